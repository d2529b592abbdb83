"""A run made again from its record: the same bits, or a word beforehand why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small import small_rows, write_jsonl
from typer.testing import CliRunner

from llmft_nb.cli import app
from llmft_nb.core import UserError
from llmft_nb.finetune import finetune
from llmft_nb.repeat import OF_PHASES, read_recipe

SAME = ("model/model.safetensors", "metrics.jsonl", "test_predictions.jsonl")


def files_of(folder: Path, task: str) -> dict[str, str]:
    "Rows of a task in three files."
    rows: list[dict[str, Any]] = small_rows(130)
    if task == "tag":
        words = [row["text"].split() for row in rows]
        rows = [{"tokens": one, "ner_tags": ["B-n" if word.isdigit() else "O" for word in one]} for one in words]
    if task == "instruct":
        rows = [{"question": row["text"], "answer": f"a {row['label']}"} for row in rows]
    parts = {"data": rows[:70], "valid": rows[70:100], "test": rows[100:]}
    return {name: str(write_jsonl(folder / f"{name}.jsonl", part)) for name, part in parts.items()}


def run(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize(
    ("task", "strategy", "own"),
    [
        ("classify", "head", []),
        ("classify", "gradual", ["--leaks", "allow", "--class-weights", "balanced", "--seed", "3"]),
        ("tag", "top:1", ["--micro-batch-size", "4"]),
        (
            "instruct",
            "lora:2",
            ["--columns", "question=prompt", "--columns", "answer=completion", "--system", "Be brief."],
        ),
    ],
)
def test_the_same_bits(task: str, strategy: str, own: list[str], small_model: Path, tmp_path: Path) -> None:
    files = [word for name, file in files_of(tmp_path, task).items() for word in (f"--{name}", file)]
    common = ["--model", small_model, "--epochs", "2", "--precision", "f32", "--max-length", "128"]
    common += ["--n-written", "4", "--max-new-tokens", "4"] if task == "instruct" else []
    told = run("train", *files, *common, "--task", task, "--strategy", strategy, *own, "--out", tmp_path / "first")
    assert told.exit_code == 0, told.stderr
    record = tmp_path / "first" / "run.json"
    told = run("train", "--from-report", record, *files, "--model", small_model, "--out", tmp_path / "again")
    assert told.exit_code == 0, told.stderr
    for name in SAME:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "first" / name).read_bytes(), name
    found = [json.loads((tmp_path / name / "run.json").read_text(encoding="utf-8")) for name in ("first", "again")]
    for name in ("scores", "settings", "fingerprint", "task"):
        assert found[0][name] == found[1][name], name
    own_words = {name for name, origin in found[1]["origins"].items() if origin == "default"}
    assert own_words <= set(OF_PHASES)


def test_shipped_data_and_base_need_nothing_else(tmp_path: Path) -> None:
    told = run(
        "train", "--data", "pharmacy-reviews", "--strategy", "head", "--epochs", "1", "--out", tmp_path / "first"
    )
    assert told.exit_code == 0, told.stderr
    told = run("train", "--from-report", tmp_path / "first", "--out", tmp_path / "again")
    assert told.exit_code == 0, told.stderr
    for name in SAME:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "first" / name).read_bytes(), name


@pytest.fixture
def first(small_model: Path, tmp_path: Path) -> tuple[Path, dict[str, str]]:
    "A finished run, and the files of its rows."
    files = files_of(tmp_path, "classify")
    held_out = {name: files[name] for name in ("valid", "test")}
    made = finetune(files["data"], model=small_model, out=tmp_path / "first", epochs=1, callbacks=(), **held_out)  # type: ignore[arg-type]
    return made.folder, files


def test_other_rows_or_another_base_are_refused(
    first: tuple[Path, dict[str, str]], small_model: Path, save_small: Any, tmp_path: Path
) -> None:
    folder, files = first
    words = ["train", "--from-report", folder / "run.json", "--out", tmp_path / "again"]
    words += ["--valid", files["valid"], "--test", files["test"]]
    other = write_jsonl(tmp_path / "other.jsonl", small_rows(70, seed=4))
    told = run(*words, "--data", other, "--model", small_model)
    assert (
        told.exit_code == 2 and "train: was " in told.stderr and "valid" not in told.stderr.split("train: was")[1][:99]
    )
    told = run(*words, "--data", files["data"], "--model", save_small("Llama", initializer_range=0.04))
    assert told.exit_code == 2 and "model: was " in told.stderr
    assert not (tmp_path / "again").exists(), "nothing is written before"
    told = run(*words, "--data", other, "--model", small_model, "--allow", "train")
    assert told.exit_code == 0, told.stderr


def test_what_the_record_does_not_have_is_asked_for(first: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    folder, files = first
    told = run("train", "--from-report", folder, "--out", tmp_path / "again")
    assert told.exit_code == 2 and "--data" in told.stderr and "no folders" in told.stderr
    told = run("train", "--from-report", folder, "--data", files["data"], "--out", tmp_path / "again")
    assert told.exit_code == 2 and "--model" in told.stderr


def test_a_flag_wins_and_is_seen(first: tuple[Path, dict[str, str]], small_model: Path, tmp_path: Path) -> None:
    folder, files = first
    words = [word for name, file in files.items() for word in (f"--{name}", file)]
    told = run(
        "train", "--from-report", folder, *words, "--model", small_model, "--lr", "0.001", "--out", tmp_path / "again"
    )
    assert told.exit_code == 0, told.stderr
    record = json.loads((tmp_path / "again" / "run.json").read_text(encoding="utf-8"))
    assert (record["settings"]["lr"], record["origins"]["lr"]) == (0.001, "argument")


def test_another_machine_is_told(
    first: tuple[Path, dict[str, str]], small_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, files = first
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    record["environment"] |= {"threads": 99, "torch": "0.1"}
    (tmp_path / "run.json").write_text(json.dumps(record))
    words = [word for name, file in files.items() for word in (f"--{name}", file)]
    with caplog.at_level("WARNING", "llmft_nb"):
        run(
            "train", "--from-report", tmp_path / "run.json", *words, "--model", small_model, "--out", tmp_path / "again"
        )
    assert "threads: 99 then" in caplog.text and "torch: 0.1 then" in caplog.text


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"settings": {}}', None])
def test_no_record(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError) as caught:
        read_recipe(tmp_path / "run.json")
    assert "run.json" in caught.value.mend
    assert run("train", "--from-report", tmp_path / "run.json").exit_code == 2
