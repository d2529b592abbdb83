"""Models from strangers: no code of theirs runs, no socket is opened, and each is refused with its reason."""

from __future__ import annotations

import json
import pickle
import shutil
import socket
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from llmft_nb.artefacts import asked_weights, check_artefacts, check_size, code_keys, find_pickles, tensor_table
from llmft_nb.bases import find_model, load_tokenizer
from llmft_nb.cli import app
from llmft_nb.core import UserError, assets_folder
from llmft_nb.finetune import finetune
from llmft_nb.model_gate import check_model, check_template, refused
from llmft_nb.modeling import LLMForSequenceClassification

Spoil = Callable[[Path], None]
SPOILT: dict[str, Spoil] = {}
RUN = "import pathlib; pathlib.Path({canary!r}).write_text('run')"


class Bomb:
    "A pickle that runs code when it is read."

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return exec, (RUN.format(canary=str(self.canary)),)


def canary(folder: Path) -> Path:
    return folder.parent / "canary"


def change(file: str, **values: Any) -> Spoil:
    "Change or add settings."

    def spoil(folder: Path) -> None:
        path = folder / file
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(json.dumps(found | values), encoding="utf-8")
        (folder / "evil.py").write_text(RUN.format(canary=str(canary(folder))), encoding="utf-8")

    return spoil


def content(file: str, data: bytes | str) -> Spoil:
    "Write a file anew."
    return lambda folder: (folder / file).write_bytes(data if isinstance(data, bytes) else data.encode()) and None


def weights(make: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Spoil:
    "Change the tensors."

    def spoil(folder: Path) -> None:
        found = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        save_file(make(found), folder / "model.safetensors")

    return spoil


def header(make: Callable[[dict[str, Any]], Any]) -> Spoil:
    "Change the list of tensors, not the numbers."

    def spoil(folder: Path) -> None:
        data = (folder / "model.safetensors").read_bytes()
        n = int.from_bytes(data[:8], "little")
        text = json.dumps(make(json.loads(data[8 : 8 + n]))).encode()
        (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + n :])

    return spoil


def first(found: dict[str, Any]) -> str:
    return next(name for name in found if name != "__metadata__")


def with_first(**values: Any) -> Spoil:
    return header(lambda found: found | {first(found): found[first(found)] | values})


def loops(depth: int, body: str = "") -> str:
    return "{% for i in range(99999) %}" * depth + body + "{% endfor %}" * depth


def rewrite(make: Callable[[bytes], bytes]) -> Spoil:
    "Change the bytes of the weights."

    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(make(path.read_bytes()))

    return spoil


def bomb(file: str) -> Spoil:
    "Put a pickle in a file's place."
    return lambda folder: (folder / file).write_bytes(pickle.dumps(Bomb(canary(folder)))) and None


def both(one: Spoil, other: Spoil) -> Spoil:
    return lambda folder: (one(folder), other(folder))[1]


def shorter(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    "Embeddings of sixty-four tokens."
    return {name: one[:64].clone() if one.shape[0] == 6144 else one for name, one in found.items()}


def negative(found: dict[str, Any]) -> dict[str, Any]:
    "A matrix of as many numbers as before, and less than no rows and columns."
    name = next(name for name, one in found.items() if len(one.get("shape", ())) == 2)
    return found | {name: found[name] | {"shape": [-n for n in found[name]["shape"]]}}


INDEX, TEMPLATE = "model.safetensors.index.json", "chat_template.jinja"
GROWS = "{% set ns = namespace(s='xxxx') %}" + loops(1, "{% set ns.s = ns.s ~ ns.s %}")
AUTO = {"AutoModel": "evil.Model", "AutoConfig": "evil.Config", "AutoTokenizer": ["evil.Tokenizer", None]}
SPOILT |= {
    "auto_map": change("config.json", auto_map=AUTO),
    "auto_map of another repository": change("config.json", auto_map={"AutoModel": "somebody/else--evil.Model"}),
    "auto_map inside": change("config.json", text_config={"auto_map": AUTO}),
    "auto_map in a list": change("config.json", parts=[{"auto_map": AUTO}]),
    "auto_map of the tokenizer": change("tokenizer_config.json", auto_map=AUTO),
    "auto_map of a processor": change("processor_config.json", auto_map=AUTO),
    "custom_generate": change("generation_config.json", custom_generate="evil.py"),
    "custom_pipelines": change("config.json", custom_pipelines={"text": {"impl": "evil.Pipe"}}),
    "trust_remote_code": change("config.json", trust_remote_code=True),
    "an internal attention": change("config.json", _attn_implementation_internal="evil"),
    "an internal expert": change("config.json", _experts_implementation_internal="evil"),
    "a kernel of a hub": change("config.json", attn_implementation="somebody/kernel"),
    "a kernel of a hub, by its other name": change("config.json", _attn_implementation="somebody/kernel@main"),
    "an adapter that imports": change("adapter_config.json", auto_mapping={"parent_library": "evil"}),
    "a billion layers": change("config.json", num_hidden_layers=10**9),
    "a huge vocabulary": change("config.json", vocab_size=10**12),
    "a huge width": change("config.json", hidden_size=2**30, intermediate_size=2**30),
    "a negative width": change("config.json", hidden_size=-64),
    "a width that is a text": change("config.json", hidden_size="wide"),
    "an architecture of nobody": change("config.json", model_type="../../evil"),
    "settings nested endlessly": content("config.json", "[" * 100_000 + "]" * 100_000),
    "settings in objects without end": content("config.json", '{"a":' * 100_000 + "1" + "}" * 100_000),
    "settings that are no object": content("config.json", "[1, 2]"),
    "settings cut off": content("config.json", '{"model_type": "llama"'),
    "settings that are a pickle": bomb("config.json"),
    "weights that are a pickle": bomb("model.safetensors"),
    "weights of torch by another name": lambda folder: torch.save(Bomb(canary(folder)), folder / "model.safetensors"),
    "a pickle beside": lambda folder: torch.save(Bomb(canary(folder)), folder / "training_args.bin"),
    "a pickle by another name": bomb("notes.txt"),
    "a tokenizer that is a pickle": bomb("tokenizer.json"),
    "weights cut off": rewrite(lambda data: data[:-1]),
    "something behind the weights": rewrite(lambda data: data + b"PK\x03\x04"),
    "a list longer than the file": content("model.safetensors", (2**62).to_bytes(8, "little") + b"{}"),
    "a list that is no JSON": content("model.safetensors", (4).to_bytes(8, "little") + b"{{{{"),
    "a list nested endlessly": content("model.safetensors", (200_000).to_bytes(8, "little") + b"[" * 200_000),
    "a tensor beyond the end": with_first(data_offsets=[0, 2**40]),
    "a tensor of a terabyte": with_first(shape=[10**6, 10**6]),
    "a negative shape": header(negative),
    "a type of nobody": with_first(dtype="EVIL"),
    "tensors that share their bytes": header(lambda found: found | {"other": found[first(found)]}),
    "a tensor that is missing": weights(lambda found: {name: one for name, one in found.items() if name != max(found)}),
    "a tensor of another shape": weights(lambda found: found | {max(found): torch.ones(3)}),
    "a number that is none": weights(lambda found: found | {max(found): found[max(found)] * float("nan")}),
    "an infinite number": weights(lambda found: found | {max(found): found[max(found)] + float("inf")}),
    "an index that leads elsewhere": content(INDEX, '{"weight_map": {"a": "../../../etc/passwd"}}'),
    "an index of files that are gone": content(INDEX, '{"weight_map": {"a": "gone.safetensors"}}'),
    "an index without a map": content(INDEX, "{}"),
    "a template that loops": content(TEMPLATE, loops(3)),
    "a template that grows": content(TEMPLATE, GROWS),
    "a template that fills the page": content(TEMPLATE, loops(1, "{{ 'x' * 9999 }}")),
    "a template that writes a megabyte": content(TEMPLATE, "{% for i in range(100) %}{{ 'x' * 9999 }}{% endfor %}"),
    "a template that looks inside": content(TEMPLATE, "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "a template that calls": content(TEMPLATE, "{{ cycler.__init__.__globals__.os.system('true') }}"),
    "a template that includes": content(TEMPLATE, "{% include '/etc/passwd' %}"),
    "a template that is none": content(TEMPLATE, "{% for %}"),
    "more tokens than embeddings": both(change("config.json", vocab_size=64), weights(shorter)),
}


@pytest.fixture
def no_socket(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    "Sockets that are noted, and refused."
    asked = list[Any]()

    def refuse(self: Any, address: Any) -> None:
        asked.append(address)
        raise OSError("no socket")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield asked
    assert asked == []


def spoilt_folder(name: str, parent: Path) -> Path:
    folder = parent / "model"
    shutil.copytree(assets_folder() / "models" / "tiny", folder)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    SPOILT[name](folder)
    return folder


def check_refused(name: str, parent: Path) -> None:
    folder = spoilt_folder(name, parent)
    started_s, here = time.monotonic(), set(sys.modules)
    found = refused(check_model(folder))
    assert found and all(one.words for one in found) and any(one.mend for one in found), name
    assert time.monotonic() - started_s < 20
    assert not canary(folder).exists() and "evil" not in set(sys.modules) - here


def check_loaded(name: str, parent: Path) -> None:
    folder = spoilt_folder(name, parent)
    try:
        LLMForSequenceClassification.from_pretrained(folder)
    except UserError as error:
        assert error.mend
    assert not canary(folder).exists() and "evil" not in sys.modules


@pytest.mark.parametrize("name", SPOILT)
def test_each_is_refused_with_its_reason(name: str, tmp_path: Path, no_socket: list[Any]) -> None:
    check_refused(name, tmp_path)


@pytest.mark.parametrize("name", SPOILT)
def test_nothing_of_it_runs_where_it_is_loaded(name: str, tmp_path: Path, no_socket: list[Any]) -> None:
    "Loading may refuse it or not look so far; it never runs anything, and never ends in a traceback."
    check_loaded(name, tmp_path)


def test_there_are_forty_and_more() -> None:
    assert len(SPOILT) >= 40


@pytest.mark.parametrize("name", ["auto_map", "weights cut off", "a number that is none"])
def test_the_command_ends_as_for_a_mistake(name: str, tmp_path: Path) -> None:
    folder = spoilt_folder(name, tmp_path)
    told = CliRunner().invoke(app, ["check", str(folder), "--json"])
    assert told.exit_code == 2 and any(one["status"] == "refused" for one in json.loads(told.stdout))
    told = CliRunner().invoke(app, ["check", str(folder)])
    assert told.exit_code == 2 and "refused" in told.stdout and "Traceback" not in told.output


@pytest.mark.parametrize("name", ["tiny", "tiny-encoder"])
def test_what_ships_passes(name: str) -> None:
    told = CliRunner().invoke(app, ["check", name, "--json"])
    assert told.exit_code == 0
    assert {one["status"] for one in json.loads(told.stdout)} == {"ok"}


@pytest.mark.parametrize("kind", ["Llama", "Bert", "GPT2", "T5", "Qwen3", "Roberta"])
def test_sound_models_of_many_kinds_are_not_refused(kind: str, save_small: Callable[..., Path]) -> None:
    assert refused(check_model(save_small(kind))) == []


def test_a_tuned_model_passes_its_own_gate(small_run: Path) -> None:
    assert refused(check_model(small_run / "model")) == []


def test_a_run_refuses_before_anything_is_written(small_files: Path, tmp_path: Path) -> None:
    folder = spoilt_folder("auto_map", tmp_path)
    with pytest.raises(UserError, match=r"asks for code to be run: auto_map"):
        finetune(small_files / "train.jsonl", model=folder, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_usual_templates_render_as_transformers_renders_them() -> None:
    tokenizer, _ = load_tokenizer(find_model("tiny"))
    assert check_template(tokenizer.chat_template).status == "ok"
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}"
    assert "no system message" in check_template(strict).words
    marked = "{% generation %}{{ m.content | tojson }}{% endgeneration %}"
    assert check_template("{% for m in messages %}" + marked + "{% break %}{% endfor %}").status == "ok"


@pytest.mark.parametrize("name", [name for name in SPOILT if name.startswith("a template that")])
def test_a_template_is_tried_before_it_renders(name: str, tmp_path: Path) -> None:
    from llmft_nb.templates import render_text

    tokenizer, _ = load_tokenizer(find_model(spoilt_folder(name, tmp_path)))
    with pytest.raises(UserError, match=r"the chat template (is refused|gave up)"):
        render_text(tokenizer, [{"role": "user", "content": "May I?"}])


def test_a_zip_without_a_pickle_is_none(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "notes.zip", "w") as file:
        file.writestr("notes.txt", "hello")
    assert find_pickles(tmp_path) == []


def test_empty_keys_ask_for_nothing() -> None:
    assert list(code_keys({"auto_map": None, "custom_pipelines": {}, "_attn_implementation": "sdpa"})) == []


def test_sizes_are_counted_before_anything_is_made(save_small: Callable[..., Path]) -> None:
    from llmft_nb.bases import base_config

    source = find_model(save_small("Llama"))
    config, table = base_config(source), tensor_table(Path(source.location) / "model.safetensors")
    n_weights = sum(torch.Size(shape).numel() for _, shape in table.values())
    assert 0.5 * n_weights < asked_weights(config) <= 1.1 * n_weights
    with pytest.raises(UserError, match="too large"):
        check_size(config, "model", n_bytes=4 * asked_weights(config) - 1)
    check_artefacts(Path(source.location))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda weights, name: weights.pop(name), r"{name} is missing"),
        (lambda weights, name: weights.update({name: torch.ones(3, 64)}), r"{name} is \[3, 64\], not \["),
    ],
    ids=["missing", "misshaped"],
)
@pytest.mark.parametrize("kind", ["Bert", "Llama"])
def test_a_base_that_is_not_whole_is_not_trained(
    kind: str, spoil: Any, told: str, save_small: Callable[..., Path], small_files: Path, tmp_path: Path
) -> None:
    "Only a head may be drawn at random; the tensor is named, and nothing is written."
    folder = shutil.copytree(save_small(kind), tmp_path / "model")
    found = load_file(folder / "model.safetensors")
    name = next(name for name in found if "layers.1" in name or ("layer.1" in name and name.endswith("weight")))
    spoil(found, name)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=told.format(name=rf"\S*{name}".replace(".", r"\."))) as caught:
        finetune(small_files / "train.jsonl", model=folder, out=tmp_path / "run")
    assert "llmft check" in caught.value.mend and not (tmp_path / "run").exists()
