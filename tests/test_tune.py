"""A search: what is drawn, what is stopped, what is kept when it is killed, and what may be said of its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import small_rows, write_jsonl
from typer.testing import CliRunner

from llmft_nb.cli import app
from llmft_nb.core import UserError
from llmft_nb.hparams import TrainSettings
from llmft_nb.search_space import Budget, first_values, parse_choices, reserve_s, usual_choices
from llmft_nb.tune import Bench, Finals, best_settings, judge_finalists, tune
from llmft_nb.tuning import (
    Attempt,
    Choice,
    GoOn,
    Stop,
    attempts_of,
    family,
    finalists,
    importance,
    open_study,
    parse_choice,
    plain_values,
    search,
    sized,
)

CHOICES = [parse_choice("lr_factor=0.1:10"), parse_choice("batch_size=8,16,32")]
FIRST = {"lr_factor": 1.0, "batch_size": 32}


def flat(values: Any, go_on: GoOn) -> float:
    go_on(0.5, 1.0)
    return 0.5


# --- the search alone ---


@pytest.mark.parametrize(
    ("text", "kind", "drawn"),
    [
        ("lr=1e-5:1e-3", float, (1e-5, 1e-3)),
        ("epochs=1:9", int, (1, 9)),
        ("weight_decay=0:0.1", float, (0, 0.1)),
        ("schedule=linear,cosine", str, ("cosine", "linear")),
        ("strategy=top:2,lora", str, ("lora:8", "top:2")),
    ],
)
def test_what_is_typed_is_drawn(text: str, kind: type, drawn: tuple[Any, Any], tmp_path: Path) -> None:
    choice = parse_choice(text)
    study = open_study(tmp_path / "study.db", [choice], {}, 0)
    values = [choice.draw(study.ask()) for _ in range(25)]
    assert all(isinstance(value, kind) for value in values)
    if kind is str:
        assert choice.values and set(values) == set(choice.values) and choice.values[0] in drawn
    else:
        assert drawn[0] <= min(values) < max(values) <= drawn[1]
    if text.startswith("lr="):
        assert sum(value < 1e-4 for value in values) > 5, "drawn by its logarithm"


def test_the_defaults_come_first_and_nothing_is_lost(tmp_path: Path) -> None:
    file, seen = tmp_path / "study.db", list[dict[str, Any]]()

    def dies(values: Any, go_on: GoOn) -> float:
        seen.append(dict(values))
        go_on(0.1 * len(seen), 1.0)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return 0.1 * len(seen)

    with pytest.raises(KeyboardInterrupt):
        search(CHOICES, FIRST, dies, file, enough=lambda tried: len(tried) >= 9)
    assert seen[0] == FIRST
    tried = search(CHOICES, FIRST, dies, file, enough=lambda tried: len(tried) >= 6)
    assert seen[4] == seen[3], "what was killed on its way is tried again"
    assert [one.values for one in tried[:3]] == seen[:3] and len(tried) == 6
    assert all(one.state == "done" and one.seconds >= 0 for one in tried)


def test_defaults_that_were_killed_stay_the_defaults(tmp_path: Path) -> None:
    "Tried again they have another number; they are no find, and are never stopped."
    n_begun = 0

    def dies_first(values: Any, go_on: GoOn) -> float:
        nonlocal n_begun
        n_begun += 1
        if n_begun == 1:
            raise KeyboardInterrupt
        return flat(values, go_on)

    with pytest.raises(KeyboardInterrupt):
        search(CHOICES, FIRST, dies_first, tmp_path / "s.db", enough=bool)
    tried = search(CHOICES, FIRST, dies_first, tmp_path / "s.db", enough=lambda tried: len(tried) >= 3)
    assert [(one.number, one.is_default) for one in tried] == [(1, True), (2, False), (3, False)]
    assert tried[0].values == FIRST and tried[0] not in finalists(tried, 9)


def test_who_falls_behind_is_stopped(tmp_path: Path) -> None:
    asked = list[int]()

    def run(values: Any, go_on: GoOn) -> float:
        number = len(asked)
        asked.append(0)
        for step in range(5):
            asked[-1] += 1
            go_on(1.0 if number < 6 else 0.1, (step + 1) / 5)
        return 1.0

    tried = search(CHOICES, FIRST, run, tmp_path / "s.db", enough=lambda tried: len(tried) >= 8)
    assert [one.state for one in tried] == ["done"] * 6 + ["stopped"] * 2 and asked == [5] * 6 + [1] * 2
    assert tried[7].score == 0.1 and tried[7] not in finalists(tried, 9)


def test_attempts_are_compared_by_the_share_that_is_done(tmp_path: Path) -> None:
    "A long run that is as good as the short ones at the same share is not stopped, however low it begins."

    def run(values: Any, go_on: GoOn) -> float:
        n_scores = 2 if values["batch_size"] == 32 else 10
        for step in range(1, n_scores + 1):
            go_on(step / n_scores, step / n_scores)
        return 1.0

    tried = search(CHOICES, FIRST, run, tmp_path / "s.db", enough=lambda tried: len(tried) >= 20)
    assert {one.state for one in tried} == {"done"} and len({len(one.scores) for one in tried}) == 2


def test_a_failing_attempt_is_an_answer(tmp_path: Path) -> None:
    def run(values: Any, go_on: GoOn) -> float:
        if values["batch_size"] != 32:
            raise UserError("the loss has exploded")
        return flat(values, go_on)

    tried = search(CHOICES, FIRST, run, tmp_path / "s.db", enough=lambda tried: len(tried) >= 12)
    failed = [one for one in tried if one.state == "failed"]
    assert failed and all(one.reason == "the loss has exploded" and one.score is None for one in failed)
    with pytest.raises(ZeroDivisionError):
        search(CHOICES, FIRST, lambda values, go_on: 1 / 0, tmp_path / "t.db", enough=bool)


def attempt(number: int, score: float | None, state: str = "done", **values: Any) -> Attempt:
    return Attempt(number, values, state, score, seconds=float(1 + number), is_default=number == 0)


def test_finalists_and_what_they_cost() -> None:
    tried = [attempt(0, 0.9, a=1), attempt(1, 0.5, a=2), attempt(2, 0.8, a=3), attempt(3, 0.8, a=3)]
    tried += [attempt(4, 0.95, "stopped", a=4), attempt(5, None, "failed", a=5), attempt(6, 0.7, a=6)]
    assert [one.number for one in finalists(tried, 3)] == [2, 6, 1], "no defaults, nothing twice, nothing unfinished"
    assert reserve_s(tried, 2, 3) == 3 * (1 + 3 + 7)
    assert reserve_s(tried, 2, 3, slower=1.5) == 1.5 * 3 * (1 + 3 + 7)
    assert reserve_s(tried[:1], 2, 3) == 3 * 3 * 1, "not yet known ones count as the longest"


def test_importance_is_a_share_of_the_spread() -> None:
    tried = [attempt(i, float(i % 2), a=i % 2, b=0.1 * (i // 2)) for i in range(16)]
    shares = importance(tried, ["a", "b"])
    assert shares["a"] == 1 and shares["b"] == pytest.approx(0, abs=0.01)
    assert importance(tried[:1], ["a"]) == {"a": 0}


def test_luck_is_no_find() -> None:
    "Ten finalists that are as good as the defaults: at most one search in twenty says otherwise."
    chance, n_found = np.random.default_rng(0), 0
    for _ in range(60):
        rights = chance.random((11, 3, 120)) < 0.8
        verdict = judge_finalists(rights[0].astype(float), [({"a": i}, rights[i].astype(float)) for i in range(1, 11)])
        n_found += verdict.is_better
    assert n_found <= 6
    better = np.maximum(rights[0], chance.random((3, 120)) < 0.6).astype(float)
    verdict = judge_finalists(rights[0].astype(float), [({"a": 1}, better)])
    assert verdict.is_better and verdict.low > 0 and "better than the defaults" in verdict.describe()


# --- with runs ---


@pytest.fixture(scope="module")
def rows() -> dict[str, Any]:
    found = small_rows(150)
    return {"data": found[:60], "valid": found[60:110], "test": found[110:]}


def options(small_model: Path, out: Path, rows: dict[str, Any], **others: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"valid": rows["valid"], "test": rows["test"], "model": small_model, "out": out}
    given |= {"strategies": ["full", "head"], "n_seeds": 2, "n_finalists": 1, "minutes": 0.1}
    return given | {"epochs": 2, "lr": 3e-3, "precision": "f32", "leaks": "allow"} | others


def test_a_search_from_rows_to_settings(small_model: Path, tmp_path: Path, rows: dict[str, Any]) -> None:
    heard = list[int]()
    given = options(small_model, tmp_path / "s", rows, told=lambda one: heard.append(one.number))
    tuned = tune(rows["data"], **given)
    assert heard == [one.number for one in tuned.attempts] and len(heard) >= 1
    usual = {"strategy": "full", "batch_size": 32, "layer_decay": 1.0, "weight_decay": 0.01}
    assert tuned.attempts[0].values == usual, "what is named is not searched"
    record = json.loads((tmp_path / "s" / "tune.json").read_text(encoding="utf-8"))
    assert record["words"] == tuned.verdict.describe() and len(record["attempts"]) == len(tuned.attempts)
    assert (tmp_path / "s" / "search.svg").stat().st_size > 3000
    best = json.loads((tmp_path / "s" / "best.json").read_text(encoding="utf-8"))
    assert best["lr"] == 3e-3 and best["strategy"] in ("full", "head")
    finals = (tmp_path / "s" / "finals.jsonl").read_text(encoding="utf-8")
    assert {json.loads(line)["seed"] for line in finals.splitlines()} == {1, 2}, "seeds that the search did not use"
    began = json.loads(finals.splitlines()[0])
    assert began["values"] == usual and began["seconds"] > 0, "the defaults first: they say what finals take"
    again = tune(rows["data"], resume=True, **given)
    assert (tmp_path / "s" / "finals.jsonl").read_text(encoding="utf-8").startswith(finals)
    assert again.verdict.default_score == tuned.verdict.default_score
    from llmft_nb.finetune import finetune

    config = {name: value for name, value in best.items() if name != "strategy"}
    run = finetune(rows["data"], model=small_model, strategy=best["strategy"], config=config, callbacks=(), epochs=1)
    assert run.record.status == "finished"


def test_the_test_rows_are_never_looked_at(
    small_model: Path, tmp_path: Path, rows: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmft_nb.classify import ClassifyTask

    asked = list[Any]()
    answers = ClassifyTask.answers
    monkeypatch.setattr(
        ClassifyTask, "answers", lambda self, model, some: (asked.append(some), answers(self, model, some))[1]
    )
    tune(rows["data"], **options(small_model, tmp_path / "s", rows))
    texts = {row["text"] for some in asked for row in some}
    assert texts == {row["text"] for row in rows["valid"]}


@pytest.mark.parametrize("task", ["tag", "instruct", "text"])
def test_every_task_can_be_searched(task: str, small_model: Path, tmp_path: Path, rows: dict[str, Any]) -> None:
    def shaped(row: dict[str, Any]) -> dict[str, Any]:
        words = row["text"].split()
        if task == "tag":
            return {"tokens": words, "ner_tags": ["B-n" if word.isdigit() else "O" for word in words]}
        if task == "instruct":
            return {"prompt": row["text"], "completion": f"a {row['label']}"}
        return {"text": row["text"]}

    own = {name: [shaped(row) for row in part] for name, part in rows.items()}
    given = options(small_model, tmp_path / "s", own, task=task, strategies=["full", "top:1"])
    tuned = tune(own["data"], **given)
    assert tuned.attempts[0].score is not None and np.isfinite(tuned.verdict.default_score)


def test_values_that_were_measured_are_measured(small_model: Path, rows: dict[str, Any]) -> None:
    from llmft_nb.tasks import make_task

    learnt = make_task("classify", TrainSettings())
    splits = learnt.prepare(rows["data"], rows["valid"], rows["test"], columns=None, leaks="allow")
    bench = Bench(
        small_model, splits, {"task": "classify", "strategy": "head", "init": "pretrained"}, {}, {"epochs": 1}, Path()
    )
    rates = [bench.train({"lr_factor": factor}, lambda score, share: None)[-1].lr for factor in (1.0, 2.0)]
    assert rates[1] == pytest.approx(2 * rates[0]) and rates[0] != bench.settle({}).settings.lr

    def stop(score: float, share: float) -> None:
        raise Stop

    with pytest.raises(Stop):
        bench.train({}, stop)


def test_what_may_be_chosen_where_nobody_says() -> None:
    settings = TrainSettings()
    names = [choice.name for choice in usual_choices(["full"], settings, {"lr": 1, "epochs": 2})]
    assert names == ["batch_size", "layer_decay", "weight_decay"]
    named = {"lr": 1, "epochs": 2, "batch_size": 8, "weight_decay": 0}
    assert [one.describe() for one in usual_choices(["head", "lora"], settings, named, 6)] == [
        "strategy=head,lora:16",
        "layer_decay=0.75,0.9,1.0",
        "rank=4,8,16,32",
    ]
    assert usual_choices(["head"], settings, named, 6) == [], "a head has no size, and no layers below it move"
    assert not any(one.name == "top_k" for one in usual_choices(["top:1"], settings, named, 2)), (
        "one value is no choice"
    )
    first = first_values([Choice("batch_size", (4, 8)), Choice("lr_factor", low=2.0, high=3.0)], settings, "full")
    assert first == {"batch_size": 8, "lr_factor": 2.0}, "the nearest there is"


def test_a_size_is_drawn_where_the_strategy_has_one(tmp_path: Path) -> None:
    "A head has no rank, and what is drawn for adapters does not say what blocks are worth."
    choices = usual_choices(["full", "top:2", "head", "lora:16"], TrainSettings(), {"epochs": 1}, n_blocks=6)
    first = first_values(choices, TrainSettings(), "full")
    tried = search(choices, first, flat, tmp_path / "s.db", enough=lambda tried: len(tried) >= 40)
    for one in tried[1:]:
        kind = one.values["strategy"].partition(":")[0]
        assert ("top_k" in one.values, "rank" in one.values) == (kind == "top", kind == "lora")
        assert ("layer_decay" in one.values) == (kind != "head")
    drawn = {str(plain_values(one.values)["strategy"]) for one in tried}
    assert {"full", "head"} < drawn and len(drawn) > 6
    assert {sized("top:2", one.values) for one in tried if "top_k" in one.values} == {f"top:{k}" for k in range(1, 6)}
    assert sized("lora:8@top:2", {"rank": 4}) == "lora:4@top:2" and sized("qlora:8", {}) == "qlora:8"
    shares = importance([*tried, attempt(99, 0.9, strategy="head")], [choice.name for choice in choices])
    assert shares["rank"] == 0 and 0 < shares["strategy"] <= 1, "among those that have it nothing differs"
    assert family({"strategy": "top:2", "top_k": 4}) == "top:K" and family({"strategy": "top:2"}) == "top:2"


def test_a_drawn_size_is_trained_and_written_down(small_model: Path, tmp_path: Path, rows: dict[str, Any]) -> None:
    given = options(small_model, tmp_path / "s", rows, strategies=["lora:4"], choices=["rank=2,8"])
    tuned = tune(rows["data"], **given)
    bench = Bench(small_model, None, {"task": "classify", "strategy": "lora:4"}, {}, {}, tmp_path)  # type: ignore[arg-type]
    assert bench.settle({"rank": 8}).choices["strategy"] == "lora:8"
    assert {one.values["rank"] for one in tuned.attempts} <= {2, 8} and "rank" not in tuned.best
    assert tuned.best["strategy"] in ("lora:2", "lora:4", "lora:8")
    found = replace(tuned.verdict, values={"rank": 8}, low=0.1, p_value=0.01)
    assert best_settings(bench, found)["strategy"] == "lora:8"


def test_the_minutes_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    "One attempt that takes far longer than those before it is stopped before it takes what the finalists need."
    now = [100.0]
    monkeypatch.setattr("llmft_nb.search_space.time.monotonic", lambda: now[0])
    budget = Budget(minutes=2.0, n_finalists=1, n_seeds=2, began_s=100.0)
    tried = [attempt(0, 0.5), attempt(1, 0.6)]  # 1 and 2 seconds; set aside: 6
    budget.hear(tried[1])
    now[0] += 50
    assert budget.spent_s(tried) == 51, "what this call took, and the attempt of the call before it"
    assert not budget.enough(tried)
    go_on = budget.within(lambda score, share: None)
    now[0] += 62
    go_on(0.1, 0.5)
    now[0] += 2
    go_on(0.1, 1.0)
    with pytest.raises(Stop):
        go_on(0.1, 0.5)
    assert budget.enough(tried)


@pytest.mark.parametrize("text", ["rank=4,8", "top_k=1:3"])
def test_a_choice_that_no_strategy_has(text: str) -> None:
    with pytest.raises(UserError, match="nothing to choose with full"):
        parse_choices([text], "full")
    assert len(parse_choices([text, "strategy=full,lora:8,top:2"], "full")) == 2


def test_finals_are_not_trained_twice(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_text('{"values": {"a": 1}, "seed": 1, "scores": [1, 0]}\n{"values": {"a"')
    finals = Finals(tmp_path / "f.jsonl", None)  # type: ignore[arg-type]
    np.testing.assert_array_equal(finals.scores({"a": 1}, 1), [1, 0])
    with pytest.raises(AttributeError):
        finals.scores({"a": 1}, 2)


# --- the command ---


def command(small_model: Path, tmp_path: Path, rows: dict[str, Any], *others: str) -> list[str]:
    files = {name: str(write_jsonl(tmp_path / f"{name}.jsonl", part)) for name, part in rows.items()}
    words = ["tune", *(f"--{name}={file}" for name, file in files.items()), "--model", str(small_model)]
    words += ["--strategy", "full", "--strategy", "head", "--epochs", "2", "--seeds", "2", "--finalists", "1"]
    return [*words, "--minutes", "0.1", "--precision", "f32", "--out", str(tmp_path / "s"), *others]


def test_the_command(small_model: Path, tmp_path: Path, rows: dict[str, Any]) -> None:
    words = command(small_model, tmp_path, rows, "--search", "lr_factor=0.3:3")
    told = CliRunner().invoke(app, words)
    assert told.exit_code == 0, told.stderr
    assert "attempts in" in told.stdout and "best.json" in told.stdout and "0: " in told.stderr
    told = CliRunner().invoke(app, words)
    assert told.exit_code == 2 and "--resume" in told.stderr
    told = CliRunner().invoke(app, [*words, "--resume", "--json"])
    assert told.exit_code == 0 and json.loads(told.stdout)["attempts"][0]["values"] == {"lr_factor": 1.0}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--search", "lr_factor=3"], "lr_factor=0.1:10"),
        (["--search", "lerning_rate=1:2"], "no such setting"),
        (["--search", "strategy=full,topp:2"], "top"),
        (["--search", "epochs=3:1"], "not below the second"),
        (["--seeds", "1"], "2"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(
    words: list[str], told: str, small_model: Path, tmp_path: Path, rows: dict[str, Any]
) -> None:
    found = CliRunner().invoke(app, [*command(small_model, tmp_path, rows), *words])
    assert found.exit_code == 2 and told in found.stderr and "Traceback" not in found.output
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("command", ["tune", "plan"])
def test_a_record_is_repeated_by_train_alone(command: str, tmp_path: Path) -> None:
    told = CliRunner().invoke(app, [command, "--data", "pharmacy-intents", "--from-report", str(tmp_path / "run.json")])
    assert told.exit_code == 2 and "repeated by train alone" in told.stderr


def test_a_killed_search_goes_on(small_model: Path, tmp_path: Path, rows: dict[str, Any]) -> None:
    words = command(small_model, tmp_path, rows, "--minutes", "0.3")
    code, study = "from llmft_nb.cli import main; main()", tmp_path / "s" / "study.db"
    with subprocess.Popen([sys.executable, "-c", code, *words], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        process.stderr.readline()  # The first attempt
        time.sleep(0.3)
        os.kill(process.pid, signal.SIGKILL)
    first = {"strategy": "full", "lr_factor": 1.0, "batch_size": 32}
    choices = usual_choices(["full", "head"], TrainSettings(), {"epochs": 2})
    n_tried = len(attempts_of(open_study(study, choices, first, 0)))
    told = CliRunner().invoke(app, [*words, "--resume", "--json"])
    assert told.exit_code == 0, told.stderr
    assert len(json.loads(told.stdout)["attempts"]) >= n_tried >= 1
