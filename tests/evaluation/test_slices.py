"""Slices of a split worked out by hand."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from rgalign.data import shards, tables
from rgalign.evaluation import slices


def clicks(*pairs, misses=()):
    rows = [(session, intent, 1) for session, intent in pairs] + [(session, intent, 0) for session, intent in misses]
    return pd.DataFrame(rows, columns=["session_id", "intent_id", "clicked"])


# a 6 clicks, b 3, c 1, d 1, e 1: c, d and e hold 3 of 12 clicks (tail), with b it would be a half; f was only shown
TRAIN = clicks(
    *[(f"t{i}", "a") for i in range(6)],
    *[(f"t{i}", "b") for i in range(6, 9)],
    ("t9", "c"),
    ("t10", "d"),
    ("t11", "e"),
    misses=[("t0", "f")],
)
TRAINED = TRAIN.loc[TRAIN.clicked == 1, "intent_id"]


def test_intents_are_cold_tail_or_head():
    kinds = slices.intent_kinds(list("abcdefg"), TRAINED)
    assert kinds.to_dict() == {
        **dict.fromkeys("ab", "head"),
        **dict.fromkeys("cde", "tail"),
        **dict.fromkeys("fg", "cold"),
    }


def test_intents_clicked_equally_often_are_of_one_kind():
    assert set(slices.intent_kinds(list("abc"), list("abc"))) == {"head"}


@pytest.mark.parametrize("dtype", ["object", "string", pd.ArrowDtype(pa.large_string())])
def test_sessions_fall_into_the_slices_of_their_clicks(dtype):
    sessions = pd.DataFrame(
        {
            "session_id": ["s0", "s1", "s2", "s3"],
            "region": ["SG", "MY", None, "SG"],
            "shuffled": [True, False, None, True],
        }
    ).astype({"session_id": dtype, "region": dtype, "shuffled": "boolean"})
    shown = clicks(("s0", "a"), ("s1", "c"), ("s2", "g"), ("s2", "a"), misses=[("s3", "f"), ("s0", "g")])
    found = slices.session_slices(sessions, shown.astype({"session_id": dtype, "intent_id": dtype}), TRAINED)
    assert found.index.tolist() == ["s0", "s1", "s2", "s3"]
    assert {name: found.index[mask].tolist() for name, mask in found.items()} == {
        "all": ["s0", "s1", "s2", "s3"],
        "cold": ["s2"],
        "tail": ["s1"],
        "head": ["s0", "s2"],
        "shuffled": ["s0", "s3"],
        "region=MY": ["s1"],
        "region=SG": ["s0", "s3"],
    }
    assert found.dtypes.eq(bool).all()


def test_without_regions_or_a_shuffled_column_there_are_no_such_slices():
    sessions = pd.DataFrame({"session_id": ["s0"], "region": [None]})
    found = slices.session_slices(sessions, clicks(("s0", "a")), TRAINED)
    assert list(found) == ["all", "cold", "tail", "head"]
    assert found.loc["s0", "head"]
    assert not np.any(found.loc["s0", ["cold", "tail"]])


def test_users_are_cut_by_how_many_impressions_train_has_of_them():
    """Train: u0 has 1 impression, u1 3, u9 none. Median of those who have some: 2."""
    train = clicks(("t0", "a"), ("t1", "a"), misses=[("t1", "b"), ("t1", "c")])
    sessions = pd.DataFrame({"session_id": list("xyz"), "user_id": ["u0", "u1", "u9"], "region": [None] * 3})
    shown = clicks(("x", "a"), ("y", "a"), ("z", "a"))
    seen = train.session_id.map({"t0": "u0", "t1": "u1"}).value_counts()
    found = slices.session_slices(sessions, shown, TRAINED, seen)
    by_user = found[["seen=0", "seen=1..2", "seen>2"]]
    assert by_user.to_numpy().tolist() == [[False, True, False], [False, False, True], [True, False, False]]


@pytest.mark.parametrize("dtype", ["datetime64[us]", pd.ArrowDtype(pa.timestamp("us"))])
def test_sessions_fall_into_four_times_of_day(dtype):
    when = pd.to_datetime(["2026-01-01 00:00", "2026-01-02 05:59", None, "2026-01-01 06:00", "2026-01-01 23:30"])
    sessions = pd.DataFrame({"session_id": list("abcde"), "region": [None] * 5, "timestamp": when})
    sessions = sessions.astype({"timestamp": dtype})
    shown = clicks(*((session, "a") for session in "abcde"))
    found = slices.session_slices(sessions, shown, TRAINED).filter(like="hour=")
    assert {name: list(found.index[mask]) for name, mask in found.items()} == {
        "hour=0..5": ["a", "b"],
        "hour=6..11": ["d"],
        "hour=12..17": [],
        "hour=18..23": ["e"],
    }
    unknown = slices.session_slices(sessions.assign(timestamp=pd.NaT), shown, TRAINED)
    assert not [name for name in unknown if name.startswith("hour")]


def test_the_encoded_lists_say_of_train_what_its_tables_say(ranked):
    shop = tables.read(ranked / "tables/dataset", splits=("train",))
    lists = [shards.load_lists(ranked / "tables/encoded", part) for part in ("train", "dev")]
    found = slices.of_train(lists, shards.load_intents(ranked / "tables/encoded"))
    clicked = shop.impressions[shop.impressions.clicked == 1].intent_id
    assert sorted(found["train_clicks"]) == sorted(clicked)
    shown = shop.impressions.merge(shop.sessions, on="session_id").user_id.value_counts()
    assert found["seen"].to_dict() == shown.to_dict()
