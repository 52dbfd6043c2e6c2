"""The ranker that knows nothing of the session: how often each intent was clicked in train."""

import torch
from torch import Tensor, nn

from rgalign.data.lists import Intents, Lists
from rgalign.ranker.fit import refuse_other_parts


class Popularity(nn.Module):
    """Every session gets the same scores: log(clicks + smoothing) of each intent."""

    def __init__(self, log_clicks: Tensor):
        super().__init__()
        self.log_clicks = nn.Parameter(log_clicks, requires_grad=False)

    def forward(self, lists: Lists, intents: Intents) -> Tensor:
        """-> scores (lists, candidates)."""
        return self.log_clicks[lists.candidates.long().clamp(min=0)]


def popularity(train: Lists, intents: Intents, *, smoothing: float = 0.5) -> Popularity:
    """Count the clicks of train, not clicks per impression: what is shown often is shown for a reason [C].

    smoothing  added to every count, so that an intent never clicked has a finite score; any value > 0 gives the same
               order, which is all that the metrics read
    """
    refuse_other_parts("popularity", train=train)
    clicked = train.candidates[train.clicked].long().cpu()
    return Popularity((torch.bincount(clicked, minlength=len(intents)) + smoothing).log())
