"""The command line: python -m rgalign new | run | sweep | status | score | report | compare | check | world | .."""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    """Execute the notebooks of a params file."""
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
        print(table.to_string(index=False))
        print(f"about {table.seconds.sum():.0f} s in all, in {run}")
        print(estimate.describe(params, options.card))
        return 0
    if params.reasoner.model != "tiny":
        print(estimate.describe(params, options.card), flush=True)
    parameters = {
        "params_file": artifacts.portable(find(options.params)),
        "run_dir": artifacts.portable(run),
        "overrides": overrides,
    }
    run.mkdir(parents=True, exist_ok=True)
    pipeline.execute(run, stages, parameters, params, forced=forced)
    print(f"results: {run / 'tables'}; read {run / 'notebooks' / stages[-1].name}.html")
    if EVALUATION in [stage.name for stage in stages]:
        run_folders.print_results(run)
    return 0


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
    """List every fault of a data set folder."""
    from rgalign.data import tables

    report = tables.check(Path(options.folder))
    print(report)
    return 1 if report.errors else 0


def world_command(options: argparse.Namespace) -> int:
    """Write a ShopWorld as a data set folder."""
    assignments = parse_assignments(options.set)
    world_sizes = set(World.model_fields)
    overrides = {f"data.world.{key}" if key in world_sizes else key: value for key, value in assignments.items()}
    if "seed" in overrides:
        overrides["data.seed"] = overrides.pop("seed")
    data = load(options.params, {**overrides, "data.source": "shopworld"}).data
    from rgalign.data import tables
    from rgalign.shopworld import world

    what = f"sessions of ShopWorld {data.world.version}"
    if options.shards:
        from rgalign.shopworld.shards import write_world

        write_world(Path(options.folder), seed=data.seed, progress=True, **data.world.model_dump())
        print(f"{data.world.sessions:,} {what}: {options.folder}")
        return 0
    dataset = world.generate(seed=data.seed, progress=True, **data.world.model_dump())
    tables.write(dataset, Path(options.folder))
    print(f"{len(dataset.sessions):,} {what}, seed {data.seed}: {options.folder}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rgalign", description="RGAlign-Rec, stage by stage.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    new = commands.add_parser("new", help="make a folder of your own with the notebooks and params")
    new.add_argument("folder", metavar="DIR", help="a folder that does not exist yet, or is empty")
    new.set_defaults(command=run_folders.new_command)

    run = commands.add_parser("run", help="execute the notebooks of a params file, in order")
    run.add_argument("params", help="for example params/quickstart.yaml")
    run.add_argument("--run-dir", help="default: outputs/<name of the params file>")
    run.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one parameter")
    run.add_argument(
        "--warm-start", metavar="RUN", help="continue from an aligned run, with newer logs (needs --run-dir)"
    )
    run.add_argument("--from", dest="first", metavar="STAGE", help="start here, whatever has run (for example 03)")
    run.add_argument("--through", metavar="STAGE", help="end here")
    run.add_argument("--force", action="store_true", help="run also what is unchanged")
    run.add_argument("--dry-run", action="store_true", help="say what would run and about how long")
    run.add_argument("--launcher", metavar="COMMAND", help='several processes: "torchrun --nproc_per_node 4"')
    run.add_argument("--card", help="estimate for this card (H100, A100, ..) instead of the one that is here")
    run.set_defaults(command=run_command)

    sweep = commands.add_parser("sweep", help="run params files with many seeds, then notebook 90 over all of them")
    sweep.add_argument("params", nargs="+", help="for example params/quickstart.yaml params/ablations/*.yaml")
    sweep.add_argument("--seeds", required=True, help="a count (5: seeds 0 to 4) or a list (5,6,8)")
    sweep.add_argument("--out", help="a folder of runs; default: outputs/study")
    sweep.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one parameter of all")
    sweep.add_argument("--through", metavar="STAGE", default="09", help="end here (default: 09, which a study reads)")
    sweep.add_argument(
        "--scheduler", metavar="tcp://HOST:PORT", help="a dask scheduler, whose workers run it all at once"
    )
    sweep.add_argument("--dry-run", action="store_true", help="say what would run and about how long")
    sweep.set_defaults(command=sweep_command)

    status = commands.add_parser("status", help="state, seconds and memory of each stage of a run")
    status.add_argument("run", help="for example outputs/quickstart")
    status.set_defaults(command=run_folders.status_command)

    score = commands.add_parser("score", help="rank the intents for a table of sessions with a finished run")
    score.add_argument("run", help="for example outputs/quickstart")
    score.add_argument("sessions", help="a .parquet with session_id and the feature columns that the run was made with")
    score.add_argument(
        "-o", "--out", required=True, help="the .parquet to write: session_id, rank, intent_id, title, score"
    )
    score.add_argument("--top", type=int, default=3, help="intents a session (default: 3)")
    score.set_defaults(command=run_folders.score_command)

    report = commands.add_parser("report", help="write report.html and model_card.md of a run again")
    report.add_argument("run", help="for example outputs/quickstart")
    report.set_defaults(command=run_folders.report_command)

    compare = commands.add_parser("compare", help="results of several runs side by side, paired where they can be")
    compare.add_argument("runs", nargs="+", metavar="RUN")
    compare.set_defaults(command=run_folders.compare_command)

    check = commands.add_parser("check", help="list every fault of a data set folder")
    check.add_argument("folder")
    check.set_defaults(command=check_command)

    world = commands.add_parser("world", help="write a ShopWorld as a data set folder")
    world.add_argument("folder")
    world.add_argument("--params", default="params/quickstart.yaml", help="sizes are read from its data section")
    world.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="for example sessions=100000, seed=1"
    )
    world.add_argument("--shards", action="store_true", help="many files, in little memory: for millions of sessions")
    world.set_defaults(command=world_command)

    labels = commands.add_parser("labels", help="write a labelling sheet, or read a filled one into labels.parquet")
    labels.add_argument("folder", help="a run (only notebook 09 runs again), or a data set (for the runs to come)")
    labels.add_argument("sheet", help="a .csv, with what a prompt may show; the intents are written beside it")
    labels.add_argument("--read", action="store_true", help="replace FOLDER/labels.parquet by the filled sheet")
    labels.add_argument("--split", default="test", choices=["train", "valid", "test"])
    labels.add_argument("--sessions", type=int, default=200, help="the first ones of the split")
    labels.set_defaults(command=run_folders.labels_command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
