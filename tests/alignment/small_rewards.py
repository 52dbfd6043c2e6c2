"""A shop in which only the query tells the click: intents are of groups, a query names one, features are noise."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch

from rgalign.alignment.reward import RewardModel
from rgalign.data.lists import Bag, Intents, Lists, QueryIntents, with_queries, with_texts
from rgalign.data.vectors import Vectors
from rgalign.params_training import RankerSettings
from rgalign.ranker.towers import ThreeTower, ThreeTowerConfig, set_whitening
from rgalign.ranker.train import Parts

GROUPS, PER_GROUP, WORDINGS, DIM = 4, 2, 5, 6
KB, SHOWN = GROUPS * PER_GROUP, GROUPS
SOURCES = ("main", "other")
SETTINGS = RankerSettings(
    dim=8, hidden=8, embedding_dim=4, experts=2, query_hidden=8, interaction_hidden=8, dropout=0.1, query_dropout=0.1,
    epochs=8, patience=8, lists_per_batch=64, learning_rate=0.02, kl_weight=0.2,
)  # fmt: skip
NOTHING = Bag(torch.zeros(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int64))


def lists(part: str = "train", count: int = 60, *, seed: int = 0) -> Lists:
    """One clicked intent, of the session's group, among one of each other group. Every fifth list is shorter by one;
    the last has no click."""
    rng = np.random.default_rng([seed, len(part)])
    shown = rng.permuted(np.tile(np.arange(GROUPS), (count, 1)), axis=1)
    group = shown[np.arange(count), rng.integers(SHOWN - 1, size=count)]
    candidates = shown * PER_GROUP + rng.integers(PER_GROUP, size=shown.shape)
    candidates[::5, -1] = -1
    clicked = shown == group[:, None]
    clicked[-1] = False
    ids = np.array([f"{part}{i}" for i in range(count)])
    words = Bag(NOTHING.values, torch.zeros(count + 1, dtype=torch.int64))
    fields = torch.tensor(rng.integers(2, 6, size=(count, 2)), dtype=torch.int16)
    return Lists(part, ids, ids, fields, (), words, torch.tensor(candidates), torch.tensor(clicked))


def group_of(these: Lists) -> np.ndarray:
    """(lists,) the group whose intent was clicked, -1 without a click."""
    clicked = these.clicked.numpy()
    group = np.take_along_axis(these.candidates.numpy(), clicked.argmax(axis=1)[:, None], axis=1)[:, 0] // PER_GROUP
    return np.where(clicked.any(axis=1), group, -1)


def intents() -> Intents:
    """The last two enter the KB in 2025."""
    ids, none = np.arange(KB), Bag(NOTHING.values, torch.zeros(KB + 1, dtype=torch.int64))
    valid_from = np.array(["NaT"] * (KB - 2) + ["2025-01-01"] * 2, "datetime64[us]")
    return Intents(ids.astype(str), valid_from, torch.tensor(ids + 2), torch.tensor(ids // PER_GROUP + 2), none)


def intent_vectors() -> Vectors:
    noise = np.random.default_rng(7).normal(size=(KB, DIM))
    return Vectors(np.arange(KB).astype(str), 0.3 * noise + 3 * np.eye(DIM)[np.arange(KB) // PER_GROUP])


def query_vectors() -> Vectors:
    """The text "g w" is the w-th wording of a question about group g."""
    texts = [f"{group} {wording}" for group in range(GROUPS) for wording in range(WORDINGS)]
    noise = np.random.default_rng(8).normal(size=(len(texts), DIM))
    return Vectors(texts, 0.3 * noise + 3 * np.eye(DIM)[np.arange(len(texts)) // WORDINGS])


def candidates(these: Lists, *, seed: int = 0, right: float = 0.7, each: int = 4) -> pd.DataFrame:
    """Queries of two sources, this share of them about the right group; one in twenty is empty."""
    rng = np.random.default_rng([seed, len(these)])
    rows = []
    for session, group in zip(these.session_id, group_of(these), strict=True):
        for source in SOURCES:
            for number in range(-1, each - 1):
                about = group if group >= 0 and rng.random() < right else rng.integers(GROUPS)
                query = "" if rng.random() < 0.05 else f"{about} {rng.integers(WORDINGS)}"
                rows.append((session, source, number, query, -1.0, 3, int(rng.integers(1, 4))))
    names = ["session_id", "source", "candidate", "query", "log_probability", "tokens", "count"]
    return pd.DataFrame(rows, columns=names)


def parts(train: int = 60, dev: int = 30) -> Parts:
    space = SimpleNamespace(
        field_sizes=(6, 6), history_sizes=(), word_buckets=1, intent_ids_size=KB + 2, category_size=GROUPS + 2
    )
    given = {name: lists(name, count) for name, count in {"train": train, "dev": dev, "valid": 8}.items()}
    return Parts(space, intents(), **given)


def kb() -> QueryIntents:
    return with_texts(intents(), intent_vectors().values)


def model(*, seed: int = 0, form: str = "list") -> RewardModel:
    """Untrained, but with the whitening of these queries; its query tower has weights."""
    sizes = dict(field_sizes=(6, 6), history_sizes=(), word_buckets=1, intent_ids=KB + 2, categories=GROUPS + 2)
    ranker = ThreeTower(
        ThreeTowerConfig.of(RankerSettings(), **sizes, positions=SHOWN, text=False, dim=8, query_dim=DIM), seed=seed
    )
    vectors, some = query_vectors().values, lists()
    set_whitening(ranker, with_queries(some.take(torch.arange(len(vectors))), vectors), kb())
    with torch.no_grad():
        ranker.position.copy_(torch.linspace(3, -3, SHOWN))
    return RewardModel(ranker, kb(), torch.from_numpy(vectors).float().mean(0).half(), form)
