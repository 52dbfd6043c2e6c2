import pytest
import torch

from rgalign.data.lists import Bag
from rgalign.ranker.layers import BagEmbedding, FieldAttention, FieldEmbedding, MixtureOfExperts, unknown_at_random
from rgalign.seeding import seeded


@pytest.fixture(autouse=True)
def _seeded():
    with seeded(0):
        yield


def test_fields_of_one_table_do_not_overlap():
    embed = FieldEmbedding((3, 2, 4), dim=5)
    last = embed(torch.tensor([[2, 1, 3]]))
    assert torch.equal(last[0], embed.table.weight[[2, 4, 8]])


def test_a_bag_is_the_mean_of_its_ids_and_an_empty_bag_is_zero():
    embed = BagEmbedding(6, dim=3)
    bag = Bag(torch.tensor([5, 1], dtype=torch.uint8), torch.tensor([0, 2, 2]))
    expected = torch.stack([embed.table.weight[[5, 1]].mean(0), torch.zeros(3)])
    torch.testing.assert_close(embed(bag), expected)


def test_attention_equals_softmax_written_out():
    layer = FieldAttention(4, 6, heads=2)
    fields = torch.randn(3, 5, 4)
    query, key, value = layer.query_key_value(fields).chunk(3, dim=2)
    heads = []
    for head in (slice(0, 3), slice(3, 6)):
        weights = (query[..., head] @ key[..., head].transpose(1, 2) / 3**0.5).softmax(dim=2)
        heads.append(weights @ value[..., head])
    expected = torch.relu(torch.cat(heads, dim=2) + layer.residual(fields))
    torch.testing.assert_close(layer(fields), expected)
    assert layer(fields).shape == (3, 5, 6)


def test_permuting_the_fields_permutes_what_attention_returns():
    layer, fields = FieldAttention(4, 4, heads=1), torch.randn(3, 5, 4)
    order = torch.randperm(5)
    torch.testing.assert_close(layer(fields[:, order]), layer(fields)[:, order])


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="3 heads do not divide the width 4"):
        FieldAttention(4, 4, heads=3)


def test_the_gate_sums_to_one_and_weighs_the_experts():
    mixture = MixtureOfExperts(4, 6, 3, experts=5, dropout=0.0)
    inputs = torch.randn(7, 4)
    weights = mixture.weights(inputs)
    torch.testing.assert_close(weights.sum(1), torch.ones(7))
    outputs = torch.zeros(7, 3)
    for expert, hidden in enumerate(torch.relu(mixture.widen(inputs)).chunk(5, dim=1)):
        outputs += weights[:, [expert]] * (hidden @ mixture.narrow[expert] + mixture.shift[expert])
    torch.testing.assert_close(mixture(inputs), outputs)


def test_id_dropout_replaces_its_share_by_unknown():
    ids = torch.full((200, 200), 7)
    dropped = unknown_at_random(ids, 0.1)
    assert set(dropped.unique().tolist()) == {1, 7}
    assert (dropped == 1).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(unknown_at_random(ids, 0.0), ids)
