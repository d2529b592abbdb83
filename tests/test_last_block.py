"The last block computed where it is read: the same answers, losses and gradients as computed everywhere."

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import small_rows
from small_models import DECODERS, ENCODERS, MASKED, answering, labelled, masked, step

from llmft_nb import opening
from llmft_nb.data import TextDataLoader
from llmft_nb.dialogues import InstructDataset, check_instruct
from llmft_nb.hparams import TrainSettings
from llmft_nb.inference import read_rule
from llmft_nb.last_block import AskedAttention, LastBlock, open_last_block
from llmft_nb.modeling import LLMForCausalLM
from llmft_nb.rows import read_rows
from llmft_nb.strategy import find_blocks, open_parts, parse_strategy
from llmft_nb.training import LLMTrainer


@pytest.mark.parametrize(
    ("kind", "made"),
    [
        *((kind, labelled) for kind in ENCODERS + DECODERS),
        *((kind, answering) for kind in DECODERS),
        *((kind, masked) for kind in MASKED),
    ],
)
def test_loss_and_gradient_are_the_same(kind: str, made: Callable[..., Any], save_small: Callable[..., Path]) -> None:
    model, dataset = made(save_small(kind))
    loss, gradient = step(model, dataset)
    last = open_last_block(model, [dataset])
    assert last is not None, "tried, and found to answer the same"
    expected = "asked" if made is not labelled else "first" if kind in ENCODERS else "last"
    assert last.rule == expected == read_rule(model, dataset)
    last.n_narrow = 0
    narrow_loss, narrow_gradient = step(model, dataset)
    assert last.n_narrow == 1
    last.close()
    assert narrow_loss == pytest.approx(loss, abs=1e-5)
    assert len(gradient) == len(narrow_gradient)
    for one, other in zip(gradient, narrow_gradient, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)
    assert not any("forward" in vars(module) for module in model.modules())
    assert not dataset.shows_asked


@pytest.mark.parametrize("strategy", ["full", "top:1", "head"])
@pytest.mark.parametrize(("kind", "dropout"), [("Bert", "hidden_dropout_prob"), ("Llama", "attention_dropout")])
def test_the_same_is_learnt(
    kind: str,
    dropout: str,
    strategy: str,
    save_small: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    one_thread: None,
) -> None:
    changes = {dropout: 0.0, "attention_probs_dropout_prob": 0.0}
    folder, opened = save_small(kind, **changes), list[LastBlock | None]()

    def learnt() -> tuple[list[float], list[torch.Tensor]]:
        model, dataset = labelled(folder)
        open_parts(model.network, parse_strategy(strategy))
        settings = TrainSettings(epochs=3, batch_size=8, lr=3e-3, precision="f32")
        trainer = LLMTrainer(model, settings=settings, strategy=strategy, callbacks=(), log_every=1)
        result = trainer.train(TextDataLoader(dataset, batch_size=8, shuffle=True))
        return [loss for _, loss in result.losses], list(model.parameters())

    def noted(*given: Any) -> LastBlock | None:
        opened.append(open_last_block(*given))
        return opened[-1]

    monkeypatch.setattr(opening, "open_last_block", noted)
    losses, weights = learnt()
    assert opened[0] is not None and (opened[0].n_narrow > 1)
    monkeypatch.setattr(opening, "open_last_block", lambda *_: None)
    plain_losses, plain = learnt()
    assert losses == pytest.approx(plain_losses, abs=1e-5)
    for one, other in zip(weights, plain, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3)


def test_a_row_asked_less_often_than_another(save_small: Callable[..., Path]) -> None:
    "Places of filling must neither answer nor pull."
    model = LLMForCausalLM.from_pretrained(save_small("Llama"))
    rows = [{"prompt": row["text"], "completion": "word " * (1 + 2 * (i % 3))} for i, row in enumerate(small_rows(6))]
    dataset = InstructDataset(check_instruct(read_rows(rows)), model.tokenizer, max_length=200)
    _, gradient = step(model, dataset)
    last = LastBlock(model, "asked", [dataset])
    assert (dataset.batch(range(6))["asked_places"] == -1).any()
    _, narrow = step(model, dataset)
    assert last.n_narrow == 1
    last.close()
    for one, other in zip(gradient, narrow, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


def test_a_block_that_needs_its_neighbours_computes_everything(save_small: Callable[..., Path]) -> None:
    model, dataset = labelled(save_small("Bert"))
    block = find_blocks(model.network)[1][-1]
    hook = block.register_forward_hook(lambda block, given, answer: answer + answer.roll(1, dims=1))
    assert open_last_block(model, [dataset]) is None
    hook.remove()
    model.network.set_attn_implementation("eager")
    last = open_last_block(model, [dataset])  # Answers the same, for it never narrows
    assert last is not None and last.n_narrow == 0
    last.close()


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_rows_of_one_length_have_no_mask(kind: str, save_small: Callable[..., Path]) -> None:
    "Then transformers only says that attention is causal, and what a token may see is worked out here."
    model = LLMForCausalLM.from_pretrained(save_small(kind))
    row = {"prompt": "I saw the apple and the pear near the river", "completion": "sea sea"}
    dataset = InstructDataset(check_instruct(read_rows([row] * 3)), model.tokenizer, max_length=200)
    loss, gradient = step(model, dataset)
    last = LastBlock(model, "asked", [dataset])
    seen: list[dict[str, Any]] = []
    ask = AskedAttention.narrow_mask

    def noted(asked: AskedAttention) -> torch.Tensor | None:
        seen.append(dict(asked.kept or {}))
        return ask(asked)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AskedAttention, "narrow_mask", noted)
        narrow_loss, narrow = step(model, dataset)
    last.close()
    assert [(one["attn_mask"], one["is_causal"]) for one in seen] == [(None, True)]
    assert narrow_loss == pytest.approx(loss, abs=1e-5)
    for one, other in zip(gradient, narrow, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)
