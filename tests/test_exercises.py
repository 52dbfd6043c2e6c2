"""Every notebook ends with exercises; the code of each hidden solution runs on a finished run as it stands."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import small_run

from rgalign.commands import pipeline
from rgalign.params import ROOT
from rgalign.run.plan import STAGES
from rgalign.run.stages import open_stage

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
STUDY = ROOT / "outputs" / "published" / "study"
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def last_cell(path: Path) -> str:
    cell = json.loads(path.read_text(encoding="utf-8"))["cells"][-1]
    assert cell["cell_type"] == "markdown"
    return "".join(cell["source"])


def solutions(path: Path) -> list[str]:
    return re.findall(r"<details><summary>Solution</summary>\n\n(.*?)\n\n</details>", last_cell(path), re.S)


@by_name
def test_a_notebook_ends_with_two_or_three_exercises_and_where_to_read_on(path):
    text = last_cell(path)
    questions = re.findall(r"^\*\*\d\.\*\*", text, re.M)
    assert len(questions) in (2, 3)
    assert len(solutions(path)) == text.count("<details>") == len(questions)
    assert "**Read on:**" in text
    sequence, links = [own.stem for own in NOTEBOOKS], r"\*\*{}:\*\* \[`(\w+)`\]\(\1\.ipynb\)"
    place = sequence.index(path.stem)
    assert re.findall(links.format("Next"), text) == sequence[place + 1 :][:1]
    assert re.findall(links.format("Previous"), text) == sequence[:place][-1:]


@by_name
def test_solutions_stay_hidden_in_the_exported_page(path, tmp_path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    notebook["cells"] = notebook["cells"][-1:]
    (tmp_path / path.name).write_text(json.dumps(notebook), encoding="utf-8")
    pipeline._export_html(tmp_path / path.name)
    page = (tmp_path / path.name).with_suffix(".html").read_text(encoding="utf-8")
    hidden = re.findall(r"<details><summary>Solution</summary>(.*?)</details>", page, re.S)
    assert len(hidden) == len(solutions(path))
    assert all("<p>" in text for text in hidden)
    assert sum(text.count('class="highlight"') for text in hidden) == last_cell(path).count("```python")


@pytest.mark.slow
@by_name
def test_solutions_run_after_the_notebook(path, request, capsys):
    """A solution uses what it makes itself, pandas, and the notebook's stage (91's are of no run)."""
    code = [block for text in solutions(path) for block in re.findall(r"```python\n(.*?)```", text, re.S)]
    variables = {"pd": pd}
    if path.stem != "91_benchmarks":
        variables["stage"] = study() if path.stem == "90_ablation" else stage(path.stem, request)
    for block in code:
        exec(block, variables)
    assert capsys.readouterr().out.count("\n") >= len(code)


def stage(name: str, request):
    run, overrides = request.getfixturevalue("aligned_run")
    return open_stage(name, small_run.SMOKE, run, small_run.SMALL | overrides)


def study() -> SimpleNamespace:
    """The published study: a sweep of worlds takes hours."""

    def read(artifact: str) -> pd.DataFrame:
        assert artifact in STAGES["90_ablation"].writes
        return pd.read_parquet(STUDY / Path(artifact).name)

    return SimpleNamespace(read=read)
