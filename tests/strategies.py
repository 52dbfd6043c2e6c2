"""Hypothesis strategies that several test modules draw from."""

import numpy as np
from hypothesis import strategies as st


@st.composite
def impression_lists(draw, *, max_lists=8, max_candidates=8, ties=True, clicked="any"):
    """Padded impression lists: scores, clicked, shown, each (lists, candidates).

    ties     scores from a handful of values (with ties, infinities and both zeros), else all distinct
    clicked  "any": no click and nothing but clicks included; "both": every list has both classes (and two candidates)
    Lists are padded on the right; what stands in the padding is drawn too, NaN included, since it must not matter.
    """
    lists = draw(st.integers(1, max_lists))
    width = draw(st.integers(2, max_candidates))
    sizes = draw(st.lists(st.integers(2 if clicked == "both" else 0, width), min_size=lists, max_size=lists))
    shown = np.arange(width) < np.array(sizes)[:, None]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if ties:
        scores = rng.choice([-np.inf, -1.5, -0.0, 0.0, 0.1, 1e300, np.inf], size=shown.shape)
    else:
        scores = rng.permutation(shown.size).reshape(shown.shape) / 3 - 2
    scores[~shown] = rng.choice([np.nan, 0.1, np.inf], size=shown.shape)[~shown]
    marks = (rng.random(shown.shape) < rng.choice([0.0, 0.2, 0.5, 1.0], size=(lists, 1))) & shown
    if clicked == "both":
        for row, size in zip(marks, sizes, strict=True):
            if row.sum() in (0, size):
                row[:size] = rng.permutation(size) < rng.integers(1, size)
    return scores, marks, shown
