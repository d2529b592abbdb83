"""The chat page as people meet it: with mouse and keys, in a real browser, by those who see it and those who hear it.

S3 on this page is here in short, and singly in `make torture`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chat_pages
import pytest
import served
from browser import CHROMIUM, MISSING, Browser
from chat_pages import KEY, FakeModel, ask, check_chat, finished, make_tuned, ready, said, served_here, text_of
from pages import PAYLOADS
from test_browser import CONTRAST, LONG, WIDER
from typer.testing import CliRunner

from llmft_nb import chat_page
from llmft_nb.gate import Doors
from llmft_nb.modeling import LLMForCausalLM, LLMForSequenceClassification, LLMForTokenClassification, size_head
from llmft_nb.predict import Predictor, load_predictor, open_chat, write_on
from llmft_nb.serving import ServedModel
from llmft_nb.tags import character_spans, split_words
from llmft_nb.wire import BadRequest
from llmft_nb.worker import Asker

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=MISSING)

NOTICE = "Fictional products, for teaching; not reviewed by a pharmacist, not medical advice."
HELD = "document.querySelector('.answer:last-of-type .said').textContent"
EMOJI = "🤒👩‍🔬 May I take ibuprofen 𝒙 with Ellorquay?"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as one:
        one.look(1280)
        yield one


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    settings = {"max_new_tokens": 16, "max_length": 256, "system": "You know the pharmacy.", "no_repeat_ngram": 4}
    return make_tuned(tmp_path_factory.mktemp("run") / "run", **settings, prompt_template="Customer: {text}")


@pytest.fixture(scope="module")
def predictor(run: Path) -> Predictor:
    return load_predictor(run)


def tagged(text: str) -> dict[str, Any]:
    "As `predict` answers: ibuprofen is a drug, Ellorquay a product."
    words = split_words(text)
    tags = ["B-drug" if w.text == "ibuprofen" else "B-product" if w.text == "Ellorquay" else "O" for w in words]
    return {"tags": tags, "spans": character_spans(text, words, tags, [0.5] * len(words))}


def quiet(browser: Browser, address: str) -> None:
    "See that nothing was said on the console, and nobody else was asked."
    assert browser.complaints() == []
    assert all(one.startswith(address) for one in browser.addresses()), browser.addresses()


# --- what is answered ---


def test_a_served_run_is_asked_as_predict_asks(
    run: Path, predictor: Predictor, browser: Browser, tmp_path: Path
) -> None:
    "The command itself, with its key and its base: answers are those of `predict`, and the base hears the same."
    questions, session = ["May I take both of them?", "And for how long?"], open_chat(predictor)
    expected = ["".join(session.ask(text)) for text in questions]
    untuned = dataclasses.replace(predictor, model=LLMForCausalLM.from_pretrained("tiny").eval())
    messages = [message for message in session.messages if message["role"] != "system"]
    prompts = [Asker(untuned).prompt_ids(messages[: 2 * k + 1]) for k in range(2)]
    others = [answer["completion"] for answer in write_on(untuned, prompts)]
    assert set(expected).isdisjoint(others)
    with served.serving(run, tmp_path, "--base") as server:
        address = f"http://127.0.0.1:{server.port}/"
        ready(browser, address)
        browser.click("#key")
        browser.type(KEY)
        browser.press("Enter")
        browser.until("!document.getElementById('ask').hidden")
        browser.click("#both")
        for text in questions:
            ask(browser, text)
        assert [said(browser, place) for place in (0, 2)] == expected
        assert [said(browser, place) for place in (1, 3)] == others
        assert [one["id"] for one in server.ask("GET", "/v1/models")[2]["data"]] == ["run", "base"]
        assert text_of(browser, "notice") == "fictional, not medical advice" and text_of(browser, "name") == "run"
        assert all(one.startswith(address) for one in browser.addresses())
        browser.click("#anew")
        browser.click("#both")
        browser.click("#settings summary")
        browser.click("#most")
        browser.type("400")
        browser.click("#box")
        browser.type("Tell me all of it.")
        browser.press("Enter")
        browser.until(f"{HELD}.length > 4")
        assert server.active() == 1
        browser.click("#stop")
        left_s = time.monotonic()
        while server.active():
            assert time.monotonic() < left_s + 0.5, "the slot is not free"
        finished(browser)
        assert len(said(browser)) > 4 and text_of(browser, "told") == "Stopped."


def test_a_text_is_gone_on_with(browser: Browser) -> None:
    model = FakeModel("text", says=[" a time", "\nthere was"])
    with served_here(model) as (address, _):
        ready(browser, address)
        ask(browser, "Once upon")
        assert said(browser) == "Once upon a time\nthere was" and model.asked[0].said == "Once upon"
        assert browser.run("document.querySelector('.given').textContent") == "Once upon"
        quiet(browser, address)


def test_probabilities_are_those_of_predict(browser: Browser, one_thread: None) -> None:
    model = LLMForSequenceClassification.from_pretrained("tiny")
    size_head(model, ["no", "yes", "perhaps", "never"])
    predictor = Predictor(model.eval(), 64, task="classify")
    expected = predictor.predict(["May I?"])[0]
    with served_here(ServedModel(predictor, "kinds")) as (address, _):
        ready(browser, address)
        ask(browser, "May I?")
        rows = browser.run("[...document.querySelectorAll('.chances tr')].map(o => [o.children[0], o.children[2]])"
                           ".map(([a, b]) => [a.textContent, b.textContent])")  # fmt: skip
        ranked = sorted(expected["probabilities"].items(), key=lambda one: -one[1])
        assert rows == [[name, f"{100 * chance:.1f} %"] for name, chance in ranked]
        assert browser.run("document.querySelector('.top').textContent") == f"{expected['label']}, {rows[0][1]}"
        widths = browser.run("[...document.querySelectorAll('.track i')].map(o => parseFloat(o.style.width))")
        assert widths == pytest.approx([100 * chance for _, chance in ranked], abs=0.1)
        quiet(browser, address)


def test_many_labels_are_folded_and_several_may_hold(browser: Browser) -> None:
    chances = {f"label {k}": 1 / (k + 1.5) for k in range(12)} | {"7": 0.9, "__proto__": 0.8}
    model = FakeModel("classify", found={"label": ["7", "__proto__"], "probabilities": chances})
    with served_here(model) as (address, _):
        ready(browser, address)
        ask(browser, "May I?")
        names = browser.run("[...document.querySelectorAll('.chances th')].map(o => o.textContent)")
        assert names == [name for name, _ in sorted(chances.items(), key=lambda one: -one[1])]
        assert browser.run("document.querySelector('.top').textContent") == "7, 90.0 %; __proto__, 80.0 %"
        assert browser.run("document.querySelector('.said details').open") is False
        assert text_of(browser, "spoken").startswith("run: 7, 90.0 %")


@pytest.mark.parametrize("kind", ["real", "made"])
def test_spans_are_marked_behind_emoji_too(kind: str, browser: Browser, one_thread: None) -> None:
    "A place counts characters as Python does; a JavaScript string counts an emoji as two."
    model: Any = FakeModel("tag", found=tagged(EMOJI))
    expected = tagged(EMOJI)["spans"]
    if kind == "real":
        made = LLMForTokenClassification.from_pretrained("tiny-encoder")
        size_head(made, ["O", "B-drug", "I-drug"])
        predictor = Predictor(made.eval(), 64, task="tag")
        model, expected = ServedModel(predictor, "run"), predictor.predict([EMOJI])[0]["spans"]
    assert expected
    with served_here(model) as (address, _):
        ready(browser, address)
        ask(browser, EMOJI)
        marks = browser.run("[...document.querySelectorAll('mark')].map(o => [o.firstChild.data.trim(),"
                            " o.querySelector('b').textContent])")  # fmt: skip
        assert [mark[0].rstrip("\xa0") for mark in marks] == [span["text"] for span in expected]
        assert [mark[1] for mark in marks] == [span["label"] for span in expected]
        browser.run("document.querySelectorAll('.marked b').forEach(o => o.remove())")
        shown = browser.run("document.querySelector('.marked').textContent")
        assert shown.replace("\xa0", "") == EMOJI
        quiet(browser, address)


def test_settings_are_sent_and_held_to_their_limits(browser: Browser) -> None:
    model = FakeModel()
    with served_here(model) as (address, _):
        ready(browser, address)
        ask(browser, "one")
        assert (model.asked[0].temperature, model.asked[0].max_tokens, model.asked[0].seed) == (0.0, None, 0)
        browser.run("at('settings').open = true, at('temperature').select()")
        browser.type("1.5")
        browser.click("#most")
        browser.type("7")
        ask(browser, "two")
        ask(browser, "three")
        assert (model.asked[1].temperature, model.asked[1].max_tokens) == (1.5, 7)
        assert model.asked[1].seed != model.asked[2].seed, "a drawn answer may be another one each time"
        browser.run("at('settings').open = false, at('most').value = 9000")
        browser.click("#box")
        browser.type("four")
        browser.press("Enter")
        assert browser.run("at('settings').open && document.activeElement.id") == "most"
        assert len(model.asked) == 3 and browser.run("at('box').value") == "four"


# --- how it is asked ---


def test_keys_of_the_keyboard(browser: Browser) -> None:
    "Enter sends, Shift and Enter break the line, Escape stops, and what was said until then stays in the conversation."
    model = FakeModel(says=["It depends", " on what is in it."])
    with served_here(model) as (address, _):
        ready(browser, address)
        assert browser.run("document.activeElement.id") == "box"
        browser.press("Enter")
        browser.type("  ")
        browser.press("Enter")
        assert model.asked == []
        browser.run("at('box').value = ''")
        browser.type("one")
        browser.press("Enter", shift=True)
        browser.type("two")
        browser.run("at('box').dispatchEvent(new KeyboardEvent('keydown',"
                    "{key: 'Enter', isComposing: true, bubbles: true, cancelable: true}))")  # fmt: skip
        assert model.asked == [] and browser.run("!page.asking"), "Enter ends the word that is being composed"
        model.go_on.clear()
        browser.press("Enter")
        browser.until(f"{HELD} === 'It depends'")
        assert text_of(browser, "told") == "Writing …" and text_of(browser, "spoken") == ""
        browser.type("next")
        browser.press("Enter")
        assert len(model.asked) == 1, "one question at a time"
        browser.press("Escape")
        finished(browser)
        until_s = time.monotonic() + 2
        while not model.n_left and time.monotonic() < until_s:
            time.sleep(0.01)
        assert model.n_left == 1 and said(browser) == "It depends" and text_of(browser, "told") == "Stopped."
        model.go_on.set()
        assert browser.run("at('box').value") == "next"
        browser.press("Enter")
        finished(browser)
        assert [one["content"] for one in model.asked[1].said] == ["one\ntwo", "It depends", "next"]
        assert text_of(browser, "spoken") == "run: It depends on what is in it."
        browser.click("#anew")
        ask(browser, "fresh")
        assert [one["content"] for one in model.asked[2].said] == ["fresh"]
        quiet(browser, address)


def test_all_of_it_can_be_reached_by_the_tabulator(browser: Browser) -> None:
    with served_here(FakeModel(), FakeModel(name="base", base_of="run")) as (address, _):
        ready(browser, address)
        reached = []
        for _ in range(6):
            browser.press("Tab")
            reached.append(browser.run("document.activeElement.id || document.activeElement.tagName"))
            outline = browser.run("getComputedStyle(document.activeElement).outlineWidth")
            assert outline == "3px" or reached[-1] == "BODY", reached
        assert reached[:3] == ["send", "both", "SUMMARY"] and {"anew", "talk"} <= set(reached), reached
        browser.run("at('both').focus()")
        browser.press(" ")
        browser.run("at('box').focus()")
        browser.type("May I?")
        browser.press("Tab")
        browser.press("Enter")
        finished(browser)
        assert len(browser.run("[...document.querySelectorAll('.answer')].map(o => o.ariaLabel)")) == 2
        assert browser.run("document.activeElement.id") == "box"


def test_who_hears_the_page_hears_its_names_and_whole_answers(browser: Browser) -> None:
    with served_here(FakeModel(), FakeModel(name="base", base_of="run")) as (address, _):
        ready(browser, address)
        browser.run("at('settings').open = true")
        ask(browser, "May I?")
        found = browser.controls()
        assert all(name for _, name in found), found
        assert {role for role, _ in found} >= {"textbox", "button", "switch", "spinbutton", "log"}, found
        assert ("textbox", "Your question") in found and ("button", "New conversation") in found
        places = {"banner": "header", "main": "main", "form": "#ask", "log": "[role=log][aria-live=off]"}
        places |= {"status": "#told[role=status]", "alert": "#wrong[role=alert]", "note": "#notice[role=note]"}
        assert all(browser.run(f"!!document.querySelector('{place}')") for place in places.values())
        live = "'[aria-live=polite], [aria-live=assertive], [role=status], [role=alert]'"
        assert browser.run(f"document.querySelector('.said').closest({live})") is None
        assert browser.run(f"at('spoken').matches({live})") is True


# --- the key ---


def test_the_page_asks_for_the_key(browser: Browser) -> None:
    model = FakeModel()
    with served_here(model, key=KEY) as (address, server):
        ready(browser, address)
        assert browser.run("document.activeElement.id") == "key" and text_of(browser, "refused") == ""
        for wrong in (KEY[:-1], KEY.swapcase(), "Schlüssel-0123456789"):
            browser.type(wrong)
            browser.press("Enter")
            browser.until("at('refused').textContent === 'That is not the key.'")
            browser.run("at('refused').textContent = ''")
            assert browser.run("at('ask').hidden && at('key').value === ''")
        browser.type(KEY)
        browser.click("#door button")
        browser.until("!at('ask').hidden")
        ask(browser, "May I?")
        assert said(browser) == "Yes"
        kept = "JSON.stringify([location.href, document.documentElement.outerHTML, document.cookie, {...localStorage},"
        assert KEY not in browser.run(f"{kept} {{...sessionStorage}}, history.state])")
        assert not any(KEY in one for one in browser.addresses())
        server.gate.doors = Doors("another-key-of-16-signs")
        ask(browser, "And now?")
        assert text_of(browser, "refused") == "The server no longer takes this key."
        browser.type("another-key-of-16-signs")
        browser.press("Enter")
        browser.until("!at('ask').hidden")
        assert browser.run("at('box').value") == "And now?"
        browser.press("Enter")
        finished(browser)
        assert [one["content"] for one in model.asked[-1].said] == ["May I?", "Yes", "And now?"]


# --- what goes wrong ---


def test_what_goes_wrong_is_told_and_the_question_is_kept(browser: Browser) -> None:
    model = FakeModel(says=["It depends", " on it."])
    with served_here(model) as (address, server):
        ready(browser, address)
        faults = {
            "Too many questions are waiting. Try again in 7 s.": BadRequest(
                "x", code="busy", status=429, retry_after_s=7
            ),
            "The server is about to end. Try again once it is back.": BadRequest("x", code="draining", status=503),
            "This is longer than the model can read: 600 tokens. Shorten it, or begin anew.": BadRequest(
                "600 tokens", code="context_length_exceeded"
            ),
            "The server has another model now. Reload this page.": BadRequest("x", code="model_not_found", status=404),
            "The server refuses this: seed: must be an integer.": BadRequest("seed: must be an integer", status=422),
            "The model failed at this. Try again; if it fails again, the server's log says why.": ValueError("secret"),
        }
        for words, fault in faults.items():
            model.fault = fault
            browser.run("at('box').value = ''")
            ask(browser, "May I?")
            assert text_of(browser, "wrong") == words and browser.run("at('box').value") == "May I?"
            assert browser.run("document.querySelectorAll('.exchange').length") == 0 and text_of(browser, "told") == ""
        model.fault = None
        browser.click("#again")
        finished(browser)
        assert said(browser) == "It depends on it." and browser.run("at('trouble').hidden && !at('box').value")
        model.breaks = True  # In the middle of an answer, while something else is being written
        model.go_on.clear()
        browser.click("#box")
        browser.type("And now?")
        browser.press("Enter")
        browser.until("document.querySelectorAll('.answer').length === 2 && document.querySelectorAll('.answer')[1]"
                      ".querySelector('.said').textContent")  # fmt: skip
        browser.type("later")
        model.go_on.set()
        finished(browser)
        assert said(browser) == "It depends" and browser.run("at('box').value") == "later"
        assert text_of(browser, "wrong").startswith("The model failed")
        model.breaks = False
        browser.click("#again")
        finished(browser)
        asked = [one["content"] for one in model.asked[-1].said]
        assert asked == ["May I?", "It depends on it.", "And now?"], "the broken answer is no part of it"
        server.should_exit = True
    browser.run("at('box').value = ''")
    ask(browser, "Still there?")
    assert text_of(browser, "wrong").startswith("The server does not answer.")
    assert browser.run("at('box').value") == "Still there?"


def test_a_base_that_fails_leaves_the_answer(browser: Browser) -> None:
    base = FakeModel(name="base", base_of="run")
    with served_here(FakeModel(), base) as (address, _):
        ready(browser, address)
        browser.click("#both")
        base.fault = BadRequest("x", code="busy", status=429, retry_after_s=3)
        ask(browser, "May I?")
        assert said(browser, 0) == "Yes" and browser.run("at('trouble').hidden") and said(browser, 1) == ""
        note = "document.querySelector('.base .soft').textContent"
        assert browser.run(note) == "Too many questions are waiting. Try again in 3 s."
        base.fault = None
        ask(browser, "And now?")
        assert [one["content"] for one in base.asked[0].said] == ["May I?", "Yes", "And now?"]


def test_a_server_that_is_gone_when_the_page_begins(browser: Browser) -> None:
    with served_here(FakeModel()) as (address, _):
        browser.call("Network.setBlockedURLs", urls=["*/v1/models"])
        ready(browser, address)
        assert text_of(browser, "why").startswith("The server does not answer.")
        browser.call("Network.setBlockedURLs", urls=[])
        browser.click("#reach")
        browser.until("!at('ask').hidden")
        ask(browser, "May I?")
        assert said(browser) == "Yes"


# --- how it looks ---


@pytest.mark.parametrize("task", ["instruct", "text", "classify", "tag"])
def test_it_can_be_read_everywhere(task: str, browser: Browser) -> None:
    found = tagged(EMOJI) if task == "tag" else {"label": "a", "probabilities": {"a": 0.7, "b": 0.2, "c": 0.1}}
    models = [FakeModel(task, notice=NOTICE, says=["It depends."], found=found)]
    models += [FakeModel(task, "base", says=["Who?"], base_of="run")] if task == "instruct" else []
    with served_here(*models) as (address, _):
        ready(browser, address)
        if task == "instruct":
            browser.click("#both")
            browser.run("at('settings').open = true")
        ask(browser, EMOJI)
        models[0].fault = BadRequest("x", code="busy", status=429, retry_after_s=7)
        ask(browser, EMOJI)
        for width in (1280, 390, 360):
            for scheme in ("light", "dark"):
                browser.look(width, scheme)
                assert browser.run(WIDER) == [] and browser.run("at('talk').scrollWidth <= at('talk').clientWidth")
                read = browser.run(CONTRAST)
                assert read["told"] == [] and read["n"] > 12, (width, scheme, read)
                box = browser.run("JSON.parse(JSON.stringify(at('notice').getBoundingClientRect()))")
                assert 0 <= box["top"] < box["bottom"] < 900, "the notice is always in sight"
        paper = browser.run("getComputedStyle(document.body).backgroundColor")
        assert paper == "rgb(18, 22, 25)"
        browser.look(700, "dark", "print")
        assert browser.run(CONTRAST)["told"] == [] and browser.run(WIDER) == []
        assert browser.run("getComputedStyle(document.body).color") == "rgb(28, 34, 38)"
        assert browser.pdf().startswith(b"%PDF-")
    browser.look(1280)


def test_long_texts_do_not_widen_it(browser: Browser) -> None:
    word, path = LONG["word"], LONG["path"]
    for task in ("instruct", "classify", "tag"):
        spans = [{"label": word, "start": 0, "stop": len(path), "text": path, "score": 0.5}]
        found = {"tags": [], "spans": spans, "label": word, "probabilities": {word: 0.7, path: 0.3}}
        models = [FakeModel(task, word, path, says=[word, path], found=found)]
        models += [FakeModel(task, path, says=[word], base_of=word)] if task == "instruct" else []
        with served_here(*models) as (address, _):
            ready(browser, address)
            if task == "instruct":
                browser.click("#both")
            ask(browser, path)
            for width in (1280, 390, 360):
                browser.look(width)
                assert browser.run(WIDER) == [] and browser.run("at('talk').scrollWidth <= at('talk').clientWidth")
        browser.look(1280)


def test_an_answer_is_followed_unless_somebody_reads_further_up(browser: Browser) -> None:
    model = FakeModel(notice=NOTICE, says=["line\n" * 80, "end"])
    with served_here(model) as (address, _):
        ready(browser, address)
        ask(browser, "May I?")
        left = "at('talk').scrollHeight - at('talk').scrollTop - at('talk').clientHeight"
        assert browser.run(left) < 2
        model.go_on.clear()
        browser.type("Again?")
        browser.press("Enter")
        browser.until("document.querySelectorAll('.answer')[1]?.querySelector('.said').textContent")
        browser.run("at('talk').scrollTop = 0")
        model.go_on.set()
        finished(browser)
        assert browser.run("at('talk').scrollTop") == 0
        low = {"width": 640, "height": 300, "deviceScaleFactor": 1, "mobile": True}
        browser.call("Emulation.setDeviceMetricsOverride", **low)
        ask(browser, "In a low window?")
        notice = "at('notice').getBoundingClientRect().top"
        assert browser.run("innerHeight + scrollY - document.documentElement.scrollHeight") > -2
        assert browser.run(WIDER) == [] and browser.run(notice) == 0
    browser.look(1280)


# --- strangers' texts (S3; one after another in `make torture`) ---


def test_payloads_are_inert_on_the_chat_page(tmp_path: Path) -> None:
    "All of them at once."
    assert check_chat(PAYLOADS, tmp_path) == ""


HOLES = {
    "made.textContent = text": "made.innerHTML = text",
    "place.appendData(visible(piece))": "shown.said.innerHTML += piece",
}


@pytest.mark.parametrize("hole", HOLES)
def test_a_hole_in_the_page_is_seen(hole: str, browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    "The control: where text becomes markup it runs without the policy; with it, the page says so and stands still."
    read = chat_page.read_page
    assert hole.encode() in read("/page.js")
    monkeypatch.setattr(chat_page, "read_page", lambda path: read(path).replace(hole.encode(), HOLES[hole].encode()))
    assert "ran: a script" in chat_pages.talk_of(browser, [PAYLOADS[10]], "instruct", True)[2]
    with contextlib.suppress(AssertionError):
        chat_pages.talk_of(browser, [PAYLOADS[10]], "instruct", False)
    wrong = browser.complaints()
    assert any("TrustedHTML" in one for one in wrong) and not any("ran" in one for one in wrong), wrong


def test_hidden_characters_are_seen(browser: Browser) -> None:
    model = FakeModel(name="ru\u202en", notice="fic\u200btion", says=["a\u202eb\x00\ue000 👩‍🔬"])
    with served_here(model) as (address, _):
        ready(browser, address)
        ask(browser, "x\u2066y \ud83d!")
        assert said(browser) == "a⟨U+202E⟩b⟨U+0000⟩⟨U+E000⟩ 👩‍🔬" and text_of(browser, "notice") == "fic⟨U+200B⟩tion"
        assert text_of(browser, "name") == "ru⟨U+202E⟩n"
        assert browser.run("document.querySelector('.asked .said').textContent") == "x⟨U+2066⟩y \ufffd!"
        assert model.asked[0].said[0]["content"] == "x\u2066y \ufffd!"
        ask(browser, "and?")
        assert model.asked[1].said[1]["content"] == "a\u202eb\ufffd\ue000 👩‍🔬", "a NUL would be refused from now on"


@pytest.mark.parametrize("trusted", [True, False])
def test_the_policy_of_the_chat_page_is_a_second_wall(trusted: bool, browser: Browser) -> None:
    "What gets into the page all the same does not run, and asks for nothing; in browsers without trusted types too."
    tries = {
        "script": "document.body.append(Object.assign(document.createElement('script'), {text: 'canary(1)'}))",
        "markup": "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=canary(1)>')",
        "handler": "document.body.setAttribute('onclick', 'canary(1)'); document.body.click()",
        "picture": "new Image().src = 'http://127.0.0.1:9/a.png'",
        "question": "fetch('http://127.0.0.1:9/?stolen').catch(() => 0)",
        "style": "document.head.append(Object.assign(document.createElement('style'), {textContent: '*{color:red}'}))",
        "frame": "document.body.append(Object.assign(document.createElement('iframe'), {src: 'http://127.0.0.1:9/f'}))",
        "form": "(() => { const f = document.createElement('form'); f.action = 'http://127.0.0.1:9/';"
        "document.body.append(f); f.submit(); })()",
        "base": "document.head.append(Object.assign(document.createElement('base'), {href: 'http://127.0.0.1:9/'}))",
    }
    policy = chat_page.PAGE_POLICIES["/"]
    with served_here(FakeModel()) as (address, server):
        server.gate.pages = server.gate.pages | {"/": policy if trusted else policy.partition(b"; require")[0]}
        ready(browser, address)
        for name, script in tries.items():
            browser.run(f"(() => {{ try {{ {script}; }} catch (error) {{ return String(error); }} }})()")
            browser.run("new Promise(done => setTimeout(done, 20))")
            assert not browser.seen("Runtime.bindingCalled"), name
        strange = [one for one in browser.addresses() if not one.startswith(address)]
        assert set(strange) <= set(browser.blocked()), strange
        assert browser.run("getComputedStyle(document.querySelector('h1')).color") == "rgb(28, 34, 38)"
        assert browser.run("document.baseURI") == address


# --- the command ---


def told(*words: str) -> str:
    from llmft_nb.deploying import app

    done = CliRunner().invoke(app, ["serve", *words, "--base", "--port", "0", "--json"])
    assert done.exit_code == 2, done.output
    return done.stderr


def test_a_base_that_cannot_be_asked_is_refused(run: Path, tmp_path: Path) -> None:
    from llmft_nb.core import read_record, write_record

    record = read_record(run)
    for changes, words in (
        ({"task": "classify"}, "no head for these labels"),
        ({"task": "tag"}, "no head for these labels"),
        ({"model": {}}, "does not name a base"),
        ({"model": record.model | {"sha256": "0" * 64}}, "not the base that the run began with"),
        ({"model": record.model | {"kind": "folder", "name": "models/gone"}}, "not there any more"),
        ({"task": "text", "model": {"name": "tiny-encoder", "sha256": "x"}}, "not the base"),
    ):
        write_record(tmp_path, dataclasses.replace(record, **changes))
        assert words in told(str(tmp_path)), changes
    assert "no record" in told(str(tmp_path / "nowhere"))


def test_chat_pages_are_part_of_the_figure() -> None:
    import inspect

    import torture

    assert "check_chat" in inspect.getsource(torture.payload) and chat_pages.check_chat is check_chat
