"""`fork`: what a copy keeps, what it runs again, and that no notebook opened by hand changes a finished run."""

import pytest

from rgalign.__main__ import main
from rgalign.commands import pipeline
from rgalign.params import dump, load, load_run
from rgalign.run import artifacts, locks, stages
from rgalign.run.plan import reads_of

SMOKE = "params/smoke.yaml"
RANDOM = {"alignment.sft.select": "random"}


@pytest.fixture
def finished(tmp_path):
    """A run in which all stages have ended, with contents of no meaning."""
    run, params = tmp_path / "outputs" / "shop", load(SMOKE)
    stages.write_params(run, params)
    for stage in pipeline.chosen():
        for name in stage.writes:
            artifacts.write_text(run / name, name)
        entry = {
            "params": stages.stage_params(stage, params),
            "code": {"rgalign/run/plan.py": artifacts.code_digest("rgalign/run/plan.py")},
            "inputs": {name: artifacts.digest(run / name) for name in reads_of(stage, params)},
            "outputs": {name: artifacts.digest(run / name) for name in stage.writes},
        }
        artifacts.record_stage(run, stage.name, entry | {"seconds": 2, "peak_memory_mb": 1})
        artifacts.write_text(run / "notebooks" / f"{stage.name}.ipynb", "{}")
    return run


def contents(run):
    """Without the files of locks, which stay."""
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and ".lock" not in path.name}


def test_a_copy_keeps_what_the_params_do_not_touch_and_says_what_is_run_again(finished, capsys):
    before = contents(finished)
    assert main(["fork", str(finished), "other", "--set", "alignment.sft.select=random"]) == 0
    new, said = finished.with_name("other"), " ".join(capsys.readouterr().out.split())
    kept = ["01_data", "02_reasoner", "03_rankers", "04_reward_model"]
    assert list(artifacts.read_manifest(new)["stages"]) == kept
    assert load_run(new) == load(SMOKE, RANDOM)
    assert contents(finished) == before
    planned = pipeline.plan(new, load_run(new), pipeline.chosen(), forced=False).set_index("stage")
    assert planned.index[planned.action == "skip"].tolist() == kept
    assert "05_rg_sft params changed: alignment.sft.select best -> random" in said
    assert "06_rg_dpo follows 05_rg_sft" in said
    assert "about 12 s:" in said, "six stages of two seconds"
    assert f"python -m rgalign run {new / 'params.yaml'}" in said
    assert not (new / "notebooks/05_rg_sft.ipynb").exists()
    assert (new / "notebooks/04_reward_model.ipynb").stat().st_nlink == 1, "an edit of the copy's page stays there"


def test_the_params_file_of_a_copy_is_enough_to_find_it(finished):
    assert main(["fork", str(finished), str(finished.with_name("other"))]) == 0
    for name in ("other", "shop"):
        assert artifacts.run_directory("", finished.parent / name / "params.yaml") == finished.with_name(name)
    (finished.parent / "params.yaml").write_text("")  # of no run
    assert artifacts.run_directory("", finished.parent / "params.yaml").name == "params"


def test_what_was_altered_since_or_never_ran_is_run_again(finished, capsys):
    (finished / "models/sft").write_text("altered")
    artifacts.forget_stage(finished, "10_ab_test")
    assert main(["fork", str(finished), "other"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "05_rg_sft output models/sft changed" in said
    assert "10_ab_test has not run" in said
    assert "04_reward_model" not in said


def test_a_copy_needs_a_run_and_a_new_folder_and_keeps_the_seed(finished, capsys):
    for arguments, told in {
        (str(finished), "shop"): f"{finished} is not empty; expected a new folder",
        (str(finished.parent), "x"): "no run in",
        (str(finished), "x", "--set", "run.seed=3"): "run.seed changes every stage",
        (str(finished), "x", "--set", "alignment.sft.selct=1"): "did you mean alignment.sft.select?",
    }.items():
        assert main(["fork", *arguments]) == 1
        assert told in capsys.readouterr().err
    assert not finished.with_name("x").exists()


def test_a_notebook_opened_by_hand_does_not_change_a_finished_run(finished):
    before, new = contents(finished), finished.with_name("shop-2")
    with pytest.raises(artifacts.ArtifactError) as refused:
        stages.open_stage("05_rg_sft", SMOKE, finished, RANDOM)
    said = str(refused.value)
    assert "was made with other params (alignment.sft.select best -> random)" in said
    assert f"python -m rgalign fork {finished} shop-2 --set 'alignment.sft.select=\"random\"'" in said
    assert f'params_file = "{new / "params.yaml"}"' in said
    assert contents(finished) == before
    assert main(["fork", str(finished), "shop-2", "--set", 'alignment.sft.select="random"']) == 0, "it holds no lock"
    opened = stages.open_stage("05_rg_sft", new / "params.yaml")
    assert (opened.run, opened.params.alignment.sft.select) == (new, "random")
    locks.release_stage(new)
    stages.open_stage("05_rg_sft", SMOKE, finished)  # with its own params it may be run again
    locks.release_stage(finished)


def test_a_run_that_changes_its_own_params_and_one_without_results_are_not_refused(finished):
    with locks.locked(finished, "python -m rgalign run"):
        stages.open_stage("05_rg_sft", SMOKE, finished, RANDOM)
        locks.release_stage(finished)
    artifacts.forget_stage(finished, "09_evaluation")
    stages.open_stage("05_rg_sft", SMOKE, finished, {"alignment.sft.epochs": 2})
    locks.release_stage(finished)


def test_one_variable_picks_the_params_of_all_notebooks_opened_by_hand(tmp_path, monkeypatch, capsys):
    shipped, mine = "params/quickstart.yaml", tmp_path / "mine.yaml"
    mine.write_text(dump(load(SMOKE, RANDOM)))
    monkeypatch.setenv("RGALIGN_PARAMS", SMOKE)
    assert stages.open_stage("01_data", shipped, tmp_path / "a").params == load(SMOKE)
    assert capsys.readouterr().out == "params: params/smoke.yaml (RGALIGN_PARAMS)\n"
    assert stages.open_stage("01_data", mine, tmp_path / "b").params == load(mine), "a cell that names a file means it"
    monkeypatch.setattr(stages, "_refuse_unknown_parameters", lambda: {"params_file"})
    assert stages.open_stage("01_data", shipped, tmp_path / "c").params == load(shipped), "and so does papermill"
    for name in "abc":
        locks.release_stage(tmp_path / name)
