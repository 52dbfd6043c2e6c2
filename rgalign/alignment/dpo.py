"""RG-DPO: queries of high reward against queries of low reward (METHOD.md 2.3, step 2).

The reference is the checkpoint that training begins from; its log-probabilities are computed once and stored.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from rgalign.alignment.context import Context
from rgalign.alignment.logprobs import ROUNDING, Layout, layout_for, rounding_of
from rgalign.alignment.monitor import EarlyStopping, RewardHackingMonitor
from rgalign.alignment.objectives import OBJECTIVES, PairLogProbabilities
from rgalign.alignment.preferences import (
    PairDocuments,
    Pairs,
    assert_reference_of,
    collate_pairs,
    mean_chosen_tokens,
    reference_log_probabilities,
    to_pairs,
)
from rgalign.params_training import Dpo
from rgalign.reasoner.batches import Task, evaluating, retry_smaller
from rgalign.reasoner.model import Reasoner, fingerprint
from rgalign.reasoner.trainer import Schedule, Setup, fit


def train_dpo(
    context: Context, start: Reasoner, pairs: pd.DataFrame, work: Path, monitor: RewardHackingMonitor | None = None
) -> tuple[Reasoner, pd.DataFrame, pd.DataFrame]:
    """RG-DPO of a run on these pairs (preferences.preference_pairs). Returns reasoner, curve and reference.

    work     folder of checkpoints, gone at the end
    monitor  evaluates the policy `alignment.dpo.looks` times and may stop training
    """
    settings = context.params.alignment.dpo
    if not settings.looks:
        monitor = None
    if context.recipe.launcher:
        how = {"given": {"pairs": pairs}, "watched": monitor is not None}
        aligned, curve, found = context.tune_by_processes("dpo", start, work, **how)
        if monitor is not None:
            monitor.rows.update({int(step): row for step, row in found["looks"].items()})
        return aligned, curve, pd.read_parquet(work / "job" / "reference.parquet")
    prompter = context.recipe.prompter(context.shop, start)
    given = to_pairs(pairs, context.prompts_by_session(start), prompter)
    reference = reference_log_probabilities(start, given)
    setup = context.setup("dpo", work)
    if monitor is not None:
        every = max(1, planned_steps(settings, len(given)) // settings.looks)
        setup = replace(setup, callbacks=[EarlyStopping(start, monitor, every)])
    return *dpo(start, given, settings, setup, reference=reference), reference


def planned_steps(settings: Dpo, pairs: int) -> int:
    """Optimiser steps of RG-DPO on so many pairs."""
    if not settings.use or not pairs:
        return 0
    return max(1, round(settings.epochs * -(-pairs // settings.pairs_per_batch)))


def dpo(
    reasoner: Reasoner, pairs: Pairs, settings: Dpo, setup: Setup, *, reference: pd.DataFrame
) -> tuple[Reasoner, pd.DataFrame]:
    """A reasoner aligned by preference pairs, and its curve.

    reference  `reference_log_probabilities` of this very reasoner and these very pairs
    Curve: step, loss, accuracy (share of pairs with a margin above 0; one within rounding of 0 is half a pair),
    chosen_ratio and rejected_ratio (log of policy to reference, nats a query), margin (beta times what the objective
    sees), preference (the objective alone; loss has the SFT term as well), seconds.
    Raises ValueError where the reference is not of this reasoner and these pairs.
    """
    checkpoint = fingerprint(reasoner)
    assert_reference_of(reference, checkpoint, pairs)
    rows, pad = PairDocuments(pairs, reference), reasoner.tokenizer.pad_token_id
    layout = layout_for(reasoner.model, rows.rows, pad=pad)
    collate = partial(collate_pairs, pad=pad, layout=layout)
    task = Task(
        "RG-DPO",
        rows,
        collate,
        partial(dpo_loss, layout=layout, settings=settings),
        weight=lambda row: 1,
        width=layout.width,
        of_step=mean_chosen_tokens,
    )
    first, rounding = rows.rows[: settings.pairs_per_batch], rounding_of(reasoner.model)
    return fit(
        reasoner,
        task,
        Schedule(settings.epochs, settings.learning_rate, settings.pairs_per_batch, settings.weight_decay),
        setup,
        identity={"reasoner": checkpoint, "settings": settings.model_dump()},
        check=lambda model: _assert_starts_at_reference(model, collate, layout, first, rounding),
    )


def dpo_loss(
    model: nn.Module, batch: Mapping[str, Tensor], *, layout: Layout, settings: Dpo
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss of a batch of `collate_pairs`, and the other columns of the curve."""
    parts = layout.log_probabilities(model, batch), batch["reference"], batch["tokens"], batch["reward"]
    pairs = PairLogProbabilities(*(half for part in parts for half in part.chunk(2)), batch.get("chosen_tokens"))
    compared = pairs.per_token() if settings.length_normalised else pairs
    loss = preference = OBJECTIVES[settings.objective](compared, settings.beta).mean()
    if settings.sft_weight:
        loss = loss + settings.sft_weight * OBJECTIVES["sft"](pairs, settings.beta).mean()
    return loss, {
        "accuracy": _accuracy(compared).mean(),
        "chosen_ratio": (pairs.chosen - pairs.reference_chosen).mean(),
        "margin": settings.beta * compared.margin.mean(),
        "preference": preference,
        "rejected_ratio": (pairs.rejected - pairs.reference_rejected).mean(),
    }


def _accuracy(pairs: PairLogProbabilities) -> Tensor:
    """(rows,) 1 where the margin is positive, 0 where it is negative, 1/2 where it is within rounding of 0.

    At the first step policy and reference agree and the margin's sign is noise that depends on the processor [C]. (TRL
    counts margins above 0.) The rounding is that of float32 in every type: a half-precision model's own is as wide as
    real margins are.
    """
    rounding = ROUNDING[torch.float32] * (pairs.chosen_tokens + pairs.rejected_tokens)
    return torch.where(pairs.margin.abs() <= rounding, 0.5, (pairs.margin > 0).float())


def _assert_starts_at_reference(
    model: nn.Module, collate: Callable[[list], dict[str, Tensor]], layout: Layout, rows: list[dict], rounding: float
) -> None:
    """Policy and reference agree before the first step, without dropout, so that the first DPO loss is ln 2.

    rounding  nats a token by which they may differ
    """
    device = next(model.parameters()).device

    def widest_gap(part: Sequence[dict]) -> float:
        """Nats a token."""
        batch = {name: value.to(device) for name, value in collate(part).items()}
        with torch.no_grad():
            found = layout.log_probabilities(model, batch)
        return float(((found - batch["reference"]).abs() / batch["tokens"]).max())

    with evaluating(model):
        gap = float(np.max([gap for _, gap in retry_smaller(widest_gap, rows, "RG-DPO")]))  # NaN where one is
    if not gap <= rounding:
        raise ValueError(
            f"RG-DPO cannot begin: the reference is not this reasoner's ({gap:.3g} nats a token apart in the first "
            "batch); compute it again: reference_log_probabilities(reasoner, pairs)"
        )
