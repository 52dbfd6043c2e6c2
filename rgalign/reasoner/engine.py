"""transformers.Trainer as the training stages use it: any objective, a step in pieces, one process or several.

A step that a device has no memory for is run anew in smaller pieces; what a step is does not depend on its pieces.
"""

import json
import logging
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
from rgalign.reasoner.memory import is_out_of_memory, let_go
from rgalign.reasoner.pieces import Piece, Share, Step

Objective = Callable[[nn.Module, dict[str, Tensor]], tuple[Tensor, Mapping[str, Tensor]]]

COMPLETE = "complete"  # mark in a checkpoint's folder, written last: a killed writer leaves none
SETTINGS = "settings.json"  # what the checkpoints beside it belong to
CHECKPOINTS, LOGS = 8, 40  # a run has about so many; a checkpoint falls on a log, so that a resumed curve is the same
CHECKPOINTING = "activation_checkpointing"  # as newer releases of transformers call it
if not hasattr(TrainingArguments, CHECKPOINTING):
    CHECKPOINTING = "gradient_checkpointing"
OPTIMIZERS = {"adamw_8bit": "adamw_bnb_8bit"}  # transformers' names; adamw is its default

logger = logging.getLogger(__name__)


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


class StepTrainer(Trainer):
    """The objective's loss over the pieces of `Share`; its other values, as means since the last log, and the seconds
    of all calls in the log.

    title  of what is trained, for the log
    """

    def __init__(self, objective: Objective, share: Share, title: str, *arguments, **more):
        super().__init__(*arguments, data_collator=lambda rows: {"step": Step(rows)}, **more)
        self.objective, self.share, self.title = objective, share, title
        self.seen, self.steps = defaultdict(list), 0

    def get_train_dataloader(self) -> DataLoader:
        """Every process reads every step's rows, in one order; `Share` takes its own."""
        loader = super().get_train_dataloader()
        if processes.several():  # accelerate would deal the batches out
            dealer = loader.batch_sampler
            dealer.num_processes, dealer.process_index, dealer.even_batches = 1, 0, False
        return loader

    def train(self, *arguments, **more):
        self.began = time.perf_counter()
        return super().train(*arguments, **more)

    def training_step(self, model: nn.Module, inputs: dict[str, Step], num_items_in_batch=None) -> Tensor:
        """The step's loss. A step that finds no memory is begun anew in smaller pieces, with the random numbers that it
        began with: as if `tokens_per_batch` had been that small. Later steps begin with the smaller pieces."""
        drawn, loss = random_states(self.args.device), None
        while loss is None:
            self.fresh = defaultdict(list)
            loss = self._attempt(model, inputs["step"].rows)
            if loss is None:
                model.zero_grad()  # of the pieces that did fit
                let_go()
                set_random_states(self.args.device, drawn)
        for name, values in self.fresh.items():
            self.seen[name] += values
        self.steps += 1
        return loss

    def _attempt(self, model: nn.Module, rows: list[dict]) -> Tensor | None:
        """The loss of all pieces of a step; None: one found no memory, and `share` makes smaller ones from now on."""
        *before, last = self.share(rows)
        piece, losses = last, []
        try:
            for piece in before:
                with self._adding_up(model):
                    losses.append(super().training_step(model, piece.as_inputs()))
            piece = last
            return sum(losses, super().training_step(model, piece.as_inputs()))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._make_smaller(piece, error)
        return None  # outside of the handler, whose traceback holds on to the batch

    @contextmanager
    def _adding_up(self, model: nn.Module) -> Iterator[None]:
        """Inside, a piece's gradients are only added to those of the pieces before it: nothing is sent to other
        processes, and DeepSpeed, which steps wherever accelerate says that gradients are complete, takes no step."""
        state = self.accelerator.gradient_state
        complete = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            with self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(complete)

    def _make_smaller(self, piece: Piece, error: Exception) -> None:
        """Half of this piece at once from now on. Raises what is to be said where a piece cannot be halved."""
        if processes.several():  # the others are in the middle of the step, and wait
            raise TrainingError(f"{self.title}: {error}\nLower alignment.engine.tokens_per_batch") from error
        if self.share.weight is None:
            raise TrainingError(
                f"{self.title}: {error}\nIts {piece.rows} documents are run at once: lower its documents_per_batch"
            ) from error
        if piece.rows == 1:
            raise error
        self.share = self.share.smaller(piece)
        logger.warning(
            "%s: out of memory with %d rows of %d tokens at once; going on with pieces of %d tokens",
            *(self.title, piece.rows, piece.tokens, self.share.tokens_per_batch),
        )

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs=False, num_items_in_batch=None):
        batch = dict(inputs)
        share = batch.pop("share")
        with self.accelerator.autocast():
            loss, values = model(batch=batch) if processes.several() else self.objective(model, batch)
        for name, value in values.items():
            self.fresh[name].append(value.detach() * share)
        loss = loss * share
        return (loss, None) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not math.isfinite(logs.get("loss", 0)):
            raise TrainingError(
                f"the language model's loss is {logs['loss']} at step {self.state.global_step}: lower this stage's "
                f"learning_rate (it is {self.args.learning_rate:g})"
            )
        if not hasattr(self, "before"):  # the seconds of a call that was killed
            self.before = max((entry.get("seconds", 0) for entry in self.state.log_history), default=0)
        pieces = {name: len(values) / self.steps for name, values in self.seen.items()}
        means = {name: float(over_processes(torch.stack(self.seen[name]).mean()) * pieces[name]) for name in pieces}
        self.seen.clear()
        self.steps = 0
        super().log({**logs, **means, "seconds": self.before + time.perf_counter() - self.began}, start_time)


def random_states(device: torch.device) -> list[Tensor]:
    """Where torch's random numbers stand: those of the CPU, and of a card's own."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def set_random_states(device: torch.device, states: list[Tensor]) -> None:
    """Draw on from `random_states` of this device."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


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
        more |= {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}}
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
