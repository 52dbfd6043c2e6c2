"""A run from the command line: killed in the middle it ends with the same bytes as unbroken."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kill_runs import Moment, kill_at, temporaries

from rgalign.params import ROOT
from rgalign.run import artifacts

TINY = {"data.world.sessions": 500, "data.world.transcripts": 50, "ranker.epochs": 3, "evaluation.bootstrap": 100}
TINY |= {"ranker.seeds": [0], "run.workers": 1, "reasoner.queries.sessions": 50}
TINY |= {"alignment.sft.epochs": 20, "alignment.dpo.epochs": 20, "alignment.cl.epochs": 20, "alignment.dpo.looks": 2}
TINY |= {"alignment.loop.look_sessions": 40, "alignment.reward.compared": "false", "reasoner.tiny.hidden": 16}
KILLS = {  # stage -> what is there while it trains
    "03_rankers": "models/.rankers*/two_tower/*",
    "05_rg_sft": "work/05_rg_sft/checkpoint-*/complete",
    "06_rg_dpo": "work/06_rg_dpo/checkpoint-*/complete",
    "07_rg_cl": "work/07_rg_cl/checkpoint-*/complete",
}
STAGES = 10


def command(run: Path, through: str = "10") -> list[str]:
    settings = [word for key, value in TINY.items() for word in ("--set", f"{key}={value}")]
    own = ["run", "params/smoke.yaml", "--run-dir", str(run), "--through", through]
    return [sys.executable, "-m", "rgalign", *own, *settings]


def finish(run: Path, through: str = "10", threads: str = "1") -> str:
    """threads: what the environment asks of BLAS and OpenMP; run.threads pins it, so no byte may depend on it."""
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
    done = subprocess.run(command(run, through), cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kill(run: Path, stage: str) -> None:
    """Start a run and SIGKILL it, with its kernel, in the middle of a stage's training."""
    process = subprocess.Popen(command(run), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(run.glob(KILLS[stage])):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False).stdout
    for pid in [process.pid, *map(int, children.split())]:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert stage not in artifacts.read_manifest(run)["stages"]


def outputs(run: Path) -> dict[str, str]:
    """Artifact -> digest, of every stage."""
    stages = artifacts.read_manifest(run)["stages"].values()
    return {name: made for stage in stages for name, made in stage["outputs"].items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """Two runs through notebook 03: one unbroken, one killed twice."""
    unbroken, killed = (tmp_path_factory.mktemp("runs") / name for name in ("unbroken", "killed"))
    finish(unbroken, "03")
    writing = Moment("02_reasoner", "in a table's or model's writing", "SIGTERM", 0.9)
    assert kill_at(killed, writing, 0, command(killed)) == ""
    kill(killed, "03_rankers")
    assert finish(killed, "03", threads="2").count("unchanged, skipped") == 2
    return unbroken, killed


def test_a_run_killed_while_it_writes_and_while_it_trains_ends_with_the_same_bytes(runs):
    unbroken, killed = runs
    assert outputs(killed) == outputs(unbroken)
    assert {"models/reasoner", "models/rankers", "tables/valid_metrics.parquet"} < set(outputs(killed))
    assert not temporaries(killed)
    assert not list(killed.glob("work/*"))


@pytest.mark.slow
def test_a_whole_run_killed_in_every_training_ends_with_the_same_bytes(runs):
    """Rankers, models and tables, what the watch of RG-DPO saw before it was killed, figures: all that is written."""
    unbroken, killed = runs
    finish(unbroken)
    papermill = Moment("04_reward_model", "in papermill's writing", "SIGINT", 0.5)
    assert kill_at(killed, papermill, 0, command(killed)) == ""
    for stage in ("05_rg_sft", "06_rg_dpo", "07_rg_cl"):
        kill(killed, stage)
    printed = finish(killed, threads="2")
    assert printed.count("unchanged, skipped") == 6
    assert "[7/10] RG-CL: running, about" in printed
    assert outputs(killed) == outputs(unbroken)
    assert {"models/sft", "models/dpo", "models/cl", "models/aligned_rankers"} < set(outputs(killed))
    assert not temporaries(killed)
    pages = [sorted(path.name for path in (run / "notebooks").iterdir()) for run in (killed, unbroken)]
    assert pages[0] == pages[1]
    assert not list(killed.glob("work/*"))
    assert finish(killed).count("unchanged, skipped") == STAGES
