"""What a run keeps of its rows, and that a report tells it, or does without."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llmft_nb.data_facts import N_COUNTED, count_bars, data_facts, facts_values, length_edges, length_facts
from llmft_nb.report import write_report
from llmft_nb.rows import Rows


def test_a_run_keeps_what_its_rows_are(small_run: Path, small_files: Path) -> None:
    data = json.loads((small_run / "run.json").read_text(encoding="utf-8"))["data"]
    facts = data["facts"]
    for name in ("train", "valid", "test"):
        lines = (small_files / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert facts["labels"][name] == dict(Counter(json.loads(line)["label"] for line in lines)), name
        assert facts["n_counted"][name] == len(lines) == data[f"n_{name}"]
    lengths = facts["lengths"]
    assert list(lengths["sets"]) == ["train", "valid"]
    for name, found in lengths["sets"].items():
        assert found["n"] == sum(found["bars"]) == data[f"n_{name}"]
        assert 0 < found["median"] <= found["p95"] <= found["longest"] < lengths["edges"][-1]


def test_a_report_tells_it_and_does_without(small_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(small_run, folder)
    write_report(folder)
    page = (folder / "report.html").read_text(encoding="utf-8")
    for part in ("<h2>The data", "<h3>Labels", "<h3>How long the rows are", "no training row is held out too"):
        assert part in page, part
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    del record["data"]["facts"], record["checks"]
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    write_report(folder)
    old = (folder / "report.html").read_text(encoding="utf-8")
    assert "<h2>The data" in old and "<h3>Labels" not in old and "How long the rows are" not in old
    assert "label names" in old, "what an older record has of the rows stays on its page"


@pytest.mark.parametrize("task", ["classify", "tag"])
def test_of_many_rows_some_are_counted(task: str) -> None:
    n = 3 * N_COUNTED - 1
    row: dict[str, Any] = {"text": "a", "label": "b"} if task == "classify" else {"tokens": ["a"], "ner_tags": ["B-b"]}
    rows = Rows([row] * n, [""] * n, "rows")
    none = Rows([], [], "rows")
    splits = SimpleNamespace(train=rows, valid=none, test=none, label_names=["O", "B-b"])
    facts = data_facts(splits, {"train": np.full(n, 9)}, task)
    assert facts["n_counted"] == {"train": N_COUNTED} and facts["labels"] == {"train": {"b": N_COUNTED}}
    assert facts["lengths"]["sets"]["train"]["n"] == n, "lengths are known of all"
    assert json.loads(json.dumps(facts)) == facts
    assert facts_values({"n_train": n, "facts": facts}, task)["n_counted"] == {"train": N_COUNTED}


def test_bars_and_lengths_are_those_of_a_plain_count() -> None:
    chance = np.random.default_rng(0)
    for _ in range(50):
        lengths = chance.integers(1, chance.integers(2, 3000), chance.integers(1, 400)).tolist()
        edges, order = length_edges(lengths), sorted(lengths)
        bars = [sum(left <= one < right for one in lengths) for left, right in itertools.pairwise(edges)]
        bars[-1] += sum(one >= edges[-1] for one in lengths)
        assert count_bars(lengths, edges) == bars and sum(bars) == len(lengths)
        found = length_facts(lengths)
        assert found["median"] == order[(len(order) - 1) // 2] and found["longest"] == order[-1]
        assert sum(one <= found["p95"] for one in lengths) >= 0.95 * len(lengths)
