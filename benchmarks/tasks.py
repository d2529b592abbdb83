"""Verdict, sentiment and tags of the house pharmacy with both embedded bases: F1 with its interval, over all seeds.

    python benchmarks/tasks.py [--tasks verdict sentiment tags tags-new] [--models tiny-encoder tiny] [--seeds 3]

A model is tuned on the same `--rows` rows of a task, once for each seed, and asked about the whole test. Macro F1 is
told for the two tasks that give a row one label, F1 of whole spans for the tags; `tags-new` asks for them in questions
about products that no training row names, which no list of known names can find. Beside them stand the commonest
answer (for tags: the commonest of each training word) and word counts (TF-IDF with a logistic regression; for tags of
a word and its two neighbours). Differences are paired, row by row, over all seeds.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tunes import Rows, answers_of_tune, tuned

from llmft_nb.report import read_lines
from llmft_nb.resampling import SPAN_F1, Statistic, f1_of_means, paired_permutation, resampled_score
from llmft_nb.rows import read_rows
from llmft_nb.scores import majority_baseline, tfidf_baseline
from llmft_nb.span_scores import span_counts
from llmft_nb.tag import dictionary_baseline
from llmft_nb.tags import repair_tags, span_tags, split_words

Row = dict[str, Any]
Tags = list[list[str]]


def macro_f1(names: list[str]) -> Statistic:
    "Mean F1 of the classes, from each row's hits, false alarms and misses of every class in turn."
    columns = tuple(f"{what} of {name}" for name in names for what in ("hits", "false alarms", "misses"))

    def of_means(means: np.ndarray) -> np.ndarray:
        by_class = f1_of_means(means.reshape(*means.shape[:-1], len(names), 3))
        return np.nan_to_num(by_class).mean(axis=-1)

    return Statistic("macro F1", columns, of_means, (0.0, 1.0))


def over_seeds(statistic: Statistic, n_seeds: int) -> Statistic:
    "The mean of a score over seeds, whose counts of a row lie side by side."

    def of_means(means: np.ndarray) -> np.ndarray:
        return statistic.of_means(means.reshape(*means.shape[:-1], n_seeds, -1)).mean(axis=-1)

    columns = tuple(f"{column}, seed {seed}" for seed in range(n_seeds) for column in statistic.columns)
    return replace(statistic, columns=columns, of_means=of_means)


def class_counts(answers: list[str] | np.ndarray, truth: list[str], names: list[str]) -> np.ndarray:
    "Hits, false alarms and misses of each class, row by row (N, 3 × classes)."
    said, true = (np.array(values)[:, None] == np.array(names) for values in (answers, truth))
    return np.stack([said & true, said & ~true, true & ~said], axis=2).reshape(len(truth), -1).astype(float)


def tagged(row: Row) -> Row:
    "A question as words and tags."
    words = split_words(row["text"])
    return {"tokens": [word.text for word in words], "ner_tags": span_tags(words, row["spans"])}


def in_context(rows: Rows) -> list[str]:
    "Each word with its neighbours, as three words that differ by their place."
    found = []
    for row in rows:
        words = ["edge", *row["tokens"], "edge"]
        found += [f"before_{a} is_{b} after_{c}" for a, b, c in zip(words, words[1:], words[2:], strict=False)]
    return found


def counted_tags(train: Rows, test: Rows) -> Tags:
    "What a linear model says to each word from it and its neighbours."
    labels = [tag for row in train for tag in row["ner_tags"]]
    said = iter(tfidf_baseline(in_context(train), labels, in_context(test)))
    return [repair_tags([next(said) for _ in row["tokens"]]) for row in test]


def tags_of_tune(train: Rows, sets: dict[str, Rows], **options: Any) -> Tags:
    "Tags of the test rows."
    with tuned(train, sets, task="tag", **options) as run:
        return [line["tags"] for line in read_lines(run.folder / "test_predictions.jsonl")]


@dataclass
class Job:
    "A task: its rows, how answers are counted, and who answers."

    sets: dict[str, Rows]
    statistic: Statistic
    counts: Callable[[Any], np.ndarray]  # Answers to one row of numbers a test row
    baselines: dict[str, Callable[[Rows], Any]]  # From training rows to answers
    tune: Callable[..., Any]


def labelled(name: str) -> Job:
    "A task with one label a row."
    sets = {split: list(read_rows(name, split=split)) for split in ("train", "valid", "test")}
    truth, texts = [row["label"] for row in sets["test"]], [row["text"] for row in sets["test"]]
    names = sorted(set(truth))
    others: dict[str, Callable[[Rows], Any]] = {
        "commonest answer": lambda rows: majority_baseline([row["label"] for row in rows], len(truth)),
        "word counts": lambda rows: tfidf_baseline(
            [row["text"] for row in rows], [row["label"] for row in rows], texts
        ),
    }
    return Job(
        sets,
        macro_f1(names),
        lambda answers: class_counts(answers, truth, names),
        others,
        lambda train, **options: answers_of_tune(train, sets, **options)["test"],
    )


def tags_job(asked: str) -> Job:
    "The entities of a set's test questions, tuned on those of the pharmacy."
    names = {"train": "pharmacy", "valid": "pharmacy", "test": asked}
    sets = {split: [tagged(row) for row in read_rows(name, split=split)] for split, name in names.items()}
    truth = [row["ner_tags"] for row in sets["test"]]
    others: dict[str, Callable[[Rows], Any]] = {
        "commonest tag of each word": lambda rows: dictionary_baseline(rows, sets["test"]),
        "word counts": lambda rows: counted_tags(rows, sets["test"]),
    }
    return Job(
        sets,
        SPAN_F1,
        lambda tags: np.column_stack(span_counts(tags, truth, "BIO")).astype(float),
        others,
        lambda train, **options: tags_of_tune(train, sets, **options),
    )


JOBS = {
    "verdict": lambda: labelled("pharmacy"),
    "sentiment": lambda: labelled("pharmacy-reviews"),
    "tags": lambda: tags_job("pharmacy"),
    "tags-new": lambda: tags_job("pharmacy-unread"),
}


def measure(task: str, arguments: argparse.Namespace) -> None:
    "Every way of answering one task."
    job, found = JOBS[task](), dict[str, list[np.ndarray]]()
    statistic = over_seeds(job.statistic, arguments.seeds)
    print(f"\n{task}: {arguments.rows} rows, {len(job.sets['test']):,} test rows, {arguments.seeds} seeds")
    for way in (*job.baselines, *arguments.models):
        started = time.monotonic()
        for seed in range(arguments.seeds):
            rows = job.sets["train"]
            train = random.Random(seed).sample(rows, min(arguments.rows, len(rows)))  # noqa: S311 - no secret
            if way in job.baselines:
                answers = job.baselines[way](train)
            else:
                options = {"lr": arguments.lr, "epochs": arguments.epochs, "batch_size": 16}
                answers = job.tune(train, model=way, seed=seed, **options)
            found.setdefault(way, []).append(job.counts(answers))
        score = resampled_score(np.hstack(found[way]), statistic)
        print(f"  {way:<27} {score.describe()}  {time.monotonic() - started:.0f} s", flush=True)
    for model in arguments.models:
        ours, counted = (np.hstack(found[way]) for way in (model, "word counts"))
        paired = paired_permutation(ours, counted, statistic)
        ends = f"[{100 * paired.low:+.1f}, {100 * paired.high:+.1f}]"
        print(f"  {model} minus word counts: {100 * paired.difference:+.1f} points {ends}, p = {paired.p_value:.2g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--models", nargs="*", default=["tiny-encoder", "tiny"])
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, help="one rate for all models (default: each model's own)")
    arguments = parser.parse_args()
    for task in arguments.tasks:
        measure(task, arguments)


if __name__ == "__main__":
    main()
