"""Comparisons of runs: a few side by side (python -m rgalign compare), or a study over its worlds (METHOD.md 4).

The unit of a study is the world: its values are averaged over LM and ranker seeds first. The interval over the worlds
has the sampling error of their sessions as a floor (bootstrap.over_worlds). Of one or two worlds there is only each
world's own interval, users sampled again. `world_seeds` names the worlds that have both models.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from rgalign.commands import study
from rgalign.commands.study import FULL, METRICS, SLICES, WORLD, as_row, table_of
from rgalign.data import tables
from rgalign.data.describe import train_clicks
from rgalign.evaluation import bootstrap, comparisons, results, slices
from rgalign.evaluation.comparisons import COMPARED, INTERVALS, PAIR, verdict
from rgalign.evaluation.metrics import LABELS
from rgalign.evaluation.results import GAUC_WEIGHT
from rgalign.ranker.variants import RANKERS
from rgalign.run.artifacts import ArtifactError

RESULTS = "tables/results.parquet"


def side_by_side(runs: Sequence[Path]) -> pd.DataFrame:
    """Means over ranker seeds on the whole test split: one row a model and metric of LABELS, one column a run.

    Raises ArtifactError that names every run without results, and for less than two runs or one given twice.
    """
    faults = [f"{run} has no {RESULTS}: run it through 09" for run in runs if not (run / RESULTS).is_file()]
    if len({run.resolve() for run in runs}) < max(2, len(runs)):
        faults.append("expected at least two runs, each once")
    if faults:
        raise ArtifactError("these runs cannot be compared:\n  " + "\n  ".join(faults))
    columns = {}
    for run, name in zip(runs, names(runs), strict=True):
        table = pd.read_parquet(run / RESULTS).query("slice == 'all' and split == 'test'")
        columns[name] = table[table.metric.isin(LABELS)].groupby(["model", "metric"])["value"].mean()
    table = pd.DataFrame(columns).dropna(how="all")
    return table.sort_index(key=lambda level: level.map([*results.MODELS, *LABELS].index))


def paired(runs: Sequence[Path]) -> pd.DataFrame:
    """GAUC of each later run minus the first's, model by model, where both judged the same test sessions.

    Columns: run, against, model, difference, ci_low, ci_high (95 %, users sampled again), p_holm (adjusted for the rows
    of this table), sessions. No row for a run that is kept without its session_metrics.
    """
    rows, labels = [], names(runs)
    first = _run_sessions(runs[0])
    for run, name in zip(runs[1:], labels[1:], strict=True):
        other = _run_sessions(run)
        for model in (model for model in results.MODELS if model in first and model in other):
            old, new = first[model], other[model]
            same = old.index.equals(new.index) and old[GAUC_WEIGHT].equals(new[GAUC_WEIGHT])
            if not same or old.user_id.ne(new.user_id).any():
                continue
            values = (new.gauc - old.gauc).to_numpy(), old[GAUC_WEIGHT].to_numpy(), old.user_id.to_numpy()
            interval = bootstrap.over_users(*values, seed=0, replicates=1000)
            rows.append((name, labels[0], model, *map(float, interval), bootstrap.p_over_users(*interval), len(old)))
    columns = ["run", "against", "model", "difference", "ci_low", "ci_high", "p_holm", "sessions"]
    table = pd.DataFrame(rows, columns=columns)
    return table.assign(p_holm=comparisons.holm(table["p_holm"]))


def names(runs: Sequence[Path]) -> list[str]:
    """A name a run: its folder's, with as much of the path before it as makes it different from the others."""
    for parts in range(1, max(len(run.resolve().parts) for run in runs) + 1):
        found = ["/".join(run.resolve().parts[-parts:]) for run in runs]
        if len(set(found)) == len(found):
            break
    return found


def _run_sessions(run: Path) -> dict[str, pd.DataFrame]:
    """model -> its test sessions by session_id, GAUC averaged over ranker seeds; nothing where they are not kept."""
    path = run / "tables" / "session_metrics.parquet"
    if not path.is_file():
        return {}
    sessions = results.conform(pd.read_parquet(path), "session_metrics")
    test = sessions[sessions.split == "test"]
    figures = {"gauc": "mean", GAUC_WEIGHT: "first", "user_id": "first"}
    return {model: own.groupby("session_id").agg(figures) for model, own in test.groupby("model")}


def compare_models(
    folder: Path, runs: pd.DataFrame, table: pd.DataFrame, pairs: Sequence[tuple[str, str]], **draws
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The comparisons rows of a study, and the same world by world (with world_seed, new, old).

    runs, table, pairs  study.runs_of, results_of, pairs_of;  draws  of the bootstrap in a world: seed, replicates
    """
    if study.is_published(folder):
        worlds = study.published_worlds(folder, pairs)
        return comparisons.comparisons_over_worlds(worlds), worlds
    worlds = comparisons.by_world(results.conform(table.drop(columns="recipe"), "results"), pairs)
    own = _own_intervals(folder, runs, worlds, **draws)
    worlds = worlds.merge(own, "left", [*COMPARED, "world_seed", *PAIR])
    return comparisons.comparisons_over_worlds(worlds), worlds


def _own_intervals(folder: Path, runs: pd.DataFrame, worlds: pd.DataFrame, **draws) -> pd.DataFrame:
    """INTERVALS of each row of `worlds` from the sessions of its world, users sampled again."""
    found = [pd.DataFrame(columns=[*COMPARED, "world_seed", *PAIR, *INTERVALS])]
    for (distance, world), part in worlds.groupby(WORLD, dropna=False):
        here = runs[(runs["state"] == "finished") & same(runs["distance"], distance) & same(runs["world_seed"], world)]
        masks = _slices(folder / here["run"].iloc[0])
        ablations = frozenset(here["ablation"]) - {""}
        all_pairs = list(part[PAIR].drop_duplicates().itertuples(index=False, name=None))
        for names in {ablations.intersection(pair): None for pair in all_pairs}:
            pairs = [pair for pair in all_pairs if ablations.intersection(pair) == names]
            sessions = _sessions(folder, here, names)
            rows = comparisons.comparisons(sessions, pairs, masks, distance=distance, **draws)
            found.append(rows[[*COMPARED, *PAIR, *INTERVALS]].assign(world_seed=world))
    return pd.concat(found).astype(study.WORLD_TYPES | dict.fromkeys(INTERVALS, "float64"))


def same(column: pd.Series, value) -> pd.Series:
    """Where a column has this value; an empty one equals an empty one."""
    return column.isna() if pd.isna(value) else column.eq(value).fillna(False)


def _slices(run: Path) -> pd.DataFrame:
    """SLICES of the test sessions of a run."""
    shop = tables.read(run / "tables/dataset", splits=("train", "test"), columns=["shuffled"])
    test = shop.sessions[shop.sessions["split"] == "test"]
    shown = shop.impressions[shop.impressions["session_id"].isin(test["session_id"])]
    found = slices.session_slices(test, shown, train_clicks(shop))
    return found[[name for name in SLICES if name in found]]  # no `shuffled` where the data do not know it


def _sessions(folder: Path, runs: pd.DataFrame, ablations: Collection[str]) -> pd.DataFrame:
    """session_metrics of one world's runs: those of no ablation and of some, by run.seeds that each has (an LM is noise
    that all must share). Seeds are numbered again, since runs of two LM seeds may have the same ranker seeds.
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

    gauc .. ihr@3  means over worlds, LM seeds and ranker seeds; cold, tail, shuffled: gauc there
    difference     of gauc, to `against`, with its interval; `relative` the share of the error removed, with its own
    p_holm, says   the p-value adjusted for the rows of this table, and what it shows
    world_seeds    the worlds of `difference`: a row whose worlds are not those of another cannot be set against it
    seconds        of the stages that make the model, each stage's median, whether this run or another executed it
    """
    of_world = table.groupby(["distance", "model", "metric", "slice", "world_seed"], dropna=False)["value"].mean()
    means = of_world.groupby(level=[0, 1, 2, 3], dropna=False).mean().rename("value").reset_index()
    means["column"] = np.where(means["slice"] == "all", means["metric"], means["slice"])
    means = means[(means["slice"] == "all") | (means["metric"] == "gauc")]
    wide = means.pivot_table("value", ["distance", "model"], "column", dropna=False, observed=True).reset_index()
    names = [*METRICS, *(name for name in SLICES[1:] if name in wide)]
    wide = wide.reindex(columns=["distance", "model", *names])
    wide = wide[wide["gauc"].notna()]
    gauc = compared[(compared["metric"] == "gauc") & (compared["slice"] == "all")]
    interval = ["difference", "ci_low", "ci_high", "p_holm", "relative", "relative_low", "relative_high"]
    shown = gauc[["distance", *PAIR, *interval, "worlds", "world_seeds"]]
    rows = wide.merge(shown.assign(says=[verdict(row) for row in shown.itertuples()]), "left", ["distance", "model"])
    rows["seconds"] = [_seconds(row.model, row.distance, seconds, runs) for row in rows.itertuples()]
    rows["order"] = rows["model"].map(list(results.MODELS).index)
    rows = rows.sort_values(["distance", "order"], kind="stable", ignore_index=True)
    first = ["distance", "model", "gauc", "against", *interval, "worlds", "world_seeds", "says"]
    return rows[[*first, *names[1:], "seconds"]].astype({"worlds": "Int64"})


def main_distance(runs: pd.DataFrame) -> float:
    """The distance with most runs, of several the middle one; NaN where the data know none."""
    counts = runs["distance"].value_counts(dropna=False)
    most = sorted(counts.index[counts == counts.max()])
    return float(most[len(most) // 2])


def _seconds(model: str, distance: float, seconds: pd.DataFrame, runs: pd.DataFrame) -> float:
    """Median over a model's runs of the seconds of its stages; NaN for what no stage trains (popularity, an oracle).

    The median, since a machine that was busy with something else must not make a stage look expensive.
    """
    if model not in RANKERS and not model.startswith(FULL):
        return np.nan
    recipe = model if model.startswith(f"{FULL}/") else ""
    own = runs[(runs["ablation"] == recipe) & (runs["state"] == "finished") & same(runs["distance"], distance)]
    last = "03" if model in RANKERS and not model.startswith(FULL) else "08"  # of the stages that make it
    making = seconds[seconds["run"].isin(own["run"]) & (seconds["stage"].str[:2] <= last)]
    if model in RANKERS and RANKERS[model].vectors is None:
        making = making[making["stage"].str[:2] != "02"]  # it reads nothing of a language model
    return float(making.groupby("stage")["seconds"].median().sum())
