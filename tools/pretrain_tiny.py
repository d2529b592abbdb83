"""Pretrain the embedded base model `tiny` from public-domain children's books.

    python tools/pretrain_tiny.py --minutes 30

reads `$LLMFT_DATA/pretrain/books_children.{train.jsonl.gz,validation.jsonl}` and writes the folder
`llmft_nb/assets/models/tiny`: weights in 16 bits, configuration, tokenizer, and `pretraining.json` with every
figure of the run. Half an hour on two cores is far too little for a good model; what it gives is printed beside
an interpolated trigram model counted on the same tokens, so that nobody has to guess.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from books import ROOT, books_folder, encode_stream, train_tokenizer
from ngrams import ngram_losses
from transformers import LlamaConfig, LlamaForCausalLM


def read_texts(path: Path) -> Iterator[str]:
    "The `text` of every row of a JSONL file, gzipped or not."
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def sample_batch(stream: np.ndarray, rng: np.random.Generator, n_rows: int, length: int) -> torch.Tensor:
    "`n_rows` windows of `length` tokens at random places."
    starts = rng.integers(0, len(stream) - length, size=n_rows)
    return torch.from_numpy(np.stack([stream[s : s + length] for s in starts]).astype(np.int64))


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, stream: np.ndarray, length: int, n_rows: int = 200) -> float:
    "Cross-entropy in nats a token over the first `n_rows` windows of `length` tokens."
    model.eval()
    rows = torch.from_numpy(stream[: n_rows * length].reshape(n_rows, length).astype(np.int64))
    losses = [model(input_ids=part, labels=part).loss.item() for part in rows.split(20)]
    model.train()
    return float(np.mean(losses))


def learning_rate(progress: float, peak: float) -> float:
    "Linear warm-up over the first 3 % of the run, then a cosine to a twentieth of the peak."
    if progress < 0.03:
        return peak * progress / 0.03
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (progress - 0.03) / 0.97)))


def train(model: LlamaForCausalLM, stream: np.ndarray, heldout: np.ndarray, args: argparse.Namespace) -> dict:
    "Train for `args.minutes` of wall time; returns the figures of the run."
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    rng = np.random.default_rng(args.seed)
    started, limit_s, step, curve = time.monotonic(), 60 * args.minutes, 0, []
    model.train()
    while (elapsed_s := time.monotonic() - started) < limit_s:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(elapsed_s / limit_s, args.lr)
        batch = sample_batch(stream, rng, args.batch_rows, args.length)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % args.report_every == 0:
            curve.append([step, round(loss.item(), 4), round(mean_loss(model, heldout, args.length), 4)])
            rate = step * args.batch_rows * args.length / (time.monotonic() - started)
            print(f"{elapsed_s:6.0f} s  step {step}  train {curve[-1][1]}  valid {curve[-1][2]}  {rate:.0f} tok/s")
    n_seen = step * args.batch_rows * args.length
    return {"steps": step, "tokens_seen": n_seen, "seconds": round(time.monotonic() - started), "curve": curve}


def main() -> None:
    "Tokenizer, weights, figures: everything the folder of `tiny` holds."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="wall time of the training loop")
    parser.add_argument("--out", type=Path, default=ROOT / "llmft_nb" / "assets" / "models" / "tiny")
    parser.add_argument("--n-tokens", type=int, default=4096, help="size of the vocabulary")
    parser.add_argument("--n-layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--length", type=int, default=256, help="tokens a row")
    parser.add_argument("--batch-rows", type=int, default=8, help="rows a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report-every", type=int, default=500, help="steps between two measurements")
    args = parser.parse_args()
    data = books_folder()
    torch.manual_seed(args.seed)

    train_file, valid_file = data / "books_children.train.jsonl.gz", data / "books_children.validation.jsonl"
    tokenizer = train_tokenizer(read_texts(train_file), args.n_tokens)
    stream, heldout = (encode_stream(tokenizer, read_texts(file)) for file in (train_file, valid_file))
    trigram = ngram_losses(stream, heldout, args.n_tokens, highest=3)[3]
    print(f"{len(stream)} training tokens, {len(heldout)} held out; trigram {trigram:.3f} nats a token")

    config = LlamaConfig(
        vocab_size=args.n_tokens,
        hidden_size=args.width,
        intermediate_size=args.width * 8 // 3,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.width // 32,
        num_key_value_heads=args.width // 32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters())} weights")
    figures = train(model, stream, heldout, args)
    model = model.to(torch.float16)
    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    model = model.to(torch.float32)
    windows = len(heldout) // args.length
    figures |= {
        "n_weights": sum(p.numel() for p in model.parameters()),
        "training_tokens": len(stream),
        "valid_loss": round(mean_loss(model, heldout, args.length, windows), 4),
        "trigram_valid_loss": round(trigram, 4),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "settings": {k: v for k, v in vars(args).items() if k != "out"},
    }
    (args.out / "pretraining.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(f"valid {figures['valid_loss']} nats a token, trigram {figures['trigram_valid_loss']}; saved to {args.out}")


if __name__ == "__main__":
    main()
