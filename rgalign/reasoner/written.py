"""The queries that a reasoner writes for sessions, for the match terms that read them (ranker.match_terms) [C].

folder/queries.parquet   session_id, query, count: how often it was drawn
      /vectors/          of the different queries, by text (data.vectors)
      /intents/          of the KB's titles

All vectors are of the reasoner before its alignment, whoever wrote: what is compared are the words alone.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import csr_array

from rgalign.data import vectors
from rgalign.data.vectors import Vectors
from rgalign.params_training import Written as WrittenSettings
from rgalign.reasoner.embed import embed
from rgalign.reasoner.generate import sample
from rgalign.reasoner.model import Reasoner, fingerprint
from rgalign.reasoner.prompts import Prompter
from rgalign.run.artifacts import atomic, write_table
from rgalign.run.distributed import digest_of, make_shards, shard_path

QUERIES, VECTORS, INTENTS = "queries.parquet", "vectors", "intents"
SESSIONS_PER_SHARD = 1_000  # a killed call goes on with the next ones


@dataclass(frozen=True, eq=False)
class SessionQueries:
    """What was written for n sessions.

    texts    (queries,) different, none blank;  vectors  (queries, dim)
    shares   (n, queries) sparse: of a session's queries, how often it is this one; a row sums to 1, or 0 without any
    """

    texts: Sequence[str]
    vectors: np.ndarray
    shares: csr_array

    def __len__(self) -> int:
        return self.shares.shape[0]

    def take(self, rows: slice) -> "SessionQueries":
        """Of these sessions, with their queries alone."""
        shares = self.shares[rows]
        used = np.unique(shares.indices)
        return SessionQueries([self.texts[i] for i in used], self.vectors[used], shares[:, used])


@dataclass(frozen=True, eq=False)
class WrittenQueries:
    """queries: columns session_id, query, count;  vectors  by query;  intents  by intent_id; None: a KB is ready"""

    queries: pd.DataFrame
    vectors: Vectors
    intents: Vectors | None = None

    def of(self, session_ids: Sequence[str]) -> SessionQueries:
        """What was written for these sessions, each named once; nothing for one that is not there."""
        own = self.queries[self.queries["query"].str.strip() != ""]
        row = pd.Index(np.asarray(session_ids, dtype=object)).get_indexer(own["session_id"])
        column, texts = pd.factorize(own["query"][row >= 0])
        drawn = csr_array(
            (own["count"].to_numpy(dtype=np.float32)[row >= 0], (row[row >= 0], column)), (len(session_ids), len(texts))
        )
        each = np.maximum(drawn.sum(axis=1), 1)
        found = self.vectors.rows(texts).astype(np.float32) if len(texts) else np.zeros((0, self.vectors.dim), "f4")
        return SessionQueries(texts.tolist(), found, csr_array(drawn / each[:, None]))

    def updated(self, later: "WrittenQueries") -> "WrittenQueries":
        """With the queries of some sessions written again."""
        kept = self.queries[~self.queries["session_id"].isin(later.queries["session_id"])]
        new = ~np.isin(later.vectors.ids, self.vectors.ids)
        more = Vectors(later.vectors.ids[new], later.vectors.values[new])
        queries = pd.concat([kept, later.queries], ignore_index=True)
        return replace(self, queries=queries, vectors=vectors.concat([self.vectors, more]))


@dataclass(frozen=True, eq=False)
class TextEmbedder:
    """Embeds queries and titles alike, each as an intent with this title and no description [C]."""

    reasoner: Reasoner
    prompter: Prompter

    def vectors(self, texts: Sequence[str], *, progress: bool = False) -> Vectors:
        """Of the different texts that are not blank, by text."""
        different = [text for text in dict.fromkeys(texts) if text.strip()]
        return Vectors(different, self._embedded(pd.DataFrame({"intent_id": "query", "title": different}), progress))

    def intents(self, kb: pd.DataFrame) -> Vectors:
        """Of the KB's titles, by intent_id."""
        return Vectors(kb["intent_id"], self._embedded(kb, False))

    def _embedded(self, frame: pd.DataFrame, progress: bool) -> np.ndarray:
        titles = frame.assign(description="").astype({"title": object})
        how = {"prefix": len(self.prompter.head), "progress": progress}
        return embed(self.reasoner, self.prompter.embedded_intents(titles), **how)


def write(
    writer: Reasoner,
    prompter: Prompter,
    frame: pd.DataFrame,
    settings: WrittenSettings,
    *,
    seed: int,
    work: Path | None = None,
) -> pd.DataFrame:
    """session_id, query, count: what the writer draws for each of these sessions.

    A session's queries depend on the seed and its id alone, not on the others. work: finished shards lie there until
    all are, and those of this writer and these prompts are kept; None: nothing is kept.
    """
    how = {**settings.model_dump(), "max_new_tokens": prompter.max_new_tokens, "seed": seed}

    def draw(part: pd.DataFrame) -> pd.DataFrame:
        ids = part["session_id"].to_numpy(dtype=object)
        numbers = [int.from_bytes(sha256(f"{own}".encode()).digest()[:7]) for own in ids]
        drawn = sample(writer, prompter, prompter.sessions(part), numbers=numbers, progress=False, **how)
        return drawn.assign(session_id=ids[drawn["row"]])[["session_id", "query", "count"]]

    if work is None or frame.empty:
        return draw(frame)
    parts = [frame.iloc[first : first + SESSIONS_PER_SHARD] for first in range(0, len(frame), SESSIONS_PER_SHARD)]
    meaning = {"writer": fingerprint(writer), "how": how}

    def label(number: int) -> str:
        ids = parts[number]["session_id"].tolist()
        return digest_of(meaning | {"sessions": ids}, prompter.sessions(parts[number]))

    make_shards(work, len(parts), lambda number, shard: write_table(shard / QUERIES, draw(parts[number])), label=label)
    found = [pd.read_parquet(shard_path(work, number) / QUERIES) for number in range(len(parts))]
    shutil.rmtree(work)
    return pd.concat(found, ignore_index=True).astype({"session_id": object, "query": object})


def save(folder: Path, written: WrittenQueries) -> None:
    """Write the folder whole or not at all."""
    with atomic(folder) as temporary:
        temporary.mkdir()
        write_table(temporary / QUERIES, written.queries)
        vectors.save(temporary / VECTORS, written.vectors)
        vectors.save(temporary / INTENTS, written.intents)


def load(folder: Path) -> WrittenQueries:
    """What `save` wrote. Raises ValueError where it is missing or damaged."""
    try:
        queries = pd.read_parquet(folder / QUERIES, columns=["session_id", "query", "count"])
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} holds no written queries that can be read: {error}") from None
    return WrittenQueries(
        queries.astype({"query": object}), vectors.load(folder / VECTORS), vectors.load(folder / INTENTS)
    )
