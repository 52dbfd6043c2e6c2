"""Scores to session metrics: every model judged on the same lists and over the same whole knowledge base."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from rgalign.data import candidates
from rgalign.data.lists import Intents, Lists, with_texts
from rgalign.data.tables import Dataset
from rgalign.data.vectors import Vectors
from rgalign.evaluation.intent_hit_rate import intent_hits, query_judge
from rgalign.evaluation.results import clicked_in_kb, session_metrics
from rgalign.ranker.fit import score, score_kb
from rgalign.ranker.train import Parts, lists_with_vectors
from rgalign.reasoner.generate import greedy
from rgalign.reasoner.model import Reasoner
from rgalign.reasoner.prompts import Prompter


@dataclass(frozen=True, eq=False)
class Judge:
    """The sessions of one split and how they are judged.

    timestamps     (lists,) datetime64, NaT where unknown: an intent counts from its valid_from on
    correction     (intents,) what is added to a ranker's scores when it ranks the whole KB, where lists were sampled
                   (candidates.kb_correction)
    group, weights GAUC's (METHOD.md 4)
    """

    lists: Lists
    intents: Intents
    timestamps: np.ndarray
    correction: np.ndarray | None = None
    k: int = 3
    group: str = "session"
    weights: str = "impressions"

    @classmethod
    def of(cls, dataset: Dataset, lists: Lists, intents: Intents, seen: Sequence[Lists], **how: Any) -> "Judge":
        """The judge of a split: `dataset` has its sessions.

        seen  train and dev, the lists of the train split: by their clicks sampled negatives were drawn
        """
        timestamps = dataset.sessions.set_index("session_id")["timestamp"].reindex(lists.session_id)
        when = timestamps.to_numpy(dtype="datetime64[us]", na_value=np.datetime64("NaT"))
        correction = candidates.correction_of(seen, len(intents), dataset.meta.get("sampled_negatives"))
        return cls(lists, intents, when, correction, **how)

    def for_parts(self, parts: Parts) -> "Judge":
        """The same judge for a variant's valid lists."""
        return replace(self, lists=parts.valid, intents=parts.intents)

    def with_vectors(self, name: str, sessions: Vectors, intents: Vectors, train: Lists, seed: int) -> "Judge":
        """The same judge for a variant that reads vectors (ranker.train.lists_with_vectors)."""
        lists = lists_with_vectors(self.lists, name, sessions, train, seed)
        return replace(self, lists=lists, intents=with_texts(self.intents, intents.rows(self.intents.intent_id)))

    def ranker(self, model: nn.Module, name: str, seed: int | None) -> pd.DataFrame:
        """The session_metrics rows of a ranker that was trained on lists like these."""
        return self._metrics(score(model, self.lists, self.intents), self.over_kb(model), name, seed)

    def over_kb(self, model: nn.Module) -> np.ndarray:
        """Scores (lists, intents) by which a ranker that was trained on lists like these ranks the whole KB."""
        found = score_kb(model, self.lists, self.intents)
        return found if self.correction is None else found + self.correction

    def scores(self, over_kb: np.ndarray, name: str, seed: int | None = None) -> pd.DataFrame:
        """The rows of scores that hold for the whole KB (lists, intents) as they are: popularity, an oracle."""
        listed = np.take_along_axis(over_kb, self.lists.candidates.numpy().clip(min=0).astype(int), axis=1)
        return self._metrics(listed, over_kb, name, seed)

    @property
    def exists(self) -> np.ndarray:
        """(lists, intents) bool: the intent was in the KB at the session's time; without a date it always was."""
        return self.intents.existing(self.timestamps)

    def intent_hits(
        self, similarity: np.ndarray, session_ids: Sequence[str], wanted: pd.DataFrame | None = None
    ) -> pd.DataFrame:
        """IHR of the queries of some sessions: session_id, ihr@1, ihr@3 (METHOD.md 4).

        similarity  (session_ids, intents) of each query to each intent (evaluation.ihr)
        wanted      columns session_id, intent_id, any number of rows a session, each of whose intents will do
                    (evaluation.witness); None: the clicked intents
        NaN where nothing is wanted, or what is wanted was not in the KB yet.
        """
        rows = pd.Index(self.lists.session_id).get_indexer(list(session_ids))
        if wanted is None:
            lists = self.lists.take(rows)
            asked = clicked_in_kb(lists.candidates.numpy(), lists.clicked.numpy(), len(self.intents))
        else:
            asked = _asked(wanted, session_ids, self.intents.intent_id)
        hits = {f"ihr@{k}": intent_hits(similarity, asked, self.exists[rows], k) for k in (1, 3)}
        return pd.DataFrame({"session_id": list(session_ids), **hits})

    def _metrics(self, listed: np.ndarray, over_kb: np.ndarray, name: str, seed: int | None) -> pd.DataFrame:
        shown, clicked = self.lists.shown.numpy(), self.lists.clicked.numpy()
        in_kb = clicked_in_kb(self.lists.candidates.numpy(), clicked, len(self.intents))
        keys: dict[str, Any] = {"session_id": self.lists.session_id, "user_id": self.lists.user_id}
        return session_metrics(
            np.where(shown, listed, 0), clicked, shown, **keys, model=name, seed=seed, split=self.lists.part,
            k=self.k, group=self.group, weights=self.weights, whole_kb=(over_kb, in_kb, self.exists),
        )  # fmt: skip


def _asked(wanted: pd.DataFrame, session_ids: Sequence[str], intent_ids: np.ndarray) -> np.ndarray:
    """(session_ids, intent_ids) bool: what is wanted; an empty intent wants nothing."""
    places = [
        pd.Index(list(ids), dtype=object).get_indexer(wanted[name].astype(object))
        for name, ids in (("session_id", session_ids), ("intent_id", intent_ids))
    ]
    row, column = (place[(places[0] >= 0) & (places[1] >= 0)] for place in places)
    asked = np.zeros((len(session_ids), len(intent_ids)), dtype=bool)
    asked[row, column] = True
    return asked


def about(dataset: Dataset, lm_seed: int | None) -> dict[str, Any]:
    """What the result tables say of a run: its data, a simulated world's seed and distance, the LM's seed."""
    settings = dataset.meta.get("world", {})
    world = {"distance": settings.get("distance"), "world_seed": settings.get("seed")}
    return {"data": dataset.name, **world, "lm_seed": lm_seed}


# Who says what a session wanted, and IHR by that witness (METHOD.md 4): labels, a simulator's truth, the click.
#
# witness, wanted = wanted_intents(shop, "test")
# hits = query_hits(judge, shop, wanted, reasoner, prompter, name="tfidf", max_new_tokens=24)

METRICS = ["ihr@1", "ihr@3"]


def wanted_intents(dataset: Dataset, split: str) -> tuple[str, pd.DataFrame]:
    """The best witness of a split, labels | truth | click, and its rows: session_id, intent_id.

    Labels where anybody labelled a session of the split, else the truth, else the clicks [C]. One witness for all: a
    mean over some sessions by label and others by click would be neither. A session may have several rows, each of
    whose intents will do; rows without an intent (looked at, and none fitted) are left out. The click's rows may be
    none at all.
    """
    clicked = dataset.impressions[dataset.impressions["clicked"] == 1]
    tables = {"labels": dataset.labels, "truth": dataset.truth, "click": clicked}
    own = dataset.sessions.loc[dataset.sessions["split"] == split, "session_id"]
    for witness, table in tables.items():
        if table is None:
            continue
        said = table.loc[table["session_id"].isin(own) & table["intent_id"].notna(), ["session_id", "intent_id"]]
        if len(said) or witness == "click":
            return witness, said.drop_duplicates(ignore_index=True)
    raise AssertionError("the click is the last witness")


def query_hits(
    judge: Judge,
    dataset: Dataset,
    wanted: pd.DataFrame,
    reasoner: Reasoner,
    prompter: Prompter,
    reader: Reasoner | None = None,
    *,
    name: str,
    max_new_tokens: int,
) -> pd.DataFrame:
    """IHR of the greedy query of each session that `wanted` names: session_id, ihr@1, ihr@3; empty for an encoder.

    judge   of the split that these sessions are of;  name  evaluation.ihr_judge
    wanted  session_id, intent_id (wanted_intents)
    reader  by whose embeddings queries are judged where `name` says so; None: their writer's. One for all that are
            compared: a judge that moves with the judged says nothing
    """
    sessions = dataset.sessions[dataset.sessions["session_id"].isin(wanted["session_id"])]
    if reasoner.kind == "encoder" or sessions.empty:
        return pd.DataFrame({"session_id": [], **{metric: [] for metric in METRICS}})
    written = greedy(reasoner, prompter, prompter.sessions(sessions), max_new_tokens=max_new_tokens)
    similarity = query_judge(name, reader or reasoner, prompter, dataset.intents).similarity(written["query"].tolist())
    return judge.intent_hits(similarity, sessions["session_id"].tolist(), wanted)


def hit_table(hits: pd.DataFrame, witness: str) -> pd.DataFrame:
    """One row named by the witness: sessions with a wanted intent in the KB of their day, and the mean of each IHR."""
    judged = hits["ihr@1"].notna().sum()
    return pd.DataFrame([{"sessions": judged, **hits[METRICS].mean()}], index=pd.Index([witness], name="witness"))


def with_hits(metrics: pd.DataFrame, hits: Mapping[str | None, pd.DataFrame], split: str) -> pd.DataFrame:
    """session_metrics with columns ihr@1 and ihr@3 in the rows of the models named in `hits` on `split`, else NaN.

    hits  the model that they are listed with (ranker.variants.reader_of_prompts) -> what `query_hits` found; of an
          encoder it is empty, and a model may be None: not listed. Without any there are no columns
    """
    told = {model: own for model, own in hits.items() if model is not None and len(own)}
    if not told:
        return metrics
    listed = pd.concat([own.assign(model=model, split=split) for model, own in told.items()])
    listed[["model", "split"]] = listed[["model", "split"]].astype(metrics["model"].dtype)
    return metrics.merge(listed, "left", ["session_id", "model", "split"])
