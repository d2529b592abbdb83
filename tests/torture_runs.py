"""Runs that are killed, stopped, starved and spoilt, each case drawn from its number: figures R1 to R9 and S2.

Every function takes the number of a case and a folder, and gives what went wrong, or "". Where a case is drawn by
chance, its number is the seed. What several cases share (a base model, the run left alone) is made once in a folder
that all cases of a figure share.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import kill_resume  # noqa: E402
from small import saved_network, small_rows, write_jsonl  # noqa: E402
from test_guards import Narrow, check_poison, trainer_of  # noqa: E402
from test_resume import DAMAGES, FILES, Ended, Hook, Training, check_full, check_last_call, flip  # noqa: E402

from llmft_nb.core import UserError, read_record  # noqa: E402

Verdict = str
TASKS, STRATEGIES = ("classify", "instruct", "text"), ("full", "top:1", "lora:4")
CELLS = [(task, strategy) for task in TASKS for strategy in STRATEGIES]


@lru_cache(maxsize=1)
def base_model(shared: Path, kind: str = "Llama") -> Path:
    "A small random model, made once."
    folder = shared / f"base-{kind}"
    if not (folder / "config.json").exists():
        saved_network(kind, folder)
    return folder


# --- R1, R6, R7: whole runs of the command, in processes of their own ---


class Cell:
    "A run of the command that is killed again and again, and what comes of it when it is left alone."

    def __init__(self, cell: int, shared: Path, epochs: int = 2) -> None:
        task, strategy = CELLS[cell]
        self.folder = shared / f"{task}-{strategy.replace(':', '')}-{epochs}"
        model = base_model(shared)
        self.chosen = argparse.Namespace(task=task, strategy=strategy, rows=160, epochs=epochs, seed=0, start="fork")
        self.chosen.model = str(model)
        kill_resume.load_modules()
        found = self.folder / "alone.json"
        if not found.exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
            command = kill_resume.make_command(self.chosen, self.folder)
            expected, times_s = kill_resume.run_alone(command, self.folder / "alone", "fork")
            found.write_text(json.dumps([command, expected, times_s]))
        self.command, self.expected, self.times_s = json.loads(found.read_text())


def killed(number: int, shared: Path, folder: Path) -> Verdict:
    "R1: `kill -9` at a random instant, and in a third of the cases once more; resumed unaided, bit-identical."
    cell = Cell(number % len(CELLS), shared)
    told = io.StringIO()
    for attempt in range(5):  # An instant after the end of the run is drawn again
        chances = random.Random(f"R1 {number} {attempt}")
        with contextlib.redirect_stdout(told):
            alike = kill_resume.kill_once(
                attempt, cell.command, cell.expected, cell.times_s, chances, cell.chosen, folder
            )
        if alike is not None:
            return "" if alike else told.getvalue()
    return "it was over before every kill"


def terminated(number: int, shared: Path, folder: Path) -> Verdict:
    "R6: SIGTERM at a random instant; exit status 143, no traceback, and the run goes on to the same end."
    cell, chance = Cell(number % len(CELLS), shared), random.Random(f"R6 {number}")
    for attempt in range(5):
        run, log = folder / f"run-{attempt}", folder / f"run-{attempt}.log"
        child = kill_resume.start([*cell.command, "--out", str(run)], log, "fork")
        while not (run / "run.json").exists() and not child.wait(time.monotonic() + 0.002):
            pass
        if child.wait(time.monotonic() + chance.uniform(0, cell.times_s[1])):
            continue
        os.kill(child.pid, signal.SIGTERM)
        asked_s = time.monotonic()
        if not child.wait(asked_s + 30):
            child.kill()
            return "it did not stop within 30 s"
        if child.status == 0 and read_record(run).status == "finished":
            continue  # It ended at that instant
        told, doing = log.read_text(encoding="utf-8"), kill_resume.under_way(run)
        if child.status != 143 or "Traceback" in told:
            return f"exit status {child.status} while {doing}: {told[-500:]}"
        _, status = kill_resume.finish(cell.command, run, log, cell.chosen, None, 120)
        found = kill_resume.outcome(run) if status == 0 else {}
        differing = [name for name in cell.expected if found.get(name) != cell.expected[name]]
        return f"stopped while {doing}, it ends otherwise: {differing}" if differing else ""
    return "it was over before every signal"


def rerun(number: int, shared: Path, folder: Path) -> Verdict:
    "R7: the same run with another hash seed, in another folder, from another one; identical."
    cell = Cell(number % len(CELLS), shared)
    run = folder / ["run", "ein Ordner, ünd noch einer", "a" * 100][number % 3]
    environment = os.environ | {"PYTHONHASHSEED": str(1 + number), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", kill_resume.ENTRY, *cell.command, "--out", str(run)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        return f"exit status {done.returncode}: {done.stderr[-500:]}"
    found = kill_resume.outcome(run)
    return ", ".join(name for name in cell.expected if found[name] != cell.expected[name])


# --- R2 to R5, R8, R9: one trainer, in this process ---


@lru_cache(maxsize=4)
def training_of(shared: Path, kind: str = "Bert", **settings: Any) -> tuple[Training, Path]:
    "The trainings of `test_resume`, and a folder for what they share."
    rows = small_rows(90)
    return Training(base_model(shared, kind), rows[:66], rows[66:], **settings), shared


@lru_cache(maxsize=64)
def left_alone(training: Training, shared: Path, name: str, settings: tuple[tuple[str, Any], ...] = ()) -> Ended:
    "What comes of a training when nobody interferes."
    shutil.rmtree(shared / name, ignore_errors=True)
    return training.run(shared / name, **dict(settings))


N_CALLS = 44  # Of a save with its best weights and its tidying; `counted_calls` says how many there are


def last_call(number: int, shared: Path, folder: Path) -> Verdict:
    "R2: each call of a save is the last one that is made."
    check_last_call(1 + number // 2, bool(number % 2), folder / "checkpoints")
    return ""


def damaged(number: int, shared: Path, folder: Path) -> Verdict:
    "R3: a file of the newest checkpoint is missing, cut in half, empty, or has a bit turned at one of 20 places."
    training, shared = training_of(shared)
    alone = left_alone(training, shared, "alone-R3")
    if not (shared / "crashed").exists():
        training.crash_at(shared / "crashed.part", "on_step", 14)
        (shared / "crashed.part").rename(shared / "crashed")
    shutil.copytree(shared / "crashed", folder / "run")
    file, place = FILES[number % 3], number // 3
    path = folder / "run" / "checkpoints" / "step-00000012" / file
    if place < 20:
        size = path.stat().st_size
        flip(path, place * size // 20 + place)
    else:
        DAMAGES[("missing", "half", "empty")[place - 20]](path)
    if training.run(folder / "run", resume=True) != alone:
        return f"{path.name}, place {place}: it ends otherwise"
    is_kept = (folder / "run" / "checkpoints" / "damaged-step-00000012").is_dir()
    if training.resumed_from == 9 and is_kept:
        return ""
    is_idle = file == "manifest.json" and place < 20  # A name nobody reads: the files are as they were
    return "" if training.resumed_from == 12 and is_idle else f"{path.name}, place {place}: not noticed"


WAYS: list[dict[str, Any]] = [
    {"micro_batch_size": rows, "window": window, "evals_per_epoch": evals}
    for rows in (8, 3)
    for window in (8, 0)
    for evals in (1, 3)
]
N_STEPS = 27


def resumed(number: int, shared: Path, folder: Path) -> Verdict:
    "R4: after each step of three epochs, under each way to draw, accumulate and score."
    way, step = WAYS[number // N_STEPS], number % N_STEPS + 1
    training, shared = training_of(shared, epochs=3)
    alone = left_alone(training, shared, f"alone-R4-{number // N_STEPS}", tuple(way.items()))
    with contextlib.suppress(BaseException):
        training.run(folder / "run", callbacks=[Hook("on_step", step, crash)], **way)
    ended = training.run(folder / "run", resume=True, **way)
    return "" if ended == alone else f"{way}, step {step}: it ends otherwise"


def crash() -> None:
    raise SystemError("dies")


def full_disk(number: int, shared: Path, folder: Path, n_sizes: int = 30) -> Verdict:
    "R5: so much and no more is free when the third checkpoint is saved; a disk of its own where one may be mounted."
    training, shared = training_of(shared)
    alone = left_alone(training, shared, "alone-R5")
    disk = folder / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True).returncode:
        return "no disk may be mounted here"
    ballast = disk / "ballast"

    def fill() -> None:
        if not ballast.exists():
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            newest = max((disk / "run" / "checkpoints").glob("step-*"))
            needed = sum(path.stat().st_size for path in newest.iterdir())
            ballast.write_bytes(bytes(max(0, free - number * needed // n_sizes)))

    try:
        training.run(disk / "run", callbacks=[Hook("on_step", 10, fill)])
        return "it was saved"
    except UserError as error:
        check_full(error, disk / "run")
        ballast.unlink()
        return "" if training.run(disk / "run", resume=True) == alone else "it ends otherwise"
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def poisoned(number: int, shared: Path, folder: Path) -> Verdict:
    "R8: NaN or infinity in a random place of a random step."
    check_poison(number, base_model(shared), folder)
    return ""


@lru_cache(maxsize=1)
def losses_with_room(shared: Path) -> Any:
    import numpy as np

    trainer, loader = trainer_of(base_model(shared), micro_batch_size=4)
    return np.array(trainer.train(loader).losses)


def out_of_memory(number: int, shared: Path, folder: Path) -> Verdict:
    "R9: memory ends in the k-th micro-batch, on the way up."
    import numpy as np

    alone = losses_with_room(shared)
    trainer, loader = trainer_of(base_model(shared), micro_batch_size=4)
    narrow = Narrow(trainer.model, calls=(number + 1,))
    losses = np.array(trainer.train(loader).losses)
    if len(narrow.refused) != 1 or losses.shape != alone.shape:
        return f"refused {narrow.refused}, {len(losses)} steps"
    off = float(np.abs(losses - alone).max())
    return "" if off <= 1e-6 else f"the losses are off by {off:.1e}"


# --- S2: secrets ---

SECRET = "cAnArY-7f3e91"
PLACES: list[tuple[str, Callable[[str], tuple[dict[str, str], list[str]]]]] = [
    ("HF_TOKEN", lambda secret: ({"HF_TOKEN": f"hf_{secret}"}, [])),
    ("HUGGING_FACE_HUB_TOKEN", lambda secret: ({"HUGGING_FACE_HUB_TOKEN": f"hf_{secret}"}, [])),
    ("OPENAI_API_KEY", lambda secret: ({"OPENAI_API_KEY": f"sk-{secret}"}, [])),
    ("WANDB_API_KEY", lambda secret: ({"WANDB_API_KEY": secret}, [])),
    ("AWS_SECRET_ACCESS_KEY", lambda secret: ({"AWS_SECRET_ACCESS_KEY": secret}, [])),
    ("a password in a proxy", lambda secret: ({"HTTPS_PROXY": f"http://me:{secret}@127.0.0.1:9"}, [])),
    ("a secret of one's own", lambda secret: ({"PHARMACY_DB_PASSWORD": secret}, [])),
    ("a password in an address", lambda secret: ({}, ["--general", f"https://me:{secret}@example.org/texts.jsonl"])),
    ("a token as a model", lambda secret: ({}, ["--model", f"https://hf_{secret}@example.org/model"])),
    ("a token as a flag", lambda secret: ({}, ["--hf-token", f"hf_{secret}"])),
    ("a token in a configuration", lambda secret: ({}, ["--config", f"{secret}.toml"])),
    ("a tracker with a key", lambda secret: ({}, ["--trackers", f"wandb:{secret}"])),
]


def kept_secret(number: int, shared: Path, folder: Path) -> Verdict:
    "S2: a run of the command with a secret somewhere, with and without `--debug`; it is in no file."
    name, plant = PLACES[number]
    environment, arguments = plant(SECRET)
    rows = write_jsonl(folder / "rows.jsonl", small_rows(66))
    home = folder / "home"
    home.mkdir()
    if "--config" in arguments:
        (shared / "config.toml").write_text(f'epochs = 1\nhf_token = "hf_{SECRET}"\n')
        arguments = ["--config", str(shared / "config.toml")]
    fixed = {"HOME": str(home), "LLMFT_CACHE": str(home / "cache"), "HF_HOME": str(home / "hub")}
    fixed |= {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "offline"), str(ROOT)])}
    command = [sys.executable, "-c", kill_resume.ENTRY, "train", "--data", str(rows), "--epochs", "1"]
    command += ["--model", str(base_model(shared)), "--trackers", "tensorboard", "--debug", "--log-level", "debug"]
    done = subprocess.run(
        [*command, *arguments], cwd=folder, env=os.environ | fixed | environment, capture_output=True, text=True
    )
    if not arguments and done.returncode:
        return f"{name}: exit status {done.returncode}: {done.stderr[-500:]}"
    found = [str(path) for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    named = [str(path) for path in folder.rglob("*") if SECRET in path.name]
    return f"{name}: in {', '.join([*found, *named])}" if found or named else ""
