"""What comes in: damage is named by line, equal data read equally, splits and orders keep their promises."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import os
import random
import re
import socket
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from llmft_nb.cleaning import clean
from llmft_nb.core import UserError, assets_folder
from llmft_nb.data import step_order
from llmft_nb.dialogues import check_instruct
from llmft_nb.formats import parse_records
from llmft_nb.rows import (
    Rows,
    check_classify,
    drop_leaks,
    find_label_names,
    is_multi_label,
    normal_text,
    read_rows,
    row_key,
    split_rows,
)
from llmft_nb.sources import DATA_CATALOGUE, missing_error, split_of
from llmft_nb.splits import TaskRows, find_licence, find_notice, own_splits, prepare_splits, survey_rows
from llmft_nb.tags import check_tag, find_tag_names

GOOD = '{"text": "Can I take both?", "label": "avoid"}'
ROWS = [
    {"text": "Can I take both?", "label": "avoid"},
    {"text": 'Is one, or "two", enough?', "label": "safe"},
    {"text": "Zwei Zeilen\nin einer Frage 💊", "label": "unknown"},
    {"text": "a separator\u2028pasted in", "text_pair": "and a second text", "label": "safe"},
]

# Kind of damage → (the bytes of line 2 or what stands in its place, line named, what the reason speaks of)
DAMAGE: dict[str, tuple[bytes, int, str]] = {
    "cut in a string": (b'{"text": "Can I take bo', 2, "cut off"),
    "cut before a value": (b'{"text": "one", "label":', 2, "cut off"),
    "cut before the end": (b'{"text": "one", "label": "safe"', 2, "cut off"),
    "not JSON": (b"Can I take both?", 2, "not JSON"),
    "array": (b'["one", "safe"]', 2, "an array"),
    "empty array": (b"[]", 2, "an array"),
    "string": (b'"one"', 2, "a string"),
    "number": (b"17", 2, "a number"),
    "true": (b"true", 2, "true or false"),
    "null": (b"null", 2, "null"),
    "empty object": (b"{}", 2, "empty"),
    "single quotes": (b"{'text': 'one', 'label': 'safe'}", 2, "single quotes"),
    "trailing comma": (b'{"text": "one", "label": "safe",}', 2, "comma before the closing"),
    "comma after the row": (b'{"text": "one", "label": "safe"},', 2, "two rows on one line"),
    "two objects": (b'{"text": "one"} {"text": "two"}', 2, "two rows on one line"),
    "equal keys": (b'{"text": "one", "label": "safe", "label": "avoid"}', 2, "'label' occurs twice"),
    "equal keys inside": (b'{"text": "one", "about": {"a": 1, "a": 2}}', 2, "'a' occurs twice"),
    "pretty-printed": (b'{\n  "text": "one",\n  "label": "safe"\n}', 2, "pretty-printed over 4 lines"),
    "NaN": (b'{"text": "one", "label": NaN}', 2, "NaN"),
    "Infinity": (b'{"text": "one", "dose": -Infinity}', 2, "-Infinity"),
    "a number beyond": (b'{"text": "one", "dose": 1e999}', 2, "too large"),
    "huge integer": (b'{"text": "one", "id": ' + b"9" * 5000 + b"}", 2, "5000 digits"),
    "integer of 65 bits": (b'{"text": "one", "id": 18446744073709551616}', 2, "20 digits"),
    "deep nesting": (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 2, "nested"),
    "nesting of 40": (b'{"text": ' + b"[" * 40 + b"]" * 40 + b"}", 2, "nested"),
    "bad UTF-8": (b'{"text": "caf\xe9"}', 2, "byte 0xe9 at position 14"),
    "overlong UTF-8": (b'{"text": "\xc0\xaf"}', 2, "is not UTF-8"),
    "surrogate bytes": (b'{"text": "\xed\xa0\xbd"}', 2, "is not UTF-8"),
    "lone surrogate": (b'{"text": "\\ud83d"}', 2, "surrogate"),
    "lone surrogate in a key": (b'{"text": "one", "\\udc8a": 1}', 2, "surrogate"),
    "raw NUL": (b'{"text": "o\x00ne"}', 2, "U+0000"),
    "escaped NUL": (b'{"text": "o\\u0000ne"}', 2, "NUL"),
    "raw tab": (b'{"text": "o\tne"}', 2, "U+0009"),
    "NULs for a line": (b"\x00" * 40, 2, "not JSON"),
    "merge markers": (b"<<<<<<< HEAD", 2, "not JSON"),
    "comment": (b"// the rest is from March", 2, "not JSON"),
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, bytes], Path]:
    "Writes a file and gives its path."

    def write_file(name: str, content: bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    return write_file


def refusal(source: object, **arguments: object) -> UserError:
    with pytest.raises(UserError) as caught:
        read_rows(source, **arguments)
    assert caught.value.mend, "a user's error says how to mend it"
    return caught.value


# --- damaged JSONL ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_line_is_named(kind: str, write: Callable[[str, bytes], Path]) -> None:
    damage, line, reason = DAMAGE[kind]
    content = b"\n".join([GOOD.encode(), damage, GOOD.encode()]) + b"\n"
    error = refusal(write("train.jsonl", content))
    assert error.where == f"train.jsonl:{line}", error
    assert reason in error.what
    assert len(str(error)) < 400, "the damaged line itself is not poured over the screen"


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_line_is_named_in_a_gzip(kind: str, write: Callable[[str, bytes], Path]) -> None:
    damage, _, reason = DAMAGE[kind]
    path = write("train.jsonl", gzip.compress(b"\r\n\r\n" + GOOD.encode() + b"\r\n" + damage + b"\r\n"))
    error = refusal(path)
    assert error.where == "train.jsonl:4"
    assert reason in error.what or kind == "pretty-printed"


@pytest.mark.parametrize(
    ("kind", "content"),
    {
        "byte order mark": codecs.BOM_UTF8 + f"{GOOD}\n{GOOD}\n".encode(),
        "files joined, each with its mark": (codecs.BOM_UTF8 + f"{GOOD}\n".encode()) * 2,
        "Windows line ends": f"{GOOD}\r\n{GOOD}\r\n".encode(),
        "old Macintosh line ends": f"{GOOD}\r{GOOD}\r".encode(),
        "blank lines": f"\n\n  \n{GOOD}\n\t\n{GOOD}\n\n".encode(),
        "no line end at the end": f"{GOOD}\n{GOOD}".encode(),
        "gzip": gzip.compress(f"{GOOD}\n{GOOD}\n".encode()),
        "gzip of two parts": gzip.compress(f"{GOOD}\n".encode()) * 2,
        "blanks around": f"  {GOOD}  \n\t{GOOD}\n".encode(),
    }.items(),
)
def test_harmless_kinds_are_read(kind: str, content: bytes, write: Callable[[str, bytes], Path]) -> None:
    rows = read_rows(write("train.jsonl", content))
    assert rows.rows == [json.loads(GOOD)] * 2, kind


def test_every_damaged_line_is_told_at_once(write: Callable[[str, bytes], Path]) -> None:
    lines = [GOOD if n % 3 else "{" for n in range(1, 101)]
    error = refusal(write("train.jsonl", "\n".join(lines).encode()))
    named = [int(line) for line in re.findall(r"train\.jsonl:(\d+): ", str(error))]
    assert named == [n for n in range(1, 101) if n % 3 == 0][:20]
    assert "33 lines are damaged" in str(error) and "and 13 more" in str(error)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("train.jsonl", b"", "no rows"),
        ("train.jsonl", b"\n \n", "no rows"),
        ("train.json", b"[]", "no rows"),
        ("train.csv", b"text,label\n", "no rows"),
        ("train.txt", b"", "no rows"),
        ("train.jsonl", gzip.compress(b""), "no rows"),
        ("train.jsonl", gzip.compress(GOOD.encode() * 100)[:-12], "gzip"),
        ("train.jsonl", b"\x1f\x8b\x08broken", "gzip"),
        ("train.jsonl", f"{GOOD}\n".encode("utf-16"), "UTF-16"),
        ("train.jsonl", f"{GOOD}\n".encode("utf-16-le"), "UTF-16"),
        ("train.csv", "text,label\na,b\n".encode("utf-16-be"), "UTF-16"),
        ("train.csv", b"PK\x03\x04\x14\x00", "zip archive"),
        ("train.jsonl", b"\x80\x04\x95\x0f\x00", "pickle"),
        ("train.parquet", b"PAR1 broken PAR1", "damaged Parquet"),
        ("train.csv", b"text,label\na,b\ncaf\xe9,c\n", "byte 0xe9"),
        ("train.txt", b"one\ntwo\xff\n", "byte 0xff"),
    ],
)
def test_damaged_files(name: str, content: bytes, what: str, write: Callable[[str, bytes], Path]) -> None:
    error = refusal(write(name, content))
    assert what in error.what
    assert name in error.where


@pytest.mark.parametrize(
    ("table", "line", "reason"),
    [
        ('text,label\n"one\nline",a\nshort\nlast,b\n', 4, "1 cell, but the header has 2"),
        ("text,label\none,a,extra\n", 2, "3 cells"),
        ('text,label\nfine,a\n"never closed,a\nmore,b\n', 3, "unexpected end of data"),
        ('text,label\nfine,a\n"a"b,c\n', 3, "expected"),
        ("text,text\none,a\n", 1, "same name"),
        ("text,,label\none,x,a\n", 1, "column 2 has no name"),
        ("text,label\no\x00ne,a\n", 2, "NUL"),
    ],
)
def test_damaged_tables(table: str, line: int, reason: str, write: Callable[[str, bytes], Path]) -> None:
    error = refusal(write("train.csv", table.encode()))
    assert error.where == f"train.csv:{line}"
    assert reason in error.what


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('[\n {"text": "a"},\n {"text": "b"\n', 4, "cut off"),
        ('[\n {"text": "a"}\n {"text": "b"}\n]', 3, "expecting ','"),
        ('[\n {"text": "a"},\n {"text": "b"},\n]', 4, "comma before the closing"),
        ('[\n {"text": "a"},\n {"text": NaN}\n]', 3, "NaN"),
        ('[\n {"text": "a"},\n ["b"]\n]', 3, "an array"),
        ('[\n {"text": "a"}\n]\n[]', 3, "more after the end"),
        ('{\n "text": "a"\n}', 1, "pretty-printed over 3 lines"),
    ],
)
def test_damaged_json(text: str, line: int, reason: str, write: Callable[[str, bytes], Path]) -> None:
    error = refusal(write("train.json", text.encode()))
    assert error.where == f"train.json:{line}"
    assert reason in error.what


def test_mutated_files_end_in_rows_or_in_a_place(write: Callable[[str, bytes], Path]) -> None:
    generator = random.Random(0)
    content = b"\n".join(json.dumps(row).encode() for row in ROWS * 3)
    n_refused = 0
    for i in range(300):
        mutated = bytearray(content)
        for _ in range(generator.choice([1, 1, 2, 8])):
            at = generator.randrange(len(mutated))
            action = generator.randrange(3)
            if action == 0:
                mutated[at] = generator.randrange(256)
            elif action == 1:
                del mutated[at : at + generator.randrange(1, 30)]
            else:
                mutated[at:at] = generator.choice([b"\n", b"{", b"\x00", b'"', b"\xff", b"[[[[", b"NaN"])
        path = write(generator.choice(["a.jsonl", "a.json", "a.csv", "a.txt", "a"]), bytes(mutated))
        started_s = time.monotonic()
        try:
            rows = read_rows(path)
        except UserError as error:
            n_refused += 1
            assert error.where.partition(":")[0].endswith(path.name), (i, error)
        else:
            json.dumps(rows.rows, allow_nan=False, ensure_ascii=False).encode()
        assert time.monotonic() - started_s < 5
    assert n_refused > 100


# --- the same rows, however packed -----------------------------------------------------------------------------


def as_csv(rows: list[dict], delimiter: str = ",") -> bytes:
    file = io.StringIO(newline="")
    table = csv.DictWriter(file, ["text", "text_pair", "label"], delimiter=delimiter)
    table.writeheader()
    table.writerows(rows)
    return file.getvalue().encode()


def as_parquet(rows: list[dict]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    file = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, pyarrow.schema(dict.fromkeys(ROWS[3], "string"))), file)
    return file.getvalue().to_pybytes()


def as_jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


PACKINGS: dict[str, bytes] = {
    "rows.jsonl": as_jsonl(ROWS),
    "rows.ndjson": as_jsonl(ROWS),
    "rows.json": json.dumps(ROWS, indent=2).encode(),
    "lines.json": as_jsonl(ROWS),
    "rows.csv": as_csv(ROWS),
    "semicolons.csv": as_csv(ROWS, ";"),
    "marked.csv": codecs.BOM_UTF8 + as_csv(ROWS),
    "rows.tsv": as_csv(ROWS, "\t"),
    "rows.parquet": as_parquet(ROWS),
    "rows.jsonl.gz": gzip.compress(as_jsonl(ROWS)),
    "rows.csv.gz": gzip.compress(as_csv(ROWS)),
    "rows.parquet.gz": gzip.compress(as_parquet(ROWS)),
    "zipped.jsonl": gzip.compress(as_jsonl(ROWS)),
    "bare_jsonl": as_jsonl(ROWS),
    "bare_json": json.dumps(ROWS).encode(),
    "bare_csv": as_csv(ROWS),
    "bare_parquet": as_parquet(ROWS),
    "bare_gzip": gzip.compress(as_csv(ROWS)),
    "rows.unknown": as_jsonl(ROWS),
}


@pytest.mark.parametrize("name", PACKINGS)
def test_every_packing_gives_the_same_rows(name: str, write: Callable[[str, bytes], Path]) -> None:
    rows = check_classify(read_rows(write(name, PACKINGS[name])))
    assert rows.rows == ROWS
    assert rows.fingerprint == check_classify(read_rows(ROWS)).fingerprint
    assert all(place.startswith(f"{name}:") for place in rows.places)


def test_folder_in_parts_of_many_formats(write: Callable[[str, bytes], Path]) -> None:
    path = write("set/part-0.jsonl", as_jsonl(ROWS[:2]))
    write("set/part-1.csv.gz", gzip.compress(as_csv(ROWS[2:])))
    for name in (".hidden.jsonl", "_SUCCESS", "README.md"):
        write(f"set/{name}", b"not data")
    rows = read_rows(path.parent)
    assert rows.rows == ROWS
    assert rows.places[2] == "part-1.csv.gz:2"


def test_folder_with_splits_gives_one_of_them(write: Callable[[str, bytes], Path]) -> None:
    for i, name in enumerate(("train-00000-of-00001.jsonl", "dev.jsonl", "test.jsonl")):
        folder = write(f"set/{name}", as_jsonl(ROWS[i : i + 1])).parent
    write("set/labels.json", b"[]")
    assert [read_rows(folder, split=split).rows[0] for split in ("train", "valid", "test")] == ROWS[:3]
    (folder / "test.jsonl").unlink()
    assert "train, valid" in refusal(folder, split="test").mend


def test_plain_text_is_a_row_a_line(write: Callable[[str, bytes], Path]) -> None:
    rows = read_rows(write("ask.txt", b"\xef\xbb\xbfOne?\r\n\r\n Two, then? \r\n"))
    assert (rows.rows, rows.places) == ([{"text": "One?"}, {"text": "Two, then?"}], ["ask.txt:1", "ask.txt:3"])
    with pytest.raises(UserError, match="no row has a field 'label'"):
        check_classify(rows)
    assert check_classify(rows, need_labels=False).rows == rows.rows


def test_other_libraries_rows() -> None:
    class Table:  # As pandas' tables look from outside
        columns = ("text", "label")

        def __iter__(self) -> Iterator[str]:
            return iter(self.columns)

        def to_dict(self, orient: str) -> list[dict]:
            assert orient == "records"
            return [{"text": "one", "label": np.int64(3)}, {"text": "two", "label": np.int64(4)}]

    assert check_classify(read_rows(Table())).rows[0] == {"text": "one", "label": "3"}
    assert read_rows(iter(ROWS)).rows == ROWS
    assert parse_records([{"dose": float("inf"), "text": "a", "raw": b"x"}], "row").rows == [{"text": "a"}]
    assert refusal([["one", "safe"]]).where == "row:1"
    with pytest.raises(UserError, match="int is no data"):
        read_rows(3)


def test_long_cells_are_read_and_the_limit_is_put_back(write: Callable[[str, bytes], Path]) -> None:
    limit = csv.field_size_limit()
    rows = [{"text": "word " * 100_000 + ".", "label": "safe"}]
    assert read_rows(write("long.csv", as_csv(rows))).rows == rows
    assert csv.field_size_limit() == limit


# --- names and columns -----------------------------------------------------------------------------------------


def test_missing_file_names_the_nearest(write: Callable[[str, bytes], Path], tmp_path: Path) -> None:
    write("data/train.jsonl", as_jsonl(ROWS))
    assert "train.jsonl" in refusal(tmp_path / "data" / "trian.jsonl").mend
    assert "did you mean data?" in refusal(tmp_path / "dta" / "train.jsonl").mend
    assert "did you mean pharmacy" in refusal("pharmcay").mend
    (tmp_path / "empty").mkdir()
    assert "there is nothing" in missing_error(tmp_path / "empty" / "x").mend
    assert "put a .jsonl" in refusal(tmp_path / "empty").mend
    assert "data" in refusal(tmp_path).mend
    refusal("x" * 5000 + ".jsonl")


def test_columns(write: Callable[[str, bytes], Path]) -> None:
    path = write("theirs.csv", b"question,intent,text\nCan I?,safe,old\nMay I?,unknown,old\n")
    rows = check_classify(read_rows(path, columns={"question": "text", "intent": "label"}))
    assert rows.rows == [{"text": "Can I?", "label": "safe"}, {"text": "May I?", "label": "unknown"}]
    assert "did you mean question?" in refusal(path, columns={"qestion": "text"}).mend
    assert "same name" in refusal(path, columns={"question": "text", "intent": "text"}).what
    with pytest.raises(UserError, match="--columns intent=label"):
        check_classify(read_rows(path))


def test_shipped_data_is_sound() -> None:
    held_out_only = {"pharmacy-unread": {"valid", "test"}, "pharmacy-chinese": {"test"}}  # Asked after `pharmacy`
    for name, known in DATA_CATALOGUE.items():
        folder = assets_folder() / "data" / name
        there = {path.stem for path in folder.glob("*.jsonl")}
        assert there == held_out_only.get(name, {"train", "valid", "test"})
        splits = {split: read_rows(name, split=split) for split in there}
        for split, rows in splits.items():
            assert read_rows(folder, split=split).rows == rows.rows, "a folder's files are read as their own split only"
        train = splits.pop("train") if "train" in there else read_rows("pharmacy")
        if name != "pharmacy-leaflets":  # Running text
            names = find_label_names(check_classify(train))
            splits = {split: check_classify(rows, names) for split, rows in splits.items()}
            assert name == "pharmacy-unread" or find_label_names(splits["test"]) == names  # It names no kinds
        assert drop_leaks(train, splits)[1].leaks == []
        assert "not medical advice" in known.notice
    assert "there is test, train, valid" in refusal("pharmacy", split="extra").mend
    assert refusal("pharmacy-unread", split="train").mend == "there is test, valid"


# --- checking --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "where", "reason"),
    [
        ({"label": "a"}, "row:3:text", "missing"),
        ({"text": None, "label": "a"}, "row:3:text", "missing"),
        ({"text": "", "label": "a"}, "row:3:text", "empty"),
        ({"text": " \n\t", "label": "a"}, "row:3:text", "empty"),
        ({"text": 7, "label": "a"}, "row:3:text", "type int"),
        ({"text": ["one", "two"], "label": "a"}, "row:3:text", "type list"),
        ({"text": "x", "text_pair": 5, "label": "a"}, "row:3:text_pair", "type int"),
        ({"text": "x"}, "row:3:label", "missing"),
        ({"text": "x", "label": None}, "row:3:label", "missing"),
        ({"text": "x", "label": ""}, "row:3:label", "empty"),
        ({"text": "x", "label": True}, "row:3:label", "type bool"),
        ({"text": "x", "label": 0.5}, "row:3:label", "type float"),
        ({"text": "x", "label": {"name": "a"}}, "row:3:label", "type dict"),
        ({"text": "x", "label": 3}, "row:3:label", "written as integer, most others as string"),
        ({"text": "x", "label": ["a"]}, "row:3:label", "written as list"),
    ],
)
def test_wrong_fields(row: dict, where: str, reason: str) -> None:
    rows = Rows([{"text": "one", "label": "a"}, {"text": "two", "label": "b"}, row], ["row:1", "row:2", "row:3"], "x")
    with pytest.raises(UserError, match=reason) as caught:
        check_classify(rows)
    assert caught.value.where == where


def test_wrong_labels_are_counted_and_corrected() -> None:
    rows = read_rows([{"text": str(n), "label": "avoid" if n % 2 else "avoidd"} for n in range(100)])
    with pytest.raises(UserError) as caught:
        check_classify(rows, label_names=["avoid", "safe"])
    assert "50 fields are wrong (label: 50)" in str(caught.value) and "and 30 more" in str(caught.value)
    assert "row:1:label: label 'avoidd' is unknown: did you mean 'avoid'?" in str(caught.value)


def test_labels_of_every_kind() -> None:
    several = check_classify(read_rows([{"text": "a", "label": ["y", "x", "y"]}, {"text": "b", "label": []}]))
    assert is_multi_label(several) and [row["label"] for row in several] == [["x", "y"], []]
    from_table = check_classify(read_rows([{"text": "a", "label": '["y", "x"]'}, {"text": "b", "label": '["x"]'}]))
    assert [row["label"] for row in from_table] == [["x", "y"], ["x"]]
    single = check_classify(read_rows([{"text": "a", "label": "x"}, {"text": "b", "label": "y "}]), multi_label=True)
    assert [row["label"] for row in single] == [["x"], ["y"]]
    with pytest.raises(UserError, match="one label was expected"):
        check_classify(several, multi_label=False)
    numbered = check_classify(read_rows([{"text": str(n), "label": n} for n in (10, -1, 9)]))
    assert find_label_names(numbered) == ["-1", "9", "10"]
    with pytest.raises(UserError, match="only the label"):
        find_label_names(numbered.subset([0]))


# --- splits and leaks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["['x', 'y']", '["a",' + "[" * 200_000, '["x"', "['x']"])
def test_what_looks_like_a_list_is_no_class(label: str) -> None:
    with pytest.raises(UserError, match=r'looks like a list, but is not JSON: write \["one", "two"\]'):
        check_classify(read_rows([{"text": "one", "label": label}, {"text": "two", "label": '["x"]'}]))


def test_lists_in_cells_are_lists_however_they_are_spaced() -> None:
    cells = ['["x","y"]', ' [ "y" , "x" ] ', "[]", "[ ]"]
    rows = check_classify(read_rows([{"text": f"text {i}", "label": cell} for i, cell in enumerate(cells)]))
    assert [row["label"] for row in rows] == [["x", "y"], ["x", "y"], [], []]
    assert find_label_names(rows) == ["x", "y"]


# Columns that mark the rows of another task, with values that it could not read
STRANGE: list[dict] = [{"tokens": 7}, {"messages": 3}, {"tokens": "12"}, {"prompt": 7}, {"messages": "hello"}]


@pytest.mark.parametrize("strange", STRANGE)
def test_columns_of_other_tasks_do_not_touch_classification(strange: dict) -> None:
    plain = [{"text": f"text number {i}", "label": "ab"[i % 2]} for i in range(60)]
    expected, found = prepare_splits(plain), prepare_splits([row | strange for row in plain])
    assert found.test.rows == expected.test.rows and found.train.rows == expected.train.rows
    questions = check_classify(read_rows([{"text": "one"} | strange, {"text": "two"} | strange]), need_labels=False)
    assert clean(questions, {}, "text").copies == []


@pytest.mark.parametrize("strange", [{"label": "unique"}, {"tokens": 7}, {"label": 0.5}])
def test_columns_of_other_tasks_do_not_touch_instructions(strange: dict) -> None:
    instruct = TaskRows(lambda rows, names, train: check_instruct(rows), lambda rows: [])
    plain = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(60)]
    marked = [
        row | {key: f"{i}" if value == "unique" else value for key, value in strange.items()}
        for i, row in enumerate(plain)
    ]
    expected, found = prepare_splits(plain, task=instruct), prepare_splits(marked, task=instruct)
    assert found.test.places == expected.test.places
    findings = survey_rows([marked], task=instruct, name="instruct").findings
    assert findings == survey_rows([plain], task=instruct, name="instruct").findings


@pytest.mark.parametrize("strange", [{"label": "unique"}, {"messages": 7}, {"label": "one", "text": 5}])
def test_columns_of_other_tasks_do_not_touch_tags(strange: dict) -> None:
    tag = TaskRows(lambda rows, names, train: check_tag(rows, names), find_tag_names)
    plain = [{"tokens": [f"word{i}", "in", f"x{i}"], "ner_tags": ["B-a", "O", "O"]} for i in range(60)]
    marked = [
        row | {key: f"{i}" if value == "unique" else value for key, value in strange.items()}
        for i, row in enumerate(plain)
    ]
    assert prepare_splits(marked, task=tag).test.places == prepare_splits(plain, task=tag).test.places
    found = [survey_rows([rows], task=tag, name="tag").findings for rows in (marked, plain)]
    assert found[0] == found[1]


def test_a_text_with_a_label_column_is_surveyed() -> None:
    text = TaskRows(lambda rows, names, train: check_classify(rows, need_labels=False), lambda rows: [])
    rows = [{"text": "one", "label": "x"}, {"text": "two"}]
    assert "labels" not in survey_rows([rows], task=text, name="text").findings


def test_the_last_row_of_a_class_is_never_held_out() -> None:
    "A text under two labels once took the only row of the second with it."
    rows = [{"text": f"t {i}", "label": "A"} for i in range(40)]
    rows += [{"text": "t 0", "label": "B"}, {"text": "x", "label": "C"}]
    for seed in range(60):
        assert {row["label"] for row in prepare_splits(rows, seed=seed, leaks="allow").train} == {"A", "B", "C"}


# --- the splits of a folder ------------------------------------------------------------------------------------


def folder_of(write: Callable[[str, bytes], Path], **texts: list[str]) -> Path:
    for name, lines in texts.items():
        rows = [{"text": line, "label": "ab"[i % 2]} for i, line in enumerate(lines)]
        path = write(f"folder/{name}.jsonl", as_jsonl(rows))
    return path.parent


MANY = [f"text number {i}" for i in range(60)]


@pytest.mark.parametrize(
    ("held_out", "carved"), [({"test": 9}, ("valid",)), ({"dev": 5}, ("test",)), ({"test": 9, "validation": 5}, ())]
)
def test_a_folder_keeps_its_own_splits(
    held_out: dict[str, int], carved: tuple[str, ...], write: Callable[[str, bytes], Path]
) -> None:
    own = {name: [f"{name} {i}" for i in range(n)] for name, n in held_out.items()}
    folder = folder_of(write, train=MANY, **own)
    for data in (folder, str(folder)):
        splits = prepare_splits(data)
        assert splits.carved == carved
        for name, rows in (("test", splits.test), ("valid", splits.valid)):
            lines = [line for spelt, lines in own.items() if split_of(spelt) == name for line in lines]
            assert name in carved or [row["text"] for row in rows] == lines
    assert ({"valid", "test"} <= own_splits(folder)) == (not carved)


def test_a_folder_given_as_test_gives_its_test(write: Callable[[str, bytes], Path]) -> None:
    folder = folder_of(write, train=MANY, test=["secret 1", "secret 2"])
    rows = [{"text": f"other {i}", "label": "ab"[i % 2]} for i in range(60)]
    splits = prepare_splits(rows, test=folder)
    assert (splits.test.places, splits.carved) == (["test.jsonl:1", "test.jsonl:2"], ("valid",))
    assert prepare_splits(rows, valid=folder).valid.places[0] == "train.jsonl:1", "it has no file for validation"
    assert survey_rows([rows, folder]).report.n_held_out == {"folder": 2}
    assert (find_notice(folder), find_licence(folder)) == ("", "unknown")


def test_a_folder_without_split_words_is_all_rows(write: Callable[[str, bytes], Path]) -> None:
    folder = folder_of(write, part1=MANY[:30], part2=MANY[30:])
    splits = prepare_splits(folder)
    assert splits.carved == ("test", "valid")
    assert sum(len(rows) for rows in (splits.train, splits.valid, splits.test)) == 60


def random_rows(generator: random.Random, *, multi_label: bool = False) -> list[dict]:
    n_rows, n_texts = generator.randint(12, 300), generator.randint(6, 300)
    names = [f"class {n}" for n in range(generator.randint(2, 9))]
    rows = []
    for _ in range(n_rows):
        text = f"Question {generator.randrange(n_texts)}"
        label = generator.choices(names, range(1, len(names) + 1))[0]
        rows.append({"text": generator.choice([text, text.upper(), f" {text}\n"]), "label": label})
        if multi_label:
            rows[-1]["label"] = sorted(generator.sample(names, generator.randint(0, len(names))))
    return rows


@pytest.mark.parametrize("multi_label", [False, True])
def test_split_keeps_its_promises(multi_label: bool) -> None:
    generator = random.Random(1)
    for seed in range(60):
        rows = Rows(random_rows(generator, multi_label=multi_label), [], "x")
        rows = Rows(rows.rows, [f"x:{i}" for i in range(len(rows))], "x")
        frac = generator.uniform(0.05, 0.6)
        try:
            kept, held_out = split_rows(rows, frac, seed)
        except UserError:
            continue  # Nothing to hold out: too few texts for the share
        assert sorted(kept.places + held_out.places) == sorted(rows.places), "every row is on one side"
        assert not {row_key(row) for row in kept} & {row_key(row) for row in held_out}, "no text is on both"
        assert len(held_out) <= round(frac * len(rows))
        if not multi_label:
            assert {row["label"] for row in kept} == {row["label"] for row in rows}, "no class gives its last row"
        order = generator.sample(range(len(rows)), len(rows))
        shuffled = split_rows(rows.subset(order), frac, seed)[1]
        assert sorted(shuffled.places) == sorted(held_out.places), "the order of the file does not matter"


def test_split_gives_every_class_its_share() -> None:
    sizes = {"a": 470, "b": 160, "c": 13, "d": 1}
    rows = read_rows([{"text": f"{label} {n}", "label": label} for label, size in sizes.items() for n in range(size)])
    kept, held_out = split_rows(rows, 0.1, seed=3)
    assert Counter(row["label"] for row in held_out) == {"a": 47, "b": 16, "c": 1}
    assert Counter(row["label"] for row in kept)["d"] == 1
    other = split_rows(rows, 0.1, seed=4)[1]
    named = split_rows(rows, 0.1, seed=3, name="test")[1]
    assert set(other.places) != set(held_out.places) != set(named.places)
    for frac in (0, 1, -0.5, float("nan")):
        with pytest.raises(UserError, match="share to hold out"):
            split_rows(rows, frac, seed=0)


def test_split_is_the_same_in_another_process() -> None:
    script = """
    from llmft_nb.rows import read_rows, split_rows
    rows = read_rows([{"text": f"question {n}", "label": str(n % 3)} for n in range(60)])
    print(split_rows(rows, 0.2, seed=5)[1].places)
    """
    answers = set()
    for hash_seed in ("0", "1", "2"):
        settings = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", textwrap.dedent(script)]
        answers.add(subprocess.run(command, env=settings, capture_output=True, text=True, check=True).stdout)
    assert len(answers) == 1


def test_planted_leaks_are_all_found_and_nothing_else() -> None:
    generator = random.Random(2)
    train = [{"text": f"Can I take product {n} with coffee?", "label": "safe"} for n in range(5000)]
    leaked = generator.sample(range(5000), 200)
    disguises = [str, str.upper, lambda text: f"  {text} ", lambda text: text.replace(" ", "\u00a0\n")]
    test = [{"text": generator.choice(disguises)(train[n]["text"]), "label": "safe"} for n in leaked]
    test += [{"text": f"Can I take brand {n} with coffee?", "label": "safe"} for n in range(1000)]
    kept, report = drop_leaks(read_rows(train), {"test": read_rows(test)})
    assert {place for place, _, _ in report.leaks} == {f"row:{n + 1}" for n in leaked}
    assert (len(kept), report.n_left_out, report.seen["test"]) == (4800, 200, list(range(200)))
    allowed, report = drop_leaks(read_rows(train), {"test": read_rows(test)}, "allow")
    assert (len(allowed), report.n_left_out, len(report.leaks)) == (5000, 0, 200)
    with pytest.raises(UserError, match="200 rows leak"):
        drop_leaks(read_rows(train), {"test": read_rows(test)}, "error")
    with pytest.raises(UserError, match="every training row"):
        drop_leaks(read_rows(test[:5]), {"test": read_rows(test)})
    with pytest.raises(UserError, match="unknown policy"):
        drop_leaks(read_rows(test[:5]), {}, "ignore")


def test_pairs_leak_as_pairs() -> None:
    train = read_rows([{"text": "a", "text_pair": "b", "label": "x"}, {"text": "a", "label": "x"}])
    kept, _ = drop_leaks(train, {"test": read_rows([{"text": "A", "text_pair": "B", "label": "y"}])})
    assert kept.places == ["row:2"]


@pytest.mark.parametrize(("name", "n_leaks"), [("banking77", 6), ("sst2", 2), ("chnsenticorp_zh", 331)])
def test_leaks_of_real_sets(name: str, n_leaks: int, real_data: Callable[[str], Path]) -> None:
    train, test = (check_classify(read_rows(real_data(name), split=split)) for split in ("train", "test"))
    _, report = drop_leaks(train, {"test": test})
    assert len(report.seen["test"]) >= n_leaks, "at least the published number; ours also looks past case and blanks"
    assert len(report.seen["test"]) <= n_leaks + 10


def test_texts_that_only_look_different() -> None:
    same = ["Café au lait", "cafe\u0301 au lait", "CAFÉ  AU\tLAIT\n", "Ｃａｆé au\u3000lait"]
    assert len({normal_text(text) for text in same}) == 1
    assert normal_text("take 1.5") != normal_text("take 15")
    for text in ("İstanbul", "ẞ", "ǅ", "ﬃ", "\u0345"):
        assert normal_text(normal_text(text)) == normal_text(text)


# --- the order of steps ----------------------------------------------------------------------------------------


def test_order_of_steps() -> None:
    generator = random.Random(3)
    for _ in range(80):
        n_rows, batch_size = generator.randint(1, 400), generator.randint(1, 70)
        window, seed, epoch = generator.choice([1, 16, 64, 256, 2048]), generator.randrange(99), generator.randrange(9)
        lengths = [generator.randint(1, 60) for _ in range(n_rows)]
        steps = step_order(lengths, batch_size, seed, epoch, window=window)
        assert sorted(row for step in steps for row in step) == list(range(n_rows)), "every row once"
        assert [len(step) for step in steps[:-1]] == [batch_size] * (len(steps) - 1), "only the last may be short"
        assert len(steps) == -(-n_rows // batch_size)
        np.random.seed(epoch)
        random.seed(epoch)
        assert step_order(np.array(lengths), batch_size, seed, epoch, window=window) == steps, "no hidden state"
        if n_rows > 50:
            assert step_order(lengths, batch_size, seed, epoch + 1, window=window) != steps
            assert step_order(lengths, batch_size, seed + 1, epoch, window=window) != steps
        in_file = step_order(lengths, batch_size, seed, epoch, shuffle=False)
        assert [row for step in in_file for row in step] == list(range(n_rows))


def test_order_is_what_it_was() -> None:
    lengths = [n * n % 17 for n in range(20)]
    assert step_order(lengths, 4, seed=0, epoch=0) == ORDER_OF_VERSION_1, "old checkpoints would resume elsewhere"


ORDER_OF_VERSION_1 = [[15, 19, 12, 5], [18, 6, 11, 2], [7, 10, 4, 13], [14, 3, 8, 9], [17, 0, 16, 1]]


# --- the hub, out of reach -------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", ["silent", "refused", "offline"])
def test_hub_out_of_reach(trouble: str, tmp_path: Path) -> None:
    script = """
    from llmft_nb.core import UserError
    from llmft_nb.rows import read_rows
    try:
        read_rows("owner/name")
    except UserError as error:
        print(error)
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if trouble == "refused":
            server.close()
        settings = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path)}
        settings["HF_HUB_OFFLINE"] = "1" if trouble == "offline" else "0"
        started_s = time.monotonic()
        command = [sys.executable, "-c", textwrap.dedent(script)]
        answer = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=60)
        took_s = time.monotonic() - started_s
    assert "data set owner/name@main" in answer.stdout and "mend: " in answer.stdout, answer.stderr[-2000:]
    assert "Traceback" not in answer.stderr
    if trouble != "offline":
        assert "the hub did not answer" in answer.stdout and "the cache holds nothing" in answer.stdout
        assert took_s < 10


@pytest.mark.parametrize("name", ["data/train.jsonl", "owner/name/more", "just-a-name", "nowhere/rows.csv.gz"])
def test_what_looks_like_a_file_never_goes_to_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmft_nb.sources.read_hub", lambda *_: pytest.fail("asked the hub"))
    assert "no such file" in refusal(name).what
