"""Batches that are shared out over processes, seen whole. With one process nothing is sent and nothing changes."""

import torch
import torch.distributed as dist
from torch import Tensor


def gathered(rows: Tensor) -> Tensor:
    """The rows of all processes, by rank: (own rows, ..) -> (rows of all, ..). Processes may have unlike numbers.

    Differentiable: what any process's loss says about a row goes back to the process that owns it. Without that,
    in-batch losses of several processes would learn otherwise than those of one.
    """
    if not _several():
        return rows
    own = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, own)
    return _Gather.apply(rows, [int(count) for count in counts])


def evened(mean: Tensor, count: int) -> Tensor:
    """This process's mean over `count` things, weighted: averaged over processes it is the mean over all things.

    Where no process has any it is 0.
    """
    if not _several():
        return mean
    total = torch.tensor(count, device=mean.device)
    dist.all_reduce(total)
    return mean * (count * dist.get_world_size() / total.clamp(min=1))


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _Gather(torch.autograd.Function):
    """all_gather of unlike numbers of rows; its gradient is the sum over processes, each taking its own rows.

    torch.distributed.nn.functional.all_gather does so for like numbers, and is deprecated as of torch 2.13.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone()
        dist.all_reduce(total)
        return total.split(ctx.counts)[dist.get_rank()], None
