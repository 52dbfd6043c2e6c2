"""A device too small for a training step: the step in smaller pieces is the same step, and the log says so."""

import logging
import re
from contextlib import contextmanager

import pandas as pd
import process_worker
import pytest
import small_pairs
import torch
from small_pairs import CHOSEN, LORA, PROMPTS, align
from small_trainings import sft

from rgalign.alignment import contrastive as rg_cl
from rgalign.alignment import dpo as rg_dpo
from rgalign.alignment import logprobs
from rgalign.alignment.logprobs import log_probabilities
from rgalign.errors import TrainingError
from rgalign.reasoner import query_loss as learning
from rgalign.reasoner.model import fingerprint
from rgalign.reasoner.trainer import Engine
from rgalign.run import distributed

CURVE = dict(rtol=1e-4, atol=1e-5)  # sums in another order, as in test_tuning_processes
NO_ROOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
STEPS = {"sft": (learning, "query_loss"), "dpo": (rg_dpo, "dpo_loss"), "cl": (rg_cl, "rg_cl_loss")}


class Backwards(torch.autograd.Function):
    """Nothing forwards; backwards, where most of a step's memory is asked for, there is none."""

    @staticmethod
    def forward(_, loss):
        return loss.clone()

    @staticmethod
    def backward(*_):
        raise NO_ROOM


@contextmanager
def room_for(most: int, step: str, *, backwards: bool = False):
    """A device with memory for so many tokens at once in training; yields the tokens of each piece that was tried."""
    module, name = STEPS[step]
    whole, tried = getattr(module, name), []

    def objective(model, batch, **how):
        tried.append(batch["ids"].numel())
        if tried[-1] > most and not backwards:
            raise NO_ROOM
        loss, values = whole(model, batch, **how)
        return (Backwards.apply(loss) if tried[-1] > most else loss), values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, objective)
        yield tried


def same_but_for_rounding(curve: pd.DataFrame, expected: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(curve.drop(columns="seconds"), expected.drop(columns="seconds"), **CURVE)


@pytest.mark.parametrize(("step", "most", "backwards"), [("sft", 30, False), ("sft", 11, True), ("dpo", 60, True)])
def test_training_goes_on_in_smaller_pieces_to_the_same_losses_and_weights(step, most, backwards, tmp_path, caplog):
    whole, expected = process_worker.train(step, tmp_path / "whole")
    with room_for(most, step, backwards=backwards) as tried, caplog.at_level(logging.WARNING):
        halved, curve = process_worker.train(step, tmp_path / "halved")
    same_but_for_rounding(curve, expected)
    for ours, theirs in zip(halved.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    said = [tuple(map(int, re.findall(r"\d+", record.message))) for record in caplog.records]
    assert len(said) == sum(tokens > most for tokens in tried), "once a halving"
    assert all(half == tokens // 2 for _, tokens, half in said)
    size = said[-1][2]
    assert all(tokens <= size for tokens in tried[tried.index(said[-1][1]) + 1 :]), "later steps begin with it"
    assert f"RG-{step.upper()}: out of memory with" in caplog.text


@pytest.mark.parametrize("step", ["sft", "dpo"])
def test_what_is_drawn_is_what_so_small_pieces_draw(step, tmp_path):
    """Dropout and NEFTune's noise: the bytes of a run that was told the size, out of memory in its first step."""
    rows = {"documents_per_batch": 8} if step == "sft" else {"pairs_per_batch": 8}
    how = dict(seed=3, epochs=1, lora={**LORA, "dropout": 0.3}, progress=False, **rows)

    def trained(folder: str, **engine):
        own = how | {"folder": tmp_path / folder, "engine": Engine(**engine)}
        if step == "dpo":
            return fingerprint(align(**own)[0])
        return fingerprint(sft(small_pairs.reasoner(), PROMPTS, CHOSEN, neftune=5.0, **own)[0])

    whole = trained("whole")
    with room_for(40, step) as tried:
        halved = trained("halved")
    first = next(place for place, tokens in enumerate(tried) if tokens <= 40)
    assert all(tokens > 40 for tokens in tried[:first])
    assert all(tokens <= 40 for tokens in tried[first:]), "it found its size in the first step"
    assert halved == trained("told", tokens_per_batch=tried[first - 1] // 2) != whole


def test_a_document_that_does_not_fit_alone_is_what_the_device_said(tmp_path):
    with room_for(3, "sft"), pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 2\.00 GiB"):
        process_worker.train("sft", tmp_path)


def test_rows_that_need_each_other_are_not_parted_and_the_parameter_is_named(tmp_path):
    with room_for(10, "cl"), pytest.raises(TrainingError, match="lower its documents_per_batch") as error:
        process_worker.train("cl", tmp_path)
    assert "contrastive: CUDA out of memory" in str(error.value)
    assert "Its 8 documents are run at once" in str(error.value)


def test_one_of_several_processes_does_not_halve_alone(tmp_path, monkeypatch):
    """The others are in the middle of the step. Told by one process that takes itself for one of several."""

    def alone(model, batch):
        monkeypatch.setattr(distributed, "several", lambda: True)
        raise NO_ROOM

    monkeypatch.setattr(learning, "query_loss", alone)
    with pytest.raises(TrainingError, match=r"Lower alignment\.engine\.tokens_per_batch"):
        process_worker.train("sft", tmp_path)


def test_another_error_is_no_want_of_memory(tmp_path, monkeypatch):
    def broken(model, batch):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(learning, "query_loss", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        process_worker.train("sft", tmp_path)


def test_reading_halves_too(tmp_path, monkeypatch, caplog):
    """The reference's log-probabilities, and RG-DPO's look at them before it begins."""
    given = small_pairs.reasoner()
    expected = log_probabilities(given, PROMPTS, CHOSEN, progress=False)
    first, unbroken = (
        log_probabilities(given, PROMPTS[:1], CHOSEN[:1], progress=False),
        logprobs.token_log_probabilities,
    )

    def small(model, ids, asked, **more):
        if len(ids) > 3 and not torch.is_grad_enabled():
            raise NO_ROOM
        return unbroken(model, ids, asked, **more)

    for module in (learning, logprobs):  # of documents, and of pairs that share a prompt
        monkeypatch.setattr(module, "token_log_probabilities", small)
    with caplog.at_level(logging.WARNING):
        found = log_probabilities(given, PROMPTS, CHOSEN, progress=False)
        align(tmp_path, epochs=1)
    assert found == pytest.approx(expected, abs=1e-5)
    assert found[0] == pytest.approx(first[0], abs=1e-5)
    assert "log-probabilities: out of memory with 24 rows at once; going on with 12" in caplog.text
    assert "RG-DPO: out of memory with 8 rows at once; going on with 4" in caplog.text
