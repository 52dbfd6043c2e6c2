"""What is settled before an online experiment: who is in which arm, how many users it takes; and did the split hold.

[C] throughout: the paper names an online test and no more.
"""

from collections.abc import Sequence
from hashlib import sha256
from typing import NamedTuple

import numpy as np
from scipy.stats import chi2, norm

_SHOWN_FAULTS = 3


class SampleRatio(NamedTuple):
    """Chi-square of the users counted against the shares planned; arrays of the leading shape."""

    statistic: np.ndarray
    p_value: np.ndarray
    alarm: np.ndarray  # True: the split is not the one planned, and no figure of this experiment can be trusted


def assign(user_ids, arms: Sequence[str], salt: str, shares: Sequence[float] | None = None) -> np.ndarray:
    """The arm of each user, (users,) of str: the same on every machine and in every run, another for another salt.

    user_ids  (users,), strings or integers; 7 and "7" are one user, repeated ids are welcome
    arms      names of the arms
    salt      names the experiment; two experiments of one salt would share their arms
    shares    of the users for each arm, in sum 1; None: equal
    The first 53 bits of SHA-256 of "salt:user_id", as a number in [0, 1), decide: any service can repeat that.
    Raises ValueError, naming every fault found.
    """
    arms = list(arms)
    shares = _equal(len(arms)) if shares is None else np.asarray(shares, dtype=np.float64)
    user_ids = np.asarray(user_ids, dtype=object).tolist()  # by itself numpy would make ["a", nan] the strings a, nan
    faults = _share_faults(shares, len(arms), "arms")
    if repeated := sorted({name for name in arms if arms.count(name) > 1}):
        faults.append(f"arms has {', '.join(repeated)} more than once")
    if not salt:
        faults.append("salt is empty; give each experiment a name of its own, or all will split users alike")
    # A column of integers with a gap becomes floats in pandas, and "7.0" is another user than "7": refused.
    strange = [user for user in user_ids if isinstance(user, bool) or not isinstance(user, str | int | np.integer)]
    if strange:
        first = ", ".join(map(repr, strange[:_SHOWN_FAULTS]))
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
    shares = _equal(users.shape[-1]) if shares is None else np.asarray(shares, dtype=np.float64)
    if faults := _share_faults(shares, users.shape[-1], "users"):
        raise ValueError("the split cannot be judged:\n  " + "\n  ".join(faults))
    planned = users.sum(axis=-1, keepdims=True) * shares
    with np.errstate(invalid="ignore"):
        statistic = ((users - planned) ** 2 / planned).sum(axis=-1)
    p_value = chi2.sf(statistic, users.shape[-1] - 1)
    return SampleRatio(statistic, p_value, p_value < alarm)


def planned_error(users, user_variance, *, share=0.5, variance_removed=0.0) -> np.ndarray:
    """Standard error that the difference of two arms' CTR will have; the arguments broadcast.

    users             of both arms together
    user_variance     the variance one user brings, as measured before: users * variance of `ab_test.arm_of`, taken to
                      be the same in both arms
    share             treatment's share of the users
    variance_removed  by CUPED (`ab_test.lift`); 0 without
    Raises ValueError, naming every fault found, for figures that cannot be.
    """
    named = {"users": users, "user_variance": user_variance, "share": share, "variance_removed": variance_removed}
    users, user_variance, share, variance_removed = (np.asarray(values, dtype=np.float64) for values in named.values())
    faults = []
    if not ((users > 0).all() and (user_variance > 0).all()):
        faults.append("users and user_variance must be above 0")
    if not ((share > 0) & (share < 1)).all():
        faults.append(f"share is {named['share']}; expected treatment's share, between 0 and 1")
    if not (variance_removed < 1).all():
        faults.append(f"variance_removed is {named['variance_removed']}; expected a share below 1")
    if faults:
        raise ValueError("nothing can be planned from this:\n  " + "\n  ".join(faults))
    return np.sqrt(user_variance * (1 - variance_removed) / (share * (1 - share) * users))


def power_of(relative_lift, users, ctr: float, user_variance, *, alpha: float = 0.05, **plan) -> np.ndarray:
    """The chance that the two-sided test of `ab_test.lift` at alpha finds a lift of this size; the arguments broadcast.

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

    A find in the wrong direction is not counted, so it is never too few: too many by none at a power of a half or more.
    Raises ValueError for a lift of 0, and as `planned_error` does.
    """
    effect = np.abs(np.asarray(relative_lift) * ctr)
    if not (effect > 0).all():
        raise ValueError(f"relative_lift is {relative_lift} and ctr {ctr}: no number of users finds a lift of 0")
    wanted = effect / (norm.isf(alpha / 2) + norm.ppf(power))
    return np.ceil((planned_error(1, user_variance, **plan) / wanted) ** 2).astype(np.int64)


def _equal(arms: int) -> np.ndarray:
    return np.full(arms, 1 / max(arms, 1))


def _share_faults(shares: np.ndarray, arms: int, name: str) -> list[str]:
    if arms < 2:
        return [f"{name} has {arms}; an experiment takes two arms or more"]
    if shares.shape != (arms,):
        return [f"shares has the shape {shares.shape}; expected {(arms,)}, one for each of {name}"]
    faults = []
    if not (shares > 0).all():
        faults.append(f"shares has {shares[~(shares > 0)].tolist()}; each must be above 0")
    if not np.isclose(shares.sum(), 1, rtol=0, atol=1e-9):
        faults.append(f"shares sum to {shares.sum():.6g}; expected 1")
    return faults
