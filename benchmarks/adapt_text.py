"""What reading medical text is worth: perplexity of medquad's held-out answers before and after, and what it costs.

    LLMFT_DATA=<folder> python benchmarks/adapt_text.py --model tiny
    LLMFT_DATA=<folder> python benchmarks/adapt_text.py --model <folder of all-MiniLM-L6-v2>

One run of `finetune(task="text")` on the answers of `$LLMFT_DATA/medquad/train.jsonl.gz`, judged on those of
`validation.jsonl` (no disease occurs in both), with general text (`$LLMFT_DATA/general`) beside it. Intervals are 95 %,
drawn over documents. A decoder is asked for every token, an encoder for 15 % of them, hidden: their perplexities
cannot be compared with each other. all-MiniLM-L6-v2 comes without its language-model head; that one starts at random,
so the perplexity before is that of guessing, and most of the fall is the head being learnt. Exit status 1 where the
embedded base's perplexity falls by less than 40 %. Seconds count only on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

N_GENERAL, GENERAL_CHARACTERS = 60, 2000  # Texts of each general set, and how much of each is read
N_VALID = 200  # Training answers held out to choose the weights by
LEAST_FALL = 0.40  # Of the embedded base's perplexity
MAX_LENGTH = 256
DEFAULTS = {  # Each within 20 minutes on two cores; an answer has about 500 tokens of the embedded base's vocabulary
    "CausalLM": {"rows": 6_000, "epochs": 1, "lr": 1e-3, "batch_size": 16},
    "MaskedLM": {"rows": 3_000, "epochs": 1, "lr": 5e-4, "batch_size": 8},
}


def read_texts(path: Path, column: str) -> Iterator[dict[str, str]]:
    "Texts of a JSONL file, plain or gzipped."
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for line in file:
            text = json.loads(line)[column]
            if text and text.strip():
                yield {"text": text}


def general_rows(data: Path) -> list[dict[str, str]]:
    "The beginnings of some encyclopaedia and some newspaper articles."
    names = ("wikitext2.validation.jsonl", "onestop_english.validation.jsonl")
    rows = [row for name in names for row in itertools.islice(read_texts(data / name, "text"), N_GENERAL)]
    return [{"text": row["text"][:GENERAL_CHARACTERS]} for row in rows]


def alarm(minutes: float) -> Any:
    "A callback that ends training after some minutes; what was learnt until then is judged."
    from llmft_nb.callbacks import Callback

    class Alarm(Callback):
        started = 0.0

        def on_train_start(self, state: Any) -> None:
            self.started = time.monotonic()

        def on_step(self, state: Any, values: Any) -> None:
            if time.monotonic() - self.started > 60 * minutes and state.step < state.n_steps:
                print(f"  out of time at step {state.step} of {state.n_steps}", flush=True)
                state.stop = True

        def on_evaluate(self, state: Any, scores: Any) -> None:
            passed_s = time.monotonic() - self.started
            print(f"  step {state.step} of {state.n_steps}, {passed_s:.0f} s: {scores['perplexity']:.2f}", flush=True)

    return Alarm()


def line(name: str, before: dict[str, Any], after: dict[str, Any]) -> str:
    "Perplexities with their intervals, and the change."
    described = [f"{one['value']:,.2f} [{one['low']:,.2f}, {one['high']:,.2f}]" for one in (before, after)]
    change = after["value"] / before["value"] - 1
    return f"{name:<22}{described[0]} -> {described[1]}: {100 * change:+.1f} % ({after['n']:,} documents)"


def measure(args: argparse.Namespace, data: Path, out: Path) -> float:
    "Tune, print the figures; the share by which the perplexity fell."
    from llmft_nb.finetune import finetune
    from llmft_nb.hparams import TrainSettings
    from llmft_nb.predict import task_model_class
    from llmft_nb.tasks import make_task

    started = time.monotonic()
    base = task_model_class("text", args.model).from_pretrained(args.model)
    given = {"rows": args.rows, "epochs": args.epochs, "lr": args.lr}
    settings = DEFAULTS[base.kind] | {name: value for name, value in given.items() if value is not None}
    rows = list(read_texts(data / "medquad" / "train.jsonl.gz", "answer"))
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    valid, train = rows[:N_VALID], rows[N_VALID : N_VALID + settings.pop("rows")]
    tests = list(read_texts(data / "medquad" / "validation.jsonl", "answer"))[: args.test_rows]
    general = general_rows(data / "general")
    task = make_task("text", TrainSettings(max_length=MAX_LENGTH, seed=args.seed))
    general_before = task.score(base, general)
    print(f"{len(train):,} answers, {settings}; {len(base.random_names)} tensors start at random", flush=True)
    options = {"strategy": args.strategy, "seed": args.seed, "max_length": MAX_LENGTH, "evals_per_epoch": 4, **settings}
    options |= {"callbacks": [alarm(args.minutes)], "out": out}
    run = finetune(train, task="text", model=args.model, valid=valid, test=tests, **options)
    scores = run.record.scores["test"]
    untuned = scores["baselines"][0]
    general_after = task.score(run.predictor().model, general)
    print(line("medquad, held out", untuned["perplexity"], scores["perplexity"]))
    print(f"{'':<22}{untuned['difference']:+.3f} nats a token, p {untuned['p_value']:.4f}: {untuned['verdict']}")
    print(line("general text", general_before["perplexity"], general_after["perplexity"]))
    if "bits_per_byte" in scores:
        table = [json.loads(row) for row in (run.folder / "test_predictions.jsonl").read_text().splitlines()]
        was = sum(row["untuned_loss_sum"] for row in table) / sum(row["loss_sum"] for row in table)
        now = scores["bits_per_byte"]
        print(
            f"{'bits per byte':<22}{was * now:.3f} -> {now:.3f}; general text {general_before['bits_per_byte']:.3f}"
            f" -> {general_after['bits_per_byte']:.3f}"
        )
    print(f"{'forgetting':<22}{run.record.scores['forgetting']['words']}")
    parts = ", ".join(f"{name} {value:.0f} s" for name, value in run.record.seconds.items())
    print(f"{'seconds':<22}{time.monotonic() - started:.0f} in all: {parts}")
    return 1 - scores["perplexity"]["value"] / untuned["perplexity"]["value"]


def main() -> None:
    "Measure once; exit status 1 where the embedded base learnt too little."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="tiny, a folder of all-MiniLM-L6-v2, or another model")
    parser.add_argument("--rows", type=int, help="training answers; default: as many as fit the time")
    parser.add_argument("--test-rows", type=int, help="held-out answers; default: all")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--strategy", default="full", help="full, top:K or head")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--minutes", type=float, default=15.0, help="of training at most")
    args = parser.parse_args()
    if "LLMFT_DATA" not in os.environ:
        sys.exit("set LLMFT_DATA to the folder that holds medquad/ and general/")
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        fall = measure(args, Path(os.environ["LLMFT_DATA"]), Path(scratch) / "run")
    if args.model == "tiny" and fall < LEAST_FALL:
        sys.exit(f"the perplexity fell by {fall:.1%}, less than {LEAST_FALL:.0%}")


if __name__ == "__main__":
    main()
