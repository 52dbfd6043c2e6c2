"""Preference pairs, and what the reference model makes of them: what RG-DPO learns from."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from rgalign.alignment.tuning import log_probabilities
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

    def above(self, min_margin: float) -> np.ndarray:
        """(pairs,) whether the chosen query's reward is higher than the rejected one's by more than this."""
        return np.asarray(self.reward_chosen) - np.asarray(self.reward_rejected) > min_margin

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
    how = dict(documents_per_batch=2 * pairs_per_batch, title="reference", progress=progress)
    both = log_probabilities(reasoner, [*pairs.prompts, *pairs.prompts], [*pairs.chosen, *pairs.rejected], **how)
    columns = dict(zip(LOG_PROBABILITIES, np.split(both, 2), strict=True))
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
    """One pair a row: two documents of one prompt, chosen first, their reference log-probabilities and rewards.

    rows  numbers of the pairs that are kept
    """

    def __init__(self, pairs: Pairs, reference: pd.DataFrame, rows: np.ndarray):
        documents = [training.Documents(pairs.prompts, getattr(pairs, side)) for side in SIDES]
        said = reference[list(LOG_PROBABILITIES)].to_numpy().tolist()
        rewards = np.stack([pairs.reward_chosen, pairs.reward_rejected], axis=1).tolist()
        kept = [
            {"documents": [side[row] for side in documents], "reference": said[row], "reward": rewards[row]}
            for row in rows
        ]
        super().__init__(kept)


def pair_tokens(row: dict) -> tuple[int, int]:
    """Tokens of the longer document of a row of PairDocuments, and that there are two."""
    return max(len(document["input_ids"]) for document in row["documents"]), 2


def chosen_tokens(rows: Sequence[dict]) -> dict[str, Tensor]:
    """chosen_tokens (), float32: mean tokens of the chosen queries of a step, of which a batch may be a piece."""
    tokens = [len(row["documents"][0]["input_ids"]) - row["documents"][0]["prompt"] for row in rows]
    return {"chosen_tokens": torch.tensor(tokens).float().mean()}


def paired(rows: Sequence[dict], pad: int) -> dict[str, Tensor]:
    """A batch of `training.right_padded` with all chosen documents first, then all rejected ones, in one forward.

    Beside it reference and reward, (2 * pairs,) in the same order.
    """
    batch = training.right_padded([row["documents"][side] for side in (0, 1) for row in rows], pad)
    more = {
        name: torch.tensor([row[name][side] for side in (0, 1) for row in rows]) for name in ("reference", "reward")
    }
    return {**batch, **more}
