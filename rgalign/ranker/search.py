"""A small random search, the same for every ranker, judged on valid (METHOD.md 4, fair play)."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from rgalign.data.lists import Intents, Lists
from rgalign.evaluation.metrics import gauc_of_lists
from rgalign.ranker.fit import Loss, TrainingError, fit, listnet, refuse_other_parts, score

FITTING = ("learning_rate", "weight_decay")  # settings of the training loop; all others are the ranker's own
SPACE: Mapping[str, tuple] = {  # [C] values around those that a first, wider search found good on valid
    "learning_rate": (2e-3, 4e-3, 8e-3),
    "weight_decay": (0.0, 0.01, 0.1),
    "embedding_dim": (8, 16, 32),
    "dim": (32, 64),
    "attention_layers": (1, 2),
    "heads": (1, 2),
    "experts": (2, 4, 8),
    "hidden": (32, 64, 128),
    "dropout": (0.1, 0.2, 0.3, 0.5),
    "id_dropout": (0.02, 0.05, 0.1),
}
THREE_TOWER_SPACE: Mapping[str, tuple] = {  # [C] what only a three-tower has, drawn beside the settings above
    "query_hidden": (64, 128, 256),
    "query_dropout": (0.1, 0.3, 0.5),
    "interaction_hidden": (16, 32, 64),
}


def configurations(
    trials: int, *, seed: int, space: Mapping[str, tuple] = SPACE, own: Mapping[str, tuple] | None = None
) -> list[dict[str, Any]]:
    """Draw each setting of each trial independently and uniformly; more trials begin with the same ones.

    own  a ranker's own settings, drawn apart: whatever they are, those of `space` are the same for every ranker
    """
    rng, own_rng, own = np.random.default_rng(seed), np.random.default_rng([seed, 1]), own or {}
    return [_drawn(space, rng) | _drawn(own, own_rng) for _ in range(trials)]


def search(
    build: Callable[[Mapping[str, Any]], nn.Module],
    train: Lists,
    dev: Lists,
    valid: Lists,
    intents: Intents,
    *,
    trials: int = 12,
    seed: int,
    loss: Loss = listnet,
    space: Mapping[str, tuple] = SPACE,
    own_space: Mapping[str, tuple] | None = None,
    accelerator: Accelerator | None = None,
    progress: bool = True,
    **fitting: Any,
) -> pd.DataFrame:
    """Fit each configuration and judge it by GAUC on valid. Returns the log, the best first.

    build      makes a ranker from the settings that are its own, with its own seed
    seed       of the configurations and of each fit
    own_space  settings that only this kind of ranker has
    fitting    what all trials share: epochs, patience, lists_per_batch, handed to `fit`
    Log: trial, one column a setting, dev_gauc, valid_gauc, best_epoch, seconds. A trial whose loss was not finite
    has NaN and comes last. Raises ValueError for lists of another part.
    """
    refuse_other_parts("search", train=train, dev=dev, valid=valid)
    clicked, shown = (mask.cpu().numpy() for mask in (valid.clicked, valid.shown))
    rows = []
    drawn = configurations(trials, seed=seed, space=space, own=own_space)
    for trial, settings in enumerate(tqdm(drawn, "search", disable=not progress)):
        started = time.perf_counter()
        row = {"trial": trial, **settings, "dev_gauc": np.nan, "valid_gauc": np.nan, "best_epoch": 0}
        own = {name: value for name, value in settings.items() if name not in FITTING}
        shared = {**fitting, **{name: value for name, value in settings.items() if name in FITTING}}
        try:
            fitted = fit(
                build(own), train, dev, intents, seed=seed, loss=loss, accelerator=accelerator, progress=False, **shared
            )
            judged = gauc_of_lists(score(fitted.model, valid, intents), clicked, shown)
            row |= {"dev_gauc": fitted.curve["dev_gauc"].max(), "valid_gauc": judged.value}
            row["best_epoch"] = fitted.best_epoch
        except TrainingError:
            pass  # its NaN in the log says so; the others go on
        rows.append(row | {"seconds": time.perf_counter() - started})
    return pd.DataFrame(rows).sort_values("valid_gauc", ascending=False, kind="stable", ignore_index=True)


def _drawn(space: Mapping[str, tuple], rng: np.random.Generator) -> dict[str, Any]:
    return {name: values[rng.integers(len(values))] for name, values in space.items()}
