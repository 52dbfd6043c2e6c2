"""Compare rankers with and without match terms on valid of finished runs; the test split is not read.

python tests/tools/refresh_match.py RUN.. writes outputs/published/match-valid/models.csv and comparisons.csv, with the
functions of notebook 03 (METHOD.md 4): users sampled again, mean over ranker seeds, Holm over the rows of one table.
The published tables are of

    python -m rgalign run params/govuk2021-minilm.yaml --set 'ranker.models=[two_tower, two_tower_text, \
        two_tower_text/word_match, qe_rec, qe_rec/no_match, qe_rec/word_match, qe_rec/shuffled_match]' --through 03

and the same of params/govuk2021-opening-minilm.yaml.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from rgalign.data import tables
from rgalign.evaluation import comparisons, results, slices
from rgalign.params import ROOT
from rgalign.ranker.train import load_parts

TARGET = ROOT / "outputs/published/match-valid"
AGAINST = (
    "raw_cosine", "word_overlap", "two_tower_text", "two_tower_text/word_match",
    "qe_rec/no_match", "qe_rec/word_match", "qe_rec/shuffled_match",
)  # fmt: skip
METRICS = ["gauc", "recall@3", "recall@3/kb"]
SLICES = ["all", "cold", "tail", "head"]


def compared(run: Path, *, replicates: int = 1000) -> tuple[pd.DataFrame, pd.DataFrame]:
    """QE-Rec against each model that the run has: values of all models, and paired differences, by slice."""
    shop, parts = tables.excerpt(run / "tables/dataset", [], splits=("valid",)), load_parts(run / "tables/encoded")
    sessions = pd.read_parquet(run / "tables/valid_metrics.parquet")
    train = slices.of_train((parts.train, parts.dev), parts.intents)
    masks = slices.session_slices(shop.sessions, shop.impressions, **train)
    there = set(sessions["model"])
    pairs = [("qe_rec", name) for name in AGAINST if name in there]
    rows = comparisons.comparisons(sessions, pairs, masks, seed=0, replicates=replicates)
    values = results.results(sessions, masks, data=shop.name)
    found = values.groupby(["model", "metric", "slice"], sort=False, observed=True).agg(
        value=("value", "mean"), seeds=("seed", "nunique"), groups=("groups", "first")
    )
    kept = ["model", "against", "metric", "slice", "difference", "ci_low", "ci_high", "p_holm", "seeds"]
    return tuple(
        table[table["metric"].isin(METRICS) & table["slice"].isin(SLICES)].assign(data=shop.name).round(4)
        for table in (found.reset_index(), rows[kept])
    )


def write(runs: Sequence[Path]) -> None:
    tables_of = zip(*map(compared, runs), strict=True)
    TARGET.mkdir(parents=True, exist_ok=True)
    for name, parts in zip(("models", "comparisons"), tables_of, strict=True):
        whole = pd.concat(parts)
        whole = whole[["data", *(column for column in whole if column != "data")]]
        whole.to_csv(TARGET / f"{name}.csv", index=False, lineterminator="\n")


if __name__ == "__main__":
    write([Path(run) for run in sys.argv[1:]])
