"""The nearest remembered vectors: against scikit-learn and a full sort."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from rgalign.ranker.nearest import Cells, finder

NOBODY = np.zeros(0, "U1")


def unit(rng, rows, dim=6):
    found = rng.standard_normal((rows, dim))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def in_order(rows, cosines):
    order = np.argsort(-cosines, axis=1, kind="stable")
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(cosines, order, axis=1)


@pytest.mark.parametrize("compared", [500, 499])
def test_they_are_those_of_scikit_learn_by_all_and_by_cells_that_hold_all(compared, monkeypatch):
    """499 of 500: the cells are used, and the last of them is needed."""
    rng = np.random.default_rng(0)
    vectors, query = unit(rng, 500).astype(np.float16), unit(rng, 20).astype(np.float32)
    monkeypatch.setattr(Cells, "near", lambda self, own, least, near=Cells.near: near(self, own, 500))
    rows, cosines = in_order(*finder(vectors, NOBODY, 9, compared)(query, None))
    distance, expected = NearestNeighbors(n_neighbors=9, metric="cosine").fit(vectors.astype(float)).kneighbors(query)
    np.testing.assert_allclose(cosines, 1 - distance, atol=2e-3)  # float16 is of length 1 to a thousandth
    assert np.mean(rows == expected) > 0.98


@given(st.integers(1, 80), st.integers(1, 100), st.integers(0, 10**6))
def test_cells_hold_every_vector_once_and_give_as_many_as_asked(count, least, seed):
    rng = np.random.default_rng(seed)
    vectors = unit(rng, count).astype(np.float16)
    cells, query = Cells.of(vectors), unit(rng, 1)[0].astype(np.float32)
    assert sorted(cells.rows) == list(range(count))
    np.testing.assert_array_equal(cells.vectors.numpy(), vectors[cells.rows])
    rows, cosines = cells.near(query, least)
    assert len(set(rows)) == len(rows) >= min(least, count)
    np.testing.assert_allclose(cosines, vectors[rows].astype(np.float32) @ query, atol=1e-6)


def test_cells_find_nearly_all_where_vectors_lie_in_groups():
    rng = np.random.default_rng(1)
    groups = unit(rng, 50, dim=32)
    noisy = np.repeat(groups, 100, axis=0) + 0.05 * rng.standard_normal((5000, 32))
    vectors = (noisy / np.linalg.norm(noisy, axis=1, keepdims=True)).astype(np.float16)
    query = groups.astype(np.float32)
    (of_all, _), (of_cells, _) = (finder(vectors, NOBODY, 50, compared)(query, None) for compared in (5000, 500))
    shared = [len({*one} & {*other}) / 50 for one, other in zip(of_all, of_cells, strict=True)]
    assert np.mean(shared) > 0.95


@pytest.mark.parametrize("compared", [100, 60])
def test_a_users_own_are_left_out(compared):
    rng = np.random.default_rng(2)
    vectors, users = unit(rng, 100).astype(np.float16), np.array([f"u{i % 4}" for i in range(100)])
    asking = np.array(["u0", "u3"])
    rows, cosines = finder(vectors, users, 10, compared)(unit(rng, 2).astype(np.float32), asking)
    assert np.isfinite(cosines).all()
    assert (users[rows] != asking[:, None]).all()
    same, _ = finder(vectors, NOBODY, 10, compared)(vectors[:1].astype(np.float32), asking[:1])
    assert 0 in same, "nobody is left out where nobody is known"
