"""A problem small enough to train in a second, whose answer is known: the session's group names the category."""

import numpy as np
import torch

from rgalign.data.lists import Bag, Intents, Lists, QueryIntents, QueryLists, with_queries, with_texts
from rgalign.params_training import RankerSettings
from rgalign.ranker import fit as training

CATEGORIES, PER_CATEGORY, CANDIDATES, BUCKETS = 4, 3, 6, 32
KB = CATEGORIES * PER_CATEGORY
QUERY_DIM = 10
UNSEEN = 11  # the last intent of the last category: never shown before test time

SMALL = {
    "field_sizes": (CATEGORIES + 2, 11),
    "history_sizes": (8,),
    "word_buckets": BUCKETS,
    "intent_ids": KB + 2,
    "categories": CATEGORIES + 2,
    "positions": CANDIDATES,
    "text": False,
    "query_dim": 0,
    "embedding_dim": 4,
    "dim": 8,
    "experts": 2,
    "hidden": 8,
}


def bags(rows: list[list[int]]) -> Bag:
    lengths = torch.tensor([0, *map(len, rows)])
    return Bag(torch.tensor([value for row in rows for value in row], dtype=torch.int32), lengths.cumsum(0))


def make_lists(part: str, count: int, *, seed: int, padded: int = 0) -> Lists:
    """Lists of one clicked intent, of the session's own category, among intents of the others."""
    rng = np.random.default_rng(seed)
    group = rng.integers(CATEGORIES, size=count)
    candidates = np.full((count, CANDIDATES + padded), -1)
    for row, own in enumerate(group):
        shown = [i for i in range(KB) if i // PER_CATEGORY == own and i != UNSEEN]
        others = [i for i in range(KB) if i // PER_CATEGORY != own and i != UNSEEN]
        order = [rng.choice(shown), *rng.choice(others, CANDIDATES - 1, replace=False)]
        candidates[row, :CANDIDATES] = rng.permutation(order)
    clicked = (candidates // PER_CATEGORY == group[:, None]) & (candidates >= 0)
    noise = rng.integers(2, 9, size=count)
    return Lists(
        part=part,
        session_id=np.array([f"{part}{i}" for i in range(count)]),
        user_id=np.array([f"{part}{i // 2}" for i in range(count)]),
        fields=torch.tensor(np.stack([group + 2, noise], axis=1), dtype=torch.int16),
        history=(bags([list(rng.integers(2, 6, size=rng.integers(4))) for _ in range(count)]),),
        words=bags([[int(own), 8 + int(n)] for own, n in zip(group, noise, strict=True)]),
        candidates=torch.tensor(candidates, dtype=torch.int16),
        clicked=torch.tensor(clicked),
    )


def make_intents() -> Intents:
    index = np.arange(KB)
    ids = np.where(index == UNSEEN, 1, index + 2)
    return Intents(
        intent_id=index.astype(str),
        valid_from=np.full(KB, "NaT", "datetime64[us]"),
        id=torch.tensor(ids, dtype=torch.int16),
        category=torch.tensor(index // PER_CATEGORY + 2, dtype=torch.int16),
        words=bags([[int(i) // PER_CATEGORY, 20] for i in index]),
    )


def make_query_lists(part: str, count: int, *, seed: int, padded: int = 0) -> QueryLists:
    """The same lists; a session's query is noise with a bump at its own group."""
    lists = make_lists(part, count, seed=seed, padded=padded)
    noise = np.random.default_rng([seed, 1]).normal(size=(count, QUERY_DIM))
    query = noise + 4 * np.eye(QUERY_DIM)[lists.fields[:, 0].numpy() - 2]
    return with_queries(lists, query.astype(np.float16))


def make_query_intents() -> QueryIntents:
    """The same intents; the text of each is noise with a bump at its category."""
    intents = make_intents()
    noise = np.random.default_rng(7).normal(size=(KB, QUERY_DIM))
    return with_texts(intents, (noise + 4 * np.eye(QUERY_DIM)[intents.category.numpy() - 2]).astype(np.float16))


def fit(*given, **how) -> training.Fitted:
    """ranker.fit.fit with its settings as keyword arguments."""
    settings = RankerSettings(**{name: how.pop(name) for name in [*how] if name in RankerSettings.model_fields})
    return training.fit(*given, settings, **how)
