"""Rows in a frame are checked as a folder's tables are."""

import datetime

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from builders import good_meta, good_tables
from every import every
from table_changes import replaced, write_raw

from rgalign.data.checks import check_frame
from rgalign.data.tables import check

KINDS = good_meta()["features"]
NEEDED = ["session_id", *KINDS]
CHECKED = [f"sessions.{column}" for column in (*NEEDED, "timestamp")]


def as_stored(what: str) -> str:
    """The fault of a frame in the words of a parquet file, which has no seconds and its own name for a list's items."""
    return what.replace("list<item:", "list<element:").replace("is it in s?", "is it in ms?")


MOMENTS = pd.date_range("2025-03-01", periods=10, freq="6h")
EPOCH = {unit: MOMENTS.astype(f"datetime64[{unit}]").astype("int64") for unit in ("s", "ms", "us", "ns")}
COLUMNS = {  # column, its values, words of the fault; None: sound
    "epoch 1": ("timestamp", [1] * 10, "numbers do not say what they count: pd.to_datetime(.., unit=..)"),
    "dates": ("timestamp", [datetime.date(2025, 3, day) for day in range(1, 11)], None),
    "datetimes": ("timestamp", [moment.to_pydatetime() for moment in MOMENTS], None),
    "zoned": ("timestamp", MOMENTS.tz_localize("Asia/Singapore"), None),
    "words": ("timestamp", MOMENTS.astype(str), "pd.to_datetime makes them"),
    "year 2300": ("timestamp", MOMENTS.astype("datetime64[us]") + np.timedelta64(275 * 365, "D"), "outside the years"),
    "far future": ("timestamp", MOMENTS.astype("datetime64[us]") + np.timedelta64(80 * 365, "D"), "outside the years"),
    "infinite": ("amount", [np.inf] + [1.0] * 9, "1 row is infinite (first: 0)"),
    "minus infinity": ("amount", [-np.inf] * 10, "10 rows are infinite"),
    "numbers in words": ("amount", ["7"] * 10, "pd.to_numeric makes them"),
    "decimals": ("amount", ["1,5"] * 10, "pd.to_numeric makes them"),
    "yes and no as numbers": ("amount", [True, False] * 5, None),
    "whole and empty": ("state", [1, None] * 5, '.astype("Int64") keeps them whole'),
    "ids whole and empty": ("session_id", [1.0, None] * 5, '.astype("Int64") keeps them whole'),
    "parts": ("state", [0.5] * 10, "has the type double; expected strings, integers or booleans"),
    "Int64": ("state", pd.array([1, None] * 5, "Int64"), None),
    "category": ("state", pd.Categorical([1, None] * 5), None),
    "category of words": ("state", pd.Categorical(["a", None] * 5), None),
    "all empty floats": ("state", [np.nan] * 10, None),
    "all empty times": ("amount", [pd.NaT] * 10, None),
    "lists": ("state", [["a"]] * 10, "expected strings, integers or booleans"),
    "bytes": ("note", [b"a"] * 10, "has the type binary; expected strings"),
    "no list": ("visited", ["a"] * 10, "expected lists of strings or integers"),
    "tuples": ("visited", [("a", "b")] * 10, None),
    "arrays": ("visited", [np.array(["a"])] * 10, None),
    "empty entry": ("visited", [["a", None]] * 10, "an empty entry in its list"),
}
for unit, numbers in EPOCH.items():
    name = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}[unit]
    for spelling, values in {"int": numbers, "float": numbers.astype(float), "words": numbers.astype(str)}.items():
        COLUMNS[f"epoch {unit}, {spelling}"] = ("timestamp", values, f"looks like {name} since 1970: ")
        COLUMNS[f"epoch {unit}, {spelling}, how"] = ("timestamp", values, f'pd.to_datetime(.., unit="{unit}") makes')
    if unit != "ns":  # which is what pd.to_datetime takes numbers for
        COLUMNS[f"epoch {unit} without its unit"] = ("timestamp", pd.to_datetime(numbers), "10 rows lie in 1970")
COLUMNS["epoch s as ms"] = ("timestamp", pd.to_datetime(EPOCH["s"], unit="ms"), "10 rows lie in 1970")
COLUMNS["epoch ms as s"] = ("timestamp", EPOCH["ms"].to_numpy().astype("datetime64[s]"), "lie outside the years")


def test_a_column_is_sound_in_a_frame_where_it_is_in_a_folder(tmp_path):
    every(COLUMNS, same_in_a_folder, tmp_path)


def same_in_a_folder(case, folder):
    column, values, told = case
    frame = good_tables()["sessions"].to_pandas().assign(**{column: values})
    report, found = check_frame(frame, "sessions", NEEDED, kinds=KINDS)
    tables = good_tables() | {"sessions": pa.Table.from_pandas(frame, preserve_index=False)}
    if column == "session_id":  # whose rows the other tables name
        in_folder = [what for where, what in check(write_raw(folder, tables, good_meta())).errors if where in CHECKED]
    else:
        tables["intents"] = replaced(tables["intents"], "valid_from", pa.nulls(4, pa.timestamp("us")))
        in_folder = [what for _, what in check(write_raw(folder, tables, good_meta())).errors]
    in_frame = [as_stored(what) for _, what in report.errors]
    assert in_frame == in_folder
    if told is None:
        assert not in_frame
        assert len(found) == 10
    else:
        assert any(told in what for what in in_frame), in_frame


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (["\ud800"] + ["a"] * 9, "1 row holds half a character (first: 0)"),
        (["a", 1] * 5, "values of the types str, int"),
        ([2**70] * 10, "values that no column can have"),
        ([object()] * 10, "values that no column can have"),
    ],
)
def test_what_no_table_could_hold_is_told_by_column(values, told):
    frame = good_tables()["sessions"].to_pandas().assign(state=pd.Series(values, dtype=object))
    report, _ = check_frame(frame, "sessions", NEEDED, kinds=KINDS)
    assert [where for where, _ in report.errors] == ["sessions.state"]
    assert told in report.errors[0][1]


@pytest.mark.parametrize(
    ("seen", "values", "told"),
    [
        (("true", "false"), [1, 0], "training knew 'false', 'true'"),
        (("true", "false"), ["True", "False"], "have another value (first: 'True', 'False')"),
        (("true",), ["1", None], "have another value (first: '1')"),
        (("1", "0"), [True, False], "training knew '0', '1'"),
        (("yes", "no"), [True, False], "training knew 'no', 'yes'"),
        (("true", "false"), [True, False], None),
        (("true", "false"), [True, None], None),
        (("1", "0"), [1, 0], None),
        (("paid", "sent"), ["new", "paid"], None),  # a value that training did not know is no fault
        ((), [1, 0], None),
        (("true",), [True, False], None),
        (("true", "false"), ["true", "unknown"], None),
    ],
)
def test_yes_and_no_have_one_spelling(seen, values, told):
    values = pd.Series([*values, *values[:1] * 8])
    frame = good_tables()["sessions"].to_pandas().assign(state=values)
    report, _ = check_frame(frame, "sessions", NEEDED, kinds=KINDS, seen={"state": seen})
    assert bool(report.errors) == (told is not None)
    assert told is None or told in report.errors[0][1]


@pytest.mark.parametrize("rows", [[1, 2], {"session_id": ["a"]}, None, pd.Series([1]), np.zeros((2, 2))])
def test_what_is_no_frame_is_told(rows):
    report, _ = check_frame(rows, "sessions", ["session_id"], kinds={})
    assert "expected a pandas DataFrame with session_id" in report.errors[0][1]


@pytest.mark.parametrize("span", [0, 1, 59, 3600])
def test_a_log_of_seconds_is_noted(tmp_path, span):
    tables = good_tables()
    moments = np.datetime64("2024-03-01") + np.linspace(0, span * 10**6, 10).astype("timedelta64[us]")
    tables["sessions"] = replaced(tables["sessions"], "timestamp", moments.astype("datetime64[us]"))
    notes = [what for where, what in check(write_raw(tmp_path, tables, good_meta())).notes if "is their unit" in what]
    assert len(notes) == (span < 60)
    assert all(f"all 10 times lie within {span} seconds of 2024-03-01T00:00:00" in what for what in notes)
