"""Figures of the reasoner: a prompt's tokens, pre-training, embeddings. Style and palette are those of `plots`."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from rgalign.plots import panels_of, short

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
