"""Objectives against cases worked by hand, their gradients, and what length normalisation means to them."""

import math

import pytest
import torch

from rgalign.alignment.objectives import OBJECTIVES, PairLogProbabilities, dpo, ipo, sft

# Two pairs. Log-ratios: chosen +1 and 0, rejected -2 and +0.5; margins 3 and -0.5.
PAIRS = PairLogProbabilities(
    chosen=torch.tensor([-3.0, -6.0]),
    rejected=torch.tensor([-8.0, -4.5]),
    reference_chosen=torch.tensor([-4.0, -6.0]),
    reference_rejected=torch.tensor([-6.0, -5.0]),
    chosen_tokens=torch.tensor([2, 4]),
    rejected_tokens=torch.tensor([4, 5]),
    reward_chosen=torch.tensor([1.0, 2.0]),
    reward_rejected=torch.tensor([0.0, 0.5]),
)


def test_the_margin_is_worked_by_hand():
    assert PAIRS.margin.tolist() == [3.0, -0.5]


def test_dpo_worked_by_hand():
    expected = [math.log(1 + math.exp(-0.2 * 3)), math.log(1 + math.exp(0.2 * 0.5))]
    assert dpo(PAIRS, 0.2).tolist() == pytest.approx(expected)


def test_ipo_worked_by_hand():
    assert ipo(PAIRS, 0.25).tolist() == pytest.approx([(3 - 2) ** 2, (-0.5 - 2) ** 2])


def test_sft_is_the_mean_per_token_of_the_batch():
    assert sft(PAIRS, 0.3).mean().item() == pytest.approx((3 + 6) / (2 + 4))


def test_length_normalised_everything_is_per_token():
    means = PAIRS.per_token()
    assert means.margin.tolist() == pytest.approx([1 / 2 + 2 / 4, 0 - 0.5 / 5])
    assert sft(means, 0.3).tolist() == pytest.approx([3 / 2, 6 / 4])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_are_those_of_finite_differences(name):
    fixed = PairLogProbabilities(*(part.double() for part in PAIRS[:-1]))

    def losses(chosen, rejected):
        return OBJECTIVES[name](fixed._replace(chosen=chosen, rejected=rejected), 0.3)

    leaves = [part.clone().requires_grad_() for part in (fixed.chosen, fixed.rejected)]
    assert losses(*leaves).shape == (2,)
    assert torch.autograd.gradcheck(losses, leaves)


def test_dpo_pushes_chosen_up_and_rejected_down_equally_and_most_where_the_pair_is_wrong():
    chosen, rejected = (part.clone().requires_grad_() for part in (PAIRS.chosen, PAIRS.rejected))
    dpo(PAIRS._replace(chosen=chosen, rejected=rejected), 0.3).sum().backward()
    expected = -0.3 * torch.sigmoid(-0.3 * PAIRS.margin)  # Rafailov et al. 2023, section 4
    torch.testing.assert_close(chosen.grad, expected)
    torch.testing.assert_close(rejected.grad, -expected)
    assert chosen.grad[1] < chosen.grad[0] < 0
