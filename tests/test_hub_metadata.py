"""A model card's front matter: what the hub's rules ask for, for every task and origin, read back by the hub's library.

The hub checks a card where it is uploaded, and cannot be asked here. Its rules are written down from its specification
of model cards and from what it says of cards that it refuses: licence and task from its lists, a name of small letters
for any other licence, languages by their ISO codes, ids of bases and data sets, results with all their parts.
"""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from pages import PAYLOADS

from llmft_nb.hub_metadata import HUB_LICENCES, HUB_METRICS, card_metadata, front_matter
from llmft_nb.report import render_card

TASKS = {
    "classify": ("text-classification", {"headline": "accuracy", "accuracy": 0.75, "macro_f1": 0.7}),
    "tag": ("token-classification", {"headline": "span_f1", "span_f1": 0.5, "word_accuracy": 0.9}),
    "instruct": ("text-generation", {"headline": "token_f1", "token_f1": 0.4, "exact_match": 0.1, "rouge_l": 0.3}),
    "text": ("text-generation", {"headline": "perplexity", "perplexity": 12.5, "bits_per_byte": 1.2}),
}
KEYS = {"license", "license_name", "library_name", "pipeline_tag", "base_model", "base_model_relation", "datasets"}
KEYS |= {"language", "tags", "metrics", "model-index"}
PIPELINES = {"text-classification", "token-classification", "text-generation", "fill-mask"}
METRICS = {"accuracy", "f1", "precision", "recall", "exact_match", "rouge", "perplexity", "bleu", "wer", "seqeval"}
HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


def hub_faults(front: dict[str, Any]) -> list[str]:
    "What the hub would find wrong."
    wrong = [f"unknown key {key}" for key in set(front) - KEYS]
    licence = front.get("license")
    if licence != "other" and licence not in HUB_LICENCES:
        wrong.append(f"license {licence!r} is not on the list")
    if (licence == "other") is not bool(re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,79}", front.get("license_name", ""))):
        wrong.append(f"license_name {front.get('license_name')!r}")
    if front.get("pipeline_tag") not in PIPELINES:
        wrong.append(f"pipeline_tag {front.get('pipeline_tag')!r}")
    if "base_model" in front and not HUB_NAME.fullmatch(front["base_model"]):
        wrong.append(f"base_model {front['base_model']!r}")
    if ("base_model" in front) is not (
        front.get("base_model_relation") in {"adapter", "finetune", "merge", "quantized"}
    ):
        wrong.append(f"base_model_relation {front.get('base_model_relation')!r}")
    wrong += [f"dataset {name!r}" for name in front.get("datasets", []) if not HUB_NAME.fullmatch(name)]
    if "language" in front and not re.fullmatch("[a-z]{2,3}", front["language"]):
        wrong.append(f"language {front['language']!r}")
    wrong += [f"metric {name!r}" for name in front.get("metrics", []) if name not in METRICS]
    wrong += [f"tag {tag!r}" for tag in front["tags"] if not isinstance(tag, str) or not tag]
    for model in front.get("model-index", []):
        wrong += [] if isinstance(model["name"], str) and model["name"].strip() else ["a result of no model"]
        for result in model["results"]:
            named = (result["task"]["type"], result["dataset"]["type"], result["dataset"]["name"])
            wrong += [f"part {part!r} of a result" for part in named if not isinstance(part, str) or not part.strip()]
            wrong += [f"dataset type {named[1]!r}"] if re.search(r"\s", named[1]) else []
            for metric in result["metrics"]:
                is_number = isinstance(metric["value"], float) and math.isfinite(metric["value"])
                wrong += [] if is_number and metric["type"] in METRICS else [f"metric {metric}"]
    return wrong


def make_run(task: str, base: dict[str, Any] | None = None, data: dict[str, Any] | None = None) -> dict[str, Any]:
    scores = {
        name: {"value": value, "low": value, "high": value, "n": 60} if isinstance(value, float) else value
        for name, value in TASKS[task][1].items()
    }
    if task == "classify":
        scores["macro_f1"] = 0.7
    model = {"name": "tiny", "kind": "catalogue", "licence": "Apache-2.0"} | (base or {})
    record: dict[str, Any] = {"task": task, "status": "finished", "model": model, "data": {"source": "rows.jsonl"}}
    record |= {"settings": {}, "origins": {}, "scores": {"test": scores}, "test_looks": 1}
    record["data"] |= data or {}
    return {"name": "my run", "record": record, "metrics": [], "predictions": []}


BASES: dict[str, dict[str, Any]] = {
    "shipped": {},
    "hub": {"name": "org/base-1.5_b", "kind": "hub", "licence": "gemma", "revision": "abc"},
    "hub, tuned by adapters": {"name": "org/base", "kind": "hub", "licence": "MIT", "strategy": "lora:8"},
    "folder": {"name": "/home/me/org/base", "kind": "folder", "licence": "unknown"},
    "folder that looks like the hub": {"name": "org/base", "kind": "folder", "licence": None},
    "licence of its own": {"name": "o/b", "kind": "hub", "licence": "My Company's Licence, v2 (draft)"},
    "licence in another script": {"licence": "許諾"},
}
DATA: dict[str, dict[str, Any]] = {
    "file": {"source": "my rows.jsonl"},
    "hub": {"source": "org/rows@0123abc", "language": "pt-BR"},
    "memory": {"source": "rows in memory"},
    "odd": {"source": "///", "language": "English"},
    "catalogue": {"source": "pharmacy", "language": "en"},
}


@pytest.mark.parametrize(("task", "base", "data"), list(itertools.product(TASKS, BASES, DATA)))
def test_every_card_is_one_the_hub_takes_and_reads_back(task: str, base: str, data: str) -> None:
    run = make_run(task, BASES[base], DATA[data])
    meant = card_metadata(run)
    assert hub_faults(meant) == []
    read = ModelCard(render_card(run)).data
    assert isinstance(read, ModelCardData)
    assert yaml.safe_load(read.to_yaml()) == yaml.safe_load(front_matter(run)), "read and written again it is the same"
    assert (read.library_name, read.pipeline_tag) == ("transformers", TASKS[task][0])
    assert read.base_model == (BASES[base]["name"] if BASES[base].get("kind") == "hub" else None)
    assert read.get("base_model_relation") == ("finetune" if read.base_model else None)
    assert read.datasets == (["org/rows"] if data == "hub" else None)
    assert read.language == {"hub": "pt", "catalogue": "en"}.get(data)
    scores = {name: value for name, value in TASKS[task][1].items() if name in HUB_METRICS}
    assert [one.metric_value for one in read.eval_results] == list(scores.values())
    assert [one.metric_type for one in read.eval_results] == [HUB_METRICS[name] for name in scores]
    assert read.metrics == list(dict.fromkeys(HUB_METRICS[name] for name in scores))
    one = read.eval_results[0]
    assert isinstance(one, EvalResult) and (one.task_type, one.dataset_split) == (TASKS[task][0], "test")
    name, results = model_index_to_eval_results(meant["model-index"])
    assert name == read.model_name == "my run"
    assert eval_results_to_model_index(name, results) == meant["model-index"], "there and back"


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("Apache-2.0", ("apache-2.0", None)),
        ("MIT", ("mit", None)),
        ("llama3.1", ("llama3.1", None)),
        ("unknown", ("unknown", None)),
        ("", ("unknown", None)),
        ("other", ("other", "other")),
        ("EUPL-1.2 or later", ("other", "eupl-1.2-or-later")),
        ("許諾", ("other", "unnamed")),
        ("x" * 300, ("other", "x" * 80)),
    ],
)
def test_licences(licence: str, expected: tuple[str, str | None]) -> None:
    data = ModelCard(render_card(make_run("classify", {"licence": licence}))).data
    assert (data.license, data.license_name) == expected


@pytest.mark.parametrize("payload", PAYLOADS)
def test_texts_of_strangers_stay_values(payload: str) -> None:
    for task in TASKS:
        run = make_run(
            task, {"name": payload, "kind": "hub", "licence": payload}, {"source": payload, "hub_id": payload}
        )
        run["name"] = payload
        front = card_metadata(run)
        assert hub_faults(front) == [] and set(front) <= KEYS - {"base_model", "datasets"}
        assert ModelCard(render_card(run)).data.model_name == front["model-index"][0]["name"]


def test_a_score_that_is_no_number_is_no_result() -> None:
    run = make_run("text")
    run["record"]["scores"]["test"]["perplexity"]["value"] = math.inf
    front = card_metadata(run)
    assert "model-index" not in front and "metrics" not in front and hub_faults(front) == []


def test_a_fault_would_be_seen() -> None:
    good = card_metadata(make_run("tag", BASES["hub"], DATA["hub"]))
    assert hub_faults(good) == []
    for change in (
        {"license": "apache 2.0"},
        {"license": "other"},
        {"language": "pt-BR"},
        {"base_model": "base"},
        {"base_model_relation": "tuned"},
        {"datasets": ["rows"]},
        {"metrics": ["span_f1"]},
        {"pipeline_tag": "tagging"},
        {"author": "me"},
    ):
        assert len(hub_faults(good | change)) == 1, change
