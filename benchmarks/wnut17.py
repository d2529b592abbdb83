"""Span F1 on wnut17: the defaults of `--task tag` beside a hand-written transformers script, seed by seed.

    LLMFT_DATA=… python benchmarks/wnut17.py --model <folder of all-MiniLM-L6-v2> [--seeds 0 1 2] [--threads 2]

Both train on the same carve of wnut17's training rows, with the same base, epochs, batch size and rate, choose the
epoch by span F1 on the other tenth, and are scored once on wnut17's validation rows. The script is what a user would
write: Trainer, first sub-words labelled, padding to the longest of a batch. Ends with status 1 where the mean of ours
falls more than a point below the script's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from llmft_nb.finetune import finetune
from llmft_nb.hparams import resolve_settings
from llmft_nb.resampling import f1_score_interval
from llmft_nb.rows import Rows, read_rows, split_rows
from llmft_nb.span_scores import span_counts
from llmft_nb.strategy import parse_strategy
from llmft_nb.tags import check_tag, find_tag_names, repair_tags


def data_folder() -> Path:
    return Path(os.environ.get("LLMFT_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data") / "wnut17"


def ours(train: Rows, valid: Rows, test: Rows, model: str, seed: int, epochs: int) -> list[list[str]]:
    "Tags of the test rows by our defaults."
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        run = finetune(train, task="tag", model=model, valid=valid, test=test, seed=seed, out=out, epochs=epochs)
        lines = (run.folder / "test_predictions.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["tags"] for line in lines]


def script(train: Rows, valid: Rows, test: Rows, model: str, seed: int, settings: dict[str, Any]) -> list[list[str]]:
    "Tags of the test rows by a plain script around transformers' Trainer."
    from transformers import (
        AutoModelForTokenClassification,
        AutoTokenizer,
        DataCollatorForTokenClassification,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        set_seed,
    )

    set_seed(seed)
    names = find_tag_names(train)
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForTokenClassification.from_pretrained(model, num_labels=len(names))

    def encode(rows: Rows) -> list[dict[str, Any]]:
        found = []
        for row in rows:
            encoded = tokenizer(row["tokens"], is_split_into_words=True, truncation=True, max_length=256)
            word_ids = encoded.word_ids()
            encoded["labels"] = [
                names.index(row["ner_tags"][word]) if word is not None and word != before else -100
                for word, before in zip(word_ids, [None, *word_ids], strict=False)
            ]
            found.append(dict(encoded))
        return found

    def tags_of(trainer: Trainer, rows: Rows, encoded: list[dict[str, Any]]) -> list[list[str]]:
        logits = trainer.predict(encoded).predictions
        answers = []
        for row, one, scores in zip(rows, encoded, logits, strict=True):
            said = [names[score.argmax()] for score, label in zip(scores, one["labels"], strict=False) if label != -100]
            answers.append(repair_tags([*said, *["O"] * (len(row["tokens"]) - len(said))]))
        return answers

    class KeepBest(TrainerCallback):
        "Keeps the weights of the best epoch in memory."

        best, weights = -1.0, dict[str, torch.Tensor]()
        trainer: Trainer

        def on_epoch_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            counts = span_counts(tags_of(self.trainer, valid, encoded_valid), [row["ner_tags"] for row in valid], "BIO")
            hits, false, missed = (int(column.sum()) for column in counts)
            score = 2 * hits / max(1, 2 * hits + false + missed)
            if score > self.best:
                self.best = score
                self.weights = {name: weight.clone() for name, weight in network.state_dict().items()}

    encoded_valid, keep = encode(valid), KeepBest()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=settings["epochs"],
            per_device_train_batch_size=settings["batch_size"],
            per_device_eval_batch_size=64,
            learning_rate=settings["lr"],
            weight_decay=settings["weight_decay"],
            warmup_steps=settings["warmup_frac"],
            lr_scheduler_type=settings["schedule"],
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            seed=seed,
        )
        collator = DataCollatorForTokenClassification(tokenizer)
        trainer = Trainer(network, arguments, collator, train_dataset=encode(train), callbacks=[keep])
        keep.trainer = trainer
        trainer.train()
        network.load_state_dict(keep.weights)
        return tags_of(trainer, test, encode(test))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of an encoder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--epochs", type=int, help="else the default")
    parser.add_argument("--rows", type=int, help="training rows to take; all where not given")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = check_tag(read_rows(data_folder() / "train.jsonl"))
    rows = rows.subset(range(arguments.rows)) if arguments.rows else rows
    test = check_tag(read_rows(data_folder() / "validation.jsonl"), find_tag_names(rows))
    true = [row["ner_tags"] for row in test]
    settings = asdict(resolve_settings(parse_strategy("full"), task="tag")[0])
    settings["epochs"] = arguments.epochs or settings["epochs"]
    shown = {name: settings[name] for name in ("epochs", "batch_size", "lr", "head_lr_factor", "schedule")}
    print(f"{len(rows)} rows, {len(test)} scored; {shown}; {arguments.threads} threads", flush=True)
    means: dict[str, list[float]] = {"ours": [], "script": []}
    for seed in arguments.seeds:
        train, valid = split_rows(rows, 0.1, seed)
        for name in means:
            started = time.monotonic()
            if name == "ours":
                tags = ours(train, valid, test, arguments.model, seed, settings["epochs"])
            else:
                tags = script(train, valid, test, arguments.model, seed, settings)
            counts = span_counts(tags, true, "BIO")
            score = f1_score_interval(*(np.asarray(column) for column in counts))
            means[name].append(score.value)
            print(f"seed {seed}  {name:<7} {score.describe():<40} {time.monotonic() - started:7.0f} s", flush=True)
    for name, values in means.items():
        print(f"mean     {name:<7} F1 {100 * mean(values):.2f} %")
    sys.exit(mean(means["ours"]) < mean(means["script"]) - 0.01)


if __name__ == "__main__":
    main()
