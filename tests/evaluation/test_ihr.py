"""IHR by hand, and against every order of tied intents written out."""

from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgalign.evaluation.judge import embedding_judge, intent_hits, tfidf_judge
from rgalign.reasoner.model import tiny
from rgalign.reasoner.prompts import Prompter
from rgalign.reasoner.tiny import build_tokenizer

KB = pd.DataFrame(
    {
        "intent_id": ["i0", "i1", "i2", "i3"],
        "title": ["Track my parcel", "Refund a parcel", "Change address", "จัดส่งล่าช้า"],
        "description": ["where is it now", None, "", "พัสดุยังไม่ถึง"],
    }
)


def test_a_case_worked_by_hand():
    similarity = np.array(
        [
            [0.9, 0.5, 0.5, 0.1],  # gold i1 ties with i2 for the second place
            [0.9, 0.5, 0.5, 0.1],  # the best does not exist yet
            [0.0, 0.0, 0.0, 0.0],  # knows nothing: all tied
            [0.2, 0.1, 0.8, 0.7],  # several gold, one of them on top
            [np.nan] * 4,  # an empty query
            [0.9, 0.5, 0.5, 0.1],  # nothing gold
            [0.9, 0.5, 0.5, 0.1],  # what is gold did not exist
            [np.nan] * 4,  # an empty query, and nothing gold
        ]
    )
    gold = np.zeros((8, 4), dtype=bool)
    gold[[0, 1, 2, 3, 3, 4, 6], [1, 1, 0, 1, 2, 0, 0]] = True
    exists = np.ones((8, 4), dtype=bool)
    exists[[1, 6], 0] = False
    nan = np.nan
    np.testing.assert_allclose(intent_hits(similarity, gold, exists, 1), [0, 0.5, 0.25, 1, 0, nan, nan, nan])
    np.testing.assert_allclose(intent_hits(similarity, gold, exists, 2), [0.5, 1, 0.5, 1, 0, nan, nan, nan])
    np.testing.assert_allclose(intent_hits(similarity, gold, exists, 3), [1, 1, 0.75, 1, 0, nan, nan, nan])
    np.testing.assert_allclose(intent_hits(similarity, gold, None, 1)[[1, 6]], [0, 1])


@settings(max_examples=100)
@given(data=st.data(), intents=st.integers(1, 5), k=st.integers(1, 6))
def test_ties_give_the_mean_over_all_orders(data, intents, k):
    rows = [data.draw(st.lists(kind, min_size=intents, max_size=intents)) for kind in
            (st.sampled_from([0.0, 0.3, 1.0]), st.booleans(), st.booleans())]  # fmt: skip
    similarity, gold, exists = map(np.array, rows)
    there = np.flatnonzero(exists)
    orders = [order for order in permutations(there) if all(np.diff(similarity[list(order)]) <= 0)]
    expected = np.mean([gold[list(order[:k])].any() for order in orders]) if gold[there].any() else np.nan
    found = intent_hits(similarity[None], gold[None], exists[None], k)
    np.testing.assert_allclose(found, [expected], atol=1e-12)


def test_shapes_that_differ_and_half_missing_similarities_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\), \(2, 4\), \(2, 4\)"):
        intent_hits(np.zeros((2, 3)), np.zeros((2, 4), dtype=bool), None, 1)
    with pytest.raises(ValueError, match="NaN"):
        intent_hits(np.array([[0.1, np.nan]]), np.array([[True, False]]), None, 1)


def test_the_tfidf_judge_finds_the_intent_and_says_nothing_of_empty_queries():
    queries = ["track MY parcel!", "จัดส่งล่าช้า", "", "  ", "refund a parcel", "zzz", "track MY parcel!"]
    similarity = tfidf_judge(KB).similarity(queries)
    assert similarity.shape == (7, 4)
    assert similarity.dtype == np.float32
    assert similarity[[0, 1, 4]].argmax(axis=1).tolist() == [0, 3, 1]
    assert np.isnan(similarity[[2, 3]]).all()
    assert (similarity[5] == 0).all()
    np.testing.assert_array_equal(similarity[0], similarity[6])
    assert similarity[4, 1] == 1  # the very text of the intent


def test_tfidf_similarity_by_hand():
    kb = pd.DataFrame({"title": ["a b", "a"], "description": ["", ""]})
    rare, common = np.log(3 / 2) + 1, 1.0  # scikit-learn's smoothed idf: a is in both, b and "a b" in one
    expected = common / np.sqrt(common**2 + 2 * rare**2)
    np.testing.assert_allclose(tfidf_judge(kb).similarity(["a"]), [[expected, 1]], atol=1e-5)


def test_equal_intents_tie_whatever_the_order_of_the_kb():
    doubled = pd.concat([KB, KB], ignore_index=True)
    similarity = tfidf_judge(doubled).similarity(["where is my refund parcel now"])
    np.testing.assert_array_equal(similarity[:, :4], similarity[:, 4:])


def test_a_kb_without_a_word_cannot_judge():
    with pytest.raises(ValueError, match="none of 2 intents has a word"):
        tfidf_judge(pd.DataFrame({"title": ["", None], "description": ["-", "!"]}))


def test_the_embedding_judge_knows_a_title_again():
    words = ["track", "my", "parcel", "refund", "a", "change", "address"]
    reasoner = tiny(build_tokenizer(dict.fromkeys(words, 5)), hidden=16, layers=1, heads=2, seed=0)
    prompter = Prompter(reasoner.tokenizer, features=["note"], kinds={"note": "text"})
    kb = KB.iloc[:3].assign(description="")
    similarity = embedding_judge(reasoner, prompter, kb).similarity(["Change address", "", "Track my parcel"])
    assert similarity.shape == (3, 3)
    assert similarity.dtype == np.float32
    np.testing.assert_allclose(similarity[[0, 2], [2, 0]], 1, atol=1e-4)
    assert similarity[[0, 2]].argmax(axis=1).tolist() == [2, 0]
    assert np.isnan(similarity[1]).all()


def test_no_queries_are_no_rows():
    reasoner = tiny(build_tokenizer({"parcel": 5}), hidden=16, layers=1, heads=2, seed=0)
    prompter = Prompter(reasoner.tokenizer, features=["note"], kinds={"note": "text"})
    for judge in (tfidf_judge(KB), embedding_judge(reasoner, prompter, KB)):
        similarity = judge.similarity([])
        assert similarity.shape == (0, 4)
        assert intent_hits(similarity, np.zeros((0, 4), dtype=bool), None, 1).shape == (0,)
