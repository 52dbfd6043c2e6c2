"""What every tower keeps to: sessions are scored alone, padding and positions move no score, seeds decide the start."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_lists import make_intents, make_lists, make_query_intents, make_query_lists

from rgalign.ranker import towers
from rgalign.ranker.fit import score, score_kb
from rgalign.ranker.store import load, save
from rgalign.ranker.towers import INTERACTIONS, ThreeTower, TwoTower

NO_DROPOUT = {"dropout": 0.0, "id_dropout": 0.0, "query_dropout": 0.0}


@pytest.fixture(params=["ids", "text", *INTERACTIONS])
def case(request, config, three_config, position_biased):
    """(ranker with a position bias, how its lists are made, its intents)"""
    if request.param in INTERACTIONS:
        ranker = ThreeTower(three_config(interaction=request.param), seed=3)
        return position_biased(ranker), make_query_lists, make_query_intents()
    return position_biased(TwoTower(config(text=request.param == "text"), seed=3)), make_lists, make_intents()


def test_a_session_is_scored_the_same_whatever_else_is_in_the_batch(case, monkeypatch):
    model, lists, intents = case
    batch = lists("valid", 40, seed=0)
    together = score(model, batch, intents)
    alone = np.concatenate([score(model, batch.take([row]), intents) for row in range(len(batch))])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(together, score(model, batch, intents, lists_per_batch=7), atol=1e-5)
    monkeypatch.setattr(towers, "PAIRS_AT_ONCE", 20)  # three lists of six candidates at a time
    np.testing.assert_allclose(together, score(model, batch, intents), atol=1e-5)


def test_padding_gets_minus_infinity_and_moves_no_other_score(case):
    model, lists, intents = case
    scores = score(model, lists("valid", 40, seed=0, padded=3), intents)
    np.testing.assert_allclose(scores[:, :6], score(model, lists("valid", 40, seed=0), intents), atol=1e-5)
    assert np.isneginf(scores[:, 6:]).all()


def test_scores_of_the_whole_kb_are_those_of_the_candidates(case):
    model, lists, intents = case
    batch = lists("valid", 40, seed=0, padded=1)
    everything, shown = score_kb(model, batch, intents), batch.shown.numpy()
    assert everything.shape == (40, len(intents))
    row, column = np.nonzero(shown)
    expected = score(model, batch, intents)[shown]
    np.testing.assert_allclose(everything[row, batch.candidates.numpy()[row, column]], expected, atol=1e-5)


def test_position_bias_is_learnt_in_training_and_gone_when_scoring(case):
    model, lists, intents = case
    batch = lists("valid", 40, seed=0)
    turned = replace(batch, candidates=batch.candidates.flip(1), clicked=batch.clicked.flip(1))
    np.testing.assert_allclose(score(model, turned, intents)[:, ::-1], score(model, batch, intents), atol=1e-5)
    own = {name: value for name, value in NO_DROPOUT.items() if hasattr(model.config, name)}
    still = type(model)(replace(model.config, **own), seed=3)
    still.load_state_dict(model.state_dict())
    in_training = still.train()(batch, intents).detach().numpy()
    bias = np.linspace(3, -3, 6)
    np.testing.assert_allclose(in_training - score(still, batch, intents), np.tile(bias, (40, 1)), atol=1e-5)
    assert still.training, "scoring gives the ranker back in the mode it came in"


def test_a_ranker_read_back_scores_the_same(case, tmp_path):
    model, lists, intents = case
    batch = lists("valid", 30, seed=0)
    save(tmp_path / "ranker", model)
    again = load(tmp_path / "ranker")
    assert (type(again), again.config) == (type(model), model.config)
    assert np.array_equal(score(again, batch, intents), score(model, batch, intents))


def test_initialisation_follows_the_seed_and_leaves_torchs_random_state(case):
    kind, config = type(case[0]), case[0].config
    before = torch.random.get_rng_state()
    first, again, other = (kind(config, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["intent.id.weight"], other["intent.id.weight"])
