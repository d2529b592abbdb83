"""The runner of notebooks catches what it is there to catch, shown on small notebooks with planted faults."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import notebooks
import outputs
import pytest

ROOT = Path(__file__).resolve().parents[1]


def result(text: str) -> list[dict]:
    return [{"output_type": "execute_result", "metadata": {}, "execution_count": None, "data": {"text/plain": text}}]


def write_notebook(path: Path, *cells: tuple[str, list[dict]] | str) -> None:
    made = []
    for index, cell in enumerate(cells):
        if isinstance(cell, str):
            made.append({"cell_type": "markdown", "id": f"c{index}", "metadata": {}, "source": cell})
        else:
            source, shown = cell
            made.append(
                {"cell_type": "code", "id": f"c{index}", "metadata": {}, "execution_count": None}
                | {"source": source, "outputs": shown}
            )
    path.write_text(json.dumps({"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))


OFFLINE_CELL = """\
import socket
from fastcore.test import expect_fail
with expect_fail(OSError, contains="network is off"):
    socket.create_connection(("192.0.2.1", 80))
with expect_fail(OSError, contains="network is off"):
    socket.getaddrinfo("example.org", 80)
listener = socket.create_server(("127.0.0.1", 0))
socket.create_connection(listener.getsockname()).close()"""

SIZED_CELL = """\
#| sized
n_rows = 2 if os.environ.get("IN_TEST") else 4
for i in range(n_rows):
    print(f"step {i:>4}   loss {1 / (i + 1):.3f}")"""


SIZED_OUTPUT = "step    0   loss 1.000\nstep    1   loss 0.5\nstep   10   loss 0.091\n"


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    "The outcome of each case of the planted notebooks, and everything pytest printed."
    folder = tmp_path_factory.mktemp("planted")
    write_notebook(
        folder / "01_good.ipynb",
        "# Good",
        ("import os\nimport signal\nimport sys", []),
        "## Closed `form`",
        ("assert 1 + 1 == 2\n0.12345, 'took 3.2 s', 7", result("(0.1239, 'took 1 min 11 s', 7)")),
        ("print('noise', file=sys.stderr)\nassert os.listdir('.') == []", []),
        ("signal.signal(signal.SIGTERM, signal.SIG_DFL)\nassert os.environ['IN_TEST'] == '1'", []),
        "## Elsewhere",
        ("#| gpu\nassert False", result("'from a real run'")),
        ("#| eval: false\nassert False", []),
        (OFFLINE_CELL, []),
        (SIZED_CELL, [{"output_type": "stream", "name": "stdout", "text": SIZED_OUTPUT}]),
    )
    write_notebook(
        folder / "02_bad.ipynb",
        "# Bad",
        ("x = 1", []),
        "## Counting",
        ("assert x == 1", []),
        ("assert x == 2, 'x is not two'", []),
        "## After",
        ("assert True", []),
    )
    write_notebook(
        folder / "03_stale.ipynb",
        "# Stale",
        ("'now'", result("'before'")),
        ("3.0", result("3.5")),
        ("7", result("8")),
        ("'shown'", []),
        ("9", result("9") + [{"output_type": "stream", "name": "stderr", "text": "UserWarning: x"}]),
    )
    write_notebook(folder / "04_cleared.ipynb", "# Cleared", ("assert True\n'shown'", []))
    write_notebook(folder / "05_dies.ipynb", "# Dies", ("import os\nos._exit(1)", []), ("assert True", []))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ["PYTHONPATH"]])}
    command = [sys.executable, "-m", "pytest", str(folder), "-v", "--rootdir", str(folder), "-p", "no:cacheprovider"]
    command += ["-c", os.devnull, "-p", "surroundings", "-p", "notebook_runner"]
    printed = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300).stdout
    return dict(re.findall(r"^(\d.+?::.+?) (PASSED|FAILED|SKIPPED)\b", printed, re.MULTILINE)), printed


def test_each_asserting_cell_is_a_case_named_by_its_heading(verdicts):
    cases, _ = verdicts
    assert [name.partition("::")[2] for name in cases if name.startswith("01_good")] == [
        "Closed form [1]",
        "Closed form [2]",
        "Closed form [3]",
        "Elsewhere [1]",
        "Elsewhere [2]",
        "runs top to bottom",
        "stored outputs fresh or cleared",
    ]
    assert cases["01_good.ipynb::Elsewhere [1]"] == "SKIPPED"


def test_a_good_notebook_passes_offline_and_in_an_empty_folder(verdicts):
    cases, printed = verdicts
    assert {verdict for name, verdict in cases.items() if name.startswith("01_good")} == {"PASSED", "SKIPPED"}, printed


def test_a_failing_cell_shows_itself_and_later_ones_are_not_reached(verdicts):
    cases, printed = verdicts
    assert cases["02_bad.ipynb::Counting [1]"] == "PASSED"
    assert cases["02_bad.ipynb::Counting [2]"] == cases["02_bad.ipynb::After [1]"] == "FAILED"
    assert cases["02_bad.ipynb::runs top to bottom"] == "FAILED"
    assert "assert x == 2, 'x is not two'" in printed and "AssertionError: x is not two" in printed
    assert "not reached: 02_bad.ipynb stopped in a cell under “Counting”" in printed


def test_stale_and_unclean_outputs_are_named(verdicts):
    cases, printed = verdicts
    assert cases["03_stale.ipynb::stored outputs fresh or cleared"] == "FAILED"
    for words in ("-'before'", "+'now'", "-3.5", "-8", "stored none, run", "stderr"):
        assert words in printed


def test_a_cleared_notebook_is_legal(verdicts):
    assert verdicts[0]["04_cleared.ipynb::stored outputs fresh or cleared"] == "PASSED"


def test_a_dying_process_fails_its_own_notebook_only(verdicts):
    cases, printed = verdicts
    assert cases["05_dies.ipynb::runs top to bottom"] == "FAILED"
    assert "DeadKernelError" in printed and "os._exit(1)" in printed


def test_seconds_of_each_notebook_are_printed(verdicts):
    assert re.search(r"01_good +\d+\.\d s\n02_bad", verdicts[1])


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("assert x", True),
        ("test_eq(1, 1)", True),
        ("with expect_fail(ValueError):\n    f()", True),
        ("!ls\nassert x", True),
        ("x = 'assert y'", False),
        ("x = test_split", False),
        ("%matplotlib inline", False),
    ],
)
def test_asserting_cells(source, expected):
    assert notebooks.is_asserting(source) is expected


@pytest.mark.parametrize(
    ("stored", "fresh", "same"),
    [
        ("took 12.3 s", "took 4 ms", True),
        ("took 3 min 20 s", "took 1.2 h", True),
        ("{'seconds': 1.5, 'n': 3}", "{'seconds': 22.5, 'n': 3}", True),
        ("{'seconds': 1.5, 'n': 3}", "{'seconds': 22.5, 'n': 4}", False),
        ("|  9.9 s | x |", "| 10.1 s | x |", True),
        ("a  b", "a b", False),
        ("0.500", "0.511", True),
        ("0.500", "0.512", False),
        ("1234.5", "1240.1", True),
        ("1e-3", "1.1e-3", True),
        ("-0.5", "0.5", False),
        ("3,080 rows", "3,081 rows", False),
        ("12 steps", "13 steps", False),
        ("sha 3fa2b1", "sha 3fa2b2", False),
        ("top2", "top3", False),
        ("avoid", "safe", False),
    ],
)
def test_what_counts_as_equal(stored, fresh, same):
    assert (outputs.difference(result(stored), result(fresh)) == "") is same


@pytest.mark.parametrize(
    ("stored", "fresh", "same"),
    [
        ("accuracy 93.1 % of 3,080", "accuracy 50 % of 12", True),
        ("[1, 2, 3]", "[1]", True),
        ("name  loss\n───────\nfull  1.25", "name loss\n───\nfull 12.5", True),
        ("full wins by 3", "top wins by 3", False),
    ],
)
def test_what_counts_as_equal_in_another_size(stored, fresh, same):
    assert (outputs.difference(result(stored), result(fresh), "") == "") is same
    assert outputs.difference(result(stored), result(fresh), "words") == ""
    assert outputs.difference(result(stored), [], "words") != ""


@pytest.mark.parametrize(
    "text",
    [
        "saved in /tmp/x/model",
        "FutureWarning: gone",
        " 42%|████      | 42/100",
        "100 it/s]",
        "2026-11-23 20:15",
        "<f at 0x7f12ab34cd>",
    ],
)
def test_unclean_text_is_named(text):
    assert outputs.problems(result(text))


@pytest.mark.parametrize("text", ["and/or", "a/tmp/b", "12 % of 3", "https://x.org/home/y", "F1 0.93", "2026-11-23"])
def test_clean_text_passes(text):
    assert outputs.problems(result(text)) == []


def test_large_pictures_are_named():
    picture = {"output_type": "display_data", "metadata": {}, "data": {"image/png": "A" * 200_000}}
    assert "150,000 bytes" in outputs.problems([picture])[0]
    assert outputs.difference([picture], [{**picture, "data": {"image/png": "B" * 100}}]) == ""
