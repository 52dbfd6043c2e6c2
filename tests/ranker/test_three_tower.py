from dataclasses import replace

import numpy as np
import pytest
import torch
from small_lists import fit
from torch.nn import functional as F

from rgalign.data.lists import with_queries
from rgalign.evaluation.metrics import gauc_of_lists
from rgalign.ranker.fit import score
from rgalign.ranker.losses import listnet, listnet_kl, listnet_loss
from rgalign.ranker.towers import INTERACTIONS, ThreeTower, TowerAttention
from rgalign.seeding import seeded


@pytest.fixture(params=INTERACTIONS)
def model(request, three_config, position_biased):
    ranker = ThreeTower(three_config(interaction=request.param), seed=3)
    return position_biased(ranker)


def gauc(model, lists, intents):
    return gauc_of_lists(score(model, lists, intents), lists.clicked.numpy(), lists.shown.numpy()).value


def test_attention_equals_softmax_over_the_other_two_written_out():
    with seeded(0):
        layer, user, vectors, query = TowerAttention(4), torch.randn(3, 4), torch.randn(5, 4), torch.randn(3, 4)
    candidates = torch.tensor([[0, 4], [2, 2], [3, 1]])
    found = layer(user, vectors, query, candidates)
    for row, column in np.ndindex(3, 2):
        towers = [user[row], vectors[candidates[row, column]], query[row]]
        maps = [layer.user, layer.intent, layer.query]
        asks, keys, gives = zip(*(project(t).split(4) for project, t in zip(maps, towers, strict=True)), strict=True)
        for own in range(3):
            others = [i for i in range(3) if i != own]
            weights = torch.stack([asks[own] @ keys[i] for i in others]).div(2).softmax(dim=0)
            expected = towers[own] + sum(w * gives[i] for w, i in zip(weights, others, strict=True))
            torch.testing.assert_close(found[own].expand(3, 2, 4)[row, column], expected)


def test_without_attention_the_score_is_the_towers_products_written_out(three_config, query_lists, query_intents):
    model = ThreeTower(three_config(interaction="product"), seed=1).eval()
    batch = query_lists("valid", 5, seed=0)
    scores = score(model, batch, query_intents)
    with torch.no_grad():
        user, query, (vectors, bias) = model.user(batch), model.query(batch), model.intent(query_intents)
        part = model.interaction
        for row, column in np.ndindex(5, 6):
            u, q, intent = user[row], query[row], int(batch.candidates[row, column])
            v = vectors[intent]
            inputs = torch.cat([u, v, q, u * v, q * v, u * q, u * v * q])
            expected = part.out(F.relu(part.hidden(inputs))) + part.direct(inputs) + bias[intent]
            assert scores[row, column] == pytest.approx(expected.item(), abs=1e-5)
        torch.testing.assert_close(part.direct(inputs)[0], (u @ v + q @ v) / 8**0.5)


def test_position_bias_is_in_the_trained_scores_and_in_no_other_branch(model, query_lists, query_intents):
    batch = query_lists("valid", 40, seed=0)
    calm = ThreeTower(replace(model.config, dropout=0.0, id_dropout=0.0, query_dropout=0.0), seed=3)
    calm.load_state_dict(model.state_dict())
    with torch.no_grad():
        trained, still = (calm.train(mode)(batch, query_intents, branches=True) for mode in (True, False))
    bias = torch.linspace(3, -3, 6).expand(40, -1)
    torch.testing.assert_close(trained.scores - trained.relevance, bias)
    torch.testing.assert_close(still.scores, still.relevance)
    for name in ("relevance", "query"):
        torch.testing.assert_close(getattr(trained, name), getattr(still, name))
    assert torch.equal(calm(batch, query_intents), still.scores)


def test_the_query_branch_is_the_product_of_query_and_intent_alone(model, query_lists, query_intents):
    batch = query_lists("valid", 9, seed=0)
    with torch.no_grad():
        found = model(batch, query_intents, branches=True).query
        query, (vectors, _) = model.query(batch), model.intent(query_intents)
    expected = torch.einsum("ld,lcd->lc", query, vectors[batch.candidates.long()]) / 8**0.5
    torch.testing.assert_close(found, expected)


def test_the_query_is_heard_and_its_scale_is_not(model, query_lists, query_intents):
    batch = query_lists("valid", 40, seed=0)
    expected = score(model, batch, query_intents)
    louder = with_queries(batch, batch.query.float() * 8 + 3)
    np.testing.assert_allclose(score(model, louder, query_intents), expected, atol=1e-3)
    strangers = with_queries(batch, batch.query.roll(1, 0))
    assert np.abs(score(model, strangers, query_intents) - expected).max() > 0.01


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_learns_from_the_query_what_the_features_do_not_say(interaction, three_config, query_lists, query_intents):
    blind = [
        replace(each, fields=torch.ones_like(each.fields))
        for each in (query_lists("train", 400, seed=0), query_lists("dev", 100, seed=1))
    ]
    ranker = ThreeTower(three_config(interaction=interaction), seed=0)
    how = {"seed": 0, "lists_per_batch": 64, "learning_rate": 0.02, "progress": False, "epochs": 12}
    fitted = fit(ranker, *blind, query_intents, loss=listnet_kl(0.2), **how)
    assert gauc(fitted.model, blind[1], query_intents) > 0.95
    fitted = fit(ThreeTower(ranker.config, seed=0), *map(_constant, blind), query_intents, loss=listnet, **how)
    assert gauc(fitted.model, _constant(blind[1]), query_intents) < 0.7


def _constant(lists):
    return with_queries(lists, lists.query[:1].expand(len(lists), -1))


def test_with_kl_weight_zero_the_loss_is_listnet(model, query_lists, query_intents):
    batch = query_lists("train", 40, seed=0)
    with torch.no_grad():
        scores = model(batch, query_intents)
        assert listnet_kl(0.0)(model, batch, query_intents) == listnet_loss(scores, batch.clicked, batch.shown)
        assert listnet_kl(0.2)(model, batch, query_intents) > listnet_kl(0.0)(model, batch, query_intents)


def test_lists_without_queries_or_of_another_width_are_refused(model, lists, intents, query_lists, query_intents):
    with pytest.raises(ValueError, match="reads vectors of 10; these Lists have none"):
        score(model, lists("valid", 3, seed=0), query_intents)
    with pytest.raises(ValueError, match="these Intents have none"):
        score(model, query_lists("valid", 3, seed=0), intents)
    batch = query_lists("valid", 3, seed=0)
    with pytest.raises(ValueError, match="these QueryLists have 4 wide"):
        score(model, with_queries(batch, batch.query[:, :4]), query_intents)


def test_in_bfloat16_the_loss_and_its_gradients_are_those_of_float32_to_its_precision(
    model, query_lists, query_intents
):
    batch, loss = query_lists("train", 60, seed=0), listnet_kl(0.2)
    model.eval()

    def learnt(reduced: bool):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
            value = loss(model, batch, query_intents)
        value.backward()
        return value.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    (expected, whole), (found, reduced) = learnt(False), learnt(True)
    assert found == pytest.approx(expected, rel=0.02)
    assert torch.cosine_similarity(whole, reduced, dim=0) > 0.99
