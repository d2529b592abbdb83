"Blocks that compute no padding: the same answers, losses and gradients as with rectangles."

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import DECODERS, ENCODERS, MASKED, answering, labelled, masked, step
from torch import nn

from llmft_nb import opening
from llmft_nb import unpadded as unpadded_module
from llmft_nb.adapters import apply_strategy
from llmft_nb.data import TextDataLoader, TextDataset
from llmft_nb.dialogues import InstructDataset, check_instruct
from llmft_nb.forwards import answer_through
from llmft_nb.hparams import TrainSettings
from llmft_nb.inference import predict_logits, rows_to_try
from llmft_nb.last_block import open_last_block
from llmft_nb.line import into_line, into_rectangle, lay_out
from llmft_nb.modeling import LLMForCausalLM, LLMForSequenceClassification, size_head
from llmft_nb.prefixes import shared_owners, token_owners
from llmft_nb.rows import read_rows
from llmft_nb.strategy import find_blocks, open_parts, parse_strategy
from llmft_nb.training import LLMTrainer
from llmft_nb.unpadded import LinedAttention, Unpadded, open_unpadded

DRAWING = ("GPT2",)  # They come with dropout


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(
    ("kind", "made"),
    [
        *((kind, labelled) for kind in ENCODERS + DECODERS),
        *((kind, answering) for kind in DECODERS),
        *((kind, partial(masked, packing=False)) for kind in MASKED),
    ],
)
def test_loss_and_gradient_are_the_same(
    kind: str,
    made: Callable[..., Any],
    narrow: bool,
    save_small: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, dataset = made(save_small(kind))
    if dataset.lengths.min() == dataset.lengths.max():
        pytest.fail("rows of one length show nothing")
    loss, gradient = step(model, dataset)
    last = open_last_block(model, [dataset]) if narrow else None
    unpadded = open_unpadded(model, [dataset])
    assert unpadded is not None, "tried, and found to answer the same"
    assert unpadded.n_blocks == len(find_blocks(model.network)[1])
    unpadded.is_tried = True
    if last is not None:
        last.n_narrow = 0
    asked, ask = list[int](), LinedAttention.narrow_mask

    def counted(attention: LinedAttention, *others: Any) -> torch.Tensor | None:
        asked.append(len(attention.layout.places))
        return ask(attention, *others)

    monkeypatch.setattr(LinedAttention, "narrow_mask", counted)
    lined_loss, lined = step(model, dataset)
    layout = dataset.batch(range(len(dataset)))["layout"]
    unpadded.close()
    if last is not None:
        last.close()
    n_lent = 0 if layout.lent is None else len(layout.lent.places)
    assert unpadded.shares == (n_lent > 0) == (kind in DECODERS and kind not in DRAWING)
    n_unread = int((dataset.lengths - dataset.read_lengths).sum())
    assert n_unread == (len(dataset) if made is answering else 0), "nobody reads the token that ends an answer"
    n_narrow = 0 if last is None else last.n_narrow
    assert n_narrow == 1 or not narrow or made is not labelled
    n_own = int(dataset.read_lengths.sum()) - n_lent
    assert asked == [n_own] * (unpadded.n_blocks - n_narrow) * len(layout.groups)
    assert lined_loss == pytest.approx(loss, abs=1e-5)
    assert len(gradient) == len(lined)
    for one, other in zip(gradient, lined, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)
    assert not any("forward" in vars(module) for module in model.modules())
    assert dataset.lay_out is None


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("strategy", ["full", "top:1", "head", "gradual"])
@pytest.mark.parametrize(("kind", "dropout"), [("Bert", "hidden_dropout_prob"), ("Llama", "attention_dropout")])
def test_the_same_is_learnt(
    kind: str,
    dropout: str,
    strategy: str,
    narrow: bool,
    save_small: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    one_thread: None,
) -> None:
    folder = save_small(kind, **{dropout: 0.0, "attention_probs_dropout_prob": 0.0})
    opened, lined = list[Unpadded | None](), list[int]()

    def learnt() -> tuple[list[float], list[torch.Tensor]]:
        model, dataset = labelled(folder)
        open_parts(model.network, parse_strategy(strategy))
        settings = TrainSettings(epochs=3, batch_size=8, lr=3e-3, precision="f32")
        trainer = LLMTrainer(model, settings=settings, strategy=strategy, callbacks=(), log_every=1)
        result = trainer.train(TextDataLoader(dataset, batch_size=8, shuffle=True, window=8))
        return [loss for _, loss in result.losses], list(model.parameters())

    def noted(*given: Any) -> Unpadded | None:
        opened.append(open_unpadded(*given))
        ask = LinedAttention.__torch_function__

        def counted(attention: LinedAttention, function: Any, *others: Any) -> Any:
            lined.append(function is nn.functional.scaled_dot_product_attention)
            return ask(attention, function, *others)

        monkeypatch.setattr(LinedAttention, "__torch_function__", counted)
        return opened[-1]

    if not narrow:
        monkeypatch.setattr(opening, "open_last_block", lambda *_: None)
    monkeypatch.setattr(opening, "open_unpadded", noted)
    losses, weights = learnt()
    assert opened[0] is not None and (sum(lined) > 8 or strategy == "head")
    assert opened[0].shares == (kind == "Llama")
    monkeypatch.setattr(opening, "open_unpadded", lambda *_: None)
    plain_losses, plain = learnt()
    assert losses == pytest.approx(plain_losses, abs=1e-5)
    for one, other in zip(weights, plain, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("n_rows", [1, 3])
@pytest.mark.parametrize(("kind", "looks"), [("Llama", {}), ("Mistral", {"sliding_window": 8})])
def test_a_step_of_one_row_with_an_answer(
    kind: str, looks: dict[str, int], n_rows: int, save_small: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def learnt() -> list[float]:
        model, dataset = answering(save_small(kind, **looks))
        settings = TrainSettings(epochs=1, batch_size=n_rows, lr=1e-3, precision="f32")
        trainer = LLMTrainer(model, settings=settings, callbacks=(), log_every=1)
        return [loss for _, loss in trainer.train(TextDataLoader(dataset, batch_size=n_rows, shuffle=True)).losses]

    losses = learnt()
    monkeypatch.setattr(opening, "open_unpadded", lambda *_: None)
    monkeypatch.setattr(opening, "open_last_block", lambda *_: None)
    assert losses == pytest.approx(learnt(), abs=1e-4)


@pytest.mark.parametrize("kind", ["Bert", "DistilBert", "GPT2", "Llama", "Gemma"])
def test_rows_of_very_different_lengths_attend_in_groups(kind: str, save_small: Callable[..., Path]) -> None:
    model = LLMForSequenceClassification.from_pretrained(save_small(kind))
    size_head(model, ["sea", "tool"])
    texts = ["a saw " * n for n in (1, 3, 30, 4, 70, 11, 31)]
    rows = [{"text": text, "label": ("sea", "tool")[i % 2]} for i, text in enumerate(texts)]
    dataset = TextDataset(rows, model.tokenizer)
    layout = lay_out(dataset.lengths)
    assert layout is not None and len(layout.groups) > 2
    loss, gradient = step(model, dataset)
    unpadded = open_unpadded(model, [dataset])
    assert unpadded is not None
    unpadded.is_tried = True
    lined_loss, lined = step(model, dataset)
    assert unpadded.layout is None and not unpadded.lined, "a batch that is done is forgotten"
    unpadded.close()
    assert lined_loss == pytest.approx(loss, abs=1e-5)
    for one, other in zip(gradient, lined, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


def test_without_a_mask_nobody_attends_to_places_without_tokens() -> None:
    lengths, attend = np.array([3, 40, 12]), nn.functional.scaled_dot_product_attention
    layout = lay_out(lengths)
    assert layout is not None
    line = torch.randn(1, 2, int(lengths.sum()), 8)
    with LinedAttention(layout):
        found = attend(line, line, line)
    start = 0
    for length in sorted(lengths):
        own = line[:, :, start : start + length]
        torch.testing.assert_close(found[:, :, start : start + length], attend(own, own, own))
        start += length


def test_two_functions_in_the_place_of_one_forward() -> None:
    layer, values = nn.Linear(2, 2), torch.ones(2)
    plain = layer(values)
    inner = answer_through(layer, lambda forward, given: forward(given) + 1)
    outer = answer_through(layer, lambda forward, given: forward(given) * 2)
    assert torch.equal(layer(values), (plain + 1) * 2)
    outer()
    assert torch.equal(layer(values), plain + 1)
    inner()
    assert torch.equal(layer(values), plain) and "forward" not in vars(layer)


def test_whoever_attends_otherwise_computes_rectangles(save_small: Callable[..., Path]) -> None:
    "Without torch's attention rows in a line would see one another."
    model, dataset = labelled(save_small("Bert"))
    model.network.set_attn_implementation("eager")
    assert open_unpadded(model, [dataset]) is None
    assert not any("forward" in vars(module) for module in model.modules())
    assert dataset.lay_out is None


def test_rows_of_one_length_are_left_alone(save_small: Callable[..., Path]) -> None:
    model = LLMForSequenceClassification.from_pretrained(save_small("Bert"))
    size_head(model, ["sea", "tool"])
    rows = [{"text": "I saw the apple", "label": label} for label in ("sea", "tool")]
    assert open_unpadded(model, [TextDataset(rows, model.tokenizer)]) is None


def test_a_model_that_is_asked_computes_rectangles(save_small: Callable[..., Path]) -> None:
    "So that states kept of a trunk are what they are without."
    model, dataset = labelled(save_small("Bert"))
    unpadded = Unpadded(model, [dataset])
    batch = {name: value for name, value in dataset.batch(range(8)).items() if name != "labels"}
    assert "layout" in batch
    shapes: list[int] = []
    hook = find_blocks(model.network)[1][0].register_forward_pre_hook(
        lambda block, given: shapes.append(given[0].shape[0])
    )
    model.eval()
    model(**batch)
    model.train()
    model(**batch)
    hook.remove()
    unpadded.close()
    assert shapes == [8, 8] and unpadded.layout is None  # The hook sees what the model gives; the line begins behind it


@pytest.mark.parametrize("kind", ["Bert", "Llama"])
def test_a_model_that_is_asked_with_its_last_block_open_computes_rectangles(
    kind: str, save_small: Callable[..., Path]
) -> None:
    "Validation rows bring a layout along, too."
    model, dataset = labelled(save_small(kind))
    plain = predict_logits(model, dataset)
    last = open_last_block(model, [dataset])
    unpadded = open_unpadded(model, [dataset])
    assert last is not None and unpadded is not None
    last.n_narrow = 0
    found = predict_logits(model, dataset)
    assert last.n_narrow > 0 and "layout" in dataset.batch(range(8))
    for opened in (unpadded, last):
        opened.close()
    np.testing.assert_allclose(found, plain, atol=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_every_token_has_one_place(seed: int) -> None:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 10 ** generator.integers(1, 4), size=int(generator.integers(1, 40)))
    layout, width = lay_out(lengths), int(lengths.max())
    n_places = len(lengths) * width
    if layout is None:
        assert lengths.sum() >= 0.97 * n_places
        return
    real = (np.arange(width) < lengths[:, None]).flatten().nonzero()[0]
    assert sorted(layout.places.tolist()) == real.tolist()
    assert sorted(layout.rows.tolist()) == list(range(len(lengths)))
    ordered = lengths[layout.rows.numpy()]
    assert (np.diff(ordered) >= 0).all()
    ends = [(group.rows.start, group.rows.stop) for group in layout.groups]
    assert [start for start, _ in ends] == [0, *[stop for _, stop in ends[:-1]]] and ends[-1][1] == len(lengths)
    for group in layout.groups:
        own = ordered[group.rows]
        assert group.n_rows == len(own) and group.width == own.max() and len(group.inside) == own.sum()
        assert own.min() >= group.width // 2 or group.width <= 32
    rectangle = torch.arange(n_places).reshape(len(lengths), width)
    line = into_line(rectangle, layout.places)
    back = into_rectangle(line, layout.places, layout.shape)
    assert torch.equal(back.flatten()[real], rectangle.flatten()[real]) and int((back != 0).sum()) <= len(real)


def test_a_batch_can_be_moved() -> None:
    layout = lay_out([3, 40, 12])
    assert layout is not None
    moved = layout.to("meta", non_blocking=True)
    assert moved.rows.is_meta and moved.places.is_meta and all(group.inside.is_meta for group in moved.groups)


def test_a_batch_that_shares_can_be_moved() -> None:
    layout = lay_out([3, 3, 40], owners=np.array([[0] * 3, [0, 0, 1], [0, 2, 2]]))
    assert layout is not None
    moved = layout.to("meta")
    lent = [one.lent for one in (moved, *moved.groups)]
    assert all(one is not None and one.places.is_meta and one.lenders.is_meta for one in lent)


@pytest.mark.parametrize("seed", range(20))
def test_every_beginning_has_one_place(seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows = [
        generator.integers(0, 3, size=int(generator.integers(1, 60))).tolist() for _ in range(generator.integers(2, 40))
    ]
    rows += [[*rows[0], 1, 2], rows[0], [*rows[0][:-1], 9]]
    lengths = np.array([len(row) for row in rows])
    beginnings = dict.fromkeys(tuple(row[: i + 1]) for row in rows for i in range(len(row)))
    numbers = {beginning: number for number, beginning in enumerate(beginnings, 1)}
    own = token_owners(rows, lengths) == np.arange(len(rows))[:, None]
    assert own[np.arange(lengths.max()) < lengths[:, None]].sum() == len(beginnings), "each beginning once"
    most = generator.integers(0, lengths)
    owners = token_owners(rows, most)
    lent = owners != np.arange(len(rows))[:, None]
    assert (lent.sum(1) <= most).all()
    layout = lay_out(lengths, owners=owners)
    assert layout is not None and layout.lent is not None
    assert len(layout.places) + len(layout.lent.places) == lengths.sum()
    rectangle = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for row, tokens in enumerate(rows):
        for i in range(len(tokens)):
            rectangle[row, i] = numbers[tuple(tokens[: i + 1])]
    line = into_line(rectangle, layout.places)
    assert torch.equal(into_rectangle(line, layout.places, layout.shape, layout.lent), rectangle)
    start = 0
    for group in layout.groups:
        part, shape = line[start : start + len(group.inside)], (group.n_rows, group.width)
        found = into_rectangle(part, group.inside, shape, group.lent, line)
        assert torch.equal(found, rectangle[layout.rows[group.rows], : group.width])
        start += len(part)
    assert start == len(line)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_adapters_share_unless_something_is_drawn(dropout: float, save_small: Callable[..., Path]) -> None:
    model, dataset = answering(save_small("Llama", attention_dropout=dropout))
    apply_strategy(model, parse_strategy("lora:2"), 0)
    stream = torch.get_rng_state()
    unpadded = open_unpadded(model, [dataset])
    assert unpadded is not None and unpadded.shares == (not dropout)
    assert torch.equal(torch.get_rng_state(), stream)
    unpadded.close()


def test_who_reads_to_both_sides_is_found_out(save_small: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    "A kind that nobody knows to read ahead, without dropout."
    model, dataset = labelled(save_small("Bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    for knows in (True, False):
        monkeypatch.setattr(unpadded_module, "reads_both_sides", lambda config, knows=knows: knows)
        opened = open_unpadded(model, [dataset])
        assert opened is not None and not opened.shares
        opened.close()
    assert dataset.lay_out is None


def test_what_a_row_does_not_compute_is_not_lent() -> None:
    "The token that ends the first row's answer is read by nobody; the second asks its question with it."
    columns = {
        "input_ids": [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6]],
        "labels": [[-100, -100, 4, -100], [-100] * 4 + [6, -100]],
    }
    owners = shared_owners(columns, np.array([3, 5]))
    assert owners is not None and owners.tolist() == [[0] * 5, [0, 0, 0, 1, 1]]
    layout = lay_out([3, 3], owners=np.array([[0, 0, 0], [0, 1, 1]]))
    assert layout is not None
    full = into_rectangle(torch.arange(5), layout.places, layout.shape, layout.lent)
    assert full.tolist() == [[0, 1, 2], [0, 3, 4]], "rows without padding"
    rows = [[1, *range(10 * row, 10 * row + 60)] for row in range(1, 9)]
    assert shared_owners({"input_ids": rows}, np.full(8, 61)) is None, "one token in sixty is not worth it"


def test_rows_that_begin_alike_are_tried(save_small: Callable[..., Path]) -> None:
    words = ["sea", "saw", "plum", "door", "box", "file", "pear", "gull", "tide"]
    texts = [" ".join(words[(i + k) % 9] for k in range(4 + i)) for i in range(9)]
    texts[3], texts[6] = "I saw it on the table again", "I saw it on the table by the river"
    tokenizer = LLMForSequenceClassification.from_pretrained(save_small("Llama")).tokenizer
    dataset = TextDataset([{"text": text} for text in texts], tokenizer, need_labels=False)
    tried = rows_to_try(dataset)
    assert {3, 6} <= set(tried) and len(tried) <= 5
    of_tried = dataset.lengths[tried]
    assert (of_tried.min(), of_tried.max()) == (dataset.lengths.min(), dataset.lengths.max())
    assert rows_to_try(TextDataset([{"text": "sea"}], tokenizer, need_labels=False)) == [0]


def test_a_trial_that_fails_leaves_the_model_as_it_was(save_small: Callable[..., Path]) -> None:
    model, dataset = labelled(save_small("Llama"))

    def fail(*_: Any) -> None:
        raise RuntimeError("no")

    for place in (model, find_blocks(model.network)[1][0]):
        hook = place.register_forward_pre_hook(fail)
        assert open_unpadded(model, [dataset]) is None and open_last_block(model, [dataset]) is None
        hook.remove()
    assert dataset.lay_out is None and not any("forward" in vars(module) for module in model.modules())


def test_rows_that_are_asked_alike_keep_their_places(save_small: Callable[..., Path]) -> None:
    "Conversations with the same first answer: it is learnt in each of them."
    folder = save_small("Llama")
    model = LLMForCausalLM.from_pretrained(folder)
    first = [{"role": "user", "content": "Is the shop open?"}, {"role": "assistant", "content": "It is open."}]
    rows = [
        {
            "messages": [
                *first,
                {"role": "user", "content": "Until " + "late " * n},
                {"role": "assistant", "content": "Yes"},
            ]
        }
        for n in range(6)
    ]
    dataset = InstructDataset(check_instruct(read_rows(rows)), model.tokenizer, train_on="all")
    loss, gradient = step(model, dataset)
    unpadded = open_unpadded(model, [dataset])
    assert unpadded is not None and unpadded.shares
    unpadded.is_tried = True
    found, lined = step(model, dataset)
    layout = dataset.batch(range(6))["layout"]
    unpadded.close()
    asked = next(i for i, label in enumerate(dataset.tokens["labels"][0]) if label >= 0)
    assert layout.lent is not None and len(layout.lent.places) == 5 * asked, "only what stands before the first answer"
    assert found == pytest.approx(loss, abs=1e-5)
    for one, other in zip(gradient, lined, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)
