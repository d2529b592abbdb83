"""What pretraining buys where language is asked for: few rows of everyday text, from the base and from random weights.

    python benchmarks/language.py [--model tiny] [--sets pharmacy-intents pharmacy-reviews:plain] [--rows 200]

For each embedded language set (after a colon: its rows of that kind alone) and each number of rows, so many training
rows are drawn evenly over the classes; the model is tuned on them from its pretrained and from random weights, each
at its own rate, once a seed, and asked about the whole test, which another hand wrote. Beside it stand word counts
(TF-IDF with a logistic regression, the same rows) and the mean of the frozen base's token vectors with a logistic
regression: what the vocabulary alone has learnt.
The difference of the two starts is tested row by row, paired, over all seeds together.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tunes import Rows, answers_of_tune, difference, right_of, write_measured

from llmft_nb.modeling import LLMForSequenceClassification
from llmft_nb.rows import read_rows
from llmft_nb.scores import tfidf_baseline

SETS = ("pharmacy-intents", "pharmacy-reviews:plain", "pharmacy-reviews:indirect", "pharmacy-kinds")


def draw(rows: Rows, n_rows: int, seed: int) -> Rows:
    "Rows of every class alike."
    by_label: dict[str, Rows] = {}
    for row in rows:
        by_label.setdefault(row["label"], []).append(row)
    chosen = random.Random(seed)  # noqa: S311 - no secret
    drawn = [row for label in sorted(by_label) for row in chosen.sample(by_label[label], n_rows // len(by_label))]
    chosen.shuffle(drawn)
    return drawn


def rows_of(name: str) -> dict[str, Rows]:
    "The splits of a set, or of its rows of one kind: `set:kind`."
    name, _, kind = name.partition(":")
    splits = {split: list(read_rows(name, split=split)) for split in ("train", "valid", "test")}
    return {split: [row for row in rows if not kind or row["kind"] == kind] for split, rows in splits.items()}


def vectors(model: LLMForSequenceClassification, rows: Rows) -> np.ndarray:
    "The mean of each text's token vectors, as the embedding layer has them."
    table = model.network.get_input_embeddings().weight.detach().float()
    ids = model.tokenizer([row["text"] for row in rows], add_special_tokens=False)["input_ids"]
    return torch.stack([table[row].mean(dim=0) for row in ids]).numpy()


def tuned(train: Rows, sets: dict[str, Rows], init: str, arguments: argparse.Namespace, seed: int) -> np.ndarray:
    "What a tuned model answers to the test."
    options = {"model": arguments.model, "epochs": arguments.epochs, "batch_size": 16}
    lr = arguments.random_lr if init == "random" else arguments.lr
    return answers_of_tune(train, sets, init=init, seed=seed, lr=lr, **options)["test"]


def measure(name: str, n_rows: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    "One set and number of rows; returns a line for each way of answering."
    sets = rows_of(name)
    truth, texts = [row["label"] for row in sets["test"]], [row["text"] for row in sets["test"]]
    model = LLMForSequenceClassification.from_pretrained(arguments.model)
    test_vectors = vectors(model, sets["test"])
    right: dict[str, list[np.ndarray]] = {}
    started = time.monotonic()
    for seed in range(arguments.seeds):
        train = draw(sets["train"], n_rows, seed)
        labels = [row["label"] for row in train]
        counted = tfidf_baseline([row["text"] for row in train], labels, texts)
        linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.03, max_iter=2000))
        said = linear.fit(vectors(model, train), labels).predict(test_vectors)
        answers = {"word counts": counted, "mean of frozen token vectors": said}
        for init in ("random", "pretrained"):
            answers[f"tuned from {init} weights"] = tuned(train, sets, init, arguments, seed)
        for how, found in answers.items():
            right.setdefault(how, []).append(right_of(found, sets["test"]))
    print(f"\n{name}: {n_rows} rows, {len(truth):,} test rows, chance {1 / len(set(truth)):.1%}")
    for how, found in right.items():
        print(f"  {how:<32} {np.mean(found):6.1%}  seeds " + " ".join(f"{np.mean(one):.1%}" for one in found))
    ours, random_start = (np.mean(right[f"tuned from {init} weights"], axis=0) for init in ("pretrained", "random"))
    seconds = time.monotonic() - started
    print(f"  pretrained minus random: {difference(ours, random_start)}")
    print(f"  pretrained minus word counts: {difference(ours, np.mean(right['word counts'], axis=0))}; {seconds:.0f} s")
    shares = {how: [float(np.mean(one)) for one in found] for how, found in right.items()}
    return [{"set": name, "rows": n_rows, "how": how, "seeds": found} for how, found in shares.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--rows", type=int, nargs="+", default=[200])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--random-lr", type=float, default=1e-3, help="the rate from random weights")
    parser.add_argument("--json", type=Path, help="write the lines there as well, after each set and number of rows")
    arguments, lines = parser.parse_args(), []
    for name in arguments.sets:
        for n_rows in arguments.rows:
            lines += measure(name, n_rows, arguments)
            if arguments.json:
                write_measured(arguments.json, lines)


if __name__ == "__main__":
    main()
