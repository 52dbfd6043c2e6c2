import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

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


def plain_whitening(vectors, ridge):
    """The matrix of a whitening that is set on these vectors, and they as it leaves them, before the layer norm."""
    layer = Whitening(vectors.shape[1], ridge)
    layer.set(vectors)
    layer.norm = torch.nn.Identity()
    return layer.matrix, layer(vectors)


NARROW = torch.tensor([[9.0, 0, 0, 0], [5, 0.5, 0, 0], [0, 3, 2, 0], [1, 1, 1, 0.5]])


@pytest.mark.parametrize("ridge", [0.01, 0.3, 1.0])
def test_whitening_divides_each_principal_direction_by_the_root_of_its_variance_and_the_ridge(ridge):
    """By scikit-learn's PCA of the standardised vectors: their variance along each component is s / (s + ridge)."""
    vectors = torch.randn(2000, 4) @ NARROW + 7
    white = plain_whitening(vectors, ridge)[1].double().numpy()
    standard = StandardScaler().fit_transform(vectors.double().numpy())
    pca = PCA().fit(standard)
    variance = pca.explained_variance_ * (len(vectors) - 1) / len(vectors)
    expected = pca.components_.T @ np.diag(variance / (variance + ridge)) @ pca.components_
    np.testing.assert_allclose(np.cov(white.T, bias=True), expected, atol=1e-3)
    np.testing.assert_allclose(white.mean(axis=0), 0, atol=1e-3)


def test_whitening_by_hand():
    """Columns of deviation 1 and 10 and correlation 0.6: variances 1.6 and 0.4 along (1, 1) and (1, -1)."""
    ones = torch.tensor([[1.0, 1], [-1, -1], [1, 1], [-1, -1], [1, 1], [-1, -1], [1, 1], [-1, -1], [1, -1], [-1, 1]])
    matrix, _ = plain_whitening(ones * torch.tensor([1.0, 10]), ridge=0.4)
    wide, narrow = 2**-0.5, 0.8**-0.5  # 1 / sqrt(1.6 + 0.4), 1 / sqrt(0.4 + 0.4)
    turned = torch.tensor([[wide + narrow, wide - narrow], [wide - narrow, wide + narrow]]) / 2
    torch.testing.assert_close(matrix, turned / torch.tensor([[1.0], [10]]))


def test_whitening_without_ridge_leaves_no_correlation_and_with_a_huge_one_turns_nothing():
    vectors = torch.randn(2000, 4) @ NARROW
    white = plain_whitening(vectors, ridge=0.0)[1]
    torch.testing.assert_close(torch.cov(white.T, correction=0), torch.eye(4), atol=1e-3, rtol=0)
    matrix, _ = plain_whitening(vectors, ridge=1e8)
    torch.testing.assert_close(matrix * 1e4, torch.diag(1 / vectors.std(dim=0, correction=0)), atol=1e-5, rtol=1e-3)


def test_whitening_of_very_many_vectors_reads_every_nth_and_no_more_than_it_says(monkeypatch):
    monkeypatch.setattr(Whitening, "MOST_ROWS", 100)
    vectors = torch.randn(199, 3)
    all_but_every_other = plain_whitening(vectors[::2], 0.3)[0]
    assert torch.equal(plain_whitening(vectors, 0.3)[0], all_but_every_other)


def test_whitening_forgets_the_scale_of_each_dimension_and_what_never_varies():
    vectors, scales = torch.randn(300, 5), torch.tensor([1.0, 100, 0.01, 5, 1])
    vectors[:, 4] = 3
    plain, scaled = Whitening(5, 0.3), Whitening(5, 0.3)
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
    torch.testing.assert_close(Whitening(5, 0.3)(vectors), torch.nn.functional.layer_norm(vectors, (5,)))
