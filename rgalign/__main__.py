"""The command line: python -m rgalign new | run | sweep | status | score | report | compare | models | .."""

import argparse
import difflib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rgalign
from rgalign.commands import runs as run_folders
from rgalign.errors import UserError
from rgalign.params import ROOT, find, load, parse_assignments
from rgalign.params_schema import World
from rgalign.run import artifacts
from rgalign.run.plan import EVALUATION

MOVED = {"scale": "python -m benchmarks.scaling"}  # commands of 0.1.0


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run the command; returns the exit status."""
    parser = _parser()
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] in MOVED:
        parser.error(f"{given[0]} is another command now: {MOVED[given[0]]}")
    (known,) = (action.choices for action in parser._actions if action.choices)
    if given and not given[0].startswith("-") and given[0] not in known:
        near = difflib.get_close_matches(given[0], known, 1) or ["one of " + ", ".join(known)]
        parser.error(f"{given[0]} is not a command; did you mean {near[0]}?")
    options = parser.parse_args(given)
    try:
        with _stopped_in_order():
            return options.command(options)
    except KeyboardInterrupt as stopped:
        number = stopped.args[0] if stopped.args else signal.SIGINT
        print("\nStopped. Give the same command again to go on where it stood.", file=sys.stderr)
        return 128 + number
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


@contextmanager
def _stopped_in_order() -> Iterator[None]:
    """SIGTERM and SIGHUP end a command as Ctrl-C does: its kernels end, nothing is left."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return

    def stop(number: int, _frame: object) -> None:
        raise KeyboardInterrupt(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_command(options: argparse.Namespace) -> int:
    run_folders.refuse_without_notebooks()
    overrides = parse_assignments(options.set)
    if options.warm_start:
        last = Path(options.warm_start)
        overrides["run.warm_start"] = artifacts.portable(Path(os.path.abspath(last)) if last.is_dir() else ROOT / last)
    if options.launcher:
        overrides["run.launcher"] = options.launcher
    params = load(options.params, overrides)
    from rgalign.commands import estimate, pipeline
    from rgalign.data.sources import size_of
    from rgalign.run import external_inputs

    run = Path(os.path.abspath(options.run_dir)) if options.run_dir else artifacts.run_directory("", options.params)
    artifacts.refuse_no_folder(run, "the run: give another --run-dir")
    if params.data.path:
        artifacts.data_path(params.data.path)  # before a kernel starts, and in a dry run too
    external_inputs.last_run(params, run)
    if not (options.dry_run and options.card):  # another machine is asked about
        estimate.check_machine(params)
    stages = pipeline.chosen(options.first, options.through)
    pipeline.refuse_unfit(stages, params)
    forced = options.force or options.first is not None
    if note := estimate.pretraining_note(params):
        print(note, flush=True)
    if options.dry_run:
        print(f"data: {size_of(params.data)}")
        table = pipeline.plan(run, params, stages, forced=forced)
        print(table.to_string(index=False, na_rep="?"))
        unknown = " beside what the language model takes (?)" if table.seconds.isna().any() else " in all"
        print(f"about {table.seconds.sum():.0f} s{unknown}, in {run}")
        print(estimate.describe(params, options.card))
        return 0
    if params.reasoner.model != "tiny":
        print(estimate.describe(params, options.card), flush=True)
    parameters = {"params_file": artifacts.portable(find(options.params)), "run_dir": artifacts.portable(run)}
    parameters["overrides"] = overrides
    run.mkdir(parents=True, exist_ok=True)
    pipeline.execute(run, stages, parameters, params, forced=forced)
    print(f"results: {run / 'tables'}; read {run / 'notebooks' / stages[-1].name}.html")
    if EVALUATION in [stage.name for stage in stages]:
        run_folders.print_results(run)
    return 0


def fork_command(options: argparse.Namespace) -> int:
    from rgalign.commands import fork

    return fork.fork_command(options)


def sweep_command(options: argparse.Namespace) -> int:
    """Run each params file with each seed, then notebook 90 over all that has finished."""
    run_folders.refuse_without_notebooks()
    overrides = parse_assignments(options.set)
    from rgalign.commands import pipeline, sweep
    from rgalign.run import locks

    out = Path(os.path.abspath(options.out)) if options.out else ROOT / "outputs" / "study"
    stages = pipeline.chosen(None, options.through)
    runs = sweep.runs_of(options.params, options.seeds, overrides, out, here=not options.scheduler)
    for each in runs:
        pipeline.refuse_unfit(stages, each.params)
    planned = sweep.plan(runs, stages)
    print(sweep.by_run(planned).to_string(index=False))
    print(f"{len(runs)} runs, about {planned.seconds.sum():.0f} s in all, in {out}")
    for note in sweep.notes(runs):
        print(f"note: {note}")
    if options.dry_run:
        return 0
    with locks.locked(out, "python -m rgalign sweep"):
        failures = sweep.execute(runs, stages, out, options.scheduler)
        failures |= sweep.execute_study(runs, out)
    print(sweep.outcome(runs, failures).to_string(index=False))
    return 1 if failures else 0


def check_command(options: argparse.Namespace) -> int:
    from rgalign.data import tables

    report = tables.check(Path(options.folder))
    print(report)
    return 1 if report.errors else 0


def import_command(options: argparse.Namespace) -> int:
    from rgalign.commands import import_log

    return import_log.import_command(options)


def models_command(options: argparse.Namespace) -> int:
    from rgalign.commands import models

    return models.models_command(options)


def world_command(options: argparse.Namespace) -> int:
    assignments = parse_assignments(options.set)
    world_sizes = set(World.model_fields)
    overrides = {f"data.world.{key}" if key in world_sizes else key: value for key, value in assignments.items()}
    if "seed" in overrides:
        overrides["data.seed"] = overrides.pop("seed")
    data = load(options.params, {**overrides, "data.source": "shopworld"}).data
    from rgalign.data import tables
    from rgalign.shopworld import world

    how = {"seed": data.seed, "progress": True, **data.world.model_dump()}
    if options.shards:
        world.write_world(Path(options.folder), **how)
    else:
        tables.write(world.generate(**how), Path(options.folder))
    what = f"{data.world.sessions:,} sessions of ShopWorld {data.world.version}, seed {data.seed}"
    print(f"{what}: {options.folder}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rgalign", description="RGAlign-Rec, stage by stage.")
    parser.add_argument("--version", action="version", version=f"rgalign {rgalign.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Callable[[argparse.Namespace], int], summary: str) -> Callable[..., Any]:
        """Adds a command; returns what adds its arguments."""
        added = commands.add_parser(name, help=summary)
        added.set_defaults(command=function)
        return added.add_argument

    new = command("new", run_folders.new_command, "make a folder of your own with the notebooks and params")
    new("folder", metavar="DIR", help="a folder that does not exist yet, or is empty")

    run = command("run", run_command, "execute the notebooks of a params file, in order")
    run("params", help="for example params/quickstart.yaml")
    run("--run-dir", help="default: outputs/<name of the params file>")
    run("--set", action="append", default=[], metavar="KEY=VALUE", help="override one parameter")
    run("--warm-start", metavar="RUN", help="continue from an aligned run, with newer logs (needs --run-dir)")
    run("--from", dest="first", metavar="STAGE", help="start here, whatever has run (for example 03)")
    run("--through", metavar="STAGE", help="end here")
    run("--force", action="store_true", help="run also what is unchanged")
    run("--dry-run", action="store_true", help="say what would run and about how long")
    run("--launcher", metavar="COMMAND", help='several processes: "torchrun --nproc_per_node 4"')
    run("--card", help="estimate for this card (H100, A100, ..) instead of the one that is here")

    sweep = command("sweep", sweep_command, "run params files with many seeds, then notebook 90 over all of them")
    sweep("params", nargs="+", help="for example params/quickstart.yaml params/ablations/*.yaml")
    sweep("--seeds", required=True, help="a count (5: seeds 0 to 4) or a list (5,6,8)")
    sweep("--out", help="a folder of runs; default: outputs/study")
    sweep("--set", action="append", default=[], metavar="KEY=VALUE", help="override one parameter of all")
    sweep("--through", metavar="STAGE", default="09", help="end here (default: 09, which a study reads)")
    sweep("--scheduler", metavar="tcp://HOST:PORT", help="a dask scheduler, whose workers run it all at once")
    sweep("--dry-run", action="store_true", help="say what would run and about how long")

    status = command("status", run_folders.status_command, "state, seconds and memory of each stage of a run")
    status("run", help="for example outputs/quickstart")

    fork = command("fork", fork_command, "copy a run under a new name with changed params; what stays valid is kept")
    fork("run", help="for example outputs/quickstart")
    fork("new", metavar="NEW", help="a name (it lies beside RUN), or a path; a folder that does not exist yet")
    fork("--set", action="append", default=[], metavar="KEY=VALUE", help="change one parameter")

    score = command("score", run_folders.score_command, "rank the intents for a table of sessions with a finished run")
    score("run", help="for example outputs/quickstart")
    score("sessions", help="a .parquet with session_id and the feature columns that the run was made with")
    score("-o", "--out", required=True, help="the .parquet to write: session_id, rank, intent_id, title, score")
    score("--top", type=int, default=3, help="intents a session (default: 3)")

    report = command("report", run_folders.report_command, "write report.html and model_card.md of a run again")
    report("run", help="for example outputs/quickstart")

    compare = command(
        "compare", run_folders.compare_command, "results of several runs side by side, paired if possible"
    )
    compare("runs", nargs="+", metavar="RUN")

    models = command("models", models_command, "where a language model lies, and what it is; fetches smollm2")
    models("names", nargs="+", metavar="MODEL", help="as reasoner.model: smollm2, a hub name, a folder, a .gguf file")

    imports = command("import", import_command, "make a data set folder and params of a log: a row an answer shown")
    imports("log", help="a .csv, .tsv, .jsonl or .parquet")
    imports("folder", metavar="DIR", help="the data set folder to write; params/<its name>.yaml is written too")
    imports("--column", action="append", default=[], metavar="ROLE=NAME", help="title=answer_text; region= for none")
    imports("--feature", action="append", default=[], metavar="NAME=KIND", help="categorical, numeric, text or history")
    imports("--drop", action="append", default=[], metavar="NAME", help="leave this column out")
    imports("--time-unit", metavar="UNIT", help="of times that are numbers: s, ms, us or ns since 1970")
    imports("--time-format", metavar="FORMAT", help="of times that are not as 2026-01-31 18:05: %%d.%%m.%%Y %%H:%%M")
    imports("--yes", action="store_true", help="write; without it what would be written is printed")

    check = command("check", check_command, "list every fault of a data set folder")
    check("folder")

    world = command("world", world_command, "write a ShopWorld as a data set folder")
    world("folder")
    world("--params", default="params/quickstart.yaml", help="sizes are read from its data section")
    world("--set", action="append", default=[], metavar="KEY=VALUE", help="for example sessions=100000, seed=1")
    world("--shards", action="store_true", help="many files, in little memory: for millions of sessions")

    labels = command("labels", run_folders.labels_command, "write a labelling sheet, or read a filled one back")
    labels("folder", help="a run (only notebook 09 runs again), or a data set (for the runs to come)")
    labels("sheet", help="a .csv, with what a prompt may show; the intents are written beside it")
    labels("--read", action="store_true", help="replace FOLDER/labels.parquet by the filled sheet")
    labels("--split", default="test", choices=["train", "valid", "test"])
    labels("--sessions", type=int, default=200, help="the first ones of the split")

    return parser


if __name__ == "__main__":
    sys.exit(main())
