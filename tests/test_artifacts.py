"""Atomic writes, digests, the manifest, and the stage's door."""

import importlib
import json
import shutil
from typing import ClassVar

import pandas as pd
import pytest

from rgalign.params import ROOT, dump, load
from rgalign.run import artifacts, stages
from rgalign.run.artifacts import ArtifactError

SMOKE = "params/smoke.yaml"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "table.txt"
    artifacts.write_text(target, "old")
    with pytest.raises(RuntimeError), artifacts.atomic(target) as temporary:  # noqa: PT012 the write is the point
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["table.txt"]


def test_a_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "models"
    for name in ("first", "second"):
        with artifacts.atomic(target) as temporary:
            temporary.mkdir()
            (temporary / name).write_text(name)
    assert [p.name for p in target.iterdir()] == ["second"]
    assert [p.name for p in tmp_path.iterdir()] == ["models"]


def test_what_a_killed_writer_left_is_swept(tmp_path):
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / ".results.part.parquet").write_text("half")
    (tmp_path / "tables" / "results.parquet").write_text("whole")
    assert [p.name for p in artifacts.sweep(tmp_path / "tables" / "results.parquet")] == [".results.part.parquet"]
    assert [p.name for p in (tmp_path / "tables").iterdir()] == ["results.parquet"]


def test_the_digest_of_a_folder_sees_names_and_contents(tmp_path):
    (tmp_path / "a").write_text("1")
    one = artifacts.digest(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    two = artifacts.digest(tmp_path)
    (tmp_path / "b").write_text("2")
    assert len({one, two, artifacts.digest(tmp_path)}) == 3


def test_the_same_table_gives_the_same_bytes(tmp_path):
    frame = pd.DataFrame({"model": ["a", "b"], "value": [0.1, None]})
    for name in ("one", "two"):
        artifacts.write_table(tmp_path / name, frame)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


WRONG = {
    "seconds in words": ({"seconds": "x"}, "01_data: seconds is 'x'; expected a number from 0"),
    "no peak": ({"peak_memory_mb": None}, "01_data: peak_memory_mb is None; expected a number from 0"),
    "seconds without end": ({"seconds": 10**400}, "01_data: seconds is 1000"),
    "outputs a list": ({"outputs": ["a"]}, "01_data: outputs is not a table of names"),
    "an output elsewhere": ({"outputs": {"../x": "0"}}, "01_data: the output '../x' lies outside the run"),
    "an absolute output": ({"outputs": {"/tmp/x": "0"}}, "01_data: the output '/tmp/x' lies outside the run"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_manifest_of_wrong_types_is_told_with_stage_and_key(tmp_path, name):
    more, expected = WRONG[name]
    entry = {"params": {}, "code": {}, "inputs": {}, "outputs": {}, "seconds": 1.5, "peak_memory_mb": 3}
    (tmp_path / "manifest.json").write_text(json.dumps({"stages": {"01_data": entry}}))
    assert artifacts.read_manifest(tmp_path)["stages"]["01_data"] == entry
    (tmp_path / "manifest.json").write_text(json.dumps({"stages": {"01_data": entry | more}}))
    with pytest.raises(artifacts.ArtifactError, match="delete it and run again") as told:
        artifacts.read_manifest(tmp_path)
    assert expected in str(told.value)


def test_a_manifest_that_nests_without_end_is_told(tmp_path):
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(artifacts.ArtifactError, match=r"manifest\.json cannot be read .*delete it"):
        artifacts.read_manifest(tmp_path)


def test_a_torn_manifest_says_what_to_do(tmp_path):
    (tmp_path / artifacts.MANIFEST).write_text('{"stages": {')
    with pytest.raises(ArtifactError, match="delete it and run again"):
        artifacts.read_manifest(tmp_path)


def test_missing_data_lists_where_it_was_looked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("RGALIGN_DATA", str(tmp_path))
    with pytest.raises(ArtifactError, match="RGALIGN_DATA") as error:
        artifacts.data_path("nowhere")
    assert str(tmp_path / "nowhere") in str(error.value)


def test_places_that_nobody_has_are_not_named(tmp_path, monkeypatch):
    """A user's own folder has no ../shared/data, and need not be told of it."""
    monkeypatch.delenv("RGALIGN_DATA", raising=False)
    monkeypatch.setattr(artifacts, "ROOT", tmp_path / "mine")
    with pytest.raises(ArtifactError) as error:
        artifacts.data_path("data/library")
    assert str(tmp_path / "mine/data/library") in str(error.value)
    assert "shared" not in str(error.value)
    (tmp_path / "mine/data/library").mkdir(parents=True)
    assert artifacts.data_path("data/library") == tmp_path / "mine/data/library"


def test_every_input_is_written_by_an_earlier_stage():
    made: set[str] = set()
    for stage in stages.STAGES.values():
        assert set(stage.reads) <= made, stage.name
        made |= set(stage.writes)


def test_only_the_evaluation_opens_the_test_split():
    readers = {s.name for s in stages.STAGES.values() if "tables/encoded_test" in s.reads}
    assert readers <= {"09_evaluation", "10_ab_test", "90_ablation"}


def test_a_stage_whose_inputs_are_not_there_names_the_notebook_to_run(tmp_path):
    with pytest.raises(ArtifactError, match=r"run 01_data\.ipynb first"):
        stages.open_stage("03_rankers", SMOKE, tmp_path)


@pytest.fixture
def finished_run(tmp_path):
    """A run directory in which 01_data has ended, with contents of no meaning."""
    stage = stages.open_stage("01_data", SMOKE, tmp_path)
    for name in stage.stage.writes:
        with stage.writing(name) as temporary:
            temporary.write_text(name)
    stage.finish()
    return tmp_path


def test_finish_writes_provenance_and_the_stage_is_then_unchanged(finished_run):
    params = load(SMOKE)
    entry = json.loads((finished_run / artifacts.MANIFEST).read_text())["stages"]["01_data"]
    assert entry["params"]["data.world.sessions"] == params.data.world.sessions
    assert "rgalign/run/stages.py" in entry["code"]
    assert (finished_run / "params.yaml").read_text() == dump(params)
    assert stages.reason_to_run(finished_run, stages.STAGES["01_data"], params) is None


def test_the_word_lists_and_the_benchmarks_in_use_are_code_too():
    """They are no module of the package, and what they make is stale without them."""
    importlib.import_module("benchmarks.peers")
    importlib.import_module("rgalign.shopworld.world")
    found = artifacts.code_in_use("91_benchmarks")
    for name in ("rgalign/shopworld/words.yaml", "rgalign/shopworld/columns.yaml", "benchmarks/peers.py"):
        assert found[name] == artifacts.digest(ROOT / name)


def test_changed_params_code_and_outputs_are_each_a_reason_to_run(finished_run):
    stage = stages.STAGES["01_data"]
    other = load(SMOKE, {"data.world.distance": 1})
    assert stages.reason_to_run(finished_run, stage, other) == "params changed: data.world.distance 0.5 -> 1.0"
    assert stages.reason_to_run(finished_run, stage, load(SMOKE, {"evaluation.bootstrap": 500})) is None

    entry = artifacts.read_manifest(finished_run)["stages"]["01_data"]
    artifacts.record_stage(finished_run, "01_data", entry | {"code": {"rgalign/run/stages.py": "other"}})
    assert stages.reason_to_run(finished_run, stage, load(SMOKE)) == "code changed: rgalign/run/stages.py"

    artifacts.record_stage(finished_run, "01_data", entry)
    (finished_run / "tables" / "dataset").write_text("altered")
    assert stages.reason_to_run(finished_run, stage, load(SMOKE)) == "output tables/dataset changed"
    with pytest.raises(ArtifactError, match="altered after 01_data wrote it"):
        stages.open_stage("03_rankers", SMOKE, finished_run)


def test_what_people_give_makes_its_reader_run_again_and_nobody_else(finished_run, monkeypatch):
    reader = stages.Stage(
        "03_rankers", reads=("tables/dataset",), writes=("tables/x.txt",), params=(), given=("l.txt",)
    )
    monkeypatch.setitem(stages.STAGES, reader.name, reader)

    def read() -> str | None:
        stage = stages.open_stage(reader.name, SMOKE, finished_run)
        artifacts.write_text(finished_run / "tables/x.txt", "x")
        stage.finish()
        path = stage.given("l.txt")
        return path and path.read_text()

    def reason(name: str) -> str | None:
        return stages.reason_to_run(finished_run, stages.STAGES[name], load(SMOKE))

    given = finished_run / "l.txt"
    assert read() is None
    assert reason(reader.name) is None, "what nobody gave is no reason"
    given.write_text("one")
    assert reason(reader.name) == "input l.txt is new"
    assert read() == "one"
    assert reason(reader.name) is None
    given.write_text("two")
    assert reason(reader.name) == "input l.txt changed"
    given.unlink()
    assert reason(reader.name) == "input l.txt is missing"
    assert reason("01_data") is None
    with pytest.raises(ArtifactError, match="does not declare other as optional"):
        stages.open_stage(reader.name, SMOKE, finished_run).given("other")


def test_a_models_weights_are_an_input_of_the_reasoners_stage(finished_run, tmp_path_factory):
    """Replaced in their folder, under the same names and sizes, they are a reason to run."""
    folder = tmp_path_factory.mktemp("model")
    weights = folder / "model.safetensors"
    weights.write_text("one")
    params = load(SMOKE, {"reasoner.model": str(folder)})
    stage = stages.open_stage("02_reasoner", SMOKE, finished_run, {"reasoner.model": str(folder)})
    for name in stage.stage.writes:
        with stage.writing(name) as temporary:
            temporary.write_text(name)
    stage.finish()
    assert stages.reason_to_run(finished_run, stage.stage, params) is None
    (folder / ".cache").write_text("of the downloader")
    assert stages.reason_to_run(finished_run, stage.stage, params) is None
    weights.write_text("two")
    assert stages.reason_to_run(finished_run, stage.stage, params) == f"input model:{folder} changed"
    shutil.rmtree(folder)
    assert stages.reason_to_run(finished_run, stage.stage, params) == f"input model:{folder} is missing"


def test_inputs_made_with_other_params_are_refused(finished_run):
    with pytest.raises(ArtifactError, match=r"with other params \(data\.world\.distance 0\.5 -> 0\.0\)"):
        stages.open_stage("03_rankers", SMOKE, finished_run, {"data.world.distance": 0})


def test_a_stage_ends_only_with_all_it_declared(tmp_path):
    stage = stages.open_stage("01_data", SMOKE, tmp_path)
    with pytest.raises(ArtifactError, match=r"ends without tables/dataset, tables/encoded,"):
        stage.finish()
    with pytest.raises(ArtifactError, match="does not declare that it writes"):
        stage.write("tables/other.parquet", pd.DataFrame())
    with pytest.raises(ArtifactError, match="does not declare that it reads"):
        stage.read("tables/results.parquet")


def test_a_misspelt_papermill_parameter_is_an_error_in_the_notebook(monkeypatch, tmp_path):
    class Shell:
        user_ns: ClassVar = {"In": ["", "params_file = ''", '# Parameters\nrun_dri = "x"\n']}

    import IPython

    monkeypatch.setattr(IPython, "get_ipython", lambda: Shell)
    with pytest.raises(ArtifactError, match="did you mean run_dir"):
        stages.open_stage("01_data", SMOKE, tmp_path)


def test_every_stage_has_its_notebook():
    for name in stages.STAGES:
        assert (ROOT / "notebooks" / f"{name}.ipynb").is_file()
