"""Confidence of a session by hand, and the curve and calibration that are read from it, against plain arithmetic."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rgalign.evaluation.confidence import confidence, reliability, served_first

SCORES = arrays(float, st.tuples(st.integers(1, 4), st.integers(1, 8)), elements=st.floats(-30, 30))


def test_a_case_by_hand():
    """Weights 4, 2, 1, 1, 0 of 8 in all; all alike: three of four; two that exist: certain; none: nothing to say."""
    nothing = -np.inf
    scores = np.log([[4, 2, 1, 1], [5, 5, 5, 5]])
    np.testing.assert_allclose(confidence(scores), [7 / 8, 3 / 4])
    scores = [[0.0, 1.0, nothing, nothing], [nothing] * 4]
    np.testing.assert_array_equal(confidence(scores), [1, np.nan])


@given(SCORES, st.floats(-50, 50), st.randoms(use_true_random=False))
def test_a_constant_and_the_order_of_intents_say_nothing(scores, more, random):
    found = confidence(scores)
    assert ((found >= 0) & (found <= 1)).all()
    np.testing.assert_allclose(confidence(scores + more), found, atol=1e-9)
    order = random.sample(range(scores.shape[1]), scores.shape[1])
    np.testing.assert_allclose(confidence(scores[:, order]), found, atol=1e-12)


@given(SCORES, st.floats(0, 20), st.floats(1, 3))
def test_it_grows_with_the_score_of_the_best_and_with_the_distances(scores, more, times):
    raised = scores.copy()
    raised[np.arange(len(scores)), scores.argmax(axis=1)] += more
    assert (confidence(raised) >= confidence(scores) - 1e-12).all()
    assert (confidence(scores * times) >= confidence(scores) - 1e-12).all()


@pytest.mark.parametrize("scores", [[[np.nan, 1.0]], [[np.inf, 1.0]], [1.0, 2.0]])
def test_what_is_no_score_is_refused(scores):
    with pytest.raises(ValueError, match=r"expected \(sessions, intents\)"):
        confidence(scores)


def test_the_curve_is_the_mean_over_the_most_confident():
    sure, ctr = np.array([0.2, 0.9, 0.5, 0.9]), np.array([0.0, 0.4, 0.2, 0.6])
    found = served_first(sure, ctr, np.arange(4), seed=0, shares=(0.25, 0.5, 0.75, 1.0))
    assert found["sessions"].tolist() == [1, 2, 3, 4]
    assert found["least"].tolist() == [0.9, 0.9, 0.5, 0.2]
    np.testing.assert_allclose(found["ctr"], [0.4, 0.5, 0.4, 0.3])
    assert (found["low"] <= found["ctr"] + 1e-12).all()
    assert (found["ctr"] <= found["high"] + 1e-12).all()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.integers(0, 3))
def test_served_by_what_they_bring_the_curve_falls_to_the_mean_of_all(ctr, seed):
    found = served_first(np.array(ctr), np.array(ctr), np.arange(len(ctr)), seed=seed, replicates=5)
    assert (np.diff(found["ctr"]) <= 1e-9).all()
    assert found["ctr"].iloc[-1] == pytest.approx(np.mean(ctr))


def test_the_interval_holds_the_truth_of_who_is_served_about_as_often_as_it_says():
    rng, inside = np.random.default_rng(0), []
    for seed in range(200):
        sure = rng.random(400)
        clicked = (rng.random(400) < sure).astype(float)
        found = served_first(sure, clicked, np.arange(400), seed=seed, shares=(0.5,), replicates=300).iloc[0]
        inside.append(found["low"] <= sure[sure >= found["least"]].mean() <= found["high"])
    assert 0.89 <= np.mean(inside) <= 1  # 0.95 to within four standard errors


def test_bad_shares_and_lengths_are_told():
    one = np.ones(2)
    with pytest.raises(ValueError, match=r"shares holds \[0, 1.5\]; expected shares"):
        served_first(one, one, one, seed=0, shares=(0, 0.5, 1.5))
    with pytest.raises(ValueError, match="2 confidences, 1 values, 2 users"):
        served_first(one, one[:1], one, seed=0)


def test_reliability_by_hand_takes_true_probabilities_too():
    table = reliability(np.array([0.1, 0.3, 0.9, 1.0]), np.array([0.0, 0.5, 1.0, 0.8]), bins=2)
    assert table["lists"].tolist() == [2, 2]
    np.testing.assert_allclose(table[["confidence", "hit"]], [[0.2, 0.25], [0.95, 0.9]])
    assert np.isnan(reliability(np.zeros(0), np.zeros(0), bins=2)["hit"]).all()
