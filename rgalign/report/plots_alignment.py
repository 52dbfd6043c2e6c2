"""Figures of the alignment: the reward, the steps' curves, what they change. Style and palette are those of `plots`."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rgalign.evaluation.results import METRIC_NAMES
from rgalign.report.plots import panels_of

BEFORE, AFTER, THIRD = "#0072B2", "#D55E00", "#009E73"
LABELS = {
    **METRIC_NAMES,
    "ranking": "GAUC on valid, query tower refitted",
    "reward": "reward of the greedy query, nats",
    "kl": "KL to the reference, nats a query",
    "tokens": "tokens a query",
    "distinct": "share of different queries",
    "loss": "loss that is minimised, nats",
    "preference": "preference loss, nats",
    "contrastive": "InfoNCE, nats",
    "language": "language loss, nats a token",
    "effective_rank": "effective rank of a batch",
    "uniformity": "uniformity",
    "alignment": "squared distance to the click",
    "chosen_ratio": "log ratio of the chosen, nats",
    "rejected_ratio": "log ratio of the rejected, nats",
    "accuracy": "share of pairs with chosen ahead",
    "margin": "beta x margin, nats",
}
# a panel shows at least so much, so that what hardly moves looks so
LEAST = {"ranking": 0.02, "reward": 0.02, "ihr@1": 0.02, "ihr@3": 0.02, "kl": 0.1, "tokens": 1.0, "distinct": 0.1}
START = {"accuracy": 0.5, "margin": 0, "chosen_ratio": 0, "rejected_ratio": 0}  # where the policy is its reference


def curve(table: pd.DataFrame, columns: Sequence[str], title: str) -> Figure:
    """One panel a column over the steps; dashed: where nothing has been learnt yet.

    table  column step and those of `columns` that it has
    """
    there = [name for name in columns if name in table]
    wide = min(3, max(1, len(there)))
    figure, panels = panels_of(max(1, len(there)), columns=wide, width=max(5, 3.7 * wide), height=_height(there))
    for axes in panels[len(there) :]:
        axes.set_axis_off()
    for axes, name in zip(panels, there, strict=False):
        axes.plot(table["step"], table[name], color=BEFORE, marker="o", ms=2.5)
        if name in START:
            axes.axhline(START[name], color="grey", lw=0.8, ls="--")
        _spread(axes, name)
        axes.set(xlabel="optimiser step", title=LABELS.get(name, name))
    if not there:
        panels[0].text(0.5, 0.5, "this step is switched off", ha="center")
    figure.suptitle(title)
    return figure


def queries_by_reward(scored: pd.DataFrame) -> Figure:
    """Rewards of queries that lead to the click and of those that do not. scored: columns reward, right (bool).

    The half per cent at either end is not shown.
    """
    figure, (axes,) = panels_of(1, width=7, height=3)
    scored = scored[scored["reward"].notna()]
    low, high = np.quantile(scored["reward"], [0.005, 0.995]) if len(scored) else (0, 0)
    bins = np.linspace(low, max(high, low + 1e-6), 41)
    for right, colour, hatch, label in ((False, BEFORE, "", "to another intent"), (True, AFTER, "//", "to the click")):
        part = scored.loc[scored["right"] == right, "reward"]
        style = {"color": colour, "hatch": hatch, "alpha": 0.55, "edgecolor": "white"}
        weights = np.full(len(part), 1 / max(1, len(part)))
        axes.hist(part, bins, weights=weights, label=f"leads {label}: {len(part):,}", **style)
    axes.axvline(0, color="black", lw=0.8)
    axes.set(
        title="Reward of queries, development users",
        xlabel="reward, nats (0: no more help than the null query)",
        ylabel="share of its kind",
    )
    axes.legend(frameon=False)
    return figure


def reliability(table: pd.DataFrame, error: float) -> Figure:
    """How often the likeliest candidate was clicked, by how likely it was said to be (judge_reward.calibration)."""
    figure, (axes,) = panels_of(1, width=4.2, height=4)
    there = table[table["lists"] > 0]
    axes.plot([0, 1], [0, 1], color="grey", lw=0.8, ls="--")
    sizes = 20 + 180 * there["lists"] / there["lists"].max()
    axes.scatter(there["confidence"], there["hit"], s=sizes, color=BEFORE, alpha=0.8, clip_on=False, zorder=3)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="what it said of its first intent", ylabel="share of these clicked")
    axes.set_title(f"Calibration: ECE {error:.3f}; area: lists", fontsize="medium")
    return figure


def margins(pairs: pd.DataFrame) -> Figure:
    """Reward margins of the pairs that were kept. pairs: preferences.COLUMNS."""
    figure, (axes,) = panels_of(1, width=7, height=2.8)
    axes.hist(pairs["reward_chosen"] - pairs["reward_rejected"], 40, color=BEFORE, edgecolor="white")
    axes.set(title="Reward margin of the pairs kept", xlabel="chosen minus rejected, nats", ylabel="pairs")
    return figure


def step_rows(rows: pd.DataFrame) -> Figure:
    """What each step changed. rows: index step, columns ranking, reward, ihr@1, distinct, of those there are."""
    there = [name for name in ("ranking", "reward", "ihr@1", "distinct") if name in rows and rows[name].notna().any()]
    wide = min(2, max(1, len(there)))
    height = 2.6 * -(-max(1, len(there)) // wide) + 0.4
    figure, panels = panels_of(max(1, len(there)), columns=wide, width=5 * wide, height=height)
    place = np.arange(len(rows))
    for axes in panels[len(there) :]:
        axes.set_axis_off()
    for axes, name in zip(panels, there, strict=False):
        axes.plot(place, rows[name], color=BEFORE, marker="o")
        _spread(axes, name)
        axes.set_xticks(place, rows.index)
        axes.set(title=LABELS.get(name, name))
    figure.suptitle("Step by step, on valid")
    return figure


def rank_shift(ranks: Mapping[str, np.ndarray], title: str) -> Figure:
    """Histograms of the clicked intent's place, means marked. ranks: name -> (sessions,) places from 1."""
    figure, (axes,) = panels_of(1, width=7.5, height=3.2)
    bins = np.arange(0.5, max(float(np.nanmax(values)) for values in ranks.values()) + 1.5)
    weights = [np.full(len(values), 1 / len(values)) for values in ranks.values()]
    colours, hatches, lines = (BEFORE, AFTER, THIRD), ("", "//", ".."), ("-", "--", ":")
    *_, bars = axes.hist(list(ranks.values()), bins, weights=weights, color=colours[: len(ranks)], edgecolor="white")
    bars = bars if len(ranks) > 1 else [bars]
    for (name, values), drawn, colour, hatch, line in zip(ranks.items(), bars, colours, hatches, lines, strict=False):
        for bar in drawn:
            bar.set_hatch(hatch)
        mean, high = np.nanmean(values), np.nanmean(np.asarray(values) <= 3)
        drawn.set_label(f"{name}: mean {mean:.2f}, in the top three {high:.1%}")
        axes.axvline(mean, ymax=0.7, color=colour, lw=1.4, ls=line)
    axes.set(title=title, xlabel="place of the clicked intent in the ranking", ylabel="share of sessions")
    axes.set_ylim(top=axes.get_ylim()[1] * 1.3)  # the legend's room
    axes.legend(frameon=False, loc="upper right")
    return figure


def rounds(table: pd.DataFrame) -> Figure:
    """GAUC of each turn of the loop. table: columns round, dev, valid; round 0 is QE-Rec before the alignment."""
    figure, (axes,) = panels_of(1, width=6, height=3)
    styles = {"dev": ("development users", BEFORE, "o"), "valid": ("valid", AFTER, "s")}
    for name, (label, colour, marker) in styles.items():
        axes.plot(table["round"], table[name], color=colour, marker=marker, label=label)
    axes.set_xticks(table["round"])
    axes.set(title="The closed loop, round by round", xlabel="round (0: QE-Rec, no alignment)", ylabel="GAUC")
    axes.legend(frameon=False)
    return figure


def _spread(axes: Axes, name: str) -> None:
    """Limits at least LEAST apart, around what is drawn; below 0 only where something is."""
    low, high = axes.get_ylim()
    lack = LEAST.get(name, 0) - (high - low)
    if lack > 0:
        down = lack / 2 if axes.dataLim.y0 < 0 else min(lack / 2, max(low, 0))
        axes.set_ylim(low - down, high + lack - down)


def _height(panels: Sequence[str]) -> float:
    return 2.6 * -(-max(1, len(panels)) // 3) + 0.4
