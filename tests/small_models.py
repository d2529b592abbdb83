"Small models of many kinds with rows to learn, and what a step makes of them."

from __future__ import annotations

from pathlib import Path

import torch
from small import small_rows
from torch import nn

from llmft_nb.data import TextDataset, TokenDataset
from llmft_nb.dialogues import InstructDataset, check_instruct
from llmft_nb.hparams import TrainSettings
from llmft_nb.modeling import LLMForCausalLM, LLMForMaskedLM, LLMForSequenceClassification, TunableModel, size_head
from llmft_nb.rows import read_rows
from llmft_nb.tasks import make_task

MASKED = ("Bert", "Roberta")
ENCODERS = ("Bert", "Roberta", "DistilBert")
DECODERS = ("GPT2", "Llama", "Qwen3", "Gemma", "Mistral", "Phi", "Phi3")
LABELS = ["fruit", "sea", "tool"]


def labelled(folder: Path) -> tuple[TunableModel, TokenDataset]:
    "A model for labels, and rows of different lengths."
    model = LLMForSequenceClassification.from_pretrained(folder)
    size_head(model, LABELS)
    return model, TextDataset(small_rows(24), model.tokenizer, label_names=LABELS)


def answering(folder: Path) -> tuple[TunableModel, TokenDataset]:
    "A model that writes, and rows whose answers are their shorter half."
    model = LLMForCausalLM.from_pretrained(folder)
    rows = [{"prompt": row["text"], "completion": row["label"]} for row in small_rows(24)]
    return model, InstructDataset(check_instruct(read_rows(rows)), model.tokenizer, max_length=200)


def masked(folder: Path, packing: bool = True) -> tuple[TunableModel, TokenDataset]:
    "An encoder, and texts with some of their tokens hidden."
    model, task = (
        LLMForMaskedLM.from_pretrained(folder),
        make_task("text", TrainSettings(max_length=48, packing=packing)),
    )
    splits = task.prepare([{"text": row["text"]} for row in small_rows(40)], None, None, columns=None, leaks="drop")
    return model, task.dataset(splits.train, model, [])


def step(model: TunableModel, dataset: TokenDataset) -> tuple[float, list[torch.Tensor]]:
    "Loss and gradients of a step without dropout."
    model.eval()
    model.zero_grad()
    batch = dataset.batch(range(len(dataset)))
    labels = batch.pop("labels")
    loss = nn.functional.cross_entropy(model(**batch), labels)
    loss.backward()
    return loss.item(), [weight.grad for weight in model.parameters() if weight.grad is not None]
