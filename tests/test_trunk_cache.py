"A frozen trunk computed once: the same training as with a trunk computed each time."

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from small import small_rows

from llmft_nb import opening
from llmft_nb.adapters import apply_strategy
from llmft_nb.callbacks import TrainResult
from llmft_nb.data import TextDataLoader, TextDataset
from llmft_nb.hparams import TrainSettings
from llmft_nb.inference import pooled_features, predict_logits
from llmft_nb.modeling import LLMForSequenceClassification, size_head
from llmft_nb.strategy import PHASED, find_blocks, parse_strategy
from llmft_nb.training import LLMTrainer
from llmft_nb.trunk_cache import Trunk, collect_states, open_trunk, trunk_keys
from llmft_nb.trunk_states import TrunkStore

KINDS = ("Bert", "Roberta", "DistilBert", "GPT2", "Llama", "Qwen3", "Gemma", "Mistral", "Phi", "Phi3")
LABELS = ["fruit", "sea", "tool"]


def trained(
    folder: Path, strategy: str, trunk_gb: float, **options: Any
) -> tuple[LLMForSequenceClassification, TrainResult]:
    "A classifier trained for some epochs, validated after each."
    model = LLMForSequenceClassification.from_pretrained(folder)
    size_head(model, LABELS)
    apply_strategy(model, parse_strategy(strategy))
    train, valid = (TextDataset(small_rows(48, seed), model.tokenizer, label_names=LABELS) for seed in (0, 1))
    epochs = 6 if parse_strategy(strategy).kind in PHASED else 3
    settings = TrainSettings(epochs=epochs, batch_size=8, lr=3e-3, precision="f32", trunk_gb=trunk_gb, **options)

    def evaluate(asked: Any) -> dict[str, float]:
        return {"accuracy": -float(abs(predict_logits(asked, valid)).mean())}

    trainer = LLMTrainer(
        model, settings=settings, strategy=strategy, evaluate=evaluate, valid=valid, callbacks=(), log_every=1
    )
    result = trainer.train(TextDataLoader(train, batch_size=8, shuffle=True))
    assert train.states is None and valid.states is None
    return model, result


@pytest.mark.parametrize("strategy", ["top:1", "head", "gradual", "head-then-full", "lora:2@top:1"])
@pytest.mark.parametrize("kind", KINDS)
def test_kept_or_computed_the_same_is_learnt(
    kind: str, strategy: str, save_small: Callable[..., Path], one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "open_last_block", lambda *_: None)  # test_last_block has both
    folder = save_small(kind)
    (kept, told), (computed, plain) = (trained(folder, strategy, gb) for gb in (4.0, 0.0))
    assert any(words.startswith("kept") for words in told.trunk), told.trunk
    assert not any(plain.trunk)
    assert [step for step, _ in told.losses] == [step for step, _ in plain.losses]
    torch.testing.assert_close([loss for _, loss in told.losses], [loss for _, loss in plain.losses], atol=1e-5, rtol=0)
    assert told.best_step == plain.best_step
    other = dict(computed.named_parameters())
    for name, weight in kept.named_parameters():
        torch.testing.assert_close(weight, other[name], atol=2e-4, rtol=1e-3)


def test_states_lie_in_files_where_memory_is_short(
    save_small: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    in_memory, _ = trained(save_small("Llama"), "top:1", 4.0)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    in_files, told = trained(save_small("Llama"), "top:1", 4.0)
    assert told.trunk[0].startswith("kept")
    other = dict(in_memory.named_parameters())
    assert all(torch.equal(weight, other[name]) for name, weight in in_files.named_parameters())


def test_states_are_found_again_by_another_store(save_small: Callable[..., Path], tmp_path: Path) -> None:
    model = LLMForSequenceClassification.from_pretrained(save_small("Llama"))
    dataset = TextDataset(small_rows(20), model.tokenizer)
    calls: list[int] = []

    def opened(store: TrunkStore) -> torch.Tensor:
        kept = open_trunk(model, [dataset], 1, 1.0, store)
        states = dataset.states.states
        kept.close()
        return states

    model.register_forward_hook(lambda *_: calls.append(1))
    first = opened(TrunkStore(tmp_path))
    n_first, again = len(calls), opened(TrunkStore(tmp_path))
    assert torch.equal(first, again)
    assert len(calls) - n_first < n_first, "only tried, not collected"
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".states"]
    with torch.no_grad():
        model.network.get_input_embeddings().weight += 0.1
    assert not torch.equal(opened(TrunkStore(tmp_path)), first), "other weights, other states"


@pytest.mark.parametrize(("kind", "is_last"), [("Bert", False), ("Roberta", False), ("Llama", True), ("GPT2", True)])
def test_of_a_row_only_what_the_head_reads_is_kept(
    kind: str, is_last: bool, save_small: Callable[..., Path], tmp_path: Path, one_thread: None
) -> None:
    model = LLMForSequenceClassification.from_pretrained(save_small(kind))
    dataset = TextDataset(small_rows(20), model.tokenizer)
    size_head(model, dataset.label_names)
    computed, n_blocks = predict_logits(model, dataset), len(find_blocks(model.network)[1])
    for _ in range(2):  # Made, and found again
        kept = open_trunk(model, [dataset], n_blocks, 1.0, TrunkStore(tmp_path))
        assert kept.words.startswith(f"kept: {n_blocks} blocks, 21 tokens")
        assert dataset.states.states.shape[0] == 21
        assert dataset.states.only.tolist() == [length - 1 if is_last else 0 for length in dataset.lengths]
        assert abs(predict_logits(model, dataset) - computed).max() < 1e-5
        kept.close()
    below = open_trunk(model, [dataset], n_blocks - 1, 1.0, TrunkStore(tmp_path))
    assert dataset.states.only is None and len(dataset.states.states) == dataset.lengths.sum() + 1
    below.close()


def test_a_trunk_that_is_closed_leaves_a_model_as_it_was(save_small: Callable[..., Path]) -> None:
    model = LLMForSequenceClassification.from_pretrained(save_small("Bert"))
    dataset = TextDataset(small_rows(8), model.tokenizer)
    before = predict_logits(model, dataset)
    trunk = Trunk(model, 1)
    dataset.states = collect_states(model, trunk, dataset)
    assert abs(predict_logits(model, dataset) - before).max() < 1e-5
    pooled = pooled_features(model, TextDataset(small_rows(8, 3), model.tokenizer))
    dataset.states = None
    trunk.close()
    assert (predict_logits(model, dataset) == before).all()
    assert (pooled_features(model, TextDataset(small_rows(8, 3), model.tokenizer)) == pooled).all(), "others compute"
    assert not any("forward" in vars(module) for module in model.modules())
    assert trunk_keys(model, 1, [dataset], "no") != trunk_keys(model, 2, [dataset], "no")


def test_states_of_another_precision_are_others(save_small: Callable[..., Path], one_thread: None) -> None:
    "What is multiplied in is chosen inside the model's forward, so a name has to be told of it."
    model, store = LLMForSequenceClassification.from_pretrained(save_small("Bert")), TrunkStore()
    apply_strategy(model, parse_strategy("top:1"))
    dataset = TextDataset(small_rows(16), model.tokenizer)
    for precision in ("f32", "bf16"):
        settings = TrainSettings(epochs=2, batch_size=8, precision=precision)
        trainer = LLMTrainer(model, settings=settings, strategy="top:1", callbacks=(), trunks=store)
        trainer.train(TextDataLoader(dataset, batch_size=8))
    assert len(store.kept) == 2


def test_a_block_with_a_forward_of_its_own_gets_it_back(save_small: Callable[..., Path]) -> None:
    model = LLMForSequenceClassification.from_pretrained(save_small("Bert"))
    block = model.network.bert.encoder.layer[0]
    block.forward = own = block.forward
    Trunk(model, 1).close()
    assert vars(block)["forward"] is own
