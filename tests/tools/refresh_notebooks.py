"""Make the committed notebook outputs again: `make notebooks` (quickstart, for readers), `make references` (nbval).

90 and 91 are executed by hand, since their outputs are those of a study and of a machine:
python tests/tools/refresh_notebooks.py study | benchmarks.

Outputs are executed, never typed; the tests compare with them and never write them.
"""

import shutil
import sys
from pathlib import Path

import nbformat

from rgalign.commands import pipeline
from rgalign.params import ROOT, load
from rgalign.run.stages import Stage

REFERENCES = ROOT / "tests" / "notebooks"
REFERENCE_PARAMETERS = {"params_file": "params/smoke.yaml", "run_dir": "outputs/nbval", "overrides": {}}


def references() -> None:
    """Execute every stage at smoke size and keep the executed copies, parameters injected, for nbval."""
    run = ROOT / REFERENCE_PARAMETERS["run_dir"]
    shutil.rmtree(run, ignore_errors=True)
    _execute(run, REFERENCE_PARAMETERS)
    for stage in pipeline.chosen():
        _keep(run / "notebooks" / f"{stage.name}.ipynb", REFERENCES / f"{stage.name}.ipynb", injected=True)


def for_readers(name: str) -> None:
    """Execute (or reuse) the run of params/<name>.yaml and put its outputs into notebooks/."""
    run = ROOT / "outputs" / name
    _execute(run, {"params_file": f"params/{name}.yaml", "run_dir": "", "overrides": {}})
    for stage in pipeline.chosen():
        notebook = f"{stage.name}.ipynb"
        _keep(run / "notebooks" / notebook, ROOT / "notebooks" / notebook, injected=False)
    _outside_the_sequence("00_tour", f"outputs/{name}")


def benchmarks() -> None:
    """Execute 91 (or reuse its run) and put its outputs, measured on this machine, into notebooks/."""
    _outside_the_sequence("91_benchmarks", "outputs/benchmarks")


def study() -> None:
    """Execute 90 over the runs that a sweep left in outputs/study, or else over the tables that were published, and put
    its outputs into notebooks/."""
    _outside_the_sequence("90_ablation", "outputs/study")


def _outside_the_sequence(name: str, folder: str) -> None:
    parameters = {"params_file": "params/quickstart.yaml", "run_dir": folder, "overrides": {}}
    _execute(ROOT / folder, parameters, pipeline.chosen(name))
    _keep(ROOT / folder / "notebooks" / f"{name}.ipynb", ROOT / "notebooks" / f"{name}.ipynb", injected=False)


def _execute(run: Path, parameters: dict, stages: list[Stage] | None = None) -> None:
    params = load(parameters["params_file"])
    pipeline.execute(run, stages or pipeline.chosen(), parameters, params, forced=False)


def _keep(executed: Path, target: Path, *, injected: bool) -> None:
    """The notebook of notebooks/ with the outputs of its executed copy, without papermill's times and paths.

    Prose is the notebook's own: a stage whose code is unchanged is not executed again when its prose is.
    """
    notebook = nbformat.read(ROOT / "notebooks" / executed.name, as_version=4)
    ran = [cell for cell in nbformat.read(executed, as_version=4).cells if cell.cell_type == "code"]
    given = [cell for cell in ran if "injected-parameters" in cell.metadata.get("tags", [])]
    outputs = iter([cell for cell in ran if cell not in given])
    cells = []
    for cell in notebook.cells:
        cells.append(cell)
        if cell.cell_type == "code":
            same = next(outputs)
            assert same.source == cell.source, f"{executed} is of another {executed.name}: run it again"
            cell.outputs = _last_words(same.outputs)
            cells += given if injected and "parameters" in cell.metadata.get("tags", []) else []
    notebook.cells = cells
    count = 0
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number:02d}"
        tags = cell.metadata.get("tags", [])
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type == "code":
            count += 1
            cell.execution_count = count
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = count
    nbformat.write(notebook, target)
    print(f"wrote {target.relative_to(ROOT)}")


def _last_words(outputs: list) -> list:
    """Outputs with each stream in one piece and without progress bars, which are no reading once they have ended.

    A library's warning that names a folder of this machine is left out.
    """
    kept = []
    for output in outputs:
        if output.output_type == "display_data" and "%|" in output.get("data", {}).get("text/plain", ""):
            continue
        if output.get("name") == "stderr" and str(ROOT) in output.text:
            continue
        if output.output_type == "stream" and kept and kept[-1].get("name") == output.name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    for output in kept:
        if output.output_type == "stream":
            lines = [line.rstrip("\r").rpartition("\r")[2] for line in output.text.split("\n")]
            output.text = "\n".join(line for line in lines if "%|" not in line)
    return [output for output in kept if output.output_type != "stream" or output.text.strip()]


if __name__ == "__main__":
    {"smoke": references, "study": study, "benchmarks": benchmarks}.get(sys.argv[1], lambda: for_readers(sys.argv[1]))()
