"""A table that is a folder of many files, with hive partitions, is the table that one file would be."""

import itertools
from itertools import pairwise
from urllib.parse import quote

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from rgalign.data import tables
from rgalign.data.schema import Table, regrouped
from rgalign.data.shards import encode_folder, fit_folder, load_lists
from rgalign.run.artifacts import digest

DAYS = ("2026-01-05", "2026-01-12", "2026-01-19")
SPLIT = dict(zip(DAYS, ("train", "valid", "test"), strict=True))
META = {"name": "shop", "features": {"state": "categorical", "orders": "numeric", "region": "categorical"}}


@pytest.mark.parametrize("sizes", [[], [0, 0], [3], [10], [10, 10], [4, 0, 25, 1], [1] * 31])
def test_rows_are_regrouped_whatever_pieces_they_come_in(sizes):
    borders = np.cumsum([0, *sizes])
    pieces = [pa.table({"row": np.arange(first, last)}) for first, last in pairwise(borders)]
    groups = list(regrouped(iter(pieces), 10))
    assert [row for group in groups for row in group["row"].to_pylist()] == list(range(borders[-1]))
    assert [len(group) for group in groups[:-1]] == [10] * (len(groups) - 1)
    assert all(group["row"].num_chunks <= 1 for group in groups)
    assert len(groups) == (max(1, -(-borders[-1] // 10)) if sizes else 0)


def drawn() -> dict[str, pd.DataFrame]:
    """90 sessions of 30 users on three days in two regions, sorted by day and region, with lists of three."""
    rng, size = np.random.default_rng(3), 90
    sessions = pd.DataFrame(
        {
            "session_id": [f"s{i:02d}" for i in range(size)],
            "user_id": [f"u{i}" for i in rng.integers(0, 30, size)],
            "timestamp": pd.to_datetime(np.repeat(DAYS, 30)) + pd.to_timedelta(np.tile(np.arange(30), 3), unit="min"),
            "region": np.tile(np.repeat(["SG", "VN"], 15), 3),
            "split": np.repeat([SPLIT[day] for day in DAYS], 30),
            "state": rng.choice(["paid", "sent"], size),
            "orders": rng.gamma(2, size=size),
        }
    )
    shown = np.concatenate([rng.permutation(5)[:3] for _ in range(size)])
    impressions = pd.DataFrame(
        {
            "session_id": np.repeat(sessions["session_id"], 3).to_numpy(),
            "intent_id": [f"i{k}" for k in shown],
            "position": np.tile(np.arange(3), size),
            "clicked": np.tile([1, 0, 0], size),
        }
    )
    intents = pd.DataFrame({"intent_id": [f"i{k}" for k in range(5)], "title": "t", "description": "d"})
    intents = intents.assign(category="c", valid_from=pd.Series([pd.NaT] * 5, dtype="datetime64[us]"))
    return {"sessions": sessions, "impressions": impressions, "intents": intents}


def write_one(folder):
    folder.mkdir()
    for name, frame in drawn().items():
        frame.to_parquet(folder / f"{name}.parquet", index=False)
    (folder / "dataset.yaml").write_text(yaml.safe_dump(META, sort_keys=False))
    return folder


def write_many(folder):
    """The same by day and region, both tables alike; region is told by the path alone."""
    folder.mkdir()
    frames = drawn()
    sessions = frames["sessions"].assign(day=np.repeat(DAYS, 30))
    for (day, region), own in sessions.groupby(["day", "region"]):
        shown = frames["impressions"][frames["impressions"]["session_id"].isin(own["session_id"])]
        for name, part in {"sessions": own.drop(columns=["day", "region"]), "impressions": shown}.items():
            place = folder / name / f"day={day}" / f"region={region}"
            place.mkdir(parents=True)
            part.to_parquet(place / "part-0.parquet", index=False)
    frames["intents"].to_parquet(folder / "intents.parquet", index=False)
    (folder / "dataset.yaml").write_text(yaml.safe_dump(META, sort_keys=False))
    return folder


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    place = tmp_path_factory.mktemp("shops")
    return write_one(place / "one"), write_many(place / "many")


def test_partitions_have_no_fault_and_the_same_rows(both):
    reports = [tables.check(folder) for folder in both]
    assert not reports[0].errors
    assert not reports[1].errors, str(reports[1])
    assert reports[1].rows == reports[0].rows == {"intents": 5, "sessions": 90, "impressions": 270}


def test_partitions_read_as_one_file(both):
    one, many = (tables.read(folder, splits=("train", "test")) for folder in both)
    pd.testing.assert_frame_equal(many.sessions[one.sessions.columns], one.sessions)
    pd.testing.assert_frame_equal(many.impressions[one.impressions.columns], one.impressions)


def test_partitions_encode_to_the_same_bytes_as_one_file(both, tmp_path):
    def development(users):
        return np.array([user[-1] == "3" for user in users])

    for folder in both:
        space = fit_folder(folder, development=development)
        encode_folder(space, folder, tmp_path / folder.name, development=development, batch_rows=7)
    assert digest(tmp_path / "many") == digest(tmp_path / "one")


def test_a_file_and_a_folder_of_one_name_are_one_too_many(tmp_path):
    folder = write_many(tmp_path / "shop")
    drawn()["sessions"].to_parquet(folder / "sessions.parquet", index=False)
    assert "sessions.parquet" in str(tables.check(folder))
    assert "a folder sessions/ as well; expected one of the two" in str(tables.check(folder))


def test_files_of_unlike_types_are_told(tmp_path):
    folder = write_many(tmp_path / "shop")
    path = next((folder / "sessions").rglob("*.parquet"))
    frame = pd.read_parquet(path).assign(orders="many")
    frame.to_parquet(path, index=False)
    assert "sessions/  cannot be read as one table" in " ".join(str(tables.check(folder)).split("\n"))


def test_an_empty_folder_is_no_table(tmp_path):
    folder = write_one(tmp_path / "shop")
    (folder / "sessions.parquet").unlink()
    (folder / "sessions").mkdir()
    assert "holds no parquet file" in str(tables.check(folder))


def test_batches_are_in_the_order_of_the_paths(tmp_path):
    for number, day in enumerate(DAYS):
        place = tmp_path / "sessions" / f"day={day}"
        place.mkdir(parents=True)
        pq.write_table(pa.table({"n": [3 * number, 3 * number + 1, 3 * number + 2]}), place / "a.parquet")
    found = Table(tmp_path, "sessions")
    batches = [batch.to_pydict() for batch in found.iter_batches(2)]
    assert [n for batch in batches for n in batch["n"]] == list(range(9))
    assert max(len(batch["n"]) for batch in batches) == 2
    assert {(n // 3, day) for batch in batches for n, day in zip(batch["n"], batch["day"], strict=True)} == set(
        enumerate(DAYS)
    )


def split_by(folder, column, values, kind):
    """`write_one` with `values` (a row each) in `column`, once as one file and once split by it, the column told by the
    path alone as Spark and pandas write it: percent-encoded, an empty value as __HIVE_DEFAULT_PARTITION__."""
    meta = {**META, "features": {**META["features"], column: kind}}
    sessions = drawn()["sessions"].assign(**{column: values})
    for name in ("one", "many"):
        write_one(folder / name)
        (folder / name / "dataset.yaml").write_text(yaml.safe_dump(meta, sort_keys=False))
    sessions.to_parquet(folder / "one" / "sessions.parquet", index=False)
    (folder / "many" / "sessions.parquet").unlink()
    for value, rows in sessions.groupby(column, sort=False, dropna=False):
        text = "__HIVE_DEFAULT_PARTITION__" if value is None or value != value else quote(str(value), safe="")
        place = folder / "many" / "sessions" / f"{quote(column)}={text}"
        place.mkdir(parents=True)
        rows.drop(columns=column).to_parquet(place / "part-0.parquet", index=False)
    return folder / "one", folder / "many"


LOOK_ALIKES = {
    "leading zeros": ["01", "007", "7"],
    "whole numbers": ["1", "2", "-3"],
    "numbers": ["1e5", "0x1F", "2.50"],
    "yes and no": ["true", "false"],
    "dates": ["2024-01-01", "2024-01-01 00:00:00"],
    "no numbers": ["NaN", "nan", "inf"],
    "nothing": ["null", "None", "N/A"],
    "quoted": ["a/b c", "50%", "ไทย=1"],
    "empty": ["01", None],
    "of 2^64": [str(2**64), str(2**63)],
}


COLUMNS = itertools.cycle(["region", "state", "two words"])


@pytest.mark.parametrize(("alike", "column"), zip(LOOK_ALIKES, COLUMNS, strict=False))
def test_a_value_of_the_path_is_the_text_that_it_is(tmp_path, alike, column):
    """Read, copied, fitted and encoded as from one file, whose column is of strings."""
    values = np.resize(np.array(LOOK_ALIKES[alike], dtype=object), 90)
    one, many = split_by(tmp_path, column, values, "categorical")
    assert not tables.check(many).errors
    expected = dict(zip(drawn()["sessions"].session_id, values, strict=True))
    splits = ("train", "valid", "test")
    tables.copy(many, tmp_path / "copy", tables.checked(many))
    for found in (
        tables.read(many, splits=splits).sessions,
        tables.excerpt(many, [column], splits=splits).sessions,
        tables.sessions(many, list(expected)),
        tables.head(many, 90, splits=splits).sessions,
        pd.read_parquet(tmp_path / "copy" / "sessions.parquet"),
    ):
        texts = found[column].astype(object).where(found[column].notna(), None)
        assert dict(zip(found.session_id, texts, strict=True)) == expected
    assert fit_folder(many, min_count=1) == fit_folder(one, min_count=1)
    space, encoded = fit_folder(many, min_count=1), []
    for folder in (one, tmp_path / "copy"):  # the one is in the order of its impressions, and so is a copy
        encode_folder(space, folder, folder / "encoded")
        lists = load_lists(folder / "encoded", "train")
        encoded.append(dict(zip(lists.session_id, map(tuple, lists.fields.tolist()), strict=True)))
    assert encoded[0] == encoded[1]


@pytest.mark.parametrize(
    ("column", "kind", "texts", "values"),
    [
        ("orders", "numeric", ["007", "2.5", "1e2", None], [7.0, 2.5, 100.0, None]),
        ("timestamp", None, ["2026-01-05", "2026-01-12 10:30:00"], None),
    ],
)
def test_a_value_of_the_path_is_read_as_its_kind(tmp_path, column, kind, texts, values):
    rows = np.resize(np.array(texts, dtype=object), 90)
    _, many = split_by(tmp_path, column, rows, kind or "categorical")
    if kind is None:
        (many / "dataset.yaml").write_text(yaml.safe_dump(META, sort_keys=False))
    found = tables.sessions(many, drawn()["sessions"].session_id)[column]
    if values is None:
        assert found.tolist() == [pd.Timestamp(text) for text in rows]
    else:
        np.testing.assert_array_equal(found.to_numpy(float, na_value=np.nan), np.resize(np.array(values, float), 90))


@pytest.mark.parametrize(
    ("column", "kind", "texts", "told"),
    [
        ("orders", "numeric", ["1", "many", "true"], "orders is 'many', 'true' in its path; expected double"),
        ("state", "history", ["a"], "sessions.state"),
    ],
)
def test_a_value_of_the_path_that_is_not_of_its_kind_is_a_fault(tmp_path, column, kind, texts, told):
    _, many = split_by(tmp_path, column, np.resize(np.array(texts, dtype=object), 90), kind)
    assert told in str(tables.check(many))


def test_a_column_that_only_some_files_hold_beside_the_path_is_a_fault(tmp_path):
    _, many = split_by(tmp_path, "state", np.resize(np.array(["a", "b"], dtype=object), 90), "categorical")
    path = many / "sessions/state=b/part-0.parquet"
    pd.read_parquet(path).assign(state="c").to_parquet(path, index=False)
    assert "tells 'state' by its path, and some files hold it as well" in str(tables.check(many))
    path = many / "sessions/state=a/part-0.parquet"
    pd.read_parquet(path).assign(state="d").to_parquet(path, index=False)  # all hold it: theirs is the word
    assert set(tables.sessions(many, drawn()["sessions"].session_id).state) == {"c", "d"}
