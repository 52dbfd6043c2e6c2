"""How sure a ranker is of a session, whether it is right to be, and what the sessions that it is sure of bring."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.special import softmax

from rgalign.evaluation.bootstrap import over_users

BEST = 3  # intents that are shown
SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def confidence(scores: np.ndarray) -> np.ndarray:
    """(sessions,) 0..1: how much of the softmax of a session's scores its three best intents have [C].

    scores  (sessions, intents) of a ranker over the knowledge base, -inf for what does not exist
    1 where three intents or fewer exist, NaN where none does. It is not calibrated: it orders sessions. Raises
    ValueError for another shape, NaN and +inf.
    """
    scores = np.asarray(scores, dtype=np.float64)
    wrong = int((np.isnan(scores) | np.isposinf(scores)).sum())
    if scores.ndim != 2 or wrong:
        raise ValueError(f"scores has the shape {scores.shape} and {wrong} NaN or inf; expected (sessions, intents)")
    nothing = np.isneginf(scores).all(axis=1)
    share = np.sort(softmax(np.where(nothing[:, None], 0, scores), axis=1), axis=1)[:, -BEST:].sum(axis=1)
    return np.where(nothing, np.nan, share.clip(max=1))


def served_first(
    sure: np.ndarray, ctr: np.ndarray, users: np.ndarray, *, seed: int, shares: Sequence[float] = SHARES,
    replicates: int = 1000
) -> pd.DataFrame:  # fmt: skip
    """CTR@3 where only the most confident sessions are served: one row a share of the sessions.

    sure   (sessions,) confidence; equal ones in the order given
    ctr    (sessions,) of each session, of which the mean counts: true, or off_policy.session_values
    users  (sessions,) sampled again for the interval; who is served stays as it is
    Columns: share, sessions, least (the confidence of the last one served), ctr, low, high. Raises ValueError for a
    share outside (0, 1] and for arrays of different length.
    """
    sure, ctr, users = map(np.asarray, (sure, ctr, users))
    if not len(sure) == len(ctr) == len(users) > 0:
        raise ValueError(f"{len(sure)} confidences, {len(ctr)} values, {len(users)} users; expected as many, above 0")
    if wrong := [share for share in shares if not 0 < share <= 1]:
        raise ValueError(f"shares holds {wrong}; expected shares of the sessions, above 0 and at most 1")
    order = np.argsort(-sure, kind="stable")
    counts = [max(1, round(share * len(sure))) for share in shares]
    served = np.zeros((len(counts), len(sure)))
    for row, count in zip(served, counts, strict=True):
        row[order[:count]] = 1
    found = over_users(np.broadcast_to(ctr, served.shape), served, users, seed=seed, replicates=replicates)
    columns = {"share": list(shares), "sessions": counts, "least": sure[order[np.array(counts) - 1]]}
    return pd.DataFrame(columns | {"ctr": found.estimate, "low": found.low, "high": found.high})


def reliability(predicted: np.ndarray, observed: np.ndarray, *, bins: int = 10) -> pd.DataFrame:
    """What was observed, by what was predicted: one row a bin of equal width.

    predicted  (rows,) 0..1; a row where it is NaN is left out;  observed  (rows,) 0 or 1, or the true probability
    Columns: low, high, lists (rows in the bin), confidence, hit (means of predicted and observed; NaN of none), as
    judge_reward.expected_calibration_error reads them.
    """
    predicted, observed = np.asarray(predicted, dtype=float), np.asarray(observed, dtype=float)
    predicted, observed = predicted[known := ~np.isnan(predicted)], observed[known]
    place = np.minimum((predicted * bins).astype(int), bins - 1)
    edges, count = np.linspace(0, 1, bins + 1), np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(place, values, minlength=bins) / count for values in (predicted, observed)]
    columns = {"low": edges[:-1], "high": edges[1:], "lists": count, "confidence": means[0], "hit": means[1]}
    return pd.DataFrame(columns)
