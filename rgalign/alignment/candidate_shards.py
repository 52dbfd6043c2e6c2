"""Candidate queries shard by shard of sessions, by one process or several: a killed writer goes on where it stood."""

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rgalign.alignment import candidates as writing
from rgalign.alignment.context import Context
from rgalign.reasoner.model import Reasoner, fingerprint
from rgalign.reasoner.prompts import Prompter
from rgalign.reasoner.source import hand_over
from rgalign.run import distributed
from rgalign.run.artifacts import write_table, write_text

SESSIONS_PER_SHARD = 1_000  # whose queries are written together; fixed, so that the number of processes changes no byte
SESSIONS = "sessions.parquet"


def write_in_shards(
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
        distributed.run("write", job, context.recipe.launcher, arguments)
    else:
        write_share(job, context, models, how)
    count = -(-len(sessions) // SESSIONS_PER_SHARD)
    table = pd.concat([pd.read_parquet(shard(job, number)) for number in range(count)], ignore_index=True)
    return table.astype({"query": object})


def write_share(job: Path, context: Context, models: Mapping[str, Reasoner], how: Mapping[str, Any]) -> dict[str, int]:
    """This process's shards of `write`; those that are there, of these very models and prompts, are kept."""
    ids: Sequence[str] = pd.read_parquet(job / SESSIONS)["session_id"].tolist()
    sessions = context.shop.sessions.set_index("session_id", drop=False).loc[ids].reset_index(drop=True)
    prompters = {name: context.recipe.prompter(context.shop, model) for name, model in models.items()}
    meant, made = {"models": {name: fingerprint(model) for name, model in models.items()}, "how": dict(how)}, 0
    for number in range(distributed.index(), -(-len(ids) // SESSIONS_PER_SHARD), distributed.count()):
        first = number * SESSIONS_PER_SHARD
        own = sessions.iloc[first : first + SESSIONS_PER_SHARD].reset_index(drop=True)
        digest, label = _digest(meant | {"first": first}, prompters, own), shard(job, number).with_suffix(".txt")
        if shard(job, number).is_file() and label.is_file() and label.read_text(encoding="utf-8") == digest:
            continue
        label.unlink(missing_ok=True)
        shown = {"progress": distributed.index() == 0}
        write_table(shard(job, number), writing.write(models, prompters, own, first_row=first, **how, **shown))
        write_text(label, digest)
        made += 1
    return {"shards": made}


def _digest(meant: Mapping[str, Any], prompters: Mapping[str, Prompter], sessions: pd.DataFrame) -> str:
    hashed = sha256(json.dumps([meant, sessions["session_id"].tolist()], sort_keys=True).encode())
    for prompter in prompters.values():
        for prompt in prompter.sessions(sessions):
            hashed.update(np.array([len(prompt), *prompt], dtype=np.int64).tobytes())
    return hashed.hexdigest()


def shard(job: Path, number: int) -> Path:
    """The file of the candidates of one shard of sessions."""
    return job / f"candidates-{number:05d}.parquet"
