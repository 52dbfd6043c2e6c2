"""Runs side by side in one folder: a stage that another run has finished with the same of everything is taken over.

What is taken over is hard-linked where the disk can, copied where not. Links are safe because no artifact is ever
written in place: every output, executed notebook and HTML page is made under a temporary name that no run has linked
and renamed over the old name (artifacts.atomic), which parts that name from the file behind it; folders are replaced
whole. What is written in place (logs/, a stage's work/) is not taken over.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rgalign import artifacts, provenance
from rgalign.artifacts import ArtifactError
from rgalign.params import Params
from rgalign.plan import Stage, stage_params
from rgalign.stages import change_since, changed_file, write_params

SHARED = "shared_from"  # note in a manifest entry: the run whose notebook was executed


def neighbours(run: Path) -> list[Path]:
    """The other runs in the folder that a run lies in, by name."""
    return [path.parent for path in sorted(run.parent.glob(f"*/{artifacts.MANIFEST}")) if path.parent != run]


def twin(run: Path, stage: Stage, params: Params) -> Path | None:
    """The first neighbour that has finished this stage as it would be run here, every output unaltered; else None.

    As it would be run here: the same params of the stage, seed, inputs, code and package versions. Only a neighbour
    whose manifest agrees in what costs nothing to compare has its files read.
    """
    wanted, packages = stage_params(stage, params), provenance.versions()
    for other in neighbours(run):
        entry = _entry(other, stage)
        if entry is None or (entry["params"], entry.get("seed")) != (wanted, params.run.seed):
            continue
        if entry.get("packages") != packages or change_since(entry, run, stage, params):
            continue
        whole = all((other / page).is_file() for page in _pages(stage))
        if whole and changed_file(other, "output", entry["outputs"]) is None:
            return other
    return None


def take_over(run: Path, stage: Stage, params: Params, other: Path) -> None:
    """Make the outputs of a stage of `other` this run's own, its executed notebook and HTML page too.

    The manifest entry is written last, as when a stage runs: killed before, the stage has not run. Raises ArtifactError
    where an output turns out not to be what the manifest says.
    """
    entry = artifacts.read_manifest(other)["stages"][stage.name]
    write_params(run, params)
    shutil.rmtree(run / "figures" / stage.name, ignore_errors=True)  # of an earlier execution, with other params
    for name in (*entry["outputs"], *_pages(stage)):
        with artifacts.atomic(run / name) as temporary:
            _link(other / name, temporary)
            if name in entry["outputs"] and artifacts.digest(temporary) != entry["outputs"][name]:
                raise ArtifactError(f"{other / name} is not what its manifest says: run {stage.name} there again")
    artifacts.record_stage(run, stage.name, {**entry, SHARED: entry.get(SHARED, other.name)})


def _entry(run: Path, stage: Stage) -> Mapping[str, Any] | None:
    try:
        return artifacts.read_manifest(run)["stages"].get(stage.name)
    except ArtifactError:  # a neighbour's torn manifest is the neighbour's affair
        return None


def _pages(stage: Stage) -> tuple[str, str]:
    return f"notebooks/{stage.name}.ipynb", f"notebooks/{stage.name}.html"


def _link(source: Path, target: Path) -> None:
    """Hard-link a file, or every file of a folder; copy what cannot be linked (another disk, no links)."""
    if source.is_dir():
        target.mkdir()
        for inner in sorted(source.iterdir()):
            _link(inner, target / inner.name)
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
