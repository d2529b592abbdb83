"""Every number of a report against another library's: scikit-learn, scipy, or the formula in a book; 200 cases each."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score

from llmft_nb.resampling import MEAN, bootstrap_interval, f1_score_interval
from llmft_nb.scores import binomial_midp, mcnemar_midp, wilson_interval
from llmft_nb.validation import classification_scores, f1_by_label

N_CASES = 200
TOLERANCE = 1e-6


@pytest.fixture(scope="module", autouse=True)
def no_warnings() -> None:
    "scikit-learn warns of labels that nobody has; that is one of the cases."
    warnings.simplefilter("ignore")


@pytest.fixture(scope="module")
def score(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, float]]:
    "The package's scores, with one folder for all of `evaluate`'s files."
    folder = tmp_path_factory.mktemp("evaluate")
    return lambda said, true, n_labels: classification_scores(said, true, n_labels, Path(folder))


def skewed_labels(generator: np.random.Generator, shape: tuple[int, ...], n_labels: int) -> np.ndarray:
    "Label numbers, some of them rare or absent."
    return generator.choice(n_labels, shape, p=generator.dirichlet(np.full(n_labels, 0.4)))


def test_single_label_scores(score: Callable[..., dict[str, float]]) -> None:
    generator = np.random.default_rng(0)
    for case in range(N_CASES):
        n, n_labels = int(generator.integers(1, 120)), int(generator.integers(2, 25))
        true = skewed_labels(generator, (n,), n_labels)
        said = np.where(generator.random(n) < generator.random(), true, skewed_labels(generator, (n,), n_labels))
        ours = score(said, true, n_labels)
        assert set(ours) == {"accuracy", "macro_f1"}
        assert ours["accuracy"] == pytest.approx(accuracy_score(true, said), abs=TOLERANCE), case
        assert ours["macro_f1"] == pytest.approx(f1_score(true, said, average="macro"), abs=TOLERANCE), case


def test_multi_label_scores(score: Callable[..., dict[str, float]]) -> None:
    generator = np.random.default_rng(1)
    for case in range(N_CASES):
        n, n_labels = int(generator.integers(1, 80)), int(generator.integers(2, 12))
        rates = generator.random(n_labels) ** 3
        true = (generator.random((n, n_labels)) < rates).astype(int)
        said = np.where(generator.random((n, n_labels)) < 0.8, true, generator.random((n, n_labels)) < rates)
        ours = score(said.astype(int), true, n_labels)
        macro = f1_score(true, said, average="macro", zero_division=np.nan)
        assert ours["accuracy"] == pytest.approx(accuracy_score(true, said), abs=TOLERANCE), case
        assert ours["macro_f1"] == pytest.approx(0.0 if math.isnan(macro) else macro, abs=TOLERANCE), case
        micro = f1_score(true, said, average="micro", zero_division=0.0)
        assert ours["micro_f1"] == pytest.approx(micro, abs=TOLERANCE), case


def test_f1_of_each_label() -> None:
    generator = np.random.default_rng(2)
    for _ in range(N_CASES):
        n, n_labels = int(generator.integers(1, 60)), int(generator.integers(2, 9))
        true, said = (generator.random((2, n, n_labels)) < generator.random(n_labels) ** 2).astype(int)
        reference = f1_score(true, said, average=None, zero_division=np.nan)
        np.testing.assert_allclose(f1_by_label(said, true), reference, atol=TOLERANCE)


def test_micro_f1_of_counts_by_row() -> None:
    "The span F1 of rows is scikit-learn's micro F1 where every decision is a column of its own."
    generator = np.random.default_rng(3)
    for _ in range(N_CASES):
        n, n_labels = int(generator.integers(2, 60)), int(generator.integers(1, 9))
        true, said = (generator.random((2, n, n_labels)) < 0.4).astype(int)
        true[0, 0] = 1
        counts = [np.sum(part, axis=1) for part in (true & said, said & (1 - true), true & (1 - said))]
        reference = f1_score(true.ravel(), said.ravel())
        assert f1_score_interval(*counts).value == pytest.approx(reference, abs=TOLERANCE)


def test_wilson() -> None:
    "scipy's, and the roots of the equation it comes from: the shares p with |k/n - p| = z sqrt(p (1 - p) / n)."
    generator = np.random.default_rng(4)
    for _ in range(N_CASES):
        n = int(10 ** generator.uniform(0, 5))
        n_right, confidence = int(generator.integers(0, n + 1)), float(generator.uniform(0.5, 0.999))
        low, high = wilson_interval(n_right, n, confidence)
        reference = stats.binomtest(n_right, n).proportion_ci(confidence, method="wilson")
        assert (low, high) == pytest.approx(tuple(reference), abs=1e-9)
        z, share = stats.norm.ppf(0.5 + confidence / 2), n_right / n
        roots = np.roots([1 + z * z / n, -2 * share - z * z / n, share * share])
        assert sorted(roots.real) == pytest.approx([low, high], abs=1e-6)


def test_mcnemar_midp() -> None:
    "The exact two-sided p-value less the chance of the observed split."
    generator = np.random.default_rng(5)
    for _ in range(N_CASES):
        n_a, n_b = (int(count) for count in generator.integers(0, 10 ** generator.integers(1, 4), 2))
        n, fewer = n_a + n_b, min(n_a, n_b)
        exact = 2 * stats.binom.cdf(fewer, n, 0.5) - stats.binom.pmf(fewer, n, 0.5) if n_a != n_b else 1.0
        right_a = np.array([True] * n_a + [False] * n_b + [True, False])
        right_b = np.array([False] * n_a + [True] * n_b + [True, False])
        found = mcnemar_midp(right_a, right_b)
        assert (found.n_only_a, found.n_only_b) == (n_a, n_b)
        assert found.p_value == pytest.approx(exact, abs=1e-9)
        assert binomial_midp(fewer, n) == found.p_value


def test_bca_within_the_error_of_drawing() -> None:
    "Twenty seeds of scipy's own scatter by so much; ours stays among them."
    generator = np.random.default_rng(6)
    for case in range(10):
        values = generator.beta(*generator.uniform(0.5, 3, 2), int(generator.integers(30, 150)))
        theirs = np.array(
            [
                stats.bootstrap((values,), np.mean, n_resamples=2000, method="BCa", rng=seed).confidence_interval
                for seed in range(20)
            ]
        )
        ours = bootstrap_interval(values, MEAN, n_resamples=2000, seed=case)
        assert np.all(np.abs(ours - theirs.mean(axis=0)) < 4 * theirs.std(axis=0, ddof=1)), case
