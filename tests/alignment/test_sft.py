"""RG-SFT against TRL's SFTTrainer; the end token is learnt; killed it goes on to the same bytes; all faults at once."""

import datasets
import pytest
import small_pairs
import torch
from interrupted import Kill, Killed
from small_pairs import CHOSEN, LORA, PROMPTS, TOKENIZER, text
from small_trainings import sft
from trl import SFTConfig, SFTTrainer

from rgalign.reasoner.model import fingerprint
from rgalign.reasoner.trainer import CHECKPOINTING

SETTINGS = dict(seed=3, epochs=5, documents_per_batch=8, progress=False)
LOOP = dict(learning_rate=1e-2, warmup=0.2, weight_decay=0.05)


def test_its_losses_are_those_of_trl(tmp_path):
    steps = 10
    arguments = SFTConfig(
        output_dir=str(tmp_path / "trl"), max_steps=steps, per_device_train_batch_size=len(PROMPTS), logging_steps=1,
        learning_rate=1e-2, lr_scheduler_type="cosine", warmup_steps=2, weight_decay=0.05, completion_only_loss=True,
        bf16=False, use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True, dataset_num_proc=None, **{CHECKPOINTING: False},
    )  # fmt: skip
    table = {"prompt": text(PROMPTS), "completion": text(CHOSEN)}
    theirs = SFTTrainer(
        small_pairs.reasoner().model,
        arguments,
        train_dataset=datasets.Dataset.from_dict(table),
        processing_class=TOKENIZER,
    )
    theirs.train()
    how = {**SETTINGS, **LOOP, "epochs": steps, "documents_per_batch": len(PROMPTS), "neftune": 0}
    _, curve = sft(small_pairs.reasoner(), PROMPTS, CHOSEN, folder=tmp_path / "ours", **how)
    expected = [entry["loss"] for entry in theirs.state.log_history if "loss" in entry]
    assert len(expected) == steps
    assert expected[-1] < expected[0] - 1
    assert curve["loss"].tolist() == pytest.approx(expected, abs=1e-4)


def test_it_learns_to_write_and_to_end_though_the_end_token_pads(tmp_path):
    given = small_pairs.reasoner(pad_is_end=True)
    before = fingerprint(given)
    queries = [[prompt[0] + 9, 3] for prompt in PROMPTS]
    how = {**SETTINGS, "epochs": 30, "learning_rate": 1e-2, "neftune": 0}
    trained, curve = sft(given, PROMPTS, queries, folder=tmp_path, **how)
    assert fingerprint(given) == before
    assert not trained.model.training
    assert list(curve) == ["step", "loss", "seconds"]
    right = 0
    for prompt, query in zip(PROMPTS, queries, strict=True):
        with torch.no_grad():
            logits = trained.model(input_ids=torch.tensor([[*prompt, query[0]]])).logits[0]
        right += logits[-2:].argmax(-1).tolist() == query
    assert right >= 22


@pytest.mark.parametrize(("lora", "neftune"), [(None, 0), (LORA, 5.0)], ids=["all weights", "LoRA and NEFTune"])
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, lora, neftune):
    how = {**SETTINGS, **LOOP, "lora": lora, "neftune": neftune}
    whole, curve = sft(small_pairs.reasoner(), PROMPTS, CHOSEN, folder=tmp_path / "whole", **how)
    for step in (6, 12):
        with pytest.raises(Killed):
            sft(small_pairs.reasoner(), PROMPTS, CHOSEN, folder=tmp_path / "work", callbacks=[Kill(step)], **how)
    assert list((tmp_path / "work").glob("checkpoint-*"))
    resumed, again = sft(small_pairs.reasoner(), PROMPTS, CHOSEN, folder=tmp_path / "work", **how)
    assert fingerprint(resumed) == fingerprint(whole) != fingerprint(small_pairs.reasoner())
    assert again.drop(columns="seconds").equals(curve.drop(columns="seconds"))


def test_noise_changes_training_and_the_seed_alone_decides_it(tmp_path):
    def made(**how) -> str:
        return fingerprint(sft(small_pairs.reasoner(), PROMPTS, CHOSEN, folder=tmp_path, **{**SETTINGS, **how})[0])

    torch.manual_seed(1)
    one = made()
    torch.manual_seed(2)
    assert made() == one
    assert len({one, made(neftune=0), made(seed=4)}) == 3


def test_without_a_document_it_is_refused(tmp_path):
    with pytest.raises(ValueError, match="RG-SFT cannot begin: there is nothing to learn from"):
        sft(small_pairs.reasoner(), [], [], folder=tmp_path, seed=0)
