"""transformers.Trainer for every stage that trains a language model: silent, seeded, resumable to the same bytes.

An objective is any function of (model, batch) that returns a loss and what else is worth a line in the curve. Documents
are prompt and query as token ids; which tokens are the query's is told by position, never by the pad token's id.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from rgalign.reasoner.model import Reasoner
from rgalign.reasoner.sharded import put_together
from rgalign.reasoner.trainer import (
    CHECKPOINTING,
    CHECKPOINTS,
    PLAIN,
    Bar,
    Engine,
    Mark,
    Objective,
    Share,
    StepTrainer,
    TrainingError,
    Weight,
    last_checkpoint,
    objective_as_forward,
    trainer_arguments,
)
from rgalign.run import distributed

__all__ = ["CHECKPOINTS", "Documents", "Engine", "Rows", "TrainingError", "right_padded", "train"]

OWN_LOGS = ("epoch", "grad_norm", "learning_rate", "train_runtime")  # what Trainer adds by itself


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
    weight: Weight | None = None,
    width: Callable[[dict], tuple[int, int]] | None = None,
    whole: Callable[[list], dict[str, Tensor]] | None = None,
    engine: Engine = PLAIN,
    title: str,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> pd.DataFrame:
    """Train a model in place by AdamW. Returns its curve: step, loss, the objective's other values, seconds.

    collate        rows of `documents` -> the batch that `objective` gets; rows come in random order
    folder         work folder: checkpoints of a killed call, from which the same call goes on to the same weights; it
                   is emptied of those of other settings, and gone at the end
    identity       what makes this call this call, beside its settings: digests of model and data (JSON)
    learning_rate  its peak; rises over the share `warmup` of the steps, then falls to zero as a cosine. The customary
                   0.05 [C] keeps AdamW's first steps small, made of averages over a few batches
    neftune        NEFTune's alpha: noise on embeddings in training (Jain et al. 2023); None: none
    weight, width, whole   of a row and of a step, as of `pieces.Share`; width None: that of a row of Documents
    engine         how a step is run: precision, memory
    title          of the progress bar
    Runs on the model's device; where it is called in several processes, with the same arguments in all of them, they
    share out each step. Random states and accelerate's state stay the caller's.
    A step that the device has no memory for is run in smaller pieces, where `weight` says what they weigh, and so are
    those after it; the log says so.
    Raises TrainingError when the loss is not finite, or where memory is short and the step has no pieces.
    """
    settings = dict(epochs=epochs, learning_rate=learning_rate, warmup=warmup, weight_decay=weight_decay, seed=seed)
    settings |= dict(documents_per_batch=documents_per_batch, beta2=beta2, neftune=neftune)
    device = next(model.parameters()).device
    share = Share(collate, weight, width or tokens_of, engine.tokens_per_batch, whole)
    wrapped = objective_as_forward(model, objective) if distributed.several() else nullcontext()
    with borrowed_state(), wrapped:
        arguments = trainer_arguments(folder, len(documents), device, **settings, engine=engine)
        trainer = StepTrainer(
            objective, share, title, model, arguments, train_dataset=documents, callbacks=[Mark(), *callbacks]
        )
        trainer.remove_callback(PrinterCallback)
        if progress and distributed.index() == 0:
            trainer.add_callback(Bar(title))
        identity = {**identity, **settings, "engine": asdict(engine), "processes": distributed.count()}
        trainer.train(resume_from_checkpoint=last_checkpoint(folder, identity))
        put_together(model, trainer.model_wrapped, trainer.accelerator)
        trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
        model.__dict__.pop("forward", None)  # what accelerate put there for autocast
    if engine.gradient_checkpointing:
        getattr(model, f"{CHECKPOINTING}_disable")()
    distributed.wait_for_all()
    if distributed.index() == 0:
        shutil.rmtree(folder)
    curve = pd.DataFrame([entry for entry in trainer.state.log_history if "loss" in entry])
    known = ["step", "loss", *sorted(set(curve) - {"step", "loss", "seconds", *OWN_LOGS}), "seconds"]
    return curve[known]


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


def tokens_of(row: dict) -> tuple[int, int]:
    """Tokens of a row of Documents, and how many documents it is."""
    return len(row["input_ids"]), 1


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
