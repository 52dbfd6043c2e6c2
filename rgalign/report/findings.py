"""What a table says, in a line that begins with "So:". The notebooks print it beneath the table."""

import pandas as pd

from rgalign.evaluation.metrics import LABELS
from rgalign.evaluation.results import MODELS, UNTRAINED


def name_of(model: str) -> str:
    return MODELS.get(model, model)


def compared(table: pd.DataFrame, model: str, against: str, where: str, metric: str = "gauc") -> str:
    """'So: on valid QE-Rec is better than two-tower + text: GAUC +0.0436 [0.0331, 0.0545].' table: comparisons"""
    own = (table["model"] == model) & (table["against"] == against) & (table["metric"] == metric)
    if "slice" in table:
        own &= table["slice"] == "all"
    if not own.any():
        return f"So: {where} {name_of(model)} and {name_of(against)} were not compared."
    row = table[own].iloc[0]
    better, worse = row.ci_low > 0, row.ci_high < 0
    found = "is better than" if better else "is worse than" if worse else "does not differ significantly from"
    interval = f"{row.difference:+.4f} [{row.ci_low:.4f}, {row.ci_high:.4f}]"
    return f"So: {where} {name_of(model)} {found} {name_of(against)}: {LABELS.get(metric, metric)} {interval}."


def best(results: pd.DataFrame, where: str) -> str:
    """Which model has the highest GAUC, and which of those without training. results: model, metric, value"""
    mean = results[results["metric"] == "gauc"].groupby("model")["value"].mean()
    groups = {"of the trained models": mean[~mean.index.isin([*UNTRAINED, "oracle", "oracle_discrete"])]}
    groups |= {"of those without training": mean[mean.index.isin(UNTRAINED)]}
    said = [f"{of} {name_of(own.idxmax())} ({own.max():.3f})" for of, own in groups.items() if len(own)]
    return f"So: {where} the highest GAUC has, {' and, '.join(said)}."


def groups(table: pd.DataFrame, what: str = "slices") -> str:
    """In how many groups something is gained or lost. table: a row a group, with ci_low and ci_high"""
    gains, losses = int((table["ci_low"] > 0).sum()), table[table["ci_high"] < 0]
    named = f" ({', '.join(losses.iloc[:, 0].astype(str))})" if len(losses) else ""
    unknown = len(table) - gains - len(losses)
    return f"So: of {len(table)} {what} {gains} gain, {len(losses)} lose{named}; in {unknown} nothing is significant."


def served(curve: pd.DataFrame) -> str:
    """Whether the sessions that a ranker is sure of bring more. curve: evaluation.confidence.served_first"""
    if curve.empty:
        return "So: nothing is known; the log has no propensities, so what a click would have been is unknown."
    half, whole = curve[curve["share"] <= 0.5].iloc[-1], curve.iloc[-1]
    said = [f"{row.ctr:.3f} [{row.low:.3f}, {row.high:.3f}]" for row in (half, whole)]
    clear = half.low > whole.high
    return f"So: the surer half brings {said[0]}, all sessions {said[1]}; " + (
        "it knows where it is good." if clear else "the intervals overlap, so this log does not show it."
    )


def step(rows: pd.DataFrame) -> str:
    """What the last step changed on valid. rows: two of the stage table"""
    moved = (rows.iloc[-1] - rows.iloc[0]).reindex(["ranking", "reward", "ihr@1"]).dropna()
    said = ", ".join(f"{name} {value:+.4f}" for name, value in moved.items())
    return f"So: from `{rows.index[0]}` to `{rows.index[-1]}`, {said} (one run, no interval)."


def steps(rows: pd.DataFrame) -> str:
    """Which step moved the ranking most, and which the reward. rows: the stage table"""
    moved = rows[["ranking", "reward"]].astype(float).diff().dropna(how="all")
    most = [(name, moved[name].abs().idxmax()) for name in moved if moved[name].notna().any()]
    said = " and ".join(f"the {name} moved most at `{at}` ({moved.loc[at, name]:+.4f})" for name, at in most)
    return f"So: {said}."


def optimism(table: pd.DataFrame) -> str:
    """What choosing by in-sample rewards promises and does not keep. table: judge_reward.optimism"""
    promised, kept = table["best"]["in-sample"], table["best"]["best in-sample, cross-fitted"]
    return (
        f"So: the best queries by in-sample rewards promise {promised:.3f} nats; models that were not trained on these "
        f"users give the same queries {kept:.3f} ({kept - promised:+.3f})."
    )
