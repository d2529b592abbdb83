"""Intervals and paired tests against scipy, exact enumeration and worlds with a known truth."""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score
from sklearn.neighbors import KNeighborsClassifier

from llmft_nb.core import UserError
from llmft_nb.resampling import (
    MEAN,
    PERPLEXITY,
    RATIO,
    SPAN_F1,
    Interval,
    bootstrap_interval,
    f1_score_interval,
    fold_rows,
    holm,
    mean_score,
    paired_permutation,
    perplexity_score,
    ratio_score,
    resampled_means,
    seeded_difference,
    standard_errors,
)
from llmft_nb.scores import Score, knn_baseline, mcnemar_midp, nearest_rows, wilson_interval

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def coverage() -> ModuleType:
    "The benchmark, as a module."
    spec = importlib.util.spec_from_file_location("coverage_benchmark", ROOT / "benchmarks" / "coverage.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def span_counts(generator: np.random.Generator, n: int) -> np.ndarray:
    names = generator.poisson(1.0, n)
    hits = generator.binomial(names, 0.7)
    return np.stack([hits, generator.poisson(0.2, n), names - hits], axis=1).astype(float)


# Coverage


def test_intervals_cover_and_tests_keep_their_level(coverage: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert coverage.main(["--short"]) == 0, capsys.readouterr().out


def test_truths_of_the_worlds_are_those_of_many_rows(coverage: ModuleType) -> None:
    "The closed forms the coverage is counted against."
    for world in coverage.worlds():
        rows = world.draw(np.random.default_rng(5), 400_000).reshape(400_000, -1)
        value = float(world.statistic.of_means(rows.mean(axis=0)))
        value = math.exp(value) if world.statistic.exponential else value
        assert value == pytest.approx(world.truth, rel=0.01), world.name


def test_a_line_outside_its_band_fails_the_benchmark(coverage: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = coverage.Line("too narrow", 300, 1000, 0.90, 0.95, 0.015, True)
    known = coverage.Line("few rows", 30, 1000, 0.90, 0.95, 0.015, False)
    monkeypatch.setattr(coverage, "table", lambda short, methods: iter([bad, known]))
    assert coverage.main([]) == 1
    assert "FAILS" in bad.describe() and "falls short" in known.describe()


# Intervals against scipy


@pytest.mark.parametrize("seed", range(6))
def test_bca_of_a_mean_equals_scipys(seed: int) -> None:
    generator = np.random.default_rng(seed)
    values = generator.beta(*generator.uniform(0.5, 4, 2), int(generator.integers(25, 200)))
    ours = bootstrap_interval(values, n_resamples=9999)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=9999, method="BCa", rng=seed).confidence_interval
    error = values.std() / math.sqrt(len(values))
    assert ours == pytest.approx(tuple(theirs), abs=0.12 * error)


def test_bca_of_skewed_values_equals_scipys() -> None:
    "Few values, most of them near zero: here bias and acceleration both count."
    values = np.random.default_rng(0).beta(0.2, 4, 25)
    ours = bootstrap_interval(values, n_resamples=20_000)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="BCa", rng=0).confidence_interval
    plain = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=0).confidence_interval
    error = values.std() / math.sqrt(len(values))
    assert ours == pytest.approx(tuple(theirs), abs=0.08 * error)
    assert ours[1] - plain.high > 0.3 * error


@pytest.mark.parametrize("seed", range(3))
def test_bca_of_span_f1_equals_scipys(seed: int) -> None:
    counts = span_counts(np.random.default_rng(seed), 80)

    def f1(hits: np.ndarray, false: np.ndarray, missed: np.ndarray, axis: int = -1) -> np.ndarray:
        return 2 * hits.sum(axis) / (2 * hits.sum(axis) + false.sum(axis) + missed.sum(axis))

    theirs = stats.bootstrap(tuple(counts.T), f1, paired=True, n_resamples=9999, method="BCa", rng=seed)
    ours = f1_score_interval(*counts.T)
    assert ours.value == pytest.approx(f1(*counts.T))
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.15 * theirs.standard_error)


def test_student_interval_equals_a_bootstrap_t_done_by_hand() -> None:
    "One sample at a time, with the delta method written out for a ratio."
    generator = np.random.default_rng(3)
    n = 60
    by = generator.integers(5, 60, n).astype(float)
    counted = by * generator.normal(2, 0.5, n)

    def ratio_and_error(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
        ratio = a.sum() / b.sum()
        return ratio, math.sqrt(np.sum((a - ratio * b) ** 2) / (len(a) * (len(a) - 1))) / b.mean()

    value, error = ratio_and_error(counted, by)
    distances = []
    for _ in range(6000):
        drawn = generator.integers(0, n, n)
        ratio, its_error = ratio_and_error(counted[drawn], by[drawn])
        distances.append((ratio - value) / its_error)
    low, high = np.quantile(distances, [0.025, 0.975])
    table = np.column_stack([counted, by])
    centre = table.mean(axis=0)
    products = np.cov(table.T, bias=True)
    assert float(standard_errors(RATIO, centre, products, centre, n)) == pytest.approx(error, rel=1e-6)
    ours = bootstrap_interval(table, RATIO, n_resamples=6000)
    assert ours == pytest.approx((value - high * error, value - low * error), abs=0.12 * error)


def test_perplexity_is_the_exponential_of_the_ratio() -> None:
    generator = np.random.default_rng(4)
    n_tokens = generator.integers(1, 90, 120)
    losses = n_tokens * generator.normal(3, 0.3, 120)
    perplexity, ratio = perplexity_score(losses, n_tokens), ratio_score(losses, n_tokens)
    assert perplexity.value == pytest.approx(math.exp(losses.sum() / n_tokens.sum()))
    assert [perplexity.low, perplexity.high] == pytest.approx([math.exp(ratio.low), math.exp(ratio.high)])


# What must always hold


@pytest.mark.parametrize("seed", range(40))
def test_intervals_are_ordered_inside_and_repeatable(seed: int) -> None:
    generator = np.random.default_rng(seed)
    n = int(generator.choice([1, 2, 3, 5, 12, 60]))
    values = generator.choice([0.0, 0.5, 1.0], n)
    counts = span_counts(generator, n) + np.array([1.0, 0, 0])
    for rows, statistic in (
        (values, MEAN),
        (counts, SPAN_F1),
        (counts[:, 1::-1], PERPLEXITY),
        (counts[:, 1::-1], RATIO),
    ):
        table = np.asarray(rows).reshape(n, -1)
        value = float(statistic.of_means(table.mean(axis=0)))
        value = math.exp(value) if statistic.exponential else value
        low, high = bootstrap_interval(rows, statistic, n_resamples=300, seed=seed)
        assert low <= value <= high
        assert (low, high) == bootstrap_interval(rows, statistic, n_resamples=300, seed=seed)
        wide = bootstrap_interval(rows, statistic, n_resamples=300, seed=seed, confidence=0.99)
        assert wide[0] <= low + 1e-9 and wide[1] >= high - 1e-9
        if statistic in (MEAN, SPAN_F1):
            assert 0 <= low <= high <= 1


def test_no_variation_at_an_end_is_not_certainty() -> None:
    assert bootstrap_interval(np.ones(50)) == wilson_interval(50, 50)
    assert bootstrap_interval(np.zeros(50)) == wilson_interval(0, 50)
    assert mean_score([1.0]).describe() == "mean 100.0 % [0.0, 100.0] of 1"
    perfect = np.tile([2.0, 0, 0], (30, 1))
    assert bootstrap_interval(perfect, SPAN_F1) == wilson_interval(30, 30)
    assert bootstrap_interval(np.full(50, 0.5)) == (0.5, 0.5)


def test_folding_keeps_the_mean_and_its_error() -> None:
    rows = np.random.default_rng(0).gamma(1.0, 2.0, (123_457, 2))
    folded = fold_rows(rows, np.random.default_rng(1))
    assert len(folded) == 10_000
    assert folded.mean(axis=0) == pytest.approx(rows.mean(axis=0))
    ratio = (folded.std(axis=0) / math.sqrt(len(folded))) / (rows.std(axis=0) / math.sqrt(len(rows)))
    assert ratio == pytest.approx(1, abs=0.05)
    assert fold_rows(rows[:20_000], np.random.default_rng(1)) is not None
    low, high = bootstrap_interval(rows[:, 0] / rows[:, 0].max())
    assert high - low == pytest.approx(2 * 1.96 * (rows[:, 0] / rows[:, 0].max()).std() / math.sqrt(123_457), rel=0.08)


def test_drawn_means_are_means_of_drawn_rows() -> None:
    "Every drawn mean of three distinct powers of a base is a sum of as many rows as there are."
    rows = np.array([[1.0], [10.0], [100.0]])
    means = resampled_means(rows, 500, np.random.default_rng(0))
    possible = {sum(three) / 3 for three in itertools.product((1.0, 10.0, 100.0), repeat=3)}
    assert {round(float(mean), 6) for mean in means[:, 0]} <= {round(value, 6) for value in possible}
    assert len({round(float(mean), 6) for mean in means[:, 0]}) == 10


@pytest.mark.parametrize(
    ("rows", "statistic", "message"),
    [
        ([], MEAN, "at least one row"),
        ([0.5, math.nan], MEAN, "row 1"),
        ([0.5, 1.5], MEAN, None),
        ([80.0, 90.0], MEAN, "shares in per cent"),
        ([[1, 0]], SPAN_F1, "rows of 3"),
        ([[0, 0, 0]], SPAN_F1, "nothing to count"),
        ([[1.0, 0.0]], PERPLEXITY, "nothing to count"),
        ([[math.inf, 3]], PERPLEXITY, "not a finite number"),
    ],
)
def test_rows_that_no_score_can_be_made_of(rows: list[object], statistic: object, message: str | None) -> None:
    if message is None:  # The mean is in range, and single values are not policed
        assert bootstrap_interval(np.array(rows, dtype=float), statistic)
        return
    with pytest.raises(UserError, match=message):
        bootstrap_interval(np.array(rows, dtype=float), statistic)


def test_intervals_are_scores_and_speak() -> None:
    score = f1_score_interval([1, 2, 0], [0, 1, 0], [1, 0, 0])
    assert isinstance(score, Score)
    assert score.value == pytest.approx(f1_score([1, 1, 1, 0, 1], [1, 1, 1, 1, 0]))
    assert Interval(1234.5, 1100.2, 1400.7, 62, "perplexity", False).describe() == (
        "perplexity 1,234 [1,100, 1,401] of 62 rows"
    )
    assert Interval(0.01234, 0.01, 0.02, 5, "x", False).describe() == "x 0.0123 [0.0100, 0.0200] of 5 rows"
    assert Interval(0.0, 0.0, 0.0, 5, "KL", False).describe() == "KL 0.00 [0.00, 0.00] of 5 rows"


# Paired tests


def exact_p(a: np.ndarray, b: np.ndarray, score: Callable[[np.ndarray], float]) -> float:
    "All swaps, one after the other."
    observed, n_as_large, n_all = abs(score(a) - score(b)), 0, 0
    for swap in itertools.product((False, True), repeat=len(a)):
        chosen = np.array(swap)[:, None]
        difference = score(np.where(chosen, b, a)) - score(np.where(chosen, a, b))
        n_as_large += abs(difference) >= observed - 1e-12
        n_all += 1
    return n_as_large / n_all


@pytest.mark.parametrize("seed", range(10))
def test_few_rows_are_enumerated(seed: int) -> None:
    generator = np.random.default_rng(seed)
    a, b = span_counts(generator, 9) + [1, 0, 0], span_counts(generator, 9) + [1, 0, 0]
    total = paired_permutation(a, b, SPAN_F1)
    assert total.p_value == pytest.approx(
        exact_p(a, b, lambda rows: 2 * rows[:, 0].sum() / (2 * rows[:, 0] + rows[:, 1] + rows[:, 2]).sum())
    )
    values = generator.random((2, 9))
    mean = paired_permutation(*values)
    assert mean.p_value == pytest.approx(exact_p(values[0][:, None], values[1][:, None], np.mean))


@pytest.mark.parametrize("seed", range(4))
def test_many_rows_agree_with_scipy(seed: int) -> None:
    generator = np.random.default_rng(seed)
    a = generator.random(70)
    b = np.clip(a + generator.normal(0.03, 0.15, 70), 0, 1)
    theirs = stats.permutation_test(
        (a, b), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples", n_resamples=9999, rng=seed
    )
    assert paired_permutation(a, b).p_value == pytest.approx(theirs.pvalue, abs=0.02)


def test_zeros_and_ones_agree_with_mcnemar() -> None:
    "On right answers the permutation test is McNemar's exact test, a little more careful than its mid-p."
    right_a = np.array([1.0] * 365 + [0.0] * 35)
    right_b = np.array([1.0] * 345 + [0.0] * 20 + [1.0] * 5 + [0.0] * 30)
    found, mcnemar = paired_permutation(right_a, right_b), mcnemar_midp(right_a, right_b)
    assert found.p_value == pytest.approx(stats.binomtest(5, 25).pvalue, abs=0.002)
    assert found.verdict() == mcnemar.verdict() == "better"
    assert (found.low, found.high) == pytest.approx((mcnemar.low, mcnemar.high), abs=0.01)
    assert found.n_differ == 25


def test_order_swapping_and_direction() -> None:
    generator = np.random.default_rng(0)
    n_tokens = generator.integers(10, 50, 90).astype(float)
    a = np.column_stack([n_tokens * generator.normal(3.0, 0.3, 90), n_tokens])
    b = a + np.column_stack([n_tokens * generator.normal(0.1, 0.1, 90), np.zeros(90)])
    one, other = paired_permutation(a, b, PERPLEXITY), paired_permutation(b, a, PERPLEXITY)
    assert (one.verdict(), other.verdict()) == ("better", "worse")
    assert (one.difference, one.low, one.high) == pytest.approx((-other.difference, -other.high, -other.low), abs=5e-3)
    assert one.p_value == other.p_value
    assert one.low < -0.1 < one.high
    same = paired_permutation(a, a, PERPLEXITY)
    assert (same.p_value, same.difference, same.low, same.high, same.n_differ) == (1.0, 0.0, 0.0, 0.0, 0)
    assert same.verdict() == "no difference shown"


def test_where_seeds_agree_rows_decide_as_in_a_paired_t_test() -> None:
    "Every seed gives the same scores: no spread over seeds, and Student's paired test over rows is left."
    rows_a, rows_b = np.random.default_rng(0).random((2, 60))
    found = seeded_difference(np.tile(rows_a, (4, 1)), np.tile(rows_b + 0.05, (4, 1)))
    reference = stats.ttest_rel(rows_a, rows_b + 0.05)
    assert found.p_value == pytest.approx(reference.pvalue, rel=1e-9)
    interval = reference.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert (found.n, found.n_differ) == (60, 60)


def test_where_rows_agree_seeds_decide_as_in_a_paired_t_test() -> None:
    seeds_a, seeds_b = np.random.default_rng(1).random((2, 5))
    found = seeded_difference(np.repeat(seeds_a[:, None], 30, axis=1), np.repeat(seeds_b[:, None], 30, axis=1))
    reference = stats.ttest_rel(seeds_a, seeds_b)
    assert found.p_value == pytest.approx(reference.pvalue, rel=1e-9)
    assert found.difference == pytest.approx(np.mean(seeds_a - seeds_b))


def test_two_ways_that_are_alike_are_told_apart_once_in_twenty() -> None:
    "Rows of unlike hardness, seeds of unlike luck, and both at once: the level holds, whatever the spread comes from."
    generator = np.random.default_rng(2)
    for luck, n_seeds in ((0.0, 3), (0.05, 3), (0.2, 3), (0.2, 8)):

        def way(hard: np.ndarray, luck: float = luck, n_seeds: int = n_seeds) -> np.ndarray:
            own = generator.normal(0, luck, (n_seeds, 1))
            return (generator.normal(size=(n_seeds, len(hard))) + own > hard).astype(float)

        n_alarms = 0
        for _ in range(400):
            hard = generator.normal(size=150)
            n_alarms += seeded_difference(way(hard), way(hard)).p_value < 0.05
        assert n_alarms <= 30, f"{n_alarms} of 400 at luck {luck}, {n_seeds} seeds: 20 are expected"


def test_a_difference_that_is_there_is_found() -> None:
    generator = np.random.default_rng(3)
    hard = generator.normal(size=400)
    rows_a, rows_b = ((generator.normal(size=(5, 400)) + gain > hard).astype(float) for gain in (0.4, 0.0))
    found = seeded_difference(rows_a, rows_b)
    assert found.verdict() == "better" and found.low > 0.05
    mirrored = seeded_difference(rows_b, rows_a)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low))
    assert mirrored.p_value == pytest.approx(found.p_value)


def test_holm_equals_a_published_definition() -> None:
    "Step down: reject the i-th smallest while all before it are rejected and it is at most alpha / (m - i)."
    generator = np.random.default_rng(0)
    for _ in range(200):
        p = generator.random(int(generator.integers(1, 9))) ** 3
        corrected = holm(p.tolist())
        for alpha in (0.01, 0.05, 0.2):
            rejected = np.zeros(len(p), dtype=bool)
            for i, place in enumerate(np.argsort(p)):
                if p[place] > alpha / (len(p) - i):
                    break
                rejected[place] = True
            assert [value <= alpha for value in corrected] == rejected.tolist()
        assert np.all(np.array(corrected) >= p)


# Nearest neighbours


@pytest.mark.parametrize("k", [1, 3, 9])
def test_neighbours_vote_as_scikit_learns(k: int) -> None:
    generator = np.random.default_rng(k)
    features, asked = generator.normal(size=(150, 8)), generator.normal(size=(60, 8))
    labels = [f"label {i % 4}" for i in range(150)]
    reference = KNeighborsClassifier(k, weights="distance", metric="cosine").fit(features, labels)
    assert knn_baseline(features, labels, asked, k=k) == reference.predict(asked).tolist()
    assert knn_baseline(100 * features, labels, 0.01 * asked, k=k) == reference.predict(asked).tolist()


def test_the_number_of_neighbours_is_the_best_on_the_training_rows() -> None:
    "One label in four is noise: a single neighbour is fooled by it, many are not."
    generator = np.random.default_rng(0)
    angle = generator.uniform(0, math.pi, 400)
    features, true = np.column_stack([np.cos(angle), np.sin(angle)]), np.where(angle < math.pi / 2, "a", "b")
    noisy = np.where(generator.random(400) < 0.25, np.where(true == "a", "b", "a"), true).tolist()
    right = {
        k: np.mean(np.array(knn_baseline(features[:300], noisy[:300], features[300:], k)) == true[300:])
        for k in (None, 1, 15)
    }
    assert right[None] >= right[15] - 0.02
    assert right[None] > right[1] + 0.02
    clean = knn_baseline(features[:300], true[:300].tolist(), features[300:])
    assert np.mean(np.array(clean) == true[300:]) > 0.97


def test_equally_near_rows_are_taken_in_order_and_oneself_is_left_out() -> None:
    twins = np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    rows, near = nearest_rows(twins, twins, 2, without=np.arange(4))
    assert rows.tolist() == [[1, 3], [0, 3], [0, 1], [0, 1]]
    assert near[0] == pytest.approx([1, 1])
    assert knn_baseline(twins, ["b", "a", "c", "a"], np.array([[5.0, 0.0]]), k=2) == ["a"]


def test_neighbours_of_few_odd_and_several_labels() -> None:
    one = np.array([[1.0, 2.0]])
    assert knn_baseline(one, ["only"], np.zeros((2, 2))) == ["only", "only"]
    assert knn_baseline(one, ["only"], np.zeros((0, 2))) == []
    several = [["card"], ["card", "urgent"], ["pin"], []]
    features = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 0.0]])
    assert knn_baseline(features, several, np.array([[1.0, 0.09], [-1.0, 0.1]]), k=1) == [["card", "urgent"], []]
    assert isinstance(knn_baseline(features, several, np.array([[1.0, 0.05]]))[0], list)
    # Two near rows say "card", of which one says "urgent" too, and a far one "pin": half of the weight is not enough
    assert knn_baseline(features, several, np.array([[1.0, 0.03]]), k=3) == [["card"]]
    with pytest.raises(UserError, match="finite rows of one width"):
        knn_baseline(features, several, np.array([[math.nan, 0.0]]))
    with pytest.raises(UserError, match="finite rows of one width"):
        knn_baseline(features, several, np.ones((2, 3)))
