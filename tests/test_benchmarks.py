"""Benchmark rows at a tiny size: their columns, and that ours and the peers did the same work. Never their speed."""

import math

import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from benchmarks import peers
from rgalign.data.encode import encode_intents, encode_lists
from rgalign.data.features import fit_space

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def task(public_data):
    """600 lists of cfpb2014 to train on, 200 to stop and 200 to judge."""
    sessions, impressions, kb = (
        pd.read_parquet(public_data / "cfpb2014" / f"{name}.parquet") for name in ("sessions", "impressions", "intents")
    )
    kinds = {"product": "categorical", "company": "categorical", "state": "categorical"}
    train = sessions[sessions["split"] == "train"]
    parts = {"train": train[:600], "dev": train[600:800], "valid": sessions[sessions["split"] == "valid"][:200]}
    shown = {part: impressions[impressions["session_id"].isin(own["session_id"])] for part, own in parts.items()}
    space = fit_space(parts["train"], kb, shown["train"], kinds)
    lists = {part: encode_lists(space, own, shown[part], kb, part) for part, own in parts.items()}
    return {**lists, "intents": encode_intents(space, kb), "space": space}


def test_gauc_rows_agree_with_every_peer_that_is_installed():
    for sampled in (None, 20):
        rows = peers.table(peers.gauc_rows(rows=480, sampled=sampled, repeats=1))
        assert tuple(rows.columns) == peers.COLUMNS
        assert rows["equal"].dropna().all()
        assert rows["equal"][0]  # scikit-learn is always there in tests
        assert (rows["ratio"] - rows["theirs"] / rows["ours"]).dropna().abs().max() < 1e-9


def test_ndcg_row_agrees_with_ranx():
    rows = peers.table(peers.ndcg_rows(lists=50))
    assert tuple(rows.columns) == peers.COLUMNS
    assert rows["equal"].all()


def test_a_peer_that_is_not_installed_is_shown_as_missing(monkeypatch, task):
    monkeypatch.setattr(peers, "installed", lambda package: None)
    monkeypatch.delenv(peers.FUXICTR, raising=False)
    rows = peers.gauc_rows(rows=240, repeats=1) + peers.ndcg_rows(lists=20)
    rows = peers.table(rows + peers.ranker_rows(**task, epochs=1, learning_rates=(4e-3,)))
    assert len(rows) == 6
    assert rows["peer_version"].str.startswith("not installed").all()
    assert rows[["theirs", "ratio", "equal"]].isna().all(axis=None)
    assert rows["ours"].map(math.isfinite).all()


def test_the_ranker_and_its_peer_see_the_same_impressions(task):
    try:
        peers._fuxictr()
    except ImportError as fault:
        pytest.skip(f"FuxiCTR: {fault}")
    rows = peers.table(peers.ranker_rows(**task, epochs=1, learning_rates=(4e-3,)))
    assert tuple(rows.columns) == peers.COLUMNS
    assert rows["equal"].all()
    assert rows["unit"].tolist() == ["impressions/s", "GAUC", "GAUC"]


def test_ours_trains_on_the_cpu_like_its_peer_and_leaves_the_process_its_gpu(monkeypatch, task):
    Accelerator()
    devices, unspied = [], peers.fit

    def spied(*given, accelerator, **more):
        devices.append(accelerator.device.type)
        return unspied(*given, accelerator=accelerator, **more)

    monkeypatch.setattr(peers, "fit", spied)
    monkeypatch.delenv(peers.FUXICTR, raising=False)
    monkeypatch.setitem(PartialState._shared_state, "device", torch.device("cuda"))
    peers.ranker_rows(**task, epochs=1, learning_rates=(4e-3,))
    assert devices == ["cpu"]
    assert AcceleratorState().device.type == "cuda"


def test_a_ratio_above_one_means_that_ours_is_better():
    ratios = [peers.row("", "", "", *each, None)["ratio"] for each in [(1, 4, "seconds"), (8, 2, "rows/s")]]
    assert ratios == [4, 4]
    assert peers.row("", "", "", 0.9, 0.6, "GAUC", None)["ratio"] == pytest.approx(4)
