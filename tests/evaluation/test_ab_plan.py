"""Assignment, the split's check and power, against scipy and against simulated experiments."""

from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from small_experiments import CONTROL_CTR, draw_counts, draw_users, three_sigma

from rgalign.experiment import ab_test

ARMS = ["qe_rec", "rgalign_rec", "baseline"]


def test_assignment_is_the_same_on_every_machine():
    """Pinned: arms are the user's for as long as an experiment runs, so no version may move anybody."""
    assigned = ab_test.assign(["u0", "u1", "u2", "u3", "Ж", "", "7"], ARMS, "pinned")
    point = [int(sha256(f"pinned:{user}".encode()).hexdigest()[:16], 16) / 2**64 for user in ("u0", "u1", "u2", "u3")]
    assert assigned[:4].tolist() == [ARMS[int(3 * share)] for share in point]
    assert assigned[4:].tolist() == ["rgalign_rec", "rgalign_rec", "rgalign_rec"]


def test_shares_are_as_planned_and_salts_independent():
    users, shares = [f"u{i}" for i in range(20_000)], [0.5, 0.3, 0.2]
    first, second = (ab_test.assign(users, ARMS, salt, shares) for salt in ("week 5", "week 6"))
    counts = np.array([[np.sum((first == a) & (second == b)) for b in ARMS] for a in ARMS])
    assert stats.chisquare(counts.sum(axis=1), 20_000 * np.array(shares)).pvalue > 0.001
    assert stats.chi2_contingency(counts).pvalue > 0.001  # who was together before is not together again


@given(users=st.lists(st.text() | st.integers(), min_size=1), salt=st.text(min_size=1), seed=st.integers(0, 2**32 - 1))
def test_a_user_is_in_one_arm_whoever_else_is_there(users, salt, seed):
    together = ab_test.assign(users, ARMS, salt)
    order = np.random.default_rng(seed).permutation(len(users))
    assert ab_test.assign([users[k] for k in order], ARMS, salt).tolist() == together[order].tolist()
    assert ab_test.assign(users[:1], ARMS, salt)[0] == together[0]
    assert ab_test.assign([str(user) for user in users], ARMS, salt).tolist() == together.tolist()


def test_any_type_of_id_that_means_the_same_is_the_same_user():
    expected = ab_test.assign([7, 8, 9], ARMS, "types").tolist()
    for same in (["7", "8", "9"], np.arange(7, 10, dtype=np.int8), np.array(["7", "8", "9"]), (np.int64(7), "8", 9)):
        assert ab_test.assign(same, ARMS, "types").tolist() == expected
    assert ab_test.assign([], ARMS, "types").tolist() == []


def test_all_faults_of_an_assignment_are_named_at_once():
    with pytest.raises(ValueError, match="no user was assigned") as error:
        ab_test.assign(["u0", np.nan, 7.0, None, True], ["a", "b", "a"], "", [0.5, 0.7, -0.1])
    assert str(error.value).splitlines()[1:] == [
        "  shares has [-0.1]; each must be above 0",
        "  shares sum to 1.1; expected 1",
        "  arms has a more than once",
        "  salt is empty; give each experiment its own name, or all will split users alike",
        "  user_ids has 4 that are neither string nor integer (first: nan, 7.0, None)",
    ]
    for arms in ([], ["only"]):
        with pytest.raises(ValueError, match=f"arms has {len(arms)}; an experiment takes two arms or more"):
            ab_test.assign(["u0"], arms, "salt")
    with pytest.raises(ValueError, match=r"shares has the shape \(2,\); expected \(3,\)"):
        ab_test.assign(["u0"], ARMS, "salt", [0.5, 0.5])
    with pytest.raises(ValueError, match="shares sum to nan"):
        ab_test.assign(["u0"], ["a", "b"], "salt", [0.5, np.nan])


@given(st.lists(st.integers(1, 5000), min_size=2, max_size=5), st.integers(0, 2**32 - 1))
def test_sample_ratio_is_scipys_chi_square(counts, seed):
    shares = np.random.default_rng(seed).dirichlet(np.full(len(counts), 5.0))
    ours, theirs = ab_test.sample_ratio(counts, shares), stats.chisquare(counts, sum(counts) * shares)
    assert (ours.statistic, ours.p_value) == pytest.approx(theirs)
    assert ours.alarm == (theirs.pvalue < 0.001)


def test_sample_ratio_alarms_as_rarely_as_it_says_and_sees_a_lost_tenth():
    rng = np.random.default_rng(1)
    even = rng.binomial(20_000, 0.5, 4000)
    sound = ab_test.sample_ratio(np.stack([even, 20_000 - even], axis=1), alarm=0.01)
    assert abs(sound.alarm.mean() - 0.01) < three_sigma(0.01, 4000)
    assert ab_test.sample_ratio([9_000, 10_000]).alarm
    assert np.isnan(ab_test.sample_ratio([0, 0]).p_value)
    with pytest.raises(ValueError, match=r"shares sum to 1.1"):
        ab_test.sample_ratio([1, 2], [0.5, 0.6])


def test_power_is_scipys_noncentral_chi_square():
    lifts, users = np.array([0, 0.01, -0.02, 0.1])[:, None], np.array([100, 2_000, 50_000])
    ours = ab_test.power_of(lifts, users, 0.2, 0.3, share=0.3, variance_removed=0.25, alpha=0.1)
    error = np.sqrt(0.3 * 0.75 * (1 / (0.3 * users) + 1 / (0.7 * users)))
    theirs = stats.ncx2.sf(stats.chi2.isf(0.1, 1), 1, (lifts * 0.2 / error) ** 2)
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)


@given(lift=st.floats(0.001, 0.5), variance=st.floats(0.01, 5), share=st.floats(0.05, 0.95), power=st.floats(0.5, 0.99))
def test_users_needed_are_the_fewest_of_that_power(lift, variance, share, power):
    needed = ab_test.users_needed(lift, 0.2, variance, power=power, share=share)
    powers = ab_test.power_of(lift, np.array([needed, max(needed - 1, 1)]), 0.2, variance, share=share)
    assert powers[0] >= power - 1e-9
    # at a power of one half the far tail that is left out is 1e-5 of chance, a few users in ten thousand
    assert powers[1] <= power + 1e-4 or needed == 1


def test_textbook_number_of_users():
    """Two proportions' rule of thumb, 16 p (1 - p) / delta ** 2 an arm (van Belle 2008): here 15.7 for 16."""
    needed = ab_test.users_needed([0.05, 0.1], 0.1, 0.1 * 0.9)
    np.testing.assert_allclose(needed / 2, [16 * 0.09 / 0.005**2, 16 * 0.09 / 0.01**2], rtol=0.02)
    halved = ab_test.users_needed(0.05, 0.1, 0.1 * 0.9, variance_removed=0.5)
    assert halved == pytest.approx(needed[0] / 2, abs=1)


@pytest.mark.parametrize("with_cuped", [False, True])
def test_the_users_needed_find_the_lift_with_the_power_promised(with_cuped):
    """Planned from one measured pilot without a lift, then 600 experiments of that size with a lift of -6 %.

    A larger one would change the treatment's variance, which the plan takes to be control's.
    """
    rng, experiments, effect = np.random.default_rng(2), 600, -0.06

    def lift_of(users, **options):
        before = draw_counts(rng, users._replace(treated=np.zeros_like(users.treated)))
        covariate = ab_test.pre_period_covariate(*before) if with_cuped else None
        counts = draw_counts(rng, users, **options)
        arms = [ab_test.arm_of(*counts, own, covariate) for own in (users.treated, ~users.treated)]
        return arms[1], ab_test.lift(*arms)

    control, pilot = lift_of(draw_users(rng, 1, 200_000, visits=6, alike=20))
    removed = pilot.variance_removed.item()
    user_variance = (control.users * control.variance).item()
    seen = control.users.item() / 100_000  # the plan counts users who come; some of those drawn do not
    needed = ab_test.users_needed(effect, CONTROL_CTR, user_variance, variance_removed=removed)
    _, results = lift_of(draw_users(rng, experiments, round(needed / seen), visits=6, alike=20), effect=effect)
    found = (results.p_value < 0.05).mean()
    assert abs(found - 0.8) < three_sigma(0.8, experiments)
    planned = ab_test.planned_error(needed, user_variance, variance_removed=removed)
    assert planned == pytest.approx(results.difference.estimate.std(), rel=0.08)


def test_a_plan_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="nothing can be planned") as error:
        ab_test.power_of(0.01, 0, 0.2, 0.3, share=1, variance_removed=1.5)
    for fault in ("users and user_variance must be above 0", "share is 1;", "variance_removed is 1.5"):
        assert fault in str(error.value)
    with pytest.raises(ValueError, match="no number of users finds a lift of 0"):
        ab_test.users_needed([0.01, 0], 0.2, 0.3)
