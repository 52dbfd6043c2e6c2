"""Building blocks of the towers: one table for all fields, attention over fields, mixture of experts."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgalign.data.features import UNKNOWN
from rgalign.data.lists import Bag


def unknown_at_random(ids: Tensor, share: float) -> Tensor:
    """Replace each id by 'unknown' with this probability: id dropout, a training step's view [C]."""
    return ids.masked_fill(torch.rand(ids.shape, device=ids.device) < share, UNKNOWN) if share else ids


class FieldEmbedding(nn.Module):
    """All categorical fields in one table: a field's ids are shifted by the sizes of the fields before it."""

    def __init__(self, sizes: Sequence[int], dim: int):
        super().__init__()
        offsets = torch.tensor([0, *sizes]).cumsum(0)
        self.register_buffer("offsets", offsets[:-1], persistent=False)
        self.table = nn.Embedding(int(offsets[-1]), dim)
        nn.init.normal_(self.table.weight, std=dim**-0.5)  # rows of length about 1, whatever the width

    def forward(self, fields: Tensor) -> Tensor:
        """fields (rows, fields) ids -> (rows, fields, dim)."""
        return self.table(fields + self.offsets)


class BagEmbedding(nn.Module):
    """Mean embedding of a bag of ids; an empty bag is the zero vector."""

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.table = nn.EmbeddingBag(size, dim, mode="mean", include_last_offset=True)
        nn.init.normal_(self.table.weight, std=dim**-0.5)  # rows of length about 1, whatever the width

    def forward(self, bag: Bag) -> Tensor:
        """bag of ids -> (rows, dim)."""
        values, offsets = bag
        return self.table(values.long(), offsets)


class Whitening(nn.Module):
    """A language model's vectors, made comparable: (x - mean) @ matrix, fixed once on train, then layer norm [C].

    An LM's states lie in a narrow cone: a few directions are a hundred times as wide as those that tell sessions apart.
    Each dimension is scaled to variance 1, then each principal direction of variance s is divided by sqrt(s + ridge)
    (ZCA). Before `set` it is the identity.

    ridge  >= 0, in units of a dimension's variance: directions that vary much less are mostly noise and stay small
    """

    MOST_ROWS = 100_000  # a correlation is then known to about 0.003, and float64 copies of 1,024 columns take 0.8 GB

    def __init__(self, dim: int, ridge: float):
        super().__init__()
        self.ridge = ridge
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("matrix", torch.eye(dim))
        self.norm = nn.LayerNorm(dim)

    def set(self, vectors: Tensor) -> None:
        """Mean and matrix from these vectors (rows, dim): all, or every n-th where they are very many."""
        rows = vectors[:: max(1, -(-len(vectors) // self.MOST_ROWS))].double()
        deviation = rows.std(dim=0, correction=0)
        # below this bound a dimension is constant in train, but for float32 rounding of vectors of length about 1
        scale = torch.where(deviation > 1e-6, 1 / deviation, 0)
        scaled = (rows - rows.mean(dim=0)) * scale
        variance, directions = torch.linalg.eigh(scaled.T @ scaled / len(rows))
        turned = directions / (variance.clamp(min=0) + self.ridge).sqrt() @ directions.T
        self.mean.copy_(rows.mean(dim=0))
        self.matrix.copy_(scale.unsqueeze(1) * turned)

    def forward(self, vectors: Tensor) -> Tensor:
        """(rows, dim) -> (rows, dim)."""
        return self.norm((vectors - self.mean) @ self.matrix)


class FieldAttention(nn.Module):
    """AutoInt's interacting layer: every field attends to all fields of its row, plus a projected residual [P].

    dim_in, dim_out  width of a field before and after; heads must divide dim_out
    """

    def __init__(self, dim_in: int, dim_out: int, heads: int):
        super().__init__()
        if dim_out % heads:
            raise ValueError(f"{heads} heads do not divide the width {dim_out}")
        self.heads = heads
        self.query_key_value = nn.Linear(dim_in, 3 * dim_out, bias=False)
        self.residual = nn.Linear(dim_in, dim_out)

    def forward(self, fields: Tensor) -> Tensor:
        """fields (rows, fields, dim_in) -> (rows, fields, dim_out)."""
        rows, count, _ = fields.shape
        split = self.query_key_value(fields).view(rows, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # the fused kernel never stores the (fields x fields) weights: half the time of matmul + softmax at 90 fields
        mixed = F.scaled_dot_product_attention(*split.unbind(0))
        return F.relu(mixed.transpose(1, 2).reshape(rows, count, -1) + self.residual(fields))


class MixtureOfExperts(nn.Module):
    """Two-layer experts, averaged by a softmax gate that sees the same input [P]; all experts run as one matmul."""

    def __init__(self, dim_in: int, hidden: int, dim_out: int, experts: int, dropout: float):
        super().__init__()
        self.gate = nn.Linear(dim_in, experts)
        self.widen = nn.Linear(dim_in, experts * hidden)
        self.narrow = nn.Parameter(torch.empty(experts, hidden, dim_out))
        self.shift = nn.Parameter(torch.zeros(experts, dim_out))
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.narrow, std=hidden**-0.5)  # an output is as wide as a hidden unit, whatever their number

    def weights(self, inputs: Tensor) -> Tensor:
        """(rows, dim_in) -> share of each expert (rows, experts); a row sums to one."""
        return self.gate(inputs).softmax(dim=1)

    def forward(self, inputs: Tensor) -> Tensor:
        """(rows, dim_in) -> (rows, dim_out)."""
        experts = len(self.narrow)
        hidden = self.dropout(F.relu(self.widen(inputs))).view(len(inputs), experts, -1)
        outputs = torch.einsum("reh,ehd->red", hidden, self.narrow) + self.shift
        return (self.weights(inputs).unsqueeze(2) * outputs).sum(dim=1)


class MatchTerms(nn.Module):
    """Learnt combination of match terms: sum over terms of weight * (term - mean) / std of the shown candidates [C].

    A term that has nothing to compare has a learnt value instead, at first train's mean. Before `set`: terms as they
    are, with weights 0.
    """

    def __init__(self, terms: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(terms))
        self.register_buffer("std", torch.ones(terms))
        self.missing = nn.Parameter(torch.zeros(terms))
        self.weight = nn.Parameter(torch.zeros(terms))

    def set(self, shown: Tensor) -> None:
        """Mean and standard deviation from these values (candidates, terms); of a term that is constant: 1."""
        values = shown.double()
        mean = values.nanmean(dim=0).nan_to_num()
        std = (values - mean).square().nanmean(dim=0).sqrt().nan_to_num()
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 1e-6, std, 1))

    def standardised(self, terms: Tensor) -> Tensor:
        """(.., terms) -> (.., terms) float32, without NaN."""
        values = (terms.float() - self.mean) / self.std
        return torch.where(values.isnan(), self.missing, values)

    def forward(self, terms: Tensor) -> Tensor:
        """(.., terms) -> (..)."""
        return self.standardised(terms) @ self.weight
