"""Write README.md from nbs/index.ipynb: its prose, its code and the text its cells print.

    python tools/readme.py            write it
    python tools/readme.py --check    exit 1 where it differs

Cells marked `#| hide` are left out, marks are stripped, and links that start at the notebook are made to start at
the README.
"""

from __future__ import annotations

import argparse
import json
import posixpath
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})")
LINK = re.compile(r"(\]\(\s*<?)([^)\s>]+)")
TAG = re.compile(r"""((?:src|href)=["'])([^"']+)""")
OUTSIDE = re.compile(r"^(?:[a-z][a-z0-9+.-]*:|#|/)", re.IGNORECASE)


def joined(text: str | Sequence[str]) -> str:
    "The text of a cell, which notebooks store as a string or as lines."
    return text if isinstance(text, str) else "".join(text)


def relinked(line: str, folder: str) -> str:
    "A line whose relative links start at the root instead of at `folder`."

    def moved(match: re.Match[str]) -> str:
        before, target = match.groups()
        if OUTSIDE.match(target):
            return match.group()
        path, mark, anchor = target.partition("#")
        return before + posixpath.normpath(posixpath.join(folder, path)) + mark + anchor

    return TAG.sub(moved, LINK.sub(moved, line))


def prose(source: str, folder: str) -> str:
    "A markdown cell with its links moved; code in it stays as it is."
    lines, fence = [], ""
    for line in source.splitlines():
        if match := FENCE.match(line):
            mark = match.group(1)
            if not fence:
                fence = mark
            elif mark.startswith(fence) and not line.strip().strip(mark[0]):
                fence = ""
        lines.append(line if fence else relinked(line, folder))
    return "\n".join(lines).strip("\n")


def shown(outputs: Sequence[Mapping[str, Any]]) -> str:
    "The text a cell shows; pictures have a text as well, which says nothing to a reader, and are left out."
    parts = []
    for output in outputs:
        if output["output_type"] == "stream" and output["name"] == "stdout":
            parts.append(joined(output["text"]))
        data = output.get("data", {})
        if "text/plain" in data and not any(kind.startswith("image/") for kind in data):
            parts.append(joined(data["text/plain"]) + "\n")
    return "".join(parts).rstrip()


def readme(notebook: Mapping[str, Any], folder: str = "nbs") -> str:
    "A notebook as Markdown."
    blocks = []
    for cell in notebook["cells"]:
        source = joined(cell["source"])
        if cell["cell_type"] == "markdown":
            blocks.append(prose(source, folder))
        if cell["cell_type"] != "code" or re.search(r"^#\|\s*hide\b", source, re.MULTILINE):
            continue
        code = "\n".join(line for line in source.splitlines() if not line.startswith("#|")).strip("\n")
        text = shown(cell.get("outputs", []))
        blocks += [f"```python\n{code}\n```"] if code else []
        blocks += [f"```text\n{text}\n```"] if text else []
    made = "<!-- Made from nbs/index.ipynb by tools/readme.py: change it there, then run `make export`. -->"
    return "\n\n".join([made, *(block for block in blocks if block)]) + "\n"


def main() -> None:
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether README.md is what it should be")
    parser.add_argument("--root", type=Path, default=ROOT, help="the project's folder")
    arguments = parser.parse_args()
    source, target = arguments.root / "nbs" / "index.ipynb", arguments.root / "README.md"
    text = readme(json.loads(source.read_text(encoding="utf-8")))
    if not arguments.check:
        target.write_text(text, encoding="utf-8")
    elif not target.is_file() or target.read_text(encoding="utf-8") != text:
        sys.exit(f"{target.name} differs from {source.relative_to(arguments.root)}: run `make export`")


if __name__ == "__main__":
    main()
