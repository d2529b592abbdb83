"""The books that the embedded base models have read: which files, what is left out, and the tokens made of them.

    python tools/books.py

prints what is read and what is left out. Only the files named here are ever opened; a test holds the list to it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
FILES = {  # Public-domain books and nothing else; whole books are held out for validation
    "train": ("books_children.train.jsonl.gz", "books_fiction_1.train.jsonl.gz", "books_fiction_2.train.jsonl.gz"),
    "valid": ("books_children.validation.jsonl", "books_fiction.validation.jsonl"),
}
NOT_HELD_OUT = {"English Fairy Tales"}  # Two of the training books tell some of the same tales, word for word
SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|mask|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MAX_LENGTH = 512  # Tokens a model is built to read at once

# Words for whole groups of people that were common in print and are insults today: the first twelve hex digits of
# their SHA-256, so that nobody has to read them here. A paragraph with one of them is left out.
SLURS = frozenset(
    """
    08a841e99678 0be9b885f4a3 0dcc4d336443 11ee63a73ffe 120f6e5b4ea3 1290d04b901d 171ee4d3a3e3 1c4bfd100aa9
    268651b3ece9 27a62b68179c 3175bf063867 341d56384afc 358e01df75c7 35ef747b9c42 3af112eacdb7 3b8b608d728d
    448b303c89be 45cd3e1bb472 46505206c396 49764bce30ef 4bfae123d170 4c58f5d5fe92 565ed74643e0 5b3ae48be122
    6122fdf4ae14 619bc82e0d20 6437ea714448 6939937b0ac6 701033ae2641 7e176c4f2315 88c03c206204 9d57436661e1
    9ee4d2748732 a7bf072c97a0 ad6cacf3af98 b3cec2f6ece2 bb87adf8aa78 c1b4ed05397d c3de533e9b7f c709d1a28781
    ce20df725915 d0e3cb91d249 d1b2dec28ad0 d873147a3546 daec0c235d31 e7b98c6aa5b9 eda887476f1d eea2991640d1
    f9d0d9b18ae9
    """.split()
)


@dataclass
class Left:
    "What the pass for slurs did."

    n_paragraphs: int = 0  # Read
    n_dropped: int = 0  # Left out
    by_book: Counter[str] = field(default_factory=Counter)  # Paragraphs left out of each book


def books_folder() -> Path:
    "Where the books lie: `$LLMFT_DATA/pretrain`."
    return Path(os.environ.get("LLMFT_DATA", ROOT.parent / "shared" / "data")) / "pretrain"


@cache
def is_slur(word: str) -> bool:
    "Whether a word in lower case is one of those left out."
    return hashlib.sha256(word.encode()).hexdigest()[:12] in SLURS


def has_slur(paragraph: str) -> bool:
    "Whether a paragraph has one of the words that are left out."
    return any(is_slur(word) for word in re.findall(r"[a-z]+", paragraph.lower()))


def read_books(split: str, left: Left | None = None) -> Iterator[dict[str, str]]:
    "The rows of a split, chapter by chapter: `text` without the paragraphs left out, `title`, `author`, `source`."
    for name in FILES[split]:
        path = books_folder() / name
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for row in map(json.loads, file):
                if split == "valid" and row["title"] in NOT_HELD_OUT:
                    continue
                paragraphs = row["text"].split("\n\n")
                kept = [paragraph for paragraph in paragraphs if not has_slur(paragraph)]
                if left is not None:
                    left.n_paragraphs += len(paragraphs)
                    left.n_dropped += len(paragraphs) - len(kept)
                    left.by_book[row["title"]] += len(paragraphs) - len(kept)
                yield {**row, "text": "\n\n".join(kept)}


def train_tokenizer(texts: Iterable[str], n_tokens: int) -> PreTrainedTokenizerFast:
    "A byte-level BPE tokenizer: any text round-trips, digits stay single, control tokens are its own."
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_tokens,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        mask_token="<|mask|>",
        extra_special_tokens=SPECIAL_TOKENS[3:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def encode_stream(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> np.ndarray:
    "All texts as one row of token ids in 16 bits, an end token after each."
    backend, parts = tokenizer.backend_tokenizer, []
    end = np.array([tokenizer.eos_token_id], dtype=np.uint16)
    for text in texts:
        parts += [np.array(backend.encode(text, add_special_tokens=False).ids, dtype=np.uint16), end]
    return np.concatenate(parts)


def main() -> None:
    "What is read, and what is left out."
    for split in FILES:
        left, n_words, books = Left(), 0, set()
        for row in read_books(split, left):
            n_words += len(row["text"].split())
            books.add((row["title"], row["author"]))
        print(f"{split}: {len(books)} books, {n_words:,} words; ", end="")
        print(f"{left.n_dropped:,} of {left.n_paragraphs:,} paragraphs left out for a slur")
        for title, n in left.by_book.most_common(5):
            print(f"  {title}: {n}")


if __name__ == "__main__":
    main()
