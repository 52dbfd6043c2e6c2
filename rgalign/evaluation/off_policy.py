"""What CTR@k a ranker would have had, from a log that another policy wrote with its propensities.

CTR@k = clicks on the k intents shown, divided by impressions of them. The item-position model: a click depends on the
session, the intent and its position, not on the rest of the list (Li, Abbasi-Yadkori, Kveton, Muthukrishnan, Vinay,
Wen 2018, "Offline evaluation of ranking policies with click models"). So a target slot counts where the log happened
to show the same intent at the same position, with the weight w = 1 / propensity, and 0 elsewhere (`estimates`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.compute as pc
from scipy.stats import t as student
from tqdm import tqdm

from rgalign.data import tables
from rgalign.data.features import as_strings, ids_of
from rgalign.data.schema import Table
from rgalign.data.tables import Dataset
from rgalign.evaluation.bootstrap import LEVEL
from rgalign.shopworld.traffic import Traffic

LARGEST = 1e12  # a weight where none is clipped: its square, summed over a log, is still a number [C]
SHRINKAGE = (np.inf, 1000.0, 100.0, 10.0, 1.0)  # lambda of dros; inf: dr
THRESHOLDS = (np.inf, 100.0, 20.0, 5.0)  # tau of switch; inf: dr
MEANS = ("standard_error", "effective_sample_size", "matched", "clipped")  # of `estimates`, in `over_logs`
_MISSING = (
    "impressions.parquet of {name!r} has no column propensity = P(this intent at this position | session), as the "
    "policy that wrote the log drew it. Without it nobody can say what another ranker would have earned. Nothing was "
    "estimated. Log it where the lists are drawn, by a policy that explores; for this log there is only an A/B test"
)


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

    @cached_property
    def user(self) -> np.ndarray:
        """0, 1, .. (sessions,)"""
        return np.unique(self.users, return_inverse=True)[1]

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

    @classmethod
    def read(cls, folder: Path, split: str) -> "Log | None":
        """That of one split of a run's own tables; None where `of` would refuse them."""
        if "propensity" not in Table(folder, "impressions").schema_arrow.names:
            return None
        dataset = tables.excerpt(folder, [], splits=(split,), whole_lists=True)
        return cls.of(dataset) if dataset.meta.get("position_is_real", True) else None


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


def log_of(dataset: Dataset) -> tuple[Log | None, str]:
    """The log that estimates can be made from; or None, and why these data have none."""
    try:
        return Log.of(dataset), ""
    except ValueError as error:
        return None, str(error)


def estimates(
    log: Log, target: np.ndarray, predicted: np.ndarray | None = None, *, clip: float | None = None
) -> pd.DataFrame:
    """CTR@k of a ranker's lists, one row an estimator:

    ips    mean of w * clicked (Horvitz & Thompson 1952). Unbiased where every target slot had a chance to be logged.
    snips  sum of w * clicked / sum of w (Swaminathan & Joachims 2015). Bias of order 1 / effective sample. NaN where
           nothing matched.
    dr     mean of q + w * (clicked - q), q the predicted click probability of the target slot (Dudik, Langford & Li
           2011; Dudik, Erhan, Langford & Li 2014): unbiased as IPS, whatever q; the better q, the smaller the variance
    sndr   mean of q + sum of w * (clicked - q) / sum of w (Thomas & Brunskill 2016). As SNIPS, which it is where q = 0
    switch dr with w * [w <= tau]: beyond tau the direct model alone (Wang, Agarwal & Dudik 2017)
    dros   dr with lambda * w / (w^2 + lambda), which never exceeds sqrt(lambda) / 2 (Su, Dimakopoulou, Krishnamurthy &
           Dudik 2020)

    tau is one of THRESHOLDS and lambda one of SHRINKAGE, that of the least estimated mean squared error: with w' for
    the new weights, (mean of (w' - w) * (clicked - q))^2 + the variance by users. The error of the choice is not in
    the standard error: with an effective sample of 60 their intervals held the truth in 70 to 95 % of 200 ShopWorld
    logs, SNDR's in 88 to 97 %, and SNDR had the smaller error.

    target     (sessions, k) rows in intents.parquet, from position 0 on
    predicted  (sessions, k) the direct model's P(click) of each target slot, made without the clicks of `log`; None:
               ips and snips alone
    clip       the largest w (evaluation.experiment.clip): trades variance for bias. IPS then reads too low, DR leans
               on q. It bounds what one slot can do: IPS lies in [0, clip], DR in [1 - clip, clip], SNIPS in [0, 1],
               SNDR in [-1, 2]
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
    """Each estimator's value, and what each session moves it by (sessions,): its influence function."""
    clicked, each = log.clicked[:, : weight.shape[1]], np.ones(len(weight))
    earned, weights = (weight * clicked).mean(axis=1), weight.mean(axis=1)
    found = {"ips": _of_ratios((earned, each)), "snips": _of_ratios((earned, weights))}
    if predicted is None:
        return found
    q = np.asarray(predicted, dtype=np.float64)
    if q.shape != weight.shape:
        raise ValueError(f"predicted has the shape {q.shape}; expected {weight.shape}, one a target slot")
    if wrong := int((~((q >= 0) & (q <= 1))).sum()):
        raise ValueError(f"predicted is outside [0, 1] or NaN in {wrong} of {q.size} slots; expected P(click)")
    error = clicked - q

    def corrected(own: np.ndarray) -> tuple[float, np.ndarray]:
        return _of_ratios(((q + own * error).mean(axis=1), each))

    def squared_error(own: np.ndarray) -> float:
        return ((own - weight) * error).mean() ** 2 + np.nan_to_num(_variance(log, corrected(own)[1]))

    cut = [weight * (weight <= tau) for tau in THRESHOLDS]
    shrunk = [shrunken(weight, by) for by in SHRINKAGE]
    return found | {
        "dr": corrected(weight),
        "sndr": _of_ratios((q.mean(axis=1), each), ((weight * error).mean(axis=1), weights)),
        "switch": corrected(min(cut, key=squared_error)),
        "dros": corrected(min(shrunk, key=squared_error)),
    }


def shrunken(weight: np.ndarray, by: float) -> np.ndarray:
    """The weights of dros, lambda * w / (w^2 + lambda); by: lambda, 0 (no weight is left) to inf (all as they are)."""
    return weight if np.isinf(by) else by * weight / np.where(weight > 0, weight**2 + by, 1)


def _of_ratios(*ratios: tuple[np.ndarray, np.ndarray]) -> tuple[float, np.ndarray]:
    """Sum of ratios, each of two sums over sessions (top, bottom), and what each session moves it by (sessions,)."""
    value, influence = 0.0, np.zeros(len(ratios[0][0]))
    for top, bottom in ratios:
        total = bottom.sum() or np.nan  # nothing matched: SNIPS and SNDR are undefined
        ratio = float(top.sum() / total)
        value, influence = value + ratio, influence + (top - ratio * bottom) / total
    return value, influence


def _variance(log: Log, influence: np.ndarray) -> float:
    """Variance of an estimate, sessions of a user together; NaN where there is one user."""
    by_user = np.bincount(log.user, influence)
    users = len(by_user)
    return float((by_user**2).sum() * users / (users - 1)) if users > 1 else np.nan


def _rows(log: Log, linearised: dict[str, tuple[float, np.ndarray]]) -> pd.DataFrame:
    """Student's t interval of 95 % by linearisation, sessions of a user together [C: no resampling, so no seed].

    With an effective sample of about 55 impressions it held the truth in about 88 % of logs (notebook 10).
    """
    free, rows = log.user.max(initial=0), []
    for name, (value, influence) in linearised.items():
        error = float(np.sqrt(_variance(log, influence)))
        half = float(student.ppf((1 + LEVEL) / 2, free)) * error if free else np.nan
        rows.append((name, value, error, value - half, value + half))
    return pd.DataFrame(rows, columns=["estimator", "value", "standard_error", "low", "high"])


def session_values(log: Log, target: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """(sessions,) values whose mean is `sndr` of `estimates`, and whose spread over users is its standard error.

    Arguments as in `estimates`; no weight is clipped. One value alone can be far outside [0, 1]. NaN where nothing of
    the target was shown.
    """
    value, influence = _linearised(log, slot_weights(log, target), predicted)["sndr"]
    return value + len(influence) * influence


def over_logs(
    traffic: Traffic, targets: Mapping[str, np.ndarray], predicted: Mapping[str, np.ndarray] | None = None, *,
    logs: int = 100, seed: int, against: str | None = None, clip: float | None = None, progress: bool = False
) -> pd.DataFrame:  # fmt: skip
    """Bias, spread and coverage of each estimator for each ranker, over `logs` logs of the traffic (Traffic.relog).

    targets    ranker -> the lists it would show (sessions, k), rows of the KB
    predicted  ranker -> the direct model's P(click) of each target slot (sessions, k); a ranker without has ips and
               snips alone
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
