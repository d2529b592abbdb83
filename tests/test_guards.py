"""What a run does when memory or the disk falls short, when numbers go astray, and when two want one folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import small_rows
from small_models import LABELS
from torch import nn

from llmft_nb.callbacks import Callback
from llmft_nb.checkpoint import LOCK, hold_folder, list_checkpoints, load_checkpoint, verify_checkpoint
from llmft_nb.classify import make_evaluate
from llmft_nb.core import UserError
from llmft_nb.data import TextDataLoader, TextDataset
from llmft_nb.finetune import finetune
from llmft_nb.guards import FAR, N_FAR, LossCourse, Notices, Room
from llmft_nb.hparams import TrainSettings
from llmft_nb.inference import compute_rows, is_out_of_memory, pooled_features, predict_logits, predict_positions
from llmft_nb.modeling import LLMForSequenceClassification
from llmft_nb.runs import claim_folder
from llmft_nb.steps import StepPlan, halved
from llmft_nb.training import LLMTrainer

ROWS = small_rows(60)
NO_ROOM = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"


class Narrow:
    "A machine with room for so many rows, or tokens, at once; where it was too many is noted."

    def __init__(self, model: nn.Module, rows: int = 10**6, calls: tuple[int, ...] = (), evaluating: bool = False):
        self.rows, self.calls, self.evaluating = rows, calls, evaluating
        self.refused, self.seen, self.n_calls = list[int](), list[int](), 0
        model.register_forward_pre_hook(self.enter, with_kwargs=True)

    def enter(self, model: nn.Module, args: Any, batch: dict[str, torch.Tensor]) -> None:
        if (model.training, torch.is_grad_enabled()) != (not self.evaluating, not self.evaluating):
            return  # Scoring, or a trial before the first step
        n_rows = len(batch["input_ids"] if "input_ids" in batch else args[0])
        self.n_calls += 1
        if n_rows > self.rows or self.n_calls in self.calls:
            self.refused.append(n_rows)
            raise RuntimeError(NO_ROOM)
        self.seen.append(n_rows)


class Do(Callback):
    "Does something after a step."

    def __init__(self, step: int, act: Callable[[], None]) -> None:
        self.step, self.act = step, act

    def on_step(self, state: Any, values: Any) -> None:
        if state.step == self.step:
            self.act()


def trainer_of(folder: Path, out: Path | None = None, **changes: Any) -> tuple[LLMTrainer, TextDataLoader]:
    "A decoder without dropout, 48 rows, 6 steps an epoch, two epochs."
    options = {name: changes.pop(name) for name in ("callbacks", "optimizer", "log_every") if name in changes}
    model = LLMForSequenceClassification.from_pretrained(folder)
    asked: dict[str, Any] = {"epochs": 2, "batch_size": 8, "micro_batch_size": 8, "lr": 3e-3, "precision": "f32"}
    settings = TrainSettings(**(asked | {"save_every": 4} | changes))
    train, valid = TextDataset(ROWS[:48], model.tokenizer), TextDataset(ROWS[48:], model.tokenizer, label_names=LABELS)
    given = {"log_every": 1, "callbacks": (), **options}
    optimizer = given.pop("optimizer", None)
    made = optimizer(model.parameters()) if optimizer else None
    trainer = LLMTrainer(model, made, settings, evaluate=make_evaluate(valid), folder=out, **given)
    return trainer, TextDataLoader(train, batch_size=settings.batch_size, shuffle=True)


@pytest.fixture(scope="module")
def llama(save_small: Callable[..., Path]) -> Path:
    return save_small("Llama")


@pytest.fixture(scope="module")
def alone(llama: Path) -> tuple[np.ndarray, int]:
    "The losses of a run with room enough, and its steps."
    trainer, loader = trainer_of(llama)
    result = trainer.train(loader)
    return np.array(result.losses), result.n_steps


# --- memory ---


@pytest.mark.parametrize("call", range(1, 13))
def test_a_step_that_does_not_fit_is_taken_in_parts(call: int, llama: Path, alone: tuple[np.ndarray, int]) -> None:
    trainer, loader = trainer_of(llama)
    narrow = Narrow(trainer.model, calls=(call,))
    result = trainer.train(loader)
    assert len(narrow.refused) == 1 and max(narrow.seen[call:]) == 4
    assert result.n_steps == alone[1]
    np.testing.assert_allclose(np.array(result.losses), alone[0], rtol=1e-6, atol=1e-6)
    assert result.notes == (f"out of memory at step {call}: from there 4 rows at once at most, the step as before",)


def test_parts_shrink_until_they_fit(llama: Path, alone: tuple[np.ndarray, int]) -> None:
    trainer, loader = trainer_of(llama)
    narrow = Narrow(trainer.model, rows=1)
    result = trainer.train(loader)
    assert narrow.refused == [8, 4, 2] and set(narrow.seen) == {1}
    np.testing.assert_allclose(np.array(result.losses), alone[0], rtol=1e-6, atol=1e-6)


def test_memory_lost_in_the_middle_of_a_step(llama: Path, alone: tuple[np.ndarray, int]) -> None:
    "What the first micro-batches of a step had added to the gradient is not added twice."
    trainer, loader = trainer_of(llama, micro_batch_size=4)
    Narrow(trainer.model, calls=(4, 15))
    result = trainer.train(loader)
    np.testing.assert_allclose(np.array(result.losses), alone[0], rtol=1e-6, atol=1e-6)


def test_no_room_on_the_way_back(llama: Path, alone: tuple[np.ndarray, int]) -> None:
    trainer, loader = trainer_of(llama)
    left = [3]

    def refuse(slope: torch.Tensor) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    trainer.model.network.model.layers[0].mlp.down_proj.weight.register_hook(refuse)
    result = trainer.train(loader)
    np.testing.assert_allclose(np.array(result.losses), alone[0], rtol=1e-6, atol=1e-6)
    assert "step 3" in result.notes[0]


def test_an_error_of_another_kind_ends_the_run_as_it_is(llama: Path) -> None:
    trainer, loader = trainer_of(llama)

    def fail(*_: Any) -> None:
        if trainer.model.training and torch.is_grad_enabled():
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    trainer.model.network.model.layers[0].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        trainer.train(loader)


def test_a_step_that_cannot_be_taken_again_says_how_to_go_on() -> None:
    "Weights that move while the gradient is made, or other processes that wait."
    plan = StepPlan(TrainSettings(micro_batch_size=8), None, 1000)
    room = Room(nn.Linear(1, 1), plan, np.full(8, 5), can_repeat=False)

    def fail(_: StepPlan) -> torch.Tensor:
        raise MemoryError

    with pytest.raises(UserError, match=r"cannot be taken again.*--allow micro_batch_size and micro_batch_size 4"):
        room.compute(range(8), 3, fail, Notices())
    assert room.plan is plan and room.at_once == []


def test_tokens_are_halved_as_rows_are() -> None:
    lengths = np.array([100] * 2 + [10] * 30)
    smaller = halved(StepPlan(TrainSettings(micro_batch_size=32), None, 10**6), range(32), lengths)
    assert smaller is not None and (smaller.settings.micro_batch_size, smaller.most_tokens) == (16, 1600)
    one = StepPlan(TrainSettings(micro_batch_size=1), None, 10**6)
    assert halved(one, range(32), lengths) is None


def test_not_even_one_row(llama: Path, tmp_path: Path) -> None:
    trainer, loader = trainer_of(llama, tmp_path / "run")
    Narrow(trainer.model, rows=0)
    with pytest.raises(UserError, match=r"out of memory at step 1.*one row of .* tokens is too much.*llmft plan"):
        trainer.train(loader)


def test_a_smaller_part_is_remembered(llama: Path, tmp_path: Path) -> None:
    "A run that shrank and was then killed ends with the bits of one that shrank alone."
    ends = []
    for name, dies in (("whole", False), ("killed", True)):
        trainer, loader = trainer_of(llama, tmp_path / name)
        Narrow(trainer.model, calls=(3,))
        if dies:
            trainer.callbacks = [Do(6, lambda: os.kill(os.getpid(), 0) or (_ for _ in ()).throw(KeyError("dies")))]
            with pytest.raises(KeyError):
                trainer.train(loader)
            trainer, loader = trainer_of(llama, tmp_path / name)
            seen = Narrow(trainer.model).seen
            result = trainer.train(loader, resume=True)
            assert result.resumed_from == 4 and max(seen) == 4 and "step 3" in result.notes[0]
        else:
            trainer.train(loader)
        ends.append({key: value.clone() for key, value in trainer.model.state_dict().items()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_no_room_for_the_optimizer(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, loader = trainer_of(llama, tmp_path / "run")

    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    with pytest.raises(UserError, match="out of memory in the optimizer at step 1"):
        trainer.train(loader)


def test_only_the_scoring_shrinks_where_scoring_does_not_fit(llama: Path, alone: tuple[np.ndarray, int]) -> None:
    trainer, loader = trainer_of(llama)
    narrow = Narrow(trainer.model, rows=5, evaluating=True)
    seen = Narrow(trainer.model).seen
    result = trainer.train(loader)
    assert narrow.refused and max(narrow.seen) <= 5 and set(seen) == {8}
    np.testing.assert_array_equal(np.array(result.losses), alone[0])
    assert result.notes == ()


def test_every_kind_of_answer_in_smaller_batches(llama: Path) -> None:
    from small_models import answering

    from llmft_nb.modeling import LLMForCausalLM

    model = LLMForSequenceClassification.from_pretrained(llama)
    dataset = TextDataset(ROWS, model.tokenizer)
    logits, features = predict_logits(model, dataset), pooled_features(model, dataset)
    Narrow(model, rows=7, evaluating=True)
    np.testing.assert_allclose(predict_logits(model, dataset), logits, atol=1e-6)
    Narrow(model.network.base_model, rows=7, evaluating=True)
    np.testing.assert_allclose(pooled_features(model, dataset), features, atol=1e-6)
    writer, answers = answering(llama)
    assert isinstance(writer, LLMForCausalLM)
    whole = predict_positions(writer, answers)
    Narrow(writer, rows=3, evaluating=True)
    for one, other in zip(predict_positions(writer, answers), whole, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_what_is_no_lack_of_memory_is_raised() -> None:
    def fail(rows: list[int]) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        compute_rows(np.arange(1, 9), 4, fail)

    def full(rows: list[int]) -> None:
        raise MemoryError

    with pytest.raises(UserError, match=r"out of memory with one row of 8 tokens"):
        compute_rows(np.arange(1, 9), 4, full)
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(RuntimeError(NO_ROOM))
    assert not is_out_of_memory(ValueError("out of memory")) and not is_out_of_memory(RuntimeError("other"))


LIMITED = """
import resource, sys
import torch
from llmft_nb.inference import is_out_of_memory
torch.set_num_threads(1)
resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))
try:
    torch.empty(2**34, dtype=torch.uint8).fill_(1)
except Exception as error:
    sys.exit(0 if is_out_of_memory(error) else f"not told: {error!r}")
sys.exit("there was room")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_what_torch_says_where_memory_ends() -> None:
    told = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr


# --- numbers ---


@pytest.mark.parametrize("seed", range(8))
def test_a_number_that_is_none_stops_the_run_within_its_step(seed: int, llama: Path, tmp_path: Path) -> None:
    check_poison(seed, llama, tmp_path)


def check_poison(seed: int, base: Path, tmp_path: Path) -> None:
    "NaN or infinity, in an activation or a gradient, at some step: the rows are named, and no file has any."
    chosen = np.random.default_rng(seed)
    step, value = int(chosen.integers(1, 13)), [float("nan"), float("inf"), -float("inf")][int(chosen.integers(3))]
    trainer, loader = trainer_of(base, tmp_path / "run", log_every=5, save_every=1)
    layers, seen = trainer.model.network.model.layers, [0]
    layer = layers[int(chosen.integers(len(layers)))]

    def spoil(*given: Any) -> Any:
        is_step = len(given) == 1 or (trainer.model.training and torch.is_grad_enabled())  # No scoring, no trial
        if not is_step:
            return None
        seen[0] += 1
        if seen[0] != step:
            return None
        spoilt = given[-1].clone()
        spoilt.view(-1)[int(chosen.integers(spoilt.numel()))] = value
        return spoilt

    if chosen.random() < 0.5:
        layer.mlp.register_forward_hook(spoil)
    else:
        layer.mlp.up_proj.weight.register_hook(spoil)
    with pytest.raises(UserError) as caught:
        trainer.train(loader)
    assert f"at step {step}; the step was not taken" in caught.value.what
    order = [row for epoch in range(2) for row in loader.steps(epoch)][step - 1]
    assert caught.value.where == ", ".join(loader.dataset.places[row] for row in order[:8])
    saved = [
        *list_checkpoints(tmp_path / "run" / "checkpoints"),
        *list_checkpoints(tmp_path / "run" / "checkpoints", "best"),
    ]
    assert len(list_checkpoints(tmp_path / "run" / "checkpoints")) == min(2, step - 1)
    for folder in saved:
        assert all(tensor.isfinite().all() for tensor in load_checkpoint(folder)[0].values())
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())


@pytest.mark.parametrize("where", ["weight", "state"])
def test_nothing_that_is_no_number_is_saved(where: str, llama: Path, tmp_path: Path) -> None:
    trainer, loader = trainer_of(llama, tmp_path / "run", save_every=1, evals_per_epoch=1)
    weight = trainer.model.network.model.layers[0].mlp.up_proj.weight

    def spoil() -> None:
        with torch.no_grad():
            (weight if where == "weight" else optimizer[0].state[weight]["exp_avg"])[0, 0] = float("nan")

    optimizer: list[Any] = []
    make = torch.optim.AdamW.__init__

    def note(self: Any, *given: Any, **others: Any) -> None:
        make(self, *given, **others)
        optimizer.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "__init__", note)
        trainer.callbacks = [Do(3, spoil)]
        with pytest.raises(UserError, match=r"the checkpoint is not saved.*not finite"):
            trainer.train(loader)
    saved = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [folder.name for folder in saved] == ["step-00000001", "step-00000002"]
    assert all(verify_checkpoint(folder) == "" for folder in saved)


def test_a_loss_that_goes_astray_ends_the_run(llama: Path) -> None:
    trainer, loader = trainer_of(llama, lr=1.0)
    with pytest.raises(UserError, match=r"the loss has exploded: .* at step .*mend: begin anew with a lower --lr"):
        trainer.train(loader)


def test_a_loss_that_was_low_may_rise(llama: Path) -> None:
    "A model that was tuned already begins with a loss of nearly nothing."
    course = LossCourse()
    for step, loss in enumerate((9.0, 9.0, 1.0, 9.0, 9.0), 2):
        course.see([(1, 1.0), (step, loss)], 1e-3)
    assert course.n_high == 2, "it is counted anew after a loss that is low"
    course, losses = LossCourse(), [(1, 0.01)]
    for step in range(2, 20):
        losses.append((step, 0.01 * FAR + 0.9))
        course.see(losses, 1e-3)
    assert course.n_high == 0 and N_FAR > 1


# --- other settings ---


def stopped(base: Path, out: Path) -> None:
    "A run that ended without a word at its fifth step."
    trainer, loader = trainer_of(base, out, callbacks=[Do(5, lambda: (_ for _ in ()).throw(KeyError("dies")))])
    with pytest.raises(KeyError):
        trainer.train(loader)


def test_what_may_differ_is_said_by_name(llama: Path, tmp_path: Path) -> None:
    stopped(llama, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    trainer, loader = trainer_of(llama, tmp_path / "run", lr=1e-4, weight_decay=0.2)
    with pytest.raises(UserError) as caught:
        trainer.train(loader, resume=True)
    assert "\n  lr: was 0.003, now 0.0001\n  weight_decay: was " in caught.value.what
    assert caught.value.mend.endswith("or say --allow lr --allow weight_decay")
    rates = list[float]()

    class Rates(Callback):
        def on_step(self, state: Any, values: Any) -> None:
            rates.append(values["lr"])

    trainer, loader = trainer_of(llama, tmp_path / "other", lr=1e-4, weight_decay=0.2, callbacks=[Rates()])
    made = list[Any]()
    init = torch.optim.AdamW.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "__init__", lambda self, *a, **k: (init(self, *a, **k), made.append(self))[0])
        result = trainer.train(loader, resume=True, allow=["lr", "weight_decay"])
    assert max(rates) <= 1e-4, "the new rate is the one that is used"
    assert {group["weight_decay"] for group in made[-1].param_groups} == {0.0, 0.2}
    assert result.notes[0] == "went on at step 4 with another lr: was 0.003, now 0.0001"


def test_another_code_is_another_run(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmft_nb import training

    stopped(llama, tmp_path / "run")
    monkeypatch.setattr(training, "code_fingerprint", lambda: "of another version")
    trainer, loader = trainer_of(llama, tmp_path / "run")
    with pytest.raises(UserError, match=r"code: was .*, now of another version"):
        trainer.train(loader, resume=True)
    assert trainer_of(llama, tmp_path / "run")[0].train(loader, resume=True, allow=["code"]).resumed_from == 4


def test_what_cannot_be_allowed(small_model: Path, small_files: Path, tmp_path: Path) -> None:
    stopped_run = tmp_path / "run"
    options: dict[str, Any] = {"model": small_model, "out": stopped_run, "epochs": 1, "precision": "f32"}
    with pytest.raises(KeyError):
        finetune(small_files / "train.jsonl", callbacks=[Do(2, lambda: {}["dies"])], save_every=1, **options)
    for name, mend in (
        ("strategy", "what may differ is train"),
        ("learning_rte", "what may differ"),
        ("epoch", "did you mean epochs"),
    ):
        with pytest.raises(UserError, match=f"cannot be allowed.*{mend}"):
            finetune(small_files / "train.jsonl", resume=True, allow=[name], save_every=1, **options)
    run = finetune(
        small_files / "train.jsonl",
        resume=True,
        allow=["epochs"],
        callbacks=(),
        **(options | {"epochs": 2}),
        save_every=1,
    )
    assert run.record.settings["epochs"] == 2 and any("epochs: was 1, now 2" in note for note in run.record.notes)
    assert "epochs: was 1, now 2" in (run.folder / "report.html").read_text(encoding="utf-8")


def test_other_rows_may_be_allowed(small_model: Path, small_files: Path, tmp_path: Path) -> None:
    files = {name: small_files / f"{name}.jsonl" for name in ("valid", "test")}
    options: dict[str, Any] = {"model": small_model, "out": tmp_path / "run", "epochs": 2, "precision": "f32", **files}
    with pytest.raises(KeyError):
        finetune(small_files / "train.jsonl", callbacks=[Do(2, lambda: {}["dies"])], save_every=1, **options)
    lines = (small_files / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(lines[1:]), encoding="utf-8")
    with pytest.raises(UserError, match=r"train: was .*--allow train"):
        finetune(tmp_path / "other.jsonl", resume=True, save_every=1, **options)
    run = finetune(tmp_path / "other.jsonl", resume=True, allow=["train"], save_every=1, callbacks=(), **options)
    assert run.record.status == "finished" and any("another rows: was " in note for note in run.record.notes)


# --- one folder, one run ---

HOLD = """
import sys, time
from pathlib import Path
from llmft_nb.checkpoint import hold_folder
with hold_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    "A process that holds a folder."
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run"), "60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_held_folder_is_refused_at_once(
    holder: subprocess.Popen[str], tmp_path: Path, small_model: Path, small_files: Path
) -> None:
    for options in ({}, {"resume": True}):
        started_s = time.monotonic()
        with pytest.raises(UserError) as caught:
            finetune(small_files / "train.jsonl", model=small_model, out=tmp_path / "run", **options)
        assert time.monotonic() - started_s < 1
        assert caught.value.what == "another run writes here" and f"process {holder.pid} on" in caught.value.why
    with pytest.raises(UserError, match="another run writes here"):
        trainer, loader = trainer_of(small_model, tmp_path / "run")
        trainer.train(loader)
    assert holder.poll() is None and (tmp_path / "run" / LOCK).exists()


def test_the_other_processes_of_a_run_do_not_ask(
    holder: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with hold_folder(tmp_path / "run"):
        assert holder.poll() is None
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="another run writes here"), hold_folder(tmp_path / "run"):
        pass


def test_a_dead_owner_has_let_go(
    holder: subprocess.Popen[str], tmp_path: Path, small_model: Path, small_files: Path
) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / LOCK).exists()
    run = finetune(small_files / "train.jsonl", model=small_model, out=tmp_path / "run", epochs=1, callbacks=())
    assert run.record.status == "finished" and list(run.folder.rglob(".*")) == []


def test_a_list_of_runs_tells_the_living_from_the_dead(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    from llmft_nb.core import RunRecord, write_record
    from llmft_nb.runs import list_runs

    (tmp_path / "other").mkdir()
    for name in ("run", "other"):
        write_record(tmp_path / name, RunRecord("classify", "running", {}, {}, {}, {}, {}))
    assert [line["status"] for line in list_runs(tmp_path)] == ["stopped", "running"]
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert [line["status"] for line in list_runs(tmp_path)] == ["stopped", "stopped"]


def test_two_runs_without_a_folder_take_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmft_nb import runs

    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-c", HOLD, "runs/001", "60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        told = iter([Path("runs/001"), runs.next_folder()])
        monkeypatch.setattr(runs, "next_folder", lambda: next(told))
        with claim_folder(None, resume=False) as folder:
            assert folder == Path("runs/002") and (folder / LOCK).exists()
        process.kill()
    assert not Path("runs/002").exists()


def test_a_mistake_leaves_no_folder(tmp_path: Path, small_model: Path) -> None:
    with pytest.raises(UserError):
        finetune(tmp_path / "no such rows.jsonl", model=small_model, out=tmp_path / "deep" / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_torn_lock_tells_what_it_can(tmp_path: Path) -> None:
    with hold_folder(tmp_path / "run"):
        (tmp_path / "run" / LOCK).write_text("{", encoding="utf-8")
        command = [sys.executable, "-c", HOLD, str(tmp_path / "run"), "0"]
        told = subprocess.run(command, capture_output=True, text=True)
        assert "another process holds it" in told.stderr


# --- the disk ---


def test_a_disk_that_is_too_small_is_heard_of_first(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    trainer, loader = trainer_of(llama, tmp_path / "run")
    with pytest.raises(UserError, match=r"the disk is too full for this run.* MB, 0.1 MB are free.*mend: make room"):
        trainer.train(loader)
    record = [path.name for path in (tmp_path / "run").iterdir()] if (tmp_path / "run").exists() else []
    assert record == [], "nothing was written"


def test_what_is_said_to_be_needed_is_what_a_run_writes(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmft_nb import training

    run = finetune(ROWS[:48], model=llama, out=tmp_path / "run", epochs=1, callbacks=(), precision="f32")
    last = list_checkpoints(run.folder / "checkpoints")[-1]
    best = list_checkpoints(run.folder / "checkpoints", "best")[-1]
    written = sum(path.stat().st_size for folder in (last, best) for path in folder.iterdir())
    written += (run.folder / "model" / "model.safetensors").stat().st_size
    asked = list[int]()
    trainer, loader = trainer_of(llama, tmp_path / "other")
    monkeypatch.setattr(training, "check_disk", lambda folder, needed: asked.append(needed))
    trainer.train(loader)
    assert asked == [pytest.approx(written, rel=0.1)]
    assert json.loads((run.folder / "run.json").read_text(encoding="utf-8"))["notes"] == []
