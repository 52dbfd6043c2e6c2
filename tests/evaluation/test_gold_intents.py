"""The relevance source of a split, and IHR by it: worked by hand, with a reasoner that writes what it is told."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from rgalign.data.lists import Bag, Intents, Lists
from rgalign.data.tables import Dataset
from rgalign.evaluation import judge as judging
from rgalign.evaluation.judge import Judge

KB = ["track", "refund", "address", "late"]
QUERIES = {"t0": "track", "t1": "refund", "t2": "", "t3": "late", "v0": "address"}  # what the reasoner writes
TODAY = np.datetime64("2024-03-02", "us")


def pairs(*rows) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["session_id", "intent_id"], dtype="string[pyarrow]")


@pytest.fixture
def shop():
    """Four test sessions and one of valid. t0 clicked track, t1 track and refund; t2 and t3 clicked on nothing."""
    sessions = pd.DataFrame({"session_id": list(QUERIES), "split": ["test"] * 4 + ["valid"]}, dtype="string[pyarrow]")
    shown = [("t0", "track", 1), ("t0", "late", 0), ("t1", "track", 1), ("t1", "refund", 1), ("t2", "late", 0),
             ("v0", "late", 1)]  # fmt: skip
    impressions = pd.DataFrame(shown, columns=["session_id", "intent_id", "clicked"])
    intents = pd.DataFrame({"intent_id": KB, "title": KB, "description": ""})
    return Dataset("shop", {}, {}, intents, sessions, impressions)


@pytest.fixture
def bench():
    """The judge of the test sessions; `late` enters the KB tomorrow."""
    bags = Bag(torch.zeros(0, dtype=torch.int32), torch.zeros(5, dtype=torch.int64))
    candidates = torch.tensor([[0, 3], [0, 1], [3, -1], [-1, -1]])
    clicked = torch.tensor([[True, False], [True, True], [False, False], [False, False]])
    ids = np.array(["t0", "t1", "t2", "t3"], dtype=object)
    lists = Lists("test", ids, ids, torch.zeros((4, 0), dtype=torch.int16), (), bags, candidates, clicked)
    valid_from = np.array(["NaT", "NaT", "NaT", "2024-03-03"], dtype="datetime64[us]")
    number = torch.arange(4)
    kb = Intents(np.array(KB, dtype=object), valid_from, number, number, bags)
    return Judge(lists, kb, np.repeat(TODAY, 4))


@pytest.fixture
def hits(shop, bench, monkeypatch):
    """hits(gold): IHR of the QUERIES by TF-IDF over the KB."""

    def written(reasoner, prompter, prompts, *, max_new_tokens):
        return pd.DataFrame({"query": [QUERIES[session] for session in prompts]})

    monkeypatch.setattr(judging, "greedy", written)
    prompter = SimpleNamespace(sessions=lambda frame: frame["session_id"].tolist())

    def of(gold, kind="causal"):
        reasoner = SimpleNamespace(kind=kind)
        return judging.query_hits(bench, shop, gold, reasoner, prompter, name="tfidf", max_new_tokens=5)

    return of


def by_session(found: pd.DataFrame, metric: str) -> dict:
    return dict(zip(found["session_id"], found[metric], strict=True))


def test_labels_come_before_the_truth_and_the_truth_before_the_click(shop):
    labels, truth = pairs(("t0", "late"), ("v0", "track")), pairs(*((session, "address") for session in QUERIES))
    source, gold = judging.gold_intents(replace(shop, labels=labels, truth=truth), "test")
    assert (source, gold.to_numpy().tolist()) == ("labels", [["t0", "late"]])
    source, gold = judging.gold_intents(replace(shop, truth=truth), "test")
    assert (source, gold.session_id.tolist()) == ("truth", ["t0", "t1", "t2", "t3"])  # clicked or not
    source, gold = judging.gold_intents(shop, "test")
    assert (source, gold.to_numpy().tolist()) == ("click", [["t0", "track"], ["t1", "track"], ["t1", "refund"]])


def test_labels_of_another_split_or_without_an_intent_are_no_source_of_this_one(shop):
    for labels in (pairs(("v0", "track")), pairs(("t0", None)), pairs()):
        assert judging.gold_intents(replace(shop, labels=labels), "test")[0] == "click"
    nobody = replace(shop, impressions=shop.impressions.assign(clicked=0))
    source, gold = judging.gold_intents(nobody, "test")
    assert source == "click"
    assert gold.empty


def test_hits_by_hand(hits):
    found = hits(pairs(("t0", "track"), ("t1", "address"), ("t2", "track"), ("t3", "track")))
    # t0 writes what is gold; t1 another, and what is gold ties with `track`; t2 is silent; t3 writes an intent that
    # comes tomorrow, so that all three that exist tie at 0
    assert by_session(found, "ihr@1") == pytest.approx({"t0": 1, "t1": 0, "t2": 0, "t3": 1 / 3})
    assert by_session(found, "ihr@3") == {"t0": 1, "t1": 1, "t2": 0, "t3": 1}
    table = judging.hit_table(found, "truth")
    assert table.loc["truth"].to_dict() == pytest.approx({"sessions": 4, "ihr@1": 1 / 3, "ihr@3": 3 / 4})


def test_any_of_several_labels_will_do_and_one_without_intent_says_nothing(shop, hits):
    labels = pairs(("t1", "address"), ("t1", "refund"), ("t1", None), ("t2", None), ("t3", "late"))
    source, gold = judging.gold_intents(replace(shop, labels=labels), "test")
    found = hits(gold)
    assert by_session(found, "ihr@1") == {"t1": 1, "t3": pytest.approx(np.nan, nan_ok=True)}  # `late` comes tomorrow
    assert judging.hit_table(found, source).loc["labels"].to_dict() == {"sessions": 1, "ihr@1": 1, "ihr@3": 1}


def test_the_judge_takes_empty_labels_as_no_gold_intent_and_clicks_without_any(bench):
    similarity, sessions = np.eye(4)[:3], ["t0", "t1", "t2"]
    found = bench.intent_hits(similarity, sessions, pairs(("t0", None), ("t1", "refund"), ("t9", "track")))
    np.testing.assert_array_equal(found["ihr@1"], [np.nan, 1, np.nan])
    clicks = pairs(("t0", "track"), ("t1", "track"), ("t1", "refund"))
    pd.testing.assert_frame_equal(
        bench.intent_hits(similarity, sessions), bench.intent_hits(similarity, sessions, clicks)
    )


def test_an_encoder_and_no_gold_intent_give_no_hits(hits):
    for found in (hits(pairs(("t0", "track")), kind="encoder"), hits(pairs())):
        assert found.empty
        assert list(found) == ["session_id", "ihr@1", "ihr@3"]
        assert judging.hit_table(found, "click").sessions.tolist() == [0]


def test_hits_stand_with_one_model_on_one_split():
    metrics = pd.DataFrame(
        {"session_id": ["t0", "t1", "t0", "v0"], "model": ["a", "a", "b", "a"], "split": ["test"] * 3 + ["valid"]}
    )
    hits = pd.DataFrame({"session_id": ["t0", "v0"], "ihr@1": [1.0, 1.0], "ihr@3": [1.0, 1.0]})
    found = judging.with_hits(metrics, {"a": hits}, "test")
    np.testing.assert_array_equal(found["ihr@1"], [1, np.nan, np.nan, np.nan])
    both = judging.with_hits(metrics, {"a": hits, "b": hits.assign(**{"ihr@1": 0.0})}, "test")
    np.testing.assert_array_equal(both["ihr@1"], [1, np.nan, 0, np.nan])
    assert judging.with_hits(metrics, {None: hits}, "test") is metrics
    assert judging.with_hits(metrics, {"a": hits.head(0)}, "test") is metrics


def test_a_judge_that_has_seen_no_list_knows_how_sampled_candidates_were_drawn(shop, bench):
    """Notebook 02 judges queries before any list is learnt from: without clicks negatives are drawn evenly."""
    sampled = {"sampled_negatives": {"popularity": 1, "uniform": 1, "smoothing": 0.5}}
    own = replace(shop, meta=sampled, sessions=shop.sessions.assign(timestamp=pd.NaT))
    judge = Judge.of(own, bench.lists, bench.intents, ())
    assert np.ptp(judge.correction) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("reader", [None, "one judge"])
def test_writers_that_are_compared_are_read_by_one_judge(shop, bench, monkeypatch, reader):
    """Else each would be judged by its own embeddings."""
    monkeypatch.setattr(judging, "greedy", lambda *given, **how: pd.DataFrame({"query": ["track"]}))
    readers, prompter = [], SimpleNamespace(sessions=lambda frame: frame["session_id"].tolist())
    judge = SimpleNamespace(similarity=lambda queries: np.eye(4)[: len(queries)])
    monkeypatch.setattr(judging, "query_judge", lambda name, reader, *rest: readers.append(reader) or judge)
    writers = [SimpleNamespace(kind="causal") for _ in range(2)]
    for writer in writers:
        asked = pairs(("t0", "track"))
        found = judging.query_hits(bench, shop, asked, writer, prompter, reader, name="embedding", max_new_tokens=5)
        assert by_session(found, "ihr@1") == {"t0": 1}
    assert readers == ([reader, reader] if reader else writers)
