"""QE-Rec: user, intent and query tower, and their three-way interaction (METHOD.md 2.2)."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgalign.data.lists import Intents, Lists
from rgalign.ranker.layers import Whitening
from rgalign.ranker.two_tower import IntentTower, TwoTowerConfig, UserTower, vectors_of
from rgalign.seeding import seeded

INTERACTIONS = ("attention", "product")
PRODUCTS = 7  # u', v', q', u'*v', q'*v', u'*q', u'*v'*q'
PAIRS_AT_ONCE = 1 << 16  # (session, intent) pairs; whole-KB scoring so stays below some 200 MB at dim 64


class Branches(NamedTuple):
    """What the ranker and its query-intent branch say of the candidates, each (lists, candidates).

    scores     what is trained on: in training with the position's bias
    relevance  the same without position bias
    query      q.v / sqrt(dim): the query tower and the intent tower alone
    """

    scores: Tensor
    relevance: Tensor
    query: Tensor


@dataclass(frozen=True)
class ThreeTowerConfig(TwoTowerConfig):
    """All that fixes the shape of a three-tower ranker: a two-tower's settings and these (each our choice [C]).

    query_dim           width of e_q and of the intents' text vectors, >= 1
    interaction         attention: each tower attends over the other two before the products; product: without
    query_hidden        width of the query tower's hidden layer; 0: one linear map
    query_dropout       on the whitened e_q, in the query tower's hidden layer and in the interaction's
    interaction_hidden  width of the hidden layer that scores a pair from the towers' products
    """

    KIND: ClassVar[str] = "three-tower"

    interaction: str = "attention"
    query_hidden: int = 128
    query_dropout: float = 0.5
    interaction_hidden: int = 32

    def faults(self) -> list[str]:
        faults = super().faults()
        for name, least in {"query_dim": 1, "query_hidden": 0, "interaction_hidden": 1}.items():
            given = getattr(self, name)
            if not isinstance(given, int) or given < least:
                faults.append(f"{name} is {given!r}; expected a whole number >= {least}")
        if not isinstance(self.query_dropout, int | float) or not 0 <= self.query_dropout < 1:
            faults.append(f"query_dropout is {self.query_dropout!r}; expected a share, 0 <= query_dropout < 1")
        if self.interaction not in INTERACTIONS:
            faults.append(f"interaction is {self.interaction!r}; expected one of {', '.join(INTERACTIONS)}")
        return list(dict.fromkeys(faults))


class QueryTower(nn.Module):
    """e_q -> q: whitening and layer norm, then one or two layers."""

    def __init__(self, config: ThreeTowerConfig):
        super().__init__()
        self.query_dim, hidden, share = config.query_dim, config.query_hidden, config.query_dropout
        layers: list[nn.Module] = [Whitening(config.query_dim, config.whitening_ridge), nn.Dropout(share)]
        if hidden:
            layers += [nn.Linear(config.query_dim, hidden), nn.ReLU(), nn.Dropout(share)]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden or config.query_dim, config.dim))

    def forward(self, lists: Lists) -> Tensor:
        """-> (lists, dim)."""
        return self.layers(vectors_of(lists, self.query_dim))


class TowerAttention(nn.Module):
    """Each of user, intent and query attends over the other two, and adds what it found to itself [C].

    A softmax over two logits is a sigmoid of their difference, so u' = u + W_q q + a (W_v v - W_q q): projections are
    made once a tower (not once a pair), and only the mix is made for every pair.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.user, self.intent, self.query = (nn.Linear(dim, 3 * dim, bias=False) for _ in range(3))
        self.scale = dim**-0.5
        with torch.no_grad():
            for tower in (self.user, self.intent, self.query):
                tower.weight[2 * dim :] = 0  # nothing is given at first: training starts from the plain products

    def forward(self, user: Tensor, vectors: Tensor, query: Tensor, candidates: Tensor) -> tuple[Tensor, ...]:
        """user, query (lists, dim), vectors (intents, dim), candidates (lists, c) -> three times (lists, c, dim)."""
        ask_u, key_u, give_u = self.user(user).chunk(3, dim=1)
        ask_v, key_v, give_v = self.intent(vectors).chunk(3, dim=1)
        ask_q, key_q, give_q = self.query(query).chunk(3, dim=1)
        # logits of each pair's intent against its session, by one product over the whole KB: cheaper than gathering
        over_intents = torch.cat([ask_u @ key_v.T, key_u @ ask_v.T, key_q @ ask_v.T, ask_q @ key_v.T], dim=1)
        places = torch.cat([candidates + i * len(vectors) for i in range(4)], dim=1)
        u_v, v_u, v_q, q_v = over_intents.gather(1, places).chunk(4, dim=1)
        u_q = (ask_u * key_q).sum(dim=1, keepdim=True)
        q_u = (ask_q * key_u).sum(dim=1, keepdim=True)
        intent, give_v = F.embedding(candidates, torch.cat([vectors, give_v], dim=1)).chunk(2, dim=2)
        user, query, give_u, give_q = (each.unsqueeze(1) for each in (user, query, give_u, give_q))
        return (
            user + self._mix(u_v - u_q, give_v, give_q),
            intent + self._mix(v_u - v_q, give_u, give_q),
            query + self._mix(q_u - q_v, give_u, give_v),
        )

    def _mix(self, logit: Tensor, first: Tensor, second: Tensor) -> Tensor:
        share = (logit * self.scale).sigmoid().unsqueeze(2)
        # autocast leaves what is gathered in float32 beside products in bfloat16; lerp takes one type alone
        return torch.lerp(*torch.broadcast_tensors(second, first.to(second.dtype)), share.to(second.dtype))


class Interaction(nn.Module):
    """(u, v, q) of a pair -> its score: a hidden layer over [u', v', q', u'*v', q'*v', u'*q', u'*v'*q'] [C].

    A linear path past the hidden layer starts as (u'.v' + q'.v') / sqrt(dim): a two-tower that hears the query.
    """

    def __init__(self, config: ThreeTowerConfig):
        super().__init__()
        dim, inputs = config.dim, PRODUCTS * config.dim
        self.attention = TowerAttention(dim) if config.interaction == "attention" else None
        self.hidden = nn.Linear(inputs, config.interaction_hidden)
        self.dropout = nn.Dropout(config.query_dropout)
        self.out = nn.Linear(config.interaction_hidden, 1, bias=False)
        self.direct = nn.Linear(inputs, 1, bias=False)
        with torch.no_grad():
            self.direct.weight.zero_()[:, 3 * dim : 5 * dim] = dim**-0.5

    def forward(self, user: Tensor, vectors: Tensor, query: Tensor, candidates: Tensor) -> Tensor:
        """user, query (lists, dim), vectors (intents, dim), candidates (lists, c), no padding -> (lists, c)."""
        rows = max(1, PAIRS_AT_ONCE // max(1, candidates.shape[1]))
        chunks = zip(user.split(rows), query.split(rows), candidates.split(rows), strict=True)
        return torch.cat([self._score(u, vectors, q, shown) for u, q, shown in chunks])

    def _score(self, user: Tensor, vectors: Tensor, query: Tensor, candidates: Tensor) -> Tensor:
        if self.attention is not None:
            u, v, q = self.attention(user, vectors, query, candidates)
        else:
            v = F.embedding(candidates, vectors)
            u, q = user.unsqueeze(1).expand_as(v), query.unsqueeze(1).expand_as(v)
        u_v = u * v
        inputs = torch.cat([u, v, q, u_v, q * v, u * q, u_v * q], dim=2)
        return (self.direct(inputs) + self.out(self.dropout(F.relu(self.hidden(inputs))))).squeeze(2)


class ThreeTower(nn.Module):
    """score(session, intent) = interaction(user, intent, query) + bias of the intent; in training, + of the position.

    Reads QueryLists and QueryIntents (data.lists).
    """

    Config = ThreeTowerConfig

    def __init__(self, config: ThreeTowerConfig, *, seed: int = 0):
        super().__init__()
        self.config = config
        with seeded(seed):
            self.user = UserTower(config)
            self.intent = IntentTower(config)
            self.query = QueryTower(config)
            self.interaction = Interaction(config)
        self.position = nn.Parameter(torch.zeros(config.positions)) if config.positions else None

    def forward(self, lists: Lists, intents: Intents, *, branches: bool = False) -> Tensor | Branches:
        """-> scores (lists, candidates), or with `branches` all three; a padded candidate has some finite score."""
        user, query = self.user(lists), self.query(lists)
        vectors, bias = self.intent(intents)
        candidates = lists.candidates.long().clamp(min=0)
        relevance = scores = self.interaction(user, vectors, query, candidates) + bias[candidates]
        if self.training and self.position is not None:
            scores = scores + self.position[: scores.shape[1]]
        if not branches:
            return scores
        alone = (query * self.config.dim**-0.5) @ vectors.T
        return Branches(scores, relevance, alone.gather(1, candidates))
