"""GAUC of the match term `memory` alone by its settings (ranker.memory), on development users and on valid.

python tests/tools/refresh_memory.py RUN.. writes outputs/published/match-valid/memory.csv. Each run is finished through
notebook 02; the test split is not read. The published table is of

    python -m rgalign run params/govuk2021-minilm.yaml --through 02

the same of params/govuk2021-opening-minilm.yaml, and the worlds 41 and 42 of outputs/published/match-worlds.
"""

import sys
from itertools import product
from pathlib import Path

import pandas as pd

from rgalign.data import shards, tables
from rgalign.evaluation.metrics import gauc_of_lists
from rgalign.params import ROOT, load_run
from rgalign.params_training import Memory
from rgalign.ranker.fit import with_click
from rgalign.ranker.match import Compared, Matcher, places_in
from rgalign.reasoner.build import Recipe

TARGET = ROOT / "outputs/published/match-valid/memory.csv"
NEIGHBOURS, TEMPERATURES, PRIORS = (50, 200, 800), (2.0, 8.0, 16.0, 32.0), (0.5, 2.0, 8.0)
RIDGES = (0.03, 0.3, 3.0, 30.0, 300.0)


def settings() -> list[Memory]:
    """The default, every value of one setting with the others at their default, and two grids."""
    usual = Memory()
    alone = {"neighbours": NEIGHBOURS, "temperature": TEMPERATURES, "prior": PRIORS, "whitening_ridge": RIDGES}
    ways = [{}] + [{name: value} for name, values in alone.items() for value in values]
    ways += [dict(zip(("neighbours", "temperature"), pair, strict=True)) for pair in product(NEIGHBOURS, TEMPERATURES)]
    ways += [dict(zip(("whitening_ridge", "temperature"), pair, strict=True)) for pair in product(RIDGES, TEMPERATURES)]
    found = [usual.model_copy(update=way) for way in ways]
    return [each for number, each in enumerate(found) if each not in found[:number]]


def measured(run: Path) -> pd.DataFrame:
    params, data = load_run(run), run / "tables/dataset"
    columns = Recipe.of(params).columns(data)
    shop, places = tables.excerpt(data, columns), places_in(run / "tables/embeddings")
    train, *judged = (shards.load_lists(run / "tables/encoded", part) for part in ("train", "dev", "valid"))
    compared = Compared(params.evaluation.untrained, params.reasoner.compares, columns, shop.kinds)
    rows = []
    for each in settings():
        ranker = params.ranker.model_copy(update={"match": ("memory",), "memory": each})
        matcher, row = Matcher.fit(shop, train, compared, places, ranker), {"data": run.name, **each.model_dump()}
        for lists in map(with_click, matcher.matched(shop, judged, places)):
            values = lists.match.of_candidates(lists.candidates, ("memory",)).float().nan_to_num(0).numpy()[:, :, 0]
            row[lists.part] = gauc_of_lists(values, lists.clicked.numpy(), lists.shown.numpy()).value
        rows.append(row)
        print(row, flush=True)
    return pd.DataFrame(rows)


if __name__ == "__main__":
    table = pd.concat([measured(Path(run)) for run in sys.argv[1:]])
    table.drop(columns="compared").round(4).to_csv(TARGET, index=False, lineterminator="\n")
