"""What CTR@k a ranker would have had, from a log that another policy wrote with its propensities.

CTR@k = clicks on the k intents shown, divided by impressions of them. The item-position model: a click depends on the
session, the intent and its position, not on the rest of the list (Li, Abbasi-Yadkori, Kveton, Muthukrishnan, Vinay,
Wen 2018, "Offline evaluation of ranking policies with click models"). So a target slot counts where the log happened
to show the same intent at the same position, with the weight w = 1 / propensity, and 0 elsewhere (`estimates`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow.compute as pc
from scipy.special import expit, log_softmax
from scipy.stats import t as student
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

from rgalign.data.features import as_strings, ids_of
from rgalign.data.lists import Lists
from rgalign.data.tables import Dataset
from rgalign.evaluation.bootstrap import LEVEL
from rgalign.shopworld.traffic import Traffic

FITTED_ON = ("train", "dev")
LEAST = np.log(1e-6)  # log-probabilities are clipped here
LARGEST = 1e12  # a weight where none is clipped: its square, summed over a log, is still a number [C]
MEANS = ("standard_error", "effective_sample_size", "matched", "clipped")  # of `estimates`, in `over_logs`
_MISSING = (
    "impressions.parquet of {name!r} has no column propensity = P(this intent at this position | session), as the "
    "policy that wrote the log drew it. Without it nobody can say what another ranker would have earned. Nothing was "
    "estimated. Log it where the lists are drawn, by a policy that explores; for this log there is only an A/B test"
)


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


@dataclass(frozen=True, eq=False)
class Log:
    """Logged impression lists, rows in the order of sessions.parquet, all (sessions, positions) but `users`.

    A list shorter than the longest is padded on the right. Raises ValueError, with counts, for shapes that do not fit
    and for propensities of shown slots that are empty or outside (0, 1].
    """

    shown: np.ndarray  # row in intents.parquet, -1 where padded
    clicked: np.ndarray  # bool
    propensity: np.ndarray  # P(this intent at this position | session)
    users: np.ndarray  # of any type (sessions,)

    def __post_init__(self):
        shape = self.shown.shape
        shapes = {name: getattr(self, name).shape for name in ("clicked", "propensity", "users")}
        if len(shape) != 2 or shapes != {"clicked": shape, "propensity": shape, "users": shape[:1]}:
            raise ValueError(
                f"shown has the shape {shape}, {shapes}; expected (sessions, positions), users (sessions,)"
            )
        stated = self.propensity[self.shown >= 0]
        empty, outside = int(np.isnan(stated).sum()), int(((stated <= 0) | (stated > 1)).sum())
        if empty or outside:
            raise ValueError(
                f"impressions.propensity is empty in {empty} of {len(stated)} rows and outside (0, 1] in {outside}; "
                "expected P(this intent at this position | session): what was shown had a chance to be"
            )

    @classmethod
    def of(cls, dataset: Dataset) -> "Log":
        """Raises ValueError where impressions have no propensity, or dataset.yaml says that positions are not real."""
        impressions = dataset.impressions
        if "propensity" not in impressions:
            raise ValueError(_MISSING.format(name=dataset.name))
        if not dataset.meta.get("position_is_real", True):
            raise ValueError(f"dataset.yaml of {dataset.name!r} says position_is_real: false; a propensity needs it")
        session, intent = (
            pc.index_in(ids_of(impressions, name), value_set=ids_of(rows, name))
            for name, rows in (("session_id", dataset.sessions), ("intent_id", dataset.intents))
        )
        if unknown := max(session.null_count, intent.null_count):
            raise ValueError(f"{unknown} impressions are of sessions or intents that are not among the data set's")
        position = impressions["position"].to_numpy(dtype=np.int64)
        shape = (len(dataset.sessions), int(position.max(initial=-1)) + 1)
        shown, clicked, propensity = np.full(shape, -1), np.zeros(shape, dtype=bool), np.full(shape, np.nan)
        shown[session, position] = intent
        clicked[session, position] = impressions["clicked"].to_numpy(dtype=bool)
        propensity[session, position] = impressions["propensity"].to_numpy(dtype=np.float64, na_value=np.nan)
        return cls(shown, clicked, propensity, as_strings(ids_of(dataset.sessions, "user_id")))


def slot_weights(log: Log, target: np.ndarray, clip: float | None = None) -> np.ndarray:
    """w of each slot of the target lists (sessions, k): 1 / propensity where the log shows the same there, else 0.

    target  (sessions, k) rows in intents.parquet, from position 0 on
    clip    the largest weight allowed; None: LARGEST, beyond which a propensity must be an error
    Raises ValueError for another shape, an empty slot, or a clip that is not above 0.
    """
    target, (sessions, positions) = np.asarray(target), log.shown.shape
    if target.ndim != 2 or len(target) != sessions or not 1 <= target.shape[1] <= positions:
        raise ValueError(f"target has the shape {target.shape}; expected ({sessions}, k), k from 1 to {positions}")
    if (target < 0).any():
        raise ValueError(f"target has {int((target < 0).sum())} slots without an intent; a ranker fills every slot")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip is {clip}; expected the largest weight allowed, above 0, or None")
    k = target.shape[1]
    propensity = np.maximum(log.propensity[:, :k], _least(clip))  # before it is inverted: 1 / 5e-324 is no number
    return np.divide(1, propensity, out=np.zeros(target.shape), where=log.shown[:, :k] == target)


def _least(clip: float | None) -> float:
    """The propensity below which a weight is clipped."""
    return 1 / (LARGEST if clip is None else min(clip, LARGEST))


def estimates(
    log: Log, target: np.ndarray, predicted: np.ndarray | None = None, *, clip: float | None = None
) -> pd.DataFrame:
    """CTR@k of a ranker's lists, one row an estimator:

    ips    mean of w * clicked (Horvitz & Thompson 1952). Unbiased where every target slot had a chance to be logged.
    snips  sum of w * clicked / sum of w (Swaminathan & Joachims 2015). Bias of order 1 / effective sample. NaN where
           nothing matched.
    dr     mean of q + w * (clicked - q), q the predicted click probability of the target slot (Dudik, Langford & Li
           2011; Dudik, Erhan, Langford & Li 2014): unbiased as IPS, whatever q; the better q, the smaller the variance

    target     (sessions, k) rows in intents.parquet, from position 0 on
    predicted  (sessions, k) the direct model's P(click) of each target slot, made without the clicks of `log`; None:
               there is no dr
    clip       the largest w (evaluation.experiment.clip): trades variance for bias. IPS then reads too low, DR leans
               on q. It bounds what one slot can do: IPS lies in [0, clip], DR in [1 - clip, clip], SNIPS in [0, 1]
    Columns: estimator, value, standard_error, low, high (NaN where there is one user), and of the weights
    effective_sample_size  (sum of w)^2 / sum of w^2, in impressions (Kish). Look at it first: where few slots match,
                           with weights in the hundreds, intervals can be too short
    matched                share of target slots that the log shows
    mean_weight            has the mean 1 if every target slot had a chance to be logged; far below 1: it had none, or
                           clipping took it; far above 1: the propensities are wrong
    clipped                share of the matched slots whose weight was clipped; 0 of none
    """
    weight = slot_weights(log, target, clip)
    squares = (weight**2).sum()
    return _rows(log, _linearised(log, weight, predicted)).assign(
        effective_sample_size=weight.sum() ** 2 / squares if squares else 0.0,
        matched=(weight > 0).mean(),
        mean_weight=weight.mean(),
        clipped=_share_clipped(log, [target], clip),
    )


def differences(
    log: Log, targets: tuple[np.ndarray, np.ndarray], predicted: tuple[np.ndarray, np.ndarray] | None = None, *,
    clip: float | None = None
) -> pd.DataFrame:  # fmt: skip
    """CTR@k of the first ranker minus that of the second on the same log, one row an estimator.

    Arguments and columns as in `estimates`; of those of the weights `clipped` alone, over the slots of both. The
    interval is paired: where both rankers show the same, nothing is uncertain.
    """
    one, other = (
        _linearised(log, slot_weights(log, target, clip), q)
        for target, q in zip(targets, predicted or (None, None), strict=True)
    )
    apart = {name: (one[name][0] - other[name][0], one[name][1] - other[name][1]) for name in one}
    return _rows(log, apart).assign(clipped=_share_clipped(log, targets, clip))


def _share_clipped(log: Log, targets: Iterable[np.ndarray], clip: float | None) -> float:
    matched = []
    for target in targets:
        k = np.shape(target)[1]
        matched.append(log.propensity[:, :k][log.shown[:, :k] == target])
    clipped = np.concatenate(matched) < _least(clip)
    return float(clipped.mean()) if len(clipped) else 0.0


def _linearised(log: Log, weight: np.ndarray, predicted: np.ndarray | None) -> dict[str, tuple[float, np.ndarray]]:
    """Each estimator's value, a ratio of two sums over sessions, and what each session moves it by (sessions,)."""
    clicked, each = log.clicked[:, : weight.shape[1]], np.ones(len(weight))
    earned = (weight * clicked).mean(axis=1)
    terms = {"ips": (earned, each), "snips": (earned, weight.mean(axis=1))}
    if predicted is not None:
        q = np.asarray(predicted, dtype=np.float64)
        if q.shape != weight.shape:
            raise ValueError(f"predicted has the shape {q.shape}; expected {weight.shape}, one a target slot")
        if wrong := int((~((q >= 0) & (q <= 1))).sum()):
            raise ValueError(f"predicted is outside [0, 1] or NaN in {wrong} of {q.size} slots; expected P(click)")
        terms["dr"] = ((q + weight * (clicked - q)).mean(axis=1), each)
    found = {}
    for name, (top, bottom) in terms.items():
        total = bottom.sum() or np.nan  # nothing matched: SNIPS is undefined
        value = float(top.sum() / total)
        found[name] = value, (top - value * bottom) / total
    return found


def _rows(log: Log, linearised: dict[str, tuple[float, np.ndarray]]) -> pd.DataFrame:
    """Student's t interval of 95 % by linearisation, sessions of a user together [C: no resampling, so no seed].

    With an effective sample of about 55 impressions it held the truth in about 88 % of logs (notebook 10).
    """
    user = np.unique(log.users, return_inverse=True)[1]
    rows = []
    for name, (value, influence) in linearised.items():
        by_user = np.bincount(user, influence)
        free = len(by_user) - 1
        error = float(np.sqrt((by_user**2).sum() * len(by_user) / free)) if free else np.nan
        half = float(student.ppf((1 + LEVEL) / 2, free)) * error if free else np.nan
        rows.append((name, value, error, value - half, value + half))
    return pd.DataFrame(rows, columns=["estimator", "value", "standard_error", "low", "high"])


def over_logs(
    traffic: Traffic, targets: Mapping[str, np.ndarray], predicted: Mapping[str, np.ndarray] | None = None, *,
    logs: int = 100, seed: int, against: str | None = None, clip: float | None = None, progress: bool = False
) -> pd.DataFrame:  # fmt: skip
    """Bias, spread and coverage of each estimator for each ranker, over `logs` logs of the traffic (Traffic.relog).

    targets    ranker -> the lists it would show (sessions, k), rows of the KB
    predicted  ranker -> the direct model's P(click) of each target slot (sessions, k); a ranker without has no dr
    against    one of the rankers: adds the differences of all others to it, paired
    Columns: ranker, against (empty: the ranker's own CTR), estimator, truth, mean, bias, standard_deviation (over
    logs), rmse, coverage of the interval, standard_error (mean of those stated), effective_sample_size and matched
    (means; NaN for a difference), clipped (mean), logs: those in which the estimate is defined, over which all of this
    is taken.
    Raises ValueError for fewer than two logs and for an unknown `against`.
    """
    if logs < 2:
        raise ValueError(f"logs is {logs}; a spread over logs needs two or more")
    if against is not None and against not in targets:
        raise ValueError(f"against is {against!r}; expected one of {', '.join(targets)}")
    predicted = predicted or {}
    truth = {(name, None): traffic.ctr(shown) for name, shown in targets.items()}
    for name in targets if against is not None else ():
        if name != against:
            truth[name, against] = truth[name, None] - truth[against, None]
    found = {key: [] for key in truth}
    for number in tqdm(range(logs), "logs", unit="log", delay=5, disable=not progress):
        drawn = traffic.relog(np.random.default_rng([seed, number]))
        log = Log(drawn.candidates, drawn.clicked, drawn.propensity, traffic.users)
        for name, other in truth:
            if other is None:
                table = estimates(log, targets[name], predicted.get(name), clip=clip)
            else:
                both = (predicted[name], predicted[other]) if {name, other} <= set(predicted) else None
                table = differences(log, (targets[name], targets[other]), both, clip=clip)
            found[name, other].append(table)
    return pd.DataFrame(
        {"ranker": name, "against": other, "estimator": estimator, **_summary(table, truth[name, other])}
        for (name, other), tables in found.items()
        for estimator, table in pd.concat(tables).groupby("estimator", sort=False)
    )


def _summary(table: pd.DataFrame, truth: float) -> dict[str, float]:
    """What `over_logs` says of one estimator of one figure; `table` has its row in every log."""
    table = table.dropna(subset="value")
    error, inside = table["value"] - truth, (table["low"] <= truth) & (truth <= table["high"])
    means = {name: table[name].mean() if name in table else np.nan for name in MEANS}
    return {
        "truth": truth,
        "mean": table["value"].mean(),
        "bias": error.mean(),
        "standard_deviation": table["value"].std(),
        "rmse": float(np.sqrt((error**2).mean())),
        "coverage": inside.mean(),
        **means,
        "logs": len(table),
    }
