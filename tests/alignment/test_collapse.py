"""What is watched of a space: against spectra and point sets whose figures are known."""

import numpy as np
import pytest
import torch

from rgalign.alignment.info_nce import alignment, effective_rank, uniformity


def with_spectrum(values: list[float], rows: int = 12) -> torch.Tensor:
    """(rows, len(values)) vectors with these singular values."""
    random = np.random.default_rng(0)
    left = np.linalg.qr(random.normal(size=(rows, len(values))))[0]
    right = np.linalg.qr(random.normal(size=(len(values), len(values))))[0]
    return torch.tensor(left * values @ right)


@pytest.mark.parametrize(
    ("spectrum", "rank"),
    [([2, 2, 2, 2], 4), ([5, 0, 0], 1), ([1, 1, 0, 0], 2), ([0.5, 0.25, 0.25], 2**1.5), ([0, 0], 1)],
)
def test_effective_rank_of_known_spectra(spectrum, rank):
    assert float(effective_rank(with_spectrum(spectrum))) == pytest.approx(rank, abs=1e-6)
    assert float(effective_rank(7 * with_spectrum(spectrum).float())) == pytest.approx(rank, abs=1e-3)


def test_effective_rank_equals_numpys():
    vectors = np.random.default_rng(1).normal(size=(40, 8)) * np.arange(1, 9)
    values = np.linalg.svd(vectors, compute_uv=False)
    share = values / values.sum()
    assert float(effective_rank(torch.tensor(vectors))) == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    assert effective_rank(torch.tensor([[1.0, torch.nan]])).isnan()


def test_uniformity_is_nought_on_one_point_and_the_mean_over_pairs_elsewhere():
    assert float(uniformity(torch.ones(5, 3))) == pytest.approx(0, abs=1e-6)
    points = torch.tensor([[1.0, 0], [0, 5.0], [-2.0, 0]])  # squared distances 2, 4, 2 once scaled to length 1
    assert float(uniformity(points)) == pytest.approx(np.log((2 * np.exp(-4) + np.exp(-8)) / 3), abs=1e-5)
    assert float(uniformity(points, t=1)) == pytest.approx(np.log((2 * np.exp(-2) + np.exp(-4)) / 3), abs=1e-5)


def test_alignment_is_the_mean_squared_distance_of_directions():
    query, positive = torch.tensor([[3.0, 0], [0, 1], [1, 0]]), torch.tensor([[1.0, 0], [1, 0], [-2, 0]])
    assert float(alignment(query, positive)) == pytest.approx((0 + 2 + 4) / 3, abs=1e-6)


def test_each_figure_tells_a_collapse():
    apart, collapsed, positive = torch.eye(4), torch.ones(4, 4), torch.eye(4)
    assert [float(effective_rank(query)) for query in (apart, collapsed)] == pytest.approx([4, 1], abs=1e-3)
    assert [float(uniformity(query)) for query in (apart, collapsed)] == pytest.approx([-4, 0], abs=1e-5)
    assert [float(alignment(query, positive)) for query in (apart, collapsed)] == pytest.approx([0, 1], abs=1e-5)
