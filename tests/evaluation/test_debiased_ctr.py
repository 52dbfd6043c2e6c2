"""ctr@3/kb of a small run's notebook 03: against the sum over its logged impressions, worked out with pandas."""

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

import rgalign
from rgalign.data import shards, tables
from rgalign.evaluation.click_model import DirectModel
from rgalign.evaluation.judge import Judge
from rgalign.ranker.match import log_clicks


@pytest.fixture(scope="module")
def parts(ranked):
    return {part: shards.load_lists(ranked / "tables/encoded", part) for part in ("train", "dev", "valid")}


def test_it_is_sndr_of_the_three_that_the_ranker_would_show(ranked, parts):
    shop = tables.read(ranked / "tables/dataset", splits=("valid",))
    top = rgalign.load(ranked).score(shop.sessions).assign(position=lambda table: table["rank"] - 1)
    popularity = log_clicks(parts["train"], shop.intents)[None]
    model = DirectModel.fit(parts["dev"], np.repeat(popularity, len(parts["dev"]), axis=0))
    row = pd.Index(shop.intents.intent_id).get_indexer(top.intent_id).reshape(-1, 3)
    top["predicted"] = model.predict(np.repeat(popularity, len(row), axis=0), row).ravel()
    keys = ["session_id", "intent_id", "position"]
    both = top[[*keys, "predicted"]].astype({"session_id": str, "intent_id": str})
    logged = shop.impressions[[*keys, "clicked", "propensity"]].astype({"session_id": str, "intent_id": str})
    matched = both.merge(logged, on=keys)
    weight = 1 / matched.propensity.astype(float)
    assert len(matched) > 2
    expected = both.predicted.mean() + (weight * (matched.clicked - matched.predicted)).sum() / weight.sum()
    found = pd.read_parquet(ranked / "tables/valid_metrics.parquet").query("model == 'qe_rec'")
    assert found["ctr@3/kb"].mean() == pytest.approx(expected)


@pytest.mark.parametrize("lacks", ["propensity", "position_is_real"])
def test_without_propensities_or_positions_it_is_not_there(ranked, parts, lacks, tmp_path):
    shop = tables.read(ranked / "tables/dataset", splits=("train", "valid"))
    if lacks == "propensity":
        shop.impressions.drop(columns=lacks, inplace=True)
    else:
        shop.meta[lacks] = False
    tables.write(shop, tmp_path / "dataset")
    assert ("propensity" in pq.read_schema(tmp_path / "dataset/impressions.parquet").names) == (lacks != "propensity")
    intents, seen = shards.load_intents(ranked / "tables/encoded"), (parts["train"], parts["dev"])
    judge = Judge.of(shop, parts["valid"], intents, seen).with_log(tmp_path / "dataset", seen)
    assert "ctr@3/kb" not in judge.scores(np.zeros((len(parts["valid"]), len(intents))), "popularity")
