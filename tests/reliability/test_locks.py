"""Two runs in one directory: the second is refused with the first one's process and time; a lock can not go stale."""

import json
import os
import re
import signal
import subprocess
import sys
import threading

import pytest

from rgalign.__main__ import main
from rgalign.run import artifacts, locks, stages
from rgalign.run.artifacts import ArtifactError

HOLD = """
import sys, time
from pathlib import Path
from rgalign.run import locks
run = Path(sys.argv[1])
if sys.argv[2] == "run":
    with locks.locked(run, "a night's run"):
        print("held", flush=True)
        time.sleep(60)
locks.hold_stage(run, "03_rankers")
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """`other("run" or "stage")`: another process that holds that lock of tmp_path, until it is killed."""
    started = []

    def hold(what: str) -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path), what], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.wait()


def test_a_second_run_is_refused_with_owner_and_time_and_touches_nothing(tmp_path, other, capsys):
    owner = other("run")
    before = sorted(tmp_path.iterdir())
    assert main(["run", "params/smoke.yaml", "--run-dir", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert f"{tmp_path} is in use: a night's run by process {owner.pid} on " in said
    assert re.search(r"since \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", said)
    assert "give another --run-dir" in said
    assert sorted(tmp_path.iterdir()) == before


def test_a_notebook_by_hand_does_not_write_into_a_running_run(tmp_path, other):
    other("run")
    with pytest.raises(ArtifactError, match="is in use: a night's run"):
        stages.open_stage("01_data", "params/smoke.yaml", tmp_path)


def test_two_notebooks_of_one_run_are_not_open_at_once(tmp_path, other):
    owner = other("stage")
    with pytest.raises(ArtifactError, match=f"03_rankers by process {owner.pid}"):
        stages.open_stage("01_data", "params/smoke.yaml", tmp_path)


def test_a_killed_owner_leaves_nothing_that_keeps_others_out(tmp_path, other):
    for what in ("run", "stage"):
        owner = other(what)
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    left = {locks.RUN, locks.STAGE}
    assert {path.name for path in tmp_path.iterdir()} == left | {f"{locks.STAGE}.json"}
    with locks.locked(tmp_path, "the next"):
        assert json.loads(locks.owner_file(tmp_path / locks.RUN).read_text())["process"] == os.getpid()
    assert {path.name for path in tmp_path.iterdir()} == left, "owner files go, lock files stay"


def test_a_run_waits_for_the_kernel_of_a_killed_one(tmp_path, other, monkeypatch):
    owner = other("stage")
    monkeypatch.setattr(locks, "PATIENCE", 0.3)
    with pytest.raises(ArtifactError, match="shut its kernel down"), locks.locked(tmp_path, "the next"):
        pass
    monkeypatch.setattr(locks, "PATIENCE", 30)
    threading.Timer(0.3, owner.kill).start()
    with locks.locked(tmp_path, "the next"):
        assert owner.wait() != 0


def test_the_same_process_may_go_in_twice_and_out(tmp_path):
    with locks.locked(tmp_path, "a sweep"), locks.locked(tmp_path, "its run"):
        assert "a sweep" in locks.owner_file(tmp_path / locks.RUN).read_text()
    assert not locks.owner_file(tmp_path / locks.RUN).exists()


def test_a_finished_stage_lets_others_in(tmp_path):
    stage = stages.open_stage("01_data", "params/smoke.yaml", tmp_path)
    assert json.loads(locks.owner_file(tmp_path / locks.STAGE).read_text())["doing"] == "01_data"
    for name in stage.stage.writes:
        artifacts.write_text(tmp_path / name, name)
    stage.finish()
    assert [path.name for path in tmp_path.glob(".*")] == [locks.STAGE]


def test_a_run_of_another_version_is_refused_with_the_command_to_type(tmp_path, capsys):
    (tmp_path / artifacts.MANIFEST).write_text('{"version": 0, "stages": {}}')
    assert main(["run", "params/smoke.yaml", "--run-dir", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert f"{tmp_path} was made by another version of this code (its layout is 0; this code writes 1)" in said
    assert f"python -m rgalign run {tmp_path}/params.yaml --run-dir {tmp_path}-new" in said


@pytest.mark.parametrize("command", ["status", "report"])
def test_params_of_another_version_are_named_with_their_run(tmp_path, capsys, command):
    (tmp_path / "params.yaml").write_text("run: {seed: 0, an_older_key: 3}\n")
    entry = {"params": {}, "code": {}, "inputs": {}, "outputs": {}, "seconds": 1, "peak_memory_mb": 1}
    (tmp_path / artifacts.MANIFEST).write_text(json.dumps({"stages": {"09_evaluation": entry}}))
    assert main([command, str(tmp_path)]) == 1
    said = capsys.readouterr().err
    for words in (f"{tmp_path}/params.yaml", "run.an_older_key", "made by another version", "python -m rgalign run"):
        assert words in said
