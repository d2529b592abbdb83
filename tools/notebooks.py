"""Run notebooks top to bottom, each in a fresh process, and store what they show.

    python tools/notebooks.py run                    every notebook, in the student's size
    python tools/notebooks.py run 03_strategy …      some of them
    python tools/notebooks.py run --flags gpu -- 30_full   also the cells marked `#| gpu`
    python tools/notebooks.py table                  seconds of the last runs

Cells run in a real Jupyter kernel through nbclient: on its main thread (so that signals work), with pictures and
the output of other programs handled as in JupyterLab, and a kernel that dies is reported instead of taking the
runner with it. Which cells run is nbdev's answer, so that `#| eval: false`, `#| gpu` and the rest mean the same.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "nbs"
SECONDS_FILE = ROOT / ".cache" / "notebook_seconds.json"
SKIP_FLAGS = ("gpu", "slow", "hub")
N_THREADS = "2"
CACHE = tempfile.TemporaryDirectory(prefix="llmft-cache-")  # What is measured of this machine is forgotten

sys.path.insert(0, str(Path(__file__).resolve().parent))
import outputs as stored_outputs  # noqa: E402


@dataclass
class Cell:
    "A code cell: where it stands, and what became of it."

    id: str
    source: str
    heading: str  # The nearest heading above it
    directives: dict[str, str]
    stored: list[dict[str, Any]]
    state: str = "not reached"  # then "ran", "failed" or "skipped"
    why: str = ""  # The directive it was skipped for, or the traceback
    seconds: float = 0.0
    outputs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def asserts(self) -> bool:
        "Whether the cell checks something."
        return is_asserting(self.source)

    @property
    def sized(self) -> str | None:
        "None, or the value of the mark `#| sized`."
        return self.directives.get("sized")


@dataclass
class Run:
    "A notebook with its code cells, before or after they ran."

    path: Path
    cells: list[Cell]
    seconds: float = 0.0
    trouble: str = ""  # What stopped the run; "" where it reached the end

    @property
    def stopped_at(self) -> Cell | None:
        "The cell the run failed in."
        return next((cell for cell in self.cells if cell.state == "failed"), None)


def is_asserting(source: str) -> bool:
    "Whether code holds an assert statement, or calls a `test_…` function or `expect_fail`."
    from IPython.core.inputtransformer2 import TransformerManager

    try:
        tree = ast.parse(TransformerManager().transform_cell(source))
    except SyntaxError:
        return re.search(r"^\s*(assert\b|test_\w+\(|with expect_fail)", source, re.MULTILINE) is not None
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name == "expect_fail" or name.startswith("test_"):
                return True
    return False


def last_heading(markdown: str) -> str:
    "The last heading of a markdown cell, as plain text; empty where it has none."
    prose = re.sub(r"^(`{3,}|~{3,}).*?^\1", "", markdown, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#{1,6} +(.+?)\s*#*$", prose, re.MULTILINE)
    if not headings:
        return ""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", headings[-1])
    return re.sub(r"[`*]", "", plain).replace("::", ":").strip()


def read_notebook(path: Path, force_flags: Sequence[str] = ()) -> Run:
    "The code cells of a notebook, with those nbdev would not run marked as skipped."
    from nbdev.process import NBProcessor
    from nbdev.test import nb_test_cells

    to_run = {cell.id for cell in nb_test_cells(path, skip_flags=SKIP_FLAGS, force_flags=list(force_flags))}
    heading, cells = path.stem, []
    for cell in NBProcessor(path, rm_directives=False).nb.cells:
        if cell.cell_type == "markdown":
            heading = last_heading(cell.source) or heading
        if cell.cell_type != "code":
            continue
        directives = dict(cell.directives_)
        made = Cell(cell.id, cell.source, heading, directives, [dict(output) for output in cell.outputs])
        if cell.id not in to_run:
            marks = [flag for flag in SKIP_FLAGS if flag in directives]
            made.state, made.why = "skipped", " ".join(marks) or "eval: false"
        cells.append(made)
    return Run(path, cells)


def execute(run: Run, env: Mapping[str, str], cell_timeout_s: int = 600) -> Run:
    "Run a notebook's cells in a fresh kernel and an empty working folder, up to the first that fails."
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="notebook-", ignore_cleanup_errors=True) as folder:
        temporary = Path(folder, "tmp")  # What lessons put aside goes with them
        temporary.mkdir()
        env = {**env, "IPYTHONDIR": folder, "MPLBACKEND": "", "TMPDIR": str(temporary)}
        asyncio.run(run_in_kernel(run, Path(folder), env, cell_timeout_s))
    run.seconds = time.monotonic() - started
    return run


async def run_in_kernel(run: Run, folder: Path, env: Mapping[str, str], cell_timeout_s: int) -> None:
    "Start a kernel, run the cells, and end the kernel whatever happens."
    import nbformat
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    home = folder / "nbs"
    home.mkdir()
    manager = AsyncKernelManager(transport="ipc", connection_file=str(folder / "kernel.json"))
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    manager._kernel_spec = KernelSpec(argv=[*command, "--HistoryManager.enabled=False"], display_name="Python")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.source) for cell in run.cells])
    client = NotebookClient(notebook, km=manager, timeout=cell_timeout_s, coalesce_streams=True)
    await manager.start_kernel(env=dict(env), cwd=str(home))
    try:
        await client.async_start_new_kernel_client()
        await run_cells(run, client)
    finally:  # also where somebody presses Ctrl-C
        if client.kc is not None:
            client.kc.stop_channels()
        await manager.shutdown_kernel(now=True)


async def run_cells(run: Run, client: Any) -> None:
    "Run the cells that are not skipped, up to the first that fails."
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    for index, cell in enumerate(run.cells):
        if cell.state == "skipped":
            continue
        began, executed = time.monotonic(), client.nb.cells[index]
        try:
            await client.async_execute_cell(executed, index)
            cell.state = "ran"
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            cell.state = "failed"
            cell.why = traceback_of(executed.outputs) or f"{type(error).__name__}: {error}"
        cell.seconds = time.monotonic() - began
        cell.outputs = json.loads(json.dumps(executed.outputs))
        if cell.state == "failed":
            run.trouble = f"stopped in a cell under “{cell.heading}”"
            return


def traceback_of(outputs: Sequence[Mapping[str, Any]]) -> str:
    "The traceback among a failed cell's outputs, without colours."
    lines = [line for output in outputs if output["output_type"] == "error" for line in output["traceback"]]
    return stored_outputs.ANSI.sub("", "\n".join(lines))


def environment(**changes: str | None) -> dict[str, str]:
    "This process's environment with the package importable, two threads unless told, and `changes`; None removes."
    env = dict(os.environ)
    env.setdefault("OMP_NUM_THREADS", N_THREADS)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH", "")]))
    env["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    env["TOKENIZERS_PARALLELISM"] = "false"
    env.setdefault("LLMFT_CACHE", CACHE.name)
    for name, value in changes.items():
        env.pop(name, None)
        if value is not None:
            env[name] = value
    return env


def cleaned(notebook: Any) -> Any:
    "A notebook as `nbdev-clean` leaves it; changed in place."
    from nbdev.clean import clean_nb

    clean_nb(notebook)
    return notebook


def as_stored(outputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    "A cell's outputs in the form they are stored in, so that two runs can be compared."
    from fastcore.nbio import dict2nb

    cell = {"cell_type": "code", "id": "0", "metadata": {}, "source": "", "execution_count": None}
    cell["outputs"] = stored_outputs.tidy(outputs)
    notebook = cleaned(dict2nb({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return [dict(output) for output in notebook.cells[0].outputs]


def store(run: Run) -> list[str]:
    "Write a run's outputs into its notebook, and say what is wrong with them; cells edited meanwhile keep theirs."
    from fastcore.nbio import read_nb, write_nb

    notebook = read_nb(run.path)
    ran = {cell.id: cell for cell in run.cells if cell.state == "ran"}
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.id in ran and cell.source == ran[cell.id].source:
            cell.outputs = as_stored(ran[cell.id].outputs)
            cell.execution_count = None
    write_nb(cleaned(notebook), run.path)
    return [
        f"{run.path.name}, “{cell.heading}”: {problem}"
        for cell in read_notebook(run.path).cells
        for problem in stored_outputs.problems(cell.stored)
    ]


def find(names: Sequence[str]) -> list[Path]:
    "The notebooks of these names (`03_strategy`, or a path), all of them where none is named."
    if not names:
        return sorted(NOTEBOOKS.glob("*.ipynb"))
    paths = [Path(name) if name.endswith(".ipynb") else NOTEBOOKS / f"{name}.ipynb" for name in names]
    for path in paths:
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in NOTEBOOKS.glob("*.ipynb")))
            sys.exit(f"no notebook {path}; there are: {known}")
    return paths


def seconds_table(seconds: Mapping[str, float]) -> str:
    "Notebooks with their seconds, one a line, and the sum."
    width = max((len(name) for name in seconds), default=0) + 2
    lines = [f"{name:<{width}}{value:8.1f} s" for name, value in sorted(seconds.items())]
    return "\n".join([*lines, f"{'all':<{width}}{sum(seconds.values()):8.1f} s"])


def known_seconds() -> dict[str, float]:
    "Seconds of the last run of each notebook in the student's size."
    return json.loads(SECONDS_FILE.read_text()) if SECONDS_FILE.is_file() else {}


def run_and_store(paths: Sequence[Path], force_flags: Sequence[str]) -> int:
    "Run notebooks in the student's size and store their outputs; the number of those that failed or are unclean."
    seconds, n_bad = {}, 0
    for path in paths:
        run = execute(read_notebook(path, force_flags), environment(IN_TEST=None), cell_timeout_s=3600)
        seconds[path.stem] = round(run.seconds, 1)
        if cell := run.stopped_at:
            n_bad += 1
            print(f"{path.name}: {run.trouble}; nothing stored\n\n{cell.source}\n\n{cell.why}\n", flush=True)
            continue
        for cell in run.cells:
            noise = "".join(
                stored_outputs.joined(output["text"]) for output in cell.outputs if output.get("name") == "stderr"
            )
            if noise.strip():
                print(f"{path.name}, “{cell.heading}”: not stored, on stderr: {noise.strip()[-300:]}", flush=True)
        found = store(run)
        n_bad += bool(found)
        print("\n".join([*found, f"{path.name}: {run.seconds:.1f} s"]), flush=True)
    SECONDS_FILE.parent.mkdir(exist_ok=True)
    SECONDS_FILE.write_text(json.dumps({**known_seconds(), **seconds}, indent=1, sort_keys=True) + "\n")
    print(f"\n{seconds_table(seconds)}")
    return n_bad


def main() -> None:
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    running = actions.add_parser("run", help="run notebooks in the student's size and store their outputs")
    running.add_argument("names", nargs="*", help="notebooks, for example 03_strategy; all where none is named")
    running.add_argument("--flags", default="", help="marks of cells to run as well, for example 'gpu slow'")
    actions.add_parser("table", help="print the seconds of the last runs")
    arguments = parser.parse_args()
    if arguments.action == "table":
        print(seconds_table(known_seconds()))
        return
    sys.exit(run_and_store(find(arguments.names), arguments.flags.split()) > 0)


if __name__ == "__main__":
    main()
