"""Small rows and small random models, made on the spot."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

THINGS = {
    "fruit": ["apple", "pear", "plum", "cherry", "grape"],
    "tool": ["hammer", "saw", "drill", "chisel", "file"],
    "sea": ["wave", "tide", "shell", "gull", "anchor"],
}
ENDINGS = ["on the table", "by the door", "in the old box", "for my sister", "from the market", "near the river"]


def small_rows(n_rows: int, seed: int = 0) -> list[dict[str, Any]]:
    "Rows of three classes, each told by one word; no two texts are alike."
    chosen = random.Random(seed)
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < n_rows:
        label = sorted(THINGS)[len(rows) % 3]
        words = [chosen.choice(THINGS[label]), chosen.choice(ENDINGS)]
        text = f"I saw {chosen.randint(2, 999)} times the {words[0]} {words[1]}" + " again" * chosen.randint(0, 9)
        rows.setdefault(text, {"text": text, "label": label})
    return list(rows.values())


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    "Write rows, one JSON value a line; a string is written as it stands."
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def small_config(kind: str, vocab_size: int, **changes: Any) -> Any:
    "The configuration of a transformers model of two blocks, 32 wide."
    import transformers

    wide: dict[str, Any] = {"vocab_size": vocab_size, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    plain = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    plain |= {"max_position_embeddings": 600}
    own: dict[str, dict[str, Any]] = {
        "Bert": plain,
        "Roberta": plain,
        "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 600},
        "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 600},
        "Llama": plain | {"num_key_value_heads": 1},
        "Qwen3": plain | {"num_key_value_heads": 1, "head_dim": 16},
        "Gemma": plain | {"num_key_value_heads": 1, "head_dim": 16},
        "Mistral": plain | {"num_key_value_heads": 1},
        "Phi": plain,
        "Phi3": plain | {"num_key_value_heads": 1},
        "T5": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
        "Bart": {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
        | {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 0},
    }
    return getattr(transformers, f"{kind}Config")(**(wide | own[kind] | changes))


def small_network(kind: str, vocab_size: int, seed: int = 0, **changes: Any) -> Any:
    "A random transformers base model of two blocks, 32 wide."
    import torch
    import transformers

    config = small_config(kind, vocab_size, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(transformers, f"{kind}Model")(config)


def saved_network(kind: str, folder: Path, **changes: Any) -> Path:
    "The folder of a small random base model with the embedded tokenizer."
    from transformers import AutoTokenizer

    from llmft_nb.core import assets_folder

    tokenizer = AutoTokenizer.from_pretrained(assets_folder() / "models" / "tiny")
    small_network(kind, len(tokenizer), **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
