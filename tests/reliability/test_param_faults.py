"""Bad params: every generated one is refused by name before a kernel starts or a folder is made."""

import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch  # noqa: F401 a device is asked of it, and its own import is not what is timed
from every import every
from param_faults import CASES, BadParam

from rgalign.__main__ import main
from rgalign.params import ROOT

SECONDS = 2.0  # of the whole process's time, whatever else the machine is busy with


def refusal(case: BadParam, run, capsys) -> str:
    """What the command says; AssertionError where it does not refuse."""
    began = time.process_time()
    command = ["run", "params/smoke.yaml", "--run-dir", str(run), "--set", f"{case.key}={case.value}"]
    assert main(command) == 1, "not refused"
    assert time.process_time() - began < SECONDS
    assert not run.exists(), "a folder was made before the params were known to be good"
    said = capsys.readouterr()
    assert not said.out
    return said.err


@pytest.fixture(autouse=True)
def no_kernel(monkeypatch):
    def started(*_, **__):
        raise AssertionError("a kernel would have been started")

    monkeypatch.setattr("rgalign.commands.pipeline.execute", started)


def test_there_are_hundreds_of_every_kind():
    kinds = Counter(case.kind for case in CASES.values())
    assert min(kinds[kind] for kind in ("typo", "type", "range")) >= 100


@pytest.mark.parametrize("nth", [pytest.param(1, marks=pytest.mark.slow), 9])
def test_every_bad_param_is_refused_by_name_before_anything_starts(tmp_path, capsys, nth):
    """Most typos are answered with what was meant. The quick tests try every ninth."""
    told = Counter()

    def judge(case: BadParam, folder: Path) -> None:
        said = refusal(case, folder / "run", capsys)
        assert said.startswith("error: ")
        assert "Traceback" not in said
        assert case.named in said
        assert len(said) < 3_000
        told[case.kind, "did you mean" in said] += 1

    every(dict(list(CASES.items())[::nth]), judge, tmp_path)
    assert told["typo", True] > 0.95 * (told["typo", True] + told["typo", False])


def test_the_command_line_itself_says_so_in_one_line(tmp_path):
    wrong = ["--set", "ranker.lerning_rate=0.1"]
    command = [sys.executable, "-m", "rgalign", "run", "params/smoke.yaml", "--run-dir", str(tmp_path / "run"), *wrong]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert "did you mean ranker.learning_rate?" in done.stderr
    assert not (tmp_path / "run").exists()
