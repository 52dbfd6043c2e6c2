"""A trained ranker with its knowledge base, ready for sessions it has never seen: what `score` serves."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import nn

from rgalign.data import candidates, shards
from rgalign.data.encode import IMPRESSION_COLUMNS, encode_intents, encode_lists, session_columns
from rgalign.data.faults import Report, count_rows
from rgalign.data.features import FeatureSpace
from rgalign.data.gate import judged
from rgalign.data.lists import Intents, Lists, with_queries, with_texts
from rgalign.data.schema import REQUIRED
from rgalign.data.vectors import Vectors
from rgalign.ranker import store
from rgalign.ranker.fit import score_kb

INTENT_TYPES = REQUIRED["intents"]
NO_IMPRESSIONS = pa.table({name: pa.array([], REQUIRED["impressions"][name]) for name in IMPRESSION_COLUMNS})


class ScoreError(ValueError):
    """Sessions or intents that a finished run cannot take; the message lists all that is wrong with them."""


@dataclass(frozen=True, eq=False)
class Ranking:
    """A ranker and the intents it ranks.

    space          how sessions and intents are encoded
    kb, intents    intents.parquet's rows, new ones at the end; the same encoded, with the vectors of their texts where
                   the ranker reads vectors (QE-Rec, RGAlign-Rec)
    correction     (intents,) or None: added to the scores of a ranker that learnt on sampled candidates
                   (candidates.kb_correction)
    """

    model: nn.Module
    space: FeatureSpace
    kb: pd.DataFrame
    intents: Intents
    correction: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        folder: Path,
        encoded: Path,
        kb: pd.DataFrame,
        vectors: Vectors | None,
        sampled: dict | None,
        device: str | torch.device = "cpu",
    ) -> "Ranking":
        """From a run's artifacts.

        folder   of the ranker (ranker.store);  encoded  tables/encoded;  vectors  of the intents, None: it reads none
        sampled  dataset.yaml's sampled_negatives, None where logs say what was shown
        device   where the ranker scores; what it is given and what it finds lie on the CPU
        """
        space = shards.load_space(encoded)
        seen = [shards.load_lists(encoded, part) for part in ("train", "dev")] if sampled else ()
        intents = encode_intents(space, kb)
        if vectors is not None:
            intents = with_texts(intents, vectors.rows(kb["intent_id"].tolist()))
        correction = candidates.correction_of(seen, len(kb), sampled)
        return cls(store.load(folder, device=device), space, kb, intents, correction)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of `sessions` that the ranker reads, session_id and features."""
        return tuple(name for name in session_columns(self.space) if name != "user_id")

    @property
    def seen(self) -> dict[str, tuple[str, ...]]:
        """Categorical column -> the values that training knew."""
        return {field.name: field.values for field in self.space.fields if field.kind == "categorical"}

    def lists(self, sessions: pd.DataFrame, vectors: Vectors | None) -> Lists:
        """Sessions, encoded, with their vectors where the ranker reads them; they were shown nothing yet."""
        known = sessions[list(self.columns)].assign(user_id="")  # a ranker reads no user id
        lists = encode_lists(self.space, known, NO_IMPRESSIONS, self.kb, "test")
        return lists if vectors is None else with_queries(lists, vectors.rows(lists.session_id))

    def scores(self, lists: Lists, timestamps: np.ndarray | None = None) -> np.ndarray:
        """(lists, intents) float32: the higher the better, comparable inside a session alone.

        timestamps  (lists,) datetime64: an intent that did not exist yet has -inf; None: all exist
        """
        found = score_kb(self.model, lists, self.intents)
        if self.correction is not None:
            found = found + self.correction.astype(np.float32)
        if timestamps is not None:
            found = np.where(self.intents.existing(timestamps), found, -np.inf)
        return found

    def top(self, session_ids: np.ndarray, scores: np.ndarray, k: int | None) -> pd.DataFrame:
        """session_id, rank (from 1), intent_id, title, score: the k best of each session, or all that exist.

        Equal scores stand in the order of the knowledge base.
        """
        order = np.argsort(-scores, axis=1, kind="stable")[:, : k or None]
        best = np.take_along_axis(scores, order, axis=1)
        table = pd.DataFrame(
            {
                "session_id": np.repeat(session_ids, order.shape[1]),
                "rank": np.tile(np.arange(1, order.shape[1] + 1), len(order)),
                "intent_id": self.kb["intent_id"].to_numpy(dtype=object)[order.ravel()],
                "title": self.kb["title"].to_numpy(dtype=object)[order.ravel()],
                "score": best.ravel(),
            }
        )
        return table[np.isfinite(table["score"])].reset_index(drop=True)

    def extended(self, more: pd.DataFrame, vectors: Vectors) -> "Ranking":
        """The same ranker over a larger knowledge base; a new intent is known by its category, words and vector.

        more  intents.parquet's columns, as `checked_intents` leaves them;  vectors  of theirs
        """
        kb = pd.concat([self.kb, more], ignore_index=True)
        texts = torch.cat([self.intents.text, torch.from_numpy(vectors.rows(more["intent_id"].tolist()))])
        correction = self.correction
        if correction is not None:  # no training list had the new ones (candidates.kb_correction)
            correction = np.concatenate([correction, np.zeros(len(more))])
        return replace(self, kb=kb, intents=with_texts(encode_intents(self.space, kb), texts), correction=correction)


def refuse(report: Report, what: str) -> None:
    """Raises ScoreError with every fault of the report."""
    if report.faults:
        raise ScoreError("\n".join([f"{what}:", *(f"  {where}  {fault}" for where, fault in report.faults)]))


def checked_intents(more: pd.DataFrame, kb: pd.DataFrame) -> pd.DataFrame:
    """New intents in intents.parquet's columns and types; description, category and valid_from may be missing.

    Raises ScoreError with every fault: those that `check` finds in intents.parquet, and ids that the KB has.
    """
    report, frame = judged(more, "intents", ("intent_id", "title"), kinds={})
    ids = more["intent_id"] if isinstance(more, pd.DataFrame) and list(more.columns).count("intent_id") == 1 else []
    known = np.isin([str(one) for one in ids], kb["intent_id"].astype(str))
    if known.any():
        report.fault("intents.intent_id", count_rows(known, "is in the knowledge base already"))
    refuse(report, "these intents cannot be added")
    missing = {name: pd.array([None] * len(frame), dtype=pd.ArrowDtype(kind)) for name, kind in INTENT_TYPES.items()}
    return frame.assign(**{name: empty for name, empty in missing.items() if name not in frame})[list(INTENT_TYPES)]
