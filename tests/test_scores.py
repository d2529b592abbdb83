"""Scores against references (scikit-learn, scipy, published tables, exact fractions) and what must always hold."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, recall_score

from llmft_nb.core import UserError
from llmft_nb.scores import (
    Score,
    binomial_midp,
    compare_with,
    confused_pairs,
    label_scores,
    majority_baseline,
    mcnemar_midp,
    right_answers,
    score_share,
    tfidf_baseline,
    wilson_interval,
    worst_harm_rate,
)
from llmft_nb.validation import Accuracy, EarlyStopping, MacroF1, TestSplit, classification_scores

ROOT = Path(__file__).resolve().parents[1]


# Intervals


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("n", [1, 2, 7, 30, 400, 3080])
def test_wilson_equals_scipy_for_every_count(n: int, confidence: float) -> None:
    for n_right in {0, 1, n // 3, n // 2, n - 1, n}:
        reference = stats.binomtest(n_right, n).proportion_ci(confidence, "wilson")
        assert wilson_interval(n_right, n, confidence) == pytest.approx(tuple(reference), abs=1e-9)


def test_wilson_equals_a_published_value() -> None:
    "Newcombe (1998), table I, method 3: 81 of 263 gives 0.2553 to 0.3662; 0 of 20 gives 0 to 0.1611."
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_wilson_is_symmetric_ordered_and_inside() -> None:
    for n in range(1, 60):
        for n_right in range(n + 1):
            low, high = wilson_interval(n_right, n)
            assert 0.0 <= low <= n_right / n <= high <= 1.0
            mirrored = wilson_interval(n - n_right, n)
            assert (low, high) == pytest.approx((1 - mirrored[1], 1 - mirrored[0]), abs=1e-12)


def test_wilson_covers_the_true_share_about_as_often_as_it_says() -> None:
    "Exact coverage, by the binomial distribution: the mean over shares is near 95 %, where Wald's is far below."
    n, shares = 50, np.linspace(0.02, 0.98, 97)
    intervals = np.array([wilson_interval(k, n) for k in range(n + 1)])
    chances = stats.binom.pmf(np.arange(n + 1)[None], n, shares[:, None])
    covered = (intervals[:, 0] <= shares[:, None]) & (shares[:, None] <= intervals[:, 1])
    coverage = (chances * covered).sum(axis=1)
    assert 0.945 < coverage.mean() < 0.96
    assert coverage.min() > 0.83


@pytest.mark.parametrize(("n_right", "n"), [(1, 0), (0, 0), (3, 2), (-1, 4)])
def test_impossible_counts_are_refused(n_right: int, n: int) -> None:
    with pytest.raises(UserError, match="no such share"):
        wilson_interval(n_right, n)


def test_a_score_reads_as_people_write_it() -> None:
    assert score_share(2867, 3080).describe() == "93.1 % [92.1, 93.9] of 3,080"
    assert Score(1.0, 0.95, 1.0, 58).describe() == "100.0 % [95.0, 100.0] of 58"


# The paired test


def exact_midp(b: int, c: int) -> Fraction:
    "The definition, in fractions: both tails of a fair coin, the observed case counted half."
    n, fewer = b + c, min(b, c)
    tail = sum(math.comb(n, k) for k in range(fewer)) + Fraction(math.comb(n, fewer), 2)
    return min(Fraction(1), 2 * tail / 2**n)


def test_midp_equals_its_definition_in_fractions() -> None:
    for b in range(26):
        for c in range(26):
            assert binomial_midp(min(b, c), b + c) == pytest.approx(float(exact_midp(b, c)), rel=1e-11)


def test_midp_equals_scipys_binomial_for_large_counts() -> None:
    for b, c in ((120, 180), (1000, 1100), (4000, 4300), (49_500, 50_500)):
        fewer, n = min(b, c), b + c
        reference = 2 * stats.binom.cdf(fewer, n, 0.5) - stats.binom.pmf(fewer, n, 0.5)
        assert binomial_midp(fewer, n) == pytest.approx(reference, rel=1e-6)


def test_midp_lies_between_the_exact_and_the_uncorrected_test() -> None:
    for b, c in ((1, 9), (3, 12), (10, 25)):
        exact = stats.binomtest(min(b, c), b + c).pvalue
        uncorrected = stats.chi2.sf((b - c) ** 2 / (b + c), df=1)
        assert uncorrected < binomial_midp(min(b, c), b + c) < exact


def rows_with(both: int, only_a: int, only_b: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    a = [True] * both + [True] * only_a + [False] * only_b + [False] * neither
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return np.array(a), np.array(b)


def test_published_example_of_the_midp_test() -> None:
    "Fagerland, Lydersen, Laake (2013), airway hyper-responsiveness: 1 and 7 discordant pairs of 21; mid-p 0.039."
    found = mcnemar_midp(*rows_with(1, 1, 7, 12))
    assert (found.n_only_a, found.n_only_b) == (1, 7)
    assert found.p_value == pytest.approx(0.0391, abs=5e-5)


def test_exchanging_the_models_mirrors_the_test() -> None:
    generator = np.random.default_rng(3)
    for _ in range(50):
        a, b = generator.random((2, 80)) < generator.random((2, 1))
        one, other = mcnemar_midp(a, b), mcnemar_midp(b, a)
        assert (one.n_only_a, one.n_only_b) == (other.n_only_b, other.n_only_a)
        assert one.p_value == other.p_value
        assert one.difference == pytest.approx(-other.difference)
        assert (one.low, one.high) == pytest.approx((-other.high, -other.low))
        assert one.difference == pytest.approx(a.mean() - b.mean())
        assert -1.0 <= one.low <= one.high <= 1.0


def test_order_of_rows_does_not_matter_but_pairing_does() -> None:
    a, b = rows_with(60, 15, 4, 21)
    order = np.random.default_rng(0).permutation(len(a))
    assert mcnemar_midp(a[order], b[order]) == mcnemar_midp(a, b)
    assert mcnemar_midp(a, b[order]) != mcnemar_midp(a, b)


def test_equal_answers_show_no_difference() -> None:
    a, _ = rows_with(40, 10, 0, 0)
    same = mcnemar_midp(a, a)
    assert (same.p_value, same.difference, same.verdict()) == (1.0, 0.0, "no difference shown")


def test_the_level_holds_and_the_interval_covers() -> None:
    "Equal models are called different in about 5 % of trials; the interval holds the true difference in about 95 %."
    generator = np.random.default_rng(7)
    verdicts, covered = [], 0
    for _ in range(1500):
        a, b = generator.random((2, 200)) < np.array([[0.8], [0.8]])
        found = mcnemar_midp(a, b)
        verdicts.append(found.verdict())
        covered += found.low <= 0.0 <= found.high
    assert 0.03 < 1 - verdicts.count("no difference shown") / 1500 < 0.065
    assert 0.93 < covered / 1500 < 0.97


@pytest.mark.parametrize("shapes", [(3, 4), (0, 0)])
def test_other_rows_are_refused(shapes: tuple[int, int]) -> None:
    with pytest.raises(UserError, match="same rows twice"):
        mcnemar_midp(np.ones(shapes[0], dtype=bool), np.ones(shapes[1], dtype=bool))


# Baselines


def test_majority_prefers_the_first_name_among_equals_and_copies_lists() -> None:
    assert majority_baseline(["b", "a", "b", "a"], 3) == ["a", "a", "a"]
    answers = majority_baseline([["x", "y"], ["y", "x"], ["z"]], 2)
    assert answers == [["x", "y"], ["x", "y"]]
    answers[0].append("changed")
    assert answers[1] == ["x", "y"]
    with pytest.raises(UserError, match="no labels"):
        majority_baseline([], 2)


def small_task() -> tuple[list[str], list[str], list[str], list[str]]:
    topics = {"card": ["card", "plastic", "wallet"], "pin": ["pin", "code", "digits"], "rate": ["rate", "euro", "fee"]}
    generator = np.random.default_rng(0)
    texts, labels = [], []
    for i in range(240):
        label = sorted(topics)[i % 3]
        words = [*generator.choice(topics[label], 2), *generator.choice(["my", "the", "please", "why", "now"], 3)]
        texts.append(" ".join(generator.permutation(words)))
        labels.append(label)
    return texts[:180], labels[:180], texts[180:], labels[180:]


def test_tfidf_learns_and_repeats() -> None:
    train_texts, train_labels, texts, labels = small_task()
    answers = tfidf_baseline(train_texts, train_labels, texts)
    assert right_answers(labels, answers).mean() > 0.95
    assert tfidf_baseline(train_texts, train_labels, texts) == answers
    assert {type(answer) for answer in answers} == {str}


def test_tfidf_answers_what_it_has_never_seen() -> None:
    train_texts, train_labels, _, _ = small_task()
    strange = ["", "家", "?!", "x" * 10_000, "\x00"]
    assert set(tfidf_baseline(train_texts, train_labels, strange)) <= set(train_labels)
    assert tfidf_baseline(["!", "?"], ["a", "b"], ["?"]) == ["b"]
    assert tfidf_baseline(["one", "two"], ["a", "a"], ["three"]) == ["a"]


def test_tfidf_with_several_labels() -> None:
    train_texts, train_labels, texts, labels = small_task()
    several, true = (
        [sorted([label, "urgent"]) if "now" in text else [label] for text, label in zip(*rows, strict=True)]
        for rows in ((train_texts, train_labels), (texts, labels))
    )
    answers = tfidf_baseline(train_texts, several, texts)
    assert all(answer == sorted(answer) for answer in answers)
    assert right_answers(true, answers).mean() > 0.9


def test_tfidf_on_real_questions(real_data: Callable[[str], Path]) -> None:
    folder = real_data("banking77")
    train, test = ([json.loads(line) for line in (folder / f"{part}.jsonl").open()] for part in ("train", "test"))
    chosen = sorted({row["label"] for row in train})[:10]
    train, test = ([row for row in part if row["label"] in chosen] for part in (train, test))
    columns = ([row[key] for row in part] for part, key in ((train, "text"), (train, "label"), (test, "text")))
    right = right_answers([row["label"] for row in test], tfidf_baseline(*columns))
    assert right.mean() > 0.9, "ten intents of PolyAI/banking77 are easy for a bag of words"


# Comparisons and mistakes


def test_compare_with_keeps_names_order_and_numbers() -> None:
    a, b = rows_with(60, 15, 4, 21)
    better, equal = compare_with(a, {"weak": b, "twin": a}, {"weak": 0.5})
    assert (better.name, equal.name) == ("weak", "twin")
    record = better.as_record()
    assert record["accuracy"] == {"value": 0.64, **{key: record["accuracy"][key] for key in ("low", "high")}, "n": 100}
    assert record["verdict"] == "better"
    assert record["difference"] == pytest.approx(0.11)
    assert (record["macro_f1"], equal.macro_f1) == (0.5, None)
    assert equal.paired.verdict() == "no difference shown"


def test_label_scores_are_recalls_worst_first() -> None:
    generator = np.random.default_rng(1)
    names = np.array(["avoid", "caution", "safe", "unknown"])
    true, said = names[generator.integers(0, 4, (2, 300))].tolist()
    scores = label_scores(true, said)
    reference = dict(zip(names, recall_score(true, said, labels=names, average=None), strict=True))
    assert {name: score.value for name, score in scores.items()} == pytest.approx(reference)
    assert [score.value for score in scores.values()] == sorted(reference.values())
    assert sum(score.n for score in scores.values()) == 300
    n_confused = sum(n for _, _, n in confused_pairs(true, said, n_most=100))
    assert n_confused == 300 - right_answers(true, said).sum()


def test_worst_harm_counts_only_the_rows_that_can_be_harmed() -> None:
    labels = ["avoid"] * 8 + ["safe"] * 92
    said = ["safe", "safe", "unknown", *["avoid"] * 5, *["safe"] * 92]
    rate = worst_harm_rate(labels, said)
    assert (rate.value, rate.n) == (0.25, 8)
    with pytest.raises(UserError, match="no row has the label 'never'"):
        worst_harm_rate(labels, said, true="never")


def test_predictions_must_match_rows() -> None:
    with pytest.raises(UserError, match="one prediction for each row"):
        right_answers(["a", "b"], ["a"])


# Validation scores


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(8))
def test_single_label_scores_equal_scikit_learns(seed: int) -> None:
    generator = np.random.default_rng(seed)
    n_labels, n = int(generator.integers(2, 9)), int(generator.integers(1, 80))
    labels, predictions = generator.integers(0, n_labels, (2, n))
    scores = classification_scores(predictions, labels, n_labels)
    assert scores["accuracy"] == pytest.approx(accuracy_score(labels, predictions))
    assert scores["macro_f1"] == pytest.approx(f1_score(labels, predictions, average="macro"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(8))
def test_multi_label_scores_equal_scikit_learns(seed: int) -> None:
    generator = np.random.default_rng(seed)
    n_labels, n = int(generator.integers(2, 7)), int(generator.integers(1, 60))
    labels, predictions = (generator.random((2, n, n_labels)) < generator.random(n_labels)).astype(int)
    scores = classification_scores(predictions, labels, n_labels)
    macro = f1_score(labels, predictions, average="macro", zero_division=np.nan)
    assert scores["accuracy"] == pytest.approx(accuracy_score(labels, predictions))
    assert scores["macro_f1"] == pytest.approx(0.0 if math.isnan(macro) else macro)
    assert scores["micro_f1"] == pytest.approx(f1_score(labels, predictions, average="micro", zero_division=0.0))


def test_batches_equal_one_call(tmp_path: Path) -> None:
    labels, predictions = np.random.default_rng(0).integers(0, 5, (2, 100))
    for kind in (Accuracy, MacroF1):
        metric = kind(cache_dir=str(tmp_path))
        for i in range(0, 100, 7):
            metric.add_batch(predictions=predictions[i : i + 7], references=labels[i : i + 7])
        whole = kind(cache_dir=str(tmp_path)).compute(predictions=predictions, references=labels)
        assert metric.compute() == whole


def test_scoring_leaves_nothing_in_the_home_folder(tmp_path: Path) -> None:
    code = (
        "import numpy as np\n"
        "from llmft_nb.validation import classification_scores\n"
        "print(classification_scores(np.array([0, 1, 1]), np.array([0, 1, 0]), 2)['accuracy'])"
    )
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    home.mkdir()
    temporary.mkdir()
    names = {"HF_HOME", "HF_DATASETS_CACHE", "HF_EVALUATE_CACHE", "XDG_CACHE_HOME"}
    environment = {key: value for key, value in os.environ.items() if key not in names}
    path = f"{ROOT}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    environment |= {"HOME": str(home), "TMPDIR": str(temporary), "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip().startswith("0.666")
    assert not list(temporary.iterdir())
    assert not [path for path in home.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        ([], [], "no rows to score"),
        ([0, 1], [0], "differ in shape"),
        ([[0, 1]], [0], "differ in shape"),
        ([0, 5], [0, 1], "predictions: a value is not between 0 and 2"),
        ([0, 1], [0, -1], "labels: a value is not between 0 and 2"),
        ([[0, 2, 0]], [[0, 1, 0]], "not between 0 and 1"),
    ],
)
def test_arrays_that_cannot_be_scored(predictions: list[object], labels: list[object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        classification_scores(np.array(predictions, dtype=int), np.array(labels, dtype=int), 3)


def test_a_run_restored_at_any_point_stops_at_the_same_one() -> None:
    scores = [0.5, 0.6, 0.58, 0.61, 0.61, 0.60, 0.59, 0.7]
    alone = EarlyStopping(patience=3)
    expected = [(alone.update(score), alone.should_stop) for score in scores]
    for cut in range(len(scores)):
        first = EarlyStopping(patience=3)
        seen = [(first.update(score), first.should_stop) for score in scores[:cut]]
        second = EarlyStopping(patience=3)
        second.restore(first.state())
        seen += [(second.update(score), second.should_stop) for score in scores[cut:]]
        assert seen == expected


def test_patience_of_zero_never_stops_and_small_gains_can_be_ignored() -> None:
    patient = EarlyStopping(patience=0)
    for score in [0.9] + [0.1] * 50:
        patient.update(score)
        assert not patient.should_stop
    strict = EarlyStopping(patience=1, min_gain=0.01)
    assert [strict.update(score) for score in (0.80, 0.805, 0.82)] == [True, False, True]
    with pytest.raises(UserError, match="must not be negative"):
        EarlyStopping(patience=-1)


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_named(score: float) -> None:
    stopping = EarlyStopping(patience=2)
    stopping.update(0.5)
    with pytest.raises(UserError, match="validation score is"):
        stopping.update(score)
    assert stopping.state() == {"best": 0.5, "n_without_gain": 0}


def test_the_test_split_remembers_looks_of_an_earlier_process() -> None:
    split = TestSplit(["one", "two"], looks=1)
    assert len(split) == 2
    with pytest.raises(UserError, match=r"scored 1 time already.*validation score.*again=True"):
        split.score(len)
    assert split.score(len, again=True) == 2
    assert split.n_looks == 2


def test_importing_scores_is_quick_and_pulls_in_no_heavy_library() -> None:
    heavy = ("torch", "transformers", "datasets", "sklearn", "scipy")
    code = f"import llmft_nb.scores, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
