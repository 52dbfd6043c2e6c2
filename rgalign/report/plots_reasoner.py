"""Figures of the reasoner and its alignment. Style and palette are those of `plots`."""

from collections.abc import Mapping, Sequence
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from rgalign.evaluation.metrics import LABELS
from rgalign.report.plots import legend_beside, panel, panels_of, short

TOKEN_STYLE = {  # kind of a prompt's token -> background
    "instruction": "#DDDDDD",
    "name": "#F0E442",
    "value": "#A6D8F5",
    "text": "#B5E3D0",
    "control": "#F4C9A8",
}
FAMILIES = 8  # intent families with a colour of their own; the rest is grey
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
MARKERS = "os^Dv<>P"


def prompt_tokens(tokens: pd.DataFrame, width: int = 110) -> Figure:
    """A prompt as the model reads it, each token on its kind's colour. tokens: Prompter.explain; width: characters."""
    lines, used = [[]], 0
    for token, kind in zip(tokens.token, tokens.kind, strict=True):
        label = short(str(token).strip() or "⏎", 40)
        if used + len(label) + 2 > width:
            lines, used = [*lines, []], 0
        lines[-1].append((used, label, kind))
        used += len(label) + 2
    axes = panel((11, 0.5 + 0.36 * len(lines)))
    for row, line in enumerate(lines):
        for start, label, kind in line:
            box = {"boxstyle": "round,pad=0.25", "facecolor": TOKEN_STYLE[kind], "edgecolor": "none"}
            axes.text(start, -row, label, family="monospace", fontsize=7.5, va="center", bbox=box)
    for kind in [kind for kind in TOKEN_STYLE if kind in set(tokens.kind)]:
        axes.scatter([], [], color=TOKEN_STYLE[kind], marker="s", s=70, label=kind)
    axes.set(xlim=(-1, width), ylim=(-len(lines) + 0.3, 0.8), title="One session's prompt, token by token")
    axes.legend(frameon=False, ncols=5, loc="upper center", bbox_to_anchor=(0.5, 0))
    axes.set_axis_off()
    return axes.figure


def pretraining(curves: pd.DataFrame) -> Figure:
    """Loss of pre-training or warm-up. curves: columns model, step, loss (nats)."""
    axes = panel((7, 3), "Training of the language models", "step", "loss, nats")
    for number, (model, curve) in enumerate(curves.groupby("model", sort=False)):
        style = {"color": COLOURS[number % 8], "marker": MARKERS[number % 8], "label": model}
        axes.plot(curve.step, curve.loss, ms=3, **style)
    axes.legend(frameon=False)
    return axes.figure


def reading(similarity: pd.DataFrame, most: int = 12) -> Figure:
    """What the last token knows as a prompt is read, over its last tokens. similarity: columns token, similarity to the
    pooled vector, of all tokens; the mean of the earlier ones is the first bar."""
    last, earlier = similarity.tail(most), similarity.similarity[:-most]
    labels = [short(str(token).strip() or "⏎", 24) for token in last.token]
    values = last.similarity.tolist()
    if len(earlier):
        labels, values = [f"mean of the {len(earlier)} before", *labels], [earlier.mean(), *values]
    axes = panel((7, 0.8 + 0.25 * len(values)), "Each token's state against the pooled vector", "cosine (centred)")
    colours = ["#56B4E9"] * (len(values) - 1) + ["#000000"]
    axes.barh(np.arange(len(values))[::-1], values, color=colours)
    axes.set_yticks(np.arange(len(values))[::-1], labels, fontsize=8)
    return axes.figure


def embedding_map(points: pd.DataFrame, title: str) -> Figure:
    """Query embeddings in their two main directions. points: columns x, y, family (of the clicked intent)."""
    axes = panel((7.5, 5), title, "first principal direction", "second")
    common = points.family.value_counts().index[:FAMILIES]
    rest = points[~points.family.isin(common)]
    if len(rest):
        axes.scatter(rest.x, rest.y, s=5, color="#CCCCCC", label="other")
    for number, family in enumerate(common):
        own = points[points.family == family]
        style = {"color": COLOURS[number], "marker": MARKERS[number], "label": short(family, 24)}
        axes.scatter(own.x, own.y, s=9, alpha=0.7, **style)
    legend_beside(axes, markerscale=1.6)
    return axes.figure


KNOWN, WRITTEN, RANKED = "#E8F1FA", "#FDEBDC", "#DFF3EA"


def idea(known: Sequence[str], before: str, after: str, shown: Sequence[str]) -> Figure:
    """From a session's features over its latent query to the intents shown, and the way back that aligns the reasoner.

    known  a few of the features, as the prompt has them;  before, after  the query without and with the alignment
    shown  the best intents
    """
    axes = panel((10, 3.1))
    axes.set_axis_off()
    axes.set(xlim=(0, 10), ylim=(0.35, 3.4))
    axes.set_title("What the shop knows, what the customer is about to ask, what is shown")
    _box(axes, 0.1, 2.7, KNOWN, "the shop knows", known)
    _box(axes, 3.6, 2.7, WRITTEN, "the reasoner writes", [f"“{after}”", "", "before its alignment:", f"“{before}”"])
    _box(axes, 7.1, 2.7, RANKED, "the ranker shows", [f"{i}. {title}" for i, title in enumerate(shown, start=1)])
    forward = {"arrowstyle": "-|>", "color": "black", "lw": 1.4}
    for start in (2.8, 6.3):
        axes.annotate("", (start + 0.8, 1.9), (start, 1.9), arrowprops=forward)
    axes.plot([1.4, 1.4, 8.4, 8.4], [0.85, 0.75, 0.75, 0.85], color="black", lw=1)
    axes.text(4.9, 0.6, "the features go to the ranker as well", ha="center", va="top", fontsize=9)
    back = {"arrowstyle": "-|>", "color": "#D55E00", "lw": 1.4, "linestyle": "--"}
    axes.annotate("", (5, 0.95), (7.4, 0.95), arrowprops=back)
    axes.text(6.2, 1.0, "which queries rank well", ha="center", va="bottom", fontsize=8, color="#D55E00")
    return axes.figure


def _box(axes: Axes, left: float, width: float, colour: str, title: str, lines: Sequence[str]) -> None:
    text = "\n".join(fill(line.replace("$", r"\$"), 34) if line else "" for line in lines)
    axes.text(left + width / 2, 3.15, title, ha="center", va="center", fontsize=11, weight="bold")
    shape = {"boxstyle": "round,pad=0.02", "facecolor": colour, "edgecolor": "grey"}
    axes.add_patch(FancyBboxPatch((left, 1.2), width, 1.75, **shape))
    axes.text(left + 0.1, 2.85, text, ha="left", va="top", fontsize=8)


# The alignment: the reward, the curves of the steps, what they change.

STEPS = {"sft": "RG-SFT", "dpo": "RG-DPO", "cl": "RG-CL"}  # rows of the stage table
BEFORE, AFTER, THIRD = "#0072B2", "#D55E00", "#009E73"
CURVE_LABELS = {
    **LABELS,
    "ranking": "GAUC on valid, query tower refitted",
    "reward": "reward of the greedy query, nats",
    "kl": "KL to the reference, nats a query",
    "kl_weight": "weight of the KL",
    "clipped": "share of tokens clipped",
    "equal": "share of groups of one reward",
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
    """One panel a column over the steps; dashed: the value before any learning.

    table  column step and those of `columns` that it has
    """
    there = [name for name in columns if name in table]
    figure, panels = _grid(len(there), most=3, width=3.7)
    for axes, name in zip(panels, there, strict=False):
        axes.plot(table["step"], table[name], color=BEFORE, marker="o", ms=2.5)
        if name in START:
            axes.axhline(START[name], color="grey", lw=0.8, ls="--")
        _spread(axes, name)
        axes.set(xlabel="optimiser step", title=CURVE_LABELS.get(name, name))
    if not there:
        panels[0].text(0.5, 0.5, "this step is switched off", ha="center")
    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    return figure


def queries_by_reward(scored: pd.DataFrame) -> Figure:
    """Rewards of queries that lead to the click and of those that do not. scored: columns reward, right (bool).

    The half per cent at either end is not shown.
    """
    axes = panel((7, 3), "Reward of queries, development users", ylabel="share of its kind")
    axes.set_xlabel("reward, nats (0: no more help than the null query)")
    scored = scored[scored["reward"].notna()]
    low, high = np.quantile(scored["reward"], [0.005, 0.995]) if len(scored) else (0, 0)
    bins = np.linspace(low, max(high, low + 1e-6), 41)
    for right, colour, hatch, label in ((False, BEFORE, "", "to another intent"), (True, AFTER, "//", "to the click")):
        part = scored.loc[scored["right"] == right, "reward"]
        style = {"color": colour, "hatch": hatch, "alpha": 0.55, "edgecolor": "white"}
        weights = np.full(len(part), 1 / max(1, len(part)))
        axes.hist(part, bins, weights=weights, label=f"leads {label}: {len(part):,}", **style)
    axes.axvline(0, color="black", lw=0.8)
    axes.legend(frameon=False)
    return axes.figure


def reliability(table: pd.DataFrame, error: float) -> Figure:
    """How often the likeliest candidate was clicked, by how likely it was said to be (judge_reward.calibration)."""
    axes = panel((4.2, 4))
    there = table[table["lists"] > 0]
    axes.plot([0, 1], [0, 1], color="grey", lw=0.8, ls="--")
    sizes = 20 + 180 * there["lists"] / there["lists"].max()
    axes.scatter(there["confidence"], there["hit"], s=sizes, color=BEFORE, alpha=0.8, clip_on=False, zorder=3)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="what it said of its first intent", ylabel="share of these clicked")
    axes.set_title(f"Calibration: ECE {error:.3f}; area: lists", fontsize="medium")
    return axes.figure


def margins(pairs: pd.DataFrame) -> Figure:
    """Reward margins of the pairs that were kept. pairs: preferences.COLUMNS."""
    axes = panel((7, 2.8), "Reward margin of the pairs kept", "chosen minus rejected, nats", "pairs")
    axes.hist((pairs["reward_chosen"] - pairs["reward_rejected"]).astype(float), 40, color=BEFORE, edgecolor="white")
    return axes.figure


def step_rows(rows: pd.DataFrame, errors: Mapping[str, float | pd.Series]) -> Figure:
    """What each step changed. rows: index step, columns ranking, reward, ihr@1, distinct, of those there are.

    errors  name of a column -> half the width of a 95 % interval of each of its values
    """
    there = [name for name in ("ranking", "reward", "ihr@1", "distinct") if name in rows and rows[name].notna().any()]
    figure, panels = _grid(len(there), most=2, width=5)
    place = np.arange(len(rows))
    for axes, name in zip(panels, there, strict=False):
        axes.errorbar(place, rows[name], yerr=errors.get(name), color=BEFORE, marker="o", linestyle="", capsize=3)
        _spread(axes, name)
        axes.set_xticks(place, [STEPS.get(step, step) for step in rows.index])
        axes.set(title=CURVE_LABELS.get(name, name))
    figure.suptitle("Step by step, on valid (bars: 95 %)", x=0.01, ha="left", weight="bold")
    return figure


def rank_shift(ranks: Mapping[str, np.ndarray], title: str) -> Figure:
    """Histograms of the clicked intent's place, means marked. ranks: name -> (sessions,) places from 1."""
    axes = panel((7.5, 3.2), title, "place of the clicked intent in the ranking", "share of sessions")
    if not any(map(len, ranks.values())):
        axes.text(0.5, 0.5, "no query was written", ha="center")
        return axes.figure
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
    axes.set_ylim(top=axes.get_ylim()[1] * 1.3)  # space for the legend
    axes.legend(frameon=False, loc="upper right")
    return axes.figure


def _spread(axes: Axes, name: str) -> None:
    """Limits at least LEAST apart, around what is drawn; below 0 only where something is."""
    low, high = axes.get_ylim()
    lack = LEAST.get(name, 0) - (high - low)
    if lack > 0:
        down = lack / 2 if axes.dataLim.y0 < 0 else min(lack / 2, max(low, 0))
        axes.set_ylim(low - down, high + lack - down)


def _grid(panels: int, most: int, width: float) -> tuple[Figure, list[Axes]]:
    """At least one panel, at most `most` in a row, each of this width; the axes beyond are off."""
    wide, count = min(most, max(1, panels)), max(1, panels)
    figure, axes = panels_of(count, columns=wide, width=max(5, width * wide), height=2.6 * -(-count // wide) + 0.4)
    for each in axes[panels:]:
        each.set_axis_off()
    return figure, axes
