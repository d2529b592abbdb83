"""Pretrain the embedded base models `tiny` (a Llama) and `tiny-encoder` (a ModernBERT) on public-domain books.

    python tools/pretrain.py tiny --minutes 90          # goes on from where the last call stopped
    python tools/pretrain.py tiny --minutes 10 --anneal # lets the rate fall to nothing, then writes the model's folder

reads the books that `tools/books.py` names, works in `--work` (tokens, weights, the optimizer's state, the curve) and
writes `llmft_nb/assets/models/<name>`: weights in 16 bits, configuration, tokenizer, `pretraining.json` with every
figure of the run, and the card. The order of the rows is a function of the step alone, so that a run cut in two reads
what the whole one would have. Where a GPU is at hand it is used, in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from base_card import bytes_per_token, counted, filled, samples, write_card
from books import MAX_LENGTH, ROOT, SPECIAL_TOKENS, Left, encode_stream, read_books, train_tokenizer
from muon import Muon
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
)
from vectors import count_vectors, neighbour_vectors

VOCABULARY = 6144


@dataclass(frozen=True)
class Plan:
    "The sizes and rates of one model's pretraining."

    width: int  # Of the hidden states
    inner: int  # Of each block's feed-forward layer
    n_layers: int
    n_heads: int
    n_kv_heads: int  # Heads of keys and values; fewer than `n_heads` shares them
    lr: float  # Of the token vectors and the norms
    block_lr: float  # Of the blocks' matrices
    n_rows: int  # Rows a step
    length: int = 256  # Tokens a row
    mask_frac: float = 0.0  # Share of tokens to be foretold; 0 foretells every next token
    passages: tuple[int, ...] = ()  # Lengths into which rows are cut; none for a Llama
    n_recalled: int = 0  # Tokens read last whose mean vector every state of a Llama shall tell
    anchor: float = 1.0  # Weight of the second loss, which holds what the model makes of a text to its token vectors
    n_neighbour_steps: int = 2000  # Of the token vectors alone, before the network's first step
    vectors_share: float = 1.0  # Of `lr`, for the token vectors
    weight_decay: float = 0.1
    n_warmup: int = 200  # Steps over which the rate rises, at the start and after each pause


PLANS = {
    "tiny": Plan(
        width=256, inner=640, n_layers=6, n_heads=8, n_kv_heads=4, lr=2e-3, block_lr=4e-3, n_rows=8, n_recalled=24
    ),
    "tiny-encoder": Plan(
        width=256,
        inner=384,
        n_layers=3,
        n_heads=8,
        n_kv_heads=8,
        lr=2e-3,
        block_lr=4e-3,
        n_rows=64,
        length=128,
        mask_frac=0.15,
        passages=(16, 32, 64),
        anchor=3.0,
        vectors_share=0.1,
    ),
}


def build(name: str, plan: Plan, tokenizer: PreTrainedTokenizerFast) -> nn.Module:
    "The model with random weights. Its head is tied to the token vectors: one table is read and written."
    shared = {
        "vocab_size": len(tokenizer),
        "hidden_size": plan.width,
        "intermediate_size": plan.inner,
        "num_hidden_layers": plan.n_layers,
        "num_attention_heads": plan.n_heads,
        "max_position_embeddings": MAX_LENGTH,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    if name == "tiny":
        return LlamaForCausalLM(LlamaConfig(**shared, num_key_value_heads=plan.n_kv_heads))
    special = {"cls_token_id": tokenizer.eos_token_id, "sep_token_id": tokenizer.eos_token_id}
    config = ModernBertConfig(**shared, **special, classifier_pooling="mean", global_attn_every_n_layers=1)
    return ModernBertForMaskedLM(config)


def vectors_of_books(file: Path, stream: np.ndarray, plan: Plan, n_tokens: int) -> dict[str, torch.Tensor]:
    "Token vectors `counted`, and the same `bent` until neighbouring passages agree; made once and kept in the file."
    if not file.is_file():
        counted_TD = count_vectors(stream, n_tokens, plan.width)
        bent_TD = neighbour_vectors(stream, counted_TD, plan.n_neighbour_steps)
        half = file.with_suffix(".half")
        save_file({"counted": counted_TD, "bent": bent_TD}, half)
        half.replace(file)
    return load_file(file)


def start_from_books(model: nn.Module, stream: np.ndarray, plan: Plan, found: dict[str, torch.Tensor]) -> None:
    "Replace the random token vectors by found ones of the same mean square; a masked model's frequencies are set."
    table = model.get_input_embeddings().weight
    vectors = found["bent" if plan.passages else "counted"]
    # Tokens that hardly occur, control tokens among them, keep their random vectors
    rare = found["counted"].norm(dim=1) < 1e-3
    if plan.passages:
        seen = np.bincount(stream, minlength=len(table)) + 1.0
        model.decoder.bias.data.copy_(torch.from_numpy(np.log(seen / seen.sum())))
    vectors = vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-6) * table.shape[1] ** 0.5
    with torch.no_grad():
        table[~rare] = vectors[~rare] * table.std()


def quiet_blocks(model: nn.Module) -> None:
    "Let every block begin by adding nothing: what the token vectors know passes through unharmed until it has learnt."
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "Wo.weight")):
                weights.zero_()
            if name == "head.dense.weight":
                weights.copy_(0.3 * torch.eye(len(weights)))  # Small enough for the activation to be nearly straight


@lru_cache(maxsize=1)
def cut_of_epoch(seed: int, epoch: int, length: int, n_pieces: int) -> np.ndarray:
    "Where the pieces of an epoch begin, in the order they are read."
    rng = np.random.default_rng([seed, epoch])
    return rng.integers(length) + length * rng.permutation(n_pieces)


def rows_of_step(stream: np.ndarray, plan: Plan, step: int, seed: int) -> torch.Tensor:
    "The rows of a step: in each epoch the stream is cut at another place, and its pieces are shuffled."
    per_epoch = (len(stream) - plan.length) // plan.length // plan.n_rows
    epoch, place = divmod(step, per_epoch)
    starts = cut_of_epoch(seed, epoch, plan.length, per_epoch * plan.n_rows)
    starts = starts[place * plan.n_rows : (place + 1) * plan.n_rows]
    return torch.from_numpy(np.stack([stream[s : s + plan.length] for s in starts]).astype(np.int64))


def loss_of(model: nn.Module, ids: torch.Tensor, plan: Plan, mask_id: int, seed: int) -> torch.Tensor:
    "Nats a foretold token: the next one, or with `mask_frac` the hidden ones."
    if plan.mask_frac:
        return masked_loss(model, ids, plan, mask_id, seed)[0]
    return next_loss(model, ids.to(next(model.parameters()).device))[0]


def next_loss(model: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    "Nats a next token, and the states."
    states = model.model(input_ids=ids).last_hidden_state
    logits = model.lm_head(states[:, :-1]).flatten(0, 1).float()
    return F.cross_entropy(logits, ids[:, 1:].flatten()), states


def masked_loss(
    model: nn.Module, ids: torch.Tensor, plan: Plan, mask_id: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    "Nats a hidden token, and the states. Of ten chosen tokens one keeps its face and one gets another's (BERT, 2018)."
    device = next(model.parameters()).device
    rng = np.random.default_rng([seed, 1])
    chosen = torch.from_numpy(rng.random(ids.shape) < plan.mask_frac)
    how = torch.from_numpy(rng.random(ids.shape))
    other = torch.from_numpy(rng.integers(len(SPECIAL_TOKENS), model.config.vocab_size, ids.shape))
    seen = torch.where(how < 0.8, torch.full_like(other, mask_id), torch.where(how < 0.9, other, ids))
    seen = torch.where(chosen, seen, ids)
    places = chosen.flatten().nonzero().squeeze(1)
    states = model.model(input_ids=seen.to(device)).last_hidden_state
    logits = model.decoder(model.head(states.flatten(0, 1)[places.to(device)])).float()
    return F.cross_entropy(logits, ids.flatten()[places].to(device)), states


def passages_loss(
    model: nn.Module, ids: torch.Tensor, plan: Plan, mask_id: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats a hidden token, and how far the features a classifier will see turn from the passage's own token vectors.

    The second is one minus the cosine between what the head makes of the mean state and the mean token vector, each
    less its mean over the passages: what all share tells none from another.
    """
    length = plan.passages[int(np.random.default_rng([seed, 2]).integers(len(plan.passages)))]
    ids = ids.reshape(-1, length)
    filling, states = masked_loss(model, ids, plan, mask_id, seed)
    features = model.head(states.mean(dim=1)).float()
    wanted = model.model.embeddings(input_ids=ids.to(states.device)).mean(dim=1).detach().float()
    features, wanted = (part - part.mean(dim=0).detach() for part in (features, wanted))
    return filling, 1 - F.cosine_similarity(features, wanted).mean()


def recall_loss(told_BLD: torch.Tensor, ids_BL: torch.Tensor, table_TD: torch.Tensor, n_last: int) -> torch.Tensor:
    """How far what is told at each token turns from the mean vector of the `n_last` tokens up to it: 1 − their cosine.

    A next token asks a state for little of what was said; a classifier at the last token asks it for all.
    """
    sums_BLD = table_TD[ids_BL].cumsum(dim=1)
    sums_BLD = sums_BLD - F.pad(sums_BLD, (0, 0, n_last, 0))[:, : ids_BL.shape[1]]
    return 1 - F.cosine_similarity(told_BLD.float(), sums_BLD, dim=-1).mean()


@torch.no_grad()
def heldout_loss(model: nn.Module, stream: np.ndarray, plan: Plan, mask_id: int, n_rows: int) -> float:
    "Mean loss over `n_rows` rows spread over the held-out stream; masks are the same at every call."
    model.eval()
    starts = np.linspace(0, len(stream) - plan.length - 1, n_rows).astype(int)
    losses: list[float] = []
    for part in np.array_split(starts, math.ceil(n_rows / 16)):
        ids = torch.from_numpy(np.stack([stream[s : s + plan.length] for s in part]).astype(np.int64))
        losses += [loss_of(model, ids, plan, mask_id, int(part[0])).item()] * len(part)
    model.train()
    return float(np.mean(losses))


def prepare(work: Path) -> tuple[PreTrainedTokenizerFast, dict[str, np.ndarray]]:
    "Tokenizer and token streams, made once and kept in the work folder."
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "left.json").is_file():
        tokenizer = train_tokenizer((row["text"] for row in read_books("train")), VOCABULARY)
        tokenizer.save_pretrained(work / "tokenizer")
        left = Left()
        for split in ("train", "valid"):
            texts = (row["text"] for row in read_books(split, left if split == "train" else None))
            np.save(work / f"{split}.npy", encode_stream(tokenizer, texts))
        (work / "left.json").write_text(json.dumps(vars(left)))
    streams = {split: np.load(work / f"{split}.npy") for split in ("train", "valid")}
    return AutoTokenizer.from_pretrained(work / "tokenizer"), streams


class Run:
    "A model in training, which can stop after any step and go on."

    def __init__(self, name: str, work: Path, seed: int, *, start: Path | None = None, compiled: bool = False) -> None:
        self.name, self.plan, self.seed = name, PLANS[name], seed
        self.folder = work / name
        self.tokenizer, self.streams = prepare(work)
        self.mask_id = self.tokenizer.mask_token_id
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        stream, saved = self.streams["train"], (self.folder / "state.json").is_file()
        if self.plan.n_recalled or not (saved or start):
            file = work / f"vectors-{self.plan.width}.safetensors"
            found = vectors_of_books(file, stream, self.plan, len(self.tokenizer))
        torch.manual_seed(seed)
        self.model = build(name, self.plan, self.tokenizer)
        self.state: dict[str, Any] = {"step": 0, "seconds": 0.0, "curve": []}
        if start and not saved:
            self.state = json.loads((start / "state.json").read_text())
            self.model.load_state_dict(load_file(start / "model.safetensors"), strict=False)  # The head is tied
        elif not saved:
            start_from_books(self.model, stream, self.plan, found)
            quiet_blocks(self.model)
        self.model.to(self.device).train()
        self.trained = dict(self.model.named_parameters())
        if self.plan.n_recalled:
            share_T = np.bincount(stream, minlength=len(self.tokenizer)) / len(stream)
            common_D = torch.from_numpy(share_T).float() @ found["bent"]  # What all texts share tells none from another
            self.table = (found["bent"] - common_D).to(self.device)
            self.teller = nn.Linear(self.plan.width, self.plan.width, bias=False, device=self.device)
            self.trained["teller.weight"] = self.teller.weight
        blocks = [p for name, p in self.model.named_parameters() if ".layers." in name and p.dim() == 2]
        table = self.model.get_input_embeddings().weight
        placed = {id(p) for p in (table, *blocks)}
        others = [p for p in self.trained.values() if id(p) not in placed]
        adam = {"betas": (0.9, 0.98), "weight_decay": 0.0, "fused": True}
        self.optimizers = [
            torch.optim.AdamW([table], self.plan.lr * self.plan.vectors_share, **adam),
            torch.optim.AdamW(others, self.plan.lr, **adam),
            Muon(blocks, self.plan.block_lr, weight_decay=self.plan.weight_decay),
        ]
        self.optimizer_of = {p: one for one in self.optimizers for p in one.param_groups[0]["params"]}
        if saved:
            self.load()
        self.begun = self.state["step"]
        if compiled:
            self.model.model.compile()

    def load(self) -> None:
        "Weights, moments and place of the last save."
        self.state = json.loads((self.folder / "state.json").read_text())
        saved = load_file(self.folder / f"state-{self.state['step']}.safetensors", device=str(self.device))
        with torch.no_grad():
            for name, weights in self.trained.items():
                weights.copy_(saved[name])
                moments = {key.split(":")[0]: kept for key, kept in saved.items() if key.endswith(f":{name}")}
                self.optimizer_of[weights].state[weights] = moments

    def save(self) -> None:
        "Keep the state; the file of the save before goes only when the new one is whole."
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, torch.Tensor] = {}
        for name, weights in self.trained.items():
            tensors[name] = weights.detach()
            moments = self.optimizer_of[weights].state[weights]
            tensors |= {f"{key}:{name}": value for key, value in moments.items()}
        file = self.folder / f"state-{self.state['step']}.safetensors"
        save_file(tensors, file)
        half = self.folder / "state.json.half"
        half.write_text(json.dumps(self.state))
        half.replace(self.folder / "state.json")
        for old in self.folder.glob("state-*.safetensors"):
            if old != file:
                old.unlink()

    def losses(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        "The loss that is reported, and the second one, which holds the features to the token vectors."
        if self.plan.passages:
            return passages_loss(self.model, ids, self.plan, self.mask_id, self.state["step"])
        ids = ids.to(self.device)
        loss, states = next_loss(self.model, ids)
        return loss, recall_loss(self.teller(states), ids, self.table, self.plan.n_recalled)

    def step(self, share: float) -> float:
        "One step of the optimizers at a share of their rates; returns the loss."
        ids = rows_of_step(self.streams["train"], self.plan, self.state["step"], self.seed)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            loss, second = self.losses(ids)
        (loss + self.plan.anchor * second).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.state["step"] += 1
        return loss.item()

    def go_on(self, seconds: float, *, anneal: bool, every: int) -> None:
        "Train for some seconds; with `anneal` the rate falls to nothing over them."
        started, before, losses = time.monotonic(), self.state["seconds"], []
        while (elapsed := time.monotonic() - started) < seconds:
            share = min(1.0, (self.state["step"] - self.begun + 1) / self.plan.n_warmup)
            losses.append(self.step(share * (1 - elapsed / seconds if anneal else 1.0)))
            self.state["seconds"] = before + time.monotonic() - started
            if self.state["step"] % every == 0:
                valid = heldout_loss(self.model, self.streams["valid"], self.plan, self.mask_id, 64)
                self.state["curve"].append([self.state["step"], round(float(np.mean(losses)), 4), round(valid, 4)])
                n_tokens = (self.state["step"] - self.begun) * self.plan.n_rows * self.plan.length
                print(*self.state["curve"][-1], f"{n_tokens / (time.monotonic() - started):.0f} tokens/s", flush=True)
                losses = []
                self.save()
        self.save()

    def keep(self, folder: Path) -> None:
        "Weights in 16 bits, tokenizer, place and curve: enough for another machine to go on from (`--start`)."
        self.model.to(torch.float16).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.model.to(torch.float32)
        (folder / "state.json").write_text(json.dumps(self.state))

    def finish(self, folder: Path, note: str = "") -> None:
        "Write the model's folder: weights in 16 bits, tokenizer, figures, card."
        self.keep(folder)
        (folder / "state.json").unlink()  # All of it stands in `pretraining.json`
        n_rows = len(self.streams["valid"]) // self.plan.length
        heldout = {"loss": heldout_loss(self.model, self.streams["valid"], self.plan, self.mask_id, n_rows)}
        heldout["bytes_per_token"] = bytes_per_token(self.tokenizer, self.streams["valid"])
        heldout |= counted(self.streams, len(self.tokenizer))
        on_gpu = self.device.type == "cuda"
        figures = {
            "n_weights": sum(p.numel() for p in self.model.parameters()),
            "steps": self.state["step"],
            "tokens_seen": self.state["step"] * self.plan.n_rows * self.plan.length,
            "training_tokens": len(self.streams["train"]),
            "seconds": round(self.state["seconds"]),
            "device": torch.cuda.get_device_name()
            if on_gpu
            else f"{torch.get_num_threads()} core(s), {platform.machine()}",
            "torch": torch.__version__,
            "date": datetime.now(UTC).date().isoformat(),
            "plan": asdict(self.plan),
            "seed": self.seed,
            "note": note,
            "heldout": heldout,
            "curve": self.state["curve"],
            "left": json.loads((self.folder.parent / "left.json").read_text()),
            "samples": (filled if self.plan.mask_frac else samples)(self.model, self.tokenizer),
        }
        write_card(folder, self.name, figures)
        print({"heldout": heldout, "samples": figures["samples"]})


def main() -> None:
    "Go on with a model's pretraining, and write its folder where it is annealed."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(PLANS))
    parser.add_argument("--minutes", type=float, default=30.0, help="wall time of the training loop")
    parser.add_argument("--anneal", action="store_true", help="let the rate fall to nothing, then write the model")
    parser.add_argument(
        "--work", type=Path, default=ROOT / ".cache" / "pretraining", help="where the run's state is kept"
    )
    parser.add_argument("--out", type=Path, help="default: llmft_nb/assets/models/<name>")
    parser.add_argument("--start", type=Path, help="where there is no state yet, begin from what --keep wrote")
    parser.add_argument("--keep", type=Path, help="write the weights here at the end, for --start on another machine")
    parser.add_argument("--compile", action="store_true", help="compile the blocks, which takes a minute")
    parser.add_argument("--note", default="", help="what else the card should say, where the plan changed on the way")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=500, help="steps between two measurements")
    arguments = parser.parse_args()
    run = Run(arguments.name, arguments.work, arguments.seed, start=arguments.start, compiled=arguments.compile)
    n_weights = sum(p.numel() for p in run.model.parameters())
    print(f"{n_weights:,} weights, {len(run.streams['train']):,} tokens, {run.device}, step {run.begun}", flush=True)
    run.go_on(60 * arguments.minutes, anneal=arguments.anneal, every=arguments.every)
    if arguments.keep:
        run.keep(arguments.keep)
    if arguments.anneal:
        run.finish(arguments.out or ROOT / "llmft_nb" / "assets" / "models" / arguments.name, arguments.note)


if __name__ == "__main__":
    main()
