"""Intervals against scipy, and against the coverage they promise where the truth is known."""

import numpy as np
import pytest
from scipy import stats

from rgalign.evaluation import bootstrap


def clustered(rng, *, users=120, per_user=6, effect=0.1, between=1.0, within=1.0, statistics=()):
    """Paired differences (*statistics, sessions) with a spread between users, and the users."""
    user = np.repeat(np.arange(users), per_user)
    shared = rng.normal(scale=between, size=(*statistics, users))[..., user]
    return effect + shared + rng.normal(scale=within, size=(*statistics, len(user))), user


def test_draws_and_percentiles_equal_scipys():
    rng = np.random.default_rng(1)
    differences, user = clustered(rng, users=40)
    weights = rng.integers(2, 15, size=len(user))
    top = np.bincount(user, differences * weights)
    bottom = np.bincount(user, weights)
    theirs = stats.bootstrap(
        (top, bottom),
        lambda x, y, axis: x.sum(axis=axis) / y.sum(axis=axis),
        paired=True,
        method="percentile",
        n_resamples=500,
        rng=np.random.default_rng(7),
    ).confidence_interval
    ours = bootstrap.over_users(differences, weights, user, seed=7, replicates=500)
    np.testing.assert_allclose([ours.low, ours.high], [theirs.low, theirs.high], rtol=0, atol=1e-12)
    assert ours.estimate == pytest.approx(np.average(differences, weights=weights), abs=1e-12)


def test_coverage_is_as_promised():
    """Weighted means of 600 simulated runs, sessions of a user alike: three sigma around 95 %."""
    rng, runs, hits = np.random.default_rng(2), 600, 0
    for run in range(runs):
        differences, user = clustered(rng, effect=0.1)
        weights = rng.integers(5, 16, size=len(user))
        interval = bootstrap.over_users(differences, weights, user, seed=run, replicates=400)
        hits += interval.low <= 0.1 <= interval.high
    assert abs(hits / runs - 0.95) < 3 * np.sqrt(0.95 * 0.05 / runs)


def test_clustering_widens_the_interval_when_users_are_alike():
    differences, user = clustered(np.random.default_rng(3), between=1.0)
    ignoring = bootstrap.over_users(differences, 1, np.arange(len(user)), seed=0)
    clustering = bootstrap.over_users(differences, 1, user, seed=0)
    design_effect = np.sqrt((1.0 * 6 + 1.0) / 2)  # sd of a user's mean of 6 sessions, against 6 independent ones
    assert (clustering.high - clustering.low) / (ignoring.high - ignoring.low) == pytest.approx(design_effect, rel=0.15)


def test_many_means_at_once_equal_one_at_a_time():
    rng = np.random.default_rng(4)
    differences, user = clustered(rng, users=30, statistics=(2, 3))
    differences[rng.random(differences.shape) < 0.2] = np.nan
    weights = rng.integers(0, 5, size=differences.shape)
    weights[1, 2] = 0
    together = bootstrap.over_users(differences, weights, user, seed=5, replicates=100)
    for cell in np.ndindex(2, 3):
        alone = bootstrap.over_users(differences[cell], weights[cell], user, seed=5, replicates=100)
        np.testing.assert_allclose([part[cell] for part in together], alone, rtol=0, atol=1e-12)
    assert np.isnan([part[1, 2] for part in together]).all()
    defined = ~np.isnan(differences[0, 0])
    expected = np.average(differences[0, 0][defined], weights=weights[0, 0][defined])
    assert together.estimate[0, 0] == pytest.approx(expected)


def test_same_seed_same_interval_and_any_type_of_user():
    differences, user = clustered(np.random.default_rng(5))
    first = bootstrap.over_users(differences, 1, user, seed=0)
    assert first == bootstrap.over_users(differences, 1, np.array([f"u{u:03}" for u in user]), seed=0)
    assert first != bootstrap.over_users(differences, 1, user, seed=1)


def test_a_model_against_itself_has_no_interval_and_no_sessions_none_at_all():
    assert bootstrap.over_users(np.zeros(10), 1, np.arange(10), seed=0) == (0, 0, 0)
    assert np.isnan(bootstrap.over_users(np.empty((3, 0)), 1, [], seed=0).low).all()
    with pytest.raises(ValueError, match=r"users has the shape \(2,\); expected \(3,\)"):
        bootstrap.over_users(np.zeros(3), 1, [1, 2], seed=0)


def test_drawing_seeds_adds_their_variance():
    rng = np.random.default_rng(6)
    differences, user = clustered(rng, users=200)
    runs = differences + rng.normal(scale=0.2, size=(5, 1))
    sigma = [
        (interval.high - interval.low) / (2 * 1.96)
        for interval in (
            bootstrap.over_users(runs.mean(axis=0), 1, user, seed=0, replicates=4000),
            bootstrap.over_seeds_and_users(runs, np.ones(len(user)), user, seed=0, replicates=4000),
        )
    ]
    of_seeds = runs.mean(axis=1).std() / np.sqrt(5)
    assert sigma[1] == pytest.approx(np.hypot(sigma[0], of_seeds), rel=0.05)
    same = bootstrap.over_seeds_and_users(np.stack([differences] * 3), 1, user, seed=0)
    assert tuple(same) == pytest.approx(tuple(bootstrap.over_users(differences, 1, user, seed=0)), abs=1e-12)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
def test_the_interval_over_worlds_is_scipys_t(level):
    rng = np.random.default_rng(8)
    for worlds in range(2, 40):
        means = rng.normal(size=worlds)
        ours = bootstrap.over_worlds(means, level=level)
        theirs = stats.t.interval(level, worlds - 1, loc=means.mean(), scale=stats.sem(means))
        np.testing.assert_allclose([ours.low, ours.high], theirs, rtol=1e-9)
        assert ours.estimate == pytest.approx(means.mean())


def test_one_world_has_no_interval():
    for means in ([0.1], [0.1, np.nan], [[0.1, 0.2]]):
        with pytest.raises(ValueError, match="two worlds or more"):
            bootstrap.over_worlds(means)
