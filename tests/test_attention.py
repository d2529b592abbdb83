"""Attention in f32 inside a step in bf16: for every family, while the run lasts, and nowhere else."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small import small_network, small_rows

from llmft_nb.callbacks import Callback
from llmft_nb.finetune import finetune
from llmft_nb.inference import last_states
from llmft_nb.steps import ATTENTION, f32_attention, make_accelerator

KINDS = ["Bert", "Roberta", "DistilBert", "GPT2", "Llama", "Qwen3", "Gemma", "Mistral", "Phi", "Phi3", "T5", "Bart"]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    "The precision of every attention that torch computes."
    found: list[torch.dtype] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def noted(query: torch.Tensor, *others: Any, **options: Any) -> torch.Tensor:
        answer = plain(query, *others, **options)
        found.append(answer.dtype)  # What autocast made of the inputs shows in what comes out
        return answer

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    return found


@pytest.fixture
def bf16() -> Iterator[Any]:
    yield make_accelerator("bf16")
    make_accelerator("f32")


def hidden(network: torch.nn.Module, lengths: tuple[int, ...] = (9, 6)) -> torch.Tensor:
    "The last block's output for two rows, the second padded."
    ids = torch.arange(2, 2 + len(lengths) * max(lengths)).reshape(len(lengths), -1)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return last_states(network.base_model, {"input_ids": ids, "attention_mask": mask})[mask.bool()]


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_attends_in_f32_and_means_the_same(kind: str, seen: list[torch.dtype], bf16: Any) -> None:
    network = small_network(kind, 100).eval()
    plain = hidden(network)
    assert set(seen) == {torch.bfloat16}, "what this test is about"
    seen.clear()
    with f32_attention(network, bf16):
        widened = hidden(network)
    n_seen = 2 * (1 + 2 * network.config.is_encoder_decoder)  # A decoder's block looks twice
    assert seen == [torch.float32] * n_seen, "every block"
    assert torch.allclose(plain, widened, atol=0.05) and not torch.equal(plain, widened)
    assert network.config._attn_implementation == "sdpa"
    seen.clear()
    assert torch.equal(hidden(network), plain) and set(seen) == {torch.bfloat16}


def test_nothing_changes_in_f32_or_where_a_model_has_its_own_attention(seen: list[torch.dtype], bf16: Any) -> None:
    network = small_network("Llama", 100).eval()
    with f32_attention(network, make_accelerator("f32")):
        assert network.config._attn_implementation == "sdpa"
    eager = small_network("Llama", 100).eval()
    eager.set_attn_implementation("eager")
    with f32_attention(eager, make_accelerator("bf16")):
        assert eager.config._attn_implementation == "eager"
    with f32_attention(torch.nn.Linear(2, 2), make_accelerator("bf16")):
        pass


def test_a_family_with_its_own_attention_is_left_alone_in_silence(bf16: Any) -> None:
    from transformers import FalconConfig, FalconModel

    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    network, told = FalconModel(FalconConfig(**sizes)), list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    try:
        with f32_attention(network, bf16):
            assert network.config._attn_implementation == "sdpa"
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert network.config._attn_implementation == "sdpa" and told == []


def test_a_run_that_breaks_leaves_the_model_as_it_was(bf16: Any) -> None:
    network = small_network("Bert", 100)
    with pytest.raises(ZeroDivisionError), f32_attention(network, bf16):
        assert network.config._attn_implementation == ATTENTION
        raise ZeroDivisionError
    assert network.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("strategy", ["full", "lora:4"])
def test_a_run_trains_so_and_saves_nothing_of_it(
    strategy: str, save_small: Callable[..., Path], seen: list[torch.dtype], tmp_path: Path
) -> None:
    during: list[set[torch.dtype]] = []

    class Look(Callback):
        def on_step(self, state: Any, values: Any) -> None:
            during.append(set(seen))
            seen.clear()

    options: dict[str, Any] = {"model": save_small("Bert"), "epochs": 1, "batch_size": 16, "callbacks": [Look()]}
    run = finetune(small_rows(96), out=tmp_path / "run", precision="bf16", strategy=strategy, **options)
    make_accelerator("f32")
    assert len(during) >= 4 and all(precisions == {torch.float32} for precisions in during[1:])
    for file in (run.folder / "model" / "config.json", run.folder / "run.json"):
        assert ATTENTION not in file.read_text(encoding="utf-8")
    assert json.loads((run.folder / "model" / "config.json").read_text(encoding="utf-8"))["model_type"] == "bert"
