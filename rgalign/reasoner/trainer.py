"""transformers.Trainer as the training stages use it: any objective, a step in pieces, one process or several.

A step that a device has no memory for is run anew in smaller pieces; what a step is does not depend on its pieces.
"""

import gc
import json
import logging
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments

from rgalign.run import distributed
from rgalign.run.artifacts import write_text

# What to do when a device's memory is too small for a batch: halves of it, and a word in the log.

Row, Result = TypeVar("Row"), TypeVar("Result")
# as devices, the CPU's allocator and cuBLAS (its own workspace) say it
NO_ROOM = ("out of memory", "can't allocate memory", "not enough memory", "cublas_status_alloc_failed")

logger = logging.getLogger(__name__)


def in_halves(
    job: Callable[[Sequence[Row]], Result], rows: Sequence[Row], what: str
) -> Iterator[tuple[Sequence[Row], Result]]:
    """(part, job(part)) for parts that make up `rows`, in order: all of it, or halves of what did not fit.

    what  for the log. A single row that does not fit raises what the device raised.
    """
    waiting = [rows]
    while waiting:
        part = waiting.pop()
        try:
            result = job(part)
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if len(part) < 2 or not is_out_of_memory(error):
                raise
            result = None
        if result is None:  # outside of the handler, whose traceback holds on to the batch
            half = len(part) // 2
            logger.warning("%s: out of memory with %d rows at once; going on with %d", what, len(part), half)
            let_go()
            waiting += [part[half:], part[:half]]
            continue
        yield part, result


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device, or the machine, had no room for what was asked."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(words in str(error).lower() for words in NO_ROOM)


def let_go() -> None:
    """Give back what of a card's memory nobody uses any more; what has failed may hang on in a cycle."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


# The pieces that a training step is run in: which rows each process has, how many at once, and what they weigh.
#
# A step's documents are the same however it is run. They are shared out over the processes, each of which runs its own
# in pieces that fit `tokens_per_batch`; every piece's loss is weighted so that the sum is the mean over the step.

Weight = Callable[[dict], int]


class Step:
    """A step's rows as the loader hands them on: an object, as whoever moves a batch looks at each number of a list."""

    def __init__(self, rows: list[dict]):
        self.rows = rows


@dataclass(frozen=True)
class Piece:
    """Rows that are run at once: their batch, how many they are, how many padded tokens, and their weight in the step's
    mean."""

    batch: dict[str, Tensor]
    rows: int
    tokens: int
    share: float

    def as_inputs(self) -> dict[str, Any]:
        """What Trainer takes for a batch."""
        return {**self.batch, "share": self.share}


@dataclass(frozen=True)
class Share:
    """A step's rows -> the pieces of this process.

    collate rows of a piece -> the objective's batch
    weight  what a row counts in the objective's mean (query tokens, pairs); None: the objective evens itself out over
            the processes (alignment.gather), and is not run in pieces; its batch has `counted`, the rows that do
    width   (row) -> tokens of its widest document, and documents in a row
    whole   (rows of the step) -> what every piece's batch must know of them all; None: nothing
    """

    collate: Callable[[list], dict[str, Tensor]]
    weight: Weight | None
    width: Callable[[dict], tuple[int, int]]
    tokens_per_batch: int | None
    whole: Callable[[list], dict[str, Tensor]] | None = None

    def __call__(self, rows: list[dict]) -> list[Piece]:
        count, index = distributed.count(), distributed.index()
        own = [_part(rows, count, each) for each in range(count)]
        pieces = [self._pieces(part or rows[:1]) for part in own]  # fewer rows than processes: one that weighs 0
        most = max(map(len, pieces))  # sharded weights are gathered in every piece: all processes have equally many
        mine = pieces[index] + [pieces[index][-1]] * (most - len(pieces[index]))
        real = len(pieces[index]) if own[index] else 0
        known = self.whole(rows) if self.whole else {}
        return [
            Piece(
                batch={**self.collate(piece), **known, **self._counted(piece, number < real)},
                rows=len(piece),
                tokens=self._tokens(piece),
                share=self._share(piece, rows, count) * (number < real),
            )
            for number, piece in enumerate(mine)
        ]

    def smaller(self, piece: Piece) -> "Share":
        """The same with half the tokens at once that this piece has: a step's other pieces may have been wider."""
        return replace(self, tokens_per_batch=piece.tokens // 2)

    def _pieces(self, rows: list[dict]) -> list[list[dict]]:
        if self.tokens_per_batch is None or self.weight is None:
            return [rows]
        order = sorted(rows, key=lambda row: -self.width(row)[0])  # the longest first, and stable
        pieces = []
        while order:
            size = max(1, self.tokens_per_batch // self._tokens(order[:1]))
            pieces.append(order[:size])
            order = order[size:]
        return pieces

    def _tokens(self, piece: list[dict]) -> int:
        """Padded tokens of rows that are run at once."""
        widest, documents = max(map(self.width, piece))
        return widest * documents * len(piece)

    def _counted(self, piece: list[dict], real: bool) -> dict[str, Tensor]:
        return {} if self.weight is not None else {"counted": torch.tensor(len(piece) * real)}

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
        if distributed.several():  # accelerate would deal the batches out
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
        if distributed.several():  # the others are in the middle of the step, and wait
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
            loss, values = model(batch=batch) if distributed.several() else self.objective(model, batch)
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
    return distributed.summed(value.clone()) / distributed.count() if distributed.several() else value


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
        distributed.wait_for_all()
        if distributed.index() == 0:
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
    if distributed.index() == 0:
        _swept(folder, json.dumps(identity, sort_keys=True))
    distributed.wait_for_all()
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
