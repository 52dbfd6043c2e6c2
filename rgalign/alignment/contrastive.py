"""RG-CL: contrastive alignment of the reasoner's embedding with the intents in the ranker's space.

METHOD.md 2.3, step 3 [P]: InfoNCE pulls e_q, through the frozen ranker's query tower, to the clicked intent [C: which
space]. Only the reasoner learns. It is the one stage of alignment that an encoder can go through: nothing is decoded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from rgalign.alignment.gather import evened, gathered
from rgalign.alignment.info_nce import (
    SIMILARITIES,
    RankingSpace,
    alignment,
    contrastive_loss,
    effective_rank,
    ranker_nce,
    space_faults,
    uniformity,
)
from rgalign.alignment.logprobs import trainable, tuned
from rgalign.reasoner import training
from rgalign.reasoner.embed import pool
from rgalign.reasoner.model import Reasoner, fingerprint
from rgalign.reasoner.pretrain import next_token_loss
from rgalign.run import distributed


def contrastive(
    reasoner: Reasoner,
    prompts: Sequence[Sequence[int]],
    *,
    spaces: Sequence[RankingSpace],
    clicked: Sequence[int] | np.ndarray | Tensor,
    hard: Sequence[Sequence[int]] | np.ndarray | Tensor,
    also: Sequence[Sequence[int]] | np.ndarray | Tensor | None = None,
    queries: Sequence[Sequence[int]] | None = None,
    asked: Sequence[Sequence[int]] | None = None,
    folder: Path,
    seed: int,
    lora: Mapping[str, Any] | None = None,
    epochs: float = 4.0,
    learning_rate: float = 1.5e-3,
    documents_per_batch: int = 48,
    temperature: float = 1.0,
    similarity: str = "ranker",
    in_batch: bool = True,
    symmetric: float = 0.0,
    lm_weight: float = 0.3,
    neftune: float | None = None,
    warmup: float = 0.05,
    weight_decay: float = 0.01,
    engine: training.Engine = training.PLAIN,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[Reasoner, pd.DataFrame]:
    """A copy of the reasoner, aligned, and its curve. e_q is the prompt's vector as `embed` makes it.

    prompts     token ids of what is embedded of sessions with a click
    spaces      of one ranker or several, frozen; the loss is the mean over them: no one ranker is to be flattered
    clicked     (rows,) row of the clicked intent in the knowledge base
    hard        (rows, h) rows of hard negatives, -1: none; intents that the reward model ranks high, not clicked [C]
    also        (rows, a) rows of what a session clicked beside `clicked`, -1: none; never its negatives. None: nothing
    queries     token ids, end id last, of each session's query, for a language term beside it (causal only): the
                reasoner is not to forget how to write; only these tokens count. []: none of this session; None: no
                such term
    asked       token ids of what `queries` are written after, where that is not what is embedded (reasoner.embed
                prompt_query); they are then read in a run of their own. None: `prompts`
    lora        rank, alpha, dropout, targets of an adapter (alignment.tuning); None: all weights learn
    similarity  ranker: the ranker's score of session and intent (info_nce.ranker_nce); cosine | dot: of the query
                branch alone (info_nce.info_nce) [C]
    in_batch, temperature, symmetric   as of `info_nce.contrastive_loss`; symmetric is not for the ranker's score
    lm_weight   of the language term, mean nats a token of the queries; 0: no such term [C]
    The rest as of `reasoner.training.train`; all defaults are choices [C] (those of a tiny model).
    Curve: step, loss, seconds; contrastive and, where there is one, language: its two parts; effective_rank,
    uniformity and alignment (`collapse`) of a batch's queries in the ranking space, means since the last step shown.
    Raises ValueError that lists all faults.
    """
    queries = queries if lm_weight else None
    asked = asked if queries is not None else None
    how = dict(temperature=temperature, similarity=similarity, in_batch=in_batch, symmetric=symmetric)
    also = np.zeros((len(prompts), 0)) if also is None else also
    clicked, hard, also = (np.asarray(each, dtype=np.int64) for each in (clicked, hard, also))
    faults = space_faults(spaces, len(prompts), scored=similarity == "ranker")
    kb = min((len(space.intents) for space in spaces), default=0)
    faults += _row_faults(prompts, queries, kb, clicked=clicked, hard=hard, also=also)
    faults += _fit_faults(reasoner, spaces, prompts, queries, asked)
    faults += _setting_faults(hard, documents_per_batch, epochs, lm_weight, **how)
    if faults:
        raise ValueError("contrastive alignment cannot begin:\n" + "\n".join(f"  {fault}" for fault in faults))
    documents = _Sessions(prompts, queries, clicked, hard, also, asked)
    how["lm_weight"] = lm_weight if queries is not None else 0.0
    identity = {"reasoner": fingerprint(reasoner), "documents": documents.digest()}
    identity |= {"spaces": [space.digest() for space in spaces], **how}
    model = trainable(reasoner, lora, seed=seed)
    curve = training.train(
        model,
        documents,
        partial(_collate, pad=reasoner.tokenizer.pad_token_id),
        partial(_objective, reasoner=reasoner, spaces=[space.to(reasoner.device) for space in spaces], **how),
        folder=folder,
        identity=identity | {"lora": lora and dict(lora)},
        seed=seed,
        epochs=epochs,
        learning_rate=learning_rate,
        documents_per_batch=documents_per_batch,
        warmup=warmup,
        weight_decay=weight_decay,
        neftune=neftune,
        engine=engine,
        title="contrastive",
        progress=progress,
        callbacks=callbacks,
    )
    return tuned(reasoner, model), curve


def _objective(
    model: nn.Module,
    batch: dict[str, Tensor],
    *,
    reasoner: Reasoner,
    spaces: Sequence[RankingSpace],
    lm_weight: float,
    **how,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch and what else the curve shows; one run of the model serves both terms, unless `asked`."""
    reasoner = replace(reasoner, model=model)
    ids, prompt, length, clicked = (batch[name] for name in ("ids", "prompt", "length", "clicked"))
    states, vectors = prompt_vectors(reasoner, batch)
    queries = [space.queries(vectors) for space in spaces]
    counted = int(batch["counted"])
    losses = [_contrast(space, query, batch, counted, **how) for space, query in zip(spaces, queries, strict=True)]
    loss, query = torch.stack(losses).mean(), queries[0]
    values = {"contrastive": loss, "effective_rank": effective_rank(query)}
    values["alignment"] = alignment(query, spaces[0].intents[clicked])
    if len(query) > 1 or distributed.several():  # all processes log the same names; of a single row it is NaN
        values["uniformity"] = uniformity(query)
    if lm_weight:
        if "asked" in batch:
            ids, prompt, length = batch["asked"], batch["asked_prompt"], batch["asked_length"]
            states = reasoner.trunk(ids, use_cache=False)[0]
        head = reasoner.plain.get_output_embeddings()
        language = next_token_loss(states, head, ids=ids, prompt=prompt, length=length, prompt_weight=0.0)
        values["language"] = evened(language, int((length - prompt)[:counted].sum()))
        loss = loss + lm_weight * values["language"]
    return loss, values


def prompt_vectors(reasoner: Reasoner, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """States (rows, longest, hidden) of ids, padded on the right, and e_q (rows, hidden), the prompts' vectors.

    batch  ids (rows, longest), prompt and length (rows,): tokens of the prompt, and of prompt and query
    """
    ids, prompt, length = (batch[name] for name in ("ids", "prompt", "length"))
    real = torch.arange(ids.shape[1], device=ids.device) < length[:, None]
    causal = reasoner.kind == "causal"  # no token sees what is to its right, neither its query nor padding: no mask
    states = reasoner.trunk(ids, **({"use_cache": False} if causal else {"attention_mask": real.long()}))[0]
    return states, pool(reasoner, states, prompt)


def _contrast(
    space: RankingSpace, query: Tensor, batch: dict[str, Tensor], counted: int, *, similarity: str, **how
) -> Tensor:
    """The loss in one ranker's space; averaged over processes it is what one process with all rows would find."""
    rows = batch["clicked"], batch["hard"], batch["also"]
    if similarity != "ranker":
        return contrastive_loss(query, space.intents, *rows, counted=counted, similarity=similarity, **how)
    everyone = gathered(batch["clicked"][:counted]) if how["in_batch"] else batch["clicked"][:0]
    score = partial(space.scores, query, batch["session"])
    put = {"negatives": everyone, "temperature": how["temperature"]}
    return evened(ranker_nce(score, len(space.intents), *rows, **put), counted)


class _Sessions(training.Documents):
    """One session a row: prompt and query, clicked intents, hard negatives, and its row in the spaces' users."""

    def __init__(self, prompts, queries, clicked: np.ndarray, hard: np.ndarray, also: np.ndarray, asked=None):
        together = queries is not None and asked is None
        super().__init__(prompts, queries if together else [[]] * len(prompts))
        own = zip(self.rows, clicked.tolist(), hard.tolist(), also.tolist(), strict=True)
        self.rows = [
            {**row, "clicked": intent, "hard": negatives, "also": beside, "session": session}
            for session, (row, intent, negatives, beside) in enumerate(own)
        ]
        if asked is not None:
            written = training.Documents(asked, queries).rows
            self.rows = [{**row, "asked": own} for row, own in zip(self.rows, written, strict=True)]


def _collate(rows: list[dict], pad: int) -> dict[str, Tensor]:
    """A batch of training.right_padded, and clicked and session (rows,), hard (rows, h), also (rows, a)."""
    columns = {name: torch.tensor([row[name] for row in rows]) for name in ("clicked", "session")}
    for name in ("hard", "also"):  # of type long, since without columns they would be float
        columns[name] = torch.tensor([row[name] for row in rows], dtype=torch.long)
    if "asked" in rows[0]:
        written = training.right_padded([row["asked"] for row in rows], pad)
        columns |= {"asked": written["ids"], "asked_prompt": written["prompt"], "asked_length": written["length"]}
    return {**training.right_padded(rows, pad), **columns}


def _row_faults(prompts, queries, kb: int, **given: np.ndarray) -> list[str]:
    faults = []
    lengths = {"prompts": len(prompts), **{name: len(values) for name, values in given.items()}}
    if queries is not None:
        lengths["queries"] = len(queries)
    if len(set(lengths.values())) > 1:
        faults.append(f"rows differ: {', '.join(f'{name} {count}' for name, count in lengths.items())}")
    if not len(prompts):
        faults.append("there is no session to learn from")
    if short := sum(not len(ids) for ids in prompts):
        faults.append(f"{short} prompts have no token")
    if queries is not None and not any(map(len, queries)):
        faults.append("no session has a query for the language term: give one, or lm_weight 0")
    for name, values in given.items():
        least, expected = (0, "(rows,)") if name == "clicked" else (-1, "(rows, any)")
        if values.ndim != (1 if name == "clicked" else 2):
            faults.append(f"{name} is of shape {values.shape}; expected {expected}")
        if (foreign := values[(values < least) | (values >= kb)]).size:
            faults.append(f"{name} has {foreign.size} values outside {least} to {kb - 1} (first: {foreign.flat[0]})")
    return faults


def _fit_faults(reasoner: Reasoner, spaces: Sequence[RankingSpace], prompts, queries, asked) -> list[str]:
    faults = [
        f"{reasoner.name} makes vectors of {reasoner.hidden_size}, the ranker reads {width}: "
        "it was trained on another reasoner's"
        for width in sorted({space.query_dim for space in spaces} - {reasoner.hidden_size})
    ]
    if reasoner.kind != "causal" and queries is not None:
        faults.append(f"{reasoner.name} is of kind {reasoner.kind} and cannot learn to write: leave queries out")
    if asked is not None and len(asked) != len(prompts):
        faults.append(f"rows differ: prompts {len(prompts)}, asked {len(asked)}")
    longest = max(map(len, prompts if asked is None else asked), default=0) + max(map(len, queries or ()), default=0)
    longest = max([longest, *map(len, prompts)])
    if reasoner.positions is not None and longest > reasoner.positions:
        faults.append(f"up to {longest} tokens are more than the model's {reasoner.positions} positions")
    return faults


def _setting_faults(
    hard: np.ndarray,
    documents_per_batch: int,
    epochs: float,
    lm_weight: float,
    *,
    temperature: float,
    similarity: str,
    in_batch: bool,
    symmetric: float,
) -> list[str]:
    faults = []
    if documents_per_batch < 1 or epochs <= 0 or not temperature > 0:
        given = f"documents_per_batch is {documents_per_batch}, epochs {epochs}, temperature {temperature}"
        faults.append(f"{given}; all must be positive")
    if similarity not in SIMILARITIES:
        faults.append(f"similarity {similarity!r} is none of {', '.join(SIMILARITIES)}")
    if not (lm_weight >= 0 and symmetric >= 0):
        faults.append(f"lm_weight is {lm_weight}, symmetric {symmetric}; expected 0 or more")
    if symmetric and similarity == "ranker":
        faults.append("symmetric is for cosine and dot; a ranker's score is no distance")
    if not (hard >= 0).any() and (not in_batch or documents_per_batch < 2):
        faults.append("no row has a negative: give hard negatives, or in_batch with documents_per_batch of 2 or more")
    return faults
