"Who trains: ours, and what a user would take instead. Each is given the same job and hands back its losses."

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from works import DECAY, MOST_NORM, WARMUP, WIDTH, Job

LOG_EVERY = 5  # Updates between two losses
Losses = list[tuple[int, float]]  # Updates done, and the mean loss since the last one


def even(losses: Losses) -> Losses:
    "Means over as many updates as everybody else logs; ours are told at the end of an epoch, too."
    found, total, done = Losses(), 0.0, 0
    for update, mean in losses:
        total += mean * (update - done)
        done = update
        if update % LOG_EVERY == 0:
            found.append((update, total / LOG_EVERY))
            total = 0.0
    return found


def ours(job: Job) -> Callable[[], Losses]:
    "LLMTrainer."
    import transformers.optimization  # noqa: F401  The peers' is imported before their time begins, too

    from llmft_nb.data import TextDataLoader
    from llmft_nb.training import LLMTrainer

    trainer = LLMTrainer(
        job.model, settings=job.settings, strategy=job.work.strategy, callbacks=(), log_every=LOG_EVERY
    )
    loader = TextDataLoader(job.train, batch_size=job.work.batch_size, shuffle=True, seed=job.seed)
    return lambda: even(list(trainer.train(loader).losses))


def columns_of(job: Job) -> Any:
    "The same tokens and targets as transformers' collators take them, with the lengths of the rows."
    from datasets import Dataset

    dataset = job.loose or job.train
    rows = [dataset[i] for i in range(len(dataset))]
    found: dict[str, Any] = {"input_ids": [row["input_ids"] for row in rows]}
    found["attention_mask"] = [[1] * len(row["input_ids"]) for row in rows]
    if "token_type_ids" in rows[0]:
        found["token_type_ids"] = [row["token_type_ids"] for row in rows]
    if job.work.task == "classify":
        found["labels"] = [row["label"] for row in rows]
    else:  # Ours stand where the answer is due, theirs where it is written
        found["labels"] = [[-100, *row["labels"][:-1]] for row in rows]
    found["length"] = [len(row["input_ids"]) for row in rows]
    return Dataset.from_dict(found)


def collator_of(job: Job) -> Any:
    "transformers' own for the task: padding to the longest row of a batch."
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

    tokenizer = job.model.tokenizer
    return DataCollatorWithPadding(tokenizer) if job.work.task == "classify" else DataCollatorForSeq2Seq(tokenizer)


def arguments_of(job: Job, folder: str) -> dict[str, Any]:
    "The same numbers as ours, under transformers' names; what is not named is its default."
    work, n_updates = job.work, job.work.epochs * -(-len(job.train) // job.work.batch_size)
    n_loose = len(job.loose or job.train)  # Rows of theirs for an update of ours
    return {
        "output_dir": folder,
        "num_train_epochs": work.epochs,
        "per_device_train_batch_size": -(-n_loose * work.epochs // n_updates) if job.loose else work.batch_size,
        "learning_rate": work.lr,
        "warmup_steps": round(WARMUP * n_updates),
        "weight_decay": DECAY,
        "max_grad_norm": MOST_NORM,
        "lr_scheduler_type": "linear",
        "logging_steps": LOG_EVERY,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "seed": job.seed,
        "disable_tqdm": True,
    }


def told_by(trainer: Any) -> Losses:
    "The losses that a Trainer has logged."
    return [(line["step"], line["loss"]) for line in trainer.state.log_history if "loss" in line]


def trainer_of(job: Job, **options: Any) -> Callable[[], Losses]:
    "transformers' Trainer."
    from transformers import Trainer, TrainingArguments
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    set_verbosity_error()
    disable_progress_bar()
    scratch = tempfile.TemporaryDirectory()
    arguments = TrainingArguments(**arguments_of(job, scratch.name), **options)
    trainer = Trainer(
        model=job.model.network, args=arguments, train_dataset=columns_of(job), data_collator=collator_of(job)
    )

    def run() -> Losses:
        trainer.train()
        scratch.cleanup()
        return told_by(trainer)

    return run


def trl_of(job: Job, packed: bool) -> Callable[[], Losses]:
    "TRL's SFTTrainer, loss on the answers alone; packed, a row holds as many tokens as an update of the others."
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error
    from trl import SFTConfig, SFTTrainer

    set_verbosity_error()
    disable_progress_bar()
    scratch = tempfile.TemporaryDirectory()
    options = arguments_of(job, scratch.name) | {"gradient_checkpointing": False, "max_length": WIDTH}
    if packed:
        width = WIDTH if job.loose else int(job.train.lengths.mean() * job.work.batch_size)
        n_at_once = job.work.batch_size if job.loose else 1
        options |= {"packing": True, "max_length": width, "per_device_train_batch_size": n_at_once}
    rows = columns_of(job).remove_columns(["length", "attention_mask"])
    trainer = SFTTrainer(
        model=job.model.network,
        args=SFTConfig(**options),
        train_dataset=rows,
        processing_class=job.model.tokenizer,
    )

    def run() -> Losses:
        trainer.train()
        scratch.cleanup()
        return told_by(trainer)

    return run


def plain_torch(job: Job) -> Callable[[], Losses]:
    "A loop as one would write it: random batches padded to their longest row, torch's AdamW."
    from torch.utils.data import DataLoader
    from transformers import get_linear_schedule_with_warmup

    network, rows = job.model.network, columns_of(job).remove_columns("length")
    loader = DataLoader(rows, batch_size=job.work.batch_size, shuffle=True, collate_fn=collator_of(job))
    moving = [weight for weight in network.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=job.work.lr, weight_decay=DECAY)
    n_updates = job.work.epochs * len(loader)
    schedule = get_linear_schedule_with_warmup(optimizer, round(WARMUP * n_updates), n_updates)

    def run() -> Losses:
        torch.manual_seed(job.seed)
        network.train()
        losses, pending = list[tuple[int, float]](), list[float]()
        for epoch in range(job.work.epochs):
            for number, batch in enumerate(loader, start=epoch * len(loader) + 1):
                loss = network(**batch).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(moving, MOST_NORM)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                pending.append(loss.item())
                if number % LOG_EVERY == 0:
                    losses.append((number, sum(pending) / len(pending)))
                    pending = []
        return losses

    return run


CONTESTANTS: dict[str, Callable[[Job], Callable[[], Losses]]] = {
    "ours": ours,
    "trainer": trainer_of,
    "trainer, sorted": lambda job: trainer_of(job, train_sampling_strategy="group_by_length"),
    "plain torch": plain_torch,
    "trl": lambda job: trl_of(job, packed=False),
    "trl, packed": lambda job: trl_of(job, packed=True),
}
