"""A run's kernels: each fresh, the next one started ahead, none left."""

import gc
import socket
import tempfile
from pathlib import Path

import nbformat
import papermill
import pytest
from jupyter_client.provisioning.local_provisioner import LocalPortCache
from nbformat.v4 import new_code_cell, new_notebook

from rgalign.commands import pipeline
from rgalign.commands.pipeline import Kernels

pytestmark = pytest.mark.slow


@pytest.fixture
def said(tmp_path, monkeypatch):
    """said(kernel, code): what the last expression of the code shows, executed by papermill in that kernel."""
    monkeypatch.setattr(pipeline, "IMPORTS", ("colorsys",))  # what no kernel imports by itself

    def execute(kernel, code: str) -> str:
        book, out = tmp_path / "book.ipynb", tmp_path / "out.ipynb"
        metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        nbformat.write(new_notebook(cells=[new_code_cell(code)], metadata=metadata), book)
        papermill.execute_notebook(book, out, kernel_name="python3", km=kernel, progress_bar=False)
        (cell,) = nbformat.read(out, as_version=4).cells
        assert cell.execution_count == 1
        return cell.outputs[0]["data"]["text/plain"]

    return execute


def alive(pid: str) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_the_next_kernel_has_imported_and_bound_nothing_and_none_outlives_its_turn(said, tmp_path):
    where = "import os, sys; (os.getpid(), os.getcwd(), 'colorsys' in sys.modules, 'colorsys' in dir(), "
    where += "get_ipython().history_manager.hist_file)"  # not the user's
    with Kernels(tmp_path) as kernels:
        with kernels.one(more=True) as first:
            told_first = eval(said(first, where))
        assert not alive(told_first[0])
        with kernels.one(more=False) as second:
            told_second = eval(said(second, where))
    assert told_first[1:] == (str(tmp_path), False, False, ":memory:")
    assert told_second[1:] == (str(tmp_path), True, False, ":memory:")
    assert not alive(told_second[0])


def test_a_port_that_another_process_took_since_it_was_found_free_does_a_kernel_no_harm(said, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken, Kernels(tmp_path) as kernels:
        port = taken.getsockname()[1]
        monkeypatch.setattr(LocalPortCache, "find_available_port", lambda *_: port)  # jupyter_client's look for one
        with kernels.one(more=False) as kernel:
            assert said(kernel, "1 + 1") == "2"


def test_sockets_lie_in_a_short_private_folder_that_goes_with_the_kernel_that_waited(said, tmp_path, monkeypatch):
    deep = tmp_path / ("long" * 20)  # no socket's path would fit in there
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with Kernels(tmp_path) as kernels, kernels.one(more=True) as kernel:
        assert said(kernel, "1 + 1") == "2"
        folder = Path(kernel.connection_file).parent
        assert folder.parent == Path("/tmp")
        assert folder.stat().st_mode & 0o777 == 0o700
        assert len([path for path in folder.glob("1-*") if path.is_socket()]) == 5
        waiting = kernels._waiting
        assert waiting.has_kernel
    assert not waiting.has_kernel
    assert not folder.exists()


def test_a_run_that_is_stopped_leaves_no_socket(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(pipeline, "LONGEST", len(str(tmp_path)))

    def stopped() -> None:
        with Kernels(tmp_path) as kernels, kernels.one(more=True) as kernel:
            assert Path(kernel.connection_file).is_relative_to(tmp_path)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert not list(tmp_path.iterdir())


def test_a_client_that_is_deleted_leaves_its_context_open(tmp_path):
    """It would wait there for the sockets that nbclient leaves open when it is interrupted, for ever."""
    with Kernels(tmp_path) as kernels, kernels.one(more=False) as kernel:
        client = kernel.client()
        context = client.context
        del client
        gc.collect()
        assert not context.closed
