"What the benchmarks of the embedded world share: one tune and what it answers, and how a difference is said."

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from llmft_nb.finetune import FinishedRun, finetune
from llmft_nb.report import read_lines
from llmft_nb.resampling import paired_permutation
from llmft_nb.runs import describe_environment

Rows = list[dict[str, Any]]


@contextmanager
def tuned(train: Rows, sets: Mapping[str, Rows], **options: Any) -> Iterator[FinishedRun]:
    "A run tuned with `options` of `finetune` and asked about `sets['test']`; its folder is gone afterwards."
    given = {"valid": sets["valid"], "test": sets["test"], "leaks": "allow", "callbacks": ()}
    with tempfile.TemporaryDirectory() as scratch:
        yield finetune(train, out=Path(scratch) / "run", **given, **options)


def answers_of_tune(
    train: Rows, sets: Mapping[str, Rows], asked: tuple[str, ...] = (), **options: Any
) -> dict[str, np.ndarray]:
    "What a classifier answers to `sets['test']` and to the other sets `asked`."
    with tuned(train, sets, **options) as run:
        found = {"test": [line["predicted"] for line in read_lines(run.folder / "test_predictions.jsonl")]}
        for name in asked:
            found[name] = [answer["label"] for answer in run.predictor().predict([row["text"] for row in sets[name]])]
    return {name: np.array(answers) for name, answers in found.items()}


def right_of(answers: np.ndarray | list[str], rows: Rows) -> np.ndarray:
    "One for each right answer, and zero for each wrong one; answers are names, whatever type a label has in its file."
    return (np.array(answers) == np.array([str(row["label"]) for row in rows])).astype(float)


def difference(ours: np.ndarray, others: np.ndarray) -> str:
    "The paired difference of two ways, row by row, in points with its interval."
    paired = paired_permutation(ours, others)
    points = f"{100 * paired.difference:+.1f} points [{100 * paired.low:+.1f}, {100 * paired.high:+.1f}]"
    return f"{points}, p = {paired.p_value:.2g}"


def write_measured(file: Path, lines: Rows) -> None:
    "Write figures down with the day and what they were measured with."
    found = {"date": time.strftime("%Y-%m-%d"), "environment": describe_environment(), "lines": lines}
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
