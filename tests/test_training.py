"""The plain API as the design draws it, six architectures, and a step that is the same however it is shared out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from small import THINGS, small_rows, write_jsonl
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from llmft_nb import training
from llmft_nb.callbacks import Callback
from llmft_nb.core import UserError
from llmft_nb.data import TextDataLoader, TextDataset
from llmft_nb.hparams import TrainSettings
from llmft_nb.modeling import LLMForSequenceClassification
from llmft_nb.steps import FiniteGuard
from llmft_nb.strategy import model_parts, open_parts, parse_strategy
from llmft_nb.training import LLMTrainer

KINDS = ("Bert", "Roberta", "DistilBert", "GPT2", "Llama", "Qwen3")


@pytest.fixture(autouse=True)
def usual_thread(one_thread: None) -> None:
    "Bits are compared."


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    "A copy of all weights."
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def moved(before: Mapping[str, torch.Tensor], model: nn.Module) -> set[str]:
    "Names of the weights that differ by a bit."
    return {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}


def plain_settings(**changes: Any) -> TrainSettings:
    "Settings under which nothing but the gradient speaks: no warm-up, no clipping, no decay."
    settings: dict[str, Any] = {"epochs": 1, "batch_size": 8, "micro_batch_size": 8, "lr": 1e-2, "precision": "f32"}
    settings |= {"schedule": "constant", "warmup_frac": 0.0, "max_grad_norm": 0.0, "weight_decay": 0.0}
    return TrainSettings(**(settings | changes))


# --- the plain API ---


def test_plain_api(small_model: Path, small_files: Path, tmp_path: Path) -> None:
    "As written in the README: a path to rows, no number of classes, an optimizer of the user's own."
    model = LLMForSequenceClassification.from_pretrained(str(small_model))
    train_dataset = TextDataset(str(small_files / "train.jsonl"), model.tokenizer)
    train_loader = TextDataLoader(train_dataset, batch_size=32, shuffle=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-5)
    stale = list(model.network.score.parameters())
    trainer = LLMTrainer(model, optimizer)
    result = trainer.train(train_loader, epochs=3)
    model.save_pretrained(str(tmp_path / "tuned"))

    assert result.n_steps == 9
    assert model.network.score.weight.shape == (3, 32)
    held = [weight for group in optimizer.param_groups for weight in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == set(model.parameters())
    assert not set(stale) & set(held)
    assert set(optimizer.state) == set(model.parameters()), "every weight was stepped, and no stale one is kept"
    assert optimizer.param_groups[0]["lr"] == 5e-5, "the user's rate is not scheduled"

    again = LLMForSequenceClassification.from_pretrained(tmp_path / "tuned")
    assert again.label_names == model.label_names == ["fruit", "sea", "tool"]
    assert not again.head_is_random
    assert len(again.tokenizer) == len(model.tokenizer)
    assert moved(weights_of(model), again) == set()


def test_saved_model_loads_in_plain_transformers(small_run: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    network, info = AutoModelForSequenceClassification.from_pretrained(
        small_run / "model", output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert network.config.id2label == {0: "fruit", 1: "sea", 2: "tool"}
    assert network.config.label2id == {"fruit": 0, "sea": 1, "tool": 2}
    assert network.config.problem_type == "single_label_classification"
    assert network.config.pad_token_id is not None
    tokenizer = AutoTokenizer.from_pretrained(small_run / "model")
    network.eval()
    for line in (small_run / "test_predictions.jsonl").read_text(encoding="utf-8").splitlines()[:8]:
        row = json.loads(line)
        with torch.no_grad():
            chances = network(**tokenizer(row["text"], return_tensors="pt")).logits.softmax(-1)[0]
        assert network.config.id2label[int(chances.argmax())] == row["predicted"]
        assert chances.tolist() == pytest.approx([row["probabilities"][name] for name in ("fruit", "sea", "tool")])


def test_labels_in_another_order_keep_what_was_learnt(small_run: Path) -> None:
    "A tuned head is kept for the same labels, whatever their order, and made anew for others."
    from llmft_nb.modeling import size_head

    model = LLMForSequenceClassification.from_pretrained(small_run / "model")
    learnt = model.network.score.weight.detach().clone()
    rows = small_rows(24)
    LLMTrainer(model, settings=plain_settings(lr=1e-8)).train(TextDataLoader(TextDataset(rows, model.tokenizer)))
    assert torch.allclose(model.network.score.weight, learnt, atol=1e-6)
    size_head(model, ["tool", "fruit", "sea"])
    assert torch.allclose(model.network.score.weight, learnt[[2, 0, 1]], atol=1e-6)
    size_head(model, ["tool", "fruit"])
    assert model.network.score.weight.shape == (2, 32) and model.head_is_random


@pytest.mark.parametrize(
    "make",
    [
        lambda weights: torch.optim.SGD(weights, lr=1e-2, momentum=0.9),
        lambda weights: torch.optim.AdamW(weights, lr=1e-3),
        lambda weights: torch.optim.Adagrad(weights, lr=1e-2),
        lambda weights: torch.optim.RMSprop(weights, lr=1e-3),
    ],
    ids=["SGD", "AdamW", "Adagrad", "RMSprop"],
)
def test_any_optimizer(make: Callable[[Any], torch.optim.Optimizer], small_model: Path, small_files: Path) -> None:
    model = LLMForSequenceClassification.from_pretrained(small_model)
    optimizer = make(model.parameters())
    loader = TextDataLoader(TextDataset(small_files / "train.jsonl", model.tokenizer), batch_size=22)
    before = weights_of(model.network.base_model)
    LLMTrainer(model, optimizer).train(loader)
    assert moved(before, model.network.base_model) == set(before)
    assert {weight for group in optimizer.param_groups for weight in group["params"]} == set(model.parameters())


def test_global_random_stream_is_left_alone(small_model: Path, small_files: Path) -> None:
    model = LLMForSequenceClassification.from_pretrained(small_model)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    loader = TextDataLoader(TextDataset(small_files / "train.jsonl", model.tokenizer), batch_size=32, shuffle=True)
    LLMTrainer(model).train(loader, epochs=1)
    assert torch.equal(torch.get_rng_state(), before)


# --- architectures ---


@pytest.mark.parametrize("strategy", ["full", "top:1", "head"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_step(kind: str, strategy: str, save_small: Callable[..., Path]) -> None:
    "What may move moves, what is frozen is bit-equal and stays in evaluation mode."
    model = LLMForSequenceClassification.from_pretrained(save_small(kind))
    open_parts(model.network, parse_strategy(strategy))
    modes: list[dict[str, set[bool]]] = []

    class Watch(Callback):
        def on_step(self, state: Any, values: Mapping[str, float]) -> None:
            parts = {part.name: part.modules for part in model_parts(model.network)}
            modes.append({name: {m.training for top in parts[name] for m in top.modules()} for name in parts})

    dataset = TextDataset(small_rows(8), model.tokenizer)
    trainer = LLMTrainer(model, settings=plain_settings(), callbacks=[Watch()])
    base = weights_of(model.network.base_model)
    trainer.train(TextDataLoader(dataset, batch_size=8))

    [by_part] = modes
    trainable = {part.name for part in model_parts(model.network) if any(w.requires_grad for w in part.parameters())}
    expected = {"full": {"embeddings", "block 0", "block 1"}, "top:1": {"block 1"}, "head": set()}[strategy]
    assert trainable - {"after blocks"} == expected | {"head"}
    for name, seen in by_part.items():
        assert seen <= {name in trainable}, f"{name} ran in the wrong mode"
    named = {name for name, weight in model.network.base_model.named_parameters() if weight.requires_grad}
    assert moved(base, model.network.base_model) == named
    assert bool(named) == (strategy != "head")
    assert not model.head_is_random, "what was trained is no longer called random"
    assert not model.training


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_no_answer(kind: str, save_small: Callable[..., Path]) -> None:
    from llmft_nb.inference import predict_logits

    model = LLMForSequenceClassification.from_pretrained(save_small(kind)).eval()
    dataset = TextDataset(small_rows(12), model.tokenizer)
    together, alone = (predict_logits(model, dataset, batch_size) for batch_size in (12, 1))
    assert torch.allclose(torch.from_numpy(together), torch.from_numpy(alone), atol=1e-5)


def test_dropout_is_off_where_frozen(save_small: Callable[..., Path]) -> None:
    "With all below the head frozen, the head sees the same features at every step."
    model = LLMForSequenceClassification.from_pretrained(save_small("Bert", hidden_dropout_prob=0.5))
    open_parts(model.network, parse_strategy("head"))
    seen: list[torch.Tensor] = []

    def note(module: nn.Module, given: Any, out: Any) -> None:
        if model.network.classifier.training:  # No trial of the model
            seen.append(out.last_hidden_state.clone())

    model.network.bert.register_forward_hook(note)
    loader = TextDataLoader(TextDataset(small_rows(8), model.tokenizer), batch_size=8)
    LLMTrainer(model, settings=plain_settings(epochs=2, trunk_gb=0)).train(loader)
    assert len(seen) == 2 and torch.equal(seen[0], seen[1])


# --- one step, however it is shared ---


def tuned(
    folder: Path, rows: list[dict[str, Any]], strategy: str = "full", **changes: Any
) -> tuple[dict[str, torch.Tensor], list[float]]:
    "Weights after plain gradient descent, and the losses of the steps."
    model = LLMForSequenceClassification.from_pretrained(folder)
    settings = plain_settings(**changes)
    loader = TextDataLoader(TextDataset(rows, model.tokenizer), batch_size=settings.batch_size, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result = LLMTrainer(model, optimizer, settings, log_every=1, strategy=strategy).train(loader)
    return weights_of(model), [loss for _, loss in result.losses]


def labelled(kind: str) -> list[dict[str, Any]]:
    "Rows of three classes, unequal in size, the last step shorter than the others; or with several labels each."
    rows = [row for i, row in enumerate(small_rows(40)) if row["label"] != "sea" or i % 4 == 0]
    if kind == "several labels":
        return [row | {"label": [row["label"]] + (["long"] if "again" in row["text"] else [])} for row in rows]
    return rows


@pytest.mark.parametrize("micro_batch_size", [1, 3, 5])
@pytest.mark.parametrize(
    ("kind", "class_weights"),
    [("one label", "none"), ("one label", "balanced"), ("several labels", "none"), ("several labels", "balanced")],
)
def test_accumulation_is_the_big_batch(kind: str, class_weights: str, micro_batch_size: int, small_model: Path) -> None:
    rows = labelled(kind)
    whole, losses = tuned(small_model, rows, class_weights=class_weights)
    parts, same = tuned(small_model, rows, class_weights=class_weights, micro_batch_size=micro_batch_size)
    assert len(rows) % 8 not in {0, micro_batch_size}
    assert same == pytest.approx(losses, rel=1e-5)
    for name, weight in whole.items():
        assert torch.allclose(parts[name], weight, atol=1e-6), name


@pytest.mark.parametrize("class_weights", ["none", "balanced"])
def test_a_step_against_torch_alone(class_weights: str, small_model: Path, tmp_path: Path) -> None:
    "The steps by hand, with transformers' own loss, or torch's weighted one, end in the same weights."
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from llmft_nb.modeling import size_head

    rows, names = labelled("one label")[:20], sorted(THINGS)
    model = LLMForSequenceClassification.from_pretrained(small_model)
    size_head(model, names)
    model.random_names.clear()
    model.save_pretrained(tmp_path / "start")
    ours, losses = tuned(tmp_path / "start", rows, class_weights=class_weights)

    network = AutoModelForSequenceClassification.from_pretrained(tmp_path / "start").train()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "start")
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    counts = torch.tensor([sum(row["label"] == name for row in rows) for name in names])
    weights = len(rows) / (3 * counts)
    order = TextDataLoader(TextDataset(rows, tokenizer), batch_size=8, shuffle=True).steps(0)
    for step, loss in zip(order, losses, strict=True):
        batch = tokenizer([rows[i]["text"] for i in step], padding=True, return_tensors="pt")
        labels = torch.tensor([names.index(rows[i]["label"]) for i in step])
        out = network(**batch, labels=labels)
        mean = nn.functional.cross_entropy(out.logits, labels, weights) if class_weights == "balanced" else out.loss
        mean.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert mean.item() == pytest.approx(loss, rel=1e-5)
    assert len(set(counts.tolist())) > 1
    for name, weight in network.named_parameters():
        assert torch.allclose(ours[f"network.{name}"], weight, atol=1e-6), name


SEVERAL = """
import json, os, sys
import torch
torch.set_num_threads(1)
from llmft_nb.data import TextDataLoader, TextDataset
from llmft_nb.classify import make_evaluate
from llmft_nb.hparams import TrainSettings
from llmft_nb.modeling import LLMForSequenceClassification
from llmft_nb.training import LLMTrainer
from safetensors.torch import save_file

asked = json.loads(sys.argv[1])
model = LLMForSequenceClassification.from_pretrained(asked["model"])
settings = TrainSettings(**asked["settings"])
dataset = TextDataset(asked["rows"], model.tokenizer)
loader = TextDataLoader(dataset, batch_size=settings.batch_size, shuffle=True)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
how = {"log_every": 1, "folder": asked["folder"], "strategy": asked["strategy"]}
trainer = LLMTrainer(model, optimizer, settings, evaluate=make_evaluate(dataset), **how)
result = trainer.train(loader)
rank = os.environ.get("RANK", "0")
save_file({name: weight.detach() for name, weight in model.named_parameters()}, f"{asked['out']}.{rank}.safetensors")
"""


@pytest.mark.parametrize(("micro_batch_size", "strategy"), [(8, "full"), (3, "full"), (3, "gradual")])
def test_two_processes_are_one(micro_batch_size: int, strategy: str, small_model: Path, tmp_path: Path) -> None:
    "17 rows in steps of 8: the last step has one row, fewer than there are processes."
    from safetensors.torch import load_file

    rows = labelled("one label")[:17]
    script = tmp_path / "several.py"
    script.write_text(SEVERAL, encoding="utf-8")
    settings = vars(plain_settings(class_weights="balanced", micro_batch_size=micro_batch_size))
    asked = {"model": str(small_model), "rows": rows, "settings": settings, "strategy": strategy}
    asked |= {"out": str(tmp_path / "tuned"), "folder": str(tmp_path / "run")}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(script), json.dumps(asked)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]

    alone, losses = tuned(small_model, rows, strategy, class_weights="balanced")
    ranks = [load_file(f"{tmp_path / 'tuned'}.{rank}.safetensors") for rank in (0, 1)]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == pytest.approx(losses, rel=1e-5)
    assert [line["step"] for line in lines] == [1, 2, 3, 3]
    assert (tmp_path / "run" / "checkpoints" / "step-00000003" / "manifest.json").is_file()
    for name, weight in alone.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        assert torch.allclose(ranks[0][name], weight, atol=1e-6), name


# --- precision, damage, listeners ---


def test_bf16_where_asked_for(small_model: Path) -> None:
    "Matrix products in bf16, weights in f32; the learning is nearly the same."
    rows, kinds = small_rows(24), []
    for precision in ("f32", "bf16"):
        model = LLMForSequenceClassification.from_pretrained(small_model)
        seen: list[torch.dtype] = []

        def note(module: nn.Module, given: Any, out: torch.Tensor, seen: list[torch.dtype] = seen) -> None:
            if module.training and torch.is_grad_enabled():  # Not where it is tried
                seen.append(out.dtype)

        model.network.model.layers[0].mlp.down_proj.register_forward_hook(note)
        loader = TextDataLoader(TextDataset(rows, model.tokenizer), batch_size=8)
        settings = plain_settings(precision=precision, lr=2e-3)  # At 1e-2 the paths of this small network part
        result = LLMTrainer(model, settings=settings, log_every=1).train(loader)
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}
        kinds.append((set(seen), [loss for _, loss in result.losses]))
    assert [seen for seen, _ in kinds] == [{torch.float32}, {torch.bfloat16}]
    assert kinds[0][1] != kinds[1][1]
    assert kinds[0][1][0] == pytest.approx(kinds[1][1][0], rel=0.005)  # Before the first step
    assert kinds[0][1] == pytest.approx(kinds[1][1], rel=0.02)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run(value: float, small_model: Path, tmp_path: Path) -> None:
    model = LLMForSequenceClassification.from_pretrained(small_model)
    dataset = TextDataset(write_jsonl(tmp_path / "train.jsonl", small_rows(24)), model.tokenizer)
    poisoned = dataset.tokens[11]["input_ids"]

    def poison(module: nn.Module, given: Any, out: torch.Tensor) -> torch.Tensor:
        ids = given[0]
        hit = [row[: len(poisoned)].tolist() == poisoned for row in ids]
        return out.masked_fill(torch.tensor(hit)[:, None, None], value) if any(hit) else out

    model.network.model.embed_tokens.register_forward_hook(poison)
    saved: list[dict[str, torch.Tensor]] = []

    class Keep(Callback):
        def on_step(self, state: Any, values: Mapping[str, float]) -> None:
            saved.append(weights_of(model))

    folder = tmp_path / "run"
    trainer = LLMTrainer(model, settings=plain_settings(save_every=1), folder=folder, callbacks=[Keep()])
    with pytest.raises(UserError) as caught:
        trainer.train(TextDataLoader(dataset, batch_size=4))
    assert len(saved) == 2
    assert "at step 3; the step was not taken" in caught.value.what
    assert caught.value.where == ", ".join(f"train.jsonl:{n}" for n in (9, 10, 11, 12))
    assert caught.value.mend
    assert moved(saved[-1], model) == set()
    from llmft_nb.checkpoint import find_checkpoint, load_checkpoint

    found = find_checkpoint(folder / "checkpoints").folder
    assert found is not None and found.name == "step-00000002"
    assert all(tensor.isfinite().all() for tensor in load_checkpoint(found)[0].values())


class Patient(FiniteGuard):
    "As on a GPU."

    def __init__(self, optimizer: torch.optim.Optimizer, is_patient: bool, is_late: bool) -> None:
        assert not is_patient, "this is a CPU"
        super().__init__(optimizer, is_patient=True, is_late=is_late)


def test_where_nobody_waits_for_the_device_the_weights_are_kept(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    "The run hears of it at the next line of the log; until then no step is taken."
    monkeypatch.setattr(training, "FiniteGuard", Patient)
    model = LLMForSequenceClassification.from_pretrained(small_model)
    calls: list[float] = []

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(float("nan") if len(calls) == 2 else 1.0)
        return gradient * calls[-1]

    model.network.model.norm.weight.register_hook(poison)
    saved: list[dict[str, torch.Tensor]] = []

    class Keep(Callback):
        def on_step(self, state: Any, values: Mapping[str, float]) -> None:
            saved.append(weights_of(model))

    trainer = LLMTrainer(model, settings=plain_settings(), callbacks=[Keep()])
    with pytest.raises(UserError, match="gradient norm nan at step 3; the step was not taken"):
        trainer.train(TextDataLoader(TextDataset(small_rows(24), model.tokenizer), batch_size=4))
    assert len(calls) == 6 and len(saved) == 5
    assert moved(saved[0], model) and not any(moved(weights, model) for weights in saved[1:])


class Questions(TorchDispatchMode):
    "Counts how often a number of the device is looked at; whether a mask hides anything is for transformers to ask."

    n_asked = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asks = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}
        if function in asks:
            Questions.n_asked += not any("masking_utils" in frame.filename for frame in traceback.extract_stack())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"micro_batch_size": 3, "max_grad_norm": 1.0},
        {"step_in_backward": True, "max_grad_norm": 0.0},
        {"activation_checkpointing": True},
    ],
)
def test_a_step_asks_the_device_nothing(
    settings: dict[str, Any], small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    "So a GPU never stands idle while the host reads a number off it."
    monkeypatch.setattr(training, "FiniteGuard", Patient)
    take_step, asked = training.take_step, list[int]()

    def counted(run: training.Run, rows: Any) -> None:
        before = Questions.n_asked
        with Questions():
            take_step(run, rows)
        asked.append(Questions.n_asked - before)

    monkeypatch.setattr(training, "take_step", counted)
    model = LLMForSequenceClassification.from_pretrained(small_model)
    trainer = LLMTrainer(model, settings=plain_settings(**settings), callbacks=(), log_every=100)
    trainer.train(TextDataLoader(TextDataset(small_rows(40), model.tokenizer), batch_size=8))
    assert asked[0] > 0, "what the first step moved is looked at"
    assert asked[1:4] == [0, 0, 0]
    assert asked[4] > 0, "the epoch's last one is logged"


@pytest.mark.parametrize("n_tokens", [1, 40, 100])
def test_parts_by_tokens_are_the_big_batch(n_tokens: int, small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, sizes = small_rows(20), list[int]()
    whole, losses = tuned(small_model, rows)
    make = TextDataset.batch

    def measured(dataset: TextDataset, indices: Any, epoch: int = 0) -> Any:
        batch = make(dataset, indices, epoch)
        sizes.append(batch["input_ids"].numel())
        is_tried = not torch.is_grad_enabled()  # Before the first step, by a model that is asked
        assert len(indices) == 1 or is_tried or sizes[-1] <= n_tokens
        return batch

    monkeypatch.setattr(TextDataset, "batch", measured)
    parts, same = tuned(small_model, rows, micro_batch_tokens=n_tokens)
    assert len(sizes) > 3
    assert same == pytest.approx(losses, rel=1e-5)
    for name, weight in whole.items():
        assert torch.allclose(parts[name], weight, atol=1e-6), name


def test_a_gradient_that_is_no_number_stops_the_run(small_model: Path) -> None:
    model = LLMForSequenceClassification.from_pretrained(small_model)
    model.network.model.norm.weight.register_hook(lambda gradient: gradient * float("nan"))
    before = weights_of(model.network.model)
    with pytest.raises(UserError, match="gradient norm nan at step 1"):
        LLMTrainer(model, settings=plain_settings()).train(TextDataLoader(TextDataset(small_rows(8), model.tokenizer)))
    assert moved(before, model.network.model) == set()


def test_a_score_that_is_no_number_is_never_best(small_model: Path, tmp_path: Path) -> None:
    model = LLMForSequenceClassification.from_pretrained(small_model)
    loader = TextDataLoader(TextDataset(small_rows(8), model.tokenizer), batch_size=4)
    trainer = LLMTrainer(model, evaluate=lambda model: {"accuracy": float("nan")}, folder=tmp_path / "run")
    with pytest.raises(UserError, match="monitor accuracy, step 2: the validation score is nan"):
        trainer.train(loader, epochs=1)
    assert list((tmp_path / "run" / "checkpoints").glob("best-*")) == []


def test_callbacks_in_order(small_model: Path, small_files: Path, tmp_path: Path) -> None:
    from llmft_nb.classify import make_evaluate

    heard: list[tuple[Any, ...]] = []

    class Ear(Callback):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_train_start(self, state: Any) -> None:
            heard.append((self.name, "start", state.step, state.n_steps))

        def on_step(self, state: Any, values: Mapping[str, float]) -> None:
            heard.append((self.name, "step", state.step, sorted(values)))

        def on_evaluate(self, state: Any, scores: Mapping[str, float]) -> None:
            heard.append((self.name, "evaluate", state.step, sorted(scores)))

        def on_save(self, state: Any, folder: Path) -> None:
            heard.append((self.name, "save", state.step, (folder / "manifest.json").is_file()))

        def on_train_end(self, state: Any) -> None:
            heard.append((self.name, "end", state.step, state.stop))

    class Stop(Callback):
        def on_step(self, state: Any, values: Mapping[str, float]) -> None:
            state.stop = state.step == 3

    model = LLMForSequenceClassification.from_pretrained(small_model)
    dataset = TextDataset(small_files / "train.jsonl", model.tokenizer)
    trainer = LLMTrainer(
        model,
        settings=plain_settings(batch_size=33, micro_batch_size=33),
        evaluate=make_evaluate(dataset),
        folder=tmp_path / "run",
        callbacks=[Ear("a"), Stop(), Ear("b")],
        log_every=2,
    )
    result = trainer.train(TextDataLoader(dataset, batch_size=33), epochs=4)
    logged, scored = ["grad_norm", "loss", "lr"], ["accuracy", "loss", "macro_f1"]
    events: list[tuple[Any, ...]] = [("start", 0, 8), ("step", 1, []), ("step", 2, logged), ("evaluate", 2, scored)]
    events += [("save", 2, True), ("step", 3, []), ("save", 3, True), ("end", 3, True)]
    assert heard == [(name, *event) for event in events for name in ("a", "b")]
    assert (result.n_steps, result.stopped_early) == (3, True)


def test_best_weights_are_kept(small_model: Path, small_files: Path, tmp_path: Path) -> None:
    "Scores are dictated: the second is best, so the weights of that step come back; patience ends the run."
    from llmft_nb.validation import EarlyStopping

    for folder in (None, tmp_path / "run"):
        scores, at_scoring = iter([0.5, 0.9, 0.9, 0.8, 1.0]), []

        def dictate(model: nn.Module, scores: Any = scores, at_scoring: list[Any] = at_scoring) -> dict[str, float]:
            at_scoring.append(weights_of(model))
            return {"accuracy": next(scores)}

        model = LLMForSequenceClassification.from_pretrained(small_model)
        loader = TextDataLoader(TextDataset(small_files / "train.jsonl", model.tokenizer), batch_size=33)
        settings = plain_settings(epochs=5, batch_size=33, micro_batch_size=33)
        trainer = LLMTrainer(model, settings=settings, evaluate=dictate, stopping=EarlyStopping(2), folder=folder)
        result = trainer.train(loader)
        assert (result.best_step, result.best_score, result.stopped_early) == (4, 0.9, True)
        assert len(at_scoring) == 4
        assert moved(at_scoring[1], model) == set()
        assert moved(at_scoring[3], model)


def test_tensorboard(small_model: Path, small_files: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from llmft_nb.finetune import finetune

    held_out = {name: small_files / f"{name}.jsonl" for name in ("valid", "test")}
    options: dict[str, Any] = {"epochs": 2, "batch_size": 22, "precision": "f32", "trackers": ["tensorboard"]}
    finetune(small_files / "train.jsonl", model=small_model, out=tmp_path / "run", **held_out, **options)
    files = list((tmp_path / "run").rglob("events.out.tfevents.*"))
    assert files
    events = EventAccumulator(str(files[0].parent))
    events.Reload()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "valid_accuracy"):
        told = {event.step: event.value for event in events.Scalars(name)}
        assert told == pytest.approx({line["step"]: line[name] for line in lines if name in line}, rel=1e-6)


# --- whole runs ---


def test_learns(small_model: Path, tmp_path: Path) -> None:
    "Three words tell the class: a small model from scratch gets nearly every test row right, and better than chance."
    from llmft_nb.finetune import finetune

    rows = small_rows(300)
    run = finetune(
        rows[:200],
        valid=rows[200:250],
        test=rows[250:],
        model=small_model,
        out=tmp_path / "run",
        epochs=8,
        batch_size=16,
        lr=3e-3,
        precision="f32",
    )
    assert run.record.scores["test"]["accuracy"]["value"] > 0.9
    others = {line["name"]: line for line in run.record.scores["test"]["baselines"]}
    assert others["majority answer"]["verdict"] == "better" and others["untuned base"]["verdict"] == "better"
    assert run.predictor().predict(["I saw 12 times the plum on the table"])[0]["label"] == "fruit"


def test_text_pairs(small_model: Path, tmp_path: Path) -> None:
    from llmft_nb.finetune import finetune

    rows = small_rows(80)
    pairs = [
        {"text": one["text"], "text_pair": two["text"], "label": "same" if one["label"] == two["label"] else "other"}
        for one, two in zip(rows, [*rows[3::2], *rows[:3], *rows[4::2]], strict=False)
    ]
    files = [write_jsonl(tmp_path / f"{name}.jsonl", part) for name, part in (("a", pairs[:60]), ("b", pairs[60:]))]
    options: dict[str, Any] = {"epochs": 2, "batch_size": 8, "lr": 3e-3, "precision": "f32"}
    run = finetune(files[0], test=files[1], model=small_model, out=tmp_path / "run", **options)
    kept = [json.loads(line) for line in (run.folder / "test_predictions.jsonl").read_text().splitlines()]
    answers = run.predictor().predict([{"text": row["text"], "text_pair": row["text_pair"]} for row in kept])
    for answer, row in zip(answers, kept, strict=True):
        assert answer["label"] == row["predicted"]
        assert answer["probabilities"] == pytest.approx(row["probabilities"], abs=1e-5)
    alone = run.predictor().predict([row["text"] for row in kept])
    assert any(abs(a["probabilities"]["same"] - b["probabilities"]["same"]) > 1e-5 for a, b in zip(alone, answers))


def test_several_labels(small_model: Path, tmp_path: Path) -> None:
    from llmft_nb.finetune import evaluate_predictor, finetune

    rows = [row | {"label": [row["label"]] + (["long"] if "again" in row["text"] else [])} for row in small_rows(240)]
    rows[5]["label"] = []
    run = finetune(
        rows[:200],
        valid=rows[200:220],
        test=rows[220:],
        model=small_model,
        out=tmp_path / "run",
        epochs=6,
        batch_size=8,
        lr=3e-3,
        precision="f32",
    )
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(run.folder / "model")
    assert config.problem_type == "multi_label_classification"
    assert [config.id2label[i] for i in range(4)] == ["fruit", "long", "sea", "tool"]
    answer = run.predictor().predict(["I saw 12 times the plum on the table again again again"])[0]
    assert isinstance(answer["label"], list) and set(answer["probabilities"]) == {"fruit", "long", "sea", "tool"}
    scores = run.record.scores["test"]
    assert scores["accuracy"]["value"] > 0.7
    again = evaluate_predictor(run.predictor(), rows[220:])
    assert {name: again[name] for name in ("accuracy", "macro_f1")} == {
        name: scores[name] for name in ("accuracy", "macro_f1")
    }


RERUN = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from llmft_nb.finetune import finetune
files, model, out = (Path(path) for path in sys.argv[1:])
held_out = {name: files / f"{name}.jsonl" for name in ("valid", "test")}
finetune(files / "train.jsonl", model=model, out=out, epochs=2, batch_size=8, lr=3e-3, precision="f32", **held_out)
"""


def test_reruns_with_another_hash_seed_are_identical(
    small_model: Path, small_files: Path, small_run: Path, tmp_path: Path
) -> None:
    "Another process, folder, order of sets, locale and time zone: the same bits."
    shutil.copytree(small_model, tmp_path / "a model")
    shutil.copytree(small_files, tmp_path / "rows")
    command = [sys.executable, "-c", RERUN, str(tmp_path / "rows"), str(tmp_path / "a model"), str(tmp_path / "out")]
    environment = os.environ | {"PYTHONHASHSEED": "12345", "LC_ALL": "C", "TZ": "Asia/Tokyo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("model/model.safetensors", "metrics.jsonl", "test_predictions.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (small_run / name).read_bytes(), name
    ours, theirs = (json.loads((run / "run.json").read_text()) for run in (tmp_path / "out", small_run))
    for name in ("scores", "settings", "data", "fingerprint"):
        assert ours[name] == theirs[name], name
