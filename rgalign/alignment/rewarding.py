"""A run's reward model: candidates written, models trained, rewards given (METHOD.md 2.3, step 1; notebook 04).

Queries are read by the reasoner as it was before its alignment: a judge that learnt with the judged would drift.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rgalign.alignment import candidate_shards, launched
from rgalign.alignment import candidates as writing
from rgalign.alignment.context import MAIN, Context
from rgalign.alignment.cross_sampling import query_vectors
from rgalign.alignment.reward import ALL, ONE, REWARDS, RewardModel, load_reward_model, scored, train_reward_models
from rgalign.alignment.steps import pull_to_clicks
from rgalign.data.lists import Lists
from rgalign.data.split import user_folds
from rgalign.data.vectors import Vectors, concat
from rgalign.ranker.fit import with_click
from rgalign.ranker.train import Parts
from rgalign.reasoner.model import Reasoner
from rgalign.reasoner.settings import TINY
from rgalign.run.artifacts import write_text
from rgalign.seeding import derived

# Cross-fitting by user (METHOD.md 2.3, step 4 [C]): a ranker learns from vectors that have not heard its own clicks.
#
# RG-CL pulls a training session's vector to the intent that was clicked in it, so that the vector knows the label that
# the ranker is to learn from it: in training it looks surer than it will ever be again. Therefore each of two halves of
# train's users has its vectors from a model that was aligned on the other half alone. What the ranker is chosen and
# judged on (development users, valid, test) comes from the model that serves, which was aligned on all and has heard
# none of their clicks either; the mean of the two halves' models would cost two language models a session [C]. RG-SFT
# and RG-DPO, before it, have heard all: they teach to write, and say little about the clicked intent itself.

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


def write_candidates(context: Context, models: dict[str, Reasoner], work: Path) -> pd.DataFrame:
    """What every LLM writes for the sessions with a click of train and of the development users.

    models  by name, the main one among them; with alignment.candidates.llms `one` it writes as many as all would
    work    of the stage: what an LLM from elsewhere, or several processes, had written before a kill is kept there
    """
    how = context.params.alignment.candidates
    samples = how.samples
    if how.llms == "one":
        samples = len(models) * (how.samples + 1) - 1  # every LLM would write a greedy one too
        models = {MAIN: models[MAIN]}
    prompters = {name: context.recipe.prompter(context.shop, model) for name, model in models.items()}
    lists = [with_click(part) for part in (context.parts.train, context.parts.dev)]
    sessions = pd.concat([context.sessions(part) for part in lists], ignore_index=True)
    asked = {
        "samples": samples,
        "temperature": how.temperature,
        "top_p": how.top_p,
        "max_new_tokens": context.params.reasoner.queries.max_new_tokens,
        "seed": derived(context.params.run.seed, "candidates"),
    }
    if context.recipe.launcher or context.params.reasoner.model != TINY:
        return candidate_shards.write_in_shards(context, models, sessions, asked, work)
    return writing.write(models, prompters, sessions, **asked)


EMPTY = {name: "object" for name in writing.COLUMNS} | {"tokens": "int64", "count": "int64", "reward": "float64"}
FORM = "form.json"  # beside the models: the form of reward that was chosen


def no_candidates() -> pd.DataFrame:
    """The empty table of a run whose reasoner writes nothing."""
    return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in EMPTY.items()})


@dataclass(frozen=True, eq=False)
class Reader:
    """Reads queries by their text alone, as KB intents are read."""

    context: Context
    reasoner: Reasoner

    def vectors(self, texts: Sequence[str], *, progress: bool = False) -> Vectors:
        """Of the different texts that are not empty, by text."""
        prompter = self.context.recipe.prompter(self.context.shop, self.reasoner)
        return query_vectors(self.reasoner, prompter, texts, progress=progress)


def train_models(context: Context, reader: Reader, candidates: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """Train the run's reward model (ALL), one without each fold of users (alignment.reward.folds), and to compare it
    with, one of another seed and one that reads the main LLM alone (ONE; where several wrote). Returns their learning
    curves. Raises ValueError where all users of train fall into one fold."""
    how, first = context.params.alignment.reward, context.params.ranker.seeds[0]
    everyone = sorted(candidates["source"].unique())
    models = {(ALL, first): everyone} | {(of_fold(i), first): everyone for i in _folds(context)}
    if how.compared:
        models |= {(ONE, first): [MAIN]} if len(everyone) > 1 else {}
        models[ALL, first + 1] = everyone
    queries = reader.vectors(candidates["query"].tolist(), progress=True)
    if context.recipe.launcher:
        return launched.train_rewards(context, candidates, queries, models, folder)
    how = {"workers": context.params.run.workers, "accelerator": context.accelerator}
    return train_on(context, candidates, queries, models=models, folder=folder, **how)


def of_fold(number: int) -> str:
    """Name of the reward model that was trained without the users of this fold; also its place below models/reward."""
    return f"fold-{number}/{ALL}"


def _folds(context: Context) -> range:
    """Numbers of the folds; none where rewards are given in-sample."""
    count = context.params.alignment.reward.folds
    return range(count if count > 1 else 0)


def _without_fold(context: Context, name: str) -> Parts:
    """What the reward model of this name learns from: train, or train without the users of the fold it is named by."""
    if name in (ALL, ONE):
        return context.parts
    left_out = {of_fold(i): i for i in _folds(context)}[name]
    train = with_click(context.parts.train)
    kept = np.flatnonzero(fold_of(context, train, len(_folds(context))) != left_out)
    if not len(kept):
        raise ValueError(
            f"alignment.reward.folds is {len(_folds(context))}, and all users of train whose sessions have a click "
            "fall into one fold: nobody is left to train a reward model on; set it to 1 (rewards in-sample)"
        )
    return replace(context.parts, train=train.take(kept))


def train_on(context: Context, candidates: pd.DataFrame, queries: Vectors, **how: Any) -> pd.DataFrame:
    """`reward.train_reward_models` with what the run says of it. queries: vectors by text; how: the other arguments."""
    intents = context.parts.intents
    return train_reward_models(
        partial(_without_fold, context),
        candidates,
        queries,
        Vectors(intents.intent_id, intents.text.numpy()),
        settings=context.settings,
        positions=context.positions,
        null_share=context.params.alignment.reward.null_share,
        **how,
    )


def both_forms(reader: Reader, folder: Path, candidates: pd.DataFrame) -> dict[str, np.ndarray]:
    """form -> the rewards that it gives these candidates: what judge_reward.choose_form compares."""
    own = Rewarder.of(reader, folder)
    return {form: own.scored(candidates, form=form)["reward"].to_numpy() for form in REWARDS}


def rivals(reader: Reader, folder: Path, candidates: pd.DataFrame) -> dict[str, np.ndarray]:
    """What the models that were trained to compare with give these candidates (alignment.reward.compared)."""
    form, first = form_of(folder), reader.context.params.ranker.seeds[0]
    others = {"another seed": (ALL, first + 1), "trained on one LLM": (ONE, first)}
    others = {name: (kind, seed) for name, (kind, seed) in others.items() if (folder / kind / f"seed-{seed}").is_dir()}
    return {
        name: Rewarder.of(reader, folder, form, name=kind, seed=seed).scored(candidates)["reward"].to_numpy()
        for name, (kind, seed) in others.items()
    }


def form_of(folder: Path) -> str:
    """The form that `save_form` wrote."""
    return json.loads((folder / FORM).read_text(encoding="utf-8"))["form"]


def save_form(folder: Path, form: str) -> None:
    """Write which form of reward was chosen."""
    write_text(folder / FORM, json.dumps({"form": form}) + "\n")


@dataclass(frozen=True, eq=False)
class Rewarder:
    """A reward model with what it reads queries by.

    form   name of reward.REWARDS that counts
    folds  the models that judge train's sessions, each those of its own fold of users, without whom it was trained
           (METHOD.md 2.3 [C]); empty: `model` judges them too, in-sample
    """

    model: RewardModel
    reader: Reader
    form: str
    folds: tuple[RewardModel, ...] = ()

    @classmethod
    def load(cls, context: Context, folder: Path) -> "Rewarder":
        """The run's own, of notebook 04, with the form that was chosen there."""
        return cls.of(Reader(context, context.main()), folder, form_of(folder))

    @classmethod
    def of(
        cls, reader: Reader, folder: Path, form: str = "list", *, name: str = ALL, seed: int | None = None
    ) -> "Rewarder":
        """One of the models that `train_models` saved; the run's own (ALL, the first seed) with those of its folds."""
        params, intents = reader.context.params, reader.context.parts.intents
        first = params.ranker.seeds[0]
        seed = first if seed is None else seed
        names = [name, *(map(of_fold, _folds(reader.context)) if (name, seed) == (ALL, first) else ())]
        places = [folder / each / f"seed-{seed}" for each in names]
        model, *folds = (load_reward_model(place, intents, device=params.run.device) for place in places)
        return cls(model, reader, form, tuple(folds))

    @property
    def in_sample(self) -> "Rewarder":
        """The same without its folds: train's sessions are judged by the model that was trained on them."""
        return replace(self, folds=())

    def of_texts(self, lists: Lists, texts: Sequence[str], *, form: str | None = None) -> np.ndarray:
        """(lists,) nats: the reward of one query a list; NaN for an empty one and where nothing was clicked."""
        there = np.array([bool(text.strip()) for text in texts])
        rewards = np.full(len(texts), np.nan)
        if there.any():
            vectors, when = self.reader.vectors(texts), self._timestamps(lists)
            for model, rows in self._judges(lists, there):
                how = {"form": form or self.form, "timestamps": when[rows]}
                rewards[rows] = model.reward(lists.take(rows), vectors.rows([texts[row] for row in rows]), **how)
        return rewards

    def scored(self, candidates: pd.DataFrame, *, form: str | None = None) -> pd.DataFrame:
        """Candidates of train and dev with their reward (reward.scored)."""
        parts, tables = self.reader.context.parts, []
        vectors = self.reader.vectors(candidates["query"].tolist())
        for lists in (with_click(parts.train), with_click(parts.dev)):
            own = candidates[candidates["session_id"].isin(lists.session_id.tolist())]
            if own.empty:
                continue
            when, found = self._timestamps(lists), []
            for model, rows in self._judges(lists, np.isin(lists.session_id, own["session_id"])):
                some = own[own["session_id"].isin(lists.session_id[rows].tolist())]
                how = {"form": form or self.form, "timestamps": when[rows]}
                found.append(scored(model, some, lists.take(rows), vectors, **how))
            tables.append(pd.concat(found).loc[own.index])
        return pd.concat(tables, ignore_index=True)

    def _judges(self, lists: Lists, asked: np.ndarray) -> list[tuple[RewardModel, np.ndarray]]:
        """The models that judge those lists that are asked for (lists,), each with its rows, of which it has some."""
        if lists.part != "train" or not self.folds:
            return [(self.model, np.flatnonzero(asked))]
        fold = fold_of(self.reader.context, lists, len(self.folds))
        rows = [np.flatnonzero(asked & (fold == number)) for number in range(len(self.folds))]
        return [(model, own) for model, own in zip(self.folds, rows, strict=True) if len(own)]

    def _timestamps(self, lists: Lists) -> np.ndarray:
        when = self.reader.context.sessions(lists)["timestamp"]
        return when.to_numpy(dtype="datetime64[us]", na_value=np.datetime64("NaT"))
