"""Compute the comparisons of outputs/published/ again, from the tables that lie there: the runs behind them are gone.

python tests/tools/refresh_published.py changes each comparisons.parquet in place (twice gives the same bytes)
and prints what it could not derive. What is published again by `make published` has all columns and is left as it is.

A run's table keeps its differences and intervals; p-values follow from the intervals (bootstrap.p_over_users). The
interval of `relative` would take the sessions, which are not kept: it stays empty. A sweep's table is made of its
worlds.parquet by today's functions. Where that has no interval of a world's own there is no floor: `sampling_error` is
empty, and the interval is Student's over the worlds.
"""

import sys
from pathlib import Path

import pandas as pd

from rgalign.commands import study
from rgalign.evaluation import bootstrap
from rgalign.evaluation.comparisons import COMPARED, PAIR, comparisons_over_worlds, with_holm
from rgalign.evaluation.results import COLUMNS
from rgalign.params import ROOT
from rgalign.run.artifacts import write_table

PUBLISHED = ROOT / "outputs" / "published"


def recomputed(folder: Path) -> pd.DataFrame:
    """The comparisons of a published run or sweep, with every column that can be derived."""
    old = pd.read_parquet(folder / "comparisons.parquet")
    if not (folder / "worlds.parquet").is_file():
        return of_run(old, pd.read_parquet(folder / "results.parquet"))
    return comparisons_over_worlds(worlds_of(folder))


def worlds_of(folder: Path) -> pd.DataFrame:
    """A published sweep's differences, world by world, with each world's own intervals where they were kept.

    Of study.STEPS, pairs of ablations whose comparison is younger than the first sweep are added from its results.
    """
    return study.published_worlds(folder, study.pairs_of(folder, runs=None))


def of_run(old: pd.DataFrame, results: pd.DataFrame) -> pd.DataFrame:
    """One run's comparisons with the p-values of their intervals."""
    rows = old.reindex(columns=list(COLUMNS["comparisons"])).astype(COLUMNS["comparisons"] | {"worlds": "int64"})
    told = rows[["difference", "ci_low", "ci_high"]].itertuples(index=False)
    rows = rows.assign(
        p=[bootstrap.p_over_users(*row) for row in told],
        sampling_error=bootstrap.standard_error(rows["ci_low"], rows["ci_high"]),
        world_seeds=" ".join(str(int(seed)) for seed in sorted(results["world_seed"].dropna().unique())),
    )
    return with_holm(rows)


def main() -> None:
    for path in sorted(PUBLISHED.glob("*/comparisons.parquet")):
        old, new = pd.read_parquet(path), recomputed(path.parent)
        keys = [*COMPARED, *PAIR]
        both = old.merge(new, "left", keys, suffixes=("", "_new"))
        moved = (both["difference"] - both["difference_new"]).abs().max()
        if len(both) != len(old) or not moved < 1e-9:
            sys.exit(f"{path.parent.name}: the differences would move by {moved}; nothing was written there")
        write_table(path, new)
        no_floor = (new["sampling_error"].isna() & new["ci_low"].notna()).sum()
        no_ratio = (new["relative_low"].isna() & new["ci_low"].notna()).sum()
        print(
            f"{path.parent.name}: {len(new)} rows ({len(new) - len(old)} added); without a known sampling error "
            f"{no_floor}, without an interval of the ratio {no_ratio}"
        )


if __name__ == "__main__":
    main()
