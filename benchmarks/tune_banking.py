"""A search of fifteen minutes on banking77, and whether what it found is better than the defaults.

    python benchmarks/tune_banking.py --model MINILM [--minutes 15] [--rows 512] [--out runs/tune-banking]

512 training rows are drawn evenly from banking77 (its folder is found through LLMFT_DATA), and a sixth of the others
are the validation rows; the test rows stay closed. What is searched is what `llmft tune` searches where nobody says:
strategy with its K or rank, rate, batch, epochs, and both decays. At the end stand the best attempts, what the choices
explain, and the verdict: the best finalist against the defaults, three seeds each, with its interval. A search that was
stopped goes on.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def main() -> None:
    "Search, and print what came of it."
    from llmft_nb.rows import read_rows
    from llmft_nb.shell import show_attempt, show_tuned
    from llmft_nb.tune import tune

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--minutes", type=float, default=15.0, help="for all of it")
    parser.add_argument("--rows", type=int, default=512, help="training rows")
    parser.add_argument("--out", type=Path, default=Path("runs/tune-banking"), help="where the search is kept")
    chosen = parser.parse_args()
    source = Path(os.environ.get("LLMFT_DATA", "../shared/data")) / "banking77"
    rows = read_rows(str(source), split="train")
    step = len(rows) / chosen.rows
    picked = {int(i * step) for i in range(chosen.rows)}
    others = [i for i in range(len(rows)) if i not in picked][::6]
    train, valid = rows.subset(sorted(picked)), rows.subset(others)
    test = read_rows(str(source), split="test").subset(range(100))
    print(f"{len(train):,} training rows, {len(valid):,} validation rows, {chosen.minutes:g} minutes", file=sys.stderr)
    found = tune(
        train,
        valid=valid,
        test=test,
        model=chosen.model,
        out=chosen.out,
        resume=(chosen.out / "study.db").exists(),
        minutes=chosen.minutes,
        leaks="drop",
        told=show_attempt,
    )
    show_tuned(found, as_json=False)


if __name__ == "__main__":
    main()
