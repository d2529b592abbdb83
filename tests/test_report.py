"""The report and the card: strangers' text is inert where it is parsed, the card is valid, bytes repeat."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from llmft_nb.core import RunRecord, UserError, write_record
from llmft_nb.hub_metadata import card_metadata
from llmft_nb.pages import curve_svg, duration, markdown_text, visible
from llmft_nb.report import read_run, render_card, render_report, repeat_command, write_report
from llmft_nb.scores import compare_with, score_share

ROOT = Path(__file__).resolve().parents[1]
HOST = "http://127.0.0.1:9"

PAYLOADS = [
    "<script>document.title='pwned'</script>",
    "</title><script>document.title='pwned'</script>",
    "</style><script>document.title='pwned'</script>",
    "</textarea></pre></code><script>document.title='pwned'</script>",
    "<img src=x onerror=\"document.title='pwned'\">",
    f"<img src='{HOST}/pixel.png'><link rel=stylesheet href='{HOST}/a.css'>",
    '"><svg onload="document.title=\'pwned\'"><p id=pwned>',
    "' autofocus onfocus='document.title=`pwned`' x='",
    "<a href=\"javascript:document.title='pwned'\" id=pwned>click</a>",
    f"<iframe src='{HOST}/frame' srcdoc=\"<script>parent.document.title='pwned'</script>\"></iframe>",
    "<style>@import url(http://127.0.0.1:9/b.css); body { display: none }</style>",
    "<form action=http://127.0.0.1:9/form><button id=pwned>go</button></form><base href=http://127.0.0.1:9/>",
    "<meta http-equiv=refresh content='0;url=http://127.0.0.1:9/away'>",
    "<math><mtext><table><mglyph><style><!--</style><img title=\"--><img src=1 onerror=document.title='pwned'>\">",
    "<!--<p id=pwned>--><p id=pwned><![CDATA[<p id=pwned>]]>",
    "{{ 7 * 7 }}{% for x in range(9) %}pwned{% endfor %}{# #}",
    "[click](javascript:alert(1)) ![x](http://127.0.0.1:9/p.png) <http://127.0.0.1:9/auto>",
    "| broken | table |\n| --- | --- |\n\n# heading\n\n```\n<p id=pwned>",
    "---\nlicense: mit\n---\n# other card",
    "a\n\n[ref]: http://127.0.0.1:9/ 'title'\n\n[ref] $$\\href{javascript:1}{x}$$ http://127.0.0.1:9/bare www.pwned.io",
    "answer \u202efas\u2066evil\u2069 \x00\x1b[31m\x7f \ud800 \u2028 end",
    "&lt;script&gt;document.title='pwned'&lt;/script&gt;&#x3c;p id=pwned&#x3e;",
    "`x` ~~~ **b** __i__ ~~s~~ <details open ontoggle=\"document.title='pwned'\"><summary>s</summary></details>",
]


def make_run(text: str = "plain", n_steps: int = 0) -> dict[str, Any]:
    "A run in which every text that comes from outside is `text`; with a curve where `n_steps` is given."
    right = np.arange(60) % 4 > 0
    other = np.arange(60) % 3 > 0
    test = {
        "accuracy": asdict(score_share(45, 60)),
        "macro_f1": 0.71,
        "baselines": [{**comparison.as_record(), "name": text} for comparison in compare_with(right, {"other": other})],
        "clean": {"accuracy": asdict(score_share(40, 55))},
        "harm": {"true": text, "predicted": text, **asdict(score_share(1, 20))},
    }
    record = RunRecord(
        task="classify",
        status="finished",
        model={"name": text, "kind": "hub", "revision": text, "licence": text, "sha256": text, "strategy": text},
        data={
            "sources": {"train": text, "valid": text, "test": text},
            "hub_id": text,
            "language": text,
            "licence": text,
            "n_train": 100,
            "label_names": [text, "safe"],
            "left_out": {text: text},
            "notice": text,
        },
        settings={"lr": 1e-3, "schedule": text, "seed": 0},
        origins={"lr": "argument", "schedule": text, "seed": "default"},
        fingerprint={},
        scores={
            "validation": {"accuracy": 0.8, "macro_f1": 0.7, "step": 40, "n": 30},
            "test": test,
            "question": {"text": text, "before": text, "after": {"label": text, "probability": 0.9}, "expected": text},
        },
        seconds={text: 1.5, "train": 20.0},
        environment={"python": "3.11", "device": text},
        test_looks=2,
    )
    metrics: list[dict[str, Any]] = [{"step": step, "loss": 2.0 / step, "note": text} for step in range(1, n_steps)]
    metrics += [{"step": n_steps, "valid_accuracy": 0.8, "valid_loss": 0.6, "note": text}] if n_steps else []
    predictions = [
        {"text": text, "text_pair": text, "label": "safe", "predicted": text, "probabilities": {text: 0.9}},
        {"text": text, "label": text, "predicted": "safe", "probability": 0.8},
        {"text": "fine", "label": "safe", "predicted": "safe"},
    ]
    return {"name": text, "record": asdict(record), "metrics": metrics, "predictions": predictions}


class Page(HTMLParser):
    "Tags with their attributes' names, addresses, and the text of a page."

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, ...]] = []
        self.addresses: list[str] = []
        self.text: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, *(name for name, _ in attrs)))
        self.addresses += [str(value) for name, value in attrs if name in {"href", "src", "action", "srcset", "data"}]

    def handle_endtag(self, tag: str) -> None:
        self.tags.append((f"/{tag}",))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


# What strangers write


@pytest.mark.parametrize("payload", PAYLOADS)
def test_html_has_the_tags_of_a_harmless_run_and_shows_the_text(payload: str) -> None:
    harmless, page = Page(render_report(make_run())), Page(render_report(make_run(payload)))
    assert page.tags == harmless.tags, "the text changed the structure of the page"
    assert page.addresses == ["data:,"]
    assert not [tag for tag in page.tags if tag[0] in {"script", "iframe", "img", "a", "form", "object", "base"}]
    assert not [name for tag in page.tags for name in tag[1:] if name.startswith("on")]
    assert "".join(page.text).count(visible(payload)) >= 12


@pytest.mark.parametrize("payload", PAYLOADS)
def test_markdown_has_the_tokens_of_a_harmless_run(payload: str) -> None:
    def tokens(text: str) -> list[str]:
        body = ModelCard(render_card(make_run(text)), ignore_metadata_errors=False).text
        parsed = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(body)
        return [kind for token in parsed for kind in (token.type, *(child.type for child in token.children or []))]

    found = tokens(payload)
    assert found == tokens("plain"), "the text changed the structure of the card"
    assert not {"link_open", "image", "html_block", "html_inline"} & set(found)
    card = render_card(make_run(payload))
    body = card[card.index("\n---\n", 4) + 5 :]
    assert not re.search(r"(?i)https?://|www\.", body), "bare addresses become links on the hub"


@pytest.mark.parametrize("payload", PAYLOADS)
def test_front_matter_says_what_it_says_and_no_more(payload: str) -> None:
    card = ModelCard(render_card(make_run(payload)))
    names = {"license", "license_name", "library_name", "pipeline_tag", "tags", "metrics", "model-index"}
    assert set(card.data.to_dict()) == names, "what is no id of the hub is not linked as one"
    assert card.data.license == "other" and re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,79}", card.data.license_name)
    assert card.data.model_name == visible(payload)
    assert card.data.eval_results[0].metric_value == 0.75


def test_hidden_characters_are_spelled_out() -> None:
    assert visible("a\u202eb") == "a⟨U+202E⟩b"
    assert visible("\x00\x1b\x7f\ud800\ue000") == "⟨U+0000⟩⟨U+001B⟩⟨U+007F⟩⟨U+D800⟩⟨U+E000⟩"
    assert visible("é 家 العربية नमस्ते 👩\u200d⚕️") == "é 家 العربية नमस्ते 👩\u200d⚕️"
    assert len(visible("x" * 10**6)) == 501
    for text in PAYLOADS:
        visible(text).encode("utf-8")
        assert "\n" not in visible(text)


def test_escaped_markdown_reads_back_as_the_text() -> None:
    for text in [*PAYLOADS, *map(chr, range(32, 127)), "1. one", "- two", "+ three", "    code", "a  b"]:
        parsed = MarkdownIt("commonmark").renderInline(f"x {markdown_text(text)} x")
        page = Page(parsed)
        assert page.tags == []
        assert "".join(page.text) == f"x {visible(text)} x"


# The page and the card


def written_run(folder: Path, text: str = "plain") -> Path:
    run = make_run(text, n_steps=50)
    folder.mkdir(parents=True, exist_ok=True)
    write_record(folder, RunRecord(**run["record"]))
    for name, rows in (("metrics.jsonl", run["metrics"]), ("test_predictions.jsonl", run["predictions"])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def test_the_page_loads_nothing_and_shows_what_counts() -> None:
    source = render_report(make_run())
    page = Page(source)
    text = " ".join(" ".join(page.text).split())
    policy = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', source)
    assert policy is not None
    assert policy.group(1).startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")
    assert page.tags.index(("meta", "http-equiv", "content")) < page.tags.index(("title",)), "the policy comes first"
    assert "url(" not in source.replace("clip-path: url(#", "").replace('clip-path="url(#', "")
    for part in ("75.0 %", "62.8 % to 84.2 %", "60 rows", "scored 2 times", "To make it again", "argument"):
        assert part in text, part


def test_two_machines_write_the_same_bytes(tmp_path: Path) -> None:
    "Other hash seed, folder, home, locale and plotting preferences: the same report and card."
    outputs = []
    code = "import sys, pathlib, llmft_nb.report as report; report.write_report(pathlib.Path(sys.argv[1]))"
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    for i, name in enumerate(("one", "two")):
        folder = written_run(tmp_path / name / "run")
        preferences = tmp_path / f"preferences{i}"
        preferences.mkdir()
        if i:
            (preferences / "matplotlibrc").write_text("lines.linewidth: 9\nfont.size: 30\nsvg.fonttype: path\n")
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": str(i), "HOME": str(tmp_path / name)}
        environment |= {"MPLCONFIGDIR": str(preferences), "LC_ALL": ("C", "C.UTF-8")[i]}
        subprocess.run([sys.executable, "-c", code, str(folder)], env=environment, cwd=tmp_path, check=True)
        outputs.append([(folder / name).read_bytes() for name in ("report.html", "README.md")])
    assert outputs[0] == outputs[1]
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "metrics.jsonl",
        "report.html",
        "run.json",
        "test_predictions.jsonl",
    ]


def test_hub_reads_the_card() -> None:
    run = make_run()
    run["name"] = "banking77-full"
    run["record"]["model"] |= {"name": "sentence-transformers/all-MiniLM-L6-v2", "licence": "Apache-2.0"}
    run["record"]["data"] |= {"hub_id": "PolyAI/banking77", "language": "en"}
    data = ModelCard(render_card(run)).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "text-classification")
    assert data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert data.datasets == ["PolyAI/banking77"]
    accuracy, f1 = data.eval_results
    assert (accuracy.dataset_type, accuracy.metric_type) == ("PolyAI/banking77", "accuracy")
    assert accuracy.metric_value == 0.75
    assert (f1.metric_type, f1.metric_value, f1.dataset_split) == ("f1", 0.71, "test")


def test_card_names_no_folder_of_this_machine() -> None:
    run = make_run()
    run["record"]["model"] |= {"name": "/home/me/models/base", "kind": "folder", "location": "/home/me/models/base"}
    run["record"]["data"] |= {"hub_id": "", "sources": {"train": "/home/me/client/train.jsonl"}, "name": ""}
    command = "llmft train --data /home/me/client/train.jsonl"
    run["record"]["environment"] |= {"folder": "/home/me/runs", "command": command}
    card = render_card(run)
    assert "/home" not in card
    assert "train.jsonl" in card
    assert "base_model" not in card_metadata(run)
    assert "/home/me/client/train.jsonl" in render_report(run), "the report is for those who made the run"


def test_a_run_without_scores_still_has_its_pages(tmp_path: Path) -> None:
    "Interrupted in its first epoch: no scores, no predictions, half a line of metrics."
    folder = tmp_path / "cut"
    folder.mkdir()
    write_record(folder, RunRecord("classify", "interrupted", {}, {}, {"lr": 0.1}, {"lr": "default"}, {}))
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    write_report(folder)
    page = (folder / "report.html").read_text()
    assert "not finished" in page
    assert "<svg" in page
    assert "Beside what" not in page
    card = ModelCard.load(folder / "README.md")
    assert "model-index" not in card.data.to_dict()
    (folder / "metrics.jsonl").unlink()
    write_report(folder)
    assert "<svg" not in (folder / "report.html").read_text()


def test_damage_is_named_and_the_old_page_stays(tmp_path: Path) -> None:
    folder = written_run(tmp_path / "run")
    write_report(folder)
    before = (folder / "report.html").read_bytes()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[4] = lines[4][:9]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl:5: not a JSON object"):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == before
    with pytest.raises(UserError, match="no run here"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("test", "accuracy", "value"), "<b>high</b>"),
        (("test", "accuracy", "low"), "1%;background:url(http://127.0.0.1:9)"),
        (("test", "accuracy"), {}),
        (("test", "baselines"), [{"name": "other"}]),
        (("validation", "accuracy"), None),
        (("test", "harm", "n"), "many"),
    ],
)
def test_a_record_with_texts_for_numbers_is_refused(path: tuple[str, ...], value: Any) -> None:
    run = copy.deepcopy(make_run())
    part = run["record"]["scores"]
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    with pytest.raises(UserError, match="does not fit the page"):
        render_report(run)


def test_several_labels_a_row_have_wrong_answers_but_no_confusions() -> None:
    run = make_run()
    run["predictions"] = [
        {"text": "where is it?", "label": ["billing", "delivery"], "predicted": ["delivery", "billing"]},
        {"text": "too dear", "label": ["billing"], "predicted": []},
    ]
    page = render_report(run)
    assert "too dear" in page
    wrong, right = page.split("<h2>Right answers")
    assert "where is it?" in right and "where is it?" not in wrong and "too dear" not in right
    assert "Commonest confusions" not in page


def test_the_command_survives_a_shell_and_names_what_was_chosen() -> None:
    run = make_run()
    record = run["record"]
    record["model"] |= {"name": "a model; rm -rf /", "revision": "abc", "strategy": "top:2"}
    record["data"]["sources"] = {"train": "my rows/$(id).jsonl", "test": "t'est.jsonl"}
    words = shlex.split(repeat_command("run one", record))
    assert words[:6] == ["llmft", "train", "--task", "classify", "--model", "a model; rm -rf /@abc"]
    assert words[words.index("--data") + 1] == "my rows/$(id).jsonl"
    assert words[words.index("--test") + 1] == "t'est.jsonl"
    assert words[words.index("--lr") + 1] == "0.001"
    assert "--seed" not in words
    assert "--valid" not in words
    assert words[-2:] == ["--out", "run one-again"]


def test_curves_of_long_runs_stay_small() -> None:
    rows: list[dict[str, Any]] = [{"step": step, "loss": 1.0 + (step % 13) / 13} for step in range(1, 100_001)]
    rows += [{"step": step, "valid_accuracy": 0.5, "valid_loss": 0.5} for step in range(0, 100_001, 1000)]
    picture = curve_svg(rows)
    assert len(picture) < 40_000
    assert "DejaVu" not in picture
    assert picture.startswith("<svg")
    assert curve_svg([{"step": 1, "valid_accuracy": 0.5}]).count("optimizer step") == 1


def test_seconds_never_round_to_sixty() -> None:
    for tenths in range(990, 80_000, 7):
        assert not re.search(r"\b60\b", duration(tenths / 10)), tenths


def test_reading_a_run_gives_what_was_written(tmp_path: Path) -> None:
    run = read_run(written_run(tmp_path / "run"))
    expected = make_run(n_steps=50) | {"name": "run"}
    assert json.loads(json.dumps(run)) == json.loads(json.dumps(expected))
