"""Do intervals hold the truth as often as they say, and do tests cry wolf as seldom? Worlds with a known truth tell.

    python benchmarks/coverage.py            about five minutes on one core
    python benchmarks/coverage.py --short    about a quarter of a minute, with wider bands

Each line of the table is a world: test sets are drawn from it again and again, and the share of the 95 % intervals that
hold the true score is counted, or the share of tests that call two equally good models different. Wilson's intervals
need no drawing: their coverage is a sum over the binomial distribution. With 300 rows or more an interval must hold the
truth in 95 % ± 1.5 % of the sets, and a test must raise 5 % ± 2 % false alarms; below that, and in the worlds called
hard, the table says where they fall short. `--methods` compares the three ways to make an interval. The exit status is
1 where a line that must hold does not.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from llmft_nb.resampling import MEAN, PERPLEXITY, SPAN_F1, Statistic, bootstrap_interval, paired_permutation
from llmft_nb.scores import mcnemar_midp, wilson_interval

Draw = Callable[[np.random.Generator, int], np.ndarray]


@dataclass(frozen=True)
class World:
    "Where test rows come from."

    name: str  # As the table calls it
    statistic: Statistic  # The score
    draw: Draw  # Generator and number of rows to rows
    truth: float  # The score of endlessly many rows, as it is written
    hard: bool = False  # Shown, but not required to hold


@dataclass(frozen=True)
class Line:
    "A line of the table."

    what: str  # World and method
    n: int  # Rows of each test set
    n_trials: int  # Test sets; 0 where the share is exact
    share: float  # Intervals that held the truth, or tests that raised a false alarm
    wanted: float  # What it should be
    band: float  # How far off it may be
    required: bool  # Whether the line must hold
    seconds: float = 0.0  # It took

    @property
    def holds(self) -> bool:
        "Whether the share is in the band, the error of counting allowed for where there are few trials."
        return abs(self.share - self.wanted) <= self.band + 1e-9

    def describe(self) -> str:
        "The line as text."
        state = "ok" if self.holds else ("FAILS" if self.required else "falls short")
        if not self.holds and not self.required and (self.share > self.wanted) == (self.wanted > 0.5):
            state = "too careful"
        trials = f"{self.n_trials:,}" if self.n_trials else "exact"
        return f"{self.what:46s} {self.n:6,} {trials:>7s} {100 * self.share:7.1f} %   {state}"


def token_f1_rows(generator: np.random.Generator, n: int) -> np.ndarray:
    "Three in ten answers are wrong, a quarter is right, the others are partly right."
    kind = generator.random(n)
    return np.where(kind < 0.3, 0.0, np.where(kind < 0.55, 1.0, generator.beta(2, 2, n)))


def good_token_f1_rows(generator: np.random.Generator, n: int) -> np.ndarray:
    "Nineteen in twenty answers are right."
    return np.where(generator.random(n) < 0.95, 1.0, generator.beta(2, 2, n))


def span_rows(generator: np.random.Generator, n: int) -> np.ndarray:
    "Names in four of ten sentences; some sentences are harder than others, for hits and for false alarms."
    hardness = generator.beta(2, 3, n)
    n_names = generator.poisson(1.2, n) * (generator.random(n) < 0.6)
    n_hit = generator.binomial(n_names, 1 - hardness)
    return np.stack([n_hit, generator.poisson(0.15 + 0.4 * hardness), n_names - n_hit], axis=1)


def good_span_rows(generator: np.random.Generator, n: int) -> np.ndarray:
    "The same sentences, hardly a name missed."
    n_names = generator.poisson(1.2, n) * (generator.random(n) < 0.6)
    n_hit = generator.binomial(n_names, 1 - generator.beta(0.3, 10, n))
    return np.stack([n_hit, generator.poisson(0.02, n), n_names - n_hit], axis=1)


def loss_rows(spread: float, slope: float) -> Draw:
    "Texts whose lengths spread log-normally and whose loss grows with the length; their true ratio is known."

    def draw(generator: np.random.Generator, n: int) -> np.ndarray:
        off = generator.normal(0, spread, n)
        n_tokens = np.exp(3.3 + off)
        return np.stack([n_tokens * (3 + slope * off + generator.normal(0, 0.6, n)), n_tokens], axis=1)

    return draw


def worlds() -> list[World]:
    "All worlds; each truth is a closed form."
    hits, good_hits, names = 1 - 2 / 5, 1 - 0.3 / 10.3, 1.2 * 0.6
    f1 = 2 * hits / (hits + 1 + (0.15 + 0.4 * 2 / 5) / names)
    good_f1 = 2 * good_hits / (good_hits + 1 + 0.02 / names)
    # E[L * off] / E[L] is the squared spread for a log-normal length L
    return [
        World("mean token F1", MEAN, token_f1_rows, 0.25 + 0.45 / 2),
        World("mean token F1, near 1", MEAN, good_token_f1_rows, 0.95 + 0.05 / 2),
        World("span F1", SPAN_F1, span_rows, f1),
        World("span F1, near 1", SPAN_F1, good_span_rows, good_f1),
        World("perplexity", PERPLEXITY, loss_rows(0.6, 0.1), math.exp(3 + 0.1 * 0.6**2)),
        World("perplexity, lengths 1 to 100", PERPLEXITY, loss_rows(1.2, 0.3), math.exp(3 + 0.3 * 1.2**2), hard=True),
    ]


def wilson_lines(n: int) -> Iterator[Line]:
    "Exact coverage of Wilson's interval for some true shares."
    ends = np.array([wilson_interval(k, n) for k in range(n + 1)])
    counts = np.arange(n + 1)
    log_ways = np.array([math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in counts])
    for share in (0.5, 0.8, 0.93, 0.98):
        chance = np.exp(log_ways + counts * math.log(share) + (n - counts) * math.log(1 - share))
        held = float(chance[(ends[:, 0] <= share) & (share <= ends[:, 1])].sum())
        yield Line(f"Wilson, share {share}", n, 0, held, 0.95, 0.015, n >= 300)


def interval_line(world: World, n: int, n_trials: int, n_resamples: int, slack: float) -> Line:
    "Share of the bootstrap intervals that hold the truth."
    generator, started_s, held = np.random.default_rng([n, len(world.name)]), time.monotonic(), 0
    for trial in range(n_trials):
        rows = world.draw(generator, n)
        low, high = bootstrap_interval(rows, world.statistic, n_resamples, seed=trial)
        held += low <= world.truth <= high
    required = n >= 300 and not world.hard
    what = f"{world.statistic.method} interval: {world.name}"
    return Line(what, n, n_trials, held / n_trials, 0.95, 0.015 + slack, required, time.monotonic() - started_s)


def alarm_line(world: World, n: int, n_trials: int, n_swaps: int, slack: float) -> Line:
    "Share of the permutation tests that call two equally good models different."
    generator, started_s, alarms = np.random.default_rng([n, len(world.name), 1]), time.monotonic(), 0
    for trial in range(n_trials):
        first, second = world.draw(generator, n), world.draw(generator, n)
        if world.statistic is PERPLEXITY:  # The same texts, each with a noise of its own
            text, noise = first, generator.normal(0, 0.3, (2, n))
            first, second = (text + np.stack([text[:, 1] * own, np.zeros(n)], axis=1) for own in noise)
        alarms += paired_test_p(first, second, world.statistic, n_swaps, trial) < 0.05
    what = f"permutation test: {world.name}"
    required = n >= 300 and not world.hard
    return Line(what, n, n_trials, alarms / n_trials, 0.05, 0.02 + slack, required, time.monotonic() - started_s)


def paired_test_p(first: np.ndarray, second: np.ndarray, statistic: Statistic, n_swaps: int, seed: int) -> float:
    "The p-value alone."
    return paired_permutation(first, second, statistic, n_swaps, seed, n_draws=2).p_value


def mcnemar_line(n: int, differing: float, n_trials: int, slack: float) -> Line:
    "Share of McNemar tests that call two equally good models different."
    generator, started_s, alarms = np.random.default_rng([n, 2]), time.monotonic(), 0
    for _ in range(n_trials):
        right, differ = generator.random((2, n)) < np.array([[0.5], [differing]])
        alarms += mcnemar_midp(right, right ^ differ).p_value < 0.05
    required = n >= 300 and n * differing >= 80
    what = f"McNemar mid-p: about {n * differing:.0f} rows differ"
    return Line(what, n, n_trials, alarms / n_trials, 0.05, 0.02 + slack, required, time.monotonic() - started_s)


def table(short: bool, methods: bool) -> Iterator[Line]:
    "All lines, one after the other."
    sizes = (300,) if short else (30, 100, 300, 1000)
    n_trials, n_resamples, n_swaps = (1000, 500, 199) if short else (2000, 1000, 499)
    slack = {share: 2 * math.sqrt(share * (1 - share) / n_trials) if short else 0.0 for share in (0.95, 0.05)}
    for n in (*sizes, *(() if short else (3000,))):
        yield from wilson_lines(n)
    for world in worlds():
        kinds = ("bca", "student", "percentile") if methods else (world.statistic.method,)
        for method in kinds:
            tried = dataclasses.replace(world, statistic=dataclasses.replace(world.statistic, method=method))
            tried = dataclasses.replace(tried, hard=world.hard or method != world.statistic.method)
            yield from (interval_line(tried, n, n_trials, n_resamples, slack[0.95]) for n in sizes)
    for n, differing in ((30, 0.3), (100, 0.3), (300, 0.05), (300, 0.3), (1000, 0.1)):
        if n in sizes:
            yield mcnemar_line(n, differing, 4 * n_trials, slack[0.05] / 2)
    for world in worlds():
        yield from (alarm_line(world, n, n_trials, n_swaps, slack[0.05]) for n in sizes)


def main(arguments: list[str] | None = None) -> int:
    "Print the table; 1 where a line that must hold does not."
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--short", action="store_true", help="300 rows only, few trials, wider bands")
    parser.add_argument("--methods", action="store_true", help="all three kinds of interval for each score")
    options = parser.parse_args(arguments)
    started_s, lines = time.monotonic(), []
    print(f"{'':46s} {'rows':>6s} {'trials':>7s} {'held or false':>13s}")
    for line in table(options.short, options.methods):
        lines.append(line)
        print(line.describe(), flush=True)
    failed = [line for line in lines if line.required and not line.holds]
    print(f"{len(lines)} lines, {len(failed)} of them fail, {time.monotonic() - started_s:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
