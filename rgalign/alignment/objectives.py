"""Alignment objectives: each one function of a batch of pairs or of lists, chosen by name.

The next one is a function in this file and its name in OBJECTIVES or LIST_OBJECTIVES, and nothing else.
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


class ListLogProbabilities(NamedTuple):
    """A batch of lists: n queries of one prompt, of which two at least are there; every field (rows, n)."""

    policy: Tensor  # log p(query | prompt): nats, summed over the query's tokens
    reference: Tensor
    tokens: Tensor
    reward: Tensor  # nats
    there: Tensor  # bool; False: the list is shorter, and what the other fields have here is not read

    @property
    def log_ratio(self) -> Tensor:
        """(rows, n) log-ratio of policy to reference; 0 where no query is."""
        return torch.where(self.there, self.policy - self.reference, 0)

    def per_token(self) -> "ListLogProbabilities":
        """Length-normalised: means over tokens in place of sums."""
        tokens = self.tokens.clamp(min=1)
        return self._replace(policy=self.policy / tokens, reference=self.reference / tokens)


ListObjective = Callable[[ListLogProbabilities, float], Tensor]  # (lists, beta) -> losses (rows,)


def irpo(lists: ListLogProbabilities, beta: float) -> Tensor:
    """sum_i w_i log(1 + mean_{j != i} exp(beta (ratio_j - ratio_i))) / sum_i w_i (Wu et al. 2025, arXiv 2504.15477):
    each query against all others of its list, by its gain in DCG.

    w_i = (2^{y_i} - 1) / log2(1 + rank_i), y the reward from 0 (the list's worst) to 1 (its best), rank by reward, of
    equal ones the best. The authors divide by n in place of sum w [C]: so two queries are `dpo`, and ln 2 is the loss
    of every list where policy and reference agree.
    """
    there, ratio, reward = lists.there, lists.log_ratio, lists.reward
    worst, best = _filled(reward, there, torch.inf).amin(1), _filled(reward, there, -torch.inf).amax(1)
    tiny = torch.finfo(reward.dtype).tiny
    relevance = (reward - worst[:, None]) / (best - worst).clamp(min=tiny)[:, None]
    rank = 1 + (_filled(reward, there, -torch.inf)[:, None] > reward[:, :, None]).sum(dim=2)
    weight = _filled((2**relevance - 1) / torch.log2(1 + rank.to(reward.dtype)), there, 0)
    ahead = beta * (ratio[:, :, None] - ratio[:, None])  # (rows, i, j)
    same = torch.eye(there.shape[1], dtype=torch.bool, device=there.device)
    others = (there.sum(dim=1) - 1).to(ahead.dtype).log()[:, None]
    mean = _filled(-ahead, there[:, None] & ~same, -torch.inf).logsumexp(dim=2) - others
    return (weight * -functional.logsigmoid(-mean)).sum(dim=1) / weight.sum(dim=1).clamp(min=tiny)


def plackett_luce(lists: ListLogProbabilities, beta: float) -> Tensor:
    """-log p(the order of the rewards) / (n - 1), p of Plackett and Luce with the strengths exp(beta ratio) (Rafailov
    et al. 2023, appendix A.3, who do not divide [C]); two queries are `dpo`. Equal rewards: in the list's order."""
    order = _filled(lists.reward, lists.there, -torch.inf).argsort(dim=1, descending=True, stable=True)
    scaled, there = (beta * lists.log_ratio).gather(1, order), lists.there.gather(1, order)
    same = torch.eye(there.shape[1], dtype=torch.bool, device=there.device)
    rest = torch.ones_like(same).triu() & there[:, None] | same  # (rows, k, l): l is k, or behind it
    passed = _filled(scaled[:, None], rest, -torch.inf).logsumexp(dim=2) - scaled
    return _filled(passed, there, 0).sum(dim=1) / (there.sum(dim=1) - 1)


def rebel(lists: ListLogProbabilities, beta: float) -> Tensor:
    """Mean over pairs of (beta (ratio_i - ratio_j) - (reward_i - reward_j))^2 (Gao et al. 2024, arXiv 2404.16767, with
    beta for 1 / eta): log-ratios regress on rewards in nats, so that it counts too by how much a query is better."""
    there, gap = lists.there, beta * lists.log_ratio - _filled(lists.reward, lists.there, 0)
    pairs = (there[:, None] & there[:, :, None]).triu(diagonal=1)
    squares = _filled((gap[:, None] - gap[:, :, None]) ** 2, pairs, 0)
    return squares.sum(dim=(1, 2)) / pairs.sum(dim=(1, 2))


def _filled(values: Tensor, there: Tensor, value: float) -> Tensor:
    return torch.where(there, values, value)


LIST_OBJECTIVES: dict[str, ListObjective] = {"irpo": irpo, "plackett_luce": plackett_luce, "rebel": rebel}
