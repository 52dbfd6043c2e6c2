"""The pages quote what was measured: their tables are those of outputs/published/."""

import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import refresh_results
from refresh_results import PAGES, PUBLISHED, RUNS, STUDY, SWEPT_FILES, TABLES, marks, with_tables

from rgalign.evaluation.results import conform
from rgalign.params import ROOT, Params, flat, load


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_are_those_of_the_published_runs(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert with_tables(text) == text, "run: make published"


def test_every_table_stands_in_one_page():
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    assert {name: text.count(marks(name)[0]) for name in TABLES} == dict.fromkeys(TABLES, 1)


def test_a_model_has_a_row_for_each_that_it_is_compared_with(tmp_path, monkeypatch):
    """The model it builds on first; the best model without training in a row of its own, without figures."""
    results, compared = (pd.read_parquet(PUBLISHED / f"quickstart/{n}.parquet") for n in ("results", "comparisons"))
    results = results[~results.model.isin(["word_overlap", "raw_cosine"])]
    compared = compared[compared.against != "raw_cosine"]
    more = results[results.model == "popularity"].assign(model="word_overlap", value=0.75)
    own = compared[(compared.model == "qe_rec") & (compared.against == "two_tower_text")]
    own = own.assign(against="word_overlap", difference=-0.02, ci_low=-0.03, ci_high=-0.01)
    (tmp_path / "own").mkdir()
    conform(pd.concat([results, more]), "results").to_parquet(tmp_path / "own/results.parquet")
    conform(pd.concat([compared, own]), "comparisons").to_parquet(tmp_path / "own/comparisons.parquet")
    shutil.copyfile(PUBLISHED / "quickstart/params.yaml", tmp_path / "own/params.yaml")
    monkeypatch.setattr(refresh_results, "PUBLISHED", tmp_path)
    monkeypatch.setattr(refresh_results, "RUNS", {"own": "own"})
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in refresh_results.results_table().split("\n")
    ]
    assert {len(row) for row in rows} == {8}
    assert ["word overlap (TF-IDF cosine)", *["0.750"] * 4] in [row[1:6] for row in rows]
    first, second = (row for row in rows if row[1] == "QE-Rec")
    assert first[7] == "two-tower + text"
    assert second[2:] == ["", "", "", "", "-0.0200 [-0.0300,\N{NO-BREAK SPACE}-0.0100]", "word overlap (TF-IDF cosine)"]


@pytest.mark.parametrize("run", RUNS)
def test_published_runs_are_whole_and_were_made_with_shipped_params(run):
    for name in ("results", "comparisons"):
        conform(pd.read_parquet(PUBLISHED / run / f"{name}.parquet"), name)
    (shipped,) = [p for p in (ROOT / "params").glob("**/*.yaml") if p.stem == run]
    assert decisive(run, published_params(run)) == decisive(run, load(shipped))


def published_params(run: str) -> Params:
    """What a published run was made with; those without RGAlign-Rec may be older than any alignment."""
    aligned = "rgalign_rec" in set(pd.read_parquet(PUBLISHED / run / "results.parquet")["model"])
    return load(PUBLISHED / run / "params.yaml", {} if aligned else {"alignment.loop.rounds": 0})


def decisive(run: str, params: Params) -> dict:
    """What a published run's figures follow from: those made before there was an alignment owe it nothing, and those of
    0.1.0 were made with the ranker settings of their time, which stand in their own params.yaml."""
    models = set(pd.read_parquet(PUBLISHED / run / "results.parquet")["model"])
    left_out = () if "rgalign_rec" in models else ("alignment.", "reasoner.others")
    left_out += ("ranker.",) if refresh_results.made_by_first_version(run) else ()
    return {key: value for key, value in flat(params).items() if not key.startswith(left_out)}


def test_the_studys_runs_differ_in_world_and_lm_alone():
    folders = sorted(PUBLISHED.glob(f"{STUDY}*"))
    assert len(folders) > 1
    for folder in folders:
        conform(pd.read_parquet(folder / "results.parquet"), "results")
        world, lm = map(int, re.fullmatch(rf"{STUDY}(\d+)-lm(\d+)", folder.name).groups())
        drawn = {"data.seed": world, "reasoner.seed": lm}
        shipped = load(ROOT / "params" / "study.yaml", drawn)
        assert decisive(folder.name, published_params(folder.name)) == decisive(folder.name, shipped)


def test_a_sweep_is_published_as_its_small_files(tmp_path, monkeypatch):
    monkeypatch.setattr(refresh_results, "ROOT", tmp_path)
    monkeypatch.setattr(refresh_results, "PUBLISHED", tmp_path / "outputs" / "published")
    for name in (*SWEPT_FILES, "models/weights"):
        (tmp_path / "outputs/study" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "outputs/study" / name).write_text(name)
    refresh_results.publish("study")
    published = {path.name for path in (tmp_path / "outputs/published/study").iterdir()}
    assert published == {Path(name).name for name in SWEPT_FILES}


def test_what_is_published_names_no_folder_of_a_machine():
    for path in PUBLISHED.rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert str(ROOT) not in text
        assert str(Path.home()) not in text


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_files_and_commands_that_a_page_names_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for path in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / page).parent.joinpath(path).exists(), path
    for path in re.findall(r"`(params/[\w./-]+\.yaml)`", text):
        assert (ROOT / path).exists() or path == "params/mine.yaml", path
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    for target in re.findall(r"^make (\w+)", text, re.M):
        assert target in targets
