"""Each question about the reward model against scikit-learn, scipy or arithmetic."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import small_rewards as shop
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score

from rgalign.alignment.judge_reward import (
    REWRITES,
    agreement,
    calibration,
    choose_form,
    expected_calibration_error,
    ladder,
    ladder_queries,
    length_effect,
    nearness,
    optimism,
    rewritten,
    right_over_wrong,
    stability,
)
from rgalign.evaluation.judge import tfidf_judge
from rgalign.shopworld import world

RNG = np.random.default_rng(0)
SESSION = np.repeat([f"dev{i}" for i in range(20)], 6)
RIGHT = RNG.random(120) < 0.4
RIGHT[:6] = True  # has no wrong query
RIGHT[6:12] = False
GOOD, POOR = RIGHT + RNG.normal(size=120), RIGHT + 4 * RNG.normal(size=120)
GOOD[17] = np.nan  # an empty query


def by_session(value):
    known = np.isfinite(GOOD)
    frame = pd.DataFrame({"session": SESSION, "right": RIGHT, "good": GOOD, "poor": POOR})[known]
    return pd.Series({session: value(own) for session, own in frame.groupby("session")})


def test_right_over_wrong_is_the_mean_auc_of_sessions():
    table = right_over_wrong({"good": GOOD, "poor": POOR}, RIGHT, SESSION).set_index("judge")
    expected = by_session(lambda own: roc_auc_score(own.right, own.good) if 0 < own.right.sum() < len(own) else np.nan)
    assert table.loc["good", "auc"] == pytest.approx(expected.mean())
    assert table.loc["good", ["sessions", "left_out"]].tolist() == [expected.notna().sum(), expected.isna().sum()]
    deaf = right_over_wrong({"deaf": np.zeros(120)}, RIGHT, SESSION)
    assert deaf["auc"].item() == 0.5


def test_the_form_is_chosen_on_development_users_alone():
    dev = shop.lists("dev", 20)
    form, table = choose_form({"list": POOR, "kb": GOOD}, RIGHT, SESSION, dev=dev)
    assert form == "kb"
    assert table["judge"].tolist() == ["list", "kb"]
    assert choose_form({"list": GOOD, "kb": GOOD}, RIGHT, SESSION, dev=dev)[0] == "list"
    for part in ("train", "valid", "test"):
        with pytest.raises(ValueError, match=f"choose_form refuses: dev holds lists of part '{part}'"):
            choose_form({"kb": GOOD}, RIGHT, SESSION, dev=shop.lists(part, 20))
    with pytest.raises(ValueError, match=r"1 sessions are not of part dev \(first: 'dev19'\)"):
        choose_form({"kb": GOOD}, RIGHT, SESSION, dev=shop.lists("dev", 19))
    form, table = choose_form({"list": POOR, "kb": GOOD}, np.ones(120, bool), SESSION, dev=dev)
    assert form == "list", "nothing can be told: the first, so that a run of a small shop does not end here"
    assert table["sessions"].tolist() == [0, 0]


def test_agreement_is_the_mean_rank_correlation_of_sessions():
    constant = np.where(SESSION == "dev3", 1.0, POOR)
    table = agreement({"good": GOOD, "poor": POOR, "constant": constant}, SESSION)
    assert table[["first", "second"]].to_numpy().tolist() == [
        ["good", "poor"], ["good", "constant"], ["poor", "constant"]
    ]  # fmt: skip
    for name in ("spearman", "kendall"):
        correlation = {"spearman": stats.spearmanr, "kendall": stats.kendalltau}[name]
        expected = by_session(lambda own: correlation(own.good, own.poor).statistic).mean()  # noqa: B023
        assert table[name][0] == pytest.approx(expected)
    assert table[["sessions", "left_out"]].to_numpy().tolist() == [[20, 0], [19, 1], [19, 1]]
    assert table["kendall"][2] == pytest.approx(1)


def test_calibration_by_hand():
    said = np.array([[0.95, 0.05, 0], [0.15, 0.85, 0], [0.9, 0.1, 0], [0.4, 0.3, 0.3], [1, 0, 0], [0.5, 0.5, 0]])
    clicked = np.zeros((6, 3), bool)
    clicked[[0, 1, 2, 3, 4], [0, 1, 1, 0, 0]] = True  # the last list has no click
    table = calibration(said, clicked, bins=2)
    assert table["lists"].tolist() == [1, 4]
    assert table["confidence"].tolist() == pytest.approx([0.4, (0.95 + 0.85 + 0.9 + 1) / 4])
    assert table["hit"].tolist() == pytest.approx([1, 0.75])
    assert expected_calibration_error(table) == pytest.approx((0.6 + 4 * abs(0.925 - 0.75)) / 5)
    assert calibration(said, clicked)["lists"].sum() == 5
    assert np.isnan(expected_calibration_error(calibration(said[:0], clicked[:0])))


def test_a_calibrated_model_has_hardly_any_error():
    rng = np.random.default_rng(1)
    said = rng.dirichlet([0.5] * 4, size=20_000)
    clicked = (said.cumsum(axis=1) > rng.random((20_000, 1))).argmax(axis=1)[:, None] == np.arange(4)
    assert expected_calibration_error(calibration(said, clicked)) < 0.02


def test_rewrites_say_the_same_otherwise():
    queries = ["where is my parcel", "", "is my", "Please refund"]
    assert rewritten("greeting in front", queries)[:2] == ["hello , where is my parcel", ""]
    assert rewritten("please behind", queries)[0] == "where is my parcel please"
    assert rewritten("fillers dropped", queries) == ["where parcel", "", "is my", "refund"]
    assert all(len(rewritten(name, queries)) == 4 for name in REWRITES)


def test_stability_in_nats_and_against_another_query():
    reward = np.array([1.0, 3.0, np.nan, 0.0, 4.0])  # spread: (1 + 1 + 2 + 2) / 4
    shifted = reward + np.array([0.5, -0.5, 0, 0.5, 0.5])
    table = stability(reward, {"same": reward, "shifted": shifted}, ["a", "a", "a", "b", "b"])
    assert table.set_index("rewrite").loc["same"].tolist() == pytest.approx([4, 0, 0, 0, 1])
    assert table.set_index("rewrite").loc["shifted"].tolist() == pytest.approx([4, 0.25, 0.5, 0.5 / 1.5, 1])


def test_a_reward_of_length_is_found_out():
    tokens = RNG.integers(2, 12, size=120)
    found = length_effect(tokens * 2.0, tokens, SESSION).iloc[0]
    assert found[["spearman", "overall"]].tolist() == pytest.approx([1, 1])
    assert abs(length_effect(GOOD, tokens, SESSION)["overall"].item()) < 0.3


def test_optimism_by_hand():
    """Of session a the two choose another query; of b, whose last query has no reward, the same."""
    found = optimism(np.array([1.0, 0.0, 2.0, 1.0, 9.0]), np.array([0.2, 0.4, 0.5, 0.1, np.nan]), list("aabbb"))
    assert found["all"].tolist()[:2] == pytest.approx([1.0, 0.3])
    assert found["best"].tolist() == pytest.approx([1.5, 0.45, 0.35])


SHOPWORLD = [f"kb_{number:03d}" for number in range(96)]  # object * 8 + issue


def one_click(clicked, *, twice=0):
    """Dev lists of three candidates each, the clicked one in the middle; the last `twice` have two clicks."""
    clicked = np.asarray(clicked)
    own = shop.lists("dev", len(clicked))
    candidates = np.stack([(clicked + 1) % 96, clicked, (clicked + 2) % 96], axis=1)
    is_clicked = np.tile([False, True, False], (len(clicked), 1))
    is_clicked[len(clicked) - twice :, 0] = True
    return replace(own, candidates=torch.tensor(candidates), clicked=torch.tensor(is_clicked))


def test_the_ladder_asks_what_its_rungs_say():
    wanted = np.array([0, 95, 9])  # late parcel, fraud of a warranty, missing refund: words.yaml
    made = ladder_queries(wanted, seed=3)
    parcel, warranty = ("parcel", "package", "box", "delivery"), ("warranty", "repair", "guarantee", "servicing")
    late, fraud = (
        ("so long", "when will", "still waiting", "too slow", "hurry"),
        ("else", "scam", "not make", "hacked", "fake"),
    )

    def has(query, words):
        return any(word in query for word in words)

    assert has(made["wanted"][0], parcel)
    assert has(made["wanted"][0], late)
    assert has(made["other issue"][0], parcel)
    assert not has(made["other issue"][0], late)
    assert has(made["other object"][1], fraud)
    assert not has(made["other object"][1], warranty)
    assert not has(made["neither"][1], fraud)
    assert not has(made["neither"][1], warranty)
    assert made["empty"] == ["", "", ""]


def test_a_judge_by_truth_has_the_whole_ladder_a_constant_half_and_the_opposite_none():
    lists = one_click(np.random.default_rng(0).integers(96, size=40), twice=3)
    quality = {}
    for height, rungs in enumerate([["empty"], ["neither"], ["other issue", "other object"], ["wanted"]]):
        for rung in rungs:
            made = ladder_queries(lists.candidates[:37, 1].numpy(), seed=0)[rung]
            quality |= {(row, query): height for row, query in enumerate(made)}

    def truth(own, queries):
        return np.array([quality[key] for key in enumerate(queries)])

    judges = {
        "truth": truth,
        "constant": lambda own, queries: np.zeros(len(own)),
        "opposite": lambda own, queries: -truth(own, queries),
        "no reward for nothing": lambda own, queries: np.where([q == "" for q in queries], np.nan, truth(own, queries)),
    }
    table = ladder(judges, lists, SHOPWORLD).set_index("judge")
    assert table["accuracy"].tolist() == [1.0, 0.5, 0.0, 1.0]
    assert table.loc["constant", ["wanted_over_half", "half_over_neither", "neither_over_empty"]].tolist() == [0.5] * 3
    # of five queries ten pairs less the one of equal quality; two clicks have no one wanted intent
    assert table["pairs"].tolist() == [37 * 9] * 3 + [37 * 5]
    assert table["left_out"].tolist() == [0, 0, 0, 37 * 4]
    assert np.isnan(table.loc["no reward for nothing", "neither_over_empty"])


def test_the_ladder_reads_steps_by_hand():
    lists = one_click([5])
    rewards = {"wanted": 2.0, "other issue": 3.0, "other object": 1.0, "neither": 1.0, "empty": -1.0}
    made = {queries[0]: rewards[rung] for rung, queries in ladder_queries(np.array([5]), seed=0).items()}
    row = ladder({"hand": lambda own, queries: np.array([made[q] for q in queries])}, lists, SHOPWORLD).iloc[0]
    # wanted: one of two; halves over neither: one and a tie; all over empty: 4
    assert row["wanted_over_half"] == 0.5
    assert row["half_over_neither"] == 0.75
    assert row["neither_over_empty"] == 1.0
    assert row["accuracy"] == pytest.approx((1 + 1.5 + 1 + 4) / 9)


def test_words_of_the_kb_climb_the_ladder_and_another_shop_is_refused():
    kb = world.generate(seed=0, sessions=20, users=10).intents
    lists = one_click(np.arange(0, 96, 3))
    row = ladder({"TF-IDF": nearness(tfidf_judge(kb))}, lists, kb["intent_id"].tolist()).iloc[0]
    assert row["accuracy"] > 0.6
    assert row["left_out"] == 32 * 4, "an empty query has no similarity"
    with pytest.raises(ValueError, match=r"1 intents are not ShopWorld's \(first: 'guide'\)"):
        ladder({}, lists, [*SHOPWORLD[:-1], "guide"])
