"""How models are judged: rankers on the same lists and over the whole knowledge base, queries by the intent hit rate.

IHR asks whether a written query leads to a gold intent (METHOD.md 4): that of a label, else of a simulator's truth,
else the click. A query judge maps queries to similarities with every intent of the KB; `intent_hits` says whether a
gold one is among the k nearest. The default, TF-IDF, is fitted on the KB alone: it does not move with the model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import nn

from rgalign.data import candidates
from rgalign.data.lists import Intents, Lists, with_texts
from rgalign.data.tables import Dataset
from rgalign.data.vectors import Vectors
from rgalign.evaluation.click_model import DirectModel
from rgalign.evaluation.metrics import hit_at
from rgalign.evaluation.off_policy import Log, session_values
from rgalign.evaluation.results import clicked_in_kb, session_metrics
from rgalign.ranker.fit import score, score_kb
from rgalign.ranker.match import log_clicks, with_values
from rgalign.ranker.train import Parts, lists_with_vectors
from rgalign.reasoner.embed import embed
from rgalign.reasoner.generate import greedy
from rgalign.reasoner.model import Reasoner
from rgalign.reasoner.prompts import Prompter
from rgalign.reasoner.verbalize import words_of

IHR = ["ihr@1", "ihr@3"]
DECIMALS = 5  # similarities are rounded, so that ties do not depend on the order of a sum


@dataclass(frozen=True, eq=False)
class QueryJudge:
    """Maps queries to their similarity with the KB's intents.

    compare  queries that are all different -> (queries, intents) in -1..1
    """

    compare: Callable[[list[str]], np.ndarray]
    intents: int

    def similarity(self, queries: Sequence[str]) -> np.ndarray:
        """(queries, intents) float32 in -1..1; a row of NaN for an empty query."""
        row, different = pd.factorize(np.array(queries, dtype=object), use_na_sentinel=False)
        if not len(different):  # scikit-learn refuses to transform nothing
            return np.empty((0, self.intents), dtype=np.float32)
        found = np.round(self.compare(list(different)), DECIMALS).astype(np.float32)
        found[[not query.strip() for query in different]] = np.nan
        return found[row]


def tfidf_judge(intents: pd.DataFrame) -> QueryJudge:
    """By the cosine of TF-IDF vectors of words and pairs of neighbours, from the KB's titles and descriptions [C].

    intents  the KB: columns title, description; empty cells are fine
    Raises ValueError where no intent has a word.
    """
    title, description = (intents[name].astype(object) for name in ("title", "description"))
    texts = (title.where(title.notna(), "") + " " + description.where(description.notna(), "")).tolist()
    if not any(map(words_of, texts)):
        raise ValueError(f"none of {len(texts)} intents has a word in title or description: nothing to judge by")
    terms = {"tokenizer": words_of, "token_pattern": None, "lowercase": False, "ngram_range": (1, 2)}
    vectorizer = TfidfVectorizer(**terms, dtype=np.float64)
    kb = vectorizer.fit_transform(texts)
    return QueryJudge(lambda queries: (vectorizer.transform(queries) @ kb.T).toarray(), len(texts))


def embedding_judge(reasoner: Reasoner, prompter: Prompter, intents: pd.DataFrame) -> QueryJudge:
    """By the cosine of a reasoner's embeddings: a query is read as an intent with this title and no description [C].

    reasoner, prompter  of either kind; the prompter is bound to the reasoner's tokenizer
    intents             the KB: columns intent_id, title, description
    """

    def embedded(texts: pd.DataFrame) -> np.ndarray:
        vectors = embed(reasoner, prompter.intents(texts), progress=False).astype(np.float64)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    kb = embedded(intents)

    def compare(queries: list[str]) -> np.ndarray:
        return embedded(pd.DataFrame({"intent_id": "query", "title": queries, "description": ""}, dtype=object)) @ kb.T

    return QueryJudge(compare, len(intents))


def query_judge(name: str, reasoner: Reasoner, prompter: Prompter, intents: pd.DataFrame) -> QueryJudge:
    """name: evaluation.ihr_judge, tfidf | embedding"""
    return tfidf_judge(intents) if name == "tfidf" else embedding_judge(reasoner, prompter, intents)


def intent_hits(similarity: np.ndarray, gold: np.ndarray, exists: np.ndarray | None, k: int) -> np.ndarray:
    """IHR@k of each session, (sessions,): the chance that a gold intent is among the k nearest, ties in any order.

    similarity  (sessions, intents) to the greedy query; a row of NaN (an empty query) hits nothing: 0
    gold        (sessions, intents), the clicked intents, the truth or a human label; any one of several counts [C]
    exists      (sessions, intents), False for intents that entered the KB after the session: these are left out, of
                `gold` too; None: all exist
    NaN where there is no gold intent. Raises ValueError if shapes differ or a row is NaN in part.
    """
    similarity, gold = np.asarray(similarity), np.asarray(gold, dtype=bool)
    exists = np.ones(gold.shape, dtype=bool) if exists is None else np.asarray(exists, dtype=bool)
    if not (similarity.shape == gold.shape == exists.shape and similarity.ndim == 2):
        raise ValueError(
            f"similarity, gold, exists have the shapes {similarity.shape}, {gold.shape}, {exists.shape}; "
            "expected one shape (sessions, intents)"
        )
    gold, empty = gold & exists, np.isnan(similarity).all(axis=1)
    hits = hit_at(np.where(empty[:, None], 0, similarity), gold, exists, k)
    return np.where(empty & gold.any(axis=1), 0.0, hits)


@dataclass(frozen=True, eq=False)
class Judge:
    """The sessions of one split and how they are judged.

    timestamps     (lists,) datetime64, NaT where unknown: an intent counts from its valid_from on
    correction     (intents,) what is added to a ranker's scores when it ranks the whole KB, where lists were sampled
                   (candidates.kb_correction)
    group, weights GAUC's (METHOD.md 4)
    debiased       scores over the KB (lists, intents) -> ctr@3/kb of each list; None: no propensities (`with_log`)
    """

    lists: Lists
    intents: Intents
    timestamps: np.ndarray
    correction: np.ndarray | None = None
    group: str = "session"
    weights: str = "impressions"
    debiased: Callable[[np.ndarray], np.ndarray] | None = None

    @classmethod
    def of(cls, dataset: Dataset, lists: Lists, intents: Intents, seen: Sequence[Lists], **how: Any) -> "Judge":
        """Of a split whose sessions `dataset` has.

        seen  train and dev, the lists of the train split: by their clicks sampled negatives were drawn
        """
        timestamps = dataset.sessions.set_index("session_id")["timestamp"].reindex(lists.session_id)
        when = timestamps.to_numpy(dtype="datetime64[us]", na_value=np.datetime64("NaT"))
        correction = candidates.correction_of(seen, len(intents), dataset.meta.get("sampled_negatives"))
        return cls(lists, intents, when, correction, **how)

    def with_log(self, folder: Path, seen: Sequence[Lists]) -> "Judge":
        """With debiased CTR@3 over the KB, ctr@3/kb, where the data set in `folder` has propensities; else as it is.

        seen  train and dev
        The estimate is SNDR (off_policy.estimates). Its direct model knows popularity in train and the position, and is
        fitted on dev: one for all models, so that it favours none of them, and what two of them show alike cancels [C].
        """
        log = Log.read(folder, self.lists.part)
        if log is None:
            return self
        popularity, exists = log_clicks(seen[0], self.intents), self.exists
        model = DirectModel.fit(seen[1], np.broadcast_to(popularity, (len(seen[1]), len(popularity))))
        k = min(3, len(model.intercepts), log.shown.shape[1], len(popularity))

        def debiased(over_kb: np.ndarray) -> np.ndarray:
            shown = np.argsort(-np.where(exists, over_kb, -np.inf), axis=1, kind="stable")[:, :k]
            return session_values(log, shown, model.predict(np.broadcast_to(popularity, over_kb.shape), shown))

        return replace(self, debiased=debiased)

    def for_parts(self, parts: Parts) -> "Judge":
        """For a variant's valid lists."""
        return replace(self, lists=parts.valid, intents=parts.intents)

    def with_match(self, folder: Path) -> "Judge":
        """With the match terms that lie there of these lists, if any (ranker.match.with_values)."""
        return replace(self, lists=with_values(self.lists, folder))

    def with_vectors(self, name: str, sessions: Vectors, intents: Vectors, train: Lists, seed: int) -> "Judge":
        """For a variant that reads vectors (ranker.train.lists_with_vectors)."""
        lists = lists_with_vectors(self.lists, name, sessions, train, seed)
        return replace(self, lists=lists, intents=with_texts(self.intents, intents.rows(self.intents.intent_id)))

    def ranker(self, model: nn.Module, name: str, seed: int | None) -> pd.DataFrame:
        """The session_metrics rows of a ranker."""
        return self._metrics(score(model, self.lists, self.intents), self.over_kb(model), name, seed)

    def over_kb(self, model: nn.Module) -> np.ndarray:
        """Scores (lists, intents) by which a ranker ranks the whole KB."""
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
        self, similarity: np.ndarray, session_ids: Sequence[str], gold: pd.DataFrame | None = None
    ) -> pd.DataFrame:
        """IHR of the queries of some sessions: session_id, ihr@1, ihr@3 (METHOD.md 4).

        similarity  (session_ids, intents) of each query to each intent
        gold        columns session_id, intent_id, any number of rows a session (gold_intents); None: the clicked ones
        NaN where there is no gold intent, or it was not in the KB yet.
        """
        rows = pd.Index(self.lists.session_id).get_indexer(list(session_ids))
        if gold is None:
            lists = self.lists.take(rows)
            is_gold = clicked_in_kb(lists.candidates.numpy(), lists.clicked.numpy(), len(self.intents))
        else:
            is_gold = np.zeros((len(rows), len(self.intents)), dtype=bool)
            row = pd.Index(list(session_ids), dtype=object).get_indexer(gold["session_id"].astype(object))
            column = pd.Index(list(self.intents.intent_id), dtype=object).get_indexer(gold["intent_id"].astype(object))
            known = (row >= 0) & (column >= 0)  # a row with an empty intent counts for none
            is_gold[row[known], column[known]] = True
        hits = {f"ihr@{k}": intent_hits(similarity, is_gold, self.exists[rows], k) for k in (1, 3)}
        return pd.DataFrame({"session_id": list(session_ids), **hits})

    def _metrics(self, listed: np.ndarray, over_kb: np.ndarray, name: str, seed: int | None) -> pd.DataFrame:
        shown, clicked = self.lists.shown.numpy(), self.lists.clicked.numpy()
        in_kb = clicked_in_kb(self.lists.candidates.numpy(), clicked, len(self.intents))
        keys: dict[str, Any] = {"session_id": self.lists.session_id, "user_id": self.lists.user_id}
        return session_metrics(
            np.where(shown, listed, 0), clicked, shown, **keys, model=name, seed=seed, split=self.lists.part,
            group=self.group, weights=self.weights, whole_kb=(over_kb, in_kb, self.exists),
            ctr=None if self.debiased is None else self.debiased(over_kb),
        )  # fmt: skip


def about(dataset: Dataset, lm_seed: int | None) -> dict[str, Any]:
    """What the result tables say of a run: its data, a simulated world's seed and distance, the LM's seed."""
    settings = dataset.meta.get("world", {})
    world = {"distance": settings.get("distance"), "world_seed": settings.get("seed")}
    return {"data": dataset.name, **world, "lm_seed": lm_seed}


def gold_intents(dataset: Dataset, split: str) -> tuple[str, pd.DataFrame]:
    """The best relevance source of a split, labels | truth | click, and its rows: session_id, intent_id.

    Labels if anybody labelled a session of the split, else the truth, else the clicks [C]. One source for all sessions:
    a mean over some by label and others by click would be neither. Any one of several rows of a session counts as a
    hit; rows without an intent (an annotator found none) are left out.
    """
    sessions = dataset.sessions.loc[dataset.sessions["split"] == split, "session_id"]

    def gold_of(table: pd.DataFrame) -> pd.DataFrame:
        rows = table["session_id"].isin(sessions) & table["intent_id"].notna()
        return table.loc[rows, ["session_id", "intent_id"]].drop_duplicates(ignore_index=True)

    for source, table in (("labels", dataset.labels), ("truth", dataset.truth)):
        if table is not None and len(gold := gold_of(table)):
            return source, gold
    return "click", gold_of(dataset.impressions[dataset.impressions["clicked"] == 1])


def query_hits(
    judge: Judge, dataset: Dataset, gold: pd.DataFrame, reasoner: Reasoner, prompter: Prompter,
    reader: Reasoner | None = None, *, name: str, max_new_tokens: int
) -> pd.DataFrame:  # fmt: skip
    """IHR of the greedy query of each session that `gold` names: session_id, ihr@1, ihr@3; empty for an encoder.

    judge   of the split of these sessions;  name  evaluation.ihr_judge
    gold    session_id, intent_id (gold_intents)
    reader  by whose embeddings queries are judged where `name` says so; None: their writer's. The same for all that are
            compared: a judge that moves with the judged model says nothing
    """
    sessions = dataset.sessions[dataset.sessions["session_id"].isin(gold["session_id"])]
    if reasoner.kind == "encoder" or sessions.empty:
        return pd.DataFrame({"session_id": [], **{metric: [] for metric in IHR}})
    written = greedy(reasoner, prompter, prompter.sessions(sessions), max_new_tokens=max_new_tokens)
    similarity = query_judge(name, reader or reasoner, prompter, dataset.intents).similarity(written["query"].tolist())
    return judge.intent_hits(similarity, sessions["session_id"].tolist(), gold)


def hit_table(hits: pd.DataFrame, source: str) -> pd.DataFrame:
    """One row named by the relevance source: sessions with a gold intent that was in the KB, and the mean IHR."""
    judged = hits["ihr@1"].notna().sum()
    return pd.DataFrame([{"sessions": judged, **hits[IHR].mean()}], index=pd.Index([source], name="source"))


def with_hits(metrics: pd.DataFrame, hits: Mapping[str | None, pd.DataFrame], split: str) -> pd.DataFrame:
    """session_metrics with columns ihr@1 and ihr@3 in the rows of the models named in `hits` on `split`, else NaN.

    hits  the model that they are listed with (ranker.variants.reader_of_prompts) -> what `query_hits` found; of an
          encoder it is empty, and a model may be None: not listed. Without any there are no columns
    """
    parts = [own.assign(model=model, split=split) for model, own in hits.items() if model is not None and len(own)]
    if not parts:
        return metrics
    listed = pd.concat(parts)
    listed[["model", "split"]] = listed[["model", "split"]].astype(metrics["model"].dtype)
    return metrics.merge(listed, "left", ["session_id", "model", "split"])
