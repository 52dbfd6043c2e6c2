"""RG-DPO: what the reward model likes best against what it likes least (METHOD.md 2.3, stage 2).

The reference is the checkpoint that training begins from; its log-probabilities are computed once and stored:

reference = reference_log_probabilities(reasoner, pairs)
aligned, curve = dpo(reasoner, pairs, reference=reference, folder=work, seed=0)
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from rgalign.alignment.logprobs import ROUNDING, Layout, Watch, layout_for, rounding_of, trainable, tuned
from rgalign.alignment.objectives import OBJECTIVES, PairLogProbabilities
from rgalign.alignment.preferences import (
    PairDocuments,
    Pairs,
    chosen_tokens,
    paired,
    reference_faults,
    reference_log_probabilities,
)
from rgalign.errors import nearest
from rgalign.reasoner import training
from rgalign.reasoner.model import Reasoner, fingerprint
from rgalign.reasoner.trainer import in_halves

__all__ = ["Pairs", "dpo", "reference_log_probabilities"]


def dpo(
    reasoner: Reasoner,
    pairs: Pairs,
    *,
    reference: pd.DataFrame,
    folder: Path,
    seed: int,
    objective: str = "dpo",
    beta: float = 0.3,
    sft_weight: float = 1.0,
    length_normalised: bool = False,
    lora: Mapping[str, Any] | None = None,
    epochs: float = 1.0,
    learning_rate: float = 1e-4,
    pairs_per_batch: int = 32,
    warmup: float = 0.05,
    weight_decay: float = 0.01,
    engine: training.Engine = training.PLAIN,
    watch: Callable[[Reasoner, int], bool] | None = None,
    watch_steps: int = 50,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[Reasoner, pd.DataFrame]:
    """A reasoner aligned by preference pairs, and its curve.

    reference          of `reference_log_probabilities`, by this very reasoner of these very pairs
    objective          a name of objectives.OBJECTIVES; beta is its scale [C: 0.2 to 0.3; below, the reward is hacked]
    sft_weight         of the chosen queries' -log p per token beside it; keeps them likely, not just likelier [C]
    length_normalised  whether the objective sees log-probabilities per token
    lora               as of `tuning.trainable`; folder, seed, engine and the loop's settings: as of `training.train`
    watch              called with the policy in eval mode and the step, every `watch_steps` steps; True stops training
    Curve: step, loss, accuracy (share of pairs with a margin above 0; one within rounding of 0 is half a pair),
    chosen_ratio and rejected_ratio (log of policy to reference, nats a query), margin (beta times what the objective
    sees), preference (the objective alone; loss has the SFT term as well), seconds.
    Raises ValueError that lists all faults, or says that the reference is not what this reasoner says.
    """
    positive = dict(beta=beta, epochs=epochs, pairs_per_batch=pairs_per_batch, watch_steps=watch_steps)
    checkpoint = fingerprint(reasoner)
    _check(reasoner, pairs, objective, sft_weight, positive, reference_faults(reference, checkpoint, pairs))
    documents = PairDocuments(pairs, reference)
    pad = reasoner.tokenizer.pad_token_id
    layout = layout_for(reasoner.model, documents.rows, pad=pad)
    collate = partial(paired, pad=pad, layout=layout)
    model = trainable(reasoner, lora, seed=seed)
    _check_start(model, collate, layout, documents.rows[:pairs_per_batch], rounding_of(reasoner.model))
    how = dict(objective=objective, beta=beta, sft_weight=sft_weight, length_normalised=length_normalised)
    identity = {"stage": "dpo", "reasoner": checkpoint, "pairs": documents.digest(), **how}
    curve = training.train(
        model,
        documents,
        collate,
        partial(_loss, layout=layout, **how),
        folder=folder,
        identity={**identity, "lora": lora and dict(lora)},
        seed=seed,
        epochs=epochs,
        learning_rate=learning_rate,
        documents_per_batch=pairs_per_batch,
        warmup=warmup,
        weight_decay=weight_decay,
        weight=lambda row: 1,
        width=layout.width,
        whole=chosen_tokens,
        engine=engine,
        title="RG-DPO",
        progress=progress,
        callbacks=[*callbacks, *([Watch(reasoner, watch, watch_steps)] if watch else [])],
    )
    return tuned(reasoner, model), curve


def _loss(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    layout: Layout,
    objective: str,
    beta: float,
    sft_weight: float,
    length_normalised: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss of a batch of `paired`, and what of it is worth a line in the curve."""
    parts = layout.said(model, batch), batch["reference"], batch["tokens"], batch["reward"]
    pairs = PairLogProbabilities(*(half for part in parts for half in part.chunk(2)), batch.get("chosen_tokens"))
    seen = pairs.per_token() if length_normalised else pairs
    loss = preference = OBJECTIVES[objective](seen, beta).mean()
    if sft_weight:
        loss = loss + sft_weight * OBJECTIVES["sft"](pairs, beta).mean()
    return loss, {
        "accuracy": _ahead(seen).mean(),
        "chosen_ratio": (pairs.chosen - pairs.reference_chosen).mean(),
        "margin": beta * seen.margin.mean(),
        "preference": preference,
        "rejected_ratio": (pairs.rejected - pairs.reference_rejected).mean(),
    }


def _ahead(pairs: PairLogProbabilities) -> Tensor:
    """(rows,) 1 where the chosen query is ahead, 0 where the rejected one is, 1/2 where rounding decides.

    At the first step policy and reference agree and the margin's sign is noise: it would count the processor [C]. (TRL
    counts margins above 0.) The rounding is that of float32 in every type: a half-precision model's own is as wide as
    real margins are.
    """
    rounding = ROUNDING[torch.float32] * (pairs.chosen_tokens + pairs.rejected_tokens)
    return torch.where(pairs.margin.abs() <= rounding, 0.5, (pairs.margin > 0).float())


def _check_start(
    model: nn.Module, collate: Callable[[list], dict[str, Tensor]], layout: Layout, rows: list[dict], rounding: float
) -> None:
    """Policy and reference agree before the first step, so that the first DPO loss is ln 2; without dropout.

    rounding  nats a token that they may be apart
    """
    device = next(model.parameters()).device

    def widest_gap(part: Sequence[dict]) -> float:
        """Nats a token."""
        batch = {name: value.to(device) for name, value in collate(part).items()}
        with torch.no_grad():
            found = layout.said(model, batch)
        return float(((found - batch["reference"]).abs() / batch["tokens"]).max())

    model.eval()
    gaps = [gap for _, gap in in_halves(widest_gap, rows, "RG-DPO")]
    model.train()
    gap = float(np.max(gaps))  # NaN where one is
    if not gap <= rounding:
        raise ValueError(
            f"RG-DPO cannot begin: the reference is not what this reasoner says ({gap:.3g} nats a token apart "
            "in the first batch); make it anew: reference_log_probabilities(reasoner, pairs)"
        )


def _check(
    reasoner: Reasoner,
    pairs: Pairs,
    objective: str,
    sft_weight: float,
    positive: Mapping[str, float],
    more: Sequence[str],
) -> None:
    """Raises ValueError that lists all faults; positive are the settings that must be, more are faults known before."""
    faults = list(more)
    if objective not in OBJECTIVES:
        faults.append(f"objective is {objective!r}; expected {' | '.join(OBJECTIVES)}{nearest(objective, OBJECTIVES)}")
    faults += [f"{name} is {value}; expected more than 0" for name, value in positive.items() if not value > 0]
    if not sft_weight >= 0:
        faults.append(f"sft_weight is {sft_weight}; expected 0 or more")
    both = [training.document_faults(reasoner, pairs.prompts, queries) for queries in (pairs.chosen, pairs.rejected)]
    faults += dict.fromkeys([*both[0], *both[1]])
    if faults:
        raise ValueError("RG-DPO cannot begin:\n" + "\n".join(f"  {fault}" for fault in faults))
