"""The wheel carries what it needs, and works from a folder that knows nothing of the project."""

import os
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import house_checks as house
import pytest

from llmft_nb.bases import CATALOGUE
from llmft_nb.sources import DATA_CATALOGUE

ROOT = Path(__file__).resolve().parents[1]
LARGEST_BYTES = 25_000_000


def run(command: list[object], cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel, built from a copy of the project's files."
    copy = tmp_path_factory.mktemp("project")
    for path in house.project_files(ROOT):
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    run([sys.executable, "-m", "build", "--no-isolation", "--sdist", "--wheel", "--outdir", "dist", "."], copy)
    assert len(list((copy / "dist").glob("*.tar.gz"))) == 1
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    "The programs' folder of an environment with the wheel installed; the libraries are borrowed from this one."
    home = tmp_path_factory.mktemp("elsewhere") / "venv"
    run([sys.executable, "-m", "venv", "--without-pip", home], home.parent)
    python = home / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel]
    run(install, home.parent, PIP_DISABLE_PIP_VERSION_CHECK="1")
    (packages,) = home.glob("lib/python*/site-packages")
    # A path in a .pth file is added behind, and the .pth files there (an editable install) are not read.
    borrowed = [path for path in [*site.getsitepackages(), site.getusersitepackages()] if Path(path).is_dir()]
    (packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return home / "bin"


def test_wheel_carries_its_assets(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for name in (
        "llmft_nb/py.typed",
        "llmft_nb/core.py",
        "llmft_nb/assets/pages/report.html",
        "llmft_nb/assets/pages/card.md",
    ):
        assert name in names
    for model in CATALOGUE:
        files = ("model.safetensors", "tokenizer.json", "pretraining.json")
        assert {f"llmft_nb/assets/models/{model}/{file}" for file in files} <= set(names)
    for data in DATA_CATALOGUE:
        assert {f"llmft_nb/assets/data/{data}/{file}" for file in ("README.md", "test.jsonl")} <= set(names)
    assert {Path(name).name for name in names} >= {"LICENSE", "NOTICE", "entry_points.txt"}
    assert {name.split("/")[0].split("-")[0] for name in names} == {"llmft_nb"}


def test_wheel_is_small(wheel):
    n_bytes = wheel.stat().st_size
    print(f"{wheel.name}: {n_bytes / 1e6:.1f} MB")
    assert n_bytes < LARGEST_BYTES


def test_wheel_works_from_elsewhere(installed, tmp_path):
    where = run([installed / "python", "-c", "import llmft_nb; print(llmft_nb.__file__)"], tmp_path).stdout.strip()
    assert Path(where).is_relative_to(installed.parent), f"imported {where}"
    assert "tiny" in run([installed / "llmft", "models"], tmp_path).stdout
    assert "predict" in run([installed / "llmft", "predict", "--help"], tmp_path).stdout
    assert list(tmp_path.iterdir()) == []
