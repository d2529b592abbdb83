"""General skills through lm-evaluation-harness: what is asked, refused and kept, and that its numbers are ours."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import small_rows, write_jsonl
from typer.testing import CliRunner

pytest.importorskip("lm_eval", reason="the extra harness is not installed")

from llmft_nb import harness, task_files
from llmft_nb.cli import app
from llmft_nb.core import UserError, read_record, write_record
from llmft_nb.finetune import finetune
from llmft_nb.harness import Asking, ask_tasks, harness_model, measure_of, question_room
from llmft_nb.modeling import LLMForCausalLM, LLMForMaskedLM
from llmft_nb.predict import load_predictor
from llmft_nb.resampling import holm, paired_permutation
from llmft_nb.scores import mcnemar_midp, score_share
from llmft_nb.skills import compare_results, evaluate_harness, judge_results
from llmft_nb.task_files import MANY_INCLUDED, PLAIN_KEYS, find_tasks, folder_tasks, read_task_file

CHOICES = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: rows.jsonl, train: shown.jsonl}}}}
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{question}"
doc_to_choice: choices
doc_to_target: right
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
ROLLING = """
task: cost
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "I saw {{thing}} {{choices[0]}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
WRITTEN = """
task: written
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl, train: shown.jsonl}}
test_split: test
fewshot_split: train
output_type: generate_until
doc_to_text: "{{thing}} is"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: true, temperature: 1.0}
metric_list: [{metric: exact_match}]
"""


def saw_rows(n_rows: int) -> list[dict[str, Any]]:
    "Questions with three choices, of other lengths each; what training rows end with is the right one."
    rows = small_rows(n_rows)
    ends = ["by the door", "in my sister's box", "at the gate"]
    return [
        {"thing": row["text"].split(" times ")[1], "choices": ends[i % 3 :] + ends[: i % 3], "right": -i % 3}
        for i, row in enumerate(rows)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    "Three tasks of one's own, and their rows."
    made = tmp_path / "tasks"
    made.mkdir()
    write_jsonl(made / "rows.jsonl", saw_rows(30))
    write_jsonl(made / "shown.jsonl", saw_rows(50)[30:])
    for name, question in (("places", "I saw {{thing}}"), ("others", "Where is {{thing}}? It is")):
        (made / f"{name}.yaml").write_text(CHOICES.format(name=name, question=question))
    (made / "cost.yaml").write_text(ROLLING)
    (made / "written.yaml").write_text(WRITTEN)
    return made


@pytest.fixture(scope="module")
def a_run(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Path:
    "A run on instructions, from a small random base."
    work = tmp_path_factory.mktemp("instruct")
    rows = [{"prompt": row["text"], "completion": f"a {row['label']} by the door"} for row in small_rows(100)]
    parts = {name: str(write_jsonl(work / f"{name}.jsonl", rows[a:b])) for name, a, b in TRAIN_PARTS}
    options: dict[str, Any] = {"epochs": 3, "lr": 3e-3, "n_written": 2, "max_new_tokens": 4, "max_length": 96}
    data = parts.pop("data")
    run = finetune(data, task="instruct", model=small_model, out=work / "run", callbacks=[], **parts, **options)
    return run.folder


TRAIN_PARTS = (("data", 0, 60), ("valid", 60, 80), ("test", 80, 100))


def told(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def by_hand(model: Any, question: str, choice: str) -> tuple[float, bool]:
    "Logarithm of the chance of a choice, and whether the model would have written it: by the package's own forward."
    import torch

    before, whole = (model.tokenizer(text)["input_ids"] for text in (question, question + choice))
    assert whole[: len(before)] == before
    with torch.no_grad():
        logs_TV = model(input_ids=torch.tensor([whole]))[0].log_softmax(-1)
    places = range(len(before), len(whole))
    likeliest = all(int(logs_TV[i - 1].argmax()) == whole[i] for i in places)
    return math.fsum(float(logs_TV[i - 1, whole[i]]) for i in places), likeliest


# --- the numbers ---


def test_numbers_are_those_of_a_direct_calculation(a_run: Path, small_model: Path, folder: Path) -> None:
    "Each row's choices, the scores of both models in their columns, the test and its correction."
    kept = evaluate_harness(a_run, ["places", "others"], folder)
    tuned, base = load_predictor(a_run).model, LLMForCausalLM.from_pretrained(small_model).eval()
    lines = [json.loads(line) for line in (a_run / "harness_samples.jsonl").read_text().splitlines()]
    p_values = []
    for task, question in (("places", "I saw {}"), ("others", "Where is {}? It is")):
        rows = [line for line in lines if line["task"] == task]
        assert [row["doc_id"] for row in rows] == list(range(30))
        right: dict[str, list[bool]] = {"tuned": [], "base": []}
        for row, given in zip(rows, saw_rows(30), strict=True):
            assert row["doc"] == given
            for who, model in (("tuned", tuned), ("base", base)):
                asked = [by_hand(model, question.format(given["thing"]), f" {choice}") for choice in given["choices"]]
                for mine, theirs in zip(asked, row[who]["filtered_resps"], strict=True):
                    assert math.isclose(mine[0], float(theirs[0]), rel_tol=1e-4, abs_tol=1e-4)
                    assert str(mine[1]) == str(theirs[1])
                logs = [one for one, _ in asked]
                sizes = [len(choice) for choice in given["choices"]]
                assert row[who]["acc"] == float(np.argmax(logs) == given["right"])
                assert row[who]["acc_norm"] == float(np.argmax(np.divide(logs, sizes)) == given["right"])
                right[who].append(bool(row[who]["acc"]))
        (found,) = [one for one in kept["tasks"] if one["task"] == task]
        for who, each in right.items():
            score, value = score_share(sum(each), 30), found["measures"]["acc"][who]
            assert (value["value"], value["low"], value["high"], value["n"]) == (score.value, score.low, score.high, 30)
        paired = mcnemar_midp(np.array(right["tuned"]), np.array(right["base"]))
        assert (found["difference"], found["p_value"]) == (paired.difference, paired.p_value)
        assert found["measure"] == "acc" and list(found["measures"]) == ["acc", "acc_norm"]
        p_values.append(paired.p_value)
        assert paired.difference != 0, "so that neither model's score could pass for the other's"
    assert [one["p_holm"] for one in kept["tasks"]] == holm(p_values)
    both = ((row["tuned"]["filtered_resps"], row["base"]["filtered_resps"]) for row in lines)
    apart = [abs(float(ours[0]) - float(theirs[0])) for pair in both for ours, theirs in zip(*pair, strict=True)]
    assert sorted(apart)[len(apart) // 2] > 0.1, "so that neither model could pass for the other"


def test_costs_are_compared_as_costs(a_run: Path, folder: Path) -> None:
    "Perplexity by words and bytes, and bits: the harness's figure, an interval around it, and fewer is better."
    (line,) = evaluate_harness(a_run, ["cost"], folder)["tasks"]
    tuned = load_predictor(a_run).model
    (found,) = ask_tasks(tuned, find_tasks(["cost"], folder))
    for name, both in line["measures"].items():
        assert both["higher_is_better"] is False
        assert math.isclose(both["tuned"]["value"], found.measures[name].value, rel_tol=1e-9), name
        assert both["tuned"]["low"] < both["tuned"]["value"] < both["tuned"]["high"]
    nats = [float(row["filtered_resps"][0]) for row in found.samples]
    texts = [f"I saw {row['thing']} {row['choices'][0]}" for row in saw_rows(30)]
    bits = -sum(nats) / math.log(2) / sum(len(text.encode()) for text in texts)
    assert math.isclose(line["measures"]["bits_per_byte"]["tuned"]["value"], bits, rel_tol=1e-9)
    words = [len(text.split()) for text in texts]
    assert math.isclose(line["measures"]["word_perplexity"]["tuned"]["value"], math.exp(-sum(nats) / sum(words)))
    base = [row["base"]["word_perplexity"] for row in map(json.loads, (a_run / "harness_samples.jsonl").open())]
    rows = [np.array([[-a, b] for a, b in one]) for one in (list(zip(nats, words)), base)]
    paired = paired_permutation(*rows, found.measures["word_perplexity"].statistic())
    assert math.isclose(line["p_value"], paired.p_value) and math.isclose(line["difference"], paired.difference)
    assert paired.difference < 0, "the tune has read such texts"
    assert line["verdict"] == "better"


def test_the_same_bits_twice_and_another_seed(a_run: Path, folder: Path) -> None:
    "Drawn answers too: the files are equal byte for byte, and nobody's random stream has moved."
    import random

    import torch

    random.seed(5)
    numbers = [random.random()]
    random.seed(5)
    seen = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(seen))  # Wherever the caller's stream stands
        state = torch.random.get_rng_state()
        evaluate_harness(a_run, ["written", "places"], folder, Asking(few_shot=2, seed=seed, limit=8))
        seen.append([(a_run / name).read_bytes() for name in ("harness.json", "harness_samples.jsonl")])
    assert seen[0] == seen[1]
    assert seen[0][1] != seen[2][1]
    assert torch.equal(state, torch.random.get_rng_state()) and [random.random()] == numbers


def test_shots_limit_and_template_are_asked_for(a_run: Path, folder: Path) -> None:
    model = load_predictor(a_run).model
    (one,) = ask_tasks(model, find_tasks(["places"], folder), Asking(few_shot=2, limit=7))
    question = one.samples[0]["arguments"][0][0]
    assert (one.conditions["n"], one.conditions["n_shot"]) == (7, 2)
    assert question.count("I saw") == 3 and question.count("\n\n") == 2
    assert all(row["thing"] not in question for row in saw_rows(30)[1:])
    (talk,) = ask_tasks(model, find_tasks(["places"], folder), Asking(limit=7, chat_template=True))
    assert "<|assistant|>" in talk.samples[0]["arguments"][0][0] and talk.conditions["chat_template"] is True
    model.tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        ask_tasks(model, find_tasks(["places"], folder), Asking(limit=7, chat_template=True))


@pytest.mark.parametrize(
    ("lines", "leaks"),
    [
        ("test_split: test", True),
        ("validation_split: test\nfewshot_split: test", True),
        ("test_split: test\nfewshot_split: test", False),
        ("test_split: test\ntraining_split: train", False),
        ("test_split: test\nfewshot_config: {samples: [{thing: a, choices: [b, c, d], right: 0}]}", False),
    ],
)
def test_no_row_is_among_its_own_examples(lines: str, leaks: bool, folder: Path, small_model: Path) -> None:
    text = CHOICES.format(name="own", question="I saw {{thing}}").replace(
        "test_split: test\nfewshot_split: train", lines
    )
    (folder / "own.yaml").write_text(text)
    model, n_shot = LLMForCausalLM.from_pretrained(small_model).eval(), 1 if "samples" in lines else 9
    if leaks:
        with pytest.raises(UserError, match="the examples are the asked rows themselves"):
            ask_tasks(model, find_tasks(["own"], folder), Asking(few_shot=n_shot, limit=20))
        return
    (found,) = ask_tasks(model, find_tasks(["own"], folder), Asking(few_shot=n_shot, limit=20))
    for row in found.samples:
        *shown, asked = row["arguments"][0][0].split("\n\n")
        answer = row["doc"]["choices"][row["doc"]["right"]]
        assert asked == f"I saw {row['doc']['thing']}" and len(shown) == n_shot
        assert f"{asked} {answer}" not in shown


# --- the command ---


def test_the_command_from_end_to_end(a_run: Path, folder: Path, tmp_path: Path) -> None:
    "In a process of its own: what is printed, what is kept, and that nothing else is written anywhere."
    before, tasks = tree(a_run), tree(folder)
    home, here, temporary = tmp_path / "home", tmp_path / "here", tmp_path / "temporary"
    for made in (home, here, temporary):
        made.mkdir()
    places = {"HOME": str(home), "HF_HOME": str(home / "hub"), "TMPDIR": str(temporary)}
    asked = ["eval", str(a_run), "--harness", "places,others", "--harness-path", str(folder), "--limit", "20"]
    command = [sys.executable, "-c", "from llmft_nb.cli import main; main()"]
    run = subprocess.run([*command, *asked], cwd=here, env=os.environ | places, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    lines = run.stdout.splitlines()
    assert [line.split()[:3] for line in lines[1:5]] == [
        [task, measure, "0"] for task in ("places", "others") for measure in ("acc", "acc_norm")
    ]
    assert "of 20" in lines[1] and "not tested" in lines[2] and "corrected for 2 tasks" in lines[5]
    added = {name for name, content in tree(a_run).items() if before.get(name) != content}
    assert added == {"harness.json", "harness_samples.jsonl"}
    assert tree(folder) == tasks and tree(here) == {} and tree(temporary) == {}
    assert [name for name in tree(home) if not name.endswith(".lock")] == []
    kept = json.loads((a_run / "harness.json").read_text())
    assert kept["asked"] == {
        "tasks": ["places", "others"],
        "limit": 20,
        "few_shot": None,
        "seed": 0,
        "chat_template": False,
        "trust": False,
    }
    assert kept["base"] == read_record(a_run).fingerprint["model"] and kept["format_version"] == 1
    assert set(kept["tasks"][0]["conditions"]) >= {"harness", "version", "definition", "rows", "n_shot", "seed", "n"}
    assert str(folder) not in (a_run / "harness.json").read_text()


def test_json_and_rows_of_ones_own_beside_it(a_run: Path, folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": row["text"], "completion": f"a {row['label']}"} for row in small_rows(140)[100:110]]
    data = write_jsonl(tmp_path / "more.jsonl", rows)
    own = ["--harness", "places", "--harness-path", folder, "--limit", 5]
    found = told("eval", a_run, "--data", data, *own, "--json")
    assert found.exit_code == 0, found.output
    both = json.loads(found.stdout)
    assert both["harness"]["tasks"][0]["conditions"]["n"] == 5 and both["perplexity"]["n"] == 10
    alone = json.loads(told("eval", a_run, *own, "--json").stdout)
    assert alone == {"harness": both["harness"]}
    only = json.loads(told("eval", a_run, "--data", data, "--json").stdout)
    assert only == {name: value for name, value in both.items() if name != "harness"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to score by"),
        (["--limit", "3"], "no tasks are asked"),
        (["--data", "x.jsonl", "--trust-task-code"], "no tasks are asked"),
        (["--harness", "places", "--limit", "0"], "no rows to ask"),
        (["--harness", "places", "--few-shot", "-1"], "fewer examples than none"),
        (["--harness", "places,,others"], "no task named"),
        (["--harness", "\x1b]0;owned\x07"], "no name of a task: ⟨U+001B⟩]0;owned⟨U+0007⟩"),
        (["--harness", "placs"], "no such task"),
        (["--harness", "humaneval"], "the task runs code"),
        (["--harness", "places", "--few-shot", "99"], "the questions cannot be put"),
        (["--harness", "places", "--base", "tiny"], "not the model that the run began with"),
        (["--harness", "places", "--harness-path", "nowhere"], "no such folder"),
    ],
)
def test_a_mistake_is_told_with_its_mend(words: Sequence[str], said: str, a_run: Path, folder: Path) -> None:
    own = ["--harness-path", str(folder)] if "--harness" in words and "--harness-path" not in words else []
    for name in ("harness.json", "harness_samples.jsonl"):
        (a_run / name).unlink(missing_ok=True)
    found = told("eval", a_run, *words, *own)
    assert (found.exit_code, found.stdout) == (2, ""), found.output
    assert said in found.stderr and "mend:" in found.stderr and "Traceback" not in found.stderr
    assert not any(ord(character) < 32 and character != "\n" for character in found.stderr)
    assert not (a_run / "harness.json").exists()


def test_a_hub_task_offline_is_refused_at_once(a_run: Path) -> None:
    started = time.monotonic()
    found = told("eval", a_run, "--harness", "hellaswag")
    assert found.exit_code == 2 and time.monotonic() - started < 10
    assert "Rowan/hellaswag, which is not on this machine" in found.stderr and "--harness-path" in found.stderr


def test_without_the_harness_its_extra_is_named(a_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    found = told("eval", a_run, "--harness", "places")
    assert found.exit_code == 2 and 'pip install "llmft_nb[harness]"' in found.stderr


def test_only_language_models_are_asked(
    a_run: Path, small_run: Path, save_small: Callable[..., Path], tmp_path: Path
) -> None:
    found = told("eval", small_run, "--harness", "places")
    assert found.exit_code == 2 and "this run was trained to classify" in found.stderr
    record = read_record(a_run)
    (tmp_path / "model").mkdir()
    LLMForMaskedLM.from_pretrained(save_small("Bert")).save_pretrained(tmp_path / "model")
    record = type(record)(**{**vars(record), "task": "text"})
    write_record(tmp_path, record)
    found = told("eval", tmp_path, "--harness", "places")
    assert found.exit_code == 2 and "this one is an encoder" in found.stderr
    with pytest.raises(UserError, match="MaskedLM"):
        harness_model(LLMForMaskedLM.from_pretrained(save_small("Bert")))


@pytest.mark.parametrize("kind", ["GPT2", "Qwen3", "Gemma", "Phi3"])
def test_kinds_of_language_models(kind: str, save_small: Callable[..., Path], folder: Path) -> None:
    "Each kind's numbers are those of its own forward."
    model = LLMForCausalLM.from_pretrained(save_small(kind)).eval()
    (found,) = ask_tasks(model, find_tasks(["places"], folder), Asking(limit=6))
    for row in found.samples:
        for asked, theirs in zip(row["arguments"], row["filtered_resps"], strict=True):
            assert math.isclose(by_hand(model, *asked)[0], float(theirs[0]), rel_tol=1e-4, abs_tol=1e-4)


def test_what_does_not_fit_is_counted(folder: Path, small_model: Path) -> None:
    write_jsonl(
        folder / "rows.jsonl", [{**row, "thing": "word " * (900 if i == 1 else 3)} for i, row in enumerate(saw_rows(4))]
    )
    model = LLMForCausalLM.from_pretrained(small_model).eval()
    (found,) = ask_tasks(model, find_tasks(["places"], folder))
    assert found.n_cut == 3, "one row, three choices"
    assert question_room(model)[0] == 600 and 1 <= question_room(model)[1] <= 16


# --- comparisons ---


def test_other_questions_are_not_compared(a_run: Path, folder: Path) -> None:
    model = load_predictor(a_run).model

    def ask(**options: Any) -> Any:
        return ask_tasks(model, find_tasks(["places"], folder), Asking(**options))[0]

    first = ask()
    assert compare_results(first, ask())["p_value"] == 1
    for options, said in (({"few_shot": 1}, "n_shot: 0 and 1"), ({"limit": 5}, "n: 30 and 5"), ({"seed": 2}, "seed")):
        with pytest.raises(UserError, match=said):
            compare_results(first, ask(**options))
    text = (folder / "places.yaml").read_text()
    (folder / "places.yaml").write_text(text.replace("version: 1.0", "version: 1.1"))
    with pytest.raises(UserError, match=r"version: 1\.0 and 1\.1"):
        compare_results(first, ask())
    (folder / "places.yaml").write_text(text)
    write_jsonl(folder / "rows.jsonl", [{**saw_rows(1)[0], "right": 1}, *saw_rows(30)[1:]])
    with pytest.raises(UserError, match="rows: "):
        compare_results(first, ask())


def test_several_tasks_are_corrected_for_and_costs_turn_the_verdict() -> None:
    def result(name: str, rows: Any, higher: bool = True) -> Any:
        measure = harness.Measure("acc", "mean", np.array(rows, dtype=float)[:, None], 0.0, higher)
        return harness.TaskResult(name, {"task": name}, {"acc": measure}, [], 0)

    won, lost = [1] * 6 + [0] * 30, [0] * 36
    alone = judge_results([result("a", won)], [result("a", lost)])
    assert alone[0]["verdict"] == "better" and alone[0]["p_holm"] == alone[0]["p_value"] < 0.05
    names = "abcd"
    ours = [result("a", won), *(result(name, lost) for name in names[1:])]
    many = judge_results(ours, [result(name, lost) for name in names])
    assert many[0]["p_holm"] == 4 * many[0]["p_value"] > 0.05 and many[0]["verdict"] == "no difference shown"
    (cost,) = judge_results([result("a", won, False)], [result("a", lost, False)])
    assert cost["verdict"] == "worse"


def test_a_measure_of_all_rows_together_has_no_interval() -> None:
    class Bleu:
        def aggregation(self) -> dict[str, Any]:
            return {"bleu": sum}

        def higher_is_better(self) -> dict[str, bool]:
            return {"bleu": True}

    whole = measure_of("bleu", [("a", "b"), ("c", "d")], 12.5, Bleu())
    assert whole.score() == {"value": 12.5, "low": None, "high": None, "n": 2, "percent": False}
    one = harness.TaskResult("t", {}, {"bleu": whole}, [], 0)
    (line,) = judge_results([one], [one])
    assert "p_value" not in line and "verdict" not in line


# --- files that are not to be trusted ---

EVIL = {
    "function": "process_docs: !function evil.run",
    "included": "include: [_part.yaml]",
    "class": "class: evil.Task",
    "dataset": "custom_dataset: !function evil.run",
    "metric": "metric_list: [{metric: ./evil.py}]",
    "fetched": "metric_list: [{metric: acc, hf_evaluate: true}]",
    "judged": "unsafe_code: true",
    "generate": "generation_kwargs: {custom_generate: some/body, trust_remote_code: true}",
    "remote": "dataset_kwargs: {data_files: {test: rows.jsonl}, trust_remote_code: true}",
    "shown": "fewshot_config: {process_docs: x}",
    "prompt": "use_prompt: 'promptsource:x'",
    "pickle": "dataset_path: pandas",
    "script": "dataset_path: ./evil.py",
    "address": "dataset_kwargs: {data_files: {test: 'https://example.org/rows.jsonl'}}",
    "template": "doc_to_text: \"{{ cycler.__init__.__globals__.os.system('touch sprung') }}\"",
    "text": 'doc_to_text: "{{ thing.__class__.__mro__ }}"',
    "object": "doc_to_text: !!python/object/apply:os.system ['touch sprung']",
    "bomb": "description: &a [x, x]\nmetadata: [*a, *a]",
    "name": 'task: "\\e[31mred"',
    "twice": "task: places",
}


@pytest.mark.parametrize("name", sorted(EVIL))
def test_a_hostile_task_runs_nothing(name: str, folder: Path, a_run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    own = {line.partition(":")[0] for line in EVIL[name].splitlines()}
    kept = [
        line
        for line in CHOICES.format(name="evil", question="{{thing}}").splitlines()
        if line.partition(":")[0] not in own
    ]
    if "metric_list" in own:
        kept = [line for line in kept if not line.startswith("  -")]
    (folder / "evil.yaml").write_text("\n".join([*kept, EVIL[name]]) + "\n")
    part = "process_docs: !function evil.run\n" if name == "included" else "description: ''\n"
    (folder / "_part.yaml").write_text(part)
    (folder / "evil.py").write_text("import os\nos.system('touch sprung')\nrun = list\n")
    found = told("eval", a_run, "--harness", "evil", "--harness-path", folder, "--limit", "2")
    assert (found.exit_code, found.stdout) == (2, ""), (name, found.output)
    assert "mend:" in found.stderr and "Traceback" not in found.stderr and "\x1b" not in found.stderr
    assert not list(tmp_path.rglob("sprung")), name


def test_a_trusted_task_runs_its_function(folder: Path, a_run: Path) -> None:
    (folder / "half.yaml").write_text("include: places.yaml\ntask: half\nprocess_docs: !function beside.half\n")
    (folder / "beside.py").write_text("def half(rows):\n    return rows.select(range(4))\n")
    own = ["eval", a_run, "--harness", "half", "--harness-path", folder, "--json"]
    assert told(*own).exit_code == 2
    found = told(*own, "--trust-task-code")
    assert found.exit_code == 0, found.output
    kept = json.loads(found.stdout)["harness"]
    assert kept["tasks"][0]["conditions"]["n"] == 4 and kept["asked"]["trust"] is True
    before = kept["tasks"][0]["conditions"]["definition"]
    (folder / "beside.py").write_text("def half(rows):\n    return rows.select(range(5))\n")
    assert find_tasks(["half"], folder, trust=True)[0].sha256() != before, "its code is part of a task"


def test_files_that_are_no_tasks(tmp_path: Path) -> None:
    for name, text in (("a", "- 1\n"), ("b", "task: [\n"), ("c", "task: x\ninclude: c.yaml\n"), ("d", "x" * 300_000)):
        (tmp_path / f"{name}.yaml").write_text(text)
        with pytest.raises(UserError):
            read_task_file(tmp_path / f"{name}.yaml")
    (tmp_path / "e.yaml").write_bytes(b"task: \xff\n")
    with pytest.raises(UserError, match="not a task file"):
        read_task_file(tmp_path / "e.yaml")
    deep = tmp_path / "deep"
    deep.mkdir()
    for i in range(MANY_INCLUDED + 3):
        (deep / f"{i}.yaml").write_text(f"include: {i + 1}.yaml\n")
    with pytest.raises(UserError, match="includes too much"):
        read_task_file(deep / "0.yaml")
    with pytest.raises(UserError, match="no such folder"):
        folder_tasks(tmp_path / "none")


def test_plain_keys_are_keys_of_the_harness() -> None:
    "A key that the harness no longer knows, or that may hold a function alone, is not on the list."
    from dataclasses import fields

    from lm_eval.config.task import TaskConfig

    assert {field.name for field in fields(TaskConfig)} >= PLAIN_KEYS
    assert not PLAIN_KEYS & {"process_docs", "process_results", "custom_dataset", "class", "unsafe_code", "use_prompt"}


def test_groups_are_their_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    index = TaskManager().task_index
    members = task_files.group_members("mmlu", index)
    assert len(members) == 57 and all(path.is_file() for path in members.values())
    with pytest.raises(UserError, match="did you mean"):
        task_files.group_members("mmluu", index)


def test_a_name_that_is_nowhere_is_told_without_the_whole_list() -> None:
    started = time.monotonic()
    with pytest.raises(UserError, match="did you mean hellaswag"):
        find_tasks(["helaswag"])
    assert time.monotonic() - started < 5
