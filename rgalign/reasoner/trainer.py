"""transformers.Trainer for every stage that trains a language model: silent, seeded, resumable to the same bytes.

A stage is a `Task`: rows, how a batch is made of them, and a loss. `fit` trains a copy of the reasoner on it, by one
process or several. A step that the device has no memory for is run again in smaller micro-batches."""

import json
import logging
import math
import os
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging as transformers_logging

from rgalign.errors import TrainingError
from rgalign.params_training import Contrastive, Lora, Sft
from rgalign.reasoner.adapter import trainable, tuned
from rgalign.reasoner.batches import Loss, MicroBatcher, StepRows, Task, empty_cache, is_out_of_memory
from rgalign.reasoner.model import Reasoner
from rgalign.run import distributed
from rgalign.run.artifacts import write_text

COMPLETE = "complete"  # mark in a checkpoint's folder, written last: a killed writer leaves none
SETTINGS = "settings.json"  # what the checkpoints beside it belong to
CHECKPOINTS, LOGS = 8, 40  # about so many in a training; a checkpoint falls on a log, so that a resumed curve is equal
CHECKPOINTING = "activation_checkpointing"  # as newer releases of transformers call it
if not hasattr(TrainingArguments, CHECKPOINTING):
    CHECKPOINTING = "gradient_checkpointing"
OPTIMIZERS = {"adamw_8bit": "adamw_bnb_8bit"}  # transformers' names; adamw is its default
TRAINER_LOGS = ("epoch", "grad_norm", "learning_rate", "train_runtime")  # what Trainer adds by itself

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Engine:
    """How a step is run: alignment.engine, and run.precision (autocast of matrix products)."""

    precision: str = "no"
    gradient_checkpointing: bool = False
    tokens_per_batch: int | None = None
    optimizer: str = "adamw"


@dataclass(frozen=True)
class Setup:
    """Where and how a training runs, whatever it learns.

    folder  work folder: checkpoints of a killed call, from which the same call goes on to the same weights; those of
            other settings are removed, and it is gone at the end
    lora    low-rank adapter (adapter.trainable); None: all weights are trained
    warmup  share of the steps in which the learning rate rises. The customary 0.05 [C] keeps AdamW's first steps small,
            whose averages are of a few batches
    """

    folder: Path
    seed: int
    lora: Lora | None = None
    engine: Engine = Engine()
    warmup: float = 0.05
    progress: bool = True
    callbacks: Sequence[TrainerCallback] = ()


@dataclass(frozen=True)
class Schedule:
    """AdamW's settings. learning_rate: its peak, after the warm-up; then it falls to zero as a cosine.

    neftune  NEFTune's alpha: noise on embeddings in training (Jain et al. 2023); 0: none
    """

    epochs: float
    learning_rate: float
    documents_per_batch: int
    weight_decay: float = 0.01
    neftune: float = 0.0
    beta2: float = 0.999

    @classmethod
    def of(cls, section: Sft | Contrastive) -> "Schedule":
        """By the params of a step."""
        rows, decay = section.documents_per_batch, section.weight_decay
        return cls(section.epochs, section.learning_rate, rows, decay, section.neftune)


def fit(
    reasoner: Reasoner,
    task: Task,
    schedule: Schedule,
    setup: Setup,
    *,
    identity: Mapping[str, Any],
    modules: Mapping[str, nn.Module] | None = None,
    check: Callable[[nn.Module], None] | None = None,
) -> tuple[Reasoner, pd.DataFrame]:
    """Train a copy of the reasoner. Returns it, and its curve: step, loss, the loss's other values, seconds.

    identity  what checkpoints belong to beside rows and settings: fingerprint of the model, settings of the loss (JSON)
    modules   name -> module that is trained with the model, in place, as its attribute of that name while it trains
    check     is called with the model before the first step, and may raise
    Runs on the model's device. Called in several processes, with the same arguments in all of them, these divide each
    step among them. Random states and accelerate's state stay the caller's.
    Raises ValueError without a row, TrainingError when the loss is not finite, or where memory is short and a step
    cannot be divided.
    """
    if not len(task.rows):
        raise ValueError(f"{task.title} cannot begin: there is nothing to learn from")
    model, engine = trainable(reasoner, setup.lora, seed=setup.seed), setup.engine
    for name, module in (modules or {}).items():
        setattr(model, name, module)  # as part of the model, Trainer trains, saves and resumes it
    if check:
        check(model)
    wrapped = loss_as_forward(model, task.loss) if distributed.several() else nullcontext()
    with borrowed_state(), wrapped:
        arguments = _arguments(task, reasoner.device, schedule, setup)
        callbacks = [MarkComplete(), *setup.callbacks]
        trainer = StepTrainer(task, engine.tokens_per_batch, model, arguments, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        if setup.progress and distributed.index() == 0:
            trainer.add_callback(ProgressBar(task.title))
        rows, lora = sha256(json.dumps(task.rows).encode()).hexdigest(), setup.lora and setup.lora.model_dump()
        settings = asdict(schedule) | {"seed": setup.seed, "warmup": setup.warmup, "engine": asdict(engine)}
        settings |= {"title": task.title, "rows": rows, "lora": lora, "processes": distributed.count(), **identity}
        trainer.train(resume_from_checkpoint=_last_checkpoint(setup.folder, settings))
        unshard(model, trainer.model_wrapped, trainer.accelerator)
        trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
        model.__dict__.pop("forward", None)  # what accelerate put there for autocast
    if engine.gradient_checkpointing:
        getattr(model, f"{CHECKPOINTING}_disable")()
    distributed.wait_for_all()
    if distributed.index() == 0:
        shutil.rmtree(setup.folder)
    for name in modules or {}:
        delattr(model, name)
    curve = pd.DataFrame([entry for entry in trainer.state.log_history if "loss" in entry])
    columns = ["step", "loss", *sorted(set(curve) - {"step", "loss", "seconds", *TRAINER_LOGS}), "seconds"]
    return tuned(reasoner, model), curve[columns]


def no_curve() -> pd.DataFrame:
    """The curve of a step that is switched off."""
    return pd.DataFrame(columns=["step", "loss", "seconds"])


class StepTrainer(Trainer):
    """The task's loss over the micro-batches of a step; its other values are logged as means since the last log, with
    the seconds of all calls."""

    def __init__(self, task: Task, tokens_per_batch: int | None, *arguments, **more):
        rows = {"train_dataset": task.rows, "data_collator": lambda rows: {"step": StepRows(rows)}}
        super().__init__(*arguments, **rows, **more)
        self.task, self.batcher = task, MicroBatcher(task, tokens_per_batch)
        self.values, self.steps = defaultdict(list), 0

    def get_train_dataloader(self) -> DataLoader:
        """Every process reads every step's rows, in one order; the batcher takes its own."""
        loader = super().get_train_dataloader()
        if distributed.several():  # accelerate would divide the batches among the processes
            sampler = loader.batch_sampler
            sampler.num_processes, sampler.process_index, sampler.even_batches = 1, 0, False
        return loader

    def train(self, *arguments, **more):
        self.began = time.perf_counter()
        return super().train(*arguments, **more)

    def training_step(self, model: nn.Module, inputs: dict[str, StepRows], num_items_in_batch=None) -> Tensor:
        """The step's loss. A step that runs out of memory is repeated in smaller micro-batches from the same random
        state, as if `tokens_per_batch` had been that small. Later steps begin with the smaller ones."""
        on_cuda, loss, rows = self.args.device.type == "cuda", None, inputs["step"].rows
        if self.task.draw:
            with kept_random_states():
                rows = self.task.draw(model, rows, self.state.global_step)
        states = torch.get_rng_state(), torch.cuda.get_rng_state(self.args.device) if on_cuda else None
        while loss is None:
            self.step_values = defaultdict(list)
            loss = self._attempt(model, rows)
            if loss is None:
                model.zero_grad()  # of the micro-batches that did fit
                empty_cache()
                torch.set_rng_state(states[0])
                if on_cuda:
                    torch.cuda.set_rng_state(states[1], self.args.device)
        for name, values in self.step_values.items():
            self.values[name] += values
        self.steps += 1
        return loss

    def _attempt(self, model: nn.Module, rows: list[dict]) -> Tensor | None:
        """The loss of all micro-batches; None: one ran out of memory, and they are smaller from now on."""
        *before, last = self.batcher(rows)
        batch, losses = last, []
        try:
            for batch in before:
                with self._accumulating(model):
                    losses.append(super().training_step(model, batch.as_inputs()))
            batch = last
            return sum(losses, super().training_step(model, batch.as_inputs()))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            title = self.task.title
            if distributed.several():  # the other processes are in the middle of the step, and wait
                raise TrainingError(f"{title}: {error}\nLower alignment.engine.tokens_per_batch") from error
            if self.task.weight is None:
                message = f"Its {batch.rows} documents are run at once: lower its documents_per_batch"
                raise TrainingError(f"{title}: {error}\n{message}") from error
            if batch.rows == 1:
                raise
            self.batcher = self.batcher.smaller(batch)
            logger.warning(
                "%s: out of memory with %d rows of %d tokens at once; going on with pieces of %d tokens",
                *(title, batch.rows, batch.tokens, self.batcher.tokens_per_batch),
            )
        return None  # outside of the handler, whose traceback still references the batch

    @contextmanager
    def _accumulating(self, model: nn.Module) -> Iterator[None]:
        """Inside, gradients are only added up: nothing is sent to other processes, and DeepSpeed, which steps wherever
        accelerate says that gradients are complete, takes no step."""
        state = self.accelerator.gradient_state
        complete = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            with self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(complete)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs=False, num_items_in_batch=None):
        batch = dict(inputs)
        weight = batch.pop("loss_weight")
        with self.accelerator.autocast():
            loss, values = model(batch=batch) if distributed.several() else self.task.loss(model, batch)
        for name, value in values.items():
            self.step_values[name].append(value.detach() * weight)
        loss = loss * weight
        return (loss, None) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not math.isfinite(logs.get("loss", 0)):
            raise TrainingError(
                f"the language model's loss is {logs['loss']} at step {self.state.global_step}: lower this stage's "
                f"learning_rate (it is {self.args.learning_rate:g})"
            )
        if not hasattr(self, "before"):  # the seconds of a call that was killed
            self.before = max((entry.get("seconds", 0) for entry in self.state.log_history), default=0)
        means = {}
        for name, values in self.values.items():
            mean = distributed.summed(torch.stack(values).mean()) / distributed.count()
            means[name] = float(mean * (len(values) / self.steps))
        self.values.clear()
        self.steps = 0
        super().log({**logs, **means, "seconds": self.before + time.perf_counter() - self.began}, start_time)


@contextmanager
def loss_as_forward(model: nn.Module, loss: Loss) -> Iterator[None]:
    """Inside, model(batch=..) is the loss: what wraps a model for several processes intercepts its forward alone."""
    plain = model.forward

    def forward(*arguments, batch: dict[str, Tensor] | None = None, **more):
        if batch is None:
            return plain(*arguments, **more)
        found, values = loss(model, batch)
        return found, {name: value.detach() for name, value in values.items()}

    model.forward = forward
    try:
        yield
    finally:
        model.__dict__.pop("forward", None)


class MarkComplete(TrainerCallback):
    """Marks a checkpoint as complete once all processes have written their part of it."""

    def on_save(self, args, state, control, **_) -> None:
        distributed.wait_for_all()
        if distributed.index() == 0:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


class ProgressBar(TrainerCallback):
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


def _arguments(task: Task, device: torch.device, schedule: Schedule, setup: Setup) -> TrainingArguments:
    engine = setup.engine
    if engine.optimizer in OPTIMIZERS and device.type != "cuda":
        raise TrainingError(f"alignment.engine.optimizer {engine.optimizer} runs on CUDA alone; found {device}")
    steps = max(1, round(schedule.epochs * -(-len(task.rows) // schedule.documents_per_batch)))
    logged, more = task.in_turn * max(1, steps // task.in_turn // LOGS), {}
    if engine.gradient_checkpointing:
        more |= {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}}
    if engine.optimizer in OPTIMIZERS:
        more["optim"] = OPTIMIZERS[engine.optimizer]
    arguments = TrainingArguments(
        output_dir=str(setup.folder),
        max_steps=steps,
        per_device_train_batch_size=schedule.documents_per_batch,
        learning_rate=schedule.learning_rate,
        adam_beta2=schedule.beta2,
        lr_scheduler_type="cosine",
        warmup_steps=round(setup.warmup * steps),
        weight_decay=schedule.weight_decay,
        neftune_noise_alpha=schedule.neftune or None,
        seed=setup.seed,
        data_seed=setup.seed,
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
    arguments._n_gpu = min(1, arguments.n_gpu)  # one GPU a process; Trainer would use all that it sees
    return arguments


def _last_checkpoint(folder: Path, settings: dict) -> str | None:
    """The newest complete checkpoint of this very call; all others are removed, and the folder is made."""
    if distributed.index() == 0:
        label, text = folder / SETTINGS, json.dumps(settings, sort_keys=True)
        if not label.exists() or label.read_text(encoding="utf-8") != text:
            shutil.rmtree(folder, ignore_errors=True)
            write_text(label, text)
        for checkpoint in folder.glob("checkpoint-*"):
            if not (checkpoint / COMPLETE).exists():
                shutil.rmtree(checkpoint)
    distributed.wait_for_all()
    return get_last_checkpoint(str(folder))


def is_sharded() -> bool:
    """Whether `accelerate launch` was told to shard the weights (its own environment variables say so)."""
    names = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    return any(os.environ.get(name, "false").lower() == "true" for name in names)


@torch.no_grad()
def unshard(model: nn.Module, wrapped: nn.Module, accelerator: Accelerator) -> None:
    """Make weights that processes share (FSDP, ZeRO-3) whole, to be saved; under ZeRO-3 in the first process alone.

    Called in all processes. wrapped: what accelerate made of the model; neither is to be run again. FSDP's tensors are
    not taken from accelerator.get_state_dict: it gives them to the first process alone, and tied ones twice.
    """
    if hasattr(next(model.parameters()), "ds_id"):
        state = accelerator.get_state_dict(wrapped)
        for name, weight in model.named_parameters() if state else ():
            weight.data = state[name]
    whole: dict[DTensor, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if isinstance(weight, DTensor):
                if weight not in whole:
                    whole[weight] = nn.Parameter(weight.full_tensor(), requires_grad=weight.requires_grad)
                module._parameters[name] = whole[weight]


@contextmanager
def kept_random_states() -> Iterator[None]:
    """Afterwards the random states of python, numpy and torch are as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def borrowed_state() -> Iterator[None]:
    """Trainer seeds python, numpy and torch and sets accelerate up again; afterwards all is as it was. transformers'
    own progress bars and remarks are silent meanwhile."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with kept_random_states(), distributed.kept_state(PartialState, AcceleratorState, GradientState):
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()
