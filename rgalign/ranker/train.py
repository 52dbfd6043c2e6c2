"""All rankers of a run: tuned the same way, trained for every seed, kept in one folder.

folder/<model>/seed-<seed>/   config.json, weights.safetensors (ranker.store)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from torch import nn

from rgalign.data import shards, vectors
from rgalign.data.features import FeatureSpace
from rgalign.data.lists import PARTS, Intents, Lists, QueryIntents, QueryLists, with_queries, with_texts
from rgalign.data.vectors import Vectors
from rgalign.ranker import chats as chatting
from rgalign.ranker import store
from rgalign.ranker.fit import Fitted, Loss, fit, listnet
from rgalign.ranker.losses import listnet_kl
from rgalign.ranker.search import changes, configurations, grid, search, space_of
from rgalign.ranker.three_tower import ThreeTower
from rgalign.ranker.two_tower import TwoTower, set_whitening
from rgalign.ranker.variants import VARIANTS
from rgalign.run.distributed import each

ARCHITECTURES = {"two_tower": TwoTower, "three_tower": ThreeTower}
LOOP = ("epochs", "patience", "lists_per_batch", "learning_rate", "weight_decay")  # settings of the training loop


@dataclass(frozen=True)
class Parts:
    """What rankers learn from and are chosen on; the test split is not among it.

    Lists and intents are QueryLists and QueryIntents where the ranker reads vectors (with_vectors); chats are those
    that it learns from before the clicks, where it does.
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


def load_parts(folder: str | Path) -> Parts:
    """The encoded parts that notebook 01 wrote."""
    lists = {part: shards.load_lists(folder, part) for part in ("train", "dev", "valid")}
    return Parts(shards.load_space(folder), shards.load_intents(folder), **lists)


def accelerator(device: str, precision: str) -> Accelerator:
    """accelerate's view of run.device and run.precision. Raises ValueError for a device that is not there."""
    seen = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not seen.get(device, True):
        raise ValueError(f"run.device is {device}, but torch sees no such device here; expected auto or cpu")
    return Accelerator(cpu=device == "cpu", mixed_precision=precision)


def parts_of_variant(parts: Parts, name: str, embeddings: Path, seed: int) -> Parts:
    """What one variant learns from: the parts as they are, or with the vectors or chats that it reads.

    embeddings  folder/<Variant.vectors>/sessions and intents (data.vectors), folder/chats (ranker.chats)
    seed        as of `with_vectors`
    """
    if VARIANTS[name].chats:
        return replace(parts, chats=chatting.load(embeddings / chatting.CHATS))
    kind = VARIANTS[name].vectors
    if kind is None:
        return parts
    pair = (vectors.load(embeddings / kind / what) for what in ("sessions", "intents"))
    return with_vectors(parts, name, *pair, seed=seed)


def with_vectors(parts: Parts, name: str, sessions: Vectors, intents: Vectors, seed: int) -> Parts:
    """The parts of one variant that reads vectors.

    sessions, intents  vectors of all of them, by id, made as VARIANTS[name].vectors says
    seed               of the order in which shuffled queries are dealt out again
    Raises ValueError for a variant that reads none, ids without a vector, and widths that differ.
    """
    if VARIANTS[name].vectors is None:
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

    train  its sessions' mean is the constant query
    seed   of the shuffle, which stays inside the part
    """
    query = VARIANTS[name].query
    if query == "constant":
        mean = sessions.rows(train.session_id).astype(np.float32).mean(axis=0)
        return with_queries(lists, np.tile(mean, (len(lists), 1)))
    values = sessions.rows(lists.session_id)
    if query == "shuffled":
        values = values[np.random.default_rng([seed, PARTS.index(lists.part)]).permutation(len(values))]
    return with_queries(lists, values)


def build(name: str, parts: Parts, settings: Mapping[str, Any], *, positions: int = 0, seed: int = 0) -> nn.Module:
    """A ranker before training.

    settings   of the ranker's shape (TwoTowerConfig, ThreeTowerConfig); others are ignored
    positions  candidates of the longest list where positions are real, else 0: no position bias
    Raises ValueError for a variant that reads vectors where the parts hold none.
    """
    variant, space = VARIANTS[name], parts.space
    ranker = ARCHITECTURES[variant.architecture]
    if variant.vectors and not parts.query_dim:
        raise ValueError(f"{name} reads vectors and these parts hold none: make its parts with with_vectors")
    fixed = {
        "field_sizes": space.field_sizes,
        "history_sizes": space.history_sizes,
        "word_buckets": space.word_buckets,
        "intent_ids": space.intent_ids_size,
        "categories": space.category_size,
        "positions": positions,
        "text": variant.words,
        "query_dim": parts.query_dim if variant.vectors else 0,
    }
    shape = {field.name for field in fields(ranker.Config)}
    own = {key: value for key, value in settings.items() if key in shape}
    model = ranker(ranker.Config(**own | fixed), seed=seed)
    if model.config.query_dim:
        set_whitening(model, parts.train, parts.intents)
    return model


def begin(
    name: str, parts: Parts, settings: Mapping[str, Any], *, positions: int, seed: int, accelerator: Accelerator | None
) -> nn.Module:
    """A ranker that is ready for `fit`: built and, where it learns from chats first, trained on them.

    Raises ValueError as `build` does, and where the parts hold no chats.
    """
    model = build(name, parts, settings, positions=positions, seed=seed)
    if not VARIANTS[name].chats:
        return model
    if parts.chats is None:
        raise ValueError(f"{name} learns from chats and these parts hold none: make its parts with parts_of_variant")
    learnt = (parts.chats, parts.train, parts.intents, settings)
    chatting.pretrain(model, *learnt, seed=seed, accelerator=accelerator)
    return model


def loss_of(name: str, settings: Mapping[str, Any]) -> Loss:
    """ListNet for two towers; for three, with the KL of settings["kl_weight"]."""
    return listnet_kl(settings["kl_weight"]) if VARIANTS[name].architecture == "three_tower" else listnet


def tune(
    settings: Mapping[str, Mapping[str, Any]], parts: PartsOf, *, trials: int, seed: int, positions: int, **runtime: Any
) -> tuple[pd.DataFrame, dict[str, dict[str, Any]]]:
    """The same search for every model. Returns its log (models stacked) and each model's best settings.

    settings  model -> its settings before the search: trial 0 is these, what the search draws replaces them
    parts     one for all models, or model -> its own
    trials    drawn for every model: half of them from the whole space, half near the best so far; a control takes its
              model's best, where that is searched too, and tries each value of what is its own (search.space_of)
    runtime   accelerator, progress
    """
    logs: dict[str, pd.DataFrame] = {}
    best: dict[str, dict[str, Any]] = {}
    progress = runtime.pop("progress", True)
    for name in sorted(settings, key=lambda name: "/" in name):
        own, space, mine = dict(settings[name]), space_of(name), parts_of(parts, name)
        if "/" in name:
            own |= best.get(name.split("/")[0], {})
            tried, nearby = grid(space), []
        else:
            drawn, half = configurations(trials, seed=seed, space=space), trials - trials // 2
            tried = [{key: own[key] for key in space if key in own}, *drawn[:half]]
            nearby = changes(drawn[half:], seed=seed)
        fit_one = partial(_fit_trial, name, mine, own, positions, seed, runtime)
        log, found = search(fit_one, tried, nearby, mine.valid, mine.intents, progress=progress)
        best[name] = {**own, **found}
        logs[name] = log.drop(columns="seconds").assign(model=name)  # seconds would differ from run to run
    return pd.concat([logs[name] for name in settings], ignore_index=True), {name: best[name] for name in settings}


def train(
    settings: Mapping[str, Mapping[str, Any]],
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
) -> pd.DataFrame:
    """Train every model with every seed and save it at once. Returns the learning curves, one row an epoch.

    start    model -> folder with seed-<seed>/ of trained rankers to go on from, which are kept where no epoch is
             better; models that are not there start from random weights
    refit_whitening  of a ranker from `start`, on the vectors that it reads now: whitening belongs to the language model
             that made the vectors, and `start` may have read another one's (METHOD.md 2.1 [C])
    workers  rankers trained at once, on a CPU; on another device they come one after the other
    """
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
    curves = each(_train_one, jobs, total=total, workers=workers, title="rankers", progress=progress)
    return pd.concat(curves, ignore_index=True)


def runtime_of(accelerator: Accelerator | None, workers: int, progress: bool) -> tuple[int, dict[str, Any]]:
    """How many trainings go at once, and what each is told of where it runs: accelerator or precision, and progress.

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
    how = {"positions": positions, "seed": seed, "accelerator": accelerator}
    model = store.load(start) if start else begin(name, parts, own, **how)
    if start and refit_whitening and model.config.query_dim:
        set_whitening(model, parts.train, parts.intents)
    if model.config.positions < positions and start:
        raise ValueError(f"{start} knows {model.config.positions} positions; lists have {positions} now: begin anew")
    how = {"accelerator": accelerator, "progress": progress}
    learnt = (parts.train, parts.dev, parts.intents)
    how |= {"loss": loss_of(name, own), "from_start": start is not None, **fitting(own)}
    fitted = fit(model, *learnt, seed=seed, **how)
    store.save(folder, fitted.model)
    curve = fitted.curve.drop(columns="seconds")
    return curve.assign(model=name, seed=seed, best=curve.epoch == fitted.best_epoch)


def last_rankers(
    aligned: Path | None, folder: Path | None, models: Sequence[str], seeds: Sequence[int]
) -> dict[str, Path]:
    """model -> folder of the rankers that a warm start goes on from: QE-Rec from the aligned ones, others from theirs.

    aligned, folder  of the last run: the closed loop's rankers, and those before it; None: nothing to go on from
    A model that the last run has not trained with all these seeds begins anew.
    """
    if folder is None:
        return {}
    found = {name: aligned if name == "qe_rec" else folder / name for name in models}
    return {name: path for name, path in found.items() if all((path / f"seed-{seed}").is_dir() for seed in seeds)}


def load_rankers(
    folder: Path, models: Sequence[str], seeds: Sequence[int], *, device: str = "cpu"
) -> dict[tuple[str, int], nn.Module]:
    """(model, seed) -> the ranker that `train` saved. device: where it scores, as of `store.load`."""
    every = [(name, seed) for name in models for seed in seeds]
    return {(name, seed): store.load(folder / name / f"seed-{seed}", device=device) for name, seed in every}


def parts_of(parts: PartsOf, name: str) -> Parts:
    """Those of one model."""
    if isinstance(parts, Parts):
        return parts
    return parts[name] if isinstance(parts, Mapping) else parts(name)


def _fit_trial(name, parts, own, positions, seed, runtime, drawn: Mapping[str, Any]) -> Fitted:
    settings = {**own, **drawn}
    model = begin(name, parts, settings, positions=positions, seed=seed, accelerator=runtime.get("accelerator"))
    how = {"loss": loss_of(name, settings), **fitting(settings), **runtime, "progress": False}
    return fit(model, parts.train, parts.dev, parts.intents, seed=seed, **how)


def fitting(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of a ranker's settings, those of the training loop."""
    return {key: value for key, value in settings.items() if key in LOOP}
