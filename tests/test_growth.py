"Many rows: a part at a time, on disk, and the same as few."

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small import small_rows
from small_models import answering, labelled

from llmft_nb import data
from llmft_nb.bases import find_model, load_tokenizer
from llmft_nb.data import TextDataLoader, TextDataset, table_digest, token_table
from llmft_nb.hparams import TrainSettings
from llmft_nb.mapped import mapped_stretches
from llmft_nb.tagging import TagDataset
from llmft_nb.tokens import TokenRows
from llmft_nb.training import LLMTrainer


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    "Every data set goes into a file."
    monkeypatch.setattr(data, "FEW_TOKENS", 0)


def learnt(made: Any) -> list[torch.Tensor]:
    "Weights after an epoch."
    model, dataset = made
    settings = TrainSettings(epochs=1, batch_size=8, lr=1e-3, precision="f32")
    LLMTrainer(model, settings=settings, callbacks=()).train(TextDataLoader(dataset, batch_size=8, shuffle=True))
    return [weight.detach() for weight in model.parameters()]


@pytest.mark.parametrize("make", [labelled, answering])
def test_a_set_on_disk_is_learnt_as_one_in_memory(
    make: Callable[[Path], Any], small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = make(small_model)
    assert held[1].tokens.cache_files == []
    monkeypatch.setattr(data, "FEW_TOKENS", 0)
    mapped = make(small_model)
    (file,) = mapped[1].tokens.cache_files
    assert not Path(file["filename"]).exists(), "nothing is left behind"
    assert mapped[1].fingerprint == held[1].fingerprint
    assert mapped[1].tokens.features == held[1].tokens.features
    assert all(torch.equal(*pair) for pair in zip(learnt(held), learnt(mapped), strict=True))


def test_rows_are_the_same_whatever_the_parts(monkeypatch: pytest.MonkeyPatch, on_disk: None) -> None:
    tokenizer, _ = load_tokenizer(find_model("tiny-encoder"))
    rows = [{**row, "text_pair": "by the sea" if i % 3 == 0 else ""} for i, row in enumerate(small_rows(23))]
    whole = TextDataset(rows, tokenizer, max_length=12)
    own = data.encode_parts
    monkeypatch.setattr(data, "encode_parts", lambda *given: own(*given, n_rows=4))
    parts = TextDataset(rows, tokenizer, max_length=12)
    assert (parts.fingerprint, parts.audit) == (whole.fingerprint, whole.audit)
    assert parts.audit.n_truncated > 0 and parts.audit.n_tokens == int(parts.lengths.sum())
    assert [parts[i] for i in range(23)] == [whole[i] for i in range(23)]


def test_a_part_is_made_when_the_one_before_is_put_away(on_disk: None) -> None:
    made = list[int]()

    def parts() -> Iterator[TokenRows]:
        for i in range(5):
            made.append(i)
            yield TokenRows([[i] * 3] * 2, None, [3, 3])

    told, own = list[int](), data.arrow_rows

    def noted(part: TokenRows) -> Any:
        told.append(len(made))
        return own(part)

    data.arrow_rows, kept = noted, own
    try:
        table = token_table(parts())
    finally:
        data.arrow_rows = kept
    assert told == [1, 2, 3, 4, 5]
    assert table["input_ids"][:] == [[i] * 3 for i in range(5) for _ in range(2)]


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux")
def test_the_pages_of_a_mapped_set_are_given_back(small_model: Path, on_disk: None) -> None:
    dataset = labelled(small_model)[1]
    (file,) = dataset.tokens.cache_files
    assert mapped_stretches(file["filename"]), "though it has no name any more"

    def n_resident() -> int:
        stretch = r"^(\S+) .*rows\.arrow.*\n(?:.*\n)*?Rss: +(\d+)"
        found = re.findall(stretch, Path("/proc/self/smaps").read_text(), re.MULTILINE)
        starts = {f"{start:x}" for start, _ in mapped_stretches(file["filename"])}
        return sum(int(n_kb) for stretch, n_kb in found if stretch.split("-")[0] in starts)

    held = dataset[3]
    assert n_resident() > 0
    data.forget_rows(dataset.tokens)
    assert n_resident() == 0 and dataset[3] == held
    dataset.n_batches = 15
    dataset.batch([0])
    assert dataset[3] == held and table_digest(dataset.tokens) == table_digest(labelled(small_model)[1].tokens)
    assert n_resident() == 0


def test_tags_and_no_rows_at_all_on_disk(on_disk: None) -> None:
    tokenizer, _ = load_tokenizer(find_model("tiny-encoder"))
    rows = [{"tokens": ["I", "saw", "Anna"], "ner_tags": ["O", "O", "B-PER"]}] * 2
    dataset = TagDataset(rows, tokenizer)
    assert len(dataset) == 2 and dataset.targets([0, 1]) == dataset.targets([0]) * 2
    assert len(token_table(TokenRows([], None, []))) == 0
    assert json.dumps(token_table(TokenRows([[1]], [[0]], [1], [[2]]))[0]) == json.dumps(
        {"input_ids": [1], "token_type_ids": [0], "labels": [2]}
    )
