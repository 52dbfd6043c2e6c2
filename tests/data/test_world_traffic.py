"""Traffic is the world that wrote the log: same policy, same probabilities, read back from files."""

import dataclasses
import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from rgalign.data import tables
from rgalign.shopworld.traffic import Traffic
from rgalign.shopworld.world import generate

POSITIONS, LEGACY = 12, 9
UNLIKELY = 1e-4  # seeds are fixed: how surprised a test would have to be


@pytest.fixture(scope="module")
def shop():
    return generate(seed=5, sessions=3_000, users=600, transcripts=0)


@pytest.fixture(scope="module")
def traffic(shop):
    return Traffic.of(shop.meta, shop.sessions, shop.truth)


@pytest.fixture(scope="module")
def logged(shop):
    """What the world itself logged: intents by their row, each (sessions, positions)."""
    row = pd.Index(list(shop.intents["intent_id"]))
    shape = (len(shop.sessions), POSITIONS)
    return {
        "shown": row.get_indexer(list(shop.impressions["intent_id"])).reshape(shape),
        "propensity": shop.impressions["propensity"].to_numpy(dtype=float).reshape(shape),
        "click_probability": np.stack(shop.truth["click_probability"].to_numpy()),
        "shuffled": shop.sessions["shuffled"].to_numpy(dtype=bool),
    }


def test_legacy_scores_are_those_the_world_used(traffic, logged):
    """Nine of twelve shown are the policy's best, and in its order where the list was not shuffled."""
    top = traffic.top(traffic.scores, LEGACY)
    place = (logged["shown"][:, None, :] == top[:, :, None]).argmax(axis=2)
    assert (np.take_along_axis(logged["shown"], place, axis=1) == top).all()
    in_order = (np.diff(place, axis=1) > 0).all(axis=1)
    assert in_order[~logged["shuffled"]].all()
    assert in_order[logged["shuffled"]].mean() < 0.01


def test_click_probabilities_are_those_in_the_truth(traffic, logged):
    np.testing.assert_allclose(
        traffic.click_probability(logged["shown"]), logged["click_probability"], rtol=1e-6
    )  # the truth is float32
    assert traffic.ctr(logged["shown"][:, :3]) == pytest.approx(logged["click_probability"][:, :3].mean(), rel=1e-6)


def test_propensities_drawn_anew_are_those_of_the_log(traffic, logged):
    drawn = traffic.relog(np.random.default_rng(0))
    same = drawn.candidates == logged["shown"]
    assert same.sum() > 5_000
    np.testing.assert_array_equal(drawn.propensity[same], logged["propensity"][same])
    np.testing.assert_array_equal(drawn.click_probability, traffic.click_probability(drawn.candidates))


@pytest.mark.parametrize("session", [0, 1, 2_999])
def test_frequencies_of_a_session_logged_again_and_again(shop, session):
    times = 20_000
    again = Traffic.of(shop.meta, shop.sessions.iloc[np.repeat(session, times)], shop.truth)
    drawn = again.relog(np.random.default_rng(session))
    count, clicks, stated, chance = (np.zeros((again.scores.shape[1], POSITIONS)) for _ in range(4))
    where = (drawn.candidates, np.arange(POSITIONS))
    np.add.at(count, where, 1)
    np.add.at(clicks, where, drawn.clicked)
    stated[where] = drawn.propensity
    chance[where] = again.click_probability(drawn.candidates)
    assert stated.sum(axis=0) == pytest.approx(1, abs=0.02)
    seen = stated > 0
    surprise = (count[seen] - times * stated[seen]) / np.sqrt(times * stated[seen] * (1 - stated[seen]))
    assert stats.chi2.sf((surprise**2).sum(), seen.sum() - POSITIONS) > UNLIKELY
    for position in range(POSITIONS):
        expected = (count * chance)[:, position].sum()
        spread = np.sqrt((count * chance * (1 - chance))[:, position].sum())
        assert abs(clicks[:, position].sum() - expected) < 4 * spread


def test_ctr_is_the_share_of_clicks_over_many_logs(traffic):
    rng = np.random.default_rng(3)
    logs = [traffic.relog(rng) for _ in range(20)]
    clicks = sum(int(log.clicked[:, :3].sum()) for log in logs)
    expected = np.mean([traffic.ctr(log.candidates[:, :3]) for log in logs])
    impressions = 20 * 3 * len(traffic)
    assert abs(clicks / impressions - expected) < 4 * np.sqrt(expected * (1 - expected) / impressions)


def test_the_same_generator_gives_the_same_log_and_another_one_another(traffic):
    first, again, other = (traffic.relog(np.random.default_rng(seed)) for seed in (1, 1, 2))
    for field in dataclasses.fields(first):
        np.testing.assert_array_equal(getattr(first, field.name), getattr(again, field.name))
    assert (first.candidates != other.candidates).mean() > 0.1


def test_one_split_read_from_files_is_those_sessions_of_the_whole(shop, traffic, tmp_path):
    tables.write(shop, tmp_path / "shop")
    part = tables.read(tmp_path / "shop", splits=("test",), truth=True)
    own = Traffic.of(part.meta, part.sessions, part.truth.sample(frac=1, random_state=0))  # its order does not matter
    rows = shop.sessions["split"].to_numpy(dtype=object) == "test"
    assert len(own) == rows.sum() > 0
    for name in ("intents", "available", "scores"):
        np.testing.assert_array_equal(getattr(own, name), getattr(traffic, name)[rows])
    users = part.sessions["user_id"]
    assert (own.users[:, None] == own.users).sum() == (users.value_counts() ** 2).sum()


def test_the_best_are_taken_from_what_exists_and_ties_go_by_the_kbs_order(traffic):
    early = np.flatnonzero(~traffic.available.all(axis=1))[0]
    scores = np.zeros(traffic.available.shape)
    scores[:, 5] = -np.inf
    scores[early] = np.where(traffic.available[early], -np.inf, 9)
    top = traffic.top(scores, 6)
    assert np.take_along_axis(traffic.available, top, axis=1).all()
    assert (top[early] == np.flatnonzero(traffic.available[early])[:6]).all()
    everything = np.flatnonzero(traffic.available.all(axis=1))[0]
    assert top[everything].tolist() == [0, 1, 2, 3, 4, 6]
    scores[everything, [40, 30]] = 2, 1
    assert traffic.top(scores)[everything].tolist() == [40, 30, 0]


def test_lists_that_the_shop_can_not_show_are_refused(traffic):
    lists = traffic.top(traffic.scores)
    row, intent = np.argwhere(~traffic.available)[0]
    lists[row, 2] = intent
    with pytest.raises(ValueError, match=rf"1 slots .* \(first: intent {intent} in session {row}\)"):
        traffic.ctr(lists)
    with pytest.raises(ValueError, match="1 slots"):
        traffic.click_probability(np.where(lists == intent, 96, traffic.top(traffic.scores)))
    with pytest.raises(ValueError, match=r"shape \(2999, 3\); expected \(3000, k\), k from 1 to 12"):
        traffic.ctr(lists[1:])
    with pytest.raises(ValueError, match="1 NaN"):
        traffic.top(np.where(np.arange(traffic.scores.size).reshape(traffic.scores.shape) == 7, np.nan, 0))


def test_what_is_not_from_a_world_is_refused(shop):
    with pytest.raises(ValueError, match=r"dataset.yaml of 'mine' names no world.*rgalign world"):
        Traffic.of({"name": "mine"}, shop.sessions, shop.truth)
    with pytest.raises(ValueError, match=r"'shopworld' was read without its truth.*truth=True"):
        Traffic.of(shop.meta, shop.sessions, None)
    with pytest.raises(ValueError, match="truth has no row for 10 of 3000 sessions"):
        Traffic.of(shop.meta, shop.sessions, shop.truth[10:])
    with pytest.raises(ValueError, match="no column search_verb, which the legacy policy"):
        Traffic.of(shop.meta, shop.sessions.drop(columns="search_verb"), shop.truth)
    foreign = shop.sessions.assign(order_status=shop.sessions["order_status"].replace("paid", "bezahlt"))
    with pytest.raises(ValueError, match=r"sessions.order_status has \d+ entries .*first: 'bezahlt'"):
        Traffic.of(shop.meta, foreign, shop.truth)
    with pytest.raises(ValueError, match=r"truth.intent_id has 3000 entries .*first: 'else'"):
        Traffic.of(shop.meta, shop.sessions, shop.truth.assign(intent_id="else"))
    early = shop.sessions.assign(timestamp=shop.sessions["timestamp"].iloc[0])
    with pytest.raises(ValueError, match=r"\d+ sessions want an intent that is not in the KB"):
        Traffic.of(shop.meta, early, shop.truth)


def test_the_best_three_are_those_of_every_order_of_every_three(traffic, logged):
    """By brute force over a few sessions; no list of the pool brings more, and no pool more than the knowledge base."""
    few = dataclasses.replace(
        traffic, users=traffic.users[:8], intents=traffic.intents[:8], available=traffic.available[:8],
        scores=traffic.scores[:8],
    )  # fmt: skip
    pool = logged["shown"][:8, :6]
    lists = [pool[:, list(order)] for order in itertools.permutations(range(6), 3)]
    brought = np.max([few.click_probability(shown).sum(axis=1) for shown in lists], axis=0)
    np.testing.assert_allclose(few.click_probability(few.best(pool)).sum(axis=1), brought)
    padded = np.hstack([pool, np.full((8, 2), -1)])
    np.testing.assert_array_equal(few.best(padded), few.best(pool))
    with pytest.raises(ValueError, match="the pools of 8 sessions have fewer than 3 intents that exist"):
        few.best(padded[:, [0, 1, -1]])


def test_a_larger_pool_has_the_higher_ceiling(traffic, logged):
    ceilings = [traffic.ctr(traffic.best(logged["shown"][:, :size])) for size in (3, 6, POSITIONS)]
    ceilings.append(traffic.ctr(traffic.best()))
    assert ceilings == sorted(ceilings)
    assert ceilings[0] >= traffic.ctr(logged["shown"][:, :3])
    assert ceilings[-1] >= traffic.ctr(traffic.top(traffic.scores))
    assert (traffic.best()[:, 0] == traffic.intents).all(), "what the customer wants comes first"
