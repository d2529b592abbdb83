"A loss over a vocabulary in parts: the same as over all scores at once."

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import DECODERS, MASKED, answering, labelled, masked, step

from llmft_nb import opening, vocabulary
from llmft_nb.data import TextDataLoader, TokenDataset
from llmft_nb.embedding_rows import TiedRows, open_embedding
from llmft_nb.hparams import TrainSettings
from llmft_nb.inference import row_losses
from llmft_nb.modeling import TunableModel
from llmft_nb.objectives import classification_loss_sum
from llmft_nb.training import LLMTrainer
from llmft_nb.vocabulary import LossInParts, open_loss_parts


@pytest.mark.parametrize(
    ("kind", "made"), [*((kind, answering) for kind in DECODERS), *((kind, masked) for kind in MASKED)]
)
def test_loss_and_gradient_are_the_same(kind: str, made: Callable[..., Any], save_small: Callable[..., Path]) -> None:
    model, dataset = made(save_small(kind))
    loss, gradient = step(model, dataset)
    n_targets, n_tokens = len(dataset.targets(range(len(dataset)))), len(model.tokenizer)
    parts = LossInParts(model, 2 * n_tokens, dataset)
    asked = dataset.batch(range(len(dataset)))
    asked["targets"] = asked.pop("labels")
    model.eval()
    assert model(**asked).shape[0] == n_targets, "a model that is asked gives scores"
    parts.is_tried = True
    model.zero_grad()
    answer = model(**asked)
    parts.close()
    (answer / n_targets).backward()
    assert not answer.dim() and answer.item() / n_targets == pytest.approx(loss, rel=1e-5)
    found = [weight.grad for weight in model.parameters() if weight.grad is not None]
    for one, other in zip(gradient, found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)
    assert not any("forward" in vars(module) for module in model.modules()) and not dataset.tells_targets


@pytest.mark.parametrize("strategy", ["full", "top:1", "lora:2"])
@pytest.mark.parametrize(
    ("kind", "made", "way", "most_scores"),
    [
        ("Llama", answering, "_InParts", 4000),
        ("Llama", answering, "_CostInBlocks", 10**9),
        ("Bert", partial(masked, packing=False), "_InParts", 4000),
    ],
)
def test_the_same_is_learnt(
    kind: str,
    made: Callable[..., Any],
    way: str,
    most_scores: int,
    strategy: str,
    save_small: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    one_thread: None,
) -> None:
    from llmft_nb.adapters import apply_strategy
    from llmft_nb.strategy import parse_strategy

    folder = save_small(kind, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    opened = list[LossInParts | None]()

    def learnt() -> tuple[list[float], list[torch.Tensor]]:
        model, dataset = made(folder)
        apply_strategy(model, parse_strategy(strategy), 0)
        settings = TrainSettings(epochs=2, batch_size=8, lr=3e-3, precision="f32")
        trainer = LLMTrainer(
            model,
            settings=settings,
            strategy=strategy,
            callbacks=(),
            log_every=1,
            evaluate=lambda model: {"loss": -float(row_losses(model, dataset)[0].sum())},
            monitor="loss",
        )
        result = trainer.train(TextDataLoader(dataset, batch_size=8, shuffle=True))
        return [loss for _, loss in result.losses], list(model.parameters())

    def noted(*given: Any, **named: Any) -> LossInParts | None:
        opened.append(open_loss_parts(*given, most_scores=most_scores, **named))
        return opened[-1]

    in_parts, apply = list[int](), getattr(vocabulary, way).apply

    def counted(*given: Any) -> torch.Tensor:
        in_parts.append(1)
        return apply(*given)

    monkeypatch.setattr(getattr(vocabulary, way), "apply", counted)
    monkeypatch.setattr(opening, "open_loss_parts", noted)
    losses, weights = learnt()
    assert opened[0] is not None and len(in_parts) > len(losses) / 2
    monkeypatch.setattr(opening, "open_loss_parts", lambda *_, **__: None)
    plain_losses, plain = learnt()
    assert losses == pytest.approx(plain_losses, abs=1e-5)
    for one, other in zip(weights, plain, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3)


def test_labels_and_few_scores_of_more_than_a_matrix_are_left_alone(save_small: Callable[..., Path]) -> None:
    folder = save_small("Llama")
    model, dataset = labelled(folder)
    assert open_loss_parts(model, dataset, TrainSettings()) is None
    for kind, made in [("Phi", answering), ("Bert", masked)]:  # Their output has a bias, or a layer before it
        model, dataset = made(save_small(kind))
        assert open_loss_parts(model, dataset, TrainSettings()) is None
        in_parts = open_loss_parts(model, dataset, TrainSettings(), most_scores=10)
        assert in_parts is not None and in_parts.matrix is None
        in_parts.close()


def test_dropout_does_not_make_the_trial_fail(save_small: Callable[..., Path]) -> None:
    model, dataset = answering(save_small("GPT2", resid_pdrop=0.5, embd_pdrop=0.5))
    model.train()
    parts = open_loss_parts(model, dataset, TrainSettings(), most_scores=10)
    assert parts is not None and model.training
    parts.close()


def test_a_head_that_sees_all_places_scores_all_at_once(save_small: Callable[..., Path]) -> None:
    model, dataset = answering(save_small("Llama"))
    head = model.network.get_output_embeddings()
    hook = head.register_forward_hook(lambda head, given, scores: scores + scores.mean(-2, keepdim=True))
    assert open_loss_parts(model, dataset, TrainSettings(), most_scores=10) is None
    hook.remove()
    assert not any("forward" in vars(module) for module in model.modules()) and not dataset.tells_targets


def gradients(model: TunableModel, dataset: TokenDataset) -> list[torch.Tensor]:
    "Of a step in two parts, of what is open."
    model.train()
    model.zero_grad()
    for part in (range(12), range(12, 24)):
        batch = dataset.batch(part)
        labels = batch.pop("labels")
        answer = model(**batch, **({"targets": labels} if dataset.tells_targets else {}))
        loss = classification_loss_sum(answer, labels) if answer.dim() else answer
        (loss / 100).backward()
    return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]


@pytest.mark.parametrize("most_tokens", [5, 10**6])
def test_a_tied_matrix_gets_its_gradient_by_whichever_way_scores_are_made(
    most_tokens: int, save_small: Callable[..., Path]
) -> None:
    model, dataset = answering(save_small("Llama", tie_word_embeddings=True))
    plain = gradients(model, dataset)
    tied = open_embedding(model, [dataset])
    assert isinstance(tied, TiedRows)
    parts = open_loss_parts(model, dataset, TrainSettings(), True, most_scores=most_tokens * len(model.tokenizer))
    assert parts is not None and parts.matrix is not None
    found = gradients(model, dataset)
    for opened in (parts, tied):
        opened.close()
    for one, other in zip(plain, found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    assert (parts.matrix.kept is not None) == (most_tokens > 5)


@pytest.mark.parametrize("opens", ["all", "head", "all but the head"])
@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("kind", ["GPT2", "Llama", "Gemma"])
def test_a_matrix_in_blocks_has_the_same_gradient(
    kind: str, ties: bool, writes: bool, opens: str, save_small: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    still = {name: 0.0 for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop") if kind == "GPT2"}
    model, dataset = answering(save_small(kind, tie_word_embeddings=ties, **still))
    head = model.network.get_output_embeddings().weight
    for weight in model.parameters():
        weight.requires_grad_(opens == "all" or (weight is head) == (opens == "head"))
    plain = gradients(model, dataset)
    monkeypatch.setattr(vocabulary, "BLOCK", 1000)
    parts = open_loss_parts(model, dataset, TrainSettings(), writes)
    assert parts is not None and parts.matrix is not None
    assert len(parts.matrix.blocks) == -(-len(model.tokenizer) // 1000) > 2
    for _ in range(2):
        found = gradients(model, dataset)
        for one, other in zip(plain, found, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    assert parts.matrix.memory is not None, "there for the next step"
    assert (head.grad is not None and head.grad is parts.matrix.kept) == (writes and opens != "all but the head")
    parts.close()
    assert not any("forward" in vars(module) for module in model.modules()) and not dataset.tells_targets


def test_scores_that_are_capped_are_no_matrix_alone(save_small: Callable[..., Path]) -> None:
    "A small model's scores are so small that a cap changes nothing in them yet."
    model, dataset = answering(save_small("Llama"))
    head = model.network.get_output_embeddings()
    hook = head.register_forward_hook(lambda head, states, scores: 30 * torch.tanh(scores / 30))
    assert open_loss_parts(model, dataset, TrainSettings()) is None and not dataset.tells_targets
    hook.remove()
    parts = open_loss_parts(model, dataset, TrainSettings())
    assert parts is not None and parts.matrix is not None
    parts.close()


def test_two_losses_may_wait_for_their_way_back(save_small: Callable[..., Path]) -> None:
    model, dataset = answering(save_small("Llama"))
    plain = gradients(model, dataset)
    parts = open_loss_parts(model, dataset, TrainSettings(), True)
    assert parts is not None
    gradients(model, dataset)  # After a step there is memory to be used again
    model.zero_grad()
    losses = list[torch.Tensor]()
    for part in (range(12), range(12, 24)):
        batch = dataset.batch(part)
        losses.append(model(**batch, targets=batch.pop("labels")))
    for loss in losses:
        (loss / 100).backward()
    parts.close()
    for one, other in zip(plain, model.parameters(), strict=True):
        torch.testing.assert_close(one, other.grad, atol=1e-6, rtol=1e-4)


def test_in_mixed_precision_scores_are_made_as_ever(save_small: Callable[..., Path]) -> None:
    model, dataset = answering(save_small("Llama", tie_word_embeddings=True))

    def mixed() -> list[torch.Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return gradients(model, dataset)

    plain = mixed()
    opened = [open_embedding(model, [dataset]), open_loss_parts(model, dataset, TrainSettings(), True)]
    matrix = opened[1].matrix
    assert isinstance(opened[0], TiedRows) and matrix is not None
    matrix.memory = None  # Of the trial, which is in f32
    found = mixed()
    for one in opened:
        one.close()
    assert matrix.memory is None and matrix.kept is None
    for one, other in zip(plain, found, strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=2e-2)
