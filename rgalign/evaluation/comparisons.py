"""Differences of two models with their intervals: the rows of the comparisons table (METHOD.md 4).

`relative` is the relative error reduction for GAUC, the relative gain for the rest; the interval is the difference's.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from rgalign.evaluation import bootstrap, metrics
from rgalign.evaluation.results import COLUMNS, GAUC_WEIGHT, conform, metric_names, slice_masks

COMPARED = ["metric", "slice", "split", "distance"]  # what two models share where they are compared


def comparisons(
    sessions: pd.DataFrame,
    pairs: Sequence[tuple[str, str]],
    slices: pd.DataFrame | None = None,
    *,
    distance: float | None = None,
    seed: int,
    replicates: int = 1000,
    level: float = 0.95,
) -> pd.DataFrame:
    """The comparisons rows of one run, from its session_metrics: users are drawn anew (bootstrap.over_users).

    pairs   (model, against); each model's metric is averaged over its ranker seeds first, and the column `seeds` is the
            larger number of seeds of the two
    slices  bool columns indexed by session_id (evaluation.slices); None: only `all`
    seed    of the bootstrap
    A metric that one of the two lacks in all sessions has no row. Raises ValueError where two models, or two seeds of
    one, were not judged on the same sessions and labels.
    """
    sessions = conform(sessions, "session_metrics")
    rows = []
    for split, part in sessions.groupby("split"):
        seeds = part.groupby("model")["seed"].nunique(dropna=False)
        means = {name: _mean_over_seeds(part[part["model"] == name], seeds[name]) for name in seeds.index}
        for model, against in pairs:
            new, old = _paired(means, model, against)
            fixed = {"model": model, "against": against, "split": split, "distance": distance, "worlds": 1}
            fixed["seeds"] = max(seeds[model], seeds[against])
            for name, inside in slice_masks(slices, new["session_id"]):
                interval = {"seed": seed, "replicates": replicates, "level": level}
                rows += [{**fixed, "slice": name, **row} for row in _of_slice(new[inside], old[inside], **interval)]
    return conform(pd.DataFrame(rows, columns=list(COLUMNS["comparisons"])), "comparisons")


def by_world(results: pd.DataFrame, pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """Each world's values of both models of each pair: metric, slice, split, distance, world_seed, model, against, new,
    old, difference, relative, seeds.

    results  results rows of many worlds. A world has one row a pair, by the mean over its LM seeds, of those in which
             both models have a value: an LM is noise that both must share. No row where there is none
    seeds    the smallest number of ranker seeds that an LM seed has, of the model that has more
    """
    rows = []
    for key, part in conform(results, "results").groupby(COMPARED, dropna=False):
        by_draw = part.groupby(["world_seed", "lm_seed", "model"], dropna=False)
        values = by_draw["value"].mean(skipna=False).unstack()
        seeds = by_draw["seed"].nunique(dropna=False).unstack()
        for model, against in pairs:
            if not {model, against} <= set(values):
                continue
            both = values[[model, against]].dropna()
            most = seeds.loc[both.index, [model, against]].max(axis=1)
            fixed = dict(zip(COMPARED, key, strict=True)) | {"model": model, "against": against}
            for world, own in both.groupby("world_seed", dropna=False):
                new, old = own.mean()
                of_world = {"world_seed": world, "new": new, "old": old, "seeds": most.loc[own.index].min()}
                rows.append(fixed | of_world | difference_of(key[0], new, old))
    names = [*COMPARED, "world_seed", "model", "against", "new", "old", "seeds", "difference", "relative"]
    return pd.DataFrame(rows, columns=names).astype({"world_seed": "Int64", "distance": "float64"})


def comparisons_over_worlds(
    results: pd.DataFrame, pairs: Sequence[tuple[str, str]], *, level: float = 0.95
) -> pd.DataFrame:
    """The comparisons rows of a study: the unit is the world, the interval Student's (bootstrap.over_worlds).

    Worlds count as in `by_world`: once each, those that lack one of the two models not at all. A pair with less than
    two worlds has no row. `seeds` is the smallest number of ranker seeds that a world has.
    """
    rows = []
    worlds = by_world(results, pairs).dropna(subset="world_seed")
    for key, part in worlds.groupby([*COMPARED, "model", "against"], dropna=False):
        if len(part) < 2:
            continue
        interval = bootstrap.over_worlds(part["difference"], level=level)
        row = dict(zip([*COMPARED, "model", "against"], key, strict=True))
        row |= {"worlds": len(part), "seeds": part["seeds"].min(), "ci_low": interval.low, "ci_high": interval.high}
        rows.append(row | difference_of(row["metric"], part["new"].mean(), part["old"].mean()))
    return conform(pd.DataFrame(rows, columns=list(COLUMNS["comparisons"])), "comparisons")


def over_seeds(sessions: pd.DataFrame, model: str, against: str, **draws) -> bootstrap.Interval:
    """GAUC's difference of two models with the same number of seeds on one split; seeds and users drawn anew.

    draws  seed, replicates, level (bootstrap.over_seeds_and_users)
    """
    ours, theirs = (sessions[sessions["model"] == name] for name in (model, against))
    by_seed = [part.pivot(index="session_id", columns="seed", values="gauc") for part in (ours, theirs)]
    differences = by_seed[0].to_numpy().T - by_seed[1].to_numpy().T
    one = ours.drop_duplicates("session_id").set_index("session_id").loc[by_seed[0].index]
    users = one["user_id"].to_numpy(dtype=object)
    return bootstrap.over_seeds_and_users(differences, one[GAUC_WEIGHT].to_numpy(), users, **draws)


def _mean_over_seeds(part: pd.DataFrame, seeds: int) -> pd.DataFrame:
    """One model's session metrics averaged over its ranker seeds; the rows come sorted by seed, then session."""
    names = metric_names(part)
    first = part.iloc[: len(part) // seeds].reset_index(drop=True)
    if not np.array_equal(part["session_id"].to_numpy(), np.tile(first["session_id"].to_numpy(), seeds)):
        raise ValueError(f"the {seeds} seeds of {part['model'].iloc[0]} were not judged on the same sessions")
    mean = part[names].to_numpy().reshape(seeds, len(first), len(names)).mean(axis=0)
    return first.assign(**dict(zip(names, mean.T, strict=True)))


def _paired(means: dict[str, pd.DataFrame], model: str, against: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    if missing := [name for name in (model, against) if name not in means]:
        raise ValueError(f"no session metrics of {', '.join(missing)}; there are those of {', '.join(means)}")
    new, old = means[model], means[against]
    both_have = [name for name in metric_names(new) if not (new[name].isna().all() or old[name].isna().all())]
    faults = [column for column in ("session_id", "user_id", GAUC_WEIGHT) if not new[column].equals(old[column])]
    if not faults:
        faults = [name for name in both_have if not new[name].isna().equals(old[name].isna())]
    if faults:
        raise ValueError(f"{model} and {against} were not judged on the same lists: {', '.join(faults)} differ")
    columns = [*COLUMNS["session_metrics"], *both_have]
    return new[columns], old[columns]


def _of_slice(new: pd.DataFrame, old: pd.DataFrame, **interval) -> list[dict]:
    """The rows of all metrics over the sessions given; the draws are the same for all of them."""
    names = metric_names(new)
    ours, theirs = (frame[names].to_numpy().T for frame in (new, old))  # (metrics, sessions)
    weight = np.ones_like(ours)
    if "gauc" in names:
        weight[names.index("gauc")] = new[GAUC_WEIGHT].to_numpy()
    ends = bootstrap.over_users(ours - theirs, weight, new["user_id"].to_numpy(dtype=object), **interval)
    means = [[metrics.average_auc(*row).value for row in zip(values, weight, strict=True)] for values in (ours, theirs)]
    of_metric = zip(names, *means, ends.low, ends.high, strict=True)
    return [
        {"metric": name, **difference_of(name, new, old), "ci_low": low, "ci_high": high}
        for name, new, old, low, high in of_metric
    ]


def difference_of(metric: str, new: float, old: float) -> dict[str, float]:
    """The difference of two values of a metric, and what it is relatively: error reduction of GAUC, gain of others."""
    relative = metrics.relative_error_reduction if metric == "gauc" else metrics.relative_gain
    return {"difference": new - old, "relative": relative(new, old)}
