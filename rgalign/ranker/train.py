"""All rankers of a run: what each learns from, how it is built, trained for every seed and saved in one folder.

folder/<model>/seed-<seed>/   config.json, weights.safetensors (ranker.store)

With run.launcher each process trains every n-th ranker, whole: they are small and many (models x seeds), and nothing is
sent while they learn [C]. Each has the bytes that one process would give it with as many threads of torch.
"""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from scipy.optimize import minimize_scalar
from torch import nn

from rgalign.data import shards, vectors
from rgalign.data.features import FeatureSpace
from rgalign.data.lists import (
    PARTS,
    Intents,
    Lists,
    Match,
    QueryIntents,
    QueryLists,
    with_match,
    with_queries,
    with_texts,
)
from rgalign.data.vectors import Vectors
from rgalign.params_training import RankerSettings
from rgalign.ranker import chats as chatting
from rgalign.ranker import match as matching
from rgalign.ranker import store
from rgalign.ranker.exposure import with_exposure
from rgalign.ranker.fit import fit, gauc_of, with_click
from rgalign.ranker.losses import Loss, listnet_loss
from rgalign.ranker.match_terms import of_written
from rgalign.ranker.towers import set_whitening
from rgalign.ranker.variants import RANKERS
from rgalign.run import distributed
from rgalign.run.artifacts import atomic, write_table
from rgalign.run.distributed import make_shards, shard_path


@dataclass(frozen=True)
class Parts:
    """What rankers learn from and are chosen on; without the test split.

    Lists and intents are QueryLists and QueryIntents where the ranker reads vectors (with_vectors).
    """

    space: FeatureSpace
    intents: Intents
    train: Lists
    dev: Lists
    valid: Lists
    chats: chatting.Chats | None = None

    @property
    def query_dim(self) -> int:
        """Width of the vectors of sessions and intents; 0 where there are none."""
        has_vectors = isinstance(self.train, QueryLists) and isinstance(self.intents, QueryIntents)
        return self.train.query.shape[1] if has_vectors else 0


PartsOf = Parts | Mapping[str, Parts] | Callable[[str], Parts]  # one for all models, or each model's own


def load_parts(folder: str | Path, match: Path | None = None, exposure: Path | None = None) -> Parts:
    """The encoded parts that notebook 01 wrote. match, exposure: tables/match, tables/exposure, of notebook 03."""
    lists = {part: matching.with_values(shards.load_lists(folder, part), match) for part in ("train", "dev", "valid")}
    lists["train"] = with_exposure(lists["train"], exposure)
    return Parts(shards.load_space(folder), shards.load_intents(folder), **lists)


def parts_of_variant(parts: Parts, name: str, embeddings: Path, seed: int) -> Parts:
    """What one variant learns from: the parts as they are, or with the vectors or chats that it reads.

    embeddings  folder/<Variant.vectors>/sessions and intents (data.vectors), folder/chats (ranker.chats)
    seed        see `with_vectors`
    """
    if RANKERS[name].chats:
        return replace(parts, chats=chatting.load(embeddings / chatting.CHATS))
    kind = RANKERS[name].vectors
    if kind is None:
        return parts
    pair = (vectors.load(embeddings / kind / what) for what in ("sessions", "intents"))
    return with_vectors(parts, name, *pair, seed=seed)


def with_vectors(parts: Parts, name: str, sessions: Vectors, intents: Vectors, seed: int) -> Parts:
    """The parts of one variant that reads vectors.

    sessions, intents  vectors of all of them, by id, made as RANKERS[name].vectors says
    seed               of the permutation of shuffled queries
    Raises ValueError for a variant that reads none, ids without a vector, and widths that differ.
    """
    if RANKERS[name].vectors is None:
        raise ValueError(f"{name} reads no vectors")
    texts = with_texts(parts.intents, intents.rows(parts.intents.intent_id))
    lists = {
        part: lists_with_vectors(getattr(parts, part), name, sessions, parts.train, seed)
        for part in ("train", "dev", "valid")
    }
    query_dim, text_dim = lists["train"].query.shape[1], texts.text.shape[1]
    if query_dim != text_dim:
        raise ValueError(f"{name}: sessions have vectors of {query_dim}, intents of {text_dim}; one model makes both")
    return replace(parts, intents=texts, **lists)


def lists_with_vectors(lists: Lists, name: str, sessions: Vectors, train: Lists, seed: int) -> QueryLists:
    """The lists of one part, test as well, with the query vectors of a variant.

    train  its sessions' mean is the constant query;  seed  of the shuffle, which stays inside the part
    """
    query = RANKERS[name].query
    if RANKERS[name].match.startswith("shuffled") and lists.match is not None:
        order = np.random.default_rng([seed, PARTS.index(lists.part)]).permutation(len(lists))
        moved = lists.match.take(torch.from_numpy(order))
        if RANKERS[name].match == "shuffled_written" and (names := of_written(moved.names)):
            moved = lists.match.replaced(Match(moved.columns(names), tuple(names)))
        lists = with_match(lists, moved)
    if query == "constant":
        mean = sessions.rows(train.session_id).astype(np.float32).mean(axis=0)
        return with_queries(lists, np.tile(mean, (len(lists), 1)))
    values = sessions.rows(lists.session_id)
    if query == "shuffled":
        values = values[np.random.default_rng([seed, PARTS.index(lists.part)]).permutation(len(values))]
    return with_queries(lists, values)


def build(name: str, parts: Parts, settings: RankerSettings, *, positions: int = 0, seed: int = 0) -> nn.Module:
    """A ranker before training. positions: of the longest list where they are real, else 0: no position bias. Where
    exposure is ips there is none either (losses.widen_by).

    Raises ValueError for a variant that reads vectors where the parts hold none.
    """
    variant, space = RANKERS[name], parts.space
    ranker = store.ARCHITECTURES[variant.architecture]
    if variant.vectors and not parts.query_dim:
        raise ValueError(f"{name} reads vectors and these parts hold none: make its parts with with_vectors")
    config = ranker.Config.of(
        settings,
        field_sizes=space.field_sizes,
        history_sizes=space.history_sizes,
        word_buckets=space.word_buckets,
        intent_ids=space.intent_ids_size,
        categories=space.category_size,
        positions=0 if settings.exposure == "ips" else positions,
        text=variant.words,
        query_dim=parts.query_dim if variant.vectors else 0,
        match=match_terms_of(name, parts.train),
    )
    model = ranker(config, seed=seed)
    if model.config.query_dim:
        set_whitening(model, parts.train, parts.intents)
    if model.config.match:
        standardise_match(model, parts.train)
        start_from_match(model, parts)
    return model


def match_terms_of(name: str, lists: Lists) -> tuple[str, ...]:
    """The match terms of these lists that a variant reads."""
    names, asked = () if lists.match is None else lists.match.names, RANKERS[name].match
    if asked == "unwritten":
        return tuple(name for name in names if name not in of_written(names))
    if asked == "words":
        return tuple(name for name in names if name == "word_overlap")
    return () if asked == "none" else names


def standardise_match(model: nn.Module, lists: Lists) -> None:
    """Fix how a ranker scales the match terms that it reads, by the candidates of these lists (train) with a click."""
    if model.config.match:
        lists = with_click(lists)
        model.match.set(lists.match.of_candidates(lists.candidates, model.config.match)[lists.shown])


def start_from_match(model: nn.Module, parts: Parts) -> pd.Series:
    """Make a new ranker the best single match term: that of the highest GAUC on the development users [C].

    Its weight minimises ListNet on train's lists; the others have weight 0. Returns the GAUC of each on dev.
    """
    train, names, head = with_click(parts.train), model.config.match, model.match
    found = {}
    with torch.no_grad():
        scores = head.standardised(train.match.of_candidates(train.candidates, names))
        for column, name in enumerate(names):
            loss = lambda log_weight, own=scores[:, :, column]: float(  # noqa: E731
                listnet_loss(own * math.exp(log_weight), train.clicked, train.shown)
            )
            weight = torch.zeros(len(names))
            weight[column] = math.exp(minimize_scalar(loss, bounds=(-4, 5), method="bounded").x)
            head.weight.copy_(weight)
            found[name] = gauc_of(model, parts.dev, parts.intents).value, weight
        head.weight.copy_(max(found.values(), key=lambda each: each[0])[1])
    return pd.Series({name: gauc for name, (gauc, _) in found.items()}, name="dev_gauc")


def position_bias(parts: Parts, *, seed: int, accelerator: Accelerator | None = None) -> np.ndarray:
    """(positions,) in nats: the trained position bias of a two-tower of the default settings [C]."""
    settings, positions = RankerSettings(), parts.train.candidates.shape[1]
    model = build("two_tower", parts, settings, positions=positions, seed=seed)
    how = {"seed": seed, "accelerator": accelerator, "progress": False}
    return fit(model, parts.train, parts.dev, parts.intents, settings, **how).model.position.detach().cpu().numpy()


def begin(
    name: str, parts: Parts, settings: RankerSettings, *, positions: int, seed: int, accelerator: Accelerator | None
) -> nn.Module:
    """A ranker that is ready for `fit`: built and, if it learns from chats first, trained on them.

    Raises ValueError as `build` does, and where the parts hold no chats.
    """
    model = build(name, parts, settings, positions=positions, seed=seed)
    if RANKERS[name].chats:
        if parts.chats is None:
            raise ValueError(f"{name} learns from chats and these parts hold none: make its parts by parts_of_variant")
        learnt = (parts.chats, parts.train, parts.intents, settings)
        chatting.pretrain(model, *learnt, seed=seed, accelerator=accelerator)
    return model


def loss_of(name: str, settings: RankerSettings) -> Loss:
    """What a ranker is trained by: ListNet for two towers, with the KL of settings.kl_weight for three."""
    return store.ARCHITECTURES[RANKERS[name].architecture].loss(settings)


@dataclass(frozen=True)
class Launch:
    """The processes that train, and where they find what their caller has in memory.

    launcher    run.launcher; None: there are none, the caller trains
    job         folder of what is under way; gone when it is done
    encoded     tables/encoded;  match  tables/match;  exposure  tables/exposure
    embeddings  folder/<Variant.vectors>/sessions and intents;  seed  of shuffled queries (with_vectors)
    """

    launcher: str | None
    job: Path
    encoded: Path
    match: Path
    exposure: Path
    embeddings: Path
    seed: int


def train(
    settings: Mapping[str, RankerSettings],
    seeds: Sequence[int],
    parts: PartsOf,
    *,
    folder: Path,
    positions: int,
    start: Mapping[str, Path] | None = None,
    refit_whitening: bool = True,
    workers: int = 1,
    accelerator: Accelerator | None = None,
    progress: bool = True,
    launch: Launch | None = None,
) -> pd.DataFrame:
    """Train every model with every seed and save it at once. Returns the learning curves, one row an epoch.

    start    model -> folder with seed-<seed>/ of trained rankers to continue from, which are kept if no epoch is
             better; models that are not there start from random weights
    refit_whitening  of a ranker from `start`, on the vectors that it reads now, which another language model may have
             made (METHOD.md 2.1 [C])
    workers  rankers trained at once, on a CPU
    launch   where it has a launcher, its processes train; parts are those that lie where it says. Raises ProcessesError
    """
    if launch is not None and launch.launcher is not None:
        accelerator = accelerator or Accelerator()
        trainings, device = [(name, seed) for name in settings for seed in seeds], accelerator.device.type
        arguments = {
            "settings": {name: own.model_dump() for name, own in settings.items()},
            "trainings": trainings,
            "positions": positions,
            "start": {name: str(path.absolute()) for name, path in (start or {}).items()},
            "refit_whitening": refit_whitening,
            "encoded": str(launch.encoded.absolute()),
            "match": str(launch.match.absolute()),
            "exposure": str(launch.exposure.absolute()),
            "embeddings": str(launch.embeddings.absolute()),
            "seed": launch.seed,
            "device": device,
            "precision": accelerator.mixed_precision,
        }
        return train_by_processes("rank", launch.launcher, launch.job, trainings, arguments, folder, device=device)
    workers, runtime = runtime_of(accelerator, workers, progress)
    jobs = (
        {
            "name": name,
            "parts": parts_of(parts, name),
            "own": own,
            "folder": folder / name / f"seed-{seed}",
            "positions": positions,
            "seed": seed,
            "start": start[name] / f"seed-{seed}" if start and name in start else None,
            "refit_whitening": refit_whitening,
            **runtime,
        }
        for name, own in settings.items()
        for seed in seeds
    )
    total = len(settings) * len(seeds)
    curves = distributed.each(_train_one, jobs, total=total, workers=workers, title="rankers", progress=progress)
    return pd.concat(curves, ignore_index=True)


def runtime_of(accelerator: Accelerator | None, workers: int, progress: bool) -> tuple[int, dict[str, Any]]:
    """How many trainings run at once, and where each runs: accelerator or precision, and progress.

    An accelerator's state belongs to its process: another one makes its own. Only a CPU is shared.
    """
    accelerator = accelerator or Accelerator()
    if workers == 1 or accelerator.device.type != "cpu":
        return 1, {"accelerator": accelerator, "progress": progress}
    return workers, {"precision": accelerator.mixed_precision, "progress": False}


def _train_one(
    name, parts, own, folder, positions, seed, start, refit_whitening, progress, accelerator=None, precision=None
) -> pd.DataFrame:
    accelerator = accelerator or Accelerator(cpu=True, mixed_precision=precision)
    if start:
        model = store.load(start)
        if refit_whitening and model.config.query_dim:
            set_whitening(model, parts.train, parts.intents)
            standardise_match(model, parts.train)
        if own.exposure == "ips" and model.config.positions:
            raise ValueError(f"{start} has a position bias, and ranker.exposure is ips: train without warm start")
        if (before := model.config.positions) < positions and own.exposure != "ips":
            raise ValueError(f"{start} knows {before} positions; lists have {positions} now: train without warm start")
        before, now = (", ".join(terms) or "none" for terms in (model.config.match, match_terms_of(name, parts.train)))
        if before != now:
            raise ValueError(f"{start} reads the match terms {before}; now there are {now}: train without warm start")
    else:
        model = begin(name, parts, own, positions=positions, seed=seed, accelerator=accelerator)
    how = {
        "accelerator": accelerator,
        "progress": progress,
        "from_start": start is not None or bool(model.config.match),
    }
    fitted = fit(model, parts.train, parts.dev, parts.intents, own, seed=seed, loss=loss_of(name, own), **how)
    store.save(folder, fitted.model)
    curve = fitted.curve.drop(columns="seconds")
    return curve.assign(model=name, seed=seed, best=curve.epoch == fitted.best_epoch)


def train_own_rankers(job: Path, given: dict[str, Any]) -> dict[str, int]:
    """This process's part of `train`."""
    parts = load_parts(given["encoded"], Path(given["match"]), Path(given["exposure"]))
    start = given["start"]

    def train_one(number: int, folder: Path) -> pd.DataFrame:
        name, seed = given["trainings"][number]
        own = parts_of_variant(parts, name, Path(given["embeddings"]), given["seed"])
        how = {"positions": given["positions"], "start": {name: Path(start[name])} if name in start else None}
        how |= {"accelerator": accelerator, "progress": distributed.index() == 0}
        how["refit_whitening"] = given["refit_whitening"]
        return train({name: RankerSettings(**given["settings"][name])}, [seed], own, folder=folder, **how)

    with distributed.single_process(given["device"], given["precision"]) as accelerator:
        return train_in_shards(job, len(given["trainings"]), train_one)


def train_by_processes(
    task: str,
    launcher: str,
    job: Path,
    trainings: Sequence[tuple[str, int]],
    arguments: dict[str, Any],
    folder: Path,
    *,
    device: str,
) -> pd.DataFrame:
    """Have a job of the worker that ends in `train_in_shards` done; returns the curves of its trainings in order.

    trainings  name and seed of each: its ranker goes to folder/<name>/seed-<seed>
    What a killed call had trained is trained again: its data or code may have been others. Raises ProcessesError.
    """
    for left in job.glob("shard-*"):
        shutil.rmtree(left)
    distributed.run(task, job, launcher, arguments, device=device, lower="ranker.lists_per_batch")
    curves = []
    for number, (name, seed) in enumerate(trainings):
        shard = shard_path(job, number)
        curves.append(pd.read_parquet(shard / "curve.parquet"))
        with atomic(folder / name / f"seed-{seed}") as temporary:
            shutil.move(shard / "rankers" / name / f"seed-{seed}", temporary)
    shutil.rmtree(job)
    return pd.concat(curves, ignore_index=True)


def train_in_shards(job: Path, count: int, train_one: Callable[[int, Path], pd.DataFrame]) -> dict[str, int]:
    """Train this process's share of `count` trainings: index, index + processes, ..; returns how many.

    train_one  (number, folder to save the ranker in) -> its learning curve
    One that an earlier start of the job has left, whole and with its curve, is kept.
    """

    def make(number: int, shard: Path) -> None:
        write_table(shard / "curve.parquet", train_one(number, shard / "rankers"))

    return {"trained": make_shards(job, count, make, label=lambda number: {"training": number})}


def last_rankers(
    aligned: Path | None, folder: Path | None, models: Sequence[str], seeds: Sequence[int]
) -> dict[str, Path]:
    """model -> folder of the rankers that a warm start continues: QE-Rec the aligned ones, others their own.

    aligned, folder  of the last run: the closed loop's rankers, and those before it; None: nothing to continue
    A model that the last run has not trained with all these seeds starts from random weights.
    """
    if folder is None:
        return {}
    found = {name: aligned if name == "qe_rec" else folder / name for name in models}
    return {name: path for name, path in found.items() if all((path / f"seed-{seed}").is_dir() for seed in seeds)}


def load_rankers(
    folder: Path, models: Sequence[str], seeds: Sequence[int], *, device: str = "cpu"
) -> dict[tuple[str, int], nn.Module]:
    """(model, seed) -> the ranker that `train` saved. device: where it scores, see `store.load`."""
    every = [(name, seed) for name in models for seed in seeds]
    return {(name, seed): store.load(folder / name / f"seed-{seed}", device=device) for name, seed in every}


def parts_of(parts: PartsOf, name: str) -> Parts:
    """Those of one model."""
    if isinstance(parts, Parts):
        return parts
    return parts[name] if isinstance(parts, Mapping) else parts(name)
