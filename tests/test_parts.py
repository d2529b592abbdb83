"""A file in parts: the rows of `read_rows`, all damage heard of first, scores that do not depend on the parts."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from small import small_rows

from llmft_nb.core import UserError
from llmft_nb.finetune import evaluate_predictor, finetune
from llmft_nb.parts import RowParts
from llmft_nb.rows import read_rows
from llmft_nb.tasks import TASKS

ROWS: list[dict[str, Any]] = [
    {"text": f"Line {i},\nof {i % 7}", "label": "abc"[i % 3], "note": None if i % 5 else f"n{i}"}
    for i in range(1, 1234)
]


def write(folder: Path, kind: str) -> Path:
    file = folder / f"rows.{kind}"
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    if kind == "jsonl":
        file.write_text(text, encoding="utf-8")
    elif kind == "jsonl.gz":
        file.write_bytes(gzip.compress(text.encode()))
    elif kind == "json":
        file.write_text(json.dumps(ROWS), encoding="utf-8")
    elif kind == "csv":
        with file.open("w", encoding="utf-8", newline="") as out:
            table = csv.DictWriter(out, ["text", "label", "note"])
            table.writeheader()
            table.writerows(ROWS)
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file, row_group_size=500)
    return file


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "parquet"])
@pytest.mark.parametrize("columns", [{}, {"note": "text"}])
def test_parts_are_the_rows_of_the_whole(kind: str, columns: dict[str, str], tmp_path: Path) -> None:
    file = write(tmp_path, kind)
    whole, parts = read_rows(file, columns), RowParts(file, columns, n_rows=100)
    assert bool(parts.files) == (kind != "json"), "read as it comes, where the format allows it"
    for _ in range(2):
        got = list(parts)
        assert [len(part) for part in got] == [100] * 12 + [33]
        assert [row for part in got for row in part] == list(whole)
        assert [place for part in got for place in part.places] == whole.places


def test_a_folder_a_name_and_a_list(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:7]), encoding="utf-8")
    for source in (tmp_path, "pharmacy-reviews", ROWS[:20]):
        whole = read_rows(source, split="test" if source == "pharmacy-reviews" else "train")
        parts = RowParts(source, split="test" if source == "pharmacy-reviews" else "train", n_rows=3)
        assert [row for part in parts for row in part] == list(whole)
        assert [place for part in parts for place in part.places] == whole.places


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_damage_at_the_end_is_told_as_ever(kind: str, tmp_path: Path) -> None:
    file = write(tmp_path, kind)
    if kind == "parquet":
        data = bytearray(file.read_bytes())
        data[len(data) // 3] ^= 0xFF
        file.write_bytes(data)
    else:
        with file.open("a", encoding="utf-8") as out:
            out.write('{"text": \n{"label"\n' if kind == "jsonl" else "a,b\na,b,c,d\n")
    told = []
    for read in (lambda: read_rows(file), lambda: list(RowParts(file, n_rows=100))):
        with pytest.raises(UserError) as found:
            read()
        told.append(str(found.value))
    assert told[0] == told[1]


def test_a_large_file_is_not_read_whole_to_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, "jsonl")
    with file.open("a", encoding="utf-8") as out:
        out.write("{damaged\n")
    monkeypatch.setattr("llmft_nb.parts.MOST_READ_AGAIN", 10)
    monkeypatch.setattr("llmft_nb.parts.read_rows", lambda *given: pytest.fail("read whole"))
    with pytest.raises(UserError, match=r"rows\.jsonl:1234"):
        list(RowParts(file, n_rows=100))


@pytest.mark.parametrize("text", ["", "\n\n", '{"text": "a"}\n'])
def test_nothing_to_read_and_a_missing_column(text: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="no rows in it" if not text.strip() else "no row has a column"):
        list(RowParts(file, {"question": "text"}))


def shaped(task: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if task == "tag":
        words = [row["text"].split() for row in rows]
        return [{"tokens": some, "ner_tags": ["B-n" if word.isdigit() else "O" for word in some]} for some in words]
    if task == "instruct":
        return [{"prompt": row["text"], "completion": f"a {row['label']}"} for row in rows]
    return rows


@pytest.mark.parametrize("task", ["classify", "tag", "instruct"])
def test_scores_do_not_depend_on_the_parts(
    task: str, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = shaped(task, small_rows(120))
    how: dict[str, Any] = {"task": task, "model": small_model, "epochs": 1, "callbacks": (), "n_written": 9}
    how |= {"leaks": "allow", "max_new_tokens": 6, "precision": "f32"}
    run = finetune(rows[:60], valid=rows[60:80], test=rows[80:], out=tmp_path / "run", **how)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = []
    for size in (7, 1000):
        monkeypatch.setattr(TASKS[task], "part_size", size)
        found.append(evaluate_predictor(run.predictor(), str(file), split="train"))
    headline = found[0]["headline"]
    assert found[0][headline]["n"] == (9 if task == "instruct" else 120) and set(found[0]) == set(found[1])
    for end in ("value", "low", "high"):
        assert found[0][headline][end] == pytest.approx(found[1][headline][end], abs=1e-9)
    if task == "instruct":
        assert found[0]["perplexity"]["value"] == pytest.approx(found[1]["perplexity"]["value"], rel=1e-4)
        assert found[0]["perplexity"]["n"] == 120
    again = evaluate_predictor(run.predictor(), rows[80:])
    assert again[headline]["value"] == pytest.approx(run.record.scores["test"][headline]["value"], abs=1e-9)


def test_a_bad_last_row_is_heard_of_before_anything_is_asked(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = small_rows(60)
    how: dict[str, Any] = {"model": small_model, "epochs": 1, "callbacks": (), "leaks": "allow"}
    predictor = finetune(rows[:40], valid=rows[40:], test=rows[40:], out=tmp_path / "run", **how).predictor()
    monkeypatch.setattr(TASKS["classify"], "part_size", 8)
    monkeypatch.setattr(TASKS["classify"], "answers", lambda *given: pytest.fail("asked too early"))
    with pytest.raises(UserError, match="never seen before"):
        evaluate_predictor(predictor, [*rows, {"text": "One more", "label": "never seen before"}])
