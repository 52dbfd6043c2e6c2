"""The notebooks keep to the house style, and nbval's references are executed copies of them that compare something.

nbval passes a cell that was never run and has no output; the guard here does not.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rgalign.params import ROOT
from rgalign.run.stages import PARAMETERS, STAGES

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
REFERENCES = sorted((ROOT / "tests" / "notebooks").glob("*.ipynb"))
OPEN_TEST = {"09_evaluation", "10_ab_test", "90_ablation"}
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
by_reference = pytest.mark.parametrize("path", REFERENCES, ids=lambda p: p.stem)


def cells(path: Path, *, code: bool = True) -> list[dict]:
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [c for c in found if (c["cell_type"] == "code") == code and "".join(c["source"]).strip()]


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def source(cell: dict) -> str:
    return "".join(cell["source"])


@by_name
def test_the_first_cell_says_what_one_learns_and_how_long_it_takes(path):
    first = source(cells(path, code=False)[0])
    assert "You learn" in first
    assert "It takes" in first


@by_name
def test_the_parameters_cell_holds_the_three_literals_and_nothing_else(path):
    (cell,) = (c for c in cells(path) if "parameters" in tags(c))
    assigned = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(source(cell)).body}
    assert tuple(assigned) == PARAMETERS
    folders = {"90_ablation": "outputs/study", "91_benchmarks": "outputs/benchmarks"}  # of no params file's own
    assert assigned["run_dir"] == folders.get(path.stem, "")


@by_name
def test_cells_are_short_and_hold_no_classes(path):
    assert len(cells(path)) <= 28
    for cell in cells(path):
        assert source(cell).count("\n") < 18, source(cell)
        assert "class " not in source(cell)


@by_name
def test_only_the_evaluation_opens_the_test_split_or_the_truth(path):
    if path.stem in OPEN_TEST or path.stem.startswith("91"):
        return
    text = "\n".join(source(c) for c in cells(path))
    assert "truth" not in text
    for line in re.findall(
        r'.*"test".*', text
    ):  # 01 encodes the split, as a folder of its own, and shows nothing of it
        assert path.stem == "01_data", line
        assert "encoded_test" in line


@by_name
def test_committed_notebooks_were_executed_to_the_end(path):
    counts = [cell["execution_count"] for cell in cells(path)]
    assert counts == list(range(1, len(counts) + 1))
    assert not [o for cell in cells(path) for o in cell["outputs"] if o["output_type"] == "error"]


def test_every_stage_notebook_has_a_reference():
    assert {p.stem for p in REFERENCES} == {name for name, stage in STAGES.items() if stage.in_sequence}


@by_reference
def test_references_are_copies_of_the_notebooks(path):
    own = [c for c in cells(path) if "injected-parameters" not in tags(c)]
    original = cells(ROOT / "notebooks" / path.name)
    assert [source(c) for c in own] == [source(c) for c in original], "run: make references"
    assert [tags(c) for c in own] == [tags(c) for c in original]
    prose = [[source(c) for c in cells(each, code=False)] for each in (path, ROOT / "notebooks" / path.name)]
    assert prose[0] == prose[1], "run: make references"


@by_reference
def test_every_reference_cell_ran_and_every_compared_cell_has_an_output(path):
    for cell in cells(path):
        assert cell["execution_count"] is not None, source(cell)
        assert not [o for o in cell["outputs"] if o["output_type"] == "error"]
        if not {"parameters", "injected-parameters", "nbval-ignore-output"} & set(tags(cell)):
            assert cell["outputs"], f"nbval would compare nothing here:\n{source(cell)}"


@pytest.mark.parametrize("path", [*NOTEBOOKS, *REFERENCES], ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_outputs_bear_no_path_and_no_time_of_a_machine(path):
    text = path.read_text(encoding="utf-8")
    assert str(ROOT) not in text
    assert str(Path.home()) not in text
    assert "papermill" not in json.loads(text)["metadata"]


@pytest.mark.slow
def test_an_altered_number_in_a_reference_fails(tmp_path):
    """Mutation: were one figure of a compared table another, nbval would have to say so."""
    notebook = json.loads((ROOT / "tests" / "notebooks" / "01_data.ipynb").read_text(encoding="utf-8"))
    code = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    (injected,) = (c for c in code if "injected-parameters" in tags(c))
    injected["source"] = source(injected).replace("outputs/nbval", str(tmp_path / "run"))
    (table,) = (c for c in code if source(c).endswith("describe.overview(shop)"))
    for output in table["outputs"]:
        for kind, lines in output["data"].items():
            text = "".join(lines)
            number = re.search(r"(?<![\d.])[1-9]\d{2,}(?![\d.])", text)
            output["data"][kind] = text.replace(number[0], str(int(number[0]) + 1), 1)
    altered = tmp_path / "01_data.ipynb"
    altered.write_text(json.dumps(notebook), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-p", "no:cacheprovider", str(altered)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1, done.stdout
    assert re.search(r"\b1 failed", done.stdout), done.stdout
