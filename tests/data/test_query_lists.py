import numpy as np
import pytest
import torch

from rgalign.data.lists import Bag, Intents, Lists, QueryIntents, QueryLists, concat_lists, with_queries, with_texts


def make(count: int, candidates: int = 3) -> Lists:
    empty = Bag(torch.zeros(0, dtype=torch.int32), torch.zeros(count + 1, dtype=torch.int64))
    ids = np.array([f"s{i}" for i in range(count)])
    shown = torch.arange(count * candidates).view(count, candidates) % 4
    fields = torch.zeros(count, 1, dtype=torch.int16)
    return Lists("train", ids, ids, fields, (empty,), empty, shown, shown == 0)


def vectors(rows: int, dim: int = 5) -> np.ndarray:
    return np.random.default_rng(rows).normal(size=(rows, dim)).astype(np.float16)


def test_queries_are_taken_with_their_lists():
    values = vectors(6)
    taken = with_queries(make(6), values).take([4, 0, 4])
    assert isinstance(taken, QueryLists)
    assert np.array_equal(taken.query.numpy(), values[[4, 0, 4]])
    assert taken.session_id.tolist() == ["s4", "s0", "s4"]


def test_queries_and_texts_move_with_the_rest():
    moved = with_queries(make(3), vectors(3)).to("meta")
    assert {moved.query.device.type, moved.candidates.device.type, moved.words.values.device.type} == {"meta"}
    intents = Intents(
        np.array(["a", "b"]), np.array(["NaT"] * 2, "datetime64[us]"), *[torch.ones(2)] * 2, make(2).words
    )
    texts = with_texts(intents, vectors(2)).to("meta")
    assert isinstance(texts, QueryIntents)
    assert texts.text.device.type == "meta"
    assert len(texts) == 2


def test_concatenation_keeps_queries_only_where_all_have_them():
    first, second = with_queries(make(2), vectors(2)), with_queries(make(3, candidates=4), vectors(3))
    both = concat_lists([first, second])
    assert np.array_equal(both.query.numpy(), np.concatenate([vectors(2), vectors(3)]))
    assert both.candidates.shape == (5, 4)
    assert type(concat_lists([first, make(3)])) is Lists


def test_new_vectors_replace_the_old_ones():
    again = with_queries(with_queries(make(2), vectors(2)), vectors(2, dim=7))
    assert again.query.shape == (2, 7)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (vectors(3), r"\(3, 5\); expected floats \(2 lists, dim\)"),
        (vectors(2)[0], r"\(5,\); expected floats"),
        (np.zeros((2, 5), np.int64), "vectors are torch.int64"),
        (np.array([[1.0, np.nan], [np.inf, np.nan]], np.float32), "2 of 2 lists have a vector with NaN or inf"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        with_queries(make(2), values)
