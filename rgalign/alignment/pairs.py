"""Preference pairs, and what the reference model makes of them: what RG-DPO learns from."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from rgalign.alignment.layouts import Layout, layout_for, query_tokens
from rgalign.alignment.tuning import said_of
from rgalign.reasoner import training
from rgalign.reasoner.model import Reasoner, fingerprint

SIDES = ("chosen", "rejected")
LOG_PROBABILITIES = ("reference_chosen", "reference_rejected")


@dataclass(frozen=True, eq=False)
class Pairs:
    """Preference pairs: two queries of one prompt, as token ids with the end id last, and their rewards (pairs,).

    Raises ValueError that lists all faults.
    """

    prompts: Sequence[Sequence[int]]
    chosen: Sequence[Sequence[int]]
    rejected: Sequence[Sequence[int]]
    reward_chosen: np.ndarray
    reward_rejected: np.ndarray

    def __post_init__(self) -> None:
        faults = []
        counts = {name: len(value) for name, value in vars(self).items()}
        if len(set(counts.values())) > 1:
            faults.append("their parts differ in number: " + ", ".join(f"{n} {name}" for name, n in counts.items()))
        if not counts["prompts"]:
            faults.append("there is no pair")
        for name in ("prompts", *SIDES):
            if empty := sum(not len(ids) for ids in getattr(self, name)):
                faults.append(f"{empty} of {name} have no token")
        if equal := sum(list(one) == list(other) for one, other in zip(self.chosen, self.rejected, strict=False)):
            faults.append(f"{equal} pairs have the same query twice: nothing is preferred")
        for name in ("reward_chosen", "reward_rejected"):
            if bad := int((~np.isfinite(np.asarray(getattr(self, name), dtype=float))).sum()):
                faults.append(f"{bad} of {name} are not finite")
        if faults:
            raise ValueError("these are no preference pairs:\n" + "\n".join(f"  {fault}" for fault in faults))

    def __len__(self) -> int:
        return len(self.prompts)

    def digest(self) -> str:
        """SHA-256 of tokens and rewards."""
        ids = [[list(map(int, row)) for row in rows] for rows in (self.prompts, self.chosen, self.rejected)]
        rewards = [list(map(float, values)) for values in (self.reward_chosen, self.reward_rejected)]
        return sha256(json.dumps([ids, rewards]).encode()).hexdigest()


def reference_log_probabilities(
    reasoner: Reasoner, pairs: Pairs, *, pairs_per_batch: int = 32, progress: bool = True
) -> pd.DataFrame:
    """What `dpo` compares the policy with, one row a pair; to be stored as parquet.

    Columns: reference_chosen, reference_rejected (float32: nats, summed over the query's tokens); checkpoint, pairs
    (digests of what they were made from, the same in every row, so that no other model's are taken for them).
    """
    rows = _documents(pairs)
    layout = layout_for(reasoner.model, rows, pad=reasoner.tokenizer.pad_token_id)
    how = dict(queries=2, rows_per_batch=pairs_per_batch, title="reference", progress=progress)
    both = said_of(reasoner, rows, collate=layout.collate, said=layout.said, width=layout.width, **how)
    columns = dict(zip(LOG_PROBABILITIES, both, strict=True))
    return pd.DataFrame({**columns, "checkpoint": fingerprint(reasoner), "pairs": pairs.digest()})


def reference_faults(reference: pd.DataFrame, checkpoint: str, pairs: Pairs) -> list[str]:
    """Why this is not the reference of this checkpoint (a fingerprint) and these pairs; empty where it is."""
    anew = "make it anew: reference_log_probabilities(reasoner, pairs)"
    if lacking := [name for name in (*LOG_PROBABILITIES, "checkpoint", "pairs") if name not in reference]:
        return [f"the reference has no column {', '.join(lacking)}; {anew}"]
    if len(reference) != len(pairs):
        return [f"the reference has {len(reference)} rows for {len(pairs)} pairs; {anew}"]
    faults = []
    for name, own in (("checkpoint", checkpoint), ("pairs", pairs.digest())):
        if others := sorted(set(reference[name]) - {own}):
            faults.append(f"the reference is of {name} {others[0][:12]}; given is {name} {own[:12]}; {anew}")
    if bad := int((~np.isfinite(reference[list(LOG_PROBABILITIES)].to_numpy())).sum()):
        faults.append(f"{bad} log-probabilities of the reference are not finite; {anew}")
    return faults


class PairDocuments(training.Rows):
    """One pair a row: two documents of one prompt, chosen first, their reference log-probabilities and rewards."""

    def __init__(self, pairs: Pairs, reference: pd.DataFrame):
        documents = _documents(pairs)
        said = reference[list(LOG_PROBABILITIES)].to_numpy().tolist()
        rewards = np.stack([pairs.reward_chosen, pairs.reward_rejected], axis=1).tolist()
        rows = zip(documents, said, rewards, strict=True)
        super().__init__([{**both, "reference": own, "reward": reward} for both, own, reward in rows])


def _documents(pairs: Pairs) -> list[dict]:
    """One pair a row: documents, chosen and rejected, each as of `training.Documents`."""
    sides = [training.Documents(pairs.prompts, getattr(pairs, side)).rows for side in SIDES]
    return [{"documents": both} for both in zip(*sides, strict=True)]


def chosen_tokens(rows: Sequence[dict]) -> dict[str, Tensor]:
    """chosen_tokens (), float32: mean tokens of the chosen queries of a step, of which a batch may be a piece."""
    return {"chosen_tokens": query_tokens(rows)[: len(rows)].float().mean()}


def paired(rows: Sequence[dict], pad: int, layout: Layout) -> dict[str, Tensor]:
    """A batch of this layout, and beside it reference, reward and tokens of the queries, (2 * pairs,): chosen first."""
    both = [(row, side) for side in (0, 1) for row in rows]
    more = {name: torch.tensor([row[name][side] for row, side in both]) for name in ("reference", "reward")}
    return {**layout.collate(rows, pad), **more, "tokens": query_tokens(rows)}
