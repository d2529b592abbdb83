"""The chat page before a server whose models say what a test has them say; and strangers' texts in all of it (S3)."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from browser import CHROMIUM, MISSING, Browser
from pages import squeezed

from llmft_nb.forms import Post
from llmft_nb.gate import Doors, bind
from llmft_nb.pages import visible
from llmft_nb.server import DrainingServer, make_app
from llmft_nb.serving import Serving
from llmft_nb.slots import Piece

KEY = "0123456789abcdef-Key"


class FakeModel:
    "What the server asks, without a network behind it."

    def __init__(
        self,
        task: str = "instruct",
        name: str = "run",
        notice: str = "",
        says: Sequence[str] | Callable[[Any], Sequence[str]] = ("Yes",),  # Pieces of an answer, or what makes them
        found: dict[str, Any] | None = None,  # Of a text that is labelled or tagged
        base_of: str | None = None,
    ) -> None:
        self.name, self.predictor, self.base_of = name, SimpleNamespace(task=task, notice=notice), base_of
        self.metadata, self.says, self.found = {"notice": notice} if notice else {}, says, found
        self.asker = SimpleNamespace(question=self.question) if task in ("instruct", "text") else None
        self.worker, self.post = self, Post()
        self.alive, self.counts = True, (0, 0)
        self.asked: list[Any] = []  # What it was asked
        self.n_left = 0  # Questions whose client went away
        self.go_on = threading.Event()  # Cleared: the answer waits after its first piece
        self.go_on.set()
        self.fault: Exception | None = None  # Raised by the line
        self.breaks = False  # Whether an answer breaks after its first piece

    def describe(self) -> dict[str, Any]:
        found = {"id": self.name, "object": "model", "task": self.predictor.task, "metadata": self.metadata}
        return found | ({"base_of": self.base_of} if self.base_of else {})

    def question(self, asked: Any, tell: Any) -> Any:
        def told(piece: Piece) -> None:
            tell(piece)
            self.post.send()

        return SimpleNamespace(asked=asked, tell=told, prompt_ids=[], ids=[], gone=False, n_likely=None)

    def check_line(self) -> None:
        if self.fault is not None:
            raise self.fault

    def put(self, question: Any) -> None:
        self.check_line()
        self.asked.append(getattr(question, "asked", None) or question.texts)
        if self.asker is None:
            question.tell([self.found for _ in question.texts])
            self.post.send()
        else:
            threading.Thread(target=self.answer, args=(question,), daemon=True).start()

    def answer(self, question: Any) -> None:
        pieces = self.says(question.asked) if callable(self.says) else self.says
        for k, piece in enumerate(pieces):
            question.tell(Piece(text=piece))
            while k == 0 and not self.go_on.wait(0.01) and not question.gone:
                pass
            if question.gone:
                self.n_left += 1
                return
            if self.breaks:
                question.tell(Piece(reason="error"))
                return
        question.tell(Piece(reason="stop"))

    def stop(self) -> None:
        pass


@contextlib.contextmanager
def served_here(*models: Any, key: str | None = None) -> Iterator[tuple[str, DrainingServer]]:
    "Address and server, in a thread of this process."
    taken = bind("127.0.0.1", 0)
    serving = Serving(models)
    server = DrainingServer(make_app(serving, Doors(key)), drain_s=1)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/", server
    finally:
        server.should_exit = True
        thread.join()
        serving.stop()


def ready(browser: Browser, address: str, rest_s: float = 0) -> None:
    "Open the page, and wait until it knows what is served."
    browser.open(address, rest_s)
    browser.until("['ask', 'door', 'lost'].some((id) => !document.getElementById(id).hidden)")


def ask(browser: Browser, text: str, n_answers: int = 1) -> None:
    "Write into the box, press Enter, and wait for the end."
    browser.click("#box")
    browser.type(text)
    browser.press("Enter")
    finished(browser)


def finished(browser: Browser) -> None:
    "Wait until nothing is being written."
    browser.until("document.getElementById('stop').hidden && !document.querySelector('[aria-busy]')")


def said(browser: Browser, place: int = -1) -> str:
    "The text of one of the answers."
    return str(browser.run(f"[...document.querySelectorAll('.answer .said')].at({place}).textContent"))


def text_of(browser: Browser, name: str) -> str:
    "The text of an element, by its id."
    return str(browser.run(f"document.getElementById('{name}').innerText"))


# --- strangers' texts: figure S3 ---

LAX = b"default-src * data: 'unsafe-inline' 'unsafe-eval'"
# What the page is made of: a text that became markup, or an attribute, would show
SKELETON = """(() => {
  for (const one of document.querySelectorAll("details")) one.open = true;
  const told = [];
  for (const one of document.querySelectorAll("*"))
    told.push(one.tagName + [...one.attributes].map(({name, value}) =>
      /^(href|src|action|srcset|data|ping|style|id|class|type|role|dir)$/.test(name)
        ? `${name}=${value.replace(/^hue[0-3]$/, "hue")}` : name).sort());
  return told;
})()"""
TOUCH = """(() => {
  for (const one of document.querySelectorAll("main *, header *"))
    for (const kind of ["mouseover", "mouseenter", "toggle", "animationstart", "load", "error"])
      one.dispatchEvent(new Event(kind));
})()"""


def fake_spans(texts: Sequence[str]) -> dict[str, Any]:
    "An answer that marks all of `words_for`, each part with one of the texts as its label."
    spans, place = [], 0
    for text in texts:
        word = "word" if len(texts) > 1 else text
        spans.append({"label": text, "start": place, "stop": place + len(word), "text": word, "score": 0.5})
        place += len(word) + 1
    return {"tags": [], "spans": spans}


def words_for(texts: Sequence[str]) -> str:
    "What is tagged."
    return " ".join(["word"] * len(texts)) if len(texts) > 1 else texts[0]


def talk_of(browser: Browser, texts: Sequence[str], task: str, lax: bool) -> tuple[list[str], str, list[str]]:
    "Skeleton and text of a page in which all that a stranger can write is one of some texts, and what went wrong."
    name, notice = texts[0].replace("\x00", ""), texts[-1]  # A name that could not be asked for
    parts = ["\n".join(texts[k : k + 8]) for k in range(0, len(texts), 8)]
    options: dict[str, Any] = {"says": lambda asked: [parts[len(models[0].asked) - 1], ""]}
    if task == "classify":
        options = {"found": {"label": texts[0], "probabilities": {text: 1 / (k + 2) for k, text in enumerate(texts)}}}
    elif task == "tag":
        options = {"found": fake_spans(texts)}
    models = [FakeModel(task, name, notice, **options)]
    if task in ("instruct", "text"):
        models.append(FakeModel(task, f"base {name}", notice, **options, base_of=name))
    with served_here(*models) as (address, server):
        if lax:
            server.gate.pages = dict.fromkeys(server.gate.pages, LAX)
        ready(browser, address)
        if len(models) > 1:
            browser.click("#both")
        for text in parts if task in ("instruct", "text") else [words_for(texts)]:
            ask(browser, text)
        wrong = browser.complaints()
        skeleton = browser.run(SKELETON)
        browser.run(TOUCH)
        browser.run("new Promise(done => setTimeout(done, 50))")
        wrong += browser.complaints()
        wrong += [f"asked for {one}" for one in browser.addresses() if not one.startswith(address)]
        return skeleton, squeezed(browser.run("document.body.innerText")), list(dict.fromkeys(wrong))


def check_chat(
    texts: Sequence[str], folder: Path, tasks: Sequence[str] = ("instruct", "text", "classify", "tag")
) -> str:
    "S3: ask with, and be answered by, strangers' texts, under the page's policy and without; what is wrong, or ''."
    if CHROMIUM is None:
        return MISSING
    found: list[str] = []
    plain = [f"plain {k}" for k in range(len(texts))]
    with Browser(folder / "chat-profile") as browser:
        browser.look(1280)
        for task in tasks:
            expected, _, wrong = talk_of(browser, plain, task, False)
            assert not wrong, wrong
            for lax in (False, True):
                skeleton, shown, wrong = talk_of(browser, texts, task, lax)
                odd = [f"{a} is {b}" for a, b in zip(expected, skeleton, strict=False) if a != b][:3]
                odd += (
                    [f"{len(skeleton)} elements instead of {len(expected)}"] if len(skeleton) != len(expected) else []
                )
                odd += [
                    f"not shown: {text}" for text in texts if squeezed(visible(text, 60).removesuffix("…")) not in shown
                ]
                found += [f"chat page, {task}{', no policy' * lax}: {one}" for one in [*wrong, *odd]]
    return "; ".join(found)[:4000]


# --- a real run ---


def make_tuned(folder: Path, **settings: Any) -> Path:
    "A finished run whose model is not its base any more, with the record of the base."
    from dataclasses import asdict

    import torch

    from llmft_nb.core import RunRecord, write_record
    from llmft_nb.modeling import LLMForCausalLM

    made = LLMForCausalLM.from_pretrained("tiny")
    with torch.no_grad():
        for weight in list(made.network.parameters())[-20:]:
            weight.mul_(1 + 0.9 * torch.rand(weight.shape, generator=torch.Generator().manual_seed(5)))
    made.save_pretrained(folder / "model")
    notice = {"notice": "fictional, not medical advice"}
    write_record(folder, RunRecord("instruct", "finished", asdict(made.source), notice, settings, {}, {}))
    return folder
