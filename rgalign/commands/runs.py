"""Commands over a finished run or its data (status, score, report, compare, labels), and `new`: a user's own folder."""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from rgalign.params import NEW_FOLDER, PACKAGE, ROOT, load_run
from rgalign.run import artifacts

DATASET = "tables/dataset"  # in a run directory


def print_results(run: Path) -> None:
    """Print a finished run's results, and write its report and model card."""
    from rgalign.report import pages

    paths = pages.write(run)
    results = pages.results_table(pages.read(run, "results"))
    print(results.rename(index=pages.MODELS, columns=pages.LABELS).round(4).to_string(na_rep=""))
    print(f"the same as a model card: {paths[1]}\nOpen: {clickable(paths[0])}")


def clickable(path: Path) -> str:
    """The path, which a terminal that knows links opens at a click."""
    path = path.resolve()
    return f"\033]8;;{path.as_uri()}\033\\{path}\033]8;;\033\\" if sys.stdout.isatty() else str(path)


def status_command(options: argparse.Namespace) -> int:
    from rgalign.commands import pipeline

    table, line = pipeline.status(run_of(options.run))
    print(f"{table.to_string(index=False, na_rep='-')}\n{line}")
    return 0


def score_command(options: argparse.Namespace) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from rgalign.data.schema import to_frame
    from rgalign.serve import load as load_scorer

    out = Path(options.out)
    if not Path(options.sessions).is_file():
        raise artifacts.ArtifactError(f"there is no file {options.sessions}; expected a .parquet of sessions")
    if out.is_dir():
        raise artifacts.ArtifactError(f"--out {out} is a folder; expected the .parquet to write")
    if out.exists() and out.samefile(options.sessions):
        raise artifacts.ArtifactError(f"--out {out} is the table of sessions itself: name another file")
    try:
        sessions = to_frame(pq.read_table(options.sessions))
    except pa.ArrowException as error:
        raise artifacts.ArtifactError(f"{options.sessions} cannot be read as parquet: {error}") from None
    scorer = load_scorer(options.run)
    artifacts.write_table(out, scorer.score(sessions, top=options.top, progress=True))
    print(f"{len(sessions):,} sessions, the best {options.top} of {len(scorer.ranking.kb):,} intents each: {out}")
    return 0


def report_command(options: argparse.Namespace) -> int:
    print_results(run_of(options.run))
    return 0


def compare_command(options: argparse.Namespace) -> int:
    from rgalign.commands import compare

    runs = [run_of(run) for run in options.runs]
    print(compare.side_by_side(runs).round(4).to_string(na_rep=""))
    if len(found := compare.paired(runs)):
        print(
            f"\nGAUC minus that of {found.against[0]}, on the same test sessions (95 %, users sampled again;\n"
            "p_holm: the p-value adjusted for these rows):"
        )
        print(found.drop(columns="against").round(4).to_string(index=False))
    return 0


def run_of(given: str) -> Path:
    """A run directory, as given or below the project's root. Raises ArtifactError where there is none."""
    run = Path(given) if Path(given).is_dir() else ROOT / given
    if not run.is_dir():
        raise artifacts.ArtifactError(f"no run in {given}; start one: python -m rgalign run PARAMS")
    return run


def labels_command(options: argparse.Namespace) -> int:
    from rgalign.data import labels, tables
    from rgalign.reasoner.prompts import shown_features

    folder = Path(options.folder) if Path(options.folder).exists() else ROOT / options.folder
    of_run = _is_run(folder)
    for run in (place := Path(os.path.realpath(folder))).parents:  # Path.resolve fails on a link that leads to itself
        if _is_run(run) and (run / artifacts.MANIFEST).is_file() and place.is_relative_to(run / "tables"):
            # an artifact must stay as its stage wrote it, or all that was made from it has to be made again
            raise labels.LabelError(f"{folder} belongs to a run, which keeps its labels beside its tables: name {run}")
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
    named, drop = None, []
    if of_run:
        params = load_run(folder)
        named, drop = params.reasoner.features, params.data.features.drop
    try:  # people may see what a prompt may show
        shown = shown_features(named, shop.meta, drop)
    except ValueError as error:
        raise labels.LabelError(str(error)) from None
    sheet, kb = labels.export_sheet(options.sheet, own, shop.intents, kinds=shop.kinds, features=shown)
    print(f"{len(own):,} sessions to label: {sheet}\nthe intents to choose from: {kb}")
    return 0


def _is_run(folder: Path) -> bool:
    return (folder / "params.yaml").is_file() and not (folder / "dataset.yaml").is_file()


# A user's own folder with notebooks and params, so that an installed package alone is useful.

SHIPPED = Path(__file__).parents[1] / "shipped"  # in a wheel: put there by setup.py


def new_command(options: argparse.Namespace) -> int:
    folder = Path(options.folder)
    print(f"{make(folder)} notebooks, the params and docs: {folder}\n\n  cd {folder}")
    print("  python -m rgalign run params/quickstart.yaml   # a simulated shop; your own logs: docs/own-logs.md")
    print("  jupyter lab --LabApp.default_url=/lab/tree/notebooks/00_tour.ipynb")
    return 0


def make(folder: Path) -> int:
    """Copy notebooks, without their outputs, params and docs into a folder; returns the number of notebooks.

    Raises ArtifactError where the folder is not empty. Where copying fails, a full disk say, nothing of it stays.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise artifacts.ArtifactError(f"{folder} is not empty; expected a new folder: give another name")
    source = SHIPPED if SHIPPED.is_dir() else PACKAGE
    try:
        for path in sorted((source / "notebooks").glob("*.ipynb")):
            notebook = json.loads(path.read_text(encoding="utf-8"))
            for cell in notebook["cells"]:
                if cell["cell_type"] == "code":
                    cell |= {"outputs": [], "execution_count": None}
            text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
            artifacts.write_text(folder / "notebooks" / path.name, text)
        shutil.copytree(source / "params", folder / "params")
        for path in sorted([*source.glob("benchmarks/*.py"), *source.glob("docs/*.md")]):
            artifacts.write_text(folder / path.relative_to(source), path.read_text(encoding="utf-8"))
        return len(list((folder / "notebooks").glob("*.ipynb")))
    except BaseException:
        for name in ("notebooks", "params", "docs", "benchmarks"):
            shutil.rmtree(folder / name, ignore_errors=True)
        raise


def refuse_without_notebooks() -> None:
    """Raises ArtifactError where there is no notebook to run."""
    if not (ROOT / "notebooks").is_dir():
        raise artifacts.ArtifactError(f"no notebooks/ in {ROOT} nor above it; {NEW_FOLDER}")
