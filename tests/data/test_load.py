"""What params ask of a data set is refused before anything is written."""

import pytest
from builders import good_meta, good_tables
from table_changes import write_raw

from rgalign.data.load import load_dataset
from rgalign.data.world_columns import KINDS, TEXT_COLUMNS

SMALL = {"sessions": 200, "users": 20, "distance": 0.5, "transcripts": 0}


def load(folder, drop):
    write_raw(folder, good_tables(), good_meta())
    return load_dataset("folder", seed=0, world_settings={}, path=folder, drop=drop)


def test_an_unknown_column_to_drop_is_named_with_the_nearest(tmp_path):
    with pytest.raises(ValueError, match=r"data\.features\.drop (.|\n)*'amont'; did you mean 'amount'\?"):
        load(tmp_path, ["state", "amont"])
    with pytest.raises(ValueError, match=r"data\.features\.drop leaves none of the 4"):
        load(tmp_path, list(good_meta()["features"]))
    assert list(load(tmp_path, ["state"]).kinds) == list(good_meta()["features"])  # only the names are checked


def test_a_world_is_not_drawn_for_an_unknown_column(monkeypatch):
    columns = [*KINDS, *TEXT_COLUMNS]
    dataset = load_dataset("shopworld", seed=0, world_settings=SMALL, drop=columns[:2])
    assert list(dataset.kinds) == columns
    monkeypatch.setattr("rgalign.data.world.generate", lambda **_: pytest.fail("drawn"))
    with pytest.raises(ValueError, match=r"data\.features\.drop"):
        load_dataset("shopworld", seed=0, world_settings=SMALL, drop=["nothing"])
