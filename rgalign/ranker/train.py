"""All rankers of a run: tuned the same way, trained for every seed, kept in one folder.

folder/<model>/seed-<seed>/   config.json, weights.safetensors (ranker.store)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import Accelerator
from torch import nn

from rgalign.data import shards
from rgalign.data.features import FeatureSpace
from rgalign.data.lists import Intents, Lists
from rgalign.ranker import store
from rgalign.ranker.fit import fit
from rgalign.ranker.search import FITTING, search
from rgalign.ranker.two_tower import TwoTower, TwoTowerConfig

TEXT = {"two_tower": False, "two_tower_text": True}  # the rankers that can be trained, and whether they read words
SHAPE = {field.name for field in fields(TwoTowerConfig)}


@dataclass(frozen=True)
class Parts:
    """What rankers learn from and are chosen on; the test split is not among it."""

    space: FeatureSpace
    intents: Intents
    train: Lists
    dev: Lists
    valid: Lists


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


def build(
    name: str, space: FeatureSpace, settings: Mapping[str, Any], *, positions: int = 0, seed: int = 0
) -> nn.Module:
    """A ranker before training.

    settings   of the ranker's shape (TwoTowerConfig); others are ignored
    positions  candidates of the longest list where positions are real, else 0: no position bias
    """
    own = {key: value for key, value in settings.items() if key in SHAPE}
    config = TwoTowerConfig(
        field_sizes=space.field_sizes,
        history_sizes=space.history_sizes,
        word_buckets=space.word_buckets,
        intent_ids=space.intent_ids_size,
        categories=space.category_size,
        positions=positions,
        text=TEXT[name],
        **own,
    )
    return TwoTower(config, seed=seed)


def tune(
    settings: Mapping[str, Mapping[str, Any]], parts: Parts, *, trials: int, seed: int, positions: int, **runtime: Any
) -> tuple[pd.DataFrame, dict[str, dict[str, Any]]]:
    """The same search for every model. Returns its log (models stacked) and each model's best settings.

    settings  model -> its settings before the search; what the search draws replaces them
    runtime   accelerator, progress
    """
    logs, best = [], {}
    for name, own in settings.items():
        make = partial(_from_trial, name, parts.space, own, positions, seed)
        given = {**_fitting(own), **runtime}
        log = search(
            make, parts.train, parts.dev, parts.valid, parts.intents, trials=trials, seed=seed,
            **{key: value for key, value in given.items() if key not in FITTING},
        )  # fmt: skip
        drawn = log.columns.difference(["trial", "dev_gauc", "valid_gauc", "best_epoch", "seconds"])
        best[name] = {**own, **{key: log[key].iloc[0].item() for key in drawn}}
        logs.append(log.drop(columns="seconds").assign(model=name))  # seconds would differ from run to run
    return pd.concat(logs, ignore_index=True), best


def train(
    settings: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    parts: Parts,
    *,
    folder: Path,
    positions: int,
    **runtime: Any,
) -> pd.DataFrame:
    """Train every model with every seed and save it at once. Returns the learning curves, one row an epoch."""
    curves = []
    for name, own in settings.items():
        for seed in seeds:
            model = build(name, parts.space, own, positions=positions, seed=seed)
            fitted = fit(model, parts.train, parts.dev, parts.intents, seed=seed, **_fitting(own), **runtime)
            store.save(folder / name / f"seed-{seed}", fitted.model)
            curve = fitted.curve.drop(columns="seconds")
            curves.append(curve.assign(model=name, seed=seed, best=curve.epoch == fitted.best_epoch))
    return pd.concat(curves, ignore_index=True)


def load_rankers(folder: Path, models: Sequence[str], seeds: Sequence[int]) -> dict[tuple[str, int], nn.Module]:
    """(model, seed) -> the ranker that `train` saved."""
    return {(name, seed): store.load(folder / name / f"seed-{seed}") for name in models for seed in seeds}


def _from_trial(name, space, own, positions, seed, drawn: Mapping[str, Any]) -> nn.Module:
    return build(name, space, {**own, **drawn}, positions=positions, seed=seed)


def _fitting(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in SHAPE}
