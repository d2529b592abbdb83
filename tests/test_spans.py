"""Span scores against nervaluate, closed forms, and what must always hold."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from nervaluate import Evaluator

from llmft_nb.core import UserError
from llmft_nb.span_scores import SpanF1, f1_of_counts, kind_scores, span_counts, span_scores
from llmft_nb.tags import repair_tags

KINDS = ["creative-work", "place", "person"]
TAGS = ["O"] * 3 + [f"{mark}-{kind}" for kind in KINDS for mark in "BI"]


def random_case(seed: int, legal: bool) -> tuple[list[list[str]], list[list[str]]]:
    "Tags of a few rows, and a noisy copy of them."
    chance = random.Random(seed)
    true, said = [], []
    for _ in range(chance.randint(1, 8)):
        tags = [chance.choice(TAGS) for _ in range(chance.randint(1, 12))]
        noisy = [tag if chance.random() < 0.8 else chance.choice(TAGS) for tag in tags]
        true.append(repair_tags(tags) if legal else tags)
        said.append(repair_tags(noisy) if legal else noisy)
    return said, true


@pytest.mark.parametrize("legal", [True, False])
def test_equal_to_nervaluate_on_random_rows(legal: bool) -> None:
    """nervaluate reads a stray `I-` as a beginning, as conlleval does, so illegal rows agree too. The two differ in
    what it does not do: tags without prefixes, a mean over the kinds, and kinds that are not in its list of tags."""
    for seed in range(200):
        said, true = random_case(seed, legal)
        result = Evaluator(true, said, tags=KINDS, loader="list").evaluate()
        ours, theirs = span_scores(said, true) if seed < 20 else totals(said, true), result["overall"]["strict"]
        assert ours["span_precision"] == pytest.approx(theirs.precision, abs=1e-6), seed
        assert ours["span_recall"] == pytest.approx(theirs.recall, abs=1e-6), seed
        assert ours["span_f1"] == pytest.approx(theirs.f1, abs=1e-6), seed
        kinds = kind_scores(said, true)
        assert set(kinds) == set(result["entities"])
        for kind, score in kinds.items():
            reference = result["entities"][kind]["strict"]
            assert (score.n_true, score.n_said) == (reference.possible, reference.actual)
            assert score.f1 == pytest.approx(reference.f1, abs=1e-6)
            assert (score.precision, score.recall) == pytest.approx((reference.precision, reference.recall), abs=1e-6)


def totals(said: list[list[str]], true: list[list[str]]) -> dict[str, float]:
    "The three shares without `evaluate`'s files, which cost a tenth of a second each."
    shares = f1_of_counts(*(int(count.sum()) for count in span_counts(said, true)))
    return dict(zip(("span_precision", "span_recall", "span_f1"), shares, strict=True))


def test_the_metric_says_what_the_counts_say() -> None:
    for seed in range(5):
        said, true = random_case(seed, False)
        scores = span_scores(said, true)
        assert {name: scores[name] for name in totals(said, true)} == totals(said, true)
        assert scores["span_macro_f1"] == pytest.approx(np.mean([k.f1 for k in kind_scores(said, true).values()]))
        words = [(a, b) for x, y in zip(said, true, strict=True) for a, b in zip(x, y, strict=True)]
        assert scores["word_accuracy"] == pytest.approx(sum(a == b for a, b in words) / len(words))


def test_counts_add_up_row_by_row() -> None:
    said, true = random_case(7, True)
    whole = [count.tolist() for count in span_counts(said, true)]
    single = [[int(c[0]) for c in span_counts([a], [b])] for a, b in zip(said, true, strict=True)]
    assert whole == [list(column) for column in zip(*single, strict=True)]
    found, invented, missed = span_counts(said, true)
    back = span_counts(true, said)
    assert [c.tolist() for c in back] == [found.tolist(), missed.tolist(), invented.tolist()]


def test_perfect_and_nothing() -> None:
    _, true = random_case(3, True)
    assert set(span_scores(true, true).values()) == {1.0}
    silent = [["O"] * len(tags) for tags in true]
    assert span_scores(silent, true)["span_f1"] == 0.0
    assert span_scores(silent, silent) == {
        "span_f1": 0.0, "span_precision": 0.0, "span_recall": 0.0, "span_macro_f1": 0.0, "word_accuracy": 1.0,
    }  # fmt: skip


def as_bio(tags: list[str]) -> list[str]:
    "Plain tags with prefixes, each run of equal ones a span."
    return [tag if tag == "O" else f"{'I' if i and tags[i - 1] == tag else 'B'}-{tag}" for i, tag in enumerate(tags)]


def test_plain_tags_equal_bio_where_no_neighbours_touch() -> None:
    "A run of equal plain tags is one span; written as BIO it gives the same counts."
    chance = random.Random(4)
    for _ in range(100):
        rows = [[[chance.choice(["O", "place", "person"]) for _ in range(9)] for _ in range(3)] for _ in range(2)]
        bio = [[as_bio(row) for row in side] for side in rows]
        plain_counts, bio_counts = span_counts(*rows, "plain"), span_counts(*bio)
        assert [c.tolist() for c in plain_counts] == [c.tolist() for c in bio_counts]
    assert span_scores(*rows, "plain")["span_f1"] == pytest.approx(span_scores(*bio)["span_f1"])


def test_rows_fed_one_by_one_score_the_same(tmp_path: Path) -> None:
    said, true = random_case(5, True)
    metric = SpanF1("bio", cache_dir=str(tmp_path))
    for a, b in zip(said, true, strict=True):
        metric.add(prediction=a, reference=b)
    assert metric.compute() == span_scores(said, true)


@pytest.mark.parametrize(
    ("said", "true", "told"),
    [
        ([["O"]], [], "1 predicted, 0 true"),
        ([["O"], ["O", "O"]], [["O"], ["O"]], "row 1: 2 predicted, 1 true"),
        ([], [], "there are no rows"),
    ],
)
def test_what_does_not_fit_is_named(said: list[list[str]], true: list[list[str]], told: str) -> None:
    with pytest.raises(UserError, match=told):
        span_scores(said, true)
