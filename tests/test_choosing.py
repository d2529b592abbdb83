"""Bases side by side: the costs of labels against transformers' own losses, on every shape, and the command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small import small_rows, write_jsonl
from test_mistakes import llmft

from llmft_nb import choosing
from llmft_nb.bases import describe_model, find_model
from llmft_nb.choosing import compare_bases, label_costs, named_rows, probe_score, reading_facts, zero_shot_score
from llmft_nb.core import UserError
from llmft_nb.modeling import LLMForCausalLM, LLMForMaskedLM
from llmft_nb.rows import Rows, read_rows

LABELS = ["fruit", "sea", "a tool_of iron"]


@pytest.mark.parametrize("kind", ["GPT2", "Llama", "Qwen3", "Gemma", "Bert", "Roberta", "DistilBert"])
def test_costs_are_those_of_the_plain_loss(kind: str, save_small: Callable[..., Path]) -> None:
    "Row by row and label by label, whatever shares their batch."
    head_of = LLMForMaskedLM if kind in ("Bert", "Roberta", "DistilBert") else LLMForCausalLM
    model = head_of.from_pretrained(save_small(kind))
    texts = ["I saw the apple on the table", "a tide", ""]
    costs = label_costs(model, texts, LABELS, batch_size=4)
    assert costs.shape == (3, 3) and (costs > 0).all()
    for i, text in enumerate(texts):
        for j, (ids, places) in enumerate(named_rows(model, text, LABELS, 256)):
            shown, labels = torch.tensor([ids]), torch.full((1, len(ids)), -100)
            labels[0, places] = shown[0, places]
            if model.kind == "MaskedLM":
                shown[0, places] = model.tokenizer.mask_token_id
            with torch.no_grad():
                loss = model.network(input_ids=shown, labels=labels).loss.item()
            assert costs[i, j] == pytest.approx(loss * len(places), rel=1e-4)


def test_a_long_text_leaves_room_for_the_label(small_model: Path) -> None:
    model = LLMForCausalLM.from_pretrained(small_model)
    whole = [ids for ids, _ in named_rows(model, "again " * 500, LABELS, 40)]
    assert {len(ids) for ids in whole} == {40}
    short = [ids for ids, _ in named_rows(model, "again", LABELS, 40)]
    endings = [ids[-len(named_rows(model, "", [name], 40)[0][1]) :] for ids, name in zip(whole, LABELS, strict=True)]
    assert all(row[-len(ending) :] == ending for row, ending in zip(short, endings, strict=True))


@pytest.mark.parametrize("kind", ["Llama", "Bert"])
def test_a_label_longer_than_the_positions_is_cut(kind: str, save_small: Callable[..., Path]) -> None:
    head = LLMForCausalLM if kind == "Llama" else LLMForMaskedLM
    model = head.from_pretrained(save_small(kind, max_position_embeddings=12))
    rows = named_rows(model, "a text of some words", ["yes", "no " * 40], 12)
    assert [len(row) for row, _ in rows] == [12, 12] and all(places for _, places in rows)
    costs = label_costs(model, ["a text of some words"], ["yes", "no " * 40], 12)
    assert costs.shape == (1, 2) and (costs > 0).all()


def test_positions_that_are_no_tokens_are_not_counted(save_small: Callable[..., Path]) -> None:
    "RoBERTa's padding token has one, and whatever stands before it."
    folder = save_small("Roberta", max_position_embeddings=14, pad_token_id=1)
    assert reading_facts(find_model(folder), ["one two"])["context"] == 12
    line, *_ = compare_bases([folder], small_rows(90))
    assert line["context"] == 12 and line["cut"] > 0.5


def test_what_a_label_costs_without_a_text_is_taken_off(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "A label that is cheap whatever is asked must not win for that."
    import numpy as np

    from llmft_nb import choosing

    rows = read_rows([{"text": f"text {i}", "label": "rare" if i % 2 else "common"} for i in range(10)])

    def costs(model: object, texts: list[str], names: list[str], max_length: int) -> np.ndarray:
        assert names == ["common", "rare"]
        plain = np.array([[1.0, 9.0]] * len(texts))
        told = np.array([[0.0, -1.0 if text.endswith(tuple("13579")) else 1.0] for text in texts])
        return plain + (told if texts != [""] else 0.0)

    monkeypatch.setattr(choosing, "label_costs", costs)
    assert zero_shot_score(LLMForCausalLM.from_pretrained(small_model), rows, ["common", "rare"]).value == 1.0


def test_a_probe_reads_off_what_is_there(small_model: Path) -> None:
    "The class of a small row stands in one of its words, which even random features keep apart."
    model = LLMForCausalLM.from_pretrained(small_model)
    rows = read_rows(small_rows(240))
    score = probe_score(model, rows.subset(range(180)), rows.subset(range(180, 240)))
    assert score.value > 0.6 > 1 / 3


def test_the_time_to_read_a_row_leaves_out_what_is_done_once(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, now, passes = LLMForCausalLM.from_pretrained(small_model), [0.0], [9.0, 0.1, 0.4, 0.2]

    def read(model: object, dataset: object) -> None:
        now[0] += passes.pop(0)

    monkeypatch.setattr(choosing, "pooled_features", read)
    monkeypatch.setattr(choosing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    rows = read_rows(small_rows(300))
    assert choosing.ms_per_row(model, rows) == pytest.approx(1000 * 0.2 / 128)


def test_facts_of_reading(save_small: Callable[..., Path]) -> None:
    from llmft_nb.bases import find_model

    facts = reading_facts(
        find_model(save_small("Bert", max_position_embeddings=16)), ["one two three"] * 3 + ["x " * 90]
    )
    assert (facts["context"], facts["cut"], facts["languages"]) == (16, 0.25, "not told")
    assert facts["tokens_per_word"] >= 1 and facts["unknown"] == 0


def test_the_command(small_model: Path, small_files: Path, tmp_path: Path) -> None:
    told = llmft("models", small_model, "--data", small_files / "train.jsonl", "--json")
    assert (told.status, told.err) == (0, "")
    lines = json.loads(told.out)
    assert [line["name"] for line in lines] == [
        "tiny",
        "tiny-encoder",
        str(small_model),
        "commonest answer",
        "word counts",
    ]
    assert {line["context"] for line in lines[:3]} == {512, 600}
    assert ["%" in line["zero_shot"] for line in lines[:3]] == [True, True, False], "the folder has a base and no head"
    assert all("%" in line["probe"] for line in lines)
    several = write_jsonl(
        tmp_path / "several.jsonl", [{"text": f"r {i}", "label": ["a", "b"][: 1 + i % 2]} for i in range(40)]
    )
    for data, needle in ((several, "several labels"), (tmp_path / "none.jsonl", "no such file")):
        refused = llmft("models", "--data", data, "--json")
        assert refused.status == 2 and needle in refused.error["what"]


def test_a_typed_control_token_is_text(save_small: Callable[..., Path]) -> None:
    model = LLMForMaskedLM.from_pretrained(save_small("Bert"))
    mask = model.tokenizer.mask_token
    assert all(model.tokenizer.mask_token_id not in ids for ids, _ in named_rows(model, f"a {mask} b", LABELS, 64))


def test_a_second_text_is_read_everywhere_and_a_random_head_says_nothing(save_small: Callable[..., Path]) -> None:
    rows = [
        {"text": f"row {i}", "text_pair": f"it is {'good' if i % 2 else 'bad'}", "label": str(i % 2)}
        for i in range(120)
    ]
    table = compare_bases([save_small("Bert")], rows)
    assert table[0]["zero_shot"] == "–", "the folder has a base and no head"
    assert table[-1]["name"] == "word counts" and table[-1]["probe"].startswith("100.0 %")


def test_rows_of_the_test_split_are_not_asked(monkeypatch: pytest.MonkeyPatch, small_model: Path) -> None:
    from llmft_nb import choosing

    asked: list[str] = []

    def note(name: Path, train: Rows, rows: Rows, *_: object) -> dict[str, str]:
        asked.extend(row["text"] for row in [*train, *rows])
        return {}

    monkeypatch.setattr(choosing, "candidate_line", note)
    compare_bases([small_model], "pharmacy", n_train=50, n_asked=50)
    test = {row["text"] for row in read_rows("pharmacy", split="test")}
    assert len(asked) == 100 and not test & set(asked)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", b"{", "its config.json is damaged"),
        ("config.json", b"[1]", "its config.json is damaged"),
        ("model.safetensors", b"", "model.safetensors is damaged"),
    ],
)
def test_a_damaged_folder_is_told(
    file: str, content: bytes, words: str, save_small: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(save_small("Bert"), tmp_path / "damaged")
    (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        describe_model(find_model(folder))
    assert "damaged" in caught.value.where and caught.value.mend == "download the model again"


def test_a_model_named_twice_is_listed_once() -> None:
    listed = llmft("models", "tiny", "tiny-encoder", "tiny", "--json")
    assert [line["name"] for line in json.loads(listed.out)] == ["tiny", "tiny-encoder"]
    refused = llmft("models", "--columns", "question=text", "--json")
    assert refused.status == 2 and refused.error["where"] == "columns"
