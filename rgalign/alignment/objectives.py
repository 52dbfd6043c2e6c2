"""Alignment objectives: each one function of a batch of pairs, chosen by name.

The next one is a function in this file and its name in OBJECTIVES, and nothing else.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class PairLogProbabilities(NamedTuple):
    """A batch of preference pairs; every field (rows,)."""

    chosen: Tensor  # log p(query | prompt) of the policy: nats, summed over the query's tokens
    rejected: Tensor
    reference_chosen: Tensor  # the same of the model that training began from
    reference_rejected: Tensor
    chosen_tokens: Tensor  # how many tokens these sums are over
    rejected_tokens: Tensor
    reward_chosen: Tensor  # what the reward model says (METHOD.md 2.3, stage 1)
    reward_rejected: Tensor
    step_tokens: Tensor | None = None  # mean of chosen_tokens over the whole step, where these rows are a piece of it

    @property
    def margin(self) -> Tensor:
        """(rows,) log-ratio of policy to reference of the chosen query, minus that of the rejected one."""
        return (self.chosen - self.reference_chosen) - (self.rejected - self.reference_rejected)

    def per_token(self) -> "PairLogProbabilities":
        """Length-normalised: means over tokens in place of sums, each of which now counts as one token."""
        return self._replace(
            chosen=self.chosen / self.chosen_tokens,
            rejected=self.rejected / self.rejected_tokens,
            reference_chosen=self.reference_chosen / self.chosen_tokens,
            reference_rejected=self.reference_rejected / self.rejected_tokens,
            chosen_tokens=torch.ones_like(self.chosen_tokens),
            rejected_tokens=torch.ones_like(self.rejected_tokens),
            step_tokens=None,
        )


AlignmentObjective = Callable[[PairLogProbabilities, float], Tensor]  # (pairs, beta) -> losses (rows,)


def dpo(pairs: PairLogProbabilities, beta: float) -> Tensor:
    """-log sigmoid(beta * margin) (Rafailov et al. 2023, eq. 7): ln 2 where policy and reference agree."""
    return -functional.logsigmoid(beta * pairs.margin)


def ipo(pairs: PairLogProbabilities, beta: float) -> Tensor:
    """(margin - 1 / (2 beta))^2 (Azar et al. 2023, eq. 17): the margin has a goal, and is not pushed beyond it.

    The authors' own figures are of length-normalised log-probabilities.
    """
    return (pairs.margin - 1 / (2 * beta)) ** 2


def sft(pairs: PairLogProbabilities, beta: float) -> Tensor:
    """-log p of the chosen queries; its mean over rows is the mean per token of the step, as in RG-SFT. No beta."""
    return -pairs.chosen / (pairs.chosen_tokens.float().mean() if pairs.step_tokens is None else pairs.step_tokens)


OBJECTIVES: dict[str, AlignmentObjective] = {"dpo": dpo, "ipo": ipo, "sft": sft}
