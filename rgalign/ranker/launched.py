"""Rankers by several processes (run.launcher): a stage's trainings are dealt out, each of them whole.

A ranker itself is never split [C]: it is small, a stage trains many (models x seeds) that know nothing of each other,
and so nothing travels between the processes while they learn. Each has the bytes that one process would give it with as
many threads of torch: run.threads shared out over the processes, as run.workers shares them out. Where there are more
processes than trainings, the rest wait.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from rgalign.params_schema import RankerSettings
from rgalign.ranker import train as rankers
from rgalign.ranker.train import PartsOf
from rgalign.run import distributed
from rgalign.run.artifacts import atomic, write_table

RANKERS, CURVE = "rankers", "curve.parquet"
OF_OTHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # a launcher tells a process of others by these
OF_ACCELERATE = "ACCELERATE_"  # and by what begins so how they train one model; the device stays the process's own


@dataclass(frozen=True)
class Launch:
    """The processes that train, and where they find what their caller has in memory.

    launcher    run.launcher; None: there are none, the caller trains
    job         folder of what is under way; gone when it is done
    encoded     tables/encoded
    embeddings  folder/<Variant.vectors>/sessions and intents;  seed  of shuffled queries (ranker.train.with_vectors)
    """

    launcher: str | None
    job: Path
    encoded: Path
    embeddings: Path
    seed: int


def train(
    settings: Mapping[str, RankerSettings],
    seeds: Sequence[int],
    parts: PartsOf,
    *,
    launch: Launch,
    folder: Path,
    positions: int,
    start: Mapping[str, Path] | None = None,
    refit_whitening: bool = True,
    workers: int = 1,
    accelerator: Accelerator | None = None,
) -> pd.DataFrame:
    """`ranker.train.train`, whose arguments and result these are, by the processes of `launch`.

    parts  those that lie where `launch` says. Raises ProcessesError.
    """
    how = {"folder": folder, "positions": positions, "start": start, "refit_whitening": refit_whitening}
    if launch.launcher is None:
        return rankers.train(settings, seeds, parts, workers=workers, accelerator=accelerator, **how)
    accelerator = accelerator or Accelerator()
    arguments = {
        "settings": {name: own.model_dump() for name, own in settings.items()},
        "trainings": [(name, seed) for name in settings for seed in seeds],
        "positions": positions,
        "start": {name: str(path.absolute()) for name, path in (start or {}).items()},
        "refit_whitening": refit_whitening,
        "encoded": str(launch.encoded.absolute()),
        "embeddings": str(launch.embeddings.absolute()),
        "seed": launch.seed,
        "device": accelerator.device.type,
        "precision": accelerator.mixed_precision,
        "threads": torch.get_num_threads(),
    }
    return by_processes("rank", launch.launcher, launch.job, arguments["trainings"], arguments, folder)


def train_share(job: Path, said: dict[str, Any]) -> dict[str, int]:
    """This process's part of `train`."""
    parts, start = rankers.load_parts(said["encoded"]), said["start"]

    def train_one(number: int, folder: Path) -> pd.DataFrame:
        name, seed = said["trainings"][number]
        own = rankers.parts_of_variant(parts, name, Path(said["embeddings"]), said["seed"])
        how = {"positions": said["positions"], "start": {name: Path(start[name])} if name in start else None}
        how |= {"accelerator": accelerator, "progress": distributed.index() == 0}
        how["refit_whitening"] = said["refit_whitening"]
        return rankers.train({name: RankerSettings(**said["settings"][name])}, [seed], own, folder=folder, **how)

    with alone(said["device"], said["precision"]) as accelerator:
        return deal(job, len(said["trainings"]), train_one)


def by_processes(
    task: str, launcher: str, job: Path, trainings: Sequence[tuple[str, int]], arguments: dict[str, Any], folder: Path
) -> pd.DataFrame:
    """Have a task of `rgalign.commands.worker` that ends in `deal` done; returns the curves of its trainings in order.

    trainings  name and seed of each: its ranker goes to folder/<name>/seed-<seed>
    What a call that was killed had trained is trained again: its data or code may have been others. Within a call, a
    lost process costs the ranker that it was at. Raises ProcessesError.
    """
    for left in job.glob("trained-*"):
        shutil.rmtree(left)
    distributed.run(task, job, launcher, arguments, lower="ranker.lists_per_batch")
    curves = []
    for number, (name, seed) in enumerate(trainings):
        curves.append(pd.read_parquet(_place(job, number) / CURVE))
        with atomic(folder / name / f"seed-{seed}") as temporary:
            shutil.move(_place(job, number) / RANKERS / name / f"seed-{seed}", temporary)
    shutil.rmtree(job)
    return pd.concat(curves, ignore_index=True)


def deal(job: Path, count: int, train_one: Callable[[int, Path], pd.DataFrame]) -> dict[str, int]:
    """Train this process's share of `count` trainings: index, index + processes, ..

    train_one  (number, folder to save the ranker in) -> its learning curve
    One that an earlier start of the job has left, whole and with its curve, is kept. Returns how many were trained.
    """
    made = 0
    for number in range(distributed.index(), count, distributed.count()):
        if _place(job, number).is_dir():
            continue
        with atomic(_place(job, number)) as temporary:
            temporary.mkdir()
            write_table(temporary / CURVE, train_one(number, temporary / RANKERS))
        made += 1
    return {"trained": made}


@contextmanager
def alone(device: str = "cpu", precision: str = "no") -> Iterator[Accelerator]:
    """accelerate's view of this process as if it were the only one; afterwards the process's own view is as it was.

    One of a launcher's processes keeps the GPU that it was given. Arguments, errors: as of `ranker.train.accelerator`.
    """
    shared = [(state, dict(state._shared_state)) for state in (PartialState, AcceleratorState)]
    told = [name for name in os.environ if name in OF_OTHERS or name.startswith(OF_ACCELERATE)]
    others = {name: os.environ.pop(name) for name in told if name != "ACCELERATE_TORCH_DEVICE"}
    for state, _ in shared:
        state._shared_state.clear()
    try:
        yield rankers.accelerator(device, precision)
    finally:
        os.environ.update(others)
        for state, was in shared:
            state._shared_state.clear()
            state._shared_state.update(was)


def _place(job: Path, number: int) -> Path:
    return job / f"trained-{number:04d}"
