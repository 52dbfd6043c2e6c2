"""P(click) from a ranker's scores: the direct model of off-policy estimates."""

from dataclasses import dataclass

import numpy as np
from scipy.special import expit, log_softmax
from sklearn.linear_model import LogisticRegression

from rgalign.data.lists import Lists

FITTED_ON = ("train", "dev")
LEAST = np.log(1e-6)  # log-probabilities are clipped here


@dataclass(frozen=True, eq=False)
class DirectModel:
    """P(click) = sigmoid(slope * log p(intent | session) + intercept of the position), p the softmax of the scores.

    The direct model of the doubly robust estimate: a calibration of the ranker, no more [C], since DR is unbiased with
    any model. Alone it is no estimate: the log shows an intent where its policy ranked it high, so a ranker that knows
    less than that policy looks better than it is. `intercepts` (positions,).
    """

    slope: float
    intercepts: np.ndarray

    @classmethod
    def fit(cls, lists: Lists, scores: np.ndarray) -> "DirectModel":
        """The model of the clicks in `lists`.

        lists   of train or dev. Prefer dev: a ranker is overconfident on the sessions it was trained on
        scores  (lists, KB) of the ranker, -inf for what was not in the KB
        Raises ValueError for lists of another part (their clicks are what is to be estimated), for scores of another
        shape or with NaN or +inf, and where clicks are all alike.
        """
        if lists.part not in FITTED_ON:
            raise ValueError(f"these are lists of {lists.part}; a direct model is fitted on {' or '.join(FITTED_ON)}")
        shown, clicked = lists.shown.numpy(), lists.clicked.numpy()
        log_p = _log_p(scores, len(lists))
        row, position = np.nonzero(shown)
        labels = clicked[row, position]
        if labels.all() or not labels.any():
            raise ValueError(f"{int(labels.sum())} of {len(labels)} impressions are clicked: nothing to learn from")
        positions = np.arange(shown.shape[1])
        inputs = np.column_stack([log_p[row, lists.candidates.numpy()[row, position]], position[:, None] == positions])
        fitted = LogisticRegression(fit_intercept=False, max_iter=1000).fit(inputs, labels)
        return cls(float(fitted.coef_[0, 0]), fitted.coef_[0, 1:])

    def predict(self, scores: np.ndarray, target: np.ndarray) -> np.ndarray:
        """P(click) of each slot of the target lists (sessions, k), which hold rows of the KB from position 0 on.

        scores  (sessions, KB) of the same ranker, made as those of `fit`
        """
        k = target.shape[1]
        if k > len(self.intercepts):
            raise ValueError(f"target has {k} positions; the model was fitted on lists of {len(self.intercepts)}")
        log_p = np.take_along_axis(_log_p(scores, len(target)), target, axis=1)
        return expit(self.slope * log_p + self.intercepts[:k])


def _log_p(scores: np.ndarray, rows: int) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64)
    wrong = int((np.isnan(scores) | np.isposinf(scores)).sum())
    if scores.ndim != 2 or len(scores) != rows or wrong:
        raise ValueError(f"scores has the shape {scores.shape} and {wrong} NaN or inf; expected ({rows}, KB)")
    nothing = np.isneginf(scores).all(axis=1, keepdims=True)  # an empty KB: all equally unlikely
    return np.where(nothing, LEAST, log_softmax(np.where(nothing, 0, scores), axis=1).clip(min=LEAST))
