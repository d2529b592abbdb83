"""Every task from rows to a finished run that answers: trained, interrupted and resumed, scored, asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small import small_config, small_rows, write_jsonl

from llmft_nb.core import UserError
from llmft_nb.finetune import FinishedRun, evaluate_predictor, finetune, make_task
from llmft_nb.hparams import TrainSettings
from llmft_nb.predict import load_predictor

PLACES = ["Kiel", "Norden", "Old Harbour", "New Mill", "Sandwick"]


def tag_rows(n_rows: int) -> list[dict[str, Any]]:
    "Orders with a place in them; two places have two words."
    rows = []
    for i in range(n_rows):
        place = PLACES[i % 5].split()
        words = [f"{i})", "Send", "it", "to", *place, "at", "noon", "."]
        tags = ["O"] * 4 + ["B-place"] + ["I-place"] * (len(place) - 1) + ["O"] * 3
        rows.append({"tokens": words, "ner_tags": tags})
    return rows


def instruct_rows(n_rows: int) -> list[dict[str, Any]]:
    "Questions of which the answer repeats a word."
    things = ["the cat", "a small boat", "his old hat", "the red door"]
    return [
        {"prompt": f"{i}: who has {things[i % 4]}?", "completion": f"I have {things[i % 4]}."} for i in range(n_rows)
    ]


def text_rows(n_rows: int) -> list[dict[str, Any]]:
    "Sentences of a small world, in documents of unequal length."
    line = "The boat went over the water to the small house by the sea. "
    return [{"text": f"Day {i}. " + line * (1 + i % 4)} for i in range(n_rows)]


ROWS: dict[str, Callable[[int], list[dict[str, Any]]]] = {
    "classify": small_rows,
    "tag": tag_rows,
    "instruct": instruct_rows,
    "text": text_rows,
}
HEADLINES = {"classify": "accuracy", "tag": "span_f1", "instruct": "token_f1", "text": "perplexity"}
CASES = [
    *(("Llama", task) for task in ROWS),
    *(("Bert", task) for task in ("classify", "tag", "text")),
    ("Roberta", "text"),
]
OPTIONS: dict[str, Any] = {"epochs": 2, "batch_size": 8, "lr": 3e-3, "max_length": 48, "precision": "f32"}
OPTIONS |= {"max_new_tokens": 6, "n_written": 3, "evals_per_epoch": 2, "save_every": 2}


class Crash(BaseException):
    "Stands for the end of the process."


class CrashAt:
    "A callback that ends the run after a step."

    def __init__(self, step: int) -> None:
        self.step = step

    def __getattr__(self, name: str) -> Callable[..., None]:
        if not name.startswith("on_"):
            raise AttributeError(name)

        def listen(state: Any, *_: Any) -> None:
            if name == "on_step" and state.step == self.step:
                raise Crash

        return listen


def general(_: Path) -> list[str]:
    "Two short texts, so that forgetting costs nothing here."
    return ["The old man went to the door.", "It was a fine day by the sea."]


def train(folder: Path, base: Path, task: str, **changes: Any) -> FinishedRun:
    data = write_jsonl(folder.parent / f"{task}.jsonl", ROWS[task](48))
    return finetune(
        data, task=task, model=base, out=folder, general=general(folder), callbacks=(), **(OPTIONS | changes)
    )


def outcome(run: FinishedRun) -> dict[str, str]:
    "All that must not depend on interruptions."
    names = ("model/model.safetensors", "metrics.jsonl", "test_predictions.jsonl")
    found = {name: hashlib.sha256((run.folder / name).read_bytes()).hexdigest() for name in names}
    return found | {"scores": json.dumps(run.record.scores, sort_keys=True)}


@pytest.fixture(scope="module")
def bases(save_small: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    "Small random models of each family with the embedded tokenizer, whose masks and ends are its own."
    from llmft_nb.bases import find_model, load_tokenizer

    saved: dict[str, Path] = {}

    def base_of(kind: str) -> Path:
        if kind not in saved:
            import torch
            import transformers

            tokenizer, _ = load_tokenizer(find_model("tiny"))
            if kind == "Llama":
                head = "ForCausalLM"
            else:
                head = "ForMaskedLM"
            config = small_config(kind, len(tokenizer))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                network = getattr(transformers, f"{kind}{head}")(config)
            saved[kind] = tmp_path_factory.mktemp(kind.lower())
            network.save_pretrained(saved[kind])
            tokenizer.save_pretrained(saved[kind])
        return saved[kind]

    return base_of


@pytest.fixture(scope="module")
def finished(bases: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., FinishedRun]:
    "Runs that were left alone."
    done: dict[tuple[str, str], FinishedRun] = {}

    def run_of(kind: str, task: str) -> FinishedRun:
        if (kind, task) not in done:
            folder = tmp_path_factory.mktemp(f"{kind}-{task}") / "alone"
            done[kind, task] = train(folder, bases(kind), task)
        return done[kind, task]

    return run_of


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_a_run_from_rows_to_answers(kind, task, finished, one_thread):
    run = finished(kind, task)
    test = run.record.scores["test"]
    assert test["headline"] == HEADLINES[task]
    score = test[test["headline"]]
    assert score["low"] <= score["value"] <= score["high"]
    assert test["baselines"][0]["name"] == "untuned base"
    assert "ratio" in run.record.scores["forgetting"]
    assert {"report.html", "README.md", "model"} <= {path.name for path in run.folder.iterdir()}
    losses = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in losses if "loss" in line]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_resumed_runs_end_with_the_same_bits(kind, task, finished, bases, tmp_path, one_thread):
    alone = outcome(finished(kind, task))
    n_steps = 2 * max(1, len((finished(kind, task).folder / "metrics.jsonl").read_text().splitlines()) // 6)
    for step in (1, 3, n_steps):
        folder = tmp_path / f"killed-{step}"
        data = write_jsonl(tmp_path / f"{task}.jsonl", ROWS[task](48))
        options = OPTIONS | {"task": task, "model": bases(kind), "out": folder, "general": general(tmp_path)}
        try:
            finetune(data, callbacks=(CrashAt(step),), **options)
        except Crash:
            resumed = finetune(data, callbacks=(), resume=True, **options)
            assert outcome(resumed) == alone


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_served_as_trained(kind, task, finished, one_thread):
    run = finished(kind, task)
    lines = [json.loads(line) for line in (run.folder / "test_predictions.jsonl").read_text().splitlines()]
    predictor = load_predictor(run.folder)
    if task == "classify":
        answers = [answer["label"] for answer in predictor.predict([line["text"] for line in lines])]
        assert answers == [line["predicted"] for line in lines]
    elif task == "tag":
        answers = predictor.predict([{"tokens": line["tokens"]} for line in lines])
        assert [answer["tags"] for answer in answers] == [line["tags"] for line in lines]
    elif task == "instruct":
        written = [line for line in lines if line["predicted"] is not None]
        answers = predictor.predict([{"prompt": line["prompt"]} for line in written])
        assert [answer["completion"] for answer in answers] == [line["predicted"] for line in written]
        assert len(written) == 3
    else:
        mask = predictor.model.tokenizer.mask_token
        answer = predictor.predict([f"The boat went {mask} the sea" if kind != "Llama" else "The boat"])[0]
        assert len(answer["fills"][0]) == 5 if kind != "Llama" else answer["completion"]


@pytest.mark.parametrize("task", list(ROWS))
def test_scored_again_on_other_rows(task, finished, one_thread):
    predictor = load_predictor(finished("Llama", task).folder)
    scores = evaluate_predictor(predictor, ROWS[task](60)[48:], task=task)
    assert scores["headline"] == HEADLINES[task]
    assert scores[scores["headline"]]["n"] == (3 if task == "instruct" else 12)


def test_rows_of_another_task_are_refused(bases, tmp_path):
    for task, wrong in (("tag", "classify"), ("instruct", "tag"), ("classify", "instruct"), ("text", "tag")):
        with pytest.raises(UserError) as caught:
            train_on = ROWS[wrong](48)
            finetune(train_on, task=task, model=bases("Llama"), out=tmp_path / f"{task}-{wrong}", **OPTIONS)
        assert "columns" in str(caught.value) or "there is" in str(caught.value), caught.value
        assert not (tmp_path / f"{task}-{wrong}").exists()


def test_a_tied_head_alone_cannot_be_trained(tmp_path):
    with pytest.raises(UserError, match="used twice"):
        finetune(instruct_rows(40), task="instruct", model="tiny", strategy="head", out=tmp_path / "run", epochs=1)


def test_tasks_are_told_by_name():
    with pytest.raises(UserError, match="choose classify, tag, instruct, text"):
        make_task("translate", TrainSettings())


def test_leaks_between_texts(bases, tmp_path):
    rows = text_rows(40)
    options = OPTIONS | {"task": "text", "model": bases("Llama"), "general": general(tmp_path)}
    run = finetune(rows, test=rows[:3], out=tmp_path / "dropped", callbacks=(), **options)
    assert run.record.data["n_left_out"] == 3
    with pytest.raises(UserError, match="3 training texts are held out too"):
        finetune(rows, test=rows[:3], leaks="error", out=tmp_path / "refused", **options)
