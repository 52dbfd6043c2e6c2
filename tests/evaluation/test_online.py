"""Simulated experiments against their known truth, and their counts against a count by hand."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import kstest, norm

from rgalign.experiment import online
from rgalign.experiment.ab_test import lift
from rgalign.experiment.online import Audience, Experiment
from rgalign.report import summaries as look

ARMS = {"control": "old", "treatment": "new"}


@pytest.fixture(scope="module")
def audience():
    """300 users with one to nine sessions of three slots, in no order; the new ranker earns a fifth more."""
    rng = np.random.default_rng(0)
    person = rng.permutation(np.repeat(np.arange(300), rng.integers(1, 10, size=300)))
    keen = rng.beta(2, 6, size=300)[person][:, None]
    old = keen * np.array([[0.5, 0.3, 0.2]])
    return Audience(person, {"old": old, "new": 1.2 * old}, rng.normal(size=300))


class Shop:
    """Stands for a Traffic: what is shown is clicked with the probability of its number in tenths."""

    def click_probability(self, shown):
        return shown / 10


def test_an_audience_knows_its_users_and_what_they_did_before():
    before = pd.DataFrame({"clicks": [2, 0], "impressions": [4, 1]}, index=["b", "x"])
    lists = {"old": np.array([[1, 2], [3, 4], [5, 6]])}
    audience = Audience.of(Shop(), lists, ["b", "a", "b"], before)
    assert audience.user_row.tolist() == [1, 0, 1]
    assert audience.ctr("old") == pytest.approx(0.35)
    # of the audience's own users: CTR before 2 of 4, so b has 2 - 0.5 * 4; a was not seen and has the mean, 0
    assert audience.covariate.tolist() == [0, 0]
    elsewhere = pd.DataFrame({"clicks": [1, 0], "impressions": [2, 1]}, index=["a", "b"])
    assert Audience.of(Shop(), lists, ["b", "a", "b"], elsewhere).covariate == pytest.approx([1 - 2 / 3, -1 / 3])


def test_every_drawn_user_brings_all_her_sessions_into_one_arm(audience):
    one = audience.experiment(ARMS, 500, seed=3, name="x")
    sessions = np.bincount(audience.user_row)
    for user in range(0, 500, 50):
        own = one.session[one.user == user]
        people = set(audience.user_row[own])
        assert len(people) == 1
        assert len(own) == len(set(own)) == sessions[people.pop()]
    assert set(one.arm) == set(ARMS)
    assert one.clicks.max() <= one.slots == 3
    again = audience.experiment(ARMS, 500, seed=3, name="x")
    assert (again.arm == one.arm).all()
    assert (again.clicks == one.clicks).all()
    other = audience.experiment(ARMS, 500, seed=3, name="y")
    assert (other.arm != one.arm).mean() > 0.3, "another experiment, another split"


def test_an_experiment_finds_the_truth_within_its_interval(audience):
    assert audience.ctr("new") == pytest.approx(1.2 * audience.ctr("old"))
    held = []
    for number in range(60):
        one = audience.experiment(ARMS, 2000, seed=1, name=str(number))
        old, new = one.of_arms("control", "treatment")
        found = lift(new, old).relative
        held.append(found.low <= 0.2 <= found.high)
    assert 0.85 <= np.mean(held) <= 1  # 95 % of 60, within three standard errors


def test_users_who_come_often_are_where_a_test_by_session_fails(audience):
    times = online.heavy_tail(audience.users, seed=1)
    assert times.min() == 1
    assert times.max() <= 50
    assert (times == 1).mean() == pytest.approx(1 - 2**-1.5, abs=0.08), "the Pareto tail's share below 2"
    often = audience.coming(times)
    assert np.bincount(often.user_row).tolist() == (np.bincount(audience.user_row) * times).tolist()
    mean = (audience.probability["old"].mean(axis=1) * times[audience.user_row]).sum() / times[audience.user_row].sum()
    assert often.ctr("old") == pytest.approx(mean)
    same = {"one": "old", "other": "old"}
    _, _, by_user, by_session = online.repeated(often, same, 600, repeats=300, looks=1, seed=0)
    assert (by_user < 0.05).mean() < 0.09
    assert (by_session < 0.05).mean() > 0.15
    with pytest.raises(ValueError, match="300 numbers, the least 0; expected 300 of at least 1"):
        audience.coming(np.zeros(300, int))


def test_counts_are_those_of_a_count_by_hand():
    one = Experiment(
        arm=np.array(["a", "b", "a"]), user=np.array([0, 0, 1, 2]), session=np.array([5, 6, 7, 5]),
        clicks=np.array([1, 2, 0, 3]), slots=3, covariate=np.zeros(3),
    )  # fmt: skip
    clicks, impressions = one.per_user()
    assert clicks.tolist() == [3, 0, 3]
    assert impressions.tolist() == [6, 3, 3]
    inside = np.zeros(8, dtype=bool)
    inside[5] = True
    clicks, impressions = one.per_user(inside)
    assert clicks.tolist() == [1, 0, 3]
    assert impressions.tolist() == [3, 0, 3]
    a, b = one.by_group([inside, np.ones(8, dtype=bool)], "a", "b")
    assert a.ctr.tolist() == [4 / 6, 6 / 9]
    assert a.users.tolist() == [2, 2]
    assert b.users.tolist() == [0, 1]


def test_the_last_look_is_the_end(audience):
    one = audience.experiment(ARMS, 400, seed=0, name="x")
    for at_end, on_the_way in zip(one.of_arms(*ARMS), one.by_look(4, *ARMS), strict=True):
        assert on_the_way.ctr[-1] == pytest.approx(at_end.ctr)
        assert on_the_way.users[-1] == at_end.users
        assert (np.diff(on_the_way.users) > 0).all()


def test_the_same_lists_twice_differ_by_chance_alone(audience):
    same = {"one": "old", "other": "old"}
    how = {"repeats": 150, "looks": 3, "seed": 0}
    difference, error, at_looks, by_session = online.repeated(audience, same, 300, **how)
    assert difference.shape == error.shape == at_looks.shape == (150, 3)
    np.testing.assert_allclose(at_looks, 2 * norm.sf(np.abs(difference / error)))
    p = at_looks[:, -1]
    assert kstest(p, "uniform").pvalue > 0.01
    alarms = look.rejections({"by user": p, "by session": by_session})
    assert alarms.share[0] == (p < 0.05).mean()
    assert alarms.share[1] > 0.07, "these users' sessions are alike: taking them for independent raises false alarms"
    at_any_look = look.rejections({"peeking": at_looks})
    assert at_any_look.share[0] == (at_looks < 0.05).any(axis=1).mean() > alarms.share[0]
    unknown = np.where(np.arange(3) == 0, np.nan, at_looks)
    assert look.rejections({"peeking": unknown}).share[0] == (unknown < 0.05).any(axis=1).mean(), "NaN rejects nothing"
    again = online.repeated(audience, same, 300, **how)
    assert (again[0] == difference).all()


def test_the_tables_hold_what_the_experiment_found(audience):
    arms = {"old": "old", "new": "new"}
    one = audience.experiment(arms, 3000, seed=0, name="x")
    table = look.lifts(one, [("new", "old")], audience)
    assert table.method.tolist() == ["plain", "CUPED"]
    old, new = one.of_arms("old", "new")
    assert table.difference[0] == pytest.approx(float(new.ctr - old.ctr))
    assert table.truth.tolist() == pytest.approx([0.2, 0.2])
    assert table.users[0] == 3000
    masks = pd.DataFrame({"first": audience.user_row < 100, "rest": audience.user_row >= 100})
    groups = look.by_group(one, "new", "old", masks, audience)
    assert groups.users.sum() == 3000
    inside = masks["first"].to_numpy()
    assert groups.truth[0] == pytest.approx(0.2 * audience.probability["old"][inside].mean())
    ratio = look.sample_ratios(one, ["old", "new"])
    assert ratio.users.sum() == 3000
    assert not ratio.alarm.any()
    assert look.sample_ratios(one, ["old", "gone"]).alarm.all()


def test_arms_are_the_last_models_that_are_no_controls():
    trained = ["two_tower", "two_tower_text", "qe_rec", "qe_rec/no_text", "rgalign_rec"]
    assert look.arms_of(trained) == ["two_tower_text", "qe_rec", "rgalign_rec"]
    assert look.arms_of(["two_tower"]) == ["popularity", "two_tower"]
