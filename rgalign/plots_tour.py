"""The tour's one picture: the system, with what it made of one customer."""

from collections.abc import Sequence
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from rgalign.plots import panels_of

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
