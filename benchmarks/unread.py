"""Is a fact learnt that was only read? The leaflets first and the questions afterwards, against the questions alone.

    python benchmarks/unread.py [--epochs-reading 12] [--strategy top:2] [--seeds 3]

Twelve products of the house pharmacy occur in leaflets and in no training question. The base reads all leaflets but
forty, which tell when it has read enough; then it is tuned on the questions about the other products, with the lower
blocks frozen unless told otherwise: what reading has put there stays. Beside it the same tune from the base itself.
Both answer the test of `pharmacy-unread`, about nine of the twelve, half of it about pairs that a leaflet states, and
the pharmacy's own test. The differences are paired, over all seeds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from llmft_nb.finetune import FinishedRun, finetune
from llmft_nb.resampling import paired_permutation
from llmft_nb.rows import read_rows

N_HELD_BACK = 40  # Leaflets in wordings that are read elsewhere


def texts(split: str) -> list[dict[str, Any]]:
    "Leaflets without their metadata."
    return [{"text": row["text"]} for row in read_rows("pharmacy-leaflets", split=split)]


def read_leaflets(arguments: argparse.Namespace, out: Path) -> Path:
    "Let the base read, say what that brought and cost, and return the model's folder."
    started, leaflets = time.monotonic(), texts("train")
    run = finetune(
        leaflets[N_HELD_BACK:],
        task="text",
        valid=leaflets[:N_HELD_BACK],
        test=texts("test"),
        model=arguments.model,
        epochs=arguments.epochs_reading,
        batch_size=8,
        lr=arguments.lr,
        out=out,
        callbacks=(),
    )
    test = run.record.scores["test"]
    before, after = (score["perplexity"]["value"] for score in (test["baselines"][0], test))
    print(f"leaflets in new wordings: perplexity {before:.0f} to {after:.0f}; {time.monotonic() - started:.0f} s")
    print(run.record.scores["forgetting"]["words"], flush=True)
    return run.folder / "model"


def tuned(model: str | Path, sets: dict[str, list[dict[str, Any]]], seed: int, arguments: argparse.Namespace) -> Any:
    "For each question of `unread` and of the test whether a tuned model is right."
    with tempfile.TemporaryDirectory() as scratch:
        run: FinishedRun = finetune(
            sets["train"],
            valid=sets["valid"],
            test=sets["test"],
            model=model,
            strategy=arguments.strategy,
            epochs=arguments.epochs,
            lr=arguments.lr,
            seed=seed,
            leaks="allow",
            out=Path(scratch) / "run",
            callbacks=(),
        )
        predictor = run.predictor()
        return {
            name: right_of(predictor.predict([row["text"] for row in sets[name]]), sets[name])
            for name in ("unread", "test")
        }


def right_of(answers: list[dict[str, Any]], rows: list[dict[str, Any]]) -> np.ndarray:
    "One for each right answer, and zero for each wrong one."
    return np.array([answer["label"] == row["label"] for answer, row in zip(answers, rows, strict=True)], dtype=float)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--epochs-reading", type=int, default=12)
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
            "leaflets first": read_leaflets(arguments, Path(scratch) / "read"),
        }
        right = {
            how: [tuned(model, sets, seed, arguments) for seed in range(arguments.seeds)]
            for how, model in starts.items()
        }
    for part, (name, chosen) in parts.items():
        shares = {how: np.mean([found[name][chosen] for found in runs], axis=0) for how, runs in right.items()}
        paired = paired_permutation(shares["leaflets first"], shares["questions alone"])
        points = f"{100 * paired.difference:+.1f} points [{100 * paired.low:+.1f}, {100 * paired.high:+.1f}]"
        said = ", ".join(f"{how} {share.mean():.1%}" for how, share in shares.items())
        print(f"{part:<20} {said}: {points}, p = {paired.p_value:.2g}", flush=True)


if __name__ == "__main__":
    main()
