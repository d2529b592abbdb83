"""A run that was killed, stopped, or found its disk full goes on, and ends with the same bits as one left alone."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from small import small_rows, write_jsonl

from llmft_nb.core import Interrupted, UserError

ROOT = Path(__file__).resolve().parents[1]


class Crash(BaseException):
    "Stands for the end of the process: nobody catches it."


@dataclass
class Hook:
    "A callback that does something at a step, in one of its methods."

    event: str  # "on_step", "on_evaluate" or "on_save"
    step: int  # The first step at which it acts
    act: Callable[[], None]  # What it does
    seen: list[str] = field(default_factory=list)  # Names of all events

    def __getattr__(self, name: str) -> Callable[..., None]:
        if not name.startswith("on_"):
            raise AttributeError(name)

        def listen(state: Any, *_: Any) -> None:
            self.seen.append(name)
            if name == self.event and state.step >= self.step:
                self.act()

        return listen


def crash() -> None:
    raise Crash


def tensors_digest(tensors: Mapping[str, Any]) -> str:
    "One SHA-256 of names and bits."
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Ended:
    "All that must not depend on interruptions."

    result: dict[str, Any]  # As `train` returned it, without the step it was resumed from
    weights: str  # SHA-256 of the model's weights
    optimizer: str  # SHA-256 of the last checkpoint's tensors
    state: str  # Its other file
    metrics: str  # The log


class Training:
    "Runs of one small model on the same rows; every call begins with a freshly loaded model."

    def __init__(
        self,
        model: Path,
        rows: list[dict[str, Any]],
        valid: list[dict[str, Any]],
        strategy: str = "full",
        **settings: Any,
    ) -> None:
        self.model, self.rows, self.valid, self.strategy = model, rows, valid, strategy
        self.settings: dict[str, Any] = {"epochs": 2, "batch_size": 8, "lr": 3e-3, "save_every": 4}
        self.settings |= {"evals_per_epoch": 2, "precision": "f32"} | settings
        self.resumed_from = 0

    def run(self, folder: Path, *, resume: bool = False, callbacks: Any = (), **settings: Any) -> Ended:
        from llmft_nb.adapters import apply_strategy
        from llmft_nb.checkpoint import load_checkpoint
        from llmft_nb.classify import make_evaluate
        from llmft_nb.data import TextDataLoader, TextDataset
        from llmft_nb.hparams import TrainSettings
        from llmft_nb.modeling import LLMForSequenceClassification
        from llmft_nb.strategy import parse_strategy
        from llmft_nb.training import LLMTrainer
        from llmft_nb.validation import EarlyStopping

        chosen = TrainSettings(**(self.settings | settings))
        model = LLMForSequenceClassification.from_pretrained(self.model)
        apply_strategy(model, parse_strategy(self.strategy))
        train = TextDataset(self.rows, model.tokenizer)
        valid = TextDataset(self.valid, model.tokenizer, label_names=train.label_names)
        trainer = LLMTrainer(
            model,
            settings=chosen,
            evaluate=make_evaluate(valid),
            stopping=EarlyStopping(chosen.patience),
            folder=folder,
            callbacks=callbacks,
            log_every=3,
            strategy=self.strategy,
        )
        loader = TextDataLoader(train, batch_size=chosen.batch_size, shuffle=True, seed=chosen.seed)
        result = trainer.train(loader, resume=resume)
        self.resumed_from = result.resumed_from
        told = {name: value for name, value in vars(result).items() if name != "resumed_from"}
        last = max((folder / "checkpoints").glob("step-*"))
        tensors, _ = load_checkpoint(last)
        return Ended(
            result=told,
            weights=tensors_digest(model.state_dict()),
            optimizer=tensors_digest(tensors),
            state=(last / "state.json").read_text(encoding="utf-8"),
            metrics=(folder / "metrics.jsonl").read_text(encoding="utf-8"),
        )

    def crash_at(self, folder: Path, event: str, step: int) -> None:
        "Begin a run that ends without a word."
        with pytest.raises(Crash):
            self.run(folder, callbacks=[Hook(event, step, crash)])


@pytest.fixture(scope="module")
def training(save_small: Callable[..., Path]) -> Training:
    "An encoder with dropout; 66 rows, 9 steps an epoch, 18 in all, the last of each epoch with 2 rows."
    rows = small_rows(90)
    return Training(save_small("Bert"), rows[:66], rows[66:])


@pytest.fixture(scope="module")
def alone(training: Training, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    "What comes of it when nobody interferes."
    return training.run(tmp_path_factory.mktemp("alone") / "run")


# --- killed ---


@pytest.mark.parametrize(
    ("task", "strategy", "n_kills"),
    [("classify", "full", 3), ("tag", "top:1", 2), ("instruct", "top:1", 2), ("text", "lora:4", 2)],
)
def test_killed_at_random_instants(task: str, strategy: str, n_kills: int, small_model: Path) -> None:
    "R1 in short: `benchmarks/kill_resume.py`, with real processes and a real `kill -9`."
    command = [sys.executable, str(ROOT / "benchmarks" / "kill_resume.py"), "--start", "fork", "--strategy", strategy]
    command += ["--task", task, "--kills", str(n_kills), "--model", str(small_model), "--rows", "160", "--epochs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{n_kills} of {n_kills} identical" in done.stdout


def test_reruns_are_identical(training: Training, alone: Ended, tmp_path: Path) -> None:
    assert training.run(tmp_path / "another folder, ünd ein Name") == alone


@pytest.mark.parametrize("step", range(1, 19))
def test_resumed_after_every_step(step: int, training: Training, alone: Ended, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    training.crash_at(folder, "on_step", step)
    assert training.run(folder, resume=True) == alone
    saved = [saved for saved in (4, 8, 9, 12, 16, 18) if saved < step]
    assert training.resumed_from == (saved[-1] if saved else 0)


@pytest.mark.parametrize("strategy", ["gradual", "head-then-full", "lora:2", "layers:block 1"])
def test_resumed_whatever_moves(strategy: str, training: Training, tmp_path: Path) -> None:
    "Saved while parts are closed, and after they have opened."
    own = Training(training.model, training.rows, training.valid, strategy)
    alone = own.run(tmp_path / "alone")
    for step in (5, 9, 10, 17):
        own.crash_at(tmp_path / f"run {step}", "on_step", step)
        assert own.run(tmp_path / f"run {step}", resume=True) == alone
        assert own.resumed_from > 0


def test_killed_while_it_wrote_the_last_checkpoint(training: Training, alone: Ended, tmp_path: Path) -> None:
    "Nothing is left to do or to save, and yet what the write left behind goes."
    training.run(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / ".step-00000018.writing-77").mkdir()
    assert training.run(tmp_path / "run", resume=True) == alone
    assert training.resumed_from == 18
    assert list((tmp_path / "run").rglob(".*")) == []


@pytest.mark.parametrize("event", ["on_evaluate", "on_save"])
def test_resumed_twice(event: str, training: Training, alone: Ended, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    training.crash_at(folder, event, 5)
    with pytest.raises(Crash):
        training.run(folder, resume=True, callbacks=[Hook(event, 13, crash)])
    assert training.run(folder, resume=True) == alone


@pytest.mark.parametrize(
    "settings",
    [
        {"micro_batch_size": 3},
        {"class_weights": "balanced", "schedule": "cosine"},
        {"epochs": 6, "patience": 2, "evals_per_epoch": 1},
        {"save_every": 1},
    ],
    ids=", ".join,
)
def test_resumed_under_other_settings(settings: dict[str, Any], training: Training, tmp_path: Path) -> None:
    alone = training.run(tmp_path / "alone", **settings)
    with pytest.raises(Crash):
        training.run(tmp_path / "run", callbacks=[Hook("on_step", 11, crash)], **settings)
    assert training.run(tmp_path / "run", resume=True, **settings) == alone
    assert training.resumed_from > 0


def test_log_has_every_step_once(training: Training, alone: Ended, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    training.crash_at(folder, "on_step", 12)
    training.run(folder, resume=True)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [3, 6, 9, 12, 15, 18]
    assert [line["step"] for line in lines if "valid_accuracy" in line] == [4, 9, 13, 18]
    assert dict(alone.result["losses"]) == {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_how_often_is_saved_changes_nothing(training: Training, alone: Ended, tmp_path: Path) -> None:
    "The one setting a resumed run may change."
    with pytest.raises(Crash):
        training.run(tmp_path / "run", callbacks=[Hook("on_step", 11, crash)], save_every=2)
    ended = training.run(tmp_path / "run", resume=True, save_every=7)
    assert training.resumed_from == 10
    assert (ended.weights, ended.optimizer, ended.metrics) == (alone.weights, alone.optimizer, alone.metrics)


def test_two_checkpoints_are_kept(training: Training, tmp_path: Path) -> None:
    training.run(tmp_path / "run", save_every=3)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.startswith("step"))
    assert names == ["step-00000015", "step-00000018"]
    assert list((tmp_path / "run").rglob(".*")) == []


def calls_of_a_save(monkeypatch: pytest.MonkeyPatch, last: int) -> list[str]:
    "Count what a save asks of the system; the call of number `last` is the one at which the process dies."
    made: list[str] = []

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            made.append(name)
            if len(made) == last:
                if name == "write":
                    function(*arguments[:-1], arguments[-1][: len(arguments[-1]) // 2])
                raise Crash
            return function(*arguments, **options)

        return call

    from llmft_nb import checkpoint

    monkeypatch.setattr(checkpoint, "write_synced", counting("write", checkpoint.write_synced))
    for module, name in ((os, "fsync"), (os, "replace"), (os, "mkdir"), (os, "rmdir"), (os, "unlink")):
        monkeypatch.setattr(module, name, counting(name, getattr(module, name)))
    return made


def save_step(parent: Path, step: int) -> None:
    "As a run does it: new best weights, then the state that speaks of them, then the tidying."
    import torch

    from llmft_nb.checkpoint import checkpoint_name, rotate_checkpoints, save_checkpoint

    tensors = {"weights.w": torch.full((100,), float(step))}
    save_checkpoint(parent, checkpoint_name("best", step), tensors, {})
    save_checkpoint(parent, checkpoint_name("step", step), tensors, {"step": step, "best_step": step})
    rotate_checkpoints(parent)


def check_found(parent: Path, steps: set[int]) -> None:
    "The newest whole checkpoint is one of these, and its best weights are there."
    from llmft_nb.checkpoint import checkpoint_name, find_checkpoint, load_checkpoint

    found = find_checkpoint(parent)
    assert found.folder is not None and found.skipped == ()
    tensors, state = load_checkpoint(found.folder)
    assert state["step"] in steps and set(tensors["weights.w"].tolist()) == {float(state["step"])}
    best, _ = load_checkpoint(parent / checkpoint_name("best", state["best_step"]))
    assert set(best["weights.w"].tolist()) == {float(state["step"])}


def calls_of_a_whole_save(parent: Path) -> list[str]:
    "What the third save of a run asks of the system."
    for step in (4, 8):
        save_step(parent, step)
    with pytest.MonkeyPatch.context() as patch:
        made = calls_of_a_save(patch, last=0)
        save_step(parent, 12)
    return made


def check_last_call(last: int, begun: bool, parent: Path) -> None:
    "Die at a call of a save, perhaps one that an earlier attempt had begun; what is left can be gone on with."
    import torch

    from llmft_nb.checkpoint import checkpoint_name, missing_best, save_checkpoint

    for step in (4, 8):
        save_step(parent, step)
    if begun:  # An earlier attempt at step 12 got as far as its best weights
        save_checkpoint(parent, checkpoint_name("best", 12), {"weights.w": torch.full((100,), 12.0)}, {})
    with pytest.MonkeyPatch.context() as patch:
        calls_of_a_save(patch, last)
        with contextlib.suppress(Crash):
            save_step(parent, 12)
    check_found(parent, {8, 12})
    save_step(parent, 16)
    check_found(parent, {16})
    assert list(parent.glob(".*")) == [], last
    assert [missing_best(path) for path in parent.glob("step-*")] == ["", ""], "either one can be gone on with"


def test_every_call_of_a_save_as_the_last(tmp_path: Path) -> None:
    "Whatever a save did last, the newest whole checkpoint is found with its best weights, and the next save tidies up."
    made = calls_of_a_whole_save(tmp_path / "counted")
    assert {"write", "fsync", "replace", "mkdir", "rmdir", "unlink"} == set(made)
    for begun in (False, True):
        for last in range(1, len(made) + 9 * begun):
            check_last_call(last, begun, tmp_path / f"{begun}-{last}")


# --- refused ---


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"lr": 1e-3}, ["lr: was 0.003, now 0.001"]),
        ({"batch_size": 16, "seed": 1}, ["batch_size: was 8, now 16", "seed: was 0, now 1", "n_steps: was 18, now 10"]),
        ({"epochs": 3}, ["epochs: was 2, now 3"]),
        ({"precision": "bf16"}, ["precision: was f32, now bf16"]),
    ],
)
def test_other_settings_are_refused(settings: dict, named: list[str], training: Training, tmp_path: Path) -> None:
    training.crash_at(tmp_path / "run", "on_step", 7)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError) as caught:
        training.run(tmp_path / "run", resume=True, **settings)
    assert all(line in caught.value.what for line in named)
    assert caught.value.where == "resume" and caught.value.mend
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_other_rows_and_threads_are_refused(training: Training, tmp_path: Path) -> None:
    import torch

    training.crash_at(tmp_path / "run", "on_step", 7)
    changed = [*training.rows[:-1], training.rows[-1] | {"text": "one word more"}]
    with pytest.raises(UserError, match="rows: was"):
        Training(training.model, changed, training.valid).run(tmp_path / "run", resume=True)
    try:
        torch.set_num_threads(2)
        with pytest.raises(UserError, match="threads: was 1, now 2"):
            training.run(tmp_path / "run", resume=True)
    finally:
        torch.set_num_threads(1)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, small_model: Path, small_files: Path) -> Path:
    "The folder of a run of the command that ended without a word after its first checkpoints."
    from llmft_nb.finetune import finetune

    folder = tmp_path_factory.mktemp("stopped") / "run"
    held_out = {name: small_files / f"{name}.jsonl" for name in ("valid", "test")}
    options: dict[str, Any] = {"epochs": 2, "batch_size": 8, "lr": 3e-3, "precision": "f32", "save_every": 4}
    with pytest.raises(Crash):
        hook = Hook("on_step", 11, crash)
        finetune(small_files / "train.jsonl", model=small_model, out=folder, callbacks=[hook], **held_out, **options)
    return folder


def resume_command(out: Path, base: Path, files: Path, **changes: Any) -> list[str]:
    "The command that goes on with `stopped`, changed."
    options = {"data": files / "train.jsonl", "valid": files / "valid.jsonl", "test": files / "test.jsonl"}
    options |= {"model": base, "out": out, "epochs": 2, "batch-size": 8, "lr": 3e-3, "precision": "f32"}
    options |= {"save-every": 4}
    return ["train", "--resume", *(f"--{name}={value}" for name, value in (options | changes).items())]


def contents(folder: Path) -> dict[str, bytes]:
    "Everything in a folder."
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lr": 0.001, "epochs": 5}, ["epochs: was 2, now 5", "lr: was 0.003, now 0.001"]),
        ({"strategy": "top:1"}, ["strategy: was full, now top:1"]),
        ({"init": "random"}, ["init: was pretrained, now random"]),
        ({"data": "{other}"}, ["train: was "]),
        ({"test": "{other}"}, ["test: was "]),
        ({"valid": "{other}"}, ["valid: was "]),
        ({"model": "{llama}"}, ["model: was "]),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_the_command_refuses_another_run(
    changes: dict[str, Any],
    named: list[str],
    stopped: Path,
    small_model: Path,
    small_files: Path,
    save_small: Callable[..., Path],
    tmp_path: Path,
) -> None:
    from typer.testing import CliRunner

    from llmft_nb.cli import app

    shutil.copytree(stopped, tmp_path / "run")
    other = write_jsonl(tmp_path / "other.jsonl", small_rows(40, seed=5))
    given = {"{other}": other, "{llama}": save_small("Llama", initializer_range=0.03)}
    changes = {name: given.get(value, value) for name, value in changes.items()}
    before = contents(tmp_path / "run")
    told = CliRunner().invoke(app, resume_command(tmp_path / "run", small_model, small_files, **changes))
    assert told.exit_code == 2, told.stderr
    assert "this is not the run that was saved" in told.stderr and "mend" in told.stderr
    assert all(line in told.stderr for line in named)
    assert contents(tmp_path / "run") == before


def test_the_command_goes_on_and_then_has_nothing_to_do(
    stopped: Path, small_run: Path, small_model: Path, small_files: Path, tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    from llmft_nb.cli import app

    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    told = CliRunner().invoke(app, [*resume_command(run, small_model, small_files, **{"save-every": 200}), "--json"])
    assert told.exit_code == 0, told.stderr
    for name in ("metrics.jsonl", "test_predictions.jsonl", "model/model.safetensors"):
        assert (run / name).read_bytes() == (small_run / name).read_bytes(), name
    first = json.loads(told.stdout)

    before, times = contents(run), {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    told = CliRunner().invoke(app, [*resume_command(run, small_model, small_files), "--json"])
    assert told.exit_code == 0, told.stderr
    assert json.loads(told.stdout) == first
    assert contents(run) == before
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == times

    told = CliRunner().invoke(app, resume_command(run, small_model, small_files, epochs=9))
    assert told.exit_code == 2
    assert "epochs: was 2, now 9" in told.stderr
    assert contents(run) == before

    (run / "report.html").unlink()  # As a kill between the last two writes leaves it
    told = CliRunner().invoke(app, [*resume_command(run, small_model, small_files), "--json"])
    assert told.exit_code == 0
    assert contents(run) == before


def test_what_a_killed_write_left_is_swept_up(
    stopped: Path, small_model: Path, small_files: Path, tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    from llmft_nb.cli import app

    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    for name in (".run.json.77.tmp", ".model.writing/config.json", ".model.removed-77/config.json"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("half", encoding="utf-8")
    (run / "checkpoints" / ".step-00000012.writing-77").mkdir()
    told = CliRunner().invoke(app, resume_command(run, small_model, small_files))
    assert told.exit_code == 0, told.stderr
    assert list(run.rglob(".*")) == []


# --- signals ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("event", ["on_step", "on_evaluate", "on_save"])
def test_stopped_by_a_signal(number: int, event: str, training: Training, alone: Ended, tmp_path: Path) -> None:
    folder, before = tmp_path / "run", signal.getsignal(number)
    hook = Hook(event, 7, lambda: signal.raise_signal(number))
    with pytest.raises(Interrupted) as caught:
        training.run(folder, callbacks=[hook])
    assert caught.value.exit_status == {signal.SIGINT: 130, signal.SIGTERM: 143}[signal.Signals(number)]
    assert signal.getsignal(number) is before
    step = {"on_step": 7, "on_evaluate": 9, "on_save": 8}[event]
    assert (folder / "checkpoints" / f"step-{step:08d}").is_dir()
    assert hook.seen[-1] == "on_train_end"
    assert training.run(folder, resume=True) == alone
    assert training.resumed_from == step


def test_a_second_signal_does_not_wait(training: Training, tmp_path: Path) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        training.run(tmp_path / "run", callbacks=[Hook("on_step", 7, twice)])


def test_what_was_ignored_stays_ignored(training: Training, alone: Ended, tmp_path: Path) -> None:
    "A shell starts the background jobs of a script with SIGINT ignored: Ctrl-C is not meant for them."
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        hook = Hook("on_step", 7, lambda: signal.raise_signal(signal.SIGINT))
        assert training.run(tmp_path / "run", callbacks=[hook]).weights == alone.weights
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_sigterm_to_the_command(small_model: Path, small_files: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from llmft_nb.cli import app
    from llmft_nb.core import read_record

    model, files = small_model, small_files
    arguments = resume_command(tmp_path / "run", model, files, epochs=12)
    command = [sys.executable, "-c", "from llmft_nb.cli import main; main()", *arguments]
    log, started_s = tmp_path / "run" / "metrics.jsonl", time.monotonic()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        while not (log.exists() and log.read_bytes().count(b"\n") >= 3):
            assert time.monotonic() < started_s + 120 and process.poll() is None, process.stderr.read()
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        told = process.stderr.read()
    assert process.returncode == 143
    assert "stopped by signal 15" in told and "--resume" in told and "Traceback" not in told
    assert read_record(tmp_path / "run").status == "interrupted"
    for folder in ("run", "alone"):
        told = CliRunner().invoke(app, resume_command(tmp_path / folder, model, files, epochs=12))
        assert told.exit_code == 0, told.stderr
    for name in ("metrics.jsonl", "test_predictions.jsonl", "model/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name


# --- damaged ---


def flip(path: Path, position: int) -> None:
    "Turn one bit of a file around."
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1 << (position % 8)
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "one bit": lambda path: flip(path, path.stat().st_size // 2 + 3),
}
FILES = ("tensors.safetensors", "state.json", "manifest.json")


@pytest.fixture(scope="module")
def crashed(training: Training, tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A run that crashed at step 14, with checkpoints of steps 9 and 12."
    folder = tmp_path_factory.mktemp("crashed") / "run"
    training.crash_at(folder, "on_step", 14)
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_damaged_checkpoint(
    file: str, damage: str, crashed: Path, training: Training, alone: Ended, tmp_path: Path, caplog: Any
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(crashed, folder)
    DAMAGES[damage](folder / "checkpoints" / "step-00000012" / file)
    with caplog.at_level("WARNING", "llmft_nb"):
        assert training.run(folder, resume=True) == alone
    assert training.resumed_from == 9
    assert "step-00000012" in caplog.text
    names = {path.name for path in (folder / "checkpoints").iterdir() if "best" not in path.name}
    assert names == {"damaged-step-00000012", "step-00000016", "step-00000018"}, "the damaged one is kept aside"


def test_flipped_bits_are_never_silent(crashed: Path, tmp_path: Path) -> None:
    from llmft_nb.checkpoint import find_checkpoint, load_checkpoint

    whole, state = load_checkpoint(crashed / "checkpoints" / "step-00000012")
    for file in FILES:
        size = (crashed / "checkpoints" / "step-00000012" / file).stat().st_size
        for i in range(20):
            folder = tmp_path / f"{file}-{i}"
            shutil.copytree(crashed / "checkpoints", folder)
            flip(folder / "step-00000012" / file, i * size // 20 + i)
            found = find_checkpoint(folder)
            assert found.folder is not None
            if file != "manifest.json":
                assert found.folder.name == "step-00000009", (file, i)
            elif found.folder.name == "step-00000012":  # A name nobody reads: the files themselves are as they were
                tensors, same = load_checkpoint(found.folder)
                assert tensors_digest(tensors) == tensors_digest(whole) and same == state


def test_damaged_best_weights(crashed: Path, training: Training, alone: Ended, tmp_path: Path, caplog: Any) -> None:
    folder = tmp_path / "run"
    shutil.copytree(crashed, folder)
    for best in (folder / "checkpoints").glob("best-*"):
        flip(best / "tensors.safetensors", 5000)
    with caplog.at_level("WARNING", "llmft_nb"):
        assert training.run(folder, resume=True) == alone
    assert "its best weights" in caplog.text


def test_nothing_whole_is_left(crashed: Path, training: Training, alone: Ended, tmp_path: Path, caplog: Any) -> None:
    folder = tmp_path / "run"
    shutil.copytree(crashed, folder)
    for path in (folder / "checkpoints").glob("step-*/state.json"):
        path.unlink()
    with caplog.at_level("WARNING", "llmft_nb"):
        assert training.run(folder, resume=True) == alone
    assert training.resumed_from == 0
    assert len(list((folder / "checkpoints").glob("damaged-*"))) == 2
    assert "step-00000009" in caplog.text and "step-00000012" in caplog.text


# --- the disk is full ---


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    "A folder on a disk of a few megabytes, where we may mount one."
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no disk may be mounted here; the limit on files is tested instead")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def check_full(caught: UserError, folder: Path) -> None:
    "The message names bytes; earlier checkpoints are whole; nothing unfinished lies about."
    from llmft_nb.checkpoint import list_checkpoints, verify_checkpoint

    assert "could not be saved" in caught.what and str(folder / "checkpoints") in caught.where
    assert " MB, " in caught.why and "are free" in caught.why
    assert "--resume" in caught.mend
    saved = list_checkpoints(folder / "checkpoints")
    assert saved and all(verify_checkpoint(path) == "" for path in saved)
    assert [path.name for path in (folder / "checkpoints").glob(".*")] == []


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a disk in memory")
def test_full_disk(training: Training, alone: Ended, small_disk: Path) -> None:
    folder, ballast = small_disk / "run", small_disk / "ballast"

    def fill() -> None:
        if not ballast.exists():
            ballast.write_bytes(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize - 200_000))

    subprocess.run(["mount", "-o", "remount,size=12m", str(small_disk)], check=True)
    with pytest.raises(UserError) as caught:
        training.run(folder, callbacks=[Hook("on_step", 10, fill)])
    check_full(caught.value, folder)
    ballast.unlink()
    assert training.run(folder, resume=True) == alone
    assert training.resumed_from == 9


def test_limit_on_files(training: Training, alone: Ended, tmp_path: Path) -> None:
    "As a full disk, where no disk can be mounted: no file may grow beyond 300 kB."
    folder, (soft, hard) = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(UserError) as caught:
            shrink = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))  # noqa: E731
            training.run(folder, callbacks=[Hook("on_step", 10, shrink)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    check_full(caught.value, folder)
    assert training.run(folder, resume=True) == alone


def test_full_disk_in_the_log(
    small_model: Path, small_files: Path, small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    "A line of the log is no checkpoint: the message is short, no traceback, and the run goes on afterwards."
    from typer.testing import CliRunner

    from llmft_nb.callbacks import MetricsFile
    from llmft_nb.cli import app

    command = resume_command(tmp_path / "run", small_model, small_files)
    with monkeypatch.context() as patch:

        def fail(self: MetricsFile, values: Mapping[str, Any]) -> None:
            if values["step"] == 10:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(self, values)

        write = MetricsFile.write
        patch.setattr(MetricsFile, "write", fail)
        told = CliRunner().invoke(app, command)
    assert told.exit_code == 1
    assert "could not write: No space left on device" in told.stderr and "--resume" in told.stderr
    told = CliRunner().invoke(app, command)
    assert told.exit_code == 0, told.stderr
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (small_run / name).read_bytes(), name
