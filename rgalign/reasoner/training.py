"""transformers.Trainer for every stage that trains a language model: silent, seeded, resumable to the same bytes.

An objective is any function of (model, batch) that returns a loss and what else is worth a line in the curve. Documents
are prompt and query as token ids; which tokens are the query's is told by position, never by the pad token's id.
"""

import json
import math
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from rgalign.artifacts import write_text
from rgalign.reasoner.model import Reasoner

Objective = Callable[[nn.Module, dict[str, Tensor]], tuple[Tensor, Mapping[str, Tensor]]]

COMPLETE = "complete"  # mark in a checkpoint's folder, written last: a killed writer leaves none
SETTINGS = "settings.json"  # what the checkpoints beside it belong to
CHECKPOINTS, LOGS = 8, 40  # a run has about so many; a checkpoint falls on a log, so that a resumed curve is the same


def train(
    model: nn.Module,
    documents: Dataset,
    collate: Callable[[list], dict[str, Tensor]],
    objective: Objective,
    *,
    folder: Path,
    identity: Mapping[str, Any],
    seed: int,
    epochs: float,
    learning_rate: float,
    documents_per_batch: int,
    warmup: float = 0.05,
    weight_decay: float = 0.01,
    beta2: float = 0.999,
    neftune: float | None = None,
    title: str,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> pd.DataFrame:
    """Train a model in place by AdamW. Returns its curve: step, loss, the objective's other values, seconds.

    collate        rows of `documents` -> the batch that `objective` gets; rows come in random order
    folder         work folder: checkpoints of a killed call, from which the same call goes on to the same weights; it
                   is emptied of those of other settings, and gone at the end
    identity       what makes this call this call, beside its settings: digests of model and data (JSON)
    learning_rate  its peak; rises over the share `warmup` of the steps, then falls to zero as a cosine
    neftune        NEFTune's alpha: noise on embeddings in training (Jain et al. 2023); None: none
    title          of the progress bar
    Runs on the model's device, in one process; random states and accelerate's state stay the caller's.
    Raises TrainingError when the loss is not finite.
    """
    settings = dict(epochs=epochs, learning_rate=learning_rate, warmup=warmup, weight_decay=weight_decay, seed=seed)
    settings |= dict(documents_per_batch=documents_per_batch, beta2=beta2, neftune=neftune)
    device = next(model.parameters()).device
    with borrowed_state():
        arguments = _arguments(folder, len(documents), device, **settings)
        trainer = _Trainer(objective, model, arguments, collate, documents, callbacks=[_Mark(), *callbacks])
        trainer.remove_callback(PrinterCallback)
        if progress:
            trainer.add_callback(_Bar(title))
        trainer.train(resume_from_checkpoint=_last_checkpoint(folder, {**identity, **settings}))
    shutil.rmtree(folder)
    curve = pd.DataFrame([entry for entry in trainer.state.log_history if "loss" in entry])
    known = ["step", "loss", *sorted(set(curve) - {"step", "loss", "seconds", *OWN_LOGS}), "seconds"]
    return curve[known]


OWN_LOGS = ("epoch", "grad_norm", "learning_rate", "train_runtime")  # what Trainer adds by itself


class Rows(Dataset):
    """What a stage learns from: a list of dicts that JSON can say."""

    def __init__(self, rows: list[dict]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict:
        return self.rows[row]

    def digest(self) -> str:
        """SHA-256 of all rows."""
        return sha256(json.dumps(self.rows).encode()).hexdigest()


class Documents(Rows):
    """One document a row: prompt and query, as token ids."""

    def __init__(self, prompts: Sequence[Sequence[int]], queries: Sequence[Sequence[int]]):
        pairs = zip(prompts, queries, strict=True)
        super().__init__([{"input_ids": [*prompt, *query], "prompt": len(prompt)} for prompt, query in pairs])


def right_padded(rows: Sequence[dict], pad: int) -> dict[str, Tensor]:
    """A batch of rows of Documents: ids (rows, longest); prompt (rows,), tokens of the prompt; length (rows,), of both.

    Padded on the right: no token of a causal model sees what is to its right, so no mask. The end token may be the pad
    token: what is padding is told by length alone.
    Rows come in random order [C]: batches of one length would hold one kind of document each, and learn worse.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    ids = [row["input_ids"] + [pad] * (max(lengths) - own) for row, own in zip(rows, lengths, strict=True)]
    prompt = [row["prompt"] for row in rows]
    return {"ids": torch.tensor(ids), "prompt": torch.tensor(prompt), "length": torch.tensor(lengths)}


def document_faults(
    reasoner: Reasoner, prompts: Sequence[Sequence[int]], queries: Sequence[Sequence[int]]
) -> list[str]:
    """Why this reasoner cannot learn to write these queries; empty where it can."""
    faults = []
    if reasoner.kind != "causal":
        faults.append(f"{reasoner.name} is of kind {reasoner.kind}; only a causal model learns to write")
    if len(prompts) != len(queries):
        faults.append(f"there are {len(prompts)} prompts and {len(queries)} queries; each prompt needs its query")
    if not len(prompts):
        faults.append("there is no document to learn from")
    if short := sum(not len(prompt) or not len(query) for prompt, query in zip(prompts, queries, strict=False)):
        faults.append(f"{short} prompts or queries have no token")
    longest = max((len(prompt) + len(query) for prompt, query in zip(prompts, queries, strict=False)), default=0)
    if reasoner.positions is not None and longest > reasoner.positions:
        faults.append(f"a prompt and its query have {longest} tokens; the model can read {reasoner.positions} at most")
    return faults


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the step and the parameter to change."""


class _Trainer(Trainer):
    """The objective's loss; its other values, as means since the last log, and the seconds of all calls in the log."""

    def __init__(self, objective: Objective, *arguments, **more):
        super().__init__(*arguments, **more)
        self.objective, self.seen = objective, defaultdict(list)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs=False, num_items_in_batch=None):
        loss, values = self.objective(model, inputs)
        for name, value in values.items():
            self.seen[name].append(value.detach())
        return (loss, None) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not math.isfinite(logs.get("loss", 0)):
            raise TrainingError(
                f"the language model's loss is {logs['loss']} at step {self.state.global_step}: lower this stage's "
                f"learning_rate (it is {self.args.learning_rate:g})"
            )
        if not hasattr(self, "began"):
            self.began = time.perf_counter() - max((e.get("seconds", 0) for e in self.state.log_history), default=0)
        means = {name: float(torch.stack(values).mean()) for name, values in self.seen.items()}
        self.seen.clear()
        super().log({**logs, **means, "seconds": time.perf_counter() - self.began}, start_time)


class _Mark(TrainerCallback):
    """Marks a checkpoint as whole once everything of it is written."""

    def on_save(self, args, state, control, **_) -> None:
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


class _Bar(TrainerCallback):
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


def _arguments(
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
) -> TrainingArguments:
    steps = max(1, round(epochs * -(-documents // documents_per_batch)))
    logged = max(1, steps // LOGS)
    return TrainingArguments(
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
    )


def _last_checkpoint(folder: Path, identity: dict) -> str | None:
    """The newest whole checkpoint of this very call; all others are removed, and the folder is made."""
    text = json.dumps(identity, sort_keys=True)
    said = folder / SETTINGS
    if not said.exists() or said.read_text(encoding="utf-8") != text:
        shutil.rmtree(folder, ignore_errors=True)
        write_text(said, text)
    for checkpoint in folder.glob("checkpoint-*"):
        if not (checkpoint / COMPLETE).exists():
            shutil.rmtree(checkpoint)
    whole = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return str(whole[-1]) if whole else None


@contextmanager
def kept_random_states() -> Iterator[None]:
    """Afterwards python, numpy and torch draw on as if nothing had been drawn inside."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def borrowed_state() -> Iterator[None]:
    """Trainer seeds python, numpy and torch and sets accelerate up anew; afterwards all is as it was.

    Its own bars (one a checkpoint) and remarks are silent meanwhile.
    """
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    shared = [(state, dict(state._shared_state)) for state in (PartialState, AcceleratorState, GradientState)]
    with kept_random_states():
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
            for state, was in shared:
                state._shared_state.clear()
                state._shared_state.update(was)
