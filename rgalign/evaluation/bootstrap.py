"""Intervals for the difference of two models on the same sessions (METHOD.md 4).

Inside one run users are sampled with replacement, since the sessions of one user are alike; for a claim about the
method the unit is the world. The statistic that is resampled is the one reported: a mean of session metrics, with
GAUC's weights, or a ratio of two such means.
"""

from math import sqrt
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr, ndtri, stdtr, stdtrit

LEVEL = 0.95  # of an interval
_CHUNK_CELLS = 1 << 22  # (replicates, users) drawn at a time: about 64 MB


class Interval(NamedTuple):
    """An estimate with the ends of its interval: floats, or arrays of one shape."""

    estimate: float | np.ndarray
    low: float | np.ndarray
    high: float | np.ndarray


class Tested(NamedTuple):
    """An estimate with the ends of its interval, and the two-sided p-value of its being zero."""

    estimate: float
    low: float
    high: float
    p: float


def over_users(
    differences, weights, users, *, per=None, seed: int, replicates: int = 1000, level: float = LEVEL
) -> Interval:
    """Percentile interval of weighted means of paired differences, users drawn with replacement.

    differences  (..., sessions): one model's session metric minus the other's, averaged over ranker seeds first; NaN
                 where the metric is undefined, which leaves the session out of that mean
    weights      (..., sessions) or (sessions,): GAUC's weight of each session, for other metrics 1; 0 outside a slice
    users        (sessions,), of any type
    per          (..., sessions): what the difference is relative to, such as the old model's error. The estimate is
                 then the ratio of the two weighted means, computed again in each replicate: an interval of its own
    Returns arrays of the leading shape (...); all means share the same draws. A mean without any weight is NaN.
    """
    differences = np.asarray(differences, dtype=np.float64)
    weights = np.broadcast_to(np.asarray(weights, dtype=np.float64), differences.shape)
    shape = differences.shape[:-1]
    if not differences.shape[-1]:
        return Interval(*(np.full(shape, np.nan) for _ in Interval._fields))
    counted = weights if per is None else weights * np.broadcast_to(np.asarray(per, dtype=np.float64), weights.shape)
    defined = ~np.isnan(differences)
    sums = _by_user(np.where(defined, differences * weights, 0), users)
    totals = _by_user(np.where(defined, counted, 0), users)
    top, bottom = _resampled(sums, totals, replicates, seed)
    means = _ratio(top, bottom).reshape(replicates, *shape)
    return _percentiles(_ratio(sums.sum(axis=-1), totals.sum(axis=-1)).reshape(shape), means, level)


def over_seeds_and_users(differences, weights, users, *, seed: int, replicates: int = 1000) -> Interval:
    """As `over_users` for one mean, but ranker seeds are drawn with replacement too, so that training's noise counts.

    differences  (seeds, sessions), the k-th seed of one model against the k-th of the other
    With few seeds it is still too narrow: sampling n seeds again shows (n - 1) / n of their variance.
    """
    differences = np.asarray(differences, dtype=np.float64)
    undefined = np.isnan(differences).any(axis=0)
    weights = np.where(undefined, 0, np.asarray(weights, dtype=np.float64))
    sums = _by_user(np.where(undefined, 0, differences) * weights, users)
    totals = _by_user(weights, users)[0]
    seeds = len(sums)
    picked = np.random.default_rng([seed, 1]).multinomial(seeds, np.full(seeds, 1 / seeds), size=replicates) / seeds
    top, bottom = _resampled(sums, totals, replicates, seed)
    means = _ratio((top * picked).sum(axis=1), bottom)
    return Interval(*map(float, _percentiles(_ratio(sums.mean(axis=0).sum(), totals.sum()), means, LEVEL)))


def over_worlds(world_means, standard_errors=None, *, level: float = LEVEL) -> Tested:
    """The mean over worlds, its t interval and p-value, with the sampling error inside the worlds as a floor.

    world_means      (worlds,), each averaged over its LM and ranker seeds
    standard_errors  (worlds,), the sampling error of each world's mean (`standard_error` of its interval over users).
                     None, or NaN in any world: not known, so there is no floor, and the interval is Student's

    With s^2 the variance of the world means and v_w the squared sampling errors, the variance of the mean is
    max(s^2 / W, sum(v_w) / W^2), on W - 1 degrees of freedom: Hartung and Knapp's interval with max(1, q) (Roever et
    al. 2015, BMC Medical Research Methodology 15:99) at equal weights, q = s^2 / mean(v_w). A few worlds can agree by
    luck more closely than the sessions of one world allow: hence the floor. [C] Equal weights: worlds are exchangeable;
    inverse-variance weights would let a world count more because its sampling error was *estimated* small.
    Raises ValueError for fewer than two worlds.
    """
    values = np.asarray(world_means, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2 or np.isnan(values).any():
        raise ValueError(
            f"world_means has the shape {values.shape} and {int(np.isnan(values).sum())} NaN; expected one number a "
            "world, of two worlds or more: run another world, or take over_users for one run"
        )
    errors = np.full(len(values), np.nan) if standard_errors is None else np.asarray(standard_errors, dtype=np.float64)
    if errors.shape != values.shape or (errors < 0).any():
        raise ValueError(
            f"standard_errors has the shape {errors.shape} and {int((errors < 0).sum())} negative; expected "
            f"{values.shape}, one a world, NaN where it is not known"
        )
    mean, free = float(values.mean()), len(values) - 1
    between = float(values.var(ddof=1)) / len(values)
    error = sqrt(max(between, sampling_error(errors) ** 2)) if np.isfinite(errors).all() else sqrt(between)
    half = float(stdtrit(free, (1 + level) / 2)) * error
    return Tested(mean, mean - half, mean + half, _p_value(mean, error, lambda z: stdtr(free, z)))


def sampling_error(standard_errors) -> float:
    """The standard error that the sessions alone give an equal-weight mean over worlds; NaN if one is not known."""
    errors = np.asarray(standard_errors, dtype=np.float64)
    return float(np.sqrt((errors**2).sum())) / len(errors)


def standard_error(low, high, *, level: float = LEVEL):
    """The standard error of an estimate from its interval, if its distribution is normal: its width / 3.92 at 95 % [C].

    Tables keep intervals, not replicates; over a thousand users the bootstrap's distribution is near normal.
    """
    return (np.asarray(high, dtype=np.float64) - low) / (2 * ndtri((1 + level) / 2))


def p_over_users(estimate: float, low: float, high: float, *, level: float = LEVEL) -> float:
    """Two-sided p-value of a difference inside one run, from its interval over users as if normal [C].

    A share of replicates could not be adjusted for many comparisons: of 1,000 none is smaller than 1 / 1,000.
    """
    return _p_value(float(estimate), float(standard_error(low, high, level=level)), ndtr)


def _p_value(estimate: float, error: float, below) -> float:
    """Two-sided, `below` being the distribution function of estimate / error; 1 where there is no spread."""
    if np.isnan(estimate) or np.isnan(error):
        return float("nan")
    return float(2 * below(-abs(estimate) / error)) if error > 0 else 1.0


def _by_user(values: np.ndarray, users) -> np.ndarray:
    """(..., sessions) summed by user: (means, users)."""
    sessions = values.shape[-1]
    if np.shape(users) != (sessions,):
        raise ValueError(f"users has the shape {np.shape(users)}; expected {(sessions,)}, one a session")
    user = np.unique(users, return_inverse=True)[1]
    return np.array([np.bincount(user, row) for row in values.reshape(-1, sessions)])


def _resampled(sums: np.ndarray, totals: np.ndarray, replicates: int, seed: int) -> list[np.ndarray]:
    """Both summed over the users of each replicate, drawn with replacement: (replicates, means)."""
    users, rng = sums.shape[-1], np.random.default_rng(seed)
    step = max(1, _CHUNK_CELLS // max(1, users))
    found = []
    for begin in range(0, replicates, step):
        rows = min(step, replicates - begin)
        drawn = rng.integers(users, size=(rows, users)) + users * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * users).reshape(rows, users).astype(np.float64)
        found.append((times @ sums.T, times @ totals.T))
    return [np.concatenate(parts) for parts in zip(*found, strict=True)]


def _ratio(top, bottom):
    return np.divide(top, bottom, out=np.full(np.shape(bottom), np.nan), where=np.asarray(bottom) > 0)


def _percentiles(estimate, means: np.ndarray, level: float) -> Interval:
    """Replicates (replicates, ...) in which no user of a small slice was drawn are undefined and left out."""
    undefined = np.isnan(means).all(axis=0)
    ends = np.nanquantile(np.where(undefined, 0, means), [(1 - level) / 2, (1 + level) / 2], axis=0)
    low, high = np.where(undefined, np.nan, ends)
    return Interval(estimate[()], low[()], high[()])
