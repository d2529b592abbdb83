"""The short form of `make torture`: some cases of each figure, and the torture itself broken on purpose.

What is not here is whole in other modules: R1 with its kills and R2 and R3 in `test_resume`, R9 in `test_guards`, D2
in `test_cleaning`, S1 in `test_model_gate`, S3 in `test_browser` and `test_chat_page`, V1 to V5 in `test_serving`.
S4 is every test run: `surroundings` switches the network off.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torture
import torture_files
import torture_runs

from llmft_nb.core import UserError


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    return tmp_path_factory.mktemp("torture")


# --- the cases ---


@pytest.mark.parametrize("block", range(20))
def test_damaged_files(block: int, tmp_path: Path) -> None:
    "D1: a hundred files a block."
    assert torture.mutated_files(block, tmp_path, tmp_path) == ""


@pytest.mark.parametrize("number", range(5, 216, 30))
def test_resumed_in_each_way(number: int, shared: Path, tmp_path: Path) -> None:
    "R4."
    assert torture_runs.resumed(number, shared, tmp_path) == ""


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounts a disk")
@pytest.mark.parametrize("number", [0, 7, 16, 29])
def test_full_disk_of_so_much(number: int, shared: Path, tmp_path: Path) -> None:
    "R5."
    told = torture_runs.full_disk(number, shared, tmp_path)
    if "no disk may be mounted" in told:
        pytest.skip(told)
    assert told == ""


@pytest.mark.parametrize("number", [1, 5, 6])
def test_terminated_at_some_instant(number: int, shared: Path, tmp_path: Path) -> None:
    "R6, one of each task and each strategy."
    assert torture_runs.terminated(number, shared, tmp_path) == ""


def test_run_again_elsewhere(shared: Path, tmp_path: Path) -> None:
    "R7."
    assert torture_runs.rerun(1, shared, tmp_path) == ""


@pytest.mark.parametrize("number", [6, 8, 10])
def test_a_secret_somewhere(number: int, shared: Path, tmp_path: Path) -> None:
    "S2: in the environment, on the command line, in a configuration."
    assert torture_runs.kept_secret(number, shared, tmp_path) == ""


# --- the torture itself ---


def test_it_says_what_it_would_catch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "A reader that lets something pass is noticed: each of these mends undone turns some files red."
    from llmft_nb import formats

    def wrongs() -> int:
        return sum(bool(torture_files.run_case(seed, tmp_path)) for seed in range(600))

    assert wrongs() == 0
    for name, lax in (
        ("STRICT_JSON", json.JSONDecoder()),
        ("check_value", lambda value, depth=0: None),
        ("MAX_DEPTH", 19),
        ("table_row", lambda header, cells: dict(zip(header, cells, strict=False)) or {"text": ""}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(formats, name, lax)
            assert wrongs() > 0, name


def figure(run: Any, n_cases: int = 4, limit_s: float = 30) -> torture.Figure:
    return torture.Figure("X1", "something", n_cases, run, limit_s)


def fails_at_two(number: int, shared: Path, folder: Path) -> str:
    (shared / f"seen-{number}").touch()
    return "it is two" if number == 2 else ""


def test_every_failing_case_is_told_with_its_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = torture.Journal(tmp_path / "journal.jsonl")
    assert not torture.torture([figure(fails_at_two)], journal, tmp_path / "shared", again=False)
    told = capsys.readouterr().out
    assert "X1, case 2: it is two" in told and "--figures X1 --case 2" in told
    assert [line["case"] for line in map(json.loads, journal.file.read_text().splitlines())] == [0, 1, 2, 3]
    size = journal.file.stat().st_size
    assert not torture.torture([figure(fails_at_two)], journal, tmp_path / "shared", again=False)
    assert journal.file.stat().st_size == size, "nothing is played twice"
    assert torture.torture([figure(lambda *_: "")], journal, tmp_path / "shared", again=True)
    assert len(journal.of("X1")) == 4, "but what failed, where that is wanted"


def dies_or_hangs(number: int, shared: Path, folder: Path) -> str:
    if number == 1:
        os.kill(os.getpid(), 9)
    if number == 2:
        time.sleep(60)
    if number == 3:
        raise UserError("a fault of the case")
    return ""


def test_who_dies_or_hangs_is_a_case_that_failed(tmp_path: Path) -> None:
    journal = torture.Journal(tmp_path / "journal.jsonl")
    assert not torture.torture([figure(dies_or_hangs, 5, limit_s=2)], journal, tmp_path / "shared", again=False)
    wrong = {number: line["wrong"] for number, line in journal.of("X1").items()}
    assert wrong[0] == wrong[4] == "" and "died (-9)" in wrong[1] and wrong[2] == "it hung"
    assert "a fault of the case" in wrong[3]


def test_other_code_is_tried_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = torture.Journal(tmp_path / "journal.jsonl")
    journal.add("X1", 0, "", 0.0)
    assert set(journal.of("X1")) == {0}
    monkeypatch.setattr(torture, "code_fingerprint", lambda: "other")
    assert torture.Journal(tmp_path / "journal.jsonl").of("X1") == {}


def test_the_figures_are_as_many_as_was_promised() -> None:
    n_cases = {figure.id: figure.n_cases for figure in torture.figures()}
    assert n_cases["R1"] == 200 and n_cases["R5"] == 30 and n_cases["R6"] == n_cases["R8"] == 50
    assert n_cases["R7"] == 10 and n_cases["D1"] * 100 == 10_000 and n_cases["S1"] >= 40 and n_cases["S2"] == 12
    assert n_cases["V1"] * 500 == 10_000 and {"V2", "V3", "V4", "V5"} <= set(n_cases)
    assert n_cases["R4"] == 27 * len(torture_runs.WAYS) and n_cases["R3"] == 3 * 23
