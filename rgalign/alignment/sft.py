"""RG-SFT: supervised fine-tuning on each session's best query by reward (METHOD.md 2.3, step 2)."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from torch import Tensor

from rgalign.alignment.context import Context
from rgalign.params_training import Sft
from rgalign.reasoner.batches import documents, right_padded
from rgalign.reasoner.model import Reasoner
from rgalign.reasoner.query_loss import learn_queries
from rgalign.reasoner.trainer import Schedule, Setup, no_curve


def train_sft(context: Context, start: Reasoner, best: pd.DataFrame, work: Path) -> tuple[Reasoner, pd.DataFrame]:
    """RG-SFT of a run: the reasoner learns to write each session's best query (preferences.best_queries).

    Returns the tuned reasoner and its curve; `start` and no curve where the step is switched off.
    work: folder of checkpoints, gone at the end.
    """
    if not context.params.alignment.sft.use:
        return start, no_curve()
    if context.recipe.launcher:
        return context.tune_by_processes("sft", start, work, given={"best": best})[:2]
    best = best.iloc[context.drawn(best["session_id"], "sft")]
    prompts, put = context.prompts_by_session(start), context.recipe.prompter(context.shop, start)
    documents = [prompts[session] for session in best["session_id"]], put.queries(best["query"].tolist())
    settings, setup = context.params.alignment.sft, context.setup("sft", work)
    return sft(start, *documents, settings, setup, head=len(put.head))


def first_batch(context: Context, start: Reasoner, best: pd.DataFrame, count: int = 4) -> dict[str, Tensor]:
    """The first targets as a batch of `right_padded`, on the reasoner's device, to look at the loss with."""
    best, prompts = best.head(count), context.prompts_by_session(start)
    queries = context.recipe.prompter(context.shop, start).queries(best["query"].tolist())
    rows = documents([prompts[session] for session in best["session_id"]], queries)
    batch = right_padded(rows, start.tokenizer.pad_token_id)
    return {name: value.to(start.device) for name, value in batch.items()}


def sft(
    reasoner: Reasoner,
    prompts: Sequence[Sequence[int]],
    queries: Sequence[Sequence[int]],
    settings: Sft,
    setup: Setup,
    *,
    head: int = 0,
) -> tuple[Reasoner, pd.DataFrame]:
    """A reasoner tuned to write these queries, and its curve. Arguments: see `learn_queries`."""
    return learn_queries(reasoner, prompts, queries, Schedule.of(settings), setup, title="RG-SFT", head=head)
