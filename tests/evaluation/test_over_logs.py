"""Over many logs of a small world the estimates do what their formulas promise."""

import numpy as np
import pandas as pd
import pytest

from rgalign.evaluation.off_policy import over_logs
from rgalign.shopworld.traffic import Traffic
from rgalign.shopworld.world import generate, oracle_scores

LOGS = 120
NAMES = ("ips", "snips", "dr", "sndr", "switch", "dros")


@pytest.fixture(scope="module")
def traffic():
    shop = generate(seed=4, sessions=500, users=150, transcripts=0)
    traffic = Traffic.of(shop.meta, shop.sessions, shop.truth)
    oracle = oracle_scores(shop.meta, shop.truth)
    return traffic, {"legacy": traffic.top(traffic.scores), "oracle": traffic.top(oracle)}


@pytest.fixture(scope="module")
def table(traffic):
    traffic, targets = traffic
    perfect = {name: traffic.click_probability(shown) for name, shown in targets.items()}
    found = over_logs(traffic, targets, perfect, logs=LOGS, seed=1, against="legacy")
    return found.set_index(["ranker", "against", "estimator"])


def test_one_row_a_figure_and_estimator(table):
    pairs = [("legacy", None), ("oracle", None), ("oracle", "legacy")]
    assert [(ranker, other if isinstance(other, str) else None, name) for ranker, other, name in table.index] == [
        (*pair, name) for pair in pairs for name in NAMES
    ]
    assert (table["logs"] == LOGS).all()
    assert table["matched"].isna().tolist() == [False] * 12 + [True] * 6


def test_truth_is_the_traffics_and_errors_add_up(table, traffic):
    traffic, targets = traffic
    ctr = {name: traffic.ctr(shown) for name, shown in targets.items()}
    expected = [ctr["legacy"], ctr["oracle"], ctr["oracle"] - ctr["legacy"]]
    assert table["truth"].to_list() == np.repeat(expected, len(NAMES)).tolist()
    np.testing.assert_allclose(table["mean"] - table["truth"], table["bias"], atol=1e-12)
    spread = table["standard_deviation"] ** 2 * (LOGS - 1) / LOGS
    np.testing.assert_allclose(table["rmse"] ** 2, table["bias"] ** 2 + spread, rtol=1e-9)


def test_ips_and_dr_have_no_bias(table):
    unbiased = table[table.index.get_level_values("estimator").isin(["ips", "dr"])]
    assert (unbiased["bias"].abs() < 4 * unbiased["standard_deviation"] / np.sqrt(LOGS)).all()


def test_the_interval_of_a_well_supported_ranker_covers(table):
    """The sessions stay the same over these logs, so more than 95 % is expected; 3 sigma below it is too few."""
    assert (table.loc["legacy", "coverage"] > 0.95 - 3 * np.sqrt(0.95 * 0.05 / LOGS)).all()


def test_spread_of_dr_with_the_truth_as_its_model_is_the_clicks_own(table, traffic):
    traffic, targets = traffic
    rules = traffic.world.rules
    assert (rules.positions, rules.explored, rules.shuffled_share) == (12, 3, 0.15)
    # The policy's r-th choice stands at position r where no slot before it is explored, or by shuffling.
    propensity = np.array([0.85 * _in_place(rank) + 0.15 / 12 for rank in range(3)])
    q = traffic.click_probability(targets["legacy"])
    exact = np.sqrt((q * (1 - q) / propensity).sum()) / q.size
    found = table.loc["legacy"].xs("dr", level="estimator")["standard_deviation"].item()
    assert found == pytest.approx(exact, rel=4 / np.sqrt(2 * LOGS))


def _in_place(rank):
    """P(the first rank + 1 of 12 positions have none of the 3 explored slots)."""
    return np.prod([(9 - place) / (12 - place) for place in range(rank + 1)])


def test_clipping_lowers_ips_and_the_seed_decides_the_rest(traffic):
    traffic, targets = traffic
    oracle = {"oracle": targets["oracle"]}
    first, again, clipped = (over_logs(traffic, oracle, logs=20, seed=3, clip=clip) for clip in (None, None, 5.0))
    pd.testing.assert_frame_equal(first, again)
    assert first["estimator"].to_list() == ["ips", "snips"]
    assert clipped["mean"][0] < 0.5 * first["mean"][0]
    assert clipped["standard_deviation"][0] < first["standard_deviation"][0]
    assert first["mean"][0] != over_logs(traffic, oracle, logs=20, seed=4)["mean"][0]


def test_logs_in_which_an_estimate_is_undefined_are_left_out_and_counted(traffic):
    traffic, _ = traffic
    few = Traffic(traffic.world, traffic.users[:4], traffic.intents[:4], traffic.available[:4], traffic.scores[:4])
    worst = few.top(-few.scores, 1)
    found = over_logs(few, {"worst": worst}, logs=30, seed=0).set_index("estimator")
    assert found.loc["ips", "logs"] == 30
    assert found.loc["snips", "logs"] < 30


def test_what_can_not_be_summarised_is_refused(traffic):
    traffic, targets = traffic
    with pytest.raises(ValueError, match="logs is 1"):
        over_logs(traffic, targets, logs=1, seed=0)
    with pytest.raises(ValueError, match="against is 'qe_rec'; expected one of legacy, oracle"):
        over_logs(traffic, targets, seed=0, against="qe_rec")
