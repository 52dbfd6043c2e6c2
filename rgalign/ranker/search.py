"""A random search, as wide and as long for every ranker, judged on valid (METHOD.md 4, fair play).

What is not searched: epochs and patience, since early stopping ends a training and more of either costs time alone.
"""

import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from rgalign.data.lists import Intents, Lists
from rgalign.evaluation.metrics import gauc_of_lists
from rgalign.ranker.fit import Fitted, TrainingError, refuse_other_parts, score
from rgalign.ranker.variants import VARIANTS

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
# of what reads vectors [C]: on valid 0.3 was the best on ShopWorld, 3 to 10 with MiniLM on govuk2021
VECTOR_SPACE: Space = {"whitening_ridge": (0.01, 0.1, 0.3, 1.0, 3.0, 10.0)}
# of the ranker that learns from chats first [C]: how long, how fast and, by the temperature, how far it moves
CHAT_SPACE: Space = {
    "chat_epochs": (2, 8),
    "chat_learning_rate": (1e-3, 4e-3),
    "chat_temperature": (0.3, 1.0, 3.0),
}

CHANGED = 0.25  # three or four settings of a trial near the best [C]: one at a time misses what goes together


def space_of(name: str) -> Space:
    """What is searched for one of VARIANTS: of a control (a name with a slash) its own alone."""
    variant = VARIANTS[name]
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
    clicked, shown = (mask.cpu().numpy() for mask in (valid.clicked, valid.shown))
    rows, best, best_gauc = [], dict(trials[0]), -np.inf
    for trial, given in enumerate(tqdm([*trials, *nearby], "search", disable=not progress)):
        started, settings = time.perf_counter(), dict(given) if trial < len(trials) else {**best, **given}
        row = {"trial": trial, **settings, "dev_gauc": np.nan, "valid_gauc": np.nan, "best_epoch": 0}
        try:
            fitted = fit_one(settings)
            judged = gauc_of_lists(score(fitted.model, valid, intents), clicked, shown)
            row |= {"dev_gauc": fitted.curve["dev_gauc"].max(), "valid_gauc": judged.value}
            row["best_epoch"] = fitted.best_epoch
            if judged.value > best_gauc:
                best, best_gauc = settings, judged.value
        except TrainingError:
            pass  # its NaN in the log says so; the others go on
        rows.append(row | {"seconds": time.perf_counter() - started})
    log = pd.DataFrame(rows).sort_values("valid_gauc", ascending=False, kind="stable", ignore_index=True)
    return log, best
