"""What each of two processes does in test_info_nce: imported by it again, so it imports little."""

from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from rgalign.alignment.contrastive import loss_in_space
from rgalign.params_training import Contrastive
from rgalign.run.distributed import all_gather_with_grad, weighted_all_reduce

DIM, KB = 5, 9


def problem(rows: int = 7) -> dict[str, torch.Tensor]:
    """Seven sessions, two intents clicked twice, second clicks, and a map of sessions to queries that learns."""
    random = torch.Generator().manual_seed(4)
    return {
        "sessions": torch.randn(rows, 3, generator=random),
        "weights": torch.randn(3, DIM, generator=random).requires_grad_(),
        "intents": torch.randn(KB, DIM, generator=random),
        "clicked": torch.tensor([0, 3, 1, 0, 8, 3, 5]),
        "also": torch.tensor([[1], [-1], [-1], [3], [-1], [0], [-1]]),
        "hard": torch.tensor([[2, -1], [3, 1], [4, 4], [-1, -1], [6, 0], [7, 8], [1, -1]]),
    }


def loss_of(given: dict, rows: slice, **how) -> torch.Tensor:
    """The loss of these sessions; its gradient stays in given["weights"]."""
    given["weights"].grad = None
    queries = given["sessions"][rows] @ given["weights"]
    batch = {name: given[name][rows] for name in ("clicked", "hard", "also")} | {"counted": torch.tensor(len(queries))}
    loss = loss_in_space(SimpleNamespace(intents=given["intents"]), queries, batch, Contrastive(**how))
    loss.backward()
    return loss.detach()


def work(rank: int, folder: str, splits: list[int], how: list[dict]) -> None:
    """Rank 0 leaves, for each way, what the processes found on average: loss and gradient."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(splits))
    found, start = {}, sum(splits[:rank])
    rows = slice(start, start + splits[rank])
    for number, way in enumerate(how):
        given = problem()
        loss = loss_of(given, rows, **way)
        for name, value in (("loss", loss), ("gradient", given["weights"].grad)):
            dist.all_reduce(value)
            found[f"{name} {number}"] = value / len(splits)
    found["clicked"] = all_gather_with_grad(given["clicked"][rows])
    found["mean"] = weighted_all_reduce(given["sessions"][rows].mean(), given["sessions"][rows].numel())
    dist.all_reduce(found["mean"])
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.destroy_process_group()
