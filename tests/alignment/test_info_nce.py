"""The losses of RG-CL: worked by hand, gradients, duplicates, and two processes that find what one finds."""

import math

import gather_worker
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from rgalign.alignment.contrastive import alignment, effective_rank, info_nce, ranker_nce, session_nce, uniformity

NONE = torch.empty(3, 0, dtype=torch.long)
INTENTS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 4.0], [-1.0, 0.0]])
QUERY = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
CLICKED = torch.tensor([0, 1, 0])  # rows 0 and 2 clicked the same intent
HARD = torch.tensor([[2, -1], [3, 1], [1, 1]])  # none; its own clicked one; in the batch already, and twice


def cross_entropy(*logits: float) -> float:
    """-log p of the first, in nats."""
    return float(functional.cross_entropy(torch.tensor([logits], dtype=torch.float), torch.tensor([0])))


def test_three_rows_with_duplicates_and_hard_negatives_worked_by_hand():
    """Cosines over temperature 1/2. Row 0: 0 against 1, 2; row 1: 1 against 0, 3; row 2: 0 against 1."""
    rows = [cross_entropy(2, 0, 1.2), cross_entropy(2, 0, 0), cross_entropy(1.2, 1.6)]
    found = info_nce(QUERY, INTENTS, CLICKED, HARD, NONE, negatives=CLICKED, temperature=0.5)
    assert float(found) == pytest.approx(sum(rows) / 3, abs=1e-6)


def test_the_other_direction_worked_by_hand():
    """Intent 0 against session 1 alone (session 2 clicked it too), twice; intent 1 against sessions 0 and 2."""
    rows = [cross_entropy(2, 0), cross_entropy(2, 0, 1.6), cross_entropy(1.2, 0)]
    found = session_nce(QUERY, INTENTS, CLICKED, QUERY, CLICKED[:, None], temperature=0.5)
    assert float(found) == pytest.approx(sum(rows) / 3, abs=1e-6)


def test_a_sessions_second_click_is_worked_by_hand():
    """Row 1 clicked intent 0 too: it is not pushed away from it, nor is intent 0 from session 1."""
    also = torch.tensor([[-1], [0], [-1]])
    rows = [cross_entropy(2, 0, 1.2), cross_entropy(2, 0), cross_entropy(1.2, 1.6)]
    found = info_nce(QUERY, INTENTS, CLICKED, HARD, also, negatives=CLICKED, temperature=0.5)
    assert float(found) == pytest.approx(sum(rows) / 3, abs=1e-6)
    clicks = torch.cat([CLICKED[:, None], also], dim=1)
    rows = [0, cross_entropy(2, 0, 1.6), 0]  # every session clicked intent 0
    found = session_nce(QUERY, INTENTS, CLICKED, QUERY, clicks, temperature=0.5)
    assert float(found) == pytest.approx(sum(rows) / 3, abs=1e-6)


def test_where_all_clicks_differ_it_is_the_cross_entropy_of_the_batchs_diagonal():
    """As MultipleNegativesRankingLoss with scale 1 / temperature."""
    query, intents = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    rows = torch.arange(5)
    logits = functional.cosine_similarity(query[:, None], intents[None], dim=2) / 0.07
    found = info_nce(query, intents, rows, rows[:, None], rows[:, None], negatives=rows, temperature=0.07)
    torch.testing.assert_close(found, functional.cross_entropy(logits, rows))
    back = session_nce(query, intents, rows, query, rows[:, None], temperature=0.07)
    torch.testing.assert_close(back, functional.cross_entropy(logits.T, rows))


def test_dot_over_the_whole_kb_at_temperature_one_is_the_rankers_own_probability():
    log_p = (QUERY @ INTENTS.T / math.sqrt(2)).log_softmax(dim=1)
    found = info_nce(QUERY, INTENTS, CLICKED, NONE, NONE, negatives=torch.arange(4), temperature=1, similarity="dot")
    torch.testing.assert_close(found, -log_p[torch.arange(3), CLICKED].mean())


def test_cosine_ignores_lengths_and_dot_does_not():
    def loss(scale, similarity):
        return info_nce(QUERY * scale, INTENTS, CLICKED, HARD, NONE, negatives=CLICKED, similarity=similarity)

    torch.testing.assert_close(loss(1, "cosine"), loss(7, "cosine"))
    assert abs(loss(1, "dot") - loss(7, "dot")) > 0.1
    torch.testing.assert_close(
        info_nce(QUERY * 3, INTENTS, CLICKED, HARD, NONE, negatives=CLICKED, temperature=3, similarity="dot"),
        info_nce(QUERY, INTENTS, CLICKED, HARD, NONE, negatives=CLICKED, temperature=1, similarity="dot"),
    )


def test_a_row_without_negatives_counts_as_nothing():
    none = info_nce(QUERY, INTENTS, CLICKED, NONE, NONE, negatives=CLICKED[:0])
    alone = session_nce(QUERY[:1], INTENTS, CLICKED[:1], QUERY[:1], CLICKED[:1, None])
    assert float(none) == float(alone) == 0


ROWS = st.integers(1, 6).flatmap(
    lambda rows: st.tuples(
        st.lists(st.integers(0, 4), min_size=rows, max_size=rows),
        st.lists(st.lists(st.integers(-1, 4), min_size=3, max_size=3), min_size=rows, max_size=rows),
        st.lists(st.lists(st.integers(-1, 4), min_size=2, max_size=2), min_size=rows, max_size=rows),
        st.integers(0, 10_000),
    )
)


@given(ROWS)
def test_negatives_are_a_set_without_the_clicked_intents(drawn):
    clicked, hard, also, seed = drawn
    query = torch.randn(len(clicked), 4, generator=torch.Generator().manual_seed(seed))
    intents = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed + 1))
    total = 0.0
    for row, own in enumerate(clicked):
        negatives = {*clicked, *hard[row]} - {own, *also[row], -1}
        cosines = functional.cosine_similarity(query[row], intents[[own, *sorted(negatives)]], dim=1)
        total += cross_entropy(*(cosines / 0.2).tolist())
    clicked, hard, also = torch.tensor(clicked), torch.tensor(hard), torch.tensor(also)
    found = info_nce(query, intents, clicked, hard, also, negatives=clicked)
    assert float(found) == pytest.approx(total / len(clicked), abs=1e-5)
    hard = torch.cat([hard, hard, clicked[:, None], also], 1)
    again = info_nce(query, intents, clicked, hard, also, negatives=clicked.repeat(3))
    torch.testing.assert_close(found, again)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_gradients_are_those_of_finite_differences(similarity):
    query = QUERY.double().requires_grad_()
    intents, how = INTENTS.double(), {"similarity": similarity}
    torch.autograd.gradcheck(lambda q: info_nce(q, intents, CLICKED, HARD, NONE, negatives=CLICKED, **how), query)
    torch.autograd.gradcheck(lambda q: session_nce(q, intents, CLICKED, q, CLICKED[:, None], **how), query)


@pytest.mark.parametrize("negatives", [CLICKED, CLICKED[:0]], ids=["in batch", "hard alone"])
def test_by_a_rankers_scores_it_is_the_same_loss_of_those_scores_alone_that_are_compared(negatives):
    scored = []

    def score(columns):
        scored.append(columns.tolist())
        return QUERY @ INTENTS[columns].T * 2**-0.5

    found = ranker_nce(score, len(INTENTS), CLICKED, HARD, NONE, negatives=negatives, temperature=0.5)
    how = {"temperature": 0.5, "similarity": "dot"}
    torch.testing.assert_close(found, info_nce(QUERY, INTENTS, CLICKED, HARD, NONE, negatives=negatives, **how))
    ranker_nce(score, len(INTENTS), CLICKED, HARD.clamp(min=-1, max=1), NONE, negatives=CLICKED[:0])
    assert scored == [[0, 1, 2, 3], [0, 1]], "nobody is compared with the others"


@pytest.mark.slow
def test_two_processes_with_unlike_shares_find_loss_and_gradient_of_one(tmp_path):
    ways = [
        {"temperature": 0.2, "similarity": "cosine", "in_batch": True, "symmetric": 0.0},
        {"temperature": 1.0, "similarity": "dot", "in_batch": True, "symmetric": 0.5},
        {"temperature": 0.2, "similarity": "cosine", "in_batch": False, "symmetric": 0.0},
    ]
    torch.multiprocessing.spawn(gather_worker.work, (str(tmp_path), [4, 3], ways), nprocs=2)
    found = torch.load(tmp_path / "found.pt")
    problem = gather_worker.problem()
    assert found["clicked"].tolist() == problem["clicked"].tolist()
    torch.testing.assert_close(found["mean"] / 2, problem["sessions"].mean())
    for number, way in enumerate(ways):
        alone = gather_worker.loss_of(problem, slice(None), **way)
        torch.testing.assert_close(found[f"loss {number}"], alone, atol=1e-6, rtol=0)
        torch.testing.assert_close(found[f"gradient {number}"], problem["weights"].grad, atol=1e-6, rtol=1e-6)


# --- measures of collapse, against spectra and point sets whose values are known


def with_spectrum(values: list[float], rows: int = 12) -> torch.Tensor:
    """(rows, len(values)) vectors with these singular values."""
    random = np.random.default_rng(0)
    left = np.linalg.qr(random.normal(size=(rows, len(values))))[0]
    right = np.linalg.qr(random.normal(size=(len(values), len(values))))[0]
    return torch.tensor(left * values @ right)


@pytest.mark.parametrize(
    ("spectrum", "rank"),
    [([2, 2, 2, 2], 4), ([5, 0, 0], 1), ([1, 1, 0, 0], 2), ([0.5, 0.25, 0.25], 2**1.5), ([0, 0], 1)],
)
def test_effective_rank_of_known_spectra(spectrum, rank):
    assert float(effective_rank(with_spectrum(spectrum))) == pytest.approx(rank, abs=1e-6)
    assert float(effective_rank(7 * with_spectrum(spectrum).float())) == pytest.approx(rank, abs=1e-3)


def test_effective_rank_equals_numpys():
    vectors = np.random.default_rng(1).normal(size=(40, 8)) * np.arange(1, 9)
    values = np.linalg.svd(vectors, compute_uv=False)
    share = values / values.sum()
    assert float(effective_rank(torch.tensor(vectors))) == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    assert effective_rank(torch.tensor([[1.0, torch.nan]])).isnan()


def test_uniformity_is_nought_on_one_point_and_the_mean_over_pairs_elsewhere():
    assert float(uniformity(torch.ones(5, 3))) == pytest.approx(0, abs=1e-6)
    points = torch.tensor([[1.0, 0], [0, 5.0], [-2.0, 0]])  # squared distances 2, 4, 2 once scaled to length 1
    assert float(uniformity(points)) == pytest.approx(np.log((2 * np.exp(-4) + np.exp(-8)) / 3), abs=1e-5)
    assert float(uniformity(points, t=1)) == pytest.approx(np.log((2 * np.exp(-2) + np.exp(-4)) / 3), abs=1e-5)


def test_alignment_is_the_mean_squared_distance_of_directions():
    query, positive = torch.tensor([[3.0, 0], [0, 1], [1, 0]]), torch.tensor([[1.0, 0], [1, 0], [-2, 0]])
    assert float(alignment(query, positive)) == pytest.approx((0 + 2 + 4) / 3, abs=1e-6)


def test_each_figure_tells_a_collapse():
    apart, collapsed, positive = torch.eye(4), torch.ones(4, 4), torch.eye(4)
    assert [float(effective_rank(query)) for query in (apart, collapsed)] == pytest.approx([4, 1], abs=1e-3)
    assert [float(uniformity(query)) for query in (apart, collapsed)] == pytest.approx([-4, 0], abs=1e-5)
    assert [float(alignment(query, positive)) for query in (apart, collapsed)] == pytest.approx([0, 1], abs=1e-5)
