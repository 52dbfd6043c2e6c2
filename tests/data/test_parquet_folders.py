"""A table that is a folder of many files, with hive partitions, is the table that one file would be."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from rgalign.artifacts import digest
from rgalign.data import tables
from rgalign.data.parquet import Table, regrouped
from rgalign.data.stream import encode_folder, fit_folder

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
    assert not reports[0].faults
    assert not reports[1].faults, str(reports[1])
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
