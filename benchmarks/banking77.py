"""Accuracy and time of full and partial fine-tuning on banking77, with the command's defaults.

    python benchmarks/banking77.py --model <folder of all-MiniLM-L6-v2> --seeds 0 1 2 --strategies full top:2

Each run is one `llmft train` in a process of its own, on the files `$LLMFT_DATA/banking77/{train,test}.jsonl`
(`PolyAI/banking77` on the hub). Prints a line a run and a summary: mean test accuracy of each strategy, and the time
of a partial run as a share of a full one's. Times count only on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def train_once(data: Path, model: str, strategy: str, seed: int, out: Path) -> dict:
    "One run of the command; returns its figures."
    command = [sys.executable, "-c", "from llmft_nb.cli import main; main()", "train", "--task", "classify"]
    command += ["--model", model, "--data", str(data / "train.jsonl"), "--test", str(data / "test.jsonl")]
    command += ["--strategy", strategy, "--seed", str(seed), "--out", str(out), "--json"]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{strategy}, seed {seed}: exit status {done.returncode}\n{done.stderr}")
    result = json.loads(done.stdout.splitlines()[-1])
    accuracy = result["scores"]["test"]["accuracy"]
    return {
        "strategy": strategy,
        "seed": seed,
        "accuracy": accuracy["value"],
        "low": accuracy["low"],
        "high": accuracy["high"],
        "valid": result["scores"]["validation"]["accuracy"],
        "train_s": result["seconds"]["6-7 train and validate"],
        "process_s": time.monotonic() - started,
    }


def main() -> None:
    "Train, print, summarise."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of all-MiniLM-L6-v2, or another model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--strategies", nargs="+", default=["full", "top:2"])
    args = parser.parse_args()
    if "LLMFT_DATA" not in os.environ:
        sys.exit("set LLMFT_DATA to the folder that holds banking77/")
    data = Path(os.environ["LLMFT_DATA"]) / "banking77"
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in args.seeds:
            for strategy in args.strategies:
                out = Path(scratch) / f"{strategy.replace(':', '-')}-{seed}"
                result = train_once(data, args.model, strategy, seed, out)
                results.append(result)
                print(
                    f"{strategy:<7} seed {seed}  test {100 * result['accuracy']:.2f} %"
                    f" [{100 * result['low']:.1f}, {100 * result['high']:.1f}]  valid {100 * result['valid']:.2f} %"
                    f"  training {result['train_s']:.0f} s  process {result['process_s']:.0f} s",
                    flush=True,
                )
    full_s = statistics.median([r["process_s"] for r in results if r["strategy"] == args.strategies[0]])
    for strategy in args.strategies:
        mine = [r for r in results if r["strategy"] == strategy]
        seconds = statistics.median([r["process_s"] for r in mine])
        mean = 100 * statistics.mean([r["accuracy"] for r in mine])
        print(f"{strategy:<7} mean of {len(mine)}: {mean:.2f} %  median {seconds:.0f} s = {seconds / full_s:.0%}")


if __name__ == "__main__":
    main()
