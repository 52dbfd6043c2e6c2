"""Train, valid and test by column, date or share; and which of train's users are development."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rgalign.data import shards
from rgalign.data.split import Development, by_time, development_users, published, resolve, user_folds


def sessions_on(days) -> pd.DataFrame:
    return pd.DataFrame({"timestamp": pd.to_datetime(list(days)), "split": None})


MARCH = [f"2024-03-{day:02d}" for day in range(1, 11)]


def test_by_time_takes_each_date_as_the_first_day_of_its_part():
    split = by_time(sessions_on(MARCH), valid_from="2024-03-05", test_from="2024-03-07")
    assert split.tolist() == ["train"] * 4 + ["valid"] * 2 + ["test"] * 4


def test_by_fraction_does_not_depend_on_the_order_of_rows():
    frame = sessions_on(MARCH)
    shuffled = frame.sample(frac=1, random_state=3)
    assert by_time(frame).tolist() == ["train"] * 7 + ["valid"] + ["test"] * 2
    assert by_time(shuffled).sort_index().tolist() == by_time(frame).tolist()


def test_a_day_is_never_cut_in_two():
    days = [MARCH[0]] * 5 + [MARCH[1]] * 3 + [MARCH[2]] * 1 + [MARCH[3]] * 3
    split = by_time(sessions_on(days), train=0.5, valid=0.2)
    assert split.groupby(days).nunique().max() == 1
    assert split.tolist() == ["train"] * 8 + ["valid"] * 1 + ["test"] * 3


@given(days=st.lists(st.integers(0, 400), min_size=3, max_size=80), train=st.floats(0.1, 0.8))
def test_no_part_begins_before_the_one_in_front_of_it_ends(days, train):
    when = pd.Timestamp("2024-01-01") + pd.to_timedelta(days, unit="D")
    try:
        split = by_time(sessions_on(when), train=train, valid=0.1)
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
        (lambda: by_time(sessions_on([*MARCH, None])), "1 of 11 sessions have none"),
        (lambda: by_time(sessions_on(MARCH), train=0.9, valid=0.1), "leave something for test"),
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
    assert by_time(sessions).tolist() == sessions["split"].tolist()


FIRST = pd.Timestamp("2024-03-01")


def write(folder: Path, seed: int, *, sessions: int = 80, users: int = 60, dates: bool = True) -> Path:
    """Sessions of returning users on ten days; lists of three of twelve intents, one of them mostly clicked."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    day = np.sort(rng.integers(0, 10, sessions))
    frame = pd.DataFrame(
        {
            "session_id": [f"s{i}" for i in range(sessions)],
            "user_id": [f"u{i}" for i in rng.integers(0, users, sessions)],
            "timestamp": FIRST + pd.to_timedelta(day, unit="D") if dates else pd.Series([pd.NaT] * sessions),
            "region": None,
            "split": np.where(day < 8, "train", "valid"),
            "state": rng.choice(["paid", "sent"], sessions),
        }
    )
    shown = np.stack([rng.permutation(12)[:3] for _ in range(sessions)])
    impressions = pd.DataFrame(
        {
            "session_id": np.repeat(frame["session_id"], 3),
            "intent_id": [f"i{k}" for k in shown.ravel()],
            "position": np.tile(range(3), sessions),
            "clicked": [int(rng.random() < 0.8 and place == 0) for place in np.tile(range(3), sessions)],
        }
    )
    intents = pd.DataFrame({"intent_id": [f"i{k}" for k in range(12)], "title": "t", "description": "d"})
    intents = intents.assign(category="c", valid_from=pd.Series([pd.NaT] * 12, dtype="datetime64[us]"))
    for name, table in {"sessions": frame, "impressions": impressions, "intents": intents}.items():
        table.to_parquet(folder / f"{name}.parquet")
    (folder / "dataset.yaml").write_text(yaml.safe_dump({"name": "x", "features": {"state": "categorical"}}))
    return folder


@settings(max_examples=20)  # each writes and encodes a data set
@given(seed=st.integers(0, 10_000), days=st.integers(0, 2), share=st.sampled_from([0.0, 0.1, 0.3]))
def test_no_user_is_in_both_parts_and_train_does_not_know_the_new_intents(tmp_path_factory, seed, days, share):
    folder = write(tmp_path_factory.mktemp("data"), seed)
    drawn = development_users(pd.read_parquet(folder / "sessions.parquet")["user_id"], share=0.2, seed=seed)
    assume(drawn[: len(drawn) // 2].any())  # certainly in train
    chosen = Development.of(folder, dev_users=0.2, seed=seed, dev_days=days, dev_new_intents=share)
    space = shards.fit_folder(folder, development=chosen)
    out = folder / "encoded"
    shards.encode_folder(space, folder, out, development=chosen, hidden=chosen.new_intents)
    train, dev = (shards.load_lists(out, part) for part in ("train", "dev"))
    sessions = pd.read_parquet(folder / "sessions.parquet").query("split == 'train'").set_index("session_id")
    clicked = pd.read_parquet(folder / "impressions.parquet").query("clicked == 1").set_index("session_id")["intent_id"]
    clicked = clicked[clicked.index.isin(sessions.index)]
    assert sorted([*train.session_id, *dev.session_id]) == sorted(sessions.index), "each list once, none lost"
    assert not set(train.user_id) & set(dev.user_id)
    late = sessions["timestamp"] > sessions["timestamp"].max() - pd.Timedelta(days=days)
    of_new = clicked.index[clicked.isin(chosen.new_intents)]
    wanted = set(sessions["user_id"][late]) | set(sessions["user_id"][of_new])
    wanted |= set(sessions["user_id"][development_users(sessions["user_id"], share=0.2, seed=seed)])
    assert set(dev.user_id) == wanted, "and nobody else"
    # Train clicks on no new intent, shows none, and gives it no id.
    kb = shards.load_intents(out)
    shown = set(kb.intent_id[train.candidates[train.shown].numpy()])
    assert not set(chosen.new_intents) & (shown | set(space.intents))
    assert not set(train.session_id) & set(of_new)
    assert set(of_new) <= set(dev.session_id)
    assert len(chosen.new_intents) == (max(1, round(share * clicked.nunique())) if share else 0)
    # The others keep the positions they were shown at.
    rows = pd.read_parquet(folder / "impressions.parquet").set_index(["session_id", "position"])["intent_id"]
    for row, session in enumerate(train.session_id):
        for place in np.flatnonzero(train.shown[row].numpy()):
            assert kb.intent_id[train.candidates[row, place]] == rows[session, place]


def test_without_either_the_folder_is_not_read_and_the_users_are_those_of_the_hash(tmp_path):
    chosen = Development.of(tmp_path / "nowhere", dev_users=0.2, seed=3)
    users = np.array([f"u{i}" for i in range(500)])
    np.testing.assert_array_equal(chosen(users), development_users(users, share=0.2, seed=3))
    assert chosen.new_intents == ()


def test_the_drawn_intents_stay_when_others_come(tmp_path):
    few, many = write(tmp_path / "few", 1, sessions=60), write(tmp_path / "many", 1, sessions=600)
    drawn = [
        Development.of(folder, dev_users=0.1, seed=5, dev_new_intents=0.3).new_intents
        for folder in (few, many)
        if len(pd.read_parquet(folder / "impressions.parquet").query("clicked == 1")["intent_id"].unique()) == 12
    ]
    assert len(drawn) == 2
    assert drawn[0] == drawn[1]


def test_a_combination_that_leaves_nothing_is_one_clear_error(tmp_path):
    folder = write(tmp_path, 2)
    with pytest.raises(ValueError, match="no user with a click is left") as error:
        Development.of(folder, dev_users=0.1, seed=0, dev_days=30, dev_new_intents=0.1)
    for words in ("data.dev_users (0.1)", "data.dev_days 30", "data.dev_new_intents 0.1", "train users"):
        assert words in str(error.value)


def test_last_days_need_dates(tmp_path):
    folder = write(tmp_path, 2, dates=False)
    with pytest.raises(ValueError, match=r"data\.dev_days is 2, but \d+ of \d+ train sessions have no timestamp"):
        Development.of(folder, dev_users=0.1, seed=0, dev_days=2)
    assert Development.of(folder, dev_users=0.1, seed=0, dev_new_intents=0.1).new_intents
