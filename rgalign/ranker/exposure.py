"""What the policy that wrote a log did to its clicks: how much each position is looked at, and what was shown at all.

Rankers with ranker.exposure kb or ips learn from it (losses.widen_by); METHOD.md 2.2 [C].

tables/exposure/train.safetensors   timestamp and weight of train's lists, row by row as encoded; not there where no
                                    ranker asks for them
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.numpy import load_file, save_file
from scipy.stats import t as student

from rgalign.data import tables
from rgalign.data.lists import Lists
from rgalign.data.tables import Dataset
from rgalign.errors import UserError
from rgalign.params_training import Ranker
from rgalign.ranker.fit import refuse_other_parts
from rgalign.shopworld.tables import World
from rgalign.shopworld.traffic import selection

FILE = "train.safetensors"
WEIGHTED = "ranker.exposure is ips or alignment.weights is exposure"


class ExposureError(UserError, ValueError):
    """A log does not say what ranker.exposure needs."""


def examination(lists: Lists, shuffled: np.ndarray) -> pd.DataFrame:
    """How much each position is looked at, relative to the first, in lists that were shown in random order.

    There a position says nothing of the intent, so it is clicks there / clicks at the first position, over the lists
    that reach it. shuffled (lists,) bool. Columns: position from 1, value, standard_error, low, high (Student's t
    interval of 95 % by linearisation, sessions of a user together). Raises ExposureError without a click at the first.
    """
    shown, clicked = (part.numpy()[shuffled] for part in (lists.shown, lists.clicked))
    users, rows = np.unique(lists.user_id[shuffled], return_inverse=True)[1], []
    for position in range(shown.shape[1]):
        both = shown[:, 0] & shown[:, position]
        there, first = clicked[both, position].astype(float), clicked[both, 0].astype(float)
        if not first.any():
            raise ExposureError(
                f"sessions.shuffled is true in {len(shown)} lists, of which {len(first)} reach position {position + 1} "
                "and none of these has a click at the first; expected some, to know how much positions are looked at"
            )
        value, count = there.sum() / first.sum(), len(np.unique(users[both]))
        influence = np.bincount(users[both], there - value * first) / first.sum()
        error = np.sqrt((influence**2).sum() * count / max(count - 1, 1))
        rows.append((position + 1, value, error, *(value + np.array([-1, 1]) * student.ppf(0.975, count - 1) * error)))
    return pd.DataFrame(rows, columns=["position", "value", "standard_error", "low", "high"])


def chance_shown(shop: Dataset, lists: Lists) -> np.ndarray:
    """(lists, candidates): the chance that the policy shows this intent at all; NaN where the list shows none.

    shop  with all impressions of these lists. Raises ExposureError where neither impressions.selection nor the rules
    of a simulated world say it: propensity, of one position alone, does not
    """
    impressions = shop.impressions
    if "selection" in impressions:
        found = impressions["selection"].to_numpy(np.float64)
    elif "propensity" in impressions and "world" in shop.meta:
        found = selection(World.from_meta(shop.meta).rules, impressions["propensity"].to_numpy(np.float64))
    else:
        there = ", ".join(impressions.columns)
        raise ExposureError(
            f"{WEIGHTED}, and impressions of {shop.name!r} have no column selection (found: {there}); "
            "expected selection = P(this intent anywhere in the list | session), as the policy that wrote the log drew "
            "it. Add it where lists are logged, or set ranker.exposure to kb or shown and alignment.weights to none"
        )
    row, position = pd.Index(lists.session_id).get_indexer(impressions["session_id"]), impressions["position"]
    own, chance = (row >= 0) & (position < lists.candidates.shape[1]), np.full(lists.candidates.shape, np.nan)
    chance[row[own], position[own].to_numpy()] = found[own]
    return np.where(lists.shown.numpy(), chance, np.nan)


def click_weights(clicked: np.ndarray, looked: np.ndarray, chance: np.ndarray, cap: float) -> np.ndarray:
    """(lists, candidates) float32: min(cap, 1 / (looked * chance)) of each click, scaled to mean 1; 0 of no click.

    clicked (lists, candidates) bool;  looked (candidates,) see `examination`;  chance see `chance_shown`
    """
    with np.errstate(divide="ignore"):
        weight = np.where(clicked, np.minimum(1 / (looked * chance), cap), 0)
    return (weight / weight[clicked].mean()).astype(np.float32)


def write(
    folder: Path, data: Path, train: Lists, how: Ranker, bias: Callable[[], np.ndarray], *, weighted: bool = False
) -> pd.DataFrame:
    """Write tables/exposure of a run. Returns how much positions are looked at (empty: not known).

    data     its tables/dataset;  train  lists of train's part
    bias     () -> (positions,) a ranker's trained position bias, in nats: where no list is shuffled, exp(bias) relative
             to the first takes the place of `examination` [C]
    weighted  the clicks' weights are asked for, whatever the rankers learn by (alignment.weights)
    Raises ExposureError where the data cannot support what a ranker asks for.
    """
    refuse_other_parts("exposure", train=train)
    folder.mkdir()
    asked = {own.exposure for own in how.settings().values()} - {"shown"} | ({"ips"} if weighted else set())
    shop = tables.excerpt(data, ["shuffled"], splits=("train",), whole_lists="ips" in asked)
    for kind in sorted(asked):
        _refuse_sampled(shop.name, shop.meta, kind)
    sessions = shop.sessions.set_index("session_id").loc[list(train.session_id)]
    shuffled = (sessions["shuffled"] if "shuffled" in sessions else pd.Series(False, sessions.index)).eq(True)
    looked = pd.DataFrame(columns=["position", "value"])
    if shuffled.any():
        looked = examination(train, shuffled.fillna(False).to_numpy(bool))
    elif "ips" in asked:
        value = np.exp(bias())
        looked = pd.DataFrame({"position": np.arange(1, len(value) + 1), "value": value / value[0]})
    if asked:
        time = sessions["timestamp"].to_numpy("datetime64[us]")
        arrays = {"timestamp": time.view(np.int64)}
        if "ips" in asked:
            given = looked["value"].to_numpy(), chance_shown(shop, train), how.weight_cap
            arrays["weight"] = click_weights(train.clicked.numpy(), *given)
        save_file(arrays, folder / FILE)
    if "world" in shop.meta and len(looked):
        looked["truth"] = World.from_meta(shop.meta).examination[: len(looked)]
    return looked


def with_exposure(lists: Lists, folder: Path | None) -> Lists:
    """The lists with what `write` wrote of them; as they are where it wrote nothing, and where they are not train's."""
    path = None if folder is None else folder / FILE
    if path is None or lists.part != "train" or not path.is_file():
        return lists
    found = load_file(path)
    if len(found["timestamp"]) != len(lists):
        raise ExposureError(
            f"{path} is of {len(found['timestamp'])} lists; expected {len(lists)}: run notebook 03 again"
        )
    weight = torch.from_numpy(found["weight"]) if "weight" in found else None
    return replace(lists, timestamp=found["timestamp"].view("datetime64[us]"), weight=weight)


def _refuse_sampled(name: str, meta: Mapping, kind: str) -> None:
    """Raise ExposureError where lists were drawn afterwards in a way that this kind of exposure cannot learn from: kb
    adds uniform negatives, so others must be uniform too; ips needs lists as they were shown."""
    sampled, wrong = meta.get("sampled_negatives"), {}
    if sampled and (kind == "ips" or sampled["popularity"]):
        wrong["sampled_negatives"] = sampled
    if kind == "ips" and not meta.get("position_is_real", True):
        wrong["position_is_real"] = False
    if wrong:
        found = ", ".join(f"{key}: {value}" for key, value in wrong.items())
        param, expected, instead = WEIGHTED, "lists as they were shown", "kb or shown and alignment.weights to none"
        if kind == "kb":
            param, instead = "ranker.exposure is kb", "shown"
            expected = "lists as they were shown, or negatives drawn uniformly (popularity: 0)"
        raise ExposureError(
            f"{param}, and dataset.yaml of {name!r} says {found}; expected {expected}. Set ranker.exposure to {instead}"
        )
