"""What more rows cost: time for each token, and resident memory.

    python benchmarks/growth.py [--tasks classify instruct text] [--rows 1000 10000 100000 1000000] [--steps 150]

Rows are sentences of the house pharmacy's leaflets in new combinations, no two alike and of one spread of lengths
whatever their number; a tenth each is held out. Each size is a process of its own. Seconds are of reading, checking,
splitting and the search for leaks ("prepare"), of making tokens ("tokens"), of what a run does before its first step
("begin"), each for a token of the training rows, and of a step for a token of its rows; their sum is what a token
costs in a run of one epoch. Memory is resident: what the process holds, and of that what is not a file's (anonymous),
after the steps. Everything computes in f32 on --threads threads.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MOST_GROWTH = 0.1  # How much dearer a token may become, and how much fuller the memory
MODELS = {"classify": "tiny-encoder", "instruct": "tiny", "text": "tiny"}
TIMED, HELD = (1_000, 100_000), (100_000, 1_000_000)  # Rows between which a figure is asked for
IN_FLAT_MEMORY = ("text",)  # Tasks whose rows are read as a stream
Run = dict[str, Any]


def sentences() -> list[str]:
    "Of the leaflets."
    from llmft_nb.rows import read_rows

    texts = [row["text"] for row in read_rows("pharmacy-leaflets")]
    return sorted({part.strip() for text in texts for part in re.split(r"[.\n]", text) if 20 < len(part) < 90})


def write_rows(task: str, n_rows: int, file: Path) -> None:
    "Rows of one to three sentences and a number that makes them different."
    known, stream = sentences(), random.Random(0)  # noqa: S311
    with file.open("w", encoding="utf-8") as out:
        for i in range(n_rows):
            said = ". ".join(stream.sample(known, stream.choice((1, 1, 2, 3))))
            words = " ".join(stream.choice(known).split()[-1] for _ in range(4))
            text = f"{said}. {words} {i}"
            row = {"text": text, "label": "ab"[i % 2]} if task == "classify" else {"text": text}
            if task == "instruct":
                row = {"prompt": text, "completion": f"{words}."}
            out.write(json.dumps(row) + "\n")


def resident_mb() -> dict[str, float]:
    "What this process holds in memory now, in all and without files' pages."
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = {name: int(re.search(rf"{name}:\s+(\d+)", status)[1]) / 1024 for name in ("VmRSS", "RssAnon")}  # type: ignore[index]
    return {"resident_mb": found["VmRSS"], "anonymous_mb": found["RssAnon"]}


def one_run(task_name: str, n_rows: int, n_steps: int) -> Run:
    "Some steps on so many rows, in this process."
    from llmft_nb.callbacks import Callback, TrainState
    from llmft_nb.data import TextDataLoader
    from llmft_nb.hparams import resolve_settings
    from llmft_nb.strategy import parse_strategy
    from llmft_nb.tasks import make_task
    from llmft_nb.training import LLMTrainer

    class Clock(Callback):
        n_warm, started, ended = 20, 0.0, 0.0

        def on_train_start(self, state: TrainState) -> None:
            self.began = time.perf_counter()

        def on_step(self, state: TrainState, values: Any) -> None:
            now = time.perf_counter()
            self.started = now if state.step == self.n_warm else self.started
            self.ended, state.stop = now, state.step == n_steps

    settings, _ = resolve_settings(
        parse_strategy("full"), task=task_name, arguments={"precision": "f32", "epochs": 100, "batch_size": 16}
    )
    learnt, clock = make_task(task_name, settings), Clock()
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "rows.jsonl"
        write_rows(task_name, n_rows, file)
        marks = [time.perf_counter()]
        splits = learnt.prepare(file, None, None, columns=None, leaks="drop")
        marks.append(time.perf_counter())
        model = learnt.build(MODELS[task_name], splits, strategy="full", init="pretrained")
        marks.append(time.perf_counter())
        dataset = learnt.dataset(splits.train, model, splits.label_names)
        marks.append(time.perf_counter())
        trainer = LLMTrainer(model, settings=settings, callbacks=[clock], log_every=1000)
        loader = TextDataLoader(dataset, batch_size=settings.batch_size, shuffle=True)
        trainer.train(loader)
        held = resident_mb()
    n_tokens = int(dataset.lengths.sum())
    steps = [row for step in first_steps(loader, n_steps)[clock.n_warm :] for row in step]
    seconds = {
        "prepare": (marks[1] - marks[0]) / n_tokens,
        "tokens": (marks[3] - marks[2]) / n_tokens,
        "begin": (clock.began - marks[3]) / n_tokens,
        "step": (clock.ended - clock.started) / int(dataset.lengths[steps].sum()),
    }
    return {"task": task_name, "rows": n_rows, "tokens": n_tokens, **seconds, **held}


def first_steps(loader: Any, n_steps: int) -> list[list[int]]:
    "Rows of the first steps of a run."
    found = list[list[int]]()
    epoch = 0
    while len(found) < n_steps:
        found += loader.steps(epoch)
        epoch += 1
    return found[:n_steps]


def in_a_process(task: str, n_rows: int, arguments: argparse.Namespace) -> Run:
    "The same in a process of its own."
    command = [sys.executable, __file__, "--steps", str(arguments.steps), "--inside", task, str(n_rows)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
    environment |= {"TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{task}, {n_rows:,} rows: exit status {done.returncode}\n{done.stderr[-4000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def whole(run: Run) -> float:
    "Seconds of a token in a run of one epoch."
    return float(sum(run[name] for name in ("prepare", "tokens", "begin", "step")))


def is_flat(task: str, runs: list[Run]) -> bool:
    "Say how time and memory grew between the sizes that are asked about."
    found, reached = {run["rows"]: run for run in runs}, True
    if set(TIMED) <= found.keys():
        growth = whole(found[TIMED[1]]) / whole(found[TIMED[0]]) - 1
        print(f"{task}: a token costs {growth:+.0%} from {TIMED[0]:,} to {TIMED[1]:,} rows (asked {MOST_GROWTH:.0%})")
        reached &= growth <= MOST_GROWTH
    if set(HELD) <= found.keys():
        small, large = (found[n] for n in HELD)
        growth = large["resident_mb"] / small["resident_mb"] - 1
        anonymous = large["anonymous_mb"] / small["anonymous_mb"] - 1
        asked = f" (asked {MOST_GROWTH:.0%})" if task in IN_FLAT_MEMORY else ""
        print(f"{task}: {growth:+.0%} memory from {HELD[0]:,} to {HELD[1]:,} rows{asked}, anonymous {anonymous:+.0%}")
        reached &= growth <= MOST_GROWTH or task not in IN_FLAT_MEMORY
    return reached


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rows", nargs="+", type=int, default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps, the first twenty not timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="keep the table in growth.json beside this file")
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        task, n_rows = arguments.inside
        print(json.dumps(one_run(task, int(n_rows), arguments.steps)))
        return
    runs, reached = list[Run](), True
    print("                       microseconds a token                              MB")
    print("                 rows  prepare  tokens   begin    step     sum  resident  anonymous")
    for task in arguments.tasks:
        own = list[Run]()
        for n_rows in arguments.rows:
            own.append(in_a_process(task, n_rows, arguments))
            costs = [1e6 * own[-1][name] for name in ("prepare", "tokens", "begin", "step")]
            figures = "".join(f"{cost:8.1f}" for cost in [*costs, 1e6 * whole(own[-1])])
            memory = f"{own[-1]['resident_mb']:10.0f}{own[-1]['anonymous_mb']:11.0f}"
            print(f"{task:<10} {n_rows:10,} {figures}{memory}", flush=True)
        reached &= is_flat(task, own)
        runs += own
    if arguments.write:
        from tunes import write_measured

        write_measured(HERE / "growth.json", runs)
    sys.exit(0 if reached else 1)


if __name__ == "__main__":
    main()
