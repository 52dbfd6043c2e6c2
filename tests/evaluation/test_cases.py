"""Wins and losses of one model against another, by hand."""

import pandas as pd

from rgalign.report.summaries import wins_and_losses, with_context


def table(places: dict[str, list[float]]) -> pd.DataFrame:
    rows = [(f"s{i}", model, 1 / place) for model, given in places.items() for i, place in enumerate(given)]
    return pd.DataFrame(rows, columns=["session_id", "model", "mrr"])


def test_the_largest_moves_come_first_and_draws_are_left_out():
    cases = wins_and_losses(table({"new": [1, 3, 9, 2], "old": [5, 4, 1, 2]}), "new", "old", count=1)
    assert cases.to_dict("records") == [
        {"session_id": "s0", "outcome": "win", "old": 5.0, "new": 1.0},
        {"session_id": "s2", "outcome": "loss", "old": 1.0, "new": 9.0},
    ]


def test_each_case_stands_beside_what_was_known_and_clicked():
    cases = wins_and_losses(table({"new": [1], "old": [2]}), "new", "old")
    sessions = pd.DataFrame({"session_id": ["s0", "s1"], "text": ["late", "early"]})
    clicks = pd.DataFrame({"session_id": ["s0", "s0"], "title": ["Speed up", "Return"]})
    win = with_context(cases, sessions, clicks, ["text"]).loc["win"]
    assert win[["text", "title"]].tolist() == ["late", "Speed up"]
