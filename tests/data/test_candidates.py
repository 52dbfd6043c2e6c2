"""Sampled candidate lists: who is in them, how often, and the log q(i) that undoes it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rgalign.data.candidates import (
    SAMPLED_NEGATIVES,
    correction_of,
    draw_lists,
    impressions,
    kb_correction,
    log_inclusion,
)
from rgalign.data.lists import Bag, Lists

CLICKS = np.round(2000 / np.arange(1, 101) ** 1.2)


def lists_of(sessions: int, clicks=CLICKS, seed=0, **keywords):
    generator = np.random.default_rng(seed)
    true = generator.choice(len(clicks), sessions, p=clicks / clicks.sum())
    return true, draw_lists(true, clicks, generator=generator, **keywords)


def test_lists_hold_the_answer_once_and_nobody_twice():
    true, lists = lists_of(3000)
    assert lists.shape == (3000, 20)
    assert (np.diff(np.sort(lists, axis=1)) > 0).all()
    assert ((lists == true[:, None]).sum(axis=1) == 1).all()
    place = (lists == true[:, None]).argmax(axis=1)
    assert np.abs(np.bincount(place, minlength=20) / 3000 - 1 / 20).max() < 0.02  # position says nothing


def test_a_first_negative_follows_smoothed_popularity():
    one = {"popularity": 1, "uniform": 0, "smoothing": 0.5}
    clicks = np.array([10.0, 5, 2, 0, 0])
    lists = draw_lists(np.zeros(40_000, int), clicks, sampled_negatives=one, generator=np.random.default_rng(1))
    found = np.bincount(lists.max(axis=1), minlength=5)[1:] / 40_000
    weight = clicks[1:] + 0.5
    assert np.abs(found - weight / weight.sum()).max() < 0.01


def test_log_inclusion_agrees_with_simulation():
    true, lists = lists_of(60_000)
    answers = np.bincount(true, minlength=100)
    found = (np.bincount(lists.ravel(), minlength=100) - answers) / (len(true) - answers)
    ratio = np.exp(log_inclusion(CLICKS)) / found
    noise = 4 / np.sqrt(found * len(true))
    assert (np.abs(ratio - 1) < 0.02 + noise).all()
    assert np.abs(ratio - 1).mean() < 0.02


def test_log_inclusion_recovers_the_intents_shares():
    """The click rate inside the lists, put right by q, is the share of clicks among all intents."""
    true, lists = lists_of(200_000, clicks=CLICKS[:30])
    q = np.exp(log_inclusion(CLICKS[:30]))
    shown = np.bincount(lists.ravel(), minlength=30)
    clicked = np.bincount(true, minlength=30)
    # P(clicked | shown) = p / (p + (1 - p) q) by Bayes, for the chance q of being drawn where not the answer
    share = CLICKS[:30] / CLICKS[:30].sum()
    ratio = clicked / shown * (share + (1 - share) * q) / share
    assert (np.abs(ratio - 1) < 0.02 + 4 / np.sqrt(clicked)).all()


def test_a_correction_worked_by_hand():
    """One negative, drawn evenly from the two other intents with equal clicks, or from all others: q by counting."""
    even = {"popularity": 0, "uniform": 1, "smoothing": 0.5}
    listed = np.array([True, True, True, False])
    assert kb_correction(np.array([5, 5, 5, 0]), listed, even).tolist() == [0, 0, 0, 0], "uniform: q = 1/3 for all"
    # One negative by popularity, weights 3, 1, 1, 0.5; the answer is drawn by the same weights, and is no negative.
    weight = np.array([3, 1, 1, 0.5])
    one = {"popularity": 1, "uniform": 0, "smoothing": 0.5}
    q = [
        sum(weight[a] * weight[i] / (weight.sum() - weight[a]) for a in range(4) if a != i) / (weight.sum() - weight[i])
        for i in range(4)
    ]
    found = kb_correction(weight - 0.5, listed, one)
    np.testing.assert_allclose(found[:3], np.log(q[:3]) - np.mean(np.log(q[:3])), atol=0.12)  # clocks approximate
    assert found[3] == 0, "no training list had it: what is typical of the others stands for it"
    assert found[:3].mean() == pytest.approx(0)
    assert kb_correction(np.zeros(4), np.zeros(4, bool), one).tolist() == [0] * 4


@given(
    clicks=hnp.arrays(int, st.integers(30, 60), elements=st.integers(0, 50)), hidden=st.integers(1, 9), data=st.data()
)
def test_a_correction_orders_the_listed_by_log_q_and_never_puts_the_others_last(clicks, hidden, data):
    listed = np.ones(len(clicks), bool)
    listed[data.draw(st.permutations(range(len(clicks))))[:hidden]] = False
    found, log_q = kb_correction(clicks, listed, SAMPLED_NEGATIVES), log_inclusion(clicks)
    gap = found[listed] - log_q[listed]
    np.testing.assert_allclose(gap, gap[0], atol=1e-9)
    assert (found[~listed] == 0).all()
    assert found[listed].min() <= 1e-9


def test_a_runs_correction_is_by_the_clicks_of_train_and_dev_and_the_lists_of_train():
    def lists_of_part(part, candidates):
        shown = torch.tensor(candidates, dtype=torch.int16)
        ids = np.arange(len(shown)).astype(str)
        bag, fields = Bag(torch.zeros(0), torch.zeros(len(shown) + 1, dtype=torch.int64)), torch.zeros(len(shown), 0)
        return Lists(part, ids, ids, fields, (), bag, shown, torch.arange(shown.shape[1]).expand(shown.shape) == 0)

    train, dev = lists_of_part("train", [[0, 1, 2], [0, 2, -1]]), lists_of_part("dev", [[3, 0, 1]])
    how = {"popularity": 1, "uniform": 1, "smoothing": 0.5}
    expected = kb_correction(np.array([2, 0, 0, 1, 0]), np.array([True, True, True, False, False]), how)
    np.testing.assert_array_equal(correction_of((train, dev), 5, how), expected)
    assert expected[0] > expected[1]
    assert correction_of((train, dev), 5, None) is None


@pytest.mark.parametrize("intents", [2, 5, 20])
def test_a_small_kb_is_shown_whole(intents):
    true, lists = lists_of(50, clicks=np.ones(intents))
    assert ((lists >= 0).sum(axis=1) == intents).all()
    assert (log_inclusion(np.ones(intents)) == 0).all()
    frame = impressions(lists, true, np.arange(50).astype(str), np.arange(intents).astype(str))
    assert frame.groupby("session_id")["position"].apply(lambda p: p.tolist() == list(range(intents))).all()
    assert (frame.groupby("session_id")["clicked"].sum() == 1).all()


def test_a_late_intent_and_a_barred_one_are_no_negatives():
    available = np.full(100, "NaT", "datetime64[us]")
    available[7] = np.datetime64("2024-01-02")
    times = np.repeat(np.array(["2024-01-01", "2024-01-02"], "datetime64[us]"), 10_000)
    barred = (np.arange(0, 20_000, 2), np.full(10_000, 3))
    true, lists = lists_of(20_000, available=available, times=times, barred=barred)
    early = (lists[:10_000] == 7).any(axis=1) & (true[:10_000] != 7)
    assert not early.any()
    assert (lists[10_000:] == 7).any()
    assert ((lists[::2] == 3).any(axis=1) == (true[::2] == 3)).all()
    assert (lists[1::2] == 3).any(axis=1).mean() > 0.5


def test_the_same_seed_gives_the_same_lists():
    assert np.array_equal(lists_of(100, seed=4)[1], lists_of(100, seed=4)[1])
    assert not np.array_equal(lists_of(100, seed=4)[1], lists_of(100, seed=5)[1])


def test_the_defaults_are_those_of_the_public_data():
    assert SAMPLED_NEGATIVES == {"popularity": 15, "uniform": 4, "smoothing": 0.5}
