"""Candidate queries shard by shard of sessions, by one process or several: a killed writer goes on where it stood."""

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd

from rgalign import processes
from rgalign.alignment import candidates as writing
from rgalign.alignment.context import Context
from rgalign.artifacts import write_table
from rgalign.reasoner.model import Reasoner, fingerprint
from rgalign.reasoner.source import hand_over

SESSIONS_PER_SHARD = 1_000  # whose queries are written together; fixed, so that the number of processes changes no byte
SESSIONS = "sessions.parquet"


def write(
    context: Context, models: Mapping[str, Reasoner], sessions: pd.DataFrame, how: Mapping[str, Any], work: Path
) -> pd.DataFrame:
    """`candidates.write`, by the processes of run.launcher where there is one; how: its settings.

    work  where the finished shards lie, and stay: a killed stage finds them there, and clears them when it ends
    The draws are those of one call; a log-probability may differ in its last bits, since batches do.
    """
    job = work / "written"
    write_table(job / SESSIONS, sessions[["session_id"]])
    if context.recipe.launcher:
        placed = {name: hand_over(model, job / name) for name, model in models.items()}
        arguments = {"run": str(context.run.absolute()), "models": placed, "how": dict(how)}
        processes.run("write", job, context.recipe.launcher, arguments)
    else:
        write_share(job, context, models, how)
    count = -(-len(sessions) // SESSIONS_PER_SHARD)
    table = pd.concat([pd.read_parquet(shard(job, number)) for number in range(count)], ignore_index=True)
    return table.astype({"query": object})


def write_share(job: Path, context: Context, models: Mapping[str, Reasoner], how: Mapping[str, Any]) -> dict[str, int]:
    """This process's shards of `write`; those that are there, of these very models and sessions, are kept."""
    ids: Sequence[str] = pd.read_parquet(job / SESSIONS)["session_id"].tolist()
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


def shard(job: Path, number: int) -> Path:
    """The file of the candidates of one shard of sessions."""
    return job / f"candidates-{number:05d}.parquet"
