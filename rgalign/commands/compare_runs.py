"""Several runs side by side, and paired where they judged the same sessions."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from rgalign.evaluation import bootstrap
from rgalign.evaluation.comparisons import holm
from rgalign.evaluation.results import GAUC_WEIGHT, MODELS, conform
from rgalign.run.artifacts import ArtifactError

_KEYS = ["run", "against", "model"]
METRICS = ("gauc", "recall@3", "ndcg@3", "recall@3/kb", "ihr@1")


def side_by_side(runs: Sequence[Path]) -> pd.DataFrame:
    """Means over ranker seeds on the whole test split: one row a model and metric, one column a run.

    Raises ArtifactError that names every run without results, and for less than two runs or one given twice.
    """
    faults = [f"{run} has no tables/results.parquet: run it through 09" for run in runs if not _table(run).is_file()]
    if len({run.resolve() for run in runs}) < max(2, len(runs)):
        faults.append("expected at least two runs, each once")
    if faults:
        raise ArtifactError("these runs cannot be compared:\n  " + "\n  ".join(faults))
    columns = {}
    for run, name in zip(runs, names(runs), strict=True):
        results = pd.read_parquet(_table(run))
        whole = results[(results.slice == "all") & (results.split == "test") & results.metric.isin(METRICS)]
        columns[name] = whole.groupby(["model", "metric"])["value"].mean()
    table = pd.DataFrame(columns).dropna(how="all")
    return table.sort_index(key=lambda level: level.map([*MODELS, *METRICS].index))


def paired(runs: Sequence[Path], *, seed: int = 0, replicates: int = 1000) -> pd.DataFrame:
    """GAUC of each later run minus the first's, model by model, where both judged the same test sessions.

    Columns: run, against, model, difference, ci_low, ci_high (95 %, users sampled again), p_holm (adjusted for the rows
    of this table), sessions. No row for a run that is kept without its session_metrics.
    """
    rows, labels = [], names(runs)
    first = _sessions(runs[0])
    for run, name in zip(runs[1:], labels[1:], strict=True):
        other = _sessions(run)
        for model in [model for model in MODELS if model in first and model in other]:
            old, new = first[model], other[model]
            same = old.index.equals(new.index) and old[GAUC_WEIGHT].equals(new[GAUC_WEIGHT])
            if not same or old.user_id.ne(new.user_id).any():
                continue
            interval = bootstrap.over_users(
                (new.gauc - old.gauc).to_numpy(), old[GAUC_WEIGHT].to_numpy(), old.user_id.to_numpy(),
                seed=seed, replicates=replicates,
            )  # fmt: skip
            rows.append((name, labels[0], model, *map(float, interval), bootstrap.p_over_users(*interval), len(old)))
    table = pd.DataFrame(rows, columns=[*_KEYS, "difference", "ci_low", "ci_high", "p_holm", "sessions"])
    return table.assign(p_holm=holm(table["p_holm"]))


def names(runs: Sequence[Path]) -> list[str]:
    """A name a run: its folder's, with as much of the path before it as tells it from the others."""
    for parts in range(1, max(len(run.resolve().parts) for run in runs) + 1):
        found = ["/".join(run.resolve().parts[-parts:]) for run in runs]
        if len(set(found)) == len(found):
            break
    return found


def _table(run: Path) -> Path:
    return run / "tables/results.parquet"


def _sessions(run: Path) -> dict[str, pd.DataFrame]:
    """model -> its test sessions by session_id, GAUC averaged over ranker seeds; nothing where they are not kept."""
    if not (run / "tables/session_metrics.parquet").is_file():
        return {}
    sessions = conform(pd.read_parquet(run / "tables/session_metrics.parquet"), "session_metrics")
    test = sessions[sessions.split == "test"]
    means = {}
    for model, own in test.groupby("model"):
        by_session = own.groupby("session_id")
        means[model] = by_session.agg({"gauc": "mean", GAUC_WEIGHT: "first", "user_id": "first"})
    return means
