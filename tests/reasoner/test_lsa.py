"""LSA against a decomposition written out with numpy."""

import numpy as np
import pytest

from rgalign.reasoner import build


def test_vectors_are_the_right_singular_projections_of_tf_idf():
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 12, size=rng.integers(3, 9)).tolist() for _ in range(40)]
    model = build.fit(documents, dim=4, seed=0)
    tfidf = model[0].transform(documents).toarray()
    _, _, directions = np.linalg.svd(tfidf, full_matrices=False)
    expected = tfidf @ directions[:4].T
    np.testing.assert_allclose(np.abs(model.transform(documents)), np.abs(expected), atol=0.02)


def test_a_prompt_of_unknown_words_is_zero_and_fits_repeat():
    documents = [[1, 2, 3], [1, 2], [3, 1], [2, 3]]
    first, again = (build.fit(documents, dim=2, seed=0).transform([[99], [1, 2]]) for _ in range(2))
    assert not first[0].any()
    assert first[1].any()
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("documents", [[], [[7], [8]], [[7], [7], [8]]])
def test_documents_without_common_words_are_one_clear_error(documents):
    with pytest.raises(ValueError, match="fewer than two words stand in two of them"):
        build.fit(documents, dim=4, seed=0)
