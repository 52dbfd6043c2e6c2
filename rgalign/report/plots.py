"""Every figure of the notebooks: one function each, from a table to a matplotlib Figure.

The same model has the same colour and marker everywhere (Okabe and Ito's colour-blind-safe palette); markers and
hatches keep a figure readable in black and white.
"""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from rgalign.evaluation.bootstrap import Interval
from rgalign.evaluation.metrics import LABELS
from rgalign.evaluation.results import MODELS
from rgalign.experiment.ab_test import Monitored

MODEL_STYLE = {  # colour, marker
    "popularity": ("#999999", "v"),
    "word_overlap": ("#56B4E9", "p"),
    "raw_cosine": ("#CC79A7", "P"),
    "two_tower": ("#E69F00", "s"),
    "two_tower_text": ("#0072B2", "o"),
    "three_tower_no_query": ("#F0E442", "h"),
    "qe_rec": ("#009E73", "^"),
    "rgalign_rec": ("#D55E00", "D"),
    "oracle_discrete": ("#777777", "<"),
    "oracle": ("#000000", ">"),
}
NAMES = {"all": "reads every LLM", "one": "reads the main LLM alone"}  # reward models
REWARD_STYLE = {"all": ("#009E73", "o"), "one": ("#56B4E9", "s")}  # reward models, by their LLMs
SPLIT_STYLE = {"train": ("#56B4E9", ""), "valid": ("#E69F00", "//"), "test": ("#000000", "xx")}


def sessions_by_day(days: pd.DataFrame) -> Figure:
    """Sessions a day, coloured by split. days: columns day (datetime), split, sessions."""
    axes = panel((8, 2.8), "Sessions by day and split", "day", "sessions")
    for split, (colour, hatch) in SPLIT_STYLE.items():
        if len(part := days[days.split == split]):
            axes.bar(part.day, part.sessions, width=0.9, color=colour, hatch=hatch, edgecolor="white", label=split)
    legend_beside(axes)
    axes.figure.autofmt_xdate()
    return axes.figure


def feature_values(counts: pd.DataFrame) -> Figure:
    """Shares of the commonest values of some features. counts: columns feature, value, share."""
    features = list(dict.fromkeys(counts.feature))
    columns = min(4, len(features))
    rows = -(-len(features) // columns)
    figure, panels = panels_of(rows * columns, columns=columns, width=11, height=2.2 * rows)
    for axes, feature in zip(panels, features, strict=False):
        part = counts[counts.feature == feature].iloc[::-1]
        axes.barh([short(value) for value in part.value], part.share, color="#56B4E9")
        axes.set(title=short(feature, 40), xlabel="share of sessions")
    for axes in panels[len(features) :]:
        axes.set_visible(False)
    return figure


def intent_clicks(intents: pd.DataFrame) -> Figure:
    """Clicks in train of each intent, most clicked first. intents: columns clicks, group (head | tail | cold)."""
    axes = panel((8, 3), "A few intents get most clicks", "intent, by rank", "clicks in train + 0.5")
    ordered = intents.sort_values("clicks", ascending=False, kind="stable").reset_index(drop=True)
    for group, colour, hatch in (("head", "#56B4E9", ""), ("tail", "#E69F00", "//"), ("cold", "#D55E00", "xx")):
        part = ordered[ordered.group == group]
        style = {"color": colour, "hatch": hatch, "edgecolor": "white", "label": f"{group} ({len(part)})"}
        axes.bar(part.index, part.clicks + 0.5, width=0.9, **style)
    axes.set_yscale("log")
    axes.legend(frameon=False, title="intents")
    return axes.figure


def clicks_by_position(rates: pd.DataFrame) -> Figure:
    """Click rate by position. rates: columns position, lists (a label), rate, error (standard error)."""
    axes = panel((6, 3), "Clicks by position", "position in the list (1 = top)", "click rate (95 % interval)")
    styles = zip(("#0072B2", "#D55E00", "#009E73"), "os^", ("-", "--", ":"), strict=True)
    for (label, part), (colour, marker, line) in zip(rates.groupby("lists", sort=False), styles, strict=False):
        style = {"color": colour, "marker": marker, "linestyle": line, "label": label, "capsize": 2}
        axes.errorbar(part.position + 1, part.rate, 1.96 * part.error, **style)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return axes.figure


def learning_curves(curves: pd.DataFrame) -> Figure:
    """Training loss and development GAUC by epoch. curves: columns model, seed, epoch, train_loss, dev_gauc."""
    figure, (left, right) = panels_of(2, columns=2, width=9, height=3)
    for (model, seed), part in curves.groupby(["model", "seed"], sort=False):
        label = name_of(model) if seed == curves[curves.model == model].seed.iloc[0] else None
        for axes, column in ((left, "train_loss"), (right, "dev_gauc")):
            axes.plot(part.epoch, part[column], markersize=4, label=label, alpha=0.8, **_style(model))
    left.set(title="Training loss", xlabel="epoch", ylabel="loss (nats a list)")
    right.set(title="Development users", xlabel="epoch", ylabel="GAUC")
    left.legend(frameon=False)
    return figure


def search_results(trials: pd.DataFrame) -> Figure:
    """GAUC on valid of every configuration that was tried. trials: columns model, trial, valid_gauc."""
    axes = panel((6, 2.6), "The search: every configuration tried", "GAUC on valid")
    models = list(dict.fromkeys(trials.model))
    for row, model in enumerate(models):
        part = trials[trials.model == model]
        axes.plot(part.valid_gauc, np.full(len(part), row), linestyle="", alpha=0.7, **_style(model))
        best = part.valid_gauc.max()
        axes.annotate(f"best {best:.3f}", (best, row), xytext=(4, 6), textcoords="offset points", fontsize=8)
    axes.set_yticks(range(len(models)), map(name_of, models))
    axes.set_ylim(-0.5, len(models) - 0.3)
    axes.margins(x=0.15)
    return axes.figure


def models(results: pd.DataFrame, metrics: Sequence[str]) -> Figure:
    """Each model's metrics, one dot a ranker seed and a bar at their mean. results: columns model, metric, value."""
    names = list(dict.fromkeys(results.model))[::-1]
    width, height = 3.2 * len(metrics) + 1.5, 1 + 0.34 * len(names)
    figure, panels = panels_of(len(metrics), columns=len(metrics), width=width, height=height)
    for axes, metric in zip(panels, metrics, strict=True):
        for row, model in enumerate(names):
            style = _style(model)
            values = results[(results.model == model) & (results.metric == metric)].value
            axes.plot(values, np.full(len(values), row), linestyle="", alpha=0.6, **style)
            axes.plot([values.mean()] * 2, [row - 0.3, row + 0.3], color=style["color"], linewidth=2)
            axes.annotate(f"{values.mean():.3f}", (values.mean(), row + 0.32), ha="center", fontsize=8)
        axes.set_yticks(range(len(names)), map(name_of, names) if axes is panels[0] else [])
        axes.set_ylim(-0.5, len(names) - 0.2)
        axes.margins(x=0.12)
        axes.set_xlabel(LABELS.get(metric, metric))
    seeds = results.groupby("model")["seed"].nunique().max() if "seed" in results else 1
    panels[0].set_title(
        "Models on the same sessions" + (" (dot: ranker seed, bar: mean)" if seeds > 1 else ""), loc="left"
    )
    return figure


def differences(comparisons: pd.DataFrame, title: str) -> Figure:
    """Paired differences with their 95 % intervals. comparisons: columns label, difference, ci_low, ci_high."""
    lines = comparisons.label.str.count("\n").max() + 1 if len(comparisons) else 1
    axes = panel((7, 0.9 + (0.12 + 0.2 * lines) * len(comparisons)), title, "difference (95 %); right of zero: better")
    rows = np.arange(len(comparisons))[::-1]
    axes.errorbar(comparisons.difference, rows, xerr=_to_ends(comparisons), fmt="o", color="#0072B2", capsize=3)
    axes.axvline(0, color="#000000", linewidth=0.8, linestyle="--")
    axes.set_yticks(rows, comparisons.label)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    return axes.figure


def _to_ends(table: pd.DataFrame) -> np.ndarray:
    """(2, rows): from each difference down and up to the ends of its interval."""
    return np.abs(np.stack([table.difference - table.ci_low, table.ci_high - table.difference]))


def gain_by_distance(comparisons: pd.DataFrame) -> Figure:
    """A model's gain at each distance between what the LM has read and the shop, with 95 % intervals.

    comparisons  columns label, model, distance, difference, ci_low, ci_high
    """
    axes = panel((7, 3), "Gain against distance", ylabel="difference in GAUC (95 % interval)")
    axes.set_xlabel("distance between the LM's chats and this shop (0: its own kind)")
    for number, (label, part) in enumerate(comparisons.sort_values("distance").groupby("label", sort=False)):
        place = part.distance + 0.008 * number  # side by side, or one interval would hide the other
        style = _style(part.model.iloc[0])
        axes.errorbar(place, part.difference, _to_ends(part), label=label, capsize=3, **style)
    axes.axhline(0, color="#000000", linewidth=0.8, linestyle="--")
    axes.legend(frameon=False)
    return axes.figure


def distance_to_oracle(values: pd.DataFrame) -> Figure:
    """GAUC of every model, the best at the top: how far each is from the oracle. values: columns model, value."""
    ordered = values.sort_values("value", kind="stable").reset_index(drop=True)
    axes = panel((8, 0.9 + 0.28 * len(ordered)), "How far from what can be known", "GAUC on the test split")
    for row, model, value in ordered[["model", "value"]].itertuples():
        axes.plot([ordered["value"].min(), value], [row, row], color="#DDDDDD", linewidth=1, zorder=0)
        axes.plot(value, row, markersize=8, **_style(model))
        axes.annotate(f"{value:.3f}", (value, row), xytext=(8, -3), textcoords="offset points", fontsize=8)
    axes.set_yticks(ordered.index, map(name_of, ordered["model"]))
    axes.margins(x=0.08)
    return axes.figure


def ratios(benchmarks: pd.DataFrame) -> Figure:
    """Ours against each peer, on a log scale. benchmarks: columns name, peer, unit, ratio; above 1 ours is better."""
    known = benchmarks[benchmarks.ratio.notna()].iloc[::-1]
    axes = panel((9, 1 + 0.5 * len(known)), "Measured side by side in this run")
    axes.set_xlabel("ratio to the peer: speed, or error (right of 1: better)")
    peers = known.peer.str.split(r" \(|,", regex=True).str[0]
    axes.barh(range(len(known)), known.ratio, color="#56B4E9")
    axes.set_yticks(range(len(known)), known["name"] + "\nagainst " + peers, fontsize=8)
    for row, (ratio, unit) in enumerate(zip(known.ratio, known.unit, strict=True)):
        text = (f"{ratio:,.0f}x" if ratio >= 10 else f"{ratio:.2f}x") + (" less error" if unit == "GAUC" else "")
        axes.annotate(text, (ratio, row), xytext=(3, -3), textcoords="offset points", fontsize=8)
    axes.axvline(1, color="#000000", linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    axes.margins(x=0.15)
    return axes.figure


# The online experiment and the off-policy estimates.

FIRST, SECOND, TRUTH = "#0072B2", "#D55E00", "#000000"
ESTIMATORS = {
    "ips": ("IPS", "#E69F00", "s"), "snips": ("SNIPS", "#009E73", "^"), "dr": ("doubly robust (DR)", "#0072B2", "o"),
    "sndr": ("SNDR", "#56B4E9", "v"), "switch": ("SWITCH", "#CC79A7", "D"), "dros": ("DRos", "#D55E00", "P"),
}  # fmt: skip


def p_values(p: np.ndarray, title: str) -> Figure:
    """p-values of A/A tests (experiments,): of a valid test they are spread evenly."""
    axes = panel((7, 2.8), title, "p-value of no difference", "experiments")
    bins = np.linspace(0, 1, 21)
    axes.hist(p, bins=bins, color="#56B4E9", edgecolor="white")
    axes.axhline(len(p) / 20, color=TRUTH, linewidth=0.8, linestyle="--", label="evenly spread")
    legend_beside(axes)
    return axes.figure


def power(users: np.ndarray, chance: dict[str, np.ndarray]) -> Figure:
    """The chance to find each lift by the number of users (users,), on a log scale."""
    axes = panel((7, 3), "How many users does it take?", "users of both arms", "chance to find the lift")
    ways = ((FIRST, "-"), (SECOND, "--"), ("#009E73", ":"), ("#CC79A7", "-."))
    for (name, values), (colour, line) in zip(chance.items(), ways, strict=False):
        axes.plot(users, values, color=colour, linestyle=line, label=name)
    axes.axhline(0.8, color="grey", linewidth=0.8, label="a chance of 0.8")
    axes.set_xscale("log")
    legend_beside(axes)
    return axes.figure


def peeking(shares: dict[str, Interval]) -> Figure:
    """The share of A/A tests that were significant at some look so far: name -> (looks,) with its interval."""
    axes = panel((7, 3), "Wrong alarms if one may stop at any look", "looks so far", "share of A/A tests")
    for (name, share), (colour, marker) in zip(shares.items(), ((SECOND, "s"), (FIRST, "o")), strict=False):
        looks = np.arange(1, len(share.estimate) + 1)
        axes.plot(looks, share.estimate, color=colour, marker=marker, markersize=4, label=name)
        axes.fill_between(looks, share.low, share.high, color=colour, alpha=0.2, linewidth=0)
    axes.axhline(0.05, color=TRUTH, linewidth=0.8, linestyle="--", label="promised: 5 %")
    axes.set_ylim(0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_beside(axes)
    return axes.figure


def looks(users: np.ndarray, fixed: Interval, monitored: Monitored, truth: float) -> Figure:
    """One experiment as it goes on: the interval of one planned look, and of all of them at once (looks,)."""
    axes = panel((7, 3), "The difference in CTR@3, look by look", "users so far", "difference (95 %)")
    known = np.isfinite(monitored.difference.low)
    low, high = monitored.difference.low[known], monitored.difference.high[known]
    axes.fill_between(users[known], low, high, color=FIRST, alpha=0.2, linewidth=0, label="at all looks at once")
    error = [fixed.estimate - fixed.low, fixed.high - fixed.estimate]
    style = {"color": FIRST, "marker": "o", "markersize": 4, "capsize": 2}
    axes.errorbar(users, fixed.estimate, yerr=error, label="at one look", **style)
    axes.axhline(truth, color=TRUTH, linewidth=0.8, linestyle="--", label="truth")
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    legend_beside(axes)
    return axes.figure


def served_first(curves: Mapping[str, pd.DataFrame]) -> Figure:
    """CTR@3 against the share of sessions served, the most confident first (evaluation.confidence.served_first).

    curves  truth, debiased or both -> its table; the band is the 95 % interval
    """
    if not curves:
        return nothing("neither the truth nor propensities: what these sessions bring is unknown")
    axes = panel((6, 3.4), "CTR@3 where the most confident are served first", "share of the sessions served", "CTR@3")
    for name, curve in curves.items():
        colour, line = (TRUTH, "--") if name == "truth" else ("#0072B2", "-")
        axes.plot(curve["share"], curve["ctr"], color=colour, linestyle=line, marker="o", markersize=3, label=name)
        axes.fill_between(curve["share"], curve["low"], curve["high"], color=colour, alpha=0.15, linewidth=0)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    legend_beside(axes)
    return axes.figure


def off_policy(table: pd.DataFrame, labels: dict[str, str]) -> Figure:
    """Each estimator over many logs, ranker by ranker: its mean, and 1.96 of its standard deviations to both sides.

    table  of evaluation.over_logs, without differences; labels: ranker -> what the figure calls it
    """
    if table.empty:
        return nothing("no truth: how good the estimates are is unknown")
    rankers = [name for name in labels if name in set(table.ranker)]
    place = np.arange(len(rankers))
    axes = panel((8, 1.2 + 1.1 * len(rankers)), "CTR@3 from the log of another ranker")
    axes.set_xlabel("CTR@3: mean over logs, 1.96 standard deviations")
    shifts = np.linspace(-0.3, 0.3, len(ESTIMATORS))
    for shift, (name, (label, colour, marker)) in zip(shifts, ESTIMATORS.items(), strict=True):
        own = table[table.estimator == name].set_index("ranker").reindex(rankers)
        style = {"color": colour, "marker": marker, "linestyle": "", "capsize": 3, "label": label}
        axes.errorbar(own["mean"], place + shift, xerr=1.96 * own.standard_deviation, **style)
    truth = table.groupby("ranker").truth.first().reindex(rankers)
    axes.vlines(truth, place - 0.4, place + 0.4, color=TRUTH, label="truth")
    axes.set_yticks(place, [labels[name] for name in rankers])
    axes.invert_yaxis()
    legend_beside(axes)
    return axes.figure


def panel(size: tuple[float, float], title: str = "", xlabel: str = "", ylabel: str = "") -> Axes:
    """The only axes of a figure of this (width, height)."""
    _, (axes,) = panels_of(1, width=size[0], height=size[1])
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return axes


def nothing(why: str) -> Figure:
    """A figure that says why there is none."""
    axes = panel((6, 1))
    axes.set_axis_off()
    axes.text(0.5, 0.5, why, ha="center", va="center")
    return axes.figure


def panels_of(panels: int, *, columns: int = 1, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure in the style of this module and its axes, row by row."""
    shape = {"nrows": -(-panels // columns), "ncols": columns, "figsize": (width, height)}
    figure, axes = plt.subplots(**shape, layout="constrained", squeeze=False)
    for each in axes.flat:
        each.spines[["top", "right"]].set_visible(False)
    plt.close(figure)  # the notebook shows what the cell returns; an open figure would be shown twice
    return figure, list(axes.flat)


def legend_beside(axes: Axes, **more) -> None:
    """The legend to the right of the axes, where it hides nothing."""
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), **more)


def _style(model: str) -> dict[str, str]:
    """A control (qe_rec/no_text) has its parent's colour and a marker of its own."""
    colour, marker = (MODEL_STYLE | REWARD_STYLE).get(model.split("/")[0], ("#CC79A7", "D"))
    return {"color": colour, "marker": "X" if "/" in model else marker}


def name_of(model: str) -> str:
    """What a figure calls a model: its label, and of a reward model what it reads."""
    kind = model.rpartition("/")[2] if model.startswith("fold-") else model
    return MODELS.get(model, NAMES.get(kind, model)) + (f", without {model.split('/')[0]}" if kind != model else "")


def short(value: object, length: int = 18) -> str:
    """A label of at most `length` characters, safe for matplotlib."""
    text = str(value).replace("$", r"\$")  # matplotlib would read a pair of dollars as mathematics
    return text if len(text) <= length else text[: length - 1] + "…"
