"""Pre-training: documents do not see their neighbours, a killed run goes on to the same bytes, nothing is left over."""

import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from accelerate.state import PartialState
from torch.nn import functional
from transformers import TrainerCallback

from rgalign.reasoner.model import fingerprint, tiny
from rgalign.reasoner.pretrain import _collate, _Rows, pretrain, weighted_loss
from rgalign.reasoner.tokenizer import build

TOKENIZER = build({f"w{number}": 2 for number in range(20)})
PROMPTS = [[4 + (7 * n + i) % 9 for i in range(2 + n % 4)] + [2] for n in range(60)]
QUERIES = [[prompt[0] + 9, prompt[1] + 9, 3] for prompt in PROMPTS]  # a query follows from its prompt
SETTINGS = dict(seed=3, epochs=4, row_tokens=32, tokens_per_batch=96, progress=False)


def reasoner(seed=0):
    return tiny(TOKENIZER, hidden=16, layers=2, heads=2, seed=seed)


def rows(prompt_weight=0.25, prompts=PROMPTS, queries=QUERIES, size=32) -> _Rows:
    return _Rows(prompts, queries, size, prompt_weight, TOKENIZER.pad_token_id, 0)


def test_a_documents_states_do_not_depend_on_its_neighbours_in_the_row():
    model = reasoner().model
    packed = rows()
    batch = _collate([packed[0]])
    with torch.no_grad():
        together = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
    starts = [*torch.where(batch["position_ids"][0] == 0)[0].tolist(), batch["input_ids"].shape[1]]
    assert len(starts) > 3
    for begin, end in pairwise(starts):
        with torch.no_grad():
            alone = model(input_ids=batch["input_ids"][:, begin:end]).logits[0]
        torch.testing.assert_close(together[begin:end], alone, atol=1e-5, rtol=0)


def test_every_document_is_in_a_row_once():
    packed = rows()
    documents = []
    for ids, positions in zip(packed.ids.tolist(), packed.positions.tolist(), strict=True):
        starts = [i for i, position in enumerate(positions) if position == 0] + [len(ids)]
        documents += [tuple(ids[a:b]) for a, b in pairwise(starts)]
    found = sorted(document for document in documents if set(document) != {TOKENIZER.pad_token_id})
    assert found == sorted((*prompt, *query) for prompt, query in zip(PROMPTS, QUERIES, strict=True))


def test_a_document_longer_than_a_row_makes_rows_longer():
    assert rows(prompts=[[4] * 40], queries=[[3]]).ids.shape == (1, 41)


@pytest.mark.parametrize("prompt_weight", [0.0, 0.25, 1.0])
def test_loss_is_the_weighted_mean_over_documents_taken_alone(prompt_weight):
    model = reasoner().model
    batch = _collate(list(rows(prompt_weight)))
    with torch.no_grad():
        found = weighted_loss(model, batch["input_ids"], batch["position_ids"], batch["weights"])
        total = weight = 0.0
        for prompt, query in zip(PROMPTS, QUERIES, strict=True):
            ids = torch.tensor([[*prompt, *query]])
            losses = functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
            counts = torch.tensor([prompt_weight] * (len(prompt) - 1) + [1.0] * len(query))
            total, weight = total + (losses * counts).sum(), weight + counts.sum()
    torch.testing.assert_close(found, total / weight)


class _Killed(Exception):
    pass


class _Kill(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise _Killed


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path):
    whole, curve = pretrain(reasoner(), PROMPTS, QUERIES, folder=tmp_path / "whole", **SETTINGS)
    for step in (5, 11):
        with pytest.raises(_Killed):
            pretrain(reasoner(), PROMPTS, QUERIES, folder=tmp_path / "work", callbacks=[_Kill(step)], **SETTINGS)
    left = sorted((tmp_path / "work").glob("checkpoint-*"))
    assert left
    (tmp_path / "work" / "checkpoint-999").mkdir()  # a writer killed in the middle leaves no mark

    steps = []

    class Steps(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            steps.append(state.global_step)

    resumed, again = pretrain(reasoner(), PROMPTS, QUERIES, folder=tmp_path / "work", callbacks=[Steps()], **SETTINGS)
    assert fingerprint(resumed) == fingerprint(whole)
    assert steps[0] == int(left[-1].name.rpartition("-")[2]) + 1
    assert again["loss"].tolist() == curve["loss"].tolist()
    assert again["seconds"].is_monotonic_increasing
    assert not (tmp_path / "work").exists()


def test_checkpoints_of_other_settings_are_not_used(tmp_path):
    with pytest.raises(_Killed):
        pretrain(reasoner(1), PROMPTS, QUERIES, folder=tmp_path / "work", callbacks=[_Kill(9)], **SETTINGS)
    found, _ = pretrain(reasoner(), PROMPTS, QUERIES, folder=tmp_path / "work", **SETTINGS)
    fresh, _ = pretrain(reasoner(), PROMPTS, QUERIES, folder=tmp_path / "fresh", **SETTINGS)
    assert fingerprint(found) == fingerprint(fresh)


def test_it_learns_and_leaves_the_given_reasoner_and_all_global_state_alone(tmp_path):
    given = reasoner()
    before = fingerprint(given)
    torch.manual_seed(11)
    PartialState()  # what a caller's accelerator has set up
    random_before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    accelerate_before = dict(PartialState._shared_state)
    trained, curve = pretrain(
        given, PROMPTS, QUERIES, folder=tmp_path, **{**SETTINGS, "epochs": 30, "learning_rate": 1e-2}
    )
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == random_before
    assert PartialState._shared_state == accelerate_before
    assert fingerprint(given) == before
    assert not trained.model.training
    assert list(curve) == ["step", "loss", "seconds"]
    assert curve["loss"].iloc[-1] < curve["loss"].iloc[0] / 2
    right = 0
    for prompt, query in zip(PROMPTS, QUERIES, strict=True):
        logits = trained.model(input_ids=torch.tensor([prompt])).logits[0, -1]
        right += int(logits.argmax()) == query[0]
    assert right > 55


def test_all_faults_at_once(tmp_path):
    with pytest.raises(ValueError, match="cannot begin") as error:
        pretrain(reasoner(), PROMPTS, [[]], folder=tmp_path, seed=0, prompt_weight=2.0, epochs=0)
    for part in ["60 prompts and 1 queries", "have no token", "prompt_weight is 2.0", "epochs 0"]:
        assert part in str(error.value)
