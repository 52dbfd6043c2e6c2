"""The whole run from the command line: killed in the middle it ends with the same bytes as unbroken."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from rgalign import artifacts
from rgalign.params import ROOT

TINY = {"data.world.sessions": 800, "data.world.transcripts": 50, "ranker.epochs": 3, "evaluation.bootstrap": 100}
RESULTS = ("tables/session_metrics.parquet", "tables/results.parquet", "tables/comparisons.parquet", "models/rankers")


def command(run: Path) -> list[str]:
    settings = [word for key, value in TINY.items() for word in ("--set", f"{key}={value}")]
    return [sys.executable, "-m", "rgalign", "run", "params/smoke.yaml", "--run-dir", str(run), *settings]


def finish(run: Path, threads: str = "1") -> str:
    """threads: what the environment asks of BLAS and OpenMP; run.threads pins it, so no byte may depend on it."""
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
    return subprocess.run(command(run), cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


def kill_in_rankers(run: Path) -> None:
    """Start a run and SIGKILL it, with its kernel, once stage 03 has begun to write models."""
    process = subprocess.Popen(command(run), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list((run / "models").glob(".rankers*/two_tower/*")):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False).stdout
    for pid in [process.pid, *map(int, children.split())]:
        os.kill(pid, signal.SIGKILL)
    process.wait()


def test_a_killed_run_resumes_and_ends_with_the_same_bytes(tmp_path):
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    finish(unbroken)
    kill_in_rankers(killed)
    assert "03_rankers" not in artifacts.read_manifest(killed)["stages"]
    printed = finish(killed, threads="2")
    assert "01_data: unchanged, skipped" in printed
    assert [artifacts.digest(killed / name) for name in RESULTS] == [
        artifacts.digest(unbroken / name) for name in RESULTS
    ]
    assert not [path for path in killed.rglob(".*") if artifacts.TEMPORARY in path.name]
    assert finish(killed).count("unchanged, skipped") == 4
