import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rgalign.ranker.losses import listnet_loss, query_kl

SHOWN = torch.tensor([[True, True, True], [True, True, False]])
CLICKED = torch.tensor([[True, False, False], [True, True, False]])


def test_equals_a_hand_worked_case():
    scores = torch.log(torch.tensor([[1.0, 2.0, 5.0], [3.0, 1.0, 9.0]]))
    # list 1: p = 1/8, 2/8, 5/8 and one click; list 2: p = 3/4, 1/4 and two clicks that share the mass
    expected = (-math.log(1 / 8) + (-math.log(3 / 4) - math.log(1 / 4)) / 2) / 2
    assert listnet_loss(scores, CLICKED, SHOWN).item() == pytest.approx(expected, rel=1e-6)


@given(shift=st.floats(-50, 50), seed=st.integers(0, 1000))
def test_adding_a_constant_to_a_list_changes_nothing(shift, seed):
    scores = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    moved = scores + torch.tensor([[shift], [0.0]])
    assert listnet_loss(moved, CLICKED, SHOWN).item() == pytest.approx(listnet_loss(scores, CLICKED, SHOWN).item())


def test_lists_without_a_click_are_left_out():
    scores = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    none = torch.stack([CLICKED[0], torch.zeros(3, dtype=torch.bool)])
    assert listnet_loss(scores, none, SHOWN) == listnet_loss(scores[:1], CLICKED[:1], SHOWN[:1])
    assert listnet_loss(scores, torch.zeros_like(CLICKED), SHOWN).isnan()


def test_kl_equals_a_hand_worked_case():
    scores = torch.log(torch.tensor([[1.0, 2.0, 5.0], [3.0, 1.0, 9.0]]))
    query = torch.log(torch.tensor([[4.0, 2.0, 2.0], [1.0, 1.0, 70.0]]))
    # list 1: p = 1/8, 2/8, 5/8 against 1/2, 1/4, 1/4; list 2: 3/4, 1/4 against 1/2, 1/2; its third is padding
    first = (math.log(1 / 4) + 2 * math.log(1) + 5 * math.log(5 / 2)) / 8
    second = 3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2)
    assert query_kl(scores, query, SHOWN).item() == pytest.approx((first + second) / 2, rel=1e-5)
    assert query_kl(scores, scores + 4, SHOWN).item() == pytest.approx(0, abs=1e-6)


def test_gradients_equal_finite_differences():
    scores = torch.tensor([[0.3, -1.2, 0.5], [2.0, 0.1, 7.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: listnet_loss(s, CLICKED, SHOWN), (scores,))
    query = torch.tensor([[1.3, 0.2, 0.4], [-1.0, 0.6, 3.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, q: query_kl(s, q, SHOWN), (scores, query))


@pytest.mark.parametrize("padding", [1e30, math.inf, -math.inf, math.nan])
def test_what_stands_in_the_padding_changes_neither_loss_nor_gradient(padding):
    found = []
    for fill in (0.0, padding):
        scores = torch.tensor([[0.3, -1.2, 0.5], [2.0, 0.1, fill]], requires_grad=True)
        query = torch.tensor([[1.3, 0.2, 0.4], [-1.0, 0.6, fill]], requires_grad=True)
        losses = listnet_loss(scores, CLICKED, SHOWN), query_kl(scores, query, SHOWN)
        sum(losses).backward()
        found.append((*losses, scores.grad, query.grad))
    assert all(torch.equal(plain, padded) for plain, padded in zip(*found, strict=True))
    assert found[1][2][1, 2] == found[1][3][1, 2] == 0
