"""Figures of the alignment: the reward, the steps' curves, what they change. Style and palette are those of `plots`."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from rgalign.plots import METRIC_NAMES, panels_of

BEFORE, AFTER, THIRD = "#0072B2", "#D55E00", "#009E73"
LABELS = {
    **METRIC_NAMES,
    "ranking": "GAUC on valid, query tower refitted",
    "reward": "reward of the greedy query, nats",
    "kl": "KL to the reference, nats a query",
    "tokens": "tokens a query",
    "distinct": "share of different queries",
    "loss": "loss, nats",
    "contrastive": "InfoNCE, nats",
    "language": "language loss, nats a token",
    "effective_rank": "effective rank of a batch",
    "uniformity": "uniformity",
    "alignment": "squared distance to the click",
    "chosen_ratio": "log ratio of the chosen, nats",
    "rejected_ratio": "log ratio of the rejected, nats",
    "accuracy": "share with chosen ahead",
    "margin": "beta x margin, nats",
}


def curve(table: pd.DataFrame, columns: Sequence[str], title: str) -> Figure:
    """One panel a column over the steps. table: column step and those of `columns` that it has."""
    there = [name for name in columns if name in table]
    figure, panels = panels_of(max(1, len(there)), columns=min(3, len(there) or 1), width=11, height=_height(there))
    for axes, name in zip(panels, there, strict=False):
        axes.plot(table["step"], table[name], color=BEFORE, marker="o", ms=2.5)
        axes.set(xlabel="step", title=LABELS.get(name, name))
    if not there:
        panels[0].set_axis_off()
        panels[0].text(0.5, 0.5, "this step is switched off", ha="center")
    figure.suptitle(title)
    return figure


def queries_by_reward(scored: pd.DataFrame) -> Figure:
    """Rewards of queries that lead to the click and of those that do not. scored: columns reward, right (bool)."""
    figure, (axes,) = panels_of(1, width=7, height=3)
    low, high = np.nanquantile(scored["reward"], [0.005, 0.995])
    bins = np.linspace(low, high, 41)
    for right, colour, hatch, label in ((False, BEFORE, "", "to another intent"), (True, AFTER, "//", "to the click")):
        part = scored.loc[scored["right"] == right, "reward"]
        style = {"color": colour, "hatch": hatch, "alpha": 0.55, "edgecolor": "white"}
        axes.hist(part, bins, weights=np.full(len(part), 1 / max(1, len(part))), label=f"leads {label}", **style)
    axes.axvline(0, color="black", lw=0.8)
    axes.set(
        title="Reward of queries, development users", xlabel="reward, nats (0: no help)", ylabel="share of queries"
    )
    axes.legend(frameon=False)
    return figure


def reliability(table: pd.DataFrame, error: float) -> Figure:
    """How often the likeliest candidate was clicked, by how likely it was said to be (judge_reward.calibration)."""
    figure, (axes,) = panels_of(1, width=4.2, height=4)
    there = table[table["lists"] > 0]
    axes.plot([0, 1], [0, 1], color="grey", lw=0.8)
    sizes = 20 + 180 * there["lists"] / there["lists"].max()
    axes.scatter(there["confidence"], there["hit"], s=sizes, color=BEFORE, alpha=0.8)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="said probability of the likeliest", ylabel="share clicked")
    axes.set_title(f"Calibration of the reward model (ECE {error:.3f})")
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
    figure, panels = panels_of(len(there), columns=min(2, len(there)), width=10, height=_height(there))
    place = np.arange(len(rows))
    for axes, name in zip(panels, there, strict=True):
        axes.plot(place, rows[name], color=BEFORE, marker="o")
        axes.set_xticks(place, rows.index)
        axes.set(title=LABELS.get(name, name))
    figure.suptitle("Step by step, on valid")
    return figure


def rank_shift(ranks: Mapping[str, np.ndarray], title: str) -> Figure:
    """Histograms of the clicked intent's place, medians marked. ranks: name -> (sessions,) places from 1."""
    figure, (axes,) = panels_of(1, width=7, height=3)
    last = max(float(np.nanmax(values)) for values in ranks.values())
    bins = np.arange(0.5, last + 1.5)
    styles = zip((BEFORE, AFTER, THIRD), ("", "//", ".."), strict=True)
    for (name, values), (colour, hatch) in zip(ranks.items(), styles, strict=False):
        weights = np.full(len(values), 1 / len(values))
        label = f"{name}: mean {np.nanmean(values):.2f}, in the top three {np.nanmean(np.asarray(values) <= 3):.1%}"
        axes.hist(values, bins, weights=weights, color=colour, hatch=hatch, alpha=0.5, edgecolor="white", label=label)
        axes.axvline(np.nanmedian(values), color=colour, lw=1.2)
    axes.set(title=title, xlabel="place of the click in its list", ylabel="share of sessions")
    axes.legend(frameon=False)
    return figure


def rounds(table: pd.DataFrame) -> Figure:
    """GAUC of each turn of the loop. table: columns round, dev, valid; round 0 is QE-Rec before the alignment."""
    figure, (axes,) = panels_of(1, width=6, height=3)
    for name, colour, marker in (("dev", BEFORE, "o"), ("valid", AFTER, "s")):
        axes.plot(table["round"], table[name], color=colour, marker=marker, label=name)
    axes.set_xticks(table["round"])
    axes.set(title="The closed loop, turn by turn", xlabel="round (0: QE-Rec)", ylabel="GAUC")
    axes.legend(frameon=False)
    return figure


def _height(panels: Sequence[str]) -> float:
    return 2.6 * -(-max(1, len(panels)) // 3) + 0.4
