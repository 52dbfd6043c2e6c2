"""transformers.Trainer as the training stages use it: any objective, a step in pieces, one process or several.

A step's documents are the same however it is run. They are shared out over the processes, each of which runs its own in
pieces that fit `tokens_per_batch`; every piece's loss is weighted so that the sum is the mean over the step.
"""

import json
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments

from rgalign import processes
from rgalign.artifacts import write_text

Objective = Callable[[nn.Module, dict[str, Tensor]], tuple[Tensor, Mapping[str, Tensor]]]
Weight = Callable[[dict], int]

COMPLETE = "complete"  # mark in a checkpoint's folder, written last: a killed writer leaves none
SETTINGS = "settings.json"  # what the checkpoints beside it belong to
CHECKPOINTS, LOGS = 8, 40  # a run has about so many; a checkpoint falls on a log, so that a resumed curve is the same
OPTIMIZERS = {"adamw_8bit": "adamw_bnb_8bit"}  # transformers' names; adamw is its default


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the step and the parameter to change."""


@dataclass(frozen=True)
class Engine:
    """How a step is run; alignment.engine and run.precision say so.

    precision               no | bf16: autocast of what is multiplied
    gradient_checkpointing  a layer's states are made again in the backward pass
    tokens_per_batch        padded tokens that a process runs at once; None: all of its documents
    optimizer               adamw | adamw_8bit (bitsandbytes, CUDA)
    """

    precision: str = "no"
    gradient_checkpointing: bool = False
    tokens_per_batch: int | None = None
    optimizer: str = "adamw"


PLAIN = Engine()


@dataclass(frozen=True)
class Share:
    """Collates a step's rows into the pieces of this process: [{.., "share": its weight in the step's mean}].

    weight  what a row counts in the objective's mean (query tokens, pairs); None: the objective evens itself out over
            the processes (alignment.gather), and is not run in pieces
    width   (row) -> tokens of its widest document, and documents in a row
    whole   (rows of the step) -> what every piece's batch must know of them all; None: nothing
    """

    collate: Callable[[list], dict[str, Tensor]]
    weight: Weight | None
    width: Callable[[dict], tuple[int, int]]
    tokens_per_batch: int | None
    whole: Callable[[list], dict[str, Tensor]] | None = None

    def __call__(self, rows: list[dict]) -> dict[str, list[dict]]:
        count, index = processes.count(), processes.index()
        own = [_part(rows, count, each) for each in range(count)]
        pieces = [self._pieces(part or rows[:1]) for part in own]  # fewer rows than processes: one that weighs 0
        most = max(map(len, pieces))  # sharded weights are gathered in every piece: all processes have equally many
        mine = pieces[index] + [pieces[index][-1]] * (most - len(pieces[index]))
        real = len(pieces[index]) if own[index] else 0
        shares = [self._share(piece, rows, count) * (number < real) for number, piece in enumerate(mine)]
        known = self.whole(rows) if self.whole else {}
        return {"pieces": [{**self.collate(piece), **known, "share": s} for piece, s in zip(mine, shares, strict=True)]}

    def _pieces(self, rows: list[dict]) -> list[list[dict]]:
        if self.tokens_per_batch is None or self.weight is None:
            return [rows]
        order = sorted(rows, key=lambda row: -self.width(row)[0])  # the longest first, and stable
        pieces = []
        while order:
            widest, documents = self.width(order[0])
            size = max(1, self.tokens_per_batch // (widest * documents))
            pieces.append(order[:size])
            order = order[size:]
        return pieces

    def _share(self, piece: list[dict], rows: list[dict], count: int) -> float:
        if self.weight is None:
            return 1.0
        # processes' gradients are averaged: count times the piece's part of the step makes that the step's mean
        return count * sum(map(self.weight, piece)) / sum(map(self.weight, rows))


def _part(rows: list[dict], count: int, index: int) -> list[dict]:
    """Rows of one of `count` processes: neighbours, as many as the others have or one more."""
    least, more = divmod(len(rows), count)
    first = index * least + min(index, more)
    return rows[first : first + least + (index < more)]


class StepTrainer(Trainer):
    """The objective's loss over the pieces of `Share`; its other values, as means since the last log, and the seconds
    of all calls in the log."""

    def __init__(self, objective: Objective, *arguments, **more):
        super().__init__(*arguments, **more)
        self.objective, self.seen, self.steps = objective, defaultdict(list), 0

    def get_train_dataloader(self) -> DataLoader:
        """Every process reads every step's rows, in one order; `Share` takes its own."""
        loader = super().get_train_dataloader()
        if processes.several():  # accelerate would deal the batches out
            dealer = loader.batch_sampler
            dealer.num_processes, dealer.process_index, dealer.even_batches = 1, 0, False
        return loader

    def training_step(self, model: nn.Module, inputs: dict[str, list], num_items_in_batch=None) -> Tensor:
        *before, last = inputs["pieces"]
        self.steps += 1
        losses = []
        for piece in before:
            with self.accelerator.no_sync(model):
                losses.append(super().training_step(model, piece))
        return sum(losses, super().training_step(model, last))

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs=False, num_items_in_batch=None):
        batch = dict(inputs)
        share = batch.pop("share")
        with self.accelerator.autocast():
            loss, values = model(batch=batch) if processes.several() else self.objective(model, batch)
        for name, value in values.items():
            self.seen[name].append(value.detach() * share)
        loss = loss * share
        return (loss, None) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not math.isfinite(logs.get("loss", 0)):
            raise TrainingError(
                f"the language model's loss is {logs['loss']} at step {self.state.global_step}: lower this stage's "
                f"learning_rate (it is {self.args.learning_rate:g})"
            )
        if not hasattr(self, "began"):
            self.began = time.perf_counter() - max((e.get("seconds", 0) for e in self.state.log_history), default=0)
        pieces = {name: len(values) / self.steps for name, values in self.seen.items()}
        means = {name: float(over_processes(torch.stack(self.seen[name]).mean()) * pieces[name]) for name in pieces}
        self.seen.clear()
        self.steps = 0
        super().log({**logs, **means, "seconds": time.perf_counter() - self.began}, start_time)


def over_processes(value: Tensor) -> Tensor:
    """The mean of a scalar over the processes."""
    return processes.summed(value.clone()) / processes.count() if processes.several() else value


@contextmanager
def objective_as_forward(model: nn.Module, objective: Objective) -> Iterator[None]:
    """Inside, model(batch=..) is the objective: what wraps a model for several processes sees its forward alone."""
    plain = model.forward

    def forward(*arguments, batch: dict[str, Tensor] | None = None, **more):
        if batch is None:
            return plain(*arguments, **more)
        loss, values = objective(model, batch)
        return loss, {name: value.detach() for name, value in values.items()}

    model.forward = forward
    try:
        yield
    finally:
        model.__dict__.pop("forward", None)


class Mark(TrainerCallback):
    """Marks a checkpoint as whole once everything of it is written, by all processes."""

    def on_save(self, args, state, control, **_) -> None:
        processes.wait_for_all()
        if processes.index() == 0:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


class Bar(TrainerCallback):
    """A progress bar over steps, with the last logged loss."""

    def __init__(self, title: str):
        self.title = title

    def on_train_begin(self, args, state, control, **_) -> None:
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.title, unit="step")

    def on_step_end(self, args, state, control, **_) -> None:
        self.bar.update(1)

    def on_log(self, args, state, control, logs=None, **_) -> None:
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def on_train_end(self, args, state, control, **_) -> None:
        self.bar.close()


def trainer_arguments(
    folder: Path,
    documents: int,
    device: torch.device,
    *,
    epochs: float,
    learning_rate: float,
    warmup: float,
    weight_decay: float,
    documents_per_batch: int,
    seed: int,
    beta2: float,
    neftune: float | None,
    engine: Engine,
) -> TrainingArguments:
    if engine.optimizer in OPTIMIZERS and device.type != "cuda":
        raise TrainingError(f"alignment.engine.optimizer {engine.optimizer} runs on CUDA alone; found {device}")
    steps = max(1, round(epochs * -(-documents // documents_per_batch)))
    logged, more = max(1, steps // LOGS), {}
    if engine.gradient_checkpointing:
        more |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    if engine.optimizer in OPTIMIZERS:
        more["optim"] = OPTIMIZERS[engine.optimizer]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=documents_per_batch,
        learning_rate=learning_rate,
        adam_beta2=beta2,
        lr_scheduler_type="cosine",
        warmup_steps=round(warmup * steps),
        weight_decay=weight_decay,
        neftune_noise_alpha=neftune,
        seed=seed,
        data_seed=seed,
        logging_steps=logged,
        logging_nan_inf_filter=False,
        save_steps=logged * max(1, LOGS // CHECKPOINTS),
        save_total_limit=1,
        use_cpu=device.type == "cpu",
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=device.type != "cpu",
        remove_unused_columns=False,
        bf16=engine.precision == "bf16",
        **more,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # a process has one card; Trainer would deal a batch out to all it sees
    return arguments


def last_checkpoint(folder: Path, identity: dict) -> str | None:
    """The newest whole checkpoint of this very call; all others are removed, and the folder is made."""
    if processes.index() == 0:
        _swept(folder, json.dumps(identity, sort_keys=True))
    processes.wait_for_all()
    whole = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return str(whole[-1]) if whole else None


def _swept(folder: Path, text: str) -> None:
    said = folder / SETTINGS
    if not said.exists() or said.read_text(encoding="utf-8") != text:
        shutil.rmtree(folder, ignore_errors=True)
        write_text(said, text)
    for checkpoint in folder.glob("checkpoint-*"):
        if not (checkpoint / COMPLETE).exists():
            shutil.rmtree(checkpoint)
