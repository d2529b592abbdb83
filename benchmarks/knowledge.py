"""How many rows does a verdict take? Learning curves on the house pharmacy, from the base and from random weights.

    python benchmarks/knowledge.py [--rows 100 300 1000 3000] [--ways full random@1e-3] [--seeds 3] [--json FILE]

For each number of rows (drawn from the training split, others for each seed) the embedded base is tuned in each of
the ways and asked about the whole test: phrasings of another hand, and pairs no training row is about. A way is a
strategy (`full`, `top:2`, `head`), or `random`: everything moves, from random weights. Each deserves a learning rate
of its own (`top:2@1e-3`; without one, --lr), and the epoch is chosen on no more validation rows than there are
training rows, or a hundred. Beside them stand the commonest label and word counts (TF-IDF with a logistic regression)
on the same rows. The last figure is the worst mistake: the share of what is to be avoided that was answered `safe`.

With --reasons the labels that are learnt are verdict and reason together (as on the tour); the verdict is what stands
before the colon, and the share of answers whose reason is right too is told as well. It takes rows enough that every
reason occurs among them.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
from tunes import Rows, answers_of_tune, difference, write_measured

from llmft_nb.demo import with_reasons
from llmft_nb.rows import read_rows
from llmft_nb.scores import majority_baseline, tfidf_baseline


def n_epochs(n_rows: int, steps: int, batch_size: int) -> int:
    "Epochs for about so many steps, whatever the rows: at least 3, at most 60."
    return max(3, min(60, round(steps * batch_size / n_rows)))


def tuned(train: Rows, sets: dict[str, Rows], way: str, arguments: argparse.Namespace, seed: int) -> np.ndarray:
    "What a tuned model answers to the test."
    way, _, rate = way.partition("@")
    start = {"init": "random"} if way == "random" else {"strategy": way}
    n_passes = n_epochs(len(train), arguments.steps, arguments.batch_size)
    options = {"model": arguments.model, "batch_size": arguments.batch_size, "epochs": n_passes}
    sets = {**sets, "valid": sets["valid"][: max(100, len(train))]}
    return answers_of_tune(train, sets, seed=seed, lr=float(rate or arguments.lr), **options, **start)["test"]


class Table:
    "Answers by number of rows, way and seed, and what they come to."

    def __init__(self, test: Rows, reasoned: Rows | None = None) -> None:
        self.labels = np.array([row["label"] for row in test])
        self.reasons = np.array([row["label"] for row in reasoned or test])
        why = np.array([row["split_reason"] for row in test])
        self.parts = {"all": why != "", "phrasings": why == "phrasing", "pairs": why == "pair"}
        self.answers: dict[tuple[int, str], list[np.ndarray]] = {}
        self.right_reasons: dict[tuple[int, str], list[float]] = {}

    def add(self, n_rows: int, way: str, answers: list[str] | np.ndarray) -> None:
        "Keep the verdicts; of answers with a reason, the share of right reasons too."
        if any(": " in answer for answer in answers):
            self.right_reasons.setdefault((n_rows, way), []).append(float(np.mean(answers == self.reasons)))
        self.answers.setdefault((n_rows, way), []).append(np.array([answer.split(":")[0] for answer in answers]))

    def right(self, n_rows: int, way: str) -> np.ndarray:
        "For each test row the share of seeds that answered it right."
        return np.mean([found == self.labels for found in self.answers[n_rows, way]], axis=0)

    def line(self, n_rows: int, way: str) -> dict[str, Any]:
        "Shares of right answers with what the seeds range over, and of `avoid` answered as `safe`."
        found = self.answers[n_rows, way]
        line: dict[str, Any] = {"rows": n_rows, "way": way, "seeds": len(found)}
        for part, chosen in self.parts.items():
            shares = [float((one == self.labels)[chosen].mean()) for one in found]
            line[part] = [float(np.mean(shares)), min(shares), max(shares)]
        avoid = self.labels == "avoid"
        line["avoid as safe"] = float(np.mean([(one == "safe")[avoid].mean() for one in found]))
        if (n_rows, way) in self.right_reasons:
            line["reasons"] = float(np.mean(self.right_reasons[n_rows, way]))
        return line

    def show(self, n_rows: int, way: str, seconds: float) -> None:
        line = self.line(n_rows, way)
        shares = "  ".join("{} {:5.1%} [{:.1%}, {:.1%}]".format(part, *line[part]) for part in self.parts)
        harm = f"avoid as safe {line['avoid as safe']:.1%}"
        reasons = f"  right reasons {line['reasons']:.1%}" if "reasons" in line else ""
        print(f"{n_rows:>6,} {way:<12} {shares}  {harm}{reasons}  {seconds:.0f} s", flush=True)

    def compare(self, n_rows: int, one: str, other: str) -> None:
        "The paired difference over all seeds, by part."
        for part, chosen in self.parts.items():
            found = difference(self.right(n_rows, one)[chosen], self.right(n_rows, other)[chosen])
            print(f"{n_rows:>6,} {one} minus {other}, {part}: {found}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--train", type=Path, help="a file of more training rows (tools/make_pharmacy.py --train)")
    parser.add_argument("--rows", type=int, nargs="+", default=[100, 300, 1000, 3000])
    parser.add_argument("--ways", nargs="+", default=["full", "random"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000, help="steps of the optimizer, about")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--reasons",
        action="store_true",
        help="learn verdict and reason as one label; needs rows that hold every reason",
    )
    parser.add_argument("--json", type=Path, help="write the lines there as well, after each number of rows")
    arguments = parser.parse_args()
    sets = {split: list(read_rows("pharmacy", split=split)) for split in ("train", "valid", "test")}
    if arguments.train:
        sets["train"] = list(read_rows(arguments.train))
    labelled = with_reasons(sets) if arguments.reasons else sets
    table = Table(sets["test"], labelled["test"])
    texts = [row["text"] for row in sets["test"]]
    for n_rows in arguments.rows:
        for way in ("commonest", "word counts", *arguments.ways):
            started = time.monotonic()
            for seed in range(arguments.seeds):
                chosen = random.Random(seed).sample(range(len(sets["train"])), min(n_rows, len(sets["train"])))  # noqa: S311
                train = [sets["train"][i] for i in chosen]
                labels = [row["label"] for row in train]
                if way == "commonest":
                    answers = majority_baseline(labels, len(texts))
                elif way == "word counts":
                    answers = tfidf_baseline([row["text"] for row in train], labels, texts)
                else:
                    answers = tuned([labelled["train"][i] for i in chosen], labelled, way, arguments, seed)
                table.add(n_rows, way, answers)
            table.show(n_rows, way, time.monotonic() - started)
        for other in ("word counts", *arguments.ways[1:]):
            table.compare(n_rows, arguments.ways[0], other)
        if arguments.json:
            write_measured(arguments.json, [table.line(*key) for key in table.answers])


if __name__ == "__main__":
    main()
