"""Off-policy estimates by hand, by every list a small policy can show, and against the bootstrap."""

import dataclasses
from itertools import permutations, product

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgalign.data.tables import Dataset
from rgalign.evaluation import bootstrap, off_policy
from rgalign.evaluation.off_policy import Log, differences, estimates, session_values, shrunken, slot_weights
from rgalign.params_schema import Experiment
from rgalign.shopworld.world import generate

K, KB = 2, 4
WITH_MODEL = ["ips", "snips", "dr", "sndr", "switch", "dros"]


def values(log, target, predicted=None, **how):
    """Estimator -> value."""
    return estimates(log, target, predicted, **how).set_index("estimator")["value"]


def test_a_case_worked_by_hand():
    log = Log(
        shown=np.array([[0, 1, 2], [0, 2, 1], [3, 1, -1]]),
        clicked=np.array([[True, False, False], [False, True, True], [True, True, False]]),
        propensity=np.array([[0.5, 0.25, 1], [0.5, 0.2, 1], [0.1, 0.8, np.nan]]),
        users=np.array(["a", "b", "a"]),
    )
    target = np.array([[0, 2], [1, 2], [3, 1]])  # the log shows: first; second; both
    predicted = np.array([[0.5, 0.1], [0.2, 0.4], [0.9, 0.8]])
    found = estimates(log, target, predicted).set_index("estimator")
    # w * clicked: (2, 0), (0, 5), (10, 1.25); w the same, since all that matched was clicked.
    assert found.loc["ips", "value"] == pytest.approx(18.25 / 6)
    assert found.loc["snips", "value"] == pytest.approx(1)
    # q + w (clicked - q): .5 + 2 * .5, .1; .2, .4 + 5 * .6; .9 + 10 * .1, .8 + 1.25 * .2
    assert found.loc["dr", "value"] == pytest.approx((1.5 + 0.1 + 0.2 + 3.4 + 1.9 + 1.05) / 6)
    assert found.loc["sndr", "value"] == pytest.approx(2.9 / 6 + (2 * 0.5 + 5 * 0.6 + 10 * 0.1 + 1.25 * 0.2) / 18.25)
    assert found.index.to_list() == WITH_MODEL
    assert found["matched"].to_list() == [4 / 6] * 6
    assert found["mean_weight"].to_list() == pytest.approx([18.25 / 6] * 6)
    squares = 4 + 25 + 100 + 1.25**2
    assert found["effective_sample_size"].to_list() == pytest.approx([18.25**2 / squares] * 6)
    # Two users: a has (2 + 11.25) / 2 over two sessions, b 5 / 2 over one; of both, variance = U / (U - 1) * sum.
    mean = 18.25 / 6
    by_user = np.array([13.25 / 2 - 2 * mean, 2.5 - mean]) / 3
    assert found.loc["ips", "standard_error"] == pytest.approx(np.sqrt(2 * (by_user**2).sum()))
    assert found.loc["ips", "high"] - mean == pytest.approx(12.7062 * found.loc["ips", "standard_error"], rel=1e-4)
    assert slot_weights(log, target, clip=4).tolist() == [[2, 0], [0, 4], [4, 1.25]]
    assert values(log, target, clip=4)["ips"] == pytest.approx(11.25 / 6)


def test_shrunken_weights_by_hand_and_at_their_limits():
    weight = np.array([[0, 1.0], [4, 1e12]])
    assert shrunken(weight, 2)[1, 0] == pytest.approx(8 / 18)
    assert shrunken(weight, 2).max() <= np.sqrt(2) / 2  # at w = sqrt(lambda)
    np.testing.assert_array_equal(shrunken(weight, 0), 0)
    np.testing.assert_array_equal(shrunken(weight, np.inf), weight)
    np.testing.assert_allclose(shrunken(weight, 1e30), weight, rtol=1e-5)


@dataclasses.dataclass
class TinyPolicy:
    """A policy over all ordered pairs of four intents, and a user who clicks each slot on its own."""

    lists: np.ndarray  # (pairs, K)
    chance: np.ndarray  # (pairs,)
    clicks: np.ndarray  # P(click) (KB, K)

    @classmethod
    def drawn(cls, seed, never=()):
        rng = np.random.default_rng(seed)
        lists = np.array(list(permutations(range(KB), K)))
        chance = rng.dirichlet(np.ones(len(lists)))
        chance[[tuple(pair) in never for pair in lists.tolist()]] = 0
        return cls(lists, chance / chance.sum(), rng.random((KB, K)))

    def propensity(self, shown):
        return np.array([self.chance[self.lists[:, p] == shown[p]].sum() for p in range(K)])

    def expected(self, target):
        return self.clicks[target, np.arange(K)]

    def moments(self, estimate):
        """Mean and variance of estimate(log) of one session over every list and every pattern of clicks."""
        found = []
        for shown, chance in zip(self.lists, self.chance, strict=True):
            for pattern in product([False, True], repeat=K) if chance else ():
                log = Log(shown[None], np.array([pattern]), self.propensity(shown)[None], np.array([0]))
                of_clicks = np.where(pattern, self.expected(shown), 1 - self.expected(shown)).prod()
                found.append((chance * of_clicks, estimate(log)))
        weight, value = np.array(found).T
        assert weight.sum() == pytest.approx(1)
        return weight @ value, weight @ value**2 - (weight @ value) ** 2


@pytest.mark.parametrize("seed", range(3))
def test_ips_and_dr_are_unbiased_whatever_the_direct_model(seed):
    policy, target = TinyPolicy.drawn(seed), np.array([[2, 1]])
    truth = policy.expected(target[0]).mean()
    wrong = np.random.default_rng(seed).random((1, K))
    for name in ("ips", "dr"):
        mean, _ = policy.moments(lambda log, name=name: values(log, target, wrong)[name])
        assert mean == pytest.approx(truth, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_with_a_perfect_direct_model_only_the_clicks_own_noise_is_left(seed):
    policy, target = TinyPolicy.drawn(seed), np.array([[0, 3]])
    q, propensity = policy.expected(target[0]), policy.propensity(target[0])
    mean, variance = policy.moments(lambda log: values(log, target, q[None])["dr"])
    assert mean == pytest.approx(q.mean(), abs=1e-12)
    assert variance == pytest.approx((q * (1 - q) / propensity).sum() / K**2, rel=1e-9)
    assert variance < policy.moments(lambda log: values(log, target)["ips"])[1]


@pytest.mark.parametrize("clip", [1.0, 3.0, 10.0, 1e6])
def test_clipping_takes_from_ips_what_the_formula_says(clip):
    policy, target = TinyPolicy.drawn(4), np.array([[1, 2]])
    kept = np.minimum(1, clip * policy.propensity(target[0]))
    mean, _ = policy.moments(lambda log: values(log, target, clip=clip)["ips"])
    assert mean == pytest.approx((policy.expected(target[0]) * kept).mean(), abs=1e-12)
    assert mean <= policy.expected(target[0]).mean() + 1e-12


def test_a_slot_that_is_never_logged_is_missing_from_ips_and_seen_in_the_mean_weight():
    never = [(2, other) for other in range(KB)]  # intent 2 never comes first
    policy, target = TinyPolicy.drawn(5, never), np.array([[2, 1]])
    mean, _ = policy.moments(lambda log: values(log, target)["ips"])
    assert mean == pytest.approx(policy.expected(target[0])[1] / K, abs=1e-12)
    support, _ = policy.moments(lambda log: estimates(log, target)["mean_weight"][0])
    assert support == pytest.approx(0.5, abs=1e-12)


def test_a_paired_difference_is_unbiased_and_has_the_variance_of_the_pair():
    policy, one, other = TinyPolicy.drawn(6), np.array([[2, 1]]), np.array([[2, 3]])
    both = (policy.expected(one[0])[None], policy.expected(other[0])[None])
    for estimator in ("ips", "dr"):
        mean, _ = policy.moments(
            lambda log, row=estimator: differences(log, (one, other), both).set_index("estimator")["value"][row]
        )
        assert mean == pytest.approx((policy.expected(one[0]) - policy.expected(other[0])).mean(), abs=1e-12)
    q, propensity = policy.clicks[[1, 3], 1], np.array([policy.propensity([0, i])[1] for i in (1, 3)])
    _, variance = policy.moments(lambda log: differences(log, (one, other), both)["value"][2])
    assert variance == pytest.approx((q * (1 - q) / propensity).sum() / K**2, rel=1e-9)  # the shared slot cancels


def simulated(rng, *, users=150, per_user=4):
    """A log of three positions by a policy of two lists a session, a target, a rough direct model; users differ."""
    sessions, user = users * per_user, np.repeat(np.arange(users), per_user)
    favoured = rng.random((sessions, 1)) < 0.6
    shown = np.where(favoured, [0, 1, 2], [1, 0, 3])
    propensity = np.broadcast_to(np.where(favoured, 0.6, 0.4), shown.shape)
    taste = rng.uniform(0, 0.25, size=users)[user]
    clicked = rng.random(shown.shape) < taste[:, None] * (1 + shown)
    target = np.where(rng.random((sessions, 1)) < 0.5, [0, 1], [1, 0])
    return Log(shown, clicked, propensity, user), target, np.full(target.shape, 0.3)


def test_coverage_is_as_promised_where_weights_are_mild():
    rng, runs, truth = np.random.default_rng(1), 500, 0.125 * 1.5  # mean taste, times that of 1 + intent
    found = pd.concat([estimates(*simulated(rng)) for _ in range(runs)])
    hit = (found["low"] <= truth) & (truth <= found["high"])
    coverage = hit.groupby(found["estimator"]).mean()
    assert (abs(coverage - 0.95) < 3 * np.sqrt(0.95 * 0.05 / runs)).all(), coverage


def test_intervals_are_those_of_the_bootstrap_over_users():
    log, target, q = simulated(np.random.default_rng(2))
    found = estimates(log, target, q).set_index("estimator")
    weight, values_of = slot_weights(log, target), session_values(log, target, q)
    resampled = bootstrap.over_users(values_of, 1, log.users, seed=0, replicates=4000)
    assert found.loc["sndr", "value"] == pytest.approx(resampled.estimate)
    assert found.loc["sndr", "high"] - found.loc["sndr", "low"] == pytest.approx(
        resampled.high - resampled.low, rel=0.06
    )
    earned, w = (weight * log.clicked[:, :2]).mean(axis=1), weight.mean(axis=1)
    corrected = (q + weight * (log.clicked[:, :2] - q)).mean(axis=1)
    ratio = np.divide(earned, w, out=np.zeros_like(w), where=w > 0)
    for name, metric, weights in (("ips", earned, 1), ("snips", ratio, w), ("dr", corrected, 1)):
        resampled = bootstrap.over_users(metric, weights, log.users, seed=0, replicates=4000)
        assert found.loc[name, "value"] == pytest.approx(resampled.estimate)
        width = found.loc[name, "high"] - found.loc[name, "low"]
        assert width == pytest.approx(resampled.high - resampled.low, rel=0.06)


@st.composite
def logs(draw):
    """A log of random lists with a target that often matches, both as arrays; propensities down to 1 %."""
    sessions, positions, k = draw(st.integers(1, 8)), draw(st.integers(2, 5)), draw(st.integers(1, 2))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shown = rng.permuted(np.tile(np.arange(6), (sessions, 1)), axis=1)[:, :positions]
    clicked = rng.random(shown.shape) < rng.choice([0.1, 0.5])
    log = Log(shown, clicked, rng.uniform(0.01, 1, shown.shape), rng.integers(3, size=sessions))
    return log, np.where(rng.random((sessions, k)) < 0.6, shown[:, :k], 6), rng.random((sessions, k))


@settings(max_examples=60)
@given(drawn=logs(), seed=st.integers(0, 9))
def test_the_order_of_sessions_does_not_matter(drawn, seed):
    log, target, q = drawn
    order = np.random.default_rng(seed).permutation(len(target))
    moved = Log(*(getattr(log, field.name)[order] for field in dataclasses.fields(log)))
    first, second = estimates(log, target, q), estimates(moved, target[order], q[order])
    pd.testing.assert_frame_equal(first, second, rtol=1e-9, atol=1e-12)


@settings(max_examples=60)
@given(drawn=logs())
def test_sndr_without_a_model_is_snips_and_where_the_weights_are_alike_dr(drawn):
    log, target, q = drawn
    found = values(log, target, np.zeros_like(q))
    np.testing.assert_allclose(found["sndr"], found["snips"])
    everywhere = dataclasses.replace(log, propensity=np.ones(log.shown.shape))
    found = values(everywhere, log.shown[:, : target.shape[1]], q)
    np.testing.assert_allclose(found["sndr"], found["dr"])


@settings(max_examples=60)
@given(drawn=logs())
def test_switch_and_dros_have_the_least_estimated_error_of_their_grids(drawn):
    """By a grid search of its own; of one user no variance is known, and nothing is given up: dr."""
    log, target, q = drawn
    clicked, w, found = log.clicked[:, : target.shape[1]], slot_weights(log, target), values(log, target, q)
    cut = [w * (w <= tau) for tau in (np.inf, 100, 20, 5)]
    shrunk = [w, *(lam * w / (w**2 + lam) for lam in (1000, 100, 10, 1))]
    for name, grid in (("switch", cut), ("dros", shrunk)):
        options = []
        for own in grid:
            by_session = pd.Series((q + own * (clicked - q)).mean(axis=1))
            by_user = (by_session - by_session.mean()).groupby(log.users).sum() / len(q)
            bias, users = ((own - w) * (clicked - q)).mean(), len(by_user)
            spread = (by_user**2).sum() * users / (users - 1) if users > 1 else 0
            options.append((bias**2 + spread, by_session.mean()))
        least = min(error for error, _ in options)
        chosen = [value for error, value in options if error <= least + 1e-12]  # near ties: any of them
        assert np.abs(np.array(chosen) - found[name]).min() < 1e-9


@settings(max_examples=60)
@given(drawn=logs())
def test_where_all_is_clicked_snips_is_one_and_a_sure_model_too(drawn):
    log, target, _ = drawn
    log = dataclasses.replace(log, clicked=np.ones_like(log.clicked))
    found = values(log, target, np.ones(target.shape))
    assert found["dr"] == 1
    matched = (log.shown[:, : target.shape[1]] == target).any()
    assert found["snips"] == pytest.approx(1) if matched else np.isnan(found["snips"])


@settings(max_examples=60)
@given(drawn=logs())
def test_differences_are_those_of_the_values_and_none_against_itself(drawn):
    log, target, q = drawn
    other = log.shown[:, : target.shape[1]]
    found = differences(log, (target, other), (q, q)).set_index("estimator")
    apart = values(log, target, q) - values(log, other, q)
    np.testing.assert_allclose(found["value"], apart, atol=1e-9)
    turned = differences(log, (other, target), (q, q)).set_index("estimator")
    np.testing.assert_allclose(turned[["low", "high"]], -found[["high", "low"]], atol=1e-9)
    itself = differences(log, (other, other))
    assert (itself["value"] == 0).all()
    assert itself["standard_error"].isin([0]).all() or len(np.unique(log.users)) == 1


def test_a_log_of_the_target_itself_is_its_observed_ctr():
    rng = np.random.default_rng(7)
    shown, clicked = np.tile(np.arange(3), (20, 1)), rng.random((20, 3)) < 0.3
    log = Log(shown, clicked, np.ones((20, 3)), np.arange(20))
    found = estimates(log, shown, rng.random((20, 3)))
    np.testing.assert_allclose(found["value"][:4], clicked.mean())  # switch and dros may trade variance for bias
    assert (found["effective_sample_size"] == 60).all()


def shop(**columns):
    """A data set of two sessions; `columns` replace those of impressions."""
    impressions = {
        "session_id": ["s1", "s1", "s2"], "intent_id": ["b", "a", "c"], "position": [0, 1, 0], "clicked": [0, 1, 0],
        "propensity": [0.5, 0.25, 1.0],
    } | columns  # fmt: skip
    return Dataset(
        name="mine",
        kinds={},
        meta={},
        intents=pd.DataFrame({"intent_id": ["a", "b", "c"]}),
        sessions=pd.DataFrame({"session_id": ["s1", "s2"], "user_id": ["u2", "u1"]}),
        impressions=pd.DataFrame({name: column for name, column in impressions.items() if column is not None}),
    )


def test_a_data_set_becomes_a_log_in_the_order_of_its_sessions():
    log = Log.of(shop())
    assert log.shown.tolist() == [[1, 0], [2, -1]]
    assert log.clicked.tolist() == [[False, True], [False, False]]
    np.testing.assert_array_equal(log.propensity, [[0.5, 0.25], [1, np.nan]])
    assert log.users.tolist() == ["u2", "u1"]
    assert slot_weights(log, np.array([[1, 1], [2, 0]])).tolist() == [[2, 0], [1, 0]]


def test_what_a_data_set_lacks_is_told():
    with pytest.raises(ValueError, match=r"impressions.parquet of 'mine' has no column propensity = P\(this intent at"):
        Log.of(shop(propensity=None))
    with pytest.raises(ValueError, match=r"empty in 1 of 3 rows and outside \(0, 1\] in 1"):
        Log.of(shop(propensity=[None, 1.5, 0.2]))
    with pytest.raises(ValueError, match=r"outside \(0, 1\] in 2"):
        Log.of(shop(propensity=[0.0, -0.5, 0.2]))
    with pytest.raises(ValueError, match="1 impressions are of sessions or intents that are not"):
        Log.of(shop(session_id=["s1", "s1", "s3"]))
    with pytest.raises(ValueError, match="position_is_real: false"):
        Log.of(dataclasses.replace(shop(), meta={"position_is_real": False}))


def test_arrays_that_do_not_fit_are_refused():
    log, target = Log.of(shop()), np.array([[1, 0], [2, 1]])
    with pytest.raises(ValueError, match=r"target has the shape \(1, 2\); expected \(2, k\), k from 1 to 2"):
        estimates(log, target[:1])
    with pytest.raises(ValueError, match="1 slots without an intent"):
        estimates(log, np.array([[1, 0], [2, -1]]))
    with pytest.raises(ValueError, match="clip is 0"):
        estimates(log, target, clip=0)
    with pytest.raises(ValueError, match=r"predicted has the shape \(2, 3\); expected \(2, 2\)"):
        estimates(log, target, np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"outside \[0, 1\] or NaN in 2 of 4 slots"):
        estimates(log, target, np.array([[0, 1], [np.nan, 1.1]]))
    with pytest.raises(ValueError, match=r"'users': \(3,\)"):
        dataclasses.replace(log, users=np.arange(3))


EXTREME = [5e-324, 1e-300, 1e-12, 1e-4, 0.3, 1.0]


@settings(max_examples=60)
@given(drawn=logs(), seed=st.integers(0, 99), clip=st.sampled_from([None, 2.0, 50.0, 1000.0, 1e300]))
def test_extreme_weights_leave_bounded_numbers_that_say_what_was_clipped(drawn, seed, clip):
    """Against the same with every propensity raised by hand to what `clip` allows."""
    log, target, q = drawn
    propensity = np.random.default_rng(seed).choice(EXTREME, log.shown.shape)
    log, other = dataclasses.replace(log, propensity=propensity), log.shown[:, : target.shape[1]]
    largest = min(clip or np.inf, off_policy.LARGEST)
    raised = dataclasses.replace(log, propensity=np.maximum(propensity, 1 / largest))
    with np.errstate(all="raise"):
        found, pair = estimates(log, target, q, clip=clip), differences(log, (target, other), (q, q), clip=clip)
    by_hand = estimates(raised, target, q)
    pd.testing.assert_frame_equal(found.drop(columns="clipped"), by_hand.drop(columns="clipped"), rtol=1e-9)
    matched = log.shown[:, : target.shape[1]] == target
    one_user = len(np.unique(log.users)) == 1
    bounds = {"ips": (0, largest), "snips": (0, 1), "dr": (1 - largest, largest), "sndr": (-1, 2)}
    bounds |= dict.fromkeys(("switch", "dros"), bounds["dr"])
    for name, (low, high) in bounds.items():
        row = found.set_index("estimator").loc[name]
        if name in ("snips", "sndr") and not matched.any():
            continue  # undefined: nothing of the target was shown
        assert low <= row["value"] <= high * (1 + 1e-9)
        assert one_user or np.isfinite([row["standard_error"], row["low"], row["high"]]).all()
    assert np.isfinite(found[["effective_sample_size", "matched", "mean_weight", "clipped"]]).all(axis=None)
    assert np.isfinite(pair.set_index("estimator").loc[["ips", "dr"], "value"]).all()
    rare = propensity[:, : target.shape[1]][matched] < 1 / largest
    assert found["clipped"].tolist() == pytest.approx([rare.mean() if matched.any() else 0] * 6)
    own = propensity[:, : target.shape[1]].ravel() < 1 / largest
    both = np.concatenate([own[matched.ravel()], own])
    assert pair["clipped"].tolist() == pytest.approx([both.mean()] * 6)


def test_the_clip_of_a_run_takes_nothing_from_the_simulated_shop():
    """Its rarest slot has a weight in the hundreds: the estimates there stay unbiased."""
    propensity = generate(seed=0, sessions=500, users=100, transcripts=0).impressions["propensity"].to_numpy(float)
    assert 1 / propensity.min() < Experiment().clip
