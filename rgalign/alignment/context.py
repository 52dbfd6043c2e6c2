"""What every step of a run's alignment works with, and where the aligned models lie on disk.

models/sft, models/dpo, models/cl, models/rgalign   a reasoner each: whole, or its adapter alone (peft)
models/retrained_rankers, tables/retrained_embeddings   seed-<seed>; sessions, intents: QE-Rec retrained on the vectors
                    of models/dpo, the space of RG-CL (loop.retrain); where that LM has not moved, copies of QE-Rec's
models/cl_folds     fold-0, fold-1: of RG-CL without one half of the users each (cross_fit); empty: not asked for
models/cl_rankers   seed-<seed>: rankers that learnt together with models/cl (end_to_end); empty: not asked for
A step that is switched off hands on what it was given. The test split is nowhere in reach.
"""

import copy
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from accelerate import Accelerator

from rgalign.alignment.objectives import OBJECTIVES
from rgalign.alignment.reward import REWARDS
from rgalign.data import tables, vectors
from rgalign.data.lists import Lists
from rgalign.data.tables import Dataset
from rgalign.data.vectors import Vectors
from rgalign.errors import nearest, safe_repr
from rgalign.params import Params
from rgalign.params_schema import Alignment
from rgalign.ranker import store
from rgalign.ranker import train as rankers
from rgalign.ranker.fit import with_click
from rgalign.ranker.three_tower import ThreeTower
from rgalign.ranker.train import Parts
from rgalign.reasoner import build
from rgalign.reasoner.adapter import adapted
from rgalign.reasoner.build import ADAPTER, MAIN, Recipe
from rgalign.reasoner.generate import embedded_sessions
from rgalign.reasoner.model import Reasoner, save
from rgalign.reasoner.source import load_saved, place_of, read_from
from rgalign.reasoner.trainer import Engine
from rgalign.run.artifacts import atomic
from rgalign.run.stages import OpenStage

# The functions that params call by name: which names there are is known where the functions are.


def unknown_names(alignment: Alignment) -> list[str]:
    """What is wrong with the names of an objective and of a form of reward; empty where both are there."""
    asked = {"dpo.objective": alignment.dpo.objective, "reward.form": alignment.reward.form}
    known = {"dpo.objective": [*OBJECTIVES], "reward.form": ["auto", *REWARDS]}
    return [
        f"alignment.{key} is {safe_repr(name)}; expected {' | '.join(known[key])}{nearest(name, known[key])}"
        for key, name in asked.items()
        if name not in known[key]
    ]


QE_REC, RGALIGN_REC = "qe_rec", "rgalign_rec"


@dataclass(frozen=True, eq=False)
class Context:
    """A run as its alignment sees it.

    shop      train and valid: of their sessions what a prompt shows, of their impressions the clicked ones
    parts     encoded, with the vectors that lie in `embeddings`: sessions, intents
    rankers   seed -> the rankers that lie in `rankers_folder`;  models  folder of the language models of notebook 02
    Vectors and rankers are QE-Rec's of notebooks 02 and 03, until `reading` puts others in their place.
    """

    params: Params
    shop: Dataset
    parts: Parts
    recipe: Recipe
    rankers: Mapping[int, ThreeTower]
    models: Path
    rankers_folder: Path
    embeddings: Path

    @classmethod
    def of(cls, stage: OpenStage) -> "Context":
        """From a stage's declared inputs. Raises as `at`."""
        return cls.at(stage.params, stage.path)

    @classmethod
    def at(cls, params: Params, path: Callable[[str], Path]) -> "Context":
        """path: artifact -> where it lies; an open stage has verified it.

        Raises ValueError for an objective or reward that nobody has written.
        """
        if unknown := unknown_names(params.alignment):  # before anything is trained: a notebook may be opened alone
            raise ValueError("; ".join(unknown))
        recipe, data = build.Recipe.of(params), path("tables/dataset")
        rankers_folder, embeddings = path("models/rankers") / QE_REC, path("tables/embeddings") / "prompt"
        shop, parts = tables.excerpt(data, recipe.columns(data)), rankers.load_parts(path("tables/encoded"))
        plain = cls(params, shop, parts, recipe, {}, path("models/reasoner"), rankers_folder, embeddings)
        return plain.reading(embeddings, rankers_folder)

    def reading(self, embeddings: Path, rankers_folder: Path) -> "Context":
        """The run with other vectors (sessions, intents in `embeddings`) and rankers (seed-<seed> in `rankers_folder`).

        Raises StoreError, and ValueError for a session or intent without a vector.
        """
        pair = (vectors.load(embeddings / kind) for kind in ("sessions", "intents"))
        return replace(
            self,
            parts=rankers.with_vectors(self.parts, QE_REC, *pair, seed=self.params.reasoner.seed),
            rankers=load_seeds(rankers_folder, self.params.ranker.seeds, device=self.params.run.device),
            rankers_folder=rankers_folder,
            embeddings=embeddings,
        )

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
        return rankers.accelerator(self.params.run.device, self.params.run.precision)

    @property
    def engine(self) -> Engine:
        """How the steps that tune the reasoner are run."""
        return Engine(self.params.run.precision, **self.params.alignment.engine.model_dump())

    @property
    def settings(self) -> dict:
        """What QE-Rec is built and trained with."""
        return self.params.ranker.settings()[QE_REC]

    @property
    def positions(self) -> int:
        """Candidates of the longest list, for the position bias; 0: positions are not real, or not to be learnt."""
        real = self.params.ranker.position_bias and self.shop.meta.get("position_is_real", True)
        return self.parts.train.candidates.shape[1] if real else 0

    @property
    def learners(self) -> Lists:
        """Lists of train's part with a click: what the reasoner may learn from. Development users are not among it."""
        return with_click(self.parts.train)

    def main(self) -> Reasoner:
        """The reasoner before its alignment."""
        return self.language_models(MAIN)[MAIN]

    def language_models(self, *names: str) -> dict[str, Reasoner]:
        """The run's language models by name; all of them where none is named."""
        how = {"kind": self.params.reasoner.kind, "dtype": self.params.reasoner.dtype, "device": self.params.run.device}
        found = names or sorted(path.name for path in self.models.iterdir() if path.name != build.KB_LM)
        return {name: load_saved(self.models / name, **how) for name in found}

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

    def embedded(self, reasoner: Reasoner, work: Path) -> Vectors:
        """Vectors of all sessions of train and valid, as notebook 02 makes them."""
        return self.embedding(reasoner).sessions(self.shop.sessions, work)

    def embedding(self, reasoner: Reasoner) -> build.Embedding:
        return build.embedding("prompt", self.recipe, {MAIN: reasoner}, self.shop)

    def save(self, reasoner: Reasoner, folder: Path) -> None:
        """Write a step's reasoner: an adapter alone where it has one, which belongs to models/reasoner/main."""
        save(reasoner, folder)

    def load(self, folder: Path) -> Reasoner:
        """What a step wrote; an adapter stays one, so that the next step trains it on."""
        return load_step(folder, self.recipe, self.main())


def load_aligned(stage: OpenStage, recipe: Recipe, main: Reasoner) -> Reasoner | None:
    """The aligned reasoner of a run, for notebook 09; None where the run has no alignment. main: before it."""
    if not stage.params.alignment.loop.rounds:
        return None
    return load_step(stage.path("models/rgalign"), recipe, main)


def load_aligned_rankers(
    folder: Path, seeds: Sequence[int], *, device: str = "cpu"
) -> dict[tuple[str, int], ThreeTower]:
    """(rgalign_rec, seed) -> the ranker that notebook 08 trained. device: where it scores, as of `store.load`."""
    return {(RGALIGN_REC, seed): model for seed, model in load_seeds(folder, seeds, device=device).items()}


def load_seeds(folder: Path, seeds: Sequence[int], *, device: str = "cpu") -> dict[int, ThreeTower]:
    """seed -> the ranker in folder/seed-<seed>. device: where it scores, as of `store.load`. Raises StoreError."""
    return {seed: store.load(folder / f"seed-{seed}", device=device) for seed in seeds}


def load_step(folder: Path, recipe: Recipe, main: Reasoner) -> Reasoner:
    """The reasoner that a step wrote: whole, or an adapter of `main`, the reasoner before its alignment."""
    if not (folder / ADAPTER).is_file():
        how = {"kind": recipe.settings["kind"], "dtype": recipe.settings["dtype"], "device": recipe.device}
        whole = load_saved(folder, **how)
        # what an adapter of a later step says it belongs to: the folder of the step before may go
        whole.model.name_or_path = whole.model.config.name_or_path = main.name
        return replace(whole, name=main.name)
    base = copy.deepcopy(main.model)  # peft writes its layers into the model that it is given
    whole = replace(main, model=adapted(base, folder, main.name, merge=False))
    place = place_of(main)
    return read_from(whole, Path(place["folder"]), folder) if place and not place["adapter"] else whole


def hand_on(start: Path, folder: Path) -> None:
    """What a step that is switched off writes: a copy of what it was given."""
    with atomic(folder) as temporary:
        shutil.copytree(start, temporary)
