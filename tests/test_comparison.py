"""Several runs on equal terms: what is refused, what is corrected, what stands in bold, and where a run came from."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_report import PAYLOADS, Page
from typer.testing import CliRunner

from llmft_nb.answers import token_f1
from llmft_nb.cli import app
from llmft_nb.comparison import compare_runs, row_pulls, unlike_seeds
from llmft_nb.comparison_page import place_labels, render_comparison, table_lines, write_comparison
from llmft_nb.core import RunRecord, UserError, read_record, write_record
from llmft_nb.finetune import finetune
from llmft_nb.pages import visible
from llmft_nb.resampling import PERPLEXITY, SPAN_F1, f1_score_interval, perplexity_score
from llmft_nb.rows import Rows, read_rows
from llmft_nb.runs import list_runs, run_tree
from llmft_nb.scored_runs import group_runs, read_scored
from llmft_nb.scores import compare_with, score_share

HARD = np.random.default_rng(5).random(160)
QUESTIONS = [{"text": f"May I take no. {i}?", "label": "abc"[i % 3]} for i in range(160)]


def answers(ability: float, seed: int = 0) -> np.ndarray:
    "Which questions a model of some ability answers right."
    return HARD + 0.1 * np.random.default_rng([seed, round(1000 * ability)]).standard_normal(160) < ability


def keep_run(
    folder: Path,
    right: np.ndarray,
    *,
    rows: Sequence[Mapping[str, Any]] = QUESTIONS,
    ratio: float | None = 1.2,
    model: Mapping[str, Any] | None = None,
    notice: str = "",
    baseline: str = "untuned base",
    train: str = "1a" * 32,
    settings: Mapping[str, Any] | None = None,
    **others: Any,
) -> Path:
    "The folder of a finished run of the task classify."
    untuned = np.arange(len(rows)) % 4 == 0
    compared = [{**one.as_record(), "name": baseline} for one in compare_with(right, {"": untuned})]
    test = {"headline": "accuracy", "accuracy": asdict(score_share(int(right.sum()), len(rows))), "baselines": compared}
    bill = None if ratio is None else {"value": ratio, "low": 0.9 * ratio, "high": 1.1 * ratio, "n": 62}
    scores = {"test": test, "validation": {"accuracy": 0.8}, "forgetting": {"ratio": bill, "note": ""}}
    record = RunRecord(
        "classify",
        "finished",
        {"name": "tiny", "kind": "catalogue", "sha256": "3c" * 32, "n_trainable": 1000, **(model or {})},
        {"n_train": 900, "notice": notice, "label_names": ["a", "b", "c"]},
        {"strategy": "full", "lr": 1e-3, "seed": 0, **(settings or {})},
        {},
        {"train": train, "valid": "2b" * 32, "test": "0d" * 32, "model": "3c" * 32},
        scores,
        seconds={"6-7 train and validate": 61.0},
        test_looks=1,
    )
    folder.mkdir(parents=True)
    write_record(folder, replace(record, **others))
    lines = [
        {**row, "predicted": row["label"] if ok else "?", "untuned": row["label"] if was else "?"}
        for row, ok, was in zip(rows, right, untuned, strict=True)
    ]
    (folder / "test_predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def llmft(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def change_record(folder: Path, **changes: Any) -> None:
    write_record(folder, replace(read_record(folder), **changes))


# What is refused


def other_task(folder: Path) -> None:
    file = folder / "test_predictions.jsonl"
    file.write_text('{"loss_sum": 4.0, "n_targets": 2, "untuned_loss_sum": 6.0, "text_hash": "aa"}\n', encoding="utf-8")
    test = {"headline": "perplexity", "perplexity": {"value": math.exp(2), "low": 5.0, "high": 9.0, "n": 1}}
    change_record(folder, task="text", scores={"test": test})


def other_score(folder: Path) -> None:
    record = read_record(folder)
    test = dict(record.scores["test"], headline="token_f1", token_f1=record.scores["test"]["accuracy"])
    change_record(folder, scores=record.scores | {"test": test})


def other_label(folder: Path) -> None:
    shutil.rmtree(folder)
    keep_run(folder, answers(0.8), rows=[*QUESTIONS[:-1], {"text": QUESTIONS[-1]["text"], "label": "other"}])


def other_text(folder: Path) -> None:
    shutil.rmtree(folder)
    keep_run(folder, answers(0.8), rows=[{"text": "May I not?", "label": "a"}, *QUESTIONS[1:]])


def fewer_rows(folder: Path) -> None:
    shutil.rmtree(folder)
    keep_run(folder, answers(0.8)[:100], rows=QUESTIONS[:100])


def cut_answers(folder: Path) -> None:
    file = folder / "test_predictions.jsonl"
    file.write_text("".join(file.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]), encoding="utf-8")


def changed_answers(folder: Path) -> None:
    file = folder / "test_predictions.jsonl"
    file.write_text(file.read_text(encoding="utf-8").replace('"predicted": "?"', '"predicted": "a"'), encoding="utf-8")


def other_fields(folder: Path) -> None:
    (folder / "test_predictions.jsonl").write_text('{"text": "May I?"}\n', encoding="utf-8")


def bad_seed(folder: Path) -> None:
    change_record(folder, settings={"strategy": "full", "seed": "seven"})


REFUSED = {
    "not finished": (lambda folder: change_record(folder, status="interrupted"), "not finished", "--resume"),
    "no test": (lambda folder: change_record(folder, scores={}), "not finished and tested", "leave it out"),
    "no answers": (
        lambda folder: (folder / "test_predictions.jsonl").unlink(),
        "no test_predictions",
        "train it again",
    ),
    "no run": (lambda folder: (folder / "run.json").unlink(), "no run here", "llmft train"),
    "other task": (other_task, "another task", "leave it out"),
    "other score": (other_score, "another leading score", "leave it out"),
    "other label": (other_label, "another test set", "--test"),
    "other text": (other_text, "another test set", "--test"),
    "fewer rows": (fewer_rows, "another test set", "--test"),
    "cut answers": (cut_answers, "do not give the run's score", "leave it out"),
    "changed answers": (changed_answers, "do not give the run's score", "leave it out"),
    "other fields": (other_fields, "lacks what a comparison needs", "leave it out"),
    "bad seed": (bad_seed, "not such as a run writes it", "leave that run out"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compared_is_refused_by_name(name: str, tmp_path: Path) -> None:
    change, what, mend = REFUSED[name]
    runs = [keep_run(tmp_path / one, answers(0.8, seed)) for seed, one in enumerate(("a", "odd", "c"))]
    change(runs[1])
    told = llmft("report", *runs, "--json")
    assert told.exit_code == 2, told.output
    error = json.loads(told.stderr)["error"]
    assert what in error["what"] and str(runs[1]) in error["where"] and mend in error["mend"], error
    assert name == "bad seed" or str(runs[2]) not in error["where"]
    assert not (tmp_path / "comparison.html").exists()


def test_the_refusal_says_what_each_has(tmp_path: Path) -> None:
    runs = [keep_run(tmp_path / one, answers(0.8)) for one in "ab"]
    fewer_rows(runs[1])
    with pytest.raises(UserError) as caught:
        compare_runs(runs)
    assert re.search(r"b has 100 test rows \([0-9a-f]{8}\); \S+a has 160 test rows \([0-9a-f]{8}\)", caught.value.why)


def test_one_run_and_the_same_run_twice(tmp_path: Path) -> None:
    run = keep_run(tmp_path / "a", answers(0.8))
    with pytest.raises(UserError, match="nothing to compare"):
        compare_runs([run])
    told = llmft("report", run, tmp_path / "a" / ".." / "a")
    assert told.exit_code == 2 and "named twice" in told.stderr


def test_the_order_of_the_rows_does_not_matter(tmp_path: Path) -> None:
    right = answers(0.8)
    turned = np.random.default_rng(0).permutation(160)
    runs = [keep_run(tmp_path / "a", right), keep_run(tmp_path / "b", answers(0.7))]
    shuffled = keep_run(tmp_path / "c", right[turned], rows=[QUESTIONS[i] for i in turned], settings={"lr": 2e-3})
    plain, other = compare_runs(runs), compare_runs([shuffled, runs[1]])
    assert plain.pairs[0].p_value == other.pairs[0].p_value < 1 and plain.rows == other.rows


# Tests


def mid_p(only_a: int, only_b: int) -> float:
    "McNemar's mid-p, from the binomial coefficients."
    n, few = only_a + only_b, min(only_a, only_b)
    below = sum(math.comb(n, k) for k in range(few)) / 2**n
    return min(1.0, 2 * below + math.comb(n, few) / 2**n)


def test_p_values_are_corrected_as_by_hand(tmp_path: Path) -> None:
    right = {name: answers(ability) for name, ability in (("a", 0.9), ("b", 0.82), ("c", 0.78))}
    runs = [keep_run(tmp_path / name, ok, settings={"lr": k}) for k, (name, ok) in enumerate(right.items())]
    found = compare_runs(runs)
    by_hand = {}
    for first, second in (("a", "b"), ("a", "c"), ("b", "c")):
        one, other = right[first], right[second]
        by_hand[first, second] = mid_p(int((one & ~other).sum()), int((other & ~one).sum()))
    order, highest, corrected = sorted(by_hand, key=by_hand.__getitem__), 0.0, {}
    for k, pair in enumerate(order):
        highest = max(highest, min(1.0, (3 - k) * by_hand[pair]))
        corrected[pair] = highest
    names = [one.name for one in found.contenders]
    assert names == ["a", "b", "c"]
    for pair in found.pairs:
        key = (names[pair.first], names[pair.second])
        assert pair.p_value == pytest.approx(by_hand[key]) and pair.corrected == pytest.approx(corrected[key])
        assert pair.verdict == ("better" if corrected[key] < 0.05 else "no difference shown")
        assert pair.difference == pytest.approx(right[key[0]].mean() - right[key[1]].mean())
    assert any(corrected[key] > by_hand[key] for key in by_hand)


def bold_names(page: str) -> list[str]:
    return re.findall(r'<b class="best"><bdi>(.*?)</bdi>', page)


def test_bold_only_what_is_shown(tmp_path: Path) -> None:
    abilities = {"best": 0.95, "good": 0.7, "also": 0.69}
    runs = {
        name: keep_run(tmp_path / name, answers(ability), settings={"lr": ability})
        for name, ability in abilities.items()
    }
    found = compare_runs(list(runs.values()))
    assert found.leading == [0] and set(bold_names(render_comparison(found))) == {"best"}
    assert "<h1><bdi>best is better than every other</bdi></h1>" in render_comparison(found)
    tied = compare_runs([runs["good"], runs["also"]])
    page = render_comparison(tied)
    assert tied.leading == [0, 1] and not bold_names(page) and page.count(">may be the best<") == 2
    assert tied.describe() == "no difference shown among all 2"


def test_better_than_most_is_not_the_best(tmp_path: Path) -> None:
    "Far ahead of one run, but not of another: nobody is in bold, and the one left behind does not lead."
    runs = [
        keep_run(tmp_path / name, answers(x), settings={"lr": x}) for name, x in (("a", 0.9), ("b", 0.89), ("c", 0.4))
    ]
    found = compare_runs(runs)
    assert found.leading == [0, 1] and found.against_first(2).verdict == "better"
    assert not bold_names(render_comparison(found))
    assert [line["mark"] for line in table_lines(found)] == ["leading", "leading", ""]


def test_a_difference_that_the_correction_takes_back(tmp_path: Path) -> None:
    "One pair alone is significant; among fifteen pairs it is not."
    right, other = np.arange(160) % 2 == 0, np.arange(160) % 2 == 0
    other[np.flatnonzero(right)[:6]] = False
    runs = [keep_run(tmp_path / "a", right), keep_run(tmp_path / "b", other, settings={"lr": 9})]
    alone = compare_runs(runs)
    assert alone.pairs[0].p_value == pytest.approx(2 / 2**7) and alone.leading == [0]
    runs += [keep_run(tmp_path / f"c{k}", right, settings={"lr": 10 + k}) for k in range(4)]
    many = compare_runs(runs)
    assert len(many.pairs) == 15 and len(many.leading) == 6
    assert min(pair.p_value for pair in many.pairs) == alone.pairs[0].p_value


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_identical_runs_differ_in_nothing(share: float, tmp_path: Path) -> None:
    right = np.arange(160) < 160 * share
    runs = [keep_run(tmp_path / name, right, settings={"lr": k}) for k, name in enumerate("abc")]
    found, _ = write_comparison(runs)
    assert [pair.p_value for pair in found.pairs] == [1.0] * 3 and len(found.leading) == 3
    grouped = [
        keep_run(tmp_path / f"{name}{s}", right, settings={"lr": name, "seed": s}) for name in "xy" for s in (1, 2)
    ]
    found, _ = write_comparison(grouped)
    assert [one.seeds for one in found.contenders] == [[1, 2]] * 2 and found.pairs[0].p_value == 1.0


# Seeds


def seeds_of(folder: Path, name: str, ability: float, seeds: Sequence[int]) -> list[Path]:
    options = {"lr": ability}
    return [keep_run(folder / f"{name}-s{s}", answers(ability, s), settings=options | {"seed": s}) for s in seeds]


def test_groups_of_seeds_against_a_direct_calculation(tmp_path: Path) -> None:
    from scipy.stats import t as student

    runs = seeds_of(tmp_path, "high", 0.9, (0, 1, 2)) + seeds_of(tmp_path, "low", 0.6, (0, 1, 2))
    found = compare_runs(runs)
    assert [(one.name, one.seeds) for one in found.contenders] == [("high", [0, 1, 2]), ("low", [0, 1, 2])]
    high, low = (np.stack([answers(x, s) for s in (0, 1, 2)]).astype(float) for x in (0.9, 0.6))
    gaps = high - low
    rows, seeds = gaps.mean(axis=0), gaps.mean(axis=1)
    parts = [(rows.var(ddof=1) / 160, 159), (seeds.var(ddof=1) / 3, 2)]
    variance = sum(part for part, _ in parts)
    freedom = variance**2 / sum(part**2 / n for part, n in parts)
    pair = found.pairs[0]
    assert pair.difference == pytest.approx(gaps.mean())
    assert pair.p_value == pytest.approx(2 * student.sf(gaps.mean() / variance**0.5, freedom))
    assert pair.high - pair.low == pytest.approx(2 * student.ppf(0.975, freedom) * variance**0.5)
    assert found.scores[0]["value"] == pytest.approx(high.mean())
    assert found.scores[0]["spread"] == pytest.approx(high.mean(axis=1).std(ddof=1))
    untuned = np.arange(160) % 4 == 0
    assert found.gains[0] is not None and found.gains[0]["value"] == pytest.approx((high - untuned).mean())
    line = table_lines(found)[0]
    assert line["seed_words"].startswith("seeds 0, 1, 2: ") and "standard deviation" in line["seed_words"]


def test_a_single_seed_is_said_to_be_one_and_is_tested_as_one_draw(tmp_path: Path) -> None:
    from scipy.stats import t as student

    runs = seeds_of(tmp_path, "high", 0.9, (0, 1, 2)) + seeds_of(tmp_path, "low", 0.6, (7,))
    found = compare_runs(runs)
    assert "seed 7 alone" in render_comparison(found)
    assert any("A single seed each" in note and "low-s7" in note for note in found.as_record()["notes"])
    high, low = np.stack([answers(0.9, s) for s in (0, 1, 2)]).astype(float), answers(0.6, 7).astype(float)[None]
    rows = high.mean(axis=0) - low[0]
    parts = [(rows.var(ddof=1) / 160, 159), (high.mean(axis=1).var(ddof=1) * (1 + 1 / 3), 2)]
    variance = sum(part for part, _ in parts)
    freedom = variance**2 / sum(part**2 / n for part, n in parts)
    assert found.pairs[0].p_value == pytest.approx(2 * student.sf(rows.mean() / variance**0.5, freedom))
    assert unlike_seeds(low, high).p_value == pytest.approx(found.pairs[0].p_value), "whichever is named first"


def test_unlike_seeds_keep_to_the_level() -> None:
    "Two equal ways of training, with other seeds each: p < 0.05 in about one of twenty."
    draw, n_small, n_trials = np.random.default_rng(0), 0, 300
    for _ in range(n_trials):
        rows = draw.standard_normal(100)
        one, other = (rows + draw.standard_normal((n, 1)) * 0.3 + draw.standard_normal((n, 100)) for n in (3, 4))
        n_small += unlike_seeds(one, other).p_value < 0.05
    assert n_small / n_trials < 0.08


def test_a_repetition_is_no_further_seed(tmp_path: Path) -> None:
    runs = seeds_of(tmp_path, "high", 0.9, (0, 1)) + [
        keep_run(tmp_path / "again", answers(0.9, 0), settings={"lr": 0.9})
    ]
    found = group_runs([read_scored(run) for run in runs])
    assert [one.seeds for one in found] == [[0, 1], [0]]


def test_names_of_groups_are_told_apart(tmp_path: Path) -> None:
    runs = [keep_run(tmp_path / where / "run", answers(0.8, k), settings={"lr": k}) for k, where in enumerate("xy")]
    assert [one.name for one in group_runs([read_scored(run) for run in runs])] == ["x/run", "y/run"]


def test_rows_divided_by_the_seed_are_the_same_rows(small_model: Path, tmp_path: Path) -> None:
    "Validation rows carved by the seed differ from run to run; what was learnt from is the same."
    rows = [{"text": f"the {word} no. {i}", "label": word} for i in range(60) for word in ("cat", "dog")]
    parts = {"test": Rows(rows[80:], [f"t:{i}" for i in range(40)], "test")}
    train = Rows(rows[:80], [f"a:{i}" for i in range(80)], "train")
    options: dict[str, Any] = {"epochs": 1, "strategy": "head", "precision": "f32", "callbacks": (), "leaks": "allow"}
    options |= {"model": small_model, "general": ["It was a bright day."]}
    runs = [finetune(train, out=tmp_path / f"s{s}", seed=s, **options, **parts).folder for s in (0, 1)]
    prints = [read_record(run).fingerprint["train"] for run in runs]
    assert prints[0] != prints[1], "the seed divided the rows otherwise"
    found = compare_runs(runs)
    assert [one.seeds for one in found.contenders] == [[0, 1]]
    assert any("Validation scores" in note for note in found.as_record()["notes"])
    fewer = train.subset(range(70))
    runs.append(finetune(fewer, out=tmp_path / "fewer", **options, **parts).folder)
    found = compare_runs(runs)
    notes = found.as_record()["notes"]
    assert len(found.contenders) == 2 and any(
        "not all learnt" in note or "Not all runs learnt" in note for note in notes
    )
    listed = {line["run"]: line["data_fingerprint"] for line in list_runs(tmp_path)}
    assert listed["s0"] == listed["s1"] != listed["fewer"]


def test_what_a_reader_has_to_know(tmp_path: Path) -> None:
    runs = [keep_run(tmp_path / "a", answers(0.8), test_looks=3, notes=["Memory was short"])]
    runs.append(keep_run(tmp_path / "b", answers(0.7), train="9f" * 32, ratio=None, notice="Fictional products."))
    _, file = write_comparison(runs)
    page = Page(file.read_text(encoding="utf-8"))
    text = " ".join(" ".join(page.text).split())
    assert "The test rows of a were scored 3 times" in text and "a: Memory was short" in text
    assert "Not all runs learnt from the same rows: a (900 rows, " in text
    assert "Fictional products." in text
    assert "Not in the picture: b , whose forgetting was not measured" in text
    told = llmft("report", *runs)
    assert "Fictional products." in told.stdout and "scored 3 times" in told.stdout


# Scores that are no means of rows


def test_pulls_have_the_score_as_their_mean() -> None:
    draw = np.random.default_rng(2)
    losses = np.column_stack([draw.random(50) * 30, draw.integers(1, 20, 50)])
    counts = draw.integers(0, 3, (50, 3)).astype(float)
    assert math.exp(row_pulls(losses, PERPLEXITY).mean()) == pytest.approx(perplexity_score(*losses.T).value)
    assert row_pulls(counts, SPAN_F1).mean() == pytest.approx(f1_score_interval(*counts.T).value)
    loss, tokens = losses.T
    ratio = loss.sum() / tokens.sum()
    assert row_pulls(losses, PERPLEXITY) == pytest.approx(ratio + (loss - ratio * tokens) / tokens.mean())
    hits, of = counts[:, 0], counts @ [2, 1, 1]
    f1 = 2 * hits.sum() / of.sum()
    assert row_pulls(counts, SPAN_F1) == pytest.approx(f1 + (2 * hits - f1 * of) / of.mean())


# The page


def test_the_page_is_one_file_and_repeats(tmp_path: Path) -> None:
    runs = [keep_run(tmp_path / name, answers(x), settings={"lr": x}) for name, x in (("a", 0.9), ("b", 0.6))]
    _, file = write_comparison(runs)
    source = file.read_text(encoding="utf-8")
    assert file == tmp_path / "comparison.html"
    assert render_comparison(compare_runs(runs)) == source
    page = Page(source)
    assert page.addresses == ["data:,"] and not [tag for tag in page.tags if tag[0] in {"script", "img", "link a"}]
    policy = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', source)
    assert policy is not None and policy.group(1).startswith("default-src 'none'; style-src 'unsafe-inline'")
    picture = source[source.index("<svg") : source.index("</svg>")]
    assert ">1 a<" in picture and ">2 b<" in picture and "<image" not in picture
    text = " ".join(" ".join(page.text).split())
    for word in ("61.0 s", "1,000", "1.20 times [1.08, 1.32]", "untuned base", "McNemar, mid-p", "corrected p < 0.001"):
        assert word in text, word


def hostile_runs(folder: Path, text: str) -> list[Path]:
    runs = []
    for k, ability in enumerate((0.95, 0.6)):
        model = {"name": text, "kind": "hub"}
        settings = {"lr": k, "strategy": text, f"s{text}": f"{text}{k}"}
        options: dict[str, Any] = {"notice": text, "baseline": text, "notes": [text], "train": text * (k + 1)}
        runs.append(keep_run(folder / f"r{k}", answers(ability), model=model, settings=settings, **options))
    return runs


@pytest.mark.parametrize("payload", PAYLOADS)
def test_strangers_texts_stay_texts(payload: str, tmp_path: Path) -> None:
    text = payload.encode("utf-8", "replace").decode()  # A lone surrogate cannot be written to a record
    harmless, page = (
        Page(render_comparison(compare_runs(hostile_runs(tmp_path / name, words))))
        for name, words in (("plain", "plain"), ("odd", text))
    )
    assert page.tags == harmless.tags and page.addresses == ["data:,"]
    assert "".join(page.text).count(visible(text)) >= 8
    told = llmft("report", tmp_path / "odd" / "r0", tmp_path / "odd" / "r1")
    assert told.exit_code == 0 and "\x1b" not in told.stdout and "\u202e" not in told.stdout
    told = llmft("runs", tmp_path / "odd")
    assert told.exit_code == 0 and "\x1b" not in told.stdout and "\u202e" not in told.stdout


@pytest.mark.parametrize("name", ["$x_1$ & <b>", "a" * 200, "名前 \u202e \x1b[31m", "{{ 7 * 7 }}"])
def test_a_folder_of_any_name(name: str, tmp_path: Path) -> None:
    runs = [keep_run(tmp_path / name, answers(0.9)), keep_run(tmp_path / "b", answers(0.5), settings={"lr": 2})]
    _, file = write_comparison(runs)
    page = Page(file.read_text(encoding="utf-8"))
    assert visible(name) in "".join(page.text) and ("b",) not in [tag for tag in page.tags if tag == ("b", "onload")]
    assert llmft("report", *runs).exit_code == 0 and llmft("runs", tmp_path).exit_code == 0


@pytest.mark.parametrize("seed", range(5))
def test_labels_do_not_lie_on_each_other(seed: int) -> None:
    draw = np.random.default_rng(seed)
    points = [(float(x), float(y)) for x, y in draw.random((12, 2)) * [260, 200]]
    points += [(130.0, 100.0)] * 3
    widths = [float(w) for w in draw.integers(20, 70, 15)]
    boxes = [(x, y, x + w, y + 12) for (x, y), w in zip(place_labels(points, widths, (260, 200)), widths, strict=True)]
    for i, one in enumerate(boxes):
        assert one[0] >= -1 and one[1] >= -1 and one[2] <= 261 and one[3] <= 201, one
        for other in boxes[:i]:
            assert min(one[2], other[2]) <= max(one[0], other[0]) or min(one[3], other[3]) <= max(one[1], other[1])


def test_nothing_is_overwritten_but_a_comparison(tmp_path: Path) -> None:
    runs = [keep_run(tmp_path / name, answers(x), settings={"lr": x}) for name, x in (("a", 0.9), ("b", 0.6))]
    for name, text in (("mine.html", "<p>thesis"), ("notes.txt", "")):
        (tmp_path / name).write_text(text, encoding="utf-8")
        told = llmft("report", *runs, "--out", tmp_path / name, "--json")
        assert told.exit_code == 2 and (tmp_path / name).read_text(encoding="utf-8") == text
        assert json.loads(told.stderr)["error"]["mend"]
    (tmp_path / "folder.html").mkdir()
    for out in (tmp_path / "folder.html", tmp_path / "none" / "page.html"):
        assert llmft("report", *runs, "--out", out).exit_code == 2
    file = tmp_path / "page.html"
    for _ in range(2):  # A page of this kind is replaced
        told = llmft("report", *runs, "--out", file, "--json")
        assert told.exit_code == 0 and json.loads(told.stdout)["page"] == str(file)
    assert llmft("report", runs[0], "--out", file).exit_code == 2, "one run has its place"


def test_the_page_lies_beside_the_runs_or_here(at_home: Path) -> None:
    runs = [
        keep_run(at_home / where / name, answers(0.8, k)) for k, (where, name) in enumerate((("x", "a"), ("y", "b")))
    ]
    assert llmft("report", *runs).exit_code == 0
    assert (at_home / "comparison.html").is_file() and not (at_home / "x" / "comparison.html").exists()
    os.chdir(at_home / "x")
    keep_run(at_home / "x" / "c", answers(0.5))
    assert llmft("report", "a", "c").exit_code == 0
    assert (at_home / "x" / "comparison.html").is_file()


def test_one_run_writes_its_report_as_before(small_run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small_run, tmp_path / "run"))
    was = (copy / "report.html").read_bytes()
    (copy / "report.html").unlink()
    told = llmft("report", copy)
    assert told.exit_code == 0 and told.stdout.strip() == str(copy / "report.html")
    assert (copy / "report.html").read_bytes().replace(b"finished", b"run") == was.replace(b"finished", b"run")


# Real runs of every task


def pharmacy_rows(task: str, split: str, n: int) -> list[dict[str, Any]]:
    "Rows of the house pharmacy for a task."
    rows = list(read_rows("pharmacy-leaflets" if task == "text" else "pharmacy", split=split))[:n]
    if task == "tag":
        words = [row["text"].split() for row in rows]
        names = [set(str(row["first"]).split() + str(row["second"]).split()) - {"a", "an", "the"} for row in rows]
        tags = [
            ["B-drug" if w.strip("?,.") in some else "O" for w in one] for one, some in zip(words, names, strict=True)
        ]
        return [{"tokens": one, "ner_tags": found} for one, found in zip(words, tags, strict=True)]
    if task == "instruct":
        return [{"prompt": row["text"], "completion": row["label"]} for row in rows]
    return [{"text": row["text"], **({"label": row["label"]} if task == "classify" else {})} for row in rows]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Any:
    "Three real runs of a task: two seeds, and another strategy."
    known: dict[str, list[Path]] = {}

    def runs_of(task: str) -> list[Path]:
        if task not in known:
            folder = tmp_path_factory.mktemp(task)
            model = "tiny" if task == "instruct" else "tiny-encoder"
            parts = {name: pharmacy_rows(task, name, n) for name, n in (("valid", 12), ("test", 24))}
            options: dict[str, Any] = {"task": task, "model": model, "epochs": 1, "precision": "f32", "callbacks": ()}
            options |= {"leaks": "allow", "general": ["It was a bright day, and the clocks were striking."] * 3}
            options |= {"n_written": 10, "max_new_tokens": 6} if task == "instruct" else {}
            train = pharmacy_rows(task, "train", 16 if task == "text" else 48)
            ways = (("full-0", "full", 0), ("full-1", "full", 1), ("top", "top:1", 0))
            known[task] = [
                finetune(train, strategy=way, seed=seed, out=folder / name, **parts, **options).folder
                for name, way, seed in ways
            ]
        return known[task]

    return runs_of


@pytest.mark.parametrize("task", ["classify", "tag", "instruct", "text"])
def test_real_runs_of_every_task(task: str, made: Any) -> None:
    runs = made(task)
    told = llmft("report", *runs, "--json")
    assert told.exit_code == 0, told.stderr
    found = json.loads(told.stdout)
    assert {line["name"]: line["seeds"] for line in found["contenders"]} == {"full": [0, 1], "top": [0]}
    records = [read_record(run) for run in runs]
    headline = records[0].scores["test"]["headline"]
    values = [record.scores["test"][headline]["value"] for record in records]
    full = next(line for line in found["contenders"] if line["name"] == "full")
    mean = math.exp(np.mean(np.log(values[:2]))) if headline == "perplexity" else np.mean(values[:2])
    assert full["test"]["value"] == pytest.approx(mean, rel=1e-6) and full["gain"] is not None
    assert 0 <= found["pairs"][0]["p_value"] <= found["pairs"][0]["corrected"] <= 1
    single = llmft("report", runs[0], runs[2], "--json")
    (pair,) = json.loads(single.stdout)["pairs"]
    assert pair["method"] == ("McNemar, mid-p" if task == "classify" else "answers swapped at random")
    page = Page(Path(found["page"]).read_text(encoding="utf-8"))
    assert len(page.text) > 50 and ("svg",) in {tag[:1] for tag in page.tags}
    people = llmft("report", *runs)
    assert people.exit_code == 0 and "corrected p" in people.stdout
    width = max(map(len, people.stdout.splitlines()[:14]))
    assert width <= 100, people.stdout


def test_gain_of_a_group_is_that_of_its_runs(made: Any) -> None:
    "For a score that is a mean, the gain of two seeds is the mean of their recorded gains."
    runs = made("classify")[:2]
    found = compare_runs(runs)
    recorded = [read_record(run).scores["test"]["baselines"][0]["difference"] for run in runs]
    assert found.gains[0] is not None and found.gains[0]["value"] == pytest.approx(np.mean(recorded))


@pytest.mark.parametrize("task", ["tag", "text"])
def test_gain_of_other_scores_is_near_the_recorded(task: str, made: Any) -> None:
    runs = made(task)[:2]
    found = compare_runs(runs)
    sign = -1 if task == "text" else 1
    recorded = [sign * read_record(run).scores["test"]["baselines"][0]["difference"] for run in runs]
    assert found.gains[0] is not None and found.gains[0]["value"] == pytest.approx(np.mean(recorded), abs=1e-6)


def test_other_tokens_are_another_measure(made: Any, tmp_path: Path) -> None:
    "Perplexities of a masked and a causal model, or of two tokenizers, are not compared."
    copy = Path(shutil.copytree(made("text")[2], tmp_path / "other"))
    file = copy / "test_predictions.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        line |= {"n_targets": 2 * line["n_targets"], "loss_sum": 2 * line["loss_sum"]}  # The same perplexity
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with pytest.raises(UserError, match="another count of tokens"):
        compare_runs([*made("text")[:2], copy])


def test_answers_written_for_other_rows(made: Any, tmp_path: Path) -> None:
    "With another --n-written the score is counted on other rows, though the test set is the same."
    copy = Path(shutil.copytree(made("instruct")[2], tmp_path / "fewer"))
    file = copy / "test_predictions.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    written = [line for line in lines if line.get("completion") is not None]
    del written[0]["completion"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    record, kept = read_record(copy), written[1:]
    value = float(np.mean([token_f1(line["completion"], line["label"]) for line in kept]))
    test = record.scores["test"] | {"token_f1": {"value": value, "low": 0.0, "high": 1.0, "n": len(kept)}}
    change_record(copy, scores=record.scores | {"test": test})
    with pytest.raises(UserError, match="another choice of test rows") as caught:
        compare_runs([*made("instruct")[:2], copy])
    assert "--n-written" in caught.value.mend


def test_texts_of_an_earlier_version_are_refused_with_a_reason(made: Any, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made("text")[0], tmp_path / "old"))
    file = copy / "test_predictions.jsonl"
    file.write_text(re.sub(r', "text_hash": "\w+"', "", file.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(UserError, match="text_hash") as caught:
        compare_runs([copy, made("text")[2]])
    assert "earlier version" in caught.value.why


# Parents


def test_parents_repetitions_and_fingerprints(small_model: Path, tmp_path: Path) -> None:
    rows = {name: pharmacy_rows("classify", name, n) for name, n in (("valid", 12), ("test", 24))}
    files = {"data": tmp_path / "train.jsonl"} | {name: tmp_path / f"{name}.jsonl" for name in rows}
    for name, some in {"data": pharmacy_rows("classify", "train", 60), **rows}.items():
        files[name].write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    words = [word for name, file in files.items() for word in (f"--{name}", file)]
    (tmp_path / "general.jsonl").write_text('{"text": "It was a bright day."}\n', encoding="utf-8")
    words += ["--general", tmp_path / "general.jsonl"]
    base = ["train", *words, "--epochs", "1", "--strategy", "head", "--leaks", "allow", "--precision", "f32"]
    parent, elsewhere = tmp_path / "runs" / "first", tmp_path / "other" / "third"
    assert llmft(*base, "--model", small_model, "--out", parent).exit_code == 0
    child = llmft(*base, "--model", parent / "model", "--out", tmp_path / "runs" / "second")
    assert child.exit_code == 0, child.stderr
    assert llmft(*base, "--model", parent / "model", "--seed", "1", "--out", elsewhere).exit_code == 0
    again = llmft(
        "train", "--from-report", parent, *words, "--model", small_model, "--out", tmp_path / "runs" / "z-again"
    )
    assert again.exit_code == 0, again.stderr
    listed = {line["run"]: line for line in json.loads(llmft("runs", tmp_path / "runs", "--json").stdout)}
    assert listed["first"]["parents"] == [] and listed["second"]["parents"] == ["first", "z-again"]
    assert listed["z-again"]["repeats"] == "first" and listed["first"]["repeats"] is None
    assert listed["z-again"]["model_fingerprint"] == listed["first"]["model_fingerprint"]
    assert listed["second"]["base_fingerprint"] == listed["first"]["model_fingerprint"]
    assert all(re.fullmatch("[0-9a-f]{8}", line["data_fingerprint"]) for line in listed.values())
    (third,) = list_runs(tmp_path / "other")
    assert third["parents"] == [str(parent.resolve())]
    shown = llmft("runs", tmp_path / "runs").stdout
    assert "└ second" in shown and "finished, first again" in shown and "run first" in shown
    assert "run …/runs/first" in llmft("runs", tmp_path / "other").stdout
    for path in (tmp_path / "runs").iterdir():  # The hash is in the record: no model is read for a list
        shutil.rmtree(path / "model")
    assert {line["run"]: line["parents"] for line in list_runs(tmp_path / "runs")}["second"] == ["first", "z-again"]
    change_record(parent, lineage={"model_sha256": "00" * 32})
    assert list_runs(tmp_path / "other")[0]["parents"] == [], "another model lies there by now"


def test_records_of_an_earlier_version_are_listed(small_run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small_run, tmp_path / "old"))
    record = json.loads((copy / "run.json").read_text(encoding="utf-8"))
    del record["lineage"]
    (copy / "run.json").write_text(json.dumps(record), encoding="utf-8")
    (line,) = list_runs(tmp_path)
    assert line["model_fingerprint"] is None and line["data_fingerprint"] and line["test"] is not None
    assert run_tree([line])[0]["model"] == "–"


def test_a_record_that_is_none_does_not_end_the_list(tmp_path: Path) -> None:
    keep_run(tmp_path / "good", answers(0.8))
    keep_run(tmp_path / "odd", answers(0.8))
    record = json.loads((tmp_path / "odd" / "run.json").read_text(encoding="utf-8"))
    (tmp_path / "odd" / "run.json").write_text(json.dumps(record | {"scores": [], "lineage": 7}), encoding="utf-8")
    lines = {line["run"]: line["status"] for line in list_runs(tmp_path)}
    assert lines["good"] == "finished" and lines["odd"].startswith("unreadable")
    assert llmft("runs", tmp_path).exit_code == 0
