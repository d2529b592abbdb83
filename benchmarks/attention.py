"""What attention costs forward and back on this CPU: in f32, in bf16, and in f32 inside a step in bf16.

    python benchmarks/attention.py [--threads 1] [--rounds 11]

Milliseconds, the median of --rounds; rows × heads × tokens × width.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch.nn.functional import scaled_dot_product_attention

SHAPES = ((32, 12, 20, 32), (8, 8, 92, 32), (16, 12, 128, 64), (4, 16, 512, 64))


def milliseconds(shape: tuple[int, ...], given: torch.dtype, computed: torch.dtype, n_rounds: int) -> str:
    "Forward and backward of causal attention."
    forward, backward = [], []
    for _ in range(n_rounds):
        inputs = [torch.randn(shape).to(given).requires_grad_() for _ in range(3)]
        began_s = time.perf_counter()
        found = scaled_dot_product_attention(*(one.to(computed) for one in inputs), is_causal=True).to(given)
        middle_s = time.perf_counter()
        found.backward(torch.ones_like(found))
        forward.append(middle_s - began_s)
        backward.append(time.perf_counter() - middle_s)
    return " / ".join(f"{1000 * statistics.median(seconds):.1f}" for seconds in (forward, backward))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    f32, bf16 = torch.float32, torch.bfloat16
    for shape in SHAPES:
        ways = {"f32": (f32, f32), "bf16": (bf16, bf16), "bf16, attention in f32": (bf16, f32)}
        cells = [f"{words} {milliseconds(shape, *way, arguments.rounds)}" for words, way in ways.items()]
        print(f"{' × '.join(map(str, shape))}: {'; '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
