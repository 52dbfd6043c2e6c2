"""The command `import`: a log becomes a data set folder and a params file, once the user has seen how."""

import argparse
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from rgalign.commands.runs import refuse_without_notebooks
from rgalign.data import import_log, tables
from rgalign.data.import_log import Asked, Plan
from rgalign.data.log_files import read_log
from rgalign.data.tables import TableError
from rgalign.params import ROOT
from rgalign.run import artifacts

RECIPE = "quickstart.yaml"  # the shipped params that the new ones extend


def import_command(options: argparse.Namespace) -> int:
    """Print what each column becomes; write DIR and its params file where the user agrees. Returns the exit status."""
    roles, kinds = _pairs(options.column, "--column ROLE=NAME"), _pairs(options.feature, "--feature NAME=KIND")
    refuse_without_notebooks()
    folder = Path(options.folder)
    params_file = ROOT / "params" / f"{folder.resolve().name}.yaml"
    if there := [path for path in (folder, params_file) if path.exists() or path.is_symlink()]:
        names = " and ".join(map(str, there))
        raise TableError(f"{names} is already there; expected neither: name another folder. Nothing was written")
    log = read_log(Path(options.log))
    planned = import_log.plan(
        log, folder.resolve().name, Asked(roles, kinds, options.drop, options.time_unit, options.time_format)
    )
    print(summary(planned))
    if not options.yes and not _agreed():
        given = ["python", "-m", "rgalign", "import", *_flags(options), "--yes"]
        print("Nothing is written yet. --column, --feature and --drop change what a column becomes. If it is right:")
        print(f"\n  {shlex.join(given)}")
        return 0
    import_log.write(planned, folder)
    try:
        artifacts.write_text(params_file, params_of(planned, folder))
    except BaseException:
        shutil.rmtree(folder)
        raise
    for where, what in tables.check(folder).notes:
        print(f"note: {where}: {what}")
    shown = Path(artifacts.portable(params_file))
    data, params = shlex.quote(str(folder)), shlex.quote(str(shown))
    print(f"{folder} and {shown} are written. Next:\n\n  python -m rgalign check {data}")
    print(f"  python -m rgalign run {params} --dry-run\n  python -m rgalign run {params}")
    return 0


def summary(planned: Plan) -> str:
    """What a terminal shows: the role of each column, what was mended, how many rows of what."""
    data = planned.dataset
    clicked = int(data.impressions["clicked"].sum())
    rows = f"{len(data.sessions):,} sessions, {len(data.intents):,} answers, {len(data.impressions):,} rows"
    rows += f", {clicked:,} clicks"
    if data.transcripts is not None:
        rows += f", {len(data.transcripts):,} typed questions"
    width = max(map(len, planned.columns["column"]))
    lines = [f"{column:<{width}}  {becomes}" for column, becomes in planned.columns.itertuples(index=False)]
    lines = [f"{'column':<{width}}  becomes", *lines, *(f"note: {each}" for each in planned.notes), rows]
    return import_log.printable("\n".join(lines))


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


def _flags(options: argparse.Namespace) -> list[str]:
    """The words of the command after its name."""
    words = [options.log, options.folder]
    for flag in ("column", "feature", "drop"):
        words += [word for value in getattr(options, flag) for word in (f"--{flag}", value)]
    for flag in ("time_unit", "time_format"):
        words += [f"--{flag.replace('_', '-')}", value] if (value := getattr(options, flag)) else []
    return words


def _pairs(given: Sequence[str], form: str) -> dict[str, str]:
    wrong = [each for each in given if "=" not in each]
    if wrong:
        raise TableError(f"{', '.join(wrong)}: expected {form}")
    return dict(each.split("=", 1) for each in given) if "ROLE" in form else dict(each.rsplit("=", 1) for each in given)
