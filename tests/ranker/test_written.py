"""Written queries: what each is worth by hand, and that their words reach the ranker and the reward."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array
from small_lists import KB, SMALL, make_query_intents, make_query_lists

from rgalign.alignment.reward import (
    Queries,
    RewardModel,
    null_query,
    score_candidates,
    with_all_queries,
    with_null_query,
)
from rgalign.data.lists import Match, with_match
from rgalign.data.vectors import Vectors
from rgalign.params_training import RankerSettings
from rgalign.ranker.match_terms import KnowledgeBase, Learnt, Sessions, WrittenCosine, WrittenOverlap, over_queries
from rgalign.ranker.train import Parts, build, lists_with_vectors, match_terms_of
from rgalign.reasoner import written
from rgalign.reasoner.written import SessionQueries, WrittenQueries

QUERIES = pd.DataFrame(
    [("s1", "where is it", 3), ("s1", "", 4), ("s1", "refund", 1), ("s3", "where is it", 2)],
    columns=["session_id", "query", "count"],
)
WRITTEN = WrittenQueries(QUERIES, Vectors(["where is it", "refund"], np.array([[1.0, 0], [0, 2]])))
NAMES = ("word_overlap", "written_overlap")


def of_written(asked):
    count = len(asked)
    return Sessions([""] * count, np.zeros((count, 1), np.float32), np.zeros(count, bool), written=asked)


def test_a_sessions_queries_weigh_as_often_as_they_were_drawn_and_blank_ones_nothing():
    asked = WRITTEN.of(["s3", "s2", "s1"])
    assert asked.texts == ["where is it", "refund"]
    np.testing.assert_allclose(asked.shares.toarray(), [[1, 0], [0, 0], [0.75, 0.25]])
    np.testing.assert_allclose(asked.vectors, [[1, 0], [0, 2]])
    assert WRITTEN.of(["s2"]).texts == []
    assert len(WRITTEN.of([])) == 0


def test_a_term_is_the_mean_over_what_can_be_compared():
    worth = {"a": [1.0, np.nan, 0.0], "b": [0.0, 0.5, np.nan]}
    asked = SessionQueries(
        ["a", "b"], np.zeros((2, 1)), csr_array(np.array([[0.75, 0.25], [1, 0], [0, 0]], dtype=np.float32))
    )
    term = over_queries(lambda sessions: np.array([worth[text] for text in sessions.texts], np.float32).reshape(-1, 3))
    nan = np.nan
    np.testing.assert_allclose(term(of_written(asked)), [[0.75, 0.5, 0], [1, nan, 0], [nan, nan, nan]])


@given(st.integers(0, 6), st.integers(1, 5), st.integers(0, 10**6))
def test_in_parts_it_is_what_it_is_in_one(sessions, queries, seed):
    draw = np.random.default_rng(seed)
    counts = draw.integers(0, 3, (sessions, queries)).astype(np.float32)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    worth = draw.random((queries, 4)).astype(np.float32)
    asked = SessionQueries([str(i) for i in range(queries)], np.zeros((queries, 1)), csr_array(shares))
    found = over_queries(lambda read: worth[[int(text) for text in read.texts]])(of_written(asked))
    expected = np.where(shares.any(axis=1, keepdims=True), shares @ worth, np.nan)
    assert found.shape == (sessions, 4)
    np.testing.assert_allclose(found, expected.reshape(found.shape), atol=2e-6)


def test_overlap_and_cosine_by_hand():
    kb = KnowledgeBase(["refund me", "parcel"], np.zeros((2, 1)), np.ones(2, bool), np.array([[0.0, 1], [1, 1]]))
    asked = WRITTEN.of(["s1", "s3"])
    learnt = Learnt(kb, ["where", "is", "it"], None, None, None, False, None, asked)
    overlap = WrittenOverlap.fit(learnt).over(kb)(of_written(asked))
    assert overlap[0, 0] == pytest.approx(0.25 / np.sqrt(2), abs=1e-5)  # refund and me: one document each, one idf
    np.testing.assert_allclose(overlap[1], [0, 0])
    cosine = WrittenCosine.fit(learnt).over(kb)(of_written(asked))
    np.testing.assert_allclose(cosine, [[0.25, 1 / np.sqrt(2)], [0, 1 / np.sqrt(2)]], atol=1e-5)
    centred = WrittenCosine.fit(replace(learnt, centred=True))
    np.testing.assert_allclose(centred.session_mean, (1.75 * np.array([1, 0]) + 0.25 * np.array([0, 2])) / 2)
    np.testing.assert_allclose(centred.intent_mean, [0.5, 1])


def test_written_anew_replaces_the_queries_of_those_sessions_alone():
    later = WrittenQueries(
        pd.DataFrame({"session_id": ["s3"], "query": ["lost"], "count": [5]}), Vectors(["lost"], np.array([[3.0, 4]]))
    )
    both = WRITTEN.updated(later)
    assert both.of(["s3"]).texts == ["lost"]
    np.testing.assert_allclose(both.of(["s1"]).shares.toarray(), WRITTEN.of(["s1"]).shares.toarray())
    np.testing.assert_allclose(both.of(["s3"]).vectors, [[3, 4]])


def test_they_come_back_from_disk_and_a_damaged_folder_says_so(tmp_path):
    whole = replace(WRITTEN, intents=Vectors(["i"], np.ones((1, 2))))
    written.save(tmp_path / "written", whole)
    back = written.load(tmp_path / "written")
    pd.testing.assert_frame_equal(back.queries, QUERIES, check_dtype=False)
    np.testing.assert_array_equal(back.of(["s1"]).vectors, WRITTEN.of(["s1"]).vectors)
    (tmp_path / "written" / "queries.parquet").write_bytes(b"x")
    with pytest.raises(ValueError, match="holds no written queries that can be read"):
        written.load(tmp_path / "written")


# --- the ranker and the reward read them


def lists_of(part, count, seed):
    """Lists whose clicked intent the written query names, by its overlap of 1."""
    lists = make_query_lists(part, count, seed=seed)
    values = torch.zeros(count, KB, 2)
    row, place = lists.clicked.nonzero(as_tuple=True)
    values[row, lists.candidates[row, place].long(), 1] = 1
    return with_match(lists, Match(values.half(), NAMES))


def parts():
    sizes = {name: SMALL[name] for name in ("field_sizes", "history_sizes", "word_buckets", "intent_ids")}
    space = SimpleNamespace(**sizes, intent_ids_size=SMALL["intent_ids"], category_size=SMALL["categories"])
    lists = (lists_of(part, count, count) for part, count in (("train", 200), ("dev", 60), ("valid", 80)))
    return Parts(space, make_query_intents(), *lists)


def test_controls_read_none_or_another_sessions():
    lists = lists_of("valid", 60, 3)
    own = Vectors(lists.session_id, lists.query.numpy())
    assert match_terms_of("qe_rec/no_written_match", lists) == ("word_overlap",)
    assert match_terms_of("qe_rec/shuffled_written_match", lists) == NAMES
    moved = lists_with_vectors(lists, "qe_rec/shuffled_written_match", own, lists, seed=0).match.values
    assert moved[:, :, 0].equal(lists.match.values[:, :, 0])
    one, other = (sorted(map(tuple, values[:, :, 1].tolist())) for values in (moved, lists.match.values))
    assert one == other
    assert not moved.equal(lists.match.values)


@pytest.fixture
def named():
    """Lists, the row of the KB that was clicked first in each, and queries that each name one intent."""
    lists = lists_of("train", 40, 5)
    first = lists.candidates[torch.arange(len(lists)), lists.clicked.int().argmax(1)].long()
    vectors = Vectors([f"names {i}" for i in range(KB)], np.zeros((KB, lists.query.shape[1])))
    return lists, first.tolist(), Queries(vectors, Match(torch.eye(KB)[:, :, None].half(), ("written_overlap",)))


def test_a_list_with_another_query_has_that_querys_terms_and_keeps_the_others(named):
    lists, first, queries = named
    asked = queries.conditioned(lists, [f"names {intent}" for intent in first])
    assert asked.match.values[:, :, 1].equal(torch.eye(KB)[first].half())
    assert asked.match.values[:, :, 0].equal(lists.match.values[:, :, 0])
    assert with_null_query(lists, torch.zeros(lists.query.shape[1])).match.values[:, :, 1].isnan().all()
    with pytest.raises(ValueError, match="have no vector"):
        queries.conditioned(lists.take([0]), ["names nothing"])


def test_a_drawn_query_brings_its_own_terms(named):
    lists, first, queries = named
    rows = [(session, "main", f"names {intent}", 1) for session, intent in zip(lists.session_id, first, strict=True)]
    candidates = pd.DataFrame(rows, columns=["session_id", "source", "query", "count"])
    null = null_query(lists, candidates, queries.vectors)
    for share, expected in ((0.0, torch.eye(KB)[first]), (1.0, torch.full((len(lists), KB), torch.nan))):
        drawn = with_all_queries(lists, candidates, queries, null=null, null_share=share).drawn()
        assert drawn.match.values[:, :, 1].nan_to_num(-1).equal(expected.half().nan_to_num(-1))
        assert drawn.take([3, 1]).match.values[:, :, 0].equal(lists.match.values[[3, 1], :, 0])


def test_the_reward_of_a_query_is_what_its_words_do_to_the_ranking(named):
    """By a ranker that is that term alone, which it starts as: one that names the click earns, another one costs."""
    lists, first, queries = named
    given = parts()
    ranker = build("qe_rec", given, RankerSettings(embedding_dim=4, dim=8, experts=2, hidden=8))
    model = RewardModel(ranker, given.intents, torch.zeros(lists.query.shape[1]).half())
    lists = replace(lists, part="dev")
    others = [
        next(int(i) for i in own if int(i) != intent) for own, intent in zip(lists.candidates, first, strict=True)
    ]
    right, wrong = ([f"names {intent}" for intent in names] for names in (first, others))
    assert (model.reward(queries.conditioned(lists, right)) > 0.5).all()
    assert (model.reward(queries.conditioned(lists, wrong)) < -0.5).all()
    candidates = pd.DataFrame({"session_id": lists.session_id, "source": "main", "query": right, "count": 1})
    scored = score_candidates(model, candidates, lists, queries)
    np.testing.assert_allclose(scored["reward"], model.reward(queries.conditioned(lists, right)), atol=1e-6)
