"""Sweeps of stages that take no time: what is shared, what a failure leaves, what is refused before anything runs."""

import json
import os

import pytest

from rgalign.__main__ import main
from rgalign.commands import pipeline, sweep
from rgalign.params import ROOT, ParamsError
from rgalign.run import artifacts
from rgalign.run.stages import open_stage

SMOKE = ROOT / "params" / "smoke.yaml"
THROUGH = ["--through", "03"]


@pytest.fixture
def files(tmp_path):
    """Two params files that differ in what 03_rankers depends on alone."""
    for name, epochs in (("a", 2), ("b", 3)):
        (tmp_path / f"{name}.yaml").write_text(SMOKE.read_text().replace("ranker:", f"ranker:\n  epochs: {epochs}"))
    return [str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")]


@pytest.fixture
def executed(monkeypatch):
    """(run, stage) of each notebook that a sweep executes; a stage writes the params it depends on and its inputs."""
    found = []

    def execute_stage(run, stage, parameters, a_kernel):
        found.append((run.name, stage.name))
        opened = open_stage(stage.name, **parameters)
        told = json.dumps(
            [stage.name, opened.params.data.seed, opened.params.ranker.epochs if stage.name[:2] == "03" else 0]
        )
        for name in stage.writes:
            with opened.writing(name) as temporary:
                temporary.mkdir()
                (temporary / "inner").write_text(told + name + "".join(sorted(opened.inputs.values())))
        for page in ("ipynb", "html"):
            artifacts.write_text(run / "notebooks" / f"{stage.name}.{page}", f"{page} of {run.name}")
        opened.finish()

    monkeypatch.setattr(pipeline, "_execute_stage", execute_stage)
    return found


def swept(files, out, *more, seeds="2"):
    return main(["sweep", *files, "--seeds", seeds, "--out", str(out), *THROUGH, *more])


def digests(run):
    return {
        name: was for entry in artifacts.read_manifest(run)["stages"].values() for name, was in entry["outputs"].items()
    }


def test_what_is_the_same_runs_once_and_ends_with_the_same_bytes_as_run_alone(files, executed, tmp_path, capsys):
    out = tmp_path / "out"
    assert swept(files, out) == 0
    assert [stage for run, stage in executed if run == "b-s1"] == ["03_rankers"]
    assert len(executed) == 3 + 3 + 1 + 1
    assert "[2/10] reasoner: copied from a-s1" in capsys.readouterr().out
    alone = tmp_path / "alone"
    assert swept(files[1:], alone, seeds="1,") == 0
    assert digests(out / "b-s1") == digests(alone / "b-s1")
    for name, was in digests(out / "b-s1").items():
        assert artifacts.digest(out / "b-s1" / name) == was
    entries = artifacts.read_manifest(out / "b-s1")["stages"]
    assert {name: entry.get("shared_from") for name, entry in entries.items()} == {
        "01_data": "a-s1", "02_reasoner": "a-s1", "03_rankers": None,
    }  # fmt: skip
    assert (out / "b-s1" / "notebooks" / "01_data.html").read_text() == "html of a-s1"
    inner = [out / run / "tables/dataset/inner" for run in ("a-s1", "b-s1")]
    assert os.path.samefile(*inner)


def test_writing_anew_in_one_run_leaves_the_other_as_it_was(files, executed, tmp_path):
    out = tmp_path / "out"
    swept(files, out, seeds="1")
    before = digests(out / "a-s0")
    with artifacts.atomic(out / "b-s0" / "tables/dataset") as temporary:
        temporary.mkdir()
        (temporary / "inner").write_text("another")
    assert artifacts.digest(out / "a-s0" / "tables/dataset") == before["tables/dataset"]


def test_runs_that_share_stages_wait_for_the_run_that_makes_them(files, tmp_path):
    stages = pipeline.chosen(None, "03")
    runs = sweep.runs_of([*files, str(SMOKE)], "2", {}, tmp_path)
    (tmp_path / "c.yaml").write_text((tmp_path / "b.yaml").read_text() + "\n# the same as b\n")
    runs += sweep.runs_of([str(tmp_path / "c.yaml")], "1", {}, tmp_path)
    names = [[run.folder.name for run in group] for group in sweep.waves(runs, stages)]
    assert names == [["a-s0", "a-s1"], ["b-s0", "b-s1", "smoke-s0", "smoke-s1"], ["c-s0"]]


@pytest.mark.slow
def test_two_workers_of_a_dask_cluster_run_a_sweep(files, tmp_path, capsys):
    """Two worlds at once, then the runs that share them."""
    distributed = pytest.importorskip("distributed")
    out, small = tmp_path / "out", ["--set", "data.world.sessions=200", "--set", "data.world.users=50"]
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        given = [*files, "--seeds", "2", "--out", str(out), "--through", "01", *small]
        assert main(["sweep", *given, "--scheduler", cluster.scheduler_address]) == 0
    entries = {run.name: artifacts.read_manifest(run)["stages"]["01_data"] for run in out.glob("*-s?")}
    made = {name: entry.get("shared_from") for name, entry in entries.items()}
    first = "a-sessions=200-users=50-s"
    assert made == {f"{first}0": None, f"{first}1": None, f"b{first[1:]}0": f"{first}0", f"b{first[1:]}1": f"{first}1"}
    printed = capsys.readouterr().out
    assert "[2/4]" in printed
    assert f"copied from {first}0" in printed


def test_a_scheduler_that_does_not_answer_is_an_error_with_what_to_start(files, tmp_path, monkeypatch, capsys):
    pytest.importorskip("distributed")
    monkeypatch.setattr(sweep, "CONNECT", 0.5)
    assert swept(files, tmp_path / "out", "--scheduler", "tcp://127.0.0.1:9") == 1
    assert "start one: dask scheduler; then start workers" in capsys.readouterr().err


def test_an_altered_artifact_is_not_taken_over(files, executed, tmp_path):
    out = tmp_path / "out"
    swept(files[:1], out, seeds="1")
    (out / "a-s0" / "tables/encoded/inner").write_text("altered")
    swept(files[1:], out, seeds="1")
    assert ("b-s0", "01_data") in executed
    assert artifacts.digest(out / "b-s0" / "tables/encoded") == digests(out / "b-s0")["tables/encoded"]


@pytest.mark.parametrize(
    "other",
    [{"packages": {"torch": "0"}}, {"seed": 9}, {"code": {"rgalign/run/plan.py": "another"}}, {"inputs": {"x": "y"}}],
)
def test_what_was_made_otherwise_is_not_taken_over(files, executed, tmp_path, other):
    out = tmp_path / "out"
    swept(files[:1], out, seeds="1")
    entry = artifacts.read_manifest(out / "a-s0")["stages"]["01_data"]
    artifacts.record_stage(out / "a-s0", "01_data", entry | other)
    (run,) = sweep.runs_of(files[1:], "1", {}, out)
    assert sweep.find_cached_stage(run.folder, pipeline.stage_named("01"), run.params) is None


def test_an_output_that_is_not_what_its_manifest_says_leaves_no_entry(files, executed, tmp_path):
    out = tmp_path / "out"
    swept(files[:1], out, seeds="1")
    (run,) = sweep.runs_of(files[1:], "1", {}, out)
    (out / "a-s0" / "tables/encoded/inner").write_text("altered")
    with pytest.raises(artifacts.ArtifactError, match="not what its manifest says"):
        sweep.copy_stage(run.folder, pipeline.stage_named("01"), run.params, out / "a-s0")
    assert not artifacts.read_manifest(run.folder)["stages"]
    assert not (run.folder / "tables/encoded").exists()


def test_a_copy_is_as_good_as_a_link(files, executed, tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError("no links here")

    monkeypatch.setattr(sweep.os, "link", no_links)
    out = tmp_path / "out"
    assert swept(files, out, seeds="1") == 0
    assert len(executed) == 4
    for name, was in digests(out / "b-s0").items():
        assert artifacts.digest(out / "b-s0" / name) == was


def test_a_failing_run_does_not_stop_the_others(files, executed, tmp_path, monkeypatch, capsys):
    out, whole = tmp_path / "out", pipeline._execute_stage

    def fails_once(run, stage, parameters, a_kernel):
        if (run.name, stage.name) == ("a-s0", "02_reasoner"):
            raise pipeline.StageFailed(f"notebooks/02_reasoner.ipynb failed in cell 3\n  KeyError: no\n  log: {ROOT}/x")
        whole(run, stage, parameters, a_kernel)

    monkeypatch.setattr(pipeline, "_execute_stage", fails_once)
    assert swept(files, out) == 1
    told = json.loads((out / "sweep.json").read_text())["runs"]
    assert {name: bool(run["failed"]) for name, run in told.items()} == {
        "a-s0": True, "a-s1": False, "b-s0": False, "b-s1": False,
    }  # fmt: skip
    assert told["a-s0"]["failed"] == "notebooks/02_reasoner.ipynb failed in cell 3 KeyError: no"
    last = capsys.readouterr().out.splitlines()[-4:]
    assert [line.split()[:2] for line in last][:2] == [["a-s0", "failed"], ["a-s1", "done"]]

    monkeypatch.setattr(pipeline, "_execute_stage", whole)
    executed.clear()
    assert swept(files, out) == 0
    assert executed == [("a-s0", "03_rankers")]  # 02 is copied from b-s0, which ran it
    assert not json.loads((out / "sweep.json").read_text())["runs"]["a-s0"]["failed"]


def test_an_interrupt_stops_cleanly_and_the_same_command_goes_on(files, executed, tmp_path, monkeypatch, capsys):
    out, whole = tmp_path / "out", pipeline._execute_stage

    def interrupted(run, stage, parameters, a_kernel):
        if (run.name, stage.name) == ("a-s1", "02_reasoner"):
            raise KeyboardInterrupt
        whole(run, stage, parameters, a_kernel)

    monkeypatch.setattr(pipeline, "_execute_stage", interrupted)
    assert swept(files, out) == 130
    assert "Give the same command again" in capsys.readouterr().err
    assert json.loads((out / "sweep.json").read_text())["runs"]["a-s1"]["stages"] == {"01_data": "ran"}
    monkeypatch.setattr(pipeline, "_execute_stage", whole)
    executed.clear()
    assert swept(files, out) == 0
    assert ("a-s0", "01_data") not in executed
    assert ("a-s1", "01_data") not in executed
    executed.clear()
    assert swept(files, out) == 0
    assert not executed


def test_the_sweeps_manifest_is_the_same_but_for_its_times(files, executed, tmp_path):
    def told():
        said = json.loads((tmp_path / "out" / "sweep.json").read_text())
        return {key: value for key, value in said.items() if key not in ("started", "ended")}

    swept(files, tmp_path / "out")
    first = told()
    swept(files, tmp_path / "out")
    assert told() == first
    assert first["runs"]["b-s1"]["stages"]["01_data"] == "shared with a-s1"
    assert first["runs"]["b-s1"]["seed"] == 1
    swept(files[:1], tmp_path / "out", seeds="7,")
    assert sorted(told()["runs"]) == ["a-s0", "a-s1", "a-s7", "b-s0", "b-s1"]


def test_the_plan_says_what_is_run_shared_and_done(files, executed, tmp_path, capsys):
    out = tmp_path / "out"
    assert swept(files, out, "--dry-run") == 0
    assert not out.exists()
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("a-", "b-"))]
    assert [row[:4] for row in rows] == [
        ["a-s0", "3", "0", "0"], ["a-s1", "3", "0", "0"], ["b-s0", "1", "2", "0"], ["b-s1", "1", "2", "0"],
    ]  # fmt: skip
    swept(files[:1], out)
    capsys.readouterr()
    swept(files[1:], out, "--dry-run")
    printed = capsys.readouterr().out
    assert [line.split()[:4] for line in printed.splitlines() if line.startswith("b-")] == [
        ["b-s0", "1", "2", "0"], ["b-s1", "1", "2", "0"],
    ]  # fmt: skip
    assert not [run for run, _ in executed if run.startswith("b-")]


def test_the_ablations_share_all_that_comes_before_what_they_change(tmp_path):
    """The study's price: the shop, its LLMs and rankers are made once a world, whatever the rows of the stage table."""
    first = {"one_llm": "04", "sft_dpo": "07", "cosine_cl": "07", "frozen_ranker": "07", "scratch_ranker": "07"}
    first |= dict.fromkeys(("no_dpo", "naive_dpo"), "06")
    given = [ROOT / "params" / "alignment.yaml", *sorted((ROOT / "params" / "ablations").glob("*.yaml"))]
    runs = sweep.runs_of([str(path) for path in given], "1", {}, tmp_path)
    planned = sweep.plan(runs, pipeline.chosen(None, None))
    ran = planned[planned["action"] == "run"].groupby("run")["stage"].min().str[:2].to_dict()
    assert ran.pop("alignment-s0") == "01"
    late = {run.removesuffix("-s0"): stage for run, stage in ran.items()}
    assert {name: stage for name, stage in late.items() if name in first} == first
    assert min(stage for name, stage in late.items() if name not in first) >= "05"


def test_what_set_changes_stands_in_the_runs_name_so_that_none_is_overwritten(files, executed, tmp_path):
    runs = sweep.runs_of(files[:1], "1", {"data.world.distance": 0.25}, tmp_path)
    assert runs[0].folder.name == "a-distance=0.25-s0"
    assert runs[0].params.data.world.distance == 0.25
    assert runs[0].parameters["overrides"] == {"data.world.distance": 0.25, "run.seed": 0}


@pytest.mark.parametrize(
    ("value", "name"),
    [(None, "seed=null"), (7, "seed=7"), ([7, 8], "seeds=_7_8_"), ("#1 of", "instruction=_1_of"), (True, "use=true")],
)
def test_a_runs_name_has_the_value_as_it_is_written_on_the_command_line(value, name, tmp_path):
    keys = {"seed": "data.seed", "seeds": "ranker.seeds", "instruction": "reasoner.instruction"}
    key = keys.get(name.split("=")[0], "alignment.sft.use")
    (run,) = sweep.runs_of([str(SMOKE)], "1,", {key: value}, tmp_path)
    assert run.folder.name == f"smoke-{name}-s1"
    assert json.loads(json.dumps(run.parameters)) == run.parameters


def test_a_seed_that_a_params_file_fixes_is_noted(files, tmp_path):
    assert not sweep.notes(sweep.runs_of(files, "2", {}, tmp_path))
    (note,) = sweep.notes(sweep.runs_of(files[:1], "2", {"data.seed": 3}, tmp_path))
    assert "the same world; --set data.seed=null frees it" in note
    assert not sweep.notes(sweep.runs_of(["params/study.yaml"], "2", {"data.seed": None}, tmp_path))


@pytest.mark.parametrize(("text", "seeds"), [("3", [0, 1, 2]), ("5,6,8", [5, 6, 8]), ("5,", [5])])
def test_seeds_are_a_count_or_a_list(text, seeds):
    assert sweep.seeds_of(text) == seeds


@pytest.mark.parametrize("text", ["", "0", "x", "-1", "1.5", "1,1", "1,,2", "1,x"])
def test_other_seeds_are_refused(text):
    with pytest.raises(ParamsError, match="expected a count"):
        sweep.seeds_of(text)


def test_all_faults_of_a_command_are_told_at_once_before_anything_runs(executed, tmp_path, capsys):
    (tmp_path / "ablations").mkdir()
    (tmp_path / "ablations" / "no_neftun.yaml").write_text(SMOKE.read_text())
    given = ["params/smok.yaml", str(tmp_path / "ablations" / "no_neftun.yaml"), str(SMOKE), "params/smoke.yaml"]
    assert swept(given, tmp_path / "out", "--set", "run.seed=3", seeds="some") == 1
    told = capsys.readouterr().err
    for part in (
        "--seeds is 'some'; expected a count",
        "--set run.seed has no place here",
        "no params file params/smok.yaml; did you mean params/smoke.yaml?",
        "did you mean 'rgalign_rec/no_neftune'?",
        "two runs would be called smoke-seed=3-s0: give each params file once",
    ):
        assert part in told
    assert not executed
    assert not (tmp_path / "out").exists()


def test_notebook_90_runs_at_the_end_over_what_has_finished(files, executed, tmp_path, monkeypatch, capsys):
    ended = {"params": {}, "code": {}, "inputs": {}, "outputs": {}, "seconds": 1, "peak_memory_mb": 1}
    monkeypatch.setattr(
        sweep, "_execute_run", lambda run, stages, kernels: artifacts.record_stage(run.folder, "09_evaluation", ended)
    )

    def study_fails(run, stages, parameters, params, forced):
        assert (run, stages[0].name, forced) == (tmp_path / "out", "90_ablation", True)
        assert parameters["overrides"] == {"evaluation.bootstrap": 100}
        raise pipeline.StageFailed("notebooks/90_ablation.ipynb failed")

    monkeypatch.setattr(pipeline, "execute", study_fails)
    assert swept(files, tmp_path / "out", "--set", "evaluation.bootstrap=100") == 1
    assert "90_ablation failed" in capsys.readouterr().out
