"""InfoNCE from a session's query to the intents of the knowledge base, and back (METHOD.md 2.3, step 3 [P])."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from rgalign.alignment.gather import evened, gathered

SIMILARITIES = ("ranker", "cosine", "dot")


def contrastive_loss(
    query: Tensor,
    intents: Tensor,
    clicked: Tensor,
    hard: Tensor,
    also: Tensor,
    *,
    counted: int,
    temperature: float,
    similarity: str,
    in_batch: bool,
    symmetric: float,
) -> Tensor:
    """`info_nce` + symmetric * `session_nce` of this process's rows, against the rows of all processes.

    counted    the rows that count are the first so many: none where a process runs one for company (reasoner.pieces)
    in_batch   whether the intents clicked in other rows are negatives; False: the hard ones alone
    symmetric  weight of the other direction [C: 0]
    The rest as of `info_nce`. Averaged over processes it is what one process with all rows would find. Intents are
    frozen, so their row numbers are all that `info_nce` needs of other processes; `session_nce` needs their queries.
    """
    everyone = gathered(clicked[:counted])
    how = {"temperature": temperature, "similarity": similarity}
    loss = info_nce(query, intents, clicked, hard, also, negatives=everyone if in_batch else everyone[:0], **how)
    if symmetric:
        clicks = gathered(torch.cat([clicked[:, None], also], dim=1)[:counted])
        loss = loss + symmetric * session_nce(query, intents, clicked, gathered(query[:counted]), clicks, **how)
    return evened(loss, counted)


def info_nce(
    query: Tensor,
    intents: Tensor,
    clicked: Tensor,
    hard: Tensor,
    also: Tensor,
    *,
    negatives: Tensor,
    temperature: float = 0.2,
    similarity: str = "cosine",
) -> Tensor:
    """Mean over rows of -log p(clicked intent | query) in nats, p a softmax over it and the row's negatives.

    query        (rows, dim)
    intents      (kb, dim) vectors of the whole knowledge base
    clicked      (rows,) row of the clicked intent in `intents`
    hard         (rows, h) rows of a row's own negatives, -1: none
    also         (rows, a) rows of what was clicked beside it in the same session, -1: none; never a row's negatives
    negatives    (n,) rows that are negatives of every row, as the intents clicked anywhere in the batch
    temperature  > 0; similarities are divided by it [C: 0.2]
    similarity   cosine | dot; dot is q.v / sqrt(dim), as the ranker's query branch has it: at temperature 1, with the
                 whole KB as negatives, the loss is -log of the reward model's own p(clicked | query) over the KB
    A row's negatives are a set [C]: an intent that is there twice, in the batch or as a hard one too, counts once
    (twice would push popular intents away by how often they are clicked, which the full softmax over the KB does
    not), and no intent that the row clicked is among them. A row without negatives counts as 0.
    """
    scores = _similarities(query, intents, similarity) / temperature
    others = ~compared(len(intents), clicked, hard, also, negatives)
    return functional.cross_entropy(scores.masked_fill(others, -torch.inf), clicked)


def compared(intents: int, clicked: Tensor, hard: Tensor, also: Tensor, negatives: Tensor) -> Tensor:
    """(rows, intents) bool: the clicked intent of each row and its negatives. Arguments as of `info_nce`."""
    rows = torch.arange(len(clicked), device=clicked.device)
    found = torch.zeros(len(clicked), intents + 1, dtype=torch.bool, device=clicked.device)
    found[:, negatives] = True
    found[rows[:, None], hard] = True  # -1 is the last column, which stands for no intent
    found[rows[:, None], also] = False
    found[rows, clicked] = True
    return found[:, :intents]


def ranker_nce(
    score: Callable[[Tensor], Tensor],
    intents: int,
    clicked: Tensor,
    hard: Tensor,
    also: Tensor,
    *,
    negatives: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """`info_nce` with the frozen ranker's own score of a session and an intent for the similarity [C].

    score    rows of the knowledge base (columns,) -> scores (rows, columns) of the batch's sessions
    intents  how many the knowledge base has
    At temperature 1, with a shown list's intents for negatives, it is the ranker's ListNet loss (of one click).
    """
    chosen = compared(intents, clicked, hard, also, negatives)
    columns = chosen.any(dim=0).nonzero()[:, 0]  # what nobody is compared with need not be scored
    logits = score(columns) / temperature
    place = torch.searchsorted(columns, clicked)
    return functional.cross_entropy(logits.masked_fill(~chosen[:, columns], -torch.inf), place)


def session_nce(
    query: Tensor,
    intents: Tensor,
    clicked: Tensor,
    others: Tensor,
    others_clicks: Tensor,
    *,
    temperature: float = 0.2,
    similarity: str = "cosine",
) -> Tensor:
    """Mean over rows of -log p(own session | clicked intent): against the sessions that did not click it.

    others, others_clicks   (sessions, dim) and (sessions, c): queries and all clicks of the batch's sessions, -1: none;
                            those that clicked a row's own intent, itself among them, are not its negatives
    The rest as of `info_nce`. In nats; a row without negatives counts as 0.
    """
    wanted = intents[clicked]
    same = (clicked[:, None, None] == others_clicks).any(dim=2)
    scores = _similarities(wanted, others, similarity).masked_fill(same, -torch.inf)
    own = torch.linalg.vecdot(*_scaled(query, wanted, similarity))
    logits = torch.cat([own[:, None], scores], dim=1) / temperature
    return functional.cross_entropy(logits, torch.zeros_like(clicked))


def _similarities(left: Tensor, right: Tensor, similarity: str) -> Tensor:
    """(rows, dim), (columns, dim) -> (rows, columns)."""
    left, right = _scaled(left, right, similarity)
    return left @ right.T


def _scaled(left: Tensor, right: Tensor, similarity: str) -> tuple[Tensor, Tensor]:
    """Both sides (.., dim) so that their inner product is the similarity."""
    if similarity == "cosine":
        return functional.normalize(left, dim=-1), functional.normalize(right, dim=-1)
    if similarity == "dot":
        return left * left.shape[-1] ** -0.5, right
    raise ValueError(f"similarity {similarity!r} is none of cosine, dot")  # a ranker's score is no product: ranker_nce
