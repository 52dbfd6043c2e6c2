"""The tour's one picture: the system, with what it made of one customer."""

from collections.abc import Sequence
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from rgalign.report.plots import panels_of, short

# Figures of the reasoner: a prompt's tokens, pre-training, embeddings. Style and palette are those of `plots`.

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
    figure, (axes,) = panels_of(1, width=11, height=0.5 + 0.36 * len(lines))
    for row, line in enumerate(lines):
        for start, label, kind in line:
            box = {"boxstyle": "round,pad=0.25", "facecolor": TOKEN_STYLE[kind], "edgecolor": "none"}
            axes.text(start, -row, label, family="monospace", fontsize=7.5, va="center", bbox=box)
    for kind in [kind for kind in TOKEN_STYLE if kind in set(tokens.kind)]:
        axes.scatter([], [], color=TOKEN_STYLE[kind], marker="s", s=70, label=kind)
    axes.set(xlim=(-1, width), ylim=(-len(lines) + 0.3, 0.8), title="One session's prompt, token by token")
    axes.legend(frameon=False, ncols=5, loc="upper center", bbox_to_anchor=(0.5, 0))
    axes.set_axis_off()
    return figure


def pretraining(curves: pd.DataFrame) -> Figure:
    """Loss of pre-training. curves: columns model, step, loss (nats)."""
    figure, (axes,) = panels_of(1, width=7, height=3)
    for number, (model, curve) in enumerate(curves.groupby("model", sort=False)):
        axes.plot(
            curve.step, curve.loss, color=COLOURS[number % len(COLOURS)], marker=MARKERS[number % 8], ms=3, label=model
        )
    axes.set(title="Pre-training the tiny model", xlabel="step", ylabel="both losses, nats")
    axes.legend(frameon=False)
    return figure


def reading(similarity: pd.DataFrame) -> Figure:
    """What the last token knows as a prompt is read. similarity: columns token, similarity to the pooled vector."""
    figure, (axes,) = panels_of(1, width=11, height=3.2)
    place = np.arange(len(similarity))
    last = place == place[-1]
    axes.bar(place[~last], similarity.similarity[~last], color="#56B4E9")
    axes.bar(place[last], similarity.similarity[last], color="#000000", label="last token: what is pooled")
    axes.set_xticks(place, [short(str(t).strip() or "⏎", 24) for t in similarity.token], rotation=90, fontsize=6.5)
    axes.set(title="Each token's state against the pooled vector", ylabel="cosine (centred)")
    axes.legend(frameon=False)
    return figure


def embedding_map(points: pd.DataFrame, title: str) -> Figure:
    """Query embeddings in their two main directions. points: columns x, y, family (of the clicked intent)."""
    figure, (axes,) = panels_of(1, width=7.5, height=5)
    common = points.family.value_counts().index[:FAMILIES]
    rest = points[~points.family.isin(common)]
    if len(rest):
        axes.scatter(rest.x, rest.y, s=5, color="#CCCCCC", label="other")
    for number, family in enumerate(common):
        own = points[points.family == family]
        axes.scatter(
            own.x, own.y, s=9, color=COLOURS[number], marker=MARKERS[number], label=short(family, 24), alpha=0.7
        )
    axes.set(title=title, xlabel="first principal direction", ylabel="second")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), markerscale=1.6)
    return figure


KNOWN, SAID, RANKED = "#E8F1FA", "#FDEBDC", "#DFF3EA"


def idea(known: Sequence[str], before: str, after: str, shown: Sequence[str]) -> Figure:
    """From a session's features over its latent query to the intents shown, and the way back that aligns the reasoner.

    known  a few of the features, as the prompt has them;  before, after  the query without and with the alignment
    shown  the best intents
    """
    figure, (axes,) = panels_of(1, width=10, height=3.1)
    axes.set_axis_off()
    axes.set(xlim=(0, 10), ylim=(0.35, 3.4), title="What the shop knows, what she is about to ask, what she is shown")
    _box(axes, 0.1, 2.7, KNOWN, "the shop knows", known)
    _box(axes, 3.6, 2.7, SAID, "the reasoner writes", [f"“{after}”", "", "before its alignment:", f"“{before}”"])
    _box(axes, 7.1, 2.7, RANKED, "the ranker shows", [f"{i}. {title}" for i, title in enumerate(shown, start=1)])
    forward = {"arrowstyle": "-|>", "color": "black", "lw": 1.4}
    for start in (2.8, 6.3):
        axes.annotate("", (start + 0.8, 1.9), (start, 1.9), arrowprops=forward)
    axes.plot([1.4, 1.4, 8.4, 8.4], [0.85, 0.75, 0.75, 0.85], color="black", lw=1)
    axes.text(4.9, 0.6, "the features go to the ranker as well", ha="center", va="top", fontsize=9)
    back = {"arrowstyle": "-|>", "color": "#D55E00", "lw": 1.4, "linestyle": "--"}
    axes.annotate("", (5, 0.95), (7.4, 0.95), arrowprops=back)
    axes.text(6.2, 1.0, "which queries rank well", ha="center", va="bottom", fontsize=8, color="#D55E00")
    return figure


def _box(axes: Axes, left: float, width: float, colour: str, title: str, lines: Sequence[str]) -> None:
    text = "\n".join(fill(line.replace("$", r"\$"), 34) if line else "" for line in lines)
    axes.text(left + width / 2, 3.15, title, ha="center", va="center", fontsize=11, weight="bold")
    shape = {"boxstyle": "round,pad=0.02", "facecolor": colour, "edgecolor": "grey"}
    axes.add_patch(FancyBboxPatch((left, 1.2), width, 1.75, **shape))
    axes.text(left + 0.1, 2.85, text, ha="left", va="top", fontsize=8)
