"""Rankers by several processes (run.launcher): each process trains every n-th ranker of a stage, whole.

A ranker itself is never split [C]: it is small, a stage trains many (models x seeds) that know nothing of each other,
and so nothing travels between the processes while they learn. Each has the bytes that one process would give it with as
many threads of torch: run.threads shared out over the processes, as run.workers shares them out. Where there are more
processes than trainings, the rest wait.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from accelerate import Accelerator

from rgalign.params_training import RankerSettings
from rgalign.ranker import train as rankers
from rgalign.ranker.train import PartsOf
from rgalign.run import distributed
from rgalign.run.artifacts import atomic, write_table
from rgalign.run.distributed import single_process
from rgalign.run.work_shards import make_shards, shard_path

RANKERS, CURVE = "rankers", "curve.parquet"


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
    }
    trainings, device = arguments["trainings"], accelerator.device.type
    return by_processes("rank", launch.launcher, launch.job, trainings, arguments, folder, device=device)


def train_share(job: Path, given: dict[str, Any]) -> dict[str, int]:
    """This process's part of `train`."""
    parts, start = rankers.load_parts(given["encoded"]), given["start"]

    def train_one(number: int, folder: Path) -> pd.DataFrame:
        name, seed = given["trainings"][number]
        own = rankers.parts_of_variant(parts, name, Path(given["embeddings"]), given["seed"])
        how = {"positions": given["positions"], "start": {name: Path(start[name])} if name in start else None}
        how |= {"accelerator": accelerator, "progress": distributed.index() == 0}
        how["refit_whitening"] = given["refit_whitening"]
        return rankers.train({name: RankerSettings(**given["settings"][name])}, [seed], own, folder=folder, **how)

    with single_process(given["device"], given["precision"]) as accelerator:
        return train_in_shards(job, len(given["trainings"]), train_one)


def by_processes(
    task: str,
    launcher: str,
    job: Path,
    trainings: Sequence[tuple[str, int]],
    arguments: dict[str, Any],
    folder: Path,
    *,
    device: str,
) -> pd.DataFrame:
    """Have a task of the worker that ends in `train_in_shards` done; returns the curves of its trainings in order.

    trainings  name and seed of each: its ranker goes to folder/<name>/seed-<seed>
    What a call that was killed had trained is trained again: its data or code may have been others. Within a call, a
    lost process costs the ranker that it was at. Raises ProcessesError.
    """
    for left in job.glob("shard-*"):
        shutil.rmtree(left)
    distributed.run(task, job, launcher, arguments, device=device, lower="ranker.lists_per_batch")
    curves = []
    for number, (name, seed) in enumerate(trainings):
        shard = shard_path(job, number)
        curves.append(pd.read_parquet(shard / CURVE))
        with atomic(folder / name / f"seed-{seed}") as temporary:
            shutil.move(shard / RANKERS / name / f"seed-{seed}", temporary)
    shutil.rmtree(job)
    return pd.concat(curves, ignore_index=True)


def train_in_shards(job: Path, count: int, train_one: Callable[[int, Path], pd.DataFrame]) -> dict[str, int]:
    """Train this process's share of `count` trainings: index, index + processes, ..

    train_one  (number, folder to save the ranker in) -> its learning curve
    One that an earlier start of the job has left, whole and with its curve, is kept. Returns how many were trained.
    """

    def make(number: int, shard: Path) -> None:
        write_table(shard / CURVE, train_one(number, shard / RANKERS))

    share = {"process": distributed.index(), "processes": distributed.count()}
    return {"trained": make_shards(job, count, make, label=lambda number: {"training": number}, **share)}
