"""What an export costs in answers and saves in bytes and seconds: MiniLM tuned on banking77, asked all test questions.

    python benchmarks/export.py --model MINILM [--epochs 4] [--strategy full] [--rows 0] [--out runs/export]

The model is tuned on banking77 (its folder is found through LLMFT_DATA) and exported as merged, int8 and onnx; each
form answers the 3,080 test questions beside the trained model. A line a form: bytes of the folder, seconds of the
trained model and of the form for the same questions, equal answers, and the largest difference of two logits as a
share of the largest. `--rows` takes so many training rows only, for a quick look; a run that is there is used again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

FORMATS = ("merged", "int8", "onnx")


def main() -> None:
    "Tune, export, compare, print."
    from llmft_nb.export import export_run
    from llmft_nb.finetune import finetune
    from llmft_nb.proof import drawn, proof_words
    from llmft_nb.rows import read_rows

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--epochs", type=int, default=4, help="passes over the training rows")
    parser.add_argument("--strategy", default="full", help="what moves")
    parser.add_argument("--rows", type=int, default=0, help="training rows; 0: all")
    parser.add_argument("--out", type=Path, default=Path("runs/export"), help="folder of the run and its exports")
    chosen = parser.parse_args()
    source = Path(os.environ.get("LLMFT_DATA", "../shared/data")) / "banking77"
    test = read_rows(str(source), split="test")
    run = chosen.out / "run"
    if not (run / "run.json").is_file():
        train = drawn(read_rows(str(source)), chosen.rows or None)
        options = {"model": chosen.model, "strategy": chosen.strategy, "epochs": chosen.epochs, "max_length": 64}
        done = finetune(train, test=test, out=run, callbacks=[], **options)
        print(f"accuracy {done.record.scores['test']['accuracy']['value']:.3f}", file=sys.stderr)
    for name in FORMATS:
        shutil.rmtree(chosen.out / name, ignore_errors=True)
        told = export_run(run, name, chosen.out / name, data=test, n_rows=len(test), tolerance=1.0)
        spent = told["proof"]["seconds"]
        line = {"format": name, "megabytes": round(told["bytes"] / 1e6, 1)}
        line |= {"of_the_run": round(told["bytes"] / told["source_bytes"], 2)}
        line |= {f"{which}_s": round(seconds, 2) for which, seconds in spent.items()}
        line |= {"kept": told["proof"]["equal_frac"] >= 0.99, "proof": proof_words(told["proof"])}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
