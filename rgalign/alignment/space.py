"""The space that RG-CL pulls queries into: a frozen ranker, through which gradients pass and in which none stays."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

from rgalign.data.lists import Lists, QueryIntents
from rgalign.ranker.three_tower import ThreeTower


@dataclass(frozen=True, eq=False)
class RankingSpace:
    """A frozen ranker and what it makes of the knowledge base and of the sessions to be learnt from.

    ranker   without dropout; its query tower maps e_q into the space, whitening included
    intents  (kb, dim) float32, the intent tower's vectors of the whole knowledge base;  bias  (kb,) of each intent
    users    (sessions, dim) float32, the user tower's vectors; None where only queries are compared
    """

    ranker: ThreeTower
    intents: Tensor
    bias: Tensor
    users: Tensor | None = None

    @classmethod
    def of(cls, ranker: ThreeTower, intents: QueryIntents, lists: Lists | None = None) -> "RankingSpace":
        """A copy; the ranker itself stays as it was.

        lists  of the sessions, in the order of their prompts. Raises ValueError for intents without texts.
        """
        still = copy.deepcopy(ranker).train(False).requires_grad_(False)
        device = still.intent.bias.weight.device
        vectors, bias = still.intent(intents.to(device))
        rows = torch.arange(len(lists)).split(4096) if lists is not None else ()
        users = [still.user(lists.take(some).to(device)) for some in rows]
        return cls(still, vectors, bias, torch.cat(users) if users else None)

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
        return self.ranker.interaction(self.users[sessions], self.intents, query, candidates) + self.bias[intents]

    def to(self, device: torch.device) -> "RankingSpace":
        users = None if self.users is None else self.users.to(device)
        return RankingSpace(copy.deepcopy(self.ranker).to(device), self.intents.to(device), self.bias.to(device), users)

    def digest(self) -> str:
        """SHA-256 of all numbers in it."""
        hashed = sha256()
        users = [] if self.users is None else [self.users]
        for value in (*self.ranker.state_dict().values(), self.intents, self.bias, *users):
            hashed.update(value.cpu().contiguous().numpy().tobytes())
        return hashed.hexdigest()


def space_faults(spaces: Sequence[RankingSpace], sessions: int, *, scored: bool) -> list[str]:
    """What keeps these rankers from teaching this many sessions together. scored: by the rankers' own scores."""
    faults = [] if spaces else ["there is no ranker to be aligned with"]
    if len({len(space.intents) for space in spaces}) > 1:
        faults.append("the rankers know different numbers of intents")
    known = [None if space.users is None else len(space.users) for space in spaces]
    if scored and any(count != sessions for count in known):
        faults.append(
            f"the rankers know {known} users, the prompts are of {sessions}: give RankingSpace.of their lists"
        )
    return faults
