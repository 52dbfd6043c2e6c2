"""What a check says of a folder: faults of dataset.yaml, all faults at once. Faults of tables: tests/reliability."""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import SESSIONS, good_meta, good_tables
from every import every
from table_changes import put, replaced, write_raw
from yaml_faults import YAML_FAULTS

from rgalign.data.schema import SPLITS, to_frame
from rgalign.data.tables import TableError, check, read, write


def test_every_fault_of_a_yaml_is_named_with_its_place_and_gives_one_complaint(tmp_path):
    def judge(fault, folder):
        change, words = fault
        tables, meta = good_tables(), good_meta()
        change(tables, meta)
        report = check(write_raw(folder, tables, meta))
        text = str(report)
        for word in words:
            assert word in text
        assert "Fix the files" in text or (
            f"Nothing was read. Fix the file (rows count from 0), then: python -m rgalign check {folder}/" in text
        )
        assert len(report.errors) == 1 or fault is YAML_FAULTS["features as a list"], report
        with pytest.raises(TableError) as raised:
            read(folder, splits=SPLITS)
        assert str(raised.value) == text

    every(YAML_FAULTS, judge, tmp_path)


def test_all_faults_are_listed_at_once(tmp_path):
    tables, meta = good_tables(), good_meta()
    for table, column, values in (
        ("sessions", "user_id", {1: None, 3: ""}),
        ("impressions", "clicked", {7: 2}),
        ("impressions", "intent_id", {0: "ret_12"}),
        ("truth", "posterior", {3: [0.5] * 4}),
    ):
        put(table, column, values)(tables, meta)
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
    assert (report.errors, [where for where, _ in report.notes]) == ([], ["intents.description"])
    assert "passes every check: 4 intents, 10 sessions, 30 impressions" in str(report)


def test_sessions_without_impressions_and_scattered_lists_are_noted(tmp_path):
    tables = good_tables() | {"labels": pa.table({"session_id": ["s1"], "intent_id": ["i1"]})}
    del tables["truth"]
    rows = tables["impressions"].slice(3)
    tables["impressions"] = rows.take(np.r_[np.arange(0, 27, 3), np.arange(1, 27, 3), np.arange(2, 27, 3)])
    tables["sessions"] = tables["sessions"].append_column("extra", pa.array(range(SESSIONS)))
    report = check(write_raw(tmp_path, tables, good_meta()))
    assert not report.errors
    for word in ("1 session has no impression (first: 0)", "not grouped by session", "sessions.extra"):
        assert word in str(report)
    dataset = read(tmp_path, splits=SPLITS)
    expected = to_frame(rows)[["session_id", "position"]]
    assert dataset.impressions[["session_id", "position"]].astype(str).equals(expected.astype(str))


@pytest.mark.parametrize(
    ("rare", "told"),
    [
        ([], None),
        ([1e-3] * 30, None),
        ([9e-4], "1 row is below 0.001 (first: 0), 3.33% of all: evaluation.experiment.clip makes their"),
        ([5e-324] * 3, "3 rows are below 0.001 (first: 0, 1, 2), 10.00% of all"),
        ([1e-12] * 6, "with 4 intents at most 0.40% can be so rare: is it P(this intent at this position)?"),
    ],
)
def test_propensities_that_will_be_clipped_are_noted(tmp_path, rare, told):
    """Of 30 impressions, over a knowledge base of 4: 0.1 of them can be expected below 0.001, 3 by luck, 6 not."""
    tables = good_tables()
    tables["impressions"] = replaced(tables["impressions"], "propensity", dict(enumerate(rare)))
    report = check(write_raw(tmp_path, tables, good_meta()))
    assert not report.errors
    notes = [what for where, what in report.notes if where == "impressions.propensity"]
    assert bool(notes) == (told is not None)
    assert told is None or told in notes[0]
    assert ("can be so rare" in " ".join(notes)) == (len(rare) == 6)


@pytest.mark.parametrize(("chance", "says"), [(0.5, None), (1.5, "has the value 1.5"), (None, "is empty")])
def test_the_chance_that_an_intent_is_shown_is_a_probability(tmp_path, chance, says):
    tables = good_tables()
    values = pa.array([chance, *[0.25] * (len(tables["impressions"]) - 1)], pa.float64())
    tables["impressions"] = tables["impressions"].append_column("selection", values)
    errors = check(write_raw(tmp_path, tables, good_meta())).errors
    assert [(where, says in what) for where, what in errors] == [("impressions.selection", True)] * bool(says)


def test_a_changed_byte_in_written_tables_is_noticed(tmp_path):
    dataset = read(write_raw(tmp_path / "raw", good_tables(), good_meta()), splits=SPLITS, truth=True)
    generator = np.random.default_rng(5)
    for number in range(30):
        write(dataset, tmp_path / "out")
        path = tmp_path / "out" / "sessions.parquet"
        column = pq.read_metadata(path).row_group(0).column(int(generator.integers(9)))
        start = column.dictionary_page_offset or column.data_page_offset
        damaged = bytearray(path.read_bytes())
        damaged[start + column.total_compressed_size - 1 - number % 8] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        assert "sessions." in str(check(tmp_path / "out").errors), column.path_in_schema


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: [shop", "is not YAML"),
        ("just words", "holds a str"),
        ("", "holds a NoneType"),
        (
            "name: shop\nfeatures: {state: text, state: categorical}",
            "the key state stands twice; expected each key once",
        ),
        ("{}", "dataset.yaml features  declares no feature column"),
        ("name: shop\nname: other", "the key name stands twice; expected each key once"),
        ("[" * 5000, "is nested too deeply"),
        ("!!python/object/apply:os.system [ls]", "is not YAML"),
    ],
)
def test_a_yaml_that_cannot_be_read_is_a_fault(tmp_path, text, words):
    assert words in str(check(write_raw(tmp_path, good_tables(), text)))


def test_a_yaml_that_may_not_be_opened_is_a_fault(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("rgalign.data.dataset_yaml.read_yaml", refuse)
    assert "cannot be read: Permission denied" in str(check(write_raw(tmp_path, good_tables(), good_meta())))


def test_a_world_without_truth_is_not_judged(tmp_path):
    tables = good_tables()
    del tables["truth"]
    assert not check(write_raw(tmp_path, tables, good_meta() | {"world": {"version": 0}})).errors


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


def test_the_public_data_sets_pass(public_data):
    for name, sessions in (("cfpb2014", 8337), ("msweb", 26169)):
        report = check(public_data / name)
        assert not report.errors
        assert report.rows["sessions"] == sessions
