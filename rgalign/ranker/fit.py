"""The training loop of every ranker, and scoring with a trained one.

A ranker is any module with `forward(lists, intents) -> scores (lists, candidates)`; what else it needs (query
embeddings, say) is in its lists.
"""

import math
import time
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from rgalign.data.lists import Intents, Lists
from rgalign.errors import TrainingError
from rgalign.evaluation.metrics import Gauc, gauc_of_lists
from rgalign.params_training import RankerSettings
from rgalign.ranker.losses import Loss, listnet
from rgalign.seeding import seeded


@dataclass(frozen=True)
class Fitted:
    """A ranker with the weights of its best epoch, and its curve: epoch, train_loss, dev_gauc, seconds."""

    model: nn.Module
    curve: pd.DataFrame
    best_epoch: int


@torch.no_grad()
def first_batch(
    model: nn.Module, lists: Lists, intents: Intents, count: int = 64
) -> tuple[Lists, Intents, Tensor, Tensor]:
    """A batch to look at a loss with: the first lists with a click, the intents, and their scores (lists, candidates)
    by the whole ranker and by its query branch; a two-tower has none, and gives its scores twice, whose KL is 0."""
    device = next(model.parameters()).device
    lists = with_click(lists)
    lists, intents = lists.take(torch.arange(min(count, len(lists)))).to(device), intents.to(device)
    if not hasattr(model, "query"):
        return lists, intents, *[model(lists, intents)] * 2
    scores, _, query = model(lists, intents, branches=True)
    return lists, intents, scores, query


def fit(
    model: nn.Module,
    train: Lists,
    dev: Lists,
    intents: Intents,
    settings: RankerSettings,
    *,
    seed: int,
    loss: Loss = listnet,
    from_start: bool = False,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> Fitted:
    """Train in place by AdamW; stop when GAUC on the development users has not risen for `patience` epochs.

    train, dev   lists of these two parts; lists without a click are left out
    seed         of the order of lists and of dropout; the same seed gives the same bytes on the same machine and
                 number of threads, and the caller's random state is unchanged
    from_start   the weights given count as epoch 0 and are kept if no epoch is better: for a ranker trained before
    loss         mean over the lists of a batch; with several processes a batch is divided and gradients are averaged
    accelerator  device, precision and processes; by default accelerate's own choice
    Raises ValueError for lists of another part, TrainingError when the loss is not finite.
    """
    refuse_other_parts("fit", train=train, dev=dev)
    accelerator = accelerator or Accelerator()
    train, dev = with_click(train), with_click(dev)
    if len(train) < accelerator.num_processes or settings.lists_per_batch < 2 * accelerator.num_processes:
        raise ValueError(
            f"{len(train)} training lists have a click, in batches of {settings.lists_per_batch}: too few for "
            f"{accelerator.num_processes} processes, each of which needs a list of every batch"
        )
    train, dev, intents = (part.to(accelerator.device) for part in (train, dev, intents))
    optimizer = torch.optim.AdamW(
        model.to(accelerator.device).parameters(),
        settings.learning_rate,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    order = torch.Generator().manual_seed(seed)
    rows, best, best_epoch, best_gauc = [], {}, 0, -math.inf
    if from_start:
        best, best_gauc = _weights(model), _dev_gauc(accelerator.unwrap_model(wrapped), dev, intents, accelerator)
        rows.append((0, math.nan, best_gauc, 0.0))
    shown = progress and accelerator.is_main_process
    bar = tqdm(range(1, settings.epochs + 1), "ranker", delay=5, disable=not shown)
    with seeded(seed + accelerator.process_index):
        for epoch in bar:
            started = time.perf_counter()
            # batches of nearly one size: none is a small remainder with a noisy gradient
            batches = torch.randperm(len(train), generator=order).tensor_split(
                math.ceil(len(train) / settings.lists_per_batch)
            )
            train_loss = _train_epoch(wrapped, optimizer, loss, train, intents, batches, accelerator)
            if diverged := _not_finite(train_loss, model):
                raise TrainingError(
                    f"{diverged} in epoch {epoch}: lower ranker.learning_rate (it is {settings.learning_rate:g})"
                )
            dev_gauc = _dev_gauc(accelerator.unwrap_model(wrapped), dev, intents, accelerator)
            rows.append((epoch, train_loss, dev_gauc, time.perf_counter() - started))
            bar.set_postfix(loss=f"{train_loss:.4f}", dev_gauc=f"{dev_gauc:.4f}", refresh=False)
            if dev_gauc > best_gauc:
                best, best_epoch, best_gauc = _weights(model), epoch, dev_gauc
            elif epoch - best_epoch >= settings.patience:
                break
    bar.close()
    model = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    model.load_state_dict(best)
    return Fitted(model.eval(), pd.DataFrame(rows, columns=["epoch", "train_loss", "dev_gauc", "seconds"]), best_epoch)


def score(model: nn.Module, lists: Lists, intents: Intents, *, lists_per_batch: int = 4096) -> np.ndarray:
    """Scores (lists, candidates) float32 of the shown candidates, without position bias; -inf where padded."""
    device = next(model.parameters()).device
    intents, training, scores = intents.to(device), model.training, []
    if training:  # a walk over all modules, which one session alone would notice
        model.eval()
    with torch.no_grad():
        for rows in torch.arange(len(lists)).split(lists_per_batch):
            batch = (lists if len(rows) == len(lists) else lists.take(rows)).to(device)
            scores.append(model(batch, intents).float().masked_fill(~batch.shown, -math.inf).cpu().numpy())
    if training:
        model.train()
    return np.concatenate(scores) if scores else np.zeros(lists.candidates.shape, np.float32)


def score_kb(model: nn.Module, lists: Lists, intents: Intents, *, lists_per_batch: int = 1024) -> np.ndarray:
    """Scores (lists, intents) float32 of the whole KB, also of intents not yet valid at a session's time."""
    everything = torch.arange(len(intents)).expand(len(lists), -1)
    nothing_clicked = torch.zeros((), dtype=torch.bool).expand(everything.shape)
    whole = replace(lists, candidates=everything, clicked=nothing_clicked)
    return score(model, whole, intents, lists_per_batch=lists_per_batch)


def gauc_of(model: nn.Module, lists: Lists, intents: Intents) -> Gauc:
    """GAUC of a ranker on these lists (evaluation.metrics.gauc_of_lists)."""
    return gauc_of_lists(score(model, lists, intents), lists.clicked.cpu().numpy(), lists.shown.cpu().numpy())


def refuse_other_parts(who: str, **lists: Lists) -> None:
    """Raise ValueError unless the lists named `train`, `dev`, `valid` are of that part."""
    wrong = [f"{name} holds lists of part {given.part!r}" for name, given in lists.items() if given.part != name]
    if wrong:
        raise ValueError(
            f"{who} refuses: {'; '.join(wrong)}. Learn from train, stop on dev, choose on valid; test is opened by "
            "notebook 09 alone"
        )


def _not_finite(train_loss: float, model: nn.Module) -> str:
    """What is not finite after an epoch: its loss, or the weights after its last step; empty if nothing."""
    if not math.isfinite(train_loss):
        return f"the loss of the ranker is {train_loss}"
    finite = all(weights.isfinite().all() for weights in model.parameters())
    return "" if finite else "the weights of the ranker are no longer finite"


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def with_click(lists: Lists) -> Lists:
    """The lists that have a click."""
    has_click = lists.clicked.any(dim=1)
    return lists if has_click.all() else lists.take(has_click.nonzero().squeeze(1))


def _train_epoch(model, optimizer, loss: Loss, train: Lists, intents: Intents, batches, accelerator) -> float:
    model.train()
    total = torch.zeros((), device=accelerator.device)
    for batch in batches:
        mine = batch.tensor_split(accelerator.num_processes)[accelerator.process_index]
        # sizes differ by one list at most: this weight makes the average over processes the mean over the batch
        share = len(mine) * accelerator.num_processes / len(batch)
        value = loss(model, train.take(mine), intents) * share
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(value)
        optimizer.step()
        total += value.detach() * len(batch)
    return float(accelerator.reduce(total, "mean")) / sum(map(len, batches))


def _dev_gauc(model: nn.Module, dev: Lists, intents: Intents, accelerator: Accelerator) -> float:
    found = gauc_of(model, dev, intents)
    if not found.groups:
        raise ValueError(f"none of the {len(dev)} development lists has a clicked and an unclicked candidate")
    return float(accelerator.reduce(torch.tensor(found.value, dtype=torch.float32, device=accelerator.device), "mean"))
