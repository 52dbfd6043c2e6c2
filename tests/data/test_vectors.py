"""Vectors keep their ids: rows by id, faults in words, the same bytes on disk."""

import numpy as np
import pytest

from rgalign.data.vectors import Vectors, concat, load, save
from rgalign.run.artifacts import digest


@pytest.fixture
def vectors():
    return Vectors(np.array(["b", "a", "ü 漢"]), np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))


def test_rows_come_in_the_order_asked_for(vectors):
    assert vectors.rows(["a", "b", "a"]).tolist() == [[3, 4], [1, 2], [3, 4]]
    assert vectors.rows([]).shape == (0, 2)
    assert vectors.values.dtype == np.float16
    assert (len(vectors), vectors.dim) == (3, 2)


def test_missing_ids_are_counted_and_the_first_named(vectors):
    with pytest.raises(ValueError, match="2 of 3 ids have no vector \\(first: 'x'\\)"):
        vectors.rows(["a", "x", "y"])


def test_saved_and_loaded_they_are_the_same_to_the_byte(tmp_path, vectors):
    save(tmp_path / "one", vectors)
    again = load(tmp_path / "one")
    save(tmp_path / "two", again)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    assert again.ids.tolist() == vectors.ids.tolist()
    assert np.array_equal(again.values, vectors.values)


def test_none_at_all_can_be_kept(tmp_path):
    save(tmp_path / "none", Vectors(np.array([]), np.zeros((0, 8))))
    assert load(tmp_path / "none").values.shape == (0, 8)


@pytest.mark.parametrize(
    ("ids", "values", "fault"),
    [
        (["a", "a"], [[1.0], [2.0]], "1 ids are there twice \\(first: 'a'\\)"),
        (["a", "b"], [[1.0], [np.nan]], "1 vectors have NaN.*first: 'b'"),
        (["a", "b"], [[np.inf], [-np.inf]], "2 vectors have NaN.*first: 'a'"),
        (["a"], [[70_000.0]], "more than 65504"),
        (["a", "b"], [[1.0]], "expected \\(n,\\) and \\(n, dim\\)"),
        (["a"], [1.0], "expected \\(n,\\) and \\(n, dim\\)"),
    ],
)
def test_what_cannot_be_kept_is_refused(ids, values, fault):
    with pytest.raises(ValueError, match=fault):
        Vectors(np.array(ids), np.array(values))


def test_several_faults_are_told_at_once():
    with pytest.raises(ValueError, match="twice") as caught:
        Vectors(np.array(["a", "a"]), np.array([[1.0], [np.nan]]))
    assert "NaN" in str(caught.value)


def test_parts_are_put_together_in_their_order(vectors):
    more = Vectors(np.array(["c"]), np.array([[7.0, 8.0]]))
    assert concat([more, vectors]).ids.tolist() == ["c", "b", "a", "ü 漢"]
    with pytest.raises(ValueError, match="twice"):
        concat([more, more])
    with pytest.raises(ValueError, match="2, 3 dimensions"):
        concat([more, Vectors(np.array(["d"]), np.zeros((1, 3)))])
    with pytest.raises(ValueError, match="no dimensions"):
        concat([])


def test_a_folder_that_cannot_be_read_is_named(tmp_path, vectors):
    with pytest.raises(ValueError, match="holds no vectors"):
        load(tmp_path)
    save(tmp_path / "v", vectors)
    (tmp_path / "v" / "vectors.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="holds no vectors"):
        load(tmp_path / "v")
