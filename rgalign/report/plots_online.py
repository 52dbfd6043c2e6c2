"""Figures of the online experiment and of the off-policy estimates. Style and palette are those of `plots`."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from rgalign.evaluation.bootstrap import Interval
from rgalign.experiment.ab_test import Monitored
from rgalign.report.plots import panels_of

FIRST, SECOND, TRUTH = "#0072B2", "#D55E00", "#000000"
ESTIMATORS = {
    "ips": ("IPS", "#E69F00", "s"),
    "snips": ("SNIPS", "#009E73", "^"),
    "dr": ("doubly robust", "#0072B2", "o"),
}


def p_values(p: np.ndarray, title: str) -> Figure:
    """p-values of A/A tests (experiments,): of a valid test they are spread evenly."""
    figure, (axes,) = panels_of(1, width=7, height=2.8)
    bins = np.linspace(0, 1, 21)
    axes.hist(p, bins=bins, color="#56B4E9", edgecolor="white")
    axes.axhline(len(p) / 20, color=TRUTH, linewidth=0.8, linestyle="--", label="evenly spread")
    axes.set(title=title, xlabel="p-value of no difference", ylabel="experiments")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def power(users: np.ndarray, chance: dict[str, np.ndarray]) -> Figure:
    """The chance to find each lift by the number of users (users,), on a log scale."""
    figure, (axes,) = panels_of(1, width=7, height=3)
    ways = ((FIRST, "-"), (SECOND, "--"), ("#009E73", ":"), ("#CC79A7", "-."))
    for (name, values), (colour, line) in zip(chance.items(), ways, strict=False):
        axes.plot(users, values, color=colour, linestyle=line, label=name)
    axes.axhline(0.8, color="grey", linewidth=0.8, label="a chance of 0.8")
    axes.set_xscale("log")
    axes.set(title="How many users does it take?", xlabel="users of both arms", ylabel="chance to find the lift")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def peeking(shares: dict[str, Interval]) -> Figure:
    """The share of A/A tests that were significant at some look so far: name -> (looks,) with its interval."""
    figure, (axes,) = panels_of(1, width=7, height=3)
    for (name, share), (colour, marker) in zip(shares.items(), ((SECOND, "s"), (FIRST, "o")), strict=False):
        looks = np.arange(1, len(share.estimate) + 1)
        axes.plot(looks, share.estimate, color=colour, marker=marker, markersize=4, label=name)
        axes.fill_between(looks, share.low, share.high, color=colour, alpha=0.2, linewidth=0)
    axes.axhline(0.05, color=TRUTH, linewidth=0.8, linestyle="--", label="promised: 5 %")
    axes.set(title="Wrong alarms if one may stop at any look", xlabel="looks so far", ylabel="share of A/A tests")
    axes.set_ylim(0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def looks(users: np.ndarray, fixed: Interval, monitored: Monitored, truth: float) -> Figure:
    """One experiment as it goes on: the interval of one planned look, and of all of them at once (looks,)."""
    figure, (axes,) = panels_of(1, width=7, height=3)
    known = np.isfinite(monitored.difference.low)
    axes.fill_between(
        users[known], monitored.difference.low[known], monitored.difference.high[known],
        color=FIRST, alpha=0.2, linewidth=0, label="at all looks at once",
    )  # fmt: skip
    error = [fixed.estimate - fixed.low, fixed.high - fixed.estimate]
    axes.errorbar(
        users, fixed.estimate, yerr=error, color=FIRST, marker="o", markersize=4, capsize=2, label="at one look"
    )
    axes.axhline(truth, color=TRUTH, linewidth=0.8, linestyle="--", label="truth")
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set(title="The difference in CTR@3, look by look", xlabel="users so far", ylabel="difference (95 %)")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def off_policy(table: pd.DataFrame, labels: dict[str, str]) -> Figure:
    """Each estimator over many logs, ranker by ranker: its mean, and 1.96 of its standard deviations to both sides.

    table  of evaluation.over_logs, without differences; labels: ranker -> what the figure calls it
    """
    rankers = [name for name in labels if name in set(table.ranker)]
    figure, (axes,) = panels_of(1, width=8, height=1.2 + 0.7 * len(rankers))
    for shift, (name, (label, colour, marker)) in zip((0.22, 0, -0.22), ESTIMATORS.items(), strict=True):
        own = table[table.estimator == name].set_index("ranker").reindex(rankers)
        axes.errorbar(
            own["mean"], np.arange(len(rankers)) + shift, xerr=1.96 * own.standard_deviation,
            color=colour, marker=marker, linestyle="", capsize=3, label=label,
        )  # fmt: skip
    truth = table.groupby("ranker").truth.first().reindex(rankers)
    axes.vlines(truth, np.arange(len(rankers)) - 0.4, np.arange(len(rankers)) + 0.4, color=TRUTH, label="truth")
    axes.set_yticks(range(len(rankers)), [labels[name] for name in rankers])
    axes.invert_yaxis()
    axes.set(title="CTR@3 from the log of another ranker", xlabel="CTR@3: mean over logs, 1.96 standard deviations")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
