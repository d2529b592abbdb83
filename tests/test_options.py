"Options for tight memory and for GPUs change what a run costs, not what it learns."

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import DECODERS, ENCODERS, answering, labelled
from torch import nn

from llmft_nb import activations, kernels, optimizers, task
from llmft_nb.adapters import apply_strategy
from llmft_nb.callbacks import Callback, TrainState
from llmft_nb.core import UserError
from llmft_nb.data import TextDataLoader, TokenDataset
from llmft_nb.finetune import finetune
from llmft_nb.hparams import TrainSettings
from llmft_nb.kernels import Kernels, open_kernels
from llmft_nb.modeling import TunableModel
from llmft_nb.strategy import parse_strategy
from llmft_nb.training import LLMTrainer

PLAIN: dict[str, Any] = {"lr": 1e-3, "precision": "f32", "warmup_frac": 0.0, "epochs": 2, "seed": 1}
IN_BACKWARD: dict[str, Any] = {"step_in_backward": True, "max_grad_norm": 0.0}
STRATEGIES = ("full", "top:1", "head", "gradual", "head-then-full", "lora:4", "lora:4@top:1")


def trainer_of(model: TunableModel, strategy: str = "full", **options: Any) -> LLMTrainer:
    "A trainer for two epochs, every step logged."
    apply_strategy(model, parse_strategy(strategy), 0)
    own = {name: options.pop(name) for name in ("folder", "own_optimizer", "callbacks") if name in options}
    own = {name.removeprefix("own_"): value for name, value in own.items()}
    settings = TrainSettings(**PLAIN | options)
    return LLMTrainer(model, settings=settings, strategy=strategy, log_every=1, **{"callbacks": ()} | own)


def tuned(
    made: tuple[TunableModel, TokenDataset], strategy: str = "full", **options: Any
) -> tuple[dict[str, torch.Tensor], list[tuple[int, float]]]:
    "Weights and losses of a run; the model is left as it came."
    model, dataset = made
    result = trainer_of(model, strategy, **options).train(loader_of(dataset))
    assert not any("forward" in vars(module) for module in model.modules())
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}, list(result.losses)


def loader_of(dataset: TokenDataset) -> TextDataLoader:
    "Eight rows a step, of different lengths."
    return TextDataLoader(dataset, batch_size=8, shuffle=True, seed=3, window=8)


def assert_same_bits(one: tuple[Any, Any], other: tuple[Any, Any]) -> None:
    "Two runs took the same steps."
    assert [name for name in one[0] if not torch.equal(one[0][name], other[0][name])] == []
    assert one[1] == other[1]


@pytest.fixture
def recomputed_blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    "How often a block went through `recomputed`."
    seen, own = list[int](), activations.recomputed

    def noted(*given: Any, **named: Any) -> Any:
        seen.append(1)
        return own(*given, **named)

    monkeypatch.setattr(activations, "recomputed", noted)
    return seen


@pytest.mark.parametrize(
    ("kind", "make"), [*((kind, labelled) for kind in ENCODERS), *((kind, answering) for kind in DECODERS)]
)
def test_activations_computed_again_give_the_same_bits(
    kind: str, make: Callable[..., Any], save_small: Callable[..., Path], recomputed_blocks: list[int]
) -> None:
    folder = save_small(kind)
    kept = tuned(make(folder))
    assert not recomputed_blocks
    assert_same_bits(tuned(make(folder), activation_checkpointing=True), kept)
    assert recomputed_blocks


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_activations_computed_again_with_dropout_and_any_strategy(
    strategy: str, save_small: Callable[..., Path]
) -> None:
    folder = save_small("Bert", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    kept = tuned(labelled(folder), strategy)
    assert_same_bits(tuned(labelled(folder), strategy, activation_checkpointing=True), kept)
    without = tuned(labelled(save_small("Bert", hidden_dropout_prob=0.0)), strategy)
    assert without[1] != kept[1], "nothing was dropped"


def test_who_stands_around_a_block_stands_there_again(
    save_small: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_small("Llama")
    kept = tuned(answering(folder))
    monkeypatch.setattr(activations, "_get_current_function_mode_stack", list)
    with pytest.raises((RuntimeError, AssertionError)):  # Rows in a line would attend to each other
        assert_same_bits(tuned(answering(folder), activation_checkpointing=True), kept)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_in_the_backward_pass_is_the_same_step(strategy: str, save_small: Callable[..., Path]) -> None:
    folder = save_small("Bert")
    plain = tuned(labelled(folder), strategy, max_grad_norm=0.0)
    assert_same_bits(tuned(labelled(folder), strategy, **IN_BACKWARD), plain)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_a_step_in_the_backward_pass_of_a_model_that_writes(
    kind: str, ties: bool, save_small: Callable[..., Path]
) -> None:
    folder = save_small(kind, tie_word_embeddings=ties)
    plain = tuned(answering(folder), max_grad_norm=0.0)
    found = tuned(answering(folder), **IN_BACKWARD, activation_checkpointing=True)
    for name, weight in plain[0].items():  # The tied gradient is added up in another order
        assert torch.allclose(found[0][name], weight, atol=2e-4), name
    assert [loss for _, loss in found[1]] == pytest.approx([loss for _, loss in plain[1]], abs=1e-4)


def test_the_norm_is_logged_and_no_gradient_is_left(save_small: Callable[..., Path]) -> None:
    class Norms(Callback):
        def __init__(self) -> None:
            self.found = list[float]()

        def on_step(self, state: TrainState, values: Any) -> None:
            self.found.append(values["grad_norm"])

    norms = Norms(), Norms()
    model, dataset = labelled(save_small("Bert"))
    trainer_of(model, callbacks=[norms[0]], max_grad_norm=0.0).train(loader_of(dataset))
    model, dataset = labelled(save_small("Bert"))
    result = trainer_of(model, callbacks=[norms[1]], **IN_BACKWARD).train(loader_of(dataset))
    (moved,) = result.moved
    assert moved["step"] == 1 and all(part["n_moved"] for part in moved["parts"])
    assert norms[1].found == pytest.approx(norms[0].found, rel=1e-4) and len(norms[0].found) == 6
    assert all(weight.grad is None for weight in model.parameters())


class Killed(Callback):
    "Ends a run after its fifth step."

    def on_step(self, state: TrainState, values: Any) -> None:
        if state.step == 5:
            raise KeyboardInterrupt


def assert_resumed_to_the_same_bits(folder: Path, out: Path, **options: Any) -> None:
    "A run that is killed goes on from step 4 as if nothing had been."
    whole, dataset = labelled(folder)
    trainer_of(whole, **options).train(loader_of(dataset))
    model, dataset = labelled(folder)
    with pytest.raises(KeyboardInterrupt):
        trainer_of(model, folder=out, callbacks=[Killed()], save_every=4, **options).train(loader_of(dataset))
    model, dataset = labelled(folder)
    trainer = trainer_of(model, folder=out, save_every=4, **options)
    assert trainer.train(loader_of(dataset), resume=True).resumed_from == 4
    assert_same_bits((dict(model.named_parameters()), 0), (dict(whole.named_parameters()), 0))


def test_a_run_that_steps_in_the_backward_pass_is_resumed(save_small: Callable[..., Path], tmp_path: Path) -> None:
    assert_resumed_to_the_same_bits(save_small("Bert"), tmp_path, **IN_BACKWARD)


def test_a_gradient_that_is_no_number_is_told_though_it_is_too_late(
    save_small: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, dataset = labelled(save_small("Bert"))
    model.network.get_input_embeddings().weight.data[5:].fill_(float("nan"))
    with pytest.raises(UserError, match="step 1; the step was taken, which spoiled the weights"):
        trainer_of(model, **IN_BACKWARD).train(loader_of(dataset))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"micro_batch_size": 4}, "adds up micro-batches"),
        ({"micro_batch_tokens": 30}, "micro_batch_tokens"),
        ({"own_optimizer": torch.optim.SGD}, "optimizer of its own"),
    ],
)
def test_what_a_step_in_the_backward_pass_excludes_is_refused(
    options: dict[str, Any], words: str, save_small: Callable[..., Path]
) -> None:
    model, dataset = labelled(save_small("Bert"))
    options = {n: v(model.parameters(), lr=0.1) if n == "own_optimizer" else v for n, v in options.items()}
    with pytest.raises(UserError, match=words):
        trainer_of(model, **IN_BACKWARD, **options).train(loader_of(dataset))
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.fixture
def eight_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    "bitsandbytes, or where it is not installed something that keeps its state as that does."
    if importlib.util.find_spec("bitsandbytes") is not None:
        return

    class Coarse(torch.optim.AdamW):
        def state_dict(self) -> dict[str, Any]:
            found = super().state_dict()
            entries = {i: {"count": float(e["step"]), "more": dict(e)} for i, e in found["state"].items()}
            return found | {"state": entries}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            own = {i: e.get("more", e) for i, e in state["state"].items()}
            super().load_state_dict(state | {"state": own})

    package = SimpleNamespace(AdamW8bit=Coarse)
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=package))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", package)
    monkeypatch.setattr(optimizers, "check_eight_bit", lambda: None)


def test_eight_bit_states_have_the_same_groups(save_small: Callable[..., Path], eight_bits: None) -> None:
    model, _ = labelled(save_small("Bert"))
    settings = TrainSettings(lr=1e-3, head_lr_factor=5.0, layer_decay=0.5)
    plain = optimizers.make_optimizer(model.network, settings)
    made = optimizers.make_optimizer(model.network, replace(settings, optimizer="adamw8bit"))
    assert "8bit" in type(made).__name__ or type(made).__name__ == "Coarse"
    for group, same in zip(made.param_groups, plain.param_groups, strict=True):
        names = ("name", "lr", "weight_decay", "params")
        assert [group[name] for name in names[:3]] == [same[name] for name in names[:3]]
        assert all(one is other for one, other in zip(group["params"], same["params"], strict=True))


@pytest.mark.parametrize("options", [{}, IN_BACKWARD])
def test_eight_bit_states_are_saved_and_resumed_to_the_same_bits(
    options: dict[str, Any], save_small: Callable[..., Path], tmp_path: Path, eight_bits: None
) -> None:
    assert_resumed_to_the_same_bits(save_small("Bert"), tmp_path, optimizer="adamw8bit", **options)


def test_bitsandbytes_that_is_not_there_is_told_how_to_get(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        optimizers.check_eight_bit()


def test_mistakes_are_heard_of_before_a_model_is_loaded(
    small_files: Path, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        pytest.fail("loaded")

    monkeypatch.setattr(task, "task_model_class", never)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    rows = small_files / "train.jsonl"
    for options, words in (
        ({"step_in_backward": True}, "max_grad_norm 1.0: contradictory"),
        ({"optimizer": "adamw8bit"}, "bitsandbytes is not installed"),
        ({"optimizer": "sgd"}, "choose adamw, adamw8bit"),
        ({"kernels": "fast"}, "choose auto, none"),
        ({"compile": "yes"}, "neither true nor false"),
    ):
        with pytest.raises(UserError) as told:
            finetune(rows, model=small_model, out=tmp_path / "run", **options)
        assert words in f"{told.value.where}: {told.value.what} {told.value.mend}"
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["compile", "activation_checkpointing"])
def test_a_model_without_a_single_list_of_blocks_is_told_which_option_to_leave(
    option: str, save_small: Callable[..., Path]
) -> None:
    model, dataset = labelled(save_small("Llama"))
    trainer = trainer_of(model, **{option: True})
    model.network.config.num_hidden_layers = 99
    with pytest.raises(UserError, match=f"{option}: .* leave it out"):
        trainer.train(loader_of(dataset))


def test_compiled_blocks_learn_the_same(save_small: Callable[..., Path]) -> None:
    folder = save_small("Llama")
    plain = tuned(answering(folder))
    found = tuned(answering(folder), compile=True, activation_checkpointing=True)
    assert [loss for _, loss in found[1]] == pytest.approx([loss for _, loss in plain[1]], abs=1e-3)


class LigerNorm(nn.Module):
    "A norm as somebody else would write it."

    def forward(self: Any, states: torch.Tensor) -> torch.Tensor:
        share = states.square().mean(-1, keepdim=True).add(self.variance_epsilon).rsqrt()
        return self.weight * states * share


@pytest.mark.parametrize(("factor", "is_kept"), [(1.0, True), (2.0, False)])
def test_kernels_are_kept_where_the_model_answers_the_same(
    factor: float, is_kept: bool, save_small: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, dataset = labelled(save_small("Llama"))
    norms = [module for module in model.network.modules() if "Norm" in type(module).__name__]
    called, given = list[float](), dict[str, Any]()

    def apply_liger_kernel(inner: nn.Module, options: dict[str, Any]) -> None:
        given.update(options)
        for norm in norms:
            forward = partial(LigerNorm.forward, norm)
            norm.forward = lambda states, forward=forward: called.append(1.0) or factor * forward(states)  # type: ignore

    plain = tuned(labelled(save_small("Llama")))
    monkeypatch.setattr("transformers.integrations.liger.apply_liger_kernel", apply_liger_kernel)
    assert open_kernels(model, dataset, "auto") is None, "not on a CPU"
    monkeypatch.setattr(kernels, "may_use_liger", lambda device: True)
    found = tuned((model, dataset))
    assert bool(called) and given == {"cross_entropy": False, "fused_linear_cross_entropy": False}
    n_tried = len(called)
    assert (n_tried > len(norms)) == is_kept, "tried once, then used or left"
    assert [loss for _, loss in found[1]] == pytest.approx([loss for _, loss in plain[1]], abs=1e-4)
    assert open_kernels(model, dataset, "none") is None and len(called) == n_tried


def test_what_kernels_change_in_a_file_is_put_back(save_small: Callable[..., Path]) -> None:
    model, _ = labelled(save_small("Llama"))
    file = vars(sys.modules[type(model.network).__module__])
    before = dict(file)

    def put(inner: nn.Module) -> None:
        file["apply_rotary_pos_emb"], file["new"] = None, 1
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError):
        Kernels(model.network, put)
    assert dict(file) == before
