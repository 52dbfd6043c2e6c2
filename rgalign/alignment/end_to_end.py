"""The reference: the ranking loss itself, through the rankers into the language model, and both learn.

It is none of the paper's stages: no reward, no preference, no frozen judge. It shows what the clicks alone teach the
two together; it is no upper bound, since it fits the training clicks with all that it has.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from rgalign.alignment.collapse import effective_rank
from rgalign.alignment.context import QE_REC, Context
from rgalign.alignment.contrastive import prompt_vectors
from rgalign.alignment.steps import CL_LOOP
from rgalign.alignment.tuning import trainable, tuned
from rgalign.data.lists import QueryIntents, QueryLists
from rgalign.ranker import store
from rgalign.ranker.fit import Loss
from rgalign.ranker.three_tower import ThreeTower
from rgalign.ranker.train import loss_of
from rgalign.reasoner import training
from rgalign.reasoner.model import Reasoner, fingerprint
from rgalign.seeding import derived


def learn_together(context: Context, start: Reasoner, folder: Path, work: Path) -> tuple[Reasoner, pd.DataFrame]:
    """In place of RG-CL (alignment.cl.ranker_learns): reasoner and rankers, from the context's on, learn together.

    folder  where seed-<seed>/ of every ranker is written
    Returns the reasoner and the curve of `end_to_end`.
    """
    own, learners = context.params.alignment.cl, context.learners
    reasoner, rankers, curve = end_to_end(
        start,
        context.embedded_prompts(start, learners),
        rankers=list(context.rankers.values()),
        lists=learners,
        intents=context.parts.intents,
        loss=loss_of(QE_REC, context.settings),
        folder=work,
        seed=derived(context.params.run.seed, "end to end"),
        engine=context.engine,
        neftune=own.neftune or None,
        **own.model_dump(include=set(CL_LOOP)),
    )
    for seed, ranker in zip(context.rankers, rankers, strict=True):
        store.save(folder / f"seed-{seed}", ranker)
    return reasoner, curve


def going_on(context: Context, folder: Path) -> Context:
    """The context whose loop starts from the rankers that `learn_together` wrote; as it was where it wrote none."""
    if not any(folder.iterdir()):
        return context
    return context.reading(context.embeddings, folder)


def end_to_end(
    reasoner: Reasoner,
    prompts: Sequence[Sequence[int]],
    *,
    rankers: Sequence[ThreeTower],
    lists: QueryLists,
    intents: QueryIntents,
    loss: Loss,
    folder: Path,
    seed: int,
    **loop: Any,
) -> tuple[Reasoner, list[ThreeTower], pd.DataFrame]:
    """Copies of reasoner and rankers that have learnt together, and their curve.

    prompts  token ids, one a list;  lists  with a click each; the vectors that they hold are not read
    loss     of a ranker, as `fit` has it; the mean over the rankers is what the reasoner learns from
    folder, seed, loop   as of `reasoner.training.train`. All weights of both learn, by one learning rate [C]
    Curve: step, loss, effective_rank of a batch's vectors (`collapse`), seconds.
    """
    model, device = trainable(reasoner, None, seed=seed), reasoner.device
    # as a part of it, Trainer trains, saves and resumes them like its own
    model.rankers = nn.ModuleList(copy.deepcopy(ranker).requires_grad_(True) for ranker in rankers).to(device)
    hashed = sha256()
    for value in model.rankers.state_dict().values():
        hashed.update(value.cpu().contiguous().numpy().tobytes())
    documents = [{"input_ids": list(ids), "prompt": len(ids), "session": row} for row, ids in enumerate(prompts)]
    curve = training.train(
        model,
        documents,
        partial(_collate, pad=reasoner.tokenizer.pad_token_id),
        partial(_objective, reasoner=reasoner, lists=lists.to(device), intents=intents.to(device), loss=loss),
        folder=folder,
        identity={"stage": "end to end", "reasoner": fingerprint(reasoner), "rankers": hashed.hexdigest()},
        seed=seed,
        title="end to end",
        **loop,
    )
    learnt = [ranker.train(False) for ranker in model.rankers]
    del model.rankers
    return tuned(reasoner, model), learnt, curve


def _collate(rows: list[dict], pad: int) -> dict[str, Tensor]:
    return training.right_padded(rows, pad) | {"session": torch.tensor([row["session"] for row in rows])}


def _objective(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    reasoner: Reasoner,
    lists: QueryLists,
    intents: QueryIntents,
    loss: Loss,
) -> tuple[Tensor, dict[str, Tensor]]:
    _, vectors = prompt_vectors(replace(reasoner, model=model), batch)
    shown = replace(lists.take(batch["session"]), query=vectors)
    losses = [loss(ranker, shown, intents) for ranker in model.rankers]
    return torch.stack(losses).mean(), {"effective_rank": effective_rank(vectors)}
