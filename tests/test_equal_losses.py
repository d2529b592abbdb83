"""Positions alone, packed, padded, accumulated: the same loss to 1e-5 and the same gradient to 1e-4 as the plain way.

For every shape the plain way is transformers' own: all logits, a full copy, and its loss function.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from small import small_config
from torch import nn

from llmft_nb.bases import find_model, load_tokenizer
from llmft_nb.data import TextDataLoader, TokenDataset, packed_inputs, token_table
from llmft_nb.hparams import TrainSettings
from llmft_nb.modeling import LLMForCausalLM, LLMForMaskedLM, LLMForTokenClassification, PositionModel
from llmft_nb.objectives import classification_loss_sum, loss_divisor
from llmft_nb.steps import StepPlan, backward_step, make_accelerator
from llmft_nb.tokens import NO_TARGET, TokenRows

DECODERS, ENCODERS = ("Llama", "Qwen3", "GPT2"), ("Bert", "Roberta")
CASES = [
    *((kind, LLMForCausalLM) for kind in DECODERS),
    *((kind, LLMForMaskedLM) for kind in ENCODERS),
    *((kind, LLMForTokenClassification) for kind in (*DECODERS, *ENCODERS)),
]
NAMES = [f"{kind}-{model.kind}" for kind, model in CASES]
N_LABELS = 5


def make_model(kind: str, model_class: type[PositionModel]) -> PositionModel:
    "A small random model with the head of a task; no dropout."
    import transformers

    source = find_model("tiny")
    tokenizer, _ = load_tokenizer(source)
    head = "LMHeadModel" if (kind, model_class) == ("GPT2", LLMForCausalLM) else f"For{model_class.kind}"
    config = small_config(kind, len(tokenizer), num_labels=N_LABELS, initializer_range=0.1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = getattr(transformers, f"{kind}{head}")(config)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout_prob", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model_class(network.train(), tokenizer, source)


def make_rows(model: PositionModel, n_rows: int = 7, seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    "Random token ids of unequal lengths, and for each position what it is to answer; some rows answer little."
    chosen = random.Random(seed)
    n_classes = N_LABELS if isinstance(model, LLMForTokenClassification) else len(model.tokenizer)
    ids, labels = [], []
    for row in range(n_rows):
        n_tokens = chosen.randint(3, 21)
        ids.append([chosen.randrange(10, len(model.tokenizer)) for _ in range(n_tokens)])
        asked = chosen.sample(range(n_tokens), 1 if row % 3 == 0 else chosen.randint(1, n_tokens))
        labels.append([chosen.randrange(n_classes) if t in asked else NO_TARGET for t in range(n_tokens)])
    return ids, labels


def make_dataset(model: PositionModel, ids: Sequence[list[int]], labels: Sequence[list[int]]) -> TokenDataset:
    table = token_table(TokenRows(list(ids), None, [len(row) for row in ids], list(labels)))
    return TokenDataset(table, model.tokenizer, 64, [f"row:{i + 1}" for i in range(len(ids))])


def gradient(model: PositionModel, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


def assert_same(model: PositionModel, ours: torch.Tensor, plain: torch.Tensor) -> None:
    assert abs(ours.item() - plain.item()) < 1e-5 * max(1.0, abs(plain.item()))
    mine, theirs = gradient(model, ours), gradient(model, plain)
    assert mine.shape == theirs.shape
    assert (mine - theirs).norm() < 1e-4 * theirs.norm()
    assert theirs.norm() > 1e-3


def mean_loss(model: PositionModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return classification_loss_sum(model(**inputs), batch["labels"]) / loss_divisor(batch["labels"].tolist())


def plain_loss(model: PositionModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    "All logits of the rectangle, by transformers alone, and torch's cross-entropy over them."
    inputs = {name: value for name, value in batch.items() if name not in {"labels", "keep"}}
    logits_NTC = model.network(**inputs).logits
    labels = torch.full(logits_NTC.shape[:2], NO_TARGET).flatten()
    labels[batch["keep"]] = batch["labels"]
    return nn.functional.cross_entropy(logits_NTC.flatten(0, 1), labels, ignore_index=NO_TARGET)


@pytest.mark.parametrize(("kind", "model_class"), CASES, ids=NAMES)
def test_positions_alone_equal_all_positions(one_thread, kind, model_class):
    model = make_model(kind, model_class)
    batch = make_dataset(model, *make_rows(model)).batch(range(7))
    assert len(batch["keep"]) < batch["input_ids"].numel() / 2
    assert_same(model, mean_loss(model, batch), plain_loss(model, batch))


@pytest.mark.parametrize("kind", DECODERS)
def test_next_token_loss_equals_transformers_own(one_thread, kind):
    model = make_model(kind, LLMForCausalLM)
    ids, _ = make_rows(model)
    answers = [[NO_TARGET] * (len(row) // 2) + row[len(row) // 2 :] for row in ids]  # Supervised: the second half
    labels = [[*row[1:], NO_TARGET] for row in answers]
    batch = make_dataset(model, ids, labels).batch(range(7))
    width = batch["input_ids"].shape[1]
    theirs = torch.tensor([row + [NO_TARGET] * (width - len(row)) for row in answers])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert_same(model, mean_loss(model, batch), model.network(labels=theirs, **inputs).loss)


@pytest.mark.parametrize(("kind", "model_class"), CASES, ids=NAMES)
def test_any_split_of_a_step_has_the_same_gradient(one_thread, kind, model_class):
    model = make_model(kind, model_class)
    loader = TextDataLoader(make_dataset(model, *make_rows(model)), batch_size=7)
    found = []
    for n_at_once in (7, 3, 1):
        model.zero_grad()
        plan = StepPlan(TrainSettings(batch_size=7, micro_batch_size=n_at_once), None, 4096)
        loss = backward_step(make_accelerator("f32"), model, loader, range(7), 0, plan)
        grads = [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
        found.append((loss.item(), torch.cat(grads)))
    whole_loss, whole = found[0]
    plain = plain_loss(model, loader.dataset.batch(range(7)))
    assert abs(whole_loss - plain.item()) < 1e-5 * max(1.0, plain.item())  # Divided by what is supervised, not by rows
    assert (gradient(model, plain) - whole).norm() < 1e-4 * whole.norm()
    for loss, parts in found[1:]:
        assert abs(loss - whole_loss) < 1e-5 * max(1.0, whole_loss)
        assert (parts - whole).norm() < 1e-4 * whole.norm()


@pytest.mark.parametrize(("kind", "model_class"), CASES, ids=NAMES)
def test_order_and_padding_change_nothing(one_thread, kind, model_class):
    model = make_model(kind, model_class)
    dataset = make_dataset(model, *make_rows(model))
    mixed = mean_loss(model, dataset.batch([3, 0, 6, 1, 5, 2, 4]))
    alone = [dataset.batch([row]) for row in sorted(range(7), key=lambda row: dataset.lengths[row])]
    sums = [classification_loss_sum(model(**{k: v for k, v in b.items() if k != "labels"}), b["labels"]) for b in alone]
    assert_same(model, sum(sums) / loss_divisor(dataset.targets(range(7))), mixed)


@pytest.mark.parametrize(("kind", "model_class"), CASES, ids=NAMES)
def test_packed_equals_unpacked(one_thread, kind, model_class):
    model = make_model(kind, model_class)
    ids, labels = make_rows(model)
    unpacked = mean_loss(model, make_dataset(model, ids, labels).batch(range(7)))
    rows, width = [[0, 3, 5], [1, 2], [4, 6]], 64
    first_position = model.network.config.pad_token_id + 1 if kind == "Roberta" else 0
    segments = torch.full((3, width), -1)
    batch = {"input_ids": torch.zeros(3, width, dtype=torch.int64)}
    kept, right = [], []
    for row, documents in enumerate(rows):
        place = 0
        for number, document in enumerate(documents):
            stop = place + len(ids[document])
            batch["input_ids"][row, place:stop] = torch.tensor(ids[document])
            segments[row, place:stop] = number
            for t, label in enumerate(labels[document]):
                if label != NO_TARGET:
                    kept.append(row * width + place + t)
                    right.append(label)
            place = stop
    batch |= packed_inputs(segments, kind in DECODERS, first_position)
    batch |= {"keep": torch.tensor(kept), "labels": torch.tensor(right)}
    assert_same(model, mean_loss(model, batch), unpacked)
    without_walls = {**batch, "attention_mask": (segments >= 0).long()}
    assert abs(mean_loss(model, without_walls).item() - unpacked.item()) > 2e-5  # The check can fail


def test_a_step_that_masks_nothing_is_no_division_by_zero(one_thread):
    model = make_model("Bert", LLMForMaskedLM)
    dataset = make_dataset(model, [[11, 12, 13]], [[NO_TARGET] * 3])
    loss = mean_loss(model, dataset.batch([0]))
    assert loss.item() == 0.0
    loss.backward()
