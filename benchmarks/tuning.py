"""Tuning against TRL, measured side by side in one run; rows as in `benchmarks`, which says what they mean.

The same random tiny model, documents, batches, checkpoints and AdamW on the CPU, in float32, all weights learning; both
sides run in this process, on torch's threads as the caller has set them, in turns, and the quickest of the rounds
counts. A rate is that of all steps but the first, which warms up.
"""

import copy
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from benchmarks.embedding import Task
from benchmarks.peers import MISSING, installed, row
from rgalign.alignment.dpo import Pairs, dpo, reference_log_probabilities
from rgalign.alignment.sft import sft
from rgalign.params_training import Dpo, Sft
from rgalign.reasoner.model import Reasoner
from rgalign.reasoner.trainer import CHECKPOINTING, CHECKPOINTS, Setup, borrowed_state

PEER = "trl"  # package
TOLERANCE = 1e-3  # of a loss in nats, between the same steps of both sides
LEARNING_RATE, WEIGHT_DECAY, BETA = 6e-4, 0.01, 0.3
Trained = tuple[float, np.ndarray]  # seconds a step, and the loss of every step


class Titles(NamedTuple):
    """Documents of both sides: prompts of sessions, each with two different titles of intents for queries, as ids."""

    prompts: list[list[int]]
    chosen: list[list[int]]
    rejected: list[list[int]]


def tuning_rows(
    task: Task, *, steps: int = 40, documents: int = 48, pairs: int = 32, seed: int = 0, rounds: int = 3
) -> list[dict]:
    """Optimiser steps a second of RG-SFT and RG-DPO against TRL's SFTTrainer and DPOTrainer.

    documents, pairs  a batch of RG-SFT and of RG-DPO
    Ours computes the reference's log-probabilities once, before the first step. TRL has two rows: as it comes, the
    reference runs in every step, and ours is charged its own reference; with precompute_ref_log_probs neither is.
    equal: the losses of all steps agree to 1e-3 nats.
    """
    how = {"steps": steps, "seed": seed}
    few, many = (_titles(task, steps * size, seed) for size in (pairs, documents))
    alone = partial(_ours_dpo, task.reasoner, few, batch=pairs, **how)
    sides = {
        f"RG-SFT, {steps} steps of {documents} queries": (
            "SFTTrainer", partial(_ours_sft, task.reasoner, many, batch=documents, **how),
            partial(_trl_sft, task.reasoner, many, batch=documents, **how),
        ),
        f"RG-DPO and its reference, {steps} steps of {pairs} pairs": (
            "DPOTrainer", partial(alone, charged=True), partial(_trl_dpo, task.reasoner, few, batch=pairs, **how),
        ),
        f"RG-DPO, reference given, {steps} steps of {pairs} pairs": (
            "DPOTrainer (precompute_ref_log_probs)", alone,
            partial(_trl_dpo, task.reasoner, few, batch=pairs, precompute_ref_log_probs=True, **how),
        ),
    }  # fmt: skip
    found = installed(PEER)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TRL calls settings of transformers by their older names
        return [_row(name, f"TRL {peer}", found, ours, theirs, rounds) for name, (peer, ours, theirs) in sides.items()]


def _row(
    name: str, peer: str, found: str | None, ours: Callable[[], Trained], theirs: Callable[[], Trained], rounds: int
) -> dict:
    tried = [(ours(), theirs() if found else None) for _ in range(rounds)]
    own = 1 / min(seconds for (seconds, _), _ in tried)
    if not found:
        return row(name, peer, MISSING, own, float("nan"), "steps/s", None)
    other = 1 / min(seconds for _, (seconds, _) in tried)
    (_, losses), (_, expected) = tried[-1]
    equal = len(losses) == len(expected) and bool(np.abs(losses - expected).max() <= TOLERANCE)
    return row(name, peer, found, own, other, "steps/s", equal)


def _titles(task: Task, count: int, seed: int) -> Titles:
    """So many documents; a session comes again where there are fewer."""
    rng, put = np.random.default_rng(seed), task.prompter
    prompts = put.sessions(task.sessions)
    titles = put.queries(sorted(set(put.titles.values())))
    first, step = rng.integers(len(titles), size=count), rng.integers(1, len(titles), size=count)
    rejected = [titles[i] for i in (first + step) % len(titles)]
    return Titles([prompts[i % len(prompts)] for i in range(count)], [titles[i] for i in first], rejected)


class Clock(TrainerCallback):
    """Seconds a step, of all steps but the first; a GPU's work is waited for."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **_) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)


def _ours_sft(reasoner: Reasoner, data: Titles, *, batch: int, steps: int, seed: int) -> Trained:
    clock = Clock()
    how = dict(learning_rate=LEARNING_RATE, documents_per_batch=batch, weight_decay=WEIGHT_DECAY)
    with TemporaryDirectory() as work:
        setup = Setup(Path(work) / "sft", seed, warmup=0.0, progress=False, callbacks=[clock])
        _, curve = sft(reasoner, data.prompts, data.chosen, Sft(epochs=1.0, neftune=0.0, **how), setup)
    return clock.seconds, curve["loss"].to_numpy()


def _ours_dpo(reasoner: Reasoner, data: Titles, *, batch: int, steps: int, seed: int, charged: bool = False) -> Trained:
    """charged: the reference's seconds are shared out over the steps."""
    clock, count = Clock(), len(data.prompts)
    pairs = Pairs(*data, reward_chosen=np.ones(count), reward_rejected=np.zeros(count))
    started = time.perf_counter()
    reference = reference_log_probabilities(reasoner, pairs, progress=False)
    spent = time.perf_counter() - started if charged else 0.0
    how = dict(learning_rate=LEARNING_RATE, pairs_per_batch=batch, weight_decay=WEIGHT_DECAY, beta=BETA)
    with TemporaryDirectory() as work:
        setup = Setup(Path(work) / "dpo", seed, warmup=0.0, progress=False, callbacks=[clock])
        _, curve = dpo(reasoner, pairs, Dpo(sft_weight=0.0, epochs=1.0, **how), setup, reference=reference)
    return clock.seconds + spent / steps, curve["loss"].to_numpy()


def _trl_sft(reasoner: Reasoner, data: Titles, *, batch: int, steps: int, seed: int) -> Trained:
    from trl import SFTConfig, SFTTrainer

    table = {"prompt": _text(reasoner, data.prompts), "completion": _text(reasoner, data.chosen)}
    with TemporaryDirectory() as work:
        arguments = SFTConfig(output_dir=work, completion_only_loss=True, **_like_ours(batch, steps, seed))
        return _trained(partial(SFTTrainer, copy.deepcopy(reasoner.model).train(), arguments), table, reasoner)


def _trl_dpo(reasoner: Reasoner, data: Titles, *, batch: int, steps: int, seed: int, **more: Any) -> Trained:
    from trl import DPOConfig, DPOTrainer

    table = {name: _text(reasoner, ids) for name, ids in data._asdict().items()}
    table["prompt"] = table.pop("prompts")
    policy, frozen = copy.deepcopy(reasoner.model).train(), copy.deepcopy(reasoner.model)
    with TemporaryDirectory() as work:
        arguments = DPOConfig(output_dir=work, beta=BETA, **_like_ours(batch, steps, seed), **more)
        return _trained(partial(DPOTrainer, policy, frozen, arguments), table, reasoner)


def _like_ours(batch: int, steps: int, seed: int) -> dict[str, Any]:
    """What makes TRL do what `reasoner.trainer.fit` does, checkpoints included."""
    return dict(
        max_steps=steps, per_device_train_batch_size=batch, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY,
        lr_scheduler_type="cosine", warmup_steps=0, logging_steps=1, save_steps=max(1, steps // CHECKPOINTS),
        save_total_limit=1, seed=seed, data_seed=seed, bf16=False, use_cpu=True, report_to="none",
        disable_tqdm=True, dataloader_pin_memory=False, **{CHECKPOINTING: False},
    )  # fmt: skip


def _trained(trainer_of: Callable, table: Mapping[str, list[str]], reasoner: Reasoner) -> Trained:
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    clock, data = Clock(), Dataset.from_dict(dict(table))
    with borrowed_state():
        trainer = trainer_of(train_dataset=data, processing_class=reasoner.tokenizer, callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return clock.seconds, np.array([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def _text(reasoner: Reasoner, rows: list[list[int]]) -> list[str]:
    """As TRL takes it: it adds the end token by itself, and joins a prompt and its query without a space."""
    words, end = reasoner.tokenizer, reasoner.tokenizer.eos_token_id
    return [" " + " ".join(words.convert_ids_to_tokens([i for i in ids if i != end])) for ids in rows]
