"""Is a fact learnt that was only read? The leaflets first and the questions afterwards, against the questions alone.

    python benchmarks/unread.py [--model tiny] [--epochs-reading 12] [--strategy top:2] [--seeds 3]
    python benchmarks/unread.py --model tiny-encoder --epochs-reading 9 --mask-frac 0.4 --mask-words --epochs 6

Twelve products of the house pharmacy occur in leaflets and in no training question. The base reads all leaflets but
forty, which tell when it has read enough; then it is tuned on the questions about the other products, with the lower
blocks frozen unless told otherwise: what reading has put there stays. With --read the model that has read is kept in
that folder, and is not made again where it is found there. Beside it the same tune from the base itself. What reading
cost is told on the package's general texts and, where `$LLMFT_DATA` names a folder of data sets, on held-out books and
on its general texts.
Both answer the test of `pharmacy-unread`, about nine of the twelve, half of it about pairs that a leaflet states, and
the pharmacy's own test. The differences are paired, over all seeds.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from tunes import Rows, answers_of_tune, difference, right_of

from llmft_nb.finetune import finetune
from llmft_nb.forgetting import measure_forgetting
from llmft_nb.predict import task_model_class
from llmft_nb.rows import read_rows

N_OTHERS, N_CHARACTERS = 60, 1200  # Texts of each kind that have nothing to do with leaflets, and how much of each
N_HELD_BACK = 40  # Leaflets in wordings that are read elsewhere
PATIENCE = 4  # Scorings of these without a gain, two an epoch, after which it has read enough


def texts(split: str) -> Rows:
    "Leaflets without their metadata."
    return [{"text": row["text"]} for row in read_rows("pharmacy-leaflets", split=split)]


def other_texts() -> dict[str, list[str]]:
    "Beginnings of held-out books, and of encyclopaedia and newspaper articles, where there is a folder of data sets."
    if "LLMFT_DATA" not in os.environ:
        return {}
    folder, found = Path(os.environ["LLMFT_DATA"]), dict[str, list[str]]()
    names = {"held-out books": ["pretrain/books_fiction.validation.jsonl"]}
    names["general"] = ["general/wikitext2.validation.jsonl", "general/onestop_english.validation.jsonl"]
    for kind, files in names.items():
        rows = [row["text"] for file in files for row in read_rows(folder / file)]
        chosen = np.linspace(0, len(rows) - 1, min(N_OTHERS, len(rows))).astype(int)
        found[kind] = [rows[i][:N_CHARACTERS] for i in chosen]
    return found


def read_leaflets(arguments: argparse.Namespace, out: Path) -> Path:
    "Let the base read, say what that brought and cost, and return the model's folder."
    if (out / "model").is_dir():
        return out / "model"
    started, leaflets = time.monotonic(), texts("train")
    run = finetune(
        leaflets[N_HELD_BACK:],
        task="text",
        valid=leaflets[:N_HELD_BACK],
        test=texts("test"),
        model=arguments.model,
        epochs=arguments.epochs_reading,
        batch_size=8,
        lr=arguments.lr_reading,
        mask_frac=arguments.mask_frac,
        mask_words=arguments.mask_words,
        patience=PATIENCE,
        out=out,
        callbacks=(),
    )
    test = run.record.scores["test"]
    before, after = (score["perplexity"]["value"] for score in (test["baselines"][0], test))
    print(f"leaflets in new wordings: perplexity {before:.0f} to {after:.0f}; {time.monotonic() - started:.0f} s")
    print(run.record.scores["forgetting"]["words"], flush=True)
    tuned = task_model_class("text", run.folder / "model").from_pretrained(run.folder / "model")
    for kind, found in other_texts().items():
        bill = measure_forgetting(arguments.model, tuned, tuned.tokenizer, found)
        print(f"{kind}: {bill.describe()}", flush=True)
    return run.folder / "model"


def tuned(model: str | Path, sets: dict[str, Rows], seed: int, arguments: argparse.Namespace) -> dict[str, np.ndarray]:
    "For each question of `unread` and of the test whether a tuned model is right."
    options = {name: getattr(arguments, name) for name in ("strategy", "epochs", "lr")}
    answers = answers_of_tune(sets["train"], sets, ("unread",), model=model, seed=seed, **options)
    return {name: right_of(found, sets[name]) for name, found in answers.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--epochs-reading", type=int, default=12)
    parser.add_argument("--lr-reading", type=float, default=1e-3)
    parser.add_argument(
        "--mask-frac", type=float, default=0.15, help="share of the tokens that an encoder is asked for"
    )
    parser.add_argument("--mask-words", action="store_true", help="hide whole words, at all their places in a row")
    parser.add_argument("--read", type=Path, help="folder in which the model that has read is kept")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--strategy", default="top:2")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    sets = {split: list(read_rows("pharmacy", split=split)) for split in ("train", "valid", "test")}
    sets |= {"train": sets["train"][: arguments.rows], "unread": list(read_rows("pharmacy-unread", split="test"))}
    stated = np.array([row["stated"] for row in sets["unread"]])
    why = np.array([row["split_reason"] for row in sets["test"]])
    parts = {
        "unread": ("unread", stated | True),
        "unread, stated": ("unread", stated),
        "unread, not stated": ("unread", ~stated),
        "test, phrasings": ("test", why == "phrasing"),
        "test, pairs": ("test", why == "pair"),
    }
    with tempfile.TemporaryDirectory() as scratch:
        starts = {
            "questions alone": arguments.model,
            "leaflets first": read_leaflets(arguments, arguments.read or Path(scratch) / "read"),
        }
        right: dict[str, list[dict[str, np.ndarray]]] = {how: [] for how in starts}
        for seed in range(arguments.seeds):
            for how, model in starts.items():
                right[how].append(tuned(model, sets, seed, arguments))
                print(f"seed {seed}, {how}: unread {right[how][-1]['unread'].mean():.1%}", flush=True)
    for part, (name, chosen) in parts.items():
        shares = {how: np.mean([found[name][chosen] for found in runs], axis=0) for how, runs in right.items()}
        said = ", ".join(f"{how} {share.mean():.1%}" for how, share in shares.items())
        print(f"{part:<20} {said}: {difference(shares['leaflets first'], shares['questions alone'])}", flush=True)


if __name__ == "__main__":
    main()
