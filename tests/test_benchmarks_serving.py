"""What serving costs: the memories it is measured with, its clocks, and a small run measured end to end."""

import time

import numpy as np
import pandas as pd
import pytest
import small_run

from benchmarks import serving
from rgalign.ranker.match_terms import MATCH_TERMS, Memory
from rgalign.run.artifacts import ArtifactError
from rgalign.serve import load


def test_a_larger_memory_has_vectors_of_length_1_and_the_same_lists():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((7, 16))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    shown = np.arange(21).reshape(7, 3)
    small = Memory(vectors, np.zeros(16), np.eye(16), shown, shown % 2 == 0, np.array([2, 8.0, 2.0, 50]), np.arange(7))
    large = serving.remembering(small, 1_000)
    assert large.vectors.dtype == np.float16
    np.testing.assert_allclose(np.linalg.norm(large.vectors.astype(float), axis=1), 1, atol=2e-3)
    nearest = (large.vectors.astype(float) @ vectors.T.astype(float)).argmax(axis=1)
    assert np.mean(shown[nearest] == large.shown) > 0.9, "near the session that its list is of"
    np.testing.assert_array_equal(large.clicked, large.shown % 2 == 0)
    assert not len(large.users)


def test_waiting_counts_by_the_clock_alone_and_the_first_calls_do_not():
    found = serving.milliseconds(lambda row: time.sleep(0.2 if row < 2 else 0.01), range(8), warm=2)
    assert 10 <= found["p50"] <= found["p99"] < 190
    assert found["cpu_p99"] < 10


@pytest.mark.slow
def test_a_small_run_is_measured_and_one_without_the_terms_refused(ranked, tmp_path, capsys):
    with pytest.raises(ArtifactError, match="reads of the match terms none; expected all: word_overlap"):
        serving.measure(load(ranked), pd.DataFrame(), [10])
    for name in ("01_data", "02_reasoner", "03_rankers"):
        small_run.play(name, tmp_path / "run", {"ranker.match": list(MATCH_TERMS), "ranker.memory.compared": 100})
    asked = [str(tmp_path / "run"), "--sessions", "12", "--remembered", "50", "2000", "--out", str(tmp_path / "out")]
    assert serving.main(asked) == 0
    table = pd.read_parquet(tmp_path / "out" / serving.TABLE)
    assert "terms and ranker" in capsys.readouterr().out
    assert (table["intents"] == serving.INTENTS).all()
    assert len(table) == 6
    assert (table["p50"] <= table["p99"]).all()
    by_size = table.groupby("remembered")[["vectors_mb", "file_mb"]].first()
    np.testing.assert_allclose(by_size["vectors_mb"] * 2**20, by_size.index * 2 * 16)
    assert (by_size["file_mb"] > by_size["vectors_mb"]).all()
