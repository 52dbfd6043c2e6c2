"""IHR, the intent hit rate: does the written query lead to the wanted intent (METHOD.md 4)?

A judge maps queries to similarities with every intent of the KB; `intent_hits` says whether a wanted one is among the
k nearest. The TF-IDF judge is the default: it is fitted on the KB alone, so it does not move with the model.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer

from rgalign.evaluation.metrics import hit_at
from rgalign.reasoner.embed import embed
from rgalign.reasoner.model import Reasoner
from rgalign.reasoner.prompts import Prompter
from rgalign.reasoner.verbalize import words_of

DECIMALS = 5  # similarities are rounded, so that what ties does not hang on the order in which sums were made


class TfidfJudge:
    """Cosine of TF-IDF vectors of words and pairs of neighbours, from the KB's titles and descriptions [C].

    intents  the KB: columns title, description; empty cells are fine
    Raises ValueError where no intent has a word.
    """

    def __init__(self, intents: pd.DataFrame) -> None:
        texts = _texts(intents)
        if not any(map(words_of, texts)):
            raise ValueError(
                f"none of {len(texts)} intents has a word in its title or description: nothing to judge by"
            )
        self._vectorizer = TfidfVectorizer(analyzer=_terms, dtype=np.float64)
        self._intents = self._vectorizer.fit_transform(texts)

    def similarity(self, queries: Sequence[str]) -> np.ndarray:
        """(queries, intents) float32 in 0..1; a row of NaN for an empty query, which says nothing about any intent."""
        different, row = _different(queries)
        if not different:  # scikit-learn refuses to transform nothing
            return np.empty((0, self._intents.shape[0]), dtype=np.float32)
        found = (self._vectorizer.transform(different) @ self._intents.T).toarray()
        return _rounded(found, different)[row]


class EmbeddingJudge:
    """Cosine of a reasoner's own embeddings: a query is read as an intent with this title and no description [C].

    reasoner, prompter  of either kind; the prompter is bound to the reasoner's tokenizer
    intents             the KB: columns intent_id, title, description
    """

    def __init__(self, reasoner: Reasoner, prompter: Prompter, intents: pd.DataFrame) -> None:
        self._reasoner, self._prompter = reasoner, prompter
        self._intents = self._embed(intents)

    def similarity(self, queries: Sequence[str]) -> np.ndarray:
        """(queries, intents) float32 in -1..1; a row of NaN for an empty query."""
        different, row = _different(queries)
        texts = pd.DataFrame({"intent_id": "query", "title": different, "description": ""}, dtype=object)
        return _rounded(self._embed(texts) @ self._intents.T, different)[row]

    def _embed(self, texts: pd.DataFrame) -> np.ndarray:
        vectors = embed(self._reasoner, self._prompter.intents(texts), progress=False).astype(np.float64)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def intent_hits(similarity: np.ndarray, wanted: np.ndarray, exists: np.ndarray | None, k: int) -> np.ndarray:
    """IHR@k of each session, (sessions,): the chance that a wanted intent is among the k nearest, ties in any order.

    similarity  (sessions, intents) to the greedy query; a row of NaN (an empty query) hits nothing: 0
    wanted      (sessions, intents), the clicked intents, the truth or a human label; any of several will do [C]
    exists      (sessions, intents), False for intents that entered the KB after the session: these are left out, of
                `wanted` too; None: all exist
    NaN where nothing is wanted. Raises ValueError for shapes that differ and for a similarity that is NaN in part.
    """
    similarity, wanted = np.asarray(similarity), np.asarray(wanted, dtype=bool)
    there = np.ones(wanted.shape, dtype=bool) if exists is None else np.asarray(exists, dtype=bool)
    if not (similarity.shape == wanted.shape == there.shape and similarity.ndim == 2):
        raise ValueError(
            f"similarity, wanted, exists have the shapes {similarity.shape}, {wanted.shape}, {there.shape}; "
            "expected one shape (sessions, intents)"
        )
    wanted = wanted & there
    silent = np.isnan(similarity).all(axis=1)
    hits = hit_at(np.where(silent[:, None], 0, similarity), wanted, there, k)
    return np.where(silent & wanted.any(axis=1), 0.0, hits)


def _texts(intents: pd.DataFrame) -> list[str]:
    columns = [intents[name].astype(object) for name in ("title", "description")]
    title, description = (column.where(column.notna(), "") for column in columns)
    return (title + " " + description).tolist()


def _different(queries: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The different queries, and for each query the place of its equal among them."""
    places: dict[str, int] = {}
    row = [places.setdefault(query, len(places)) for query in queries]
    return list(places), np.array(row, dtype=np.int64)


def _rounded(similarity: np.ndarray, queries: list[str]) -> np.ndarray:
    rounded = np.round(similarity, DECIMALS).astype(np.float32)
    rounded[[not query.strip() for query in queries]] = np.nan
    return rounded


def _terms(text: str) -> list[str]:
    words = words_of(text)
    return words + [f"{a} {b}" for a, b in pairwise(words)]


def query_judge(
    name: str, reasoner: Reasoner, prompter: Prompter, intents: pd.DataFrame
) -> TfidfJudge | EmbeddingJudge:
    """The judge that maps a query to KB intents: tfidf (fixed), or embedding (as this reasoner sees them)."""
    return TfidfJudge(intents) if name == "tfidf" else EmbeddingJudge(reasoner, prompter, intents)
