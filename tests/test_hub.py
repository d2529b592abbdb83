"""Models of a hub: found, described without their weights, pinned to a commit, and tuned."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub import Hub, served
from small import small_rows, write_jsonl
from test_mistakes import Outcome, llmft_process

from llmft_nb.bases import describe_model, find_model


@pytest.fixture
def hub() -> Iterator[Hub]:
    with served() as found:
        yield found


def surroundings(hub: Hub, home: Path) -> dict[str, str]:
    "The environment of a process that knows this hub and no other."
    return {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "0"}


def llmft(hub: Hub, home: Path, *arguments: str, **changes: str) -> Outcome:
    "The command, with this hub as its only one."
    return llmft_process(*arguments, **(surroundings(hub, home) | changes))


def test_a_hub_model_is_described_by_headers_alone(hub: Hub, save_small: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_small("Llama")
    hub.push("owner/small", folder)
    told = llmft(hub, tmp_path, "models", "owner/small", "--json")
    assert told.status == 0, told.err
    *_, line = json.loads(told.out)
    same = describe_model(find_model(folder)) | {"name": "owner/small", "licence": "mit"}
    assert line.pop("megabytes") == pytest.approx(same.pop("megabytes"), abs=0.1)
    assert line == same
    assert not list((tmp_path / "hub").rglob("*.safetensors")), "weights were fetched"


def test_a_hub_model_is_looked_at_before_it_is_trusted(
    hub: Hub, save_small: Callable[..., Path], tmp_path: Path
) -> None:
    sound = shutil.copytree(save_small("Llama"), tmp_path / "sound")
    (sound / "pytorch_model.bin").write_bytes(b"never read")
    (sound / "evil.py").write_text("1 / 0")
    hub.push("owner/small", sound)
    evil = shutil.copytree(save_small("Bert"), tmp_path / "evil")
    config = json.loads((evil / "config.json").read_text(encoding="utf-8"))
    (evil / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Model"}}))
    hub.push("owner/evil", evil)
    told = llmft(hub, tmp_path / "home", "check", "owner/small", "--json")
    assert told.status == 0, told.err
    found = {one["name"]: one for one in json.loads(told.out)}
    assert found["licence"]["words"] == "mit" and found["tensors"]["status"] == "ok"
    assert found["pickles"]["status"] == "warning" and "pytorch_model.bin" in found["pickles"]["words"]
    fetched = {path.name for path in (tmp_path / "home").rglob("snapshots/*/*")}
    assert "model.safetensors" in fetched and not fetched & {"pytorch_model.bin", "evil.py"}
    told = llmft(hub, tmp_path / "home", "check", "owner/evil")
    assert told.status == 2 and "auto_map" in told.out and "Traceback" not in told.out + told.err
    told = llmft(hub, tmp_path / "home", "check", "owner/nothing")
    assert told.status == 2 and "owner/nothing" in told.err, "neither a model nor rows"


REFUSED = """
from llmft_nb.bases import describe_model, find_model
from llmft_nb.core import UserError
for name in ("owner/other", "owner/small@v9", "owner/bare"):
    try:
        describe_model(find_model(name))
    except UserError as error:
        print(error)
"""


def test_what_the_hub_does_not_have_is_told(hub: Hub, save_small: Callable[..., Path], tmp_path: Path) -> None:
    hub.push("owner/small", save_small("Llama"))
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((save_small("Llama") / "config.json").read_bytes())
    hub.push("owner/bare", tmp_path / "bare")
    environment = os.environ | surroundings(hub, tmp_path / "home")
    command = [sys.executable, "-c", REFUSED]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert told.returncode == 0, told.stderr
    nobody, no_revision, bare = told.stdout.splitlines()
    assert "owner/other" in nobody and "neither a folder here nor a model on the hub" in nobody
    assert "owner/small@v9" in no_revision and "no such revision" in no_revision
    assert "owner/bare" in bare and "headers" in bare and "safetensors" in bare


def test_a_branch_that_moves_while_a_run_is_under_way(
    hub: Hub, save_small: Callable[..., Path], tmp_path: Path
) -> None:
    "The run ends with the commit it began with, and the same commit can be had by its name, offline too."
    first = hub.push("owner/small", save_small("Bert"))
    hub.after = ("model.safetensors", lambda: hub.push("owner/small", save_small("Bert", num_hidden_layers=3)))
    data = write_jsonl(tmp_path / "rows.jsonl", small_rows(48))
    options = ["--data", str(data), "--epochs", "1", "--batch-size", "16", "--strategy", "top:1"]
    told = llmft(hub, tmp_path, "train", "--model", "owner/small", "--out", str(tmp_path / "run"), *options)
    assert told.status == 0, told.err
    assert hub.after is None and hub.find("owner/small", "main") != hub.find("owner/small", first), "main has moved"
    model = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["model"]
    assert model["revision"] == first
    moved = {part["name"]: part["n_moved"] for part in model["moved"]["whole"]}
    assert moved["embeddings"] == 0 and moved["block 0"] == 0 and moved["block 1"] > 0
    offline = llmft(hub, tmp_path, "models", f"owner/small@{first}", "--data", str(data), "--json", HF_HUB_OFFLINE="1")
    assert offline.status == 0, offline.err
    assert "owner/small" in [line["name"] for line in json.loads(offline.out)]
