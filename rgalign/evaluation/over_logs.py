"""How good off-policy estimates are, where the truth is known: over many logs of the same sessions of a ShopWorld."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from tqdm import tqdm

from rgalign.data.world_traffic import Traffic
from rgalign.evaluation.off_policy import Log, differences, estimates


def over_logs(
    traffic: Traffic,
    targets: Mapping[str, np.ndarray],
    predicted: Mapping[str, np.ndarray] | None = None,
    *,
    logs: int = 100,
    seed: int,
    against: str | None = None,
    clip: float | None = None,
    level: float = 0.95,
    progress: bool = False,
) -> pd.DataFrame:
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
    others = [name for name in targets if against is not None and name != against]
    truth = {(name, None): traffic.ctr(shown) for name, shown in targets.items()}
    truth |= {(name, against): truth[name, None] - truth[against, None] for name in others}
    found = {key: [] for key in truth}
    for number in tqdm(range(logs), "logs", unit="log", delay=5, disable=not progress):
        drawn = traffic.relog(np.random.default_rng([seed, number]))
        log = Log(drawn.candidates, drawn.clicked, drawn.propensity, traffic.users)
        for name, other in truth:
            found[name, other].append(_one(log, name, other, targets, predicted or {}, {"clip": clip, "level": level}))
    return pd.DataFrame(
        {"ranker": name, "against": other, "estimator": estimator, **_summary(table, truth[name, other])}
        for (name, other), tables in found.items()
        for estimator, table in pd.concat(tables).groupby("estimator", sort=False)
    )


def _one(log: Log, name: str, other: str | None, targets: Mapping, predicted: Mapping, how: dict) -> pd.DataFrame:
    if other is None:
        return estimates(log, targets[name], predicted.get(name), **how)
    both = (predicted[name], predicted[other]) if name in predicted and other in predicted else None
    return differences(log, (targets[name], targets[other]), both, **how)


def _summary(table: pd.DataFrame, truth: float) -> dict[str, float]:
    """What `over_logs` says of one estimator of one figure; `table` has its row in every log."""
    table = table.dropna(subset="value")
    error = table["value"] - truth
    return {
        "truth": truth,
        "mean": table["value"].mean(),
        "bias": error.mean(),
        "standard_deviation": table["value"].std(),
        "rmse": float(np.sqrt((error**2).mean())),
        "coverage": ((table["low"] <= truth) & (truth <= table["high"])).mean(),
        "standard_error": table["standard_error"].mean(),
        "effective_sample_size": table["effective_sample_size"].mean() if "matched" in table else np.nan,
        "matched": table["matched"].mean() if "matched" in table else np.nan,
        "clipped": table["clipped"].mean(),
        "logs": len(table),
    }
