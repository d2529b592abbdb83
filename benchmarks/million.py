"""Look through a million rows with `llmft check`, and say how long it takes and how much memory it holds.

    python benchmarks/million.py [--rows 1000000]

The rows are sentences drawn from 20,000 made-up words, with a label each; one in a hundred repeats another one, exactly
or with a word changed, and a tenth more is held out, of which one in a hundred repeats a training row. Asked are five
minutes and two gigabytes on two cores; the exit status is 1 where either is missed, or where planted copies are not
found.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT_S, LIMIT_GB = 300, 2.0
LETTERS = "bcdfglmnprstvz", "aeiou"


def make_words(
    chance: random.Random,  # Draws
    n_words: int,  # How many
) -> list[str]:  # All different
    "Words of two to four syllables."
    words: dict[str, None] = {}
    while len(words) < n_words:
        words["".join(chance.choice(letters) for letters in LETTERS * chance.randint(2, 4))] = None
    return list(words)


def write_rows(
    file: Path,  # JSONL
    chance: random.Random,  # Draws
    words: list[str],  # To make sentences of
    n_rows: int,  # How many
    known: list[str],  # Texts that may be repeated
    adds: bool,  # Whether some of the new ones may be repeated too
) -> int:  # Rows that repeat another one exactly
    "Write rows, one in a hundred of them planted."
    n_copies = 0
    with file.open("w", encoding="utf-8") as out:
        for i in range(n_rows):
            text = " ".join(chance.choices(words, k=chance.randint(6, 20)))
            if known and i % 100 == 99:
                text = chance.choice(known)
                if i % 200 == 99:
                    text = f"{text.rpartition(' ')[0]} {chance.choice(words)}"
                else:
                    n_copies += 1
            elif adds and i % 10 == 0:
                known.append(text)
            out.write(json.dumps({"text": text, "label": chance.choice("abcd")}) + "\n")
    return n_copies


def main() -> None:
    "Make the rows, check them, and print what it took."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="training rows")
    chosen = parser.parse_args()
    chance = random.Random(0)  # noqa: S311 - no secret
    words, known = make_words(chance, 20_000), list[str]()
    with tempfile.TemporaryDirectory(prefix="llmft_million_") as parent:
        files = [Path(parent) / f"{name}.jsonl" for name in ("train", "test")]
        n_copies = write_rows(files[0], chance, words, chosen.rows, known, adds=True)
        n_leaks = write_rows(files[1], chance, words, chosen.rows // 10, known, adds=False)
        code = "from llmft_nb.cli import main; main()"
        command = [sys.executable, "-c", code, "check", *map(str, files), "--json"]
        started_s = time.monotonic()
        told = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=True)
        seconds = time.monotonic() - started_s
    peak_gb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    kinds = json.loads(told.stdout)["kinds"]
    print(f"{chosen.rows:,} rows and {chosen.rows // 10:,} held out: {seconds:.0f} s, {peak_gb:.2f} GB at the peak")
    found = {"copies": (kinds["train"].get("exact", 0), n_copies)}
    found["leaks"] = (next(kinds[name] for name in kinds if name != "train").get("exact", 0), n_leaks)
    for name, (n_found, n_planted) in found.items():
        print(f"exact {name}: {n_found:,} found, {n_planted:,} planted")
    is_whole = all(n_found >= 0.99 * n_planted for n_found, n_planted in found.values())
    sys.exit(not (is_whole and seconds <= LIMIT_S and peak_gb <= LIMIT_GB))


if __name__ == "__main__":
    main()
