"""The data card: counts by hand, strangers' words inert, equal bytes each time, and answers that a limit cuts away."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from small import write_jsonl
from test_mistakes import llmft
from test_report import PAYLOADS, Page
from transformers import AutoTokenizer, BertTokenizer

from llmft_nb.audit import LengthReport, length_report
from llmft_nb.cleaning import CleaningReport, Match
from llmft_nb.core import UserError, assets_folder
from llmft_nb.data_card import card_values, data_card, row_facts, write_data_card
from llmft_nb.data_facts import count_bars, label_counts, label_lines, length_edges, length_facts
from llmft_nb.dialogues import InstructDataset
from llmft_nb.hparams import TrainSettings
from llmft_nb.pages import visible
from llmft_nb.rejects import Rejects
from llmft_nb.rows import Rows, read_rows
from llmft_nb.splits import Survey, survey_rows
from llmft_nb.suspects import Suspect
from llmft_nb.tagging import TagDataset
from llmft_nb.tasks import make_task
from llmft_nb.tokens import NO_TARGET

ROOT = Path(__file__).resolve().parents[1]


class Tables(HTMLParser):
    "The cells of all rows of all tables of a page."

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.rows: list[list[str]] = []
        self.inside = False
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in {"td", "th"}:
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in {"td", "th"}

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] = f"{self.rows[-1][-1]} {' '.join(data.split())}".strip()


def addresses(page: str) -> list[str]:
    "Whatever a page points to, but for parts of itself."
    found = re.findall(r"""(?i)(?:href|src|srcset|action|data|poster)\s*=\s*["']?([^"'\s>]*)""", page)
    return [address for address in found if not address.startswith("#")]


# Counts by hand


@pytest.fixture
def parcels(tmp_path: Path) -> list[Path]:
    "Six training rows and three held out, with one fault of each kind; a line that is none stands between them."
    train: list[Any] = [
        {"text": "Where is my parcel today, please tell me", "label": "delivery"},
        {"text": "Where is my parcel today, please tell me", "label": "delivery"},
        '{"text": "cut o',
        {"text": "WHERE is my parcel today, please tell me", "label": "price"},
        {"text": "What does the large parcel cost to send abroad?", "label": "price"},
        {"text": "What does the small parcel cost to send abroad?", "label": "price"},
        {"text": "Are you open?", "label": "hours"},
    ]
    test = [
        {"text": "Are you open?", "label": "hours"},
        {"text": "what does the LARGE parcel cost to send abroad?", "label": "price"},
        {"text": "Can I pay by card?", "label": "price"},
    ]
    return [write_jsonl(tmp_path / "train.jsonl", train), write_jsonl(tmp_path / "test.jsonl", test)]


def test_counts_by_hand(parcels: list[Path]) -> None:
    survey = survey_rows(parcels, rejects=Rejects(), suspects=False)
    values = card_values(survey)
    assert values["kinds"] == [
        ("train", 6, {"exact": 1, "normalised": 1, "near": 1}),
        ("test.jsonl", 3, {"exact": 1, "normalised": 1, "near": 0}),
    ]
    assert [(one["name"], one["n"], one["median"], one["longest"]) for one in values["texts"]] == [
        ("train", 6, 8, 9),
        ("test.jsonl", 3, 5, 9),
    ]
    assert values["labels"]["lines"] == [
        ("price", [(3, 3 / 6), (2, 2 / 3)]),
        ("delivery", [(2, 2 / 6), (0, 0.0)]),
        ("hours", [(1, 1 / 6), (1, 1 / 3)]),
    ]
    [[one, other]] = values["contradictions"]
    assert (one["place"], one["answer"]) == ("train.jsonl:1", "delivery")
    assert (other["place"], other["answer"], other["text"][:5]) == ("train.jsonl:4", "price", "WHERE")
    leaks, copies = values["pairs"]
    assert [(pair["kind"], pair["row"]["place"], pair["other"]["place"]) for pair in leaks[2]] == [
        ("exact", "test.jsonl:1", "train.jsonl:7"),
        ("normalised", "test.jsonl:2", "train.jsonl:5"),
    ]
    assert [(pair["kind"], pair["row"]["text"][:20], pair["other"]["text"][:20]) for pair in copies[2]] == [
        ("exact", "Where is my parcel t", "Where is my parcel t"),
        ("normalised", "WHERE is my parcel t", "Where is my parcel t"),
        ("near", "What does the small ", "What does the large "),
    ]
    assert [line["place"] for line in values["aside"]] == ["train.jsonl:3"]


def test_the_page_shows_what_was_counted(parcels: list[Path]) -> None:
    page = data_card(survey_rows(parcels, rejects=Rejects()))
    rows = Tables(page).rows
    assert ["train", "", "1", "1", "1", "6"] in rows and ["test.jsonl", "", "1", "1", "0", "3"] in rows
    assert ["price", "train 3 50.0 %", "test.jsonl 2 66.7 %"] in rows
    assert ["delivery", "train 2 33.3 %", "test.jsonl 0 0.0 %"] in rows
    assert [row[0] for row in rows if "train.jsonl:3" in row[0]] == ["train.jsonl:3"], "the row that was set aside"
    assert page.count("<svg") == 3, "two sets of lengths, and the similarity of the near copy"
    widths = re.findall(r'<i style="width:([\d.]+)%"></i></span><span>(\d+)', page)
    assert widths[0] == ("75.00", "3") and ("50.00", "2") in widths, "to the scale of the greatest share, two thirds"


def test_markdown_has_the_same_tables(parcels: list[Path]) -> None:
    card = data_card(survey_rows(parcels, rejects=Rejects()), markdown=True)
    page = MarkdownIt("commonmark").enable("table").render(card)
    rows = Tables(page).rows
    assert page.count("<h1>") == 1 and page.count("<table>") == page.count("<h2>") + 1 == 8
    assert ["train", "1", "1", "1", "6"] in rows and ["price", "3", "50.0 %", "2", "66.7 %"] in rows
    [near] = [row for row in rows if row[1:2] == ["near"]]
    assert near[3:6] == ["train.jsonl:6", "What does the small parcel cost to send abroad?", "price"]
    assert all(len(row) == len(rows[0]) or len(row) in (5, 6, 7, 9, 3) for row in rows)


def test_many_labels_end_in_others() -> None:
    counts = {"train": Counter({f"label {k:02d}": 100 - k for k in range(30)}), "test": Counter({"label 29": 1})}
    lines = label_lines(counts)
    assert len(lines) == 21 and lines[0] == ("label 00", [(100, 100 / 2565), (0, 0.0)])
    assert lines[-1] == ("others (10)", [(sum(100 - k for k in range(20, 30)), 755 / 2565), (1, 1.0)])
    alike = label_lines({"train": Counter(dict.fromkeys("tbcdefghijklmnopqrsa", 1))})
    assert [name for name, _ in alike] == list("abcdefghijklmnopqrst"), "equally common ones by name"


def test_bars_hold_every_value_once() -> None:
    for lengths in ([0], [1, 1, 1], list(range(500)), [3] * 400 + [90_000], [7, 7, 8]):
        edges = length_edges(lengths)
        assert len(edges) <= 33 and edges[0] == 0
        counts = count_bars(lengths, edges)
        assert sum(counts) == len(lengths)
        inside = [length for length in lengths if length < edges[-1]]
        for left, right, n in list(zip(edges, edges[1:], counts, strict=False))[:-1]:
            assert n == sum(left <= length < right for length in inside)
    assert length_facts([5, 1, 3, 2])["median"] == 2 and length_facts(list(range(1, 101)))["p95"] == 95


# Every task


def survey_of(task: str, rows: list[dict[str, Any]], *held_out: Any, **options: Any) -> Survey:
    return survey_rows([rows, *held_out], task=make_task(task, TrainSettings()).rows, name=task, **options)


def test_kinds_of_entities_are_counted_as_spans() -> None:
    rows = [
        {"tokens": ["Ann", "Lee", "and", "Bo"], "ner_tags": ["B-person", "I-person", "O", "B-person"]},
        {"tokens": ["in", "Rome"], "ner_tags": ["O", "B-place"]},
    ]
    survey = survey_of("tag", rows, [{"tokens": ["Rome"], "ner_tags": ["B-place"]}])
    values = card_values(survey)
    assert values["labels"]["lines"] == [("person", [(2, 2 / 3), (0, 0.0)]), ("place", [(1, 1 / 3), (1, 1.0)])]
    assert label_counts(read_rows([{"tokens": ["a"] * 3, "ner_tags": ["x", "x", "O"]}]), "tag", "plain") == {"x": 1}
    assert row_facts(survey.train, 1)["answer"] == "Rome=B-place"
    assert "Kinds of entities" in data_card(survey)


def test_answers_of_an_assistant_are_measured() -> None:
    rows = [
        {"prompt": "Say hello", "completion": "Hello there, friend"},
        {"messages": [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "one two three four"}]},
    ]
    values = card_values(survey_of("instruct", [rows[0], {"prompt": "Say hello", "completion": "Good day"}]))
    assert [(one["n"], one["longest"], one["median"]) for one in values["answers"]] == [(2, 3, 2)]
    assert [fact["answer"] for fact in values["contradictions"][0]] == ["Hello there, friend", "Good day"]
    assert card_values(survey_of("instruct", rows[1:]))["answers"][0]["longest"] == 4
    page = data_card(survey_of("instruct", rows[:1] * 2))
    assert "How long the answers are" in page and "there are many good answers" not in page


def test_plain_text_has_neither_labels_nor_answers() -> None:
    survey = survey_of(
        "text", [{"text": "One page of a book."}, {"text": "房间很大服务周到。"}, {"text": "房间很小态度恶劣。"}]
    )
    values = card_values(survey)
    assert values["unit"] == "characters" and values["texts"][0]["longest"] == 19
    assert (values["labels"]["lines"], values["answers"], values["contradictions"]) == ([], [], [])
    assert "Labels" not in data_card(survey) and "<h1>" in data_card(survey)


def test_a_held_out_set_called_train_is_told_apart(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train", [{"text": "Are you open?", "label": "a"}])
    (tmp_path / "train").rename(tmp_path / "train.jsonl")
    (tmp_path / "other").mkdir()
    folder = tmp_path / "other" / "train"
    folder.mkdir()
    write_jsonl(folder / "test.jsonl", [{"text": "Are you open?", "label": "a"}])
    survey = survey_rows([[{"text": "Are you open?", "label": "a"}, {"text": "What is it?", "label": "b"}], folder])
    assert card_values(survey)["kinds"][1] == ("train (2)", 1, {"exact": 1, "normalised": 0, "near": 0})
    assert len(card_values(survey)["texts"]) == 2


def test_the_notice_of_the_pharmacy_stands_on_its_card() -> None:
    rows = read_rows("pharmacy")
    survey = survey_rows([rows.subset(range(0, 3000, 60))])
    for card in (data_card(survey), data_card(survey, markdown=True)):
        assert "not medical advice" in card and "Apache" in card


# What strangers write


def hostile(text: str) -> tuple[Survey, LengthReport]:
    "A survey in which every word that comes from outside is `text`, and what a limit takes of it."
    rows = Rows([{"text": f"{text} {k}", "label": text} for k in range(4)], [f"{text}:{k}" for k in range(4)], text)
    match = Match(1, 0, f"{text}:1", f"{text}:0", "near", 0.7)
    report = CleaningReport(
        "classify",
        4,
        {text: 4},
        [match, replace(match, index=2, kind="exact")],
        [(f"{text}:0", f"{text}:3")],
        [replace(match, split=text)],
        [Suspect(0, text, text, 0.1, 0.9, f"{text}:0")],
    )
    rejects = Rejects()
    rejects.lines[text] = {"place": text, "reason": text, "content": text}
    findings = {"rows": "4", text: text, **report.findings()}
    lengths = LengthReport(4, 9, 8, 2, "cut", 2, 1, (text,), (text, f"{text}:1"), (text,))
    return Survey(findings, report, rows, {text: rows}, rejects), lengths


MORE = [
    "$\\frac$ $x_1$ font: 9px evil; font-family: x",
    "#010101 #010102 <g id='a_1'>",
    "]]></svg><script>alert(1)</script>",
]


@cache
def harmless_card(markdown: bool) -> str:
    "The card that every hostile one is compared with."
    return data_card(*hostile("plain"), markdown=markdown)


@pytest.mark.parametrize("payload", [*PAYLOADS, *MORE])
def test_words_of_strangers_are_inert_and_legible(payload: str) -> None:
    pictures = re.compile(r"<svg.*?</svg>", re.DOTALL)
    page, harmless = data_card(*hostile(payload)), harmless_card(False)
    assert Page(pictures.sub("", page)).tags == Page(pictures.sub("", harmless)).tags, "the text changed the page"
    tags = Page(page).tags
    assert not [tag for tag in tags if tag[0] in {"script", "iframe", "img", "a", "form", "object", "embed", "base"}]
    assert not [name for tag in tags for name in tag[1:] if name.startswith("on")]
    assert Page(page).addresses == ["data:,"]
    assert "".join(Page(page).text).count(visible(payload)) >= 20
    assert {tag[0] for tag in Page("".join(pictures.findall(page))).tags} == {
        tag[0] for tag in Page("".join(pictures.findall(harmless))).tags
    }
    for picture in pictures.findall(page):
        assert payload not in picture and "evil" not in picture


@pytest.mark.parametrize("payload", [*PAYLOADS, *MORE])
def test_markdown_keeps_its_structure(payload: str) -> None:
    def kinds(card: str) -> list[str]:
        parsed = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(card)
        assert not re.search(r"(?i)https?://|www\.|\w@\w", card), "nothing for a renderer to make a link of"
        return [kind for token in parsed for kind in (token.type, *(child.type for child in token.children or []))]

    found = kinds(data_card(*hostile(payload), markdown=True))
    assert found == kinds(harmless_card(True))
    assert not {"link_open", "image", "html_block", "html_inline", "code_inline", "strong_open"} & set(found)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_files_with_hostile_names_and_rows(payload: str, tmp_path: Path) -> None:
    "The whole way, from files on disk by the command."
    word = payload.encode("utf-8", "replace").decode().replace("\0", "")
    name = "".join(character for character in word if character not in "/\0")[:40] + ".jsonl"
    rows = [{"text": f"{word} {k} times", "label": word if k % 2 else "other"} for k in range(6)]
    train = write_jsonl(tmp_path / "train.jsonl", [*rows, rows[0], {"text": rows[1]["text"], "label": "other"}, word])
    (tmp_path / "held out").mkdir()
    exam = write_jsonl(tmp_path / "held out" / name, rows[:2])
    outcome = llmft("check", train, exam, "--card", tmp_path / "card.html", "--bad-rows", "quarantine")
    assert outcome.status == 0, outcome
    page = (tmp_path / "card.html").read_text(encoding="utf-8")
    tags = Page(page).tags
    assert not [tag for tag in tags if tag[0] in {"script", "iframe", "img", "a", "form", "object", "embed", "base"}]
    assert not [attribute for tag in tags for attribute in tag[1:] if attribute.startswith("on")]
    assert addresses(re.sub(r">[^<]*<", "><", page)) == ["data:,"]
    assert tags.count(("meta", "http-equiv", "content")) == 1 and "default-src 'none'" in page
    assert visible(word) in "".join(Page(page).text)


def test_the_policy_comes_first_and_nothing_is_loaded(parcels: list[Path]) -> None:
    page = data_card(survey_rows(parcels, rejects=Rejects()))
    policy = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', page)
    assert policy is not None and policy.group(1).startswith("default-src 'none'; style-src 'unsafe-inline'")
    tags = Page(page).tags
    assert tags.index(("meta", "http-equiv", "content")) < tags.index(("title",))
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    assert "prefers-color-scheme: dark" in page and "currentColor" in page and "#010102" not in page


# Bytes


def test_two_processes_write_the_same_bytes(parcels: list[Path], tmp_path: Path) -> None:
    "Other hash seed, home, locale and plotting preferences: the same card."
    code = """
import sys, pathlib
from llmft_nb.data_card import write_data_card
from llmft_nb.rejects import Rejects
from llmft_nb.splits import survey_rows
for ending in ("html", "md"):
    write_data_card(pathlib.Path(sys.argv[1]) / f"card.{ending}", survey_rows(sys.argv[2:], rejects=Rejects()))
"""
    outputs = []
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "matplotlibrc").write_text("lines.linewidth: 9\nfont.size: 30\n" if number else "")
        path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": str(number), "HOME": str(folder)}
        environment |= {"MPLCONFIGDIR": str(folder), "LC_ALL": ("C", "C.UTF-8")[number]}
        command = [sys.executable, "-c", code, str(folder), *map(str, parcels)]
        subprocess.run(command, env=environment, cwd=folder, check=True)
        outputs.append([(folder / f"card.{ending}").read_bytes() for ending in ("html", "md")])
    assert outputs[0] == outputs[1]


# The command


def test_the_ending_says_what_is_written(parcels: list[Path], tmp_path: Path) -> None:
    train, test = parcels
    for name, begins in (("card.html", "<!doctype html>"), ("card.md", "# train.jsonl: what was found")):
        outcome = llmft("check", train, test, "--rejects", tmp_path / "rejects.jsonl", "--card", tmp_path / name)
        assert outcome.status == 0, outcome
        text = (tmp_path / name).read_text(encoding="utf-8").lstrip()
        assert text.startswith(begins) and "test.jsonl" in text
    assert len((tmp_path / "rejects.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("name", ["card.pdf", "card", "card.htm", "card.md.txt", "html"])
def test_another_ending_is_a_mistake_told_before_the_rows_are_read(name: str, tmp_path: Path) -> None:
    outcome = llmft("check", tmp_path / "no_such_rows.jsonl", "--card", tmp_path / name)
    told = " ".join(outcome.err.split())
    assert outcome.status == 2 and "--card" in told and name in told.replace(" ", "")
    for part in ("no such kind of card", "why:", "mend:", ".html", ".md"):
        assert part in told, told
    assert "no_such_rows" not in told and not (tmp_path / name).exists()
    with pytest.raises(UserError, match="no such kind of card"):
        write_data_card(tmp_path / name, survey_rows([[{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]]))


def test_a_limit_needs_a_tokenizer(parcels: list[Path], tmp_path: Path) -> None:
    outcome = llmft("check", parcels[1], "--max-length", "16", "--json")
    assert outcome.status == 2 and json.loads(outcome.err)["error"]["where"] == "--max-length 16"
    assert llmft("check", parcels[1], "--model", tmp_path / "no_model").status == 2
    assert llmft("check", parcels[1], "--model", "tiny", "--max-length", "1").status == 2
    found = json.loads(llmft("check", parcels[1], "--json").out)
    assert "lengths" not in found and "lengths" not in found["findings"]


# Answers that are cut away


@pytest.fixture(scope="module")
def tiny() -> Any:
    return AutoTokenizer.from_pretrained(assets_folder() / "models" / "tiny")


TALKS = [
    ("Why?", "No."),
    ("Where is it?", "so " * 40),
    ("where " * 50, "On its way."),
    ("How? " * 9, "Like this. " * 9),
]


def expected_cuts(tokenizer: Any, max_length: int) -> tuple[list[int], list[int]]:
    "Rows that lose some and rows that lose all, by the numbers of the tokens that are to be said."
    some, every = [], []
    for number, (prompt, completion) in enumerate(TALKS):
        row = InstructDataset([{"prompt": prompt, "completion": completion}], tokenizer, max_length=500)[0]
        said = [k + 1 for k, label in enumerate(row["labels"]) if label != NO_TARGET]
        assert tokenizer.decode([row["input_ids"][k] for k in said]).strip().startswith(completion.strip()[:4])
        kept = [k for k in said if k < max_length]
        some += [number] if len(kept) < len(said) else []
        every += [number] if not kept else []
    return some, every


def test_cut_answers_have_the_right_places_at_every_limit(tiny: Any) -> None:
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in TALKS]
    seen = set()
    for max_length in range(16, 130):
        report = length_report(InstructDataset(rows, tiny, max_length=max_length, too_long="split"))
        some, every = expected_cuts(tiny, max_length)
        assert report.cut == tuple(f"row:{number + 1}" for number in some), max_length
        assert report.gone == tuple(f"row:{number + 1}" for number in every), max_length
        assert (report.n_cut, report.n_gone, report.n_rows) == (len(some), len(every), 4)
        seen.add((len(some), len(every)))
    assert len(seen) > 4 and (0, 0) in seen


def test_the_command_names_rows_whose_answer_is_gone(tmp_path: Path, tiny: Any) -> None:
    lines: list[Any] = [{"prompt": prompt, "completion": completion} for prompt, completion in TALKS]
    lines.insert(1, "not a row")
    data = write_jsonl(tmp_path / "talks.jsonl", lines)
    asked = ["check", data, "--task", "instruct", "--model", "tiny", "--max-length", "40", "--bad-rows", "quarantine"]
    found = json.loads(llmft(*asked, "--json", "--card", tmp_path / "card.html").out)
    some, every = expected_cuts(tiny, 40)
    places = [f"talks.jsonl:{number + 1 if number < 1 else number + 2}" for number in range(4)]
    assert found["lengths"]["cut"] == [places[number] for number in some] == places[1:]
    assert found["lengths"]["gone"] == [places[number] for number in every] == [places[2], places[3]][: len(every)]
    assert found["lengths"]["n_over"] == 3 and found["lengths"]["max_length"] == 40
    words = found["findings"]["answers cut away"]
    assert words.startswith("in 3 of 4 rows: talks.jsonl:3") and "the whole answer in" in words and places[2] in words
    longest = max(len(InstructDataset([row], tiny, max_length=500)[0]["input_ids"]) for row in (lines[0], *lines[2:]))
    assert found["findings"]["lengths"].startswith(f"longest {longest} tokens, 3 of 4 rows over 40")
    page = (tmp_path / "card.html").read_text(encoding="utf-8")
    assert "Rows with answers cut away" in page and f"<b><bdi>{places[2]}</bdi></b>" in page
    told = llmft(*asked)
    assert told.status == 0 and "answers cut away" in told.out and places[2] in told.out


def test_texts_that_are_cut_keep_their_labels(tmp_path: Path) -> None:
    rows = [{"text": "good " * n, "label": "yes" if n % 2 else "no"} for n in (3, 50, 4, 60, 5)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    found = json.loads(llmft("check", data, "--model", "tiny", "--max-length", "20", "--json").out)
    assert found["lengths"]["over"] == ["rows.jsonl:2", "rows.jsonl:4"] and found["lengths"]["n_over"] == 2
    assert found["findings"]["answers cut away"] == "none" and found["lengths"]["longest"] >= 60
    assert "of which the end is cut: rows.jsonl:2, rows.jsonl:4" in found["findings"]["lengths"]


def test_long_rows_of_tags_are_read_in_windows(tmp_path: Path) -> None:
    rows = [{"tokens": ["word"] * n, "ner_tags": ["B-thing"] + ["O"] * (n - 1)} for n in (3, 50, 4)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    asked = ["check", data, "--task", "tag", "--model", "tiny-encoder", "--max-length", "16", "--json"]
    found = json.loads(llmft(*asked, "--log-level", "error").out)
    assert (found["lengths"]["over"], found["lengths"]["cut"]) == (["rows.jsonl:2"], [])
    assert found["lengths"]["longest"] >= 50 and "read in windows: rows.jsonl:2" in found["findings"]["lengths"]


def test_words_without_a_token_are_answers_that_are_gone() -> None:
    "BERT's normaliser takes out characters without a width; a row of nothing else has nothing to learn."
    small = BertTokenizer(vocab={word: k for k, word in enumerate("[PAD] [UNK] [CLS] [SEP] [MASK] in rome".split())})
    words = [["in", "rome"], ["in", "\u200b", "rome"], ["\u200b"]]
    rows = [{"tokens": found, "ner_tags": ["B-place"] + ["O"] * (len(found) - 1)} for found in words]
    report = length_report(TagDataset(rows, small, max_length=12))
    assert (report.cut, report.gone, report.over, report.longest) == (("row:2", "row:3"), ("row:3",), (), 4)


def test_long_texts_go_on_in_the_next_row(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text": "word " * n} for n in (3, 70, 4)])
    found = json.loads(llmft("check", data, "--task", "text", "--model", "tiny", "--max-length", "16", "--json").out)
    lengths = found["lengths"]
    assert (lengths["n_rows"], lengths["n_over"], lengths["cut"]) == (3, 1, []) and lengths["longest"] >= 70
    assert "go on in the next row" in found["findings"]["lengths"]


def test_prompts_made_of_columns_are_measured_once(tmp_path: Path) -> None:
    "A template that names the column `text` must not be filled a second time with its own prompt."
    rows = [{"text": "alpha beta", "input": "gamma", "completion": "delta"} for _ in range(2)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    plain = write_jsonl(tmp_path / "plain.jsonl", [{"prompt": "alpha beta gamma", "completion": "delta"}] * 2)
    asked = ["--task", "instruct", "--model", "tiny", "--json"]
    found = json.loads(llmft("check", data, "--prompt-template", "{text} {input}", *asked).out)
    assert found["lengths"] == json.loads(llmft("check", plain, *asked).out)["lengths"]
