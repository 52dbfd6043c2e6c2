"""What params ask of a data set is refused before anything is written."""

from typing import get_args

import pytest
from builders import good_meta, good_tables
from table_changes import write_raw

from rgalign.data import tables
from rgalign.data.schema import SPLITS
from rgalign.data.sources import SOURCES, write_dataset
from rgalign.params_schema import Data, Features, SampledNegatives, World
from rgalign.run.artifacts import digest
from rgalign.shopworld.vocabulary import KINDS, TEXT_COLUMNS

SMALL = World(sessions=200, users=20, distance=0.5, transcripts=0)
FOLDER = Data(source="folder", path="raw", seed=0)


def load(folder, drop):
    write_raw(folder / "raw", good_tables(), good_meta())
    data = FOLDER.model_copy(update={"features": Features(drop=tuple(drop))})
    return write_dataset(folder / "out", data, folder / "raw")


def test_an_unknown_column_to_drop_is_named_with_the_nearest(tmp_path):
    with pytest.raises(ValueError, match=r"data\.features\.drop (.|\n)*'amont'; did you mean 'amount'\?"):
        load(tmp_path, ["state", "amont"])
    with pytest.raises(ValueError, match=r"data\.features\.drop leaves none of the 4"):
        load(tmp_path, list(good_meta()["features"]))
    assert not (tmp_path / "out").exists()
    assert load(tmp_path, ["state"]) == good_meta()["features"]  # only the names are checked
    assert tables.read(tmp_path / "out").kinds == good_meta()["features"]


def test_a_folder_that_has_faults_is_not_written(tmp_path):
    write_raw(tmp_path / "raw", good_tables() | {"impressions": good_tables()["impressions"][:0]}, good_meta())
    with pytest.raises(tables.TableError, match=r"impressions\.parquet +is empty"):
        write_dataset(tmp_path / "out", FOLDER, tmp_path / "raw")
    assert not (tmp_path / "out").exists()


def test_how_lists_were_sampled_is_written_down_or_refused(tmp_path):
    write_raw(tmp_path / "raw", good_tables(), good_meta())
    sampled = {"popularity": 2, "uniform": 1, "smoothing": 0.5}
    data = Data(source="folder", path="raw", sampled_negatives=SampledNegatives(**sampled))
    write_dataset(tmp_path / "out", data, tmp_path / "raw")
    plain = tables.read(tmp_path / "raw", splits=SPLITS, truth=True)
    plain.meta["sampled_negatives"] = sampled
    tables.write(plain, tmp_path / "whole")
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    other = data.model_copy(update={"sampled_negatives": SampledNegatives(**sampled | {"uniform": 2})})
    with pytest.raises(ValueError, match=r"data\.sampled_negatives is .*, but dataset\.yaml says"):
        write_dataset(tmp_path / "no", other, tmp_path / "out")


def test_a_world_is_not_drawn_for_an_unknown_column(tmp_path, monkeypatch):
    columns = [*KINDS, *TEXT_COLUMNS]
    data = Data(world=SMALL, seed=0, features=Features(drop=tuple(columns[:2])))
    kinds = write_dataset(tmp_path / "shop", data)
    assert list(kinds) == columns
    monkeypatch.setattr("rgalign.shopworld.world.generate", lambda **_: pytest.fail("drawn"))
    with pytest.raises(ValueError, match=r"data\.features\.drop"):
        write_dataset(tmp_path / "shop", data.model_copy(update={"features": Features(drop=("nothing",))}))


def test_params_name_every_source_and_no_other():
    assert set(get_args(Data.model_fields["source"].annotation)) == set(SOURCES)
