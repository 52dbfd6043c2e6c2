"""The match terms: what each learns from train, and its values for any sessions (METHOD.md 2.2 [C]).

A new term is a class here, an entry in MATCH_TERMS and its name in params_training.MatchTerm.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import ClassVar, Self

import numpy as np
import torch
from scipy.sparse import csr_array
from sklearn.feature_extraction.text import TfidfVectorizer

from rgalign.data.lists import Lists
from rgalign.params_training import WRITTEN_TERMS
from rgalign.params_training import Memory as MemorySettings
from rgalign.ranker.fit import with_click
from rgalign.ranker.layers import Whitening
from rgalign.ranker.nearest import finder
from rgalign.reasoner import verbalize
from rgalign.reasoner.written import SessionQueries

ROWS_AT_ONCE = 4_096  # a sparse product takes three times the memory of the dense scores that it becomes
PAIRS_AT_ONCE = 1 << 25  # (session, remembered session) pairs of memory: 128 MB of similarities
DECIMALS = 6  # so that ties do not depend on the order of a sum


@dataclass(frozen=True, eq=False)
class Sessions:
    """What the terms read of some sessions, row by row.

    texts    (n,) words of word_overlap
    vectors  (n, dim) float32 of raw_cosine, and read: (n,) bool, False where they stand for no text
    query    (n, query_dim) e_q, by which memory finds near sessions; None where memory is not asked for
    user_id  (n,) of train's sessions, while a ranker learns: memory leaves a user's own sessions out; else None
    written  the queries that the reasoner wrote for them; None where no term reads them
    """

    texts: Sequence[str]
    vectors: np.ndarray
    read: np.ndarray
    query: np.ndarray | None = None
    user_id: np.ndarray | None = None
    written: SessionQueries | None = None

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True, eq=False)
class KnowledgeBase:
    """What the terms read of the intents: texts (intents,) and vectors (intents, dim).

    in_train  (intents,) bool: the intent was in the KB at train's last session; for what is fitted
    titles    (intents, query_dim) vectors of written_cosine; None where it is not asked for
    """

    texts: Sequence[str]
    vectors: np.ndarray
    in_train: np.ndarray
    titles: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Learnt:
    """What terms are fitted on: the KB, and of train

    texts     of at most COUNTED sessions;  averaged  (at most AVERAGED, dim) raw vectors
    lists     of train's part;  query  (lists, query_dim) e_q, None where memory is not asked for
    written   for train's sessions with a click; None where no term reads written queries
    """

    kb: KnowledgeBase
    texts: Sequence[str]
    averaged: np.ndarray
    lists: Lists
    query: np.ndarray | None
    centred: bool
    memory: MemorySettings
    written: SessionQueries | None = None


# Sessions -> (n, intents) float32; NaN where there is nothing to compare
Values = Callable[[Sessions], np.ndarray]


class Term(ABC):
    """A match term: a frozen dataclass of arrays, those that it has learnt from train."""

    NOT_SAVED: ClassVar[tuple[str, ...]] = ()  # fields with what is personal

    @classmethod
    @abstractmethod
    def fit(cls, learnt: Learnt) -> Self:
        """Read what it needs."""

    @abstractmethod
    def over(self, kb: KnowledgeBase) -> Values:
        """Ready for any sessions: what is done once for a knowledge base is done."""


@dataclass(frozen=True, eq=False)
class WordOverlap(Term):
    """TF-IDF cosine, 0..1. Single words, 1 + log(count) times the idf of train's sessions and intents [C]: pairs of
    words changed nothing on valid of four public sets, and idf of the KB alone lost a quarter of the Recall@3 over the
    KB (govuk2021).

    words  (words,) of train, sorted;  idf  (words,)
    """

    words: np.ndarray
    idf: np.ndarray

    @classmethod
    def fit(cls, learnt: Learnt) -> Self:
        corpus = [text for text, old in zip(learnt.kb.texts, learnt.kb.in_train, strict=True) if old]
        corpus += learnt.texts
        if not any(map(verbalize.words_of, corpus)):
            return cls(np.zeros(0, "U1"), np.zeros(0))
        counted = TfidfVectorizer(analyzer=verbalize.words_of, dtype=np.float64).fit(corpus)
        return cls(counted.get_feature_names_out().astype(str), counted.idf_)

    def over(self, kb: KnowledgeBase) -> Values:
        if not len(self.words):
            return lambda sessions: np.full((len(sessions), len(kb.texts)), np.nan, np.float32)
        column = {word: place for place, word in enumerate(self.words.tolist())}
        of_kb = tf_idf(kb.texts, column, self.idf)
        in_kb, turned = np.diff(of_kb.indptr) > 0, of_kb.T.tocsr()

        def values(sessions: Sessions) -> np.ndarray:
            parts = [np.zeros((0, len(kb.texts)), np.float32)]
            for first in range(0, len(sessions), ROWS_AT_ONCE):
                own = tf_idf(sessions.texts[first : first + ROWS_AT_ONCE], column, self.idf)
                found, has_words = (own @ turned).toarray().round(DECIMALS), np.diff(own.indptr) > 0
                parts.append(np.where(has_words[:, None] & in_kb, found, np.nan).astype(np.float32))
            return np.concatenate(parts)

        return values


def tf_idf(texts: Sequence[str], column: Mapping[str, int], idf: np.ndarray) -> csr_array:
    """(texts, words) of length 1, or 0 of a text without a known word, as TfidfVectorizer(sublinear_tf=True) has them;
    its checks alone take a millisecond a call, which is too long for one session.

    column  word -> its place in idf (words,)
    """
    counts = [Counter(column[word] for word in verbalize.words_of(text) if word in column) for text in texts]
    row, starts = np.repeat(np.arange(len(texts)), list(map(len, counts))), np.cumsum([0, *map(len, counts)])
    columns, times = (
        np.array([*chain.from_iterable(part)], np.int64) for part in (counts, map(Counter.values, counts))
    )
    weights = (1 + np.log(times)) * idf[columns]
    weights /= np.sqrt(np.bincount(row, weights**2, minlength=len(texts)))[row]
    return csr_array((weights, columns, starts), (len(texts), len(idf)))


@dataclass(frozen=True, eq=False)
class RawCosine(Term):
    """Cosine of raw vectors, -1..1.

    session_mean, intent_mean  (dim,) taken off first: of train's sessions, of its intents; zeros where not centred
    """

    session_mean: np.ndarray
    intent_mean: np.ndarray

    @classmethod
    def fit(cls, learnt: Learnt) -> Self:
        kb, old = learnt.kb.vectors, learnt.kb.in_train
        if not learnt.centred:
            return cls(np.zeros_like(kb[0]), np.zeros_like(kb[0]))
        return cls(learnt.averaged.mean(axis=0), (kb[old] if old.any() else kb).mean(axis=0))

    def over(self, kb: KnowledgeBase) -> Values:
        centred = kb.vectors - self.intent_mean

        def values(sessions: Sessions) -> np.ndarray:
            found = cosine(sessions.vectors - self.session_mean, centred)
            found[~sessions.read] = np.nan
            return found

        return values


@dataclass(frozen=True, eq=False)
class Memory(Term):
    """log of clicks per impression among the train sessions whose whitened e_q is nearest.

    Of the `neighbours` nearest lists with a click, with weights w = exp(temperature * cosine), clicks y and impressions
    o of an intent: log (sum w y + k g) / (sum w o + k). g is clicks per impression of all train, and k is `prior` mean
    weights. An intent that no neighbour was shown has log g: an intent that is new has no memory.

    vectors   (remembered, dim) float16, whitened by mean (dim,) and matrix (dim, dim), of length 1
    shown     (remembered, candidates) rows of the KB, -1 where padded;  clicked  (remembered, candidates)
    settings  (4,) neighbours, temperature, prior, compared (nearest.finder)
    users     (remembered,) while a ranker learns; nobody is left out where it is empty
    """

    NOT_SAVED = ("users",)

    vectors: np.ndarray
    mean: np.ndarray
    matrix: np.ndarray
    shown: np.ndarray
    clicked: np.ndarray
    settings: np.ndarray
    users: np.ndarray = field(default_factory=lambda: np.zeros(0, "U1"))

    @classmethod
    def fit(cls, learnt: Learnt) -> Self:
        if learnt.query is None:
            raise ValueError("the match term memory compares query vectors, and these sessions have none")
        how, query = learnt.memory, learnt.query.astype(np.float32)
        rows, lists = learnt.lists.clicked.any(dim=1).numpy(), with_click(learnt.lists)
        whitening = Whitening(query.shape[1], how.whitening_ridge)
        whitening.set(torch.from_numpy(query))
        mean, matrix = whitening.mean.numpy(), whitening.matrix.numpy()
        return cls(
            unit_length((query[rows] - mean) @ matrix).astype(np.float16),
            mean,
            matrix,
            lists.candidates.numpy(),
            lists.clicked.numpy(),
            np.array([how.neighbours, how.temperature, how.prior, how.compared]),
            lists.user_id,
        )

    def over(self, kb: KnowledgeBase) -> Values:
        neighbours, temperature, prior, compared = self.settings.tolist()
        count, shape = min(int(neighbours), len(self.vectors)), (len(self.vectors), len(kb.texts))
        row, column = np.nonzero(self.shown >= 0)
        at = row, self.shown[row, column]
        impressions = csr_array((np.ones(len(row), np.float32), at), shape)
        clicks = csr_array((self.clicked[row, column].astype(np.float32), at), shape)
        rate = clicks.sum() / max(impressions.sum(), 1)
        find = finder(self.vectors, self.users, count, int(compared))

        def near(query: np.ndarray, users: np.ndarray | None) -> np.ndarray:
            nearest, similarity = find(query, users)
            weights = np.exp(temperature * similarity)
            starts = np.arange(len(query) + 1) * count
            pairs = csr_array((weights.ravel(), nearest.ravel(), starts), (len(query), shape[0]))
            k = prior * weights.mean(axis=1, keepdims=True) + 1e-9  # above 0 where nobody else is remembered
            return np.log(((pairs @ clicks).toarray() + k * rate) / ((pairs @ impressions).toarray() + k))

        def values(sessions: Sessions) -> np.ndarray:
            query = unit_length((sessions.query.astype(np.float32) - self.mean) @ self.matrix)
            parts = [np.zeros((0, shape[1]), np.float32)]
            for rows in np.array_split(np.arange(len(query)), 1 + len(query) * shape[0] // PAIRS_AT_ONCE):
                found = near(query[rows], None if sessions.user_id is None else sessions.user_id[rows])
                parts.append(found.astype(np.float32).round(DECIMALS))
            return np.concatenate(parts)

        return values


def over_queries(values: Values) -> Values:
    """Of what is written for a session: the mean of these values over its queries, each as often as it was drawn. Those
    that can be compared with an intent count; NaN where none can."""

    def mean(sessions: Sessions) -> np.ndarray:
        parts = []
        for first in range(0, max(len(sessions), 1), ROWS_AT_ONCE):  # once where there is no session: (0, intents)
            asked = sessions.written.take(slice(first, first + ROWS_AT_ONCE))
            found = values(Sessions(asked.texts, asked.vectors, np.ones(len(asked.texts), bool)))
            known = ~np.isnan(found)
            share = asked.shares @ known.astype(np.float32)
            total = asked.shares @ np.where(known, found, 0)
            parts.append(np.divide(total, share, out=np.full_like(total, np.nan), where=share > 0).round(DECIMALS))
        return np.concatenate(parts)

    return mean


@dataclass(frozen=True, eq=False)
class WrittenOverlap(WordOverlap):
    """Word overlap of the queries that the reasoner writes for a session (`over_queries`), 0..1."""

    def over(self, kb: KnowledgeBase) -> Values:
        return over_queries(super().over(kb))


@dataclass(frozen=True, eq=False)
class WrittenCosine(RawCosine):
    """Cosine of the vectors of written queries and of titles (`over_queries`), -1..1; both by the reasoner before its
    alignment, so that better words alone can make it better."""

    @classmethod
    def fit(cls, learnt: Learnt) -> Self:
        asked, titles, old = learnt.written, learnt.kb.titles, learnt.kb.in_train
        if not learnt.centred:
            return cls(np.zeros_like(titles[0]), np.zeros_like(titles[0]))
        drawn = np.asarray(asked.shares.sum(axis=0)).ravel()
        mean = drawn @ asked.vectors / max(drawn.sum(), 1e-12)
        return cls(mean.astype(np.float32), (titles[old] if old.any() else titles).mean(axis=0))

    def over(self, kb: KnowledgeBase) -> Values:
        return over_queries(super().over(replace(kb, vectors=kb.titles)))


def cosine(sessions: np.ndarray, intents: np.ndarray) -> np.ndarray:
    """(sessions, intents) float32 in -1..1 of vectors (sessions, dim) and (intents, dim); 0 where one is zero."""
    one, other = (unit_length(values.astype(np.float32)) for values in (sessions, intents))
    return (one @ other.T).round(DECIMALS)


def unit_length(values: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; a row of zeros stays."""
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)


MATCH_TERMS: dict[str, type[Term]] = {
    "word_overlap": WordOverlap,
    "raw_cosine": RawCosine,
    "memory": Memory,
    "written_overlap": WrittenOverlap,
    "written_cosine": WrittenCosine,
}


def of_written(names: Sequence[str]) -> list[str]:
    """Those of these terms that read written queries."""
    return [name for name in names if name in WRITTEN_TERMS]
