"""The grid: every strategy × number of rows × distance from what the base has read, with its price.

    python benchmarks/strategies.py run --tasks reviews pharmacy
    python benchmarks/strategies.py run --model MINILM --tasks sst2 banking pharmacy
    python benchmarks/strategies.py show

Near are tasks of everyday language (`reviews`, plain reviews of the house pharmacy; `sst2`, sentences on films), far
are those of a field (`pharmacy`, verdicts on pairs of products; `banking`, ten intents of banking77's). `sst2` and
`banking` are read from the folder `$LLMFT_DATA`; MINILM is a folder of all-MiniLM-L6-v2.

Equal terms: the same rows, drawn anew for each seed; the same number of updates; and for each strategy the best of
three rates, a third of its default, the default and three times it, chosen on validation rows for 200 rows of a draw
that is not used otherwise. A cell is a process of its own, so that its peak of memory is its own, and a line in
`strategies.jsonl` beside this file, or in the file of --out; what is there already is not run again, so the command can
be stopped and called again. A cell of the embedded encoder takes from ten seconds to two minutes on one core. Seconds
count only where nothing else ran; lines measured beside other work have none.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from language import rows_of
from tunes import Rows, right_of, tuned

from llmft_nb.report import read_lines
from llmft_nb.resampling import paired_permutation
from llmft_nb.rows import read_rows

STRATEGIES = ("full", "top:2", "head", "gradual", "head-then-full", "full+decay", "lora:16", "dora:16", "lora:16@top:2")
DISTANCE = {"reviews": "near", "sst2": "near", "pharmacy": "far", "banking": "far"}
RATES = (1 / 3, 1.0, 3.0)
N_TO_CHOOSE, CHOOSING_SEED = 200, 100
BATCH_SIZE, EPOCHS, UPDATES_AN_EPOCH = 16, 8, 25
FILE = Path(__file__).with_suffix(".jsonl")  # What has been measured so far
Cell = dict[str, Any]


def shared(name: str) -> Rows:
    "Rows of the folder of data sets."
    if "LLMFT_DATA" not in os.environ:
        sys.exit("set LLMFT_DATA to the folder that holds sst2/ and banking77/")
    return list(read_rows(Path(os.environ["LLMFT_DATA"]) / name))


def banking() -> dict[str, Rows]:
    "Every eighth intent of banking77, ten of them, so that fifty rows can teach each; a tenth of training validates."
    train, test = (shared(f"banking77/{split}.jsonl") for split in ("train", "test"))
    chosen = set(sorted({row["label"] for row in train})[::8][:10])
    rows = [row for row in train if row["label"] in chosen]
    random.Random(0).shuffle(rows)  # noqa: S311 - no secret
    n_valid = len(rows) // 10
    return {"train": rows[n_valid:], "valid": rows[:n_valid], "test": [row for row in test if row["label"] in chosen]}


TASKS: dict[str, Callable[[], dict[str, Rows]]] = {
    "reviews": lambda: rows_of("pharmacy-reviews:plain"),
    "pharmacy": lambda: rows_of("pharmacy"),
    "sst2": lambda: {
        "train": shared("sst2/train.jsonl")[:4000],
        "valid": shared("sst2/train.jsonl")[4000:4300],
        "test": shared("sst2/validation.jsonl"),
    },
    "banking": banking,
}


def drawn(rows: Rows, n_rows: int, seed: int) -> Rows:
    "So many rows of a draw, every class among them, repeated until an epoch has its updates; 0 rows mean all."
    order = list(rows)
    random.Random(seed).shuffle(order)  # noqa: S311 - no secret
    first = {row["label"]: row for row in reversed(order)}.values()
    chosen = (list(first) + [row for row in order if all(row is not one for one in first)])[: n_rows or None]
    return chosen * math.ceil(UPDATES_AN_EPOCH * BATCH_SIZE / len(chosen))


def settings_of(strategy: str) -> dict[str, Any]:
    "A strategy of the grid as `finetune` takes it."
    name, _, option = strategy.partition("+")
    return {"strategy": name, **({"layer_decay": 0.8} if option else {})}


def default_lr(model: str, strategy: str) -> float:
    "The rate that the package would take."
    from llmft_nb.bases import CATALOGUE
    from llmft_nb.hparams import resolve_settings
    from llmft_nb.strategy import parse_strategy

    model_lr = CATALOGUE[model].lr if model in CATALOGUE else None
    return resolve_settings(parse_strategy(settings_of(strategy)["strategy"]), model_lr=model_lr)[0].lr


def carry_out(cell: Cell, queue: Any) -> None:
    "Run one cell and put what came of it into the queue."
    sets = TASKS[cell["task"]]()
    sets["valid"] = sets["valid"][:200]
    train = drawn(sets["train"], cell["rows"], cell["seed"])
    options = settings_of(cell["strategy"]) | {"model": cell["model"], "epochs": EPOCHS, "batch_size": BATCH_SIZE}
    started = time.monotonic()
    with tuned(train, sets, lr=cell["lr"], seed=cell["seed"], **options) as run:
        answers = [line["predicted"] for line in read_lines(run.folder / "test_predictions.jsonl")]
        record = run.record
    right = right_of(answers, sets["test"]).astype(bool)
    forgot = record.scores["forgetting"]
    found = {
        "valid": record.scores["validation"]["accuracy"],
        "accuracy": float(right.mean()),
        "right": np.packbits(right).tobytes().hex(),
        "n": len(right),
        "trained": record.model["n_trainable"],
        "train_s": record.seconds["6-7 train and validate"],
        "process_s": round(time.monotonic() - started, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "cosine": (forgot.get("features") or {}).get("value"),
        "ratio": (forgot.get("ratio") or {}).get("value"),
    }
    queue.put(found)


def run_cell(cell: Cell, out: Path) -> Cell:
    "A cell in a process of its own, unless the file has it."
    key = ("task", "name", "rows", "strategy", "seed", "factor")
    for line in read_lines(out) if out.is_file() else []:
        if all(line[name] == cell[name] for name in key):
            return line
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=carry_out, args=(cell, queue))
    child.start()
    while child.is_alive() and queue.empty():
        child.join(0.2)
    if queue.empty():
        sys.exit(f"the cell ended with status {child.exitcode}: {cell}")
    line = {name: value for name, value in cell.items() if name != "model"} | queue.get()
    child.join()
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    shown = {name: line[name] for name in ("task", "rows", "strategy", "seed", "lr")}
    print(f"{shown} {100 * line['accuracy']:.1f} %, {line['train_s']:.0f} s", flush=True)
    return line


def run(arguments: argparse.Namespace) -> None:
    "Choose each strategy's rate, then run every cell that is missing."
    shared_name = Path(arguments.model).name if os.sep in arguments.model else arguments.model
    for task in arguments.tasks:
        for strategy in arguments.strategies:
            plain = {"task": task, "model": arguments.model, "name": shared_name, "strategy": strategy}
            lr = default_lr(arguments.model, strategy)
            trials = [
                run_cell(plain | {"rows": N_TO_CHOOSE, "seed": CHOOSING_SEED, "factor": f, "lr": lr * f}, arguments.out)
                for f in RATES
            ]
            best = max(trials, key=lambda line: line["valid"])["factor"]
            for n_rows in arguments.rows:
                for seed in range(arguments.seeds):
                    cell = plain | {"rows": n_rows, "seed": seed, "factor": best, "lr": lr * best}
                    run_cell(cell, arguments.out)


def right_rows(lines: Iterable[Cell]) -> np.ndarray:
    "Share of the seeds with which each test row was answered right."
    bits = [np.unpackbits(np.frombuffer(bytes.fromhex(line["right"]), np.uint8))[: line["n"]] for line in lines]
    return np.mean(bits, axis=0)


def show(arguments: argparse.Namespace) -> None:
    "A table for each task and number of rows; whoever is not shown to be behind the best is marked."
    lines = [line for line in read_lines(arguments.file) if line["seed"] != CHOOSING_SEED]
    for name, task, n_rows in sorted({(line["name"], line["task"], line["rows"]) for line in lines}):
        mine = [line for line in lines if (line["name"], line["task"], line["rows"]) == (name, task, n_rows)]
        groups = {strategy: [line for line in mine if line["strategy"] == strategy] for strategy in STRATEGIES}
        groups = {strategy: group for strategy, group in groups.items() if group}
        right = {strategy: right_rows(group) for strategy, group in groups.items()}
        best = max(right, key=lambda strategy: right[strategy].mean())
        print(f"\n{name}, {task} ({DISTANCE[task]}), {n_rows or 'all'} rows, {mine[0]['n']} test rows")
        for strategy, group in groups.items():
            paired = paired_permutation(right[best], right[strategy])
            behind = "" if strategy == best else f"behind by {100 * paired.difference:.1f} [{100 * paired.low:.1f}, "
            behind += "" if strategy == best else f"{100 * paired.high:.1f}], p {paired.p_value:.3f}"
            mark = "*" if strategy == best or paired.p_value >= 0.05 else " "
            timed = [line["train_s"] for line in group if line["train_s"] is not None] or [np.nan]
            seconds, peak = np.median(timed), np.median([line["peak_mb"] for line in group])
            kept = np.mean([line["cosine"] for line in group if line["cosine"] is not None] or [np.nan])
            print(
                f"{mark} {strategy:<15} {100 * right[strategy].mean():5.1f} %  {group[0]['trained']:>10,} weights"
                f"  {seconds:5.0f} s  {peak:5.0f} MB  features {kept:.3f}  × {group[0]['factor']:.2g}  {behind}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run", help="run every cell that the file lacks")
    running.add_argument("--model", default="tiny-encoder")
    running.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["reviews", "pharmacy"])
    running.add_argument("--strategies", nargs="+", default=list(STRATEGIES))
    running.add_argument("--rows", type=int, nargs="+", default=[50, 200, 1000, 0], help="0: all there are")
    running.add_argument("--seeds", type=int, default=3)
    running.add_argument("--out", type=Path, default=FILE)
    running.set_defaults(carry_out=run)
    showing = commands.add_parser("show", help="print the tables")
    showing.add_argument("file", type=Path, nargs="?", default=FILE)
    showing.set_defaults(carry_out=show)
    arguments = parser.parse_args()
    arguments.carry_out(arguments)


if __name__ == "__main__":
    main()
