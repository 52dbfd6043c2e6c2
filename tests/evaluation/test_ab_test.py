"""Fixed-horizon statistics against scipy, regression and hand-worked cases, and against the rates that they promise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats
from small_experiments import CONTROL_CTR, draw_counts, draw_users, three_sigma

from rgalign.experiment import ab_test


def both_arms(clicks, impressions, treated, covariate=None, **options):
    arms = (ab_test.arm_of(clicks, impressions, own, covariate) for own in (treated, ~treated))
    return ab_test.lift(*arms, **options)


def flat(result):
    """All arrays of a Lift, one after another."""
    return [*result.difference, *result.relative, *result[2:]]


@st.composite
def user_counts(draw):
    """Clicks, impressions and who is treated, (users,), with three users or more in each arm."""
    users = draw(st.integers(6, 30))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    impressions = 3 * rng.integers(1, 20, users)
    return rng.binomial(impressions, rng.uniform(0.05, 0.9, users)), impressions, rng.permutation(users) % 2 == 0


def test_hand_worked_arm():
    """CTR 3 / 12; residuals .25, -.75, .5 with squares .875; variance 3 / 2 * .875 / 12 ** 2. Two users stay out."""
    clicks, impressions = np.array([1, 0, 2, 0, 3]), np.array([3, 3, 6, 0, 3])
    arm = ab_test.arm_of(clicks, impressions, np.array([True, True, True, True, False]))
    assert arm == pytest.approx((3, 0.25, 1.3125 / 144, 0, 0, 0))


def test_hand_worked_lift():
    """The case above as control; treatment: CTR 5 / 12, residuals .5 and -.5, variance 2 / 1 * .5 / 12 ** 2."""
    clicks, impressions = np.array([1, 0, 2, 3, 2]), np.array([3, 3, 6, 6, 6])
    treated = np.array([False, False, False, True, True])
    result = both_arms(clicks, impressions, treated)
    control, treatment = 1.3125 / 144, 1 / 144
    z = stats.norm.ppf(0.975)
    assert result.difference == pytest.approx([1 / 6 + sign * z * np.sqrt(control + treatment) for sign in (0, -1, 1)])
    relative_error = np.sqrt(treatment / 0.25**2 + (5 / 12) ** 2 * control / 0.25**4)
    assert result.relative == pytest.approx([2 / 3 + sign * z * relative_error for sign in (0, -1, 1)])


def test_with_as_many_impressions_for_all_it_is_welchs_statistic():
    rng = np.random.default_rng(1)
    clicks, treated = rng.binomial(12, rng.beta(2, 5, 200)), rng.random(200) < 0.4
    result = both_arms(clicks, np.full(200, 12), treated)
    theirs = stats.ttest_ind(clicks[treated] / 12, clicks[~treated] / 12, equal_var=False)
    assert result.difference.estimate / result.standard_error == pytest.approx(theirs.statistic)
    assert result.p_value == pytest.approx(2 * stats.norm.sf(abs(theirs.statistic)))
    assert result.difference.high == pytest.approx(theirs.confidence_interval().high, rel=0.02)  # t's is a little wider


def test_variance_is_that_of_regression_with_errors_clustered_by_user():
    """Liang and Zeger's sandwich: impressions as rows, users as clusters, n / (n - 1) for the 30 users of each arm."""
    rng = np.random.default_rng(2)
    impressions, treated = 3 * rng.integers(1, 9, 60), np.arange(60) % 2 == 0
    clicks = rng.binomial(impressions, rng.beta(2, 5, 60))
    row_user = np.repeat(np.arange(60), impressions)
    clicked = np.arange(len(row_user)) - np.repeat(np.cumsum(impressions) - impressions, impressions) < clicks[row_user]
    design = np.stack([np.ones(len(row_user)), treated[row_user]], axis=1)
    bread = np.linalg.inv(design.T @ design)
    coefficients = bread @ design.T @ clicked
    scores = np.zeros((60, 2))
    np.add.at(scores, row_user, design * (clicked - design @ coefficients)[:, None])
    sandwich = bread @ (scores.T @ scores) @ bread * 30 / 29
    result = both_arms(clicks, impressions, treated)
    assert result.difference.estimate == pytest.approx(coefficients[1])
    assert result.standard_error == pytest.approx(np.sqrt(sandwich[1, 1]))


def test_cuped_is_regression_on_the_covariate():
    """With arms of one size and as many impressions for all, theta is the coefficient of least squares."""
    rng = np.random.default_rng(3)
    covariate, treated = rng.normal(size=80), rng.permutation(80) % 2 == 0
    clicks = rng.binomial(30, 1 / (1 + np.exp(1 - covariate)))
    design = np.stack([np.ones(80), treated, covariate], axis=1)
    coefficients = np.linalg.lstsq(design, clicks / 30)[0]
    result = both_arms(clicks, np.full(80, 30), treated, covariate)
    assert result.difference.estimate == pytest.approx(coefficients[1])
    residual = clicks / 30 - coefficients[2] * covariate
    welch = stats.ttest_ind(residual[treated], residual[~treated], equal_var=False)
    assert result.difference.estimate / result.standard_error == pytest.approx(welch.statistic)
    plain = both_arms(clicks, np.full(80, 30), treated)
    assert result.variance_removed == pytest.approx(1 - (result.standard_error / plain.standard_error) ** 2)


def test_relative_lift_with_cuped_is_the_delta_method_by_numerical_gradient():
    """Arms of 40 and 160 users, a lift of about a half: both CTRs are read at the mean of all users' covariate."""
    rng = np.random.default_rng(9)
    covariate, treated, impressions = rng.normal(2, 1, 200), np.arange(200) < 40, 3 * rng.integers(1, 9, 200)
    clicks = rng.binomial(impressions, (0.15 + 0.1 * np.clip(covariate, 0, 4)) * np.where(treated, 1.5, 1))
    result = both_arms(clicks, impressions, treated, covariate)
    points, covariances = [], np.zeros((4, 4))
    for k, own in enumerate((treated, ~treated)):
        ctr = clicks[own].sum() / impressions[own].sum()
        linearised = (clicks[own] - ctr * impressions[own]) / impressions[own].mean()
        points += [ctr, covariate[own].mean()]
        covariances[2 * k : 2 * k + 2, 2 * k : 2 * k + 2] = np.cov(linearised, covariate[own]) / own.sum()
    theta = (covariances[0, 1] + covariances[2, 3]) / (covariances[1, 1] + covariances[3, 3])

    def relative(point):
        common = 0.2 * point[1] + 0.8 * point[3]
        return (point[0] - theta * (point[1] - common)) / (point[2] - theta * (point[3] - common)) - 1

    gradient = optimize.approx_fprime(points, relative)
    half = stats.norm.ppf(0.975) * np.sqrt(gradient @ covariances @ gradient)
    expected = [relative(points), relative(points) - half, relative(points) + half]
    assert result.relative == pytest.approx(expected, rel=1e-5)


def test_a_covariate_of_one_arm_alone_adjusts_nothing():
    rng = np.random.default_rng(4)
    clicks, impressions, treated = rng.integers(0, 3, 50), np.full(50, 3), np.arange(50) < 25
    treatment = ab_test.arm_of(clicks, impressions, treated, clicks + 5.0)
    result = ab_test.lift(treatment, ab_test.arm_of(clicks, impressions, ~treated))
    np.testing.assert_allclose(flat(result), flat(both_arms(clicks, impressions, treated)), atol=1e-15)


def test_aa_rejects_five_per_cent_and_a_test_on_sessions_far_more():
    rng, experiments = np.random.default_rng(5), 2000
    users = draw_users(rng, experiments, 1500)
    clicks, impressions = draw_counts(rng, users)
    result = both_arms(clicks, impressions, users.treated)
    assert abs((result.p_value < 0.05).mean() - 0.05) < three_sigma(0.05, experiments)

    naive = []
    for k in range(300):
        sessions = impressions[k, 0] // 3
        user = np.repeat(np.arange(1500), sessions)
        clicked = rng.binomial(3, users.rate[k, 0, user])
        naive.append(both_arms(clicked, np.full(len(user), 3), users.treated[k, 0, user]).p_value)
    assert (np.array(naive) < 0.05).mean() > 0.15


def test_lift_is_covered_and_cuped_narrower_without_bias():
    """True lift -10 %; a pre-period as long as the experiment, in which a quarter of the users was not seen."""
    rng, experiments = np.random.default_rng(6), 1000
    users = draw_users(rng, experiments, 4000)
    clicks, impressions = (counts[:, 0] for counts in draw_counts(rng, users, effect=-0.1))
    before, shown_before = (counts[:, 0] for counts in draw_counts(rng, users._replace(treated=users.treated & False)))
    unseen = rng.random(before.shape) < 0.25
    covariate = ab_test.pre_period_covariate(np.where(unseen, 0, before), np.where(unseen, 0, shown_before))
    treated = users.treated[:, 0]
    plain, adjusted = both_arms(clicks, impressions, treated), both_arms(clicks, impressions, treated, covariate)
    for result in (plain, adjusted):
        for truth, interval in ((-0.1 * CONTROL_CTR, result.difference), (-0.1, result.relative)):
            covered = ((interval.low <= truth) & (truth <= interval.high)).mean()
            assert abs(covered - 0.95) < three_sigma(0.95, experiments)
        error = result.difference.estimate + 0.1 * CONTROL_CTR
        assert abs(error.mean()) < 3 * error.std() / np.sqrt(experiments)
    spread = [result.difference.estimate.var() for result in (plain, adjusted)]
    removed = adjusted.variance_removed.mean()
    assert removed > 0.1
    assert removed == pytest.approx(1 - spread[1] / spread[0], abs=0.05)
    narrower = adjusted.difference.high - adjusted.difference.low < plain.difference.high - plain.difference.low
    assert narrower.all()


def test_pre_period_covariate_has_mean_zero_and_zero_for_the_unseen():
    clicks, impressions = np.array([[2, 0, 0, 1], [0, 0, 0, 0]]), np.array([[3, 3, 0, 6], [0, 0, 0, 0]])
    covariate = ab_test.pre_period_covariate(clicks, impressions)
    np.testing.assert_allclose(covariate, [[1.25, -0.75, 0, -0.5], [0, 0, 0, 0]])


def test_guardrails_hold_for_all_groups_at_once():
    """Twelve groups that share users: an A/A experiment has a false alarm in any of them in at most 5 %."""
    rng, experiments, groups = np.random.default_rng(7), 800, 12
    users = draw_users(rng, experiments, 500, visits=24)
    clicks, impressions = (np.diff(counts, axis=1, prepend=0) for counts in draw_counts(rng, users, looks=groups))
    arms = [ab_test.arm_of(clicks, impressions, own) for own in (users.treated, ~users.treated)]
    result, alone = ab_test.guardrails(*arms), ab_test.lift(*arms)
    excludes = (result.difference.low > 0) | (result.difference.high < 0)
    np.testing.assert_array_equal(excludes, result.p_value < 0.05)
    assert excludes.any(axis=1).mean() <= 0.05 + three_sigma(0.05, experiments)
    assert (alone.p_value < 0.05).any(axis=1).mean() > 0.2
    np.testing.assert_allclose(result.difference, ab_test.lift(*arms, level=1 - 0.05 / groups).difference)
    np.testing.assert_allclose(result.p_value, np.minimum(groups * alone.p_value, 1))


def test_guardrails_want_a_group_axis_and_bear_an_empty_group():
    clicks, impressions = np.array([[1, 2, 0, 3], [0, 0, 0, 0]]), np.array([[3, 3, 3, 6], [0, 0, 0, 0]])
    arms = [ab_test.arm_of(clicks, impressions, np.arange(4) % 2 == parity) for parity in (0, 1)]
    result = ab_test.guardrails(*arms)
    np.testing.assert_array_equal(np.isnan(result.p_value), [False, True])
    with pytest.raises(ValueError, match="no group axis"):
        ab_test.guardrails(*(ab_test.Arm(*(field[0] for field in arm)) for arm in arms))


@given(counts=user_counts(), factor=st.integers(2, 1000))
def test_counting_in_another_unit_changes_nothing(counts, factor):
    clicks, impressions, treated = counts
    scaled = both_arms(clicks * factor, impressions * factor, treated)
    np.testing.assert_allclose(flat(scaled), flat(both_arms(*counts)), rtol=1e-9, atol=1e-12)


@given(counts=user_counts(), seed=st.integers(0, 2**32 - 1))
def test_swapping_the_arms_flips_the_sign(counts, seed):
    clicks, impressions, treated = counts
    covariate = np.random.default_rng(seed).normal(size=len(clicks))
    one, other = (both_arms(clicks, impressions, own, covariate) for own in (treated, ~treated))
    mirrored = [-one.difference.estimate, -one.difference.high, -one.difference.low]
    np.testing.assert_allclose(other.difference, mirrored, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(flat(other)[6:], flat(one)[6:], rtol=1e-9, atol=1e-12)
    relatives = (1 + one.relative.estimate) * (1 + other.relative.estimate)
    assert np.isnan(relatives) or relatives == pytest.approx(1)


@given(counts=user_counts(), seed=st.integers(0, 2**32 - 1))
def test_the_order_of_the_users_and_those_unseen_change_nothing(counts, seed):
    rng = np.random.default_rng(seed)
    covariate = rng.normal(size=len(counts[0]))
    order = rng.permutation(len(covariate) + 3)
    padded = [np.append(values, [0, 0, 0])[order] for values in (*counts, covariate)]
    shuffled = both_arms(*padded[:2], padded[2].astype(bool), padded[3])
    np.testing.assert_allclose(flat(shuffled), flat(both_arms(*counts, covariate)), rtol=1e-6, atol=1e-12)


def test_many_experiments_at_once_equal_one_at_a_time_and_small_integers_do_not_overflow():
    rng = np.random.default_rng(8)
    impressions = 3 * rng.integers(0, 40, size=(2, 3, 50)).astype(np.uint8)
    clicks = rng.binomial(impressions, 0.4).astype(np.uint8)
    treated, covariate = rng.random((2, 1, 50)) < 0.5, rng.normal(size=50)
    together = both_arms(clicks, impressions, treated, covariate)
    for i, j in np.ndindex(2, 3):
        alone = both_arms(clicks[i, j].astype(float), impressions[i, j].astype(float), treated[i, 0], covariate)
        np.testing.assert_allclose([part[i, j] for part in flat(together)], flat(alone), rtol=1e-9)


def test_an_arm_without_clicks_and_an_arm_of_one_user():
    impressions, treated = np.full(20, 3), np.arange(20) < 10
    nothing = both_arms(np.zeros(20), impressions, treated)
    assert nothing.difference == (0, 0, 0)
    assert nothing.p_value == 1
    no_clicks = both_arms(np.where(treated, 0, [0, 3] * 10), impressions, treated)
    assert no_clicks.relative.estimate == -1
    assert no_clicks.relative.low == no_clicks.relative.high == -1  # a share of zero has no spread by the delta method
    lonely = both_arms(np.ones(20), impressions, np.arange(20) < 1)
    assert np.isnan([lonely.standard_error, lonely.p_value]).all()


def test_all_faults_are_named_at_once():
    with pytest.raises(ValueError, match="cannot be compared") as error:
        ab_test.arm_of([1, 4, -1, np.nan], [3, 3, 3, 3], [0, 1, 1, 1], [0, 0, np.nan, 0])
    for fault in ("3 users break 0 <= clicks <= impressions", "in_arm is int64", "covariate is not finite for 1"):
        assert fault in str(error.value)
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(3,\); expected one\n.*do not fit each other"):
        ab_test.arm_of([1, 1], [3, 3, 3], [True, True])
    with pytest.raises(ValueError, match="impressions is one number"):
        ab_test.arm_of(1, 3, [True])
