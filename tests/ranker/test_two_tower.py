from dataclasses import replace

import numpy as np
import pytest
import torch

from rgalign.data.features import UNKNOWN
from rgalign.data.lists import with_texts
from rgalign.ranker.fit import score, score_kb
from rgalign.ranker.layers import Whitening
from rgalign.ranker.towers import ThreeTower, TwoTower, set_whitening
from rgalign.seeding import seeded

KB, UNSEEN = 12, 11  # of conftest.py: intents, and the last one, which no list shows


@pytest.fixture(params=[False, True], ids=["ids", "text"])
def model(request, config, position_biased):
    ranker = TwoTower(config(text=request.param), seed=3)
    return position_biased(ranker)


def test_a_session_is_scored_the_same_whatever_else_is_in_the_batch(model, lists, intents):
    batch = lists("valid", 40, seed=0)
    together = score(model, batch, intents)
    alone = np.concatenate([score(model, batch.take([row]), intents) for row in range(len(batch))])
    in_sevens = score(model, batch, intents, lists_per_batch=7)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(together, in_sevens, atol=1e-5)


def test_padding_gets_minus_infinity_and_moves_no_other_score(model, lists, intents):
    plain, padded = lists("valid", 40, seed=0), lists("valid", 40, seed=0, padded=3)
    scores = score(model, padded, intents)
    np.testing.assert_allclose(scores[:, :6], score(model, plain, intents), atol=1e-6)
    assert np.isneginf(scores[:, 6:]).all()


def test_position_bias_is_learnt_in_training_and_gone_when_scoring(model, lists, intents):
    batch = lists("valid", 40, seed=0)
    turned = replace(batch, candidates=batch.candidates.flip(1), clicked=batch.clicked.flip(1))
    np.testing.assert_allclose(score(model, turned, intents)[:, ::-1], score(model, batch, intents), atol=1e-6)
    still = TwoTower(replace(model.config, dropout=0.0, id_dropout=0.0), seed=3)
    still.load_state_dict(model.state_dict())
    in_training = still.train()(batch, intents).detach().numpy()
    bias = np.linspace(3, -3, 6)
    np.testing.assert_allclose(in_training - score(still, batch, intents), np.tile(bias, (40, 1)), atol=1e-5)
    assert still.training, "scoring gives the ranker back in the mode it came in"


def test_without_real_positions_there_is_no_position_bias(config):
    assert TwoTower(config(positions=0)).position is None


def test_scores_of_the_whole_kb_are_those_of_the_candidates(model, lists, intents):
    batch = lists("valid", 40, seed=0, padded=1)
    everything, shown = score_kb(model, batch, intents), batch.shown.numpy()
    assert everything.shape == (40, len(intents))
    row, column = np.nonzero(shown)
    expected = score(model, batch, intents)[shown]
    np.testing.assert_allclose(everything[row, batch.candidates.numpy()[row, column]], expected, atol=1e-6)


def test_only_the_text_ranker_reads_words(config, lists, intents):
    batch = lists("valid", 40, seed=0)
    shuffled = replace(batch, words=batch.words.take(torch.arange(40).roll(1)))
    changed = {
        text: not np.array_equal(score(ranker, batch, intents), score(ranker, shuffled, intents))
        for text in (False, True)
        for ranker in [TwoTower(config(text=text))]
    }
    assert changed == {False: False, True: True}


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_unknown_rows_of_id_and_category_learn_by_dropout_each_by_itself(config, lists, intents, share):
    """No intent here is of an unknown category: without dropout that row would stay as it was drawn."""
    seen = replace(intents, id=intents.id.clamp(min=2))
    ranker, batch = TwoTower(config(id_dropout=share), seed=3).train(), lists("train", 40, seed=0)
    with seeded(0):
        vectors = torch.stack([ranker.intent(seen)[0] for _ in range(400)])
        ranker(batch, seen).square().sum().backward()
    for table in (ranker.intent.id, ranker.intent.category):
        assert bool(table.weight.grad[UNKNOWN].any()) == bool(share)
    ids, categories = ranker.intent.id.weight, ranker.intent.category.weight
    own, kind = int(seen.id[5]), int(seen.category[5])
    drawn = [
        (vectors[:, 5] - ids[one] - categories[other]).abs().amax(1) < 1e-6
        for one, other in ((own, kind), (UNKNOWN, kind), (own, UNKNOWN), (UNKNOWN, UNKNOWN))
    ]
    assert sum(drawn).eq(1).all()
    expected = [(1 - share) ** 2, share * (1 - share), share * (1 - share), share**2]
    np.testing.assert_allclose([found.float().mean() for found in drawn], expected, atol=0.08)


def test_whitening_of_texts_is_that_of_the_intents_of_trains_time(three_config, query_lists, query_intents):
    """Against numpy: an intent that enters after everything that these lists show is left out, others are in."""
    train = query_lists("train", 60, seed=1)  # UNSEEN is in no list
    dates = np.full(KB, "NaT", "datetime64[us]")
    dates[[0, 1]], dates[UNSEEN] = np.datetime64("2024-03-01"), np.datetime64("2024-04-01")
    ranker = ThreeTower(three_config(text=True), seed=0)
    set_whitening(ranker, train, replace(query_intents, valid_from=dates))
    text, query = query_intents.text.double().numpy(), train.query.double().numpy()
    whitening = {name: part for name, part in ranker.named_modules() if isinstance(part, Whitening)}
    known = np.arange(KB) != UNSEEN
    for name, part in whitening.items():
        expected = text[known] if name.startswith("intent.") else query
        np.testing.assert_allclose(part.mean.numpy(), expected.mean(axis=0), atol=1e-6, err_msg=name)
    (of_text,) = [part for name, part in whitening.items() if name.startswith("intent.")]
    altered = text.copy()
    altered[UNSEEN] = 1e3
    other = ThreeTower(three_config(text=True), seed=0)
    set_whitening(other, train, replace(with_texts(query_intents, altered), valid_from=dates))
    assert torch.equal(other.intent.text[0].matrix, of_text.matrix)
    early = dates.copy()
    early[UNSEEN] = np.datetime64("2024-02-01")  # valid in train, though no list shows it
    set_whitening(other, train, replace(query_intents, valid_from=early))
    np.testing.assert_allclose(other.intent.text[0].mean.numpy(), text.mean(axis=0), atol=1e-6)


def test_history_is_read(model, lists, intents):
    batch = lists("valid", 40, seed=0)
    shuffled = replace(batch, history=tuple(bag.take(torch.arange(40).roll(1)) for bag in batch.history))
    assert not np.array_equal(score(model, batch, intents), score(model, shuffled, intents))


def test_initialisation_follows_the_seed_and_leaves_torchs_random_state(config):
    before = torch.random.get_rng_state()
    first, again, other = (TwoTower(config(), seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["intent.id.weight"], other["intent.id.weight"])
