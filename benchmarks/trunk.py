"""What it saves to compute a frozen trunk once: the same training with `trunk_gb` and without.

    python benchmarks/trunk.py [--model tiny | MINILM] [--strategies top:2 head] [--rounds 3] [--threads 2]

Rows are the house pharmacy's questions, or with $LLMFT_DATA 600 of banking77's, every 15th. Each way is a process of
its own, in turn, on the same rows, seed and updates; the seconds of the training alone, the making of the states
counted, and the peak of memory are medians over the rounds. Both ways must come to the same loss, or this stops.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

EPOCHS = {"top:2": 4, "head": 10, "lora:16@top:2": 4, "gradual": 10}  # For each strategy
KEPT_GB = 4.0


def one_run(model_name: str, strategy: str, epochs: int, trunk_gb: float) -> dict[str, Any]:
    "Train once in this process."
    from llmft_nb.adapters import apply_strategy
    from llmft_nb.data import TextDataLoader, TextDataset
    from llmft_nb.hparams import resolve_settings
    from llmft_nb.modeling import LLMForSequenceClassification, size_head
    from llmft_nb.rows import read_rows
    from llmft_nb.strategy import parse_strategy
    from llmft_nb.training import LLMTrainer

    folder = os.environ.get("LLMFT_DATA")
    every = read_rows(Path(folder) / "banking77" / "train.jsonl" if folder else "pharmacy")
    rows = every.subset(range(0, len(every), 15 if folder else 5)).subset(range(600))
    names = sorted({row["label"] for row in rows})
    model = LLMForSequenceClassification.from_pretrained(model_name)
    size_head(model, names)
    apply_strategy(model, parse_strategy(strategy))
    arguments = {"epochs": epochs, "precision": "f32", "trunk_gb": trunk_gb}
    settings, _ = resolve_settings(parse_strategy(strategy), arguments=arguments)
    dataset = TextDataset(rows, model.tokenizer, label_names=names)
    trainer = LLMTrainer(model, settings=settings, strategy=strategy, callbacks=())
    started = time.perf_counter()
    result = trainer.train(TextDataLoader(dataset, batch_size=32, shuffle=True))
    seconds = time.perf_counter() - started
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found = {"seconds": seconds, "loss": result.losses[-1][1], "trunk": result.trunk}
    return found | {"peak_mb": peak_mb, "rows": len(rows)}


def measured(arguments: argparse.Namespace, strategy: str, epochs: int, trunk_gb: float) -> dict[str, Any]:
    "The same in a process of its own."
    command = [sys.executable, __file__, "--model", arguments.model, "--inside", strategy, str(epochs), str(trunk_gb)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{strategy}: exit status {done.returncode}\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="tiny, tiny-encoder, or a folder of all-MiniLM-L6-v2")
    parser.add_argument("--strategies", nargs="+", choices=list(EPOCHS), default=list(EPOCHS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--inside", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        strategy, epochs, trunk_gb = arguments.inside
        print(json.dumps(one_run(arguments.model, strategy, int(epochs), float(trunk_gb))))
        return
    for strategy in arguments.strategies:
        epochs = EPOCHS[strategy]
        found: dict[float, list[dict[str, Any]]] = {0.0: [], KEPT_GB: []}
        for _ in range(arguments.rounds):
            for trunk_gb, runs in found.items():
                runs.append(measured(arguments, strategy, epochs, trunk_gb))
        plain, kept = found.values()
        if abs(plain[0]["loss"] - kept[0]["loss"]) > 1e-3:
            sys.exit(
                f"{strategy}: another loss with the trunk kept, {kept[0]['loss']}, than without, {plain[0]['loss']}"
            )
        seconds = [statistics.median(run["seconds"] for run in runs) for runs in (plain, kept)]
        ratios = [one["seconds"] / two["seconds"] for one, two in zip(plain, kept, strict=True)]
        peaks = [statistics.median(run["peak_mb"] for run in runs) for runs in (plain, kept)]
        print(
            f"{strategy}, {epochs} epochs, {plain[0]['rows']} rows: {seconds[0]:.1f} s computed each time, "
            f"{seconds[1]:.1f} s once, {seconds[0] / seconds[1]:.2f} × [{min(ratios):.2f}, {max(ratios):.2f}]; "
            f"{peaks[0]:.0f} and {peaks[1]:.0f} MB; last loss {plain[0]['loss']:.5f} and {kept[0]['loss']:.5f}"
        )
        print(f"  {'; '.join(filter(None, kept[0]['trunk']))}", flush=True)


if __name__ == "__main__":
    main()
