"""The tables of notebook 10: what an experiment found, and how often it would have been wrong."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from rgalign.data.lists import Lists
from rgalign.data.vectors import Vectors
from rgalign.evaluation.ab_plan import sample_ratio
from rgalign.evaluation.ab_test import Lift, guardrails, lift
from rgalign.evaluation.judge import Judge
from rgalign.evaluation.online import Audience, Experiment
from rgalign.evaluation.results import MODELS
from rgalign.evaluation.sequential import rejected_by_look
from rgalign.ranker.untrained import log_clicks

POPULARITY = "popularity"
LIFT = ["difference", "ci_low", "ci_high", "relative", "relative_low", "relative_high", "p_value"]
FOUND = ["treatment", "control", "method", "users", "ctr_control", "ctr_treatment", *LIFT, "variance_removed", "truth"]


def arms_of(models: Iterable[str], most: int = 3) -> list[str]:
    """The last few of popularity and the trained models that are no controls, in the order of results.MODELS."""
    return [name for name in MODELS if name == POPULARITY or (name in models and "/" not in name)][-most:]


def scores_of(
    bench: Judge, model, name: str, vectors: tuple[Vectors, Vectors] | None, train: Lists, seed: int
) -> np.ndarray:
    """Scores (lists, intents) by which a ranker ranks the KB for the judge's sessions; -inf for what did not exist yet.

    model    None: popularity, by the clicks in train
    vectors  of sessions and intents, None where the model reads none; seed: of the order of shuffled queries
    """
    if name == POPULARITY:
        found = np.broadcast_to(log_clicks(train, bench.intents), bench.exists.shape)
    else:
        found = (bench.with_vectors(name, *vectors, train, seed) if vectors else bench).over_kb(model)
    return np.where(bench.exists, found, -np.inf)


def sample_ratios(experiment: Experiment, arms: Sequence[str]) -> pd.DataFrame:
    """Users of each arm, and whether they fit an equal split: arm, users, planned, p_value, alarm."""
    users = np.array([(experiment.arm == name).sum() for name in arms])
    ratio = sample_ratio(users)
    planned = np.full(len(arms), users.sum() / len(arms))
    fixed = {"p_value": float(ratio.p_value), "alarm": bool(ratio.alarm)}
    return pd.DataFrame({"arm": list(arms), "users": users, "planned": planned}).assign(**fixed)


def lifts(experiment: Experiment, pairs: Sequence[tuple[str, str]], audience: Audience) -> pd.DataFrame:
    """One row a pair (treatment, control) and method (plain | CUPED); truth: the relative lift that is to be found."""
    rows = []
    for treatment, control in pairs:
        for method in ("plain", "CUPED"):
            new, old = experiment.of_arms(treatment, control, cuped=method == "CUPED")
            found = lift(new, old)
            rows.append(
                {
                    "treatment": treatment,
                    "control": control,
                    "method": method,
                    "users": int(new.users + old.users),
                    "ctr_control": float(old.ctr),
                    "ctr_treatment": float(new.ctr),
                    **{name: float(value) for name, value in _told(found).items()},
                    "variance_removed": float(found.variance_removed),
                    "truth": audience.ctr(treatment) / audience.ctr(control) - 1,
                }
            )
    return pd.DataFrame(rows, columns=FOUND)


def by_group(
    experiment: Experiment, treatment: str, control: str, masks: pd.DataFrame, audience: Audience
) -> pd.DataFrame:
    """The lift in each group, with intervals that hold for all groups at once: group, users, LIFT, truth.

    masks  bool columns, one a group, rows as the audience's sessions (evaluation.slices)
    """
    inside = [masks[name].to_numpy(dtype=bool) for name in masks]
    new, old = experiment.by_group(inside, treatment, control)
    ctr = {name: [audience.probability[name][mask].mean() for mask in inside] for name in (treatment, control)}
    truth = np.array(ctr[treatment]) - ctr[control]
    users = (new.users + old.users).astype(int)
    told = _told(guardrails(new, old))
    return pd.DataFrame({"group": list(masks), "users": users, **told, "truth": truth})


def rejections(p: Mapping[str, np.ndarray], *, alpha: float = 0.05) -> pd.DataFrame:
    """How often each test of A/A experiments was significant: test, share, low, high (Wilson, 95 %), experiments.

    p  test -> (experiments,), or (experiments, looks): then at any of the looks
    """
    rows = []
    for name, values in p.items():
        share = rejected_by_look(values.reshape(len(values), -1), alpha=alpha)
        rows.append((name, *(float(part[-1]) for part in share), len(values)))
    return pd.DataFrame(rows, columns=["test", "share", "low", "high", "experiments"])


def _told(found: Lift) -> dict[str, np.ndarray]:
    values = (*found.difference, *found.relative, found.p_value)
    return dict(zip(LIFT, values, strict=True))
