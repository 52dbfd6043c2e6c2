"""The direct model finds the rule that clicks were drawn from, and never sees the clicks it will be judged by."""

import numpy as np
import pytest
import torch
from scipy.special import expit, log_softmax

from rgalign.data.lists import Bag, Lists
from rgalign.evaluation.click_model import DirectModel

KB, POSITIONS = 20, 4


def lists_of(shown, clicked, part="dev"):
    ids = np.arange(len(shown)).astype(str)
    empty = Bag(torch.empty(0, dtype=torch.int16), torch.zeros(len(shown) + 1, dtype=torch.int64))
    return Lists(part, ids, ids, torch.empty(len(shown), 0), (), empty, torch.tensor(shown), torch.tensor(clicked))


@pytest.fixture(scope="module")
def drawn():
    """Scores of a ranker, lists, the true P(click) of each slot, clicks."""
    rng = np.random.default_rng(0)
    scores = rng.normal(scale=2, size=(8_000, KB))
    shown = rng.permuted(np.tile(np.arange(KB), (len(scores), 1)), axis=1)[:, :POSITIONS]
    log_p = np.take_along_axis(log_softmax(scores, axis=1), shown, axis=1)
    chance = expit(0.7 * log_p + np.array([1.5, 1.0, 0.6, 0.4]))
    return scores, shown, chance, rng.random(chance.shape) < chance


def test_it_finds_the_rule(drawn):
    scores, shown, chance, clicked = drawn
    model = DirectModel.fit(lists_of(shown, clicked), scores)
    assert model.slope == pytest.approx(0.7, abs=0.05)
    np.testing.assert_allclose(model.intercepts, [1.5, 1.0, 0.6, 0.4], atol=0.15)
    np.testing.assert_allclose(model.predict(scores, shown[:, :3]), chance[:, :3], atol=0.03)


def test_scores_may_be_shifted_and_padding_does_not_matter(drawn):
    scores, shown, _, clicked = (part[:500] for part in drawn)
    model = DirectModel.fit(lists_of(shown, clicked), scores)
    wider = np.pad(shown, ((0, 0), (0, 1)), constant_values=-1), np.pad(clicked, ((0, 0), (0, 1)))
    again = DirectModel.fit(lists_of(*wider), scores + 7)
    np.testing.assert_allclose(again.predict(scores - 7, shown), model.predict(scores, shown), atol=1e-3)


def test_an_intent_outside_the_kb_is_very_unlikely_but_a_number(drawn):
    scores, shown, _, clicked = (part[:500] for part in drawn)
    scores = np.where(np.arange(KB) == 3, -np.inf, scores)
    predicted = DirectModel.fit(lists_of(shown, clicked), scores).predict(scores, np.full((500, 1), 3))
    assert ((predicted > 0) & (predicted < 0.01)).all()


def test_it_is_not_fitted_on_what_is_to_be_estimated(drawn):
    scores, shown, _, clicked = (part[:50] for part in drawn)
    for part in ("valid", "test"):
        with pytest.raises(ValueError, match=f"lists of {part}; a direct model is fitted on train or dev"):
            DirectModel.fit(lists_of(shown, clicked, part), scores)
    with pytest.raises(ValueError, match="0 of 200 impressions are clicked"):
        DirectModel.fit(lists_of(shown, np.zeros_like(clicked)), scores)
    with pytest.raises(ValueError, match=r"scores has the shape \(49, 20\) and 0 NaN or inf; expected \(50, KB\)"):
        DirectModel.fit(lists_of(shown, clicked), scores[1:])
    model = DirectModel.fit(lists_of(shown, clicked), scores)
    with pytest.raises(ValueError, match="target has 5 positions; the model was fitted on lists of 4"):
        model.predict(scores, np.zeros((50, 5), dtype=int))


def test_extreme_scores_give_probabilities_or_are_refused(drawn):
    scores, shown, _, clicked = (part[:500].copy() for part in drawn)
    scores[::3] *= 1e307
    scores[1] = -np.inf  # a session before every intent
    scores[2] = -1e308
    model = DirectModel.fit(lists_of(shown, clicked), scores)
    predicted = model.predict(scores, shown)
    assert ((predicted >= 0) & (predicted <= 1)).all()
    for wrong in (np.nan, np.inf):
        scores[5, 3] = wrong
        with pytest.raises(ValueError, match="and 1 NaN or inf"):
            model.predict(scores, shown)
