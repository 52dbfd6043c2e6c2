"""What is written is read back unchanged; only the parts asked for are opened; nothing foreign is overwritten."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from builders import SESSIONS, good_meta, good_tables
from hypothesis import given, settings
from hypothesis import strategies as st
from table_changes import replaced, write_raw

from rgalign.data import tables as rgalign_tables
from rgalign.data.schema import SPLITS
from rgalign.data.tables import Dataset, TableError, check, checked, copy, head, read, write
from rgalign.evaluation.slices import session_slices
from rgalign.run.artifacts import digest


def test_other_types_of_the_same_meaning_are_accepted(tmp_path):
    tables = good_tables()
    sessions = tables["sessions"]
    for column in ("session_id", "split", "state"):
        sessions = replaced(sessions, column, pa.array(sessions[column].to_pylist()).dictionary_encode())
    sessions = replaced(sessions, "timestamp", sessions["timestamp"].cast(pa.date32()).combine_chunks())
    sessions = replaced(sessions, "region", pa.nulls(SESSIONS))
    sessions = replaced(sessions, "visited", pa.array([[1, 2], []] * 5, pa.large_list(pa.int64())))
    impressions = replaced(
        tables["impressions"], "clicked", tables["impressions"]["clicked"].cast(pa.bool_()).combine_chunks()
    )
    impressions = replaced(impressions, "position", impressions["position"].cast(pa.uint64()).combine_chunks())
    plain, other = tmp_path / "plain", tmp_path / "other"
    write_raw(plain, good_tables(), good_meta())
    write_raw(other, tables | {"sessions": sessions, "impressions": impressions}, good_meta())
    wanted, found = read(plain, splits=SPLITS), read(other, splits=SPLITS)
    assert found.impressions.equals(wanted.impressions)
    same = [column for column in wanted.sessions if column not in ("region", "visited")]
    assert found.sessions[same].equals(wanted.sessions[same])
    assert list(found.sessions["visited"][0]) == ["1", "2"]
    assert found.sessions["region"].isna().all()


def test_instants_with_a_zone_become_utc(tmp_path):
    tables = good_tables()
    for table, column in (("sessions", "timestamp"), ("intents", "valid_from")):
        zoned = tables[table][column].cast(pa.timestamp("us", "Asia/Singapore")).combine_chunks()
        tables[table] = replaced(tables[table], column, zoned)
    dataset = read(write_raw(tmp_path, tables, good_meta()))
    assert dataset.sessions["timestamp"].iloc[0] == pd.Timestamp("2024-03-01")


def test_columns_without_a_value_have_no_zone_and_no_type(tmp_path):
    tables = good_tables()
    zoned = tables["sessions"]["timestamp"].cast(pa.timestamp("us", "UTC")).combine_chunks()
    tables["sessions"] = replaced(tables["sessions"], "timestamp", zoned)
    tables["intents"] = replaced(tables["intents"], "valid_from", pa.nulls(4, pa.timestamp("us")))
    tables["sessions"] = replaced(tables["sessions"], "visited", pa.array([[], None] * 5, pa.list_(pa.null())))
    dataset = read(write_raw(tmp_path, tables, good_meta()), splits=SPLITS)
    assert [None if value is None else list(value) for value in pa.array(dataset.sessions["visited"]).to_pylist()] == (
        [[], None] * 5
    )
    assert dataset.sessions["timestamp"].iloc[0] == pd.Timestamp("2024-03-01")


@pytest.mark.parametrize("values", [[True, None], [1, None], [1.0, float("nan")], [True, False], [None, None]])
def test_whether_lists_were_shuffled_is_said_in_each_spelling_and_kept_when_written(tmp_path, values):
    tables = good_tables()
    tables["sessions"] = tables["sessions"].append_column("shuffled", pa.array(values * 5))
    raw = write_raw(tmp_path / "raw", tables, good_meta())
    write(read(raw, splits=SPLITS), tmp_path / "written")
    for folder in (raw, tmp_path / "written"):
        shop = read(folder, splits=SPLITS)
        found = session_slices(shop.sessions, shop.impressions, train_clicks=[])
        assert found["shuffled"].tolist() == [value is not None and value == 1 for value in values * 5]


def test_only_the_parts_asked_for_are_given(tmp_path):
    write_raw(tmp_path, good_tables(), good_meta())
    for splits, sessions in ((("train",), 6), (("train", "valid"), 8), (("test",), 2)):
        dataset = read(tmp_path, splits=splits)
        assert len(dataset.sessions) == sessions
        assert set(dataset.sessions["split"]) == set(splits)
        assert list(dataset.impressions["session_id"].unique()) == list(dataset.sessions["session_id"])
        assert dataset.truth is None
    assert len(read(tmp_path).labels) == 0  # the only label is of a test session
    assert read(tmp_path, splits=("test",)).transcripts["session_id"].isna().tolist() == [True]
    assert list(read(tmp_path, splits=("test",), truth=True).truth["session_id"]) == ["s8", "s9"]
    with pytest.raises(ValueError, match="dev"):
        read(tmp_path, splits=("dev",))


def test_truth_that_is_not_there_cannot_be_asked_for(tmp_path):
    tables = good_tables()
    del tables["truth"]
    with pytest.raises(TableError, match=r"no truth\.parquet"):
        read(write_raw(tmp_path, tables, good_meta()), truth=True)


def test_an_empty_split_is_filled_in_by_time(tmp_path):
    tables = good_tables()
    tables["sessions"] = replaced(tables["sessions"], "split", pa.nulls(SESSIONS))
    rule = {"time_split": {"valid_from": "2024-03-05", "test_from": "2024-03-06"}}
    write_raw(tmp_path, tables, good_meta() | rule)
    assert read(tmp_path, splits=SPLITS).sessions["split"].tolist() == ["train"] * 4 + ["valid"] + ["test"] * 5
    write_raw(tmp_path, tables, good_meta() | {"time_split": {"valid_from": "2024-03-05"}})
    assert "time_split.test_from" in str(check(tmp_path))
    tables["sessions"] = replaced(tables["sessions"], "timestamp", pa.nulls(SESSIONS, pa.timestamp("us")))
    write_raw(tmp_path, tables, good_meta())
    assert "a split by time fails: timestamp: 10 of 10 sessions have none" in str(check(tmp_path))


def frames_equal(one: Dataset, other: Dataset) -> bool:
    for name in ("intents", "sessions", "impressions", "transcripts", "labels", "truth"):
        first, second = getattr(one, name), getattr(other, name)
        if (first is None) != (second is None) or (first is not None and not first.equals(second)):
            return False
    return (one.name, one.kinds, one.meta) == (other.name, other.kinds, other.meta)


def test_what_is_written_is_read_back_and_gives_the_same_bytes(tmp_path):
    dataset = read(write_raw(tmp_path / "raw", good_tables(), good_meta()), splits=SPLITS, truth=True)
    for folder in ("one", "two", "one"):
        write(dataset, tmp_path / folder)
    assert frames_equal(read(tmp_path / "one", splits=SPLITS, truth=True), dataset)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(names) == 7
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "raw", "two"]


words = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
floats = st.none() | st.floats(allow_nan=False, allow_infinity=False, width=64)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_reading_what_was_written_changes_nothing(tmp_path_factory, data):
    tables = good_tables()
    sessions = tables["sessions"]
    drawn = {
        "state": pa.array(data.draw(st.lists(st.none() | words, min_size=10, max_size=10)), pa.string()),
        "note": pa.array(data.draw(st.lists(st.none() | words, min_size=10, max_size=10)), pa.string()),
        "amount": pa.array(data.draw(st.lists(floats, min_size=10, max_size=10)), pa.float64()),
        "visited": pa.array(
            data.draw(st.lists(st.none() | st.lists(words.filter(bool), max_size=3), min_size=10, max_size=10)),
            pa.list_(pa.string()),
        ),
    }
    for column, values in drawn.items():
        sessions = replaced(sessions, column, values)
    folder = tmp_path_factory.mktemp("round")
    raw = write_raw(folder / "raw", tables | {"sessions": sessions}, good_meta())
    dataset = read(raw, splits=SPLITS, truth=True)
    for column, values in drawn.items():
        kept = [None if value is None or value is pd.NA else value for value in dataset.sessions[column].tolist()]
        assert [list(v) if isinstance(v, np.ndarray) else v for v in kept] == values.to_pylist()
    write(dataset, folder / "written")
    assert frames_equal(read(folder / "written", splits=SPLITS, truth=True), dataset)


def test_plain_pandas_frames_can_be_written(tmp_path):
    plain = {name: table.to_pandas() for name, table in good_tables().items()}
    write(Dataset("shop", good_meta()["features"], good_meta(), **plain), tmp_path / "plain")
    wanted = read(write_raw(tmp_path / "raw", good_tables(), good_meta()), splits=SPLITS, truth=True)
    assert frames_equal(read(tmp_path / "plain", splits=SPLITS, truth=True), wanted)


def test_write_refuses_what_is_not_a_data_set(tmp_path):
    dataset = read(write_raw(tmp_path / "raw", good_tables(), good_meta()))
    (tmp_path / "raw" / "thesis.doc").write_text("three years")
    with pytest.raises(FileExistsError, match=r"thesis\.doc"):
        write(dataset, tmp_path / "raw")
    assert (tmp_path / "raw" / "thesis.doc").read_text() == "three years"
    (tmp_path / "other").mkdir()
    write(dataset, tmp_path / "other")  # an empty folder will do
    with pytest.raises(FileExistsError, match="is a file"):
        write(dataset, tmp_path / "other" / "dataset.yaml")


def test_a_write_that_fails_leaves_the_old_data_set(tmp_path, monkeypatch):
    dataset = read(write_raw(tmp_path / "raw", good_tables(), good_meta()))
    write(dataset, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(rgalign_tables.yaml, "safe_dump", fail)
    with pytest.raises(OSError, match="disk full"):
        write(dataset, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw"]


def in_any_order(tables):
    """Impressions upside down, a split by time, a transcript of a session that is not there, a column of its own."""
    session = tables["transcripts"].schema.field("session_id").type
    lost = pa.table({"session_id": pa.array(["s0", "s77"], session), "typed_query": ["where", "what"]})
    features = pa.array([None, [("state", "paid")]], pa.map_(pa.string(), pa.string()))
    return tables | {
        "impressions": tables["impressions"].take(list(range(3 * SESSIONS))[::-1]).append_column("more", [[True] * 30]),
        "sessions": replaced(tables["sessions"], "split", pa.nulls(SESSIONS)),
        "transcripts": lost.append_column("features", features),
    }


@pytest.mark.parametrize("group", [2**17, 4])
@pytest.mark.parametrize("change", [dict, in_any_order])
def test_a_copy_has_the_bytes_of_what_is_read_whole_and_written(tmp_path, monkeypatch, change, group):
    for rows in ("ROW_GROUP", "ROWS_AT_ONCE", "KEYS_AT_ONCE"):
        monkeypatch.setattr(rgalign_tables, rows, group)
    raw = write_raw(tmp_path / "raw", change(good_tables()), good_meta() | {"files": {}})
    write(read(raw, splits=SPLITS, truth=True), tmp_path / "whole")
    copy(raw, tmp_path / "copy", checked(raw))
    assert digest(tmp_path / "copy") == digest(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "raw", "whole"]
    with pytest.raises(FileExistsError, match=r"is a file"):
        copy(raw, tmp_path / "copy" / "dataset.yaml", checked(raw))


@pytest.mark.parametrize("name", ["transcripts", "labels"])
def test_a_table_of_which_no_row_is_left_is_no_empty_one(tmp_path, name):
    """A chat with its own features may be of another shop; its session is not there."""
    features = pa.array([[("state", "paid")]], pa.map_(pa.string(), pa.string()))
    strange = pa.table({"session_id": ["s77"], "typed_query": ["where"], "features": features})
    raw = write_raw(tmp_path / "raw", good_tables() | {"transcripts": strange}, good_meta())
    if name == "transcripts":
        copy(raw, tmp_path / "copy", checked(raw))
    else:
        dataset = read(raw, splits=SPLITS, truth=True)
        write(replace(dataset, labels=dataset.labels.head(0)), tmp_path / "copy")
    assert not (tmp_path / "copy" / f"{name}.parquet").exists()
    assert check(tmp_path / "copy").errors == []


def test_columns_and_sessions_can_be_left_out(tmp_path):
    raw = write_raw(tmp_path, good_tables(), good_meta())
    whole, narrow, few = read(raw), read(raw, columns=["amount", "nothing"]), head(raw, 3)
    assert list(narrow.sessions) == ["session_id", "user_id", "timestamp", "region", "split", "amount"]
    assert narrow.sessions.equals(whole.sessions[list(narrow.sessions)])
    assert narrow.impressions.equals(whole.impressions)
    assert narrow.kinds == whole.kinds
    assert few.sessions.equals(whole.sessions.head(3))
    assert few.impressions.equals(whole.impressions.head(9))
    assert len(head(raw, 99, splits=("test",)).sessions) == 2


def test_what_was_verified_is_read_the_same_and_not_checked_again(tmp_path, monkeypatch):
    folder = write_raw(tmp_path, good_tables(), good_meta())
    wanted = read(folder, splits=SPLITS)
    monkeypatch.setattr(rgalign_tables, "check", lambda _: pytest.fail("it was checked"))
    found = read(folder, splits=SPLITS, verified=True)
    assert found.meta == wanted.meta
    assert all(getattr(found, name).equals(getattr(wanted, name)) for name in ("intents", "sessions", "impressions"))


def test_an_excerpt_is_what_read_gives_without_what_was_not_asked_for(tmp_path):
    raw = write_raw(tmp_path, good_tables(), good_meta())
    whole, few = read(raw, splits=("test",), truth=True), rgalign_tables.excerpt(raw, ["note"], splits=("test",))
    assert few.sessions.equals(read(raw, splits=("test",), columns=["note"]).sessions)
    assert few.impressions.equals(whole.impressions[whole.impressions.clicked == 1].reset_index(drop=True))
    assert few.intents.equals(whole.intents)
    assert few.labels.equals(whole.labels)
    assert few.transcripts is None
    assert few.truth is None
    assert few.meta == whole.meta
    asked = {"truth": True, "transcripts": True, "whole_lists": True}
    all_of_it = rgalign_tables.excerpt(raw, list(whole.kinds), splits=("test",), **asked)
    for name in ("sessions", "impressions", "transcripts", "truth"):
        assert getattr(all_of_it, name).equals(getattr(whole, name)), name
    with pytest.raises(ValueError, match=r"splits is \('week',\); expected"):
        rgalign_tables.excerpt(raw, [], splits=("week",))


def test_some_sessions_are_found_in_the_order_asked_for(tmp_path):
    raw = write_raw(tmp_path, good_tables(), good_meta())
    whole = read(raw, splits=SPLITS).sessions
    asked = whole.session_id.iloc[[5, 0, 5, 3]]
    assert rgalign_tables.sessions(raw, asked).equals(whole.iloc[[5, 0, 5, 3]].reset_index(drop=True))
    narrow = rgalign_tables.sessions(raw, asked, ["amount"])
    assert narrow.equals(whole.iloc[[5, 0, 5, 3]].reset_index(drop=True)[list(narrow)])
    assert "amount" in narrow
    assert len(narrow.columns) == 6
    assert len(rgalign_tables.sessions(raw, [])) == 0
    with pytest.raises(KeyError, match=r"no session 'nobody'"):
        rgalign_tables.sessions(raw, ["nobody", asked.iloc[0]])
