"""A part of one shard is mapped from its file: it is in memory only as far as it is read."""

import re
from pathlib import Path

import pytest

from rgalign.data import shards, tables
from rgalign.data.split import development_users
from rgalign.shopworld import world


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
