"""What an editor does to a notebook: it runs with the parameters it is given, or is refused before a kernel starts."""

import copy
import json
from types import SimpleNamespace

import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from rgalign.commands import pipeline
from rgalign.params import ROOT, load
from rgalign.run import notebook_files
from rgalign.run.plan import STAGES
from rgalign.run.stages import PARAMETERS

pytestmark = pytest.mark.filterwarnings("ignore::nbformat.warnings.MissingIDFieldWarning")
GIVEN = {"params_file": "params/mine.yaml", "run_dir": "outputs/mine", "overrides": {"run.seed": 3}}
SHIPPED = sorted((ROOT / "notebooks").glob("*.ipynb"))
FIRST = "notebooks/01_data.ipynb"


def parameters_cell(notebook):
    return next(cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", []))


def code(source, **metadata):
    return {"cell_type": "code", "metadata": metadata, "source": source, "outputs": [], "execution_count": None}


def tag_lost(notebook):
    parameters_cell(notebook)["metadata"] = {}


def tag_elsewhere(notebook):
    tag_lost(notebook)
    next(cell for cell in notebook["cells"] if cell["cell_type"] == "markdown")["metadata"] = {"tags": ["parameters"]}


def tagged_twice(notebook):
    notebook["cells"].insert(0, copy.deepcopy(parameters_cell(notebook)))


def cell_deleted(notebook):
    notebook["cells"].remove(parameters_cell(notebook))


def copied_below(notebook):
    cells = notebook["cells"]
    cells.insert(cells.index(parameters_cell(notebook)) + 1, code(["run_dir = 'outputs/theirs'\n"]))


def under_a_condition(notebook):
    copied_below(notebook)
    cells = notebook["cells"]
    cells[cells.index(parameters_cell(notebook)) + 1]["source"] = "%matplotlib inline\nif True:\n    run_dir, _ = '', 1"


def name_changed(notebook):
    cell = parameters_cell(notebook)
    cell["source"] = "".join(cell["source"]).replace("run_dir", "run_folder")


def injected_above(notebook):
    notebook["cells"].insert(0, code("# Parameters\nrun_dir = 'outputs/theirs'\n", tags=["injected-parameters"]))


REFUSED = {
    tag_lost: "has 0 cells tagged `parameters`; expected one code cell",
    tag_elsewhere: "has 1 cell tagged `parameters`, a markdown cell",
    tagged_twice: "has 2 cells tagged `parameters`",
    cell_deleted: "has 0 cells tagged `parameters`",
    copied_below: "assigns run_dir in cell",
    under_a_condition: "assigns run_dir in cell",
    name_changed: "has no run_dir in its cell tagged `parameters`",
    injected_above: "has 1 cell tagged `injected-parameters`; expected none, or one below",
}


def no_metadata(notebook):
    notebook["metadata"] = {}


def no_language(notebook):
    notebook["metadata"] = {"kernelspec": {"display_name": ".venv", "name": "python3"}}


def another_kernel(notebook):
    spec = {"display_name": "shop-env", "language": "python", "name": "shop-env"}
    notebook["metadata"] = {"kernelspec": spec, "colab": {"provenance": []}}


def no_ids(notebook):
    for cell in notebook["cells"]:
        cell.pop("id", None)


def sources_as_one_string(notebook):
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])


def executed_before(notebook):
    """A copy that papermill has written is run again."""
    cells = notebook["cells"]
    injected = code("# Parameters\nrun_dir = 'outputs/theirs'\n", tags=["injected-parameters"])
    cells.insert(cells.index(parameters_cell(notebook)) + 1, injected)


RUN = [no_metadata, no_language, another_kernel, no_ids, sources_as_one_string, executed_before]


@pytest.fixture
def bent(tmp_path):
    def write(bend):
        notebook = json.loads((ROOT / FIRST).read_text(encoding="utf-8"))
        bend(notebook)
        path = tmp_path / FIRST
        path.parent.mkdir()
        path.write_text(json.dumps(notebook), encoding="utf-8")
        return path

    return write


def what_papermill_runs_with(path) -> dict:
    """The parameters at the end of all cells that assign some, as papermill puts the notebook together."""
    notebook = parameterize_notebook(load_notebook_node(str(path)), GIVEN, kernel_name="python3", language="python")
    variables = {}
    for cell in notebook.cells:
        if cell.cell_type == "code" and notebook_files.assigned(cell.source) & set(PARAMETERS):
            exec("\n".join(line for line in cell.source.splitlines() if not line.startswith("%")), variables)
    return {name: variables.get(name) for name in GIVEN}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_notebook_can_be_run(path):
    assert not notebook_files.faults(path, PARAMETERS)
    assert what_papermill_runs_with(path) == GIVEN


@pytest.mark.parametrize("bend", RUN, ids=lambda bend: bend.__name__)
def test_what_papermill_can_do_without_is_no_fault(bent, bend):
    path = bent(bend)
    assert not notebook_files.faults(path, PARAMETERS)
    assert what_papermill_runs_with(path) == GIVEN


@pytest.mark.parametrize("bend", REFUSED, ids=lambda bend: bend.__name__)
def test_what_would_run_with_other_parameters_is_refused_by_name_before_a_kernel_starts(bent, bend, monkeypatch):
    path = bent(bend)
    if bend not in (tagged_twice, cell_deleted, name_changed):  # by luck or by another name: an error all the same
        assert what_papermill_runs_with(path) != GIVEN
    monkeypatch.setattr(pipeline, "ROOT", path.parents[1])
    monkeypatch.setattr(pipeline, "Kernels", lambda *_: pytest.fail("a kernel was started"))
    params, stages = load("params/smoke.yaml"), [STAGES["01_data"]]
    run = path.parents[1] / "run"
    for refuse in (
        lambda: pipeline.refuse_unfit(stages, params),
        lambda: pipeline.execute(run, stages, GIVEN, params, forced=True),
    ):
        with pytest.raises(pipeline.StageFailed, match="nothing was") as error:
            refuse()
        assert f"{FIRST}  {REFUSED[bend]}" in str(error.value)
    assert not run.exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xef\xbb\xbf{}", "begins with a byte order mark"),
        ("{}".encode("utf-16"), "is not UTF-8"),
        (b"[]", "is not a notebook of format 4 (found list)"),
        (b'{"nbformat": 3, "nbformat_minor": 0, "metadata": {}, "worksheets": []}', "of format 4 (found 3)"),
        (b'{"nbformat": 4, "nbformat_minor": 5, "metadata": {}}', "is not a notebook ("),
        (b'{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [{"cell_type": "cod"}]}', "is not a notebook"),
        (b'{"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": {"name": "ir", "display_name": "R", '
         b'"language": "R"}}, "cells": []}', "is a notebook of r; expected python"),
    ],
)  # fmt: skip
def test_what_is_no_notebook_is_told(tmp_path, content, told):
    (tmp_path / "n.ipynb").write_bytes(content)
    assert any(told in fault for fault in notebook_files.faults(tmp_path / "n.ipynb", PARAMETERS))


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("a = 1", {"a"}),
        ("a: int = 1\nb += 1", {"a", "b"}),
        ("(a, [b, *c]) = 1, [2]", {"a", "b", "c"}),
        ("for a in b:\n    c = a", {"a", "c"}),
        ("def f():\n    a = 1", set()),
        ("f = lambda a: a", {"f"}),
        ("a == 1; b.c = 2; d[0] = 3", set()),
        ("%time a = 1\nb = 2", {"b"}),
        ("!ls\na = 1", {"a"}),
        ("a = (1\nb = 2", {"a", "b"}),
        ("", set()),
    ],
)
def test_names_that_a_cell_assigns(source, names):
    assert notebook_files.assigned(source) == names


def test_a_tag_that_was_lost_is_told_where_papermill_is_called_by_hand(bent, monkeypatch):
    """By the stage itself, from what IPython has run: papermill puts the parameters on top of all cells."""

    from rgalign.run import stages
    from rgalign.run.artifacts import ArtifactError

    def ran(path):
        notebook = parameterize_notebook(load_notebook_node(str(path)), GIVEN, kernel_name="python3", language="python")
        return ["", *(cell.source for cell in notebook.cells if cell.cell_type == "code")]

    shell = SimpleNamespace(user_ns={"In": ran(SHIPPED[1])})
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    stages._refuse_unknown_parameters()
    shell.user_ns = {"In": ran(bent(tag_lost))}
    with pytest.raises(ArtifactError, match="assigns overrides, params_file, run_dir below what papermill was given"):
        stages._refuse_unknown_parameters()
    cells = ran(SHIPPED[1])
    shell.user_ns = {"In": [*cells, *cells[1:2]]}  # by hand, in an executed copy: the cell is run again, as is meant
    stages._refuse_unknown_parameters()
