"""What a reasoner writes and sees: the small tables behind notebook 02's figures."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from rgalign.data.personal import masked
from rgalign.data.prompts import Prompter
from rgalign.data.tables import Dataset
from rgalign.data.vectors import Vectors
from rgalign.evaluation.ihr import query_judge
from rgalign.evaluation.judge import Judge
from rgalign.reasoner.embed import embed
from rgalign.reasoner.model import Reasoner
from rgalign.reasoner.queries import greedy, sample

QUERY_COLUMNS = ["session_id", "candidate", "query", "log_probability", "tokens", "count", "source"]


def model_card(reasoner: Reasoner) -> dict[str, Any]:
    """Name, architecture, sizes and pooling."""
    return {
        "model": reasoner.name,
        "architecture": type(reasoner.model).__name__,
        "parameters": sum(p.numel() for p in reasoner.model.parameters()),
        "tokens": len(reasoner.tokenizer),
        "width": reasoner.hidden_size,
        "pooling": reasoner.pooling,
    }


def clicked_sessions(dataset: Dataset, split: str) -> pd.DataFrame:
    """The split's sessions with a click, in order."""
    clicked = dataset.impressions.loc[dataset.impressions.clicked == 1, "session_id"]
    sessions = dataset.sessions
    return sessions[(sessions.split == split) & sessions.session_id.isin(clicked)].reset_index(drop=True)


def written_queries(
    reasoner: Reasoner, prompter: Prompter, sessions: pd.DataFrame, sampling: Any, *, seed: int, source: str = "main"
) -> pd.DataFrame:
    """The greedy query of each session (candidate -1) and its samples: QUERY_COLUMNS; empty for an encoder.

    sampling  params.reasoner.queries
    """
    if reasoner.kind == "encoder":
        return pd.DataFrame(columns=QUERY_COLUMNS).astype({"session_id": "string", "query": "string"})
    prompts = prompter.sessions(sessions)
    how = {key: getattr(sampling, key) for key in ("samples", "temperature", "top_p", "max_new_tokens")}
    best = greedy(reasoner, prompter, prompts, max_new_tokens=sampling.max_new_tokens).assign(candidate=-1)
    drawn = sample(reasoner, prompter, prompts, seed=seed, **how)
    both = pd.concat([best, drawn]).sort_values(["row", "candidate"], kind="stable", ignore_index=True)
    both["session_id"] = sessions["session_id"].to_numpy()[both["row"]]
    return both.assign(source=source)[QUERY_COLUMNS]


def few_queries(queries: pd.DataFrame, sessions: pd.DataFrame, count: int = 4) -> pd.DataFrame:
    """The queries of the first sessions, with their probability; the greedy one first."""
    few = queries[queries.session_id.isin(sessions.session_id.head(count))].copy()
    few["query"] = few["query"].map(masked)
    few["probability"] = np.exp(few.log_probability.astype(float)).round(4)
    few["how"] = np.where(few.candidate < 0, "greedy", "sampled")
    return few.set_index(["session_id", "how"])[["query", "probability", "count"]]


def greedy_hits(
    queries: pd.DataFrame, judge: Judge, dataset: Dataset, name: str, reasoner: Reasoner, prompter: Prompter
) -> pd.DataFrame:
    """IHR of each greedy query against the clicked intents: session_id, ihr@1, ihr@3; empty for an encoder.

    judge  of the sessions' split;  name  evaluation.ihr_judge
    """
    best = queries[queries.candidate == -1]
    if best.empty:
        return pd.DataFrame(columns=["session_id", "ihr@1", "ihr@3"])
    nearest = query_judge(name, reasoner, prompter, dataset.intents)
    return judge.intent_hits(nearest.similarity(best["query"].tolist()), best.session_id)


def hit_rates(
    queries: pd.DataFrame, judge: Judge, dataset: Dataset, name: str, reasoner: Reasoner, prompter: Prompter
) -> pd.DataFrame:
    """Mean of `greedy_hits`; empty for an encoder."""
    hits = greedy_hits(queries, judge, dataset, name, reasoner, prompter)[["ihr@1", "ihr@3"]]
    return hits.mean().to_frame("clicked intent").T if len(hits) else hits


def states(reasoner: Reasoner, prompter: Prompter, session: pd.Series, others: pd.DataFrame) -> pd.DataFrame:
    """Each token of a prompt with the cosine of its state to the last one's; the mean over `others` is taken off."""
    tokens = prompter.explain(session)
    ids = tokens["id"].tolist()
    prefixes = [ids[: end + 1] for end in range(len(ids))]
    centre = embed(reasoner, prompter.sessions(others), pooling="last", progress=False).mean(axis=0)
    state = embed(reasoner, prefixes, pooling="last", progress=False) - centre
    length = np.linalg.norm(state, axis=1) * np.linalg.norm(state[-1])
    return tokens.assign(similarity=state @ state[-1] / np.maximum(length, 1e-9))


def principal_map(embedded: Vectors, sessions: pd.DataFrame, dataset: Dataset) -> pd.DataFrame:
    """The two main directions of standardised vectors: columns x, y, family (category of the clicked intent)."""
    clicked = dataset.impressions[dataset.impressions.clicked == 1].drop_duplicates("session_id")
    family = clicked.merge(dataset.intents[["intent_id", "category"]], on="intent_id").set_index("session_id")
    values = embedded.rows(sessions["session_id"].tolist()).astype(np.float64)
    values = (values - values.mean(axis=0)) / np.maximum(values.std(axis=0), 1e-6)
    _, _, directions = np.linalg.svd(values, full_matrices=False)
    signs = np.sign(directions[:2][np.arange(2), np.abs(directions[:2]).argmax(axis=1)])  # a direction has no sign
    x, y = (values @ (directions[:2] * signs[:, None]).T).T
    of_session: Mapping = family["category"].astype(object).fillna("(none)").to_dict()
    return pd.DataFrame({"x": x, "y": y, "family": [of_session[i] for i in sessions["session_id"]]})
