"""What each process of run.launcher does: python -m rgalign.commands.worker JOB, by torchrun or accelerate.

Every process is called with the same arguments; the first one writes the result. A reason that a user can fix is
written for the notebook to report; any other end (a process killed, a connection lost) makes the job start once more.
"""

import json
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.distributed as dist
from accelerate import PartialState

from rgalign.alignment import contrastive, dpo, rewarding, sft
from rgalign.alignment.context import CURVE, TUNED, Context
from rgalign.alignment.monitor import ProbeSet, RewardHackingMonitor
from rgalign.alignment.reward import Queries
from rgalign.data import vectors
from rgalign.errors import TrainingError, UserError
from rgalign.params import load
from rgalign.ranker.train import train_in_shards, train_own_rankers
from rgalign.reasoner.embed import embed_own_shards
from rgalign.reasoner.model import Reasoner, import_reasoner
from rgalign.reasoner.trainer import is_sharded
from rgalign.report import summaries as look
from rgalign.run import distributed
from rgalign.run.artifacts import write_table, write_text

EXPECTED = (ValueError, KeyError, TypeError, OSError, UserError, TrainingError, torch.OutOfMemoryError)


def main(folder: Path) -> int:
    """Do this process's part of the job in a folder; returns the exit status."""
    given = json.loads((folder / distributed.ARGUMENTS).read_text(encoding="utf-8"))
    try:
        _join(given)
        result = JOBS[given["job"]](folder, given["arguments"])
        distributed.wait_for_all()
        if distributed.index() == 0:
            write_text(folder / distributed.RESULT, json.dumps(result) + "\n")
    except EXPECTED as error:
        write_text(folder / distributed.ERROR, f"{type(error).__name__}: {error}")
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def _join(given: Mapping[str, Any]) -> None:
    """Meet the other processes. Raises ProcessesError where there are not as many as the launcher was to start."""
    patience = {}
    if given["job"] in ("rank", "reward"):  # their processes meet at the end alone, however long the last one takes
        patience["timeout"] = timedelta(days=2)  # a lost process is reported by the launcher, not by the clock
    state = PartialState(cpu=given["device"] == "cpu" or not torch.cuda.is_available(), **patience)
    found, planned = state.num_processes, given["processes"]
    if planned is not None and found != planned:
        raise distributed.ProcessesError(
            f"`{given['launcher']}` was to start {planned} processes, and each finds itself one of {found}; on a CPU "
            "use torchrun --nproc_per_node N (accelerate launch runs one there and says nothing)"
        )
    torch.set_num_threads(max(1, given["threads"] // found))


def _context(arguments: Mapping[str, Any]) -> tuple[Context, Callable[[dict], Reasoner]]:
    """The run as its alignment sees it, without the launcher that has done its part; and how to read a reasoner."""
    run = Path(arguments["run"])
    params = load(run / "params.yaml")
    params = params.model_copy(update={"run": params.run.model_copy(update={"launcher": None})})
    how = {"dtype": params.reasoner.dtype, "device": params.run.device}
    return Context.at(params, lambda artifact: run / artifact), lambda place: import_reasoner(place, **how)


def write(folder: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    context, read = _context(arguments)
    models = {name: read(place) for name, place in arguments["models"].items()}
    return rewarding.write_own_shards(folder, context, models, arguments["how"])


def reward(folder: Path, arguments: dict[str, Any]) -> dict[str, int]:
    """This process's share of the reward models (alignment.rewarding.train_models)."""
    context, _ = _context(arguments)
    candidates, embedded = pd.read_parquet(folder / "candidates.parquet"), vectors.load(folder / "queries")
    queries = Queries(embedded, context.matched_queries(embedded))

    def train_one(number: int, place: Path) -> pd.DataFrame:
        name, seed, sources = arguments["models"][number]
        how = {"folder": place, "accelerator": accelerator, "progress": distributed.index() == 0}
        return rewarding.train_run_models(context, candidates, queries, models={(name, seed): sources}, **how)

    with distributed.single_process(context.params.run.device, context.params.run.precision) as accelerator:
        return train_in_shards(folder, len(arguments["models"]), train_one)


def tune(folder: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """One of the steps that tune the reasoner (Context.tune_by_processes)."""
    context, read = _context(arguments)
    context = context.reading(Path(arguments["embeddings"]), Path(arguments["rankers"]))
    start, work = read(arguments["reasoner"]), Path(arguments["work"])
    tables = {name: pd.read_parquet(folder / f"{name}.parquet") for name in arguments["tables"]}
    monitor, written = None, {}
    if arguments["step"] == "sft":
        tuned, curve = sft.train_sft(context, start, tables["best"], work)
    elif arguments["step"] == "dpo":
        if arguments["watched"] and is_sharded():
            print("RG-DPO is not looked at while it trains: its weights are shared out", flush=True)
        elif arguments["watched"]:  # as in notebook 06
            rewarder = rewarding.Rewarder.load(context, context.run / "models" / "reward")
            probe = ProbeSet.of(context, rewarder, look.hits_by_click(context, context.main()))
            monitor = RewardHackingMonitor(probe, start, context.params.alignment.dpo.tolerance)
        tuned, curve, written["reference.parquet"] = dpo.train_dpo(context, start, tables["pairs"], work, monitor)
    else:
        ids = arguments["learners"]
        lists = None if ids is None else context.rows_of(context.clicked_lists, ids)
        tuned, curve = contrastive.train_contrastive(context, start, tables.get("best"), work, lists=lists)
    if distributed.index() == 0:
        context.save(tuned, folder / TUNED)
        for name, table in (written | {CURVE: curve}).items():
            write_table(folder / name, table)
    return {"looks": monitor.rows if monitor else {}}


JOBS = {"embed": embed_own_shards, "write": write, "tune": tune, "rank": train_own_rankers, "reward": reward}

if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
