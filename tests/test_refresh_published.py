"""The published comparisons are those of the tables that lie beside them, and claim nothing that is not kept."""

import numpy as np
import pandas as pd
import pytest
import refresh_published
from refresh_published import PUBLISHED, recomputed
from scipy import stats

from rgalign.evaluation.comparisons import COMPARED, PAIR, holm
from rgalign.evaluation.results import conform

FOLDERS = sorted(path.parent.name for path in PUBLISHED.glob("*/comparisons.parquet"))


@pytest.mark.parametrize("name", FOLDERS)
def test_comparisons_are_todays(name):
    folder = PUBLISHED / name
    stored = conform(pd.read_parquet(folder / "comparisons.parquet"), "comparisons")
    pd.testing.assert_frame_equal(recomputed(folder), stored, rtol=1e-9)
    for _, part in stored.groupby(["metric", "slice", "split"]):
        assert part["p_holm"].to_numpy() == pytest.approx(holm(part["p"]), nan_ok=True)


def test_a_sweep_whose_worlds_have_no_interval_of_their_own_has_students_and_no_floor():
    folder = PUBLISHED / "study"
    stored = pd.read_parquet(folder / "comparisons.parquet").set_index([*PAIR, "metric", "slice"])
    results = pd.read_parquet(folder / "results.parquet")
    own = results[(results["metric"] == "gauc") & (results["slice"] == "all")]
    means = own.groupby(["world_seed", "model"])["value"].mean().unstack()
    for model, against in (("rgalign_rec", "qe_rec"), ("rgalign_rec/sft_only", "qe_rec")):
        row = stored.loc[(model, against, "gauc", "all")]
        theirs = stats.ttest_rel(means[model], means[against])
        interval = theirs.confidence_interval(0.95)
        assert (row.p, row.ci_low, row.ci_high) == pytest.approx((theirs.pvalue, *interval), abs=1e-9)
        ratios = 1 - (1 - means[model]) / (1 - means[against])
        ends = stats.t.interval(0.95, len(ratios) - 1, ratios.mean(), stats.sem(ratios))
        assert (row.relative, row.relative_low, row.relative_high) == pytest.approx((ratios.mean(), *ends), abs=1e-9)
        assert row.world_seeds == "5 6 8 9 10"
        assert np.isnan(row.sampling_error)


def test_with_each_worlds_own_interval_there_is_a_floor(tmp_path):
    for name in ("results", "worlds"):
        table = pd.read_parquet(PUBLISHED / "study-2" / f"{name}.parquet")
        if name == "worlds":
            table = table.assign(ci_low=table["difference"] - 0.0036, ci_high=table["difference"] + 0.0036)
        table.to_parquet(tmp_path / f"{name}.parquet")
    (tmp_path / "stage_seconds.parquet").touch()
    rows = refresh_published.comparisons_over_worlds(refresh_published.worlds_of(tmp_path)).set_index(
        [*PAIR, "metric", "slice"]
    )
    row = rows.loc[("rgalign_rec", "qe_rec", "gauc", "all")]
    error = 0.0036 / stats.norm.ppf(0.975) / np.sqrt(3)
    assert row.sampling_error == pytest.approx(error)
    assert row.ci_high - row.difference == pytest.approx(4.302653 * error, rel=1e-6)
    assert set(COMPARED) <= set(rows.reset_index())


def test_the_command_is_idempotent_and_keeps_every_difference(tmp_path, monkeypatch, capsys):
    for name in ("study-2", "msweb-minilm"):
        (tmp_path / name).mkdir()
        for path in (PUBLISHED / name).glob("*.parquet"):
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(refresh_published, "PUBLISHED", tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.glob("*/comparisons.parquet")}
    refresh_published.main()
    assert {path: path.read_bytes() for path in before} == before
    assert "without a known sampling error" in capsys.readouterr().out
    moved = pd.read_parquet(tmp_path / "study-2/comparisons.parquet")
    moved.assign(difference=moved["difference"] + 0.1).to_parquet(tmp_path / "study-2/comparisons.parquet")
    with pytest.raises(SystemExit, match=r"study-2: the differences would move by 0\.1"):
        refresh_published.main()
