"""Full fine-tuning at real size on one GPU: llmft_nb with its options, and what a user would take instead.

    python benchmarks/gpu.py [--shapes 0.5B 1.5B] [--who ours "ours, compiled" trainer] [--steps 12] [--write]

Random weights in Qwen2.5's shapes, rows of 2,048 random tokens that are all learnt, eight to a step, in bf16 with the
weights in f32. Each contestant is a process of its own. Tokens a second are of the steps after the first four; the
share of the peak is of bf16 matrix products measured in the same process, by six products for each token and weight of
a linear layer, attention's own not counted, however often activations are computed. Memory is torch's peak of the
timed steps beside what the plan says of it, which needs neither weights nor device. `--write` keeps the
table in `gpu.json` beside this file.

Without a GPU, `--shapes tiny` goes through the same steps on a CPU; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SHARED = {"tie_word_embeddings": True, "max_position_embeddings": 4096, "use_cache": False}
SHAPES: dict[str, dict[str, Any]] = {  # Of Qwen2.5's configurations
    "tiny": {"vocab_size": 6144, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
    "0.5B": {"vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    | {"num_attention_heads": 14, "num_key_value_heads": 2},
    "1.5B": {"vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
    | {"num_attention_heads": 12, "num_key_value_heads": 2},
}
OURS: dict[str, dict[str, Any]] = {  # Settings beside the defaults
    "ours": {},
    "ours, compiled": {"compile": True},
    "ours, checkpointing": {"activation_checkpointing": True},
    "ours, step in backward": {"step_in_backward": True, "max_grad_norm": 0.0},
    "ours, eight bits": {"optimizer": "adamw8bit"},
}
PEERS: dict[str, dict[str, Any]] = {  # Arguments of transformers' Trainer
    "trainer": {},
    "trainer, compiled": {"torch_compile": True},
    "trainer, checkpointing": {"gradient_checkpointing": True},
    "trainer, liger": {"use_liger_kernel": True},
}
NEEDED = {"ours, eight bits": "bitsandbytes", "trainer, liger": "liger_kernel"}
ASKED_SHARE, ASKED_RATIO, ASKED_SHAPE = 0.45, 1.1, "1.5B"
N_WARM, LR = 4, 1e-4
Run = dict[str, Any]


def products_per_second(device: Any, n: int) -> float:
    "Multiplications and additions a second of bf16 matrix products, the median of some."
    import torch

    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    found = list[float]()
    for _ in range(20):
        wait(device)
        started = time.perf_counter()
        a @ b
        wait(device)
        found.append(2 * n**3 / (time.perf_counter() - started))
    return statistics.median(found[5:])


def wait(device: Any) -> None:
    "Until a device has done all that it was asked for."
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    "Seconds and memory of the steps after the first ones."

    def __init__(self, device: Any, n_steps: int) -> None:
        self.device, self.n_steps = device, n_steps
        self.started = self.seconds = 0.0

    def tick(self, step: int) -> None:
        "After each step, counted from 1."
        import torch

        if step == N_WARM:
            wait(self.device)
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            self.started = time.perf_counter()
        if step == self.n_steps:
            wait(self.device)
            self.seconds = time.perf_counter() - self.started


def random_model(shape: str, device: Any) -> Any:
    "A model of random weights on the device."
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from llmft_nb.bases import find_model, load_tokenizer
    from llmft_nb.modeling import LLMForCausalLM

    source = find_model("tiny")
    torch.manual_seed(0)
    with torch.device(device):
        network = AutoModelForCausalLM.from_config(Qwen2Config(**SHAPES[shape], **SHARED), dtype=torch.float32)
    return LLMForCausalLM(network, load_tokenizer(source)[0], source)


def random_rows(shape: str, n_rows: int, width: int) -> Any:
    "Token ids, shape (rows, tokens)."
    import torch

    stream = torch.Generator().manual_seed(1)
    return torch.randint(5, SHAPES[shape]["vocab_size"], (n_rows, width), generator=stream)


def predicted_bytes(model: Any, loader: Any, settings: Any) -> float:
    "What the plan says of the peak of a step."
    from llmft_nb.memory import plan_memory
    from llmft_nb.rehearsal import Job
    from llmft_nb.strategy import parse_strategy

    given = type(model), model.network.config, model.tokenizer, model.source, loader, settings
    return plan_memory(Job(*given, parse_strategy("full"), kind=next(model.parameters()).device.type)).peak


def own_loader(model: Any, ids: Any, batch_size: int, options: dict[str, Any]) -> tuple[Any, Any]:
    "Rows and settings of LLMTrainer."
    from llmft_nb.data import TextDataLoader, TokenDataset, token_table
    from llmft_nb.hparams import TrainSettings
    from llmft_nb.tokens import NO_TARGET, TokenRows

    rows = ids.tolist()
    encoded = TokenRows(rows, None, [len(row) for row in rows], [[*row[1:], NO_TARGET] for row in rows])
    dataset = TokenDataset(token_table(encoded), model.tokenizer, ids.shape[1], [""] * len(rows))
    settings = TrainSettings(
        **{"epochs": 1, "batch_size": batch_size, "micro_batch_size": batch_size, "lr": LR, "precision": "bf16"}
        | {"micro_batch_tokens": batch_size * ids.shape[1], "schedule": "constant", "warmup_frac": 0.0}
        | options
    )
    return TextDataLoader(dataset, batch_size=batch_size), settings


def ours(model: Any, ids: Any, batch_size: int, clock: Clock, options: dict[str, Any]) -> list[float]:
    "LLMTrainer."
    from llmft_nb.callbacks import Callback
    from llmft_nb.training import LLMTrainer

    class Ticks(Callback):
        def on_step(self, state: Any, values: Any) -> None:
            clock.tick(state.step)

    loader, settings = own_loader(model, ids, batch_size, options)
    trainer = LLMTrainer(model, settings=settings, callbacks=[Ticks()], log_every=clock.n_steps)
    return [loss for _, loss in trainer.train(loader).losses]


def trainer(model: Any, ids: Any, batch_size: int, clock: Clock, options: dict[str, Any]) -> list[float]:
    "transformers' Trainer."
    import tempfile

    from datasets import Dataset
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.utils.logging import disable_progress_bar

    class Ticks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.tick(state.global_step)

    disable_progress_bar()
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()}).with_format("torch")
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=1,
            per_device_train_batch_size=batch_size,
            learning_rate=LR,
            lr_scheduler_type="constant",
            weight_decay=0.01,
            bf16=True,
            optim="adamw_torch_fused",
            logging_steps=clock.n_steps,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=clock.device.type == "cpu",
            **options,
        )
        made = Trainer(model=model.network, args=arguments, train_dataset=rows, callbacks=[Ticks()])
        made.train()
    return [line["loss"] for line in made.state.log_history if "loss" in line]


def one_run(shape: str, who: str, n_steps: int, batch_size: int, width: int) -> Run:
    "Train once in this process."
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = products_per_second(device, 8192 if device.type == "cuda" else 256)
    model, ids = random_model(shape, device), random_rows(shape, n_steps * batch_size, width)
    linear = [module for module in model.network.modules() if isinstance(module, torch.nn.Linear)]
    n_weights = sum(layer.weight.numel() for layer in linear)
    options = {**OURS, **PEERS}[who]
    predicted = predicted_bytes(model, *own_loader(model, ids, batch_size, options)) if who in OURS else None
    clock = Clock(device, n_steps)
    losses = (ours if who in OURS else trainer)(model, ids, batch_size, clock, options)
    tokens_s = (n_steps - N_WARM) * batch_size * width / clock.seconds
    found: Run = {"shape": shape, "who": who, "tokens_s": tokens_s, "loss": losses[-1], "n_weights": n_weights}
    found |= {"share": 6.0 * n_weights * tokens_s / peak, "peak_tflops": peak / 1e12}
    if device.type == "cuda":
        found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        found["device"] = torch.cuda.get_device_name()
    return found | ({} if predicted is None else {"predicted_gb": predicted / 1e9})


def in_a_process(shape: str, who: str, arguments: argparse.Namespace) -> Run | None:
    "The same in a process of its own; None, and a word on it, where that fails."
    options = ["--steps", str(arguments.steps), "--batch", str(arguments.batch), "--width", str(arguments.width)]
    done = subprocess.run(
        [sys.executable, __file__, *options, "--inside", shape, who], capture_output=True, text=True, timeout=180
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no word"])[-1]
        print(f"{shape:<5} {who:<24} failed: {reason[:160]}", flush=True)
        return None
    return dict(json.loads(done.stdout.splitlines()[-1]))


def say(run: Run, ours_tokens_s: float | None) -> None:
    "Print one line of the table."
    memory = f"{run['peak_gb']:6.1f} GB" if "peak_gb" in run else ""
    if "predicted_gb" in run:
        memory += f", predicted {run['predicted_gb']:.1f}"
    ratio = f"  ours {ours_tokens_s / run['tokens_s']:.2f} x" if ours_tokens_s else ""
    share = f"{100 * run['share']:4.0f} % of {run['peak_tflops']:.0f} TFLOP/s"
    print(
        f"{run['shape']:<5} {run['who']:<24} {run['tokens_s']:9.0f} tokens/s {share}  loss {run['loss']:.2f}  "
        f"{memory}{ratio}",
        flush=True,
    )


def is_reached(runs: list[Run]) -> bool:
    "Whether the largest shape is as fast as asked, where it was run."
    own = [run for run in runs if run["shape"] == ASKED_SHAPE and run["who"] in OURS]
    peers = [run for run in runs if run["shape"] == ASKED_SHAPE and run["who"] in PEERS]
    if not own or not peers:
        return True
    best = max(own, key=lambda run: run["tokens_s"])
    ratio = best["tokens_s"] / max(run["tokens_s"] for run in peers)
    print(
        f"{ASKED_SHAPE}: {best['who']}, {100 * best['share']:.0f} % of the peak (asked {100 * ASKED_SHARE:.0f}), "
        f"{ratio:.2f} times the best peer (asked {ASKED_RATIO})"
    )
    return bool(best["share"] >= ASKED_SHARE and ratio >= ASKED_RATIO)


def versions() -> str:
    "What the table was made with."
    found = []
    for name in ("torch", "transformers", "accelerate", "triton", "liger-kernel", "bitsandbytes"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def main(train: Callable[..., Run | None] = in_a_process) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["0.5B", "1.5B"])
    parser.add_argument("--who", nargs="+", choices=[*OURS, *PEERS], help="some of them; else all that can run")
    parser.add_argument("--steps", type=int, default=12, help=f"optimizer steps, of which {N_WARM} are not timed")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--width", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--minutes", type=float, default=8.5, help="after which nobody else begins")
    parser.add_argument("--write", action="store_true", help="keep the table")
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.steps <= N_WARM:
        parser.error(f"--steps {arguments.steps}: the first {N_WARM} are not timed, give more")
    if arguments.inside:
        run = one_run(*arguments.inside, arguments.steps, arguments.batch, arguments.width)
        print(json.dumps(run))
        return
    print(versions())
    runs, started = list[Run](), time.perf_counter()
    for shape in arguments.shapes:
        own: float | None = None
        for who in arguments.who or [*OURS, *PEERS]:
            if who in NEEDED and find_spec(NEEDED[who]) is None:
                print(f"{shape:<5} {who:<24} left out: no {NEEDED[who]}")
            elif time.perf_counter() - started > 60 * arguments.minutes:
                print(f"{shape:<5} {who:<24} left out: no time")
            elif (run := train(shape, who, arguments)) is not None:
                own = run["tokens_s"] if who == "ours" else own
                say(run, own if who != "ours" else None)
                runs.append(run)
    if arguments.write:
        from tunes import write_measured

        write_measured(HERE / "gpu.json", [{"versions": versions()}, *runs])
    sys.exit(0 if is_reached(runs) else 1)


if __name__ == "__main__":
    main()
