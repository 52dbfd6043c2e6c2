from dataclasses import replace

import numpy as np
import pytest
import torch

from rgalign.data.features import UNKNOWN
from rgalign.data.lists import with_texts
from rgalign.ranker.fit import score
from rgalign.ranker.layers import Whitening
from rgalign.ranker.towers import ThreeTower, TwoTower, set_whitening
from rgalign.seeding import seeded

KB, UNSEEN = 12, 11  # of small_lists.py: intents, and the last one, which no list shows


@pytest.fixture(params=[False, True], ids=["ids", "text"])
def model(request, config, position_biased):
    ranker = TwoTower(config(text=request.param), seed=3)
    return position_biased(ranker)


def test_without_real_positions_there_is_no_position_bias(config):
    assert TwoTower(config(positions=0)).position is None


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
