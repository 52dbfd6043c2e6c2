"""Vocabularies, bins, histories and words: which id a value gets, and that only train decides."""

import zlib

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgalign.data import encode
from rgalign.data.encode import encode_intents, encode_lists
from rgalign.data.features import FeatureSpace, as_keys, column_of, fit_space

KINDS = {"state": "categorical", "orders": "numeric", "recent": "history", "note": "text"}
KB = pd.DataFrame(
    {
        "intent_id": ["ship", "refund", "login", "new"],
        "title": ["Speed up delivery", "Refund", "Log in", "Coins"],
        "description": ["Delivery is late", "Money back", "", None],
        "category": ["order", "money", "account", None],
        "valid_from": pd.to_datetime([None, None, None, "2024-05-01"]),
    }
)
TRAIN = pd.DataFrame(
    {
        "session_id": ["a", "b", "c", "d", "e"],
        "user_id": ["u", "u", "v", "w", "x"],
        "split": "train",
        "state": ["paid", "paid", "sent", "sent", "lost"],
        "orders": [1.0, 2.0, 3.0, 4.0, np.nan],
        "recent": [["p", "q", "p"], [], ["q"], None, ["r"]],
        "note": ["Where, where is my PARCEL?", None, "", "parcel where", "Über 3 Tage"],
    }
)
SHOWN = pd.DataFrame(
    {
        "session_id": ["a", "a", "b", "b", "b", "d", "d"],
        "intent_id": ["ship", "new", "refund", "ship", "login", "login", "refund"],
        "position": [0, 1, 0, 1, 2, 0, 1],
        "clicked": [1, 0, 0, 1, 0, 0, 1],
    }
)


def space(**settings) -> FeatureSpace:
    return fit_space(TRAIN, KB, SHOWN, KINDS, **{"numeric_bins": 2, **settings})


def sessions(**values) -> pd.DataFrame:
    """One session of the first training row with some values changed."""
    row = TRAIN.iloc[[0]].copy()
    for name, value in values.items():
        row[name] = pd.Series([value], index=row.index, dtype=object if value is None else None)
    return row


def fields_of(fitted: FeatureSpace, frame: pd.DataFrame) -> dict[str, int]:
    lists = encode_lists(fitted, frame, SHOWN[:0], KB, "train")
    return dict(zip(fitted.field_names, lists.fields[0].tolist(), strict=True))


def bags(bag) -> list[list[int]]:
    return [bag.values[start:end].tolist() for start, end in zip(bag.offsets[:-1], bag.offsets[1:], strict=True)]


def bucket(word: str) -> int:
    return zlib.crc32(word.encode()) % 4096


def test_a_hand_worked_table():
    fitted = space()
    lists = encode_lists(fitted, TRAIN, SHOWN, KB, "train")
    assert fitted.field_names == ("state", "orders", "recent.length")
    # paid 2, sent 3, lost (once) unknown; orders below 2 | from 2 on; lengths 3 0 1 - 1: below 1 | from 1 on.
    assert lists.fields.tolist() == [[2, 2, 3], [2, 3, 2], [3, 3, 3], [3, 3, 0], [1, 0, 3]]
    assert fitted.field_sizes == (4, 4, 4)
    assert bags(lists.history[0]) == [[2, 3, 2], [], [3], [], [1]]
    assert fitted.history_sizes == (4,)
    assert lists.candidates.tolist() == [[0, 3, -1], [1, 0, 2], [-1] * 3, [2, 1, -1], [-1] * 3]
    assert lists.clicked.int().tolist() == [[1, 0, 0], [0, 1, 0], [0] * 3, [0, 1, 0], [0] * 3]
    assert (lists.shown == (lists.candidates >= 0)).all()
    words = [["where", "is", "my", "parcel"], [], [], ["parcel", "where"], ["über", "3", "tage"]]
    assert bags(lists.words) == [sorted({bucket(word) for word in each}) for each in words]
    assert lists.session_id.tolist() == list("abcde")
    assert lists.user_id.tolist() == list("uuvwx")


def test_an_intent_that_was_never_clicked_in_train_is_unknown_and_told_apart_by_its_text():
    intents = encode_intents(space(), KB)
    assert intents.id.tolist() == [2, 3, 1, 1]  # login was shown, never clicked; new was shown once
    assert intents.category.tolist() == [2, 3, 1, 1]  # order has two clicks, money one, account none; no category
    assert bags(intents.words)[0] == sorted(bucket(word) for word in ["speed", "up", "delivery", "is", "late"])
    assert bags(intents.words)[3] == [bucket("coins")]
    assert intents.valid_from[3] == np.datetime64("2024-05-01")
    assert np.isnat(intents.valid_from[:3]).all()
    assert (space().intent_ids_size, space().category_size) == (4, 4)


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        ("state", "never seen", 1),
        ("state", None, 1),  # no session of train is without a state
        ("state", "", 1),
        ("orders", None, 0),
        ("orders", 1e12, 3),
        ("orders", -1e12, 2),
    ],
)
def test_unknown_and_missing_are_told_apart(column, value, expected):
    assert fields_of(space(), sessions(**{column: value}))[column] == expected


def test_an_empty_cell_has_its_own_id_where_train_has_empty_cells():
    """Of categorical, numeric, history and an intent's category alike; else it is unknown, whose row is trained."""
    train = TRAIN.assign(state=["paid", "paid", None, "sent", "lost"], recent=[["p", ""], [], ["p"], None, []])
    nothing = TRAIN.assign(state=None, orders=np.nan, recent=None).iloc[:1]
    for known, expected in ((train, 0), (TRAIN.assign(orders=1.0, recent=[["p"]] * 5), 1)):
        fitted = fit_space(known, KB, SHOWN, KINDS, numeric_bins=2)
        lists = encode_lists(fitted, nothing, SHOWN[:0], KB, "train")
        assert lists.fields[0].tolist() == [expected] * 3
        assert bags(lists.history[0]) == [[]]
        silent = encode_lists(fitted, TRAIN.iloc[:1].assign(recent=[[""]]), SHOWN[:0], KB, "train")
        assert bags(silent.history[0]) == [[expected]], "an empty string stands for no value"
        assert FeatureSpace.from_json(fitted.to_json()) == fitted
    clicked = SHOWN.assign(clicked=SHOWN["intent_id"].eq("new").astype(int))
    assert encode_intents(fit_space(TRAIN, KB, clicked, KINDS), KB).category.tolist() == [1, 1, 1, 0]


def test_whole_numbers_are_one_category_whatever_the_type_of_the_column():
    codes = {}
    for name, values in {"integer": [7, 8], "with a gap": [7, 8, None], "text": ["7", "8"]}.items():
        index, keys = as_keys(column_of(pd.DataFrame({"x": pd.Series(values)}), "x"))
        codes[name] = [keys[i] for i in index]
    assert codes == {"integer": ["7", "8"], "with a gap": ["7", "8", None], "text": ["7", "8"]}


@given(
    values=st.lists(st.floats(-1e6, 1e6) | st.just(np.nan) | st.integers(0, 3).map(float), min_size=1, max_size=60),
    bins=st.integers(2, 16),
)
def test_numeric_bins_are_numpys_quantiles_and_none_is_empty_in_train(values, bins):
    frame = pd.DataFrame({"session_id": [str(i) for i in range(len(values))], "user_id": "u", "x": values})
    fitted = fit_space(frame, KB, SHOWN[:0], {"x": "numeric"}, numeric_bins=bins)
    ids = encode_lists(fitted, frame, SHOWN[:0], KB, "train").fields[:, 0].numpy()
    there = np.array(values)[~np.isnan(values)]
    assert (ids[np.isnan(values)] == 0).all()
    if len(there) == 0:
        assert fitted.field_sizes == (2,)
        return
    edges = np.quantile(there, np.arange(1, bins) / bins, method="inverted_cdf")
    edges = np.unique(edges[edges > there.min()])
    assert (ids[~np.isnan(values)] == 2 + (there[:, None] >= edges[None, :]).sum(axis=1)).all()
    assert set(ids[~np.isnan(values)]) == set(range(2, fitted.field_sizes[0]))


def test_a_constant_column_has_one_bin_and_an_empty_one_knows_no_number():
    frame = TRAIN.assign(orders=5.0, state=None)
    fitted = fit_space(frame, KB, SHOWN, KINDS)
    assert fields_of(fitted, sessions(orders=9.0))["orders"] == 2
    nothing = fit_space(TRAIN.assign(orders=np.nan), KB, SHOWN, KINDS)
    assert fields_of(nothing, sessions(orders=9.0))["orders"] == 1


def test_a_history_keeps_its_most_recent_values_and_its_whole_length():
    fitted = space(max_history=2, min_count=1, numeric_bins=16)
    lists = encode_lists(fitted, sessions(recent=["r", "q", None, "p"]), SHOWN[:0], KB, "train")
    names = {2 + i: value for i, value in enumerate(fitted.histories[0].values)}
    assert [names[i] for i in bags(lists.history[0])[0]] == ["q", "p"]
    longest, one = fields_of(fitted, sessions(recent=["p"] * 3)), fields_of(fitted, sessions(recent=["p"]))
    assert longest["recent.length"] > one["recent.length"]


WORDS = st.sampled_from(["late", "parcel", "refund", "เงิน", "café", "12", "a_b"])


@given(words=st.lists(WORDS, max_size=12), data=st.data())
def test_words_are_free_of_order_case_and_repetition(words, data):
    shuffled = data.draw(st.permutations(words + words[:3]))
    texts = pa.array([", ".join(words), " !? ".join(shuffled).upper()])
    rows, buckets = encode.hashed_words([texts], buckets=4096, pairs=False)
    assert buckets[rows == 0].tolist() == sorted({bucket(word) for word in words}) == buckets[rows == 1].tolist()


def test_pairs_are_neighbours_within_one_column():
    texts = [pa.array(["money back", ""]), pa.array(["now", "back; money"])]
    rows, buckets = encode.hashed_words(texts, buckets=4096, pairs=True)
    first, second = ["money", "back", "money back", "now"], ["back", "money", "back money"]
    assert buckets[rows == 0].tolist() == sorted(map(bucket, first))
    assert buckets[rows == 1].tolist() == sorted(map(bucket, second))


def test_dropped_columns_leave_no_trace_and_a_misspelt_one_is_named():
    fitted = space(drop=["state", "note", "recent"])
    assert (fitted.field_names, fitted.texts, fitted.histories) == (("orders",), (), ())
    assert bags(encode_lists(fitted, TRAIN, SHOWN, KB, "train").words) == [[]] * 5
    with pytest.raises(ValueError, match=r"'stat'; did you mean 'state'\?\n.*'nots'; did you mean 'note'\?"):
        space(drop=["stat", "nots"])
    with pytest.raises(ValueError, match="leaves none of the 4"):
        space(drop=list(KINDS))


@pytest.mark.parametrize("part", ["valid", "test"])
def test_a_session_of_another_split_is_refused(part):
    frame = pd.concat([TRAIN, TRAIN.iloc[[0]].assign(session_id="z", split=part)])
    with pytest.raises(ValueError, match=f"have split {part}"):
        fit_space(frame, KB, SHOWN, KINDS)
    with pytest.raises(ValueError, match=f"'train' alone; these sessions have split .*{part}"):
        encode_lists(space(), frame, SHOWN, KB, "train")
    with pytest.raises(ValueError, match="name 1 sessions"):
        fit_space(TRAIN[1:], KB, SHOWN, KINDS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intent_id": "gone"}, "1 intents that the KB does not have .*'gone'"),
        ({"session_id": "gone"}, "7 impressions are of sessions that are not among these 5"),
        ({"position": 0}, "share session and position"),
        ({"position": -1}, "position is -1"),
    ],
)
def test_impressions_that_fit_nowhere_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        encode_lists(space(), TRAIN, SHOWN.assign(**change), KB, "train")


VALUES = st.sampled_from(["x", "y", "z", "only later", "", None])


@settings(deadline=None, max_examples=40)
@given(train=st.lists(VALUES, min_size=1, max_size=12), later=st.lists(VALUES, min_size=1, max_size=12))
def test_what_comes_after_train_changes_nothing(train, later):
    """The vocabulary is that of train, and whatever was not in train is unknown later."""
    rows = [str(i) for i in range(len(train) + len(later))]
    split = ["train"] * len(train) + ["valid"] * len(later)
    values = pd.Series(train + later, dtype="str")
    frame = pd.DataFrame({"session_id": rows, "user_id": rows, "split": split, "c": values, "t": values})
    frame["h"] = [[value] * 2 for value in values]
    kinds = {"c": "categorical", "h": "history", "t": "text"}
    past, future = frame[frame["split"] == "train"], frame[frame["split"] == "valid"]
    fitted = fit_space(past, KB, SHOWN[:0], kinds, min_count=1)
    known = {value for value in train if value}
    assert set(fitted.fields[0].values) == set(fitted.histories[0].values) == known
    lists = encode_lists(fitted, future, SHOWN[:0], KB, "valid")
    empty = 0 if {"", None} & set(train) else 1
    ids = {None: empty, "": empty} | {value: 2 + i for i, value in enumerate(fitted.fields[0].values)}
    assert lists.fields[:, 0].tolist() == [ids.get(value, 1) for value in later]


def test_a_space_survives_its_json():
    fitted = space()
    assert FeatureSpace.from_json(fitted.to_json()) == fitted
    assert FeatureSpace.from_json(fitted.to_json()).to_json() == fitted.to_json()
