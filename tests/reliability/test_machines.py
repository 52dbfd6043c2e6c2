"""What may differ between machines, and by how much: docs/reliability.md, Same bytes.

Machines differ in the order in which they take sums: by their instructions and by their number of threads. This one is
made another by forbidding torch, MKL, oneDNN, OpenBLAS and numpy all but the instructions that every x86 has.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rgalign.params import ROOT

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
OLD = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OPENBLAS_CORETYPE": "Nehalem",
    "NPY_DISABLE_CPU_FEATURES": " ".join(np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])),
}
APART = {  # at most; found on one Xeon with AVX-512 in brackets
    "pre-training losses": 1e-4,  # nats, of 13 (1e-6)
    "vectors": 0.01,  # of values up to 2.6, kept as float16 (0.0005)
    "query log-probabilities": 1e-3,  # nats, of 33 (8e-6)
    "RG-SFT losses": 1e-4,  # nats, of 6 (1e-6)
    "ranker losses": 0.01,  # nats, of 2.6, in five epochs on those vectors (0.0006)
    "scores": 0.25,  # of scores up to 2.5 (0.05)
    "GAUC": 0.01,  # of 142 lists (0.0018)
}
OTHERS = {"two threads": "results-2", "other instructions": "old/results-1"}


def run(folder: Path, *threads: int, **more: str) -> None:
    folder.mkdir(exist_ok=True)
    path = os.pathsep.join(map(str, (ROOT, HERE.parent)))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(max(threads)), **more}
    command = [sys.executable, str(HERE / "machine_worker.py"), str(folder), *map(str, threads)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def machines(tmp_path_factory) -> Path:
    """The small pipeline on this machine with one thread and with two, and in old/ without its newer instructions."""
    folder = tmp_path_factory.mktemp("machines")
    run(folder, 1, 2)
    run(folder / "old", 1, **OLD)
    return folder


def read(machines: Path, name: str) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    digests = json.loads((machines / f"{name.replace('results', 'digests')}.json").read_text())
    with np.load(machines / f"{name}.npz") as file:
        return digests, dict(file)


@pytest.mark.parametrize("other", OTHERS)
def test_what_is_data_is_the_same_to_the_byte(machines, other):
    """The world, its splits, encoded lists, and the tokens of prompts."""
    (here, _), (there, _) = read(machines, "results-1"), read(machines, OTHERS[other])
    own, foreign = here.pop("instructions"), there.pop("instructions")
    assert foreign == ("DEFAULT" if other == "other instructions" else own), "it was run as it was meant to be"
    assert len(here) > 20
    assert there == here


@pytest.mark.parametrize("what", APART)
@pytest.mark.parametrize("other", OTHERS)
def test_what_is_trained_differs_by_no_more_than_is_stated(machines, other, what):
    (_, here), (_, there) = read(machines, "results-1"), read(machines, OTHERS[other])
    assert np.isfinite(here[what]).all()
    np.testing.assert_allclose(there[what], here[what], atol=APART[what], rtol=0)


@pytest.mark.parametrize("other", OTHERS)
def test_nearly_all_queries_are_the_same_words(machines, other):
    (_, here), (_, there) = read(machines, "results-1"), read(machines, OTHERS[other])
    assert (here["queries"] == there["queries"]).mean() >= 0.95
