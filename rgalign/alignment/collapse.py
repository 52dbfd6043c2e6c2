"""Is a space of vectors collapsing? Three figures to watch while the reasoner is pulled towards the ranker."""

import torch
from torch import Tensor
from torch.nn import functional


@torch.no_grad()
def effective_rank(vectors: Tensor) -> Tensor:
    """exp of the entropy of the singular values' shares (Roy & Vetterli 2007): how many directions are in use.

    vectors  (rows, dim), not centred
    Returns a scalar from 1 (all rows on one line, or zero) to min(rows, dim); NaN where a vector is not finite.
    """
    vectors = _floats(vectors)
    if not vectors.isfinite().all():
        return vectors.new_full((), torch.nan)  # a decomposition would raise, and hide the loss that went astray
    values = torch.linalg.svdvals(vectors)
    return torch.special.entr(values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)).sum().exp()


@torch.no_grad()
def uniformity(vectors: Tensor, t: float = 2.0) -> Tensor:
    """log of the mean over pairs of rows of exp(-t |x - y|^2), rows scaled to length 1 (Wang & Isola 2020).

    vectors  (rows, dim), at least two; memory grows with rows squared: of many, give some thousands
    Returns a scalar: 0 where all rows are one point, the lower the more evenly they cover the sphere.
    """
    distance = torch.pdist(functional.normalize(_floats(vectors), dim=1))
    return distance.square().mul(-t).exp().mean().log()


@torch.no_grad()
def alignment(query: Tensor, positive: Tensor) -> Tensor:
    """Mean over rows of |x - y|^2, both scaled to length 1 (Wang & Isola 2020): 0 where all queries hit, 4 at most.

    query, positive  (rows, dim)
    """
    pairs = functional.normalize(_floats(query), dim=1) - functional.normalize(_floats(positive), dim=1)
    return pairs.square().sum(dim=1).mean()


def _floats(vectors: Tensor) -> Tensor:
    return vectors if vectors.dtype == torch.float64 else vectors.float()
