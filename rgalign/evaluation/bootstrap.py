"""Intervals for the difference of two models on the same sessions (METHOD.md 4).

Inside one run users are drawn anew, since the sessions of one user are alike; for a claim about the method the unit
is the world. The statistic that is resampled is the one reported: a mean of session metrics, with GAUC's weights.
"""

from math import sqrt
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

_CHUNK_CELLS = 1 << 22  # (replicates, users) drawn at a time: about 64 MB


class Interval(NamedTuple):
    """An estimate with the ends of its interval: floats, or arrays of one shape."""

    estimate: float | np.ndarray
    low: float | np.ndarray
    high: float | np.ndarray


def over_users(differences, weights, users, *, seed: int, replicates: int = 1000, level: float = 0.95) -> Interval:
    """Percentile interval of weighted means of paired differences, users drawn with replacement.

    differences  (..., sessions): one model's session metric minus the other's, averaged over ranker seeds first; NaN
                 where the metric is undefined, which leaves the session out of that mean
    weights      (..., sessions) or (sessions,): GAUC's weight of each session, for other metrics 1; 0 outside a slice
    users        (sessions,), of any type
    Returns arrays of the leading shape (...). All means share the same draws, so one call for many of them is much
    cheaper than many calls. A mean without any weight is NaN.
    """
    differences = np.asarray(differences, dtype=np.float64)
    weights = np.broadcast_to(np.asarray(weights, dtype=np.float64), differences.shape)
    shape = differences.shape[:-1]
    user = _user_rows(users, differences.shape[-1])
    if not len(user):
        return Interval(*(np.full(shape, np.nan) for _ in Interval._fields))
    sums = _user_sums(np.where(np.isnan(differences), 0, differences * weights), user)
    totals = _user_sums(np.where(np.isnan(differences), 0, weights), user)
    drawn = [(count @ sums.T, count @ totals.T) for count in _draws(len(sums.T), replicates, seed)]
    top, bottom = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    means = _ratio(top, bottom).reshape(replicates, *shape)
    return _percentiles(_ratio(sums.sum(axis=-1), totals.sum(axis=-1)).reshape(shape), means, level)


def over_seeds_and_users(
    differences, weights, users, *, seed: int, replicates: int = 1000, level: float = 0.95
) -> Interval:
    """As `over_users` for one mean, but ranker seeds are drawn with replacement too, so that training's noise counts.

    differences  (seeds, sessions), the k-th seed of one model against the k-th of the other
    With few seeds it is still too narrow: drawing n seeds anew shows (n - 1) / n of their variance.
    """
    differences = np.asarray(differences, dtype=np.float64)
    user = _user_rows(users, differences.shape[-1])
    undefined = np.isnan(differences).any(axis=0)
    weights = np.where(undefined, 0, np.asarray(weights, dtype=np.float64))
    sums = _user_sums(np.where(undefined, 0, differences) * weights, user)
    totals = _user_sums(weights[None], user)[0]
    seeds = len(sums)
    picked = np.random.default_rng([seed, 1]).multinomial(seeds, np.full(seeds, 1 / seeds), size=replicates) / seeds
    drawn = [(count @ sums.T, count @ totals) for count in _draws(len(totals), replicates, seed)]
    top, bottom = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    means = _ratio((top * picked).sum(axis=1), bottom)
    return Interval(*map(float, _percentiles(_ratio(sums.mean(axis=0).sum(), totals.sum()), means, level)))


def over_worlds(world_means, *, level: float = 0.95) -> Interval:
    """Student's t interval of the mean over worlds; world_means (worlds,), each averaged over its seeds.

    Raises ValueError for fewer than two worlds: one world says nothing about another.
    """
    values = np.asarray(world_means, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2 or np.isnan(values).any():
        raise ValueError(
            f"world_means has the shape {values.shape} and {int(np.isnan(values).sum())} NaN; expected one number a "
            "world, of two worlds or more: run another world, or take over_users for one run"
        )
    mean = float(values.mean())
    half = float(student.ppf((1 + level) / 2, len(values) - 1)) * float(values.std(ddof=1)) / sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def _user_rows(users, sessions: int) -> np.ndarray:
    users = np.asarray(users)
    if users.shape != (sessions,):
        raise ValueError(f"users has the shape {users.shape}; expected {(sessions,)}, one a session")
    return np.unique(users, return_inverse=True)[1]


def _user_sums(values: np.ndarray, user: np.ndarray) -> np.ndarray:
    """(..., sessions) summed by user: (means, users)."""
    flat = values.reshape(-1, values.shape[-1])
    users = int(user.max(initial=-1)) + 1
    return np.array([np.bincount(user, row, minlength=users) for row in flat]).reshape(len(flat), users)


def _draws(users: int, replicates: int, seed: int):
    """How often each user was drawn, (some replicates, users) at a time."""
    rng = np.random.default_rng(seed)
    step = max(1, _CHUNK_CELLS // max(1, users))
    for begin in range(0, replicates, step):
        rows = min(step, replicates - begin)
        drawn = rng.integers(users, size=(rows, users)) + users * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * users).reshape(rows, users).astype(np.float64)


def _ratio(top, bottom):
    return np.divide(top, bottom, out=np.full(np.shape(bottom), np.nan), where=np.asarray(bottom) > 0)


def _percentiles(estimate, means: np.ndarray, level: float) -> Interval:
    """Replicates (replicates, ...) in which no user of a small slice was drawn are undefined and left out."""
    undefined = np.isnan(means).all(axis=0)
    ends = np.nanquantile(np.where(undefined, 0, means), [(1 - level) / 2, (1 + level) / 2], axis=0)
    low, high = np.where(undefined, np.nan, ends)
    return Interval(estimate[()], low[()], high[()])
