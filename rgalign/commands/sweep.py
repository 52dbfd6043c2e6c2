"""Many runs: each params file with each seed, one after the other, or at once by the workers of a dask scheduler.

A run that fails does not stop the rest. The same command goes on where it stood. OUT/sweep.json says what was run.
Runs in one folder share stages: one that a sibling run has finished with the same params, seed, inputs, code and
packages is copied from it, hard-linked where the disk can: no artifact is written in place (artifacts.atomic).
"""

import datetime
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from rgalign.commands import estimate, pipeline, study
from rgalign.commands.pipeline import Kernels
from rgalign.params import ROOT, Params, ParamsError, find, load, load_run
from rgalign.run import artifacts, locks
from rgalign.run.artifacts import ArtifactError
from rgalign.run.plan import STAGES, Stage, maker, needed, reads_of, stage_params
from rgalign.run.stages import FIRST, change_since, changed_file, reason_to_run, write_params

CONNECT = 20  # seconds for a dask scheduler to answer
SHARED = "shared_from"  # note in a manifest entry: the run whose notebook was executed


def sibling_runs(run: Path) -> list[Path]:
    return [path.parent for path in sorted(run.parent.glob(f"*/{artifacts.MANIFEST}")) if path.parent != run]


def find_cached_stage(run: Path, stage: Stage, params: Params) -> Path | None:
    """The first sibling run that has finished this stage as it would be run here, every output unaltered; else None.

    Files are read last, of a run whose manifest agrees in all that costs nothing to compare.
    """
    wanted = stage_params(stage, params), params.run.seed, artifacts.versions()
    for other in sibling_runs(run):
        entry = _entries(other).get(stage.name)
        if entry is None or (entry["params"], entry.get("seed"), entry.get("packages")) != wanted:
            continue
        if change_since(entry, run, stage, params) or changed_file(other, "output", entry["outputs"]):
            continue
        if all((other / page).is_file() for page in _pages(stage)):
            return other
    return None


def copy_stage(run: Path, stage: Stage, params: Params, other: Path) -> None:
    """Copy the outputs and pages of a stage of `other` into this run, its manifest entry last. A page is never linked:
    somebody may edit the executed notebook, and a notebook run by hand has none.

    Raises ArtifactError where an output turns out not to be what the manifest says.
    """
    entry = artifacts.read_manifest(other)["stages"][stage.name]
    write_params(run, params)
    shutil.rmtree(run / "figures" / stage.name, ignore_errors=True)  # of an earlier execution, with other params
    for name in (*entry["outputs"], *(page for page in _pages(stage) if (other / page).is_file())):
        link = _link if name in entry["outputs"] else shutil.copyfile
        with artifacts.atomic(run / name) as temporary:
            if (other / name).is_dir():
                shutil.copytree(other / name, temporary, copy_function=link)
            else:
                link(other / name, temporary)
            if name in entry["outputs"] and artifacts.digest(temporary) != entry["outputs"][name]:
                raise ArtifactError(f"{other / name} is not what its manifest says: run {stage.name} there again")
    artifacts.record_stage(run, stage.name, {**entry, SHARED: entry.get(SHARED, other.name)})


def _pages(stage: Stage) -> tuple[str, str]:
    return f"notebooks/{stage.name}.ipynb", f"notebooks/{stage.name}.html"


def _link(source: Path, target: Path) -> None:
    """Hard-link a file; copy it where it cannot be linked (another disk, no links)."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@dataclass(frozen=True)
class Run:
    """One run of a sweep: a params file with a seed."""

    folder: Path
    params_file: str  # as notebooks are given it
    overrides: Mapping[str, Any]
    params: Params

    @property
    def parameters(self) -> dict[str, Any]:
        """What goes into each notebook's parameters cell."""
        run_dir = artifacts.portable(self.folder)
        return {"params_file": self.params_file, "run_dir": run_dir, "overrides": dict(self.overrides)}


def seeds_of(text: str) -> list[int]:
    """'5' -> [0, 1, 2, 3, 4]; '5,6,8' -> [5, 6, 8]; '5,' -> [5]."""
    listed = [part.strip() for part in text.removesuffix(",").split(",")]
    if all(part.isdecimal() for part in listed):
        seeds = [int(part) for part in listed] if "," in text else list(range(int(text)))
        if seeds and len(set(seeds)) == len(seeds):
            return seeds
    raise ParamsError(f"--seeds is {text!r}; expected a count (5 means 0,1,2,3,4) or different seeds (5,6,8; one: 5,)")


def runs_of(
    files: Sequence[str], seeds: str, overrides: Mapping[str, Any], out: Path, *, here: bool = True
) -> list[Run]:
    """OUT/<params name>-s<seed> for each params file and seed; what --set changes stands in the name as well.

    Raises ParamsError with every fault of the whole command, and of this machine if they run `here`.
    """
    faults, runs, numbers = [], [], [0]
    try:
        numbers = seeds_of(seeds)
    except ParamsError as error:
        faults.append(str(error))
    if "run.seed" in overrides:
        faults.append("--set run.seed has no place here: --seeds gives every run its own")
    try:
        artifacts.refuse_no_folder(out, "the runs")
    except ArtifactError as error:
        faults.append(f"--out {error}")
    before = study.read_sweep(out)["runs"]
    for file in files:
        try:
            runs += [_run(file, seed, overrides, out, before) for seed in numbers]
            if here:
                estimate.check_machine(runs[-1].params)
        except (ParamsError, ValueError, ArtifactError) as error:
            faults.append(str(error))
    names = [run.folder.name for run in runs]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        faults.append(f"two runs would be called {', '.join(doubled)}: give each params file once")
    if faults:
        raise ParamsError("the sweep cannot start:\n  " + "\n".join(dict.fromkeys(faults)).replace("\n", "\n  "))
    return runs


def _run(file: str, seed: int, overrides: Mapping[str, Any], out: Path, before: Mapping[str, Any]) -> Run:
    path = find(file)
    study.model_of(artifacts.portable(path))  # an ablation's name is known, or nothing starts
    own = {**overrides, "run.seed": seed}
    params = load(path, own)
    if params.data.path:
        artifacts.data_path(params.data.path)
    values = {key: v if isinstance(v, str) else json.dumps(v, default=str) for key, v in overrides.items()}
    changed = [f"{key.rsplit('.', 1)[-1]}={re.sub(r'[^A-Za-z0-9_.+]+', '_', v)}" for key, v in values.items()]
    run = Run(out / "-".join([path.stem, *changed, f"s{seed}"]), artifacts.portable(path), own, params)
    was = before.get(run.folder.name)
    if was is not None and (was["params_file"], was["overrides"]) != (run.params_file, dict(overrides)):
        made = f"{was['params_file']} {was['overrides'] or ''}"
        raise ParamsError(f"{run.folder.name} was made with {made} before; give another --out")
    return run


def notes(runs: Sequence[Run]) -> list[str]:
    """What the seeds do not change, because a params file or --set gives it a seed of its own."""
    found = []
    for file in dict.fromkeys(run.params_file for run in runs):
        own = [run.params for run in runs if run.params_file == file]
        drawn = {"reasoner.seed": ("LM", {p.reasoner.seed for p in own})}
        if own[0].data.source == "shopworld":
            drawn["data.seed"] = ("world", {p.data.seed for p in own})
        for key, (what, values) in drawn.items():
            if len(values) < len(own):
                found.append(f"{file}: {key} is fixed, so all its runs have the same {what}; --set {key}=null frees it")
    return found


def plan(runs: Sequence[Run], stages: Sequence[Stage]) -> pd.DataFrame:
    """What the sweep would do: run, stage, action (run | share | done), and estimated seconds of what is run.

    A forecast: a stage is shared if another run that is finished or stands earlier in the plan has the same params and
    seed from its first input on; whether its bytes are the same is seen when its turn comes.
    """
    tables = [pipeline.plan(run.folder, run.params, list(stages), forced=False) for run in runs]
    keys = [_keys(run.params) for run in runs]
    known: set[str] = set()
    for own, table in zip(keys, tables, strict=True):
        known |= {own[name] for name in table.stage[table.action == "skip"]}
    for folder in set(sibling_runs(runs[0].folder)) - {run.folder for run in runs}:
        with suppress(ParamsError, ArtifactError):  # of another version, or damaged: nothing to share
            if (folder / "params.yaml").is_file():
                params = load_run(folder)
                own = _keys(params)
                known |= {own[stage.name] for stage in stages if reason_to_run(folder, stage, params) is None}
    rows = []
    for run, own, table in zip(runs, keys, tables, strict=True):
        entries = {name: entry for other in sibling_runs(run.folder) for name, entry in _entries(other).items()}
        entries |= _entries(run.folder)
        for name, action in table[["stage", "action"]].itertuples(index=False):
            action = "done" if action == "skip" else "share" if own[name] in known else "run"
            known.add(own[name])
            seconds = pipeline.estimate(STAGES[name], run.params, entries) if action == "run" else 0.0
            rows.append((run.folder.name, name, action, seconds))
    return pd.DataFrame(rows, columns=["run", "stage", "action", "seconds"])


def _keys(params: Params) -> dict[str, str]:
    """One key a stage: equal where the stage and all that it follows from have the same params and seed."""
    keys: dict[str, str] = {}
    for stage in STAGES.values():
        above = sorted({keys[maker(name).name] for name in reads_of(stage, params)})
        meaning = json.dumps([stage.name, stage_params(stage, params), params.run.seed, above], sort_keys=True)
        keys[stage.name] = hashlib.sha256(meaning.encode()).hexdigest()
    return keys


def by_run(planned: pd.DataFrame) -> pd.DataFrame:
    """The plan with one row a run: the numbers of its stages to run, to share and done, and the seconds."""
    counts = pd.crosstab(planned["run"], planned["action"]).reindex(columns=["run", "share", "done"], fill_value=0)
    table = counts.assign(seconds=planned.groupby("run")["seconds"].sum().round().astype(int))
    table = table.loc[list(dict.fromkeys(planned["run"]))].rename(columns={"run": "to run", "share": "to share"})
    return table.rename_axis(columns=None).reset_index()


def execute(runs: Sequence[Run], stages: Sequence[Stage], out: Path, scheduler: str | None = None) -> dict[str, str]:
    """Execute all, here or by the workers of a dask scheduler; returns {run: what went wrong} of those that failed."""
    failures, started, begun = {}, _now(), 0
    groups = waves(runs, stages) if scheduler else [[run] for run in runs]
    runs = [run for group in groups for run in group]
    with _cluster(scheduler, stages) if scheduler else _here(stages) as execute_group:
        for group in groups:
            begun += len(group)
            print(f"[{begun}/{len(runs)}] {', '.join(run.folder.name for run in group)}", flush=True)
            _write_manifest(out, runs, begun, failures, started)
            try:
                failures |= execute_group(group)
            finally:
                _write_manifest(out, runs, begun, failures, started)
    return failures


def waves(runs: Sequence[Run], stages: Sequence[Stage]) -> list[list[Run]]:
    """The runs in groups that can be executed at once: a stage that a run shares was made in a group before."""
    made: dict[str, int] = {}  # key of a stage -> number of the group that executes it
    groups: dict[int, list[Run]] = defaultdict(list)
    for run in runs:
        keys = _keys(run.params)
        own = [keys[stage.name] for stage in stages if needed(stage, run.params)]
        number = max((made[key] + 1 for key in own if key in made), default=0)
        made = dict.fromkeys(own, number) | made
        groups[number].append(run)
    return [groups[number] for number in sorted(groups)]


@contextmanager
def _here(stages: Sequence[Stage]) -> Iterator[Callable[[Sequence[Run]], dict[str, str]]]:
    """What executes a group of runs, one after the other: runs -> {run: what went wrong}."""
    with Kernels(ROOT) as kernels:
        yield lambda group: {run.folder.name: wrong for run in group if (wrong := _executed(run, stages, kernels))}


def _executed(run: Run, stages: Sequence[Stage], kernels: Kernels) -> str:
    """Executes a run; returns what went wrong, empty: nothing. The other runs of a sweep still run."""
    try:
        _execute_run(run, stages, kernels)
        return ""
    except Exception as error:
        if not isinstance(error, pipeline.StageFailed | ArtifactError | ParamsError | OSError):
            traceback.print_exc()
        print(f"{run.folder.name} failed: {error}", flush=True)
        return str(error) or type(error).__name__


def _execute_run(run: Run, stages: Sequence[Stage], kernels: Kernels) -> None:
    estimate.check_machine(run.params)
    with locks.locked(run.folder, f"python -m rgalign sweep, {run.folder.name}"):
        for stage in (stage for stage in stages if needed(stage, run.params)):
            why = reason_to_run(run.folder, stage, run.params)
            other = find_cached_stage(run.folder, stage, run.params) if why else None
            if other is None:
                pipeline.execute(run.folder, [stage], run.parameters, run.params, forced=False, kernels=kernels)
            else:
                copy_stage(run.folder, stage, run.params, other)
                reason = "" if why == FIRST else f"{why}; "
                print(f"{pipeline.label(stage, run.params)}: {reason}copied from {other.name}", flush=True)


@contextmanager
def _cluster(scheduler: str, stages: Sequence[Stage]) -> Iterator[Callable[[Sequence[Run]], dict[str, str]]]:
    """The same at once, by joblib's dask backend. Raises ParamsError without dask, a scheduler there, or a worker."""
    try:
        from distributed import Client
    except ImportError:
        raise ParamsError("--scheduler needs dask: pip install 'rgalign[dask]'") from None
    from joblib import Parallel, delayed, parallel_config

    worker = f"start workers where {ROOT} can be read: dask worker {scheduler} --nthreads 1"
    try:
        client = Client(scheduler, timeout=CONNECT)
    except (OSError, ValueError) as error:
        start = f"start one: dask scheduler; then {worker}"
        raise ParamsError(f"no dask scheduler answers at {scheduler} ({error}); {start}") from None
    names = [stage.name for stage in stages]

    def execute_group(group: Sequence[Run]) -> dict[str, str]:
        left, failures = {run.folder.name for run in group}, {}
        at_once = Parallel(batch_size=1, pre_dispatch="all", return_as="generator_unordered")
        try:
            for name, printed, wrong in at_once(delayed(_on_worker)(str(ROOT), run, names) for run in group):
                print(f"{name}:\n{printed}", flush=True)
                left.discard(name)
                failures |= {name: wrong} if wrong else {}
        except Exception as error:  # of the cluster: a worker was killed several times, say
            traceback.print_exc()
            failures |= dict.fromkeys(left, f"{type(error).__name__}: {error}")
        return failures

    with client, parallel_config("dask", client=client):
        if not client.ncores():
            raise ParamsError(f"the dask scheduler at {scheduler} has no worker; {worker}")
        yield execute_group


def _on_worker(root: str, run: Run, stages: list[str]) -> tuple[str, str, str]:
    """A run in a process of its own, as kernels, locks and signals ask: its name, what it printed, what went wrong."""
    name = run.folder.name
    if not Path(root).is_dir():
        return name, "", f"{root} is not on {platform.node()}: the workers and the sweep need one file system"
    job = {"folder": str(run.folder), "params_file": run.params_file, "overrides": run.overrides, "stages": stages}
    command = [sys.executable, "-m", "rgalign.commands.sweep", json.dumps(job)]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if ended.returncode:
        return name, ended.stdout + ended.stderr, f"its process ended with status {ended.returncode}"
    *printed, last = ended.stdout.splitlines()
    wrong = json.loads(last)
    return name, "\n".join([*printed, ended.stderr] if wrong else printed), wrong


def main(job: str) -> None:
    """The process of `_on_worker`; its last line says what went wrong."""
    given = json.loads(job)
    params = load(given["params_file"], given["overrides"])
    run = Run(Path(given["folder"]), given["params_file"], given["overrides"], params)
    with Kernels(ROOT) as kernels:
        wrong = _executed(run, [STAGES[name] for name in given["stages"]], kernels)
    print(json.dumps(wrong))


def execute_study(runs: Sequence[Run], out: Path) -> dict[str, str]:
    """Execute notebook 90 over all that has finished in OUT; returns {its name: what went wrong} if it fails.

    Where no run has results yet (a sweep through 03, say) it waits.
    """
    if not any(study.EVALUATION in _entries(path.parent) for path in out.glob(f"*/{artifacts.MANIFEST}")):
        print(f"{study.STAGE}: waits for a run with results")
        return {}
    overrides = {key: value for key, value in runs[0].overrides.items() if key != "run.seed"}
    params = load(runs[0].params_file, overrides)
    parameters = {**runs[0].parameters, "run_dir": artifacts.portable(out), "overrides": overrides}
    try:
        pipeline.execute(out, [STAGES[study.STAGE]], parameters, params, forced=True)
    except pipeline.StageFailed as error:
        print(f"{study.STAGE} failed: {error}", flush=True)
        return {study.STAGE: str(error)}
    print(f"the study: {out / 'tables'}; read {out / 'notebooks' / study.STAGE}.html")
    return {}


def outcome(runs: Sequence[Run], failures: Mapping[str, str]) -> pd.DataFrame:
    """One row a run: state, stages that ran and that were shared, seconds of those that ran, what went wrong."""
    rows = []
    for run in runs:
        entries, wrong = _entries(run.folder), failures.get(run.folder.name)
        ran = [entry["seconds"] for entry in entries.values() if SHARED not in entry]
        state = "failed" if wrong else "done"
        rows.append((run.folder.name, state, len(ran), len(entries) - len(ran), round(sum(ran)), _short(wrong or "")))
    rows += [(name, "failed", 0, 0, 0, _short(wrong)) for name, wrong in failures.items() if name == study.STAGE]
    return pd.DataFrame(rows, columns=["run", "state", "ran", "shared", "seconds", "what went wrong"])


def _write_manifest(out: Path, runs: Sequence[Run], begun: int, failures: Mapping[str, str], started: str) -> None:
    """OUT/sweep.json: every run of this sweep and of those before it in the folder; only `begun` runs have news."""
    known = study.read_sweep(out)["runs"]
    for number, run in enumerate(runs):
        name = run.folder.name
        stages = {s: f"shared with {e[SHARED]}" if SHARED in e else "ran" for s, e in _entries(run.folder).items()}
        overrides = {key: value for key, value in run.overrides.items() if key != "run.seed"}
        wrong = _short(failures.get(name, "")) if number < begun else known.get(name, {}).get("failed", "")
        known[name] = {"params_file": run.params_file, "seed": run.params.run.seed, "overrides": overrides}
        known[name] |= {"stages": stages, "failed": wrong}
    table = {"started": started, "ended": _now(), "versions": artifacts.versions(), "runs": dict(sorted(known.items()))}
    artifacts.write_text(out / study.SWEEP, json.dumps(table, indent=2) + "\n")


def _entries(run: Path) -> dict[str, Any]:
    """A run's manifest entries by stage; none where its manifest cannot be read, which the run itself will report."""
    try:
        return artifacts.read_manifest(run)["stages"]
    except ArtifactError:
        return {}


def _short(error: str) -> str:
    """The first two lines of an error, without this machine's paths: the table is published."""
    return " ".join(line.strip() for line in error.splitlines()[:2]).replace(f"{ROOT}/", "")[:300]


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


if __name__ == "__main__":
    main(sys.argv[1])
