"""Compare the models of a sweep on valid, world by world and over the worlds; the test split is not read.

python tests/tools/refresh_valid.py SWEEP writes outputs/published/mended-valid/control.csv, with the functions of
notebook 90 (METHOD.md 4): users sampled again inside a world, equal weights over worlds, Holm over the rows of one
table. SWEEP is

    python -m rgalign sweep params/alignment.yaml params/ablations/sft_only.yaml params/ablations/sft_dpo.yaml \
        params/ablations/no_alignment.yaml --seeds 31,32,0 --out SWEEP

The pair with old_order was measured when the order of the steps was still a parameter: it is left out of a new sweep.
"""

import sys
from pathlib import Path

import pandas as pd

from rgalign.commands.study import FULL, as_row, runs_of, table_of
from rgalign.evaluation.comparisons import PAIR, by_world, comparisons, comparisons_over_worlds
from rgalign.evaluation.results import conform
from rgalign.params import ROOT

TARGET = ROOT / "outputs/published/mended-valid/control.csv"
CONTROL = f"{FULL}/no_alignment"
PAIRS = (
    ("qe_rec", "two_tower_text"),
    (FULL, "qe_rec"),
    (CONTROL, "qe_rec"),
    *((model, CONTROL) for model in (FULL, f"{FULL}/sft_only", f"{FULL}/sft_dpo")),
    (f"{FULL}/sft_dpo", f"{FULL}/sft_only"),
    (FULL, f"{FULL}/old_order"),
)
WRITTEN = [*PAIR, "world_seeds", "seeds", "difference", "ci_low", "ci_high", "p_holm"]


def compared(sweep: Path, *, replicates: int = 1000) -> pd.DataFrame:
    """GAUC on valid: each world's comparisons by its users, and those over the worlds. Columns: WRITTEN."""
    own, results = [], []
    for world, runs in runs_of(sweep).groupby("world_seed"):
        sessions, values = (
            pd.concat([as_row(on_valid(sweep, run.run, table), run.ablation) for run in runs.itertuples()])
            for table in ("session_metrics", "results")
        )
        rows = comparisons(sessions, PAIRS, distance=runs["distance"].iloc[0], seed=0, replicates=replicates)
        own.append(rows.assign(world_seed=world, world_seeds=str(world)))
        results.append(values.drop_duplicates())
    worlds = pd.concat(own).query("metric == 'gauc' and slice == 'all'")
    values = by_world(conform(pd.concat(results), "results").query("metric == 'gauc' and slice == 'all'"), PAIRS)
    keys = [*PAIR, "world_seed"]
    both = values.merge(worlds[[*keys, "ci_low", "ci_high", "relative_low", "relative_high"]], "left", keys)
    return pd.concat([worlds, comparisons_over_worlds(both)])[WRITTEN].round(4)


def on_valid(sweep: Path, run: str, table: str) -> pd.DataFrame:
    """The rows of the valid split of a run's table."""
    return table_of(sweep, run, table).query("split == 'valid'")


if __name__ == "__main__":
    table = compared(Path(sys.argv[1]))
    table.to_csv(TARGET, index=False, lineterminator="\n")
    print(table.to_string(index=False))
