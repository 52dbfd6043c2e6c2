"""Runs side by side: a hand-worked pair, and what is not to be paired."""

import numpy as np
import pandas as pd
import pytest

from rgalign.__main__ import main
from rgalign.commands import compare
from rgalign.evaluation.results import results
from rgalign.run.artifacts import ArtifactError, write_table


def make_run(folder, gauc, *, sessions=None, weight=4.0):
    """A run with one model, two ranker seeds, and these session values (sessions, seeds)."""
    gauc = np.asarray(gauc, dtype=float)
    ids = sessions or [f"s{i}" for i in range(len(gauc))]
    rows = [
        {"session_id": name, "user_id": f"u{i // 2}", "model": "qe_rec", "seed": seed, "split": "test",
         "gauc_weight": weight, "gauc": gauc[i, seed], "recall@3": gauc[i, seed] / 2}
        for i, name in enumerate(ids) for seed in range(gauc.shape[1])
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    write_table(folder / "tables/session_metrics.parquet", table)
    fixed = {"data": "shop", "distance": None, "world_seed": None, "lm_seed": 0}
    write_table(folder / "tables/results.parquet", results(table, **fixed))
    return folder


def test_the_difference_is_that_of_the_means_over_seeds(tmp_path, capsys):
    first = make_run(tmp_path / "a", [[0.5, 0.7], [0.2, 0.4], [0.9, 0.9], [0.3, 0.5]])
    other = make_run(tmp_path / "b", [[0.6, 0.8], [0.4, 0.4], [0.9, 1.0], [0.3, 0.5]])
    table = compare.side_by_side([first, other])
    assert table.loc[("qe_rec", "gauc")].tolist() == pytest.approx([0.55, 0.6125])
    (row,) = compare.paired([first, other]).itertuples()
    assert (row.run, row.against, row.model, row.sessions) == ("b", "a", "qe_rec", 4)
    assert row.difference == pytest.approx(0.0625)
    assert row.ci_low <= row.difference <= row.ci_high
    assert main(["compare", str(first), str(other)]) == 0
    told = capsys.readouterr().out
    assert "0.0625" in told
    assert "on the same test sessions" in told


def test_a_run_on_other_sessions_is_not_paired(tmp_path, capsys):
    first = make_run(tmp_path / "a", [[0.5], [0.6]])
    elsewhere = make_run(tmp_path / "b", [[0.5], [0.6]], sessions=["x1", "x2"])
    weighed = make_run(tmp_path / "c", [[0.5], [0.6]], weight=9.0)
    assert compare.paired([first, elsewhere, weighed]).empty
    assert main(["compare", str(first), str(elsewhere)]) == 0
    assert "same test sessions" not in capsys.readouterr().out


def test_a_published_run_has_results_and_no_pairs(tmp_path, capsys):
    first = make_run(tmp_path / "a", [[0.5], [0.6]])
    published = make_run(tmp_path / "b", [[0.7], [0.6]])
    (published / "tables/session_metrics.parquet").unlink()
    assert main(["compare", str(first), str(published)]) == 0
    assert "same test sessions" not in capsys.readouterr().out
    assert main(["compare", str(first), str(tmp_path / "nowhere")]) == 1
    assert "no run in" in capsys.readouterr().err


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / week / "shop", [[0.5], [0.6]]) for week in ("one", "two")]
    assert list(compare.side_by_side(runs)) == ["one/shop", "two/shop"]


def test_every_fault_is_told_at_once(tmp_path):
    first = make_run(tmp_path / "a", [[0.5], [0.6]])
    with pytest.raises(
        ArtifactError, match=r"nowhere has no tables/results\.parquet[\s\S]*at least two runs"
    ) as caught:
        compare.side_by_side([first, tmp_path / "nowhere", first])
    assert "cannot be compared" in str(caught.value)
    with pytest.raises(ArtifactError, match="at least two runs"):
        compare.side_by_side([first])
