"""The baseline ranker: AutoInt + mixture of experts for the session, id, category and words for the intent."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from rgalign.data.lists import Intents, Lists, listed_in
from rgalign.ranker.layers import (
    BagEmbedding,
    FieldAttention,
    FieldEmbedding,
    MixtureOfExperts,
    Whitening,
    unknown_at_random,
)
from rgalign.seeding import seeded


@dataclass(frozen=True)
class TwoTowerConfig:
    """All that fixes the shape of a two-tower ranker (METHOD.md 2.2; every size is our choice [C]).

    field_sizes, history_sizes   vocabulary of each field and of each history column (FeatureSpace)
    word_buckets                 hashed words of session and intent texts; used only where text is True
    intent_ids, categories       vocabularies of the knowledge base (FeatureSpace)
    positions                    longest training list; 0 where positions are not real: no position bias
    text                         True: the words of both sides are read; False: ids only
    embedding_dim, dim           width of a field, and of the user and intent vectors
    hidden                       width of an expert
    query_dim                    width of a reasoner's vectors of sessions and intents; 0: none are read
    id_dropout                   share of ids replaced by 'unknown' in a training step, which so learns to stand in: of
                                 session fields, elements of histories, intents and their categories
    intent_std                   of the first weights of an intent's id and category
    whitening_ridge              of the vectors that are read (layers.Whitening)
    """

    KIND: ClassVar[str] = "two-tower"

    field_sizes: tuple[int, ...]
    history_sizes: tuple[int, ...]
    word_buckets: int
    intent_ids: int
    categories: int
    positions: int
    text: bool
    embedding_dim: int = 8
    dim: int = 32
    attention_layers: int = 1
    heads: int = 1
    experts: int = 4
    hidden: int = 32
    dropout: float = 0.5
    id_dropout: float = 0.1
    intent_std: float = 0.3
    whitening_ridge: float = 0.3
    query_dim: int = 0

    def __post_init__(self):
        if faults := self.faults():
            raise ValueError(f"these settings make no {self.KIND}:\n  " + "\n  ".join(faults))

    def faults(self) -> list[str]:
        """What is wrong with the settings, one line each."""
        counts = ("embedding_dim", "dim", "heads", "experts", "hidden", "intent_ids", "categories", "word_buckets")
        at_least = dict.fromkeys(counts, 1) | {"attention_layers": 0, "positions": 0, "query_dim": 0}
        given = {name: getattr(self, name) for name in (*at_least, "dropout", "id_dropout")}
        faults = [
            f"{name} is {given[name]!r}; expected a whole number >= {least}"
            for name, least in at_least.items()
            if not isinstance(given[name], int) or given[name] < least
        ]
        faults += [
            f"{name} is {given[name]!r}; expected a share, 0 <= {name} < 1"
            for name in ("dropout", "id_dropout")
            if not isinstance(given[name], int | float) or not 0 <= given[name] < 1
        ]
        faults += [
            f"{name} is {value!r}; expected a number > 0"
            for name in ("intent_std", "whitening_ridge")
            if not isinstance(value := getattr(self, name), int | float) or not 0 < value < math.inf
        ]
        if not faults and self.embedding_dim % self.heads:
            faults.append(f"{self.heads} heads do not divide an embedding_dim of {self.embedding_dim}")
        return faults


def vectors_of(container: Lists | Intents, dim: int) -> Tensor:
    """A reasoner's vectors of sessions or intents, float32 (rows, dim). Raises ValueError where they are missing."""
    name = "query" if isinstance(container, Lists) else "text"
    values = getattr(container, name, None)
    if values is None or values.shape[1] != dim:
        found = "none" if values is None else f"{values.shape[1]} wide"
        raise ValueError(
            f"this ranker reads vectors of {dim}; these {type(container).__name__} have {found}: "
            "give them their own by ranker.train.with_vectors"
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
    """(intents,) bool: those that these lists may know, train as a rule; one that enters later is not among them.

    Lists have no date of their own: the latest valid_from that they show tells how far they reach.
    """
    dates = intents.valid_from[listed_in(lists, len(intents))]
    dates = dates[~np.isnat(dates)]
    always = np.isnat(intents.valid_from)
    return always | (intents.valid_from <= dates.max()) if len(dates) else always


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
        self.query = (
            nn.Sequential(Whitening(query_dim, config.whitening_ridge), nn.Linear(query_dim, width))
            if query_dim
            else None
        )
        self.query_dim = query_dim
        layers = [FieldAttention(width, width, config.heads) for _ in range(config.attention_layers)]
        self.attention = nn.Sequential(*layers)
        inputs = (len(config.field_sizes) + len(config.history_sizes) + int(config.text) + bool(query_dim)) * width
        self.experts = MixtureOfExperts(inputs, config.hidden, config.dim, config.experts, config.dropout)
        self.direct = nn.Linear(inputs, config.dim)  # past the attention: what is additive need not be learnt by it
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
    Both unknown rows learn by dropout, each with a draw of its own [C]: a new intent mostly has a known category, and a
    new category's row is added to the id's, so that the two must make sense apart.
    """

    def __init__(self, config: TwoTowerConfig):
        super().__init__()
        self.id = nn.Embedding(config.intent_ids, config.dim)
        self.category = nn.Embedding(config.categories, config.dim)
        for table in (self.id, self.category):
            nn.init.normal_(table.weight, std=config.intent_std)
        self.words = BagEmbedding(config.word_buckets, config.dim) if config.text else None
        self.query_dim = config.query_dim
        self.text = (
            nn.Sequential(Whitening(config.query_dim, config.whitening_ridge), nn.Linear(config.query_dim, config.dim))
            if config.query_dim
            else None
        )
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


class TwoTower(nn.Module):
    """score(session, intent) = user . intent / sqrt(dim) + bias of the intent; in training, + bias of the position."""

    Config = TwoTowerConfig

    def __init__(self, config: TwoTowerConfig, *, seed: int = 0):
        super().__init__()
        self.config = config
        with seeded(seed):
            self.user = UserTower(config, query_dim=config.query_dim)
            self.intent = IntentTower(config)
        self.position = nn.Parameter(torch.zeros(config.positions)) if config.positions else None

    def forward(self, lists: Lists, intents: Intents) -> Tensor:
        """-> scores (lists, candidates); a padded candidate has some finite score."""
        user = self.user(lists) * self.config.dim**-0.5
        vectors, bias = self.intent(intents)
        candidates = lists.candidates.long().clamp(min=0)
        scores = torch.addmm(bias, user, vectors.T).gather(1, candidates)
        if self.training and self.position is not None:
            scores = scores + self.position[: scores.shape[1]]
        return scores
