"""Differences of two models with their intervals: the rows of the comparisons table (METHOD.md 4).

`relative` is the relative error reduction for GAUC, the relative gain for the rest, with an interval of its own.
`p_holm` adjusts `p` for the rows of one table, and a verdict goes by it. One table: the pairs of models, at all
distances, of one metric, slice and split [C]; metrics are several views of one question, not several questions.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from rgalign.evaluation import bootstrap, metrics
from rgalign.evaluation.results import COLUMNS, GAUC_WEIGHT, conform, metric_names, slice_masks

COMPARED = ["metric", "slice", "split", "distance"]  # what two models share where they are compared
PAIR = ["model", "against"]
INTERVALS = ["ci_low", "ci_high", "relative_low", "relative_high"]
TABLE = ["metric", "slice", "split"]  # what the rows of one table share
MIN_WORLDS = 3  # fewer: no interval over worlds; with two, t has one degree of freedom and is 12.7 [C]
SIGNIFICANT = 0.05  # of p_holm: the level of the 95 % intervals


def comparisons(
    sessions: pd.DataFrame, pairs: Sequence[tuple[str, str]], slices: pd.DataFrame | None = None, *,
    distance: float | None = None, **draws
) -> pd.DataFrame:  # fmt: skip
    """The comparisons rows of one run, from its session_metrics: users are sampled again (bootstrap.over_users).

    pairs   (model, against); each model's metric is averaged over its ranker seeds first, and the column `seeds` is the
            larger number of seeds of the two
    slices  bool columns indexed by session_id (evaluation.slices); None: only `all`
    draws   seed, replicates, level of the bootstrap
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
            fixed |= {"world_seeds": "", "seeds": max(seeds[model], seeds[against])}
            for name, inside in slice_masks(slices, new["session_id"]):
                rows += [{**fixed, "slice": name, **row} for row in _of_slice(new[inside], old[inside], **draws)]
    return with_holm(rows)


def with_holm(rows: Sequence[dict] | pd.DataFrame) -> pd.DataFrame:
    """Comparisons rows as the table of that name, with `p_holm`: Holm's adjustment within each TABLE."""
    frame = pd.DataFrame(rows, columns=[name for name in COLUMNS["comparisons"] if name != "p_holm"])
    adjusted = frame.groupby(TABLE)["p"].transform(lambda p: holm(p.to_numpy(dtype=np.float64)))
    return conform(frame.assign(p_holm=adjusted), "comparisons")


def holm(p) -> np.ndarray:
    """Holm's step-down adjusted p-values, in the order given (Holm 1979); a NaN stays one and does not count.

    With m values in ascending order, the i-th is max over j <= i of min(1, (m - j + 1) p_j): rejecting what is at most
    alpha holds the chance of any false rejection in the family at alpha, whatever the dependence between the rows.
    """
    p = np.asarray(p, dtype=np.float64)
    adjusted = np.full(len(p), np.nan)
    order = np.argsort(p, kind="stable")[: int((~np.isnan(p)).sum())]  # NaN sorts last
    steps = np.arange(len(order), 0, -1)
    adjusted[order] = np.maximum.accumulate(np.minimum(1, steps * p[order]))
    return adjusted


def verdict(row) -> str:
    """What a comparisons row shows, in words; `row` has worlds, difference, p_holm."""
    if row.worlds == 2:
        return "two worlds: see each"
    significant = row.p_holm < SIGNIFICANT
    shown = "not significant" if not significant else "gain" if row.difference > 0 else "loss"
    return f"{shown} (in one world)" if row.worlds == 1 else shown


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
    names = [*COMPARED, "world_seed", *PAIR, "new", "old", "seeds", "difference", "relative"]
    return pd.DataFrame(rows, columns=names).astype({"world_seed": "Int64", "distance": "float64"})


def comparisons_over_worlds(worlds: pd.DataFrame) -> pd.DataFrame:
    """The comparisons rows of a study: the unit is the world (bootstrap.over_worlds), each counted once.

    worlds  rows of `by_world`, with each world's own intervals over users (INTERVALS) where they are known
    `worlds` says what an interval is: MIN_WORLDS or more, over the worlds; 1, over the users of that world; 2, there
    is none. `relative` is the mean of the worlds' ratios. `sampling_error` is the floor of the standard error of
    `difference`, NaN where a world's own interval is not known. `seeds` is the smallest number of ranker seeds that a
    world has, `world_seeds` names the worlds.
    """
    worlds = worlds.reindex(columns=[*worlds, *(name for name in INTERVALS if name not in worlds)])
    rows = []
    for key, part in worlds.groupby([*COMPARED, *PAIR], dropna=False):
        named = " ".join(str(seed) for seed in sorted(part["world_seed"].dropna()))
        row = dict(zip([*COMPARED, *PAIR], key, strict=True)) | {"worlds": len(part), "world_seeds": named}
        errors = bootstrap.standard_error(part["ci_low"], part["ci_high"])
        row |= {"seeds": part["seeds"].min(), "sampling_error": bootstrap.sampling_error(errors)}
        difference = _over("difference", part, "ci_low", "ci_high")
        relative = _over("relative", part, "relative_low", "relative_high")
        row |= dict(zip(["difference", "ci_low", "ci_high", "p"], difference, strict=True))
        rows.append(row | dict(zip(["relative", "relative_low", "relative_high"], relative, strict=False)))
    return with_holm(rows)


def _over(column: str, part: pd.DataFrame, low: str, high: str) -> bootstrap.Tested:
    values = part[column].to_numpy(dtype=np.float64)
    if np.isnan(values).any() or 1 < len(values) < MIN_WORLDS:
        return bootstrap.Tested(float(values.mean()), np.nan, np.nan, np.nan)
    ends = part[[low, high]].to_numpy(dtype=np.float64)
    if len(values) == 1:
        return bootstrap.Tested(values[0], *ends[0], bootstrap.p_over_users(values[0], *ends[0]))
    return bootstrap.over_worlds(values, bootstrap.standard_error(*ends.T))


def over_seeds(sessions: pd.DataFrame, model: str, against: str, **draws) -> bootstrap.Interval:
    """GAUC's difference of two models with the same number of seeds on one split; seeds and users sampled again.

    draws  seed, replicates (bootstrap.over_seeds_and_users)
    """
    new, old = (sessions[sessions["model"] == name] for name in (model, against))
    by_seed = [part.pivot(index="session_id", columns="seed", values="gauc") for part in (new, old)]
    differences = by_seed[0].to_numpy().T - by_seed[1].to_numpy().T
    one = new.drop_duplicates("session_id").set_index("session_id").loc[by_seed[0].index]
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
    if faults := faults or [name for name in both_have if not new[name].isna().equals(old[name].isna())]:
        raise ValueError(f"{model} and {against} were not judged on the same lists: {', '.join(faults)} differ")
    columns = [*COLUMNS["session_metrics"], *both_have]
    return new[columns], old[columns]


def _of_slice(new: pd.DataFrame, old: pd.DataFrame, *, level: float = bootstrap.LEVEL, **draws) -> list[dict]:
    """The rows of all metrics over the sessions given."""
    names = metric_names(new)
    new_values, old_values = (frame[names].to_numpy().T for frame in (new, old))  # (metrics, sessions)
    weight = np.ones_like(new_values)
    if "gauc" in names:
        weight[names.index("gauc")] = new[GAUC_WEIGHT].to_numpy()
    users = new["user_id"].to_numpy(dtype=object)
    ends = bootstrap.over_users(new_values - old_values, weight, users, level=level, **draws)
    per = np.stack([1 - row if name == "gauc" else row for name, row in zip(names, old_values, strict=True)])
    ratios = bootstrap.over_users(new_values - old_values, weight, users, per=per, level=level, **draws)
    rows = []
    for i, name in enumerate(names):
        means = [metrics.average_auc(values[i], weight[i]).value for values in (new_values, old_values)]
        row = {"metric": name, **difference_of(name, *means), "ci_low": ends.low[i], "ci_high": ends.high[i]}
        row |= {"relative_low": ratios.low[i], "relative_high": ratios.high[i]}
        row["p"] = bootstrap.p_over_users(row["difference"], ends.low[i], ends.high[i], level=level)
        row["sampling_error"] = float(bootstrap.standard_error(ends.low[i], ends.high[i], level=level))
        rows.append(row)
    return rows


def difference_of(metric: str, new: float, old: float) -> dict[str, float]:
    """The difference of two values of a metric, and what it is relatively: error reduction of GAUC, gain of others."""
    return {"difference": new - old, "relative": metrics.METRICS[metric].relative(new, old)}
