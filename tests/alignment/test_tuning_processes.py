"""A step is the same step in pieces of few tokens, and shared out over two processes (gloo, CPU)."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import process_worker
import pytest
import torch
import two_processes
from accelerate import Accelerator
from test_short_memory import room_for

from rgalign.reasoner.batches import MicroBatcher, Task, documents, right_padded
from rgalign.reasoner.model import load
from rgalign.reasoner.trainer import CHECKPOINTING, Engine, StepTrainer

# sums are taken in another order: float32's rounding, which AdamW passes on for a dozen steps
CURVE = dict(rtol=1e-4, atol=1e-5)
JOBS = {
    "sft": {"step": "sft"},
    "sft in pieces": {"step": "sft", "budget": 16},
    "sft by an adapter": {"step": "sft", "lora": True},
    "sft with a document too few": {"step": "sft", "batch": 7},  # the last step has one document for two processes
    "dpo": {"step": "dpo"},
    "dpo in pieces": {"step": "dpo", "budget": 40},
    "dpo looked at and stopped": {"step": "dpo", "looks": True},
    "cl": {"step": "cl"},
    "cl with a session too few": {"step": "cl", "batch": 7},
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """What two processes made of all jobs, one after the other: <name>/ and <name>.parquet."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "jobs.json").write_text(json.dumps(JOBS))
    two_processes.run(two_processes.HERE / "process_worker.py", folder, seconds=600)
    return folder


def compared(shared: Path, name: str, folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    how = {key: value for key, value in JOBS[name].items() if key != "budget"}
    _, alone = process_worker.train(**how, folder=folder)
    two = pd.read_parquet(shared / f"{name}.parquet")
    return two.drop(columns="seconds"), alone.drop(columns="seconds")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in JOBS if not name.startswith("cl")])
def test_two_processes_have_the_curve_of_one(shared, name, tmp_path):
    two, one = compared(shared, name, tmp_path / "alone")
    assert len(one) > 4
    pd.testing.assert_frame_equal(two, one, **CURVE)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in JOBS if name.startswith("cl")])
def test_two_processes_have_the_contrastive_curve_of_one(shared, name, tmp_path):
    """The losses; a batch's rank, uniformity and distance are means over the processes' own rows."""
    two, one = compared(shared, name, tmp_path / "alone")
    losses = ["step", "loss", "contrastive", "language"]
    pd.testing.assert_frame_equal(two[losses], one[losses], **CURVE)


@pytest.mark.slow
def test_two_processes_end_with_the_weights_of_one(shared, tmp_path):
    reasoner, _ = process_worker.train("sft", tmp_path / "alone")
    both = load(str(shared / "sft")).model.state_dict()
    for name, value in reasoner.model.state_dict().items():
        torch.testing.assert_close(both[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("step", "budget"), [("sft", 10), ("dpo", 30)])
def test_pieces_leave_the_curve_of_one_process_as_it_is(step, budget, tmp_path):
    _, whole = process_worker.train(step, tmp_path / "whole")
    _, pieces = process_worker.train(step, tmp_path / "pieces", budget=budget)
    pd.testing.assert_frame_equal(pieces.drop(columns="seconds"), whole.drop(columns="seconds"), **CURVE)


@pytest.mark.parametrize("budget", [None, 11])
def test_gradients_are_complete_in_a_steps_last_piece_alone(budget, tmp_path, monkeypatch):
    """DeepSpeed steps in every backward pass that accelerate calls complete; also where a piece found no memory."""
    passes, pieces, backward, attempt = [], [], Accelerator.backward, StepTrainer._attempt

    def spied(accelerator, loss, **more):
        passes.append(accelerator.gradient_state.sync_gradients)
        backward(accelerator, loss, **more)

    def counted(trainer, model, rows):
        before = len(passes)
        loss = attempt(trainer, model, rows)
        assert trainer.accelerator.gradient_state.sync_gradients, "as it was, for the optimizer"
        pieces.append((passes[before:], loss))
        return loss

    monkeypatch.setattr(Accelerator, "backward", spied)
    monkeypatch.setattr(StepTrainer, "_attempt", counted)
    if budget is None:
        process_worker.train("sft", tmp_path, budget=16)
    else:
        with room_for(budget, "sft"):
            process_worker.train("sft", tmp_path, budget=2 * budget)
    whole = [said for said, loss in pieces if loss is not None]
    assert max(map(len, whole)) > 1
    assert all(said == [False] * (len(said) - 1) + [True] for said in whole)
    assert not any(said for failed, loss in pieces if loss is None for said in failed)


def test_pieces_hold_every_document_once_within_the_budget():
    lengths = np.random.default_rng(0).integers(3, 30, 40)
    rows = documents([[7] * n for n in lengths], [[8, 3]] * 40)
    task = Task("", rows, lambda part: right_padded(part, 0), None, weight=lambda row: 2)
    pieces = MicroBatcher(task, 64)(rows)
    assert all(piece.tokens == piece.batch["ids"].numel() for piece in pieces)
    assert all(piece.tokens <= 64 or piece.rows == 1 for piece in pieces)
    assert sorted(int(n) for piece in pieces for n in piece.batch["length"]) == sorted(lengths + 2)
    assert sum(piece.weight for piece in pieces) == pytest.approx(1)


@pytest.mark.filterwarnings("error::FutureWarning")
def test_gradient_checkpointing_leaves_the_curve_as_it_is(tmp_path, monkeypatch):
    _, whole = process_worker.train("sft", tmp_path / "whole")
    monkeypatch.setattr(process_worker, "Engine", lambda **own: Engine(gradient_checkpointing=True, **own))
    reasoner, again = process_worker.train("sft", tmp_path / "again")
    pd.testing.assert_frame_equal(again.drop(columns="seconds"), whole.drop(columns="seconds"), **CURVE)
    assert not getattr(reasoner.model, f"is_{CHECKPOINTING}")


def test_half_precision_learns_about_the_same_and_leaves_no_autocast(tmp_path, monkeypatch):
    _, whole = process_worker.train("sft", tmp_path / "whole")
    monkeypatch.setattr(process_worker, "Engine", lambda **own: Engine(precision="bf16", **own))
    reasoner, half = process_worker.train("sft", tmp_path / "half")
    assert "_original_forward" not in vars(reasoner.model)
    assert half["loss"].iloc[-1] == pytest.approx(whole["loss"].iloc[-1], rel=0.1)
    assert (half["loss"] != whole["loss"]).any()
    assert "forward" not in vars(reasoner.model)
    assert {value.dtype for value in reasoner.model.parameters()} == {torch.float32}
