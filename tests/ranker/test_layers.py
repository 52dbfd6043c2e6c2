import pytest
import torch

from rgalign.data.lists import Bag
from rgalign.ranker.layers import (
    BagEmbedding,
    FieldAttention,
    FieldEmbedding,
    MixtureOfExperts,
    Whitening,
    unknown_at_random,
)
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


def test_whitening_makes_directions_uncorrelated_and_as_wide_as_each_other():
    narrow = torch.randn(5000, 4) @ torch.tensor([[9.0, 0, 0, 0], [5, 0.1, 0, 0], [0, 3, 2, 0], [1, 1, 1, 0.02]])
    layer = Whitening(4)
    layer.set(narrow + 7)
    layer.norm = torch.nn.Identity()
    white = layer(narrow + 7)
    found = torch.cov(white.T, correction=0)
    correlations = torch.corrcoef(narrow.T)
    variance, directions = torch.linalg.eigh(correlations)
    expected = directions @ torch.diag(variance / (variance + layer.RIDGE)) @ directions.T
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    torch.testing.assert_close(white.mean(0), torch.zeros(4), atol=1e-3, rtol=0)


def test_whitening_forgets_the_scale_of_each_dimension_and_what_never_varies():
    vectors, scales = torch.randn(300, 5), torch.tensor([1.0, 100, 0.01, 5, 1])
    vectors[:, 4] = 3
    plain, scaled = Whitening(5), Whitening(5)
    plain.set(vectors)
    scaled.set(vectors * scales)
    torch.testing.assert_close(plain(vectors), scaled(vectors * scales), atol=1e-3, rtol=1e-3)
    stranger = vectors.clone()
    stranger[:, 4] = 50
    assert torch.equal(plain(stranger), plain(vectors))
    plain.set(vectors[:1].expand(20, -1))  # a constant query
    assert plain(vectors[:3]).isfinite().all()


def test_whitening_is_plain_layer_norm_before_it_is_set():
    vectors = torch.randn(6, 5)
    torch.testing.assert_close(Whitening(5)(vectors), torch.nn.functional.layer_norm(vectors, (5,)))
