"""docs/own-logs.md works from its first block to its last, as a new user would type it."""

import contextlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from rgalign.evaluation.results import UNTRAINED
from rgalign.params import ROOT, flat, load
from rgalign.run import plan

DOC = ROOT / "docs" / "own-logs.md"
STAGES = [name for name, stage in plan.STAGES.items() if stage.in_sequence]
MODELS = ["two_tower", "two_tower_text", "qe_rec"]
PLAY = f"""  # in place of `run`: the folder's notebooks in one process, at a size of seconds
from pathlib import Path
from small_run import play
for name in {STAGES}:
    play(name, Path("outputs/library").resolve(), {{"ranker.models": {MODELS}}}, "params/library.yaml")
"""


def blocks() -> list[tuple[str, str]]:
    """(language, text) of every fenced block, in order; a block without a language holds commands."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", DOC.read_text(encoding="utf-8"), re.M | re.S)


def command(line: str, folder: Path) -> str:
    """Run a line of the document as its reader would, with this interpreter and this package. Returns what it said."""
    words = shlex.split(line)
    assert words[:3] == ["python", "-m", "rgalign"], line
    if words[3:] == ["run", "params/library.yaml"]:
        return python(folder, "-c", PLAY) + python(folder, "-m", "rgalign", "report", "outputs/library")
    return python(folder, *words[1:])


def python(folder: Path, *words: str) -> str:
    """What this interpreter prints there; it must end well."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def followed(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """The folder of one who followed the document, and what each command said."""
    folder, said, variables = tmp_path_factory.mktemp("reader"), {}, {"__name__": "own_logs"}
    for language, text in blocks():
        if language == "text":  # what the command before it prints
            assert text in list(said.values())[-1]
        elif language == "python":
            with contextlib.chdir(folder):
                exec(text, variables)
        else:
            for line in text.splitlines():
                if line.startswith("cd "):
                    folder = folder / line.removeprefix("cd ")
                else:
                    said[line] = command(line, folder)
    return folder, said


@pytest.mark.slow
def test_the_document_ends_with_ranked_sessions(followed):
    folder, _ = followed
    ranked = pd.read_parquet(folder / "ranked.parquet")
    new = pd.read_parquet(folder / "new-visits.parquet")
    assert ranked.session_id.nunique() == len(new)
    assert set(ranked["rank"]) == {1, 2, 3}
    assert set(ranked.title) <= set(pd.read_csv(folder / "clicks.csv").answer)
    assert (folder / "outputs/library/report.html").is_file()


@pytest.mark.slow
def test_the_tables_hold_what_the_csv_holds(followed):
    """Shown and clicked, visit by visit, against the CSV read by other means."""
    folder, _ = followed
    log = pd.read_csv(folder / "clicks.csv")
    shown = pd.read_parquet(folder / "data/library/impressions.parquet")
    titles = pd.read_parquet(folder / "data/library/intents.parquet").set_index("intent_id").title
    found = shown.assign(answer=shown.intent_id.map(titles), slot=shown.position.astype("int64") + 1).set_index(
        ["session_id", "slot"]
    )
    expected = log.set_index(["visit", "slot"])[["answer", "clicked"]].rename_axis(["session_id", "slot"])
    pd.testing.assert_frame_equal(found[["answer", "clicked"]].sort_index(), expected.sort_index(), check_dtype=False)


@pytest.mark.slow
def test_both_data_sets_pass_their_check(followed):
    _, said = followed
    checks = [text for line, text in said.items() if " check " in line]
    assert len(checks) == 2
    assert all("passes every check" in text for text in checks)


@pytest.mark.slow
def test_the_run_is_of_that_folder_and_of_every_model(followed):
    folder, _ = followed
    results = pd.read_parquet(folder / "outputs/library/tables/results.parquet")
    assert set(results.data) == {"library"}
    assert {*UNTRAINED, *MODELS, "rgalign_rec"} == set(results.model)


def test_keys_and_commands_that_the_prose_names_exist():
    text = DOC.read_text(encoding="utf-8")
    leaves = flat(load("params/smoke.yaml"))
    named = set(re.findall(r"`((?:data|ranker|reasoner|alignment|run)\.[\w.]+)`", text))
    assert named <= set(leaves), named - set(leaves)
    for path in re.findall(r"`(params/[\w.-]+\.yaml)`", text):
        made = path in ("params/library.yaml", "params/library-clicks.yaml")  # by import
        assert made or (ROOT / path).is_file(), path


@pytest.mark.slow
def test_sampled_negatives_of_the_page_exist_when_they_are_drawn(followed, tmp_path):
    """The block of section 6 over intents of which two come late: none of them stands in an earlier list."""
    folder, _ = followed
    log = pd.read_csv(folder / "clicks.csv", dtype=str)
    late = log.time.sort_values().iloc[int(0.6 * len(log))]
    two = log.answer.unique()[:2]
    log[(log.time >= late) | ~log.answer.isin(two)].to_csv(tmp_path / "clicks.csv", index=False)
    (text,) = [text for language, text in blocks() if language == "python" and "draw_lists" in text]
    with contextlib.chdir(tmp_path):
        exec(text, {})
    rows = pd.read_csv(tmp_path / "lists.csv", dtype=str)
    shown = rows[rows.title.isin(two)]
    assert len(shown) > 50
    assert (shown.time >= late).all()
    assert set(rows.groupby("session_id").clicked.apply(lambda own: (own == "1").sum())) == {1}
