"""Rankers and reward models by the user's launcher: each trained whole, with the bytes and curves of one process."""

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import small_run
import torch

from rgalign.alignment import closed_loop, rewarding
from rgalign.alignment.context import Context
from rgalign.ranker import train as rankers
from rgalign.run import distributed
from rgalign.run.artifacts import digest, write_table
from rgalign.run.distributed import ProcessesError

TORCHRUN = "torchrun --standalone --nproc_per_node 2"
MODELS = ["two_tower_text", "qe_rec/shuffled_query"]
# Starts the worker and ends it as soon as its first ranker is there; the next time it lets the worker end by itself.
KILLER = """
import pathlib, signal, subprocess, sys, time
folder = pathlib.Path(sys.argv[-1])
first, killed = folder / "shard-00000", folder.parent / "killed"
child = subprocess.Popen([sys.executable, *sys.argv[1:]])
if not killed.exists():
    while not first.is_dir():
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    killed.write_text(str(first.stat().st_ino))
    sys.exit(child.wait() != 0)
assert killed.read_text() == str(first.stat().st_ino)
status = child.wait()
assert killed.read_text() == str(first.stat().st_ino), "it was trained again"
sys.exit(status)
"""


def train(context, folder: Path, launcher: str | None, **changes) -> pd.DataFrame:
    """MODELS, each with two seeds, into folder/rankers; returns their curves."""
    wanted = small_run.small({"ranker.models": MODELS, "alignment.loop.rounds": 0}).ranker.settings()
    settings = {name: own.model_copy(update=changes) for name, own in wanted.items()}
    read = {"embeddings": context.run / "tables" / "embeddings", "seed": 7}
    made = {name: context.run / "tables" / name for name in ("encoded", "match", "exposure")}
    launch = rankers.Launch(launcher, folder / "job", **made, **read)
    parts = rankers.load_parts(launch.encoded)
    own = {name: rankers.parts_of_variant(parts, name, **read) for name in MODELS}
    how = {"positions": context.positions, "accelerator": context.accelerator, "launch": launch}
    return rankers.train(settings, [0, 1], own, folder=folder / "rankers", **how)


@pytest.fixture(scope="module")
def alone(context, tmp_path_factory) -> tuple[Path, pd.DataFrame]:
    """What one process trains, and its curves."""
    folder = tmp_path_factory.mktemp("alone")
    return folder / "rankers", train(context, folder, None)


@pytest.mark.slow
def test_two_processes_train_the_rankers_of_one(context, alone, tmp_path):
    folder, curves = alone
    two = train(context, tmp_path, TORCHRUN)
    assert len(list(folder.rglob("weights.safetensors"))) == 2 * len(MODELS)
    assert digest(tmp_path / "rankers") == digest(folder)
    pd.testing.assert_frame_equal(two, curves)
    for name, table in {"one": curves, "two": two}.items():
        write_table(tmp_path / name, table)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    assert not (tmp_path / "job").exists()


@pytest.mark.slow
def test_a_lost_process_costs_the_ranker_that_it_was_at(context, alone, tmp_path, capsys):
    script = tmp_path / "killer.py"
    script.write_text(KILLER)
    curves = train(context, tmp_path, f"{sys.executable} {script}")
    assert "rank: a process was lost (exit 1); started once more" in capsys.readouterr().out
    assert digest(tmp_path / "rankers") == digest(alone[0])
    pd.testing.assert_frame_equal(curves, alone[1])


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_told_by_the_ranker_that_has_it(context, tmp_path):
    with pytest.raises(ProcessesError, match=r"the loss of the ranker is .* lower ranker\.learning_rate"):
        train(context, tmp_path, sys.executable, learning_rate=1e38, lists_per_batch=8)


@pytest.mark.parametrize(("index", "own"), [(0, [0, 3]), (1, [1, 4]), (2, [2]), (7, [])])
def test_each_process_trains_its_share_once(monkeypatch, tmp_path, index, own):
    monkeypatch.setattr(distributed, "count", lambda: max(3, index + 1))
    monkeypatch.setattr(distributed, "index", lambda: index)
    trained = []

    def train_one(number: int, folder: Path) -> pd.DataFrame:
        folder.mkdir()
        trained.append(number)
        return pd.DataFrame({"epoch": [number]})

    assert rankers.train_in_shards(tmp_path, 5, train_one) == {"trained": len(own)}
    assert rankers.train_in_shards(tmp_path, 5, train_one) == {"trained": 0}
    assert trained == own


def test_half_a_ranker_is_not_kept(tmp_path):
    def killed(number: int, folder: Path) -> pd.DataFrame:
        folder.mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rankers.train_in_shards(tmp_path, 1, killed)
    assert list(tmp_path.iterdir()) == []


def test_what_another_call_left_is_trained_again(monkeypatch, tmp_path):
    stale = tmp_path / "job" / "shard-00000"
    stale.mkdir(parents=True)

    def train_one(number: int, folder: Path) -> pd.DataFrame:
        (folder / "m" / "seed-5").mkdir(parents=True)
        return pd.DataFrame({"epoch": [1]})

    def run(task: str, job: Path, *given, **how) -> None:
        assert not stale.exists()
        rankers.train_in_shards(job, 1, train_one)

    monkeypatch.setattr(distributed, "run", run)
    job = tmp_path / "job"
    curves = rankers.train_by_processes("rank", "torchrun", job, [("m", 5)], {}, tmp_path / "rankers", device="cpu")
    assert curves["epoch"].tolist() == [1]
    assert (tmp_path / "rankers" / "m" / "seed-5").is_dir()


def by_two(context):
    return replace(context, recipe=replace(context.recipe, launcher=TORCHRUN))


@pytest.mark.slow
def test_the_retraining_and_the_closed_loop_by_two_processes_end_with_the_rankers_of_one(
    context, monkeypatch, tmp_path
):
    """One training for two processes: the other waits. (How they embed: test_processes_launch.py.)"""
    main, other = context.main(), context.main()
    with torch.no_grad():
        other.model.get_input_embeddings().weight.mul_(1.5)  # what stands for RG-SFT and RG-DPO
    embedding = Context.embedding
    alone = replace(context.recipe, launcher=None)
    monkeypatch.setattr(Context, "embedding", lambda own, reasoner: replace(embedding(own, reasoner), recipe=alone))
    curves, turns = [], []
    for name, own in {"one": context, "two": by_two(context)}.items():
        to, folder, work = (tmp_path / name / part for part in ("embeddings", "rankers", "work"))
        curves.append(closed_loop.retrain_rankers(own, main, other, to, folder, work))
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["embeddings", "rankers"]
        turns.append(
            closed_loop.finish_iteration(own.reading(to, folder), other, other, tmp_path / name / "turn", work)
        )
        assert not work.exists()
    pd.testing.assert_frame_equal(*curves)
    pd.testing.assert_frame_equal(*(turn.curves for turn in turns))
    assert digest(tmp_path / "two") == digest(tmp_path / "one")
    assert digest(tmp_path / "two" / "rankers" / "seed-0") != digest(context.rankers_folder / "seed-0")


@pytest.mark.slow
def test_two_processes_train_the_reward_models_of_one(context, rewarded, tmp_path):
    run = shutil.copytree(context.run, tmp_path / "run")
    own = small_run.small({"alignment.reward.compared": True})
    own = replace(context, params=own, models=run / "models" / "reasoner")
    candidates, embedder = rewarded[0].drop(columns="reward"), rewarding.QueryEmbedder(context, context.main())
    one, two = (
        rewarding.train_models(each, embedder, candidates, tmp_path / name)
        for name, each in {"one": own, "two": by_two(own)}.items()
    )
    assert len(list((tmp_path / "two").glob("**/seed-*"))) == 5, "three, and one without each of two folds"
    assert digest(tmp_path / "two") == digest(tmp_path / "one")
    pd.testing.assert_frame_equal(two.drop(columns="seconds"), one.drop(columns="seconds"))
    assert not (tmp_path / "two" / "job").exists()


def test_a_process_is_alone_with_its_rankers_among_others(monkeypatch):
    """It knows neither of the others nor of how they train one model: a ranker would else have its loss divided."""
    told = {"RANK": "1", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
    told |= {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_DEEPSPEED": "true"}
    told |= {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}
    told |= {"ACCELERATE_MIXED_PRECISION": "bf16"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with distributed.single_process() as accelerator:
        assert (accelerator.num_processes, accelerator.device.type) == (1, "cpu")
        assert (accelerator.gradient_accumulation_steps, accelerator.mixed_precision) == (1, "no")
        assert accelerator.state.dynamo_plugin.backend == "NO"
    assert {name: os.environ[name] for name in told} == told
