"""One training step more or less everywhere: several processes, half precision."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from small_lists import fit

from rgalign.evaluation.metrics import gauc_of_lists
from rgalign.ranker.fit import score
from rgalign.ranker.store import load
from rgalign.ranker.towers import TwoTower

# 31 lists make batches of 5 and 4; two processes share 5 as 3 + 2: a plain average of their gradients would be wrong
SETTINGS = {"epochs": 3, "lists_per_batch": 5, "seed": 0, "progress": False}
WORKER = """
import sys
sys.path.insert(0, {here!r})
from small_lists import fit, make_intents, make_lists
from accelerate import Accelerator
from rgalign.ranker.store import save
from rgalign.ranker.towers import TwoTower, TwoTowerConfig

accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2, accelerator.num_processes
model = TwoTower({config!r}, seed=1)
fitted = fit(model, make_lists("train", 31, seed=0), make_lists("dev", 40, seed=1), make_intents(),
             accelerator=accelerator, **{settings!r})
if accelerator.is_main_process:
    save({folder!r}, fitted.model)
"""


@pytest.fixture
def still(config):
    """Without dropout, so that the number of processes has nothing to draw differently."""
    return config(text=True, dropout=0.0, id_dropout=0.0)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(lists, intents, still, tmp_path):
    dev = lists("dev", 40, seed=1)
    alone = fit(TwoTower(still, seed=1), lists("train", 31, seed=0), dev, intents, **SETTINGS)
    script, folder = tmp_path / "worker.py", str(tmp_path / "ranker")
    here = str(Path(__file__).parent)
    script.write_text(WORKER.format(here=here, config=still, settings=SETTINGS, folder=folder))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    # scores, not weights: what shifts a whole list has no gradient but rounding, which Adam blows up
    scores = [score(model, dev, intents) for model in (alone.model, load(folder))]
    centred = [each - each.mean(axis=1, keepdims=True) for each in scores]
    np.testing.assert_allclose(centred[1], centred[0], atol=1e-4)


def test_half_precision_learns_too_and_keeps_its_weights_whole(lists, intents, config):
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        dev = lists("dev", 100, seed=1)
        fitted = fit(
            TwoTower(config(text=True)), lists("train", 400, seed=0), dev, intents,
            seed=0, epochs=10, lists_per_batch=64, learning_rate=0.02, progress=False,
            accelerator=Accelerator(cpu=True, mixed_precision="bf16"),
        )  # fmt: skip
        judged = gauc_of_lists(score(fitted.model, dev, intents), dev.clicked.numpy(), dev.shown.numpy())
        assert judged.value > 0.95
        assert {value.dtype for value in fitted.model.parameters()} == {torch.float32}
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
