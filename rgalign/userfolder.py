"""A user's own folder: the notebooks and params, so that an installed package alone is useful."""

import argparse
import json
import shutil
from pathlib import Path

from rgalign import artifacts
from rgalign.params import NEW_FOLDER, PACKAGE, ROOT

COPIED = ("notebooks", "params", "docs", "benchmarks")
SHIPPED = Path(__file__).parent / "shipped"  # in a wheel: put there by setup.py


def new_command(options: argparse.Namespace) -> int:
    """Make a folder of one's own."""
    folder = Path(options.folder)
    made = make(folder)
    print(f"{made} notebooks, the params and docs: {folder}\n\n  cd {folder}")
    print("  python -m rgalign run params/quickstart.yaml   # a simulated shop; your own logs: docs/own-logs.md")
    print("  jupyter lab notebooks")
    return 0


def make(folder: Path) -> int:
    """Copy notebooks, without their outputs, params and docs into a folder; returns the number of notebooks.

    Raises ArtifactError where the folder is not empty: what a user has written must not be overwritten. Where copying
    fails, a full disk say, nothing of it stays: the same command can be given again.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise artifacts.ArtifactError(f"{folder} is not empty; expected a new folder: give another name")
    try:
        return _copy(SHIPPED if SHIPPED.is_dir() else PACKAGE, folder)
    except BaseException:
        for name in COPIED:
            shutil.rmtree(folder / name, ignore_errors=True)
        raise


def _copy(source: Path, folder: Path) -> int:
    notebooks = sorted((source / "notebooks").glob("*.ipynb"))
    for path in notebooks:
        notebook = without_outputs(json.loads(path.read_text(encoding="utf-8")))
        text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
        artifacts.write_text(folder / "notebooks" / path.name, text)
    shutil.copytree(source / "params", folder / "params")
    for path in sorted((source / "benchmarks").glob("*.py")):
        artifacts.write_text(folder / "benchmarks" / path.name, path.read_text(encoding="utf-8"))
    for path in sorted((source / "docs").glob("*.md")):
        artifacts.write_text(folder / "docs" / path.name, path.read_text(encoding="utf-8"))
    return len(notebooks)


def without_outputs(notebook: dict) -> dict:
    """The same notebook as if no cell had run."""
    cleared = {"outputs": [], "execution_count": None}
    cells = [cell | cleared if cell["cell_type"] == "code" else cell for cell in notebook["cells"]]
    return notebook | {"cells": cells}


def refuse_without_notebooks() -> None:
    """Raises ArtifactError where there is no notebook to run."""
    if not (ROOT / "notebooks").is_dir():
        raise artifacts.ArtifactError(f"no notebooks/ in {ROOT} nor above it; {NEW_FOLDER}")
