"""The command line: python -m rgalign run | sweep | status | score | check | world | labels."""

import argparse
import os
import sys
from pathlib import Path

from rgalign import artifacts
from rgalign.params import ROOT, ParamsError, find, load, parse_assignments
from rgalign.rooms import World

DATASET = "tables/dataset"  # in a run directory


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run the command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except KeyboardInterrupt:
        print("\nStopped. Give the same command again to go on where it stood.", file=sys.stderr)
        return 130
    except Exception as error:
        if not isinstance(error, _expected_errors()):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1


def _expected_errors() -> tuple[type[Exception], ...]:
    """Errors whose message tells the user all there is to know; any other shows its traceback."""
    expected = [ParamsError, artifacts.ArtifactError, OSError]
    for module, name in (
        ("rgalign.pipeline", "StageFailed"),
        ("rgalign.data.tables", "TableError"),
        ("rgalign.data.labels", "LabelError"),
        ("rgalign.ranking", "ScoreError"),
        ("rgalign.reasoner.folder", "ReasonerError"),
    ):
        if module in sys.modules:
            expected.append(getattr(sys.modules[module], name))
    return tuple(expected)


def run_command(options: argparse.Namespace) -> int:
    """Execute the notebooks of a params file."""
    overrides = parse_assignments(options.set)
    if options.warm_start:
        last = Path(options.warm_start)
        overrides["run.warm_start"] = artifacts.portable(Path(os.path.abspath(last)) if last.is_dir() else ROOT / last)
    params = load(options.params, overrides)
    from rgalign import outside, pipeline

    run = Path(os.path.abspath(options.run_dir)) if options.run_dir else artifacts.run_directory("", options.params)
    if run.exists() and not run.is_dir():
        raise artifacts.ArtifactError(f"{run} is a file; expected a folder for the run: give another --run-dir")
    if params.data.path:
        artifacts.data_path(params.data.path)  # before a kernel starts, and in a dry run too
    outside.last_run(params, run)
    stages = pipeline.chosen(options.first, options.through)
    forced = options.force or options.first is not None
    if options.dry_run:
        table = pipeline.plan(run, params, stages, forced=forced)
        print(table.to_string(index=False))
        print(f"about {table.seconds.sum():.0f} s in all, in {run}")
        return 0
    parameters = {
        "params_file": artifacts.portable(find(options.params)),
        "run_dir": artifacts.portable(run),
        "overrides": overrides,
    }
    run.mkdir(parents=True, exist_ok=True)
    pipeline.execute(run, stages, parameters, params, forced=forced)
    print(f"results: {run / 'tables'}; read {run / 'notebooks' / stages[-1].name}.html")
    return 0


def sweep_command(options: argparse.Namespace) -> int:
    """Run each params file with each seed, then notebook 90 over all that has finished."""
    overrides = parse_assignments(options.set)
    from rgalign import pipeline, sweep

    out = Path(os.path.abspath(options.out)) if options.out else ROOT / "outputs" / "study"
    stages = pipeline.chosen(None, options.through)
    runs = sweep.runs_of(options.params, options.seeds, overrides, out)
    planned = sweep.plan(runs, stages)
    print(sweep.by_run(planned).to_string(index=False))
    print(f"{len(runs)} runs, about {planned.seconds.sum():.0f} s in all, in {out}")
    for note in sweep.notes(runs):
        print(f"note: {note}")
    if options.dry_run:
        return 0
    failures = sweep.execute(runs, stages, out)
    failures |= sweep.execute_study(runs, out)
    print(sweep.outcome(runs, failures).to_string(index=False))
    return 1 if failures else 0


def status_command(options: argparse.Namespace) -> int:
    """Print the state of each stage of a run."""
    from rgalign import pipeline

    run = Path(options.run) if Path(options.run).is_dir() else ROOT / options.run
    print(pipeline.status(run).to_string(index=False, na_rep="-"))
    return 0


def score_command(options: argparse.Namespace) -> int:
    """Rank the knowledge base for a table of sessions."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from rgalign.data.schema import to_frame
    from rgalign.score import load as load_scorer

    out = Path(options.out)
    if not Path(options.sessions).is_file():
        raise artifacts.ArtifactError(f"there is no file {options.sessions}; expected a .parquet of sessions")
    if out.exists() and out.samefile(options.sessions):
        raise artifacts.ArtifactError(f"--out {out} is the table of sessions itself: name another file")
    try:
        sessions = to_frame(pq.read_table(options.sessions))
    except pa.ArrowException as error:
        raise artifacts.ArtifactError(f"{options.sessions} cannot be read as parquet: {error}") from None
    scorer = load_scorer(options.run)
    ranked = scorer.score(sessions, top=options.top, progress=True)
    artifacts.write_table(out, ranked)
    print(f"{len(sessions):,} sessions, the best {options.top} of {len(scorer.ranking.kb):,} intents each: {out}")
    return 0


def check_command(options: argparse.Namespace) -> int:
    """List every fault of a data set folder."""
    from rgalign.data import tables

    report = tables.check(Path(options.folder))
    print(report)
    return 1 if report.faults else 0


def world_command(options: argparse.Namespace) -> int:
    """Write a ShopWorld as a data set folder."""
    assignments = parse_assignments(options.set)
    world_sizes = set(World.model_fields)
    overrides = {f"data.world.{key}" if key in world_sizes else key: value for key, value in assignments.items()}
    if "seed" in overrides:
        overrides["data.seed"] = overrides.pop("seed")
    data = load(options.params, {**overrides, "data.source": "shopworld"}).data
    from rgalign.data import tables, world

    dataset = world.generate(seed=data.seed, progress=True, **data.world.model_dump())
    tables.write(dataset, Path(options.folder))
    print(f"{len(dataset.sessions):,} sessions of ShopWorld {world.WORLD_VERSION}, seed {data.seed}: {options.folder}")
    return 0


def labels_command(options: argparse.Namespace) -> int:
    """Write a sheet for people to fill in, or read a filled one back into the data set or beside it in its run."""
    from rgalign.data import labels, tables

    folder = Path(options.folder) if Path(options.folder).exists() else ROOT / options.folder
    of_run = _is_run(folder)
    _refuse_inside_a_run(folder)
    dataset, target = (folder / DATASET if of_run else folder), folder / "labels.parquet"
    if of_run and not dataset.is_dir():
        raise artifacts.ArtifactError(f"{dataset} is not there: run 01_data first (python -m rgalign status {folder})")
    shop = tables.read(dataset, splits=("train", "valid", "test"))
    if options.read:
        found = labels.read_sheet(options.sheet, shop.sessions, shop.intents)
        labels.write_labels(target, found, dataset if of_run else None)
        print(f"{len(found):,} labels: {target}")
        return 0
    own = shop.sessions[shop.sessions.split == options.split].head(options.sessions)
    shown = _shown_in_prompts(folder if of_run else None, shop.meta)
    sheet, kb = labels.export_sheet(options.sheet, own, shop.intents, kinds=shop.kinds, features=shown)
    print(f"{len(own):,} sessions to label: {sheet}\nthe intents to choose from: {kb}")
    return 0


def _is_run(folder: Path) -> bool:
    return (folder / "params.yaml").is_file() and not (folder / "dataset.yaml").is_file()


def _refuse_inside_a_run(folder: Path) -> None:
    """An artifact of a stage must stay as the stage wrote it, or all that was made from it has to be made again."""
    from rgalign.data.labels import LabelError

    for run in folder.resolve().parents:
        if _is_run(run) and (run / artifacts.MANIFEST).is_file() and folder.resolve().is_relative_to(run / "tables"):
            raise LabelError(f"{folder} belongs to a run, which keeps its labels beside its tables: name {run}")


def _shown_in_prompts(run: Path | None, meta: dict) -> list[str]:
    """Feature columns that people may see: those that a prompt may show, by the run's params or else the data set's."""
    from rgalign.data.labels import LabelError
    from rgalign.reasoner.settings import shown_features

    settings, drop = {"features": None}, []
    if run is not None:
        params = load(run / "params.yaml")
        settings, drop = params.reasoner.model_dump(mode="json"), params.data.features.drop
    try:
        return shown_features(settings, meta, drop)
    except ValueError as error:
        raise LabelError(str(error)) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rgalign", description="RGAlign-Rec, stage by stage.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="execute the notebooks of a params file, in order")
    run.add_argument("params", help="for example params/quickstart.yaml")
    run.add_argument("--run-dir", help="default: outputs/<name of the params file>")
    run.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one parameter")
    run.add_argument(
        "--warm-start", metavar="RUN", help="go on from an aligned run, with newer logs (--run-dir as well)"
    )
    run.add_argument("--from", dest="first", metavar="STAGE", help="start here, whatever has run (for example 03)")
    run.add_argument("--through", metavar="STAGE", help="end here")
    run.add_argument("--force", action="store_true", help="run also what is unchanged")
    run.add_argument("--dry-run", action="store_true", help="say what would run and about how long")
    run.set_defaults(command=run_command)

    sweep = commands.add_parser("sweep", help="run params files with many seeds, then notebook 90 over all of them")
    sweep.add_argument("params", nargs="+", help="for example params/quickstart.yaml params/ablations/*.yaml")
    sweep.add_argument("--seeds", required=True, help="a count (5: seeds 0 to 4) or a list (5,6,8)")
    sweep.add_argument("--out", help="a folder of runs; default: outputs/study")
    sweep.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one parameter of all")
    sweep.add_argument("--through", metavar="STAGE", help="end here")
    sweep.add_argument("--dry-run", action="store_true", help="say what would run and about how long")
    sweep.set_defaults(command=sweep_command)

    status = commands.add_parser("status", help="state, seconds and memory of each stage of a run")
    status.add_argument("run", help="for example outputs/quickstart")
    status.set_defaults(command=status_command)

    score = commands.add_parser("score", help="rank the intents for a table of sessions with a finished run")
    score.add_argument("run", help="for example outputs/quickstart")
    score.add_argument("sessions", help="a .parquet with session_id and the feature columns that the run was made with")
    score.add_argument(
        "-o", "--out", required=True, help="the .parquet to write: session_id, rank, intent_id, title, score"
    )
    score.add_argument("--top", type=int, default=3, help="intents a session (default: 3)")
    score.set_defaults(command=score_command)

    check = commands.add_parser("check", help="list every fault of a data set folder")
    check.add_argument("folder")
    check.set_defaults(command=check_command)

    world = commands.add_parser("world", help="write a ShopWorld as a data set folder")
    world.add_argument("folder")
    world.add_argument("--params", default="params/quickstart.yaml", help="sizes are read from its data section")
    world.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="for example sessions=100000, seed=1"
    )
    world.set_defaults(command=world_command)

    labels = commands.add_parser("labels", help="write a labelling sheet, or read a filled one into labels.parquet")
    labels.add_argument("folder", help="a run (only notebook 09 runs again), or a data set (for the runs to come)")
    labels.add_argument("sheet", help="a .csv, with what a prompt may show; the intents are written beside it")
    labels.add_argument("--read", action="store_true", help="read the filled sheet into FOLDER/labels.parquet, anew")
    labels.add_argument("--split", default="test", choices=["train", "valid", "test"])
    labels.add_argument("--sessions", type=int, default=200, help="the first ones of the split")
    labels.set_defaults(command=labels_command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
