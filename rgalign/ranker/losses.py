"""Listwise losses of the rankers."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rgalign.data.lists import Intents, Lists

Loss = Callable[[nn.Module, Lists, Intents], Tensor]  # mean over the lists of a batch


def listnet_loss(scores: Tensor, clicked: Tensor, shown: Tensor) -> Tensor:
    """Mean over lists of the cross-entropy from the clicks of a list to the softmax of its scores (METHOD.md 2.2 [P]).

    scores   (lists, candidates), any scale; adding a constant to a list changes nothing
    clicked  (lists, candidates) bool; several clicks of a list share its mass equally
    shown    (lists, candidates) bool, False where padded; the values there have no influence, not even NaN
    Returns nats, a scalar. Lists without a click are left out; NaN if all are: to check it in every batch would keep a
    GPU waiting.
    """
    clicks = (clicked & shown).to(scores.dtype)
    per_list = clicks.sum(dim=1)
    target = clicks / per_list.clamp(min=1).unsqueeze(1)
    return -(target * _log_softmax(scores, shown)).sum() / (per_list > 0).sum()


def listnet(model: nn.Module, lists: Lists, intents: Intents) -> Tensor:
    """The baseline's loss: ListNet on the shown lists, one of which has a click."""
    return listnet_loss(model(lists, intents), lists.clicked, lists.shown)


def query_kl(scores: Tensor, query_scores: Tensor, shown: Tensor) -> Tensor:
    """Mean over lists of KL( softmax(scores) || softmax(query_scores) ) (METHOD.md 2.2 [P]; its direction [C]).

    scores        (lists, candidates) of the whole ranker, without position bias
    query_scores  (lists, candidates) of the query-intent branch alone; constants of a list change nothing in either
    shown         (lists, candidates) bool, False where padded; the values there have no influence, not even NaN
    Returns nats, a scalar >= 0; a list with one candidate counts as 0. Both arguments learn: the ranking is pulled
    towards the query branch as well.
    """
    log_p, log_q = _log_softmax(scores, shown), _log_softmax(query_scores, shown)
    return (log_p.exp() * (log_p - log_q)).masked_fill(~shown, 0).sum(dim=1).mean()


def listnet_kl(kl_weight: float) -> Loss:
    """QE-Rec's loss, for fit: ListNet + kl_weight * query_kl; with weight 0 it is ListNet alone [C: 0.2].

    It calls ranker(lists, intents, branches=True), which returns towers.Branches.
    """

    def loss(ranker: nn.Module, lists: Lists, intents: Intents) -> Tensor:
        scores, relevance, query = ranker(lists, intents, branches=True)
        value = listnet_loss(scores, lists.clicked, lists.shown)
        return value + kl_weight * query_kl(relevance, query, lists.shown) if kl_weight else value

    return loss


def _log_softmax(scores: Tensor, shown: Tensor) -> Tensor:
    floor = torch.finfo(scores.dtype).min  # finite: with -inf, 0 * -inf would turn the gradient of padding into NaN
    return scores.masked_fill(~shown, floor).log_softmax(dim=1)
