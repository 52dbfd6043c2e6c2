"""Metrics against scikit-learn, ranx, every order of the tied written out, and cases worked by hand."""

from functools import partial
from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score, roc_auc_score
from strategies import impression_lists

from rgalign.evaluation import metrics

with pytest.MonkeyPatch.context() as patch:  # compiling ranx takes a minute, these few lists none
    patch.setenv("NUMBA_DISABLE_JIT", "1")
    import ranx

EXACT = {"rtol": 0, "atol": 1e-12}
AT_K = {"recall": metrics.recall_at, "ndcg": metrics.ndcg_at, "hit": metrics.hit_at}


def orders(scores):
    """All orders, best first, that the scores of one list allow."""
    indices = range(len(scores))
    return [p for p in permutations(indices) if all(scores[a] >= scores[b] for a, b in pairwise(p))]


def of_one_order(name, clicked_in_order, k):
    """A metric of one list in a given order, as its textbook says it."""
    ranks = [rank for rank, clicked in enumerate(clicked_in_order, start=1) if clicked]
    top = [rank for rank in ranks if rank <= k]
    if name == "recall":
        return len(top) / len(ranks)
    if name == "hit":
        return float(bool(top))
    if name == "mrr":
        return 1 / ranks[0]
    ideal = sum(1 / np.log2(1 + rank) for rank in range(1, min(k, len(ranks)) + 1))
    return sum(1 / np.log2(1 + rank) for rank in top) / ideal


def expected(name, scores, clicked, k):
    if not clicked.any():
        return np.nan
    return np.mean([of_one_order(name, clicked[list(order)], k) for order in orders(scores)])


@settings(max_examples=200, deadline=None)
@given(lists=impression_lists(max_lists=3, max_candidates=6), k=st.integers(1, 7))
def test_tied_candidates_give_the_mean_over_all_their_orders(lists, k):
    scores, clicked, shown = lists
    for name in ("recall", "ndcg", "hit", "mrr"):
        ours = AT_K[name](*lists, k) if name in AT_K else metrics.mrr(*lists)
        truth = [expected(name, s[m], c[m], k) for s, c, m in zip(scores, clicked, shown, strict=True)]
        np.testing.assert_allclose(ours, truth, **EXACT, err_msg=name)


@given(lists=impression_lists(ties=False, clicked="both", max_lists=12, max_candidates=20), k=st.integers(1, 25))
@settings(max_examples=50, deadline=None)
def test_without_ties_all_equal_ranx(lists, k):
    rows = list(zip(*lists, strict=True))
    truth = ranx.Qrels({f"s{i}": {f"i{j}": 1 for j in np.flatnonzero(c)} for i, (_, c, _) in enumerate(rows)})
    run = ranx.Run({f"s{i}": {f"i{j}": s[j] for j in np.flatnonzero(m)} for i, (s, _, m) in enumerate(rows)})
    names = {f"recall@{k}": "recall", f"ndcg@{k}": "ndcg", f"hit_rate@{k}": "hit", "mrr": "mrr"}
    ranx.evaluate(truth, run, list(names), return_mean=False)
    for theirs, name in names.items():
        ours = AT_K[name](*lists, k) if name in AT_K else metrics.mrr(*lists)
        np.testing.assert_allclose(ours, [run.scores[theirs][f"s{i}"] for i in range(len(rows))], **EXACT, err_msg=name)


@given(lists=impression_lists(clicked="both"), k=st.integers(1, 9))
@settings(deadline=None)
def test_auc_and_ndcg_of_a_list_equal_scikit_learn(lists, k):
    scores, clicked, shown = lists
    rank = np.unique(np.where(shown, scores, 0), return_inverse=True)[1].reshape(scores.shape)  # scikit-learn: finite
    rows = list(zip(rank, clicked, shown, strict=True))
    auc = [roc_auc_score(c[m], r[m]) for r, c, m in rows]
    ndcg = [ndcg_score([c[m]], [r[m]], k=k) for r, c, m in rows]
    np.testing.assert_allclose(metrics.session_auc(*lists), auc, **EXACT)
    np.testing.assert_allclose(metrics.ndcg_at(*lists, k), ndcg, **EXACT)


def loop_gauc(scores, clicked, groups, weights):
    """GAUC as a loop over scikit-learn says it."""
    kept, left_out = [], 0
    for group in set(groups.tolist()):
        own = clicked[groups == group]
        if own.all() or not own.any():
            left_out += 1
            continue
        weight = {"impressions": len(own), "clicks": own.sum(), "uniform": 1}[weights]
        kept.append((roc_auc_score(own, scores[groups == group]), weight))
    value = sum(auc * weight for auc, weight in kept) / sum(weight for _, weight in kept) if kept else np.nan
    return value, len(kept), left_out


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 200),
    groups=st.integers(1, 20),
    weights=st.sampled_from(metrics.WEIGHTS),
    form=st.sampled_from(["int64", "uint8", "far apart", "text", "object", "date", "bool", "float"]),
    scale=st.sampled_from([1, 3, 1e9]),
    precision=st.sampled_from([np.float32, np.float64]),
)
@settings(deadline=None)
def test_gauc_is_the_weighted_mean_of_sklearn_aucs(seed, rows, groups, weights, form, scale, precision):
    rng = np.random.default_rng(seed)
    scores = np.round(rng.normal(size=rows) * scale).astype(precision) / 3
    clicked = rng.random(rows) < 0.3
    ids = rng.integers(0, groups, size=rows)
    named = {
        "far apart": lambda: ids * 2**58 + np.iinfo(np.int64).min,
        "text": lambda: np.array([f"user {i}" for i in ids]),
        "object": lambda: np.array([f"user {i}" for i in ids], dtype=object),
        "date": lambda: np.datetime64("2024-01-01") + ids,
        "float": lambda: ids / 7 - 1,
    }
    ids = named[form]() if form in named else ids.astype(form)
    value, kept, left_out = loop_gauc(scores, clicked, ids, weights)
    ours = metrics.gauc(scores, clicked, ids, weights)
    np.testing.assert_allclose(ours.value, value, **EXACT)
    assert (ours.groups, ours.left_out) == (kept, left_out)


@given(lists=impression_lists(), weights=st.sampled_from(metrics.WEIGHTS))
@settings(deadline=None)
def test_padded_and_flat_gauc_agree(lists, weights):
    scores, clicked, shown = lists
    row = np.nonzero(shown)[0]
    flat = metrics.gauc(scores[shown], clicked[shown], row, weights)
    padded = metrics.gauc_of_lists(*lists, weights)
    np.testing.assert_allclose(padded.value, flat.value, **EXACT)
    empty = int((~shown.any(axis=1)).sum())  # a list without candidates has no row to be seen by
    assert (padded.groups, padded.left_out) == (flat.groups, flat.left_out + empty)


@given(lists=impression_lists(max_lists=1, max_candidates=20, clicked="both"), order=st.randoms(use_true_random=False))
@settings(deadline=None)
def test_the_order_of_the_input_does_not_matter(lists, order):
    columns = order.sample(range(lists[0].shape[1]), lists[0].shape[1])
    shuffled = [part[:, columns] for part in lists]
    for metric in (metrics.session_auc, metrics.mrr, *(partial(at_k, k=3) for at_k in AT_K.values())):
        np.testing.assert_allclose(metric(*shuffled), metric(*lists), **EXACT)


def test_a_constant_scorer_has_exactly_one_half():
    rng = np.random.default_rng(0)
    clicked = rng.random((1000, 15)) < 0.2
    shown = np.ones_like(clicked)
    scores = np.full(clicked.shape, 0.1)
    auc = metrics.session_auc(scores, clicked, shown)
    assert set(auc[~np.isnan(auc)]) == {0.5}
    assert metrics.gauc(scores.ravel(), clicked.ravel(), np.repeat(np.arange(1000), 15)).value == 0.5


def test_a_worked_case():
    #         clicked: ranks 2 and 4      tied first three, one clicked   no click            all clicked
    scores = [[0.9, 0.7, 0.5, 0.3, 0.1], [1.0, 1.0, 1.0, 0.0, np.nan], [1.0, 2.0, 3, 4, 5], [1.0, 2.0, 3, 4, 5]]
    clicked = [[0, 1, 0, 1, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]
    shown = [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    lists = scores, clicked, shown
    nan = np.nan
    np.testing.assert_allclose(metrics.session_auc(*lists), [3 / 6, 2 / 3, nan, nan])
    np.testing.assert_allclose(metrics.recall_at(*lists, 3), [0.5, 1, nan, 0.6])
    np.testing.assert_allclose(metrics.recall_at(*lists, 2), [0.5, 2 / 3, nan, 0.4])
    np.testing.assert_allclose(metrics.hit_at(*lists, 1), [0, 1 / 3, nan, 1])
    np.testing.assert_allclose(metrics.mrr(*lists), [1 / 2, (1 + 1 / 2 + 1 / 3) / 3, nan, 1])
    discount = 1 / np.log2([2, 3, 4])
    np.testing.assert_allclose(metrics.ndcg_at(*lists, 3), [discount[1] / discount[:2].sum(), discount.mean(), nan, 1])
    assert metrics.gauc_of_lists(*lists) == (pytest.approx((5 * 1 / 2 + 4 * 2 / 3) / 9), 2, 2)
    assert metrics.gauc_of_lists(*lists, "clicks").value == pytest.approx((2 * 1 / 2 + 1 * 2 / 3) / 3)
    assert metrics.gauc_of_lists(*lists, "uniform").value == pytest.approx((1 / 2 + 2 / 3) / 2)


@pytest.mark.parametrize("clicked", [[0, 0, 0, 0], [1, 1, 1, 1]])
def test_with_no_group_left_gauc_is_nan_and_says_so(clicked):
    ours = metrics.gauc([0.1, 0.2, 0.3, 0.4], clicked, ["a", "a", "b", "b"])
    assert np.isnan(ours.value)
    assert (ours.groups, ours.left_out) == (0, 2)
    empty = metrics.gauc([], [], [])
    assert np.isnan(empty.value)
    assert (empty.groups, empty.left_out) == (0, 0)


def test_all_faults_are_named_at_once():
    scores, clicked, shown = np.array([[np.nan, 1.0], [np.nan, 0.0]]), [[0, 3], [1, 0]], [[1, 1], [0, 1]]
    with pytest.raises(
        ValueError, match=r"(?s)NaN for 1 shown.*\(0, 0\).*neither 0 nor 1.*clicked but not shown.*k is 0"
    ):
        metrics.recall_at(scores, clicked, shown, 0)
    with pytest.raises(ValueError, match=r"shapes \(2, 2\), \(3,\)"):
        metrics.session_auc(scores, [1, 0, 1], shown)
    with pytest.raises(ValueError, match="NaN for 1 shown"):
        metrics.gauc([np.nan, 1], [0, 1], [0, 0])
    with pytest.raises(ValueError, match="groups is missing in 1 rows"):
        metrics.gauc([0, 1], [0, 1], [np.nan, 0])
    with pytest.raises(ValueError, match="None"):
        metrics.gauc([0, 1], [0, 1], np.array(["a", None], dtype=object))
    with pytest.raises(ValueError, match="expected one of impressions, clicks, uniform"):
        metrics.gauc([0, 1], [0, 1], [0, 0], "lists")


def test_figures_of_two_models():
    assert metrics.relative_error_reduction(0.9672, 0.966) == pytest.approx(0.0012 / 0.034)  # the paper's 3.52 %
    assert np.isnan(metrics.relative_error_reduction(1.0, 1.0))
    assert metrics.relative_gain(0.66, 0.6) == pytest.approx(0.1)
    assert np.isnan(metrics.relative_gain(0.1, 0.0))
    assert metrics.gap_closed(0.87, floor=0.82, oracle=0.92) == pytest.approx(0.5)
    assert np.isnan(metrics.gap_closed(0.8, floor=0.8, oracle=0.8))
