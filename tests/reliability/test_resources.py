"""Too little of something: disk, rights, memory, a device; a kernel that dies, a clock that runs backwards."""

import datetime
import errno
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import SafetensorError

from rgalign.__main__ import main
from rgalign.commands import pipeline
from rgalign.params import ROOT, load
from rgalign.reasoner.batches import is_out_of_memory, retry_smaller
from rgalign.run import artifacts, stages
from rgalign.run.artifacts import ArtifactError

SMALL_FILES = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
SMALL_FILES += "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"


def run_code(code: str) -> subprocess.CompletedProcess:
    """The code in a process of its own, whose limits are its own."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


WRITE = {
    "a table": "artifacts.write_table(target, pd.DataFrame({'value': np.random.default_rng(0).random(5000)}))",
    "a text": "artifacts.write_text(target, 'word ' * 5000)",
    "weights": """
        with artifacts.atomic(target) as temporary:
            from safetensors.numpy import save_file
            save_file({'values': np.zeros(5000)}, temporary)
        """,
}


@pytest.mark.parametrize("what", WRITE)
def test_a_full_disk_is_said_with_the_file_and_leaves_the_old_one(tmp_path, what):
    """A limit on the size of files is what a full disk is to a writer: it ends in the middle of a write."""
    target = tmp_path / "artifact"
    target.write_text("old")
    header = "import numpy as np, pandas as pd\nfrom pathlib import Path\nfrom rgalign.run import artifacts\n"
    code = f"{header}target = Path({str(target)!r})\n{SMALL_FILES}{textwrap.dedent(WRITE[what])}"
    done = run_code(code)
    assert "rgalign.run.artifacts.ArtifactError: " in done.stderr, done.stderr
    assert f"{target} cannot be written" in done.stderr
    assert "MiB are free there" in done.stderr
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


@contextmanager
def mounted(folder, options: str):
    """A small file system of memory in the folder's place."""
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]).returncode:
        pytest.skip("this machine lets us mount nothing")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_file_system_is_said_and_the_write_goes_well_once_there_is_room(tmp_path):
    frame = pd.DataFrame({"value": np.random.default_rng(0).random(3_000)})
    with mounted(tmp_path, "size=64k"):
        (tmp_path / "filler").write_bytes(b"0" * 50_000)
        with pytest.raises(ArtifactError, match=r"table\.parquet cannot be written: .*No space left on device"):
            artifacts.write_table(tmp_path / "table.parquet", frame)
        assert [path.name for path in tmp_path.iterdir()] == ["filler"]
        (tmp_path / "filler").unlink()
        artifacts.write_table(tmp_path / "table.parquet", frame)
        assert len(pd.read_parquet(tmp_path / "table.parquet")) == 3_000


@pytest.mark.parametrize("exists", [True, False], ids=["a run", "no run yet"])
def test_read_only_outputs_end_in_one_line_with_the_path(tmp_path, capsys, exists):
    run = tmp_path if exists else tmp_path / "run"
    with mounted(tmp_path, "ro"):
        assert main(["run", "params/smoke.yaml", "--run-dir", str(run)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: [Errno 30] Read-only file system")
    assert str(run) in said


LINKS = {command: ["itself", "a file", "nothing"] for command in ("run", "sweep", "labels", "new")}
LINKS |= {"world": ["itself", "a file"]}  # it makes the folder that is linked to


@pytest.mark.parametrize(("command", "what"), [(command, what) for command in LINKS for what in LINKS[command]])
def test_a_link_that_leads_to_no_folder_ends_in_one_line_with_the_path(tmp_path, capsys, monkeypatch, command, what):
    monkeypatch.setattr(pipeline, "execute", lambda *_, **__: pytest.fail("a stage was run"))
    place = tmp_path / "place"
    (tmp_path / "a file").write_text("kept")
    place.symlink_to(place if what == "itself" else tmp_path / what)
    given = {
        "run": ["params/smoke.yaml", "--run-dir", str(place)],
        "sweep": ["params/smoke.yaml", "--seeds", "1", "--out", str(place)],
        "world": [str(place), "--set", "sessions=200"],
        "labels": [str(place), str(tmp_path / "sheet.csv")],
    }
    assert main([command, *given.get(command, [str(place)])]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert str(place) in said
    assert (tmp_path / "a file").read_text() == "kept"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_whoever_says_that_a_disk_is_full_is_understood(tmp_path, error):
    with pytest.raises(ArtifactError, match="free some space"), artifacts.atomic(tmp_path / "x"):
        raise error


def fits(most: int):
    """A job that has memory for so many rows at once; it counts its calls in `tried`."""
    tried = []

    def job(rows):
        tried.append(len(rows))
        if len(rows) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return [row * 10 for row in rows]

    return job, tried


def test_a_batch_that_does_not_fit_is_halved_until_it_does_and_the_log_says_so(caplog):
    job, tried = fits(3)
    with caplog.at_level(logging.WARNING):
        parts = list(retry_smaller(job, range(10), "embed"))
    assert [value for _, values in parts for value in values] == [row * 10 for row in range(10)]
    assert [row for rows, _ in parts for row in rows] == list(range(10))
    assert tried == [10, 5, 2, 3, 5, 2, 3]
    assert "embed: out of memory with 10 rows at once; going on with 5" in caplog.text


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: out of memory",
        "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8",
    ],
)
def test_whoever_finds_no_room_says_it_in_its_own_words(words):
    assert is_out_of_memory(RuntimeError(words))
    assert not is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"))


def test_a_row_that_does_not_fit_alone_and_other_errors_are_raised_as_they_are():
    with pytest.raises(torch.OutOfMemoryError):
        list(retry_smaller(fits(0)[0], range(4), "embed"))

    def broken(rows):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        list(retry_smaller(broken, range(4), "embed"))


@pytest.mark.slow
def test_a_process_without_memory_says_so(tmp_path):
    """The CPU's allocator is halved for too; what can not be halved ends with torch's own words, not in silence."""
    code = """
        import resource
        import torch
        from rgalign.reasoner.batches import retry_smaller
        pages = int(open("/proc/self/statm").read().split()[0])
        limit = pages * resource.getpagesize() + (400 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        def job(rows):
            return torch.empty(len(rows), 1 << 22).shape[0]
        print([len(rows) for rows, _ in retry_smaller(job, range(64), "embed")])
        """
    done = run_code(code)
    assert done.returncode == 0, done.stderr
    sizes = json.loads(done.stdout)
    assert sum(sizes) == 64
    assert len(sizes) > 1
    assert "embed: out of memory with 64 rows at once; going on with 32" in done.stderr


def test_a_device_that_is_not_there_is_refused_before_anything_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command = ["run", "params/smoke.yaml", "--run-dir", str(tmp_path / "run"), "--set", "run.device=cuda"]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "run.device is cuda, and torch finds none on this machine; set run.device to auto" in said
    assert not (tmp_path / "run").exists()


def test_a_clock_that_runs_backwards_changes_nothing(tmp_path, monkeypatch):
    """What has run is told by digests: a stage of tomorrow, or of 1970, is not run again for it."""
    stage = stages.open_stage("01_data", "params/smoke.yaml", tmp_path)
    for name in stage.stage.writes:
        artifacts.write_text(tmp_path / name, name)

    class Backwards(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime(1970, 1, 1, tzinfo=tz)

    monkeypatch.setattr(stages.datetime, "datetime", Backwards)
    stage.finish()
    for path in tmp_path.rglob("*"):
        os.utime(path, (2**32, 2**32))
    params = load("params/smoke.yaml")
    assert stages.reason_to_run(tmp_path, stages.STAGES["01_data"], params) is None
    assert artifacts.read_manifest(tmp_path)["stages"]["01_data"]["seconds"] >= 0


@pytest.fixture
def in_a_terminal():
    """A shell that starts something in the background has Ctrl-C ignored there."""
    was = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, was)


@pytest.mark.usefixtures("in_a_terminal")
def test_being_asked_to_end_is_as_a_ctrl_c_in_the_terminal(capsys, monkeypatch, tmp_path):
    """SIGTERM and SIGHUP stop in order, say how to go on, and leave the handlers as they were."""
    before = signal.getsignal(signal.SIGTERM)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        monkeypatch.setattr(pipeline, "execute", lambda *_, number=number, **__: os.kill(os.getpid(), number))
        monkeypatch.setattr("rgalign.commands.runs.print_results", lambda _: time.sleep(10))
        assert main(["run", "params/smoke.yaml", "--run-dir", str(tmp_path)]) == 128 + number
        assert "Give the same command again" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
