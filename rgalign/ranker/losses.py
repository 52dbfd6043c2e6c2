"""Listwise losses of the rankers, by what a click competes with (ranker.exposure)."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from rgalign.data.features import UNKNOWN
from rgalign.data.lists import PADDING, Intents, Lists
from rgalign.params_training import RankerSettings

Loss = Callable[[nn.Module, Lists, Intents], Tensor]  # mean over the lists of a batch
Widen = Callable[[Lists, Intents], Lists]  # the lists with all that a click competes with


def listnet_loss(scores: Tensor, clicked: Tensor, shown: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean over lists of the cross-entropy from the clicks of a list to the softmax of its scores (METHOD.md 2.2 [P]).

    scores   (lists, candidates), any scale; adding a constant to a list changes nothing
    clicked  (lists, candidates) bool; several clicks of a list share its mass equally
    shown    (lists, candidates) bool, False where padded; the values there have no influence, not even NaN
    weight   (lists, candidates) of each click: a list's clicks are then summed, not averaged, since an estimate by
             inverse propensities needs a term a click; None: no weights
    Returns nats, a scalar. Lists without a click are left out; NaN if all are: to check it in every batch would keep a
    GPU waiting.
    """
    clicks = (clicked & shown).to(scores.dtype)
    per_list = clicks.sum(dim=1)
    target = clicks / per_list.clamp(min=1).unsqueeze(1) if weight is None else clicks * weight
    return -(target * _log_softmax(scores, shown)).sum() / (per_list > 0).sum()


def listnet(model: nn.Module, lists: Lists, intents: Intents) -> Tensor:
    """The baseline's loss: ListNet on the shown lists, one of which has a click."""
    return listnet_loss(model(lists, intents), lists.clicked, lists.shown)


def listnet_over(widen: Widen) -> Loss:
    """ListNet over the lists that `widen` makes of those shown."""

    def loss(model: nn.Module, lists: Lists, intents: Intents) -> Tensor:
        wide = widen(lists, intents)
        return listnet_loss(model(wide, intents), wide.clicked, wide.shown, wide.weight)

    return loss


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


def listnet_kl(kl_weight: float, widen: Widen | None = None) -> Loss:
    """QE-Rec's loss, for fit: ListNet + kl_weight * query_kl; with weight 0 it is ListNet alone [C: 0.2].

    widen  what ListNet is over, see `widen_by`; query_kl is over the shown list alone. None: both are
    It calls ranker(lists, intents, branches=True), which returns towers.Branches.
    """

    def loss(ranker: nn.Module, lists: Lists, intents: Intents) -> Tensor:
        wide = widen(lists, intents) if widen else lists
        scores, relevance, query = ranker(wide, intents, branches=True)
        value = listnet_loss(scores, wide.clicked, wide.shown, wide.weight if widen else None)
        own = slice(lists.candidates.shape[1])
        return value + kl_weight * query_kl(relevance[:, own], query[:, own], lists.shown) if kl_weight else value

    return loss


def widen_by(settings: RankerSettings) -> Widen | None:
    """What a click competes with in training (ranker.exposure) [C]; None: the shown list.

    kb   and kb_negatives intents that were not shown. They have the mean position bias. One that was never clicked in
         train is not among them: it would only be seen as not clicked, which says nothing of the day when it is new
    ips  and all intents that were not shown, each click weighted by 1 / its chance of being seen (ranker.exposure):
         unbiased for the attraction of each intent where nothing is capped. The ranker has no position bias: with one,
         position would be corrected twice
    """
    if settings.exposure == "kb":
        return lambda lists, intents: replace(
            with_unshown(lists, intents, settings.kb_negatives, intents.id > UNKNOWN), weight=None
        )
    return _weighted if settings.exposure == "ips" else None


def _weighted(lists: Lists, intents: Intents) -> Lists:
    if lists.weight is None:
        raise ValueError("ranker.exposure is ips, and these lists have no weights: see ranker.exposure.with_exposure")
    wide = with_unshown(lists, intents, len(intents))
    return replace(wide, weight=nn.functional.pad(lists.weight, (0, wide.unshown)))


def with_unshown(lists: Lists, intents: Intents, most: int, among: Tensor | None = None) -> Lists:
    """The lists and, on the right of each, at most so many intents that existed at its time and were not shown.

    They are drawn uniformly without replacement, from torch's random state (`fit` seeds it); among: (intents,) bool,
    those that may be drawn. Raises ValueError for lists without timestamps.
    """
    if lists.timestamp is None:
        raise ValueError(
            "these lists have no timestamps, which say what else could have been shown: see ranker.exposure"
        )
    device, rows = lists.candidates.device, len(lists)
    left = torch.from_numpy(intents.existing(lists.timestamp)).to(device)
    left = left if among is None else left & among
    padding_last = torch.where(lists.shown, lists.candidates.long(), len(intents))
    shown = torch.zeros((rows, len(intents) + 1), dtype=torch.bool, device=device).scatter_(1, padding_last, True)
    order = torch.rand(left.shape, device=device).masked_fill(~left | shown[:, :-1], 2)  # 2: not to be drawn
    order, drawn = order.topk(min(most, len(intents)), dim=1, largest=False)
    drawn = torch.where(order < 2, drawn, PADDING).to(lists.candidates.dtype)
    return replace(
        lists,
        candidates=torch.cat([lists.candidates, drawn], dim=1),
        clicked=nn.functional.pad(lists.clicked, (0, drawn.shape[1])),
        unshown=drawn.shape[1],
    )


def _log_softmax(scores: Tensor, shown: Tensor) -> Tensor:
    floor = torch.finfo(scores.dtype).min  # finite: with -inf, 0 * -inf would turn the gradient of padding into NaN
    return scores.masked_fill(~shown, floor).log_softmax(dim=1)
