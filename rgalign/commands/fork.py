"""`fork`: a copy of a run with other params, which keeps every stage that they leave as it is."""

import argparse
import json
import shutil
from pathlib import Path

import pandas as pd

from rgalign.commands import pipeline, sweep
from rgalign.commands.runs import run_of
from rgalign.params import Params, ParamsError, load, parse_assignments
from rgalign.run import artifacts, locks
from rgalign.run.artifacts import ArtifactError
from rgalign.run.plan import STAGES, needed, reads_of
from rgalign.run.stages import FIRST, change_since, changed_file, write_params


def fork_command(options: argparse.Namespace) -> int:
    run, overrides = run_of(options.run), parse_assignments(options.set)
    if not (run / artifacts.PARAMS).is_file():
        raise ArtifactError(f"no run in {run}; start one: python -m rgalign run PARAMS")
    new = Path(options.new)
    new = (run / artifacts.PARAMS).resolve().parent.with_name(options.new) if new.name == options.new else new.resolve()
    if "run.seed" in overrides:
        raise ParamsError(
            "run.seed changes every stage, so that a fork has nothing to keep; begin a new run: python -m rgalign run "
            f"PARAMS --set run.seed={overrides['run.seed']} --run-dir {artifacts.portable(new)}"
        )
    again = fork(run, new, load(run / artifacts.PARAMS, overrides))
    name = artifacts.portable(new / artifacts.PARAMS)
    print(f"{artifacts.portable(new)}: a copy of {artifacts.portable(run)}")
    if again.empty:
        print(f"every stage is kept; with results once it has run: python -m rgalign run {name}")
        return 0
    print(f"will be run again, about {pipeline.span(again.seconds.sum())}:\n{again.to_string(index=False, na_rep='?')}")
    print(f"all at once:  python -m rgalign run {name}")
    print(f'by hand:      make lab PARAMS={name}, or params_file = "{name}" in a notebook')
    return 0


def fork(run: Path, new: Path, params: Params) -> pd.DataFrame:
    """Copy a run, and all of its stages that these params do not change, into the folder `new`. Returns the stages that
    have to run there: stage, why, seconds (estimated).

    Large files are hard-linked where the disk can. Raises ArtifactError where `new` is not empty, or somebody is at
    work in `run`.
    """
    if new.exists() and (not new.is_dir() or any(new.iterdir())):
        raise ArtifactError(f"{new} is not empty; expected a new folder: give another name")
    dropped, rows = set(), []
    with locks.locked(run, "python -m rgalign fork"):
        entries = artifacts.read_manifest(run)["stages"]
        write_params(new, params)
        artifacts.write_text(new / artifacts.MANIFEST, json.dumps({"version": artifacts.VERSION, "stages": {}}) + "\n")
        for stage in (stage for stage in STAGES.values() if needed(stage, params)):
            for given in (name for name in stage.given if (run / name).is_file()):
                shutil.copyfile(run / given, new / given)
            entry = entries.get(stage.name)
            if entry is None and not stage.in_sequence:
                continue
            follows = [name for name in dropped if {*STAGES[name].writes} & {*reads_of(stage, params)}]
            why = FIRST
            if entry is not None:
                why = change_since(entry, new, stage, params) or changed_file(run, "output", entry["outputs"])
            if why is None:
                sweep.copy_stage(new, stage, params, run)
                continue
            dropped.add(stage.name)
            why = f"follows {', '.join(sorted(follows))}" if follows and why.startswith("input ") else why
            rows.append((stage.name, why, pipeline.estimate(stage, params, entries)))
    return pd.DataFrame(rows, columns=["stage", "why", "seconds"])
