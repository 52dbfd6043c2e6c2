"""A run's kernels: each fresh, the next one started ahead, none left."""

from pathlib import Path

import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from rgalign import kernels as rooms
from rgalign.kernels import Kernels


@pytest.fixture
def said(tmp_path, monkeypatch):
    """said(kernel, code): what the last expression of the code shows, executed by papermill in that kernel."""
    monkeypatch.setattr(rooms, "IMPORTS", ("colorsys",))  # what no kernel imports by itself

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
    where = "import os, sys; (os.getpid(), os.getcwd(), 'colorsys' in sys.modules, 'colorsys' in dir())"
    with Kernels(tmp_path) as kernels:
        with kernels.one(more=True) as first:
            told_first = eval(said(first, where))
        assert not alive(told_first[0])
        with kernels.one(more=False) as second:
            told_second = eval(said(second, where))
    assert told_first[1:] == (str(tmp_path), False, False)
    assert told_second[1:] == (str(tmp_path), True, False)
    assert not alive(told_second[0])


def test_a_kernel_that_waits_for_nothing_is_ended(said, tmp_path):
    with Kernels(tmp_path) as kernels:
        with kernels.one(more=True):
            pass
        waiting = kernels._waiting
        assert waiting.has_kernel
    assert not waiting.has_kernel


def test_what_a_run_executes_is_not_in_the_users_history(said, tmp_path):
    with Kernels(tmp_path) as kernels, kernels.one(more=False) as kernel:
        assert said(kernel, "get_ipython().history_manager.hist_file") == "':memory:'"
