"""Exports: every form held against a reference that is not ours; what is refused, and that nothing is left then."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import served
import torch
from small import small_rows, write_jsonl
from typer.testing import CliRunner

pytest.importorskip("onnxruntime", reason="the extra export is not installed")
pytest.importorskip("gguf", reason="the extra export is not installed")

from llmft_nb import export, int8, onnx_graph
from llmft_nb.bases import weights_fingerprint
from llmft_nb.cli import app
from llmft_nb.core import UserError, assets_folder, sha256_file
from llmft_nb.export import export_run, load_exported
from llmft_nb.finetune import finetune
from llmft_nb.gguf_file import GgufModel, rule_name, save_gguf, words_of_file
from llmft_nb.handover import served_template
from llmft_nb.int8 import Int8Linear, load_int8, quantise_model, read_int8, save_int8
from llmft_nb.modeling import LLMForCausalLM, LLMForSequenceClassification, size_head
from llmft_nb.ollama import model_file, turn_ends
from llmft_nb.predict import load_predictor
from llmft_nb.push import push_folder, push_operations

TEXTS = ["I saw 12 times the apple on the table", "Saw", "I saw 999 times the gull near the river" + " again" * 30]
QUIET: dict[str, Any] = {"callbacks": [], "epochs": 1, "leaks": "allow"}


def called(*words: Any, status: int = 0) -> Any:
    "The command line's answer; its status is checked."
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == status, (done.exit_code, done.output, done.exception)
    return done


@pytest.fixture(scope="module")
def labels_run(tmp_path_factory: pytest.TempPathFactory, small_files: Path, save_small: Callable[..., Path]) -> Path:
    "A classifier, tuned by adapters on a small random Bert."
    folder = tmp_path_factory.mktemp("labels") / "run"
    options = {"model": save_small("Bert"), "strategy": "lora:4", "lr": 0.01}
    finetune(small_files, out=folder, **options, **(QUIET | {"epochs": 3}))
    return folder


@pytest.fixture(scope="module")
def tags_run(tmp_path_factory: pytest.TempPathFactory, save_small: Callable[..., Path]) -> Path:
    "A tagger on a small random Bert."
    folder = tmp_path_factory.mktemp("tags") / "run"
    rows = [
        {"tokens": row["text"].split(), "ner_tags": ["B-N" if word.isdigit() else "O" for word in row["text"].split()]}
        for row in small_rows(60)
    ]
    options = {"task": "tag", "model": save_small("Bert"), "lr": 0.01}
    finetune(rows[:40], valid=rows[40:50], test=rows[50:], out=folder, **options, **QUIET)
    return folder


@pytest.fixture(scope="module")
def talk_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The embedded Llama, tuned on a few written answers."
    folder = tmp_path_factory.mktemp("talk") / "run"
    rows = [{"prompt": row["text"], "completion": row["label"]} for row in small_rows(60)]
    options = {"task": "instruct", "model": "tiny", "system": "Answer in one word.", "strategy": "lora:4"}
    finetune(rows[:40], valid=rows[40:50], test=rows[50:], out=folder, **options, **QUIET)
    return folder


def copied(run: Path, to: Path) -> Path:
    "A run that may be broken."
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("export", "checkpoints"))
    return to


# Merged


def test_merged_equals_what_peft_makes_of_base_and_adapter(labels_run, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    told = export_run(labels_run, "merged", tmp_path / "merged")
    base = json.loads((labels_run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    beside = PeftModel.from_pretrained(plain, str(labels_run / "adapter")).eval()
    alone = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    batch = AutoTokenizer.from_pretrained(tmp_path / "merged")(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        gap = float((beside(**batch).logits - alone(**batch).logits).abs().max())
        moved = float((plain.base_model(**batch)[0] - alone.base_model(**batch)[0]).abs().max())
    assert gap < 1e-5
    assert moved > 0 or gap == 0
    assert 0 < told["proof"]["largest"] <= 1e-5, "held against itself, not against base and adapter"


def test_a_merge_that_lost_something_is_refused_and_leaves_nothing(labels_run, tmp_path):
    from safetensors.torch import load_file, save_file

    run = copied(labels_run, tmp_path / "run")
    file = run / "adapter" / "adapter_model.safetensors"
    adapters = load_file(file)
    name = next(name for name in adapters if "output.dense.lora_B" in name)
    noise = torch.randn(adapters[name].shape, generator=torch.Generator().manual_seed(0))
    save_file(adapters | {name: adapters[name] + noise}, file)
    with pytest.raises(UserError, match="does not answer as the trained model") as error:
        export_run(run, "merged", tmp_path / "there" / "merged")
    assert "merging may differ" in error.value.why and ".jsonl:" in error.value.where
    assert not (tmp_path / "there").exists()


# Eight bits


def test_int8_is_what_dequantising_by_hand_gives(labels_run, tmp_path):
    export_run(labels_run, "int8", tmp_path / "int8", tolerance=1.0)
    tensors = read_int8(tmp_path / "int8" / "int8.safetensors")
    names = [name.removesuffix(".step") for name in tensors if name.endswith(".step")]
    trained = load_predictor(labels_run).model.network.cpu()
    assert len(names) == 2 * 6 + 1 + 1  # two blocks of six matrices, the pooler, the table of words
    for name in names:
        weight = trained.get_submodule(name).weight.detach()
        whole, step = tensors[f"{name}.weight"], tensors[f"{name}.step"]
        assert whole.dtype == torch.int8 and whole.shape == weight.shape
        widths = weight.abs().amax(1).numpy() / 127
        np.testing.assert_allclose(step.numpy(), np.where(widths > 0, widths, 1.0), rtol=1e-6)  # Padding is all zeros
        assert float(((whole * step[:, None] - weight).abs() / step[:, None]).max()) <= 0.5 + 1e-3
    states = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))
    name = "bert.encoder.layer.0.attention.self.query"
    layer = Int8Linear(*(tensors[f"{name}.{part}"] for part in ("weight", "step", "bias")))
    flat = states.numpy().reshape(-1, 32).astype(np.float64)
    rounded = tensors[f"{name}.weight"].double() * tensors[f"{name}.step"].double()[:, None]
    wanted = flat @ rounded.numpy().T + tensors[f"{name}.bias"].numpy()
    np.testing.assert_allclose(layer(states).numpy().reshape(-1, 32), wanted, atol=2e-4)


def test_int8_answers_do_not_depend_on_the_batch(labels_run, tmp_path):
    export_run(labels_run, "int8", tmp_path / "int8", tolerance=1.0)
    predictor = load_exported(tmp_path / "int8")
    together = predictor.predict(TEXTS)
    for text, answer in zip(TEXTS, together, strict=True):
        alone = predictor.predict([text])[0]
        assert alone["label"] == answer["label"]
        assert alone["probabilities"] == pytest.approx(answer["probabilities"], abs=1e-2)


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_int8_of_writers_keeps_shared_matrices_shared(kind, save_small, tmp_path):
    model = LLMForCausalLM.from_pretrained(save_small(kind, tie_word_embeddings=True))
    ids = torch.tensor([[10, 20, 30, 40]])
    with torch.no_grad():
        before = model(input_ids=ids)
        quantise_model(model)
        rounded = model(input_ids=ids)
        save_int8(model, tmp_path / "int8")
        again = load_int8(tmp_path / "int8", LLMForCausalLM)
        assert torch.allclose(again(input_ids=ids), rounded, atol=1e-5)
    assert 0 < float((rounded - before).abs().max()) < 0.2 * float(before.abs().max())
    table, output = again.network.get_input_embeddings(), again.network.lm_head
    assert table.weight.data_ptr() == output.weight.data_ptr()


def test_int8_holds_no_pickle_and_reports_its_size(labels_run, tmp_path):
    told = export_run(labels_run, "int8", tmp_path / "int8", tolerance=1.0)
    assert {path.suffix for path in (tmp_path / "int8").iterdir()} <= {".json", ".safetensors", ".jinja", ".md", ""}
    assert told["bytes"] == sum(p.stat().st_size for p in (tmp_path / "int8").iterdir() if p.name != "export.json")
    assert all(sha256_file(tmp_path / "int8" / name) == kept["sha256"] for name, kept in told["files"].items())
    assert told["model_sha256"] == weights_fingerprint(labels_run / "model")
    assert set(told["proof"]["seconds"]) == {"trained", "exported"}


# ONNX


@pytest.mark.parametrize("which", ["labels_run", "tags_run"])
def test_onnxruntime_gives_what_transformers_gives(which, request, tmp_path):
    import onnxruntime
    import transformers

    run = request.getfixturevalue(which)
    told = export_run(run, "onnx", tmp_path / "onnx")
    assert told["proof"]["largest"] <= 1e-4 and told["proof"]["equal_frac"] == 1.0
    kind = "SequenceClassification" if which == "labels_run" else "TokenClassification"
    network = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(run / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    names = {one.name for one in session.get_inputs()}
    for texts in (TEXTS, TEXTS[1:2], TEXTS[:1] * 7):
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            wanted = network(**batch).logits.numpy()
        given = {name: tensor.numpy() for name, tensor in batch.items() if name in names}
        np.testing.assert_allclose(session.run(None, given)[0], wanted, atol=1e-4)
    answers = load_exported(tmp_path / "onnx").predict(TEXTS)
    wanted_answers = load_predictor(run).predict(TEXTS)
    field = "label" if which == "labels_run" else "tags"
    assert [one[field] for one in answers] == [one[field] for one in wanted_answers]


def test_a_graph_that_forgets_the_mask_is_refused(labels_run, tmp_path, monkeypatch):
    run = copied(labels_run, tmp_path / "run")
    plain = onnx_graph.OnnxModel.forward

    def forgetful(self: Any, keep: Any = None, **batch: Any) -> Any:
        return plain(self, keep, **(batch | {"attention_mask": torch.ones_like(batch["attention_mask"])}))

    monkeypatch.setattr(onnx_graph.OnnxModel, "forward", forgetful)
    with pytest.raises(UserError, match="does not answer as the trained model"):
        export_run(run, "onnx")
    assert not (run / "export").exists()


# GGUF


def test_gguf_read_back_by_its_own_package(talk_run, tmp_path):
    import gguf

    told = export_run(talk_run, "gguf", tmp_path / "gguf")
    assert told["proof"]["largest"] < 1e-2
    network = load_predictor(talk_run).model.network.cpu()
    reader = gguf.GGUFReader(tmp_path / "gguf" / "model.gguf")
    tensors = {one.name: one.data for one in reader.tensors}
    state = network.state_dict()
    half = {name: weight.half().numpy() for name, weight in state.items()}
    assert len(tensors) == 6 * 9 + 2
    np.testing.assert_array_equal(tensors["token_embd.weight"], half["model.embed_tokens.weight"])
    np.testing.assert_array_equal(tensors["output_norm.weight"], state["model.norm.weight"].numpy())
    pairs = {"attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj"}
    pairs |= {"ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    for i in range(6):
        for theirs, ours in pairs.items():
            np.testing.assert_array_equal(tensors[f"blk.{i}.{theirs}.weight"], half[f"model.layers.{i}.{ours}.weight"])
        for theirs, ours, n_heads in (("attn_q", "q_proj", 8), ("attn_k", "k_proj", 4)):
            wanted = half[f"model.layers.{i}.self_attn.{ours}.weight"]
            order = [head * 32 + side * 16 + pair for head in range(n_heads) for pair in range(16) for side in (0, 1)]
            np.testing.assert_array_equal(tensors[f"blk.{i}.{theirs}.weight"], wanted[order])
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tokenizer = load_predictor(talk_run).model.tokenizer
    said = served_template(tokenizer.chat_template, {"system": "Answer in one word."})
    assert fields["tokenizer.chat_template"] == said != tokenizer.chat_template
    assert fields["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(6144))
    assert fields["tokenizer.ggml.eos_token_id"] == 1 and fields["tokenizer.ggml.padding_token_id"] == 0
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert (fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]) == (8, 4)
    read = words_of_file(GgufModel(tmp_path / "gguf"))
    for text in [*TEXTS, "Take 20 mg,\n don't!", "Größe 漢字"]:
        assert read.encode(text).ids == tokenizer(text)["input_ids"]
    shipped = (tmp_path / "gguf" / "Modelfile").read_text()
    assert 'SYSTEM """Answer in one word."""' in shipped and 'PARAMETER stop "<|end|>"' in shipped


def test_llama_cpp_computes_the_same(talk_run, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    export_run(talk_run, "gguf", tmp_path / "gguf")
    model = load_predictor(talk_run).model.to("cpu")
    made = llama_cpp.Llama(
        str(tmp_path / "gguf" / "model.gguf"), n_ctx=512, logits_all=True, verbose=False, n_threads=1
    )
    for text in [*TEXTS, "Take 20 mg,\n don't!", "Größe 漢字", "<|user|>May I?<|end|><|assistant|>"]:
        ids = model.tokenizer(text)["input_ids"]
        assert made.tokenize(text.encode(), add_bos=True, special=True) == ids
        with torch.no_grad():
            wanted = model(input_ids=torch.tensor([ids]))[0].numpy()
        made.reset()
        made.eval(ids)
        found = np.array(made.scores[: len(ids)])
        assert np.abs(found - wanted).max() < 1e-2 * np.abs(wanted).max()
        assert (found.argmax(-1) == wanted.argmax(-1)).all()


def test_llama_three_turns_at_its_own_speeds(save_small, tmp_path):
    slower = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    slower |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    model = LLMForCausalLM.from_pretrained(
        save_small("Llama", rope_parameters=slower, tie_word_embeddings=False, initializer_range=0.2)
    )
    save_gguf(model, tmp_path / "gguf")
    read, ids = GgufModel(tmp_path / "gguf"), torch.arange(10, 210)[None]
    assert "rope_freqs.weight" in read.tensors and "output.weight" in read.tensors
    with torch.no_grad():
        wanted, found = model(input_ids=ids), read(input_ids=ids)
        read.tensors.pop("rope_freqs.weight")
        other = read(input_ids=ids)
    near, far = (float((wanted - one).abs().max() / wanted.abs().max()) for one in (found, other))
    assert near < 5e-3 and far > 5e-2, (near, far)


def test_what_llama_cpp_would_read_wrongly_is_refused(save_small, tmp_path):
    for changes in ({"attention_bias": True}, {"hidden_act": "gelu"}):
        model = LLMForCausalLM.from_pretrained(save_small("Llama", **changes))
        with pytest.raises(UserError, match="this Llama cannot be written"):
            save_gguf(model, tmp_path / "gguf")
    with pytest.raises(UserError, match="of the Llama family"):
        save_gguf(LLMForCausalLM.from_pretrained(save_small("Qwen3")), tmp_path / "gguf")
    spec = json.loads((assets_folder() / "models" / "tiny" / "tokenizer.json").read_text())
    with pytest.raises(UserError, match="is not known"):
        rule_name(spec | {"normalizer": {"type": "Lowercase"}})
    assert not (tmp_path / "gguf").exists()


def test_a_modelfile_renders_as_the_template_or_not_at_all():
    model = LLMForCausalLM.from_pretrained("tiny")
    chatml = "{% for m in messages %}<|user|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    model.tokenizer.chat_template = chatml + "{% if add_generation_prompt %}<|user|>assistant\n{% endif %}"
    found = turn_ends(model.tokenizer)
    assert found is not None
    turns, opening = found
    assert turns["user"] == ("<|user|>user\n", "<|end|>\n") and opening == "<|user|>assistant\n"
    model.tokenizer.chat_template = "{{ messages | length }}" + chatml
    assert turn_ends(model.tokenizer) is None
    assert "TEMPLATE" not in model_file(model, {"system": 'three """ quotes'})


# What travels along


def test_card_licences_and_notice_travel_along(labels_run, tmp_path):
    run = copied(labels_run, tmp_path / "run")
    (run / "LICENSE").write_text("All rights of nobody")
    record = json.loads((run / "run.json").read_text())
    record["data"]["notice"] = "for teaching"
    (run / "run.json").write_text(json.dumps(record))
    export_run(run, "merged", tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "All rights of nobody"
    assert "for teaching" in (tmp_path / "out" / "NOTICE").read_text()
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith((run / "README.md").read_text().rstrip()) and "## This export" in card
    assert load_exported(tmp_path / "out").notice == "for teaching"
    assert load_exported(tmp_path / "out").max_length == load_predictor(run).max_length


def test_generation_settings_and_template_travel_along(talk_run, tmp_path):
    for name in ("merged", "int8"):
        export_run(talk_run, name, tmp_path / name, tolerance=1.0)
        there = {path.name for path in (tmp_path / name).iterdir()}
        assert {"generation_config.json", "chat_template.jinja", "tokenizer.json", "config.json"} <= there
    asked = ["I saw 12 times the apple on the table"]
    assert load_exported(tmp_path / "merged").predict(asked) == load_predictor(talk_run).predict(asked)
    assert set(load_exported(tmp_path / "int8").predict(asked)[0]) == {"completion", "finished"}


# The command, and what is refused


def test_the_command_exports_and_predict_takes_it(labels_run, tmp_path):
    data = write_jsonl(tmp_path / "asked.jsonl", small_rows(20, seed=5))
    done = called(
        "export", labels_run, "--format", "onnx", "--out", tmp_path / "o", "--data", data, "--push", tmp_path / "hub"
    )
    assert "20 of 20 answers equal (100.00 %) on 20 rows" in done.output and "rows of asked.jsonl" in done.output
    assert {path.name for path in (tmp_path / "hub").iterdir()} == {path.name for path in (tmp_path / "o").iterdir()}
    answered = called("predict", tmp_path / "o", TEXTS[0], "--json")
    assert json.loads(answered.stdout)["label"] == load_predictor(labels_run).predict(TEXTS[:1])[0]["label"]


@pytest.mark.parametrize(
    ("which", "name"), [("labels", "int8"), ("tags", "onnx"), ("talk", "merged"), ("talk", "int8")]
)
def test_an_export_is_served_and_scored_as_it_is_asked(which, name, request, tmp_path):
    run, out = request.getfixturevalue(f"{which}_run"), tmp_path / "out"
    export_run(run, name, out, tolerance=1.0)
    expected = load_exported(out).predict(TEXTS)
    with served.serving(out, tmp_path) as server:
        if which == "talk":
            asked = [{"messages": [{"role": "user", "content": text}]} for text in TEXTS]
            answers = [server.ask("POST", "/v1/chat/completions", one)[2]["choices"][0] for one in asked]
            assert [one["message"]["content"] for one in answers] == [one["completion"] for one in expected]
        else:
            path = "/v1/classify" if which == "labels" else "/v1/tag"
            answers = server.ask("POST", path, {"input": TEXTS})[2]["data"]
            key = "label" if which == "labels" else "tags"
            assert [one[key] for one in answers] == [one[key] for one in expected]
    if which == "labels":
        data = write_jsonl(tmp_path / "asked.jsonl", small_rows(30, seed=5))
        scores = json.loads(called("eval", out, "--data", data, "--json").stdout)
        right = [one["label"] for one in load_exported(out).predict([row["text"] for row in small_rows(30, seed=5)])]
        share = sum(one == row["label"] for one, row in zip(right, small_rows(30, seed=5), strict=True)) / 30
        assert scores["accuracy"]["value"] == pytest.approx(share)


def broken(run: Path, how: str) -> None:
    "Spoil a run in one way."
    record = json.loads((run / "run.json").read_text())
    if how == "unfinished":
        (run / "run.json").write_text(json.dumps(record | {"status": "interrupted"}))
    elif how == "no record":
        (run / "run.json").write_text("{")
    elif how == "no weights":
        shutil.rmtree(run / "model")
    elif how == "other weights":
        record["lineage"]["model_sha256"] = "0" * 64
        (run / "run.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("unfinished", "this run is interrupted"),
        ("no record", "not a run record"),
        ("no weights", "no model folder"),
        ("other weights", "not the weights that were trained"),
    ],
)
def test_a_broken_run_is_told(labels_run, tmp_path, how, says):
    run = copied(labels_run, tmp_path / "run")
    broken(run, how)
    done = called("export", run, "--format", "merged", status=2)
    assert says in done.stderr and "mend:" in done.stderr
    assert not (run / "export").exists()
    assert says in called("serve", run, "--port", 0, status=2).stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--format", "onxx"), "did you mean onnx?"),
        (("--format", "gguf"), "gguf is not for a model trained to classify"),
        (("--format", "int8", "--push", "a/b/c"), "no name that the hub knows"),
        (("--format", "int8", "--push", "owner/name"), "set HF_TOKEN in the environment"),
        (("--format", "int8", "--data", "no-such.jsonl"), "no-such"),
    ],
)
def test_bad_input_is_told(labels_run, monkeypatch, words, says):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    done = called("export", labels_run, *words, status=2)
    assert says in done.stderr and "Traceback" not in done.stderr


def test_onnx_of_a_writer_and_a_full_folder_are_refused(talk_run, tmp_path):
    assert "a graph answers once" in called("export", talk_run, "--format", "onnx", status=2).stderr
    (tmp_path / "kept.txt").write_text("mine")
    assert "it is not empty" in called("export", talk_run, "--out", tmp_path, status=2).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_a_missing_extra_is_told_before_anything_is_computed(labels_run, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graph.importlib.util, "find_spec", lambda name: None)
    done = called("export", labels_run, "--format", "onnx", "--out", tmp_path / "o", status=2)
    assert 'pip install "llmft_nb[export]"' in done.stderr


def test_a_full_disk_names_bytes_and_leaves_nothing(labels_run, tmp_path, monkeypatch):
    def full(model: Any, folder: Path) -> None:
        (folder / "begun").write_bytes(bytes(1234))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(export, "save_int8", full)
    done = called("export", labels_run, "--format", "int8", "--out", tmp_path / "a" / "o", status=2)
    assert "1,234 bytes were written" in done.stderr and "free" in done.stderr
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(export.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 9, 1))
    done = called("export", labels_run, "--format", "merged", "--out", tmp_path / "o", status=2)
    assert "no room for the export" in done.stderr and "1 are free" in done.stderr


def test_answers_that_differ_are_told_with_their_row_made_harmless(labels_run, tmp_path, monkeypatch):
    data = write_jsonl(tmp_path / "asked.jsonl", [{"text": "bad\x1b[31m\u202e text"}, {"text": "I saw a gull"}])
    plain = int8.quantise_rows

    def wrong(weight: torch.Tensor) -> Any:
        whole, step = plain(weight)
        return -whole, step

    monkeypatch.setattr(int8, "quantise_rows", wrong)
    words = ("--format", "int8", "--out", tmp_path / "o", "--data", data, "--tolerance", 0)
    done = called("export", labels_run, *words, status=2)
    assert "does not answer as the trained model" in done.stderr and "asked.jsonl:" in done.stderr
    assert "\x1b" not in done.stderr and "\u202e" not in done.stderr
    assert not (tmp_path / "o").exists() and not list(tmp_path.glob(".*"))


def test_what_was_damaged_after_the_export_is_not_loaded(labels_run, tmp_path):
    export_run(labels_run, "int8", tmp_path / "o", tolerance=1.0)
    file = tmp_path / "o" / "int8.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "not as it was written" in called("predict", tmp_path / "o", "a text", status=2).stderr
    told = json.loads((tmp_path / "o" / "export.json").read_text())
    flipped = bytearray(file.read_bytes() + b"!")
    file.write_bytes(flipped)  # The right length, and a byte that is not the one that was written
    assert told["files"][file.name]["bytes"] == len(flipped)
    said = called("serve", tmp_path / "o", "--port", 0, status=2).stderr
    assert "int8.safetensors is missing, or not as it was written" in said
    (tmp_path / "o" / "export.json").write_text('{"format": "int8"}')
    assert "not an export's record" in called("predict", tmp_path / "o", "a text", status=2).stderr


# Pushing


class FakeHub:
    "Takes what a push would send."

    def __init__(self, fails: str = "") -> None:
        self.fails, self.sent, self.asked = fails, dict[str, bytes](), list[Any]()

    def create_repo(self, name: str, **options: Any) -> None:
        self.asked.append((name, options))

    def create_commit(self, name: str, operations: Any, **options: Any) -> Any:
        if self.fails:
            raise RuntimeError(self.fails)
        for one in operations:
            with one.as_file() as file:
                self.sent[one.path_in_repo] = file.read()


def test_a_push_sends_the_very_files_to_a_private_place(labels_run, tmp_path, monkeypatch):
    export_run(labels_run, "merged", tmp_path / "o")
    monkeypatch.setenv("HF_TOKEN", "hf_abcdef")
    hub = FakeHub()
    push_folder(tmp_path / "o", "owner/name", hub)
    assert hub.asked == [("owner/name", {"private": True, "exist_ok": True})]
    assert hub.sent == {path.name: path.read_bytes() for path in (tmp_path / "o").iterdir()}
    assert not any(b"hf_abcdef" in content for content in hub.sent.values())
    with pytest.raises(UserError, match="the hub did not take it") as error:
        push_folder(tmp_path / "o", "owner/name", FakeHub("401 for hf_abcdef"))
    assert "hf_abcdef" not in str(error.value) and error.value.__suppress_context__
    (tmp_path / "o" / "notes.txt").write_text("hf_abcdef")
    with pytest.raises(UserError, match="a file holds your token"):
        push_operations(tmp_path / "o", "hf_abcdef")


def test_a_bare_head_is_kept_out_of_eight_bits(save_small):
    model = LLMForSequenceClassification.from_pretrained(save_small("Bert"))
    size_head(model, ["a", "b"])
    names = quantise_model(model)
    assert "classifier" not in names and type(model.network.classifier) is torch.nn.Linear
    assert "bert.embeddings.position_embeddings" not in names
