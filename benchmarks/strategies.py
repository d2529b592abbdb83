"""The grid: every strategy × number of rows × distance from what the base has read, with its price.

    python benchmarks/strategies.py run --tasks reviews pharmacy
    python benchmarks/strategies.py run --model MINILM --tasks sst2 banking pharmacy
    python benchmarks/strategies.py show
    python benchmarks/strategies.py write llmft_nb/assets/measured/strategies.json

Near are tasks of everyday language (`reviews`, plain reviews of the house pharmacy; `sst2`, sentences on films), far
are those of a field (`pharmacy`, verdicts on pairs of products; `banking`, ten intents of banking77's). `sst2` and
`banking` are read from the folder `$LLMFT_DATA`; MINILM is a folder of all-MiniLM-L6-v2.

Equal terms: the same rows, drawn anew for each seed; the same number of updates; and for each strategy its default
rate, unless another is better by more than a standard error. A third of the default, the default and three times it are
tried, and further thirds or threes while the outermost is chosen, with 200 rows of a draw that is not used otherwise,
judged on 400 training rows left over by it. A cell is a process of its own, so that its peak of memory is its own, and
a line in `strategies.jsonl` beside this file, or in the file of --out; what is there already is not run again, so the
command can be stopped and called again. A cell of the embedded encoder takes from ten seconds to two minutes on one
core. Seconds are kept where --idle says that nothing else runs; cells that are there without them are run again, so
call it with few:

    python benchmarks/strategies.py run --idle --tasks reviews --rows 0 --seeds 1

The peak of memory is left out of cells that were measured before the training step spared embeddings that no row
touches, since it would be held against cells measured afterwards. All cells are of the order of steps before rows of a
small set were mixed more (`window=2048`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from language import rows_of
from tunes import Rows, right_of, tuned, write_measured

from llmft_nb.report import read_lines
from llmft_nb.resampling import PairedDifference, holm, mean_score, paired_permutation, seeded_difference
from llmft_nb.rows import read_rows
from llmft_nb.task import plain_score

STRATEGIES = ("full", "top:2", "head", "gradual", "head-then-full", "full+decay", "lora:16", "dora:16", "lora:16@top:2")
DISTANCE = {"reviews": "near", "sst2": "near", "pharmacy": "far", "banking": "far"}
RATES, MOST_RATES = (1 / 3, 1.0, 3.0), 6  # Times the default; how many are tried at most
N_TO_CHOOSE, N_CHOOSING, CHOOSING_SEED = 200, 400, 100  # Rows to train on, rows to choose by
BATCH_SIZE, EPOCHS, UPDATES_AN_EPOCH, N_SEEDS = 16, 8, 25, 3
FILE = Path(__file__).with_suffix(".jsonl")  # What has been measured so far
KEY = ("name", "task", "rows", "strategy", "seed", "factor")  # What tells two cells apart
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


def drawn(rows: Rows, n_rows: int, seed: int) -> tuple[Rows, Rows]:
    "So many rows of a draw, every class among them, and the rows left over; 0 rows mean all."
    order = list(rows)
    random.Random(seed).shuffle(order)  # noqa: S311 - no secret
    first = {row["label"]: row for row in reversed(order)}.values()
    order = list(first) + [row for row in order if all(row is not one for one in first)]
    return order[: n_rows or None], order[n_rows or len(order) :]


def repeated(rows: Rows) -> Rows:
    "Rows repeated until an epoch has its updates."
    return rows * math.ceil(UPDATES_AN_EPOCH * BATCH_SIZE / len(rows))


def settings_of(strategy: str) -> dict[str, Any]:
    "A strategy of the grid as `finetune` takes it."
    name, _, option = strategy.partition("+")
    return {"strategy": name, **({"layer_decay": 0.8} if option else {})}


def default_lr(model: str, task: str, strategy: str) -> float:
    "The rate that the package would take; a head's on the rows to choose rates with."
    from llmft_nb.bases import CATALOGUE
    from llmft_nb.data import TextDataset
    from llmft_nb.hparams import head_lr, resolve_settings
    from llmft_nb.inference import head_inputs
    from llmft_nb.modeling import LLMForSequenceClassification
    from llmft_nb.strategy import parse_strategy

    if strategy == "head":
        reader, rows = LLMForSequenceClassification.from_pretrained(model), TASKS[task]()["train"]
        dataset = TextDataset(drawn(rows, N_TO_CHOOSE, CHOOSING_SEED)[0], reader.tokenizer)
        return head_lr(head_inputs(reader, dataset, range(0, len(dataset), 4)))
    model_lr = CATALOGUE[model].lr if model in CATALOGUE else None
    return resolve_settings(parse_strategy(settings_of(strategy)["strategy"]), model_lr=model_lr)[0].lr


def carry_out(cell: Cell, queue: Any) -> None:
    "Run one cell and put what came of it into the queue."
    sets = TASKS[cell["task"]]()
    train, left = drawn(sets["train"], cell["rows"], cell["seed"])
    sets["valid"] = left[:N_CHOOSING] if cell["seed"] == CHOOSING_SEED else sets["valid"][:200]
    options = settings_of(cell["strategy"]) | {"model": cell["model"], "epochs": EPOCHS, "batch_size": BATCH_SIZE}
    options["precision"] = "f32"  # Whatever the machine that a cell is run on
    started = time.monotonic()
    with tuned(repeated(train), sets, lr=cell["lr"], seed=cell["seed"], **options) as run:
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
    for line in read_lines(out) if out.is_file() else []:
        if all(line[name] == cell[name] for name in KEY) and not (cell["idle"] and line["train_s"] is None):
            return line
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=carry_out, args=(cell, queue))
    child.start()
    while child.is_alive() and queue.empty():
        child.join(0.2)
    if queue.empty():
        sys.exit(f"the cell ended with status {child.exitcode}: {cell}")
    line = {name: value for name, value in cell.items() if name not in ("model", "idle")} | queue.get()
    child.join()
    if not cell["idle"]:
        line["train_s"] = line["process_s"] = None
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    shown = {name: line[name] for name in ("task", "rows", "strategy", "seed", "lr")}
    print(f"{shown} valid {100 * line['valid']:.1f} %, test {100 * line['accuracy']:.1f} %", flush=True)
    return line


def chosen_factor(
    found: Mapping[float, float],  # Share of right answers by how many times the default rate
) -> float:  # One of them
    "The nearest to the default of those within a standard error of the best (the rule of Breiman et al. 1984)."
    best = max(found.values())
    enough = best - math.sqrt(best * (1 - best) / N_CHOOSING)
    near = [factor for factor, share in found.items() if share >= enough]
    return min(near, key=lambda factor: (round(abs(math.log(factor)), 6), -found[factor]))


def best_factor(
    valid: Callable[[float], float],  # Share of right answers with so many times the default rate
) -> float:  # As `chosen_factor` says
    "Try rates until the chosen one has another on either side."
    found = {factor: valid(factor) for factor in RATES}
    while True:
        best = chosen_factor(found)
        further = {min(found): best / 3, max(found): best * 3}.get(best)
        if further is None or len(found) == MOST_RATES:
            return best
        found[further] = valid(further)


def run(arguments: argparse.Namespace) -> None:
    "Choose each strategy's rate, then run every cell that is missing."
    shared_name = Path(arguments.model).name if os.sep in arguments.model else arguments.model
    for task in arguments.tasks:
        n_train = len(TASKS[task]()["train"])
        numbers = sorted({n if n < n_train else 0 for n in arguments.rows}, key=lambda n: n or n_train)
        for strategy in arguments.strategies:
            plain = {"task": task, "model": arguments.model, "name": shared_name, "strategy": strategy}
            lr = default_lr(arguments.model, task, strategy)
            trial = plain | {"rows": N_TO_CHOOSE, "seed": CHOOSING_SEED, "idle": False}

            def valid(factor: float, trial: Cell = trial, lr: float = lr) -> float:
                return float(run_cell(trial | {"factor": factor, "lr": lr * factor}, arguments.out)["valid"])

            best = best_factor(valid)
            for n_rows in numbers:
                for seed in range(arguments.seeds):
                    cell = plain | {"rows": n_rows, "seed": seed, "factor": best, "lr": lr * best}
                    run_cell(cell | {"idle": arguments.idle}, arguments.out)


def right_rows(lines: Iterable[Cell]) -> np.ndarray:
    "Which test rows were answered right, 0 or 1, shape (seeds, rows)."
    packed = [(np.frombuffer(bytes.fromhex(line["right"]), np.uint8), line["n"]) for line in lines]
    return np.array([np.unpackbits(bits)[:n] for bits, n in packed], dtype=np.float64)


def compared(best: np.ndarray, other: np.ndarray) -> PairedDifference:
    "Two strategies over rows and seeds; with one seed over rows alone."
    n_seeds = min(len(best), len(other))
    if n_seeds < 2:
        return paired_permutation(best[0], other[0])
    return seeded_difference(best[:n_seeds], other[:n_seeds])


def cells_of(file: Path) -> Iterator[tuple[tuple[str, str, int], dict[str, list[Cell]]]]:
    "For each model, task and number of rows the cells of each strategy at its chosen rate."
    lines = list({tuple(line[name] for name in KEY): line for line in read_lines(file)}.values())  # The last of a cell
    trials: dict[tuple[str, str, str], dict[float, float]] = {}
    for line in lines:
        if line["seed"] == CHOOSING_SEED:
            trials.setdefault((line["name"], line["task"], line["strategy"]), {})[line["factor"]] = line["valid"]
    found: dict[tuple[str, str, int], dict[str, list[Cell]]] = {}
    for line in lines:
        tried = trials.get((line["name"], line["task"], line["strategy"]))
        if line["seed"] != CHOOSING_SEED and tried and line["factor"] == chosen_factor(tried):
            groups = found.setdefault((line["name"], line["task"], line["rows"]), {})
            groups.setdefault(line["strategy"], []).append(line)
    for key in sorted(found, key=lambda key: (*key[:2], key[2] or math.inf)):
        n_seeds = min(N_SEEDS, max(map(len, found[key].values())))  # Whoever is under way is left out until then
        whole = {name: group for name, group in found[key].items() if len(group) >= n_seeds}
        ordered = {name: sorted(group, key=lambda line: line["seed"]) for name, group in whole.items()}
        yield key, {strategy: ordered[strategy] for strategy in STRATEGIES if strategy in ordered}


def summaries(file: Path) -> Iterator[Cell]:
    "For each model, task, number of rows and strategy what the seeds come to, beside the best of its kind."
    for (name, task, n_rows), groups in cells_of(file):
        n_there = n_rows or len(TASKS[task]()["train"])
        right = {strategy: right_rows(group) for strategy, group in groups.items()}
        best = max(right, key=lambda strategy: right[strategy].mean())
        paired = {name: compared(right[best], right[name]) for name in groups if name != best}
        p_values = dict(zip(paired, holm([one.p_value for one in paired.values()]), strict=True))
        for strategy, group in groups.items():
            timed = [line["train_s"] for line in group if line["train_s"] is not None]
            kept = [line["cosine"] for line in group if line["cosine"] is not None]
            peaks = [line["peak_mb"] for line in group if line["peak_mb"] is not None]
            yield {
                "model": name,
                "task": task,
                "distance": DISTANCE[task],
                "rows": n_there,
                "strategy": strategy,
                "seeds": len(group),
                "accuracy": plain_score(mean_score(right[strategy].mean(axis=0))),
                "by_seed": right[strategy].mean(axis=1).tolist(),
                "behind": None if strategy == best else asdict(paired[strategy]) | {"p_holm": p_values[strategy]},
                "over_full": asdict(compared(right[strategy], right["full"])) if "full" in right else None,
                "trained": group[0]["trained"],
                "lr": group[0]["lr"],
                "factor": group[0]["factor"],
                "peak_mb": float(np.median(peaks)) if peaks else None,
                "train_s": float(np.median(timed)) if timed else None,
                "cosine": float(np.mean(kept)) if kept else None,
            }


def show(arguments: argparse.Namespace) -> None:
    "A table for each task and number of rows; whoever is not shown to be behind the best (Holm) is marked."
    for key, group in itertools.groupby(
        summaries(arguments.file), lambda line: (line["model"], line["task"], line["rows"])
    ):
        lines = list(group)
        first = lines[0]
        print(f"\n{key[0]}, {key[1]} ({first['distance']}), {key[2]:,} rows, {first['accuracy']['n']} test rows")
        for line in lines:
            score, behind, words = line["accuracy"], line["behind"], ""
            if behind:
                words = f"behind by {100 * behind['difference']:.1f} [{100 * behind['low']:.1f}, "
                words += f"{100 * behind['high']:.1f}], p {behind['p_holm']:.3f}"
            mark = " " if behind and behind["p_holm"] < 0.05 else "*"
            seconds = "" if line["train_s"] is None else f"  {line['train_s']:.0f} s"
            kept = "" if line["cosine"] is None else f"  features {line['cosine']:.3f}"
            memory = "" if line["peak_mb"] is None else f"  {line['peak_mb']:5.0f} MB"
            print(
                f"{mark} {line['strategy']:<15} {100 * score['value']:5.1f} % [{100 * score['low']:.1f}, "
                f"{100 * score['high']:.1f}]  {line['trained']:>10,} weights{memory}{seconds}{kept}"
                f"  rate {line['lr']:.1e} (× {line['factor']:.2g})  {words}"
            )


def write(arguments: argparse.Namespace) -> None:
    "What the lessons and the plan read."
    write_measured(arguments.json, list(summaries(arguments.file)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run", help="run every cell that the file lacks")
    running.add_argument("--model", default="tiny-encoder")
    running.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["reviews", "pharmacy"])
    running.add_argument("--strategies", nargs="+", default=list(STRATEGIES))
    running.add_argument("--rows", type=int, nargs="+", default=[50, 200, 1000, 0], help="0: all there are")
    running.add_argument("--seeds", type=int, default=N_SEEDS)
    running.add_argument("--out", type=Path, default=FILE)
    running.add_argument("--idle", action="store_true", help="nothing else runs: keep the seconds")
    running.set_defaults(carry_out=run)
    showing = commands.add_parser("show", help="print the tables")
    showing.add_argument("file", type=Path, nargs="?", default=FILE)
    showing.set_defaults(carry_out=show)
    writing = commands.add_parser("write", help="write the tables as JSON")
    writing.add_argument("json", type=Path)
    writing.add_argument("file", type=Path, nargs="?", default=FILE)
    writing.set_defaults(carry_out=write)
    arguments = parser.parse_args()
    arguments.carry_out(arguments)


if __name__ == "__main__":
    main()
