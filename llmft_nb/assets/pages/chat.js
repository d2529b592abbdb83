"use strict";
// The chat page: asks this server and nobody else, and writes what it hears as text, never as markup.
// The key, the questions and the answers live in this page's memory and nowhere else.

const TASKS = {
  instruct: {
    kind: "conversation", label: "Your question", send: "Send", anew: "New",
    nothing: "Ask something. The answer appears here while it is written.",
  },
  text: {
    kind: "continuation", label: "A text to go on from", send: "Go on", anew: "Clear",
    nothing: "Give the beginning of a text. The model goes on from it, here.",
  },
  classify: {
    kind: "classification", label: "A text to label", send: "Label", anew: "Clear",
    nothing: "Give a text. Its labels appear here, the likeliest first.",
  },
  tag: {
    kind: "tagging", label: "A text to tag", send: "Tag", anew: "Clear",
    nothing: "Give a text. What is found in it is marked here.",
  },
};
const N_SHOWN = 8; // Labels shown at once; the others are folded
const N_HUES = 4; // Colours of marks; labels beyond share them, and say their name anyway

const page = {
  key: "", // "" where none is wanted
  tuned: null, // The model, as /v1/models describes it
  base: null, // Its untuned base; null where it is not served
  turns: [], // Questions and answers that are part of the conversation
  asking: null, // AbortController of the question being answered
  failed: "", // The question that got no answer
};
const at = (id) => document.getElementById(id);

// --- text ---

// Characters that hide or turn the text around them are shown by their number; emoji keep their joiners.
const HIDDEN =
  /[\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\u{e0001}\u{e0020}-\u{e007f}\p{Cs}\p{Co}]|(?![\n\t])\p{Cc}/gu;

function visible(text) {
  return String(text).replace(HIDDEN, (one) => `⟨U+${one.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}

// The server refuses NULs and halves of emoji; each becomes one character, so that places stay what they are.
function sendable(text) {
  return text.replace(/\0|\p{Cs}/gu, "\ufffd");
}

function make(name, className = "", text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

function percent(share) {
  return `${(100 * share).toFixed(1)} %`;
}

// --- the server ---

class Refusal extends Error {
  constructor(words, status = 0, code = "") {
    super(words);
    this.status = status;
    this.code = code;
  }
}

const GONE = "The server does not answer. It may have ended, or the network is gone. Try again once it is back.";
const BROKEN = "The connection broke in the middle of the answer. Try again.";

function wordsFor(status, code, message, waitS) {
  if (status === 401) return "The key is missing or wrong.";
  if (status === 429) return `Too many questions are waiting. Try again in ${waitS || 1} s.`;
  if (code === "draining") return "The server is about to end. Try again once it is back.";
  if (code === "context_length_exceeded")
    return `This is longer than the model can read: ${message}. Shorten it, or begin anew.`;
  if (code === "model_failed" || status >= 500)
    return "The model failed at this. Try again; if it fails again, the server's log says why.";
  if (code === "model_not_found") return "The server has another model now. Reload this page.";
  if (code === "bad_origin") return "The server does not know this page's address. Open the one it was started with.";
  if (status === 413) return "This text is too long for the server. Shorten it.";
  if (code === "wrong_task") return `This page cannot ask this model: ${message}.`;
  return `The server refuses this: ${message || `status ${status}`}.`;
}

function refusal(error, status, waitS) {
  const { code = "", message = "" } = error && typeof error === "object" ? error : {};
  return new Refusal(visible(wordsFor(status, code, String(message), Number(waitS))), status, String(code));
}

async function request(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if (page.key) headers.Authorization = `Bearer ${page.key}`;
  const sent = { ...options, headers, cache: "no-store", credentials: "omit", redirect: "error" };
  const response = await fetch(path, sent).catch((error) => {
    throw error.name === "AbortError" ? error : new Refusal(GONE);
  });
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  throw refusal(body && body.error, response.status, response.headers.get("Retry-After"));
}

function post(path, body, signal) {
  return request(path, { method: "POST", body: JSON.stringify(body), signal });
}

async function* events(response) {
  const reader = response.body.getReader(), decoder = new TextDecoder();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Refusal(BROKEN);
    });
    if (done) throw new Refusal(BROKEN); // The last event never came
    held += decoder.decode(value, { stream: true });
    const whole = held.split("\n\n");
    held = whole.pop();
    for (const line of whole) {
      if (!line.startsWith("data: ")) continue; // A proxy's sign of life
      const data = line.slice(6);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw refusal(event.error, 500);
      yield event;
    }
  }
}

// --- asking ---

function writingBody(model, text) {
  const body = { model: model.id, stream: true, temperature: Number(at("temperature").value || 0) };
  if (at("most").value) body.max_tokens = Number(at("most").value);
  if (body.temperature > 0) body.seed = crypto.getRandomValues(new Uint32Array(1))[0];
  if (model.task === "text") return { ...body, prompt: text };
  const messages = page.turns.flatMap((turn) => [
    { role: "user", content: turn.question },
    { role: "assistant", content: sendable(turn.answer) },
  ]);
  return { ...body, messages: [...messages, { role: "user", content: text }] };
}

async function askWriter(model, text, shown, answer, signal) {
  const path = model.task === "text" ? "v1/completions" : "v1/chat/completions";
  const place = shown.said.appendChild(document.createTextNode(""));
  for await (const event of events(await post(path, writingBody(model, text), signal))) {
    const choice = event.choices[0];
    const piece = (choice.delta ? choice.delta.content : choice.text) || "";
    answer.text += piece;
    follow(() => place.appendData(visible(piece)));
    if (choice.finish_reason === "length") shown.note.textContent = "Cut off: as many tokens as are allowed.";
  }
  if (!answer.text.trim()) shown.note.textContent = "The model ended without a word.";
}

async function askReader(model, text, shown, answer, signal) {
  const path = model.task === "tag" ? "v1/tag" : "v1/classify";
  const found = (await (await post(path, { model: model.id, input: text }, signal)).json()).data[0];
  follow(() => (answer.text = model.task === "tag" ? showTags(found, text, shown) : showChances(found, shown)));
}

// Ask one model; it never throws: what went wrong is in the answer.
async function askModel(model, text, shown, signal) {
  const answer = { text: "", state: "done", refusal: null };
  const asked = model.task === "classify" || model.task === "tag" ? askReader : askWriter;
  shown.box.setAttribute("aria-busy", "true");
  try {
    await asked(model, text, shown, answer, signal);
  } catch (error) {
    answer.state = error.name === "AbortError" ? "stopped" : "failed";
    answer.refusal = error instanceof Refusal ? error : new Refusal(BROKEN);
    shown.note.textContent = answer.state === "stopped" ? "Stopped." : answer.refusal.message;
    shown.note.classList.toggle("bad", answer.state === "failed");
  }
  shown.box.removeAttribute("aria-busy");
  return answer;
}

async function ask(text) {
  clearTrouble();
  const models = page.base && at("both").checked ? [page.tuned, page.base] : [page.tuned];
  const shown = showExchange(text, models);
  page.asking = new AbortController();
  showBusy(true);
  const answers = await Promise.all(models.map((one, k) => askModel(one, text, shown.answers[k], page.asking.signal)));
  page.asking = null;
  showBusy(false);
  follow(() => end(text, models, answers, shown));
}

// What comes of a question: it counts as a turn of the conversation once the tuned model has said something.
function end(text, models, answers, shown) {
  const [first] = answers;
  if (first.state === "failed") {
    if (!answers.some((one) => one.text)) shown.exchange.remove();
    else shown.exchange.append(make("p", "soft", "This question is not part of the conversation."));
    at("nothing").hidden = at("talk").childElementCount > 1;
    return fail(text, first.refusal);
  }
  if (first.text.trim()) page.turns.push({ question: text, answer: first.text });
  const said = answers.map((one, k) => `${shownName(models[k])}: ${one.text || one.refusal?.message || "nothing"}`);
  at("told").textContent = first.state === "stopped" ? "Stopped." : "Answered.";
  at("spoken").textContent = visible(said.join("\n"));
}

function fail(text, refused) {
  page.failed = text;
  if (!at("box").value) at("box").value = text;
  at("told").textContent = "";
  if (refused.status === 401) return showDoor(page.key ? "The server no longer takes this key." : "");
  at("wrong").textContent = refused.message;
  at("trouble").hidden = false;
}

function clearTrouble() {
  page.failed = at("wrong").textContent = at("spoken").textContent = "";
  at("trouble").hidden = true;
}

function stop() {
  if (page.asking) page.asking.abort();
}

// --- showing ---

function shownName(model) {
  return visible(model === page.base ? `${model.id} (untuned)` : model.id);
}

function showExchange(text, models) {
  const exchange = make("article", "exchange"), answers = make("div", models.length > 1 ? "answers two" : "answers");
  const asked = make("div", "asked"), question = make("p", "said", visible(text));
  const isContinued = page.tuned.task === "text", parts = [];
  exchange.setAttribute("aria-label", `Question ${document.querySelectorAll(".exchange").length + 1}`);
  question.dir = "auto";
  asked.append(make("p", "who", "You"), question);
  for (const model of models) {
    const box = make("div", model === page.base ? "answer base" : "answer"), said = make("div", "said");
    const note = make("p", "soft");
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", `Answer of ${shownName(model)}`);
    said.dir = "auto";
    if (isContinued) said.append(make("span", "given", visible(text)));
    box.append(make("p", "who", shownName(model)), said, note);
    answers.append(box);
    parts.push({ box, said, note });
  }
  exchange.append(...(isContinued ? [answers] : [asked, answers]));
  at("nothing").hidden = true;
  at("talk").append(exchange);
  scroller().scrollTop = scroller().scrollHeight;
  return { exchange, answers: parts };
}

function chanceRow(label, chance, isChosen) {
  const row = make("tr", isChosen ? "chosen" : ""), name = make("th", "", visible(label)), cell = make("td", "track");
  const bar = make("i");
  name.scope = "row";
  name.dir = "auto";
  bar.style.width = `${100 * Math.min(1, Math.max(0, chance))}%`;
  cell.setAttribute("aria-hidden", "true");
  cell.append(bar);
  row.append(name, cell, make("td", "number", percent(chance)));
  return row;
}

function chanceTable(rows, chosen, name) {
  const table = make("table", "chances");
  table.setAttribute("aria-label", name);
  table.createTBody().append(...rows.map(([label, chance]) => chanceRow(label, chance, chosen.includes(label))));
  return table;
}

function showChances(found, shown) {
  const chosen = Array.isArray(found.label) ? found.label : [found.label];
  const rows = Object.entries(found.probabilities).sort((one, other) => other[1] - one[1]);
  const words = chosen.map((label) => `${visible(label)}, ${percent(found.probabilities[label])}`).join("; ");
  shown.said.append(make("p", "top", words || "no label"));
  shown.said.append(chanceTable(rows.slice(0, N_SHOWN), chosen, "Probabilities by label"));
  if (rows.length > N_SHOWN) {
    const others = make("details"), rest = rows.slice(N_SHOWN);
    others.append(make("summary", "", `${rest.length} more labels`), chanceTable(rest, chosen, "Other probabilities"));
    shown.said.append(others);
  }
  return words || "no label";
}

// Places of spans count characters as Python does; a JavaScript string counts an emoji as two.
function showTags(found, text, shown) {
  const characters = Array.from(text), labels = [...new Set(found.spans.map((span) => span.label))].sort();
  const cut = (start, stop) => visible(characters.slice(start, stop).join(""));
  const list = make("ul", "spans"), marked = make("p", "marked");
  let place = 0;
  for (const { label, start, stop, score } of found.spans) {
    const mark = make("mark", `hue${labels.indexOf(label) % N_HUES}`, cut(start, stop));
    mark.append("\u00a0", make("b", "", visible(label))); // A label stays on the line of its last word
    marked.append(cut(place, start), mark);
    list.append(make("li", "", `${visible(label)}: ${cut(start, stop)} (${percent(score)})`));
    place = stop;
  }
  marked.append(cut(place, characters.length));
  shown.said.append(marked, list);
  shown.note.textContent = found.spans.length ? "" : "Nothing found in it.";
  return [...list.children].map((one) => one.textContent).join("; ") || "nothing found";
}

// In a low window all of the page scrolls, else the talk alone.
function scroller() {
  return getComputedStyle(at("talk")).overflowY === "auto" ? at("talk") : document.scrollingElement;
}

// Change what is shown, and keep the end in sight unless somebody reads further up.
function follow(change) {
  const one = scroller(), isAtEnd = one.scrollHeight - one.scrollTop - one.clientHeight < 60;
  change();
  if (isAtEnd) one.scrollTop = one.scrollHeight;
}

function showBusy(isBusy) {
  const had = document.activeElement;
  at("send").hidden = isBusy;
  at("stop").hidden = !isBusy;
  at("anew").disabled = isBusy;
  if (isBusy) at("told").textContent = "Writing …";
  if (had === at("send")) at("stop").focus();
  if (had === at("stop") || had === at("again")) at("box").focus();
}

function showModel() {
  const { tuned, base } = page, words = TASKS[tuned.task], writes = tuned.task === "instruct" || tuned.task === "text";
  const notice = tuned.metadata?.notice || "";
  document.title = `${visible(tuned.id)} · llmft_nb`;
  at("name").textContent = visible(tuned.id);
  at("kind").textContent = `· ${words.kind}`;
  at("notice").textContent = visible(notice);
  at("notice").hidden = !notice;
  at("label").textContent = words.label;
  at("send").textContent = words.send;
  at("anew").replaceChildren(words.anew, make("span", "long", words.anew === "New" ? " conversation" : ""));
  at("nothing").textContent = words.nothing;
  at("settings").hidden = !writes;
  at("beside").hidden = !base;
  for (const id of ["anew", "talk", "ask"]) at(id).hidden = false;
  at("door").hidden = at("lost").hidden = true;
  at("box").focus();
}

function showDoor(words) {
  page.key = "";
  for (const id of ["anew", "talk", "ask", "lost"]) at(id).hidden = true;
  at("door").hidden = false;
  at("refused").textContent = words;
  at("key").focus();
}

// --- beginning ---

async function begin() {
  try {
    const models = (await (await request("v1/models")).json()).data;
    page.tuned = models[0];
    page.base = models.find((one) => one.base_of === page.tuned.id) || null;
    if (!TASKS[page.tuned.task]) throw new Refusal(`This page does not know the task ${visible(page.tuned.task)}.`);
    showModel();
  } catch (error) {
    if (error.status === 401) return showDoor(page.key ? "That is not the key." : "");
    for (const id of ["anew", "talk", "ask", "door"]) at(id).hidden = true;
    at("lost").hidden = false;
    at("why").textContent = error instanceof Refusal ? error.message : GONE;
  }
}

function enter(event) {
  event.preventDefault();
  const key = at("key").value.trim();
  at("key").value = "";
  if (!/^[!-~]+$/.test(key)) return showDoor("That is not the key."); // No header could hold it
  page.key = key;
  begin();
}

function submit(event) {
  event.preventDefault();
  const text = sendable(at("box").value), fields = [at("temperature"), at("most")];
  if (page.asking || !text.trim()) return;
  if (!fields.every((one) => one.validity.valid)) {
    at("settings").open = true;
    fields.find((one) => !one.reportValidity());
    return;
  }
  at("box").value = "";
  ask(text);
}

function retry() {
  const text = page.failed;
  if (at("box").value === text) at("box").value = "";
  at("box").focus();
  ask(text);
}

function beginAnew() {
  page.turns = [];
  clearTrouble();
  for (const one of document.querySelectorAll(".exchange")) one.remove();
  at("nothing").hidden = false;
  at("told").textContent = "";
  at("box").focus();
}

function pressed(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  at("ask").requestSubmit();
}

at("door").addEventListener("submit", enter);
at("ask").addEventListener("submit", submit);
at("ask").noValidate = true; // Checked in `submit`, which opens the settings first
at("box").addEventListener("keydown", pressed);
at("stop").addEventListener("click", stop);
at("again").addEventListener("click", retry);
at("reach").addEventListener("click", begin);
at("anew").addEventListener("click", beginAnew);
document.addEventListener("keydown", (event) => event.key === "Escape" && stop());
begin();
