"""A random search, as wide and as long for every ranker, judged on valid (METHOD.md 4, fair play).

What is not searched: epochs and patience, since early stopping ends a training, and more of either only costs time.
"""

import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from accelerate import Accelerator
from tqdm import tqdm

from rgalign.data.lists import Intents, Lists
from rgalign.errors import TrainingError
from rgalign.params_training import RankerSettings
from rgalign.ranker.fit import Fitted, fit, gauc_of, refuse_other_parts
from rgalign.ranker.train import PartsOf, begin, loss_of, parts_of
from rgalign.ranker.variants import RANKERS

Space = Mapping[str, tuple]
SPACE: Space = {  # [C] wider on both sides than where the best trials of earlier searches lay
    "learning_rate": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
    "weight_decay": (0.0, 0.01, 0.1, 0.3),
    "lists_per_batch": (64, 128, 256, 512),
    "embedding_dim": (4, 8, 16, 32, 64),
    "dim": (16, 32, 64, 128),
    "attention_layers": (0, 1, 2, 3),
    "heads": (1, 2, 4),
    "experts": (1, 2, 4, 8, 16),
    "hidden": (16, 32, 64, 128, 256),
    "dropout": (0.1, 0.2, 0.3, 0.5, 0.7, 0.85),
    "id_dropout": (0.02, 0.05, 0.1, 0.2, 0.4),
    "intent_std": (0.1, 0.3, 1.0),
}
THREE_TOWER_SPACE: Space = {  # [C] what only a three-tower has
    "query_hidden": (0, 32, 64, 128, 256),
    "query_dropout": (0.1, 0.3, 0.5, 0.7),
    "interaction_hidden": (8, 16, 32, 64, 128),
    "kl_weight": (0.05, 0.1, 0.2, 0.5),  # above 0: the reward model and RG-CL need a query branch that ranks
}
NO_QUERY_SPACE: Space = {"kl_weight": (0.0, 0.05, 0.1, 0.2, 0.5)}  # the branch is then the same list for every session
# of what reads vectors [C]: on valid 0.3 was the best on ShopWorld, 30 with MiniLM on govuk2021 (100 tried)
VECTOR_SPACE: Space = {"whitening_ridge": (0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)}
# of the ranker that learns from chats first [C]: how long, how fast and, by the temperature, how far it moves
CHAT_SPACE: Space = {"chat_epochs": (2, 8), "chat_learning_rate": (1e-3, 4e-3), "chat_temperature": (0.3, 1.0, 3.0)}

CHANGED = 0.25  # three or four settings of a trial near the best [C]: one at a time misses what goes together


def space_of(name: str) -> Space:
    """What is searched for one of RANKERS: of a control (a name with a slash) its own settings alone."""
    variant = RANKERS[name]
    vectors = VECTOR_SPACE if variant.vectors else {}
    if "/" in name:
        return {**vectors, **(CHAT_SPACE if variant.chats else {})}
    three = THREE_TOWER_SPACE if variant.architecture == "three_tower" else {}
    return {**SPACE, **three, **(NO_QUERY_SPACE if variant.query == "constant" else {}), **vectors}


def configurations(trials: int, *, seed: int, space: Space = SPACE) -> list[dict[str, Any]]:
    """Draw each setting of each trial independently and uniformly; more trials begin with the same ones.

    Each setting has a random stream of its own, so that it is the same for every ranker that has it.
    """
    streams = {name: np.random.default_rng([seed, zlib.crc32(name.encode())]) for name in space}
    return [{name: space[name][rng.integers(len(space[name]))] for name, rng in streams.items()} for _ in range(trials)]


def changes(drawn: Sequence[Mapping[str, Any]], *, seed: int) -> list[dict[str, Any]]:
    """Of each trial the settings that replace the best ones: each with probability CHANGED, the same for any ranker."""
    streams = {
        name: np.random.default_rng([seed, zlib.crc32(name.encode()), 1]) for name in (drawn[0] if drawn else ())
    }
    return [{name: trial[name] for name, rng in streams.items() if rng.random() < CHANGED} for trial in drawn]


def grid(space: Space) -> list[dict[str, Any]]:
    """Every combination of these values; a single empty one where there is nothing to choose."""
    return [dict(zip(space, values, strict=True)) for values in product(*space.values())]


def tune(
    settings: Mapping[str, RankerSettings],
    parts: PartsOf,
    *,
    trials: int,
    seed: int,
    positions: int,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> tuple[pd.DataFrame, dict[str, RankerSettings]]:
    """The same search for every model. Returns its log (models stacked) and each model's best settings.

    settings  model -> its settings before the search: trial 0 is these, what the search draws replaces them
    parts     one for all models, or model -> its own
    trials    drawn for every model: half of them from the whole space, half near the best so far; a control takes its
              model's best, where that is searched too, and tries each value of its own settings (space_of)
    """
    logs: dict[str, pd.DataFrame] = {}
    best: dict[str, RankerSettings] = {}
    for name in sorted(settings, key=lambda name: "/" in name):
        own, space, mine = settings[name], space_of(name), parts_of(parts, name)
        if "/" in name:
            own = best.get(name.split("/")[0], own)
            tried, nearby = grid(space), []
        else:
            drawn, half = configurations(trials, seed=seed, space=space), trials - trials // 2
            tried = [{key: getattr(own, key) for key in space}, *drawn[:half]]
            nearby = changes(drawn[half:], seed=seed)

        def fit_one(drawn: Mapping[str, Any], name=name, own=own, mine=mine) -> Fitted:
            given, how = own.model_copy(update=dict(drawn)), {"seed": seed, "accelerator": accelerator}
            model = begin(name, mine, given, positions=positions, **how)
            return fit(
                model,
                mine.train,
                mine.dev,
                mine.intents,
                given,
                loss=loss_of(name, given),
                progress=False,
                from_start=bool(model.config.match),
                **how,
            )

        log, found = search(fit_one, tried, nearby, mine.valid, mine.intents, progress=progress)
        best[name] = own.model_copy(update=found)
        logs[name] = log.drop(columns="seconds").assign(model=name)  # seconds would differ from run to run
    return pd.concat([logs[name] for name in settings], ignore_index=True), {name: best[name] for name in settings}


def search(
    fit_one: Callable[[Mapping[str, Any]], Fitted],
    trials: Sequence[Mapping[str, Any]],
    nearby: Sequence[Mapping[str, Any]],
    valid: Lists,
    intents: Intents,
    *,
    progress: bool = True,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Fit each trial's settings and judge them by GAUC on valid. Returns the log, the best first, and its settings.

    fit_one  trains a ranker with these settings, always by the same seed
    trials   settings, at least one
    nearby   after them: each some settings that replace those of the best trial so far
    Log: trial, one column a setting, dev_gauc, valid_gauc, best_epoch, seconds. A trial whose loss was not finite
    has NaN and comes last. Raises ValueError for lists of another part.
    """
    refuse_other_parts("search", valid=valid)
    rows, best, best_gauc = [], dict(trials[0]), -np.inf
    for trial, given in enumerate(tqdm([*trials, *nearby], "search", disable=not progress)):
        started, settings = time.perf_counter(), dict(given) if trial < len(trials) else {**best, **given}
        row = {"trial": trial, **settings, "dev_gauc": np.nan, "valid_gauc": np.nan, "best_epoch": 0}
        try:
            fitted = fit_one(settings)
            gauc = gauc_of(fitted.model, valid, intents).value
            row |= {"dev_gauc": fitted.curve["dev_gauc"].max(), "valid_gauc": gauc, "best_epoch": fitted.best_epoch}
            if gauc > best_gauc:
                best, best_gauc = settings, gauc
        except TrainingError:
            pass  # NaN in the log marks it; the search continues
        rows.append(row | {"seconds": time.perf_counter() - started})
    log = pd.DataFrame(rows).sort_values("valid_gauc", ascending=False, kind="stable", ignore_index=True)
    return log, best
