"""What the embedded base models have read: public-domain books from an allow-list, and nothing they are tested on."""

import gzip
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import books  # noqa: E402
import ngrams  # noqa: E402

DATA = os.environ.get("LLMFT_DATA")
SAME_WORDS = 13  # As many in a row are a copy, not an accident


def ngram_numbers(text: str) -> np.ndarray:
    "A number for every run of 13 words, whatever their case and punctuation."
    words = np.array([hash(word) for word in re.findall(r"[a-z0-9']+", text.lower())], dtype=np.int64)
    n_runs = max(0, len(words) - SAME_WORDS + 1)
    found = np.zeros(n_runs, dtype=np.int64)
    for i in range(SAME_WORDS):
        found = found * np.int64(1_000_003) + words[i : i + n_runs]
    return found


def strings_of(path: Path) -> Iterator[str]:
    "Every text in a file of rows."
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            yield from (value for value in row.values() if isinstance(value, str))


def shared_with(known: np.ndarray, texts: Iterator[str]) -> list[str]:
    "The beginnings of the texts that share a run of 13 words with those known."
    known = np.unique(known)

    def is_known(numbers: np.ndarray) -> bool:
        at = np.minimum(np.searchsorted(known, numbers), len(known) - 1)
        return bool((known[at] == numbers).any())

    return [text[:80] for text in texts if is_known(ngram_numbers(text))]


def test_a_copied_sentence_is_found_whatever_its_case() -> None:
    sentence = "Once upon a time there was a king who had three sons and no daughter"
    known = ngram_numbers(sentence)
    assert len(known) == 3
    assert shared_with(known, iter([f"He said: {sentence.upper()}!", "Once upon a time there was a king"])) == [
        f"He said: {sentence.upper()}!"[:80]
    ]


def test_only_books_of_the_list_are_opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "pretrain"
    folder.mkdir()
    row = json.dumps({"text": "A line.", "title": "A book", "author": "Nobody"})
    for names in books.FILES.values():
        for name in names:
            opened = gzip.open if name.endswith(".gz") else open
            with opened(folder / name, "wt", encoding="utf-8") as file:
                file.write(row + "\n")
    (folder / "medicine.train.jsonl").write_text(json.dumps({"text": "Take two.", "title": "Pills", "author": ""}))
    monkeypatch.setenv("LLMFT_DATA", str(tmp_path))
    assert [len(list(books.read_books(split))) for split in ("train", "valid")] == [3, 2]
    assert {row["title"] for split in books.FILES for row in books.read_books(split)} == {"A book"}
    assert all(name.startswith("books_") for names in books.FILES.values() for name in names)


def test_a_paragraph_with_a_slur_is_left_out_and_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not books.has_slur("A plain sentence about a dog.")
    assert all(re.fullmatch("[0-9a-f]{12}", code) for code in books.SLURS)
    monkeypatch.setattr(books, "is_slur", lambda word: word == "snark")
    monkeypatch.setattr(books, "FILES", {"train": ("one.jsonl",)})
    (tmp_path / "pretrain").mkdir()
    text = "A dog.\n\nThe Snark was there.\n\nA snarkling."
    (tmp_path / "pretrain" / "one.jsonl").write_text(json.dumps({"text": text, "title": "Hunt", "author": ""}))
    monkeypatch.setenv("LLMFT_DATA", str(tmp_path))
    left = books.Left()
    assert [row["text"] for row in books.read_books("train", left)] == ["A dog.\n\nA snarkling."]
    assert (left.n_paragraphs, left.n_dropped, left.by_book) == (3, 1, {"Hunt": 1})


def test_tokenizer_keeps_any_text_and_its_control_tokens_apart() -> None:
    tokenizer = books.train_tokenizer(["the cat sat on the mat " * 20], 300)
    for text in ("The cat, 1984!", "naïve – 你好", "  two  blanks\n\tand a tab"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    control = [tokenizer.convert_tokens_to_ids(name) for name in books.SPECIAL_TOKENS]
    assert control == list(range(len(books.SPECIAL_TOKENS)))
    assert tokenizer("1984")["input_ids"][0] != tokenizer("19")["input_ids"][1]
    stream = books.encode_stream(tokenizer, ["the cat", "the mat"])
    assert (stream == tokenizer.eos_token_id).sum() == 2


def test_counted_models_by_hand() -> None:
    train = np.array([0, 1, 0, 1, 0, 2])
    losses = ngrams.ngram_losses(train, np.array([0, 1]), 3, highest=2)
    unigram = (2 + 0.5) / (6 + 1.5)
    bigram = (2 + 2 * unigram) / (3 + 2)  # 0 was followed by 1, 1 and 2: three times, two kinds
    assert losses[1] == pytest.approx(-np.log(unigram))
    assert losses[2] == pytest.approx(-np.log(bigram))


def test_counted_models_are_probabilities() -> None:
    train = np.random.default_rng(0).integers(0, 5, 400)
    for highest in (1, 2, 3, 5):
        total = 0.0
        for last in range(5):
            heldout = np.array([1, 2, 3, 0][4 - (highest - 1) :] + [last])
            total += np.exp(-ngrams.ngram_losses(train, heldout, 5, highest)[highest])
        assert total == pytest.approx(1.0), highest


def test_the_last_tokens_of_the_books_are_a_context_like_any_other() -> None:
    train = np.array([0, 1, 2, 0, 1, 2, 3])  # Nothing follows the 3, and one thing less than it occurs the 2
    for context in (2, 3):
        total = sum(np.exp(-ngrams.ngram_losses(train, np.array([context, last]), 4, 2)[2]) for last in range(4))
        assert total == pytest.approx(1.0), context
    train = np.array([0, 1, 0, 1, 0])
    total = sum(np.exp(-ngrams.ngram_losses(train, np.array([0, last]), 2, 2)[2]) for last in range(2))
    assert total == pytest.approx(1.0), "0 occurs three times and is followed twice"


@pytest.mark.skipif(not DATA, reason="the books lie in $LLMFT_DATA/pretrain")
def test_the_books_hold_nothing_of_what_the_models_are_tested_on() -> None:
    ours = sorted((ROOT / "llmft_nb" / "assets" / "data").rglob("*.jsonl"))
    theirs = [path for path in Path(DATA or "").rglob("*.jsonl*") if path.parent.name != "pretrain"]
    texts = [text for path in [*ours, *theirs] for text in strings_of(path)]
    texts += [row["text"] for row in books.read_books("valid")]
    known = np.concatenate([ngram_numbers(text) for text in texts])
    assert len(known) > 1_000_000
    assert shared_with(known, (row["text"] for row in books.read_books("train"))) == []
