"""What an alignment step did: the small tables behind the figures of notebooks 04 to 08."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from rgalign.alignment.context import Context
from rgalign.alignment.looking import Hits, Lookout
from rgalign.data.lists import Lists
from rgalign.evaluation.ihr import query_judge
from rgalign.evaluation.judge import Judge
from rgalign.reasoner.model import Reasoner

FIGURES = ["ranking", "reward", "ihr@1", "ihr@3", "tokens", "distinct", "repeated", "seconds"]


def hits_by_click(context: Context, reader: Reasoner) -> Hits:
    """IHR of valid's watched queries, against the clicked intents (METHOD.md 4).

    reader  by whose embeddings they are judged where evaluation.ihr_judge says so: the reasoner before its alignment
    """
    lists = Lookout.of(context).valid
    prompter = context.recipe.prompter(context.shop, reader)
    judge = query_judge(context.params.evaluation.ihr_judge, reader, prompter, context.shop.intents)
    bench = Judge.of(context.shop, lists, context.parts.intents, ())

    def hits(queries: Sequence[str]) -> dict[str, float]:
        found = bench.intent_hits(judge.similarity(list(queries)), lists.session_id.tolist())
        return found[["ihr@1", "ihr@3"]].mean().to_dict()

    return hits


def leads_to_click(context: Context, reader: Reasoner, candidates: pd.DataFrame) -> np.ndarray:
    """(rows,) bool: the KB intent nearest to the query, by the fixed judge, is one that its session clicked.

    An intent that came into the KB after the session is none that it could have been led to.
    """
    prompter = context.recipe.prompter(context.shop, reader)
    judge = query_judge(context.params.evaluation.ihr_judge, reader, prompter, context.shop.intents)
    similarity = np.nan_to_num(judge.similarity(candidates["query"].tolist()), nan=-1.0)
    when = context.shop.sessions.set_index("session_id")["timestamp"].loc[candidates["session_id"].tolist()]
    times = when.to_numpy(dtype="datetime64[us]", na_value=np.datetime64("NaT"))
    similarity = np.where(context.parts.intents.existing(times), similarity, -1.0)
    nearest = context.shop.intents["intent_id"].to_numpy(dtype=object)[similarity.argmax(axis=1)]
    clicks = context.shop.impressions
    clicks = clicks[(clicks["clicked"] == 1) & clicks["session_id"].isin(candidates["session_id"])]
    clicked = set(clicks[["session_id", "intent_id"]].itertuples(index=False, name=None))
    told = similarity.max(axis=1) > 0  # a query that shares no word with the KB leads nowhere
    pairs = zip(candidates["session_id"], nearest, strict=True)
    return told & np.array([pair in clicked for pair in pairs], dtype=bool)


def row(step: str, figures: Mapping[str, float], seconds: float) -> pd.DataFrame:
    """A step's row of the stage table: index step, columns FIGURES."""
    return pd.DataFrame([{**dict.fromkeys(FIGURES, np.nan), **figures, "seconds": round(seconds, 1)}], index=[step])[
        FIGURES
    ].rename_axis("step")


def before_and_after(lookout: Lookout, models: Mapping[str, Reasoner], sessions: int = 6) -> pd.DataFrame:
    """The same sessions' greedy queries by several reasoners, beside what was clicked: index session_id."""
    context, lists = lookout.context, lookout.valid
    titles = context.shop.intents["title"].fillna("").to_numpy(dtype=object)
    clicked = titles[lists.candidates.long().gather(1, lists.clicked.int().argmax(1, keepdim=True)).squeeze(1).numpy()]
    table: dict[str, Any] = {"clicked": clicked}
    for name, reasoner in models.items():
        table[name] = lookout.written(reasoner)["query"].to_numpy()
    index = pd.Index(lists.session_id, name="session_id")
    return pd.DataFrame(table, index=index).head(sessions)


def places_of_click(scores: np.ndarray, lists: Lists) -> np.ndarray:
    """(lists,) place of the first click in its list, from 1; ties count one half. scores (lists, candidates)."""
    own = np.take_along_axis(scores, lists.clicked.int().argmax(1, keepdim=True).numpy(), axis=1)
    shown = lists.shown.numpy()
    return 0.5 + ((scores > own) & shown).sum(axis=1) + ((scores == own) & shown).sum(axis=1) / 2
