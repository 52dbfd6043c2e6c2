"""A notebook's stage (declared in plan.py) while it runs, and whether a stage must run.

A notebook opens its stage, reads and writes through it, and ends it with `finish`, which writes the manifest entry."""

import datetime
import difflib
import itertools
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from threadpoolctl import threadpool_limits

from rgalign.errors import UserError
from rgalign.params import Params, dump, flat, load, load_run
from rgalign.run import artifacts, external_inputs, locks, notebook_files
from rgalign.run.artifacts import ArtifactError
from rgalign.run.plan import EVALUATION, STAGES, Stage, maker, needed, reads_of, stage_params

FIRST = "has not run"  # the reason of a stage's first execution
SHOWN = 3  # changed params and files named in a reason to run
PARAMETERS = ("params_file", "run_dir", "overrides")  # the whole of a notebook's parameters cell
SHIPPED = "params/quickstart.yaml"  # what the shipped notebooks' parameters cells name
OWN_PARAMS = "RGALIGN_PARAMS"  # environment variable: what notebooks opened by hand take in its place


def reason_to_run(run: Path, stage: Stage, params: Params) -> str | None:
    """Why a stage must run, or None where params, inputs, code and outputs are those of its manifest entry."""
    entry = artifacts.read_manifest(run)["stages"].get(stage.name)
    if entry is None:
        return FIRST
    return change_since(entry, run, stage, params) or changed_file(run, "output", entry["outputs"])


def change_since(entry: Mapping[str, Any], run: Path, stage: Stage, params: Params) -> str | None:
    """What has changed for a stage in `run` since `entry` was written, in this or another run: params, code, inputs.
    None where all are the same, so that its outputs would be too."""
    if changes := params_changes(entry["params"], stage_params(stage, params)):
        return f"params changed: {changes}"
    if changed := [name for name, was in entry["code"].items() if artifacts.code_digest(name) != was]:
        more = [f"and {len(changed) - SHOWN} more"] if len(changed) > SHOWN else []
        return f"code changed: {', '.join([*changed[:SHOWN], *more])}"
    new = [name for name in stage.given if name not in entry["inputs"] and (run / name).exists()]
    return f"input {', '.join(new)} is new" if new else changed_file(run, "input", entry["inputs"])


def changed_file(run: Path, kind: str, digests: Mapping[str, str]) -> str | None:
    """'output models/rankers changed' (or is missing) for the first of these that is; None where all are as they were.
    kind: input or output, for the message."""
    for name, was in digests.items():
        path = external_inputs.located(run, name)
        if path is None or not path.exists():
            return f"{kind} {name} is missing"
        if external_inputs.digest(name, path) != was:
            return f"{kind} {name} changed"
    return None


def params_changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """'ranker.seeds [0] -> [1]' for the first leaves that differ, and how many more; empty where none does."""
    keys = [key for key in sorted({*was, *now}) if was.get(key) != now.get(key)]
    changes = [f"{key} {was.get(key)} -> {now.get(key)}" for key in keys[:SHOWN]]
    return "; ".join(changes + ([f"and {len(keys) - SHOWN} more"] if len(keys) > SHOWN else []))


@dataclass
class OpenStage:
    """A stage while its notebook runs."""

    stage: Stage
    run: Path
    params: Params
    inputs: dict[str, str]
    code: dict[str, str]  # as it was when the stage opened: an edit while it runs is not what ran
    started: datetime.datetime
    figures: list[str] = field(default_factory=list)
    clock: float = field(default_factory=time.perf_counter)

    def path(self, artifact: str) -> Path:
        """Where a declared input or output lies."""
        return self._declared(artifact, (*self.stage.reads, *self.stage.writes), f"that it reads {artifact}")

    def given(self, artifact: str) -> Path | None:
        """Where an optional input that users may add lies; None where it was not there when the stage opened."""
        path = self._declared(artifact, self.stage.given, f"{artifact} as optional")
        return path if artifact in self.inputs else None

    def _declared(self, artifact: str, declared: tuple[str, ...], what: str) -> Path:
        if artifact not in declared:
            raise ArtifactError(f"{self.stage.name} does not declare {what} (rgalign/run/plan.py)")
        return self.run / artifact

    def read(self, artifact: str) -> pd.DataFrame:
        """A declared parquet table."""
        return pd.read_parquet(self.path(artifact))

    def use_data(self) -> Path:
        """The data outside the run directory that `data.path` names; its digest goes into the manifest."""
        path = artifacts.data_path(str(self.params.data.path))
        self.inputs[f"{external_inputs.DATA}{self.params.data.path}"] = artifacts.digest(path)
        return path

    def last(self, artifact: str) -> Path | None:
        """An artifact of the run that this one continues (run.warm_start), or None; its digest goes into the manifest.
        Raises ArtifactError as `external_inputs.last_run` does, and where the artifact was altered since."""
        last = external_inputs.last_run(self.params, self.run)
        if last is None:
            return None
        name, made_by = f"{external_inputs.LAST}{self.params.run.warm_start}/{artifact}", maker(artifact).name
        path = last / artifact
        was = artifacts.read_manifest(last)["stages"].get(made_by, {"outputs": {}})["outputs"].get(artifact)
        self.inputs[name] = artifacts.digest(path) if path.exists() else "missing"
        if self.inputs[name] != was:
            raise ArtifactError(f"{path} was altered after {made_by} wrote it: run it again in {last.name}")
        return path

    def use(self, file: str) -> Path:
        """A file of a run below this one (a study's folder holds runs); its digest goes into the manifest."""
        self.inputs[file] = artifacts.digest(self.run / file)
        return self.run / file

    def writing(self, artifact: str) -> AbstractContextManager[Path]:
        """A temporary path for a declared output; renamed when the block ends well."""
        return artifacts.atomic(self._declared(artifact, self.stage.writes, f"that it writes {artifact}"))

    def write(self, artifact: str, frame: pd.DataFrame) -> None:
        """Write a declared parquet table."""
        artifacts.write_table(self._declared(artifact, self.stage.writes, f"that it writes {artifact}"), frame)

    @property
    def seconds(self) -> float:
        """Since the stage was opened."""
        return round(time.perf_counter() - self.clock, 1)

    @property
    def work(self) -> Path:
        """A folder for what a killed stage resumes from; removed when the stage finishes."""
        return self.run / "work" / self.stage.name

    def figure(self, name: str, figure: Figure) -> Figure:
        """Save a figure as figures/<stage>/<name>.png and return it, so that the notebook shows it."""
        self.figures.append(f"figures/{self.stage.name}/{name}.png")
        with artifacts.atomic(self.run / self.figures[-1]) as temporary:
            metadata = {"Software": None, "Description": described(figure)}
            figure.savefig(temporary, format="png", dpi=120, metadata=metadata)
        return figure

    def finish(self) -> None:
        """Check that every declared output is there, write the manifest entry, and say so in a line.
        Raises ArtifactError naming all outputs that are missing."""
        if missing := [name for name in self.stage.writes if not (self.run / name).exists()]:
            raise ArtifactError(f"{self.stage.name} ends without {', '.join(missing)}: run its cells in order")
        outputs = [*self.stage.writes, *sorted(set(self.figures))]
        shutil.rmtree(self.work, ignore_errors=True)
        for stale in set((self.run / "figures" / self.stage.name).glob("*.png")) - {self.run / f for f in outputs}:
            stale.unlink()  # of an earlier execution, with other params
        entry = {
            "started": self.started.isoformat(timespec="seconds"),
            "seconds": self.seconds,
            "peak_memory_mb": artifacts.peak_memory_mb(),
            "device": artifacts.device_name(),
            "seed": self.params.run.seed,
            "params": stage_params(self.stage, self.params),
            "inputs": self.inputs,
            "outputs": {name: artifacts.digest(self.run / name) for name in outputs},
            "code": {**artifacts.code_in_use(self.stage.name), **self.code},
            "packages": artifacts.versions(),
        }
        artifacts.record_stage(self.run, self.stage.name, entry)
        locks.release_stage(self.run)
        tables, figures = len(self.stage.writes), len(outputs) - len(self.stage.writes)
        print(f"{self.stage.name} is done: {tables} tables or models and {figures} figures are in {self.run.name}/")


def described(figure: Figure) -> str:
    """What a figure shows, in words, for those who cannot see it: each panel's title, axes and legend."""
    panels = []
    for axes in figure.axes:
        labels = [label for label in (axes.get_ylabel(), axes.get_xlabel()) if label]
        legend = axes.get_legend_handles_labels()[1]
        panel = ": ".join(part for part in (axes.get_title(), " against ".join(labels)) if part)
        panels.append(panel + (f" ({', '.join(legend)})" if panel and legend else ""))
    return "; ".join(panel.replace("\n", " ") for panel in panels if panel)


def open_stage(
    name: str, params_file: str | Path, run_dir: str | Path = "", overrides: Mapping[str, Any] | None = None
) -> OpenStage:
    """Check params and inputs of a stage and open it. Called by the notebook's second code cell.

    Raises ParamsError for faults in the params, ArtifactError where an input is missing, was altered, or was made
    with other params (the message says which notebook to run), and where a notebook that no run has started would
    change the params of a finished run (the message says how to copy it).
    """
    injected = _refuse_unknown_parameters()
    own = os.environ.get(OWN_PARAMS)
    if own and str(params_file) == SHIPPED and "params_file" not in injected:
        print(f"params: {own} ({OWN_PARAMS})")
        params_file = own
    stage = STAGES[name]
    params = load(params_file, overrides)
    if not needed(stage, params):
        raise ArtifactError(f"{name} is not part of this run: alignment.loop.rounds is 0; set it to 1 or more")
    run = artifacts.run_directory(run_dir, params_file)
    artifacts.refuse_no_folder(run, "the run: give another run_dir")
    run.mkdir(parents=True, exist_ok=True)
    if stage.writes:
        locks.hold_stage(run, name)
    try:
        if not locks.of_this_run(run):
            _refuse_other_params(run, params, overrides or {})
        artifacts.sweep(*(run / name for name in stage.writes))
        command = f"python -m rgalign run {params_file}" + (f" --run-dir {run_dir}" if str(run_dir) else "")
        inputs = _checked_inputs(run, stage, params, command)
    except UserError:
        locks.release_stage(run)  # what the message advises needs it
        raise
    if stage.models:
        inputs |= external_inputs.models(params)
    write_params(run, params)
    import torch  # late: a wrong parameter should not wait two seconds for it

    torch.set_num_threads(params.run.threads)  # threads change the last bits of sums
    threadpool_limits(params.run.threads)
    code = artifacts.code_in_use(stage.name)
    return OpenStage(stage, run, params, inputs, code, datetime.datetime.now(datetime.UTC))


def _refuse_other_params(run: Path, params: Params, overrides: Mapping[str, Any]) -> None:
    """Raises ArtifactError where a run has its results already and these params are not those it was made with."""
    if EVALUATION not in artifacts.read_manifest(run)["stages"]:
        return
    changes = params_changes(flat(load_run(run)), flat(params))
    if not changes:
        return
    new = next(name for number in itertools.count(2) if not (name := run.with_name(f"{run.name}-{number}")).exists())
    values = [f"--set {shlex.quote(f'{key}={json.dumps(value)}')}" for key, value in overrides.items()]
    raise ArtifactError(
        f"{artifacts.portable(run)} is finished, and was made with other params ({changes}). A notebook opened by hand "
        "does not change them: its models and its params would no longer agree. Try them in a copy:\n"
        f"  python -m rgalign fork {artifacts.portable(run)} {new.name} {' '.join(values) or '--set KEY=VALUE'}\n"
        f'and then here: params_file = "{artifacts.portable(new / "params.yaml")}", run_dir = "", overrides = {{}}'
    )


def write_params(run: Path, params: Params) -> None:
    """Write a run's resolved params.yaml, unless it is the same already."""
    text, path = dump(params), run / "params.yaml"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        artifacts.write_text(path, text)


def _checked_inputs(run: Path, stage: Stage, params: Params, command: str) -> dict[str, str]:
    """Digest of each input. Raises ArtifactError for inputs that are missing, altered or of other params, and names
    the command that makes them all."""
    entries = artifacts.read_manifest(run)["stages"]
    faults, inputs = [], {name: artifacts.digest(run / name) for name in stage.given if (run / name).exists()}
    for name in reads_of(stage, params):
        made_by = maker(name)
        entry = entries.get(made_by.name)
        if entry is None or not (run / name).exists():
            faults.append(f"{name} is not there: run {made_by.name}.ipynb first")
            continue
        inputs[name] = artifacts.digest(run / name)
        if inputs[name] != entry["outputs"].get(name):
            faults.append(f"{name} was altered after {made_by.name} wrote it: run {made_by.name}.ipynb again")
        if changes := params_changes(entry["params"], stage_params(made_by, params)):
            faults.append(f"{name} was made by {made_by.name} with other params ({changes}): run it again")
    if faults:
        lines = "\n".join(f"  {fault}" for fault in dict.fromkeys(faults))
        raise ArtifactError(
            f"{stage.name} cannot start in {run.name}/:\n{lines}\nOr all at once: {command} --through {stage.name[:2]}"
        )
    return inputs


def _refuse_unknown_parameters() -> set[str]:
    """What papermill gave. Raises ArtifactError for a misspelt `-p` name and for a lost `parameters` tag: papermill
    only warns of these, and runs with the cell's defaults."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    cells, injected = shell.user_ns.get("In", []) if shell else [], set()
    for place, source in enumerate(cells):
        if not source.startswith("# Parameters"):  # the line papermill puts on top of what it injects
            continue
        given = notebook_files.assigned(source)
        injected |= given
        for name in sorted(given - set(PARAMETERS)):
            near = difflib.get_close_matches(name, PARAMETERS, 1) or [", ".join(PARAMETERS)]
            raise ArtifactError(f"{name} is not a parameter of this notebook; did you mean {near[0]}?")
        parts = (cells[:place], cells[place + 1 :])
        before, after = (set().union(*map(notebook_files.assigned, part)) for part in parts)
        if lost := sorted((given & after) - before):
            raise ArtifactError(
                f"the notebook assigns {', '.join(lost)} below what papermill was given, which then has no effect: tag "
                "the cell that assigns it `parameters` again"
            )
    return injected
