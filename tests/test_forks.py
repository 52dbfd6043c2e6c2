"""Processes forked by a server that has imported the libraries: those of any other start, and gone with who asked."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from rgalign.run import forks

pytestmark = pytest.mark.skipif(not forks.supported(), reason="no server here: processes are started anew")


def gone(pid: int) -> bool:
    until = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < until:
        time.sleep(0.01)
    return not Path(f"/proc/{pid}").exists()


@pytest.fixture(scope="module")
def address():
    with tempfile.TemporaryDirectory() as folder, forks.server(Path(folder) / "forks", {}):
        yield str(Path(folder) / "forks")


def script(address: str, *arguments: str, **how) -> subprocess.Popen:
    command = [sys.executable, "-I", "-S", forks.__file__, address, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **how)


def test_a_process_sees_the_callers_folder_and_environment_and_has_the_libraries(address, tmp_path):
    (tmp_path / "shown.py").write_text("import os, sys; print(os.getcwd(), os.environ['MARK'], 'peft' in sys.modules)")
    process = script(address, "shown", cwd=tmp_path, env={**os.environ, "MARK": "here"})
    assert process.communicate(timeout=60)[0].split() == [str(tmp_path), "here", "True"]


def test_tables_are_shown_as_in_a_notebook(address, tmp_path):
    """Whole, and not cut to the width of a terminal that the server does not have."""
    shown = "import pandas as pd; print(pd.DataFrame([range(10**8, 10**8 + 19)]), pd.get_option('display.max_columns'))"
    (tmp_path / "wide.py").write_text(shown)
    said = script(address, "wide", cwd=tmp_path).communicate(timeout=60)[0]
    assert "..." not in said
    assert said.split()[-1] == "20"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_ends_with_who_asked_for_it(address, tmp_path, number):
    (tmp_path / "lasting.py").write_text("import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    process = script(address, "lasting", cwd=tmp_path)
    pid = int(process.stdout.readline())
    process.send_signal(number)
    assert gone(pid)
    process.communicate(timeout=20)


def test_nothing_that_it_forked_outlives_the_server(tmp_path):
    with tempfile.TemporaryDirectory() as folder, forks.server(Path(folder) / "forks", {}):
        connection = forks.fork(str(Path(folder) / "forks"), ["timeit", "-n", "1", "import time; time.sleep(600)"])
        pid = int(connection.makefile().readline())
        assert Path(f"/proc/{pid}").exists()
    assert gone(pid)
    connection.close()


def test_there_is_no_server_beside_a_gpu(tmp_path, monkeypatch):
    """An import may begin to use it, and no forked process could then."""
    monkeypatch.setattr(forks, "GPUS", (str(tmp_path),))
    assert not forks.supported()
