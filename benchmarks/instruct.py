"""Answers before and after `--task instruct` with the embedded base, and how many of them never end.

    LLMFT_DATA=… python benchmarks/instruct.py [--sets rasbt_instruct medquad] [--threads 1] [--rows N] [--epochs N]

Each set is read from `$LLMFT_DATA/<set>/`, tuned on once, and scored on its test rows: perplexity of the right answers
and token F1 of the written ones, each before and after with an interval and a paired test, and what was forgotten.

The end token can only be learnt where it is seen. medquad's answers are long (the middle one has more tokens than half
of the model's 512 positions), so `too_long="drop"` keeps conversations that fit `--max-length` as a whole, and the
number left out is printed. Validation questions are all kept, whatever the length of their reference answers: of
`--prompts` of them, drawn evenly, the share is printed whose written answer runs past its end, that is, has not ended
within `--max-new-tokens`. It is measured twice, plain greedy and with the guard against repeated runs
(`--no-repeat-ngram`, by default the task's own); the figure to reach, at most 2 % on medquad's validation prompts, is
asked of `--judge`. What the guard may cost is printed, too: the share of right answers that say such a run twice.
Ends with status 1 where the figure is missed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmft_nb.bases import find_model, load_tokenizer
from llmft_nb.callbacks import Callback, TrainState
from llmft_nb.decoding import generate
from llmft_nb.dialogues import InstructDataset, check_instruct
from llmft_nb.finetune import finetune
from llmft_nb.hparams import TASK_DEFAULTS
from llmft_nb.instruct import evenly
from llmft_nb.predict import Predictor
from llmft_nb.rows import Rows, read_rows
from llmft_nb.scores import score_share

GUARD = TASK_DEFAULTS["instruct"]["no_repeat_ngram"]


@dataclass(frozen=True)
class Recipe:
    "How a set is read, and how much of it is taken by default."

    n_train: int  # Training rows
    columns: dict[str, str]  # Its names to ours
    template: str | None = None  # How a prompt is made of columns
    epochs: int = 3  # Passes
    max_length: int = 256  # Tokens of a whole conversation
    max_new_tokens: int = 256  # Tokens of a written answer
    most_endless: float | None = None  # The figure to reach; None: printed only
    files: dict[str, str] = field(default_factory=lambda: {"train": "train.jsonl"})  # Where names differ


RECIPES = {
    "rasbt_instruct": Recipe(935, {"output": "completion"}, "{instruction}\n{input}"),
    "medquad": Recipe(
        3000,
        {"question": "prompt", "answer": "completion"},
        most_endless=0.02,
        files={"train": "train.jsonl.gz"},
    ),
}


def say(started: float, text: str) -> None:
    print(f"{time.monotonic() - started:6.0f} s  {text}", flush=True)


class Lines(Callback):
    "A line now and then; ends the training where its time is up."

    def __init__(self, started: float, minutes: float) -> None:
        self.started, self.until = started, time.monotonic() + 60 * minutes if minutes else float("inf")

    def on_step(self, state: TrainState, values: Mapping[str, float]) -> None:
        if values and state.step % 50 == 0:
            say(self.started, f"step {state.step} of {state.n_steps}  loss {values['loss']:.3f}")
        if time.monotonic() > self.until and not state.stop:
            say(self.started, f"time is up after step {state.step} of {state.n_steps}")
            state.stop = True

    def on_evaluate(self, state: TrainState, scores: Mapping[str, float]) -> None:
        say(self.started, f"step {state.step}  perplexity of validation answers {scores['perplexity']:.2f}")


def some(rows: Rows, n_most: int) -> Rows:
    return rows.subset(evenly(len(rows), n_most))


def whole(rows: Rows, recipe: Recipe, max_length: int) -> Rows:
    "The rows whose conversation fits as a whole, so that its end token is seen."
    tokenizer, _ = load_tokenizer(find_model("tiny"))
    checked = check_instruct(rows, prompt_template=recipe.template)
    kept = InstructDataset(checked, tokenizer, max_length=max_length, too_long="drop").row_numbers
    return rows.subset(kept)


def says_twice(ids: Sequence[int], n_tokens: int) -> bool:
    "Whether an answer says some run of tokens twice."
    runs = [tuple(ids[start : start + n_tokens]) for start in range(len(ids) - n_tokens + 1)]
    return len(set(runs)) < len(runs)


def print_cost(rows: Rows, n_new: int, no_repeat: int) -> None:
    "How many right answers the guard would not let pass."
    tokenizer, _ = load_tokenizer(find_model("tiny"))
    answers = [row["messages"][-1]["content"] for row in rows]
    ids = tokenizer(answers, add_special_tokens=False, verbose=False)["input_ids"]
    for n_tokens in sorted({4, 8, no_repeat, 32}):
        share = score_share(sum(says_twice(one[:n_new], n_tokens) for one in ids), len(ids))
        print(f"          right answers that say a run of {n_tokens} tokens twice: {share.describe()}", flush=True)


def endless(predictor: Predictor, prompts: Sequence[Sequence[int]], n_new: int, no_repeat: int) -> tuple[Any, float]:
    "The share of answers that have not ended, with its interval, and the middle length of those that have."
    model = predictor.model
    written = generate(model.network, model.tokenizer, prompts, max_new_tokens=n_new, no_repeat_ngram=no_repeat)
    lengths = sorted(len(answer.token_ids) for answer in written if answer.finished)
    share = score_share(sum(not answer.finished for answer in written), len(written))
    return share, lengths[len(lengths) // 2] if lengths else float("nan")


def interval(score: dict[str, Any], factor: float = 1.0, unit: str = "") -> str:
    value, low, high = (factor * score[name] for name in ("value", "low", "high"))
    return f"{value:.2f}{unit} [{low:.2f}, {high:.2f}] (n {score['n']})"


def measure(name: str, arguments: argparse.Namespace) -> bool:
    "One set; whether its figure is reached."
    recipe, started = RECIPES[name], time.monotonic()
    max_length = arguments.max_length or recipe.max_length
    n_new = arguments.max_new_tokens or recipe.max_new_tokens
    folder = Path(os.environ["LLMFT_DATA"]) / name
    files = {"valid": "validation.jsonl", "test": "test.jsonl", **recipe.files}
    read = {split: read_rows(folder / file, recipe.columns) for split, file in files.items()}
    fitting = {split: whole(read[split], recipe, max_length) for split in ("train", "valid")}
    train = some(fitting["train"], arguments.rows or recipe.n_train)
    print(f"\n{name}: {len(fitting['train'])} of {len(read['train'])} training rows fit {max_length} tokens as a whole")
    epochs = arguments.epochs or recipe.epochs
    say(started, f"training on {len(train)} of them, {epochs} epochs; answers of {n_new} tokens at most")
    with tempfile.TemporaryDirectory() as scratch:
        run = finetune(
            train,
            task="instruct",
            valid=some(fitting["valid"], arguments.valid_rows),
            test=some(read["test"], arguments.test_rows),
            prompt_template=recipe.template,
            too_long="drop",
            max_length=max_length,
            max_new_tokens=n_new,
            n_written=arguments.written,
            epochs=epochs,
            seed=arguments.seed,
            out=Path(scratch) / "run",
            callbacks=[Lines(started, arguments.minutes)],
        )
        predictor = run.predictor()
    say(started, "; ".join(f"{step} {seconds:.0f} s" for step, seconds in run.record.seconds.items()))
    print_scores(run.record.scores)
    rows = check_instruct(some(read["valid"], arguments.prompts), prompt_template=recipe.template, need_answers=False)
    asked = InstructDataset(
        rows, predictor.model.tokenizer, max_length=512, too_long="cut_prompt", need_answers=False
    ).prompts(n_new)
    shares = {}
    for how, no_repeat in (("plain", 0), ("guarded", arguments.no_repeat_ngram)):
        shares[how], middle = endless(predictor, asked, n_new, no_repeat)
        words = "plain greedy" if how == "plain" else f"greedy, no run of {no_repeat} tokens twice"
        say(started, f"run past their end, {words}: {shares[how].describe()}; the others take {middle} tokens (median)")
    print_cost(check_instruct(read["valid"], prompt_template=recipe.template), n_new, arguments.no_repeat_ngram)
    reached = recipe.most_endless is None or shares[arguments.judge].value <= recipe.most_endless
    if recipe.most_endless is not None:
        verdict = "reached" if reached else "MISSED"
        print(f"          figure: at most {recipe.most_endless:.0%}, {arguments.judge}: {verdict}", flush=True)
    return reached


def print_scores(scores: dict[str, Any]) -> None:
    test = scores["test"]
    change = test["perplexity_change"]
    print(f"          perplexity of right answers  before {interval(test['perplexity_before'])}")
    print(f"                                       after  {interval(test['perplexity'])}  {change['verdict']}")
    for baseline in test["baselines"]:
        shown = interval(baseline["token_f1"], 100, " %")
        print(f"          token F1  {baseline['name']}: {shown}; tuned against it: {baseline['verdict']}")
    print(f"          token F1  tuned: {interval(test['token_f1'], 100, ' %')}")
    print(f"          test answers that did not end: {interval(test['endless'], 100, ' %')}")
    print(f"          forgetting: {scores['forgetting']['words']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=0, help="end each training then; 0: when it is done")
    parser.add_argument("--rows", type=int, help="training rows to take; else the set's own number")
    parser.add_argument("--epochs", type=int, help="else the set's own number")
    parser.add_argument("--valid-rows", type=int, default=200, help="validation rows that choose the epoch")
    parser.add_argument("--test-rows", type=int, default=200, help="test rows for perplexity")
    parser.add_argument("--written", type=int, default=60, help="test rows for which answers are written")
    parser.add_argument("--prompts", type=int, default=300, help="validation prompts for the share that never ends")
    parser.add_argument("--max-length", type=int, help="else the set's own number")
    parser.add_argument("--max-new-tokens", type=int, help="else the set's own number")
    parser.add_argument("--no-repeat-ngram", type=int, default=GUARD, help="tokens in a row not said twice")
    parser.add_argument("--judge", choices=["plain", "guarded"], default="guarded", help="which the figure is asked of")
    arguments = parser.parse_args()
    if "LLMFT_DATA" not in os.environ:
        sys.exit("set LLMFT_DATA to the folder that holds medquad/ and rasbt_instruct/")
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.threads} threads, seed {arguments.seed}")
    reached = [measure(name, arguments) for name in arguments.sets]
    sys.exit(0 if all(reached) else 1)


if __name__ == "__main__":
    main()
