"""How long a waiting thread of torch should look for work before it sleeps: steps of the embedded base, both cores.

    python benchmarks/waiting.py [--spins 0 300 1000 3000 10000] [--steps 25] [--rounds 3]

Torch's threads are OpenMP's, which on Linux is libgomp's: `GOMP_SPINCOUNT` says how often a thread looks before it
sleeps, and `OMP_WAIT_POLICY=PASSIVE` is the same as 0. A thread that looks is there at once when work comes, and
takes a core from whoever else wants one. So both are measured: alone, and beside a process that keeps one core busy.
Each figure is the median of --rounds processes, in tokens a second of an instruct step with eight rows.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time


def tokens_per_second(n_steps: int) -> float:
    "Tokens a second of the training step, optimizer included."
    import torch

    from llmft_nb.data import TextDataLoader
    from llmft_nb.dialogues import InstructDataset, check_instruct
    from llmft_nb.hparams import TrainSettings, parameter_groups
    from llmft_nb.modeling import LLMForCausalLM
    from llmft_nb.rows import read_rows
    from llmft_nb.steps import StepPlan, backward_step, make_accelerator

    columns = {"text": "prompt", "answer": "completion"}
    model, accelerator = LLMForCausalLM.from_pretrained("tiny"), make_accelerator("f32")
    dataset = InstructDataset(check_instruct(read_rows("pharmacy", columns)), model.tokenizer, max_length=512)
    loader, settings = TextDataLoader(dataset, batch_size=8, shuffle=True), TrainSettings(batch_size=8)
    optimizer = torch.optim.AdamW(parameter_groups(model.network, settings), fused=True)
    prepared, plan = accelerator.prepare(model), StepPlan(settings, None, 16_384)
    started, n_tokens = 0.0, 0
    for step, rows in enumerate(loader.steps(0)[: n_steps + 5]):
        if step == 5:
            started, n_tokens = time.perf_counter(), 0
        backward_step(accelerator, prepared, loader, rows, step, plan)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        n_tokens += int(dataset.lengths[rows].sum())
    return n_tokens / (time.perf_counter() - started)


def measured(n_spins: int, n_steps: int) -> float:
    "The same in a process of its own, two threads."
    environment = {**os.environ, "GOMP_SPINCOUNT": str(n_spins), "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--inside", "--steps", str(n_steps)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spins", type=int, nargs="+", default=[0, 300, 1000, 3000, 10000])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        print(tokens_per_second(arguments.steps))
        return
    for words in ("alone", "beside a busy process"):
        neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if words != "alone" else None
        try:
            rounds = [[measured(n, arguments.steps) for n in arguments.spins] for _ in range(arguments.rounds)]
        finally:
            if neighbour:
                neighbour.kill()
        for n_spins, rates in zip(arguments.spins, zip(*rounds, strict=True), strict=True):
            spread = f"{min(rates):,.0f} to {max(rates):,.0f}"
            print(
                f"{words}: {n_spins:>6} looks  {statistics.median(rates):7,.0f} tokens a second ({spread})", flush=True
            )


if __name__ == "__main__":
    main()
