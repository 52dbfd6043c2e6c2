"""RG-DPO: queries of high reward against queries of low reward, in pairs or lists (METHOD.md 2.3, step 2).

The reference is the checkpoint that training begins from; its log-probabilities are computed once and stored.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from rgalign.alignment.context import Context
from rgalign.alignment.grpo import train_grpo
from rgalign.alignment.logprobs import ROUNDING, SEPARATE, Layout, batched, layout_for, query_tokens, rounding_of
from rgalign.alignment.monitor import EarlyStopping, RewardHackingMonitor
from rgalign.alignment.objectives import LIST_OBJECTIVES, OBJECTIVES, ListLogProbabilities, PairLogProbabilities
from rgalign.alignment.preferences import BETWEEN, COLUMNS, no_reference
from rgalign.alignment.rewarding import Rewarder
from rgalign.params_training import Dpo, Grpo
from rgalign.reasoner.batches import Task, documents
from rgalign.reasoner.model import Reasoner, fingerprint
from rgalign.reasoner.prompts import Prompter
from rgalign.reasoner.trainer import Schedule, Setup, fit, no_curve

AGAIN = "compute it again: reference_log_probabilities(reasoner, pairs)"


def train_dpo(
    context: Context,
    start: Reasoner,
    pairs: pd.DataFrame,
    work: Path,
    monitor: RewardHackingMonitor | None = None,
    rewarder: Rewarder | None = None,
) -> tuple[Reasoner, pd.DataFrame, pd.DataFrame]:
    """RG-DPO of a run on these pairs (preferences.preference_pairs), or GRPO in its place (alignment.grpo.use), which
    reads no pair and has no reference table. Returns reasoner, curve and reference.

    work      folder of checkpoints, gone at the end
    monitor   evaluates the policy `alignment.dpo.looks` times and may stop training
    rewarder  of GRPO; None: the monitor's, or the run's own
    Where the step is switched off, or there is no pair: `start`, no curve and no reference.
    """
    settings, on_policy = context.params.alignment.dpo, context.params.alignment.grpo
    steps = planned_steps(settings, len(pairs), on_policy)
    if not steps:
        return start, no_curve(), no_reference()
    if on_policy.use and rewarder is None:
        rewarder = monitor.probe.reward if monitor else Rewarder.load(context, context.run / "models" / "reward")
    if not settings.looks:
        monitor = None
    if context.recipe.launcher:
        how = {"given": {"pairs": pairs}, "watched": monitor is not None}
        aligned, curve, found = context.tune_by_processes("dpo", start, work, **how)
        if monitor is not None:
            monitor.rows.update({int(step): row for step, row in found["looks"].items()})
        return aligned, curve, pd.read_parquet(work / "job" / "reference.parquet")
    setup = context.setup("grpo" if on_policy.use else "dpo", work)
    if monitor is not None:
        setup = replace(setup, callbacks=[EarlyStopping(start, monitor, max(1, steps // settings.looks))])
    if on_policy.use:
        return *train_grpo(context, start, rewarder, setup), no_reference()
    pairs = pairs.iloc[context.drawn(pairs["session_id"], "dpo")]
    given = to_pairs(pairs, context.prompts_by_session(start), context.recipe.prompter(context.shop, start))
    reference = reference_log_probabilities(start, given)
    return *dpo(start, given, settings, setup, reference=reference), reference


def first_batch(
    context: Context, start: Reasoner, policy: Reasoner, pairs: pd.DataFrame, count: int = 4
) -> tuple[dict[str, Tensor], Layout]:
    """The first pairs as a batch of `collate_pairs`, on the policy's device, to look at the loss with; and its layout.
    start: the reference."""
    prompts, put = context.prompts_by_session(start), context.recipe.prompter(context.shop, start)
    own = to_pairs(pairs.head(count)[COLUMNS], prompts, put)  # of lists the best and the worst alone
    rows = _rows(own, reference_log_probabilities(start, own, progress=False), fingerprint(start))
    batch = collate_pairs(rows, policy.tokenizer.pad_token_id, SEPARATE)
    return {name: value.to(policy.device) for name, value in batch.items()}, SEPARATE


def planned_steps(settings: Dpo, pairs: int, grpo: Grpo | None = None) -> int:
    """Optimiser steps of RG-DPO on so many pairs, or of GRPO where it takes its place."""
    if settings.use and grpo is not None and grpo.use:
        return grpo.steps * grpo.inner_steps
    if not settings.use or not pairs:
        return 0
    return max(1, round(settings.epochs * -(-pairs // settings.pairs_per_batch)))


@dataclass(frozen=True, eq=False)
class Pairs:
    """Preference pairs: two queries of one prompt, as token ids with the end id last, and their rewards (pairs,).

    between  of lists: the prompt's other queries, and reward_between, their rewards, for each prompt; empty: pairs
    """

    prompts: Sequence[Sequence[int]]
    chosen: Sequence[Sequence[int]]
    rejected: Sequence[Sequence[int]]
    reward_chosen: np.ndarray
    reward_rejected: np.ndarray
    between: Sequence[Sequence[Sequence[int]]] = ()
    reward_between: Sequence[Sequence[float]] = ()

    def __len__(self) -> int:
        return len(self.prompts)

    def documents(self) -> list[dict]:
        """A row a pair: documents, the chosen and the rejected row of `documents`; of lists then the others, and an
        empty query where a list has fewer than the longest."""
        sides = [self.chosen, self.rejected]
        for place in range(max(map(len, self.between), default=0)):
            sides.append([own[place] if place < len(own) else () for own in self.between])
        return [
            {"documents": list(own)} for own in zip(*(documents(self.prompts, side) for side in sides), strict=True)
        ]

    def digest(self) -> str:
        """SHA-256 of tokens and rewards."""
        ids = [[list(map(int, row)) for row in rows] for rows in (self.prompts, self.chosen, self.rejected)]
        rewards = [list(map(float, values)) for values in (self.reward_chosen, self.reward_rejected)]
        lists = [[list(map(int, query)) for query in own] for own in self.between]
        others = [lists, [list(map(float, own)) for own in self.reward_between]] if lists else []
        return sha256(json.dumps([ids, rewards, *others]).encode()).hexdigest()


def to_pairs(frame: pd.DataFrame, prompts: Mapping[str, Sequence[int]], prompter: Prompter) -> Pairs:
    """What preferences.pairs found, or a parquet table of it, as token ids. prompts, prompter: see there."""
    chosen, rejected = (prompter.queries(frame[side].tolist()) for side in ("chosen", "rejected"))
    rewards = (frame[f"reward_{side}"].to_numpy(dtype=float) for side in ("chosen", "rejected"))
    lists = ()
    if BETWEEN[0] in frame:
        lists = [prompter.queries(list(texts)) for texts in frame[BETWEEN[0]]], frame[BETWEEN[1]].tolist()
    return Pairs([prompts[session] for session in frame["session_id"]], chosen, rejected, *rewards, *lists)


def reference_log_probabilities(reasoner: Reasoner, pairs: Pairs, *, progress: bool = True) -> pd.DataFrame:
    """The log-probabilities that RG-DPO compares the policy with, one row a pair; to be stored as parquet.

    Columns: reference_chosen, reference_rejected (float32: nats, summed over the query's tokens); of lists
    reference_between, those of the others (0: no query); checkpoint, pairs (digests of what they were made from, so
    that another model's reference is refused).
    """
    rows = pairs.documents()
    layout = layout_for(reasoner.model, rows, pad=reasoner.tokenizer.pad_token_id)
    chosen, rejected, *between = batched(
        reasoner, rows, layout, rows_per_batch=32, title="reference", progress=progress
    )
    made_from = {"checkpoint": fingerprint(reasoner), "pairs": pairs.digest()}
    others = {"reference_between": np.transpose(between).tolist()} if between else {}
    return pd.DataFrame({"reference_chosen": chosen, "reference_rejected": rejected, **others, **made_from})


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
    rows, pad = _rows(pairs, reference, checkpoint), reasoner.tokenizer.pad_token_id
    layout, queries = layout_for(reasoner.model, rows, pad=pad), len(rows[0]["documents"]) if rows else 2

    def starts_at_reference(policy: nn.Module) -> None:
        """The first DPO loss is ln 2, but for dropout: policy and reference agree before the first step."""
        first = rows[: settings.pairs_per_batch]
        found, stored = layout.evaluate(policy, first, pad, "RG-DPO"), torch.tensor([row["reference"] for row in first])
        gap = float(
            ((found - stored.T).abs() / query_tokens(first).view(found.shape).clamp(min=1)).max()
        )  # NaN where one is
        if not gap <= rounding_of(reasoner.model):
            raise ValueError(
                f"RG-DPO cannot begin: the reference is not this reasoner's ({gap:.3g} nats a token apart in the first "
                f"batch); {AGAIN}"
            )

    task = Task(
        "RG-DPO",
        rows,
        lambda part: collate_pairs(part, pad, layout),
        lambda model, batch: dpo_loss(model, batch, layout=layout, settings=settings, queries=queries),
        weight=lambda row: 1,
        width=layout.width,
        # mean tokens of the chosen queries of a step, for each of its micro-batches
        of_step=lambda step: {"chosen_tokens": query_tokens(step)[: len(step)].float().mean()},
    )
    schedule = Schedule(settings.epochs, settings.learning_rate, settings.pairs_per_batch, settings.weight_decay)
    identity = {"reasoner": checkpoint, "settings": settings.model_dump()}
    return fit(reasoner, task, schedule, setup, identity=identity, check=starts_at_reference)


def _rows(pairs: Pairs, reference: pd.DataFrame, checkpoint: str) -> list[dict]:
    """A row a pair: its documents, their reference log-probabilities and rewards, chosen first.

    Raises ValueError unless this is the reference of this checkpoint (a fingerprint) and these pairs.
    """
    begin = "RG-DPO cannot begin: the reference"
    if len(reference) != len(pairs):
        raise ValueError(f"{begin} has {len(reference)} rows for {len(pairs)} pairs; {AGAIN}")
    for name, own in (("checkpoint", checkpoint), ("pairs", pairs.digest())):
        if others := sorted(set(reference[name]) - {own}):
            raise ValueError(f"{begin} is of {name} {others[0][:12]}; given is {name} {own[:12]}; {AGAIN}")
    rows = pairs.documents()
    between = reference["reference_between"] if "reference_between" in reference else [()] * len(rows)
    two = reference[["reference_chosen", "reference_rejected"]].to_numpy().tolist()
    log_p = [[*own, *map(float, others)] for own, others in zip(two, between, strict=True)]
    rewards = np.stack([pairs.reward_chosen, pairs.reward_rejected], axis=1).tolist()
    if len(pairs.between):
        rewards = [[*own, *map(float, others)] for own, others in zip(rewards, pairs.reward_between, strict=True)]
    queries = len(rows[0]["documents"]) if rows else 2
    return [
        {**documents, "reference": own, "reward": reward + [0.0] * (queries - len(reward))}
        for documents, own, reward in zip(rows, log_p, rewards, strict=True)
    ]


def collate_pairs(rows: Sequence[dict], pad: int, layout: Layout) -> dict[str, Tensor]:
    """A batch of this layout, and beside it reference, reward and tokens of the queries, (queries * rows,): all chosen
    ones first, then the rejected ones, then the others of lists."""
    more = {name: torch.tensor([row[name] for row in rows]).T.flatten() for name in ("reference", "reward")}
    return {**layout.collate(rows, pad), **more, "tokens": query_tokens(rows)}


def dpo_loss(
    model: nn.Module, batch: Mapping[str, Tensor], *, layout: Layout, settings: Dpo, queries: int = 2
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss of a batch of `collate_pairs`, and the other columns of the curve. queries: of a prompt."""
    parts = layout.log_probabilities(model, batch), batch["reference"], batch["tokens"], batch["reward"]
    parts = [part.view(queries, -1) for part in parts]
    pairs = PairLogProbabilities(*(part[side] for part in parts for side in (0, 1)), batch.get("chosen_tokens"))
    compared = pairs.per_token() if settings.length_normalised else pairs
    if settings.objective in LIST_OBJECTIVES:
        lists = ListLogProbabilities(*(part.T for part in parts), there=parts[2].T > 0)
        lists = lists.per_token() if settings.length_normalised else lists
        loss = preference = LIST_OBJECTIVES[settings.objective](lists, settings.beta).mean()
    else:
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
