"""What a pretrained base is worth, and the card that says so: costs on held-out books, counted models, samples."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from books import FILES, NOT_HELD_OUT, read_books
from ngrams import ngram_losses
from torch import nn
from transformers import PreTrainedTokenizerFast

OPENINGS = (
    "Once upon a time",
    "The old man looked at",
    '"I do not believe you,"',
    "In the morning the children",
    "She opened the letter and",
    "There was a house by the sea",
    "It was raining when",
    "The captain of the ship",
    "Nobody in the village knew",
    "He had never been so happy as",
)
GAPS = (
    "The king and the _ lived in a palace.",
    "He opened the _ and went in.",
    "The ship sailed across the _ to the island.",
    "She was ill, and they sent for the _.",
    "It was _ good; I liked it very much.",
    "The old man looked at the _ and smiled.",
    "He was so _ that he wept all night.",
    "It was raining, and the children had to stay in the _.",
    "She opened the letter and _ it aloud.",
    "Nobody in the village knew _ he came from.",
)


def bytes_per_token(tokenizer: PreTrainedTokenizerFast, stream: np.ndarray, n_tokens: int = 100_000) -> float:
    "Bytes of text that a token stands for, on the first tokens of a stream."
    ids = stream[:n_tokens].tolist()
    return len(tokenizer.decode(ids, skip_special_tokens=True).encode()) / len(ids)


@torch.no_grad()
def samples(model: nn.Module, tokenizer: PreTrainedTokenizerFast, n_tokens: int = 40) -> list[str]:
    "What the model makes of ten openings, drawn at temperature 0.8 from the fifty likeliest tokens; none is chosen."
    model.eval()
    torch.manual_seed(0)
    found = []
    for opening in OPENINGS:
        ids = tokenizer(opening, return_tensors="pt").to(model.device)
        said = model.generate(
            **ids,
            max_new_tokens=n_tokens,
            do_sample=True,
            temperature=0.8,
            top_k=50,
            pad_token_id=tokenizer.pad_token_id,
        )
        found.append(tokenizer.decode(said[0], skip_special_tokens=True))
    return found


@torch.no_grad()
def filled(model: nn.Module, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    "What a masked model puts into the gaps of ten sentences, the three likeliest each."
    model.eval()
    found = []
    for text in GAPS:
        ids = tokenizer(text.replace(" _", tokenizer.mask_token), return_tensors="pt").to(model.device)
        place = (ids["input_ids"][0] == tokenizer.mask_token_id).nonzero().item()
        best = model(**ids).logits[0, place].topk(3).indices
        found.append(f"{text} {', '.join(tokenizer.decode([token]).strip() for token in best)}")
    return found


def counted(streams: dict[str, np.ndarray], n_tokens: int) -> dict[str, float]:
    "Nats a token of the models of one and of five tokens that only count, on the same held-out tokens."
    losses = ngram_losses(streams["train"], streams["valid"], n_tokens)
    return {"unigram": round(losses[1], 4), "five_gram": round(losses[5], 4)}


def provenance() -> list[str]:
    "A line for every book, as a table."
    books = Counter((row["title"], row["author"], row["source"]) for row in read_books("train"))
    return [f"| {title} | {author} | {source} |" for title, author, source in sorted(books)]


def card(name: str, figures: dict[str, Any]) -> str:
    "The model card."
    left, heldout = figures["left"], figures["heldout"]
    what = "a Llama, which foretells the next token" if name == "tiny" else "a ModernBERT, which fills gaps"
    rows = [("the model", heldout["loss"])]
    rows += [(f"counts of {n}", heldout[key]) for n, key in (("one token", "unigram"), ("five tokens", "five_gram"))]
    lines = ["| | nats a token | bits a byte |", "| --- | --- | --- |"]
    lines += [f"| {how} | {nats:.3f} | {nats / math.log(2) / heldout['bytes_per_token']:.3f} |" for how, nats in rows]
    if name != "tiny":  # A gap with both sides in view is another question: no comparison with counts of what is past
        lines = [f"{heldout['loss']:.3f} nats a hidden token, with {figures['plan']['mask_frac']:.0%} of them hidden."]
    return CARD.format(
        name=name,
        what=what,
        **{key: figures[key] for key in ("n_weights", "steps", "tokens_seen", "device", "torch", "date")},
        minutes=figures["seconds"] / 60,
        bent=BENT if figures["plan"]["passages"] else "",
        told=TOLD.format(**figures["plan"]) if figures["plan"].get("n_recalled") else "",
        note=f"\n\n{figures['note']}" if figures["note"] else "",
        n_tokens=figures["training_tokens"],
        epochs=figures["tokens_seen"] / figures["training_tokens"],
        n_dropped=left["n_dropped"],
        n_paragraphs=left["n_paragraphs"],
        files=", ".join(f"`{file}`" for file in FILES["train"]),
        not_held_out=", ".join(sorted(NOT_HELD_OUT)),
        heldout="\n".join(lines),
        curve="\n".join(f"| {step:,} | {train:.3f} | {valid:.3f} |" for step, train, valid in figures["curve"]),
        samples="\n".join(f"- {' '.join(text.split())}" for text in figures["samples"]),
        books="\n".join(provenance()),
    )


BENT = """, bent until the mean over a passage tells its neighbour from a thousand others;
the network then learns to fill gaps, while the mean of its states is held near the mean of these vectors"""
TOLD = """
Beside the next token every state is asked, through one linear map that is not kept, for the mean vector of the last
{n_recalled} tokens, in counted vectors bent until the mean over a passage tells its neighbour from a thousand others:
a classifier at the last token needs what was said, and not only what comes."""
CARD = """---
license: apache-2.0
language: en
---

# {name}

The embedded base of `llmft_nb`: {what}, of {n_weights:,} weights in 16 bits. It has read books in the
public domain and nothing else: no line about medicines, no web page, nothing it is tested on. It is small enough to
be fine-tuned on a laptop in minutes, and too small for anything else. Licence of the weights: Apache-2.0.

## How it was made
`tools/pretrain.py {name}`: {steps:,} steps, {tokens_seen:,} tokens ({epochs:.2f} passes over {n_tokens:,}),
{minutes:.0f} minutes on {device}, torch {torch}, finished {date}. Its token vectors begin as counted ones (which tokens
stand near which, factorised){bent}, everything else at
random, and every block begins by adding nothing.{told}
Token vectors and head are one table (`tie_word_embeddings`). Tuned as a language model, the strategies `head` and
`top:K` leave that table still; where nothing else is in the head, `head` is refused. `full` moves it, once and not
twice.{note}

| step | training loss | held-out loss |
| --- | --- | --- |
{curve}

## What it is worth
On books it has not read, whole books held out:

{heldout}

Ten samples, none chosen, none edited:

{samples}

## What it has read
The files {files}, and no other: a test holds the reader to this list, and another one
looks for runs of 13 words that the books share with any text used for testing, and finds none. *{not_held_out}* is
neither read nor used for validation, since two of the books read tell some of the same tales.

The books are old and so are their attitudes. Paragraphs with a word that insults a whole group of people were left
out ({n_dropped:,} of {n_paragraphs:,}; the list is in `tools/books.py`, as hashes). That takes the words away and not
the attitudes: do not put this model before people who do not know what it is.

| title | author | source |
| --- | --- | --- |
{books}
"""


def write_card(folder: Path, name: str, figures: dict[str, Any]) -> None:
    "`pretraining.json` with every figure, and the card made from them."
    (folder / "pretraining.json").write_text(json.dumps(figures, indent=1) + "\n")
    (folder / "README.md").write_text(card(name, figures))
