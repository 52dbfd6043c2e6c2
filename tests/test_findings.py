"""The lines that notebooks print beneath their tables, and what stands in for tables where nobody knows the truth."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from rgalign.alignment.judge_reward import GOOD, verdict
from rgalign.commands import study
from rgalign.data import describe
from rgalign.params import ROOT
from rgalign.report import findings
from rgalign.report.simulated import NO_TRUTH, Simulation
from rgalign.shopworld.tables import ISSUE, KB, OBJECT, Rules, World
from rgalign.shopworld.text import TELLS, draw_texts, explained
from rgalign.shopworld.vocabulary import COLUMNS, INFORMATIVE, ISSUES, THINGS


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [
        (0.01, 0.03, "is better than"),
        (-0.03, -0.01, "is worse than"),
        (-0.01, 0.01, "does not differ significantly from"),
    ],
)
def test_a_comparison_is_told_by_its_interval(low, high, says):
    row = {"model": "qe_rec", "against": "two_tower", "metric": "gauc", "slice": "all"}
    table = pd.DataFrame([row | {"difference": (low + high) / 2, "ci_low": low, "ci_high": high}])
    table = pd.concat([table.assign(slice="cold", ci_low=-9, ci_high=9), table])
    line = findings.compared(table, "qe_rec", "two_tower", "on valid")
    assert says in line
    assert "on valid QE-Rec" in line
    assert f"[{low:.4f}, {high:.4f}]" in line
    assert "were not compared" in findings.compared(table, "qe_rec", "popularity", "on valid")


def test_groups_that_gain_lose_or_say_nothing_are_counted_and_losers_named():
    table = pd.DataFrame({"group": ["a", "b", "c", "d"], "ci_low": [0.1, -1, -2, 0.2], "ci_high": [1, 1, -1, 0.3]})
    assert findings.groups(table, "groups") == "So: of 4 groups 2 gain, 1 lose (c); in 1 nothing is significant."


def test_what_a_confident_half_brings_is_claimed_only_where_intervals_are_apart():
    curve = pd.DataFrame({"share": [0.5, 1.0], "ctr": [0.3, 0.2], "low": [0.28, 0.18], "high": [0.32, 0.22]})
    assert "it knows where it is good" in findings.served(curve)
    assert "that is not shown" in findings.served(curve.assign(low=0.1))
    assert "unknown" in findings.served(pd.DataFrame())


def test_the_verdict_on_a_judge_follows_its_limits_from_both_sides():
    at_the_limit = {name: limit for name, (_, limit, _) in GOOD.items()}
    assert (verdict(at_the_limit).holds == "yes").all()
    worse = {name: limit + (-0.01 if side == "at least" else 0.01) for name, (_, limit, side) in GOOD.items()}
    assert (verdict(worse).holds == "no").all()
    assert (verdict({}).holds == "not known").all()


def test_the_open_clause_that_people_are_told_is_the_one_that_was_drawn():
    """Independent of how it is read: draw_texts says which intent the open clause tells."""
    world, intents = World.build(3), np.arange(KB).repeat(3)
    texts = draw_texts(intents, world.texts, world.wordings, np.random.default_rng(0))
    for text, active in zip(texts.event_text.to_pylist(), texts.active, strict=True):
        (still_open,) = [clause for clause in explained("event_text", text).split("; ") if clause.startswith("STILL")]
        assert f"{THINGS[OBJECT[active]].title}, {ISSUES[ISSUE[active]].name} (" in still_open
    assert {column.group for column in COLUMNS if explained(column.name, "x") in TELLS.values()} == set(INFORMATIVE)


def test_the_rules_that_are_told_are_those_of_the_world():
    assert set(describe.RULES) <= set(vars(Rules()))
    told = describe.rules({"world": {"rules": vars(Rules())}})
    assert told.value.to_dict() == {name: getattr(Rules(), name) for name in describe.RULES}
    assert describe.rules({"name": "mine"}).empty


def test_without_a_truth_tables_are_empty_and_figures_say_why():
    shop, scores = SimpleNamespace(truth=None), {"two_tower": np.zeros((2, 3)), "qe_rec": np.zeros((2, 3))}
    simulation = Simulation.of(shop, scores, pd.DataFrame(), SimpleNamespace(), 0)
    for table in (simulation.lifts(), simulation.false_alarms(), simulation.over_logs({}), simulation.by_group(None)):
        assert table.empty
        assert len(table.columns)
    assert simulation.session_ctr("qe_rec") == {}
    for figure in (simulation.power(), simulation.looks(), simulation.peeking(), simulation.p_values()):
        assert [text.get_text() for text in figure.axes[0].texts] == [NO_TRUTH]


def test_a_study_without_runs_is_read_from_what_was_published_and_one_with_runs_is_left_alone(tmp_path):
    for name in ("empty", "runs/one"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "runs/one/params.yaml").write_text("")
    assert study.is_published(study.or_published(tmp_path / "empty"))
    for name in study.PUBLISHED:
        assert (tmp_path / "empty" / name).read_bytes() == (ROOT / "outputs/published/study" / name).read_bytes()
    study.or_published(tmp_path / "runs")
    assert not study.is_published(tmp_path / "runs")
