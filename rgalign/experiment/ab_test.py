"""An online experiment whose unit is the user (METHOD.md 4): how it is planned, what it found, when it may be stopped.

CTR@3 is a ratio of sums over users, clicks on the three intents shown / impressions of them. The sessions of one user
are alike, so its variance comes from users (Deng, Knoblich and Lu 2018, "Applying the Delta Method in Metric
Analytics"), never from sessions. All of this is [C]: the paper says nothing of the statistics of its online test.

Users are the last axis everywhere; axes before it are experiments, looks or groups, and broadcast.
"""

from collections.abc import Sequence
from hashlib import sha256
from typing import NamedTuple

import numpy as np
from scipy.special import lambertw
from scipy.stats import chi2, norm

from rgalign.evaluation.bootstrap import Interval


class SampleRatio(NamedTuple):
    """Chi-square of the users counted against the shares planned; arrays of the leading shape."""

    statistic: np.ndarray
    p_value: np.ndarray
    alarm: np.ndarray  # True: the split is not the one planned, and no figure of this experiment can be trusted


def assign(user_ids, arms: Sequence[str], salt: str, shares: Sequence[float] | None = None) -> np.ndarray:
    """The arm of each user, (users,) of str, by the first 53 bits of SHA-256 of "salt:user_id" as a number in [0, 1).

    user_ids  (users,), strings or integers; 7 and "7" are one user, ids may repeat
    salt      names the experiment; two experiments of one salt would share their arms
    shares    of the users for each arm, in sum 1; None: equal
    Raises ValueError, naming every fault found.
    """
    arms = list(arms)
    user_ids = np.asarray(user_ids, dtype=object).tolist()  # by itself numpy would make ["a", nan] the strings a, nan
    shares, faults = _planned(shares, len(arms), "arms")
    if repeated := sorted({name for name in arms if arms.count(name) > 1}):
        faults.append(f"arms has {', '.join(repeated)} more than once")
    if not salt:
        faults.append("salt is empty; give each experiment its own name, or all will split users alike")
    # A column of integers with a gap becomes floats in pandas, and "7.0" is another user than "7": refused.
    strange = [user for user in user_ids if isinstance(user, bool) or not isinstance(user, str | int | np.integer)]
    if strange:
        first = ", ".join(map(repr, strange[:3]))
        faults.append(f"user_ids has {len(strange)} that are neither string nor integer (first: {first})")
    if faults:
        raise ValueError("no user was assigned:\n  " + "\n  ".join(faults))
    digests = b"".join(sha256(f"{salt}:{user}".encode()).digest()[:8] for user in user_ids)
    point = (np.frombuffer(digests, dtype=">u8") >> np.uint64(11)) * 2.0**-53
    return np.asarray(arms)[np.searchsorted(np.cumsum(shares)[:-1], point, side="right")]


def sample_ratio(users, shares: Sequence[float] | None = None, *, alarm: float = 0.001) -> SampleRatio:
    """Do the users counted in each arm fit the shares planned? Look before any metric (Fabijan et al. 2019).

    users   (..., arms): users of each arm, not sessions
    shares  planned for each arm, in sum 1; None: equal
    alarm   the p-value below which the split is called broken: strict, since every look at every experiment asks
    Raises ValueError if shares do not fit. p_value is NaN without users.
    """
    users = np.asarray(users, dtype=np.float64)
    shares, faults = _planned(shares, users.shape[-1], "users")
    if faults:
        raise ValueError("the split cannot be judged:\n  " + "\n  ".join(faults))
    planned = users.sum(axis=-1, keepdims=True) * shares
    with np.errstate(invalid="ignore"):
        statistic = ((users - planned) ** 2 / planned).sum(axis=-1)
    p_value = chi2.sf(statistic, users.shape[-1] - 1)
    return SampleRatio(statistic, p_value, p_value < alarm)


def planned_error(users, user_variance, *, share=0.5, variance_removed=0.0) -> np.ndarray:
    """Standard error that the difference of two arms' CTR will have; the arguments broadcast.

    users             of both arms together
    user_variance     the variance one user brings, in both arms: users * variance of `arm_of`, as measured before
    share             treatment's share of the users
    variance_removed  by CUPED (`lift`); 0 without
    Raises ValueError, naming every fault found.
    """
    given = users, user_variance, share, variance_removed
    users, user_variance, of_treatment, removed = (np.asarray(values, dtype=np.float64) for values in given)
    faults = []
    if not ((users > 0).all() and (user_variance > 0).all()):
        faults.append("users and user_variance must be above 0")
    if not ((of_treatment > 0) & (of_treatment < 1)).all():
        faults.append(f"share is {share}; expected treatment's share, between 0 and 1")
    if not (removed < 1).all():
        faults.append(f"variance_removed is {variance_removed}; expected a share below 1")
    if faults:
        raise ValueError("nothing can be planned from this:\n  " + "\n  ".join(faults))
    return np.sqrt(user_variance * (1 - removed) / (of_treatment * (1 - of_treatment) * users))


def power_of(relative_lift, users, ctr: float, user_variance, *, alpha: float = 0.05, **plan) -> np.ndarray:
    """The chance that the two-sided test of `lift` at alpha finds a lift of this size; the arguments broadcast.

    relative_lift  true, relative to control's CTR: 0.01 is one per cent
    ctr            control's, as measured before
    users, user_variance, and in plan share and variance_removed: as in `planned_error`
    """
    shift = np.asarray(relative_lift) * ctr / planned_error(users, user_variance, **plan)
    critical = norm.isf(alpha / 2)
    return norm.sf(critical - shift) + norm.cdf(-critical - shift)


def users_needed(
    relative_lift, ctr: float, user_variance, *, power: float = 0.8, alpha: float = 0.05, **plan
) -> np.ndarray:
    """Users of both arms together, rounded up, that find a relative lift with the chance `power`; rest: `power_of`.

    A significant result in the wrong direction is not counted. Raises ValueError, as for a lift of 0.
    """
    effect = np.abs(np.asarray(relative_lift) * ctr)
    if not (effect > 0).all():
        raise ValueError(f"relative_lift is {relative_lift} and ctr {ctr}: no number of users finds a lift of 0")
    wanted = effect / (norm.isf(alpha / 2) + norm.ppf(power))
    return np.ceil((planned_error(1, user_variance, **plan) / wanted) ** 2).astype(np.int64)


def _planned(shares: Sequence[float] | None, arms: int, name: str) -> tuple[np.ndarray, list[str]]:
    """The shares (arms,), equal ones for None, and what is wrong with them."""
    shares = np.full(arms, 1 / max(arms, 1)) if shares is None else np.asarray(shares, dtype=np.float64)
    if arms < 2:
        return shares, [f"{name} has {arms}; an experiment takes two arms or more"]
    if shares.shape != (arms,):
        return shares, [f"shares has the shape {shares.shape}; expected {(arms,)}, one for each of {name}"]
    faults = []
    if not (shares > 0).all():
        faults.append(f"shares has {shares[~(shares > 0)].tolist()}; each must be above 0")
    if not np.isclose(shares.sum(), 1, rtol=0, atol=1e-9):
        faults.append(f"shares sum to {shares.sum():.6g}; expected 1")
    return shares, faults


class Arm(NamedTuple):
    """CTR of one arm; arrays of one shape, NaN where there are too few users."""

    users: np.ndarray  # with at least one impression
    ctr: np.ndarray  # clicks / impressions
    variance: np.ndarray  # of ctr; times users: the variance one user brings (users_needed)
    covariate: np.ndarray  # mean over users; 0 without CUPED, as the next two
    covariate_variance: np.ndarray  # of that mean
    covariance: np.ndarray  # of ctr and that mean


class Lift(NamedTuple):
    """Treatment against control: `difference` in CTR, `relative` to control's CTR; arrays of one shape.

    standard_error and p_value (two-sided, of no difference) are the difference's. variance_removed is the share of the
    difference's variance that CUPED took away: 0 without a covariate, NaN without a variance.
    """

    difference: Interval
    relative: Interval
    standard_error: np.ndarray
    p_value: np.ndarray
    variance_removed: np.ndarray


def arm_of(clicks, impressions, in_arm, covariate=None) -> Arm:
    """CTR of the users of one arm, and its variance by the delta method.

    clicks, impressions  (..., users): each user's counts, 0 <= clicks <= impressions. A user without an impression has
                         not met the experiment (yet) and is left out, so one array serves all looks and all groups
    in_arm               (..., users), bool
    covariate            (..., users), known before the experiment (`pre_period_covariate`); None: no CUPED
    Returns arrays of the leading shape (...). Raises ValueError, naming every fault found.
    """
    clicks, impressions, in_arm = np.asarray(clicks), np.asarray(impressions), np.asarray(in_arm)
    x = np.zeros(1) if covariate is None else np.asarray(covariate)
    _refuse(clicks, impressions, in_arm, x)
    counted = in_arm & (impressions > 0)

    def total(*factors) -> np.ndarray:
        # einsum makes no copy of the broadcast product: a thousand experiments at twenty looks stay small
        names = ",".join(["...u"] * (1 + len(factors)))
        return np.einsum(f"{names}->...", counted, *factors, dtype=np.float64)

    users, clicked, shown = total(), total(clicks), total(impressions)
    with np.errstate(invalid="ignore", divide="ignore"):
        ctr = clicked / shown
        # The residual clicks - ctr * impressions sums to zero by itself, so its square needs no mean taken off.
        squares = total(clicks, clicks) - 2 * ctr * total(clicks, impressions)
        squares = np.maximum(squares + ctr**2 * total(impressions, impressions), 0)
        spread = np.where(users > 1, users / (users - 1), np.nan)
        variance = spread * squares / shown**2
        if covariate is None:
            return Arm(users, ctr, variance, *(np.zeros_like(ctr) for _ in range(3)))
        mean = total(x) / users
        covariate_variance = spread * np.maximum(total(x, x) / users**2 - mean**2 / users, 0)
        covariance = spread * (total(clicks, x) - ctr * total(impressions, x)) / (shown * users)
    return Arm(users, ctr, variance, mean, covariate_variance, covariance)


def pre_period_covariate(clicks, impressions) -> np.ndarray:
    """CUPED's covariate: each user's clicks before the experiment above what the mean CTR would have given.

    clicks, impressions  (..., users): counts before the experiment, of the users of all arms; 0 and 0 for those unseen
    Returns clicks - ctr * impressions (..., users), the ratio metric linearised as in its variance; its mean is 0.
    Raises ValueError for counts that cannot be.
    """
    clicks, impressions = np.asarray(clicks), np.asarray(impressions)
    _refuse(clicks, impressions, np.ones(1, dtype=bool), np.zeros(1))
    shown = impressions.sum(axis=-1, keepdims=True)
    return clicks - clicks.sum(axis=-1, keepdims=True) / np.where(shown > 0, shown, 1) * impressions


def lift(treatment: Arm, control: Arm, *, level: float = 0.95) -> Lift:
    """The difference of two arms' CTR and the relative lift, each with its interval by the delta method.

    treatment, control  of `arm_of`, of one shape. If both have a covariate, the difference is adjusted by it (CUPED;
                        Deng, Xu, Kohavi and Walker 2013): theta * (difference of its means) is taken off, an estimate
                        of zero since the arms were drawn at random. theta makes the difference's variance least [C]
    level               of both intervals, which are normal. In simulation one of 95 % covered 94.5 to 94.9 % with 270
                        effective users, (sum of impressions)**2 / sum of impressions**2; 94.1 to 94.5 % with 110
    Where there is no variance at all (no click in either arm) the difference is 0 with p_value 1.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        both_have = (treatment.covariate_variance > 0) & (control.covariate_variance > 0)
        best = (treatment.covariance + control.covariance) / (treatment.covariate_variance + control.covariate_variance)
        theta = np.where(both_have, best, 0)
        gap = theta * (treatment.covariate - control.covariate)
        share = treatment.users / (treatment.users + control.users)
        new, old = treatment.ctr - (1 - share) * gap, control.ctr + share * gap  # both as if at the common mean
        variance = _variance(treatment, 1, theta) + _variance(control, 1, theta)
        error = np.sqrt(np.maximum(variance, 0))
        # new / old by its gradient: the covariate enters both, through their common mean
        by_new, by_old = 1 / old, new / old**2
        by_mean = theta * ((1 - share) * by_new + share * by_old)
        of_relative = _variance(treatment, by_new, by_mean) + _variance(control, by_old, by_mean)
        difference = new - old
        p_value = 2 * norm.sf(np.where(difference == 0, 0 * error, np.abs(difference) / error))
        removed = 1 - variance / (treatment.variance + control.variance)
        relative = _normal(difference / old, np.sqrt(np.maximum(of_relative, 0)), level)
    return Lift(_normal(difference, error, level), relative, error, p_value, removed)


def guardrails(treatment: Arm, control: Arm, *, level: float = 0.95) -> Lift:
    """`lift` by group, with intervals that hold for all groups at once with the chance `level` or more (Bonferroni).

    treatment, control  (..., groups), of `arm_of` on clicks and impressions (..., groups, users): what each user had
                        inside that group, so that a user counts in several groups (cold intents and others) or in one
                        (a region)
    p_value is multiplied by groups, at most 1. Bonferroni and not Holm [C]: a guardrail is read by its interval's lower
    end, and Holm's tests have none. Groups may share users.
    Raises ValueError without a group axis.
    """
    if np.ndim(treatment.ctr) == 0:
        raise ValueError("the arms have no group axis; expected clicks and impressions of (..., groups, users)")
    groups = np.shape(treatment.ctr)[-1]
    each = lift(treatment, control, level=1 - (1 - level) / groups)
    return each._replace(p_value=np.minimum(each.p_value * groups, 1))


def _variance(arm: Arm, a, b) -> np.ndarray:  # of a * ctr - b * covariate
    return a**2 * arm.variance - 2 * a * b * arm.covariance + b**2 * arm.covariate_variance


def _normal(estimate: np.ndarray, error: np.ndarray, level: float) -> Interval:
    half = norm.ppf((1 + level) / 2) * error
    return Interval(estimate, estimate - half, estimate + half)


def _refuse(clicks, impressions, in_arm, covariate) -> None:
    named = {"clicks": clicks, "impressions": impressions, "in_arm": in_arm, "covariate": covariate}
    faults = [f"{name} is one number; expected (..., users)" for name, values in named.items() if not values.ndim]
    if clicks.shape != impressions.shape:
        faults.append(f"clicks and impressions have the shapes {clicks.shape} and {impressions.shape}; expected one")
    elif bad := int((~(clicks >= 0) | ~(clicks <= impressions) | ~np.isfinite(impressions)).sum()):
        faults.append(f"{bad} users break 0 <= clicks <= impressions < infinity (a user unseen has 0 and 0)")
    if in_arm.dtype != bool:
        faults.append(f"in_arm is {in_arm.dtype}; expected bool, such as arms == 'treatment'")
    if bad := int((~np.isfinite(covariate)).sum()):
        faults.append(f"covariate is not finite for {bad} users; 0 is pre_period_covariate's mean")
    try:
        np.broadcast_shapes(*(values.shape for values in named.values()))
    except ValueError:
        shapes = ", ".join(f"{name} {values.shape}" for name, values in named.items())
        faults.append(f"the shapes do not fit each other: {shapes}")
    if faults:
        raise ValueError("these users cannot be compared:\n  " + "\n  ".join(faults))


class Monitored(NamedTuple):
    """What always-valid inference says at each look, (..., looks), and where it could have stopped, (...)."""

    difference: Interval
    p_value: np.ndarray  # never rises
    first: np.ndarray  # the first look, from 0, whose interval excludes zero; -1 if none does


def always_valid(difference, standard_error, mixture: float, *, level: float = 0.95) -> Monitored:
    """Interval and p-value of a difference at every look, both valid at all looks at once: it may be stopped at any.

    The normal mixture of Robbins (1970): the mixture sequential probability ratio test of Johari, Pekelis and Walsh
    (2015; with Koomen 2022, "Always Valid Inference"), tuned as in Howard, Ramdas, McAuliffe and Sekhon (2021), and
    valid asymptotically (Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas 2021): let each arm have some hundreds of
    users before the first look. In simulated A/A experiments of 20 looks and very uneven users it rejected 1 to 2 %
    from 40 users of both arms at the first look on, but 6 to 8 % with 8 to 18. Users may come back at later looks.

    difference, standard_error  (..., looks): `lift` of all sums up to each look
    mixture   > 0, in units of the difference: the standard deviation of the differences that the test is tuned to. Any
              is valid if it is fixed before the experiment; `mixture_for` picks one
    With s = standard_error ** 2 and v = mixture ** 2, the likelihood ratio of a true difference drawn from N(d, v)
    against d itself is sqrt(s / (s + v)) exp(v (difference - d) ** 2 / (2 s (s + v))). If d is true it exceeds
    1 / (1 - level) at any look with a chance of at most 1 - level (Ville). A look without a standard error, or with 0
    (no click yet), has an infinite interval.
    Raises ValueError for shapes that differ or a mixture that is not above 0.
    """
    difference, standard_error = (np.asarray(values, dtype=np.float64) for values in (difference, standard_error))
    if difference.shape != standard_error.shape or not difference.ndim:
        shapes = f"{difference.shape} and {standard_error.shape}; expected one shape (..., looks)"
        raise ValueError(f"difference and standard_error have the shapes {shapes}")
    if not mixture > 0:
        raise ValueError(f"mixture is {mixture}; expected a number above 0, such as mixture_for gives")
    known = standard_error > 0
    s, v = np.where(known, standard_error, 1) ** 2, mixture**2
    evidence = v * difference**2 / (2 * s * (s + v)) - np.log1p(v / s) / 2  # log of the likelihood ratio at d = 0
    evidence = np.where(known, evidence, -np.inf)
    half = np.where(known, np.sqrt(s * (s + v) / v * (np.log1p(v / s) - 2 * np.log(1 - level))), np.inf)
    estimate = np.where(known, difference, 0)
    excludes = np.abs(estimate) > half
    first = np.where(excludes.any(axis=-1), excludes.argmax(axis=-1), -1)
    p_value = np.exp(-np.maximum(np.maximum.accumulate(evidence, axis=-1), 0))
    return Monitored(Interval(difference, estimate - half, estimate + half), p_value, first)


def mixture_for(standard_error: float, *, level: float = 0.95) -> float:
    """The mixture whose interval is narrowest where the difference has this standard error.

    standard_error  `planned_error` at the look that matters most, never the one measured in the experiment itself
    Exact, by Lambert's W (Howard et al. 2021).
    """
    return float(standard_error * np.sqrt(-lambertw(-((1 - level) ** 2) / np.e, -1).real - 1))


def rejected_by_look(p_values, *, alpha: float = 0.05, level: float = 0.95) -> Interval:
    """The share of experiments found significant at some look so far: the error rate of peeking, if they are A/A.

    p_values  (experiments, looks): of the fixed horizon (`lift`) or always valid
    Returns (looks,), with Wilson's interval of the share; each look includes those before. NaN never rejects.
    """
    p_values = np.asarray(p_values)
    rejected = np.maximum.accumulate(p_values < alpha, axis=-1)
    share, experiments, z = rejected.mean(axis=0), len(rejected), norm.ppf((1 + level) / 2)
    middle = (share + z**2 / (2 * experiments)) / (1 + z**2 / experiments)
    half = z * np.sqrt(share * (1 - share) / experiments + (z / (2 * experiments)) ** 2) / (1 + z**2 / experiments)
    return Interval(share, middle - half, middle + half)
