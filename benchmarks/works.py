"What is trained when speed is compared: the same rows, model, seed, updates and score for everybody."

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from llmft_nb.adapters import apply_strategy
from llmft_nb.bases import find_model, load_tokenizer, quiet_loading
from llmft_nb.data import TextDataset, TokenDataset
from llmft_nb.dialogues import InstructDataset, check_instruct
from llmft_nb.hparams import TrainSettings
from llmft_nb.inference import predict_logits, row_losses
from llmft_nb.modeling import LLMForCausalLM, LLMForSequenceClassification, TunableModel, size_head
from llmft_nb.rows import Rows, read_rows
from llmft_nb.strategy import parse_strategy
from llmft_nb.tasks import make_task

WARMUP, DECAY, MOST_NORM, WIDTH = 0.1, 0.01, 1.0, 256
PROMPT = "Carry out what is asked below and answer with nothing else.\nAsked: {instruction}\nGiven: {input}\nAnswer:"
SHAPE = {"hidden_size": 384, "num_hidden_layers": 8, "num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 64}
SHAPE |= {"intermediate_size": 1024, "tie_word_embeddings": True, "max_position_embeddings": 1024}


def folder_of(name: str) -> Path | None:
    "A set of the folder of data sets, or None where there is no such folder."
    return Path(os.environ["LLMFT_DATA"]) / name if "LLMFT_DATA" in os.environ else None


@dataclass(frozen=True)
class Work:
    "Something to train, and who is asked to."

    task: str  # "classify", "instruct" or "text"
    strategy: str  # As in 03_strategy
    epochs: int  # Passes over the rows
    batch_size: int  # Rows of an update
    lr: float  # Peak learning rate of all that moves
    who: tuple[str, ...]  # Contestants beside ours, the ones to be measured against first


ENCODER_PEERS = ("trainer, sorted", "trainer", "plain torch")
WORKS = {
    "classify, full": Work("classify", "full", 2, 32, 3e-4, ENCODER_PEERS),
    "classify, top:2": Work("classify", "top:2", 4, 32, 1e-3, ENCODER_PEERS[:2]),
    "classify, head": Work("classify", "head", 10, 32, 2e-2, ENCODER_PEERS[:2]),
    "classify, lora:16": Work("classify", "lora:16", 2, 32, 3e-3, ENCODER_PEERS[:2]),
    "classify, full, 2,048 tokens": Work("classify", "full", 4, 110, 1e-3, ENCODER_PEERS[:1]),
    "instruct, full": Work("instruct", "full", 3, 8, 5e-4, ("trainer", "trl", "trl, packed")),
    "instruct, lora:16": Work("instruct", "lora:16", 3, 8, 5e-3, ("trl",)),
    "text, full": Work("text", "full", 1, 8, 5e-4, ("trl, packed", "trainer")),
}


@dataclass
class Job:
    "A work, made ready: model, rows as tokens, and how it is scored."

    work: Work
    seed: int  # Of head, adapters, order and dropout
    model: TunableModel  # What moves is open
    train: TokenDataset
    score: Callable[[], float]  # Accuracy in per cent, or perplexity of what is right, on test rows
    loose: TokenDataset | None = None  # The same texts, a row each, for trainers that do not pack

    @cached_property
    def settings(self) -> TrainSettings:
        "The same numbers as the peers are given."
        work = self.work
        return TrainSettings(
            epochs=work.epochs,
            batch_size=work.batch_size,
            micro_batch_size=work.batch_size,
            lr=work.lr,
            head_lr_factor=1.0,
            weight_decay=DECAY,
            warmup_frac=WARMUP,
            max_grad_norm=MOST_NORM,
            seed=self.seed,
            precision="f32",
        )

    @property
    def n_tokens(self) -> int:  # Of all epochs, no padding
        return int(self.train.lengths.sum()) * self.work.epochs

    @property
    def n_products(self) -> float:  # Multiplications and additions of all epochs where everything moves
        "Six for each token and weight of a linear layer of the blocks, and of the head for each answer asked for."
        from torch import nn

        network = self.model.network
        inside = {id(module) for module in network.base_model.modules()}
        weights = {True: 0, False: 0}
        for module in network.modules():
            if isinstance(module, nn.Linear):
                weights[id(module) in inside] += module.weight.numel()
        n_answers = len(self.train.targets(range(len(self.train))))
        return 6.0 * (self.n_tokens * weights[True] + n_answers * self.work.epochs * weights[False])


def classify_job(work: Work, seed: int, model_name: str, n_rows: int) -> Job:
    "Labels: every 15th row of banking77, or the house pharmacy's verdicts."
    folder = folder_of("banking77")
    if folder:
        every, test = (read_rows(folder / f"{split}.jsonl") for split in ("train", "test"))
        rows, asked = every.subset(range(0, len(every), 15)), test.subset(range(0, len(test), 8))
    else:
        rows, asked = read_rows("pharmacy"), read_rows("pharmacy", split="test")
    rows = rows.subset(range(n_rows or 640))
    names = sorted({row["label"] for row in [*rows, *asked]})
    model = LLMForSequenceClassification.from_pretrained(model_name)
    size_head(model, names, seed=seed)
    apply_strategy(model, parse_strategy(work.strategy), seed)
    train, held_out = (TextDataset(part, model.tokenizer, label_names=names) for part in (rows, asked))

    def score() -> float:
        right = predict_logits(model, held_out).argmax(1) == held_out.targets(range(len(held_out)))
        return float(100 * right.mean())

    return Job(work, seed, model, train, score)


def writing_model(work: Work, seed: int, model_name: str) -> LLMForCausalLM:
    "A random model of Qwen3's shape, 25 million weights with a vocabulary of 30,522."
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    tokenizer, _ = load_tokenizer(find_model(model_name))
    torch.manual_seed(seed)
    network = AutoModelForCausalLM.from_config(Qwen3Config(vocab_size=len(tokenizer), **SHAPE))
    with tempfile.TemporaryDirectory() as scratch, quiet_loading():
        network.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        model = LLMForCausalLM.from_pretrained(scratch)
    apply_strategy(model, parse_strategy(work.strategy), seed)
    return model


def perplexity_of(model: LLMForCausalLM, held_out: TokenDataset) -> Callable[[], float]:
    "What is right in some rows, as a score to be asked for later."

    def score() -> float:
        losses, counts = row_losses(model, held_out)
        return math.exp(min(20.0, losses.sum() / counts.sum()))

    return score


def instruct_job(work: Work, seed: int, model_name: str, n_rows: int) -> Job:
    "Answers: 96 rows of rasbt_instruct, or of the house pharmacy's reasons."
    model = writing_model(work, seed, model_name)
    if folder := folder_of("rasbt_instruct"):
        train, test = (read_rows(folder / f"{s}.jsonl", {"output": "completion"}) for s in ("train", "test"))
        train, test = (check_instruct(rows, prompt_template=PROMPT) for rows in (train, test))
    else:
        columns = {"text": "prompt", "reason": "completion"}
        train, test = (check_instruct(read_rows("pharmacy", columns, s)) for s in ("train", "test"))
    rows = train.subset(range(n_rows or 96))
    options = {"max_length": WIDTH, "train_on": "last", "too_long": "drop"}
    dataset, held_out = (InstructDataset(part, model.tokenizer, **options) for part in (rows, test))
    return Job(work, seed, model, dataset, perplexity_of(model, held_out))


def text_job(work: Work, seed: int, model_name: str, n_rows: int) -> Job:
    "Running text: 24 articles of onestop_english, or the house pharmacy's leaflets."
    model = writing_model(work, seed, model_name)
    folder = folder_of("general")
    every = read_rows(folder / "onestop_english.train.jsonl" if folder else "pharmacy-leaflets")
    n_rows = min(n_rows or 24, len(every) - 8)
    train, test = every.subset(range(n_rows)), every.subset(range(n_rows, n_rows + 8))

    def dataset(rows: Rows, packing: bool) -> TokenDataset:
        task = make_task("text", TrainSettings(max_length=WIDTH, packing=packing))
        return task.dataset(task.prepare(rows, test, test, columns=None, leaks="allow").train, model, [])

    return Job(
        work, seed, model, dataset(train, True), perplexity_of(model, dataset(test, False)), dataset(train, False)
    )


def make_job(name: str, seed: int, model_name: str, n_rows: int = 0) -> Job:
    "A work of a name, with so many rows; 0: as many as are measured."
    work = WORKS[name]
    make = {"classify": classify_job, "instruct": instruct_job, "text": text_job}[work.task]
    return make(work, seed, model_name, n_rows)
