"""The click's place by hand; what leads to a click; one judge for all writers; the same sessions before and after."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import small_run
import torch

from rgalign.alignment.monitor import ProbeSet
from rgalign.evaluation.judge import query_judge
from rgalign.report import summaries as look


def test_places_of_the_click_by_hand():
    lists = SimpleNamespace(
        clicked=torch.tensor([[False, True, False], [True, False, False], [False, True, True], [False, False, True]]),
        shown=torch.tensor([[True, True, True], [True, True, False], [True, True, True], [True, True, True]]),
    )
    scores = np.array([[0.5, 0.7, 0.9], [1.0, 0.0, 9.0], [0.2, 0.1, 0.3], [0.4, 0.4, 0.4]])
    assert look.places_of_click(scores, lists).tolist() == [2, 1, 3, 2]  # padding never counts; three alike: the middle


def test_a_row_has_every_figure_and_its_price():
    row = look.row("sft", {"ranking": 0.6, "reward": 0.1}, 2.345)
    assert list(row) == look.FIGURES
    assert row.index.tolist() == ["sft"]
    assert row.loc["sft", ["ranking", "reward", "seconds"]].tolist() == [0.6, 0.1, 2.3]
    assert row.loc["sft", ["ihr@1", "tokens"]].isna().all()


@pytest.fixture(scope="module")
def said(context):
    """What customers would say who name the intent that they click, word for word, and one who is silent."""
    lists = ProbeSet.of(context).valid
    clicks = context.shop.impressions.query("clicked == 1").drop_duplicates("session_id").set_index("session_id")
    title = context.shop.intents.set_index("intent_id")["title"]
    return lists, [title[clicks.intent_id[session]] for session in lists.session_id]


def test_queries_that_are_the_clicked_title_hit_and_silent_ones_do_not(context, said):
    lists, titles = said
    hits = look.hits_by_click(context, context.main())
    assert hits(titles)["ihr@3"] == 1
    assert 0.9 <= hits(titles)["ihr@1"] <= 1  # two intents may have one title
    assert hits([""] * len(lists)) == {"ihr@1": 0, "ihr@3": 0}
    half = [*titles[: len(titles) // 2], *[""] * (len(titles) - len(titles) // 2)]
    assert hits(half)["ihr@3"] == pytest.approx((len(titles) // 2) / len(titles))


def test_leading_to_the_click_asks_for_the_very_session(context, said):
    lists, titles = said
    candidates = pd.DataFrame({"session_id": lists.session_id, "query": titles})
    assert look.leads_to_click(context, context.main(), candidates).mean() > 0.9
    strangers = candidates.assign(query=np.roll(titles, 1))
    same = np.array(titles) == np.roll(titles, 1)
    assert not (look.leads_to_click(context, context.main(), strangers) & ~same).any()
    silent = candidates.assign(query=["", "zzz nothing of the shop", *titles[2:]])
    assert look.leads_to_click(context, context.main(), silent)[:2].tolist() == [False, False]


def test_several_writers_have_one_judge_that_does_not_move_with_them(context, said, monkeypatch):
    """With ihr_judge embedding the queries are read by the reasoner before its alignment, whoever wrote them."""
    _, titles = said
    own = replace(context, params=small_run.small({"evaluation.ihr_judge": "embedding"}))
    readers = []
    monkeypatch.setattr(
        look,
        "query_judge",
        lambda name, reader, *rest: readers.append((name, reader)) or query_judge(name, reader, *rest),
    )
    reader, writer = context.main(), context.language_models("other-1")["other-1"]
    hits = look.hits_by_click(own, reader)
    probe = ProbeSet.of(own, hits=hits)
    for each in (reader, writer):
        assert 0 <= hits(probe.written(each)["query"].tolist())["ihr@1"] <= 1
    assert readers == [("embedding", reader)]
    assert hits(titles) == hits(titles)


def test_before_and_after_are_of_the_same_sessions(context, said):
    lists, titles = said
    models = {"main": context.main(), **context.language_models("other-1")}
    probe = ProbeSet.of(context)
    table = look.before_and_after(probe, models, sessions=4)
    assert table.index.tolist() == lists.session_id[:4].tolist()
    assert list(table) == ["clicked", "main", "other-1"]
    assert table.clicked.tolist() == titles[:4]
    assert table["other-1"].tolist() == probe.written(models["other-1"])["query"].head(4).tolist()
