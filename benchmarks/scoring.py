"""What scoring costs beside the bare forward passes, how long answers take to write, and what a larger set holds.

    python benchmarks/scoring.py --model MINILM [--only forwards|writing|memory] [--repeats 5]

forwards: MiniLM with a head for 77 labels, drawn at random (the work is that of a tuned one), scores the 3,080 test
rows of banking77 through `evaluate_predictor`: reading, checking, tokenising, forward passes, answers, scores with
intervals. In turn with it the same batches, tokenised beforehand, go through the network alone. At most 1.2 is asked.

writing: the embedded base, tuned on instructions of the house pharmacy for an epoch, writes answers to 300 of its test
questions through `evaluate_predictor`, on two cores. At most 60 seconds are asked.

memory: processes of their own score the same rows once, four times and sixteen times over: banking77, and 512
conversations of the house pharmacy. Asked is that the peak does not grow, by 5 % at sixteen times at most.

banking77 is found through LLMFT_DATA. The exit status is 1 where a figure is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

MOST_RATIO, MOST_WRITING_S, MOST_GROWTH = 1.2, 60.0, 1.05
TIMES = (1, 4, 16)


def write_test_rows(
    file: Path,  # JSONL
    times: int = 1,  # How often over
) -> int:  # Rows
    "Write the test rows of banking77 as a file."
    from llmft_nb.rows import read_rows

    source = Path(os.environ.get("LLMFT_DATA", "../shared/data")) / "banking77"
    rows = [json.dumps({"text": row["text"], "label": row["label"]}) for row in read_rows(str(source), split="test")]
    with file.open("w", encoding="utf-8") as out:
        for _ in range(times):
            out.write("\n".join(rows) + "\n")
    return times * len(rows)


def conversations(
    split: str,  # "train" or "test"
    n_rows: int,  # How many at most, evenly drawn
) -> list[dict[str, str]]:  # "prompt" and "completion"
    "Questions of the house pharmacy, with the verdict and its reason as the answer."
    from llmft_nb.rows import read_rows

    rows = list(read_rows("pharmacy", split=split))
    picked = [rows[i * len(rows) // n_rows] for i in range(min(n_rows, len(rows)))]
    return [{"prompt": row["text"], "completion": f"{row['label']}: {row['reason']}."} for row in picked]


def make_predictor(
    model: str,  # Folder of an encoder
    file: Path,  # Rows with labels
) -> Any:  # A classifier with a head drawn at random
    "A classifier that has learnt nothing: it computes what a tuned one computes."
    from llmft_nb.modeling import LLMForSequenceClassification, size_head
    from llmft_nb.predict import Predictor
    from llmft_nb.rows import read_rows

    classifier = LLMForSequenceClassification.from_pretrained(model)
    size_head(classifier, sorted({str(row["label"]) for row in read_rows(str(file))}))
    return Predictor(classifier, 128)


def bare_forwards(
    predictor: Any,  # A classifier
    file: Path,  # Rows
) -> list[dict[str, torch.Tensor]]:  # Batches as scoring makes them
    "Tokenise beforehand."
    from llmft_nb.data import TextDataset, collate
    from llmft_nb.inference import by_length
    from llmft_nb.rows import read_rows

    dataset = TextDataset(read_rows(str(file)), predictor.model.tokenizer, max_length=128, need_labels=False)
    return [dict(collate(dataset, rows)) for rows in by_length(dataset.lengths, predictor.batch_size)]


def compare_forwards(
    model: str,  # Folder of MiniLM
    repeats: int,  # Of each
) -> bool:  # Whether the ratio is kept
    "Time scoring and the bare forward passes in turn."
    from llmft_nb.finetune import evaluate_predictor

    with tempfile.TemporaryDirectory(prefix="llmft_evaluate_") as parent:
        file = Path(parent) / "test.jsonl"
        n_rows = write_test_rows(file)
        predictor = make_predictor(model, file)
        batches, took = bare_forwards(predictor, file), {"bare": list[float](), "scored": list[float]()}
        for repeat in range(repeats + 1):
            started_s = time.perf_counter()
            with torch.inference_mode():
                for batch in batches:
                    predictor.model.network(**batch)
            between_s = time.perf_counter()
            evaluate_predictor(predictor, str(file), split="train")
            if repeat:  # The first is for warming up
                took["bare"].append(between_s - started_s)
                took["scored"].append(time.perf_counter() - between_s)
    bare, scored = (statistics.median(took[name]) for name in ("bare", "scored"))
    ratios = sorted(b / a for a, b in zip(took["bare"], took["scored"], strict=True))
    ratio = statistics.median(ratios)
    print(f"{n_rows:,} rows: bare forward passes {bare:.2f} s, scored {scored:.2f} s")
    print(f"ratio {ratio:.3f} (of {repeats} pairs: {ratios[0]:.3f} to {ratios[-1]:.3f}); asked: {MOST_RATIO}")
    return ratio <= MOST_RATIO


def time_writing() -> bool:  # Whether it is written in time
    "Tune the embedded base for an epoch, and let it write."
    from llmft_nb.finetune import evaluate_predictor, finetune

    with tempfile.TemporaryDirectory(prefix="llmft_writing_") as parent:
        asked, settings = conversations("test", 300), {"epochs": 2, "n_written": 8}
        options: dict[str, Any] = {"task": "instruct", "out": Path(parent) / "run", "callbacks": (), **settings}
        run = finetune(conversations("train", 800), test=asked[::8], **options)
        predictor = run.predictor()
        predictor = replace(predictor, settings={**predictor.settings, "n_written": len(asked)})
        started_s = time.perf_counter()
        scores = evaluate_predictor(predictor, asked)
        seconds = time.perf_counter() - started_s
    n_written = scores["token_f1"]["n"]
    endless = scores["endless"]["value"]
    print(f"{n_written} answers in {seconds:.1f} s ({endless:.1%} endless); asked: {MOST_WRITING_S:g}")
    return n_written == 300 and seconds <= MOST_WRITING_S


def hold_rows(
    task: str,  # "classify" or "instruct"
    model: str,  # Folder of MiniLM
    times: int,  # How often over
) -> None:
    "Score, and print what was held before and at the peak; for a process of its own."
    from llmft_nb.finetune import evaluate_predictor
    from llmft_nb.modeling import LLMForCausalLM
    from llmft_nb.plan_check import most_resident_bytes, resident_bytes
    from llmft_nb.predict import Predictor

    with tempfile.TemporaryDirectory(prefix="llmft_memory_") as parent:
        file = Path(parent) / "rows.jsonl"
        if task == "classify":
            n_rows, predictor = write_test_rows(file, times), make_predictor(model, file)
        else:
            rows = [json.dumps(row) for row in conversations("test", 512)]
            file.write_text("\n".join(rows * times) + "\n", encoding="utf-8")
            n_rows, settings = times * len(rows), {"n_written": 16}
            predictor = Predictor(LLMForCausalLM.from_pretrained("tiny"), 512, settings=settings, task="instruct")
        before = resident_bytes()
        evaluate_predictor(predictor, str(file), split="train")
    print(json.dumps({"rows": n_rows, "before": before, "peak": most_resident_bytes()}))


def compare_memory(
    model: str,  # Folder of MiniLM
) -> bool:  # Whether a larger set holds no more
    "Score sets of three sizes, each in a process of its own."
    kept = True
    for task in ("classify", "instruct"):
        found = []
        for times in TIMES:
            command = [sys.executable, __file__, "--model", model, "--hold", task, "--times", str(times)]
            told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found.append(json.loads(told.splitlines()[-1]))
            line = found[-1]
            print(f"{task}: {line['rows']:>7,} rows  {line['before'] / 1e6:6.1f} MB  peak {line['peak'] / 1e6:6.1f} MB")
        growth = found[-1]["peak"] / found[0]["peak"]
        n_bytes = (found[-1]["peak"] - found[0]["peak"]) / (found[-1]["rows"] - found[0]["rows"])
        print(f"{task}: {growth:.3f} times the peak, {n_bytes:.0f} bytes a row; asked: {MOST_GROWTH}")
        kept &= growth <= MOST_GROWTH
    return kept


def main() -> None:
    "Measure, print, and fail where a figure is missed."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--only", choices=("forwards", "writing", "memory"), help="one of the three")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of timings")
    parser.add_argument("--hold", help=argparse.SUPPRESS)
    parser.add_argument("--times", type=int, default=1, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.hold:
        hold_rows(chosen.hold, chosen.model, chosen.times)
        return
    parts: dict[str, Any] = {
        "forwards": lambda: compare_forwards(chosen.model, chosen.repeats),
        "writing": time_writing,
        "memory": lambda: compare_memory(chosen.model),
    }
    kept = [parts[name]() for name in parts if chosen.only in (None, name)]
    sys.exit(0 if all(kept) else 1)


if __name__ == "__main__":
    main()
