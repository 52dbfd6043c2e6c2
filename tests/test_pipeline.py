"""The pipeline on toy notebooks: what is run, what is skipped, and how a failure is told."""

import json
import logging
import os
import platform
import subprocess

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

import rgalign
from rgalign.__main__ import main
from rgalign.commands import pipeline
from rgalign.params import ROOT, load
from rgalign.run import artifacts, locks
from rgalign.run.stages import Stage

TOY = Stage("01_toy", reads=(), writes=("tables/toy.txt",), params=("run.seed",))
FINISH = """
from pathlib import Path
from rgalign.run import artifacts, locks
artifacts.write_text(Path(run_dir) / "tables/toy.txt", "toy")
artifacts.record_stage(Path(run_dir), "01_toy", {
    "params": {"run.seed": 0}, "code": {}, "inputs": {}, "seconds": 1, "peak_memory_mb": 1,
    "outputs": {"tables/toy.txt": artifacts.digest(Path(run_dir) / "tables/toy.txt")},
})
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A project of one notebook; `toy(cells)` writes it and returns a function that executes it in tmp_path/run."""
    monkeypatch.setattr(pipeline, "ROOT", tmp_path)
    (tmp_path / "notebooks").mkdir()

    def write(*sources: str):
        cells = [new_code_cell("run_dir = ''", metadata={"tags": ["parameters"]}), *map(new_code_cell, sources)]
        metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        nbformat.write(new_notebook(cells=cells, metadata=metadata), tmp_path / "notebooks" / "01_toy.ipynb")
        run = tmp_path / "run"
        return lambda: pipeline.execute(run, [TOY], {"run_dir": str(run)}, load("params/smoke.yaml"), forced=False)

    return write


def test_a_stage_runs_once_and_is_then_skipped(toy, tmp_path, capsys):
    execute = toy(FINISH)
    execute()
    execute()
    printed = capsys.readouterr().out.splitlines()
    assert printed == ["toy: running, about 5 s left", "toy: done in 1 s, 1 MiB", "toy: unchanged, skipped"]
    folder = tmp_path / "run" / "notebooks"
    assert sorted(p.name for p in folder.iterdir()) == ["01_toy.html", "01_toy.ipynb"]
    executed = json.loads((folder / "01_toy.ipynb").read_text())
    assert all(c["execution_count"] for c in executed["cells"] if c["cell_type"] == "code")


def test_a_failing_cell_is_named_with_its_error_copy_and_log(toy, tmp_path):
    execute = toy("1 + 1", "raise KeyError('no such intent')", FINISH)
    with pytest.raises(pipeline.StageFailed) as error:
        execute()
    message = str(error.value)
    copy, log = tmp_path / "run/notebooks/01_toy.failed.ipynb", tmp_path / "run/logs/01_toy.log"
    assert "notebooks/01_toy.ipynb failed in cell 4" in message  # parameters, injected, 1 + 1, raise
    assert "KeyError: 'no such intent'" in message
    for path in (copy, log):
        assert str(path) in message
        assert path.is_file()
    assert not (tmp_path / "run/notebooks/01_toy.ipynb").exists()


def test_a_run_that_is_removed_while_it_runs_is_told_and_no_file_is_named_that_is_gone(toy, tmp_path):
    execute = toy("import shutil; shutil.rmtree(run_dir)", FINISH)
    with pytest.raises(pipeline.StageFailed) as error:
        execute()
    assert f"{tmp_path / 'run'} was removed while it ran" in str(error.value)
    assert "executed copy" not in str(error.value)


def test_a_notebook_that_is_not_there_is_told_before_an_earlier_one_runs(toy, tmp_path, capsys, monkeypatch):
    toy(FINISH)
    monkeypatch.setattr(pipeline, "execute", lambda *_, **__: pytest.fail("a stage was run"))
    for command in (
        ["run", "params/smoke.yaml", "--run-dir", str(tmp_path / "run")],
        ["sweep", "params/smoke.yaml", "--seeds", "1", "--out", str(tmp_path / "run")],
    ):
        assert main([*command, "--through", "02"]) == 1
        said = capsys.readouterr().err
        assert f"{tmp_path} lacks notebooks/01_data.ipynb, notebooks/02_reasoner.ipynb; nothing was run" in said
    assert not (tmp_path / "run").exists()


def test_a_kernel_that_dies_is_explained(toy):
    execute = toy("import os; os._exit(9)", FINISH)
    with pytest.raises(pipeline.StageFailed, match=r"kernel died .*memory ran out"):
        execute()


def test_a_notebook_that_never_finishes_its_stage_has_failed(toy):
    with pytest.raises(pipeline.StageFailed, match=r"without stage\.finish"):
        toy("1 + 1")()


def test_an_error_after_the_stages_end_is_no_success(toy, tmp_path):
    """The manifest's entry was there, the notebook was not: the stage would have passed for done."""
    with pytest.raises(pipeline.StageFailed, match="after the end"):
        toy(FINISH, "raise KeyError('after the end')")()
    assert artifacts.read_manifest(tmp_path / "run")["stages"] == {}


def test_a_stage_killed_between_its_entry_and_its_notebook_runs_again(toy, tmp_path, capsys):
    execute = toy(FINISH)
    execute()
    folder = tmp_path / "run/notebooks"
    (folder / "01_toy.ipynb").rename(folder / ".01_toy.part.ipynb")
    capsys.readouterr()
    execute()
    assert capsys.readouterr().out.splitlines()[0] == f"toy: running ({pipeline.INTERRUPTED}), about 5 s left"
    assert sorted(path.name for path in folder.iterdir()) == ["01_toy.html", "01_toy.ipynb"]


def test_what_a_killed_run_left_goes_and_a_page_that_it_did_not_write_comes(toy, tmp_path, capsys):
    execute = toy(FINISH)
    execute()
    run = tmp_path / "run"
    page = (run / "notebooks/01_toy.html").read_bytes()
    (run / "notebooks/01_toy.html").unlink()
    for left in (".params.part.yaml", "tables/..dataset.part.1f.part", "models/.rankers.part", "figures/x/.y.part.png"):
        (run / left).mkdir(parents=True)
    capsys.readouterr()
    execute()
    assert capsys.readouterr().out.splitlines() == ["toy: unchanged, skipped"]
    assert (run / "notebooks/01_toy.html").read_bytes() == page
    assert not [path for path in run.rglob("*") if ".part" in path.name]


def test_a_plan_says_what_would_run_and_why(tmp_path):
    table = pipeline.plan(tmp_path, load("params/smoke.yaml"), pipeline.chosen(), forced=False)
    assert list(table.action) == ["run"] * len(pipeline.chosen())
    assert table.why.iloc[0] == "has not run"
    assert (table.seconds > 0).all()


@pytest.mark.parametrize("name", ["03", "3", "03_rankers"])
def test_a_stage_goes_by_name_or_number(name):
    assert pipeline.stage_named(name).name == "03_rankers"


def test_from_and_through_cut_the_sequence_and_benchmarks_run_alone():
    names = [stage.name for stage in pipeline.chosen()]
    assert [s.name for s in pipeline.chosen("03", "03")] == ["03_rankers"]
    assert [s.name for s in pipeline.chosen("03")] == names[names.index("03_rankers") :]
    assert [s.name for s in pipeline.chosen("91")] == ["91_benchmarks"]
    assert "91_benchmarks" not in names


def test_an_unknown_stage_lists_the_known_ones(capsys):
    assert main(["run", "params/smoke.yaml", "--from", "33", "--dry-run"]) == 1
    assert "01_data, 02_reasoner, 03_rankers" in capsys.readouterr().err


def test_a_wrong_parameter_ends_before_anything_is_written(capsys, tmp_path):
    run = tmp_path / "run"
    assert main(["run", "params/smoke.yaml", "--run-dir", str(run), "--set", "ranker.seds=[1]"]) == 1
    assert "did you mean ranker.seeds?" in capsys.readouterr().err
    assert not run.exists()


def test_a_dry_run_writes_nothing(capsys, tmp_path):
    assert main(["run", "params/smoke.yaml", "--run-dir", str(tmp_path / "run"), "--dry-run"]) == 0
    assert "01_data" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_status_of_no_run_says_how_to_start_one(capsys, tmp_path):
    assert main(["status", str(tmp_path)]) == 1
    assert "python -m rgalign run" in capsys.readouterr().err


def test_an_unknown_command_names_the_nearest_one_and_the_version_is_told(capsys):
    for given, said in {"stauts": "stauts is not a command; did you mean status?", "xyz": "one of new, run,"}.items():
        with pytest.raises(SystemExit) as ended:
            main([given, "outputs/x"])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"rgalign {rgalign.__version__}\n"


def test_a_log_has_no_carriage_return_and_a_bar_a_minute(tmp_path):
    with pipeline._log_file(tmp_path / "x.log") as path:
        logger = logging.getLogger("papermill")
        for step in range(50):
            logger.warning(f"\rtraining: {step}/50")
        logger.warning("\rtraining: 50/50\nthe loss rises\n")
        logger.info("a table")
    lines = [line.split(" ", 2)[2] for line in path.read_text().splitlines()]
    assert lines == ["training: 0/50", "the loss rises", "a table"]


def test_a_stage_that_takes_long_says_so_where_there_is_no_terminal(toy, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "MINUTE", 0.2)
    toy("import time; time.sleep(1)", FINISH)()
    assert "toy: has been running for " in capsys.readouterr().out


@pytest.mark.parametrize(("seconds", "said"), [(5.4, "5 s"), (89, "89 s"), (150, "2 min"), (5400, "1.5 hours")])
def test_a_time_is_told_as_people_say_it(seconds, said):
    assert pipeline.span(seconds) == said


def test_titles_are_the_words_of_the_field_and_places_those_of_the_run():
    params = load("params/smoke.yaml")
    labels = [pipeline.label(stage, params) for stage in pipeline.chosen("04")]
    assert labels[0] == "[4/10] reward model"
    assert labels[1:4] == ["[5/10] RG-SFT", "[6/10] RG-DPO", "[7/10] RG-CL"]
    assert labels[-1] == "[10/10] A/B test"
    none = load("params/smoke.yaml", {"alignment.loop.rounds": 0})
    assert pipeline.label(pipeline.stage_named("09"), none) == "[4/5] evaluation"
    assert pipeline.label(pipeline.stage_named("91"), params) == "benchmarks"


def test_status_says_who_runs_what(tmp_path):
    artifacts.write_text(tmp_path / "params.yaml", (ROOT / "params/smoke.yaml").read_text())
    with locks.locked(tmp_path, "python -m rgalign run params/smoke.yaml"):
        line = pipeline.status(tmp_path)[1]
        assert line.startswith("running: python -m rgalign run params/smoke.yaml since ")
        locks.hold_stage(tmp_path, "01_data")
        table, line = pipeline.status(tmp_path)
        assert table.state.head(2).tolist() == ["running", "has not run"]
        assert line.startswith("running: 01_data since ")
        assert line.endswith(f"by process {os.getpid()} on {platform.node()}; next: 02_reasoner")
        locks.release_stage(tmp_path)
    assert pipeline.status(tmp_path)[1].startswith("nothing is running; next: 01_data")
    gone = subprocess.Popen(["true"])
    gone.wait()
    left = {"process": gone.pid, "machine": platform.node(), "since": "?", "doing": "03_rankers"}
    locks.owner_file(tmp_path / locks.STAGE).write_text(json.dumps(left))  # of a killed process
    assert pipeline.status(tmp_path)[1].startswith("nothing is running")


def test_status_lists_every_stage(capsys, tmp_path):
    artifacts.write_text(tmp_path / "params.yaml", (ROOT / "params/smoke.yaml").read_text())
    table, line = pipeline.status(tmp_path)
    assert list(table.state) == ["has not run"] * len(pipeline.chosen())
    assert line == f"nothing is running; next: 01_data (python -m rgalign run {tmp_path / 'params.yaml'})"
