"""InfoNCE from a session's query to the intents of the knowledge base, and back (METHOD.md 2.3, step 3 [P])."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor
from torch.nn import functional

from rgalign.data.lists import Lists, QueryIntents
from rgalign.ranker.towers import ThreeTower
from rgalign.run.distributed import all_gather_with_grad, weighted_all_reduce


def digest_of(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of all numbers in them."""
    hashed = sha256()
    for value in tensors:
        hashed.update(value.cpu().contiguous().numpy().tobytes())
    return hashed.hexdigest()


@dataclass(frozen=True, eq=False)
class RankingSpace:
    """The space that RG-CL aligns queries with: a frozen ranker, through which gradients pass.

    ranker   without dropout; its query tower maps e_q into the space, whitening included
    intents  (kb, dim) float32, the intent tower's vectors of the whole knowledge base;  bias  (kb,) of each intent
    users    (sessions, dim) float32, the user tower's vectors; None where only queries are compared
    match    (sessions, kb) float32, what match terms add to the scores; None where the ranker reads none
    """

    ranker: ThreeTower
    intents: Tensor
    bias: Tensor
    users: Tensor | None = None
    match: Tensor | None = None

    @classmethod
    def of(cls, ranker: ThreeTower, intents: QueryIntents, lists: Lists | None = None) -> "RankingSpace":
        """A copy; the ranker itself stays as it was.

        lists  of the sessions, in the order of their prompts. Raises ValueError for intents without texts.
        """
        frozen = copy.deepcopy(ranker).train(False).requires_grad_(False)
        device = frozen.intent.bias.weight.device
        vectors, bias = frozen.intent(intents.to(device))
        rows = torch.arange(len(lists)).split(4096) if lists is not None else ()
        batches = [lists.take(some).to(device) for some in rows]
        users = torch.cat([frozen.user(batch) for batch in batches]) if batches else None
        match = None
        if batches and frozen.match is not None:
            match = torch.cat([frozen.match(batch.match.columns(frozen.config.match)) for batch in batches])
        return cls(frozen, vectors, bias, users, match)

    @property
    def query_dim(self) -> int:
        """Width of the vectors that the ranker reads."""
        return self.ranker.query.query_dim

    def queries(self, vectors: Tensor) -> Tensor:
        """e_q (rows, hidden) -> (rows, dim)."""
        return self.ranker.query.layers(vectors)

    def scores(self, query: Tensor, sessions: Tensor, intents: Tensor) -> Tensor:
        """The ranker's scores (rows, columns), without position bias.

        query (rows, dim) of `queries`; sessions (rows,) their rows in `users`; intents (columns,) rows of the KB
        """
        candidates = intents.expand(len(query), -1)
        found = self.ranker.interaction(self.users[sessions], self.intents, query, candidates) + self.bias[intents]
        return found if self.match is None else found + self.match[sessions][:, intents]

    def to(self, device: torch.device) -> "RankingSpace":
        own = [None if each is None else each.to(device) for each in (self.users, self.match)]
        return RankingSpace(copy.deepcopy(self.ranker).to(device), self.intents.to(device), self.bias.to(device), *own)

    def digest(self) -> str:
        own = [each for each in (self.users, self.match) if each is not None]
        return digest_of([*self.ranker.state_dict().values(), self.intents, self.bias, *own])


@torch.no_grad()
def effective_rank(vectors: Tensor) -> Tensor:
    """exp of the entropy of the singular values' shares (Roy & Vetterli 2007): how many directions are in use.

    vectors  (rows, dim), not centred
    Returns a scalar from 1 (all rows on one line, or zero) to min(rows, dim); NaN where a vector is not finite.
    """
    vectors = _floats(vectors)
    if not vectors.isfinite().all():
        return vectors.new_full((), torch.nan)  # a decomposition would raise, and hide the loss that diverged
    values = torch.linalg.svdvals(vectors)
    return torch.special.entr(values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)).sum().exp()


@torch.no_grad()
def uniformity(vectors: Tensor, t: float = 2.0) -> Tensor:
    """log of the mean over pairs of rows of exp(-t |x - y|^2), rows scaled to length 1 (Wang & Isola 2020).

    vectors  (rows, dim), at least two; memory grows with rows squared: of many, give some thousands
    Returns a scalar: 0 where all rows are one point, the lower the more evenly they cover the sphere.
    """
    distance = torch.pdist(functional.normalize(_floats(vectors), dim=1))
    return distance.square().mul(-t).exp().mean().log()


@torch.no_grad()
def alignment(query: Tensor, positive: Tensor) -> Tensor:
    """Mean over rows of |x - y|^2, both scaled to length 1 (Wang & Isola 2020): 0 where all queries hit, 4 at most.

    query, positive  (rows, dim)
    """
    pairs = functional.normalize(_floats(query), dim=1) - functional.normalize(_floats(positive), dim=1)
    return pairs.square().sum(dim=1).mean()


def _floats(vectors: Tensor) -> Tensor:
    return vectors if vectors.dtype == torch.float64 else vectors.float()


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

    counted    the first rows, so many, count: 0 where a process has a dummy row for rank synchronisation
    in_batch   whether the intents clicked in other rows are negatives; False: the hard ones alone
    symmetric  weight of the other direction [C: 0]
    The rest: see `info_nce`. Its average over processes is the loss of one process with all rows.
    """
    everyone = all_gather_with_grad(clicked[:counted])
    how = {"temperature": temperature, "similarity": similarity}
    loss = info_nce(query, intents, clicked, hard, also, negatives=everyone if in_batch else everyone[:0], **how)
    if symmetric:
        clicks = all_gather_with_grad(torch.cat([clicked[:, None], also], dim=1)[:counted])
        loss = loss + symmetric * session_nce(
            query, intents, clicked, all_gather_with_grad(query[:counted]), clicks, **how
        )
    return weighted_all_reduce(loss, counted)


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
    similarity   cosine | dot; dot is q.v / sqrt(dim), as in the ranker's query branch
    A row's negatives are a set [C]: an intent that is there twice counts once (else popular intents would be pushed
    away by how often they are clicked, unlike in the softmax over the KB), and none that the row clicked is among them.
    A row without negatives counts as 0.
    """
    scores = _similarities(query, intents, similarity) / temperature
    others = ~compared(len(intents), clicked, hard, also, negatives)
    return functional.cross_entropy(scores.masked_fill(others, -torch.inf), clicked)


def compared(intents: int, clicked: Tensor, hard: Tensor, also: Tensor, negatives: Tensor) -> Tensor:
    """(rows, intents) bool: the clicked intent of each row and its negatives. Arguments: see `info_nce`."""
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
    columns = chosen.any(dim=0).nonzero()[:, 0]  # intents that no row compares are not scored
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
    """
    target = intents[clicked]
    same = (clicked[:, None, None] == others_clicks).any(dim=2)
    scores = _similarities(target, others, similarity).masked_fill(same, -torch.inf)
    own = torch.linalg.vecdot(*_scaled(query, target, similarity))
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
    return left * left.shape[-1] ** -0.5, right
