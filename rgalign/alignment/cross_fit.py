"""Cross-fitting by user (METHOD.md 2.3, step 4 [C]): a ranker learns from vectors that have not heard its own clicks.

RG-CL pulls a training session's vector to the intent that was clicked in it, so that the vector knows the label that
the ranker is to learn from it: in training it looks surer than it will ever be again. Therefore each of two halves of
train's users has its vectors from a model that was aligned on the other half alone. What the ranker is chosen and
judged on (development users, valid, test) comes from the model that serves, which was aligned on all and has heard
none of their clicks either; the mean of the two halves' models would cost two language models a session [C]. RG-SFT
and RG-DPO, before it, have heard all: they teach to write, and say little about the clicked intent itself.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from rgalign.alignment.context import Context
from rgalign.alignment.steps import pull_to_clicks
from rgalign.data.lists import Lists
from rgalign.data.split import user_folds
from rgalign.data.vectors import Vectors, concat
from rgalign.reasoner.model import Reasoner
from rgalign.seeding import derived

FOLDS = 2  # the cheapest: every fold is one more RG-CL to train [C]


def fold_of(context: Context, lists: Lists, folds: int = FOLDS) -> np.ndarray:
    """(lists,) 0 to folds - 1: the part of train's users that a session's user belongs to, by a hash."""
    seed = derived(context.params.run.seed, "cross-fitting")  # the development users were drawn by another
    return user_folds(lists.user_id, folds=folds, seed=seed)


def align_folds(context: Context, start: Reasoner, best: pd.DataFrame | None, folder: Path, work: Path) -> None:
    """Write fold-<i>/, the reasoner that RG-CL makes without the users of that fold; an empty folder where
    alignment.loop.cross_fit or RG-CL is switched off. Arguments as of `steps.pull_to_clicks`."""
    folder.mkdir()
    how = context.params.alignment
    if not (how.loop.cross_fit and how.cl.use):
        return
    learners = context.learners
    fold = fold_of(context, learners)
    for left_out in range(FOLDS):
        others = learners.take(np.flatnonzero(fold != left_out))
        reasoner, _ = pull_to_clicks(context, start, best, work / f"fold-{left_out}", learners=others)
        context.save(reasoner, folder / f"fold-{left_out}")


def with_folds(context: Context, vectors: Vectors, folds: Path, work: Path) -> Vectors:
    """The vectors with those of train's sessions by the model that was aligned without their users.

    vectors  of all sessions, by the reasoner that serves;  folds  what `align_folds` wrote; empty: they stay
    """
    if not any(folds.iterdir()):
        return vectors
    sessions = context.sessions(context.parts.train)
    fold = fold_of(context, context.parts.train)
    heard = np.isin(vectors.ids, context.parts.train.session_id)
    parts = [Vectors(vectors.ids[~heard], vectors.values[~heard])]
    for left_out in range(FOLDS):
        way = context.embedding(context.load(folds / f"fold-{left_out}"))
        parts.append(way.sessions(sessions[fold == left_out], work / f"fold-{left_out}"))
    mixed = concat(parts)
    return Vectors(vectors.ids, mixed.rows(vectors.ids))
