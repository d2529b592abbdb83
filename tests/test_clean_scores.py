"""Beside the score on all test rows stands the one on those that training rows do not repeat, whatever the task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import small_rows

from llmft_nb.finetune import finetune
from llmft_nb.hparams import TrainSettings
from llmft_nb.tasks import make_task

OTHER = {"fruit": "sea", "sea": "tool", "tool": "fruit"}


def rows_of(task: str, n_rows: int, seed: int = 0) -> list[dict[str, Any]]:
    rows = small_rows(n_rows, seed)
    if task == "tag":
        words = [row["text"].split() for row in rows]
        return [{"tokens": one, "ner_tags": ["B-n" if word.isdigit() else "O" for word in one]} for one in words]
    if task == "instruct":
        return [{"prompt": row["text"], "completion": f"it is a {row['label']} to be sure"} for row in rows]
    return rows


@pytest.mark.parametrize(("task", "headline"), [("classify", "accuracy"), ("tag", "span_f1"), ("instruct", "token_f1")])
def test_only_the_rows_that_were_never_seen_count(task: str, headline: str, small_model: Path, tmp_path: Path) -> None:
    "Answers that are right for the seen rows alone, and wrong for the others: the clean score is none."
    rows = rows_of(task, 40)
    learnt = make_task(task, TrainSettings())
    splits = learnt.prepare(rows[:30], rows[30:34], [*rows[:6], *rows[34:]], columns=None, leaks="allow")
    assert splits.leaks.seen["test"] == list(range(6))
    answers: list[dict[str, Any]] = []
    for i, row in enumerate(splits.test):
        right = i < 6
        answers.append(
            {"label": row["label"] if right else OTHER[row["label"]]}
            if task == "classify"
            else {"tags": row["ner_tags"] if right else ["O"] * len(row["tokens"])}
            if task == "tag"
            else {"completion": row["messages"][-1]["content"] if right else "zzz", "finished": True}
            | {"loss_sum": 1.0, "n_targets": 4}
        )
    others = ["sea"] * len(answers) if task == "classify" else answers
    scores = learnt.judge(splits, answers, {"untuned base": others})
    assert scores["clean"][headline]["value"] == 0 and scores["clean"][headline]["n"] > 0
    assert 0.2 < scores[headline]["value"] < 0.8


def test_it_is_on_every_page(small_model: Path, tmp_path: Path) -> None:
    rows = rows_of("tag", 60)
    options: dict[str, Any] = {"task": "tag", "model": small_model, "epochs": 1, "callbacks": (), "leaks": "allow"}
    run = finetune(rows[:50], valid=rows[50:], test=[*rows[:4], *rows[50:]], out=tmp_path / "run", **options)
    assert np.isfinite(run.record.scores["test"]["clean"]["span_f1"]["value"])
    for name in ("report.html", "README.md"):
        assert "test rows that occur nowhere in the training rows" in (run.folder / name).read_text(encoding="utf-8")
    sound = finetune(rows[:40], valid=rows[50:], test=rows[50:], out=tmp_path / "sound", **options)
    assert "clean" not in sound.record.scores["test"]
