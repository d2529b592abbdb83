"What is trained when speed is compared: the same rows, model, seed, updates and score for everybody."

from __future__ import annotations

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

WARMUP, DECAY, MOST_NORM = 0.1, 0.01, 1.0
PROMPT = "Carry out what is asked below and answer with nothing else.\nAsked: {instruction}\nGiven: {input}\nAnswer:"
SHAPE = {"hidden_size": 384, "num_hidden_layers": 8, "num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 64}
SHAPE |= {"intermediate_size": 1024, "tie_word_embeddings": True, "max_position_embeddings": 1024}


def folder_of(name: str) -> Path | None:
    "A set of the folder of data sets, or None where there is no such folder."
    return Path(os.environ["LLMFT_DATA"]) / name if "LLMFT_DATA" in os.environ else None


@dataclass(frozen=True)
class Work:
    "Something to train, and who is asked to."

    task: str  # "classify" or "instruct"
    strategy: str  # As in 03_strategy
    epochs: int  # Passes over the rows
    batch_size: int  # Rows of an update
    lr: float  # Peak learning rate of all that moves
    who: tuple[str, ...]  # Contestants beside ours, the ones to be measured against first


ENCODER_PEERS = ("trainer, sorted", "trainer", "plain torch")
WORKS = {
    "classify, full": Work("classify", "full", 2, 32, 3e-4, ENCODER_PEERS),
    "classify, top:2": Work("classify", "top:2", 4, 32, 1e-3, ENCODER_PEERS),
    "classify, head": Work("classify", "head", 10, 32, 2e-2, ENCODER_PEERS),
    "classify, lora:16": Work("classify", "lora:16", 2, 32, 3e-3, ENCODER_PEERS[:2]),
    "classify, full, 2,048 tokens": Work("classify", "full", 4, 110, 1e-3, ENCODER_PEERS[:1]),
    "instruct, full": Work("instruct", "full", 3, 8, 5e-4, ("trainer", "trl", "trl, packed")),
    "instruct, lora:16": Work("instruct", "lora:16", 3, 8, 5e-3, ("trl",)),
}


@dataclass
class Job:
    "A work, made ready: model, rows as tokens, and how it is scored."

    work: Work
    seed: int  # Of head, adapters, order and dropout
    model: TunableModel  # What moves is open
    train: TokenDataset
    score: Callable[[], float]  # Accuracy in per cent, or perplexity of the right answers, on test rows

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


def classify_job(work: Work, seed: int, model_name: str) -> Job:
    "Labels: every 15th row of banking77, or the house pharmacy's verdicts."
    folder = folder_of("banking77")
    if folder:
        every, test = (read_rows(folder / f"{split}.jsonl") for split in ("train", "test"))
        rows, asked = every.subset(range(0, len(every), 15)).subset(range(640)), test.subset(range(0, len(test), 8))
    else:
        rows, asked = read_rows("pharmacy").subset(range(640)), read_rows("pharmacy", split="test")
    names = sorted({row["label"] for row in [*rows, *asked]})
    model = LLMForSequenceClassification.from_pretrained(model_name)
    size_head(model, names, seed=seed)
    apply_strategy(model, parse_strategy(work.strategy), seed)
    train, held_out = (TextDataset(part, model.tokenizer, label_names=names) for part in (rows, asked))

    def score() -> float:
        right = predict_logits(model, held_out).argmax(1) == held_out.targets(range(len(held_out)))
        return float(100 * right.mean())

    return Job(work, seed, model, train, score)


def instruct_rows() -> tuple[Rows, Rows]:
    "Training rows and rows to be judged by: rasbt_instruct, or the house pharmacy's answers."
    if folder := folder_of("rasbt_instruct"):
        train, test = (read_rows(folder / f"{s}.jsonl", {"output": "completion"}) for s in ("train", "test"))
        return tuple(check_instruct(rows, prompt_template=PROMPT) for rows in (train, test))
    return tuple(
        check_instruct(read_rows("pharmacy", {"text": "prompt", "reason": "completion"}, split))
        for split in ("train", "test")
    )


def instruct_job(work: Work, seed: int, model_name: str) -> Job:
    "Answers: 96 rows, a random model of Qwen3's shape, 25 million weights with a vocabulary of 30,522."
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
    train, test = instruct_rows()
    options = {"max_length": 256, "train_on": "last", "too_long": "drop"}
    dataset, held_out = (InstructDataset(rows, model.tokenizer, **options) for rows in (train.subset(range(96)), test))

    def score() -> float:
        losses, counts = row_losses(model, held_out)
        return float(torch.exp(torch.tensor(losses.sum() / counts.sum())))

    return Job(work, seed, model, dataset, score)


def make_job(name: str, seed: int, model_name: str) -> Job:
    "A work of a name."
    work = WORKS[name]
    return {"classify": classify_job, "instruct": instruct_job}[work.task](work, seed, model_name)
