"""Pre-training of the tiny model on transcripts and KB text: prompt in, the query the customer typed out.

METHOD.md 2.1 [C]. Never on clicks. Two losses: the next token, and at the prompt's end a look ahead at the whole query.
"""

import copy
import json
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
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
    epochs: float = 3.0,
    learning_rate: float = 4e-3,
    prompt_weight: float = 0.0,
    ahead_weight: float = 1.0,
    documents_per_batch: int = 48,
    warmup: float = 0.05,
    weight_decay: float = 0.01,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[Reasoner, pd.DataFrame]:
    """A trained copy of a causal reasoner, and its curve: step, loss (of both losses, nats), seconds.

    prompts, queries  token ids (Prompter.transcripts; KB intents' prompts with their titles as queries), end id last
    folder            work folder: checkpoints of a killed call, from which the same call goes on to the same weights;
                      it is emptied of those of other settings, and gone at the end
    learning_rate     its peak; rises over the share `warmup` of the steps, then falls to zero as a cosine
    prompt_weight     what a prompt's token counts against a query's; 0: only queries are learnt
    ahead_weight      of `ahead_loss` against the next token's; 0: the prompt's last state only has to know the
                      query's first word, and says little about the rest
    Runs on the reasoner's device, in one process; random states and accelerate's state stay the caller's.
    Raises ValueError that lists all faults.
    """
    weights = {"prompt_weight": prompt_weight, "ahead_weight": ahead_weight}
    _check(reasoner, prompts, queries, weights, documents_per_batch, epochs)
    documents = _Documents(prompts, queries)
    settings = dict(epochs=epochs, learning_rate=learning_rate, warmup=warmup, weight_decay=weight_decay, seed=seed)
    settings |= {"documents_per_batch": documents_per_batch}
    identity = {"reasoner": fingerprint(reasoner), "documents": documents.digest(), **weights, **settings}
    model = copy.deepcopy(reasoner.model).train()
    with _borrowed_state():
        model.ahead = _ahead_head(reasoner)
        arguments = _arguments(folder, len(documents), reasoner.device, **settings)
        collate = partial(_collate, pad=reasoner.tokenizer.pad_token_id)
        trainer = _Trainer(model, arguments, collate, documents, callbacks=[_Mark(), *callbacks], **weights)
        trainer.remove_callback(PrinterCallback)
        if progress:
            trainer.add_callback(_Bar())
        trainer.train(resume_from_checkpoint=_last_checkpoint(folder, identity))
    shutil.rmtree(folder)
    del model.ahead
    curve = pd.DataFrame([entry for entry in trainer.state.log_history if "loss" in entry])
    return replace(reasoner, model=model.eval()), curve[["step", "loss", "seconds"]]


class _Documents(torch.utils.data.Dataset):
    """One document a row: prompt and query."""

    def __init__(self, prompts, queries):
        self.rows = [
            {"input_ids": [*prompt, *query], "prompt": len(prompt)}
            for prompt, query in zip(prompts, queries, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict:
        return self.rows[row]

    def digest(self) -> str:
        """SHA-256 of all documents."""
        return sha256(json.dumps(self.rows).encode()).hexdigest()


def _collate(rows: list[dict], pad: int) -> dict[str, Tensor]:
    """ids (rows, longest), padded on the right: no token of a causal model sees what is to its right, so no mask.

    Rows come in random order [C]: batches of one length would hold one kind of document each, and learn worse.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    ids = [row["input_ids"] + [pad] * (max(lengths) - own) for row, own in zip(rows, lengths, strict=True)]
    prompt = [row["prompt"] for row in rows]
    return {"ids": torch.tensor(ids), "prompt": torch.tensor(prompt), "length": torch.tensor(lengths)}


def _ahead_head(reasoner: Reasoner) -> nn.Linear:
    """The look ahead's own map of the prompt's last state; the identity at first, and thrown away after training."""
    head = nn.Linear(reasoner.hidden_size, reasoner.hidden_size, bias=False)
    nn.init.eye_(head.weight)
    return head.to(reasoner.device)


class _Trainer(Trainer):
    """Both losses by their weights, and the seconds of all calls in the log."""

    def __init__(self, *arguments, prompt_weight: float, ahead_weight: float, **more):
        super().__init__(*arguments, **more)
        self.prompt_weight, self.ahead_weight = prompt_weight, ahead_weight

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs=False, num_items_in_batch=None):
        states = model.base_model(input_ids=inputs["ids"], use_cache=False).last_hidden_state
        head = model.get_output_embeddings()
        loss = next_token_loss(states, head, **inputs, prompt_weight=self.prompt_weight)
        if self.ahead_weight:
            loss = loss + self.ahead_weight * ahead_loss(states, head, model.ahead, **inputs)
        return (loss, None) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not hasattr(self, "began"):
            self.began = time.perf_counter() - max((e.get("seconds", 0) for e in self.state.log_history), default=0)
        super().log({**logs, "seconds": time.perf_counter() - self.began}, start_time)


def next_token_loss(
    states: Tensor, head: nn.Module, *, ids: Tensor, prompt: Tensor, length: Tensor, prompt_weight: float
) -> Tensor:
    """Weighted mean of -log p(next token) in nats; only targets that count are put through the language head.

    states          (rows, tokens, hidden), final hidden states of ids (rows, tokens)
    prompt, length  (rows,) tokens of the prompt, and of prompt and query; what follows is padding
    prompt_weight   what a prompt's token counts as a target, a query's being 1; a document's first token never counts
    """
    place = torch.arange(1, ids.shape[1], device=ids.device)
    asked, real = place >= prompt[:, None], place < length[:, None]
    weight = torch.where(asked, 1.0, prompt_weight) * real  # (rows, tokens - 1)
    counted = weight > 0
    losses = functional.cross_entropy(head(states[:, :-1][counted]).float(), ids[:, 1:][counted], reduction="none")
    return (losses * weight[counted]).sum() / weight.sum()


def ahead_loss(
    states: Tensor, head: nn.Module, ahead: nn.Module, *, ids: Tensor, prompt: Tensor, length: Tensor
) -> Tensor:
    """Mean over a query's words of -log p(word | the prompt's last state) in nats: multi-token prediction [C].

    A language model's state at the prompt's end only has to know the first word of what follows; a large one plans
    the rest all the same, a tiny one does not. `ahead` maps the state before the head, so that writing keeps its own
    distribution (Gloeckle et al. 2024 predict the next few tokens in order; here all words, in any order).
    Arguments as of `next_token_loss`; the end token is no word, and a query without words does not count.
    """
    place = torch.arange(ids.shape[1], device=ids.device)
    word = (place >= prompt[:, None]) & (place < length[:, None] - 1)  # (rows, tokens)
    last = states[torch.arange(len(ids), device=ids.device), prompt - 1]
    log_p = head(ahead(last)).float().log_softmax(dim=1)
    losses = -(log_p.gather(1, ids) * word).sum(dim=1) / word.sum(dim=1).clamp(min=1)
    return losses.sum() / word.any(dim=1).sum().clamp(min=1)


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
    documents: int,
    device: torch.device,
    *,
    epochs: float,
    learning_rate: float,
    warmup: float,
    weight_decay: float,
    documents_per_batch: int,
    seed: int,
) -> TrainingArguments:
    steps = max(1, round(epochs * -(-documents // documents_per_batch)))
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=documents_per_batch,
        learning_rate=learning_rate,
        adam_beta2=0.98,  # a few thousand steps are too few for 0.999 to know its gradients
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


def _check(reasoner: Reasoner, prompts, queries, weights: dict, documents_per_batch: int, epochs: float) -> None:
    faults = []
    if reasoner.kind != "causal":
        faults.append(f"{reasoner.name} is of kind {reasoner.kind}; only a causal model learns to write")
    if len(prompts) != len(queries):
        faults.append(f"there are {len(prompts)} prompts and {len(queries)} queries; each prompt needs its query")
    if not prompts:
        faults.append("there is no transcript to learn from")
    if short := sum(not prompt or not query for prompt, query in zip(prompts, queries, strict=False)):
        faults.append(f"{short} prompts or queries have no token")
    if not 0 <= weights["prompt_weight"] <= 1:
        faults.append(f"prompt_weight is {weights['prompt_weight']}; expected 0 to 1")
    if not weights["ahead_weight"] >= 0:
        faults.append(f"ahead_weight is {weights['ahead_weight']}; expected 0 or more")
    if documents_per_batch < 1 or epochs <= 0:
        faults.append(f"documents_per_batch is {documents_per_batch}, epochs {epochs}; both must be positive")
    if faults:
        raise ValueError("pre-training cannot begin:\n" + "\n".join(f"  {fault}" for fault in faults))
