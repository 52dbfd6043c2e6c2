"""Who says what a session wanted, and IHR by that witness (METHOD.md 4): labels, a simulator's truth, the click.

witness, wanted = wanted_intents(shop, "test")
hits = query_hits(judge, shop, wanted, reasoner, prompter, name="tfidf", max_new_tokens=24)
"""

from collections.abc import Mapping

import pandas as pd

from rgalign.data.prompts import Prompter
from rgalign.data.tables import Dataset
from rgalign.evaluation.ihr import query_judge
from rgalign.evaluation.judge import Judge
from rgalign.reasoner.model import Reasoner
from rgalign.reasoner.queries import greedy

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
