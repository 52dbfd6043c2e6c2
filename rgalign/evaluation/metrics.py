"""Ranking metrics in numpy, one function each; their definitions are METHOD.md 4.

padded  scores, clicked, shown, each (lists, candidates); `shown` is False where a list is padded, and the scores
        there do not matter. Returns (lists,), NaN where the metric is undefined.
flat    scores, clicked, groups, each (rows,), in any order: `gauc` and `group_auc` only.

A tied pair counts one half in AUC; the other metrics are the mean over all orders of the tied candidates, so the order
of the input never matters. All raise ValueError, naming every fault found, if shapes differ, a shown score is NaN,
clicked is not 0 or 1, or a candidate is clicked but not shown.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd

WEIGHTS = ("impressions", "clicks", "uniform")
_CHUNK_CELLS = 1 << 22  # cells compared at a time in the padded form: about 40 MB of temporaries


class Gauc(NamedTuple):
    """AUC inside each group, averaged: `value` (NaN if no group has one), over `groups` groups; `left_out` had none."""

    value: float
    groups: int
    left_out: int


def session_auc(scores, clicked, shown) -> np.ndarray:
    """AUC of each list: the share of its (clicked, not clicked) pairs ranked right. NaN without one of the two."""
    ranks = _ranks(scores, clicked, shown)
    # Twice the average rank from above, an integer, so that AUC is rounded once and a constant scorer has exactly 0.5.
    twice_rank = ranks.sum_by_list(2 * ranks.above + ranks.tied + 1)
    pairs = ranks.clicks * (ranks.shown - ranks.clicks)
    won = ranks.clicks * (2 * ranks.shown - ranks.clicks + 1) - twice_rank
    return won / np.where(pairs > 0, 2 * pairs, np.nan)


def recall_at(scores, clicked, shown, k: int) -> np.ndarray:
    """Recall@k of each list: the share of its clicked candidates that are among its k best. NaN without a click."""
    ranks = _ranks(scores, clicked, shown, k)
    inside = np.clip((k - ranks.above) / ranks.tied, 0, 1)
    return ranks.sum_by_list(inside) / np.where(ranks.clicks > 0, ranks.clicks, np.nan)


def ndcg_at(scores, clicked, shown, k: int) -> np.ndarray:
    """NDCG@k of each list: sum of 1 / log2(1 + rank) over its clicked candidates of rank <= k, as a share of the best
    sum possible (all clicked first). NaN without a click."""
    ranks = _ranks(scores, clicked, shown, k)
    k = min(k, np.shape(scores)[1])
    gain = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, k + 2)))])  # gain[n]: sum over the ranks 1..n
    upper, lower = np.minimum(ranks.above + ranks.tied, k), np.minimum(ranks.above, k)
    found = ranks.sum_by_list((gain[upper] - gain[lower]) / ranks.tied)
    return found / np.where(ranks.clicks > 0, gain[np.minimum(ranks.clicks, k)], np.nan)


def hit_at(scores, clicked, shown, k: int) -> np.ndarray:
    """Hit@k of each list: 1 if any clicked candidate is among its k best, else 0. NaN without a click.

    Only the best-scored clicked candidates and those tied with them matter: `clicked` of `tied`, after `above` others.
    All of the first k - above of these are not clicked with the hypergeometric probability
    C(tied - clicked, k - above) / C(tied, k - above).
    """
    best = _ranks(scores, clicked, shown, k).best()
    missed = np.ones(len(best.row))
    for drawn in range(min(k, np.shape(scores)[1])):
        left = np.maximum(best.tied - drawn, 1)
        missed *= np.where(drawn < k - best.above, np.maximum(left - best.clicked, 0) / left, 1)
    return np.where(best.clicks > 0, best.sum_by_list(1 - missed), np.nan)


def mrr(scores, clicked, shown) -> np.ndarray:
    """Reciprocal rank of each list: 1 / rank of its first clicked candidate. NaN without a click.

    Tied: the first of `clicked` among `tied` after `above` others is the j-th with probability
    p(1) = clicked / tied, p(j + 1) = p(j) (tied - j - clicked + 1) / (tied - j); the value is sum p(j) / (above + j).
    """
    best = _ranks(scores, clicked, shown).best()
    probability = best.clicked / best.tied
    reciprocal = probability / (best.above + 1)
    for j in range(1, int((best.tied - best.clicked).max(initial=0)) + 1):
        left = np.maximum(best.tied - j, 1)
        probability = probability * np.maximum(left - best.clicked + 1, 0) / left * (best.tied > j)
        reciprocal += probability / (best.above + j + 1)
    return np.where(best.clicks > 0, best.sum_by_list(reciprocal), np.nan)


def gauc_of_lists(scores, clicked, shown, weights: str = "impressions") -> Gauc:
    auc = session_auc(scores, clicked, shown)
    return average_auc(auc, group_weights(weights, np.sum(shown, axis=1), np.sum(clicked, axis=1)))


def gauc(scores, clicked, groups, weights: str = "impressions") -> Gauc:
    """AUC inside each group, averaged with weights; groups without both classes are left out and counted.

    groups   (rows,), the list's or the user's id: integers, strings or dates
    weights  a group's weight: "impressions" (its rows), "clicks" or "uniform" (1)
    """
    auc, impressions, clicks = group_auc(scores, clicked, groups)
    return average_auc(auc, group_weights(weights, impressions, clicks))


def group_auc(scores, clicked, groups) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """AUC (NaN without both classes), impressions and clicks of each group, each (groups,) in the order of the ids."""
    scores, clicked, groups = _one_shape("(rows,)", 1, scores=scores, clicked=clicked, groups=groups)
    missing = int((groups != groups).sum()) if groups.dtype.kind in "fmM" else 0
    clicked = _clicked(scores, clicked, True, [f"groups is missing in {missing} rows"] if missing else [])
    for group in pd.unique(groups) if groups.dtype == object else ():
        if not isinstance(group, (str, bytes, int, np.integer)):
            raise ValueError(f"groups has missing values or ids that are no string or integer, such as {group!r}")
    rank = pd.Series(scores).groupby(groups).rank()  # from the lowest; of tied ones the mean, so its double is whole
    table = pd.DataFrame({"rows": 1, "clicks": clicked.astype(int), "twice_rank": np.where(clicked, 2 * rank, 0)})
    impressions, clicks, twice_rank = table.groupby(groups).sum().to_numpy().T
    pairs = clicks * (impressions - clicks)
    auc = (twice_rank - clicks * (clicks + 1)) / np.where(pairs > 0, 2 * pairs, np.nan)
    return auc, impressions.astype(int), clicks.astype(int)


def group_weights(weights: str, impressions: np.ndarray, clicks: np.ndarray) -> np.ndarray:
    if weights not in WEIGHTS:
        raise ValueError(f"weights is {weights!r}; expected one of {', '.join(WEIGHTS)}")
    chosen = {"impressions": impressions, "clicks": clicks, "uniform": np.ones(len(impressions))}
    return np.asarray(chosen[weights], dtype=np.float64)


def average_auc(auc: np.ndarray, weights: np.ndarray) -> Gauc:
    """The mean of the AUCs (groups,) that are not NaN, weighted; value NaN, not an error, if none is left."""
    has_both = ~np.isnan(auc)
    total = weights[has_both].sum()
    value = float(auc[has_both] @ weights[has_both] / total) if total > 0 else float("nan")
    return Gauc(value, int(has_both.sum()), int((~has_both).sum()))


def relative_error_reduction(new: float, old: float) -> float:
    """1 - (1 - new) / (1 - old): the share of the old model's error (1 - GAUC) that is gone; NaN if it made none."""
    return 1 - (1 - new) / (1 - old) if old != 1 else float("nan")


def relative_gain(new: float, old: float) -> float:
    """new / old - 1; NaN if old is 0."""
    return new / old - 1 if old != 0 else float("nan")


def gap_closed(model: float, floor: float, oracle: float) -> float:
    """(model - floor) / (oracle - floor): 0 at the floor, 1 at the oracle; NaN if these do not differ."""
    return (model - floor) / (oracle - floor) if oracle != floor else float("nan")


class Metric(NamedTuple):
    """How a metric is computed from scores, and where it is shown.

    label      how reports, figures and `compare` call it; empty: it is in the tables of a run, and nowhere else
    of_lists   (scores, clicked, shown) -> (lists,), NaN where undefined; None: not made from these alone (judge.py)
    over_kb    the lists are the whole knowledge base instead of what was shown
    in_study   studies of many runs have it too
    relative   (new, old) -> the relative difference
    """

    label: str = ""
    of_lists: Callable[..., np.ndarray] | None = None
    over_kb: bool = False
    in_study: bool = False
    relative: Callable[[float, float], float] = relative_gain


# Every metric of a run's tables, in the order in which readers see them: a new one is a function and an entry here.
METRICS = {
    "gauc": Metric("GAUC", session_auc, in_study=True, relative=relative_error_reduction),
    "recall@3": Metric("Recall@3", partial(recall_at, k=3), in_study=True),
    "ndcg@3": Metric("NDCG@3", partial(ndcg_at, k=3), in_study=True),
    "mrr": Metric("MRR", mrr),
    "hit@3": Metric("", partial(hit_at, k=3)),
    "recall@3/kb": Metric("Recall@3, whole KB", partial(recall_at, k=3), over_kb=True),
    "ndcg@3/kb": Metric("", partial(ndcg_at, k=3), over_kb=True),
    "mrr/kb": Metric("", mrr, over_kb=True),
    "hit@3/kb": Metric("", partial(hit_at, k=3), over_kb=True),
    "ctr@3/kb": Metric("CTR@3, whole KB, debiased", in_study=True),
    "ihr@1": Metric("IHR@1", in_study=True),
    "ihr@3": Metric("IHR@3", in_study=True),
}
LABELS = {name: metric.label for name, metric in METRICS.items() if metric.label}


class _Ranks(NamedTuple):
    """Where the clicked candidates stand: the first four (clicked candidates,), lists in order; the others (lists,)."""

    row: np.ndarray  # its list
    above: np.ndarray  # shown candidates scored higher
    tied: np.ndarray  # shown candidates scored the same, itself included
    clicked: np.ndarray  # clicked ones among the tied, itself included
    clicks: np.ndarray  # clicked candidates of each list
    shown: np.ndarray  # all candidates of each list

    def sum_by_list(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self.row, values, minlength=len(self.clicks))

    def best(self) -> "_Ranks":
        """Of each list with a click, the highest-scored clicked candidate alone."""
        order = np.lexsort((self.above, self.row))
        first = order[np.diff(self.row[order], prepend=-1) > 0]
        return _Ranks(*(values[first] for values in self[:4]), self.clicks, self.shown)


def _ranks(scores, clicked, shown, k: int = 1) -> _Ranks:
    """Compares each clicked candidate with its list: clicks are few, so this is cheaper than sorting the lists."""
    scores, clicked, shown = _one_shape("(lists, candidates)", 2, scores=scores, clicked=clicked, shown=shown)
    hidden = int(((clicked == 1) & (shown == 0)).sum())
    faults = [f"{hidden} candidates are clicked but not shown"] if hidden else []
    faults += [f"k is {k!r}; expected a whole number >= 1"] if int(k) != k or k < 1 else []
    shown = shown.astype(bool)
    clicked = _clicked(scores, clicked, shown, faults)
    row, column = np.nonzero(clicked)
    step = max(1, _CHUNK_CELLS // max(1, scores.shape[1]))
    counts = np.empty((3, len(row)), dtype=np.int64)
    for begin in range(0, len(row), step):
        part = slice(begin, begin + step)
        own, others, present = scores[row[part], column[part], None], scores[row[part]], shown[row[part]]
        same = (others == own) & present
        counts[0, part] = ((others > own) & present).sum(axis=1)
        counts[1, part] = same.sum(axis=1)
        counts[2, part] = (same & clicked[row[part]]).sum(axis=1)
    return _Ranks(row, *counts, clicked.sum(axis=1), shown.sum(axis=1))


def _one_shape(form: str, axes: int, **given) -> list[np.ndarray]:
    arrays = [np.asarray(values) for values in given.values()]
    shapes = [array.shape for array in arrays]
    if len(set(shapes)) > 1 or len(shapes[0]) != axes:
        raise ValueError(f"{', '.join(given)} have the shapes {', '.join(map(str, shapes))}; expected one shape {form}")
    return arrays


def _clicked(scores: np.ndarray, clicked: np.ndarray, shown: np.ndarray | bool, more: list[str]) -> np.ndarray:
    """`clicked` as bool; raises ValueError with what is wrong with it, with the scores, and `more`."""
    faults = []
    if (broken := np.isnan(scores) & shown).any():
        first = tuple(int(i) for i in np.argwhere(broken)[0])
        faults.append(f"scores is NaN for {int(broken.sum())} shown candidates (first: {first})")
    if clicked.dtype != bool and (bad := int(((clicked != 0) & (clicked != 1)).sum())):
        faults.append(f"clicked is neither 0 nor 1 in {bad} places")
    if faults := faults + more:
        raise ValueError("these scores cannot be judged:\n  " + "\n  ".join(faults))
    return clicked.astype(bool)
