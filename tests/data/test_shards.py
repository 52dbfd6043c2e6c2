"""Encoding a folder batch by batch gives what encoding it whole gives; shards on disk."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rgalign.data import shards, tables
from rgalign.data.encode import encode_intents, encode_lists
from rgalign.data.features import _Sample, fit_space
from rgalign.data.lists import Lists, concat_lists
from rgalign.data.shards import (
    encode_folder,
    fit_folder,
    load_intents,
    load_lists,
    load_space,
    save_intents,
    save_lists,
    save_space,
)
from rgalign.data.split import development_users
from rgalign.run.artifacts import digest
from rgalign.shopworld import world

KINDS = {"state": "categorical", "plan": "categorical", "orders": "numeric", "recent": "history", "note": "text"}
DEVELOPMENT = partial(development_users, share=0.3, seed=1)
SPLITS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """120 sessions of 40 users, lists of 0 to 6 intents out of 9, in the layout of a data set."""
    path, rng, size = tmp_path_factory.mktemp("data") / "shop", np.random.default_rng(5), 120
    path.mkdir()
    words = np.array(["late", "parcel", "refund", "coins", "login", "where"])
    sessions = pd.DataFrame(
        {
            "session_id": [f"s{i}" for i in range(size)],
            "user_id": [f"u{i}" for i in rng.integers(0, 40, size)],
            "timestamp": pd.Timestamp("2024-01-01") + pd.to_timedelta(np.arange(size), unit="h"),
            "region": None,
            "split": np.array(SPLITS)[rng.integers(0, 3, size)],
            "state": rng.choice(["paid", "sent", "lost", None], size),
            "plan": pd.array(rng.choice([1, 2, 30, None], size), dtype="Int32"),
            "orders": np.where(rng.random(size) < 0.2, np.nan, rng.gamma(2, size=size)),
            "recent": [list(rng.choice(words, n)) if n >= 0 else None for n in rng.integers(-1, 5, size)],
            "note": [" ".join(rng.choice(words, rng.integers(0, 4))) for _ in range(size)],
        }
    )
    kb = [f"i{k}" for k in range(9)]
    intents = pd.DataFrame({"intent_id": kb, "title": "Title " + pd.Series(kb), "description": "help"})
    intents = intents.assign(category=list("aaabbbccc"), valid_from=pd.Series([pd.NaT] * 9, dtype="datetime64[us]"))
    rows = []
    for session in sessions["session_id"]:
        for position, intent in enumerate(rng.permutation(kb)[: rng.integers(0, 7)]):
            rows.append((session, intent, position, int(rng.random() < 0.3)))
    impressions = pd.DataFrame(rows, columns=["session_id", "intent_id", "position", "clicked"])
    for name, table in {"sessions": sessions, "intents": intents, "impressions": impressions}.items():
        table.to_parquet(path / f"{name}.parquet", row_group_size=50)
    (path / "dataset.yaml").write_text(yaml.safe_dump({"name": "shop", "features": KINDS}, sort_keys=False))
    return path


def tables_of(folder):
    return [pd.read_parquet(folder / f"{name}.parquet") for name in ("sessions", "impressions", "intents")]


def encoded_in_memory(folder, out, lists_per_shard):
    sessions, impressions, intents = tables_of(folder)
    part = sessions["split"].to_numpy(dtype=object).copy()
    part[(part == "train")] = np.where(DEVELOPMENT(sessions["user_id"][part == "train"]), "dev", "train")
    of = {name: impressions[impressions["session_id"].isin(sessions["session_id"][part == name])] for name in set(part)}
    space = fit_space(sessions[part == "train"], intents, of["train"], KINDS)
    save_space(out, space)
    save_intents(out, encode_intents(space, intents))
    for name, shown in of.items():
        lists = encode_lists(space, sessions[part == name], shown, intents, name)
        save_lists(out, lists, lists_per_shard=lists_per_shard)


@pytest.mark.parametrize(("batch_rows", "lists_per_shard"), [(7, 10), (1000, 10), (13, 10_000)])
def test_batches_leave_no_trace(folder, tmp_path, batch_rows, lists_per_shard):
    encoded_in_memory(folder, tmp_path / "memory", lists_per_shard)
    space = fit_folder(folder, development=DEVELOPMENT)
    sizes = {"lists_per_shard": lists_per_shard, "batch_rows": batch_rows}
    count = encode_folder(space, folder, tmp_path / "out", splits=SPLITS, development=DEVELOPMENT, **sizes)
    assert digest(tmp_path / "out") == digest(tmp_path / "memory")
    assert sum(count.values()) == 120
    assert count["dev"] > 0


@pytest.mark.parametrize(("share", "words"), [(0.0, "none of the"), (1.0, "all of the")])
def test_development_users_on_one_side_only_are_refused(folder, tmp_path, share, words):
    sessions = tables_of(folder)[0]
    users = sessions["user_id"][sessions["split"] == "train"].nunique()
    one_side = partial(development_users, share=share, seed=1)
    message = rf"{words} {users} train users fell into development \(data\.dev_users\)"
    with pytest.raises(ValueError, match=message):
        fit_folder(folder, development=one_side)
    with pytest.raises(ValueError, match=message):
        encode_folder(fit_folder(folder), folder, tmp_path, development=one_side, batch_rows=7)


def test_parts_hold_the_sessions_of_their_split_and_users_stay_together(folder, tmp_path):
    encode_folder(fit_folder(folder), folder, tmp_path, splits=SPLITS, development=DEVELOPMENT)
    sessions = tables_of(folder)[0].set_index("session_id")
    parts = {part: load_lists(tmp_path, part) for part in ("train", "dev", "valid", "test")}
    for part, lists in parts.items():
        assert set(sessions.loc[lists.session_id, "split"]) == {"train" if part == "dev" else part}
        assert (sessions.loc[lists.session_id, "user_id"] == lists.user_id).all()
    assert not set(parts["dev"].user_id) & set(parts["train"].user_id)


def test_development_lists_of_an_earlier_run_do_not_outlive_it(folder, tmp_path):
    space = fit_folder(folder)
    assert encode_folder(space, folder, tmp_path, splits=["train"], development=DEVELOPMENT)["dev"] > 0
    assert set(encode_folder(space, folder, tmp_path, splits=["train"])) == {"train"}
    with pytest.raises(FileNotFoundError, match=r"of 'dev' \(it has train\)"):
        load_lists(tmp_path, "dev")


def test_valid_and_test_are_encoded_only_when_asked_for(folder, tmp_path):
    assert set(encode_folder(fit_folder(folder), folder, tmp_path)) == {"train", "valid"}
    with pytest.raises(FileNotFoundError, match=r"of 'test' \(it has train, valid\)"):
        load_lists(tmp_path, "test")
    with pytest.raises(ValueError, match="splits name vaild"):
        encode_folder(fit_folder(folder), folder, tmp_path, splits=("train", "vaild"))


def test_a_value_that_only_valid_test_or_development_has_does_not_enter(folder, tmp_path):
    sessions, impressions, intents = tables_of(folder)
    train = (sessions["split"] == "train").to_numpy(copy=True)
    train[train] = ~DEVELOPMENT(sessions["user_id"][train])
    foreign = sessions.copy()
    foreign.loc[~train, ["state", "note"]] = "foreign"
    foreign.loc[~train, "orders"] = 1e9
    for name, table in {"sessions": foreign, "impressions": impressions, "intents": intents}.items():
        table.to_parquet(tmp_path / f"{name}.parquet")
    (tmp_path / "dataset.yaml").write_bytes((folder / "dataset.yaml").read_bytes())
    assert fit_folder(tmp_path, development=DEVELOPMENT) == fit_folder(folder, development=DEVELOPMENT)


def test_impressions_in_another_order_are_refused(folder, tmp_path):
    for name, table in zip(("sessions", "impressions", "intents"), tables_of(folder), strict=True):
        table = table.iloc[::-1] if name == "impressions" else table
        table.to_parquet(tmp_path / f"{name}.parquet")
    (tmp_path / "dataset.yaml").write_bytes((folder / "dataset.yaml").read_bytes())
    with pytest.raises(ValueError, match="not grouped in the order of sessions"):
        encode_folder(fit_folder(folder), tmp_path, tmp_path / "out", batch_rows=10)
    with pytest.raises(FileNotFoundError, match="it has none"):
        load_lists(tmp_path / "out", "train")


def flat(container) -> dict[str, torch.Tensor | np.ndarray | str]:
    bags = {f"history.{i}": bag for i, bag in enumerate(getattr(container, "history", ()))} | {"words": container.words}
    tensors = {f"{name}.{key}": value for name, bag in bags.items() for key, value in bag._asdict().items()}
    return tensors | {name: value for name, value in vars(container).items() if name not in ("words", "history")}


def assert_same(one, other):
    one, other = flat(one), flat(other)
    assert list(one) == list(other)
    for name, value in one.items():
        assert getattr(value, "dtype", None) == getattr(other[name], "dtype", None), name
        np.testing.assert_array_equal(np.asarray(value), np.asarray(other[name]), err_msg=name)


@pytest.mark.parametrize("lists_per_shard", [4, 1000])
def test_saved_lists_load_as_they_were(folder, tmp_path, lists_per_shard):
    sessions, impressions, intents = tables_of(folder)
    valid = sessions[sessions["split"] == "valid"]
    own = impressions[impressions["session_id"].isin(valid["session_id"])]
    space = fit_folder(folder)
    lists, kb = encode_lists(space, valid, own, intents, "valid"), encode_intents(space, intents)
    save_lists(tmp_path, lists, lists_per_shard=1)
    save_lists(tmp_path, lists, lists_per_shard=lists_per_shard)  # the shards of the first go
    assert len(list(tmp_path.glob("valid-*.safetensors"))) == -(-len(lists) // lists_per_shard)
    save_intents(tmp_path, kb)
    save_space(tmp_path, space)
    assert load_space(tmp_path) == space
    assert_same(load_lists(tmp_path, "valid"), lists)
    assert_same(load_intents(tmp_path), kb)
    save_space(tmp_path, fit_folder(folder, numeric_bins=3))
    with pytest.raises(FileNotFoundError):
        load_lists(tmp_path, "valid")


def test_take_and_concat_are_inverse(folder):
    sessions, impressions, intents = tables_of(folder)
    test = sessions[sessions["split"] == "test"]
    own = impressions[impressions["session_id"].isin(test["session_id"])]
    lists = encode_lists(fit_folder(folder), test, own, intents, "test")
    order = torch.randperm(len(lists), generator=torch.Generator().manual_seed(0))
    taken = lists.take(order)
    row, place = 5, int((order == 5).nonzero())
    assert taken.session_id[place] == lists.session_id[row]
    for bag, own_bag in [(taken.words, lists.words), (taken.history[0], lists.history[0])]:
        mine, theirs = bag.offsets[place : place + 2], own_bag.offsets[row : row + 2]
        assert bag.values[slice(*mine)].tolist() == own_bag.values[slice(*theirs)].tolist()
    assert_same(concat_lists([taken.take(torch.argsort(order)[:7]), taken.take(torch.argsort(order)[7:])]), lists)
    assert_same(lists.to("cpu"), lists)
    with pytest.raises(ValueError, match="part is 'training'"):
        Lists(**{**vars(lists), "part": "training"})


@given(st.lists(st.integers(0, 9), max_size=6), st.integers(1, 12))
def test_the_sample_does_not_depend_on_the_batches(cuts, size):
    stream = np.arange(10.0)[:, None]
    batches = np.split(stream, sorted(cuts))
    samples = [_Sample(1, size, np.random.default_rng(3)) for _ in range(2)]
    samples[0].add(stream)
    for batch in batches:
        samples[1].add(batch)
    np.testing.assert_array_equal(samples[0].rows(), samples[1].rows())
    assert len(samples[0].rows()) == min(size, 10)


def test_public_data_encodes_to_what_its_tables_say(public_data, tmp_path):
    space = fit_folder(public_data / "msweb")
    count = encode_folder(space, public_data / "msweb", tmp_path, splits=SPLITS, batch_rows=5000)
    assert count == {"train": 20_466, "valid": 2_250, "test": 3_453}
    lists, intents = load_lists(tmp_path, "valid"), load_intents(tmp_path)
    table = pd.read_parquet(public_data / "msweb" / "impressions.parquet").set_index("session_id")
    for row in range(0, len(lists), 500):
        shown = table.loc[[lists.session_id[row]]]
        assert intents.intent_id[lists.candidates[row].numpy()].tolist() == shown["intent_id"].tolist()
        assert lists.clicked[row].int().tolist() == shown["clicked"].tolist()


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="Linux tells what is mapped")
def test_lists_of_one_shard_are_mapped_and_those_of_several_are_the_same(tmp_path):
    tables.write(world.generate(seed=1, sessions=400, users=60, transcripts=0), tmp_path / "shop")
    development = lambda users: development_users(users, share=0.2, seed=0)  # noqa: E731
    space = shards.fit_folder(tmp_path / "shop", development=development)
    for name, size in {"one": 10_000, "many": 50}.items():
        shards.encode_folder(space, tmp_path / "shop", tmp_path / name, development=development, lists_per_shard=size)
    mapped, whole = (shards.load_lists(tmp_path / name, "train") for name in ("one", "many"))
    held = re.findall(r"(\S+\.safetensors)$", Path("/proc/self/maps").read_text(), re.MULTILINE)
    assert str(tmp_path / "one" / "train-00000.safetensors") in held
    assert not [path for path in held if "/many/" in path]
    assert (mapped.candidates == whole.candidates).all()
    assert (mapped.fields == whole.fields).all()
    assert (mapped.words.values == whole.words.values).all()
    assert (mapped.take([3, 1]).clicked == whole.take([3, 1]).clicked).all()
