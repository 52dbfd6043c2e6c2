"""A run's reward model: candidates generated, models trained, rewards given (METHOD.md 2.3, step 1; notebook 04).

Queries are embedded by the reasoner from before its alignment: a reward model that changed with it would drift.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rgalign.alignment import candidates as generation
from rgalign.alignment.context import MAIN, Context
from rgalign.alignment.judge_reward import choose_form, right_over_wrong
from rgalign.alignment.reward import (
    ALL,
    ONE,
    REWARDS,
    Queries,
    RewardModel,
    load_reward_model,
    score_candidates,
    train_reward_models,
)
from rgalign.data import vectors
from rgalign.data.lists import Lists, QueryLists
from rgalign.data.split import user_folds
from rgalign.data.vectors import Vectors
from rgalign.ranker.fit import with_click
from rgalign.ranker.train import Parts, train_by_processes
from rgalign.reasoner import build
from rgalign.reasoner.model import Reasoner, export_reasoner, fingerprint
from rgalign.reasoner.prompts import TINY
from rgalign.reasoner.written import TextEmbedder
from rgalign.run import distributed
from rgalign.run.artifacts import write_table, write_text
from rgalign.run.distributed import digest_of, make_shards, shard_path
from rgalign.seeding import derived

SESSIONS_PER_SHARD = 1_000  # fixed, so that the number of processes changes no byte
SESSIONS, CANDIDATES = "sessions.parquet", "candidates.parquet"
FORM = "form.json"  # beside the models: the form of reward that was chosen


def fold_of(context: Context, lists: Lists, folds: int) -> np.ndarray:
    """(lists,) 0 to folds - 1: the fold of train's users that a session's user belongs to, by a hash."""
    seed = derived(context.params.run.seed, "cross-fitting")  # other than the seed of the development users
    return user_folds(lists.user_id, folds=folds, seed=seed)


def write_candidates(context: Context, models: dict[str, Reasoner], work: Path) -> pd.DataFrame:
    """The queries of every LLM for the sessions with a click of train and of the development users.

    models  by name, the main one among them; with alignment.candidates.llms `one` it writes as many as all would
    work    of the stage: pretrained models and several processes write shards there, which survive a kill
    Empty for an encoder, which writes nothing.
    """
    if not context.writes:
        return no_candidates()
    how = context.params.alignment.candidates
    samples = how.samples
    if how.llms == "one":
        samples = len(models) * (how.samples + 1) - 1  # every LLM would write a greedy one as well
        models = {MAIN: models[MAIN]}
    lists = [with_click(part) for part in (context.parts.train, context.parts.dev)]
    sessions = pd.concat([context.sessions(part) for part in lists], ignore_index=True)
    asked = {
        "samples": samples,
        "temperature": how.temperature,
        "top_p": how.top_p,
        "max_new_tokens": context.params.reasoner.queries.max_new_tokens,
        "seed": derived(context.params.run.seed, "candidates"),
    }
    tables = []
    for number, (rows, own) in enumerate(build.by_writer(context.recipe, models, sessions)):
        part = sessions[rows].reset_index(drop=True)
        if context.recipe.launcher or context.params.reasoner.model != TINY:
            tables.append(_write_in_shards(context, own, part, asked, work / f"written-{number}"))
        else:
            prompters = {name: context.recipe.prompter(context.shop, model) for name, model in own.items()}
            tables.append(generation.generate_candidates(own, prompters, part, **asked))
    place = pd.Series(range(len(sessions)), sessions["session_id"])
    return pd.concat(tables).sort_values("session_id", key=lambda ids: ids.map(place), kind="stable", ignore_index=True)


def _write_in_shards(
    context: Context, models: Mapping[str, Reasoner], sessions: pd.DataFrame, how: dict[str, Any], job: Path
) -> pd.DataFrame:
    """`generate_candidates`, by the processes of run.launcher where there is one; how: its settings.

    The samples are those of one call; a log-probability may differ in its last bits, since batches do.
    """
    write_table(job / SESSIONS, sessions[["session_id"]])
    if context.recipe.launcher:
        placed = {name: export_reasoner(model, job / name) for name, model in models.items()}
        arguments = {"run": str(context.run.absolute()), "models": placed, "how": how}
        distributed.run("write", job, context.recipe.launcher, arguments, device=context.params.run.device)
    else:
        write_own_shards(job, context, models, how)
    count = -(-len(sessions) // SESSIONS_PER_SHARD)
    shards = [pd.read_parquet(shard_path(job, number) / CANDIDATES) for number in range(count)]
    return pd.concat(shards, ignore_index=True).astype({"query": object})


def write_own_shards(
    job: Path, context: Context, models: Mapping[str, Reasoner], how: Mapping[str, Any]
) -> dict[str, int]:
    """Write this process's shards; finished ones of these very models and prompts are kept."""
    ids = pd.read_parquet(job / SESSIONS)["session_id"].tolist()
    sessions = context.shop.sessions.set_index("session_id", drop=False).loc[ids].reset_index(drop=True)
    prompters = {name: context.recipe.prompter(context.shop, model) for name, model in models.items()}
    settings = {"models": {name: fingerprint(model) for name, model in models.items()}, "how": dict(how)}
    firsts = range(0, len(ids), SESSIONS_PER_SHARD)
    parts = [sessions[first : first + SESSIONS_PER_SHARD].reset_index(drop=True) for first in firsts]

    def label(number: int) -> str:
        prompts = (prompt for prompter in prompters.values() for prompt in prompter.sessions(parts[number]))
        return digest_of(settings | {"shard": number, "sessions": parts[number]["session_id"].tolist()}, prompts)

    def make(number: int, shard: Path) -> None:
        numbers = range(firsts[number], firsts[number] + len(parts[number]))
        given = {"numbers": numbers, "progress": distributed.index() == 0, **how}
        write_table(shard / CANDIDATES, generation.generate_candidates(models, prompters, parts[number], **given))

    return {"shards": make_shards(job, len(parts), make, label=label)}


def no_candidates() -> pd.DataFrame:
    """The empty table of a run whose reasoner writes nothing."""
    types = dict.fromkeys(generation.COLUMNS, "object") | {"tokens": "int64", "count": "int64", "reward": "float64"}
    return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in types.items()})


@dataclass(frozen=True, eq=False)
class QueryEmbedder:
    """Embeds queries by their text alone, like the title of a KB intent [C].

    reasoner  embeds the KB's own texts too, so that both are in one space
    """

    context: Context
    reasoner: Reasoner

    def queries(self, texts: Sequence[str], *, progress: bool = False) -> Queries:
        """The different texts that are not empty, as the reward model reads them."""
        reader = TextEmbedder(self.reasoner, self.context.recipe.prompter(self.context.shop, self.reasoner))
        vectors = reader.vectors(texts, progress=progress)
        return Queries(vectors, self.context.matched_queries(vectors))


def train_models(context: Context, embedder: QueryEmbedder, candidates: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """Train the run's reward model (ALL), one without each fold of users (alignment.reward.folds), and for comparison
    one of another seed and one on the main LLM's queries alone (ONE; where several wrote). Returns their learning
    curves, empty for an encoder. Raises ValueError where all users of train fall into one fold."""
    if not context.writes:
        return pd.DataFrame(columns=["model", "seed", "epoch", "train_loss", "dev_gauc", "seconds"])
    how, first = context.params.alignment.reward, context.params.ranker.seeds[0]
    everyone = sorted(candidates["source"].unique())
    models = {(name, first): everyone for name in (ALL, *fold_names(context))}
    if how.compared:
        models |= {(ONE, first): [MAIN]} if len(everyone) > 1 else {}
        models[ALL, first + 1] = everyone
    queries = embedder.queries(candidates["query"].tolist(), progress=True)
    if context.recipe.launcher:
        job = folder / "job"
        write_table(job / "candidates.parquet", candidates)
        vectors.save(job / "queries", queries.vectors)
        given = {"run": str(context.run.absolute()), "models": [[*key, list(names)] for key, names in models.items()]}
        how = {"device": context.params.run.device}
        return train_by_processes("reward", context.recipe.launcher, job, list(models), given, folder, **how)
    how = {"workers": context.params.run.workers, "accelerator": context.accelerator}
    return train_run_models(context, candidates, queries, models=models, folder=folder, **how)


def fold_names(context: Context) -> list[str]:
    """Names of the reward models that were trained without the users of a fold; none where rewards are in-sample."""
    count = context.params.alignment.reward.folds
    return [f"fold-{number}/{ALL}" for number in range(count if count > 1 else 0)]


def _without_fold(context: Context, name: str) -> Parts:
    """What the reward model of this name learns from: train, or train without the users of the fold it is named by."""
    if name in (ALL, ONE):
        return context.parts
    folds, train = fold_names(context), with_click(context.parts.train)
    kept = np.flatnonzero(fold_of(context, train, len(folds)) != folds.index(name))
    if not len(kept):
        raise ValueError(
            f"alignment.reward.folds is {len(folds)}, and all users of train whose sessions have a click "
            "fall into one fold: no user is left to train a reward model on; set it to 1 (rewards in-sample)"
        )
    return replace(context.parts, train=train.take(kept))


def train_run_models(context: Context, candidates: pd.DataFrame, queries: Queries, **how: Any) -> pd.DataFrame:
    """`reward.train_reward_models` with the run's data and settings. how: the rest."""
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


def rewards_by_form(embedder: QueryEmbedder, folder: Path, candidates: pd.DataFrame) -> dict[str, np.ndarray]:
    """form -> its rewards of these candidates, for judge_reward.choose_form."""
    own = Rewarder.of(embedder, folder)
    return {form: own.scored(candidates, form=form)["reward"].to_numpy() for form in REWARDS}


def chosen_form(
    embedder: QueryEmbedder, folder: Path, candidates: pd.DataFrame, right: np.ndarray
) -> tuple[str, pd.DataFrame]:
    """The form of reward, written into `folder`: alignment.reward.form, or where that is auto the better one on these
    candidates of development users (judge_reward.choose_form), with the table that it was read from."""
    context, rewards = embedder.context, rewards_by_form(embedder, folder, candidates)
    form, table = context.params.alignment.reward.form, right_over_wrong(rewards, right, candidates["session_id"])
    if form == "auto" and context.writes:
        form, table = choose_form(rewards, right, candidates["session_id"].tolist(), dev=context.parts.dev)
    save_form(folder, form)
    return form, table


def rewards_of_others(embedder: QueryEmbedder, folder: Path, candidates: pd.DataFrame) -> dict[str, np.ndarray]:
    """The rewards of the models trained for comparison (alignment.reward.compared)."""
    form, first = form_of(folder), embedder.context.params.ranker.seeds[0]
    others = {"another seed": (ALL, first + 1), "trained on one LLM": (ONE, first)}
    return {
        name: Rewarder.of(embedder, folder, form, name=kind, seed=seed).scored(candidates)["reward"].to_numpy()
        for name, (kind, seed) in others.items()
        if (folder / kind / f"seed-{seed}").is_dir()
    }


def form_of(folder: Path) -> str:
    """The form that `save_form` wrote."""
    return json.loads((folder / FORM).read_text(encoding="utf-8"))["form"]


def save_form(folder: Path, form: str) -> None:
    """Write which form of reward was chosen."""
    write_text(folder / FORM, json.dumps({"form": form}) + "\n")


@dataclass(frozen=True, eq=False)
class Rewarder:
    """A reward model with the embedder of its queries.

    folds  the models that score train's sessions, each those of its own fold of users, without whom it was trained
           (METHOD.md 2.3 [C]); empty: `model` scores them too, in-sample
    folder the models' own
    """

    model: RewardModel | None  # None for an encoder, which writes nothing that could be scored
    embedder: QueryEmbedder
    form: str  # name of reward.REWARDS
    folds: tuple[RewardModel, ...] = ()
    folder: Path | None = None

    @classmethod
    def load(cls, context: Context, folder: Path) -> "Rewarder":
        """The run's own, of notebook 04, with the form that was chosen there."""
        return cls.of(QueryEmbedder(context, context.main()), folder, form_of(folder))

    @classmethod
    def of(
        cls, embedder: QueryEmbedder, folder: Path, form: str = "list", *, name: str = ALL, seed: int | None = None
    ) -> "Rewarder":
        """One of the models that `train_models` saved; the run's own (ALL, the first seed) with those of its folds."""
        params, intents = embedder.context.params, embedder.context.parts.intents
        first = params.ranker.seeds[0]
        seed = first if seed is None else seed
        if not embedder.context.writes:
            return cls(None, embedder, form)
        names = [name, *(fold_names(embedder.context) if (name, seed) == (ALL, first) else ())]
        on = {"device": params.run.device}
        model, *folds = (load_reward_model(folder / each / f"seed-{seed}", intents, **on) for each in names)
        return cls(model, embedder, form, tuple(folds), folder)

    @property
    def of_another_seed(self) -> "Rewarder":
        """The model of the second seed, trained for comparison (alignment.reward.compared)."""
        return Rewarder.of(self.embedder, self.folder, self.form, seed=self.embedder.context.params.ranker.seeds[0] + 1)

    @property
    def in_sample(self) -> "Rewarder":
        """The same without its folds: train's sessions are scored by the model that was trained on them."""
        return replace(self, folds=())

    def of_texts(self, lists: Lists, texts: Sequence[str]) -> np.ndarray:
        """(lists,) nats: the reward of one query a list; NaN for an empty one and where nothing was clicked."""
        present, rewards = np.array([bool(text.strip()) for text in texts]), np.full(len(texts), np.nan)
        if present.any():
            queries, when = self.embedder.queries(texts), self._timestamps(lists)
            for model, rows in self._models(lists, present):
                asked = queries.conditioned(lists.take(rows), [texts[row] for row in rows])
                rewards[rows] = model.reward(asked, form=self.form, timestamps=when[rows])
        return rewards

    def scored(self, candidates: pd.DataFrame, *, form: str | None = None) -> pd.DataFrame:
        """Candidates of train and dev with their reward (reward.score_candidates)."""
        parts, tables = self.embedder.context.parts, []
        queries = self.embedder.queries(candidates["query"].tolist())
        for lists in (with_click(parts.train), with_click(parts.dev)):
            own = candidates[candidates["session_id"].isin(lists.session_id.tolist())]
            if own.empty:
                continue
            when, found = self._timestamps(lists), []
            for model, rows in self._models(lists, pd.Index(lists.session_id).isin(own["session_id"])):
                some = own[own["session_id"].isin(lists.session_id[rows].tolist())]
                how = {"form": form or self.form, "timestamps": when[rows]}
                found.append(score_candidates(model, some, lists.take(rows), queries, **how))
            tables.append(pd.concat(found).loc[own.index])
        return pd.concat(tables, ignore_index=True) if tables else candidates.assign(reward=np.nan)

    def probabilities(self, lists: Lists, texts: Sequence[str]) -> np.ndarray:
        """(lists, candidates): the softmax of each shown list, with one query a list (RewardModel.probabilities)."""
        return self.model.probabilities(self.asked(lists, texts)) if len(texts) else np.zeros(lists.candidates.shape)

    def asked(self, lists: Lists, texts: Sequence[str]) -> QueryLists:
        """The lists, each with its query, as the reward model reads it."""
        return self.embedder.queries(texts).conditioned(lists, texts)

    def _models(self, lists: Lists, asked: np.ndarray) -> list[tuple[RewardModel, np.ndarray]]:
        """The models that score those lists that are asked for (lists,), each with its rows, at least one."""
        if lists.part != "train" or not self.folds:
            return [(self.model, np.flatnonzero(asked))]
        fold = fold_of(self.embedder.context, lists, len(self.folds))
        rows = [np.flatnonzero(asked & (fold == number)) for number in range(len(self.folds))]
        return [(model, own) for model, own in zip(self.folds, rows, strict=True) if len(own)]

    def _timestamps(self, lists: Lists) -> np.ndarray:
        when = self.embedder.context.sessions(lists)["timestamp"]
        return when.to_numpy(dtype="datetime64[us]", na_value=np.datetime64("NaT"))
