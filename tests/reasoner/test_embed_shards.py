"""Shards: resumed, shared by processes, never half made."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import small_models

from rgalign.reasoner import embed as embed_shards
from rgalign.reasoner.embed import embed, embed_to_shards, gather
from rgalign.reasoner.model import save, tiny
from rgalign.run import distributed
from rgalign.run.artifacts import digest

IDS = [f"s{i}" for i in range(10)]
ROWS = [[3 + i, 4, 5 + i % 3] for i in range(10)]
PROCESS = """
import sys
from rgalign.reasoner.embed import embed_to_shards
from rgalign.reasoner.model import load
from rgalign.run import distributed
ids, rows = [f"s{i}" for i in range(10)], [[3 + i, 4, 5 + i % 3] for i in range(10)]
distributed.index, distributed.count = lambda: int(sys.argv[3]), lambda: 2
embed_to_shards(sys.argv[2], load(sys.argv[1]), ids, rows, rows_per_shard=3, progress=False)
"""


@pytest.fixture(scope="module")
def reasoner():
    return tiny(small_models.tokenizer(), hidden=16, heads=2, seed=0)


def make(folder, reasoner, ids=IDS, rows=ROWS, **options) -> int:
    return embed_to_shards(folder, reasoner, ids, rows, **{"rows_per_shard": 3, "progress": False, **options})


def test_gathered_shards_are_the_vectors_in_order(tmp_path, reasoner):
    assert make(tmp_path / "s", reasoner) == 4
    vectors = gather(tmp_path / "s")
    assert vectors.ids.tolist() == IDS
    np.testing.assert_allclose(vectors.values, embed(reasoner, ROWS, progress=False), atol=2e-3, rtol=2e-3)


def test_finished_shards_are_kept_and_lost_ones_made_again(tmp_path, reasoner):
    make(tmp_path / "s", reasoner)
    before = digest(tmp_path / "s")
    assert make(tmp_path / "s", reasoner, tokens_per_batch=7) == 0
    (tmp_path / "s" / "shard-00002" / "shard.json").unlink()
    with pytest.raises(ValueError, match=r"1 of 4 shards are missing.*shard-00002"):
        gather(tmp_path / "s")
    assert make(tmp_path / "s", reasoner) == 1
    assert digest(tmp_path / "s") == before


@pytest.mark.parametrize("change", ["model", "ids", "tokens", "pooling"])
def test_anything_else_is_made_anew(tmp_path, reasoner, change):
    make(tmp_path / "s", reasoner)
    other = {
        "model": {"reasoner": tiny(small_models.tokenizer(), hidden=16, heads=2, seed=1)},
        "ids": {"ids": [*IDS[:-1], "new"]},
        "tokens": {"rows": [*ROWS[:-1], [7]]},
        "pooling": {"pooling": "mean"},
    }
    assert make(tmp_path / "s", **{"reasoner": reasoner, **other[change]}) == 4


def test_shards_of_a_longer_set_are_swept(tmp_path, reasoner):
    make(tmp_path / "s", reasoner)
    make(tmp_path / "s", reasoner, ids=IDS[:2], rows=ROWS[:2])
    assert gather(tmp_path / "s").ids.tolist() == IDS[:2]
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["shard-00000"]


def test_a_killed_process_leaves_no_half_shard_and_the_next_run_ends_with_the_same_bytes(
    tmp_path, reasoner, monkeypatch
):
    make(tmp_path / "whole", reasoner)
    real, calls = embed_shards.store.save, []

    def dies(folder, vectors):
        calls.append(folder)
        real(folder, vectors)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(embed_shards.store, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "s", reasoner)
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["shard-00000"]
    (tmp_path / "s" / ".shard-00001.part").mkdir()  # what a process without time for farewells leaves
    assert make(tmp_path / "s", reasoner) == 3
    assert digest(tmp_path / "s") == digest(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path, reasoner):
    save(reasoner, tmp_path / "m")
    command = [sys.executable, "-c", PROCESS, str(tmp_path / "m"), str(tmp_path / "s")]
    root = Path(__file__).resolve().parents[2]
    running = [subprocess.Popen([*command, str(i)], cwd=root) for i in range(2)]
    assert [process.wait(timeout=240) for process in running] == [0, 0]
    make(tmp_path / "one", reasoner)
    assert digest(tmp_path / "s") == digest(tmp_path / "one")


def test_one_of_two_processes_is_not_enough(monkeypatch, tmp_path, reasoner):
    monkeypatch.setattr(distributed, "count", lambda: 2)
    assert make(tmp_path / "s", reasoner) == 2
    with pytest.raises(ValueError, match="2 of 4 shards are missing"):
        gather(tmp_path / "s")


def test_nothing_is_a_set_too(tmp_path, reasoner):
    assert make(tmp_path / "s", reasoner, ids=[], rows=[]) == 1
    assert gather(tmp_path / "s").values.shape == (0, 16)


def test_an_empty_folder_has_nothing_to_gather(tmp_path):
    with pytest.raises(ValueError, match="no first shard"):
        gather(tmp_path)


def test_prompts_of_a_frame_are_made_some_at_a_time_and_are_those_of_the_whole(monkeypatch):
    class Counting:
        rows = ()

        def sessions(self, frame):
            self.rows = (*self.rows, len(frame))
            return [[number, number + 1] for number in frame["n"]]

    put, frame = Counting(), pd.DataFrame({"n": range(10)}, index=range(5, 15))
    monkeypatch.setattr(embed_shards, "SESSIONS_AT_ONCE", 4)
    prompts = embed_shards.Prompts(put, frame)
    assert (len(prompts), put.rows) == (10, ()), "none is made before it is asked for"
    assert list(prompts) == [[n, n + 1] for n in range(10)]
    assert put.rows == (4, 4, 2)
    assert (prompts[7:9], prompts[-1]) == ([[7, 8], [8, 9]], [9, 10])
