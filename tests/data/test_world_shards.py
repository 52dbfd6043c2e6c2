"""A world written batch by batch holds the rows of one that is drawn whole, and a killed writer goes on."""

import json

import pandas as pd
import pyarrow.parquet as pq
import pytest

from rgalign.data import tables
from rgalign.run.artifacts import digest
from rgalign.shopworld import sessions, world
from rgalign.shopworld.world import write_world

SIZES = dict(seed=3, sessions=1_300, users=200, distance=0.5, transcripts=50)
SPLITS = ("train", "valid", "test")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(sessions, "BATCH", 500)
    monkeypatch.setattr(world, "BATCH", 500)


def test_parts_hold_the_rows_of_the_whole_and_have_no_fault(tmp_path):
    write_world(tmp_path / "shop", **SIZES)
    assert [path.name for path in sorted((tmp_path / "shop" / "truth").iterdir())] == [
        f"part-0000{n}.parquet" for n in range(3)
    ]
    parts, whole = tables.read(tmp_path / "shop", splits=SPLITS, truth=True), world.generate(**SIZES)
    assert parts.meta == whole.meta
    for name in ("intents", "sessions", "impressions", "transcripts", "truth"):
        found, expected = getattr(parts, name), getattr(whole, name)
        pd.testing.assert_frame_equal(found[expected.columns], expected, check_dtype=False)


def test_a_killed_writer_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    write_world(tmp_path / "whole", **SIZES)
    real, calls = world.write_arrow, []

    def dies(path, table):
        calls.append(path)
        if len(calls) == 5:  # in the middle of the second batch
            raise KeyboardInterrupt
        real(path, table)

    monkeypatch.setattr(world, "write_arrow", dies)
    with pytest.raises(KeyboardInterrupt):
        write_world(tmp_path / "shop", **SIZES)
    assert "dataset.yaml" in dict(tables.check(tmp_path / "shop").errors)
    first = (tmp_path / "shop" / "truth" / "part-00000.parquet").stat().st_mtime_ns
    monkeypatch.setattr(world, "write_arrow", real)
    write_world(tmp_path / "shop", **SIZES)
    assert (tmp_path / "shop" / "truth" / "part-00000.parquet").stat().st_mtime_ns == first
    assert digest(tmp_path / "shop") == digest(tmp_path / "whole")


def test_parts_of_another_world_are_drawn_anew(tmp_path):
    write_world(tmp_path / "whole", **SIZES)
    other = tmp_path / "shop" / "sessions" / "part-00007.parquet"
    other.parent.mkdir(parents=True)
    pq.write_table(pq.read_table(tmp_path / "whole" / "intents.parquet"), other)
    (tmp_path / "shop" / "drawing.json").write_text(json.dumps({"seed": 4}))
    write_world(tmp_path / "shop", **SIZES)
    assert digest(tmp_path / "shop") == digest(tmp_path / "whole")


def test_a_folder_with_anything_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="Name a new folder"):
        write_world(tmp_path, **SIZES)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
