"""Kill a run with `kill -9` at random instants, resume it, and see that it ends as one left alone.

    python benchmarks/kill_resume.py --kills 20 --seed 0 --task classify --strategy full

The run fine-tunes the embedded model on some rows of the house pharmacy (its questions and verdicts; the products
named in them; the reasons given; or the bare texts, as the task asks), with one thread, an evaluation twice an
epoch and a checkpoint every few steps. Instants are uniform from the first file of the run to its end, so that they
fall into steps, evaluations, the writing of checkpoints, the test and the saving. A third of the resumed runs is
killed again. Compared are the tuned weights, the log, the answers to the test rows, the scores and the last checkpoint
with its optimizer state. It takes about 20 s a kill on one core, or 8 s with `--start fork`, where the interpreter is
loaded once and copied for each run. The exit status is 1 where anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

ENTRY = "from llmft_nb.cli import main; main()"


@dataclass
class Child:
    "A run in a process of its own."

    pid: int  # Its number
    started_s: float  # When it was started, by the monotonic clock
    status: int | None = None  # Exit status, negative for a signal; None while it lives

    def poll(self) -> bool:  # True once it has ended
        "Look whether it has ended."
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is not None

    def wait(
        self,
        until_s: float,  # By the monotonic clock
    ) -> bool:  # True where it ended before
        "Wait for its end, but not beyond an instant."
        while not self.poll():
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                return False
            time.sleep(min(0.002, left_s))
        return True

    def kill(self) -> None:
        "End it at once, and collect it."
        os.kill(self.pid, signal.SIGKILL)
        while not self.poll():
            time.sleep(0.001)


def start(
    arguments: list[str],  # Of the command `llmft`
    log: Path,  # What it says is appended here
    mode: str,  # "process": a new interpreter; "fork": a copy of this one
) -> Child:  # Running
    "Start a run."
    started_s = time.monotonic()
    with log.open("ab") as file:
        if mode == "process":
            command = [sys.executable, "-c", ENTRY, *arguments]
            popen = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
            popen.returncode = 0  # It is collected by `Child`
            return Child(popen.pid, started_s)
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            return Child(pid, started_s)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    status = 1
    try:
        from llmft_nb.cli import app

        app(args=arguments, prog_name="llmft")
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def load_modules() -> None:
    "Import what a run needs, once, for all copies."
    import accelerate  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import sklearn.feature_extraction.text
    import sklearn.linear_model  # noqa: F401
    import transformers

    import llmft_nb.finetune  # noqa: F401

    _ = transformers.AutoModelForSequenceClassification, transformers.AutoTokenizer, transformers.get_scheduler
    _ = transformers.AutoModelForTokenClassification, transformers.AutoModelForCausalLM, transformers.GenerationConfig


def digest(
    path: Path,  # A file that may not be there
) -> str:  # 12 hexadecimal digits, or "missing"
    "A file's fingerprint."
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.is_file() else "missing"


def outcome(
    folder: Path,  # A finished run
) -> dict[str, str]:  # Name and fingerprint of everything that must not depend on interruptions
    "What came of a run."
    names = ("model/model.safetensors", "metrics.jsonl", "test_predictions.jsonl")
    found = {name: digest(folder / name) for name in names}
    for kind in ("step", "best"):
        saved = sorted((folder / "checkpoints").glob(f"{kind}-*"))
        for name in ("tensors.safetensors", "state.json"):
            found[f"last {kind}, {name}"] = digest(saved[-1] / name) if saved else "missing"
    record: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    kept = {name: record[name] for name in ("status", "scores", "settings", "fingerprint", "data", "test_looks")}
    found["run.json without times"] = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]
    found["leftovers"] = ", ".join(sorted(path.name for path in folder.rglob(".*")))
    return found


def last_step(
    folder: Path,  # A run
) -> int:  # The last step in its log; 0 where there is none
    "How far a run got."
    lines = (folder / "metrics.jsonl").read_bytes().splitlines() if (folder / "metrics.jsonl").is_file() else []
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except ValueError:  # Cut off by the kill
            continue
    return 0


def under_way(
    folder: Path,  # A run that was just killed
) -> str:  # In words
    "What a run was doing, as its files tell."
    hidden = {path.name.split("-")[0].strip(".") for path in folder.glob("checkpoints/.*")}
    signs = {
        "writing its end": any(folder.glob(".run.json.*")) or (folder / "report.html").is_file(),
        "saving the model": (folder / ".model.writing").exists() or (folder / "model").exists(),
        "writing the answers": (folder / "test_predictions.jsonl").exists(),
        "writing a checkpoint": "step" in hidden,
        "writing best weights": "best" in hidden,
        "before the first log": last_step(folder) == 0,
    }
    return next((words for words, is_so in signs.items() if is_so), "training or scoring")


def task_row(
    row: dict[str, Any],  # Of the house pharmacy
    task: str,  # What is learnt
) -> dict[str, Any]:  # The same as the task wants it
    "A question with its verdict, its products, its reason, or nothing."
    if task == "tag":
        words = re.findall(r"\w+|[^\w\s]", row["text"])
        return {"tokens": words, "ner_tags": ["B-product" if word in row["products"] else "O" for word in words]}
    if task == "instruct":
        return {"prompt": row["text"], "completion": row["reason"]}
    return {"text": row["text"]} | ({"label": row["label"]} if task == "classify" else {})


def prepare_data(
    folder: Path,  # Where the files go
    task: str,  # What is learnt
    n_train: int,  # Training rows
) -> list[str]:  # Arguments that name them
    "Cut some rows from the house pharmacy."
    from llmft_nb.core import assets_folder

    arguments = []
    for option, split, n_rows in (("data", "train", n_train), ("valid", "valid", 80), ("test", "test", 80)):
        lines = (assets_folder() / "data" / "pharmacy" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [task_row(json.loads(line), task) for line in lines[:n_rows]]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        arguments += [f"--{option}", str(folder / f"{split}.jsonl")]
    return arguments


def finish(
    command: list[str],  # The run's arguments
    folder: Path,  # Its folder
    log: Path,  # Where it speaks to
    chosen: argparse.Namespace,  # How it is started
    again_s: float | None,  # Kill the resumed run after this, too; None lets it go on
    limit_s: float,  # How long it may take
) -> tuple[int, int]:  # Kills beside the first, and the exit status of the last run
    "Resume a killed run to its end."
    n_again = 0
    while True:
        child = start([*command, "--out", str(folder), "--resume"], log, chosen.start)
        if again_s is not None and not child.wait(child.started_s + again_s):
            child.kill()
            n_again, again_s = n_again + 1, None
            continue
        if not child.wait(child.started_s + limit_s):
            child.kill()
        return n_again, int(child.status or 0)


def kill_once(
    number: int,  # Which kill this is
    command: list[str],  # The run's arguments
    expected: dict[str, str],  # What came of the run left alone
    times_s: tuple[float, float],  # Seconds of that run to its first file, and from there to its end
    chances: random.Random,  # Draws the instants
    chosen: argparse.Namespace,  # How it is started
    parent: Path,  # Where folders go
) -> bool | None:  # Whether it ended alike; None where it was over before the kill
    "Start a run, kill it, resume it, compare."
    folder, log = parent / f"run-{number}", parent / f"run-{number}.log"
    instant_s = chances.uniform(0, times_s[1])
    again_s = chances.uniform(0, sum(times_s)) if chances.random() < 1 / 3 else None
    limit_s = 60 + 20 * sum(times_s)
    child = start([*command, "--out", str(folder)], log, chosen.start)
    while not (folder / "run.json").exists() and not child.wait(time.monotonic() + 0.002):
        assert time.monotonic() < child.started_s + limit_s, f"never began; see {log}"
    if child.wait(time.monotonic() + instant_s):
        return None
    child.kill()
    doing, step = under_way(folder), last_step(folder)
    n_again, status = finish(command, folder, log, chosen, again_s, limit_s)
    found = outcome(folder) if status == 0 else {}
    differing = [name for name in expected if found.get(name) != expected[name]]
    verdict = "identical" if not differing else f"exit status {status}" if status else f"DIFFERS: {differing}"
    print(f"{number:>4}  {instant_s:>8.3f}  {step:>4}  {doing:<21}  {n_again:>5}  {verdict}", flush=True)
    if differing and status:
        print(log.read_text(encoding="utf-8", errors="replace")[-2000:], flush=True)
    return not differing


def make_command(
    chosen: argparse.Namespace,  # As asked for on the command line
    parent: Path,  # Where the rows go
) -> list[str]:  # Arguments of `llmft`, but for the folder
    "Cut the rows, and say what is trained on them."
    command = ["train", *prepare_data(parent, chosen.task, chosen.rows), "--task", chosen.task]
    command += ["--model", chosen.model, "--strategy", chosen.strategy, "--max-length", "128"]
    command += ["--n-written", "8", "--max-new-tokens", "8"] if chosen.task == "instruct" else []
    command += ["--epochs", str(chosen.epochs), "--batch-size", "8", "--save-every", "5", "--evals-per-epoch", "2"]
    return [*command, "--precision", "f32", "--seed", str(chosen.seed), "--question", "May I take both?", "--json"]


def run_alone(
    command: list[str],  # The run's arguments
    folder: Path,  # Its folder
    mode: str,  # How it is started
) -> tuple[dict[str, str], tuple[float, float]]:  # What came of it; seconds to its first file and after it
    "A run that nobody interferes with."
    log = folder.with_suffix(".log")
    child = start([*command, "--out", str(folder)], log, mode)
    while not (folder / "run.json").exists() and not child.wait(time.monotonic() + 0.002):
        pass
    first_s = time.monotonic() - child.started_s
    child.wait(float("inf"))
    assert child.status == 0, log.read_text(encoding="utf-8")
    return outcome(folder), (first_s, time.monotonic() - child.started_s - first_s)


def run_kills(
    chosen: argparse.Namespace,  # As asked for on the command line
    parent: Path,  # Where folders go
) -> bool:  # True where every run ended alike
    "The whole comparison."
    if chosen.start == "fork":
        load_modules()
    command = make_command(chosen, parent)
    expected, times_s = run_alone(command, parent / "alone", chosen.start)
    steps = last_step(parent / "alone")
    print(f"left alone: {steps} steps, {times_s[0]:.1f} s to the first file, {times_s[1]:.1f} s from there")
    for name, value in expected.items():
        print(f"  {name:<34} {value}")
    print("kill  after, s  step  under way              again  the resumed run's end", flush=True)
    chances = random.Random(chosen.seed)  # noqa: S311 - no secret
    verdicts: list[bool] = []
    for number in range(1, 4 * chosen.kills + 1):
        alike = kill_once(number, command, expected, times_s, chances, chosen, parent)
        if alike is not None:
            verdicts.append(alike)
        if len(verdicts) == chosen.kills:
            break
    print(
        f"{sum(verdicts)} of {len(verdicts)} identical ({chosen.task}, strategy {chosen.strategy}, seed {chosen.seed})"
    )
    return len(verdicts) == chosen.kills and all(verdicts)


def main() -> None:
    "Read the arguments, and end with 1 where any run differs."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how many runs are killed")
    parser.add_argument("--seed", type=int, default=0, help="of the run and of the instants")
    parser.add_argument("--task", choices=("classify", "tag", "instruct", "text"), default="classify")
    parser.add_argument("--strategy", default="full", help="full, top:K or head")
    parser.add_argument("--model", default="tiny", help="catalogue name or folder")
    parser.add_argument("--rows", type=int, default=240, help="training rows")
    parser.add_argument("--epochs", type=int, default=3, help="passes over them")
    parser.add_argument("--start", choices=("process", "fork"), default="process", help="how runs are started")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="llmft_nb_kill_") as parent:
        sys.exit(0 if run_kills(chosen, Path(parent)) else 1)


if __name__ == "__main__":
    main()
