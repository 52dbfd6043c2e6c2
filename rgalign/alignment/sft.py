"""RG-SFT: supervised fine-tuning on each session's best query by reward (METHOD.md 2.3, step 2)."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
from torch import Tensor, nn

from rgalign.alignment.context import Context
from rgalign.alignment.logprobs import query_log_probabilities
from rgalign.params_training import Sft
from rgalign.reasoner.batches import Task, documents, right_padded
from rgalign.reasoner.model import Reasoner, fingerprint
from rgalign.reasoner.trainer import Schedule, Setup, fit


def train_sft(context: Context, start: Reasoner, best: pd.DataFrame, work: Path) -> tuple[Reasoner, pd.DataFrame]:
    """RG-SFT of a run: the reasoner learns to write each session's best query (preferences.best_queries).

    Returns the tuned reasoner and its curve. work: folder of checkpoints, gone at the end.
    """
    if context.recipe.launcher:
        return context.tune_by_processes("sft", start, work, given={"best": best})[:2]
    prompts = context.prompts_by_session(start)
    queries = context.recipe.prompter(context.shop, start).queries(best["query"].tolist())
    settings, setup = context.params.alignment.sft, context.setup("sft", work)
    return sft(start, [prompts[session] for session in best["session_id"]], queries, settings, setup)


def sft(
    reasoner: Reasoner, prompts: Sequence[Sequence[int]], queries: Sequence[Sequence[int]], settings: Sft, setup: Setup
) -> tuple[Reasoner, pd.DataFrame]:
    """A reasoner tuned to write these queries, and its curve: step, loss, seconds.

    prompts, queries  token ids (Prompter.sessions, Prompter.queries), end id last
    The loss is the mean of -log p over the batch's query tokens, in nats.
    """
    collate = partial(right_padded, pad=reasoner.tokenizer.pad_token_id)
    rows = documents(prompts, queries)
    task = Task("RG-SFT", rows, collate, query_loss, weight=lambda row: len(row["input_ids"]) - row["prompt"])
    return fit(reasoner, task, Schedule.of(settings), setup, identity={"reasoner": fingerprint(reasoner)})


def query_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict]:
    """Mean of -log p per query token of a batch of `right_padded`, in nats."""
    tokens = (batch["length"] - batch["prompt"]).sum()
    return -query_log_probabilities(model, batch).sum() / tokens, {}
