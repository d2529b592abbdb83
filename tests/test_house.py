"""The house is in order: generated files are up to date, imports run one way, public names keep their contract."""

import ast
import configparser
import importlib.metadata
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import house_checks as house
import notebooks
import pytest
import readme

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / house.PACKAGE
MODULES = sorted(path for path in PACKAGE.glob("*.py") if path.stem != "_modidx")
BIN = Path(sys.executable).parent


def metadata() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def notebook_sources() -> dict[str, str]:
    return {
        path.stem: "\n".join(cell.source for cell in notebooks.read_notebook(path).cells)
        for path in sorted((ROOT / "nbs").glob("*.ipynb"))
    }


def median_seconds(command: list[str]) -> tuple[float, subprocess.CompletedProcess[str]]:
    seconds = []
    for _ in range(5):
        started = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        seconds.append(time.monotonic() - started)
    return house.median(seconds), done


# What is generated


def test_clean_and_export_leave_no_difference(tmp_path):
    changed = house.drift(ROOT, tmp_path)
    assert not changed, f"run `make export`: it changes {changed}"


@pytest.mark.parametrize("generated", ["core.py", "_modidx.py", "__init__.py"])
def test_a_planted_drift_is_caught(tmp_path, monkeypatch, generated):
    monkeypatch.setenv("IN_TEST", "1")  # under which nbdev exports nothing, silently
    planted = house.copy_sources(ROOT, tmp_path / "planted")
    target = planted / house.PACKAGE / generated
    if generated == "__init__.py":  # nbdev keeps what it finds there, so the check must see a missing version
        target.unlink()
    else:
        target.write_text(target.read_text().replace("UserError", "UsedError", 1))
    assert f"{house.PACKAGE}/{generated}" in house.drift(planted, tmp_path / "scratch")


def test_an_unclean_notebook_is_caught(tmp_path):
    planted = house.copy_sources(ROOT, tmp_path / "planted")
    target = planted / "nbs" / "00b_core.ipynb"
    target.write_text(target.read_text().replace('"execution_count": null', '"execution_count": 7', 1))
    assert "nbs/00b_core.ipynb" in house.drift(planted, tmp_path / "scratch")


def test_readme_equals_its_notebook():
    done = subprocess.run([sys.executable, "tools/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_readme_moves_links_and_keeps_code(tmp_path):
    cells = [
        {"cell_type": "markdown", "source": "[a](00a_why.ipynb#x) [b](../CONTRIBUTING.md) [c](https://x.org) [d](#e)"},
        {"cell_type": "markdown", "source": "```sh\nx](y)\n```\n![p](images/p.png)"},
        {"cell_type": "code", "source": "#| hide\nsecret", "outputs": []},
        {
            "cell_type": "code",
            "source": "#| sized\n1 + 1",
            "outputs": [{"output_type": "execute_result", "data": {"text/plain": "2"}}],
        },
    ]
    text = readme.readme({"cells": cells})
    assert "[a](nbs/00a_why.ipynb#x) [b](CONTRIBUTING.md) [c](https://x.org) [d](#e)" in text
    assert "x](y)" in text and "![p](nbs/images/p.png)" in text
    assert "secret" not in text and "sized" not in text
    assert "```python\n1 + 1\n```\n\n```text\n2\n```" in text


def test_versions_agree():
    in_package = re.search(r'^__version__ = "(.+)"$', (PACKAGE / "__init__.py").read_text(), re.MULTILINE)
    assert in_package and in_package.group(1) == metadata()["version"]
    assert f"## [{metadata()['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def test_every_requirement_is_pinned():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pinned = {re.sub(r"[-_.]+", "-", name).lower() for name in pins}
    extras = [f"{name}_requirements" for name in ("trackers", "gpu", "judge", "harness", "serve")]
    for field in ("requirements", "dev_requirements", *extras):
        for requirement in metadata()[field].split():
            name = re.sub(r"[-_.]+", "-", re.split(r"[<>=!~\[]", requirement)[0]).lower()
            assert name in pinned, f"{requirement} is in settings.ini but not in constraints.txt"
    assert not any(character in version for version in pins.values() for character in "+/@ ")


def test_every_pin_can_be_had_by_the_oldest_python():
    "pip would search for minutes among pinned versions of which one will not have this Python, and then give up."
    from packaging.specifiers import SpecifierSet

    oldest = f"{metadata()['min_python']}.0"
    needs = {found.name: found.metadata["Requires-Python"] or "" for found in importlib.metadata.distributions()}
    assert len(needs) > 50
    assert {name: need for name, need in needs.items() if not SpecifierSet(need).contains(oldest)} == {}


# Which way imports run


@pytest.fixture(scope="module")
def steps():
    return house.steps_of_modules(notebook_sources())


def test_imports_run_downhill(steps):
    faults = [fault for path in MODULES for fault in house.import_faults(path.stem, path.read_text(), steps)]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("from .cli import main", "imports cli"),
        ("from llmft_nb.cli import main", "imports cli"),
        ("import llmft_nb.cli", "imports cli"),
        ("from . import cli", "imports cli"),
        ("from .rows import Rows", "imports rows"),
        ("def late():\n    from .cli import main", "imports cli"),
        ("from .core import *", "star import"),
        ("from fastcore.basics import first", "imports fastcore"),
        ("def late():\n    import nbdev.export", "imports nbdev"),
    ],
)
def test_a_planted_import_is_caught(line, words):
    places = {"core": (0, "b"), "rows": (1, "a"), "cli": (10, "b")}
    assert house.import_faults("rows", "from .core import UserError\n", places) == []
    faults = house.import_faults("rows", f"from .core import UserError\n{line}\n", places)
    assert len(faults) == 1 and words in faults[0]


def test_numbers_give_the_order():
    names = ["00b_core", "01a_rows", "01b_tokens", "02b_modeling", "06a_objectives", "10a_finetune", "10b_cli"]
    assert [house.step_of(name) for name in names] == sorted(house.step_of(name) for name in names)


# The contract of public names


def test_public_names_keep_the_contract():
    faults = [fault for path in MODULES for fault in house.contract_faults(path.stem, path.read_text())]
    assert not faults, f"{len(faults)} faults:\n" + "\n".join(faults)


GOOD = """
__all__ = ["share", "Pair"]

def share(
    n_right: int,  # Right ones
    *names: str,  # Of whom
    n_rows: int = 1,  # All of them
) -> float:  # Between 0 and 1
    "How much is right."

class Pair:
    "Two."

    left: int  # One

    def __init__(
        self,
        left: int,  # One
    ) -> None:
        self.left = left

    def clear(self) -> None:
        "Forget it."

    def _hidden(self, x): ...

def _helper(x): ...
"""


def test_a_command_explains_its_parameters_by_help():
    source = """
__all__ = ["Json", "show"]

Json = Annotated[bool, Option(help="For programs.")]

def show(
    run: Annotated[str, Argument(help="A folder.")],
    as_json: Json = False,
    depth: Annotated[int, Option("--depth")] = 1,
) -> None:
    "Show it."
"""
    faults = house.contract_faults("cli", source)
    assert len(faults) == 1 and "no comment behind depth" in faults[0]
    elsewhere = source.replace('Json = Annotated[bool, Option(help="For programs.")]', "from .commands import Json")
    assert house.contract_faults("cli", elsewhere.replace('"Json", ', "")) == faults
    nowhere = elsewhere.replace("commands", "core").replace('"Json", ', "")
    assert len(house.contract_faults("cli", nowhere)) == 2


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('["share", "Pair"]', '["Pair"]', "share is not in __all__"),
        ('    "How much is right."', "    pass", "share: no docstring"),
        ("n_right: int,  # Right ones", "n_right: int,", "no comment behind n_right"),
        ("n_right: int,  # Right ones\n    *", "n_right: int, *", "no comment behind n_right"),
        ("n_right: int,", "n_right,", "no type for n_right"),
        ("*names: str,  # Of whom", "*names: str,", "no comment behind names"),
        ("-> float:  # Between 0 and 1", "-> float:", "no comment behind what it returns"),
        (") -> float:  # Between 0 and 1", "):", "no type for what it returns"),
        ('    "Two."', "    pass", "Pair has no docstring"),
        ("left: int  # One\n\n", "left: int\n\n", "no comment behind the field Pair.left"),
        ("        left: int,  # One", "        left: int,", "Pair.__init__: no comment behind left"),
        ('        "Forget it."', "        pass", "Pair.clear: no docstring"),
    ],
)
def test_a_planted_breach_is_caught(old, new, words):
    assert house.contract_faults("pair", GOOD) == []
    assert old in GOOD
    faults = house.contract_faults("pair", GOOD.replace(old, new, 1))
    assert any(words in fault for fault in faults), faults


def test_types_are_clean():
    command = [sys.executable, "-m", "mypy", "--no-error-summary"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_lint_is_clean():
    command = [str(BIN / "ruff"), "check", "--output-format", "concise", "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_modules_stay_short(path, record_property):
    n_lines = len(path.read_text().splitlines())
    record_property("n_lines", n_lines)
    assert n_lines <= house.MAX_MODULE_LINES, f"{path.name} has {n_lines} lines: a container, cut it"
    if n_lines > house.GOOD_MODULE_LINES:
        print(f"{path.name} has {n_lines} lines, more than {house.GOOD_MODULE_LINES}")


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_stay_short(path):
    n_cells = len(notebooks.read_notebook(path).cells)
    assert n_cells <= house.MAX_CODE_CELLS, f"{path.name} has {n_cells} code cells: a container, cut it"


def test_no_file_names_a_folder_of_our_machines():
    found = []
    for path in house.project_files(ROOT):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += house.machine_paths(path.relative_to(ROOT), text)
    assert not found, "\n".join(found)


def test_a_planted_machine_path_is_caught():
    planted = "/".join(["see ", "work", "main"])
    assert house.machine_paths(Path("x"), planted) and not house.machine_paths(Path("x"), "homework/main, /worker")


# Start-up


def test_import_is_silent_and_fast():
    seconds, done = median_seconds([sys.executable, "-c", "import llmft_nb"])
    print(f"import llmft_nb: {seconds:.3f} s, the middle of five")
    assert done.returncode == 0 and done.stdout == "" and done.stderr == ""
    assert seconds < 0.5


def test_help_is_fast():
    program = shutil.which("llmft", path=str(BIN))
    assert program, "no llmft beside this Python: run `pip install -e .`"
    seconds, done = median_seconds([program, "--help"])
    print(f"llmft --help: {seconds:.3f} s, the middle of five")
    assert done.returncode == 0, done.stderr
    assert seconds < 1


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_modules_say_what_they_are_for(path):
    assert path.stem == "__init__" or ast.get_docstring(ast.parse(path.read_text()))
