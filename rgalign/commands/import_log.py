"""The command `import`: a log becomes a data set folder and a params file, once the user has seen how."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from rgalign.data import import_log, tables
from rgalign.data.import_log import Asked, Plan
from rgalign.data.tables import TableError
from rgalign.params import ROOT
from rgalign.run import artifacts

RECIPE = "quickstart.yaml"  # the shipped params that the new ones extend


def import_command(options: argparse.Namespace) -> int:
    """Print what each column becomes; write DIR and its params file where the user agrees. Returns the exit status."""
    roles, kinds = _pairs(options.column, "--column ROLE=NAME"), _pairs(options.feature, "--feature NAME=KIND")
    folder = Path(options.folder)
    params_file = ROOT / "params" / f"{folder.resolve().name}.yaml"
    if params_file.exists():
        raise TableError(f"{params_file} is there already; expected none of this name: name another folder")
    log = import_log.read_log(Path(options.log))
    planned = import_log.plan(log, folder.resolve().name, Asked(roles, kinds, options.drop, options.time_unit))
    print(summary(planned))
    if not options.yes and not _agreed():
        given = ["python", "-m", "rgalign", "import", *sys.argv[2:], "--yes"]
        print("Nothing is written yet. --column, --feature and --drop change what a column becomes. If it is right:")
        print(f"\n  {shlex.join(given)}")
        return 0
    import_log.write(planned, folder)
    artifacts.write_text(params_file, params_of(planned, folder))
    for where, what in tables.check(folder).notes:
        print(f"note: {where}: {what}")
    shown = Path(artifacts.portable(params_file))
    print(f"{folder} and {shown} are written. Next:\n\n  python -m rgalign run {shown} --dry-run")
    print(f"  python -m rgalign run {shown}")
    return 0


def summary(planned: Plan) -> str:
    """What a terminal shows: the role of each column, what was mended, how many rows of what."""
    data = planned.dataset
    clicked = int(data.impressions["clicked"].sum())
    rows = f"{len(data.sessions):,} sessions, {len(data.intents):,} answers, {len(data.impressions):,} rows"
    rows += f", {clicked:,} clicks"
    if data.transcripts is not None:
        rows += f", {len(data.transcripts):,} typed questions"
    lines = [planned.columns.to_string(index=False, justify="left"), *(f"note: {each}" for each in planned.notes), rows]
    return "\n".join(lines)


def params_of(planned: Plan, folder: Path) -> str:
    """A params file that extends RECIPE: its rankers keep no settings that were found on the simulated shop."""
    path = artifacts.portable(folder.resolve())
    own = {"base": RECIPE, "data": {"source": "folder", "path": path}, "ranker": {"tuned": {}, "search": {"trials": 0}}}
    if planned.dataset.transcripts is None:  # a tiny LM without a typed question can only repeat the columns
        own["alignment"] = {"sft": {"use": False}, "dpo": {"use": False}}
    head = "# Made by `python -m rgalign import`. ranker.search.trials: 16 searches each model's settings on valid.\n"
    return head + yaml.safe_dump(own, sort_keys=False, allow_unicode=True)


def _agreed() -> bool:
    return sys.stdin.isatty() and input("Write it? [y/N] ").strip().lower() in ("y", "yes")


def _pairs(given: Sequence[str], form: str) -> dict[str, str]:
    wrong = [each for each in given if "=" not in each]
    if wrong:
        raise TableError(f"{', '.join(wrong)}: expected {form}")
    return dict(each.split("=", 1) for each in given)
