"""The figures of what a run and its gates must survive, in full: `make torture`.

    python tests/torture.py [--figures R1,D1] [--case 17] [--folder runs/torture] [--again]

Every figure is a number of cases, and every case is told by its number, which is also its seed: `--figures R8 --case
17` plays one of them again. Cases run one after another in a process of their own; what came of each is a line of
`journal.jsonl` in the folder, so that an interrupted torture goes on where it was, as long as the code is the same. A
process that dies or takes too long is a case that failed. At the end stand a table of all figures and every failing
case with the command that repeats it; the exit status is 1 where there is one. What a test run does of it is in
`test_torture.py`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
if __name__ == "__main__":  # Before any of these libraries is loaded
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import chat_pages  # noqa: E402
import pages  # noqa: E402
import served  # noqa: E402
import surroundings  # noqa: E402
import test_cleaning  # noqa: E402
import test_model_gate  # noqa: E402
import test_resume  # noqa: E402
import torture_files  # noqa: E402
import torture_runs  # noqa: E402

from llmft_nb.core import code_fingerprint, sha256_json  # noqa: E402

Run = Callable[[int, Path, Path], str]


@dataclass(frozen=True)
class Figure:
    "Something that must hold in so many cases."

    id: str  # As the figures are named, e.g. "R4"
    words: str  # What is done
    n_cases: int  # How often in full
    run: Run  # Takes the number of a case, a folder shared by all of them, and one of its own; says what is wrong
    limit_s: float = 120  # Longer than any case takes


def mutated_files(number: int, shared: Path, folder: Path) -> str:
    "D1: a hundred damaged files."
    seeds = range(100 * number, 100 * number + 100)
    found = {seed: wrong for seed in seeds if (wrong := torture_files.run_case(seed, folder))}
    return "; ".join(f"file {seed}: {wrong}" for seed, wrong in found.items())


def planted_leaks(number: int, shared: Path, folder: Path) -> str:
    "D2: ten thousand rows and two hundred planted leaks."
    test_cleaning.check_planted(number)
    return ""


def artefact(number: int, shared: Path, folder: Path) -> str:
    "S1: a model from a stranger is refused, and nothing of it runs."
    name = sorted(test_model_gate.SPOILT)[number]
    for check in (test_model_gate.check_refused, test_model_gate.check_loaded):
        part = folder / check.__name__
        part.mkdir()
        check(name, part)
    return ""


def payload(number: int, shared: Path, folder: Path) -> str:
    "S3: a stranger's text in every place of every page, in a browser."
    texts = pages.PAYLOADS[number : number + 1]
    return pages.check_payloads(texts, folder) or chat_pages.check_chat(texts, folder)


def offline_suite(number: int, shared: Path, folder: Path) -> str:
    "S4: all tests, with no connection but to this machine."
    command = [sys.executable, "-m", "pytest", "-q", "--no-header"]
    own = {"OMP_NUM_THREADS", "HF_HUB_OFFLINE"}
    environment = {name: value for name, value in os.environ.items() if name not in own}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.stdout[-3000:] if done.returncode else ""


def figures() -> list[Figure]:
    "All of them, in the order in which they are run."
    with tempfile.TemporaryDirectory() as folder:
        n_calls = len(test_resume.calls_of_a_whole_save(Path(folder) / "counted"))
    n_ways = len(torture_runs.WAYS) * torture_runs.N_STEPS
    return [
        Figure("D1", "a hundred damaged files each", 100, mutated_files),
        Figure("D2", "200 leaks planted in 10,000 rows", 5, planted_leaks),
        Figure("R2", "each call of a save is the last", 2 * n_calls + 8, torture_runs.last_call),
        Figure("R3", "a file of a checkpoint is damaged", 69, torture_runs.damaged),
        Figure("R4", "resumed after each step, in each way", n_ways, torture_runs.resumed),
        Figure("R5", "the disk is full", 30, torture_runs.full_disk),
        Figure("R8", "a number that is none", 50, torture_runs.poisoned),
        Figure("R9", "memory ends in the k-th micro-batch", 24, torture_runs.out_of_memory),
        Figure("S1", "a malicious model", len(test_model_gate.SPOILT), artefact),
        Figure("S2", "a secret somewhere", len(torture_runs.PLACES), torture_runs.kept_secret),
        Figure("S3", "a stranger's text on every page", len(pages.PAYLOADS), payload),
        Figure("R7", "run again elsewhere", 10, torture_runs.rerun, 300),
        Figure("R6", "SIGTERM at a random instant", 50, torture_runs.terminated, 300),
        Figure("R1", "kill -9 at a random instant", 200, torture_runs.killed, 300),
        Figure("V1", "five hundred malformed requests each", 20, served.malformed, 600),
        Figure("V2", "a crowd", 1, served.crowd, 300),
        Figure("V3", "300 stalled connections", 1, served.stalled),
        Figure("V4", "100 clients that leave", 1, served.gone, 300),
        Figure("V5", "every route with every key", 1, served.keys),
        Figure("V6", "300 served answers and predict's", 2, served.equal, 600),
        Figure("S4", "all tests without a network", 1, offline_suite, 5400),
    ]


def play(
    figure: Figure,
    number: int,  # Of the case
    shared: Path,  # What cases have in common
) -> str:  # What is wrong, or ""
    "One case; an exception is a fault of it."
    shared.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        try:
            return figure.run(number, shared, Path(folder))
        except Exception:
            return traceback.format_exc()


class Journal:
    "What came of each case, a line each."

    def __init__(self, file: Path) -> None:
        self.file = file
        mine = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))]
        self.key = sha256_json([code_fingerprint(), mine])

    def add(self, figure: str, number: int, wrong: str, seconds: float) -> None:
        line = {"figure": figure, "case": number, "wrong": wrong, "seconds": round(seconds, 3), "code": self.key[:12]}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def forget_failures(self, figure: str) -> None:
        "Take the lines of failing cases out."
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
        told = [json.loads(line) for line in lines]
        kept = [json.dumps(one) + "\n" for one in told if not (one["figure"] == figure and one["wrong"])]
        self.file.write_text("".join(kept), encoding="utf-8")

    def of(self, figure: str) -> dict[int, dict[str, Any]]:
        "Cases of this code that are done, by number; the newest counts."
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
        told = [json.loads(line) for line in lines if line.endswith("}")]
        return {one["case"]: one for one in told if one["figure"] == figure and one["code"] == self.key[:12]}


def work(figure: Figure, cases: list[int], journal: Journal, shared: Path) -> None:
    "What a process does: cases, one after another."
    surroundings.switch_network_off()
    logging.disable(logging.CRITICAL)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    import torch

    torch.set_num_threads(1)
    for number in cases:
        started_s = time.monotonic()
        wrong = play(figure, number, shared)
        journal.add(figure.id, number, wrong, time.monotonic() - started_s)


def watch(figure: Figure, cases: list[int], journal: Journal, shared: Path) -> Iterator[int]:
    "Have cases run elsewhere; gives how many more are done; who dies or hangs is told, and the others go on."
    left = list(cases)
    while left:
        pid = os.fork()
        if pid == 0:
            os.setsid()
            work(figure, left, journal, shared)
            os._exit(0)
        seen_s = time.monotonic()
        try:
            while True:
                ended, status = os.waitpid(pid, os.WNOHANG)
                done = journal.of(figure.id)
                still = [number for number in left if number not in done]
                if len(still) < len(left):
                    seen_s = time.monotonic()
                    yield len(left) - len(still)
                    left = still
                if ended or time.monotonic() > seen_s + figure.limit_s:
                    break
                time.sleep(0.2)
            if not ended:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            if left:
                wrong = f"it died ({os.waitstatus_to_exitcode(status)})" if ended else "it hung"
                journal.add(figure.id, left.pop(0), wrong, time.monotonic() - seen_s)
                yield 1
        except BaseException:
            os.killpg(pid, signal.SIGKILL)
            raise


def torture(chosen: list[Figure], journal: Journal, shared: Path, again: bool) -> bool:
    "All cases that are not done, and a table of what came of them; True where nothing failed."
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True)) as progress:
        for figure in chosen:
            if again:
                journal.forget_failures(figure.id)
            done = journal.of(figure.id)
            bar = progress.add_task(f"{figure.id} {figure.words}", total=figure.n_cases)
            todo = [n for n in range(figure.n_cases) if n not in done]
            progress.advance(bar, figure.n_cases - len(todo))
            for n in watch(figure, todo, journal, shared / f"{figure.id}-{journal.key[:12]}"):
                progress.advance(bar, n)
    shutil.rmtree(shared, ignore_errors=True)
    table, wrong = Table(box=None, pad_edge=False), list[tuple[Figure, int, str]]()
    for name in ("figure", "case", "cases", "hold", "seconds"):
        table.add_column(name, justify="right" if name in ("cases", "hold", "seconds") else "left")
    for figure in chosen:
        done = journal.of(figure.id)
        failed = [(figure, number, line["wrong"]) for number, line in sorted(done.items()) if line["wrong"]]
        wrong += failed
        seconds = sum(line["seconds"] for line in done.values())
        table.add_row(figure.id, figure.words, f"{len(done)}", f"{len(done) - len(failed)}", f"{seconds:.0f}")
    Console(width=100).print(table)
    for figure, number, words in wrong:
        print(f"\n{figure.id}, case {number}: {words.strip()}")
        print(f"  again: python tests/torture.py --figures {figure.id} --case {number}")
    return not wrong


def main() -> None:
    "Read the arguments, and end with 1 where any case fails."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", default="", help="e.g. R1,D1; all where none is named")
    parser.add_argument("--case", type=int, help="play one case, and say all of it")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "torture", help="where the journal is kept")
    parser.add_argument("--again", action="store_true", help="play failing cases again")
    asked = parser.parse_args()
    known = {figure.id: figure for figure in figures()}
    names = asked.figures.split(",") if asked.figures else list(known)
    if unknown := set(names) - set(known):
        parser.error(f"no figure {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    asked.folder.mkdir(parents=True, exist_ok=True)
    if asked.case is not None:
        surroundings.switch_network_off()
        shared = Path(tempfile.mkdtemp(prefix="llmft-torture-"))
        wrong = play(known[names[0]], asked.case, shared)
        shutil.rmtree(shared)
        print(wrong or "it holds")
        sys.exit(bool(wrong))
    journal = Journal(asked.folder / "journal.jsonl")
    sys.exit(not torture([known[name] for name in names], journal, asked.folder / "shared", asked.again))


if __name__ == "__main__":
    main()
