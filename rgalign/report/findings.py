"""What a table says, in a line that begins with "So:". The notebooks print it beneath the table."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from rgalign.evaluation.metrics import LABELS
from rgalign.evaluation.results import UNTRAINED
from rgalign.report.plots import name_of


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
    groups = {"among the trained models": mean[~mean.index.isin([*UNTRAINED, "oracle", "oracle_discrete"])]}
    groups |= {"among those without training": mean[mean.index.isin(UNTRAINED)]}
    said = [f"{name_of(own.idxmax())} ({own.max():.3f}) {of}" for of, own in groups.items() if len(own)]
    return f"So: {where} the highest GAUC is that of {', and of '.join(said)}."


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
        "it knows where it is good." if clear else "the intervals overlap, so that is not shown."
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


def hits(rates: pd.DataFrame, queries: int) -> str:
    """How often a greedy query leads to the click. rates: summaries.hit_rates"""
    if rates.empty:
        return "So: an encoder writes nothing that could hit."
    first, third = rates.iloc[0]
    return f"So: of {queries:,} greedy queries {first:.1%} lead to the clicked intent first, {third:.1%} among three."


def left_to_win(means: pd.DataFrame) -> str:
    """How far the best model is from the oracle. means: columns model, value (GAUC)"""
    value = means.set_index("model")["value"]
    if "oracle" not in value:
        return "So: what is left to win is unknown; nobody knows the truth of these data."
    own = value.drop(["oracle", "oracle_discrete"])
    gaps = [f"{value[name] - own.max():+.3f}" for name in ("oracle_discrete", "oracle")]
    best = f"{name_of(own.idxmax())} ({own.max():.3f})"
    return f"So: to {best} a perfect reader of the columns adds {gaps[0]}, one who reads the texts as well {gaps[1]}."


def ctr(table: pd.DataFrame) -> str:
    """What each arm earns, and the ceiling. table: simulated.Simulation.true_ctr"""
    if table.empty:
        return "So: nothing can be simulated; nobody knows the truth of these data."
    value = table["true CTR@3"]
    *arms, _, ceiling = [f"{number:.3f} ({name})" for name, number in value.items()]
    return f"So: the true CTR@3 is {', '.join(arms)}; nothing can pass {ceiling}."


def lifts(found: pd.DataFrame) -> str:
    """What the experiment finds of the last arm. found: summaries.lifts"""
    if found.empty:
        return "So: no experiment, since nobody can be asked what they would have clicked."
    row = found[found["method"] == "plain"].iloc[-1]
    clear = row.relative_low > 0 or row.relative_high < 0
    interval = f"{row.relative:+.1%} [{row.relative_low:.1%}, {row.relative_high:.1%}]"
    return (
        f"So: {name_of(row.treatment)} over {name_of(row.control)}: lift {interval}, where {row.truth:+.1%} is true; "
        f"{'significant' if clear else 'not significant'}."
    )


def alarms(table: pd.DataFrame, promised: float = 0.05) -> str:
    """Which tests are wrong more often than they promise. table: summaries.rejections"""
    if table.empty:
        return "So: no test was simulated."
    wrong = table[table["low"] > promised]
    named = ", ".join(f"{row.test} ({row.share:.1%})" for row in wrong.itertuples())
    return f"So: wrong more often than {promised:.0%}: {named or 'none'}; the others keep to it."


def estimates(judged: pd.DataFrame, has_log: bool) -> str:
    """Whether a log can tell the last two arms apart. judged: Simulation.over_logs"""
    pair = judged[judged["against"].notna() & (judged["estimator"] == "dr")] if len(judged) else judged
    if pair.empty:
        return "So: how good the estimates are is unknown without a truth." if has_log else "So: there is no such log."
    row = pair.iloc[-1]
    can = abs(row.truth) > 1.96 * row.standard_deviation
    pair, spread = f"{name_of(row.ranker)} and {name_of(row.against)}", f"{row.standard_deviation:.4f}"
    found = f"one week's log has a standard deviation of {spread} (DR)"
    return f"So: {pair} truly differ by {row.truth:+.4f} in CTR@3; {found}, so it {'can' if can else 'cannot'} tell."


def places(found: Mapping[str, np.ndarray]) -> str:
    """Where the click stands before the first and after the last step. found: name -> (sessions,) places from 1"""
    first, *_, last = [f"{np.nanmean(own):.2f} ({name})" for name, own in found.items()]
    return f"So: the click's mean place goes from {first} to {last}; the top of the list is 1."
