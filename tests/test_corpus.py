"""Text without labels: bounded memory, each token asked for once, packed documents never meet, masks repeat."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import small_network, write_jsonl

from llmft_nb.core import UserError, assets_folder
from llmft_nb.corpus import CorpusDataset, build_corpus
from llmft_nb.packing import Piece, document_pieces, mask_row, mask_words_of_row, pack_pieces, spell_tokens
from llmft_nb.rows import read_rows
from llmft_nb.streams import N_DAMAGED, PART_CHARACTERS, TextPart, split_texts, stream_texts, text_rows
from llmft_nb.tokens import NO_TARGET

WORDS = "take one two tablets a day with water and food not more than ask your doctor before rash fever pain".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def random_texts(n_texts: int, seed: int = 0, longest: int = 60) -> list[str]:
    "Different texts of 1 to `longest` words, with a number at the end."
    chosen = random.Random(seed)
    return [" ".join(chosen.choices(WORDS, k=chosen.randint(1, longest))) + f" {seed}{i}" for i in range(n_texts)]


@pytest.fixture(scope="module")
def decoder_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(assets_folder() / "models" / "tiny")


@pytest.fixture(scope="module")
def encoder_tokenizer() -> Any:
    from transformers import BertTokenizer

    digits = [str(i) for i in range(10)] + [f"##{i}" for i in range(10)]
    return BertTokenizer(vocab={word: i for i, word in enumerate([*SPECIAL, *WORDS, *digits])})


# Reading


def write_as(kind: str, folder: Path, texts: list[str]) -> Path:
    import gzip

    import pandas

    path = folder / f"train.{kind}"
    if kind in ("jsonl", "jsonl.gz"):
        data = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)).encode()
        path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    elif kind == "json":
        path.write_text(json.dumps([{"text": text} for text in texts]), encoding="utf-8")
    elif kind == "csv":
        pandas.DataFrame({"id": range(len(texts)), "text": texts}).to_csv(path, index=False)
    else:
        pandas.DataFrame({"id": range(len(texts)), "text": texts}).to_parquet(path, row_group_size=7)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "parquet"])
def test_a_format_makes_no_difference(kind, tmp_path):
    texts = [*random_texts(2500), "zwei\nZeilen 💊", "a separator\u2028inside", 'a "quoted", part']
    path = write_as(kind, tmp_path, texts)
    assert [text for _, text in stream_texts(path)] == texts
    assert [text for _, text in stream_texts(tmp_path)] == texts
    assert stream_texts(path).fingerprint == stream_texts(str(path)).fingerprint


def test_folders_give_one_split_and_files_in_order(tmp_path):
    for name, text in (("train-0.jsonl", "one"), ("train-1.jsonl", "two"), ("valid.jsonl", "three")):
        write_jsonl(tmp_path / name, [{"text": text}])
    assert [text for _, text in stream_texts(tmp_path)] == ["one", "two"]
    assert [text for _, text in stream_texts(tmp_path, split="valid")] == ["three"]


def test_a_data_set_in_memory_and_the_catalogue():
    import datasets

    texts = random_texts(20)
    table = datasets.Dataset.from_dict({"body": texts})
    assert [text for _, text in stream_texts(table, columns={"body": "text"})] == texts
    assert [text for _, text in stream_texts(iter(texts))] == texts
    pharmacy = stream_texts("pharmacy")
    assert next(iter(pharmacy))[0].startswith("train.jsonl")


@pytest.mark.parametrize("seed", range(20))
def test_a_text_file_loses_no_line(seed, tmp_path):
    chosen = random.Random(seed)
    ends = ["\n", "\n\n", "\n\n\n"][: chosen.randint(1, 3)]
    lines = [chosen.choice(WORDS) * chosen.choice([1, 30, 2000 * (seed % 4 == 0)]) for _ in range(400)]
    text = "".join(line + chosen.choice(ends) for line in lines)
    path = tmp_path / "book.txt"
    path.write_bytes(text.replace("\n", chosen.choice(["\n", "\r\n"])).encode())
    parts = [row["text"] for _, row in text_rows(path)]
    assert "".join("".join(parts).split()) == "".join(text.split())
    assert all(len(part) <= 3 * PART_CHARACTERS for part in parts)
    every = text.split("\n")
    for place, row in text_rows(path):
        number = int(place.rpartition(":")[2])
        first = next(line for line in every[number - 1 :] if line)
        assert row["text"].startswith(first[:50]) or len(first) > PART_CHARACTERS


def test_every_bad_line_is_named(tmp_path, decoder_tokenizer):
    lines: list[Any] = [{"text": f"good {i}"} for i in range(100)]
    bad = {3: "{", 17: '{"text": 5}', 40: "[]", 99: '{"body": "x"}'}
    for number, line in bad.items():
        lines[number - 1] = line
    path = write_jsonl(tmp_path / "train.jsonl", lines)
    with pytest.raises(UserError) as error:
        build_corpus(path, decoder_tokenizer, max_length=16)
    assert "4 lines are damaged" in str(error.value)
    assert all(f"train.jsonl:{number}:" in str(error.value) for number in bad)
    many = write_jsonl(tmp_path / "many.jsonl", ["{"] * 30)
    with pytest.raises(UserError, match="30 lines are damaged") as error:
        list(stream_texts(many))
    assert "many.jsonl:20:" in str(error.value) and "and 10 more" in str(error.value)
    wrong = stream_texts([{"body": "x"}] * (5 * N_DAMAGED))
    with pytest.raises(UserError, match="no more were looked for"):
        list(wrong)


@pytest.mark.parametrize(
    "name", ["utf16.txt", "archive.jsonl", "cut.jsonl.gz", "latin.csv", "latin.txt", "broken.parquet"]
)
def test_a_foreign_or_damaged_file_is_the_users_mistake(name, tmp_path):
    import gzip

    good = "".join(json.dumps({"text": text}) + "\n" for text in random_texts(500))
    data = {
        "utf16.txt": good.encode("utf-16"),
        "archive.jsonl": b"PK\x03\x04" + bytes(50),
        "cut.jsonl.gz": gzip.compress(good.encode())[:-30],
        "latin.csv": b"text\none\ncaf\xe9\n",
        "latin.txt": b"one\ncaf\xe9\n",
        "broken.parquet": b"PAR1" + bytes(500),
    }[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=name):
        list(stream_texts(tmp_path / name))


# Splits


def test_the_order_makes_no_difference_to_a_split():
    texts = random_texts(3000, longest=12)
    shuffled = random.Random(1).sample(texts, len(texts))
    parts = []
    for order in (texts, shuffled):
        splits = split_texts(stream_texts(order), seed=5)
        parts.append([{text for _, text in part} for part in (splits.train, splits.valid, splits.test)])
    assert parts[0] == parts[1]
    assert set.union(*parts[0]) == set(texts) and sum(map(len, parts[0])) == len(texts)
    assert all(abs(len(part) / 3000 - share) < 0.025 for part, share in zip(parts[0], (0.8, 0.1, 0.1), strict=True))
    other = {text for _, text in split_texts(stream_texts(texts), seed=6).test}
    assert len(other & parts[0][2]) < 80  # Another seed draws anew: about 30 of 300 in common


@pytest.mark.parametrize("given", [("valid",), ("test",), ("valid", "test"), ()])
def test_no_copy_crosses_the_splits(given):
    texts = random_texts(400, longest=8)
    copies = [text.upper() for text in texts[:100]] + ["  " + text.replace(" ", "  ") for text in texts[50:150]]
    held_out = {name: stream_texts(random_texts(30, seed=i, longest=8) + texts[i * 20 : i * 20 + 20])
                for i, name in enumerate(("valid", "test"), 1) if name in given}  # fmt: skip
    splits = split_texts(stream_texts(texts + copies), **held_out)
    seen = {}
    for name in ("train", "valid", "test"):
        part = getattr(splits, name)
        seen[name] = {" ".join(text.lower().split()) for _, text in part}
    assert not seen["train"] & seen["valid"] and not seen["train"] & seen["test"] and not seen["valid"] & seen["test"]
    n_leaks = splits.train.n_leaks + sum(getattr(splits, name).n_leaks for name in ("valid", "test"))
    assert (n_leaks > 0) == bool(given)


# Cutting and packing


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("causal", [True, False])
def test_every_token_is_asked_for_once(seed, causal):
    chosen = random.Random(seed)
    ids = [chosen.randint(5, 99) for _ in range(chosen.randint(1, 200))]
    frame = ([2] * chosen.randint(0, 1), [3]) if causal else ([2], [3])
    max_length = chosen.randint(4, 64)
    overlap = chosen.randint(0, max_length - 3)
    pieces = document_pieces("", ids, frame, max_length, causal=causal, overlap=overlap, never=[2, 3, 7])
    asked = [token for piece in pieces for token in piece.labels.tolist() if token != NO_TARGET]
    whole = [*frame[0], *ids, *frame[1]]
    assert asked == (whole[1:] if causal else [token for token in ids if token != 7])
    assert all(len(piece.input_ids) == len(piece.labels) <= max_length for piece in pieces)
    for piece in pieces:
        if causal:  # A label is the next token wherever that one is in the piece
            here = piece.labels[:-1] != NO_TARGET
            assert (piece.labels[:-1][here] == piece.input_ids[1:][here]).all()
        else:
            here = piece.labels != NO_TARGET
            assert (piece.labels[here] == piece.input_ids[here]).all()
            assert piece.input_ids[0] == 2 and piece.input_ids[-1] == 3


@pytest.mark.parametrize("seed", range(30))
def test_packing_keeps_every_piece_and_every_limit(seed):
    chosen = random.Random(seed)
    max_length, n_open = chosen.randint(4, 100), chosen.randint(1, 20)
    sizes = [chosen.randint(1, max_length) for _ in range(300)]
    pieces = [Piece(str(i), np.full(n, i), np.full(n, i)) for i, n in enumerate(sizes)]
    rows = list(pack_pieces(iter(pieces), max_length, n_open))
    assert Counter(piece.place for row in rows for piece in row) == Counter(str(i) for i in range(300))
    assert all(0 < sum(len(piece.input_ids) for piece in row) <= max_length for row in rows)
    places = [[piece.place for piece in row] for row in rows]
    assert places == [[piece.place for piece in row] for row in pack_pieces(iter(pieces), max_length, n_open)]
    assert len(rows) <= len(pieces)


def first_fit(sizes: list[int], room: int) -> list[list[int]]:
    "The textbook's first-fit, with all rows open."
    rows: list[list[int]] = []
    for size in sizes:
        row = next((row for row in rows if sum(row) + size <= room), None)
        if row is None:
            rows.append([size])
        else:
            row.append(size)
    return rows


def test_packing_is_first_fit_where_rows_are_few():
    sizes = np.random.default_rng(0).integers(3, 40, 60).tolist()
    pieces = [Piece("", np.zeros(n), np.zeros(n)) for n in sizes]
    found = [[len(piece.input_ids) for piece in row] for row in pack_pieces(pieces, 50, n_open=1000)]
    assert sorted(map(tuple, found)) == sorted(map(tuple, first_fit(sizes, 50)))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_a_corpus_is_its_documents(seed, packing, decoder_tokenizer):
    texts = random_texts(60, seed, longest=100)
    corpus = build_corpus(texts, decoder_tokenizer, max_length=64, packing=packing, overlap=seed)
    expected: Counter[int] = Counter()
    for text in texts:
        ids = decoder_tokenizer(text)["input_ids"]
        expected.update([*ids[1:], decoder_tokenizer.eos_token_id])
    assert Counter(corpus.targets(range(len(corpus)))) == expected
    audit = corpus.audit
    assert audit.n_targets == expected.total() and audit.n_tokens == expected.total() + len(texts)
    assert audit.n_bytes == sum(len(text.encode()) for text in texts)
    assert audit.n_filled == corpus.lengths.sum() and audit.n_rows == len(corpus)
    assert ("segments" in corpus.tokens.column_names) == packing


def test_a_typed_control_token_stays_text(decoder_tokenizer):
    text = "before <|end|> after <|pad|>"
    corpus = build_corpus([text], decoder_tokenizer, max_length=64)
    ids = corpus.tokens[0]["input_ids"]
    assert ids.count(decoder_tokenizer.eos_token_id) == 1 and ids[-1] == decoder_tokenizer.eos_token_id
    assert decoder_tokenizer.decode(ids[:-1]) == text


def test_a_begin_token_comes_first_and_a_missing_end_is_told():
    from transformers import AutoTokenizer

    folder = assets_folder() / "models" / "tiny"
    begun = AutoTokenizer.from_pretrained(folder, bos_token="<|system|>")
    corpus = build_corpus(["take one"], begun, max_length=16)
    assert corpus.tokens[0]["input_ids"][0] == begun.bos_token_id
    assert corpus.audit.n_targets == corpus.audit.n_tokens - 1
    with pytest.raises(UserError, match="no end token"):
        build_corpus(["take one"], AutoTokenizer.from_pretrained(folder, eos_token=None), max_length=16)


# Masks


@pytest.mark.parametrize("seed", range(10))
def test_masks_keep_their_promises(seed, encoder_tokenizer):
    texts = [*random_texts(40, seed), "unknown words only here", "day"]
    corpus = build_corpus(texts, encoder_tokenizer, max_length=32, objective="masked", seed=seed)
    original = corpus.tokens[:]["input_ids"]
    special = set(encoder_tokenizer.all_special_ids)
    for epoch in range(3):
        for index, (chosen, shown, right) in enumerate(corpus.masks(range(len(corpus)), epoch)):
            ids = np.array(original[index])
            n_ordinary = sum(token not in special for token in ids)
            assert len(chosen) == max(1, round(0.15 * n_ordinary)) and len(set(chosen.tolist())) == len(chosen)
            assert (np.diff(chosen) > 0).all()
            assert (ids[chosen] == right).all() and not special & set(right.tolist())
            assert not (special - {encoder_tokenizer.mask_token_id}) & set(shown.tolist())
            batch = corpus.batch([index], epoch)
            changed = batch["input_ids"][0].numpy() != ids
            assert set(np.flatnonzero(changed)) <= set(chosen.tolist())
            assert batch["keep"].tolist() == chosen.tolist()
    rows = list(range(len(corpus)))
    mixed = random.Random(seed).sample(rows, len(rows))
    parts = [part for row in mixed for part in corpus.targets([row], epoch=2)]
    assert corpus.targets(mixed, epoch=2) == parts == corpus.batch(mixed, epoch=2)["labels"].tolist()
    assert corpus.targets(rows, epoch=1) != corpus.targets(rows, epoch=2)
    assert corpus.targets(np.array(rows), epoch=1) == corpus.targets(rows, epoch=1)


def test_every_place_is_masked_equally_often():
    labels = np.full(20, 7)
    counts: Counter[int] = Counter()
    for seed in range(4000):
        counts.update(mask_row(labels, seed, 4, np.arange(8, 18))[0].tolist())
    expected = 4000 * 3 / 20
    chi_squared = sum((counts[i] - expected) ** 2 / expected for i in range(20))
    assert chi_squared < 43.8  # 0.1 % point of 19 degrees of freedom


def test_the_shares_are_those_of_the_paper():
    labels = np.full(100_000, 7)
    chosen, shown = mask_row(labels, 1, 4, np.arange(8, 18))
    assert len(chosen) == 15_000
    for share, expected in (((shown == 4).mean(), 0.8), ((shown == 7).mean(), 0.1), ((shown > 7).mean(), 0.1)):
        assert share == pytest.approx(expected, abs=0.012)  # Four standard errors
    assert min(Counter(shown[shown > 7].tolist()).values()) > 100  # Ten tokens, about 150 times each


def test_equal_rows_get_masks_of_their_own(encoder_tokenizer):
    texts = [" ".join(WORDS)] * 20
    corpus = build_corpus(texts, encoder_tokenizer, max_length=32, objective="masked", packing=False)
    drawn = {tuple(chosen.tolist()) for chosen, _, _ in corpus.masks(range(20))}
    assert len(drawn) > 15


def test_hidden_words_are_hidden_everywhere(decoder_tokenizer):
    tokenizer = decoder_tokenizer
    letters, goes_on = spell_tokens(tokenizer)
    line = "Codeine or Jorvelle: with codeine, Bramwick; with codeine, not Jorvelle. "
    texts = [f"{i} {line * (1 + i % 3)}" for i in range(9)]
    corpus = build_corpus(texts, tokenizer, max_length=64, objective="masked", mask_frac=0.4, mask_words=True)
    n_cut = n_hidden = 0
    for index, (chosen, shown, right) in enumerate(corpus.masks(range(len(corpus)), epoch=1)):
        labels = np.array(corpus.tokens[index]["labels"])
        places = np.flatnonzero(labels != NO_TARGET)
        assert len(chosen) == max(1, round(0.4 * len(places))) and (np.diff(chosen) > 0).all()
        assert set(shown.tolist()) == {tokenizer.mask_token_id} and (labels[chosen] == right).all()
        words: dict[str, list[int]] = {}
        begins = [place == 0 or not goes_on[labels[place]] or labels[place - 1] == NO_TARGET for place in places]
        for mention in np.split(places, np.flatnonzero(begins)[1:]):
            words.setdefault("".join(letters[labels[place]] for place in mention), []).extend(mention.tolist())
        assert {"codeine", "jorvelle"} <= set(words), "a word is one whether it begins a sentence or not"
        shares = [np.isin(where, chosen).mean() for where in words.values()]
        n_hidden += sum(share == 1 for share in shares)
        cut = sum(0 < share < 1 for share in shares)
        assert cut <= 1, "only the last word may be hidden in part"
        n_cut += cut
    assert n_hidden > 3 * n_cut
    plain = build_corpus(texts, tokenizer, max_length=64, objective="masked", mask_frac=0.4)
    assert plain.fingerprint != corpus.fingerprint


def test_no_word_goes_on_from_one_document_to_the_next():
    labels = np.array([0, NO_TARGET, 1, 0, 0])  # "x", an end, "y" without a mark, "x" twice
    spelling = (["x", "y"], [False, True])
    asked = {tuple(mask_words_of_row(labels, seed, 4, spelling, 0.25)[0].tolist()) for seed in range(20)}
    assert asked == {(0,), (2,)}


def test_pieces_that_go_on_with_a_word_are_known(encoder_tokenizer):
    from transformers import BertTokenizer

    letters, goes_on = spell_tokens(encoder_tokenizer)
    ids = encoder_tokenizer("take 12", add_special_tokens=False)["input_ids"]
    assert [(letters[token], goes_on[token]) for token in ids] == [("take", False), ("1", False), ("2", True)]
    unmarked = BertTokenizer(vocab={word: i for i, word in enumerate([*SPECIAL, "take", "day"])})
    with pytest.raises(UserError, match="does not mark where words begin"):
        build_corpus(["day"], unmarked, max_length=32, objective="masked", mask_words=True)


# Packed and alone


def head_model(kind: str, tokenizer: Any) -> tuple[Any, str]:
    import torch
    import transformers

    masked = kind in ("Bert", "Roberta")
    config = small_network(kind, len(tokenizer)).config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        name = f"{kind}ForMaskedLM" if masked else {"GPT2": "GPT2LMHeadModel"}.get(kind, f"{kind}ForCausalLM")
        model = getattr(transformers, name)(config).eval()
        for parameter in model.parameters():  # Random biases and norms too, or an error in them would not show
            parameter.data += 0.15 * torch.randn_like(parameter)
    return model, "masked" if masked else "causal"


def loss_and_gradients(model: Any, batches: list[dict[str, Any]]) -> tuple[float, list[Any]]:
    import torch

    model.zero_grad()
    total = 0.0
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name not in ("keep", "labels")}
        logits = model(**inputs).logits.flatten(0, 1)[batch["keep"]]
        loss = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum")
        loss.backward()
        total += loss.item()
    return total, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def alone(corpus: CorpusDataset, index: int) -> list[dict[str, Any]]:
    "The documents of a packed row, each in a batch of its own."
    import torch

    packed, segments = corpus.batch([index]), np.array(corpus.tokens[index]["segments"])
    answers = dict(zip(packed["keep"].tolist(), packed["labels"].tolist(), strict=True))
    batches = []
    for number in sorted(set(segments.tolist())):
        places = np.flatnonzero(segments == number)
        keep = [k for k, place in enumerate(places.tolist()) if place in answers]
        if keep:
            labels = [answers[int(places[k])] for k in keep]
            ids = packed["input_ids"][:, places]
            batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids),
                            "keep": torch.tensor(keep), "labels": torch.tensor(labels)})  # fmt: skip
    return batches


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "GPT2", "Bert", "Roberta"])
def test_packing_changes_no_loss_and_no_gradient(kind, one_thread, decoder_tokenizer, encoder_tokenizer):
    import torch

    tokenizer = encoder_tokenizer if kind in ("Bert", "Roberta") else decoder_tokenizer
    model, objective = head_model(kind, tokenizer)
    first = tokenizer.pad_token_id + 1 if kind == "Roberta" else 0
    corpus = build_corpus(random_texts(24), tokenizer, max_length=96, objective=objective, first_position=first)
    assert corpus.tokens[0]["segments"][-1] > 0
    rows = list(range(len(corpus)))
    packed, gradients = loss_and_gradients(model, [corpus.batch(rows)])
    single, expected = loss_and_gradients(model, [batch for row in rows for batch in alone(corpus, row)])
    assert packed == pytest.approx(single, rel=1e-5)
    for found, right in zip(gradients, expected, strict=True):
        assert torch.linalg.norm(found - right) <= 1e-4 * torch.linalg.norm(right) + 1e-6
    if objective == "causal":  # And the corpus that was never packed
        plain = build_corpus(random_texts(24), tokenizer, max_length=96, packing=False)
        assert loss_and_gradients(model, [plain.batch(range(len(plain)))])[0] == pytest.approx(single, rel=1e-5)
    careless = corpus.batch(rows)
    careless["attention_mask"] = careless["attention_mask"].any(dim=2)[:, 0].long()
    assert loss_and_gradients(model, [careless])[0] != pytest.approx(single, rel=1e-5)


# Keeping


def test_a_kept_corpus_is_found_again_and_equal(tmp_path, decoder_tokenizer, monkeypatch):
    texts = random_texts(200)
    path, cache = write_jsonl(tmp_path / "train.jsonl", [{"text": text} for text in texts]), tmp_path / "kept"
    fresh = build_corpus(path, decoder_tokenizer, max_length=64)
    first = build_corpus(path, decoder_tokenizer, max_length=64, cache_folder=cache)
    with monkeypatch.context() as patch:
        patch.setattr("llmft_nb.corpus.write_corpus", None)  # Building again would fail
        again = build_corpus(path, decoder_tokenizer, max_length=64, cache_folder=cache)
    assert fresh.fingerprint == first.fingerprint == again.fingerprint
    assert fresh.audit == again.audit and list(fresh.places) == list(again.places)
    path.write_text(path.read_text(encoding="utf-8").replace("take", "TAKE"), encoding="utf-8")
    assert build_corpus(path, decoder_tokenizer, max_length=64, cache_folder=cache).fingerprint != first.fingerprint
    changes: list[dict[str, Any]] = [{"max_length": 32}, {"packing": False}, {"overlap": 3}]
    for change in changes:
        build_corpus(path, decoder_tokenizer, **({"max_length": 64, "cache_folder": cache} | change))
    parts = split_texts(stream_texts(path))
    assert isinstance(parts.train, TextPart)
    build_corpus(parts.train, decoder_tokenizer, max_length=64, cache_folder=cache)
    build_corpus(parts.test, decoder_tokenizer, max_length=64, cache_folder=cache)
    assert len(list(cache.iterdir())) == 7


def test_a_killed_build_leaves_nothing_under_its_name(tmp_path, decoder_tokenizer):
    path = write_jsonl(tmp_path / "train.jsonl", [{"text": text} for text in random_texts(8_000)])
    code = f"""
        from transformers import AutoTokenizer
        from llmft_nb.core import assets_folder
        from llmft_nb.corpus import build_corpus
        tokenizer = AutoTokenizer.from_pretrained(assets_folder() / "models" / "tiny")
        build_corpus({str(path)!r}, tokenizer, max_length=64, cache_folder={str(tmp_path / "kept")!r})
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    deadline_s = time.monotonic() + 60
    while not list((tmp_path / "kept").glob("*/rows.arrow")) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    left = list((tmp_path / "kept").iterdir())
    assert len(left) == 1 and left[0].name.startswith(".corpus-")
    old_s = time.time() - 7200
    for part in [*left[0].iterdir(), left[0]]:
        os.utime(part, (old_s, old_s))
    corpus = build_corpus(path, decoder_tokenizer, max_length=64, cache_folder=tmp_path / "kept")
    assert corpus.audit.n_documents == 8_000
    assert [entry.name.startswith("corpus-") for entry in (tmp_path / "kept").iterdir()] == [True]


def test_a_failed_build_leaves_nothing(tmp_path, decoder_tokenizer):
    rows = [{"text": text} for text in random_texts(50)]
    path = write_jsonl(tmp_path / "train.jsonl", [*rows, "{"])
    with pytest.raises(UserError, match=r"train.jsonl:51"):
        build_corpus(path, decoder_tokenizer, max_length=64, cache_folder=tmp_path / "kept")
    assert list((tmp_path / "kept").iterdir()) == []


# Memory


BUILD = """
    import json, resource, sys, time
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from llmft_nb.corpus import build_corpus

    words = ["<unk>", "<end>", "<pad>", *sys.argv[2].split()]
    rules = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = {"unk_token": "<unk>", "eos_token": "<end>", "pad_token": "<pad>", "model_max_length": 512}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rules, **tokens)  # Fast, so that the test is

    def peak_mib():  # Linux hands the peak of getrusage down from the parent: what began with this program counts
        try:
            lines = open("/proc/self/status").read().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10
        except OSError:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

    build_corpus(["a b"], tokenizer, max_length=512)  # Imports what it needs
    began_mib, began_s = peak_mib(), time.monotonic()
    corpus = build_corpus(sys.argv[1], tokenizer, max_length=512)
    print(json.dumps([corpus.audit.n_bytes, peak_mib(), time.monotonic() - began_s, began_mib]))
"""


def test_memory_does_not_grow_with_the_corpus(tmp_path, record_property):
    found, texts = [], random_texts(1000, longest=600)
    for n_mb in (6, 60):
        path, n_bytes = tmp_path / f"{n_mb}.jsonl", 0
        with path.open("w") as file:
            while n_bytes < n_mb * 1_000_000:
                n_bytes += sum(file.write(json.dumps({"text": f"{n_bytes} {text}"}) + "\n") for text in texts)
        command = [sys.executable, "-c", textwrap.dedent(BUILD), str(path), " ".join(WORDS)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found.append(json.loads(done.stdout))
    (n_small, small_mib, small_s, began_mib), (n_large, large_mib, large_s, _) = found
    record_property("MiB", [round(began_mib), round(small_mib), round(large_mib)])
    record_property("MB/s", [round(n_small / 1e6 / small_s, 1), round(n_large / 1e6 / large_s, 1)])
    print(found)
    assert n_large > 8 * n_small
    assert large_mib - small_mib < 40  # Measured: 3


# What is not a stream of texts, and places


@pytest.mark.parametrize("source", [{"text": ["one", "two"]}, b"one", 7])
def test_what_holds_no_texts_is_refused(source):
    with pytest.raises(UserError, match=r"is no data"):
        stream_texts(source)
    with pytest.raises(UserError, match=r"is no data"):
        read_rows(source)


def test_several_splits_in_memory_are_refused():
    from datasets import Dataset, DatasetDict

    both = DatasetDict({name: Dataset.from_dict({"text": ["one", "two"]}) for name in ("train", "test")})
    for read in (stream_texts, read_rows):
        with pytest.raises(UserError, match=r"a DatasetDict is no data; mend: name one split, e.g. data\['train'\]"):
            read(both)
    assert [text for _, text in stream_texts(both["test"])] == ["one", "two"]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("line", [1, 4, 5003])
@pytest.mark.parametrize("name", ["bad.csv", "bad.txt"])
def test_a_bad_byte_is_named_by_file_and_line(name, line, end, tmp_path):
    lines = [b"text,label", *[b"ok,1"] * 6000]
    lines[line - 1] = b"caf\xe9,2"
    (tmp_path / name).write_bytes(end.join(lines))
    with pytest.raises(UserError) as caught:
        list(stream_texts(tmp_path / name))
    assert (caught.value.where, caught.value.what) == (f"{name}:{line}", "byte 0xe9 is not UTF-8")


def test_tables_read_in_turn_do_not_disturb_each_other(tmp_path):
    (tmp_path / "a.csv").write_text("text\none\ntwo\n")
    (tmp_path / "b.csv").write_text("text\nfirst\n" + "y" * 200_000 + "\n")
    usual = csv.field_size_limit()
    long, short = iter(stream_texts(tmp_path / "b.csv")), iter(stream_texts(tmp_path / "a.csv"))
    next(short), next(long)
    assert csv.field_size_limit() == usual
    assert len(list(short)) == 1
    assert [len(text) for _, text in long] == [200_000]
    assert csv.field_size_limit() == usual


def test_rows_that_hold_themselves_are_told():
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(UserError, match=r"row:2: nested endlessly"):
        list(stream_texts([{"text": "one"}, {"text": "two", "more": endless}]))


def test_a_document_stands_where_its_first_line_is(tmp_path):
    (tmp_path / "late.txt").write_text("\n\n\nhello\n")
    assert list(text_rows(tmp_path / "late.txt")) == [("late.txt:4", {"text": "hello"})]


# Damage to what was kept


@pytest.mark.parametrize("damage", ["cut", "missing", "longer", "no audit", "half an audit", "a list", "older"])
def test_a_damaged_corpus_is_built_again(damage, tmp_path, decoder_tokenizer):
    texts, cache = random_texts(40), tmp_path / "kept"
    first = build_corpus(texts, decoder_tokenizer, max_length=64, cache_folder=cache).fingerprint
    (rows,), (audit,) = cache.glob("*/rows.arrow"), cache.glob("*/audit.json")
    sound = rows.read_bytes(), audit.read_bytes()
    if damage in ("cut", "longer"):
        rows.write_bytes(sound[0][:-200] if damage == "cut" else sound[0] * 2)
    elif damage in ("missing", "no audit"):
        (rows if damage == "missing" else audit).unlink()
    else:
        values = json.loads(sound[1])
        del values["n_file_bytes"]
        audit.write_text({"half an audit": sound[1].decode()[:20], "a list": "[]", "older": json.dumps(values)}[damage])
    again = build_corpus(texts, decoder_tokenizer, max_length=64, cache_folder=cache)
    assert again.fingerprint == first and len(list(cache.iterdir())) == 1
    assert (rows.read_bytes(), audit.read_bytes()) == sound


def test_a_file_is_no_folder_to_keep_a_corpus_in(tmp_path, decoder_tokenizer):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"no folder to keep a corpus in"):
            build_corpus(["take one"], decoder_tokenizer, cache_folder=folder)
