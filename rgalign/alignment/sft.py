"""RG-SFT: supervised fine-tuning on the queries that the reward model likes best (METHOD.md 2.3, stage 2)."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor, nn
from transformers import TrainerCallback

from rgalign.alignment.logprobs import query_log_probabilities, trainable, tuned
from rgalign.reasoner import training
from rgalign.reasoner.model import Reasoner, fingerprint


def sft(
    reasoner: Reasoner,
    prompts: Sequence[Sequence[int]],
    queries: Sequence[Sequence[int]],
    *,
    folder: Path,
    seed: int,
    lora: Mapping[str, Any] | None = None,
    epochs: float = 2.0,
    learning_rate: float = 6e-4,
    documents_per_batch: int = 48,
    neftune: float = 5.0,
    warmup: float = 0.05,
    weight_decay: float = 0.01,
    engine: training.Engine = training.PLAIN,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[Reasoner, pd.DataFrame]:
    """A reasoner tuned to write these queries, and its curve: step, loss, seconds.

    prompts, queries  token ids (Prompter.sessions, Prompter.queries), end id last
    folder            work folder, seed, warmup, engine and all else of the loop: as of `training.train`
    lora              as of `tuning.trainable`; None: all weights
    neftune           alpha of the noise on embeddings [P: NEFTune; C: 5]; 0: none
    The loss is the mean of -log p over the batch's query tokens, in nats. Raises ValueError that lists all faults.
    """
    faults = training.document_faults(reasoner, prompts, queries)
    if documents_per_batch < 1 or epochs <= 0:
        faults.append(f"documents_per_batch is {documents_per_batch}, epochs {epochs}; both must be positive")
    if not neftune >= 0:
        faults.append(f"neftune is {neftune}; expected 0 (no noise) or more")
    if faults:
        raise ValueError("RG-SFT cannot begin:\n" + "\n".join(f"  {fault}" for fault in faults))
    documents, model = training.Documents(prompts, queries), trainable(reasoner, lora, seed=seed)
    curve = training.train(
        model,
        documents,
        partial(training.right_padded, pad=reasoner.tokenizer.pad_token_id),
        query_loss,
        folder=folder,
        identity={
            "stage": "sft",
            "reasoner": fingerprint(reasoner),
            "documents": documents.digest(),
            "lora": lora and dict(lora),
        },
        seed=seed,
        epochs=epochs,
        learning_rate=learning_rate,
        documents_per_batch=documents_per_batch,
        warmup=warmup,
        weight_decay=weight_decay,
        neftune=neftune or None,
        weight=query_tokens,
        engine=engine,
        title="RG-SFT",
        progress=progress,
        callbacks=callbacks,
    )
    return tuned(reasoner, model), curve


def query_tokens(row: dict) -> int:
    """Tokens of a row of `training.Documents` that the loss is a mean over."""
    return len(row["input_ids"]) - row["prompt"]


def query_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict]:
    """Mean of -log p per query token of the batch, in nats, as an objective of `training.train`."""
    tokens = (batch["length"] - batch["prompt"]).sum()
    return -query_log_probabilities(model, batch).sum() / tokens, {}
