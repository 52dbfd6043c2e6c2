"""The whole run from the command line: killed in the middle it ends with the same bytes as unbroken."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from kill_runs import Moment, kill_at, temporaries

from rgalign.params import ROOT
from rgalign.run import artifacts

TINY = {"data.world.sessions": 500, "data.world.transcripts": 50, "ranker.epochs": 3, "evaluation.bootstrap": 100}
TINY |= {"ranker.seeds": [0], "run.workers": 1, "reasoner.queries.sessions": 50}
TINY |= {"alignment.sft.epochs": 20, "alignment.dpo.epochs": 20, "alignment.cl.epochs": 20, "alignment.dpo.looks": 2}
TINY |= {"alignment.loop.look_sessions": 40, "alignment.reward.compared": "false"}
KILLS = {  # stage -> what is there while it trains
    "03_rankers": "models/.rankers*/two_tower/*",
    "05_rg_sft": "work/05_rg_sft/checkpoint-*/complete",
    "06_rg_dpo": "work/06_rg_dpo/checkpoint-*/complete",
    "07_rg_cl": "work/07_rg_cl/checkpoint-*/complete",
}
MOMENTS = {  # further kills before the stage named, at moments that last a blink
    "03_rankers": (
        Moment("01_data", "after the manifest, before the notebook", "SIGKILL", 0.5, alone=True),
        Moment("02_reasoner", "in a table's or model's writing", "SIGTERM", 0.9),
    ),
    "05_rg_sft": (Moment("04_reward_model", "in papermill's writing", "SIGINT", 0.5),),
}
STAGES = 10


def command(run: Path) -> list[str]:
    settings = [word for key, value in TINY.items() for word in ("--set", f"{key}={value}")]
    return [sys.executable, "-m", "rgalign", "run", "params/smoke.yaml", "--run-dir", str(run), *settings]


def finish(run: Path, threads: str = "1") -> str:
    """threads: what the environment asks of BLAS and OpenMP; run.threads pins it, so no byte may depend on it."""
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
    done = subprocess.run(command(run), cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
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


def test_a_run_killed_seven_times_ends_with_the_same_bytes(tmp_path):
    """Rankers, models and tables, what the watch of RG-DPO saw before it was killed, figures: all that is written."""
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    finish(unbroken)
    for stage in KILLS:
        for moment in MOMENTS.get(stage, ()):
            assert kill_at(killed, moment, 0, command(killed)) == "", moment
        kill(killed, stage)
    printed = finish(killed, threads="2")
    assert printed.count("unchanged, skipped") == 6
    assert "07_rg_cl: has not run" in printed
    assert outputs(killed) == outputs(unbroken)
    assert {"models/sft", "models/dpo", "models/cl", "models/aligned_rankers"} < set(outputs(killed))
    assert not temporaries(killed)
    pages = [sorted(path.name for path in (run / "notebooks").iterdir()) for run in (killed, unbroken)]
    assert pages[0] == pages[1]
    assert not list(killed.glob("work/*"))
    assert finish(killed).count("unchanged, skipped") == STAGES
