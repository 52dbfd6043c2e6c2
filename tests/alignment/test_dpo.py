"""RG-DPO against TRL's DPOTrainer; it begins at ln 2; references are told apart; watched or killed, the same bytes."""

import copy
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import small_pairs
import torch
from interrupted import Kill, Killed
from small_pairs import CHOSEN, LORA, PROMPTS, REJECTED, TOKENIZER, Onlooker, align, text
from trl import DPOConfig, DPOTrainer

from rgalign.alignment.dpo import _accuracy, reference_log_probabilities
from rgalign.alignment.objectives import PairLogProbabilities
from rgalign.params import ROOT, ParamsError, check
from rgalign.reasoner.model import fingerprint
from rgalign.reasoner.trainer import CHECKPOINTING
from rgalign.run.artifacts import write_table


def refusal(folder: Path, **how) -> str:
    with pytest.raises(ValueError, match="RG-DPO cannot begin") as error:
        align(folder, **how)
    return str(error.value)


LOSSES = {
    "sigmoid": (dict(sft_weight=0), dict(loss_type=["sigmoid"])),
    "sigmoid and sft": (dict(sft_weight=0.7), dict(loss_type=["sigmoid", "sft"], loss_weights=[1, 0.7])),
    "per token": (dict(sft_weight=0, length_normalised=True), dict(loss_type=["sigmoid_norm"])),
    "ipo": (dict(sft_weight=0, objective="ipo", length_normalised=True), dict(loss_type=["ipo"])),
}


@pytest.mark.parametrize("name", LOSSES)
def test_its_losses_are_those_of_trl(tmp_path, name):
    ours, theirs = LOSSES[name]
    steps, model = 8, small_pairs.reasoner().model
    arguments = DPOConfig(
        output_dir=str(tmp_path / "trl"), max_steps=steps, per_device_train_batch_size=len(PROMPTS), logging_steps=1,
        learning_rate=1e-2, lr_scheduler_type="cosine", warmup_steps=2, weight_decay=0.05, beta=0.3, bf16=False,
        use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, **{CHECKPOINTING: False}, **theirs,
    )  # fmt: skip
    table = {"prompt": text(PROMPTS), "chosen": text(CHOSEN), "rejected": text(REJECTED)}
    trainer = DPOTrainer(
        copy.deepcopy(model), model, arguments, train_dataset=datasets.Dataset.from_dict(table),
        processing_class=TOKENIZER,
    )  # fmt: skip
    trainer.train()
    expected = pd.DataFrame([entry for entry in trainer.state.log_history if "loss" in entry])
    how = dict(epochs=steps, pairs_per_batch=len(PROMPTS), warmup=0.25, weight_decay=0.05, beta=0.3)
    _, curve = align(tmp_path / "ours", **how, **ours)
    assert len(expected) == steps
    assert expected["loss"].iloc[-1] < 0.95 * expected["loss"].iloc[0]
    assert curve["loss"].tolist() == pytest.approx(expected["loss"].tolist(), abs=1e-4)
    ratios = expected[["rewards/chosen", "rewards/rejected"]] / 0.3
    assert curve[["chosen_ratio", "rejected_ratio"]].to_numpy() == pytest.approx(ratios.to_numpy(), abs=2e-3)
    if name == "sigmoid":
        assert curve["margin"].tolist() == pytest.approx(expected["rewards/margins"].tolist(), abs=2e-3)
        assert curve["accuracy"].tolist()[2:] == expected["rewards/accuracies"].tolist()[2:]  # ties before


@pytest.mark.parametrize("length_normalised", [False, True])
def test_a_margin_within_rounding_counts_half(length_normalised):
    """Four queries of ten tokens, said to differ from the reference by no more than float32 rounds off, and by more."""
    nats = torch.tensor([0.0, 3e-6, -3e-6, 0.5, -0.5])
    zero, tokens = torch.zeros(5), torch.full((5,), 10.0)
    pairs = PairLogProbabilities(nats - 20, zero - 20, zero - 20, zero - 20, tokens, tokens, zero, zero)
    assert _accuracy(pairs.per_token() if length_normalised else pairs).tolist() == [0.5, 0.5, 0.5, 1, 0]


@pytest.mark.parametrize("lora", [None, {**LORA, "dropout": 0.0}], ids=["all weights", "LoRA"])
def test_the_first_loss_is_ln_2(tmp_path, lora):
    aligned, curve = align(tmp_path, sft_weight=0, pairs_per_batch=24, lora=lora)
    assert curve["loss"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert curve["chosen_ratio"][0] == pytest.approx(0, abs=1e-5)
    assert curve["accuracy"][0] == 0.5  # whatever the processor's rounding is
    assert list(curve) == [
        "step",
        "loss",
        "accuracy",
        "chosen_ratio",
        "margin",
        "preference",
        "rejected_ratio",
        "seconds",
    ]
    assert curve["loss"].iloc[-1] < 0.6
    assert curve["accuracy"].iloc[-1] > 0.8
    assert not aligned.model.training


def test_dropout_is_no_reason_to_refuse_a_reference(tmp_path):
    _, curve = align(tmp_path, lora={**LORA, "dropout": 0.5}, epochs=1)
    assert len(curve) == 3


def test_a_stored_reference_is_as_good(tmp_path):
    reasoner, pairs = small_pairs.reasoner(), small_pairs.pairs()
    reference = reference_log_probabilities(reasoner, pairs, progress=False)
    write_table(tmp_path / "reference.parquet", reference)
    stored, _ = align(tmp_path / "work", reference=pd.read_parquet(tmp_path / "reference.parquet"))
    assert fingerprint(stored) == fingerprint(align(tmp_path / "work", reference=reference)[0])


def test_a_reference_of_another_checkpoint_or_of_other_pairs_is_refused_by_name(tmp_path):
    other = small_pairs.reasoner(1)
    reference = reference_log_probabilities(other, small_pairs.pairs(), progress=False)
    text = refusal(tmp_path, reference=reference)
    assert f"of checkpoint {fingerprint(other)[:12]}" in text
    assert f"given is checkpoint {fingerprint(small_pairs.reasoner())[:12]}" in text
    pairs = small_pairs.pairs(reward_chosen=np.linspace(0.2, 2, 24))
    reference = reference_log_probabilities(small_pairs.reasoner(), pairs, progress=False)
    assert f"of pairs {pairs.digest()[:12]}" in refusal(tmp_path, reference=reference)
    assert "24 rows for 9 pairs" in refusal(tmp_path, of=small_pairs.pairs(9), reference=reference)


def test_a_reference_that_only_claims_to_be_this_model_is_found_out(tmp_path):
    reference = reference_log_probabilities(small_pairs.reasoner(1), small_pairs.pairs(), progress=False)
    reference["checkpoint"] = fingerprint(small_pairs.reasoner())
    assert "nats a token apart" in refusal(tmp_path, reference=reference)


def test_watched_it_does_the_same(tmp_path):
    look = Onlooker()
    unwatched, curve = align(tmp_path, lora=LORA)
    watched, again = align(tmp_path, lora=LORA, watch=look, watch_steps=5)
    assert look.steps == [5, 10, 15, 20]
    assert fingerprint(watched) == fingerprint(unwatched)
    assert again.drop(columns="seconds").equals(curve.drop(columns="seconds"))


def test_an_onlooker_stops_it_and_it_stays_stopped_after_a_kill(tmp_path):
    """24 steps, a checkpoint every 5: one would fall on the step that is the last."""
    stopped, curve = align(tmp_path / "whole", watch=Onlooker(10), watch_steps=5)
    assert curve["step"].iloc[-1] == 10
    with pytest.raises(Killed):
        align(tmp_path / "work", watch=Onlooker(10), watch_steps=5, callbacks=[_KillAtEnd()])
    look = Onlooker(10)
    resumed, again = align(tmp_path / "work", watch=look, watch_steps=5)
    assert look.steps == [10]
    assert fingerprint(resumed) == fingerprint(stopped)
    assert again.drop(columns="seconds").equals(curve.drop(columns="seconds"))


class _KillAtEnd(Kill):
    def __init__(self):
        super().__init__(0)

    def on_train_end(self, *_, **__):
        raise Killed


KILLED = """
import os, signal, sys
from pathlib import Path
from interrupted import Kill
from small_pairs import LORA, Onlooker, align

class Kill9(Kill):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)

align(Path(sys.argv[1]), lora=LORA, watch=Onlooker(), watch_steps=4, callbacks=[Kill9(13)])
"""


@pytest.mark.slow
def test_killed_by_the_system_while_watched_it_goes_on_to_the_same_bytes(tmp_path):
    unbroken = Onlooker()
    whole, curve = align(tmp_path / "whole", lora=LORA, watch=unbroken, watch_steps=4)
    code = [sys.executable, "-c", KILLED, str(tmp_path / "work")]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)])
    threads = str(torch.get_num_threads())  # whoever ran before may have pinned them, and they change the last bits
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": threads}
    assert subprocess.run(code, env=env).returncode == -signal.SIGKILL
    (checkpoint,) = (tmp_path / "work").glob("checkpoint-*")
    look = Onlooker()
    resumed, again = align(tmp_path / "work", lora=LORA, watch=look, watch_steps=4)
    done = int(checkpoint.name.rpartition("-")[2])
    assert look.steps == [step for step in (4, 8, 12, 16, 20, 24) if step > done]
    assert look.rows == unbroken.rows, "what was seen before the kill is not lost"
    assert fingerprint(resumed) == fingerprint(whole)
    assert again.drop(columns="seconds").equals(curve.drop(columns="seconds"))


def test_all_errors_of_settings_at_once():
    with pytest.raises(ParamsError) as error:
        check({"alignment": {"dpo": {"beta": 0, "sft_weight": -1, "pairs_per_batch": 0, "epochs": 0}}})
    for name, bound in {"beta": "than 0", "sft_weight": "to 0", "pairs_per_batch": "to 1", "epochs": "than 0"}.items():
        assert re.search(rf"alignment\.dpo\.{name} .*{bound}", str(error.value))
