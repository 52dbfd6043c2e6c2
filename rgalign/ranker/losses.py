"""Listwise losses of the rankers."""

import torch
from torch import Tensor


def listnet_loss(scores: Tensor, clicked: Tensor, shown: Tensor) -> Tensor:
    """Mean over lists of the cross-entropy from the clicks of a list to the softmax of its scores (METHOD.md 2.2 [P]).

    scores   (lists, candidates), any scale; adding a constant to a list changes nothing
    clicked  (lists, candidates) bool; several clicks of a list share its mass equally
    shown    (lists, candidates) bool, False where padded; what stands there has no influence, not even NaN
    Returns nats, a scalar. Lists without a click say nothing and are left out; ValueError if all are.
    """
    clicks = (clicked & shown).to(scores.dtype)
    per_list = clicks.sum(dim=1)
    if not per_list.any():
        raise ValueError(f"none of the {len(clicked)} lists has a click on a shown candidate: nothing to learn from")
    floor = torch.finfo(scores.dtype).min  # finite: with -inf, 0 * -inf would turn the gradient of padding into NaN
    log_probability = scores.masked_fill(~shown, floor).log_softmax(dim=1)
    target = clicks / per_list.clamp(min=1).unsqueeze(1)
    return -(target * log_probability).sum() / (per_list > 0).sum()
