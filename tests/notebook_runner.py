"""A pytest plugin: notebooks are test files, and each of their asserting cells is a test case.

A notebook runs once, when the first of its cases is asked for: top to bottom, in a fresh process, in its miniature
size (`IN_TEST=1`), with the network off and an empty temporary folder to work in. Its cases are

- one for each cell that asserts something, named by the nearest heading above it and counted below that heading,
- `runs top to bottom`,
- `stored outputs fresh or cleared`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import notebooks
import outputs

CELL_TIMEOUT_S = 300
SECONDS: dict[str, float] = {}  # By notebook


class Failure(Exception):
    "A case's verdict in words; shown without a traceback of this plugin."


class NotebookFile(pytest.File):
    "A notebook."

    run: notebooks.Run
    is_run = False

    def collect(self) -> Iterator[pytest.Item]:
        self.run = notebooks.read_notebook(self.path)
        counts: Counter[str] = Counter()
        for cell in self.run.cells:
            if cell.asserts and cell.why != "eval: false":
                counts[cell.heading] += 1
                yield CellCase.from_parent(self, name=f"{cell.heading} [{counts[cell.heading]}]", cell=cell)
        if self.run.cells:
            yield WholeCase.from_parent(self, name="runs top to bottom")
            yield FreshCase.from_parent(self, name="stored outputs fresh or cleared")

    def finished(self) -> notebooks.Run:
        "The notebook after its one run."
        if not self.is_run:
            self.is_run = True
            notebooks.execute(self.run, notebooks.environment(IN_TEST="1"), CELL_TIMEOUT_S)
        return self.run


class NotebookCase(pytest.Item):
    "One thing a notebook's run shows."

    parent: NotebookFile

    def runtest(self) -> None:
        run = self.parent.finished()
        self.user_properties.append(("seconds of the notebook", run.seconds))
        self.judge(run)

    def judge(self, run: notebooks.Run) -> None:
        "Raise a `Failure` where the run shows a fault."
        raise NotImplementedError

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, f"{self.path.stem}: {self.name}"

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: str | None = None) -> str:
        return str(excinfo.value) if isinstance(excinfo.value, Failure) else str(super().repr_failure(excinfo, style))


class CellCase(NotebookCase):
    "A cell whose asserts hold."

    def __init__(self, *, cell: notebooks.Cell, **arguments: object) -> None:
        super().__init__(**arguments)
        self.cell = cell
        if cell.state == "skipped":
            self.add_marker(pytest.mark.skip(reason=f"cells marked {cell.why} do not run under test"))

    def judge(self, run: notebooks.Run) -> None:
        if self.cell.state == "failed":
            raise Failure(f"this cell of {self.path.name} failed:\n\n{self.cell.source}\n\n{self.cell.why}")
        if self.cell.state == "not reached":
            raise Failure(f"not reached: {self.path.name} {run.trouble}")


class WholeCase(NotebookCase):
    "The run reaches the notebook's end."

    def judge(self, run: notebooks.Run) -> None:
        cell = run.stopped_at
        if cell and cell.asserts:
            raise Failure(f"{self.path.name} {run.trouble}; the cell's own case shows it")
        if cell:
            raise Failure(f"{self.path.name} {run.trouble}:\n\n{cell.source}\n\n{cell.why}")


class FreshCase(NotebookCase):
    "What is stored is what the run gave, or the whole notebook is cleared."

    def judge(self, run: notebooks.Run) -> None:
        found = unclean(run) + stale(run)
        if found:
            raise Failure("\n\n".join(found))


def unclean(run: notebooks.Run) -> list[str]:
    "What must not be stored, by cell; cells that do not run under test are looked at too."
    return [
        f"{run.path.name}, “{cell.heading}”: stores {problem}"
        for cell in run.cells
        for problem in outputs.problems(cell.stored)
    ]


def stale(run: notebooks.Run) -> list[str]:
    "Cells whose stored outputs differ from the run's, each with a short difference."
    if run.trouble:
        return [f"cannot be told: {run.path.name} {run.trouble}"]
    if not any(cell.stored for cell in run.cells if cell.state == "ran"):
        return []
    found = []
    for cell in run.cells:
        if cell.state == "ran":
            different = outputs.difference(cell.stored, notebooks.as_stored(cell.outputs), cell.sized)
            if different:
                first_line = next((line for line in cell.source.splitlines() if not line.startswith("#|")), "")
                found.append(f"{run.path.name}, “{cell.heading}”, the cell `{first_line}` is stale:\n{different}")
    if found:
        found.append(f'mend: make notebooks NB="{run.path.stem}"')
    return found


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> NotebookFile | None:
    if file_path.suffix == ".ipynb" and ".ipynb_checkpoints" not in file_path.parts:
        return NotebookFile.from_parent(parent, path=file_path)
    return None


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    "Also where the tests run in other processes, reports come here."
    for name, seconds in report.user_properties:
        if name == "seconds of the notebook":
            SECONDS[Path(report.nodeid.partition("::")[0]).stem] = float(seconds)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if SECONDS:
        terminalreporter.section("seconds of each notebook, in its miniature size")
        terminalreporter.write_line(notebooks.seconds_table(dict(sorted(SECONDS.items()))))
