"""A control without a language model: the prompts' words as TF-IDF, reduced by a truncated SVD (LSA).

Fitted on the transcripts that the tiny model is pre-trained on (not on the KB), so that it tells what language
modelling adds to having read them.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import Pipeline, make_pipeline

Ids = Sequence[Sequence[int]]


def fit(documents: Ids, *, dim: int, seed: int) -> Pipeline:
    """TF-IDF and SVD of documents given as token ids. dim: width of a vector, at most the words seen less one.

    Raises ValueError where fewer than two words stand in two documents each.
    """
    words = TfidfVectorizer(analyzer=_same, min_df=2, sublinear_tf=True, dtype=np.float32)
    seen = Counter(word for ids in documents for word in set(ids))
    if sum(count >= words.min_df for count in seen.values()) < 2:
        raise ValueError(
            f"vectors lsa cannot be fitted on {len(documents)} transcripts: fewer than two words stand in two of them; "
            "is typed_query blank? Give transcripts with words, or leave qe_rec/lsa out of ranker.models"
        )
    counted = words.fit_transform(documents)
    reduced = TruncatedSVD(min(dim, counted.shape[1] - 1), random_state=seed).fit(counted)
    return make_pipeline(words, reduced)


def embed(model: Pipeline, sequences: Ids) -> np.ndarray:
    """(sequences, dim) float32; a sequence without a known word is the zero vector."""
    return model.transform(sequences).astype(np.float32)


def _same(ids: Sequence[int]) -> Sequence[int]:
    return ids
