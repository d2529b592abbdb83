"Plans held against what torch's allocator and the clock say, and what is told where there is none."

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small import small_rows
from small_models import LABELS
from torch.profiler import ProfilerActivity, profile

from llmft_nb import plan_check, planning, timing
from llmft_nb.adapters import apply_strategy
from llmft_nb.bases import base_config
from llmft_nb.callbacks import Callback
from llmft_nb.core import UserError, read_record
from llmft_nb.data import TextDataLoader, TextDataset
from llmft_nb.devices import DeviceSpec, find_device
from llmft_nb.dialogues import InstructDataset, check_instruct
from llmft_nb.finetune import finetune
from llmft_nb.hparams import TrainSettings, resolve_settings
from llmft_nb.memory import SLACK_BYTES, find_depths, largest_micro_batch, plan_memory
from llmft_nb.modeling import LLMForCausalLM, LLMForSequenceClassification, TunableModel, size_head
from llmft_nb.rehearsal import Job, count_steps
from llmft_nb.rows import read_rows
from llmft_nb.strategy import parse_strategy
from llmft_nb.timing import Measurements, Pace, plan_time, remembered_memory
from llmft_nb.training import LLMTrainer

DEEP = {"Bert": {"num_hidden_layers": 6}, "GPT2": {"n_layer": 6}, "Llama": {"num_hidden_layers": 6}}
DEEP |= {"Qwen3": {"num_hidden_layers": 6}}


def model_of(folder: Path, task: str) -> tuple[TunableModel, Any]:
    "A model, and rows for it."
    if task == "classify":
        model = LLMForSequenceClassification.from_pretrained(folder)
        return model, TextDataset(small_rows(48), model.tokenizer, label_names=LABELS)
    writer = LLMForCausalLM.from_pretrained(folder)
    rows = [{"prompt": row["text"], "completion": row["label"]} for row in small_rows(48)]
    return writer, InstructDataset(check_instruct(read_rows(rows)), writer.tokenizer, max_length=200)


def job_of(folder: Path, task: str, strategy: str, **settings: Any) -> tuple[TunableModel, Job]:
    "A model ready for training, and the job of planning it."
    model, dataset = model_of(folder, task)
    asked = {"precision": "f32", "epochs": 2, "batch_size": 16} | settings
    resolved, _ = resolve_settings(parse_strategy(strategy), arguments=asked)
    loader = TextDataLoader(dataset, batch_size=resolved.batch_size, shuffle=True)
    given = type(model), base_config(model.source), model.tokenizer, model.source, loader, resolved
    if task == "classify":
        size_head(model, LABELS)
    apply_strategy(model, parse_strategy(strategy))
    return model, Job(*given, parse_strategy(strategy))


class Books(Callback):
    "The allocator's books of the fourth step."

    def on_step(self, state: Any, values: Any) -> None:
        if state.step == 3:
            self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profile.__enter__()
        if state.step == 4:
            self.profile.__exit__(None, None, None)
            state.stop = True

    @property
    def added(self) -> int:  # Bytes
        events = [one for one in self.profile.profiler.kineto_results.events() if one.name() == "[memory]"]
        return max(itertools.accumulate(one.nbytes() for one in sorted(events, key=lambda one: one.start_ns())))


def added_really(model: TunableModel, job: Job, step: list[int]) -> int:
    "Bytes that a step adds at its peak, by the allocator's books."
    loader, books = TextDataLoader(job.dataset, batch_size=len(step)), Books()
    loader.steps = lambda epoch: [step] * 5  # type: ignore[method-assign]
    LLMTrainer(model, settings=job.settings, strategy=job.strategy, callbacks=[books]).train(loader)
    return books.added


@pytest.mark.parametrize("strategy", ["full", "top:1", "lora:4"])
@pytest.mark.parametrize(
    ("kind", "task"), [("Bert", "classify"), ("GPT2", "classify"), ("Llama", "instruct"), ("Qwen3", "instruct")]
)
def test_planned_as_the_allocator_says(kind: str, task: str, strategy: str, save_small: Callable[..., Path]) -> None:
    model, job = job_of(save_small(kind, **DEEP[kind]), task, strategy)
    depths = find_depths(job)
    assert len(depths.n_upper) + len(depths.n_lower) > 2 or strategy == "top:1"
    step = job.loader.steps(0)[0]
    _, counted = depths.count([[step], [step]])  # Memory of scores is kept from the first to the second
    planned = counted.peak - counted.kept
    assert planned == pytest.approx(added_really(model, job, step), rel=0.05)


@pytest.mark.parametrize(
    "settings",
    [
        {"activation_checkpointing": True},
        {"step_in_backward": True, "max_grad_norm": 0.0},
        {"micro_batch_size": 4},
        {"trunk_gb": 0.0},
    ],
    ids=lambda settings: next(iter(settings)),
)
@pytest.mark.parametrize("strategy", ["full", "top:2"])
def test_options_are_planned(strategy: str, settings: dict[str, Any], save_small: Callable[..., Path]) -> None:
    model, job = job_of(save_small("Llama", **DEEP["Llama"]), "classify", strategy, **settings)
    step = job.loader.steps(0)[0]
    parts = [
        step[start : start + job.settings.micro_batch_size] for start in range(0, 16, job.settings.micro_batch_size)
    ]
    (counted,) = find_depths(job).count([parts])
    planned = counted.peak - counted.kept
    assert planned == pytest.approx(added_really(model, job, step), rel=0.05)


def test_states_of_a_frozen_trunk_are_planned(small_model: Path) -> None:
    def trunk(strategy: str, kind: str = "cpu", n_further: int = 0, **settings: Any) -> float:
        job = job_of(small_model, "classify", strategy, **settings)[1]
        return plan_memory(replace(job, kind=kind), n_further=n_further).trunk

    _, job = job_of(small_model, "classify", "top:1")
    n_tokens, width = int(job.dataset.lengths.sum()), job.config.hidden_size
    assert trunk("top:1", n_further=100) == 4 * (n_tokens + 100) * width
    assert trunk("head", n_further=100) == 4 * len(job.dataset) * width, "of a row the head reads one token"
    assert trunk("full") == trunk("top:1", epochs=1) == trunk("top:1", trunk_gb=0.0) == trunk("top:1", "cuda") == 0


def test_compiled_blocks_are_planned_with_their_padding(small_model: Path) -> None:
    _, plain = job_of(small_model, "classify", "full")
    step = [sorted(range(48), key=lambda row: plain.dataset.lengths[row])[place] for place in (0, 1, 2, 3, 47)]
    compiled = replace(plain, settings=replace(plain.settings, compile=True))
    few, many = (find_depths(job).count([[step]])[0].products for job in (plain, compiled))
    assert many > 1.2 * few


def test_a_pattern_of_layers_is_extended_whole(small_model: Path) -> None:
    from transformers import Gemma3TextConfig

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Gemma3TextConfig(vocab_size=6144, num_hidden_layers=15, head_dim=16, sliding_window=8, **sizes)
    _, job = job_of(small_model, "instruct", "full")
    job = replace(job, config=config)
    depths = find_depths(job)
    assert (depths.period, depths.n_upper) == (6, [3, 9])
    parts = [job.loader.steps(0)[0]]
    (whole,) = count_steps(job, config, job.strategy, depths.notes, [parts])
    (few,) = depths.count([parts])
    assert few.peak == pytest.approx(whole.peak, rel=2e-3)
    assert few.products == pytest.approx(whole.products, rel=1e-3)


def test_shared_layers_are_counted_whole(small_model: Path) -> None:
    from transformers import AlbertConfig

    _, job = job_of(small_model, "classify", "full")
    sizes = {"hidden_size": 32, "embedding_size": 16, "num_attention_heads": 2, "intermediate_size": 64}
    job = replace(job, config=AlbertConfig(vocab_size=len(job.tokenizer), num_hidden_layers=6, **sizes))
    depths, step = find_depths(job), job.loader.steps(0)[0]
    assert depths.period == 0 and depths.n_upper == [6]
    (counted,) = depths.count([[step]])
    assert counted.peak > counted.weights + counted.optimizer + counted.activations > 0


def test_eight_bits_need_nobody_else(save_small: Callable[..., Path]) -> None:
    _, plain = job_of(save_small("Llama", hidden_size=64), "classify", "full")
    packed = replace(plain, settings=replace(plain.settings, optimizer="adamw8bit"))
    wide, narrow = (plan_memory(job).count.optimizer for job in (plain, packed))
    assert 0.25 < narrow / wide < 0.5  # Small tensors keep theirs in f32


def test_planning_leaves_rows_and_random_streams_alone(small_model: Path, tmp_path: Path) -> None:
    _, job = job_of(small_model, "instruct", "top:1")
    dataset, state = job.dataset, torch.random.get_rng_state()
    plan_time(find_depths(job), plan_memory(job), find_device(), remembered=Measurements(tmp_path))
    assert not dataset.tells_targets and not dataset.shows_asked and dataset.states is None and dataset.lay_out is None
    assert torch.equal(torch.random.get_rng_state(), state)


def test_largest_micro_batch_grows_with_memory(small_model: Path) -> None:
    _, job = job_of(small_model, "classify", "full", batch_size=32)
    depths = find_depths(job)
    memory = plan_memory(job, depths)
    always = memory.between_steps + SLACK_BYTES
    limits = [always + share * (memory.resident - always) for share in (0.6, 1.0, 1.4)]
    rows = [largest_micro_batch(depths, limit, memory) for limit in limits]
    assert 0 < rows[0] <= rows[1] <= rows[2] == 32
    assert rows == [largest_micro_batch(depths, limit) for limit in limits]


def test_a_run_takes_fewer_rows_where_memory_is_short_and_goes_on_with_them(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = small_rows(96)
    asked: dict[str, Any] = {"model": small_model, "valid": rows[:12], "test": rows[:12], "precision": "f32"}
    asked |= {"epochs": 2, "callbacks": (), "leaks": "allow", "batch_size": 32}
    usual = finetune(rows, out=tmp_path / "usual", **asked)
    need = usual.record.plan["memory"]
    always = need["weights"] + need["optimizer"] + need["others"] + SLACK_BYTES
    limit = always - need["weights"] + 0.6 * (need["resident"] - always)
    monkeypatch.setattr(plan_check, "this_device", lambda: DeviceSpec("cpu", "cpu", limit, bf16=False))
    tight = finetune(rows, out=tmp_path / "tight", **asked)
    assert tight.record.origins["micro_batch_size"] == "plan"
    assert 0 < tight.record.settings["micro_batch_size"] < 32
    assert tight.record.plan["fits"]
    told = finetune(rows, out=tmp_path / "told", micro_batch_size=32, **asked)
    assert (told.record.settings["micro_batch_size"], told.record.plan["fits"]) == (32, False)
    again = finetune(rows, out=tmp_path / "tight", resume=True, **asked)
    assert again.record.settings["micro_batch_size"] == tight.record.settings["micro_batch_size"]


def test_a_run_says_how_far_off_its_plan_was(small_model: Path, tmp_path: Path) -> None:
    rows = small_rows(200)
    run = finetune(
        rows, model=small_model, out=tmp_path / "run", epochs=2, batch_size=16, precision="f32", callbacks=()
    )
    checked = read_record(run.folder).plan["checked"]
    assert set(checked) == {"peak_bytes", "step_s", "run_s"}
    for one in checked.values():
        assert one["off_by"] == pytest.approx(one["measured"] / one["planned"] - 1)
    assert abs(checked["peak_bytes"]["measured"] - checked["peak_bytes"]["planned"]) < 150e6
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "The plan, and what came of it" in page and "memory at the peak" in page


def test_no_plan_is_no_reason_to_fail(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("this architecture cannot be built of a configuration")

    monkeypatch.setattr(plan_check, "plan_job", broken)
    run = finetune(small_rows(60), model=small_model, out=tmp_path / "run", epochs=1, precision="f32", callbacks=())
    assert run.record.plan == {} and run.record.status == "finished"
    assert "The plan, and" not in (run.folder / "report.html").read_text(encoding="utf-8")


def test_what_is_remembered_may_be_lost(tmp_path: Path) -> None:
    (tmp_path / "a_file").write_text("", encoding="utf-8")
    remembered = Measurements(tmp_path / "a_file" / "below")
    remembered.keep_pace("key", Pace(1.0, 2.0, "words"))
    assert remembered.pace("key") == Pace(1.0, 2.0, "words")
    strange = '{"counts": {"key": {"count": {}, "parts": 1}}, "paces": {"key": {"start_s": 1}}, "ratios": {"run": "a"}}'
    for damaged in ("{", "[]", '{"paces": {}, "ratios": {}}', strange):
        (tmp_path / "measured.json").write_text(damaged, encoding="utf-8")
        found = Measurements(tmp_path)
        assert found.count("key") is None and found.pace("key") is None and found.correction("run") == 1.0


def test_the_oldest_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "N_KEPT", 3)
    remembered = Measurements(tmp_path)
    for i in range(5):
        remembered.keep_pace(f"key {i}", Pace(float(i), 0.0, "words"))
    assert list(Measurements(tmp_path).paces) == ["key 2", "key 3", "key 4"]


def test_a_count_is_kept_for_the_same_step_alone(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, job = job_of(small_model, "classify", "full")
    remembered, n_counted = Measurements(tmp_path), list[int]()
    count = timing.count_heaviest
    monkeypatch.setattr(timing, "count_heaviest", lambda depths: [n_counted.append(1), count(depths)][1])
    first = remembered_memory(job, remembered=remembered)[1]
    same = replace(job, settings=replace(job.settings, lr=1.0))
    assert remembered_memory(same, remembered=Measurements(tmp_path))[1] == first and len(n_counted) == 1
    fewer = TextDataLoader(TextDataset(small_rows(40), job.tokenizer, label_names=LABELS), batch_size=16, shuffle=True)
    others = [replace(job, loader=fewer), replace(job, strategy=parse_strategy("top:1")), replace(job, kind="cuda")]
    others += [replace(job, settings=replace(job.settings, batch_size=8))]
    for one in others:
        assert remembered_memory(one, remembered=remembered)[1].count == plan_memory(one).count
    monkeypatch.setattr(timing, "code_fingerprint", lambda: "of another day")
    remembered_memory(job, remembered=remembered)
    assert len(n_counted) == 2 + len(others)


def test_plan_takes_what_train_takes() -> None:
    from inspect import signature

    from llmft_nb import commands

    theirs, ours = signature(commands.train).parameters, signature(commands.plan).parameters
    assert set(theirs) < set(ours)
    assert all(ours[name].default == one.default for name, one in theirs.items())
    asked = set(signature(finetune).parameters) - {
        "out",
        "allow",
        "strict",
        "same_as",
        "repeats",
        "resume",
        "question",
        "general",
        "callbacks",
        "trackers",
        "trunks",
    }
    assert asked <= set(signature(planning.plan).parameters)
    assert {one.name for one in fields(TrainSettings)} <= set(ours)


def test_weights_need_not_be_there(small_model: Path, tmp_path: Path) -> None:
    for file in small_model.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    asked: dict[str, Any] = {"strategy": "full", "device_memory": "8GB", "precision": "f32"}
    found = [
        planning.plan(small_rows(80), model=folder, remembered=Measurements(tmp_path / "cache"), **asked).plans[0]
        for folder in (small_model, tmp_path)
    ]
    assert found[0].memory.as_record() == found[1].memory.as_record()
    with pytest.raises(UserError, match="no weights"):
        finetune(small_rows(80), model=tmp_path, out=tmp_path / "run")


def test_each_strategy_once_and_what_cannot_be_had(small_model: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": row["text"], "completion": row["label"]} for row in small_rows(80)]
    asked: dict[str, Any] = {"task": "instruct", "device": "h100", "remembered": Measurements(tmp_path)}
    found = planning.plan(pairs, model=small_model, prices=planning.Prices(per_hour=2.0), **asked)
    assert {plan.strategy for plan in found.plans} | set(found.refused) == {*planning.EACH, "qlora:16"}
    assert found.strategy == "full" and "fits" in found.reason
    record = json.loads(json.dumps(found.as_record()))
    assert record["device"]["name"] == "H100"
    assert all(line["price"] > 0 and line["kwh"] > 0 for line in record["plans"])
