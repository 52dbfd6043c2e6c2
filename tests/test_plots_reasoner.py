"""Figures of the alignment say what they show, also of a step that is off and of figures that do not move."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from rgalign.report import plots_reasoner as plots

mpl.use("Agg")


def drawn(figure) -> list:
    """The panels that show something; the figure can be drawn at all."""
    figure.canvas.draw()
    return [axes for axes in figure.axes if axes.axison]


def test_a_curve_has_a_panel_a_column_that_is_there_and_no_empty_one():
    table = pd.DataFrame({"step": [1, 2], "loss": [2.0, 1.0], "margin": [0.1, 0.2], "kl": [0.0, 0.3], "tokens": 2.0})
    panels = drawn(plots.curve(table, ["loss", "accuracy", "margin", "kl", "tokens"], "RG-DPO"))
    assert [axes.get_title() for axes in panels] == [
        plots.CURVE_LABELS[name] for name in ("loss", "margin", "kl", "tokens")
    ]
    assert all(axes.get_xlabel() == "optimiser step" for axes in panels)


def test_what_does_not_move_looks_so():
    table = pd.DataFrame({"step": [0, 9], "ranking": [0.62248, 0.62254]})
    (axes,) = drawn(plots.curve(table, ["ranking"], "on valid"))
    low, high = axes.get_ylim()
    assert high - low == pytest.approx(plots.LEAST["ranking"])
    assert low < 0.6224 < 0.6226 < high


def test_a_step_that_is_off_says_so():
    figure = plots.curve(pd.DataFrame(columns=["step", "seconds"]), ["loss"], "RG-SFT")
    assert not drawn(figure)
    assert [text.get_text() for text in figure.axes[0].texts] == ["this step is switched off"]


def test_rewards_are_counted_by_kind_and_an_empty_kind_or_silence_is_no_fault():
    scored = pd.DataFrame({"reward": [0.1, -0.2, 0.4, np.nan], "right": [True, False, False, True]})
    (axes,) = drawn(plots.queries_by_reward(scored))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "leads to another intent: 2",
        "leads to the click: 1",
    ]
    drawn(plots.queries_by_reward(scored.assign(right=False)))
    drawn(plots.queries_by_reward(scored.assign(reward=np.nan)))


def test_the_shift_of_places_gives_mean_and_share_in_the_top_three():
    (axes,) = drawn(plots.rank_shift({"before": np.array([1.0, 4, 7]), "after": np.array([1.0, 2, 3])}, "places"))
    before, after = (text.get_text() for text in axes.get_legend().get_texts())
    assert before == "before: mean 4.00, in the top three 33.3%"
    assert after == "after: mean 2.00, in the top three 100.0%"


def test_step_rows_leave_out_what_nobody_knows():
    rows = pd.DataFrame({"ranking": [0.6, 0.7], "reward": np.nan}, index=["before", "cl"])
    (axes,) = drawn(plots.step_rows(rows, {"ranking": 0.01}))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["before", "RG-CL"]


def test_every_other_figure_is_drawn():
    pairs = pd.DataFrame({"reward_chosen": [0.5, 0.4], "reward_rejected": [0.0, -0.3]})
    table = pd.DataFrame({"lists": [0, 3, 9], "confidence": [np.nan, 0.4, 0.9], "hit": [np.nan, 0.5, 1.0]})
    for figure in (plots.margins(pairs), plots.reliability(table, 0.1)):
        (axes,) = drawn(figure)
        assert axes.get_title()
        assert axes.get_xlabel()
        assert axes.get_ylabel()
