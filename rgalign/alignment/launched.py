"""The alignment's steps by several processes (run.launcher): what `rgalign.commands.worker` is given and returns.

A worker reads the run's context from its directory, so that only what the notebook made itself is passed on: tables as
parquet; a reasoner, rankers and vectors as the folders that they lie in.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from rgalign.alignment.context import Context
from rgalign.data import vectors
from rgalign.data.lists import Lists
from rgalign.data.vectors import Vectors
from rgalign.ranker.launched import by_processes
from rgalign.reasoner.model import Reasoner, export_reasoner
from rgalign.run import distributed
from rgalign.run.artifacts import write_table

TUNED, CURVE = "tuned", "curve.parquet"


def tune(
    context: Context,
    step: str,
    start: Reasoner,
    work: Path,
    *,
    tables: Mapping[str, pd.DataFrame],
    learners: Lists | None = None,
    watched: bool = False,
) -> tuple[Reasoner, pd.DataFrame, dict[str, Any]]:
    """A step (sft, dpo, cl) of `alignment` by the processes of run.launcher.

    tables    what the step reads, by name;  learners  lists it learns from; None: all
    watched   RG-DPO is looked at while it trains
    Returns the reasoner, its curve, and what the worker returns: looks (step -> figures).
    """
    job = work / "job"
    for name, table in tables.items():
        write_table(job / f"{name}.parquet", table)
    arguments = {"run": str(context.run.absolute()), "step": step, "tables": sorted(tables), "watched": watched}
    arguments |= {"embeddings": str(context.embeddings.absolute()), "rankers": str(context.rankers_folder.absolute())}
    arguments |= {"reasoner": export_reasoner(start, job / "start"), "work": str((work / "training").absolute())}
    arguments["learners"] = None if learners is None else learners.session_id.tolist()
    result = distributed.run("tune", job, context.recipe.launcher, arguments, device=context.params.run.device)
    return context.load(job / TUNED), pd.read_parquet(job / CURVE), result


def train_rewards(
    context: Context,
    candidates: pd.DataFrame,
    queries: Vectors,
    models: Mapping[tuple[str, int], Sequence[str]],
    folder: Path,
) -> pd.DataFrame:
    """Reward models by several processes, as rankers are (ranker.launched). queries: vectors by text; models: as of
    `reward.train_reward_models`. Returns their learning curves."""
    job = folder / "job"
    write_table(job / "candidates.parquet", candidates)
    vectors.save(job / "queries", queries)
    trained = [[*key, list(sources)] for key, sources in models.items()]
    arguments, device = {"run": str(context.run.absolute()), "models": trained}, context.params.run.device
    return by_processes("reward", context.recipe.launcher, job, list(models), arguments, folder, device=device)
