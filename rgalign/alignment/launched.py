"""The alignment's steps by several processes (run.launcher): handed to `rgalign.worker`, and what comes back.

A worker builds the run's context from its directory anew, so that only what the notebook made itself travels: tables as
parquet, a reasoner as the folder that it lies in.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd

from rgalign import processes
from rgalign.alignment import candidates as writing
from rgalign.alignment.context import Context
from rgalign.artifacts import write_table
from rgalign.data import vectors
from rgalign.data.lists import Lists
from rgalign.data.vectors import Vectors
from rgalign.ranker.launched import by_processes
from rgalign.reasoner.model import Reasoner, fingerprint
from rgalign.reasoner.source import hand_over

SESSIONS_PER_SHARD = 1_000  # whose queries are written together; fixed, so that the number of processes changes no byte
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
    """A step (sft, dpo, cl) of `alignment.steps` by the processes of run.launcher.

    tables    what the step reads, by name;  learners  lists it learns from; None: all
    watched   RG-DPO is looked at while it trains
    Returns the reasoner, its curve, and what the worker has to say: left_out, looks (step -> figures).
    """
    job = work / "job"
    for name, table in tables.items():
        write_table(job / f"{name}.parquet", table)
    arguments = {"run": str(context.run.absolute()), "step": step, "tables": sorted(tables), "watched": watched}
    arguments |= {"reasoner": hand_over(start, job / "start"), "work": str((work / "training").absolute())}
    arguments["learners"] = None if learners is None else learners.session_id.tolist()
    said = processes.run("tune", job, context.recipe.launcher, arguments)
    curve = pd.read_parquet(job / CURVE)
    curve.attrs["left_out"] = said["left_out"]
    return context.load(job / TUNED), curve, said


def write(
    context: Context, models: Mapping[str, Reasoner], sessions: pd.DataFrame, how: Mapping[str, Any]
) -> pd.DataFrame:
    """`candidates.write` by the processes of run.launcher, shard by shard of sessions; how: its settings.

    The draws are those of one process; a log-probability may differ in its last bits, since batches do.
    """
    job = context.run / "work" / "written"
    write_table(job / "sessions.parquet", sessions[["session_id"]])
    placed = {name: hand_over(model, job / name) for name, model in models.items()}
    arguments = {"run": str(context.run.absolute()), "models": placed, "how": dict(how)}
    processes.run("write", job, context.recipe.launcher, arguments)
    count = -(-len(sessions) // SESSIONS_PER_SHARD)
    table = pd.concat([pd.read_parquet(shard(job, number)) for number in range(count)], ignore_index=True)
    shutil.rmtree(job)
    return table.astype({"query": object})


def write_share(job: Path, context: Context, models: Mapping[str, Reasoner], how: Mapping[str, Any]) -> dict[str, int]:
    """This process's shards of `write`; those that are there, of these very models and sessions, are kept."""
    ids: Sequence[str] = pd.read_parquet(job / "sessions.parquet")["session_id"].tolist()
    sessions = context.shop.sessions.set_index("session_id", drop=False).loc[ids].reset_index(drop=True)
    prompters = {name: context.recipe.prompter(context.shop, model) for name, model in models.items()}
    meant = {"models": {name: fingerprint(model) for name, model in models.items()}, "ids": ids, "how": dict(how)}
    digest, made = sha256(json.dumps(meant, sort_keys=True).encode()).hexdigest(), 0
    for number in range(processes.index(), -(-len(ids) // SESSIONS_PER_SHARD), processes.count()):
        label = shard(job, number).with_suffix(".json")
        if shard(job, number).is_file() and label.is_file() and json.loads(label.read_text()) == digest:
            continue
        label.unlink(missing_ok=True)
        first = number * SESSIONS_PER_SHARD
        own = sessions.iloc[first : first + SESSIONS_PER_SHARD].reset_index(drop=True)
        shown = {"progress": processes.index() == 0}
        write_table(shard(job, number), writing.write(models, prompters, own, first_row=first, **how, **shown))
        label.write_text(json.dumps(digest), encoding="utf-8")
        made += 1
    return {"shards": made}


def train_rewards(
    context: Context,
    candidates: pd.DataFrame,
    queries: Vectors,
    models: Mapping[tuple[str, int], Sequence[str]],
    folder: Path,
) -> pd.DataFrame:
    """Reward models dealt out as rankers are (ranker.launched). queries: vectors by text; models: as of
    `reward.train_reward_models`. Returns their learning curves."""
    job = context.run / "work" / "rewards"
    write_table(job / "candidates.parquet", candidates)
    vectors.save(job / "queries", queries)
    arguments = {"run": str(context.run.absolute()), "models": [[*key, list(heard)] for key, heard in models.items()]}
    return by_processes("reward", context.recipe.launcher, job, list(models), arguments, folder)


def shard(job: Path, number: int) -> Path:
    """The file of the candidates of one shard of sessions."""
    return job / f"candidates-{number:05d}.parquet"
