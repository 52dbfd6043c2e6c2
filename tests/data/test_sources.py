"""What params ask of a data set is checked before anything is written; how much data there is, before it is read."""

import csv
from typing import get_args

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from builders import good_meta, good_tables
from table_changes import replaced, write_raw

from rgalign.__main__ import main
from rgalign.commands import pipeline
from rgalign.data import cfpb, sources, tables
from rgalign.data.schema import SPLITS
from rgalign.data.sources import SOURCES, size_of, write_dataset
from rgalign.params import load
from rgalign.params_schema import Data, Features, SampledNegatives, World
from rgalign.run.artifacts import ArtifactError, digest
from rgalign.shopworld.vocabulary import KINDS, TEXT_COLUMNS

SMALL = World(sessions=200, users=20, distance=0.5, transcripts=0)
FOLDER = Data(source="folder", path="raw", seed=0)


def written(folder, drop):
    write_raw(folder / "raw", good_tables(), good_meta())
    data = FOLDER.model_copy(update={"features": Features(drop=tuple(drop))})
    return write_dataset(folder / "out", data, folder / "raw")


def test_an_unknown_column_to_drop_is_named_with_the_nearest(tmp_path):
    with pytest.raises(ValueError, match=r"data\.features\.drop (.|\n)*'amont'; did you mean 'amount'\?"):
        written(tmp_path, ["state", "amont"])
    with pytest.raises(ValueError, match=r"data\.features\.drop leaves none of the 4"):
        written(tmp_path, list(good_meta()["features"]))
    assert not (tmp_path / "out").exists()
    assert written(tmp_path, ["state"]) == good_meta()["features"]  # only the names are checked
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


def data(source, path):
    return load("params/smoke.yaml", {"data.source": source, "data.path": str(path)}).data


def test_a_simulated_shop_is_as_large_as_its_params_say():
    assert size_of(load("params/smoke.yaml", {"data.world.sessions": 777}).data).sessions == 777


@pytest.mark.parametrize("partitioned", [False, True])
def test_a_folder_tells_rows_dates_and_columns(tmp_path, partitioned):
    folder = write_raw(tmp_path / "shop", good_tables(), good_meta())
    if partitioned:
        sessions = good_tables()["sessions"].to_pandas()
        (folder / "sessions.parquet").unlink()
        sessions.to_parquet(folder / "sessions", partition_cols=["state"], index=False)
    size = size_of(data("folder", folder))
    assert dict(size.rows) == {"intents": 4, "sessions": 10, "impressions": 30}
    told = "10 sessions; 4 intents; 30 impressions; 2024-03-01 to 2024-03-10; 4 feature columns: state, amount, note, "
    assert str(size) == told + "visited"


def test_a_log_without_times_has_no_dates(tmp_path):
    tables = good_tables()
    tables["sessions"] = replaced(tables["sessions"], "timestamp", pa.nulls(10))
    size = size_of(data("folder", write_raw(tmp_path, tables, good_meta())))
    assert (size.sessions, size.first, size.last) == (10, None, None)


@pytest.mark.parametrize("files", [1, 3])
def test_complaints_are_counted_whatever_is_in_them(tmp_path, files, monkeypatch):
    """Line breaks in quotation marks are no rows; of a long file the beginning tells the rest."""
    rng, rows = np.random.default_rng(0), 400
    for number in range(files):
        with (tmp_path / f"{number}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["complaint_id", "narrative"])
            writer.writerows([row, 'a "b"\r\n' * int(rng.integers(1, 5))] for row in range(rows))
    size = size_of(data("cfpb", tmp_path if files > 1 else tmp_path / "0.csv"))
    assert (size.sessions, size.about) == (files * rows, False)
    monkeypatch.setattr(cfpb, "COUNTED", 5_000)
    sources.size_of.cache_clear()
    size = size_of(data("cfpb", tmp_path if files > 1 else tmp_path / "0.csv"))
    assert size.about
    assert str(size).startswith("about ")
    assert size.sessions == pytest.approx(files * rows, rel=0.1)


def test_visitors_of_two_areas_or_more_are_sessions(tmp_path):
    head = "I,4\n" + "".join(f'A,{area},1,"x","/x"\n' for area in (1, 2, 3))
    lines = {"data": "C,1,1\nV,1,1\nC,2,2\nV,1,1\nV,2,1\nV,3,1\n", "test": "C,3,3\nV,1,1\nV,2,1\nC,4,4\n"}
    for name, text in lines.items():
        (tmp_path / f"anonymous-msweb.{name}").write_text(head + text)
    assert size_of(data("msweb", tmp_path)).sessions == 2


@pytest.mark.parametrize(
    ("source", "made", "told"),
    [
        ("folder", {}, "python -m rgalign check"),
        ("folder", {"sessions.parquet": "PAR1 not"}, "python -m rgalign check"),
        ("msweb", {}, "anonymous-msweb.data"),
        ("cfpb", {}, r"holds no \.csv"),
    ],
)
def test_what_cannot_be_counted_is_one_clear_error(tmp_path, source, made, told):
    for name, text in made.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ArtifactError, match=rf"data\.path .* cannot be read as {source} .*{told}"):
        size_of(data(source, tmp_path))


def test_the_dry_run_looks_at_the_data(tmp_path, capsys):
    folder = write_raw(tmp_path / "shop", good_tables(), good_meta())
    for number, rows in enumerate((10, 100_000)):
        few = pd.DataFrame({"timestamp": pd.date_range("2025-01-01", periods=rows, freq="min")})
        sources.size_of.cache_clear()
        few.to_parquet(folder / "sessions.parquet", index=False)
        words = ["--set", "data.source=folder", "--set", f"data.path={folder}", "--run-dir", str(tmp_path / "run")]
        assert main(["run", "params/smoke.yaml", *words, "--dry-run"]) == 0
        said = capsys.readouterr().out
        assert f"data: {rows:,} sessions; 4 intents; 30 impressions; 2025-01-01 to " in said
        stage, params = (
            pipeline.stage_named("03"),
            load("params/smoke.yaml", {"data.source": "folder", "data.path": str(folder)}),
        )
        fixed, per_thousand = stage.seconds
        assert pipeline.estimate(stage, params, {}) == round(fixed + per_thousand * (0.01, 100)[number])
    words[3] = f"data.path={tmp_path / 'nowhere'}"
    assert main(["run", "params/smoke.yaml", *words, "--dry-run"]) == 1
    assert "nowhere was not found; looked for" in capsys.readouterr().err
