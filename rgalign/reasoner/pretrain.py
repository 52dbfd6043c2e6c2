"""Pre-training of the tiny model on transcripts and KB text: prompt in, the query the customer typed out.

METHOD.md 2.1 [C]. Never on clicks. Documents are packed into rows; positions start anew with each document, and
transformers then masks attention across documents by itself.
"""

import copy
import json
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from rgalign.artifacts import write_text
from rgalign.reasoner.model import Reasoner, fingerprint

COMPLETE = "complete"  # mark in a checkpoint's folder, written last: a killed writer leaves none
SETTINGS = "settings.json"  # what the checkpoints beside it belong to
CHECKPOINTS, LOGS = 8, 40  # a run has about so many


def pretrain(
    reasoner: Reasoner,
    prompts: Sequence[Sequence[int]],
    queries: Sequence[Sequence[int]],
    *,
    folder: Path,
    seed: int,
    epochs: float = 2.0,
    learning_rate: float = 4e-3,
    prompt_weight: float = 0.1,
    row_tokens: int = 192,
    tokens_per_batch: int = 3072,
    warmup: float = 0.05,
    weight_decay: float = 0.01,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[Reasoner, pd.DataFrame]:
    """A trained copy of a causal reasoner, and its curve: step, loss (nats a token, weighted), seconds.

    prompts, queries  token ids (Prompter.transcripts; KB intents' prompts with their titles as queries), end id last
    folder            work folder: checkpoints of a killed call, from which the same call goes on to the same weights;
                      it is emptied of those of other settings, and gone at the end
    learning_rate     its peak; rises over the share `warmup` of the steps, then falls to zero as a cosine
    prompt_weight     what a prompt's token counts against a query's; 0: only queries are learnt
    row_tokens        tokens a row; a longer document makes all rows longer. tokens_per_batch: of all its rows
    Runs on the reasoner's device, in one process; random states and accelerate's state stay the caller's.
    Raises ValueError that lists all faults.
    """
    _check(reasoner, prompts, queries, prompt_weight, tokens_per_batch, epochs)
    rows = _Rows(prompts, queries, row_tokens, prompt_weight, reasoner.tokenizer.pad_token_id, seed)
    settings = dict(epochs=epochs, learning_rate=learning_rate, warmup=warmup, weight_decay=weight_decay, seed=seed)
    identity = {"reasoner": fingerprint(reasoner), "rows": rows.digest(), "tokens": tokens_per_batch, **settings}
    model = copy.deepcopy(reasoner.model).train()
    with _borrowed_state():
        arguments = _arguments(folder, rows, reasoner.device, tokens_per_batch, **settings)
        trainer = _Trainer(model, arguments, _collate, rows, callbacks=[_Mark(), *callbacks])
        trainer.remove_callback(PrinterCallback)
        if progress:
            trainer.add_callback(_Bar())
        trainer.train(resume_from_checkpoint=_last_checkpoint(folder, identity))
    shutil.rmtree(folder)
    curve = pd.DataFrame([entry for entry in trainer.state.log_history if "loss" in entry])
    return replace(reasoner, model=model.eval()), curve[["step", "loss", "seconds"]]


class _Rows(torch.utils.data.Dataset):
    """Documents packed into rows of equal length: ids, positions (anew in each document), weight as a target.

    First fit in a random order over the rows that are still open. A document's first token is never a target.
    """

    OPEN = 16  # rows looked at for room; more fill rows better and take longer

    def __init__(self, prompts, queries, row_tokens: int, prompt_weight: float, pad: int, seed: int):
        lengths = [len(prompt) + len(query) for prompt, query in zip(prompts, queries, strict=True)]
        size = max(row_tokens, *lengths)
        number = self._pack(lengths, size, seed)
        shape = (len(number), size)
        self.ids, self.weights = torch.full(shape, pad), torch.zeros(shape)
        self.positions = torch.arange(size).repeat(len(number), 1)
        for row, documents in enumerate(number):
            begin = 0
            for document in documents:
                prompt, end = len(prompts[document]), begin + lengths[document]
                self.ids[row, begin:end] = torch.tensor([*prompts[document], *queries[document]])
                self.positions[row, begin:] = torch.arange(size - begin)
                self.weights[row, begin + 1 : end] = prompt_weight
                self.weights[row, begin + prompt : end] = 1.0
                begin = end
            self.positions[row, begin:] = torch.arange(size - begin)  # padding is a document of its own

    def _pack(self, lengths: Sequence[int], size: int, seed: int) -> list[list[int]]:
        rows: list[list[int]] = []
        open_rows: list[list[int]] = []  # [row, room]
        for document in np.random.default_rng(seed).permutation(len(lengths)).tolist():
            fitting = next((entry for entry in open_rows if entry[1] >= lengths[document]), None)
            if fitting is None:
                fitting = [len(rows), size]
                rows.append([])
                open_rows = [*open_rows[-self.OPEN + 1 :], fitting]
            rows[fitting[0]].append(document)
            fitting[1] -= lengths[document]
        return rows

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.ids[row], self.positions[row], self.weights[row]

    def digest(self) -> str:
        """SHA-256 of all rows."""
        hashed = sha256()
        for part in (self.ids, self.positions, self.weights):
            hashed.update(part.numpy().tobytes())
        return hashed.hexdigest()


def _collate(rows: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
    ids, positions, weights = (torch.stack(part) for part in zip(*rows, strict=True))
    return {"input_ids": ids, "position_ids": positions, "weights": weights}


class _Trainer(Trainer):
    """Cross-entropy by weight, and the seconds of all calls in the log."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs=False, num_items_in_batch=None):
        loss = weighted_loss(model, inputs["input_ids"], inputs["position_ids"], inputs["weights"])
        return (loss, None) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not hasattr(self, "began"):
            self.began = time.perf_counter() - max((e.get("seconds", 0) for e in self.state.log_history), default=0)
        super().log({**logs, "seconds": time.perf_counter() - self.began}, start_time)


def weighted_loss(model: nn.Module, ids: Tensor, positions: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of -log p(next token) in nats; only targets with a weight are put through the language head.

    ids, positions, weights  (rows, tokens); weights[:, i] is what token i counts as a target
    """
    states = model.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[:, :-1]
    counted = weights[:, 1:] > 0
    logits = model.get_output_embeddings()(states[counted])
    losses = functional.cross_entropy(logits.float(), ids[:, 1:][counted], reduction="none")
    weight = weights[:, 1:][counted]
    return (losses * weight).sum() / weight.sum()


class _Mark(TrainerCallback):
    """Marks a checkpoint as whole once everything of it is written."""

    def on_save(self, args, state, control, **_) -> None:
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


class _Bar(TrainerCallback):
    """A progress bar over steps, with the last logged loss."""

    def on_train_begin(self, args, state, control, **_) -> None:
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="pre-training", unit="step")

    def on_step_end(self, args, state, control, **_) -> None:
        self.bar.update(1)

    def on_log(self, args, state, control, logs=None, **_) -> None:
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def on_train_end(self, args, state, control, **_) -> None:
        self.bar.close()


def _arguments(
    folder: Path,
    rows: _Rows,
    device: torch.device,
    tokens_per_batch: int,
    *,
    epochs: float,
    learning_rate: float,
    warmup: float,
    weight_decay: float,
    seed: int,
) -> TrainingArguments:
    batch = max(1, tokens_per_batch // rows.ids.shape[1])
    steps = max(1, round(epochs * -(-len(rows) // batch)))
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(warmup * steps),
        weight_decay=weight_decay,
        seed=seed,
        data_seed=seed,
        logging_steps=max(1, steps // LOGS),
        logging_nan_inf_filter=False,
        save_steps=max(1, steps // CHECKPOINTS),
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
def _borrowed_state() -> Iterator[None]:
    """Trainer seeds python, numpy and torch and sets accelerate up anew; afterwards all is as it was.

    Its own bars (one a checkpoint) and remarks are silent meanwhile.
    """
    python, numpy = random.getstate(), np.random.get_state()
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    shared = [(state, dict(state._shared_state)) for state in (PartialState, AcceleratorState, GradientState)]
    with torch.random.fork_rng():
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
            random.setstate(python)
            np.random.set_state(numpy)
            for state, was in shared:
                state._shared_state.clear()
                state._shared_state.update(was)


def _check(reasoner: Reasoner, prompts, queries, prompt_weight: float, tokens_per_batch: int, epochs: float) -> None:
    faults = []
    if reasoner.kind != "causal":
        faults.append(f"{reasoner.name} is of kind {reasoner.kind}; only a causal model learns to write")
    if len(prompts) != len(queries):
        faults.append(f"there are {len(prompts)} prompts and {len(queries)} queries; each prompt needs its query")
    if not prompts:
        faults.append("there is no transcript to learn from")
    if short := sum(not prompt or not query for prompt, query in zip(prompts, queries, strict=False)):
        faults.append(f"{short} prompts or queries have no token")
    if not 0 <= prompt_weight <= 1:
        faults.append(f"prompt_weight is {prompt_weight}; expected 0 to 1")
    if tokens_per_batch < 1 or epochs <= 0:
        faults.append(f"tokens_per_batch is {tokens_per_batch}, epochs {epochs}; both must be positive")
    if faults:
        raise ValueError("pre-training cannot begin:\n" + "\n".join(f"  {fault}" for fault in faults))
