"""Intervals against scipy, and against the coverage they promise where the truth is known."""

import numpy as np
import pytest
from scipy import optimize, stats

from rgalign.evaluation import bootstrap


def clustered(rng, *, users=120, per_user=6, effect=0.1, between=1.0, within=1.0, statistics=()):
    """Paired differences (*statistics, sessions) with a spread between users, and the users."""
    user = np.repeat(np.arange(users), per_user)
    shared = rng.normal(scale=between, size=(*statistics, users))[..., user]
    return effect + shared + rng.normal(scale=within, size=(*statistics, len(user))), user


def scipys_ends(user, top, bottom, replicates, seed):
    """Ends of scipy's percentile interval of a ratio of sums over users drawn with replacement."""
    drawn = stats.bootstrap(
        (np.bincount(user, top), np.bincount(user, bottom)),
        lambda x, y, axis: x.sum(axis=axis) / y.sum(axis=axis),
        paired=True,
        method="percentile",
        n_resamples=replicates,
        rng=np.random.default_rng(seed),
    )
    return [drawn.confidence_interval.low, drawn.confidence_interval.high]


def test_draws_and_percentiles_equal_scipys():
    rng = np.random.default_rng(1)
    differences, user = clustered(rng, users=40)
    weights = rng.integers(2, 15, size=len(user))
    theirs = scipys_ends(user, differences * weights, weights, 500, 7)
    ours = bootstrap.over_users(differences, weights, user, seed=7, replicates=500)
    np.testing.assert_allclose([ours.low, ours.high], theirs, rtol=0, atol=1e-12)
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


def test_the_interval_of_a_ratio_is_that_of_the_ratio_in_each_replicate():
    rng = np.random.default_rng(9)
    differences, user = clustered(rng, users=50)
    weights, per = rng.integers(1, 9, size=len(user)), rng.random(len(user))  # an old model's error, often near 0
    theirs = scipys_ends(user, differences * weights, per * weights, 300, 4)
    ours = bootstrap.over_users(differences, weights, user, per=per, seed=4, replicates=300)
    np.testing.assert_allclose([ours.low, ours.high], theirs, rtol=0, atol=1e-12)
    assert ours.estimate == pytest.approx((differences * weights).sum() / (per * weights).sum())
    undefined = np.where(rng.random(len(user)) < 0.3, np.nan, differences)
    there = ~np.isnan(undefined)
    alone = bootstrap.over_users(undefined, weights, user, per=per, seed=4, replicates=100).estimate
    assert alone == pytest.approx((differences * weights)[there].sum() / (per * weights)[there].sum())
    assert np.isnan(bootstrap.over_users(differences, weights, user, per=0 * per, seed=4, replicates=100).estimate)


def hartung_knapp(d, v, tau2, *, floor):
    """The textbook's estimate and standard error, weights 1 / (v + tau2); floor: q is at least 1."""
    weights = 1 / (v + tau2)
    mean = (weights * d).sum() / weights.sum()
    q = (weights * (d - mean) ** 2).sum() / (len(d) - 1)
    return mean, np.sqrt((max(1, q) if floor else q) / weights.sum())


def paule_mandel(d, v):
    """The variance between studies at which q is 1, or 0 where q is below 1 without any."""

    def excess(tau2):
        weights = 1 / (v + tau2)
        return (weights * (d - (weights * d).sum() / weights.sum()) ** 2).sum() - (len(d) - 1)

    return optimize.brentq(excess, 0, 100 * d.var(ddof=1), xtol=1e-15) if excess(0) > 0 else 0.0


# BCG vaccine against tuberculosis, 13 trials (Colditz et al. 1994): cases and others, vaccinated and not.
BCG = np.array(
    [
        [4, 119, 11, 128],
        [6, 300, 29, 274],
        [3, 228, 11, 209],
        [62, 13536, 248, 12619],
        [33, 5036, 47, 5761],
        [180, 1361, 372, 1079],
        [8, 2537, 10, 619],
        [505, 87886, 499, 87892],
        [29, 7470, 45, 7232],
        [17, 1699, 65, 1600],
        [186, 50448, 141, 27197],
        [5, 2493, 3, 2338],
        [27, 16886, 29, 17825],
    ],
    dtype=float,
)


def test_the_textbooks_formula_gives_what_metafor_publishes_of_the_bcg_trials():
    """rma(yi, vi, data=dat, test="knha"): tau^2 0.3132, estimate -0.7145, se 0.1808, 95 % [-1.1084, -0.3206]."""
    a, b, c, d = BCG.T
    ratios, variances = np.log(a / (a + b) * (c + d) / c), 1 / a - 1 / (a + b) + 1 / c - 1 / (c + d)
    mean, error = hartung_knapp(ratios, variances, 0.3132, floor=False)
    half = stats.t.ppf(0.975, 12) * error
    assert (mean, error, mean - half, mean + half) == pytest.approx((-0.7145, 0.1808, -1.1084, -0.3206), abs=1e-4)


def test_with_equal_sampling_errors_the_interval_is_hartungs_and_knapps_with_paule_and_mandels_variance():
    rng, floored = np.random.default_rng(10), 0
    for worlds in range(2, 12):
        for spread in (0.0, 1.0, 5.0):
            d, v = rng.normal(0.3, spread, worlds) + rng.normal(size=worlds), np.full(worlds, 1.3)
            mean, error = hartung_knapp(d, v, paule_mandel(d, v), floor=True)
            half = stats.t.ppf(0.975, worlds - 1) * error
            found = bootstrap.over_worlds(d, np.sqrt(v))
            assert tuple(found[:3]) == pytest.approx((mean, mean - half, mean + half), rel=1e-6)
            assert found.p == pytest.approx(2 * stats.t.sf(abs(mean) / error, worlds - 1), rel=1e-5)
            floored += d.var(ddof=1) < 1.3
    assert 5 < floored < 25, "both branches"


def test_worlds_that_agree_by_luck_have_no_narrower_interval_than_their_sessions_allow():
    """By hand: the floor is sqrt(.0018^2 + .0018^2 + .0009^2) / 3 = .0009, t with two degrees of freedom 4.302653."""
    d, errors = [0.0080, 0.0086, 0.0080], [0.0018, 0.0018, 0.0009]
    found = bootstrap.over_worlds(d, errors)
    assert (found.low, found.high) == pytest.approx((0.0082 - 4.302653 * 0.0009, 0.0082 + 4.302653 * 0.0009))
    alone = bootstrap.over_worlds(d)
    assert (alone.low, alone.high) == pytest.approx((0.0082 - 4.302653 * 0.0002, 0.0082 + 4.302653 * 0.0002))
    assert bootstrap.over_worlds(d, [0.0018, np.nan, 0.0009]) == alone, "a floor that is not known is none"
    assert bootstrap.over_worlds(d, [0.0, 0.0, 0.0]) == alone
    assert bootstrap.standard_error(-1.959964, 1.959964) == pytest.approx(1)
    for wrong in ([0.1, 0.1], [0.1, -0.1, 0.1]):
        with pytest.raises(ValueError, match="standard_errors has the shape"):
            bootstrap.over_worlds(d, wrong)


@pytest.mark.parametrize(("worlds", "between"), [(3, 0), (5, 1), (8, 3), (5, 0)])
def test_coverage_over_worlds(worlds, between):
    """2,000 studies; worlds spread by 0, 1 or 3 sampling errors, which differ and are known to 5 %.

    The floor never costs coverage: four sigma below 95 % is .930. (Of 4,000 with another seed: .952 to 1.000, Student's
    .947 to .957; but of those with a spread below half the sampling variance, Student's covers .36 to .89.)
    """
    rng, studies, hits, lucky = np.random.default_rng([11, worlds, between]), 2000, 0, []
    for _ in range(studies):
        errors = rng.uniform(0.5, 1.5, worlds)
        d = rng.normal(0, between, worlds) + rng.normal(0, errors)
        known = errors * rng.normal(1, 0.05, worlds)
        found, student = bootstrap.over_worlds(d, known), bootstrap.over_worlds(d)
        assert student.low >= found.low
        assert found.high >= student.high
        hits += found.low <= 0 <= found.high
        if d.var(ddof=1) < (known**2).mean() / 2:
            lucky.append((found.low <= 0 <= found.high, student.low <= 0 <= student.high))
    assert hits / studies > 0.93
    if len(lucky) > 200:
        ours, students = np.mean(lucky, axis=0)
        assert ours > 0.93 > students


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
def test_without_sampling_errors_the_interval_over_worlds_is_scipys_t(level):
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
