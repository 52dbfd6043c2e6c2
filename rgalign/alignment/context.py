"""The data, models and settings that every alignment step of a run uses, and where the aligned models are on disk.

models/sft, dpo, cl, rgalign   a reasoner each: whole, or its adapter alone (peft); a step that is off copies its input
models/retrained_rankers, tables/retrained_embeddings   QE-Rec retrained on the vectors of models/dpo: RG-CL's space
models/cl_folds, cl_rankers    of cross-fitting, and of end_to_end; empty: switched off
The test split is not accessible here.
"""

import copy
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from accelerate import Accelerator

from rgalign.alignment.objectives import LIST_OBJECTIVES, OBJECTIVES
from rgalign.alignment.reward import REWARDS
from rgalign.data import tables, vectors
from rgalign.data.lists import Lists, Match, QueryLists, with_queries
from rgalign.data.tables import Dataset
from rgalign.data.vectors import Vectors
from rgalign.errors import nearest, safe_repr
from rgalign.params import Params
from rgalign.params_training import Alignment, RankerSettings
from rgalign.ranker import store
from rgalign.ranker import train as rankers
from rgalign.ranker.fit import score, with_click
from rgalign.ranker.match import PROMPT, WRITTEN, Compared, Matcher, Places, places_in, with_values
from rgalign.ranker.match_terms import of_written
from rgalign.ranker.towers import ThreeTower
from rgalign.ranker.train import Parts
from rgalign.reasoner import build, written
from rgalign.reasoner.adapter import adapted
from rgalign.reasoner.build import ADAPTER, MAIN, Recipe
from rgalign.reasoner.embed import embed
from rgalign.reasoner.generate import embedded_sessions
from rgalign.reasoner.model import Reasoner, export_reasoner, load_saved, place_of, read_from, save
from rgalign.reasoner.trainer import Engine, Setup
from rgalign.run import distributed
from rgalign.run.artifacts import atomic, write_table
from rgalign.run.stages import OpenStage
from rgalign.seeding import derived


def unknown_names(alignment: Alignment) -> list[str]:
    """Errors in the names of the objective and of the form of reward; empty where both are registered."""
    asked = {"dpo.objective": alignment.dpo.objective, "reward.form": alignment.reward.form}
    known = {"dpo.objective": [*OBJECTIVES, *LIST_OBJECTIVES], "reward.form": ["auto", *REWARDS]}
    return [
        f"alignment.{key} is {safe_repr(name)}; expected {' | '.join(known[key])}{nearest(name, known[key])}"
        for key, name in asked.items()
        if name not in known[key]
    ]


QE_REC, RGALIGN_REC = "qe_rec", "rgalign_rec"
TUNED, CURVE = "tuned", "curve.parquet"  # of a step's job: what its processes write


@dataclass(frozen=True, eq=False)
class Context:
    """A run's params, data, rankers and vectors: those of QE-Rec (notebooks 02, 03), until `reading` replaces them."""

    params: Params
    shop: Dataset  # train and valid: of their sessions what a prompt shows, of their impressions the clicked ones
    parts: Parts  # encoded, with the vectors in `embeddings`: sessions, intents
    recipe: Recipe
    rankers: Mapping[int, ThreeTower]  # by seed, those in `rankers_folder`
    models: Path  # folder of the language models of notebook 02
    rankers_folder: Path
    embeddings: Path
    matcher: Matcher

    @classmethod
    def of(cls, stage: OpenStage) -> "Context":
        """From a stage's declared inputs. Raises as `at`."""
        return cls.at(stage.params, stage.path)

    @classmethod
    def at(cls, params: Params, path: Callable[[str], Path]) -> "Context":
        """path: artifact -> its path. Raises ValueError for an unknown objective or form of reward."""
        if unknown := unknown_names(params.alignment):  # before anything is trained: a notebook may be opened alone
            raise ValueError("; ".join(unknown))
        recipe, data = build.Recipe.of(params), path("tables/dataset")
        rankers_folder, embeddings = path("models/rankers") / QE_REC, path("tables/embeddings") / "prompt"
        shop = tables.excerpt(data, recipe.columns(data))
        parts = rankers.load_parts(*map(path, ("tables/encoded", "tables/match", "tables/exposure")))
        compared = Compared(params.evaluation.untrained, params.reasoner.compares, recipe.columns(data), shop.kinds)
        terms = path("tables/match"), params.ranker.match, compared
        matcher = Matcher.load(*terms, shop.intents, places_in(path("tables/embeddings")), parts.train)
        plain = cls(params, shop, parts, recipe, {}, path("models/reasoner"), rankers_folder, embeddings, matcher)
        return plain.reading(embeddings, rankers_folder)

    def reading(self, embeddings: Path, rankers_folder: Path) -> "Context":
        """The run with other vectors (sessions, intents in `embeddings`) and rankers (seed-<seed> in `rankers_folder`).

        Match terms are those over these vectors, where `match_again` has written them beside them.
        Raises StoreError, and ValueError for a session or intent without a vector.
        """
        pair = (vectors.load(embeddings / kind) for kind in ("sessions", "intents"))
        parts, matcher, own = self.parts, self.matcher, embeddings / "match"
        if own.is_dir():
            parts = replace(
                parts, **{each.part: with_values(each, own) for each in (parts.train, parts.dev, parts.valid)}
            )
            matcher = Matcher.load(
                own, matcher.names, matcher.compared, self.shop.intents, self.places(embeddings), self.parts.train
            )
        return replace(
            self,
            matcher=matcher,
            parts=rankers.with_vectors(parts, QE_REC, *pair, seed=self.params.reasoner.seed),
            rankers=load_seeds(rankers_folder, self.params.ranker.seeds, device=self.params.run.device),
            rankers_folder=rankers_folder,
            embeddings=embeddings,
        )

    def places(self, embeddings: Path) -> Places:
        """Where the match terms find vectors: those of prompts in `embeddings`, others as notebook 02 made them."""
        return places_in(self.run / "tables" / "embeddings", embeddings)

    def match_again(self, writer: Reasoner, embeddings: Path, work: Path) -> None:
        """Fit the match terms on the vectors and queries of another LM, into embeddings/match and embeddings/written.

        Train's queries stay those of the reasoner before its alignment: the aligned one has learnt from their clicks,
        and a ranker would trust its queries more than those of sessions that nobody has seen (METHOD.md 2.3 [C]).
        """
        if self.params.ranker.match:
            parts = (self.parts.train, self.parts.dev, self.parts.valid)
            if asked := self.write_queries(writer, parts[1:], work):
                before = written.load(self.run / "tables" / "embeddings" / WRITTEN)
                written.save(embeddings / WRITTEN, before.updated(asked))
            places = self.places(embeddings)
            matcher = Matcher.fit(self.shop, self.parts.train, self.matcher.compared, places, self.params.ranker)
            matcher.save(embeddings / "match", matcher.matched(self.shop, parts, places))

    def write_queries(
        self, writer: Reasoner, parts: Sequence[Lists], work: Path | None = None
    ) -> written.WrittenQueries | None:
        """The queries that a reasoner writes for these lists' sessions; None where no match term reads them. work: see
        `written.write`."""
        frame = pd.concat([self.sessions(lists) for lists in parts], ignore_index=True)
        how = {"seed": derived(self.params.run.seed, WRITTEN), "work": work}
        return build.written(self.recipe, self.main(), self.shop, self.params.ranker, frame, writer, **how)

    def matched_queries(self, queries: Vectors) -> Match | None:
        """The match terms of queries, which their ids say; None where none reads a query. queries: by `main`."""
        if self.query_reader is not None:
            queries = self.query_reader.vectors(queries.ids.tolist())
        return self.matcher.of_queries(queries)

    @cached_property
    def query_reader(self) -> written.TextEmbedder | None:
        """What reads written queries beside the LLM (reasoner.reader), where a match term does; else None."""
        if self.recipe.settings.reader is None or not of_written(self.params.ranker.match):
            return None
        recipe, reads = build.text_reader(self.recipe, None, self.models)
        return written.TextEmbedder(reads, recipe.prompter(self.shop, reads))

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.models.parents[1]

    @property
    def writes(self) -> bool:
        """Whether the reasoner writes queries; an encoder only embeds."""
        return self.params.reasoner.kind == "causal"

    @property
    def accelerator(self) -> Accelerator:
        return distributed.accelerator(self.params.run.device, self.params.run.precision)

    def setup(self, step: str, work: Path) -> Setup:
        """How the reasoner is trained in this step, whose name its seed derives from. work: folder of checkpoints."""
        run, how = self.params.run, self.params.alignment
        engine = Engine(run.precision, **how.engine.model_dump())
        return Setup(folder=work, seed=derived(run.seed, step), lora=how.lora, engine=engine)

    def tune_by_processes(
        self,
        step: str,
        start: Reasoner,
        work: Path,
        *,
        given: Mapping[str, pd.DataFrame],
        learners: Lists | None = None,
        watched: bool = False,
    ) -> tuple[Reasoner, pd.DataFrame, dict[str, Any]]:
        """A step (sft, dpo, cl) by the processes of run.launcher, which read the run's context from its directory.

        given  tables that the step reads, by name;  learners  lists it learns from; None: all
        Returns the reasoner, its curve, and what the worker returns: looks (step -> figures) if it is `watched`.
        """
        job = work / "job"
        for name, table in given.items():
            write_table(job / f"{name}.parquet", table)
        arguments = {"run": str(self.run.absolute()), "step": step, "tables": sorted(given), "watched": watched}
        arguments |= {"embeddings": str(self.embeddings.absolute()), "rankers": str(self.rankers_folder.absolute())}
        arguments |= {"reasoner": export_reasoner(start, job / "start"), "work": str((work / "training").absolute())}
        arguments["learners"] = None if learners is None else learners.session_id.tolist()
        result = distributed.run("tune", job, self.recipe.launcher, arguments, device=self.params.run.device)
        return self.load(job / TUNED), pd.read_parquet(job / CURVE), result

    @property
    def settings(self) -> RankerSettings:
        """QE-Rec's settings."""
        return self.params.ranker.settings()[QE_REC]

    @property
    def positions(self) -> int:
        """Candidates of the longest list, for the position bias; 0: positions are not real, or not to be learnt."""
        real = self.params.ranker.position_bias and self.shop.meta.get("position_is_real", True)
        return self.parts.train.candidates.shape[1] if real else 0

    @property
    def clicked_lists(self) -> Lists:
        """Lists of train's part with a click, development users not among them: what the reasoner may learn from."""
        return with_click(self.parts.train)

    def drawn(self, session_ids: Sequence[str], step: str) -> np.ndarray:
        """(sessions,) rows of these sessions of train that a step learns from: each once or, by alignment.weights, as
        many in all, drawn again and again in proportion to the weights of their clicks."""
        if self.params.alignment.weights == "none":
            return np.arange(len(session_ids))
        lists = self.clicked_lists
        if lists.weight is None:
            raise ValueError("alignment.weights is exposure, and tables/exposure has no weights: run notebook 03 again")
        weight = pd.Series(lists.weight.sum(dim=1).double().numpy(), lists.session_id)[list(session_ids)].to_numpy()
        random = np.random.default_rng(derived(self.params.run.seed, f"sessions of {step}"))
        return np.sort(random.choice(len(weight), len(weight), p=weight / weight.sum()))

    def main(self) -> Reasoner:
        """The reasoner before its alignment."""
        return self.language_models(MAIN)[MAIN]

    def language_models(self, *names: str) -> dict[str, Reasoner]:
        """The run's language models by name; all of them where none is named."""
        others = build.KB_LM, build.READER
        found = names or sorted(path.name for path in self.models.iterdir() if path.name not in others)
        return {name: load_saved(self.models / name, **self.recipe.loading) for name in found}

    def sessions(self, lists: Lists) -> pd.DataFrame:
        """The sessions of these lists, in their order."""
        return self.shop.sessions.set_index("session_id", drop=False).loc[list(lists.session_id)].reset_index(drop=True)

    def rows_of(self, lists: Lists, session_ids: Sequence[str]) -> Lists:
        """One list a session id, in their order; a session may come many times. Raises KeyError for an unknown one."""
        return lists.take(pd.Series(range(len(lists)), lists.session_id)[list(session_ids)].to_numpy())

    def prompts(self, reasoner: Reasoner, lists: Lists) -> list[list[int]]:
        """Token ids, one prompt a list."""
        return self.recipe.prompter(self.shop, reasoner).sessions(self.sessions(lists))

    def embedded_prompts(self, reasoner: Reasoner, lists: Lists) -> Sequence[Sequence[int]]:
        """Token ids of what is embedded, one row a list (reasoner.embed): with prompt_query this reasoner writes."""
        prompter = self.recipe.prompter(self.shop, reasoner)
        return embedded_sessions(reasoner, prompter, prompter.sessions(self.sessions(lists)), progress=False)

    def prompts_by_session(self, reasoner: Reasoner) -> dict[str, list[int]]:
        """session_id -> token ids, of `clicked_lists`."""
        lists = self.clicked_lists
        return dict(zip(lists.session_id.tolist(), self.prompts(reasoner, lists), strict=True))

    def mean_scores(self, lists: QueryLists) -> np.ndarray:
        """(lists, candidates) scores of the rankers, mean over their seeds; -inf where padded."""
        return np.mean([score(each, lists, self.parts.intents) for each in self.rankers.values()], axis=0)

    def with_vectors_of(self, reasoner: Reasoner, lists: Lists) -> QueryLists:
        """The lists with the vectors of their sessions by this reasoner."""
        prefix, prompts = len(self.recipe.prompter(self.shop, reasoner).head), self.embedded_prompts(reasoner, lists)
        found = embed(reasoner, prompts, prefix=prefix, progress=False)
        if self.params.ranker.match:  # of these vectors too: what the terms learnt from train stays
            places = self.places(self.embeddings)

            def of_set(name: str) -> Vectors | written.WrittenQueries:
                if name == PROMPT:
                    return Vectors(lists.session_id, found)
                if name == WRITTEN:
                    return (
                        written.load(places(name)) if lists.part == "train" else self.write_queries(reasoner, [lists])
                    )
                return vectors.load(places(name) / "sessions")

            [lists] = self.matcher.matched(self.shop, [lists], of_set)
        return with_queries(lists, found)

    def embedding(self, reasoner: Reasoner) -> build.Embedding:
        return build.embedding("prompt", self.recipe, {MAIN: reasoner}, self.shop)

    def save(self, reasoner: Reasoner, folder: Path) -> None:
        """Write a step's reasoner; of one with an adapter, which belongs to models/reasoner/main, the adapter alone."""
        save(reasoner, folder)

    def save_step(self, reasoner: Reasoner, folder: Path, *, start: Reasoner, before: Path) -> None:
        """`save`, or a copy of `before` where the step is switched off, and `reasoner` is still `start`."""
        copy_folder(before, folder) if reasoner is start else self.save(reasoner, folder)

    def load(self, folder: Path) -> Reasoner:
        """A step's reasoner; an adapter is not merged, so that the next step can go on training it."""
        return load_step(folder, self.recipe, self.main())


def load_aligned(stage: OpenStage, recipe: Recipe, main: Reasoner) -> Reasoner | None:
    """The aligned reasoner of a run, for notebook 09; None where the run has no alignment. main: before it."""
    return load_step(stage.path("models/rgalign"), recipe, main) if stage.params.alignment.loop.rounds else None


def load_aligned_rankers(folder: Path, seeds: Sequence[int], *, device: str) -> dict[tuple[str, int], ThreeTower]:
    """(rgalign_rec, seed) -> the ranker that notebook 08 trained. device: see `store.load`."""
    return {(RGALIGN_REC, seed): model for seed, model in load_seeds(folder, seeds, device=device).items()}


def load_seeds(folder: Path, seeds: Sequence[int], *, device: str) -> dict[int, ThreeTower]:
    """seed -> the ranker in folder/seed-<seed>. Raises StoreError."""
    return {seed: store.load(folder / f"seed-{seed}", device=device) for seed in seeds}


def load_step(folder: Path, recipe: Recipe, main: Reasoner) -> Reasoner:
    """The reasoner that a step wrote: whole, or an adapter of `main`, the reasoner before its alignment."""
    if not (folder / ADAPTER).is_file():
        whole = load_saved(folder, **recipe.loading)
        # the base that an adapter of a later step names: the folder of the step before may be removed
        whole.model.name_or_path = whole.model.config.name_or_path = main.name
        return replace(whole, name=main.name)
    base = copy.deepcopy(main.model)  # peft writes its layers into the model that it is given
    whole = replace(main, model=adapted(base, folder, main.name, merge=False))
    place = place_of(main)
    return read_from(whole, Path(place["folder"]), folder) if place and not place["adapter"] else whole


def copy_folder(start: Path, folder: Path) -> None:
    """The output of a step that is switched off: a copy of its input."""
    with atomic(folder) as temporary:
        shutil.copytree(start, temporary)
