"""What a browser makes of the pages: nothing runs or is fetched, nothing is cut off, and everything can be read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pages
import pytest
from browser import CHROMIUM, MISSING, Browser
from pages import PAYLOADS, TASKS, all_pages, check_payloads, make_compared, make_run
from small import small_rows, write_jsonl

from llmft_nb import pages as engine
from llmft_nb.comparison import weigh_runs
from llmft_nb.comparison_page import render_comparison, write_comparison
from llmft_nb.data_card import write_data_card
from llmft_nb.finetune import finetune
from llmft_nb.rejects import Rejects
from llmft_nb.report import render_report
from llmft_nb.splits import survey_rows
from llmft_nb.tasks import make_task

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=MISSING)

# Every text of a page: how it stands out against what is behind it, as WCAG 2 reckons it
CONTRAST = """(() => {
  const parse = (text) => {
    const [r, g, b, a = 1] = (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
    return text.startsWith("color(") ? [r * 255, g * 255, b * 255, a] : [r, g, b, a];
  };
  const over = ([r, g, b, a], [x, y, z]) => [r * a + x * (1 - a), g * a + y * (1 - a), b * a + z * (1 - a), 1];
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = (one) => {
    const layers = [];
    for (; one; one = one.parentElement) layers.push(parse(getComputedStyle(one).backgroundColor));
    return layers.reverse().reduce((base, layer) => over(layer, base), [255, 255, 255, 1]);
  };
  const told = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let n = 0, least = 99;
  for (let node; (node = walk.nextNode()); ) {
    const one = node.parentElement, style = getComputedStyle(one), box = one.getBoundingClientRect();
    if (!node.data.trim() || !box.width || style.visibility !== "visible" || one.closest("style")) continue;
    const back = behind(one), ink = over(parse(one.closest("svg") ? style.fill : style.color), back);
    const [a, b] = [light(ink), light(back)].sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05);
    n += 1;
    least = Math.min(least, ratio);
    if (ratio < 4.5) told.push(`${node.data.trim().slice(0, 40)}: ${ratio.toFixed(2)}`);
  }
  return {n, least, told};
})()"""
WIDER = """(() => {
  const edge = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth <= edge) return [];
  return [...document.querySelectorAll("main *")].filter((one) => one.scrollWidth > edge
    || one.getBoundingClientRect().right > edge + 1)
    .slice(0, 5).map((one) => `${one.tagName}.${one.className} ${one.textContent.slice(0, 40)}`)
    .concat(document.documentElement.scrollWidth);
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as one:
        yield one


@pytest.fixture(scope="module")
def real_pages(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> dict[str, Path]:
    "The report of a small run of each task, and the card of its rows; runs compared, with a winner and without one."
    folder, labelled = tmp_path_factory.mktemp("real"), small_rows(60)
    words = [row["text"].split()[:6] for row in labelled]
    rows: dict[str, list[dict[str, Any]]] = {
        "classify": labelled,
        "tag": [{"tokens": said, "ner_tags": ["B-n" if one.isdigit() else "O" for one in said]} for said in words],
        "instruct": [{"prompt": row["text"], "completion": f"a {row['label']}"} for row in labelled],
        "text": [{"text": f"{row['text']}, a {row['label']}. " * 4} for row in labelled],
    }
    found: dict[str, Path] = {}
    for task in TASKS:
        data = write_jsonl(folder / f"{task}.jsonl", rows[task] + rows[task][:2])
        model = "tiny-encoder" if task == "tag" else "tiny"
        options: dict[str, Any] = {"epochs": 1, "max_length": 64, "batch_size": 16, "precision": "f32", "callbacks": ()}
        options |= {"max_new_tokens": 8} if task == "instruct" else {}
        strategy = "lora:4" if task == "instruct" else "top:1"
        options |= {"general": [row["text"] for row in small_rows(12, seed=1)]}
        asked = None if task == "text" else labelled[0]["text"]
        run = finetune(data, task=task, model=model, strategy=strategy, out=folder / task, question=asked, **options)
        found[f"{task}-report"] = run.folder / "report.html"
        if task != "text":
            found[f"{task}-card"] = folder / f"{task}.html"
            survey = survey_rows(
                [data, data],
                task=make_task(task, None).rows,
                name=task,
                rejects=Rejects(),  # type: ignore[arg-type]
            )
            write_data_card(found[f"{task}-card"], survey)
        if task == "classify":
            other = finetune(data, task=task, model=model, strategy="head", out=folder / "other", **options)
            compared, found["comparison"] = write_comparison([run.folder, other.folder])
            assert len(compared.leading) == 2, "a page on which no name is bold"
    won = weigh_runs(make_compared("classify", ["plain"]))
    assert won.mark(0) == "best"
    found["winner"] = folder / "winner.html"
    found["winner"].write_text(render_comparison(won), encoding="utf-8")
    return found


# Strangers' texts (S3; one text after another in `make torture`)


def test_payloads_are_inert_on_every_page(tmp_path: Path) -> None:
    "All of them at once; the first stands in each place, and so does a second one that is made of several."
    assert check_payloads(PAYLOADS, tmp_path) == ""


@pytest.mark.parametrize("hole", ["autoescape", "visible", "markdown_text", "fence_text"])
def test_a_hole_is_seen(hole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "The control: each wall taken away by itself."
    if hole == "autoescape":
        monkeypatch.setattr(engine.page_environment(False), "autoescape", False)
        html = engine.page_environment(False)
        html.cache.clear()  # type: ignore[union-attr]
    else:
        monkeypatch.setattr(engine, hole, str if hole != "fence_text" else engine.Markup)
        engine.page_environment.cache_clear()
    texts = ["\u202eefas" + PAYLOADS[0], PAYLOADS[10]] if hole == "visible" else [PAYLOADS[0], PAYLOADS[10]]
    try:
        told = check_payloads(texts, tmp_path, ("classify",))
    finally:
        monkeypatch.undo()
        engine.page_environment.cache_clear()
    ran = "ran: a script" in told
    assert ("comparison.html: " in told) is (hole in ("autoescape", "visible")), told
    assert ran if hole in ("autoescape", "markdown_text") else told if hole == "visible" else not ran, told


def test_the_policy_is_a_second_wall(browser: Browser, tmp_path: Path) -> None:
    "A script that gets into a page all the same runs without the policy, and does not with it."
    page = render_report(make_run("classify", ["plain"])).replace("</main>", f"{PAYLOADS[0]}{PAYLOADS[11]}</main>")
    (tmp_path / "closed.html").write_text(page, encoding="utf-8")
    (tmp_path / "open.html").write_text(pages.POLICY.sub("", page), encoding="utf-8")
    browser.open(tmp_path / "open.html")
    assert browser.complaints()[0] == "ran: a script" and len(browser.addresses()) > 1
    browser.open(tmp_path / "closed.html")
    page_alone = [(tmp_path / "closed.html").as_uri()]
    assert not browser.seen("Runtime.bindingCalled") and browser.addresses() == page_alone + browser.blocked()


# What a reader sees


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_real_pages_can_be_read_everywhere(scheme: str, real_pages: dict[str, Path], browser: Browser) -> None:
    for name, page in real_pages.items():
        for width in (1280, 390, 360):
            browser.look(width, scheme)
            browser.open(page, rest_s=0.02)
            assert browser.complaints() == [] and browser.addresses() == [page.as_uri()], name
            assert browser.run(WIDER) == [], (name, width)
            found = browser.run(CONTRAST)
            assert found["told"] == [] and found["n"] > 60, (name, width, scheme, found)
    paper = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(18, 22, 25)") is (scheme == "dark"), paper


def test_pages_are_printed_dark_on_white(real_pages: dict[str, Path], browser: Browser) -> None:
    for name, page in real_pages.items():
        browser.look(700, "dark", "print")
        browser.open(page, rest_s=0.02)
        found = browser.run(CONTRAST)
        assert found["told"] == [] and browser.run(WIDER) == [], (name, found)
        ink = browser.run("getComputedStyle(document.body).color")
        assert ink == "rgb(28, 34, 38)", ink
        behind = (
            "[document.body, ...document.querySelectorAll('section')].map(o => getComputedStyle(o).backgroundColor)"
        )
        assert set(browser.run(behind)) == {"rgba(0, 0, 0, 0)"}, name
        assert browser.run("getComputedStyle(document.querySelector('tr')).breakInside") == "avoid"
        assert browser.pdf().startswith(b"%PDF-")


LONG = {
    "word": "Donaudampfschifffahrtsgesellschaft" * 4,
    "path": "/srv/very/long/path/of/somebody/" * 6 + "rows.jsonl",
    "name": "a_name_of_many_parts_" * 6,
    "blanks": "many short words " * 12,
}


@pytest.mark.parametrize("kind", sorted(LONG))
def test_long_names_do_not_widen_a_page(kind: str, browser: Browser, tmp_path: Path) -> None:
    texts = [LONG[kind], *(f"{LONG[kind]}{i}" for i in range(76))]
    for name, page in all_pages(texts, ("tag" if kind == "path" else "classify",)):
        if name.endswith(".md.html"):
            continue
        (tmp_path / name).write_text(page, encoding="utf-8")
        for width in (1280, 390, 360):
            browser.look(width)
            browser.open(tmp_path / name, rest_s=0)
            assert browser.run(WIDER) == [], (name, width)


def test_what_a_page_is_held_against_would_be_seen(browser: Browser, tmp_path: Path) -> None:
    "The control: a page that is too wide, too pale, and asks for something."
    wide = "<!doctype html><meta name=viewport content=width=device-width><main>"
    wide += "<p style='width:800px;color:#999;background:#fff'>pale</p><img src=none.png></main>"
    (tmp_path / "page.html").write_text(wide, encoding="utf-8")
    browser.look(360)
    browser.open(tmp_path / "page.html")
    assert browser.run(WIDER) and browser.run(CONTRAST)["told"] == ["pale: 2.85"]
    assert len(browser.addresses()) == 2 and any("Failed to load" in one for one in browser.complaints())
