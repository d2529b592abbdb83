"""Is the plan right? What is planned beside what is measured: four architectures x three strategies x two shapes.

    python benchmarks/plan.py [--models llama qwen3 bert modernbert] [--strategies full top:2 lora:16] [--shapes ...]
        [--precision f32] [--memory-only] [--write]
    python benchmarks/plan.py --large [--strategies full top:2 lora:16 qlora:16]

Models have random weights and eight layers, but for the embedded ones (`llama` is `tiny`, `modernbert` is
`tiny-encoder`); rows are the house pharmacy's, as they are in batches of 32 ("short"), or five to one in batches of 8
("long"). Each cell is three processes. One plans, without weights. One takes the heaviest step four times: what
tensors hold between two steps, each storage once, and what torch's profiler sees the allocator add to that in the
fourth, is the peak ("counted"). One trains two epochs and measures what is resident at most after two steps
("resident") and the mean time of a step, as every run does. Asked for are 5 % of the counted peak, 10 % or 150 MB of
the resident one, whichever is more, and 30 % of the time, each as a share of what was planned; the exit status is 1
where a cell misses. What is resident is planned with what the allocator keeps. `--write` keeps the table in `plan.json`
beside this file. It takes a quarter of an hour on two cores; time means something on an idle machine only.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SHARED = {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 704}
MADE: dict[str, tuple[str, dict[str, Any]]] = {  # Configuration's class, and sizes
    "qwen3": ("Qwen3Config", {**SHARED, "num_key_value_heads": 4, "head_dim": 32, "tie_word_embeddings": True}),
    "bert": ("BertConfig", {**SHARED, "intermediate_size": 1024}),
}
EMBEDDED = {"llama": "tiny", "modernbert": "tiny-encoder"}
TASKS = {"llama": "instruct", "qwen3": "instruct", "bert": "classify", "modernbert": "classify"}
SHAPES = {"short": (800, 1, 32), "long": (1200, 5, 8)}  # Rows read, how many make one, and rows of a step
ASKED = {"counted": 0.05, "resident": 0.10, "step": 0.30}
FREE_BYTES = 150e6  # That the resident peak may be off whatever its size
Cell = dict[str, Any]


def model_folder(model: str, scratch: Path) -> str:
    "A catalogue name, or a folder with random weights and the embedded tokenizer."
    if model in EMBEDDED:
        return EMBEDDED[model]
    folder = scratch / model
    if not folder.exists():
        import torch
        import transformers

        from llmft_nb.bases import find_model, load_tokenizer

        tokenizer = load_tokenizer(find_model("tiny"))[0]
        kind, sizes = MADE[model]
        torch.manual_seed(0)
        config = getattr(transformers, kind)(vocab_size=len(tokenizer), **sizes)
        made = transformers.AutoModelForMaskedLM if model == "bert" else transformers.AutoModelForCausalLM
        made.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def rows_of(task: str, shape: str) -> list[dict[str, Any]]:
    "The house pharmacy's questions, one or several to a row."
    from llmft_nb.rows import read_rows

    n_rows, n_each, _ = SHAPES[shape]
    rows = read_rows("pharmacy").subset(range(n_rows))
    texts = ["\n".join(row["text"] for row in rows.subset(range(i, i + n_each))) for i in range(0, n_rows, n_each)]
    labels = [rows[i]["label"] for i in range(0, n_rows, n_each)]
    if task == "instruct":
        return [{"prompt": text, "completion": f"It is {label}."} for text, label in zip(texts, labels, strict=True)]
    return [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]


def options_of(cell: Cell) -> dict[str, Any]:
    "What is asked of `plan` and of a run alike."
    sizes = {"epochs": 2, "batch_size": SHAPES[cell["shape"]][2], "precision": cell["precision"], "max_length": 512}
    return {"task": TASKS[cell["model"]], "model": cell["folder"], "strategy": cell["strategy"], **sizes}


def planned(cell: Cell) -> Cell:
    "What is planned."
    from llmft_nb.planning import plan

    rows = rows_of(TASKS[cell["model"]], cell["shape"])
    (one,) = plan(rows, leaks="allow", **options_of(cell)).plans
    step_s = {"step_s": one.time.step_s, "words": one.time.words, "between": one.memory.between_steps}
    step_s |= {"planned_resident": one.memory.resident}
    return {"peak": one.memory.peak, "peak_in": one.memory.where, "heavy": one.memory.parts[-1], **step_s}


def made_ready(cell: Cell) -> tuple[Any, Any, Any]:
    "Model, loader and settings, as a run has them."
    from llmft_nb.data import TextDataLoader
    from llmft_nb.hparams import resolve_settings
    from llmft_nb.strategy import parse_strategy
    from llmft_nb.tasks import make_task

    options = options_of(cell)
    task, model, strategy = (options.pop(name) for name in ("task", "model", "strategy"))
    settings, _ = resolve_settings(parse_strategy(strategy), task=task, arguments=options)
    learnt = make_task(task, settings)
    splits = learnt.prepare(rows_of(task, cell["shape"]), None, None, columns=None, leaks="allow")
    ready = learnt.build(model, splits, strategy=strategy, init="pretrained")
    dataset = learnt.dataset(splits.train, ready, splits.label_names)
    return ready, TextDataLoader(dataset, batch_size=settings.batch_size, shuffle=True), settings


def held_bytes() -> int:
    "What all tensors hold, each storage once."
    import torch

    tensors = [one for one in gc.get_objects() if isinstance(one, torch.Tensor)]
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


def counted(cell: Cell) -> Cell:
    "What the heaviest step really holds at its peak."
    import itertools

    from torch.profiler import ProfilerActivity, profile

    from llmft_nb.callbacks import Callback
    from llmft_nb.strategy import parse_strategy
    from llmft_nb.training import LLMTrainer

    class Books(Callback):
        held = 0
        seen: Any = None

        def on_step(self, state: Any, values: Any) -> None:
            if state.step == 3:  # In the second, the first that moves anything, weights are kept to see that they do
                gc.collect()
                self.held, self.seen = held_bytes(), profile(activities=[ProfilerActivity.CPU], profile_memory=True)
                self.seen.__enter__()
            if state.step == 4:
                self.seen.__exit__(None, None, None)
                state.stop = True

    model, loader, settings = made_ready(cell)
    steps = [step for epoch in range(settings.epochs) for step in loader.steps(epoch)]
    step = next(step for step in steps if set(cell["heavy"]) <= set(step))
    loader.steps = lambda epoch: [step] * 5
    books = Books()
    trainer = LLMTrainer(model, settings=settings, strategy=parse_strategy(cell["strategy"]), callbacks=[books])
    trainer.train(loader)
    events = [one for one in books.seen.profiler.kineto_results.events() if one.name() == "[memory]"]
    changes = [one.nbytes() for one in sorted(events, key=lambda one: one.start_ns())]
    return {"counted": books.held + max(itertools.accumulate(changes))}


def trained(cell: Cell) -> Cell:
    "What two epochs take."
    from llmft_nb.plan_check import Meter
    from llmft_nb.strategy import parse_strategy
    from llmft_nb.training import LLMTrainer

    model, loader, settings = made_ready(cell)
    meter = Meter(cell["between"])
    LLMTrainer(model, settings=settings, strategy=parse_strategy(cell["strategy"]), callbacks=[meter]).train(loader)
    return {
        "resident": meter.peak_bytes,
        "step": sum(meter.steps_s) / len(meter.steps_s),
        "n_timed": len(meter.steps_s),
    }


def large(cell: Cell) -> Cell:
    "Seconds and memory of planning eight billion weights for a GPU; nothing of them is here."
    import resource
    import time

    from transformers import Qwen3Config, Qwen3ForCausalLM  # Imports are not counted

    from llmft_nb.bases import find_model, load_tokenizer
    from llmft_nb.data import TextDataLoader
    from llmft_nb.dialogues import InstructDataset, check_instruct
    from llmft_nb.hparams import resolve_settings
    from llmft_nb.memory import plan_memory
    from llmft_nb.modeling import LLMForCausalLM
    from llmft_nb.rehearsal import Job
    from llmft_nb.rows import read_rows
    from llmft_nb.strategy import parse_strategy

    assert Qwen3ForCausalLM
    config, source, strategy = Qwen3Config(**LARGE), find_model("tiny"), parse_strategy(cell["strategy"])
    tokenizer = load_tokenizer(source)[0]
    settings, _ = resolve_settings(strategy, task="instruct", arguments={"precision": "bf16"})
    dataset = InstructDataset(check_instruct(read_rows(rows_of("instruct", "short"))), tokenizer)
    loader = TextDataLoader(dataset, batch_size=settings.batch_size, shuffle=True)
    started_s = time.perf_counter()
    memory = plan_memory(Job(LLMForCausalLM, config, tokenizer, source, loader, settings, strategy, kind="cuda"))
    seconds = time.perf_counter() - started_s
    held = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "held": held, "peak": memory.peak, "peak_in": memory.where}


INSIDE = {"plan": planned, "count": counted, "train": trained}
LARGE = {"vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36}
LARGE |= {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False}
MOST_S, MOST_BYTES = 5.0, 1.5e9  # That planning eight billion weights may take


def in_a_process(what: str, cell: Cell, cache: Path) -> Cell:
    "One of them in a process of its own."
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "LLMFT_CACHE": str(cache)}
    command = [sys.executable, __file__, "--inside", what, json.dumps(cell)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{what} {cell}: exit status {done.returncode}\n{done.stderr[-4000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def misses(cell: Cell) -> list[str]:
    "Which quantities of a cell are farther off than asked."
    found = []
    for name, plan in (("counted", cell["peak"]), ("resident", cell["planned_resident"]), ("step", cell["step_s"])):
        if name in cell:
            off = abs(cell[name] - plan)
            is_free = name == "resident" and off <= FREE_BYTES
            found += [name] if off > ASKED[name] * plan and not is_free else []
    return found


def line_of(cell: Cell) -> str:
    "A cell as a line of the table."
    parts = [f"{cell['model']:<11}{cell['strategy']:<9}{cell['shape']:<6}{cell['peak'] / 1e6:9.1f}"]
    for name, plan, factor in (("counted", cell["peak"], 1e-6), ("resident", cell["planned_resident"], 1e-6)):
        shown = f"{factor * cell[name]:9.1f} {100 * (cell[name] / plan - 1):+5.1f} %" if name in cell else ""
        parts.append(f"{shown:<18}")
    if "step" in cell:
        off = 100 * (cell["step"] / cell["step_s"] - 1)
        parts.append(f"{1e3 * cell['step_s']:8.1f}{1e3 * cell['step']:9.1f} {off:+5.0f} %")
    return "".join(parts) + ("  MISSED: " + ", ".join(misses(cell)) if misses(cell) else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--strategies", nargs="+", default=["full", "top:2", "lora:16"])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--precision", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--memory-only", action="store_true", help="leave out what is resident, and time")
    parser.add_argument("--large", action="store_true", help="instead: how long eight billion weights take to plan")
    parser.add_argument("--write", action="store_true", help="keep the table")
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        what, text = arguments.inside
        print(json.dumps((INSIDE | {"large": large})[what](json.loads(text))))
        return
    if arguments.large:
        with tempfile.TemporaryDirectory() as scratch:
            found = {one: in_a_process("large", {"strategy": one}, Path(scratch)) for one in arguments.strategies}
        for name, one in found.items():
            took = f"planned in {one['seconds']:.1f} s (asked {MOST_S:g})"
            what = f"{took} with {one['held'] / 1e9:.2f} GB (asked {MOST_BYTES / 1e9:g})"
            print(f"8 billion weights, {name:<9}{one['peak'] / 1e9:7.1f} GB, most in: {one['peak_in']:<20} {what}")
        sys.exit(any(one["seconds"] > MOST_S or one["held"] > MOST_BYTES for one in found.values()))
    cells = list[Cell]()
    print("                          peak, MB                                      step, ms")
    print("                           planned  counted           resident          planned measured", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for model in arguments.models:
            for strategy in arguments.strategies:
                for shape in arguments.shapes:
                    cell = {"model": model, "strategy": strategy, "shape": shape, "precision": arguments.precision}
                    cell |= {"folder": model_folder(model, Path(scratch))}
                    for what in ("plan", "count") if arguments.memory_only else INSIDE:
                        cell |= in_a_process(what, cell, Path(scratch) / "cache")
                    cells.append(cell)
                    print(line_of(cell), flush=True)
    missed = sum(bool(misses(cell)) for cell in cells)
    print(f"{len(cells)} cells, {missed} missed")
    if arguments.write:
        from tunes import write_measured

        known = [{name: value for name, value in cell.items() if name not in ("heavy", "folder")} for cell in cells]
        write_measured(HERE / "plan.json", known)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
