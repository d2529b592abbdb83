"""Damaged rows are set aside with their reasons, whatever the task, and the others are used."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small import small_rows, write_jsonl
from typer.testing import CliRunner

from llmft_nb.cli import app
from llmft_nb.core import UserError
from llmft_nb.finetune import finetune
from llmft_nb.hparams import TrainSettings
from llmft_nb.planning import plan
from llmft_nb.rejects import Rejects, read_sound, rejects_of
from llmft_nb.rows import check_classify, read_rows
from llmft_nb.streams import stream_texts
from llmft_nb.tasks import make_task

SOUND: dict[str, Callable[[int], dict[str, Any]]] = {
    "classify": lambda i: {"text": f"a text of number {i}", "label": "even" if i % 2 else "odd"},
    "tag": lambda i: {"tokens": ["number", str(i)], "ner_tags": ["O", "B-N"]},
    "instruct": lambda i: {"prompt": f"what is {i}?", "completion": f"it is {i}"},
    "text": lambda i: {"text": f"a text of number {i}"},
}
DAMAGED: dict[str, list[Any]] = {
    "classify": [{"text": "", "label": "odd"}, {"text": "no label"}, {"text": 3, "label": ["odd"]}],
    "tag": [{"tokens": ["one"], "ner_tags": ["O", "O"]}, {"tokens": [], "ner_tags": []}, {"tokens": ["one"]}],
    "instruct": [{"prompt": "and?"}, {"prompt": "", "completion": "yes"}, {"messages": [{"role": "nobody"}]}],
    "text": [{"content": "elsewhere"}, {"text": 3}, {"text": ["a", "b"]}],
}
LINES = ['{"text": "cut o', "[1]", '{"text": NaN}', "null"]


@pytest.mark.parametrize("task", SOUND)
def test_every_damaged_row_is_set_aside_once(task: str, tmp_path: Path) -> None:
    rows: list[Any] = [SOUND[task](i) for i in range(60)]
    bad = [*DAMAGED[task], *LINES]
    for place, one in enumerate(bad):
        rows.insert(7 * place + 3, one)
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    places = [f"train.jsonl:{rows.index(one) + 1}" for one in bad]
    learnt, rejects = make_task(task, TrainSettings()), Rejects()
    with pytest.raises(UserError):
        splits = learnt.prepare(path, None, None, columns=None, leaks="drop")
        list(splits.train)
    splits = learnt.prepare(path, None, None, columns=None, leaks="drop", rejects=rejects)
    n_kept = sum(1 for name in ("train", "valid", "test") for _ in getattr(splits, name))
    assert n_kept == 60, "no sound row is lost"
    assert sorted(rejects.lines) == sorted(places) and all(line["reason"] for line in rejects.lines.values())
    rejects.write(tmp_path / "rejects.jsonl")
    kept = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["place"] for line in kept] == list(rejects.lines)
    cut = next(line for line in kept if line["content"] == LINES[0])
    assert "cut off" in cut["reason"]
    assert "rows set aside: " in rejects.describe()


@pytest.mark.parametrize(
    ("name", "content", "place", "reason", "kept"),
    [
        ("a.csv", "text,label\none,a\ntwo,b,c\nthree,b\n", "a.csv:3", "3 cells", "two,b,c"),
        ("a.json", '[{"text": "one", "label": "a"},\n {},\n {"text": "two", "label": "b"}]', "a.json:2", "empty", "{}"),
        (
            "a.jsonl",
            '{"text": "one", "label": "a"}\n{"text": "c\xe9", \n{"text": "two", "label": "b"}\n',
            "a.jsonl:2",
            "cut",
            '{"text": "cé", ',
        ),
    ],
)
def test_what_was_written_is_kept(name: str, content: str, place: str, reason: str, kept: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    rejects = Rejects()
    assert len(read_rows(tmp_path / name, aside=rejects.take)) == 2
    assert list(rejects.lines) == [place] and reason in rejects.lines[place]["reason"]
    assert rejects.lines[place]["content"] == kept


def test_bytes_that_are_no_text_are_kept_readable(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": "caf\xe9"}\n')
    rejects = Rejects()
    read_rows(tmp_path / "a.jsonl", aside=rejects.take)
    assert rejects.lines["a.jsonl:2"]["content"] == '{"text": "caf\\xe9"}'


def test_a_run_and_a_plan_go_on_without_them(small_model: Path, small_files: Path, tmp_path: Path) -> None:
    lines = (small_files / "train.jsonl").read_text(encoding="utf-8").splitlines()
    sound = write_jsonl(tmp_path / "sound.jsonl", lines)
    spoilt = write_jsonl(tmp_path / "train.jsonl", [*lines[:5], LINES[0], {"text": "", "label": "sea"}, *lines[5:]])
    options: dict[str, Any] = {"model": small_model, "epochs": 1, "precision": "f32"}
    options |= {name: small_files / f"{name}.jsonl" for name in ("valid", "test")}
    with pytest.raises(UserError, match=r"train.jsonl:6"):
        finetune(spoilt, out=tmp_path / "refused", **options)
    assert not (tmp_path / "refused").exists()
    run = finetune(spoilt, out=tmp_path / "run", bad_rows="quarantine", callbacks=(), **options)
    assert run.record.data["n_rejected"] == 2 and "2 rows set aside" in run.record.notes[0]
    assert len((run.folder / "rejects.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    assert "2 rows set aside" in (run.folder / "report.html").read_text(encoding="utf-8")
    assert "2 rows set aside" in (run.folder / "README.md").read_text(encoding="utf-8")
    other = finetune(sound, out=tmp_path / "other", callbacks=(), **options)
    assert other.record.fingerprint["train"] == run.record.fingerprint["train"] and other.record.notes == []
    assert not (other.folder / "rejects.jsonl").exists()
    planned = plan(spoilt, bad_rows="quarantine", strategy="head", **options)
    assert planned.n_rows == run.record.data["n_train"]


def test_what_cannot_be_done(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown choice 'skip'.*error or quarantine"):
        rejects_of("skip")
    path = write_jsonl(tmp_path / "train.jsonl", [{"text": "", "label": "a"}, {"text": " ", "label": "b"}])
    with pytest.raises(UserError, match=r"every row is damaged.*text is empty"):
        make_task("classify", TrainSettings()).prepare(path, None, None, columns=None, leaks="drop", rejects=Rejects())


def test_the_check_sets_aside_too(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [*small_rows(20), LINES[0], {"text": "x"}])
    told = CliRunner().invoke(app, ["check", str(path)])
    assert told.exit_code == 2 and "train.jsonl:21" in told.stderr
    told = CliRunner().invoke(app, ["check", str(path), "--rejects", str(tmp_path / "rejects.jsonl")])
    assert told.exit_code == 0 and "2 rows set aside" in told.stdout
    assert len((tmp_path / "rejects.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    told = CliRunner().invoke(app, ["check", str(path), "--bad-rows", "quarantine", "--json"])
    assert "2 rows set aside" in json.loads(told.stdout)["findings"]["set aside"]


def test_lines_and_fields_are_told_in_the_order_of_the_file(tmp_path: Path) -> None:
    rows: list[Any] = [{"text": "one", "label": "a"}, {"text": "", "label": "b"}, '{"text": "cut', {"text": "x"}, "[1]"]
    path = write_jsonl(tmp_path / "train.jsonl", rows * 3)
    with pytest.raises(UserError, match="12 problems, 6 damaged lines and 6 wrong fields") as caught:
        read_sound(path, check_classify)
    told = [int(number) for number in re.findall(r"\n  train\.jsonl:(\d+)", caught.value.what)]
    assert told == [line for line in range(1, 16) if line % 5 != 1]


def test_a_parquet_page_is_held_against_its_sum(tmp_path: Path) -> None:
    "A bit turned in what a page holds is found wherever the file is read, in whole or in a stream."
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": f"this is the text of row number {i}", "label": "ab"[i % 2]} for i in range(60)]
    path = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, write_page_checksum=True, compression="none")
    data = bytearray(path.read_bytes())
    assert len(read_rows(path)) == len(list(stream_texts(path))) == 60
    data[data.index(b"row number 33")] ^= 1
    path.write_bytes(data)
    for read in (read_rows, lambda file: list(stream_texts(file))):
        with pytest.raises(UserError, match="damaged Parquet file"):
            read(path)
