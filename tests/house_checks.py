"""The checks of the house, as functions that take what they check, so that each can be shown to catch a fault."""

from __future__ import annotations

import ast
import filecmp
import io
import os
import re
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

PACKAGE = "llmft_nb"
MADE_WITHOUT_NOTEBOOK = {"__init__", "_modidx"}
NOT_IN_PACKAGE = {"nbdev", "fastcore"}
MAX_MODULE_LINES = 450
GOOD_MODULE_LINES = 400
MAX_CODE_CELLS = 60


def copy_sources(project: Path, target: Path) -> Path:
    "Copy what nbdev reads and writes (notebooks, modules, settings); the assets are left out."
    target.mkdir(parents=True, exist_ok=True)
    leave = shutil.ignore_patterns("__pycache__", "assets", ".ipynb_checkpoints", ".last_checked")
    for folder in ("nbs", PACKAGE):
        shutil.copytree(project / folder, target / folder, ignore=leave)
    for name in ("pyproject.toml", "settings.ini"):
        shutil.copy(project / name, target / name)
    return target


def clean_and_export(project: Path) -> None:
    "Run nbdev's clean and export in a folder. Export does nothing, silently, where IN_TEST is set: it is removed."
    env = {name: value for name, value in os.environ.items() if name != "IN_TEST"}
    code = "from nbdev.clean import nbdev_clean; from nbdev.doclinks import nbdev_export; nbdev_clean(); nbdev_export()"
    subprocess.run([sys.executable, "-c", code], cwd=project, env=env, check=True, capture_output=True, text=True)


def differing_files(before: Path, after: Path) -> list[str]:
    "Files below two folders that only one has, or whose contents differ."
    names = {
        path.relative_to(folder).as_posix()
        for folder in (before, after)
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    return sorted(
        name
        for name in names
        if not ((before / name).is_file() and (after / name).is_file())
        or not filecmp.cmp(before / name, after / name, shallow=False)
    )


def drift(project: Path, scratch: Path) -> list[str]:
    "Files that clean and export change in a copy of the project: whoever made them forgot `make export`."
    before = copy_sources(project, scratch / "before")
    after = copy_sources(project, scratch / "after")
    clean_and_export(after)
    return differing_files(before, after)


def step_of(notebook: str) -> tuple[int, str]:
    "The place a notebook's name gives it: `06a_objectives` is (6, 'a')."
    match = re.match(r"(\d+)([a-z]*)_", notebook)
    assert match, f"{notebook}: a notebook that exports is named by its number, like 06a_objectives"
    return int(match.group(1)), match.group(2)


def steps_of_modules(sources: Mapping[str, str]) -> dict[str, tuple[int, str]]:
    "The place of each module, from the notebooks (name and text of all code cells) that export them."
    steps = {}
    for notebook, source in sources.items():
        if match := re.search(r"^#\|\s*default_exp:?\s+(\S+)", source, re.MULTILINE):
            steps[match.group(1)] = step_of(notebook)
    return steps


def imported_modules(source: str) -> Iterator[tuple[int, str, str]]:
    "Line, full name and imported name of every import in a module of the package, at any depth."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = [PACKAGE] if node.level else []
            parts += [node.module] if node.module else []
            yield from ((node.lineno, ".".join(parts), alias.name) for alias in node.names)


def import_faults(module: str, source: str, steps: Mapping[str, tuple[int, str]]) -> list[str]:
    "Imports that a module must not make: uphill, with a star, or of the tools that write the package."
    faults = []
    if module in MADE_WITHOUT_NOTEBOOK:
        return faults
    if module not in steps:
        return [f"{module}.py: no notebook exports it"]
    for line, name, imported in imported_modules(source):
        top, _, rest = name.partition(".")
        if imported == "*":
            faults.append(f"{module}.py:{line}: star import of {name}")
        if top in NOT_IN_PACKAGE:
            faults.append(f"{module}.py:{line}: imports {top}, which a user does not have")
        if top != PACKAGE:
            continue
        lower = rest.partition(".")[0] or imported
        if lower in steps and steps[lower] >= steps[module]:
            faults.append(f"{module}.py:{line}: imports {lower}, which does not come before it")
    return faults


def comment_lines(source: str) -> set[int]:
    "The lines of a source that end in a comment behind code."
    lines = source.splitlines()
    return {
        token.start[0]
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and lines[token.start[0] - 1][: token.start[1]].strip()
    }


def help_lines(tree: ast.Module) -> set[int]:
    "The last lines of parameters that a command explains by `help=…` in their type, or in a type of the package."

    def helps(node: ast.expr | None) -> bool:
        parts = list(ast.walk(node)) if node else []
        named = any(isinstance(part, ast.Name) and part.id in helping for part in parts)
        return named or any(isinstance(part, ast.keyword) and part.arg == "help" for part in parts)

    helping: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and helps(node.value):
            helping |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.ImportFrom) and node.level == 1:
            helping |= {name.asname or name.name for name in node.names} & explained_types(node.module or "")
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for parameter in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
                if helps(parameter.annotation):
                    lines.add(end_of_default(parameter, node.args) or parameter.end_lineno or 0)
    return lines


def explained_types(module: str) -> set[str]:
    "Types of a module of the package that say by `help=…` what a parameter of theirs is."
    path = Path(__file__).resolve().parents[1] / PACKAGE / f"{module}.py"
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
    return {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        and any(isinstance(part, ast.keyword) and part.arg == "help" for part in ast.walk(node.value))
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def all_names(tree: ast.Module) -> list[str]:
    "What `__all__` lists."
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets):
            return ast.literal_eval(node.value)
    return []


def contract_faults(module: str, source: str) -> list[str]:
    "Public names that lack their place in `__all__`, a docstring, a comment behind a parameter, or a type."
    tree = ast.parse(source)
    comments = comment_lines(source) | help_lines(tree)
    listed, faults = all_names(tree), []
    for node in tree.body:
        names = []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        for name in names:
            if not name.startswith("_") and name not in listed:
                faults.append(f"{module}.py:{node.lineno}: {name} is not in __all__")
        if names and names[0].startswith("_"):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            faults += function_faults(module, node, node.name, comments)
        elif isinstance(node, ast.ClassDef):
            faults += class_faults(module, node, comments)
    return faults


def class_faults(module: str, node: ast.ClassDef, comments: set[int]) -> list[str]:
    "What a public class lacks, its public methods and its fields included."
    faults = [] if ast.get_docstring(node) else [f"{module}.py:{node.lineno}: {node.name} has no docstring"]
    for part in node.body:
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
            if part.name == "__init__" or not part.name.startswith("_"):
                faults += function_faults(module, part, f"{node.name}.{part.name}", comments)
        elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            name = part.target.id
            lines = range(part.lineno, (part.end_lineno or part.lineno) + 1)
            if not name.startswith("_") and not comments.intersection(lines):
                faults.append(f"{module}.py:{part.lineno}: no comment behind the field {node.name}.{name}")
    return faults


def function_faults(
    module: str, node: ast.FunctionDef | ast.AsyncFunctionDef, name: str, comments: set[int]
) -> list[str]:
    "What a public function or method lacks."

    def fault(line: int, what: str) -> str:
        return f"{module}.py:{line}: {name}: {what}"

    faults = []
    setter = any(isinstance(mark, ast.Attribute) and mark.attr in ("setter", "deleter") for mark in node.decorator_list)
    overload = any(getattr(mark, "id", getattr(mark, "attr", "")) == "overload" for mark in node.decorator_list)
    if not (ast.get_docstring(node) or node.name == "__init__" or setter or overload):
        faults.append(fault(node.lineno, "no docstring"))
    spec = node.args
    parameters = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *filter(None, [spec.vararg, spec.kwarg])]
    if parameters and parameters[0].arg in ("self", "cls"):
        parameters = parameters[1:]
    signature_end = (node.returns.end_lineno if node.returns else None) or max(
        (parameter.end_lineno or 0 for parameter in parameters), default=node.lineno
    )
    ends = [parameter.end_lineno or parameter.lineno for parameter in parameters]
    for parameter, end in zip(parameters, ends, strict=True):
        if parameter.annotation is None:
            faults.append(fault(parameter.lineno, f"no type for {parameter.arg}"))
        last = end_of_default(parameter, spec) or end
        alone = ends.count(end) == 1 and last != node.lineno and (node.returns is None or last != node.returns.lineno)
        if not (alone and last in comments):
            faults.append(fault(parameter.lineno, f"no comment behind {parameter.arg}, on a line of its own"))
    if node.returns is None and node.name != "__init__":
        faults.append(fault(node.lineno, "no type for what it returns"))
    nothing = node.returns is None or ast.unparse(node.returns) in ("None", "Iterator[None]", "Generator[None]")
    if not nothing and signature_end not in comments:
        faults.append(fault(signature_end, "no comment behind what it returns"))
    return faults


def end_of_default(parameter: ast.arg, spec: ast.arguments) -> int | None:
    "The line a parameter's default ends on."
    positional = [*spec.posonlyargs, *spec.args]
    with_default = positional[len(positional) - len(spec.defaults) :]
    pairs = [
        *zip(with_default, spec.defaults, strict=True),
        *zip(spec.kwonlyargs, spec.kw_defaults, strict=True),
    ]
    for candidate, default in pairs:
        if candidate is parameter and default is not None:
            return default.end_lineno
    return None


def project_files(project: Path) -> list[Path]:
    "The files of the project that are, or would be, in git."
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=project, capture_output=True, text=True, check=True).stdout
    return [path for name in sorted(set(listed.split("\0"))) if name and (path := project / name).is_file()]


def machine_paths(path: Path, text: str) -> list[str]:
    "Lines of a file that name a folder of somebody's machine."
    words = "|".join(["work", "root", "home/" + r"\w", "tmp/" + "author", "Users/" + r"\w"])
    pattern = re.compile(rf"(?<![\w.:/~*)-])/(?:{words})\b")
    return [
        f"{path}:{number}: {line.strip()[:100]}"
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]


def median(values: Iterable[float]) -> float:
    "The middle one."
    ordered = sorted(values)
    return ordered[len(ordered) // 2]
