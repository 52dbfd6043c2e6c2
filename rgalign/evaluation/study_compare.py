"""Comparisons over a study's worlds, and the stage table (METHOD.md 4).

The unit is the world: each has its own LM seed and ranker seeds, over which its values are averaged first. The interval
is Student's over the worlds' differences. One or two worlds say next to nothing about another world: then each world's
own interval is given, users drawn anew, and the column `worlds` shows it.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from rgalign.data import tables
from rgalign.data.describe import train_clicks
from rgalign.evaluation import results, slices
from rgalign.evaluation.comparisons import COMPARED, by_world, comparisons, comparisons_over_worlds, difference_of
from rgalign.evaluation.study import FULL, METRICS, PAIR, SLICES, WORLD, as_row, table_of
from rgalign.ranker.variants import VARIANTS

MIN_WORLDS = 3  # fewer: no interval over worlds [C]


def compare(
    folder: Path, runs: pd.DataFrame, table: pd.DataFrame, pairs: Sequence[tuple[str, str]], **draws
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The comparisons rows of a study, and the same world by world (with world_seed, new, old).

    runs, table, pairs  study.runs_of, results_of, pairs_of
    draws               seed, replicates of the bootstrap where there are less than MIN_WORLDS worlds
    `worlds` says what an interval is: MIN_WORLDS or more, Student's over the worlds; 1, of the sessions of that world,
    users drawn anew; 2, there is none, and each world's own is in the second table, which has none otherwise.
    """
    table = results.conform(table.drop(columns="recipe"), "results")
    worlds = by_world(table, pairs)
    over = comparisons_over_worlds(table, pairs)
    group = [*COMPARED, *PAIR]
    counted = worlds.groupby(group, dropna=False)["model"].transform("size")
    few = worlds[counted < MIN_WORLDS]
    own = _own_intervals(folder, runs, few, **draws)
    worlds = worlds.merge(own, "left", [*COMPARED, "world_seed", *PAIR])
    rows = []
    for key, part in worlds[counted < MIN_WORLDS].groupby(group, dropna=False):
        row = dict(zip(group, key, strict=True)) | {"worlds": len(part), "seeds": part["seeds"].min()}
        row |= difference_of(row["metric"], part["new"].mean(), part["old"].mean())
        alone = part.iloc[0] if len(part) == 1 else {"ci_low": np.nan, "ci_high": np.nan}
        rows.append(row | {name: alone[name] for name in ("ci_low", "ci_high")})
    kept = over[over["worlds"] >= MIN_WORLDS]
    columns = results.COLUMNS["comparisons"]
    found = pd.concat([kept, pd.DataFrame(rows, columns=list(columns)).astype(columns)], ignore_index=True)
    return results.conform(found, "comparisons"), worlds


def _own_intervals(folder: Path, runs: pd.DataFrame, few: pd.DataFrame, **draws) -> pd.DataFrame:
    """ci_low and ci_high of each row of `few` from the sessions of its world, users drawn anew."""
    found = [pd.DataFrame(columns=[*COMPARED, "world_seed", *PAIR, "ci_low", "ci_high"])]
    for (distance, world), part in few.groupby(WORLD, dropna=False):
        here = runs[(runs["state"] == "finished") & same(runs["distance"], distance) & same(runs["world_seed"], world)]
        masks = _slices(folder / here["run"].iloc[0])
        ablations = frozenset(here["ablation"]) - {""}
        wanted = list(part[PAIR].drop_duplicates().itertuples(index=False, name=None))
        for names in {ablations.intersection(pair): None for pair in wanted}:
            pairs = [pair for pair in wanted if ablations.intersection(pair) == names]
            sessions = _sessions(folder, here, names)
            rows = comparisons(sessions, pairs, masks, distance=distance, **draws)
            found.append(rows[[*COMPARED, *PAIR, "ci_low", "ci_high"]].assign(world_seed=world))
    return pd.concat(found).astype(
        {"world_seed": "Int64", "distance": "float64", "ci_low": "float64", "ci_high": "float64"}
    )


def same(column: pd.Series, value) -> pd.Series:
    """Where a column has this value; an empty one equals an empty one (data that knows no distance or world)."""
    return column.isna() if pd.isna(value) else column.eq(value).fillna(False)


def _slices(run: Path) -> pd.DataFrame:
    """SLICES of the test sessions of a run."""
    shop = tables.read(run / "tables/dataset", splits=("train", "test"), columns=["shuffled"])
    test = shop.sessions[shop.sessions["split"] == "test"]
    shown = shop.impressions[shop.impressions["session_id"].isin(test["session_id"])]
    return slices.session_slices(test, shown, train_clicks(shop))[list(SLICES)]


def _sessions(folder: Path, runs: pd.DataFrame, ablations: Collection[str]) -> pd.DataFrame:
    """session_metrics of one world's runs: those of no ablation, with those of some beside them.

    Seeds are numbered anew, since runs of two LM seeds may have the same ranker seeds. Beside ablations only runs of
    run.seeds that each of them has count: an LM is noise that all must share.
    """
    seeds = set.intersection(*(set(runs["seed"][runs["ablation"] == name]) for name in ("", *ablations)))
    chosen = runs[runs["ablation"].isin(["", *ablations]) & runs["seed"].isin(seeds)]
    parts = []
    for run in chosen.itertuples():
        sessions = table_of(folder, run.run, "session_metrics")
        parts.append(as_row(sessions[sessions["split"] == "test"], run.ablation).assign(run=run.run))
    sessions = pd.concat(parts, ignore_index=True)
    sessions["seed"] = sessions.groupby(["run", "seed"], dropna=False).ngroup()
    return sessions.drop(columns="run")


def stage_table(table: pd.DataFrame, compared: pd.DataFrame, seconds: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """One row a distance and model (twice if it is compared twice), in the order of results.MODELS.

    gauc .. ihr@3  means over worlds, LM seeds and ranker seeds; cold, tail: gauc there
    difference     of gauc, to `against`, with its interval; `relative` the share of the error removed
    says           what the interval shows
    seconds        of the stages that make the model, each stage's median, whether this run or another executed it
    """
    of_world = table.groupby(["distance", "model", "metric", "slice", "world_seed"], dropna=False)["value"].mean()
    means = of_world.groupby(level=[0, 1, 2, 3], dropna=False).mean().rename("value").reset_index()
    means["column"] = np.where(means["slice"] == "all", means["metric"], means["slice"])
    means = means[(means["slice"] == "all") | (means["metric"] == "gauc")]
    wide = means.pivot_table("value", ["distance", "model"], "column", dropna=False, observed=True).reset_index()
    wide = wide.reindex(columns=["distance", "model", *METRICS, *SLICES[1:]])
    wide = wide[wide["gauc"].notna()]
    gauc = compared[(compared["metric"] == "gauc") & (compared["slice"] == "all")]
    shown = gauc[["distance", *PAIR, "difference", "ci_low", "ci_high", "relative", "worlds"]]
    rows = wide.merge(shown.assign(says=[verdict(row) for row in shown.itertuples()]), "left", ["distance", "model"])
    rows["seconds"] = [_seconds(row.model, row.distance, seconds, runs) for row in rows.itertuples()]
    order = rows["model"].map(list(results.MODELS).index)
    rows = rows.assign(order=order).sort_values(["distance", "order"], kind="stable", ignore_index=True)
    first = ["distance", "model", "gauc", "against", "difference", "ci_low", "ci_high", "relative", "worlds", "says"]
    return rows[[*first, *METRICS[1:], *SLICES[1:], "seconds"]].astype({"worlds": "Int64"})


def main_distance(runs: pd.DataFrame) -> float:
    """The distance with most runs, of several the middle one; NaN where the data know none."""
    counts = runs["distance"].value_counts(dropna=False)
    most = sorted(counts.index[counts == counts.max()])
    return float(most[len(most) // 2])


def verdict(row) -> str:
    """What a comparisons row shows, in words; `row` has worlds, ci_low, ci_high."""
    if row.worlds == 2:
        return "two worlds: see each"
    shown = "gain" if row.ci_low > 0 else "loss" if row.ci_high < 0 else "not shown: crosses zero"
    return f"{shown} (in one world)" if row.worlds == 1 else shown


def _seconds(model: str, distance: float, seconds: pd.DataFrame, runs: pd.DataFrame) -> float:
    """Median over a model's runs of the seconds of its stages; NaN for what no stage trains (popularity, an oracle).

    The median, since a machine that was busy with something else must not make a stage look dear.
    """
    trained = model.split("+")[0]
    if trained not in VARIANTS and not trained.startswith(FULL):
        return np.nan
    recipe = model if model.startswith(f"{FULL}/") else ""
    own = runs[(runs["ablation"] == recipe) & (runs["state"] == "finished") & same(runs["distance"], distance)]
    last = "03" if model in VARIANTS and not model.startswith(FULL) else "08"  # of the stages that make it
    making = seconds[seconds["run"].isin(own["run"]) & (seconds["stage"].str[:2] <= last)]
    if model in VARIANTS and VARIANTS[model].vectors is None:
        making = making[making["stage"].str[:2] != "02"]  # it reads nothing of a language model
    return float(making.groupby("stage")["seconds"].median().sum())
