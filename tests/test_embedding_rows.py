"An embedding of which only the rows that occur move: the same training, fewer numbers."

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import small_rows
from small_models import answering

from llmft_nb import opening
from llmft_nb.callbacks import Callback, TrainState
from llmft_nb.data import TextDataLoader, TextDataset
from llmft_nb.embedding_rows import OccurringRows, OpenEmbedding, TiedRows, occurring_tokens, open_embedding
from llmft_nb.hparams import TrainSettings
from llmft_nb.inference import predict_logits
from llmft_nb.modeling import LLMForMaskedLM, LLMForSequenceClassification, TunableModel, size_head
from llmft_nb.strategy import open_parts, parse_strategy
from llmft_nb.tasks import make_task
from llmft_nb.training import LLMTrainer

UNTIED = ("Bert", "Roberta", "DistilBert", "GPT2", "Llama", "Gemma", "Phi")
LABELS = ["fruit", "sea", "tool"]
OTHER_TEXT = "Zebras quote jazz; vexing sphinx!"


def trained(
    folder: Path, strategy: str = "full", **options: Any
) -> tuple[TunableModel, list[tuple[int, float]], LLMTrainer]:
    "A classifier trained for three epochs, asked about other tokens after each."
    model = LLMForSequenceClassification.from_pretrained(folder)
    size_head(model, LABELS)
    open_parts(model.network, parse_strategy(strategy))
    rows = small_rows(24)
    dataset = TextDataset(rows, model.tokenizer, label_names=LABELS)
    others = TextDataset([{"text": OTHER_TEXT, "label": "sea"}], model.tokenizer, label_names=LABELS)
    settings = TrainSettings(epochs=3, batch_size=8, lr=3e-3, precision="f32")

    best = iter(range(9))

    def evaluate(asked: Any) -> dict[str, float]:
        assert abs(predict_logits(asked, others)).max() > 0
        return {"accuracy": float(next(best))}

    trainer = LLMTrainer(
        model, settings=settings, strategy=strategy, evaluate=evaluate, log_every=1, **({"callbacks": ()} | options)
    )
    result = trainer.train(TextDataLoader(dataset, batch_size=8, shuffle=True))
    return model, list(result.losses), trainer


def weights_of(model: TunableModel) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("strategy", ["full", "gradual"])
@pytest.mark.parametrize("kind", UNTIED)
def test_the_same_is_learnt(
    kind: str, strategy: str, save_small: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    folder, opened = save_small(kind), list[OpenEmbedding]()

    def noted(*arguments: Any) -> OpenEmbedding:
        opened.append(open_embedding(*arguments))
        return opened[-1]

    monkeypatch.setattr(opening, "open_embedding", noted)
    some, losses, _ = trained(folder, strategy)
    assert isinstance(opened[0], OccurringRows), type(opened[0])
    monkeypatch.setattr(opening, "open_embedding", lambda *arguments: OpenEmbedding())
    every, plain, _ = trained(folder, strategy)
    assert [loss for _, loss in losses] == pytest.approx([loss for _, loss in plain], abs=1e-5)
    ours, theirs = weights_of(some), weights_of(every)
    assert {name: weight.shape for name, weight in ours.items()} == {n: weight.shape for n, weight in theirs.items()}
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], atol=2e-4, rtol=1e-3)
    start = LLMForSequenceClassification.from_pretrained(folder).network.get_input_embeddings().weight
    moved = (some.network.get_input_embeddings().weight != start).any(dim=1)
    assert 0 < moved.sum() <= len(opened[0].ids)
    assert not any("forward" in vars(module) for module in some.modules())


def test_callbacks_find_the_model_whole(save_small: Callable[..., Path], tmp_path: Path) -> None:
    "One that saves the model saves all of it; one that writes to it is heeded."

    class Keep(Callback):
        model: TunableModel
        seen: torch.Tensor

        def on_step(self, state: TrainState, values: dict[str, float]) -> None:
            if state.step == 2:
                self.model.save_pretrained(tmp_path / "kept")
                self.seen = self.model.network.get_input_embeddings().weight.detach().clone()
            if state.step == 9:
                with torch.no_grad():
                    self.model.network.get_input_embeddings().weight.fill_(0.25)

    keep = Keep()
    folder = save_small("Llama")
    model = LLMForSequenceClassification.from_pretrained(folder)
    size_head(model, LABELS)
    dataset = TextDataset(small_rows(24), model.tokenizer, label_names=LABELS)
    keep.model = model
    settings = TrainSettings(epochs=3, batch_size=8, lr=3e-3, precision="f32")
    LLMTrainer(model, settings=settings, callbacks=[keep]).train(TextDataLoader(dataset, batch_size=8))
    assert (model.network.get_input_embeddings().weight == 0.25).all(), "the last step's callback wrote it"
    saved = LLMForSequenceClassification.from_pretrained(tmp_path / "kept")
    assert torch.equal(saved.network.get_input_embeddings().weight, keep.seen)
    assert len(keep.seen) == len(model.tokenizer)


def test_a_run_that_fails_leaves_the_embedding_as_it_was(save_small: Callable[..., Path]) -> None:
    class Fail(Callback):
        def on_step(self, state: TrainState, values: dict[str, float]) -> None:
            raise RuntimeError("no more")

    model = LLMForSequenceClassification.from_pretrained(save_small("Bert"))
    size_head(model, LABELS)
    weight = model.network.get_input_embeddings().weight
    dataset = TextDataset(small_rows(24), model.tokenizer, label_names=LABELS)
    with pytest.raises(RuntimeError, match="no more"):
        LLMTrainer(model, callbacks=[Fail()]).train(TextDataLoader(dataset, batch_size=8))
    assert model.network.get_input_embeddings().weight is weight


@pytest.mark.parametrize("kind", ["GPT2", "Llama", "Qwen3"])
def test_a_tied_matrix_has_the_same_gradient(kind: str, save_small: Callable[..., Path]) -> None:
    model, dataset = answering(save_small(kind, tie_word_embeddings=True))

    def gradients() -> list[torch.Tensor]:
        model.train()
        model.zero_grad()
        for part in (range(5), range(5, 12)):
            batch = dataset.batch(part)
            torch.manual_seed(0)
            labels = batch.pop("labels")
            torch.nn.functional.cross_entropy(model(**batch), labels).backward()
        return [weight.grad.clone() for weight in model.parameters()]

    plain = gradients()
    opened = open_embedding(model, [dataset])
    assert isinstance(opened, TiedRows)
    in_place = gradients()
    opened.close()
    for one, other in zip(plain, in_place, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_where_any_token_may_come_every_row_moves(save_small: Callable[..., Path]) -> None:
    "Masking draws tokens at random."
    model, task = LLMForMaskedLM.from_pretrained(save_small("Bert")), make_task("text", TrainSettings(max_length=48))
    splits = task.prepare([{"text": row["text"]} for row in small_rows(40)], None, None, columns=None, leaks="drop")
    dataset = task.dataset(splits.train, model, [])
    assert occurring_tokens([dataset]) is None


def test_a_closed_embedding_asks_for_no_gradient(save_small: Callable[..., Path]) -> None:
    "Else backward would go down to it through every frozen block, while `gradual` keeps it closed."
    model = LLMForSequenceClassification.from_pretrained(save_small("Bert"))
    embedding = model.network.get_input_embeddings()
    opened = OccurringRows(embedding, torch.arange(20))
    embedding.weight.requires_grad_(False)
    embedding.eval()  # As a frozen part is
    assert not embedding(torch.tensor([[3, 4]])).requires_grad, "the large matrix is closed as its rows are"
    embedding.weight.requires_grad_(True)
    assert embedding(torch.tensor([[3, 4]])).requires_grad
    opened.close()
    assert embedding.weight.requires_grad and embedding.weight.grad is None
