"""Ranking metrics in pure numpy, one function each; their definitions are METHOD.md 4.

Two forms of input:

padded  scores, clicked, shown, each (lists, candidates); `shown` is False where a list is padded, and the scores
        there do not matter. A metric a list comes back: (lists,), NaN where it is undefined.
flat    scores, clicked, groups, each (rows,), in any order: `gauc` only.

Ties: a tied pair counts one half in AUC; the other metrics are the expected value over all orders of the tied
candidates, so the order of the input never matters and a constant scorer gets what a random order would get.
All functions raise ValueError, naming every fault found, if shapes differ, a shown score is NaN, clicked is not 0 or
1, or a candidate is clicked but not shown.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

WEIGHTS = ("impressions", "clicks", "uniform")
_CHUNK_CELLS = 1 << 22  # cells compared at a time in the padded form: about 40 MB of temporaries


class Gauc(NamedTuple):
    """AUC inside each group, averaged: `value` (NaN if no group has one), over `groups` groups; `left_out` had none."""

    value: float
    groups: int
    left_out: int


def session_auc(scores, clicked, shown) -> np.ndarray:
    """AUC of each list: the share of its (clicked, not clicked) pairs ranked right. NaN without one of the two."""
    scores, clicked, shown = _padded(scores, clicked, shown)
    rank = _rank_clicked(scores, clicked, shown)
    clicks, size = clicked.sum(axis=1), shown.sum(axis=1)
    # Twice the average rank from above, an integer, so that AUC is rounded once and a constant scorer has exactly 0.5.
    twice_rank = np.bincount(rank.row, 2 * rank.above + rank.tied + 1, minlength=len(scores))
    pairs = clicks * (size - clicks)
    with np.errstate(invalid="ignore", divide="ignore"):
        auc = (clicks * (2 * size - clicks + 1) - twice_rank) / (2 * pairs)
    return np.where(pairs > 0, auc, np.nan)


def recall_at(scores, clicked, shown, k: int) -> np.ndarray:
    """Recall@k of each list: the share of its clicked candidates that are among its k best. NaN without a click."""
    scores, clicked, shown = _padded(scores, clicked, shown, k)
    rank = _rank_clicked(scores, clicked, shown)
    inside = np.clip((k - rank.above) / rank.tied, 0, 1)
    return _divide(np.bincount(rank.row, inside, minlength=len(scores)), clicked.sum(axis=1))


def ndcg_at(scores, clicked, shown, k: int) -> np.ndarray:
    """NDCG@k of each list: sum of 1 / log2(1 + rank) over its clicked candidates of rank <= k, as a share of the best
    sum possible (all clicked first). NaN without a click."""
    scores, clicked, shown = _padded(scores, clicked, shown, k)
    rank = _rank_clicked(scores, clicked, shown)
    k = min(k, scores.shape[1])
    gain = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, k + 2)))])  # gain[n]: sum over the ranks 1..n
    upper, lower = np.minimum(rank.above + rank.tied, k), np.minimum(rank.above, k)
    found = np.bincount(rank.row, (gain[upper] - gain[lower]) / rank.tied, minlength=len(scores))
    return _divide(found, gain[np.minimum(clicked.sum(axis=1), k)])


def hit_at(scores, clicked, shown, k: int) -> np.ndarray:
    """Hit@k of each list: 1 if any clicked candidate is among its k best, else 0. NaN without a click.

    Only the best-scored clicked candidates and those tied with them matter: `clicked` of `tied`, after `above` others.
    All of the first k - above of these are not clicked with the hypergeometric probability
    C(tied - clicked, k - above) / C(tied, k - above).
    """
    scores, clicked, shown = _padded(scores, clicked, shown, k)
    best = _best(_rank_clicked(scores, clicked, shown))
    missed = np.ones(len(best.row))
    for drawn in range(min(k, scores.shape[1])):
        left = np.maximum(best.tied - drawn, 1)
        missed *= np.where(drawn < k - best.above, np.maximum(left - best.clicked, 0) / left, 1)
    value = np.full(len(scores), np.nan)
    value[best.row] = 1 - missed
    return value


def mrr(scores, clicked, shown) -> np.ndarray:
    """Reciprocal rank of each list: 1 / rank of its first clicked candidate. NaN without a click.

    Tied: the first of `clicked` among `tied` after `above` others is the j-th with probability
    p(1) = clicked / tied, p(j + 1) = p(j) (tied - j - clicked + 1) / (tied - j); the value is sum p(j) / (above + j).
    """
    scores, clicked, shown = _padded(scores, clicked, shown)
    best = _best(_rank_clicked(scores, clicked, shown))
    probability = best.clicked / best.tied
    reciprocal = probability / (best.above + 1)
    for j in range(1, int((best.tied - best.clicked).max(initial=0)) + 1):
        left = np.maximum(best.tied - j, 1)
        probability = probability * np.maximum(left - best.clicked + 1, 0) / left * (best.tied > j)
        reciprocal += probability / (best.above + j + 1)
    value = np.full(len(scores), np.nan)
    value[best.row] = reciprocal
    return value


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
    """AUC (NaN without both classes), impressions and clicks of each group, each (groups,).

    Groups come in the order of np.unique(groups), strings in that of their first appearance. Rows are sorted once, by
    one 64-bit integer that packs (group, score, clicked): faster than to find a sorting order.
    """
    scores, clicked, groups = _flat(scores, clicked, groups)
    if not len(scores):
        return np.empty(0), np.empty(0, np.int64), np.empty(0, np.int64)
    code, order = _group_code(groups), _score_code(scores)
    score_bits = np.uint64(int(order.max()).bit_length() + 1)
    if int(code.max()).bit_length() + int(score_bits) > 64:
        code = np.unique(code, return_inverse=True)[1].astype(np.uint64)
    key = np.sort(code << score_bits | order << np.uint64(1) | clicked)
    group = key >> score_bits
    start = np.concatenate([[0], np.flatnonzero(group[1:] != group[:-1]) + 1])
    size = np.diff(start, append=len(key))
    row = np.flatnonzero(key & np.uint64(1))  # clicked rows; in a tie they come after those not clicked
    before = np.searchsorted(row, start)  # clicked rows before each group
    clicks = np.diff(before, append=len(row))
    own = np.repeat(np.arange(len(start)), clicks)
    key_of_row = key[row]
    not_above = row - np.arange(len(row))  # rows not clicked with at most this score, in this group or one before
    below = np.searchsorted(key, key_of_row - np.uint64(1)) - np.searchsorted(key_of_row, key_of_row)
    won = np.bincount(own, not_above + below - 2 * (start - before)[own], minlength=len(start))  # twice the pairs won
    pairs = clicks * (size - clicks)
    auc = np.where(pairs > 0, won / np.maximum(2 * pairs, 1), np.nan)
    return auc, size, clicks


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
    of_lists   (scores, clicked, shown) -> (lists,), NaN where undefined; None: not made from scores (IHR, judge.py)
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
    "ihr@1": Metric("IHR@1", in_study=True),
    "ihr@3": Metric("IHR@3", in_study=True),
}
LABELS = {name: metric.label for name, metric in METRICS.items() if metric.label}


class _Ranks(NamedTuple):
    """Of the clicked candidates, lists in order, each (clicked candidates,)."""

    row: np.ndarray  # its list
    above: np.ndarray  # shown candidates scored higher
    tied: np.ndarray  # shown candidates scored the same, itself included
    clicked: np.ndarray  # clicked ones among the tied, itself included


def _rank_clicked(scores, clicked, shown) -> _Ranks:
    """Compares each clicked candidate with its list: clicks are few, so this is cheaper than sorting the lists."""
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
    return _Ranks(row, *counts)


def _best(rank: _Ranks) -> _Ranks:
    """Of each list with a click, the highest-scored clicked candidate."""
    order = np.lexsort((rank.above, rank.row))
    first = order[np.diff(rank.row[order], prepend=-1) > 0]
    return _Ranks(*(values[first] for values in rank))


def _divide(total: np.ndarray, by: np.ndarray) -> np.ndarray:
    return np.where(by > 0, total / np.where(by > 0, by, 1), np.nan)


def _score_code(scores: np.ndarray) -> np.ndarray:
    """Unsigned integers in the order of the scores, equal where these are equal (-0.0 is 0.0)."""
    with np.errstate(over="ignore"):
        short = scores.astype(np.float32)
    if np.array_equal(short, scores):  # as a model's scores are: the bits of a float32, once turned, sort as it does
        bits = (short + np.float32(0)).view(np.uint32)
        return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)).astype(np.uint64)
    order = np.argsort(scores)
    ranked = scores[order]
    code = np.empty(len(scores), dtype=np.uint64)
    code[order] = np.concatenate([[0], np.cumsum(ranked[1:] != ranked[:-1])])
    return code


def _group_code(groups: np.ndarray) -> np.ndarray:
    """Unsigned integers, one a group id."""
    if groups.dtype.kind in "biu":
        groups = groups.astype(np.int64) if groups.dtype.kind == "b" else groups
        return groups.astype(np.uint64) - np.array(groups.min()).astype(np.uint64)  # wraps round: exact for any range
    if groups.dtype.kind in "fmM":
        return np.unique(groups, return_inverse=True)[1].astype(np.uint64)
    # Strings: the rows of a list usually follow one another, so one look-up a run of equal ids is enough.
    start = np.concatenate([[0], np.flatnonzero(groups[1:] != groups[:-1]) + 1])
    first_seen: dict = {}
    code = np.fromiter(map(first_seen.setdefault, groups[start].tolist(), start.tolist()), np.uint64, len(start))
    unusable = [group for group in first_seen if not isinstance(group, (str, bytes, int, np.integer))]
    if unusable:
        raise ValueError(f"groups has missing values or ids that are no string or integer, such as {unusable[0]!r}")
    return np.repeat(code, np.diff(start, append=len(groups)))


def _padded(scores, clicked, shown, k: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scores, clicked, shown = _of_one_shape(2, "(lists, candidates)", scores=scores, clicked=clicked, shown=shown)
    more = [f"k is {k!r}; expected a whole number >= 1"] if int(k) != k or k < 1 else []
    if hidden := int(((clicked == 1) & (shown == 0)).sum()):
        more.insert(0, f"{hidden} candidates are clicked but not shown")
    _refuse(scores, clicked, shown.astype(bool), more)
    return scores, clicked.astype(bool), shown.astype(bool)


def _flat(scores, clicked, groups) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scores, clicked, groups = _of_one_shape(1, "(rows,)", scores=scores, clicked=clicked, groups=groups)
    missing = int((groups != groups).sum()) if groups.dtype.kind in "fmM" else 0
    _refuse(scores, clicked, True, [f"groups is missing in {missing} rows"] if missing else [])
    return scores, clicked.astype(bool), groups


def _of_one_shape(axes: int, form: str, **given) -> list[np.ndarray]:
    """As arrays; raises ValueError that expects `form` unless all have one shape of so many axes."""
    arrays = [np.asarray(values) for values in given.values()]
    shapes = [array.shape for array in arrays]
    if len(set(shapes)) > 1 or len(shapes[0]) != axes:
        raise ValueError(f"{', '.join(given)} have the shapes {', '.join(map(str, shapes))}; expected one shape {form}")
    return arrays


def _refuse(scores: np.ndarray, clicked: np.ndarray, shown: np.ndarray | bool, more: list[str]) -> None:
    faults = []
    if (broken := np.isnan(scores) & shown).any():
        first = tuple(int(i) for i in np.argwhere(broken)[0])
        faults.append(f"scores is NaN for {int(broken.sum())} shown candidates (first: {first})")
    if clicked.dtype != bool and (bad := int(((clicked != 0) & (clicked != 1)).sum())):
        faults.append(f"clicked is neither 0 nor 1 in {bad} places")
    if faults := faults + more:
        raise ValueError("these scores cannot be judged:\n  " + "\n  ".join(faults))
