"""Splits: by date, by fraction of the time line, as published; development users."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rgalign.data.split import by_fraction, by_time, development_users, published, resolve, user_folds


def sessions_on(days) -> pd.DataFrame:
    return pd.DataFrame({"timestamp": pd.to_datetime(list(days)), "split": None})


MARCH = [f"2024-03-{day:02d}" for day in range(1, 11)]


def test_by_time_takes_each_date_as_the_first_day_of_its_part():
    split = by_time(sessions_on(MARCH), valid_from="2024-03-05", test_from="2024-03-07")
    assert split.tolist() == ["train"] * 4 + ["valid"] * 2 + ["test"] * 4


def test_by_fraction_does_not_depend_on_the_order_of_rows():
    frame = sessions_on(MARCH)
    shuffled = frame.sample(frac=1, random_state=3)
    assert by_fraction(frame).tolist() == ["train"] * 7 + ["valid"] + ["test"] * 2
    assert by_fraction(shuffled).sort_index().tolist() == by_fraction(frame).tolist()


def test_a_day_is_never_cut_in_two():
    days = [MARCH[0]] * 5 + [MARCH[1]] * 3 + [MARCH[2]] * 1 + [MARCH[3]] * 3
    split = by_fraction(sessions_on(days), train=0.5, valid=0.2)
    assert split.groupby(days).nunique().max() == 1
    assert split.tolist() == ["train"] * 8 + ["valid"] * 1 + ["test"] * 3


@given(days=st.lists(st.integers(0, 400), min_size=3, max_size=80), train=st.floats(0.1, 0.8))
def test_no_part_begins_before_the_one_in_front_of_it_ends(days, train):
    when = pd.Timestamp("2024-01-01") + pd.to_timedelta(days, unit="D")
    try:
        split = by_fraction(sessions_on(when), train=train, valid=0.1)
    except ValueError as error:
        assert "empty" in str(error)  # noqa: PT017 - few distinct days cannot fill three parts
        return
    last = {part: when[split.eq(part).to_numpy(dtype=bool)].max() for part in ("train", "valid")}
    first = {part: when[split.eq(part).to_numpy(dtype=bool)].min() for part in ("valid", "test")}
    assert last["train"] < first["valid"]
    assert last["valid"] < first["test"]
    assert split.eq("train").mean() >= train - 1e-9


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: by_time(sessions_on(MARCH), valid_from="2024-03-07", test_from="2024-03-05"), "must lie before"),
        (lambda: by_time(sessions_on(MARCH), valid_from="2024-03-05", test_from="2025-01-01"), "test 0"),
        (lambda: by_fraction(sessions_on([*MARCH, None])), "1 of 11 sessions have none"),
        (lambda: by_fraction(sessions_on(MARCH), train=0.9, valid=0.1), "leave something for test"),
        (
            lambda: by_time(sessions_on(MARCH), valid_from="2024-03-05", test_from="soon"),
            "test_from is 'soon'; expected",
        ),
        (lambda: published(pd.DataFrame({"split": ["train", "dev"]})), "1 of 2 sessions have none of"),
    ],
)
def test_what_cannot_be_split_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_the_published_split_is_kept_and_an_empty_one_filled_in():
    frame = sessions_on(MARCH)
    rule = {"time_split": {"train": 0.5, "valid": 0.3}}
    assert resolve(frame, rule).tolist() == ["train"] * 5 + ["valid"] * 3 + ["test"] * 2
    frame["split"] = ["test", "train"] * 5
    assert resolve(frame, rule).tolist() == ["test", "train"] * 5


def test_development_is_a_stable_tenth_of_users():
    users = np.array([f"user {number}" for number in range(20_000)])
    chosen = development_users(np.repeat(users, 2), seed=1)
    assert np.array_equal(chosen[::2], chosen[1::2])
    assert abs(chosen.mean() - 0.1) < 0.01
    some = np.arange(0, len(users), 7)
    assert np.array_equal(development_users(users[some], seed=1), chosen[::2][some])
    other = development_users(users, seed=2)
    assert abs((other & chosen[::2]).mean() - 0.01) < 0.005  # another seed, an independent choice


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_folds_hold_whole_users_and_about_as_many_each(folds):
    users = np.array([f"user {number}" for number in range(9_000)])
    fold = user_folds(np.repeat(users, 2), folds=folds, seed=1)
    assert np.array_equal(fold[::2], fold[1::2])
    np.testing.assert_allclose(np.bincount(fold, minlength=folds) / len(fold), 1 / folds, atol=0.02)
    some = np.arange(0, len(users), 7)
    assert np.array_equal(user_folds(users[some], folds=folds, seed=1), fold[::2][some])
    if folds == 2:
        assert np.array_equal(fold == 1, development_users(np.repeat(users, 2), share=0.5, seed=1))


def test_the_published_cfpb_split_is_seventy_ten_twenty_by_whole_days(public_data):
    sessions = pd.read_parquet(public_data / "cfpb2014" / "sessions.parquet")
    assert by_fraction(sessions).tolist() == sessions["split"].tolist()
