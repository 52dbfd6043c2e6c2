"""Always-valid inference against numerical integration, known boundaries and the rates it promises under peeking."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize, stats
from small_experiments import CONTROL_CTR, draw_counts, draw_users, three_sigma

from rgalign.experiment import ab_test


def half_width(standard_error, mixture, **options):
    interval = ab_test.always_valid([0.0], [standard_error], mixture, **options).difference
    return interval.high.item()


def walks(rng, experiments, times):
    """Estimates and standard errors of experiments without an effect, whose information grows with times (looks,)."""
    steps = rng.normal(size=(experiments, len(times))) * np.sqrt(np.diff(times, prepend=0))
    return steps.cumsum(axis=1) / times, np.broadcast_to(1 / np.sqrt(times), steps.shape)


@settings(max_examples=40)  # each is an integral
@given(z=st.floats(-4, 4), error=st.floats(0.01, 10), ratio=st.floats(0.1, 10))
def test_p_value_is_one_over_the_likelihood_ratio_of_the_mixture(z, error, ratio):
    mixture, difference = ratio * error, z * error
    prior, density = stats.norm(0, mixture), stats.norm(difference, error)
    ends = (-12 * mixture, 12 * mixture)
    mixed = integrate.quad(lambda d: prior.pdf(d) * density.pdf(d), *ends, points=[difference], limit=500)[0]
    ours = ab_test.always_valid([difference], [error], mixture).p_value.item()
    assert ours == pytest.approx(min(1, density.pdf(0) / mixed), rel=1e-5)


@given(
    differences=st.lists(st.floats(-1, 1), min_size=1, max_size=8),
    mixture=st.floats(0.01, 10),
    level=st.floats(0.5, 0.99),
    seed=st.integers(0, 2**32 - 1),
)
def test_interval_and_p_value_tell_the_same(differences, mixture, level, seed):
    errors = np.random.default_rng(seed).uniform(0.05, 1, len(differences))
    seen = ab_test.always_valid(differences, errors, mixture, level=level)
    assert (np.diff(seen.p_value) <= 0).all()
    excludes = (seen.difference.low > 0) | (seen.difference.high < 0)
    assert seen.first == (np.flatnonzero(excludes)[0] if excludes.any() else -1)
    assert (seen.p_value[-1] < 1 - level) == excludes.any()
    at_the_end = ab_test.always_valid([seen.difference.low[0] - differences[0]], errors[:1], mixture, level=level)
    assert at_the_end.p_value.item() == pytest.approx(1 - level)
    mirrored = ab_test.always_valid(-np.array(differences), errors, mixture, level=level)
    np.testing.assert_array_equal(mirrored.p_value, seen.p_value)
    np.testing.assert_array_equal(mirrored.difference.low, -seen.difference.high)


@pytest.mark.parametrize("level", [0.8, 0.95, 0.999])
def test_mixture_gives_the_narrowest_interval_there_is(level):
    for error in (1e-3, 1, 50):
        narrowest = optimize.minimize_scalar(
            lambda log_mixture, error=error: half_width(error, error * np.exp(log_mixture), level=level) / error,
            bounds=(-3, 5),
            method="bounded",
            options={"xatol": 1e-8},
        )
        ours = ab_test.mixture_for(error, level=level)
        assert ours == pytest.approx(error * np.exp(narrowest.x), rel=1e-3)
        assert half_width(error, ours, level=level) <= narrowest.fun * error * (1 + 1e-12)
    # Waudby-Smith et al. approximate the same optimum
    approximate = np.sqrt(-2 * np.log(1 - level) + np.log(1 - 2 * np.log(1 - level)))
    assert ab_test.mixture_for(1.0, level=level) == pytest.approx(approximate, rel=0.1)


def test_the_price_of_looking_always():
    """At the look it is tuned to, the interval at 95 % is 1.5 times as wide as one planned for that look alone."""
    assert half_width(1.0, ab_test.mixture_for(1.0)) / stats.norm.ppf(0.975) == pytest.approx(1.5, abs=0.05)


@pytest.mark.parametrize("tuned_to", [1, 100, 10_000])
def test_five_per_cent_at_most_however_often_one_looks(tuned_to):
    """600 looks while the information grows ten-thousandfold: nearly all of the five per cent is spent, no more."""
    experiments = 4000
    times = np.geomspace(1, 10_000, 600)
    estimates, errors = walks(np.random.default_rng(1), experiments, times)
    seen = ab_test.always_valid(estimates, errors, ab_test.mixture_for(1 / np.sqrt(tuned_to)))
    rejected = (seen.first >= 0).mean()
    assert rejected <= 0.05 + three_sigma(0.05, experiments)
    assert rejected > (0.02 if tuned_to < 10_000 else 0.005)  # tuned to the last look, it has hardly begun to spend
    assert rejected == ab_test.rejected_by_look(seen.p_value).estimate[-1]


def test_peeking_does_the_known_harm():
    """Armitage, McPherson and Rowe (1969), table 2: the true level of a test at 5 % after so many equal steps."""
    experiments = 20_000
    estimates, errors = walks(np.random.default_rng(2), experiments, np.arange(1, 21))
    rejected = ab_test.rejected_by_look(2 * stats.norm.sf(np.abs(estimates / errors))).estimate
    for looks, known in ((1, 0.05), (2, 0.083), (5, 0.142), (10, 0.193), (20, 0.248)):
        assert abs(rejected[looks - 1] - known) < three_sigma(known, experiments) + 0.0005


@pytest.mark.parametrize("effect", [0.0, -0.4])
def test_experiments_with_users_who_return(effect):
    """All looks of an interval cover the truth in 95 % at least; A/A: peeking at p-values finds far more than 5 %."""
    rng, experiments, looks = np.random.default_rng(3), 600, 20
    users = draw_users(rng, experiments, 1000, visits=6)
    counts = draw_counts(rng, users, looks=looks, effect=effect)
    control, treatment = (ab_test.arm_of(*counts, own) for own in (~users.treated, users.treated))
    result = ab_test.lift(treatment, control)
    user_variance = (control.users * control.variance)[:, -1].mean()
    mixture = ab_test.mixture_for(ab_test.planned_error(1000, user_variance))
    seen = ab_test.always_valid(result.difference.estimate, result.standard_error, mixture)
    truth = effect * CONTROL_CTR
    missed = ((seen.difference.low > truth) | (seen.difference.high < truth)).any(axis=1)
    assert missed.mean() <= 0.05 + three_sigma(0.05, experiments)
    if not effect:
        assert ab_test.rejected_by_look(result.p_value).estimate[-1] > 0.15
        assert ab_test.rejected_by_look(seen.p_value).estimate[-1] == missed.mean()
    else:
        assert (seen.first >= 0).mean() > 0.4
        assert seen.first[seen.first >= 0].mean() < looks - 3  # those that stop, stop early


def test_looks_without_a_click_say_nothing():
    seen = ab_test.always_valid([np.nan, 0.0, 0.5], [np.nan, 0.0, 0.1], 0.2)
    np.testing.assert_array_equal(np.isinf(seen.difference.high), [True, True, False])
    np.testing.assert_array_equal(seen.p_value[:2], [1, 1])
    assert seen.first == 2
    assert ab_test.always_valid([[0.0, 0.1]], [[0.0, 0.2]], 0.2).first == [-1]


def test_shares_have_wilsons_interval():
    p_values = np.array([[0.5, 0.01, 0.9], [0.2, 0.3, 0.04], [np.nan, 0.6, 0.7], [0.5, 0.5, 0.5]])
    ours = ab_test.rejected_by_look(p_values)
    theirs = [stats.binomtest(k, 4).proportion_ci(method="wilson") for k in (0, 1, 2)]
    np.testing.assert_allclose(ours.estimate, [0, 0.25, 0.5])
    np.testing.assert_allclose(np.transpose(ours[1:]), theirs, atol=1e-12)


def test_faults():
    with pytest.raises(ValueError, match=r"have the shapes \(2,\) and \(3,\); expected one shape \(..., looks\)"):
        ab_test.always_valid([0, 0], [1, 1, 1], 1)
    for mixture in (0, -1, np.nan):
        with pytest.raises(ValueError, match=f"mixture is {mixture}; expected a number above 0"):
            ab_test.always_valid([0], [1], mixture)
