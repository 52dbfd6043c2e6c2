"""The tuning benchmark rows at a tiny size: both sides make the same losses. Never speed."""

import math

import numpy as np
import pytest

from benchmarks import embedding, peers, tuning

pytestmark = pytest.mark.slow

SMALL = {"steps": 4, "documents": 6, "pairs": 4, "rounds": 1}


@pytest.fixture(scope="module")
def task():
    return embedding.small_task(hidden=16, layers=1, sessions=200, instruction="")


def test_both_sides_make_the_same_losses(task):
    rows = peers.table(tuning.tuning_rows(task, **SMALL))
    assert tuple(rows.columns) == peers.COLUMNS
    assert rows["equal"].tolist() == [True] * 3
    assert (rows["unit"] == "steps/s").all()
    assert (rows["ratio"] - rows["ours"] / rows["theirs"]).abs().max() < 1e-9


@pytest.mark.parametrize(("apart", "equal"), [(9e-4, True), (2e-3, False)])
def test_losses_that_differ_are_not_equal(apart, equal):
    losses = np.linspace(3, 1, 4)
    row = tuning._row("name", "peer", "1", lambda: (0.5, losses), lambda: (1.0, losses + apart), 2)
    assert (row["equal"], row["ratio"]) == (equal, 2.0)


def test_a_peer_that_is_not_installed_is_shown_as_missing(task, monkeypatch):
    monkeypatch.setattr(tuning, "installed", lambda package: None)
    rows = peers.table(tuning.tuning_rows(task, **SMALL))
    assert (rows["peer_version"] == peers.MISSING).all()
    assert rows[["theirs", "ratio", "equal"]].isna().all(axis=None)
    assert rows["ours"].map(math.isfinite).all()
