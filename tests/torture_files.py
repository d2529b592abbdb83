"""Damaged data files, drawn from a seed, and what has to be said of each: figure D1.

A case is a file of some rows in some format, damaged in one of two ways. *By kind*: up to three lines are replaced by
something whose fate is known (a cut line, a NaN, a row without its label, but also a blank line or a Windows line end,
which are simply read). *By chance*: bytes are turned, lost, doubled or put in; a plain reader, written here and
nowhere else, then says which lines are still rows. In both the library has to name exactly the damaged lines, load
exactly the sound rows, and end within five seconds without a traceback.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import random
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from small import small_rows

from llmft_nb.core import UserError
from llmft_nb.hparams import TrainSettings
from llmft_nb.rejects import Rejects, read_sound
from llmft_nb.rows import read_rows
from llmft_nb.streams import stream_texts
from llmft_nb.tasks import make_task

LIMIT_S = 5
N_ROWS = 24

Row = dict[str, Any]
SOUND: dict[str, Callable[[Row, int], Row]] = {
    "classify": lambda row, i: row,
    "tag": lambda row, i: {"tokens": row["text"].split(), "ner_tags": tags_of(row["text"].split())},
    "instruct": lambda row, i: {"prompt": row["text"], "completion": f"it is a {row['label']}"},
    "chat": lambda row, i: {"messages": [said("user", row["text"]), said("assistant", f"a {row['label']}")]},
    "text": lambda row, i: {"text": row["text"]},
}


def said(role: str, content: Any) -> Row:
    return {"role": role, "content": content}


def tags_of(words: list[str]) -> list[str]:
    "The number in a row of `small_rows` is an amount, and the word after it goes on with it."
    tags = ["B-amount" if word.isdigit() else "O" for word in words]
    return [("I-amount" if i and tags[i - 1] == "B-amount" else tag) for i, tag in enumerate(tags)]


# --- damage by kind: what stands in a line's place ---

Lines = list[bytes]
BAD_LINES: dict[str, Callable[[bytes, random.Random], Lines]] = {
    "cut off": lambda line, chance: [line[: chance.randrange(1, len(line))]],
    "its beginning lost": lambda line, chance: [line[chance.randrange(1, len(line)) :]],
    "no JSON": lambda line, chance: [b"this is a line of prose"],
    "an array": lambda line, chance: [b"[" + line + b"]"],
    "a text": lambda line, chance: [b'"text"'],
    "a number": lambda line, chance: [b"17"],
    "null": lambda line, chance: [b"null"],
    "true": lambda line, chance: [b"true"],
    "an empty object": lambda line, chance: [b"{}"],
    "single quotes": lambda line, chance: [line.replace(b'"', b"'")],
    "a comma at the end": lambda line, chance: [line[:-1] + b",}"],
    "a comma after it": lambda line, chance: [line + b","],
    "no colon": lambda line, chance: [line.replace(b'": ', b'" ', 1)],
    "a key twice": lambda line, chance: [line[:-1] + b', "text": 1, "text": 2}'],
    "two on a line": lambda line, chance: [line + line],
    "two on a line, apart": lambda line, chance: [line + b" " + line],
    "NaN": lambda line, chance: [line[:-1] + b', "score": NaN}'],
    "Infinity": lambda line, chance: [line[:-1] + b', "score": -Infinity}'],
    "a number without end": lambda line, chance: [line[:-1] + b', "score": 1e999}'],
    "a huge integer": lambda line, chance: [line[:-1] + b', "id": ' + b"9" * chance.choice([20, 400, 9000]) + b"}"],
    "nested deeply": lambda line, chance: [line[:-1] + b', "a": ' + b"[" * 99 + b"]" * 99 + b"}"],
    "nested endlessly": lambda line, chance: [line[:-1] + b', "a": ' + b"[" * 99_999 + b"]" * 99_999 + b"}"],
    "opened endlessly": lambda line, chance: [b'{"a":' * chance.choice([50, 99_999])],
    "no UTF-8": lambda line, chance: [line[:12] + bytes([chance.choice([0xFF, 0xC3, 0xE9, 0x80])]) + b"." + line[12:]],
    "half a pair": lambda line, chance: [line[:-1] + b', "note": "\\ud83d"}'],
    "a NUL, escaped": lambda line, chance: [line[:-1] + b', "note": "a\\u0000b"}'],
    "a NUL": lambda line, chance: [line[:-1] + b', "note": "a\0b"}'],
    "a raw tab": lambda line, chance: [line[:-1] + b', "note": "a\tb"}'],
    "a comment": lambda line, chance: [b"# " + line],
    "a bad escape": lambda line, chance: [line[:-1] + b', "note": "\\x41"}'],
    "Python's None": lambda line, chance: [line[:-1] + b', "note": None}'],
    "Python's True": lambda line, chance: [line[:-1] + b', "note": True}'],
    "hexadecimal": lambda line, chance: [line[:-1] + b', "id": 0x1F}'],
    "leading zeros": lambda line, chance: [line[:-1] + b', "id": 007}'],
    "bytes of a picture": lambda line, chance: [b"\x89PNG\x1a" + chance.randbytes(40).translate(None, b"\r\n")],
    "a conflict of versions": lambda line, chance: [b"<<<<<<< HEAD"],
}
FINE_LINES: dict[str, Callable[[bytes, random.Random], Lines]] = {
    "blank": lambda line, chance: [b"", line],
    "blanks": lambda line, chance: [b" \t ", line],
    "a Windows line end": lambda line, chance: [line + b"\r"],
    "blanks around": lambda line, chance: [b"  " + line + b"\t"],
    "other fields": lambda line, chance: [line[:-1] + b', "id": 7, "note": null}'],
    "escaped letters": lambda line, chance: [json.dumps(json.loads(line), ensure_ascii=True).encode()],
    "large, but an integer": lambda line, chance: [line[:-1] + b', "id": 9223372036854775807}'],
    "nested a little": lambda line, chance: [line[:-1] + b', "a": ' + b"[" * 20 + b"]" * 20 + b"}"],
}


def without(name: str) -> Callable[[Row], Row]:
    return lambda row: {key: value for key, value in row.items() if key != name}


def having(name: str, value: Any) -> Callable[[Row], Row]:
    return lambda row: row | {name: value}


def dialogue(*messages: Any) -> Callable[[Row], Row]:
    return lambda row: {"messages": list(messages)}


ASK, ANSWER = said("user", "And?"), said("assistant", "So.")
BAD_ROWS: dict[str, dict[str, tuple[Callable[[Row], Row], str]]] = {  # Kind: how a row is changed, and the field named
    "classify": {
        "no text": (without("text"), "text"),
        "text null": (having("text", None), "text"),
        "text empty": (having("text", " \n"), "text"),
        "text a number": (having("text", 3), "text"),
        "text a list": (having("text", ["a"]), "text"),
        "text an object": (having("text", {"a": 1}), "text"),
        "a pair of numbers": (having("text_pair", 3), "text_pair"),
        "no label": (without("label"), "label"),
        "label null": (having("label", None), "label"),
        "label empty": (having("label", ""), "label"),
        "label a number": (having("label", 3), "label"),
        "label a share": (having("label", 0.5), "label"),
        "label a truth": (having("label", True), "label"),
        "label an object": (having("label", {"name": "sea"}), "label"),
        "label a list": (having("label", ["sea"]), "label"),
        "label a list in a list": (having("label", [["sea"]]), "label"),
        "label a list as a text": (having("label", "['sea', 'tool']"), "label"),
    },
    "tag": {
        "no tokens": (without("tokens"), "tokens"),
        "no tags": (without("ner_tags"), "ner_tags"),
        "a tag too few": (lambda row: row | {"ner_tags": row["ner_tags"][:-1]}, "ner_tags"),
        "a tag too many": (lambda row: row | {"ner_tags": [*row["ner_tags"], "O"]}, "ner_tags"),
        "no words": (lambda row: {"tokens": [], "ner_tags": []}, "tokens"),
        "a word that is none": (lambda row: row | {"tokens": [3, *row["tokens"][1:]]}, "tokens"),
        "a word null": (lambda row: row | {"tokens": [None, *row["tokens"][1:]]}, "tokens"),
        "a tag null": (lambda row: row | {"ner_tags": [None, *row["ner_tags"][1:]]}, "ner_tags"),
        "I- without B-": (lambda row: row | {"ner_tags": ["I-amount", *["O"] * (len(row["tokens"]) - 1)]}, "ner_tags"),
        "I- of another kind": (
            lambda row: row | {"ner_tags": ["B-amount", "I-place", *["O"] * (len(row["tokens"]) - 2)]},
            "ner_tags",
        ),
        "a tag without a kind": (lambda row: row | {"ner_tags": ["B-", *row["ner_tags"][1:]]}, "ner_tags"),
        "tokens an object": (having("tokens", {"a": 1}), "tokens"),
    },
    "instruct": {
        "no completion": (without("completion"), "completion"),
        "no prompt": (without("prompt"), "prompt"),
        "prompt empty": (having("prompt", " "), "prompt"),
        "completion empty": (having("completion", ""), "completion"),
        "completion null": (having("completion", None), "completion"),
        "completion a number": (having("completion", 3), "completion"),
        "prompt an object": (having("prompt", {"a": 1}), "prompt"),
    },
    "chat": {
        "no messages": (dialogue(), "messages"),
        "messages null": (having("messages", None), ""),
        "messages a text": (having("messages", "hello"), "messages"),
        "a message that is a text": (dialogue("hello", ANSWER), "messages"),
        "a role of nobody": (dialogue(said("usr", "And?"), ANSWER), "messages"),
        "no role": (dialogue({"content": "And?"}, ANSWER), "messages"),
        "no content": (dialogue({"role": "user"}, ANSWER), "messages"),
        "content null": (dialogue(said("user", None), ANSWER), "messages"),
        "content a number": (dialogue(said("user", 3), ANSWER), "messages"),
        "content empty": (dialogue(said("user", " "), ANSWER), "messages"),
        "an empty answer": (dialogue(ASK, said("assistant", "")), "messages"),
        "no answer": (dialogue(ASK), "messages"),
        "no question": (dialogue(ANSWER), "messages"),
        "two questions": (dialogue(ASK, ASK, ANSWER), "messages"),
        "a late system message": (dialogue(ASK, ANSWER, said("system", "Be kind."), ASK, ANSWER), "messages"),
        "a call of a tool": (dialogue(ASK, ANSWER | {"tool_calls": [{"name": "f"}]}), "messages"),
    },
    "text": {
        "no text": (lambda row: {"content": row["text"]}, "text"),
        "text a number": (having("text", 3), "text"),
        "text a list": (having("text", ["a"]), "text"),
        "text an object": (having("text", {"a": 1}), "text"),
    },
}


UNKNOWN = {  # Where the labels are known
    "a label mistyped": (having("label", "fruti"), "label"),
    "a label in capitals": (having("label", "SEA"), "label"),
    "a label of nobody": (having("label", "planet"), "label"),
}


@dataclass
class Case:
    "A file, and what has to come of it."

    task: str  # As the command names it
    name: str  # The file's
    data: bytes = b""  # What stands in it
    kinds: list[str] = field(default_factory=list)  # What was done to it, in words
    bad: dict[int, str] = field(default_factory=dict)  # Damaged lines, from 1, and the field that is named or ""
    kept: list[Row] | None = None  # The sound rows in order; None where that is not known
    is_whole: bool = False  # Whether all of the file is refused, by its name
    is_held_out: bool = False  # Whether the labels are known from other rows
    is_free: bool = False  # Whether it may be refused or read: only tracebacks, hanging and wrong names are faults


def by_kind(chance: random.Random, kind: str, rows: list[Row]) -> Case:
    "Replace up to three lines of a JSONL file."
    case = Case("instruct" if kind == "chat" else kind, "train.jsonl", kept=[])
    spoilt = set(chance.sample(range(N_ROWS), chance.choice([0, 1, 1, 1, 2, 3])))
    case.is_held_out = kind == "classify" and chance.random() < 0.3
    fields = BAD_ROWS[kind] | (UNKNOWN if case.is_held_out else {})
    lines: Lines = []
    assert case.kept is not None
    for i, row in enumerate(rows):
        line = json.dumps(row, ensure_ascii=False).encode()
        if i not in spoilt:
            name = chance.choice(sorted(FINE_LINES)) if chance.random() < 0.1 else ""
            case.kinds += [name] if name else []
            lines += FINE_LINES[name](line, chance) if name else [line]
            case.kept.append(row)
        elif chance.random() < 0.5:
            name = chance.choice(sorted(BAD_LINES))
            case.kinds.append(name)
            case.bad[len(lines) + 1] = ""
            lines += BAD_LINES[name](line, chance)
        else:
            name = chance.choice(sorted(fields))
            change, blamed = fields[name]
            case.kinds.append(name)
            case.bad[len(lines) + 1] = blamed
            lines.append(json.dumps(change(row)).encode())
    case.data = b"\n".join(lines) + (b"\n" if chance.random() < 0.8 else b"")
    if chance.random() < 0.2:
        case.data, case.kinds = case.data.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"), [*case.kinds, "Windows"]
    if chance.random() < 0.1:
        case.data, case.kinds = b"\xef\xbb\xbf" + case.data, [*case.kinds, "a mark in front"]
    if chance.random() < 0.1:
        case.data, case.kinds = gzip.compress(case.data), [*case.kinds, "gzip by another name"]
    return case


def pretty(chance: random.Random, kind: str, rows: list[Row]) -> Case:
    "One row printed over several lines; told where it begins."
    case, lines, place = (
        Case("instruct" if kind == "chat" else kind, "train.jsonl", kept=[]),
        [],
        chance.randrange(N_ROWS),
    )
    assert case.kept is not None
    for i, row in enumerate(rows):
        begin, more = len(lines) + 1, json.dumps(row, indent=2 if i == place else None).splitlines()
        if i == place:  # A corpus is read a line at a time, and each of them is told
            case.bad |= dict.fromkeys(range(begin, begin + (len(more) if kind == "text" else 1)), "")
        else:
            case.kept.append(row)
        lines += more
    case.data, case.kinds = "\n".join(lines).encode(), ["pretty-printed"]
    return case


def as_array(chance: random.Random, kind: str, rows: list[Row]) -> Case:
    "A JSON array with an element a line, some of them no rows, or broken at a line."
    case, lines, place = (
        Case("instruct" if kind == "chat" else kind, "train.json", kept=[]),
        [],
        chance.randrange(N_ROWS - 1),
    )
    assert case.kept is not None
    named = {"a number": b"17", "null": b"null", "a text": b'"text"', "an array": b"[1]", "an empty object": b"{}"}
    named |= {"a row without fields of the task": b'{"other": 1}'}
    broken = {"a comma too many": b",", "single quotes": b"{'a': 1},", "no JSON": b"prose,", "NaN": b'{"a": NaN},'}
    broken |= {"a key twice": b'{"a": 1, "a": 2},', "cut off": b""}
    name = chance.choice(sorted([*named, *broken]))
    for i, row in enumerate(rows):
        line = json.dumps(row).encode()
        if i == place and name in named:
            case.bad[i + 2] = ""
            lines.append(named[name] + b",")
        elif i == place:
            case.bad[i + 2] = ""
            lines.append(broken[name])
            case.is_whole = True
        else:
            lines.append(line + b",")
            case.kept += [row] if not case.is_whole else []
        if name == "cut off" and i == place:
            break
    case.data = b"[\n" + b"\n".join(lines).removesuffix(b",") + (b"" if name == "cut off" else b"\n]\n")
    case.kinds = [name]
    return case


def as_table(chance: random.Random, kind: str, rows: list[Row]) -> Case:
    "A table with texts over two lines, and rows with a cell too many or too few."
    case, mark = Case("classify", f"train.{chance.choice(['csv', 'tsv'])}", kept=[]), chance.choice(",;\t")
    assert case.kept is not None
    spoilt, lines = set(chance.sample(range(N_ROWS), chance.randrange(3))), [f"text{mark}label"]
    for i, row in enumerate(rows):
        place, text = len(lines) + 1, row["text"]
        if i in spoilt:
            name = chance.choice(["a cell too many", "a cell too few", "no label", "no text"])
            cells = {"a cell too many": [text, row["label"], "x"], "a cell too few": [text]}
            cells |= {"no label": [text, ""], "no text": ["", row["label"]]}
            case.kinds.append(name)
            case.bad[place] = ""
            lines.append(mark.join(cells[name]))
        elif chance.random() < 0.2:
            lines += ['"' + text, f'over ""two"" lines"{mark}{row["label"]}']
            case.kept.append(row | {"text": f'{text}\nover "two" lines'})
        else:
            lines.append(f"{text}{mark}{row['label']}")
            case.kept.append(row)
    case.data = ("\ufeff" if chance.random() < 0.2 else "").encode() + "\n".join(lines).encode() + b"\n"
    return case


# --- damage by chance ---


MARKS = (b"\n", b"\r", b'"', b"{", b"}", b"[", b"\\", b"\0", b",", b"null", b"\xef\xbb\xbf")


def turn_bytes(data: bytes, chance: random.Random) -> bytes:
    "Turn, lose, double, exchange or put in some bytes, or cut the end off."
    found = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 5, 20])):
        i, n = chance.randrange(len(found) + 1), chance.choice([1, 1, 2, 8, 60])
        what = chance.randrange(6)
        if what == 0 and i < len(found):
            found[i] ^= 1 << chance.randrange(8)
        elif what == 1:
            del found[i : i + n]
        elif what == 2:
            found[i:i] = found[i : i + n]
        elif what == 3:
            found[i:i] = chance.randbytes(n)
        elif what == 4:
            found[i:i] = chance.choice(MARKS)
        elif chance.random() < 0.2:
            del found[i:]
        if not found:
            break
    return bytes(found)


class NotARow(Exception):
    "What the plain reader says of a line."


def refuse(*_: Any) -> Any:
    raise NotARow


def once(pairs: list[tuple[str, Any]]) -> Row:
    return dict(pairs) if len({key for key, _ in pairs}) == len(pairs) else refuse()


def integer(digits: str) -> int:
    return int(digits) if len(digits) < 25 and -(2**63) <= int(digits) < 2**63 else refuse()


def number(digits: str) -> float:
    return float(digits) if abs(float(digits)) < float("inf") else refuse()


def is_clean(value: Any, depth: int = 0) -> bool:
    "No NUL, no half pair, not nested beyond 32."
    if isinstance(value, str):
        return not re.search("[\0\ud800-\udfff]", value)
    if depth > 32:
        return False
    parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return all(is_clean(part, depth + 1) for part in parts)


def plain_row(line: bytes) -> Row | None:
    "A line as a row; None for a blank one; `NotARow` for anything else."
    try:
        text = line.decode("utf-8").removeprefix("\ufeff")
        if not text.strip():
            return None
        hooks = {"object_pairs_hook": once, "parse_int": integer, "parse_float": number, "parse_constant": refuse}
        row = json.loads(text, **hooks)
    except (ValueError, RecursionError):
        raise NotARow from None
    if not isinstance(row, dict) or not row or not is_clean(row):
        raise NotARow
    return row


def is_classified(row: Row) -> bool:
    "Whether a row of texts as labels can be learnt."
    text, pair, label = row.get("text"), row.get("text_pair"), row.get("label")
    texts = isinstance(text, str) and bool(text.strip()) and (pair is None or isinstance(pair, str))
    return texts and isinstance(label, str) and bool(label.strip()) and not re.match(r"\s*\[\s*[\"'\]]", label)


def by_chance(chance: random.Random, kind: str, rows: list[Row]) -> Case:
    "Any bytes of a JSONL file; a plain reader says what is left of it."
    data = turn_bytes(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows), chance)
    case = Case("classify", "train.jsonl", data, ["by chance"], kept=[])
    assert case.kept is not None
    for i, line in enumerate(re.split(b"\r\n|\n|\r", data)):
        try:
            row = plain_row(line)
            if row is not None and not is_classified(row):
                raise NotARow
        except NotARow:
            case.bad[i + 1] = ""
        else:
            case.kept += [] if row is None else [row]
    return case


def packed(chance: random.Random, kind: str, rows: list[Row]) -> Case:
    "Any bytes of a file in another format: no traceback, no hanging, and its name in the message."
    form = chance.choice(["json", "csv", "txt", "parquet", "jsonl.gz", "csv.gz"])
    lines = {"json": [json.dumps(rows, indent=1)], "jsonl": [json.dumps(row) for row in rows]}
    lines |= {"csv": ["text,label", *(f'"{row["text"]}",{row["label"]}' for row in rows)]}
    data = "\n".join(lines.get(form.removesuffix(".gz"), [row["text"] for row in rows])).encode()
    if form == "parquet":
        file = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, write_page_checksum=True)
        data = file.getvalue().to_pybytes()
    data = gzip.compress(data, mtime=0) if form.endswith("gz") else data
    task = "text" if form == "txt" or (form == "parquet" and chance.random() < 0.5) else "classify"
    case = Case(task, f"train.{form}", turn_bytes(data, chance), [f"by chance, {form}"], is_free=True)
    case.kept = rows if form == "parquet" or form.endswith("gz") else None
    return case


WHOLE: dict[str, Callable[[bytes], bytes]] = {
    "UTF-16": lambda data: data.decode().encode("utf-16"),
    "UTF-16 without its mark": lambda data: data.decode().encode("utf-16-le"),
    "UTF-32": lambda data: data.decode().encode("utf-32"),
    "empty": lambda data: b"",
    "blank": lambda data: b"\n \n\n",
    "a cut gzip": lambda data: gzip.compress(data)[:-20],
    "zeros": lambda data: bytes(len(data)),
    "a zip": lambda data: b"PK\x03\x04" + data,
    "a PDF": lambda data: b"%PDF-1.7\n" + data,
    "a pickle": lambda data: b"\x80\x04\x95" + data,
    "a page": lambda data: b"<!DOCTYPE html>\n<html><body>404</body></html>\n",
    "one row": lambda data: data.splitlines()[0],
    "one class": lambda data: b"\n".join(line for line in data.splitlines() if b'"sea"' in line),
}


def whole(chance: random.Random, kind: str, rows: list[Row]) -> Case:
    "A file that is none of rows, or too little of it; refused, and named."
    name = chance.choice(sorted(WHOLE))
    data = WHOLE[name](b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))
    return Case("classify", "train.jsonl", data, [name], is_whole=True)


MAKERS = [(by_kind, 40), (by_chance, 25), (packed, 15), (as_array, 7), (as_table, 7), (pretty, 3), (whole, 3)]


def make_case(seed: int) -> Case:
    "The case of a seed."
    chance = random.Random(f"D1 {seed}")
    make = chance.choices([make for make, _ in MAKERS], [share for _, share in MAKERS])[0]
    kind = "classify" if make not in (by_kind, pretty, as_array) else chance.choice(sorted(SOUND))
    rows = small_rows(N_ROWS, seed % 50)
    if kind == "classify" and chance.random() < 0.3:
        rows = [row | {"text": f"{row['text']} – ça {chr(0x1F600 + i)}"} for i, row in enumerate(rows)]
    return make(chance, kind, [SOUND[kind](row, i) for i, row in enumerate(rows)])


# --- what the library makes of it ---


class Hung(BaseException):
    "It took longer than is allowed."


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    "Leave a block that takes too long."

    def leave(*_: Any) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, leave)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def read(case: Case, path: Path, aside: Rejects | None) -> list[Row]:
    "Read and check all rows of a file as `llmft check` and training do."
    if case.task == "text":
        stream = stream_texts(path)
        stream.aside = aside.take if aside is not None else None
        return [{"text": text} for _, text in stream]
    task, known, train = make_task(case.task, TrainSettings()), None, None
    if case.is_held_out:
        train = task.rows.check(read_rows(small_rows(N_ROWS, 99)), None, None)
        known = task.rows.find_names(train)
    rows = read_sound(path, lambda found: task.rows.check(found, known, train), aside)
    task.rows.find_names(rows)
    return rows.rows


def judge(case: Case, folder: Path) -> str:
    "What the library does wrong with a case; '' for nothing."
    path = folder / case.name
    path.write_bytes(case.data)
    told, kept, aside = None, [], Rejects()
    try:
        with time_limit(LIMIT_S):
            try:
                read(case, path, None)
            except UserError as error:
                told = error
        with time_limit(LIMIT_S):
            try:
                kept = read(case, path, aside)
            except UserError as error:
                if told is None:
                    return f"set aside, it is refused: {error}"
    except Hung:
        return "it hung"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    return compare(case, told, kept, aside)


def compare(case: Case, told: Any, kept: list[Row], aside: Any) -> str:
    "Hold what was said against what has to be said."
    if told is not None and case.name not in f"{told}":
        return f"the message does not name the file: {told}"
    if told is not None and not told.mend:
        return f"the message has no mend: {told}"
    if case.is_free:  # What it is packed in has sums of its own
        return "" if told is not None or case.kept is None else differing(case, kept)
    if case.is_whole and case.bad and "nothing after it" not in f"{told}":
        return f"it is not said that the rest was not read: {told}"
    if (case.is_whole and not case.bad) or case.kept == []:
        return "" if told is not None else "it was read without a word"
    spanned = set[int]()
    found = {int(re.sub(r"^[^:]*:(\d+).*$", r"\1", place)): line for place, line in aside.lines.items()}
    for place, line in found.items():
        over = re.search(r"over (\d+) lines", line["reason"])
        spanned |= set(range(place + 1, place + int(over.group(1)))) if over else set()
    if set(case.bad) - set(found) - spanned:
        return f"not set aside: {sorted(set(case.bad) - set(found) - spanned)}"
    if set(found) - set(case.bad):
        return f"set aside, but sound: {sorted(set(found) - set(case.bad))}"
    if case.bad and told is None:
        return f"read without a word: lines {sorted(case.bad)}"
    words = f"{told}"
    for place in sorted(set(case.bad) - spanned)[:20]:
        blamed = case.bad[place]
        if not re.search(rf"{re.escape(case.name)}:{place}\b", words) and "fields are wrong" not in words:
            return f"line {place} is not named: {words[:300]}"
        names = (f"{case.name}:{place}:{blamed}", f"field {blamed!r}")
        if blamed and len(case.bad) == 1 and not any(name in words for name in names):
            return f"the field {blamed} of line {place} is not named: {words[:300]}"
    if not case.bad and told is not None and "with only the label" not in words and "no rows" not in words:
        return f"sound, but refused: {words[:300]}"
    return differing(case, kept)


def differing(case: Case, kept: list[Row]) -> str:
    "Whether the sound rows are there, each as it was written."
    if case.kept is None or not kept:
        return ""
    names = {"classify": ("text", "label"), "text": ("text",)}.get(case.task, ())
    mine = [tuple(row.get(name) for name in names) for row in case.kept]
    theirs = [tuple(row.get(name) for name in names) for row in kept]
    mine = [tuple(text.strip() if name == "label" else text for name, text in zip(names, one)) for one in mine]
    if len(kept) != len(case.kept):
        return f"{len(kept)} rows were kept, {len(case.kept)} are sound"
    return "" if mine == theirs else f"a row was changed: {next(b for a, b in zip(mine, theirs) if a != b)}"


def run_case(seed: int, folder: Path) -> str:
    "What goes wrong with the file of a seed, with what was done to it; '' for nothing."
    case = make_case(seed)
    wrong = judge(case, folder)
    return f"{wrong} ({', '.join(case.kinds) or 'nothing was done'})" if wrong else ""
