"""Every single fault is named with its place and its count; what has no fault is read back unchanged."""

import hashlib
from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import SESSIONS, good_meta, good_tables, replaced, write_raw
from hypothesis import given, settings
from hypothesis import strategies as st

from rgalign.data import tables as rgalign_tables
from rgalign.data.schema import SPLITS, to_frame
from rgalign.data.tables import Dataset, TableError, check, read, write


def put(table, column, values):
    """A fault: values put into a column."""

    def change(tables, meta):
        tables[table] = replaced(tables[table], column, values)

    return change


def typed(table, column, kind, values=None):
    """A fault: the column in another type."""

    def change(tables, meta):
        old = tables[table][column]
        tables[table] = replaced(
            tables[table], column, pa.array([values] * len(old) if values else old.to_pylist(), kind)
        )

    return change


def drop(table, column):
    def change(tables, meta):
        tables[table] = tables[table].drop_columns([column])

    return change


def rename(table, column, to):
    def change(tables, meta):
        tables[table] = tables[table].rename_columns(
            [to if name == column else name for name in tables[table].column_names]
        )

    return change


def double(table, column):
    def change(tables, meta):
        tables[table] = tables[table].append_column(column, tables[table][column])

    return change


def empty(table):
    def change(tables, meta):
        tables[table] = tables[table].slice(0, 0)

    return change


def declare(**keys):
    def change(tables, meta):
        meta.update(keys)

    return change


def kind(column, value):
    def change(tables, meta):
        meta["features"][column] = value

    return change


TIME = pa.timestamp("us")
ZONED = [datetime(2024, 2, 1, tzinfo=UTC)] * 4
FAULTS = {
    "empty user": (
        put("sessions", "user_id", {1: None, 3: ""}),
        ["sessions.user_id", "2 rows are empty (first: 1, 3)"],
    ),
    "empty session id": (put("sessions", "session_id", {9: ""}), ["sessions.session_id", "1 row is empty (first: 9)"]),
    "empty title": (put("intents", "title", {0: ""}), ["intents.title", "1 row is empty (first: 0)"]),
    "empty click": (put("impressions", "clicked", {4: None}), ["impressions.clicked", "1 row is empty (first: 4)"]),
    "empty position": (
        put("impressions", "position", {4: None}),
        ["impressions.position", "1 row is empty (first: 4)"],
    ),
    "empty shown intent": (put("impressions", "intent_id", {4: ""}), ["impressions.intent_id", "1 row is empty"]),
    "empty propensity": (
        put("impressions", "propensity", {2: float("nan")}),
        ["impressions.propensity", "1 row is empty"],
    ),
    "doubled intent": (
        put("intents", "intent_id", {1: "i0"}),
        ["intents.intent_id", "1 row repeats an id (first: 'i0')"],
    ),
    "doubled session": (put("sessions", "session_id", {1: "s0"}), ["sessions.session_id", "1 row repeats an id"]),
    "shown twice": (
        put("impressions", "intent_id", {1: "i0"}),
        ["impressions ", "1 row shows an intent that its session was already shown (first: 1)"],
    ),
    "two at one position": (put("impressions", "position", {1: 0}), ["impressions.position", "already has (first: 1)"]),
    "gap in positions": (put("impressions", "position", {2: 5}), ["1 row has a position beyond", "(first: 2)"]),
    "negative position": (put("impressions", "position", {2: -1}), ["impressions.position", "has the value -1"]),
    "orphan intent": (
        put("impressions", "intent_id", {0: "ret_12", 3: "ret_12"}),
        ["impressions.intent_id", "2 rows name what intents.parquet does not have (first: 'ret_12')"],
    ),
    "orphan session": (
        put("impressions", "session_id", {29: "s77"}),
        ["sessions.parquet does not have (first: 's77')"],
    ),
    "clicked is 2": (
        put("impressions", "clicked", {7: 2}),
        ["impressions.clicked", "1 row has the value 2 (first: 7)"],
    ),
    "clicked in words": (
        typed("impressions", "clicked", pa.string(), "yes"),
        ["has the type string; expected integers 0 or 1"],
    ),
    "clicked a float": (typed("impressions", "clicked", pa.float64()), ["impressions.clicked", "has the type double"]),
    "propensity zero": (put("impressions", "propensity", {0: 0.0}), ["impressions.propensity", "has the value 0.0"]),
    "propensity above 1": (
        put("impressions", "propensity", {0: 1.5, 1: 1.5}),
        ["2 rows have the value 1.5 (first: 0, 1)"],
    ),
    "infinite amount": (
        put("sessions", "amount", {2: float("inf")}),
        ["sessions.amount", "1 row is infinite (first: 2)"],
    ),
    "amount in words": (
        typed("sessions", "amount", pa.string(), "much"),
        ["sessions.amount", "string; expected numbers"],
    ),
    "state a list": (
        typed("sessions", "state", pa.list_(pa.string()), ["x"]),
        ["sessions.state", "expected strings, integers"],
    ),
    "history a string": (typed("sessions", "visited", pa.string(), "a b"), ["sessions.visited", "expected lists"]),
    "null in a history": (
        put("sessions", "visited", {4: ["a", None]}),
        ["sessions.visited", "(first: 4)", "empty entry"],
    ),
    "time in words": (
        typed("sessions", "timestamp", pa.string(), "1.3.2024"),
        ["sessions.timestamp", "timestamps or dates"],
    ),
    "mixed zones": (
        put("intents", "valid_from", pa.array(ZONED, pa.timestamp("us", "UTC"))),
        ["one has a time zone, the other none", "intents.valid_from (timestamp[us, tz=UTC])"],
    ),
    "shown too early": (
        put("intents", "valid_from", {0: datetime(2024, 3, 2)}),
        ["impressions.intent_id", "1 row shows an intent before its valid_from (first: 'i0')"],
    ),
    "unknown split": (
        put("sessions", "split", {0: "dev"}),
        ["sessions.split", "1 row has an unknown value (first: 'dev')"],
    ),
    "split half filled": (
        put("sessions", "split", {0: None, 1: ""}),
        ["sessions.split", "2 rows are empty (first: 0, 1)"],
    ),
    "missing column": (drop("impressions", "clicked"), ["impressions.clicked", "is missing"]),
    "missing empty column": (drop("sessions", "region"), ["sessions.region", "even if all its values are empty"]),
    "misspelt column": (rename("sessions", "user_id", "userid"), ["sessions.user_id", "did you mean 'userid'?"]),
    "doubled column": (double("sessions", "state"), ["sessions.state", "is there 2 times; expected once"]),
    "declared, absent": (kind("browser", "categorical"), ["sessions.browser", "declares it (categorical)"]),
    "unknown kind": (kind("note", "txt"), ["features.note", "has the kind 'txt'", "did you mean 'text'?"]),
    "a key as feature": (kind("user_id", "categorical"), ["features.user_id", "cannot be a feature"]),
    "features as a list": (declare(features=["state"]), ["dataset.yaml features", "expected one line a feature"]),
    "no name": (declare(name=None), ["dataset.yaml name", "is None"]),
    "position_is_real": (declare(position_is_real="no"), ["position_is_real", "is 'no'; expected true or false"]),
    "negatives misspelt": (declare(sampled_negatives={"populrity": 3}), ["populrity", "did you mean 'popularity'?"]),
    "no intents": (empty("intents"), ["intents.parquet", "is empty: no rows"]),
    "no sessions": (empty("sessions"), ["sessions.parquet", "is empty: no rows"]),
    "no impressions": (empty("impressions"), ["impressions.parquet", "is empty: no rows"]),
    "empty query": (put("transcripts", "typed_query", {0: ""}), ["transcripts.typed_query", "1 row is empty"]),
    "bare transcript": (
        put("transcripts", "session_id", {0: None}),
        ["transcripts", "1 row has neither session_id nor"],
    ),
    "foreign transcript": (put("transcripts", "session_id", {0: "s77"}), ["transcripts.session_id", "(first: 's77')"]),
    "foreign label": (put("labels", "intent_id", {0: "i9"}), ["labels.intent_id", "(first: 'i9')"]),
    "truth of nobody": (put("truth", "session_id", {0: "s77"}), ["truth.session_id", "(first: 's77')"]),
    "short posterior": (
        put("truth", "posterior", {3: [1.0]}),
        ["truth.posterior ", "list of another length (first: 3)"],
    ),
    "posterior sum": (put("truth", "posterior", {3: [0.5] * 4}), ["truth.posterior ", "does not sum to 1 (first: 3)"]),
    "probability above 1": (
        put("truth", "click_probability", {0: [0, 2.0, 0]}),
        ["truth.click_probability", "outside 0 to 1"],
    ),
    "short click list": (put("truth", "click_probability", {0: [0.5]}), ["truth.click_probability", "another length"]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_with_its_place(tmp_path, name):
    change, words = FAULTS[name]
    tables, meta = good_tables(), good_meta()
    change(tables, meta)
    folder = write_raw(tmp_path / "shop", tables, meta)
    text = str(check(folder))
    for word in words:
        assert word in text
    assert f"Nothing was read. Fix the file (rows count from 0), then: python -m rgalign check {folder}/" in text or (
        "Fix the files" in text
    )
    with pytest.raises(TableError) as raised:
        read(folder, splits=SPLITS)
    assert str(raised.value) == text


# Faults that make other tables wrong too: an id that is gone leaves orphans behind.
SPREADING = ("empty session id", "doubled intent", "doubled session", "orphan session", "features as a list")


@pytest.mark.parametrize("name", [name for name in FAULTS if name not in SPREADING])
def test_one_fault_gives_one_complaint(tmp_path, name):
    change, _ = FAULTS[name]
    tables, meta = good_tables(), good_meta()
    change(tables, meta)
    report = check(write_raw(tmp_path, tables, meta))
    assert len(report.faults) == 1, report


def test_all_faults_are_listed_at_once(tmp_path):
    tables, meta = good_tables(), good_meta()
    for name in ("empty user", "clicked is 2", "orphan intent", "misspelt column", "posterior sum"):
        if name != "misspelt column":
            FAULTS[name][0](tables, meta)
    (write_raw(tmp_path, tables, meta) / "labels.parquet").write_bytes(b"PAR1 and no more")
    text = str(check(tmp_path))
    assert text.startswith(f"{tmp_path}/ fails 5 checks:\n")
    for word in (
        "sessions.user_id",
        "impressions.clicked",
        "impressions.intent_id",
        "truth.posterior",
        "labels.parquet",
    ):
        assert f"\n  {word}" in text


def test_a_good_folder_passes_without_a_note(tmp_path):
    report = check(write_raw(tmp_path, good_tables(), good_meta()))
    assert (report.faults, [where for where, _ in report.notes]) == ([], ["intents.description"])
    assert "passes every check: 4 intents, 10 sessions, 30 impressions" in str(report)


NOTES = {
    "no click": (put("impressions", "clicked", {1: 0}), ["1 session has no click (first: 0)", "no GAUC"]),
    "only clicks": (put("impressions", "clicked", {0: 1, 2: 1}), ["1 session has only clicks (first: 0)"]),
    "out of order": (
        put("sessions", "timestamp", {5: datetime(2024, 3, 9, 5)}),
        ["it steps back 1 times", "1 train session lies at or after the first session of test"],
    ),
    "no time": (put("sessions", "timestamp", {2: None}), ["sessions.timestamp", "1 row is empty (first: 2)"]),
    "no test": (put("sessions", "split", ["train"] * 6 + ["valid"] * 4), ["no session is test"]),
    "split by time": (put("sessions", "split", [None] * 10), ["every row is empty: split by time"]),
    "column not declared": (rename("transcripts", "intent_id", "intentid"), ["did you mean 'intent_id'?"]),
    "feature all empty": (put("sessions", "state", [None] * 10), ["sessions.state", "every row is empty"]),
    "not labelled": (put("labels", "intent_id", {0: None}), ["labels.intent_id", "not labelled yet"]),
    "key not read": (declare(positions_is_real=False), ["did you mean 'position_is_real'?"]),
}


@pytest.mark.parametrize("name", NOTES)
def test_a_note_is_counted_and_does_not_stop(tmp_path, name):
    change, words = NOTES[name]
    tables, meta = good_tables(), good_meta()
    change(tables, meta)
    report = check(write_raw(tmp_path, tables, meta))
    assert not report.faults
    for word in words:
        assert word in str(report)
    assert len(read(tmp_path, splits=SPLITS).sessions) == SESSIONS


def test_sessions_without_impressions_and_scattered_lists_are_noted(tmp_path):
    tables = good_tables() | {"labels": pa.table({"session_id": ["s1"], "intent_id": ["i1"]})}
    del tables["truth"]
    rows = tables["impressions"].slice(3)
    tables["impressions"] = rows.take(np.r_[np.arange(0, 27, 3), np.arange(1, 27, 3), np.arange(2, 27, 3)])
    tables["sessions"] = tables["sessions"].append_column("extra", pa.array(range(SESSIONS)))
    report = check(write_raw(tmp_path, tables, good_meta()))
    assert not report.faults
    for word in ("1 session has no impression (first: 0)", "not grouped by session", "sessions.extra"):
        assert word in str(report)
    dataset = read(tmp_path, splits=SPLITS)
    expected = to_frame(rows)[["session_id", "position"]]
    assert dataset.impressions[["session_id", "position"]].astype(str).equals(expected.astype(str))


@pytest.mark.parametrize("name", ["intents", "sessions", "impressions"])
def test_a_missing_file_is_named(tmp_path, name):
    (write_raw(tmp_path, good_tables(), good_meta()) / f"{name}.parquet").unlink()
    assert f"{name}.parquet  is missing; expected columns" in str(check(tmp_path)).replace("    ", "  ")


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
def test_a_file_cut_short_is_named(tmp_path, keep):
    path = write_raw(tmp_path, good_tables(), good_meta()) / "sessions.parquet"
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    assert "sessions.parquet" in str(check(tmp_path))
    assert "corrupt or cut short" in str(check(tmp_path))


def test_damaged_pages_and_bytes_that_are_not_utf8_are_named(tmp_path):
    tables = good_tables()
    broken = pa.array([b"\xff\xfe"] * SESSIONS, pa.binary()).view(pa.string())
    tables["sessions"] = replaced(tables["sessions"], "note", broken)
    assert "sessions.note" in str(check(write_raw(tmp_path / "a", tables, good_meta())))
    path = write_raw(tmp_path / "b", good_tables(), good_meta()) / "impressions.parquet"
    start = pq.read_metadata(path).row_group(0).column(1).data_page_offset
    damaged = bytearray(path.read_bytes())
    damaged[start : start + 40] = b"\xff" * 40
    path.write_bytes(damaged)
    assert "impressions.intent_id" in str(check(tmp_path / "b"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: [shop", "is not YAML"),
        ("just words", "holds a str"),
        ("", "holds a NoneType"),
        ("!!python/object/apply:os.system [ls]", "is not YAML"),
    ],
)
def test_a_yaml_that_cannot_be_read_is_a_fault(tmp_path, text, words):
    assert words in str(check(write_raw(tmp_path, good_tables(), text)))


def test_no_yaml_and_no_folder(tmp_path):
    assert "is not a folder" in str(check(tmp_path / "nowhere"))
    (write_raw(tmp_path, good_tables(), good_meta()) / "dataset.yaml").unlink()
    assert "dataset.yaml  is missing; expected name and features" in str(check(tmp_path))


def test_values_are_printed_escaped_and_short(tmp_path):
    tables = good_tables()
    tables["impressions"] = replaced(tables["impressions"], "intent_id", {0: "\x1b[31m" + "{x}" * 40})
    text = str(check(write_raw(tmp_path, tables, good_meta())))
    assert "\x1b" not in text
    assert "{x}..." in text or "..." in text


def test_a_checksum_that_differs_is_noted(tmp_path):
    folder = write_raw(tmp_path, good_tables(), good_meta())
    digest = hashlib.sha256((folder / "intents.parquet").read_bytes()).hexdigest()
    files = {"intents.parquet": {"sha256": digest}, "sessions.parquet": {"sha256": "0" * 64}}
    write_raw(tmp_path, good_tables(), good_meta() | {"files": files})
    assert [where for where, what in check(folder).notes if "sha256" in what] == ["sessions.parquet"]


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
    assert "sessions.split" in str(check(tmp_path))
    tables["sessions"] = replaced(tables["sessions"], "timestamp", pa.nulls(SESSIONS, TIME))
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


def test_the_public_data_sets_pass(public_data):
    for name, sessions in (("cfpb2014", 8337), ("msweb", 26169)):
        report = check(public_data / name)
        assert not report.faults
        assert report.rows["sessions"] == sessions
