"""The rankers' towers: the two-tower baseline, and QE-Rec with its query tower (METHOD.md 2.2).

A ranker is an nn.Module with a `Config` (a dataclass that store writes), `forward(lists, intents)` -> scores (lists,
candidates), and `loss(settings)`, what it is trained by. store.ARCHITECTURES lists them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, ClassVar, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from rgalign.data.lists import Intents, Lists, listed_in
from rgalign.params_training import Interactions, RankerSettings
from rgalign.ranker.layers import (
    BagEmbedding,
    FieldAttention,
    FieldEmbedding,
    MatchTerms,
    MixtureOfExperts,
    Whitening,
    unknown_at_random,
)
from rgalign.ranker.losses import Loss, listnet, listnet_kl, listnet_over, widen_by
from rgalign.seeding import seeded

PAIRS_AT_ONCE = 1 << 16  # (session, intent) pairs; keeps whole-KB scoring below some 200 MB at dim 64


Count, Natural = Annotated[int, Field(ge=1)], Annotated[int, Field(ge=0)]
Dropout, Positive = Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class TwoTowerConfig:
    """All that fixes the shape of a two-tower ranker (METHOD.md 2.2). store.load checks the types: files are edited.

    field_sizes, history_sizes   vocabulary of each field and of each history column (FeatureSpace)
    word_buckets                 hashed words of session and intent texts; used only where text is True
    intent_ids, categories       vocabularies of the knowledge base (FeatureSpace)
    positions                    longest training list; 0 where positions are not real: no position bias
    text                         True: the words of both sides are read; False: ids only
    query_dim                    width of a reasoner's vectors of sessions and intents; 0: none are read
    match                        names of the match terms that are read (ranker.match)
    The others are those of params_training.RankerSettings.
    """

    __pydantic_config__: ClassVar = ConfigDict(strict=True, extra="forbid")

    field_sizes: tuple[int, ...]
    history_sizes: tuple[int, ...]
    word_buckets: Count
    intent_ids: Count
    categories: Count
    positions: Natural
    text: bool
    embedding_dim: Count
    dim: Count
    attention_layers: Natural
    heads: Count
    experts: Count
    hidden: Count
    dropout: Dropout
    id_dropout: Dropout
    intent_std: Positive
    whitening_ridge: Positive
    query_dim: Natural
    match: tuple[str, ...] = field(default=(), kw_only=True)

    @classmethod
    def of(cls, settings: RankerSettings, **given) -> Self:
        """Settings with what the data and the variant give, the other fields of this class."""
        shape = {each.name: getattr(settings, each.name) for each in fields(cls) if hasattr(settings, each.name)}
        return cls(**shape | given)


@dataclass(frozen=True)
class ThreeTowerConfig(TwoTowerConfig):
    """All that fixes the shape of a three-tower ranker.

    query_dropout is on the whitened e_q, in the query tower's hidden layer and in the interaction's.
    """

    query_dim: Count
    interaction: Interactions
    query_hidden: Natural
    query_dropout: Dropout
    interaction_hidden: Count


def vectors_of(container: Lists | Intents, dim: int) -> Tensor:
    """A reasoner's vectors of sessions or intents, float32 (rows, dim). Raises ValueError where they are missing."""
    name = "query" if isinstance(container, Lists) else "text"
    values = getattr(container, name, None)
    if values is None or values.shape[1] != dim:
        found = "none" if values is None else f"{values.shape[1]} wide"
        raise ValueError(
            f"this ranker reads vectors of {dim}; these {type(container).__name__} have {found}: "
            "add them by ranker.train.with_vectors"
        )
    return values.float()


def set_whitening(model: nn.Module, lists: Lists, intents: Intents) -> None:
    """Fix how a ranker scales the vectors it reads: queries by these lists (train), texts by the intents of their time.

    Raises ValueError where lists or intents have no vectors.
    """
    known = torch.from_numpy(of_their_time(lists, intents))
    for name, module in model.named_modules():
        if isinstance(module, Whitening):
            of_intents = name.startswith("intent.")
            vectors = vectors_of(intents if of_intents else lists, len(module.mean))
            module.set(vectors[known] if of_intents else vectors)


def of_their_time(lists: Lists, intents: Intents) -> np.ndarray:
    """(intents,) bool: the intents that existed at the time of these lists (usually train).

    Lists have no date: the latest valid_from among their candidates stands for it.
    """
    dates = intents.valid_from[listed_in(lists, len(intents))]
    dates = dates[~np.isnat(dates)]
    always = np.isnat(intents.valid_from)
    return always | (intents.valid_from <= dates.max()) if len(dates) else always


def _projection(query_dim: int, ridge: float, width: int) -> nn.Module | None:
    """Of a reasoner's vectors, whitened; None where none are read."""
    return nn.Sequential(Whitening(query_dim, ridge), nn.Linear(query_dim, width)) if query_dim else None


def match_of(match: MatchTerms | None, names: Sequence[str], lists: Lists) -> Tensor | float:
    """(lists, candidates): what the match terms add to the scores; 0 of a ranker without them."""
    if match is None:
        return 0.0
    if lists.match is None:
        raise ValueError(f"this ranker reads the match terms {', '.join(names)}; these lists have none")
    return match(lists.match.of_candidates(lists.candidates, names))


def bias_of(position: Tensor, lists: Lists) -> Tensor:
    """(candidates,): the bias of each position (positions,); that of an intent that was not shown is their mean [C]."""
    shown = position[: lists.candidates.shape[1] - lists.unshown]
    return torch.cat([shown, shown.mean().expand(lists.unshown)]) if lists.unshown else shown


class UserTower(nn.Module):
    """Session -> vector: attention over its fields, bags of history and of words among them; then experts [P].

    query_dim  width of a frozen LM vector of the session that is one more field (a control); 0: none
    """

    def __init__(self, config: TwoTowerConfig, *, query_dim: int = 0):
        super().__init__()
        width = config.embedding_dim
        self.fields = FieldEmbedding(config.field_sizes, width)
        self.history = nn.ModuleList(BagEmbedding(size, width) for size in config.history_sizes)
        self.words = BagEmbedding(config.word_buckets, width) if config.text else None
        self.query = _projection(query_dim, config.whitening_ridge, width)
        self.query_dim = query_dim
        layers = [FieldAttention(width, width, config.heads) for _ in range(config.attention_layers)]
        self.attention = nn.Sequential(*layers)
        inputs = (len(config.field_sizes) + len(config.history_sizes) + int(config.text) + bool(query_dim)) * width
        self.experts = MixtureOfExperts(inputs, config.hidden, config.dim, config.experts, config.dropout)
        self.direct = nn.Linear(inputs, config.dim)  # past the attention: additive effects need not be learnt by it
        self.dropout = nn.Dropout(config.dropout)
        self.id_dropout = config.id_dropout

    def forward(self, lists: Lists) -> Tensor:
        """-> (lists, dim)."""
        ids, history = lists.fields.long(), lists.history
        if self.training:
            ids = unknown_at_random(ids, self.id_dropout)
            history = [bag._replace(values=unknown_at_random(bag.values, self.id_dropout)) for bag in history]
        bags = [table(bag) for table, bag in zip(self.history, history, strict=True)]
        if self.words is not None:
            bags.append(self.words(lists.words))
        if self.query is not None:
            bags.append(self.query(vectors_of(lists, self.query_dim)))
        embedded = torch.cat([self.fields(ids), *(bag.unsqueeze(1) for bag in bags)], dim=1)
        embedded = self.dropout(embedded)
        return self.experts(self.attention(embedded).flatten(1)) + self.direct(embedded.flatten(1))


class IntentTower(nn.Module):
    """Intent -> vector and bias: id + category + words + projected text vector, of those that are read.

    An unseen intent is the unknown id with its own category, words and text; an unseen category is the unknown one.
    Both unknown rows learn by dropout, each with a draw of its own [C]: a new intent mostly has a known category.
    """

    def __init__(self, config: TwoTowerConfig):
        super().__init__()
        self.id = nn.Embedding(config.intent_ids, config.dim)
        self.category = nn.Embedding(config.categories, config.dim)
        for table in (self.id, self.category):
            nn.init.normal_(table.weight, std=config.intent_std)
        self.words = BagEmbedding(config.word_buckets, config.dim) if config.text else None
        self.query_dim = config.query_dim
        self.text = _projection(config.query_dim, config.whitening_ridge, config.dim)
        self.bias = nn.Linear(config.dim, 1)
        self.id_dropout = config.id_dropout

    def forward(self, intents: Intents) -> tuple[Tensor, Tensor]:
        """The whole knowledge base -> (intents, dim) and (intents,)."""
        ids, categories = intents.id.long(), intents.category.long()
        if self.training:
            ids, categories = (unknown_at_random(values, self.id_dropout) for values in (ids, categories))
        vectors = self.id(ids) + self.category(categories)
        if self.words is not None:
            vectors = vectors + self.words(intents.words)
        if self.text is not None:
            vectors = vectors + self.text(vectors_of(intents, self.query_dim))
        return vectors, self.bias(vectors).squeeze(1)


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
    """Each of user, intent and query attends over the other two and adds the result to itself [C].

    A softmax over two logits is a sigmoid of their difference, so u' = u + W_q q + a (W_v v - W_q q): projections are
    made once a tower (not once a pair), and only the mix is made for every pair.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.user, self.intent, self.query = (nn.Linear(dim, 3 * dim, bias=False) for _ in range(3))
        self.scale = dim**-0.5
        with torch.no_grad():
            for tower in (self.user, self.intent, self.query):
                tower.weight[2 * dim :] = 0  # zero at first: training starts from the plain products

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


class NoAttention(nn.Module):
    """The three towers as they are."""

    def __init__(self, dim: int):
        super().__init__()

    def forward(self, user: Tensor, vectors: Tensor, query: Tensor, candidates: Tensor) -> tuple[Tensor, ...]:
        """As TowerAttention."""
        intent = F.embedding(candidates, vectors)
        return user.unsqueeze(1).expand_as(intent), intent, query.unsqueeze(1).expand_as(intent)


# What the towers of a pair know of one another before they are multiplied; a new way is a module and an entry, here and
# in params_training.Interactions.
INTERACTIONS = {"attention": TowerAttention, "product": NoAttention}


class Interaction(nn.Module):
    """(u, v, q) of a pair -> its score: a hidden layer over [u', v', q', u'*v', q'*v', u'*q', u'*v'*q'] [C].

    A linear path past the hidden layer starts as (u'.v' + q'.v') / sqrt(dim): a two-tower conditioned on the query.
    """

    def __init__(self, config: ThreeTowerConfig):
        super().__init__()
        dim, inputs = config.dim, 7 * config.dim
        self.attention = INTERACTIONS[config.interaction](dim)
        self.hidden = nn.Linear(inputs, config.interaction_hidden)
        self.dropout = nn.Dropout(config.query_dropout)
        self.out = nn.Linear(config.interaction_hidden, 1, bias=False)
        self.direct = nn.Linear(inputs, 1, bias=False)
        with torch.no_grad():
            self.direct.weight.zero_()[:, 3 * dim : 5 * dim] = dim**-0.5

    def forward(self, user: Tensor, vectors: Tensor, query: Tensor, candidates: Tensor) -> Tensor:
        """user, query (lists, dim), vectors (intents, dim), candidates (lists, c), no padding -> (lists, c)."""
        rows, scores = max(1, PAIRS_AT_ONCE // max(1, candidates.shape[1])), []
        for users, queries, shown in zip(user.split(rows), query.split(rows), candidates.split(rows), strict=True):
            u, v, q = self.attention(users, vectors, queries, shown)
            u_v = u * v
            inputs = torch.cat([u, v, q, u_v, q * v, u * q, u_v * q], dim=2)
            scores.append((self.direct(inputs) + self.out(self.dropout(F.relu(self.hidden(inputs))))).squeeze(2))
        return torch.cat(scores)


class TwoTower(nn.Module):
    """score(session, intent) = user . intent / sqrt(dim) + bias of the intent + match terms; in training, + bias of the
    position."""

    Config = TwoTowerConfig

    def __init__(self, config: TwoTowerConfig, *, seed: int = 0):
        super().__init__()
        self.config = config
        with seeded(seed):
            self.user = UserTower(config, query_dim=config.query_dim)
            self.intent = IntentTower(config)
        self.position = nn.Parameter(torch.zeros(config.positions)) if config.positions else None
        self.match = MatchTerms(len(config.match)) if config.match else None
        if self.match:  # training starts from the match terms alone
            for weights in (self.user.experts.narrow, *self.user.direct.parameters(), *self.intent.bias.parameters()):
                nn.init.zeros_(weights)

    @staticmethod
    def loss(settings: RankerSettings) -> Loss:
        return listnet_over(widen) if (widen := widen_by(settings)) else listnet

    def forward(self, lists: Lists, intents: Intents) -> Tensor:
        """-> scores (lists, candidates); a padded candidate has some finite score."""
        user = self.user(lists) * self.config.dim**-0.5
        vectors, bias = self.intent(intents)
        candidates = lists.candidates.long().clamp(min=0)
        scores = torch.addmm(bias, user, vectors.T).gather(1, candidates)
        scores = scores + match_of(self.match, self.config.match, lists)
        if self.training and self.position is not None:
            scores = scores + bias_of(self.position, lists)
        return scores


class Branches(NamedTuple):
    """Scores of the candidates by the ranker and by its query-intent branch, each (lists, candidates)."""

    scores: Tensor  # what is trained on: in training with the position's bias
    relevance: Tensor  # the same without position bias
    query: Tensor  # q.v / sqrt(dim): the query tower and the intent tower alone


class ThreeTower(nn.Module):
    """score(session, intent) = interaction(user, intent, query) + bias of the intent + match terms; in training, + bias
    of the position.

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
        self.match = MatchTerms(len(config.match)) if config.match else None
        if self.match:  # training starts from the match terms alone
            own = self.interaction
            for weights in (own.direct.weight, own.out.weight, *self.intent.bias.parameters()):
                nn.init.zeros_(weights)

    @staticmethod
    def loss(settings: RankerSettings) -> Loss:
        return listnet_kl(settings.kl_weight, widen_by(settings))

    def forward(self, lists: Lists, intents: Intents, *, branches: bool = False) -> Tensor | Branches:
        """-> scores (lists, candidates), or with `branches` all three; a padded candidate has some finite score."""
        user, query = self.user(lists), self.query(lists)
        vectors, bias = self.intent(intents)
        candidates = lists.candidates.long().clamp(min=0)
        found = self.interaction(user, vectors, query, candidates) + bias[candidates]
        relevance = scores = found + match_of(self.match, self.config.match, lists)
        if self.training and self.position is not None:
            scores = scores + bias_of(self.position, lists)
        if not branches:
            return scores
        alone = (query * self.config.dim**-0.5) @ vectors.T
        return Branches(scores, relevance, alone.gather(1, candidates))
