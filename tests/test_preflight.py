"""What is looked at before the first step, and who decides about it."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from small import small_rows, write_jsonl
from typer.testing import CliRunner

from llmft_nb.cli import app
from llmft_nb.core import UserError, read_record
from llmft_nb.finetune import finetune
from llmft_nb.preflight import FINDINGS, check_labels, check_leaks, check_rows, stop_at
from llmft_nb.rejects import Rejects
from llmft_nb.rows import read_rows
from llmft_nb.splits import prepare_splits


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    "Rows of which one is there twice, one twice with two labels, and one is held out too."
    rows = small_rows(130)
    train = [*rows[:66], rows[0], rows[1] | {"label": "tool"}, rows[70]]
    return {
        name: write_jsonl(tmp_path / f"{name}.jsonl", part)
        for name, part in (("train", train), ("valid", rows[66:98]), ("test", rows[98:]))
    }


def options(files: dict[str, Path], model: Path, out: Path) -> dict[str, Any]:
    return {"valid": files["valid"], "test": files["test"], "model": model, "out": out, "epochs": 1, "callbacks": ()}


def warnings_of(folder: Path) -> dict[str, str]:
    return {check["name"]: check["words"] for check in read_record(folder).checks if check["status"] == "warning"}


def test_a_run_tells_and_goes_on(files: dict[str, Path], small_model: Path, tmp_path: Path) -> None:
    run = finetune(files["train"], **options(files, small_model, tmp_path / "run"))
    found = warnings_of(run.folder)
    assert found["copies"] == "2 of 68 rows repeat a text", "the leak was left out before"
    assert found["contradictions"] == "1 text with two answers, first train.jsonl:2 and train.jsonl:68"
    assert found["leaks"].startswith(
        "1 row held out too, 1 training row left out (first train.jsonl:69 is valid.jsonl:5"
    )
    assert found["few-rows"].startswith("train 68, valid 32, test 32; 1 left out as leaks; scores may be off")
    assert "valid by 17 points, test by 17 points" in found["few-rows"]
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "Looked at before the first step" in page and "1 text with two answers" in page


def test_strict_refuses_before_anything_is_written(files: dict[str, Path], small_model: Path, tmp_path: Path) -> None:
    given = options(files, small_model, tmp_path / "run")
    with pytest.raises(UserError) as caught:
        finetune(files["train"], strict=True, **given)
    for name in ("copies", "contradictions", "leaks", "few-rows"):
        assert f"\n  {name}: " in caught.value.what and f"--allow {name}" in caught.value.mend
    assert not (tmp_path / "run").exists()
    allow = [word for word in caught.value.mend.split() if word in FINDINGS]
    with pytest.raises(UserError, match="contradictions: ") as caught:
        finetune(files["train"], strict=True, allow=[name for name in allow if name != "contradictions"], **given)
    assert "copies: " not in caught.value.what
    run = finetune(files["train"], strict=True, allow=allow, **given)
    assert run.record.status == "finished" and set(warnings_of(run.folder)) == set(allow)


def test_sound_rows_pass(small_model: Path, tmp_path: Path) -> None:
    rows = small_rows(330)
    files = {"valid": rows[66:196], "test": rows[196:]}
    run = finetune(
        rows[:66],
        strict=True,
        allow=["near-leaks"],
        **options(files, small_model, tmp_path / "run"),  # type: ignore[arg-type]
    )
    assert set(warnings_of(run.folder)) <= {"near-leaks"}


def test_the_command_and_its_configuration(files: dict[str, Path], small_model: Path, tmp_path: Path) -> None:
    command = ["train", "--data", files["train"], "--valid", files["valid"], "--test", files["test"], "--epochs", "1"]
    command += ["--model", small_model, "--out", tmp_path / "run"]
    told = CliRunner().invoke(app, [*map(str, command), "--strict"])
    assert told.exit_code == 2 and "copies: 2 of 68 rows repeat a text" in told.stderr
    assert "--allow copies" in told.stderr and "Traceback" not in told.output
    names = [word for word in told.stderr.split("mend: ")[1].split() if word in FINDINGS]
    (tmp_path / "train.json").write_text(json.dumps({"strict": True, "allow": names[:-1]}))
    told = CliRunner().invoke(app, [*map(str, command), "--config", str(tmp_path / "train.json")])
    assert told.exit_code == 2 and f"{names[-1]}: " in told.stderr and f"{names[0]}: " not in told.stderr
    (tmp_path / "train.json").write_text(json.dumps({"strict": True, "allow": names}))
    told = CliRunner().invoke(app, [*map(str, command), "--config", str(tmp_path / "train.json")])
    assert told.exit_code == 0, told.stderr
    told = CliRunner().invoke(app, [*map(str, command), "--allow", "copys"])
    assert told.exit_code == 2 and "did you mean copies" in told.stderr


def test_a_person_sees_the_table(files: dict[str, Path], small_model: Path, tmp_path: Path) -> None:
    command = ["train", "--data", files["train"], "--valid", files["valid"], "--test", files["test"], "--epochs", "1"]
    command = [*map(str, command), "--model", str(small_model), "--out", str(tmp_path / "run")]
    mine, theirs = pty.openpty()
    code = "from llmft_nb.cli import main; main()"
    environment = os.environ | {"COLUMNS": "160", "TERM": "xterm"}
    with subprocess.Popen([sys.executable, "-c", code, *command], stderr=theirs, stdout=-3, env=environment) as process:
        os.close(theirs)
        told = b""
        while True:
            try:
                part = os.read(mine, 65536)
            except OSError:
                break
            told += part
            if not part:
                break
    assert process.returncode == 0
    text = told.decode()
    assert text.index("contradictions") < text.index("1 text with two answers") and "decide which is right" in text
    assert "2 of 68 rows repeat a text" in text


@pytest.mark.parametrize("strategy", ["full", "head"])
def test_a_number_that_is_none_ends_a_run_before_it_begins(
    strategy: str, files: dict[str, Path], small_model: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(small_model, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if "up_proj" in name)
    weights[name][0, 0] = float("inf")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"weights: 1 numbers of .*up_proj.* are not finite"):
        finetune(files["train"], strategy=strategy, **options(files, model, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_rows_that_are_set_aside_or_cut(small_model: Path, tmp_path: Path) -> None:
    rows: list[Any] = small_rows(330)
    train = write_jsonl(tmp_path / "train.jsonl", [*rows[:66], '{"text": "cut'])
    files = {"valid": rows[66:196], "test": rows[196:]}
    given: dict[str, Any] = options(files, small_model, tmp_path / "run") | {"bad_rows": "quarantine", "max_length": 9}  # type: ignore[arg-type]
    with pytest.raises(UserError) as caught:
        finetune(train, strict=True, **given)
    assert "set-aside: 1 row set aside" in caught.value.what and "cut-rows: " in caught.value.what
    assert not (tmp_path / "run").exists()


def test_labels_and_sizes_are_counted() -> None:
    rows = read_rows([*({"text": f"a {i}", "label": "x"} for i in range(9)), {"text": "b", "label": "y"}])
    (found,) = check_labels(rows)
    assert (found.name, found.words) == ("few-labels", "2: x 9 times, y 1 times; 1 label with fewer than 5 rows")
    splits = prepare_splits(small_rows(40), valid=small_rows(30, 1), test=small_rows(30, 2), leaks="allow")
    names = [check.name for check in check_rows(splits, Rejects(), 64)]
    assert names[0] == "few-rows" and "set-aside" not in names
    assert "not one whole step of 64" in next(check_rows(splits, None, 64)).words
    assert list(check_leaks(None)) == []


def test_every_warning_can_be_allowed_by_its_name(files: dict[str, Path], small_model: Path, tmp_path: Path) -> None:
    run = finetune(files["train"], **options(files, small_model, tmp_path / "run"))
    assert set(warnings_of(run.folder)) <= set(FINDINGS)
    stop_at([], strict=True)


def test_the_check_of_rows_can_end_a_pipeline(files: dict[str, Path]) -> None:
    command = ["check", str(files["train"]), str(files["valid"])]
    assert CliRunner().invoke(app, command).exit_code == 0
    told = CliRunner().invoke(app, [*command, "--strict"])
    assert told.exit_code == 2 and "copies: 2 training rows repeat another" in told.stderr
    assert "contradictions: 1 texts with two answers" in told.stderr and "leaks: 1 rows held out" in told.stderr
    assert "copies " in told.stdout, "what was found is shown all the same"
    names = [word for word in told.stderr.split("mend: ")[1].split() if word in FINDINGS]
    assert "near-copies" in names
    allow = [part for name in names for part in ("--allow", name)]
    assert CliRunner().invoke(app, [*command, "--strict", *allow]).exit_code == 0
    told = CliRunner().invoke(app, [*command, "--strict", *allow[2:], "--json"])
    assert told.exit_code == 2 and json.loads(told.stderr)["error"]["mend"].endswith(f"--allow {names[0]}")
    told = CliRunner().invoke(app, [*command, "--allow", "lr"])
    assert told.exit_code == 2 and "this cannot be allowed" in told.stderr


def test_a_full_disk_is_on_the_table(
    files: dict[str, Path], small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"(?s)this run should not begin:\n  disk: the disk is too full.*make room"):
        finetune(files["train"], **options(files, small_model, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
