"""Small models, rows and runs that several test modules share; nothing here comes from a network."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from small import saved_network, small_rows, write_jsonl

os.environ.setdefault("OMP_NUM_THREADS", "1")
CACHE = tempfile.TemporaryDirectory(prefix="llmft-cache-")  # What is measured of this machine is forgotten
os.environ["LLMFT_CACHE"] = CACHE.name
signal.signal(signal.SIGINT, signal.default_int_handler)  # Started in the background, a shell has it ignored


@pytest.fixture(scope="session")
def one_thread() -> None:
    "Bits depend on the number of threads: one, here and in the processes started from here."
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def save_small(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Callable[..., Path]:
    "Gives the folder of a small random base model of an architecture, with the embedded tokenizer."
    saved: dict[str, Path] = {}

    def folder_of(kind: str, **changes: Any) -> Path:
        key = json.dumps([kind, changes], sort_keys=True)
        if key not in saved:
            saved[key] = saved_network(kind, tmp_path_factory.mktemp(kind.lower()), **changes)
        return saved[key]

    return folder_of


@pytest.fixture(scope="session")
def small_model(save_small: Callable[..., Path]) -> Path:
    "The folder of a small random Llama."
    return save_small("Llama")


@pytest.fixture(scope="session")
def small_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder with train.jsonl (66 rows), valid.jsonl and test.jsonl (24 each), without leaks."
    folder, rows = tmp_path_factory.mktemp("rows"), small_rows(114)
    for name, part in (("train", rows[:66]), ("valid", rows[66:90]), ("test", rows[90:])):
        write_jsonl(folder / f"{name}.jsonl", part)
    return folder


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory, small_model: Path, small_files: Path) -> Path:
    "The folder of a finished run; tests only read it."
    from llmft_nb.finetune import finetune

    folder = tmp_path_factory.mktemp("runs") / "finished"
    options: dict[str, Any] = {"epochs": 2, "batch_size": 8, "lr": 3e-3, "precision": "f32"}
    held_out = {name: small_files / f"{name}.jsonl" for name in ("valid", "test")}
    finetune(small_files / "train.jsonl", model=small_model, out=folder, **held_out, **options)
    return folder


@pytest.fixture
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    "Work in an empty folder."
    monkeypatch.chdir(tmp_path)
    yield tmp_path
