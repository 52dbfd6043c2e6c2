"""A run's reward model: candidates written, models trained, rewards given (METHOD.md 2.3, step 1; notebook 04).

Queries are read by the reasoner as it was before its alignment: a judge that learnt with the judged would drift.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rgalign.alignment import candidate_shards, launched
from rgalign.alignment import candidates as writing
from rgalign.alignment.context import MAIN, Context
from rgalign.alignment.cross_sampling import query_vectors
from rgalign.alignment.reward import ALL, ONE, REWARDS, RewardModel, load_reward_model, scored, train_reward_models
from rgalign.artifacts import write_text
from rgalign.data.lists import Lists
from rgalign.data.vectors import Vectors
from rgalign.ranker.fit import with_click
from rgalign.reasoner.model import Reasoner
from rgalign.reasoner.settings import TINY
from rgalign.seeding import derived


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
        return candidate_shards.write(context, models, sessions, asked, work)
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
    """Train the run's reward model (ALL) and, to compare it with, one of another seed and one that hears the main LLM
    alone (ONE; where several wrote). Returns their learning curves."""
    how, first = context.params.alignment.reward, context.params.ranker.seeds[0]
    everyone = sorted(candidates["source"].unique())
    models = {(ALL, first): everyone}
    if how.compared:
        models |= {(ONE, first): [MAIN]} if len(everyone) > 1 else {}
        models[ALL, first + 1] = everyone
    queries = reader.vectors(candidates["query"].tolist(), progress=True)
    if context.recipe.launcher:
        return launched.train_rewards(context, candidates, queries, models, folder)
    how = {"workers": context.params.run.workers, "accelerator": context.accelerator}
    return train_on(context, candidates, queries, models=models, folder=folder, **how)


def train_on(context: Context, candidates: pd.DataFrame, queries: Vectors, **how: Any) -> pd.DataFrame:
    """`reward.train_reward_models` with what the run says of it. queries: vectors by text; how: the other arguments."""
    intents = context.parts.intents
    return train_reward_models(
        context.parts,
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

    form  name of reward.REWARDS that counts
    """

    model: RewardModel
    reader: Reader
    form: str

    @classmethod
    def load(cls, context: Context, folder: Path) -> "Rewarder":
        """The run's own, of notebook 04, with the form that was chosen there."""
        return cls.of(Reader(context, context.main()), folder, form_of(folder))

    @classmethod
    def of(
        cls, reader: Reader, folder: Path, form: str = "list", *, name: str = ALL, seed: int | None = None
    ) -> "Rewarder":
        """One of the models that `train_models` saved."""
        params, intents = reader.context.params, reader.context.parts.intents
        seed = params.ranker.seeds[0] if seed is None else seed
        model = load_reward_model(folder / name / f"seed-{seed}", intents, device=params.run.device)
        return cls(model, reader, form)

    def of_texts(self, lists: Lists, texts: Sequence[str], *, form: str | None = None) -> np.ndarray:
        """(lists,) nats: the reward of one query a list; NaN for an empty one and where nothing was clicked."""
        there = np.array([bool(text.strip()) for text in texts])
        rewards = np.full(len(texts), np.nan)
        if there.any():
            rows = np.flatnonzero(there)
            asked = [texts[row] for row in rows]
            how = {"form": form or self.form, "timestamps": self._timestamps(lists)[rows]}
            rewards[rows] = self.model.reward(lists.take(rows), self.reader.vectors(asked).rows(asked), **how)
        return rewards

    def scored(self, candidates: pd.DataFrame, *, form: str | None = None) -> pd.DataFrame:
        """Candidates of train and dev with their reward (reward.scored)."""
        parts, tables = self.reader.context.parts, []
        vectors = self.reader.vectors(candidates["query"].tolist())
        for lists in (with_click(parts.train), with_click(parts.dev)):
            own = candidates[candidates["session_id"].isin(lists.session_id.tolist())]
            if own.empty:
                continue
            how = {"form": form or self.form, "timestamps": self._timestamps(lists)}
            tables.append(scored(self.model, own, lists, vectors, **how))
        return pd.concat(tables, ignore_index=True)

    def _timestamps(self, lists: Lists) -> np.ndarray:
        when = self.reader.context.sessions(lists)["timestamp"]
        return when.to_numpy(dtype="datetime64[us]", na_value=np.datetime64("NaT"))
