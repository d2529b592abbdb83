"""What a user can get wrong: told with place and mend, exit status 2, no traceback, nothing written or overwritten."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import pty
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from small import small_rows, write_jsonl

ENTRY = "from llmft_nb.cli import main; main()"


@dataclass(frozen=True)
class Outcome:
    "What a command said and how it ended."

    status: int  # Exit status
    out: str  # Standard output
    err: str  # Error stream

    @property
    def error(self) -> dict[str, str]:  # "what", "where", "why", "mend"
        "The error object that `--json` gives."
        return json.loads(self.err.strip().splitlines()[-1])["error"]


def llmft(*arguments: str | Path, typed: str | None = None) -> Outcome:
    "Run a command in this process; whatever is no exit is a bug, and raised."
    from typer.testing import CliRunner

    from llmft_nb.cli import app

    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=typed)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


def llmft_process(*arguments: str | Path, typed: str | None = None, **environment: str) -> Outcome:
    "Run a command in a process of its own."
    command = [sys.executable, "-c", ENTRY, *(str(argument) for argument in arguments)]
    done = subprocess.run(
        command, input=typed, capture_output=True, text=True, env=os.environ | environment, timeout=240
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def contents(*folders: Path) -> dict[str, str]:
    "Path and SHA-256 of everything below some folders."
    paths = [path for folder in folders for path in sorted(folder.rglob("*"))]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "" for path in paths}


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Path:
    "A folder of files and models with one thing wrong in each."
    folder, rows = tmp_path_factory.mktemp("wrong"), small_rows(30)
    write_jsonl(folder / "columns.jsonl", [{"question": row["text"], "label": row["label"]} for row in rows])
    write_jsonl(folder / "no_label.jsonl", [{"text": row["text"], "intent": row["label"]} for row in rows])
    write_jsonl(folder / "label.jsonl", [rows[0], rows[1] | {"label": "fruits"}, rows[2] | {"label": "zebra"}])
    write_jsonl(folder / "malformed.jsonl", [rows[0], rows[1], '{"text": "cut off', rows[2], "[1, 2]"])
    write_jsonl(folder / "null.jsonl", [*rows, {"text": None, "label": "fruit"}])
    write_jsonl(folder / "one_class.jsonl", [row | {"label": "fruit"} for row in rows])
    write_jsonl(folder / "mixed.jsonl", [*rows, {"text": "a number among names", "label": 3}])
    write_jsonl(folder / "leaking.jsonl", rows)
    (folder / "empty.jsonl").touch()
    (folder / "blank.csv").write_text("\n\n", encoding="utf-8")
    (folder / "header.csv").write_text("text,label\n", encoding="utf-8")
    (folder / "ragged.csv").write_text("text,label\na wave,sea\na saw,tool,extra\n", encoding="utf-8")
    (folder / "utf16.jsonl").write_text('{"text": "a wave", "label": "sea"}\n', encoding="utf-16")
    packed = gzip.compress(json.dumps(rows[0]).encode() * 50)
    (folder / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (folder / "no_files").mkdir()

    (folder / "unknown.toml").write_text('lr = 0.001\nlearning_speed = 3\nmodel = "tiny"\n', encoding="utf-8")
    (folder / "broken.toml").write_text("lr = = 3\n", encoding="utf-8")
    for name, value in WRONG_CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")

    for name in ("no_config", "pickled", "no_weights", "truncated", "odd_config", "no_tokenizer", "unknown_kind"):
        shutil.copytree(small_model, folder / name)
    (folder / "no_config" / "config.json").unlink()
    (folder / "pickled" / "model.safetensors").rename(folder / "pickled" / "pytorch_model.bin")
    (folder / "no_weights" / "model.safetensors").unlink()
    weights = folder / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (folder / "odd_config" / "config.json").write_text('{"model_type": "llama"', encoding="utf-8")
    (folder / "unknown_kind" / "config.json").write_text('{"model_type": "abacus"}', encoding="utf-8")
    for path in (folder / "no_tokenizer").glob("tokenizer*"):
        path.unlink()

    (folder / "a_file").write_text("kept\n", encoding="utf-8")
    (folder / "taken").mkdir()
    (folder / "taken" / "thesis.txt").write_text("kept\n", encoding="utf-8")
    return folder


WRONG_CONFIGS: dict[str, Any] = {
    "list": [1, 2],
    "lr_text": {"lr": "fast"},
    "epochs_half": {"epochs": 2.5},
    "batch_float": {"batch_size": 8.0},
    "evals_half": {"evals_per_epoch": 1.5},
    "model_number": {"model": 3},
    "strategy_list": {"strategy": ["full"]},
    "out_number": {"out": 7},
    "columns_number": {"columns": 5},
    "trackers_number": {"trackers": [4]},
    "question_number": {"question": 4},
}

# What is given beside or instead of the usual arguments (None: left out), and what the message must hold.
MISTAKES: dict[str, tuple[dict[str, str | None], list[str]]] = {
    "no data named": ({"data": None}, ["no training rows are named", "--data"]),
    "missing file": ({"data": "{rows}/trian.jsonl"}, ["no such file", "trian.jsonl", "did you mean train.jsonl"]),
    "missing test file": ({"test": "{rows}/tests.jsonl"}, ["no such file", "tests.jsonl", "did you mean test.jsonl"]),
    "missing folder": ({"valid": "{rows}/deep/er/valid.jsonl"}, ["no such file", "there is no deep"]),
    "folder without data": ({"data": "{wrong}/no_files"}, ["no data files", "no_files"]),
    "wrong column": ({"data": "{wrong}/columns.jsonl"}, ["'text'", "columns.jsonl", "--columns question=text"]),
    "wrong label column": ({"data": "{wrong}/no_label.jsonl"}, ["'label'", "--columns intent=label"]),
    "wrong column in test": ({"test": "{wrong}/columns.jsonl"}, ["'text'", "columns.jsonl"]),
    "unknown label in test": (
        {"test": "{wrong}/label.jsonl"},
        ["label.jsonl:2:label", "'fruits' is unknown: did you mean 'fruit'", "label.jsonl:3:label", "'zebra'"],
    ),
    "unknown label in valid": ({"valid": "{wrong}/label.jsonl"}, ["label.jsonl:2:label"]),
    "empty file": ({"data": "{wrong}/empty.jsonl"}, ["there are no rows", "empty.jsonl"]),
    "blank file": ({"data": "{wrong}/blank.csv"}, ["there are no rows", "blank.csv"]),
    "header alone": ({"data": "{wrong}/header.csv"}, ["there are no rows", "header.csv"]),
    "empty test": ({"test": "{wrong}/empty.jsonl"}, ["there are no rows", "empty.jsonl"]),
    "malformed lines": (
        {"data": "{wrong}/malformed.jsonl"},
        ["2 lines are damaged", "malformed.jsonl:3: ", "malformed.jsonl:5: "],
    ),
    "malformed line in test": ({"test": "{wrong}/malformed.jsonl"}, ["malformed.jsonl:3: "]),
    "ragged table": ({"data": "{wrong}/ragged.csv"}, ["ragged.csv:3"]),
    "null text": ({"data": "{wrong}/null.jsonl"}, ["null.jsonl:31:text", "text is missing"]),
    "labels of two kinds": ({"data": "{wrong}/mixed.jsonl"}, ["mixed.jsonl:31:label", "integer"]),
    "one class only": ({"data": "{wrong}/one_class.jsonl"}, ["only the label 'fruit'", "one_class.jsonl"]),
    "UTF-16": ({"data": "{wrong}/utf16.jsonl"}, ["UTF-16", "utf16.jsonl", "UTF-8"]),
    "cut gzip": ({"data": "{wrong}/cut.jsonl.gz"}, ["gzip", "cut.jsonl.gz"]),
    "leaks refused": (
        {"data": "{wrong}/leaking.jsonl", "test": "{wrong}/leaking.jsonl", "leaks": "error"},
        ["leaking.jsonl", "the same text"],
    ),
    "every row leaks": ({"data": "{wrong}/leaking.jsonl", "test": "{wrong}/leaking.jsonl"}, ["every training row"]),
    "unknown leak policy": ({"leaks": "ignore"}, ["'ignore'", "drop, error or allow"]),
    "columns without sign": ({"columns": "question"}, ["theirs=ours", "columns question"]),
    "columns half empty": ({"columns": "=text"}, ["theirs=ours", "columns =text"]),
    "column that is not there": ({"columns": "txet=text"}, ["'txet'", "did you mean text"]),
    "unknown task": ({"task": "clasify"}, ["unknown task", "task clasify", "choose classify"]),
    "unknown strategy": ({"strategy": "bottom:2"}, ["unknown strategy", "strategy bottom:2", "choose full"]),
    "top of nothing": ({"strategy": "top:0"}, ["unknown strategy", "strategy top:0"]),
    "top of a word": ({"strategy": "top:two"}, ["unknown strategy", "strategy top:two"]),
    "K larger than the model": ({"strategy": "top:3"}, ["2 blocks", "strategy top:3", "choose top:1 to top:2"]),
    "strategy misspelt": ({"strategy": "gradul"}, ["unknown strategy", "did you mean gradual?"]),
    "strategy against itself": ({"strategy": "full@top:1"}, ["contradictory strategy", "full@top:1", "lora:R@top:K"]),
    "adapters of no rank": ({"strategy": "lora:0"}, ["rank 0", "strategy lora:0"]),
    "four bits of nothing": ({"strategy": "qlora:4", "init": "random"}, ["contradictory", "qlora:4", "choose lora:4"]),
    "adapters in too many blocks": ({"strategy": "lora@top:3"}, ["2 blocks", "top:1 to top:2"]),
    "adapter on an embedding": (
        {"strategy": "lora@embed_tokens"},
        ["no linear layer", "Embedding", "strategy lora:16@embed_tokens", "q_proj"],
    ),
    "layers that are not there": (
        {"strategy": "layers:self_atn"},
        ["no weight is called self_atn", "strategy layers:self_atn", "near to it: self_attn"],
    ),
    "layers without a name": ({"strategy": "layers:"}, ["no pattern", "strategy layers:"]),
    "rates by layer for a head": ({"strategy": "head", "layer-decay": "0.5"}, ["contradictory", "layer_decay 0.5"]),
    "opening of what is open": ({"unfreeze-frac": "0.5"}, ["contradictory", "unfreeze_frac 0.5", "choose gradual"]),
    "a head's own time": ({"head-first-lr": "0.1"}, ["contradictory", "head_first_lr 0.1", "choose head-then-full"]),
    "unknown init": ({"init": "zeros"}, ["unknown init", "init zeros", "choose pretrained"]),
    "init larger than the model": ({"init": "top:3"}, ["2 blocks", "init top:3", "top:1 to top:2"]),
    "no such model path": ({"model": "./no/such/model"}, ["no such model", "tiny"]),
    "model is a file": ({"model": "{wrong}/a_file"}, ["no such model", "a_file"]),
    "model without config": ({"model": "{wrong}/no_config"}, ["config.json", "no_config"]),
    "model pickled": ({"model": "{wrong}/pickled"}, ["pickled", "pytorch_model.bin", "safetensors"]),
    "model without weights": ({"model": "{wrong}/no_weights"}, ["no weights", "no_weights"]),
    "model truncated": ({"model": "{wrong}/truncated"}, ["truncated"]),
    "model with a broken config": ({"model": "{wrong}/odd_config"}, ["odd_config"]),
    "model of an unknown kind": ({"model": "{wrong}/unknown_kind"}, ["unknown_kind"]),
    "model without tokenizer": ({"model": "{wrong}/no_tokenizer"}, ["tokenizer", "no_tokenizer"]),
    "no epochs": ({"epochs": "0"}, ["out of range", "epochs 0", "from 1"]),
    "no batch": ({"batch-size": "0"}, ["out of range", "batch_size 0"]),
    "learning rate NaN": ({"lr": "nan"}, ["out of range", "lr nan"]),
    "negative seed": ({"seed": "-1"}, ["out of range", "seed -1"]),
    "unknown precision": ({"precision": "f16"}, ["unknown choice", "precision f16", "bf16"]),
    "unknown schedule": ({"schedule": "zigzag"}, ["unknown choice", "schedule zigzag", "cosine"]),
    "unknown class weights": ({"class-weights": "some"}, ["unknown choice", "class_weights some", "balanced"]),
    "max_length out of range": ({"max-length": "1"}, ["out of range", "max_length 1"]),
    "max_length leaves no room": ({"max-length": "2", "model": "{bert}"}, ["max_length", "2"]),
    "max_length beyond the model": ({"max-length": "5000"}, ["max_length", "5000", "512"]),
    "unknown tracker": ({"trackers": "abacus"}, ["abacus"]),
    "out is a file": ({"out": "{wrong}/a_file"}, ["this is a file", "a_file"]),
    "out is not empty": ({"out": "{wrong}/taken"}, ["not empty", "taken", "nothing is overwritten"]),
    "out below a file": ({"out": "{wrong}/a_file/run"}, ["cannot write", "a_file"]),
    "out cannot be written": ({"out": "/proc/llmft/run"}, ["cannot write", "/proc"]),
    "out with a name too long": ({"out": "{wrong}/" + 300 * "x"}, ["xxx"]),
    "resume of what is no run": ({"out": "{wrong}/taken", "resume": ""}, ["not a run's", "taken"]),
    "no config file": ({"config": "{wrong}/none.toml"}, ["no such file", "none.toml"]),
    "broken config": ({"config": "{wrong}/broken.toml"}, ["not readable", "broken.toml"]),
    "unknown config name": ({"config": "{wrong}/unknown.toml"}, ["unknown name learning_speed", "unknown.toml"]),
    **{f"config {name}": ({"config": "{wrong}/" + f"{name}.json"}, []) for name in WRONG_CONFIGS},
}


@pytest.fixture(scope="module")
def bert(save_small: Callable[..., Path]) -> Path:
    "An encoder whose tokenizer adds [CLS] and [SEP]."
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    folder = save_small("Bert", type_vocab_size=3)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = ("<|system|>", "<|end|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A <|end|>",
        pair="<|system|> $A <|end|> $B:1 <|end|>:1",
        special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in names],
    )
    tokenizer.save_pretrained(folder)
    return folder


def arguments_of(given: dict[str, str | None], names: dict[str, Path], out: Path) -> list[str]:
    "A `train` command with some arguments changed; `{name}` stands for a folder."
    usual = {"data": "{rows}/train.jsonl", "valid": "{rows}/valid.jsonl", "test": "{rows}/test.jsonl"}
    usual |= {"model": "{model}", "out": str(out), "epochs": "1", "precision": "f32"}
    if "config" in given:
        usual = {"data": usual["data"], "out": usual["out"]} | ({"model": "{model}"} if "model" not in given else {})
        entries = WRONG_CONFIGS.get(Path(str(given["config"])).stem, {})
        usual = {name: value for name, value in usual.items() if name not in entries}
    arguments = ["train"]
    for name, value in (usual | given).items():
        if value is not None:
            arguments += [f"--{name}", *([value.format(**names)] if value else [])]
    return arguments


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(name: str, wrong: Path, small_files: Path, small_model: Path, bert: Path, at_home: Path) -> None:
    given, needles = MISTAKES[name]
    names = {"rows": small_files, "wrong": wrong, "model": small_model, "bert": bert}
    before = contents(wrong, small_files, small_model, at_home)
    outcome = llmft(*arguments_of(given, names, at_home / "run"), "--json")
    assert outcome.status == 2, outcome
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    error = outcome.error
    message = " | ".join(error.values())
    for needle in needles:
        assert needle in message
    assert error["what"] and error["where"], f"says not where: {error}"
    assert error["mend"], f"has no mend: {error}"
    assert contents(wrong, small_files, small_model, at_home) == before, "something was written"


def test_message_for_people(wrong: Path, small_files: Path, at_home: Path) -> None:
    outcome = llmft("train", "--data", small_files / "train.jsonl", "--out", wrong / "taken")
    assert outcome.status == 2
    what, why, mend = outcome.err.splitlines()
    assert what == f"llmft: out {wrong / 'taken'}: the folder is not empty"
    assert why == "  why: nothing is overwritten"
    assert mend == "  mend: name another folder"


def test_mistake_in_a_process(wrong: Path, small_model: Path, at_home: Path) -> None:
    data = wrong / "malformed.jsonl"
    outcome = llmft_process("train", "--data", data, "--model", small_model, "--out", at_home / "run")
    assert outcome.status == 2
    assert outcome.out == ""
    assert "malformed.jsonl:3: " in outcome.err and "  mend: " in outcome.err
    assert "Traceback" not in outcome.err and "Warning" not in outcome.err
    assert list(at_home.iterdir()) == []


def test_traceback_only_where_asked_for(wrong: Path, at_home: Path) -> None:
    outcome = llmft_process("train", "--data", wrong / "empty.jsonl", "--debug")
    assert outcome.status == 2
    assert "Traceback" in outcome.err and "there are no rows" in outcome.err


@pytest.mark.parametrize(
    ("command", "needles"),
    [
        (["trian"], ["trian"]),
        (["train", "--epoch-count", "3"], ["--epoch-count"]),
        (["train", "--epochs", "three"], ["--epochs"]),
        (["predict"], ["argument 'run'"]),
        (["check"], ["argument 'data'"]),
    ],
)
def test_usage(command: list[str], needles: list[str]) -> None:
    outcome = llmft(*command)
    assert outcome.status == 2
    assert all(needle in outcome.err for needle in needles)
    assert "Traceback" not in outcome.err


# --- the hub ---


@pytest.fixture
def silent_server() -> Iterator[str]:
    "The address of a server on this machine that takes connections and never answers."
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


HUB = """
import sys, time
from llmft_nb.core import UserError
from llmft_nb.bases import find_model
from llmft_nb.rows import read_rows
import huggingface_hub, datasets
for look_up in (find_model, read_rows):
    started = time.monotonic()
    try:
        look_up("someone/something@v2")
    except UserError as error:
        print(time.monotonic() - started, error.where, "|", error.what, "|", error.mend)
"""


def test_hub_that_never_answers(silent_server: str) -> None:
    environment = os.environ | {"HF_ENDPOINT": silent_server}
    done = subprocess.run([sys.executable, "-c", HUB], capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    for line in lines:
        seconds, told = line.split(" ", 1)
        assert float(seconds) < 10
        assert "someone/something@v2" in told and "the hub did not answer" in told


@pytest.mark.parametrize("what", ["model", "data"])
def test_hub_out_of_reach(what: str, small_files: Path, small_model: Path, at_home: Path) -> None:
    given: dict[str, str | None] = {what: "someone/something"}
    names = {"rows": small_files, "model": small_model}
    outcome = llmft(*arguments_of(given, names, at_home / "run"), "--json")
    assert outcome.status == 2, outcome
    assert "someone/something" in outcome.error["where"] and "hub did not answer" in outcome.error["what"]
    assert outcome.error["mend"]
    assert list(at_home.iterdir()) == []


# --- what reads a finished run ---


def damaged_run(folder: Path, run: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    "A copy of a run with another `run.json`."
    shutil.copytree(run, folder)
    value = change(json.loads((run / "run.json").read_text(encoding="utf-8")))
    text = value if isinstance(value, str) else json.dumps(value)
    (folder / "run.json").write_text(text, encoding="utf-8")
    return folder


RECORDS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "newer": (lambda record: record | {"format_version": 99}, "newer version (format 99"),
    "cut off": (lambda record: json.dumps(record)[:200], "not a run record"),
    "a list": (lambda record: [record], "not a run record"),
    "without version": (lambda record: {"task": "classify"}, "not a run record"),
    "version a word": (lambda record: record | {"format_version": "one"}, "not a run record"),
    "without fields": (lambda record: {"format_version": 1}, "not a run record"),
    "unfinished": (lambda record: record | {"status": "interrupted"}, "interrupted"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_record_that_cannot_be_used(name: str, small_run: Path, small_files: Path, tmp_path: Path) -> None:
    change, needle = RECORDS[name]
    run = damaged_run(tmp_path / "run", small_run, change)
    before = contents(run)
    for command in (["predict", run, "a wave"], ["eval", run, "--data", small_files / "test.jsonl"]):
        outcome = llmft(*command, "--json")
        assert outcome.status == 2, outcome
        assert needle in outcome.error["what"] and str(run) in outcome.error["where"] and outcome.error["mend"]
    if name != "unfinished":
        outcome = llmft("report", run, "--json")
        assert outcome.status == 2 and needle in outcome.error["what"]
        outcome = llmft("train", "--data", small_files / "train.jsonl", "--out", run, "--resume", "--json")
        assert outcome.status == 2 and needle in outcome.error["what"]
        shown = llmft("runs", tmp_path, "--json")
        assert shown.status == 0
        assert "unreadable" in json.loads(shown.out)[0]["status"]
    assert contents(run) == before


def test_predict_on_a_base_model(small_model: Path) -> None:
    outcome = llmft("predict", small_model, "a wave", "--json")
    assert outcome.status == 2
    assert "no trained head" in outcome.error["what"] and str(small_model) in outcome.error["where"]
    assert outcome.error["mend"]
    outcome = llmft("predict", "tiny", "a wave", "--json")
    assert outcome.status == 2 and "no run here" in outcome.error["what"]


def test_predict_with_nothing_to_predict(small_run: Path) -> None:
    "On a terminal there is nobody to wait for; an empty pipe is no text, and no answer."
    theirs, ours = pty.openpty()
    command = [sys.executable, "-c", ENTRY, "predict", str(small_run)]
    done = subprocess.run(command, stdin=ours, capture_output=True, text=True, timeout=240)
    os.close(theirs)
    os.close(ours)
    assert done.returncode == 2
    assert "nothing to predict" in done.stderr and "mend" in done.stderr and "Traceback" not in done.stderr
    piped = llmft("predict", small_run, typed="")
    assert (piped.status, piped.out) == (0, "")


def test_predict_mistakes(small_run: Path, small_files: Path, wrong: Path) -> None:
    for arguments, needle in (
        (["a wave", "--file", small_files / "test.jsonl"], "texts and a file"),
        (["--file", wrong / "malformed.jsonl"], "malformed.jsonl:3"),
        (["--file", wrong / "columns.jsonl"], "--columns question=text"),
        (["--file", wrong / "none.jsonl"], "no such file"),
        (["a wave", " "], "text is empty"),
    ):
        outcome = llmft("predict", small_run, *arguments, "--json")
        assert outcome.status == 2, outcome
        assert needle in " ".join(outcome.error.values())
        assert outcome.error["where"] and outcome.error["mend"]


def test_eval_mistakes(small_run: Path, wrong: Path) -> None:
    for name, needle in (("label.jsonl", "label.jsonl:2:label"), ("no_label.jsonl", "--columns intent=label")):
        outcome = llmft("eval", small_run, "--data", wrong / name, "--json")
        assert outcome.status == 2
        assert needle in " ".join(outcome.error.values())


def test_runs_and_models_mistakes(at_home: Path, wrong: Path) -> None:
    for command in (["runs"], ["runs", at_home / "none"], ["models", wrong / "a_file"], ["models", wrong / "pickled"]):
        outcome = llmft(*command, "--json")
        assert outcome.status == 2, outcome
        assert outcome.error["where"] and outcome.error["mend"]


PLAN_MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "unknown device": (["--device", "abacus"], ["unknown device", "device abacus", "H100"]),
    "no size": (["--device-memory", "a lot"], ["not a size of memory", "24GB"]),
    "no room for a row": (["--device-memory", "1MB"], ["not even one row fits", "1 MB", "needs", "smaller base"]),
    "rows that were told do not fit": (
        ["--device-memory", "24MB", "--micro-batch-size", "64", "--batch-size", "64"],
        ["64 rows at once do not fit", "set micro_batch_size to"],
    ),
    "unknown distance": (["--distance", "there"], ["unknown distance", "near or far"]),
    "energy of an unknown power": (["--price-kwh", "0.3"], ["power is not known", "--watts"]),
    "unknown strategy": (["--strategy", "halves"], ["unknown strategy", "top:K"]),
    "more blocks than there are": (["--strategy", "top:9"], ["this model has 2 blocks"]),
    "no such model": (["--model", "{rows}/nothing/at/all"], ["no such model"]),
    "no rows": (["--data", "{rows}/none.jsonl"], ["none.jsonl"]),
    "unknown init": (["--init", "half"], ["unknown init", "random"]),
}


@pytest.mark.parametrize("name", PLAN_MISTAKES)
def test_plan_mistakes(name: str, small_files: Path, small_model: Path, at_home: Path) -> None:
    given, needles = PLAN_MISTAKES[name]
    usual = ["--data", str(small_files / "train.jsonl"), "--model", str(small_model), "--precision", "f32"]
    usual += [] if "--strategy" in given else ["--strategy", "full"]
    outcome = llmft("plan", *usual, *(one.format(rows=small_files) for one in given), "--json")
    assert outcome.status == 2, outcome
    assert outcome.out == "" and "Traceback" not in outcome.err
    message = " | ".join(outcome.error.values())
    for needle in needles:
        assert needle in message
    assert outcome.error["where"] and outcome.error["mend"]


# --- what is right ends with 0, and speaks JSON where asked ---


@pytest.fixture
def usual(small_files: Path, small_model: Path) -> list[str]:
    "A `train` command without its folder."
    files = [f"--{name}={small_files / name}.jsonl" for name in ("valid", "test")]
    return ["train", f"--data={small_files / 'train.jsonl'}", *files, f"--model={small_model}", "--precision=f32"]


def test_train_json(usual: list[str], at_home: Path) -> None:
    outcome = llmft(*usual, "--epochs=1", "--question", "what is a plum?", "--json")
    assert outcome.status == 0, outcome
    told = json.loads(outcome.out)
    assert told["folder"] == "runs/001"
    assert set(told["scores"]) == {"validation", "test", "question", "forgetting"}
    assert told["scores"]["test"]["accuracy"]["n"] == 24
    assert {path.name for path in (at_home / "runs" / "001").iterdir()} == {
        *("run.json", "metrics.jsonl", "timings.jsonl", "report.html", "README.md", "checkpoints", "model"),
        *("profile.json", "test_predictions.jsonl"),
    }


@pytest.mark.parametrize("kind", ["toml", "json"])
def test_config_and_the_flag_that_wins(kind: str, usual: list[str], at_home: Path) -> None:
    values: dict[str, Any] = {"epochs": 3, "batch-size": 16, "lr": 0.002, "strategy": "head", "out": "chosen"}
    if kind == "toml":
        text = "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())
    else:
        text = json.dumps(values)
    (at_home / f"run.{kind}").write_text(text, encoding="utf-8")
    outcome = llmft(*usual, "--epochs=1", "--strategy=top:1", f"--config=run.{kind}", "--json")
    assert outcome.status == 0, outcome
    assert json.loads(outcome.out)["folder"] == "chosen"
    record = json.loads((at_home / "chosen" / "run.json").read_text(encoding="utf-8"))
    found = {name: record["settings"][name] for name in ("epochs", "batch_size", "lr", "strategy")}
    assert found == {"epochs": 1, "batch_size": 16, "lr": 0.002, "strategy": "top:1"}
    origins = {name: record["origins"][name] for name in ("epochs", "batch_size", "lr", "seed")}
    assert origins == {"epochs": "argument", "batch_size": "config", "lr": "config", "seed": "default"}


def test_config_names_the_rows(usual: list[str], small_files: Path, at_home: Path) -> None:
    rows = [{"question": row["text"], "label": row["label"]} for row in small_rows(60, seed=7)]
    write_jsonl(at_home / "asked.jsonl", rows)
    values = {"data": "asked.jsonl", "columns": {"question": "text"}, "epochs": 1}
    (at_home / "run.json").write_text(json.dumps(values), encoding="utf-8")
    model = next(part for part in usual if part.startswith("--model"))
    outcome = llmft("train", model, "--precision=f32", "--config=run.json", "--json")
    assert outcome.status == 0, outcome
    record = json.loads((at_home / "runs" / "001" / "run.json").read_text(encoding="utf-8"))
    assert record["data"]["carved"] == ["test", "valid"]
    assert record["data"]["n_train"] + record["data"]["n_valid"] + record["data"]["n_test"] == 60


def test_predict_speaks_json_from_arguments_a_file_and_a_pipe(small_run: Path, small_files: Path) -> None:
    texts = [json.loads(line)["text"] for line in (small_files / "test.jsonl").read_text().splitlines()]
    told = [
        llmft("predict", small_run, *texts, "--json"),
        llmft("predict", small_run, "--file", small_files / "test.jsonl", "--json", "--batch-size", "7"),
        llmft("predict", small_run, "--json", typed="".join(text + "\n" for text in texts) + "\n"),
    ]
    answers = [[json.loads(line) for line in outcome.out.splitlines()] for outcome in told]
    assert [outcome.status for outcome in told] == [0, 0, 0]
    kept = [json.loads(line) for line in (small_run / "test_predictions.jsonl").read_text().splitlines()]
    for lines in answers:
        assert [line["text"] for line in lines] == texts
        assert [line["label"] for line in lines] == [line["predicted"] for line in kept]
        for line, trained in zip(lines, kept, strict=True):
            assert line["probabilities"] == pytest.approx(trained["probabilities"], abs=1e-5)
    plain = llmft("predict", small_run, texts[0])
    chance = kept[0]["probabilities"][kept[0]["predicted"]]
    assert (plain.status, plain.out) == (0, f"{kept[0]['predicted']} ({100 * chance:.0f} %)\t{texts[0]}\n")


def test_pipe_in_a_process(small_run: Path) -> None:
    outcome = llmft_process("predict", small_run, "--json", typed="a wave\r\nein Apfel für Zoë\n")
    assert outcome.status == 0, outcome
    assert [json.loads(line)["text"] for line in outcome.out.splitlines()] == ["a wave", "ein Apfel für Zoë"]
    assert outcome.err == ""


def test_reader_that_goes_away(small_run: Path) -> None:
    "`llmft predict … | head -1` is no failure."
    command = [sys.executable, "-c", ENTRY, "predict", str(small_run), "--batch-size", "1"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdin and process.stdout and process.stderr
    process.stdin.write("a wave\n" * 200)
    process.stdin.flush()
    assert "a wave" in process.stdout.readline()
    process.stdout.close()
    process.stdin.close()
    told = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=120) == 0
    assert "Traceback" not in told and "BrokenPipe" not in told


def test_other_commands_speak_json(small_run: Path, small_files: Path, small_model: Path) -> None:
    scores = llmft("eval", small_run, "--data", small_files / "test.jsonl", "--json")
    record = json.loads((small_run / "run.json").read_text(encoding="utf-8"))
    assert json.loads(scores.out)["accuracy"] == record["scores"]["test"]["accuracy"]
    assert json.loads(scores.out)["macro_f1"] == record["scores"]["test"]["macro_f1"]

    models = llmft("models", small_model, "--json")
    assert [line["name"] for line in json.loads(models.out)] == ["tiny", "tiny-encoder", str(small_model)]
    assert json.loads(models.out)[-1]["layers"] == 2

    runs = llmft("runs", small_run.parent, "--json")
    [line] = json.loads(runs.out)
    assert (line["run"], line["status"]) == ("finished", "finished")

    checked = llmft("check", small_files / "train.jsonl", small_files / "test.jsonl", "--json")
    found = json.loads(checked.out)
    assert found["n_rows"] == 66 and "66" in found["findings"]["rows"]
    kinds = {match["kind"] for match in found["leaks"]}
    assert kinds == {"near"} and len(found["leaks"]) == found["counts"]["leaks"]  # Small rows differ by a word

    tokens = llmft("tokens", small_files / "train.jsonl", "--model", small_model, "--json")
    seen = json.loads(tokens.out)
    assert (seen["rows"], seen["audit"]["n_rows"], len(seen["shown"])) == (66, 66, 3)

    report = llmft("report", small_run, "--json")
    assert json.loads(report.out)["report"] == str(small_run / "report.html")
    for outcome in (scores, models, runs, checked, tokens, report):
        assert (outcome.status, outcome.err) == (0, "")


def test_commands_for_people(small_run: Path, small_files: Path, small_model: Path) -> None:
    for command, needle in (
        (["eval", small_run, "--data", small_files / "test.jsonl"], "accuracy"),
        (["models", small_model], "Apache-2.0"),
        (["runs", small_run.parent], "finished"),
        (["check", small_files / "train.jsonl"], "66"),
        (["tokens", small_files / "train.jsonl"], "66 rows"),
        (["--version"], "."),
        (["--help"], "train"),
    ):
        outcome = llmft(*command)
        assert outcome.status == 0, outcome
        assert needle in outcome.out


def test_version() -> None:
    from llmft_nb import __version__

    assert llmft("--version").out == f"{__version__}\n"
    assert llmft_process("--version").out == f"{__version__}\n"


def test_odd_input_of_commands(small_run: Path, small_files: Path, tmp_path: Path) -> None:
    "Bytes that are no UTF-8, a folder that is not there, rows of columns with other names."
    for command in (["predict"], ["predict", "--json"]):
        arguments = [sys.executable, "-c", ENTRY, *command, str(small_run)]
        done = subprocess.run(
            arguments, input="ein Apfel für Zoë\n".encode("latin-1"), capture_output=True, timeout=240
        )
        told = done.stderr.decode()
        assert (done.returncode, done.stdout) == (2, b"") and "not UTF-8 (byte 0xfc)" in told, told
        assert "Traceback" not in told

    outcome = llmft("check", small_files / "train.jsonl", "--card", tmp_path / "no" / "such" / "card.md")
    assert outcome.status == 2 and "no/such" in outcome.err.replace("\n", "") and "check the path" in outcome.err


def test_plan_speaks_json_and_draws(small_files: Path, small_model: Path, at_home: Path) -> None:
    asked = ["--data", str(small_files / "train.jsonl"), "--model", str(small_model), "--precision", "f32"]
    outcome = llmft("plan", *asked, "--out", "runs/later", "--picture", "plans.png", "--price-hour", "1.5", "--json")
    assert outcome.status == 0, outcome
    told = json.loads(outcome.out)
    assert {line["strategy"] for line in told["plans"]} >= {"full", "top:2", "head", "lora:16"}
    assert told["recommended"]["strategy"] in {line["strategy"] for line in told["plans"]}
    assert all(line["price"] > 0 for line in told["plans"])
    assert (at_home / "plans.png").stat().st_size > 5_000 and not (at_home / "runs").exists()
    people = llmft("plan", *asked, "--strategy", "top:1")
    assert people.status == 0 and "most is held in" in people.out and "top:1" in people.out
