"""How long a user waits for the first step: from `llmft train` to the first line that it writes of its steps.

    python benchmarks/start.py [--data pharmacy] [--model tiny-encoder] [--task classify] [--rounds 3]

Each round starts the command twice in new processes, in a home that is empty at first, with the same arguments. The
first step is seen from outside, by the checkpoint it leaves (`--save-every 1`); then the command is stopped.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ASKED_S = 8.0


def seconds_to_first_step(arguments: argparse.Namespace, home: Path, out: Path) -> float:
    "Start a run, wait for its first checkpoint, and stop it."
    command = [
        sys.executable,
        "-c",
        "from llmft_nb.cli import main; main()",
        "train",
        "--data",
        arguments.data,
        "--model",
        arguments.model,
    ]
    command += ["--task", arguments.task, "--out", str(out), "--save-every", "1", "--precision", "f32"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    started = time.perf_counter()
    with (out.parent / f"{out.name}.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        while not (out / "checkpoints" / "step-00000001").is_dir():
            if process.poll() is not None:
                sys.exit((out.parent / f"{out.name}.log").read_text(encoding="utf-8"))
            time.sleep(0.02)
        seconds = time.perf_counter() - started
        process.send_signal(signal.SIGKILL)
        process.wait()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="pharmacy")
    parser.add_argument("--model", default="tiny-encoder")
    parser.add_argument("--task", default="classify")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    first, second = list[float](), list[float]()
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as scratch:
            for number, found in enumerate((first, second)):
                found.append(seconds_to_first_step(arguments, Path(scratch), Path(scratch) / f"run{number}"))
    middle = [statistics.median(found) for found in (first, second)]
    print(
        f"{arguments.task}, {arguments.model}, {arguments.data}: {middle[0]:.1f} s to the first step, again "
        f"{middle[1]:.1f} s [{min(second):.1f}, {max(second):.1f}] (asked {ASKED_S:.0f})"
    )
    sys.exit(0 if middle[1] <= ASKED_S else 1)


if __name__ == "__main__":
    main()
