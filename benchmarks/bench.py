"""Training side by side: llmft_nb and what a user would take instead, on the same rows, model, seed and updates.

    make bench
    python benchmarks/bench.py [--model MINILM] [--works "classify, full"] [--rounds 3] [--threads 2] [--write]

Each run is a process of its own, and the contestants take turns. Seconds are of the training alone, the making of
kept states counted, tokenising and loading not; of the whole process too, which starts with the imports. Tokens are
counted without padding. Memory is the peak of the process until the last update. Losses are means over the last
updates, the score is of test rows: accuracy in per cent, or perplexity of the right answers. Ratios are of medians,
with the lowest and highest of the rounds, each with a seed of its own; losses and scores are means over the seeds with
their standard deviation. The share of the peak is by the products of the plain way, the same for everybody.

Everybody computes in f32. With $LLMFT_DATA and MINILM, a folder of all-MiniLM-L6-v2, the rows are of banking77 and
rasbt_instruct; without, of the house pharmacy, and the encoder is the embedded one. `--write` keeps the table in
`bench.json`, where works not measured this time stay as they are, and draws speeds into `bench.png` and the losses
against updates into `losses.png`, all beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tunes import write_measured

ASKED = {  # How many times as fast as whom
    "classify, full": {"trainer, sorted": 1.25, "trainer": 2.3},
    "classify, top:2": {"trainer, sorted": 2.5, "trainer": 5.0},
    "classify, head": {"trainer, sorted": 10.0, "trainer": 20.0},
    "classify, lora:16": {"trainer, sorted": 1.3},
    "instruct, full": {"trainer": 1.8, "trl": 2.8},
    "instruct, lora:16": {"trl": 1.5},
}
ASKED_SHARE = {"classify, full, 2,048 tokens": 0.5}  # Of the peak of matrix products
HERE = Path(__file__).parent
Run = dict[str, Any]


def products_per_second(n: int = 1024, n_times: int = 20) -> float:
    "The peak of matrix products in f32: multiplications and additions a second, the median of some."
    import torch

    a, b, found = torch.randn(n, n), torch.randn(n, n), []
    for _ in range(n_times):
        started = time.perf_counter()
        a @ b
        found.append(2 * n**3 / (time.perf_counter() - started))
    return statistics.median(found)


def one_run(work: str, contestant: str, seed: int, model: str, n_rows: int) -> Run:
    "Train once in this process."
    from peers import CONTESTANTS
    from works import make_job

    job = make_job(work, seed, model, n_rows)
    run = CONTESTANTS[contestant](job)
    started = time.perf_counter()
    losses = run()
    seconds = time.perf_counter() - started
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found = {"seconds": seconds, "peak_mb": peak_mb, "losses": losses, "score": job.score()}
    found |= {"rows": len(job.train) * job.work.epochs, "tokens": job.n_tokens}
    if job.work.strategy == "full":
        found["share"] = job.n_products / seconds / products_per_second()
    return found


def in_a_process(work: str, contestant: str, seed: int, arguments: argparse.Namespace) -> Run:
    "The same in a process of its own, with its whole time."
    options = ["--model", arguments.model, "--rows", str(arguments.rows)]
    command = [sys.executable, __file__, *options, "--inside", work, contestant, str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
    environment |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000", "TOKENIZERS_PARALLELISM": "false"}
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{work}, {contestant}: exit status {done.returncode}\n{done.stderr[-4000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1])) | {"process_s": time.perf_counter() - started}


def summary(work: str, runs: dict[str, list[Run]]) -> list[Run]:
    "Medians of each contestant, and how many times as fast ours is."
    lines = []
    for name, found in runs.items():
        middle = {key: statistics.median(run[key] for run in found) for key in ("seconds", "process_s", "peak_mb")}
        ratios = [other["seconds"] / own["seconds"] for other, own in zip(found, runs["ours"], strict=True)]
        own = statistics.median(run["seconds"] for run in runs["ours"])
        lines.append(
            {
                "work": work,
                "who": name,
                "date": time.strftime("%Y-%m-%d"),
                **middle,
                "rows_s": found[0]["rows"] / middle["seconds"],
                "tokens_s": found[0]["tokens"] / middle["seconds"],
                "ratio": middle["seconds"] / own,
                "low": min(ratios),
                "high": max(ratios),
                "asked": ASKED.get(work, {}).get(name),
                "share": statistics.median(run["share"] for run in found) if "share" in found[0] else None,
                "loss": [run["losses"][-1][1] for run in found],
                "score": [run["score"] for run in found],
                "losses": [run["losses"] for run in found],
            }
        )
    return lines


def over_seeds(values: list[float]) -> str:
    "The mean, and the standard deviation from seed to seed."
    spread = f" ±{statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{spread}"


def say(lines: list[Run]) -> bool:
    "Print a work's table; whether every figure asked for is reached."
    print(f"\n{lines[0]['work']}")
    print("                   s   process   rows/s  tokens/s    MB          loss         score")
    reached = True
    leanest = min(line["peak_mb"] for line in lines[1:])
    for line in lines:
        words = "" if line["share"] is None else f"  {100 * line['share']:.0f} % of the peak"
        if line["who"] == "ours":
            asked = ASKED_SHARE.get(line["work"])
            if asked:
                words += f" (asked {100 * asked:.0f})"
                reached &= line["share"] >= asked
            if line["peak_mb"] > leanest:
                words += f"  more memory than the leanest peer, {leanest:.0f} MB"
                reached = False
        else:
            words += f"  {line['ratio']:.2f} × [{line['low']:.2f}, {line['high']:.2f}]"
            if line["asked"]:
                words += f", asked {line['asked']}"
                reached &= line["ratio"] >= line["asked"]
        print(
            f"{line['who']:<15} {line['seconds']:6.1f} {line['process_s']:8.1f} {line['rows_s']:8.1f} "
            f"{line['tokens_s']:9.0f} {line['peak_mb']:5.0f} {over_seeds(line['loss']):>13} "
            f"{over_seeds(line['score']):>13}{words}",
            flush=True,
        )
    return reached


def panels(lines: list[Run], **options: Any) -> tuple[Any, Iterator[tuple[Any, list[Run]]]]:
    "A figure with a panel for each work, and each panel with the work's lines."
    import matplotlib.pyplot as plt

    works = list(dict.fromkeys(line["work"] for line in lines))
    n_columns = min(4, len(works))
    n_rows = -(-len(works) // n_columns)
    size = (2.1 * n_columns, 2.4 * n_rows)
    figure, axes = plt.subplots(n_rows, n_columns, figsize=size, squeeze=False, **options)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=7)
    for ax in axes.flat[len(works) :]:
        ax.set_visible(False)
    for ax, work in zip(axes.flat, works, strict=False):
        ax.set_title(work, fontsize=8)
    return figure, zip(axes.flat, ([line for line in lines if line["work"] == work] for work in works), strict=False)


def draw(lines: list[Run], file: Path) -> None:
    "Rows a second of each contestant, work by work, as a share of ours."
    figure, groups = panels(lines, sharey=True)
    for ax, group in groups:
        shares = [1 / line["ratio"] for line in group]
        bars = ax.bar(range(len(group)), shares, color=["#1f77b4", *["#b0b7bf"] * (len(group) - 1)])
        ax.bar_label(bars, [f"{line['rows_s']:.0f}" for line in group], fontsize=7)
        ax.set_xticks(range(len(group)), [line["who"] for line in group], rotation=60, ha="right", fontsize=7)
    figure.supylabel("speed, ours = 1 (rows/s above)", fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def draw_losses(lines: list[Run], file: Path) -> None:
    "The loss of each contestant against updates, the mean over the seeds; where updates differ, only what all have."
    figure, groups = panels(lines)
    for ax, group in groups:
        for line, style in zip(group, ("-", "--", ":", "-."), strict=False):
            seeds = [dict(map(tuple, losses)) for losses in line["losses"]]
            updates = sorted(set.intersection(*map(set, seeds)))
            means = [statistics.mean(losses[update] for losses in seeds) for update in updates]
            ax.plot(updates, means, style, linewidth=1, label=line["who"])
        ax.legend(fontsize=6, frameon=False)
    figure.supylabel("training loss, mean over the seeds", fontsize=8)
    figure.supxlabel("updates", fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-encoder", help="the encoder: a folder, or tiny-encoder")
    parser.add_argument("--works", nargs="+", help="some of them; else all")
    parser.add_argument("--who", nargs="+", help="some of the contestants beside ours; else all")
    parser.add_argument("--rows", type=int, default=0, help="training rows, for a trial; else what is measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="keep the table and draw the picture")
    parser.add_argument("--inside", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        work, contestant, seed = arguments.inside
        print(json.dumps(one_run(work, contestant, int(seed), arguments.model, arguments.rows)))
        return
    from works import WORKS

    packages = ("torch", "transformers", "trl", "peft", "accelerate")
    print(", ".join(f"{name} {version(name)}" for name in packages) + f"; {arguments.threads} threads, f32")
    lines, reached = list[Run](), True
    for work in arguments.works or WORKS:
        names = ["ours", *(name for name in WORKS[work].who if name in (arguments.who or WORKS[work].who))]
        runs: dict[str, list[Run]] = {name: [] for name in names}
        for seed in range(arguments.rounds):
            for name in names:
                runs[name].append(in_a_process(work, name, seed, arguments))
        found = summary(work, runs)
        reached &= say(found)
        lines += found
    if arguments.write:
        file = HERE / "bench.json"
        earlier = json.loads(file.read_text(encoding="utf-8"))["lines"] if file.is_file() else []
        lines += [line for line in earlier if line["work"] not in {line["work"] for line in lines}]
        lines.sort(key=lambda line: list(WORKS).index(line["work"]))
        write_measured(file, lines)
        draw(lines, HERE / "bench.png")
        draw_losses(lines, HERE / "losses.png")
    sys.exit(0 if reached else 1)


if __name__ == "__main__":
    main()
