"""Pre-training: both losses, what looking ahead is for, a killed run goes on to the same bytes, all faults at once."""

import random

import numpy as np
import pytest
import torch
from accelerate.state import PartialState
from interrupted import Kill, Killed, Steps
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from torch.nn import functional

from rgalign.errors import TrainingError
from rgalign.params_schema import Pretraining
from rgalign.reasoner import tiny as pretraining
from rgalign.reasoner.batches import documents, right_padded
from rgalign.reasoner.model import fingerprint, tiny
from rgalign.reasoner.tiny import ahead_loss, build_tokenizer, next_token_loss
from rgalign.reasoner.trainer import Setup

TOKENIZER = build_tokenizer({f"w{number}": 2 for number in range(20)})
PROMPTS = [[4 + (7 * n + i) % 9 for i in range(2 + n % 4)] + [2] for n in range(60)]
QUERIES = [[prompt[0] + 9, prompt[1] + 9, 3] for prompt in PROMPTS]  # a query follows from its prompt
SETTINGS = dict(seed=3, epochs=4, documents_per_batch=8, progress=False)


def reasoner(seed=0):
    return tiny(TOKENIZER, hidden=16, layers=2, heads=2, seed=seed)


def pretrain(given, prompts, queries, *, folder, seed, progress=False, callbacks=(), **section):
    setup = Setup(folder=folder, seed=seed, progress=progress, callbacks=callbacks)
    return pretraining.pretrain(given, prompts, queries, Pretraining(**section), setup)


def batch(prompts=PROMPTS, queries=QUERIES) -> dict[str, torch.Tensor]:
    return right_padded(documents(prompts, queries), TOKENIZER.pad_token_id)


def states(model, ids):
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


@pytest.mark.parametrize("prompt_weight", [0.0, 0.25, 1.0])
def test_next_token_loss_is_the_weighted_mean_over_documents_taken_alone(prompt_weight):
    model, given = reasoner().model, batch()
    with torch.no_grad():
        found = next_token_loss(states(model, given["ids"]), model.lm_head, **given, prompt_weight=prompt_weight)
        total = weight = 0.0
        for prompt, query in zip(PROMPTS, QUERIES, strict=True):
            ids = torch.tensor([[*prompt, *query]])
            losses = functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
            counts = torch.tensor([prompt_weight] * (len(prompt) - 1) + [1.0] * len(query))
            total, weight = total + (losses * counts).sum(), weight + counts.sum()
    torch.testing.assert_close(found, total / weight)


def test_ahead_loss_is_the_mean_over_a_querys_words_from_the_prompts_last_state_alone():
    model, ahead = reasoner().model, torch.nn.Linear(16, 16)
    prompts, queries = [*PROMPTS[:5], [4, 2]], [*QUERIES[:4], [7, 8, 8, 9, 3], [3]]  # the last one says nothing
    given = batch(prompts, queries)
    expected = []
    with torch.no_grad():
        found = ahead_loss(states(model, given["ids"]), model.lm_head, ahead, **given)
        for prompt, query in zip(prompts[:-1], queries[:-1], strict=True):
            last = states(model, torch.tensor([prompt]))[0, -1]
            log_p = model.lm_head(ahead(last)).log_softmax(0)
            expected.append(-np.mean([float(log_p[word]) for word in query[:-1]]))
    assert float(found) == pytest.approx(np.mean(expected), abs=1e-5)


def test_without_a_single_word_nothing_is_looked_ahead_at():
    model = reasoner().model
    given = batch([[4, 2]], [[3]])
    with torch.no_grad():
        assert ahead_loss(states(model, given["ids"]), model.lm_head, torch.nn.Identity(), **given) == 0


def test_looking_ahead_puts_the_whole_query_into_the_prompts_last_state(tmp_path):
    """Queries begin alike, so the next token asks nothing of that state; their second word is the prompt's first."""
    rng = np.random.default_rng(0)
    prompts = [[*rng.integers(4, 13, rng.integers(3, 7)).tolist(), 2] for _ in range(120)]
    queries = [[15, prompt[0] + 9, 3] for prompt in prompts]

    def read_off(ahead_weight: float) -> float:
        """Share of second words that a linear model tells from the state, cross-validated."""
        how = {**SETTINGS, "epochs": 15, "learning_rate": 1e-2, "ahead_weight": ahead_weight}
        trained, _ = pretrain(reasoner(), prompts, queries, folder=tmp_path, **how)
        with torch.no_grad():
            vectors = torch.stack([states(trained.model, torch.tensor([prompt]))[0, -1] for prompt in prompts])
        second = np.array([query[1] for query in queries])
        return cross_val_score(LogisticRegression(max_iter=500), vectors.numpy(), second, cv=5).mean()

    with_it = read_off(1.0)
    assert with_it > 0.95
    assert with_it > read_off(0.0) + 0.1


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path):
    whole, curve = pretrain(reasoner(), PROMPTS, QUERIES, folder=tmp_path / "whole", **SETTINGS)
    for step in (5, 11):
        with pytest.raises(Killed):
            pretrain(reasoner(), PROMPTS, QUERIES, folder=tmp_path / "work", callbacks=[Kill(step)], **SETTINGS)
    left = sorted((tmp_path / "work").glob("checkpoint-*"))
    assert left
    (tmp_path / "work" / "checkpoint-999").mkdir()  # a writer killed in the middle leaves no mark

    steps = Steps()
    resumed, again = pretrain(reasoner(), PROMPTS, QUERIES, folder=tmp_path / "work", callbacks=[steps], **SETTINGS)
    assert fingerprint(resumed) == fingerprint(whole)
    assert steps.made[0] == int(left[-1].name.rpartition("-")[2]) + 1
    assert again["loss"].tolist() == curve["loss"].tolist()
    assert again["seconds"].is_monotonic_increasing
    assert not (tmp_path / "work").exists()


def test_checkpoints_of_other_settings_are_not_used(tmp_path):
    with pytest.raises(Killed):
        pretrain(reasoner(1), PROMPTS, QUERIES, folder=tmp_path / "work", callbacks=[Kill(9)], **SETTINGS)
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


def test_a_loss_that_is_not_finite_ends_training_with_what_to_change(tmp_path):
    given = reasoner()
    with torch.no_grad():
        given.model.get_input_embeddings().weight[4:13] = torch.nan
    with pytest.raises(
        TrainingError, match=r"loss is nan at step \d+: lower this stage's learning_rate \(it is 0\.01\)"
    ):
        pretrain(given, PROMPTS, QUERIES, folder=tmp_path, learning_rate=0.01, **SETTINGS)
