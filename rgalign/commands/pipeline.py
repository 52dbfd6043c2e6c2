"""The stages in order: each notebook executed by papermill in a fresh kernel, skipped where nothing changed.

papermill cannot resume, so this does: a stage is skipped while its manifest entry still matches (stages.py).
papermill may also call an interrupted notebook complete, so success is checked here: the manifest entry of this
execution is there, every code cell has run, and none shows an error.
"""

import json
import logging
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pandas as pd
import zmq.asyncio
from jupyter_client.client import KernelClient
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync

from rgalign.data.sources import size_of
from rgalign.errors import UserError
from rgalign.params import ROOT, Params, load_run
from rgalign.run import artifacts, locks, notebook_files
from rgalign.run.plan import STAGES, Stage, needed
from rgalign.run.stages import FIRST, PARAMETERS, reason_to_run

IMPORTS = ("pandas", "matplotlib.pyplot", "torch", "transformers.trainer", "peft")
LONGEST = 70  # bytes of the folder that holds the sockets' folder: a socket's whole path has 103 (macOS; Linux: 107)


class _Manager(AsyncKernelManager):
    """Its clients share a context that ends with the process. One of their own waits, when it is deleted, for sockets
    that an interrupt may have left open: after Ctrl-C while papermill connected, a run in twenty never ended."""

    def client(self, **given: Any) -> KernelClient:
        return super().client(context=zmq.asyncio.Context.instance(), **given)


class Kernels(ExitStack):
    """The kernels of one run, which work in the folder `cwd`, each fresh and used once; none outlives the `with` block.

    Most of a small stage's time is the import of its libraries: the next kernel starts while a stage runs, and imports
    IMPORTS. The project's own modules it imports when its notebook does, so that a stage runs the code that its
    manifest entry names. Kernels listen on Unix sockets in a private folder: a TCP port would be chosen here and bound
    by the kernel seconds later, when another process may have it.
    """

    def __init__(self, cwd: Path):
        super().__init__()
        self.cwd, self._numbers = cwd, count(1)
        self._waiting: AsyncKernelManager | None = None

    def __enter__(self) -> "Kernels":
        self._folder = self.enter_context(_private_folder())
        self.callback(lambda: self._waiting is not None and _stop(self._waiting, now=True))
        return self

    @contextmanager
    def one(self, *, more: bool) -> Iterator[AsyncKernelManager]:
        """A kernel that has executed nothing; more: another one will be needed after it."""
        kernel, self._waiting = self._waiting or self._started(), None
        try:
            if more:
                self._waiting = self._started(IMPORTS)
            yield kernel
        finally:
            _stop(kernel)

    def _started(self, imports: tuple[str, ...] = ()) -> AsyncKernelManager:
        """A kernel that is starting. The modules it imports are bound to no name there."""
        file = self._folder / f"{next(self._numbers)}.json"  # the sockets lie beside it: 1-ipc-1 to 1-ipc-5
        specs = KernelSpecManager(kernel_dirs=[str(self._folder / "kernels")])
        how = {"transport": "ipc", "connection_file": str(file), "kernel_spec_manager": specs}
        kernel = _Manager(kernel_name="python3", **how)
        options = [f"--IPKernelApp.exec_lines=import {name}; del {name.split('.')[0]}" for name in imports]
        options.append("--HistoryManager.hist_file=:memory:")  # not the user's history
        run_sync(kernel.start_kernel)(cwd=str(self.cwd), extra_arguments=options)
        return kernel


def _stop(kernel: AsyncKernelManager, *, now: bool = False) -> None:
    """Shut it down, at once if `now`; papermill may have done so when it was interrupted."""
    if kernel.has_kernel:
        run_sync(kernel.shutdown_kernel)(now=now)
    run_sync(kernel.cleanup_resources)()


@contextmanager
def _private_folder() -> Iterator[Path]:
    """A folder for the kernels' sockets that only this user can read. It holds a kernel spec too: inside, `python3` is
    the running interpreter, whatever kernels the user has installed under that name."""
    short = len(os.fsencode(tempfile.gettempdir())) <= LONGEST
    with tempfile.TemporaryDirectory(prefix="rgalign-", dir=None if short else "/tmp") as folder:
        spec = Path(folder) / "kernels" / "python3" / "kernel.json"
        spec.parent.mkdir(parents=True)
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR"]
        # threads that spin while they wait make two of them seventy times slower beside a busy process; and nobody
        # watches the bars of a notebook that papermill executes
        env = {"GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "1000"), "TQDM_MININTERVAL": str(MINUTE)}
        spec.write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python", "env": env}))
        yield Path(folder)


MINUTE = 60
START = 600  # seconds at most for a kernel and what it imports, on a busy machine
INTERRUPTED = "was interrupted before its notebook was written"


class StageFailed(UserError, RuntimeError):
    """A notebook did not end well; the message names notebook, cell, error, executed copy and log."""


def chosen(first: str | None = None, through: str | None = None) -> list[Stage]:
    """The stages from `first` up to and with `through` (see `stage_named`); one outside the sequence (91) runs alone,
    and only as `first`. Raises StageFailed where nothing is chosen."""
    sequence = [stage for stage in STAGES.values() if stage.in_sequence]
    start = stage_named(first) if first else sequence[0]
    if not start.in_sequence:
        return [start]
    end = stage_named(through) if through else sequence[-1]
    if not end.in_sequence or end.name < start.name:
        names = ", ".join(stage.name for stage in sequence)
        raise StageFailed(f"from {start.name} through {end.name} is no part of {names}")
    return [stage for stage in sequence if start.name <= stage.name <= end.name]


def stage_named(name: str) -> Stage:
    """The stage called `03`, `3` or `03_rankers`. Raises StageFailed with the list of names."""
    for stage in STAGES.values():
        number = stage.name.split("_")[0]
        if name in (stage.name, number, number.lstrip("0")):
            return stage
    raise StageFailed(f"there is no stage {name}; stages: {', '.join(STAGES)}")


def refuse_unfit(stages: list[Stage], params: Params, parameters: Collection[str] = PARAMETERS) -> None:
    """Raises StageFailed that lists the notebooks that are missing, or that papermill would run with other parameters
    than these (notebook_files.faults), before a kernel starts."""
    names = [f"notebooks/{stage.name}.ipynb" for stage in stages if needed(stage, params)]
    if missing := [name for name in names if not (ROOT / name).is_file()]:
        lacks = f"{ROOT} lacks {', '.join(missing)}; nothing was run."
        raise StageFailed(f"{lacks} A whole set of notebooks: python -m rgalign new DIR")
    if wrong := [f"  {name}  {fault}" for name in names for fault in notebook_files.faults(ROOT / name, parameters)]:
        raise StageFailed("\n".join(["these notebooks cannot be run; nothing was:", *wrong]))


def plan(run: Path, params: Params, stages: list[Stage], *, forced: bool) -> pd.DataFrame:
    """What a run would do: stage, action (run | skip), why, and estimated seconds.

    A stage after one that runs is listed as run; if its inputs then turn out the same bytes it is skipped after all.
    """
    entries = artifacts.read_manifest(run)["stages"]
    rows, upstream = [], set()
    for stage in (stage for stage in stages if needed(stage, params)):
        why = "forced" if forced else reason_to_run(run, stage, params)
        waits = [name for name in upstream if set(STAGES[name].writes) & set(stage.reads)]
        if why is None and waits:
            why = f"follows {', '.join(sorted(waits))}"
        if why is not None:
            upstream.add(stage.name)
        rows.append((stage.name, "run" if why else "skip", why or "unchanged", estimate(stage, params, entries)))
    table = pd.DataFrame(rows, columns=["stage", "action", "why", "seconds"])
    table.loc[table.action == "skip", "seconds"] = 0.0
    return table


def execute(
    run: Path, stages: list[Stage], parameters: Mapping[str, Any], params: Params, *,
    forced: bool, kernels: Kernels | None = None,
) -> None:  # fmt: skip
    """Run the stages that need it, in order. Raises StageFailed at the first that fails, ArtifactError where another
    process runs stages in `run`.

    parameters   what goes into each notebook's parameters cell: params_file, run_dir, overrides
    kernels      of a caller who runs other stages after these; None: new ones
    What a killed run left unfinished is removed first.
    """
    refuse_unfit(stages, params, parameters)
    command = f"python -m rgalign run {parameters.get('params_file', '')}".strip()
    own = Kernels(ROOT) if kernels is None else nullcontext(kernels)
    with locks.locked(run, command), own as started:
        left = {path.name for path in artifacts.sweep_run(run)}
        stages = [stage for stage in stages if needed(stage, params)]
        copies = {stage.name: run / "notebooks" / f"{stage.name}.ipynb" for stage in stages}
        recorded = artifacts.read_manifest(run)["stages"].keys() & copies.keys()
        interrupted = {name for name in recorded if artifacts.temporary_of(copies[name]).name in left}
        for name in interrupted:
            artifacts.forget_stage(run, name)
        planned = plan(run, params, stages, forced=forced).seconds
        for number, stage in enumerate(stages):
            copy, name = copies[stage.name], label(stage, params)
            why = "forced" if forced else reason_to_run(run, stage, params)
            if why is None:
                print(f"{name}: unchanged, skipped", flush=True)
                if copy.exists() and not copy.with_suffix(".html").exists():  # killed just before
                    _export_html(copy)
                continue
            why = INTERRUPTED if stage.name in interrupted else why
            rest = planned[number:].sum(skipna=False)  # NaN where nobody knows
            reason, remaining = "" if why == FIRST else f" ({why})", f", about {span(rest)} left" if rest > 0 else ""
            print(f"{name}: running{reason}{remaining}", flush=True)
            more = kernels is not None or stage is not stages[-1]
            with _every_minute(name):
                _execute_stage(run, stage, dict(parameters), partial(started.one, more=more))
            entry = artifacts.read_manifest(run)["stages"][stage.name]
            print(f"{name}: done in {span(entry['seconds'])}, {entry['peak_memory_mb']:,} MiB", flush=True)


def label(stage: Stage, params: Params) -> str:
    """'[4/10] reward model': its place in a run of these params."""
    names = [each.name for each in STAGES.values() if each.in_sequence and needed(each, params)]
    place = f"[{names.index(stage.name) + 1}/{len(names)}] " if stage.name in names else ""
    return f"{place}{stage.title}"


def span(seconds: float) -> str:
    """A time as people say it: 40 s, 12 min, 3.5 hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * MINUTE else f"{seconds / 3600:.1f} hours"


@contextmanager
def _every_minute(name: str) -> Iterator[None]:
    """A line a minute that the stage still runs, where there is no terminal: there papermill shows a bar."""
    over, began = threading.Event(), time.monotonic()

    def tell() -> None:
        while not over.wait(MINUTE):
            print(f"{name}: has been running for {span(time.monotonic() - began)}", flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    if not sys.stderr.isatty():
        thread.start()
    try:
        yield
    finally:
        over.set()


def status(run: Path) -> tuple[pd.DataFrame, str]:
    """One row a stage (state, seconds, peak memory, when), and a line: what is running, and what comes next. Raises
    ArtifactError where there is no run."""
    if not (run / "params.yaml").exists():
        raise artifacts.ArtifactError(f"no run in {run}; start one: python -m rgalign run PARAMS")
    params = load_run(run)
    entries = artifacts.read_manifest(run)["stages"]
    owner, rows = locks.at_work(run), []
    for stage in STAGES.values():
        if not needed(stage, params) or (not stage.in_sequence and stage.name not in entries):
            continue
        at_work = owner.get("doing") == stage.name
        why = "running" if at_work else reason_to_run(run, stage, params)
        entry = entries.get(stage.name, {}) if not at_work else {"started": owner.get("since")}
        rows.append((stage.name, why or "done", *(entry.get(k) for k in ("seconds", "peak_memory_mb", "started"))))
    table = pd.DataFrame(rows, columns=["stage", "state", "seconds", "peak MiB", "started"])
    waiting = [name for name, state in zip(table.stage, table.state, strict=True) if state not in ("done", "running")]
    following = f"next: {waiting[0]}" if waiting else "no stage is left"
    if not owner:
        how = f" (python -m rgalign run {artifacts.portable(run / 'params.yaml')})" if waiting else ""
        return table, f"nothing is running; {following}{how}"
    who = f"process {owner.get('process', '?')} on {owner.get('machine', '?')}"
    return table, f"running: {owner.get('doing', '?')} since {owner.get('since', '?')}, by {who}; {following}"


def _execute_stage(run: Path, stage: Stage, parameters: dict[str, Any], a_kernel: Callable[[], Any]) -> None:
    """a_kernel: -> context of a kernel that has executed nothing."""
    import papermill  # late: `--dry-run` and `status` do without it
    from papermill.engines import NBClientEngine, papermill_engines

    class SavedOnce(NBClientEngine):
        """papermill's engine saves the notebook twice a cell, in a tenth of a small stage's time; this one at its end,
        however it ends."""

        @classmethod
        def execute_managed_notebook(cls, nb_man, *arguments, **more):
            nb_man.save = lambda **_: None
            try:
                super().execute_managed_notebook(nb_man, *arguments, **more)
            finally:
                del nb_man.save

    before = artifacts.read_manifest(run)["stages"].get(stage.name)
    copy, source = (folder / "notebooks" / f"{stage.name}.ipynb" for folder in (run, ROOT))
    failed = copy.with_name(f"{stage.name}.failed.ipynb")
    how = {"kernel_name": "python3", "language": "python"}  # which not every editor leaves in the file
    how |= {"cwd": ROOT, "start_timeout": START, "log_output": True, "progress_bar": sys.stderr.isatty()}
    with _log_file(run / "logs" / f"{stage.name}.log") as log, a_kernel() as kernel:
        try:
            with artifacts.atomic(copy) as temporary:
                try:
                    papermill_engines.register("saved_once", SavedOnce)
                    own = {"engine_name": "saved_once", "parameters": parameters, "km": kernel}
                    papermill.execute_notebook(source, temporary, **own, **how)
                    _check_executed(temporary)
                except BaseException:  # the stage may have finished, and its notebook has not
                    if artifacts.read_manifest(run)["stages"].get(stage.name) != before:
                        artifacts.forget_stage(run, stage.name)
                    if temporary.exists():
                        temporary.rename(failed)
                    raise
        except Exception as error:
            raise StageFailed(_explain(stage, error, failed, log)) from error
        if artifacts.read_manifest(run)["stages"].get(stage.name) == before:
            raise StageFailed(f"{stage.name} ran to its end without stage.finish(); executed copy: {copy}")
    failed.unlink(missing_ok=True)
    _export_html(copy)


def _check_executed(path: Path) -> None:
    """Every code cell has run and shows no error. Raises StageFailed with the first that does not."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code" and "".join(cell["source"]).strip()]
    for number, cell in enumerate(code, start=1):  # as Jupyter counts: [1], [2], ..
        if cell["execution_count"] is None:
            raise StageFailed(f"code cell {number} never ran: it was interrupted")
        if any(output["output_type"] == "error" for output in cell["outputs"]):
            raise StageFailed(f"code cell {number} ended in an error")


def _explain(stage: Stage, error: Exception, copy: Path, log: Path) -> str:
    """The error, with the cell it came from and where to read on."""
    where, what = "", f"{type(error).__name__}: {error}"
    if hasattr(error, "ename"):  # papermill's own error: the traceback belongs to the cell
        where, what = f" in cell {error.exec_count}", f"{error.ename}: {error.evalue}"
        if error.ename == "OutOfMemoryError":
            what += "\n  Lower its documents_per_batch, pairs_per_batch or lists_per_batch, or set run.device=cpu"
    elif type(error).__name__ == "DeadKernelError":
        what = (
            "the kernel died without an error, most often because memory ran out. "
            "Lower data.world.sessions or ranker.lists_per_batch, then run again."
        )
    kept = [f"  {name:<14} {path}" for name, path in (("executed copy:", copy), ("log:", log)) if path.exists()]
    if not copy.parent.is_dir():
        kept.append(f"  {copy.parents[1]} was removed while it ran: start it again")
    advice = "Fix it and give the same command again: finished stages are kept."
    return "\n".join([f"notebooks/{stage.name}.ipynb failed{where}", f"  {what}", *kept, advice])


class _OneBarAMinute(logging.Filter):
    """Of progress bars, which write their line again and again, a log has the newest state, a minute apart."""

    def __init__(self) -> None:
        super().__init__()
        self.last = -math.inf

    def filter(self, record: logging.LogRecord) -> bool:
        lines = record.getMessage().split("\n")
        bars = [line.rpartition("\r")[2] for line in lines if "\r" in line]
        if not bars:
            return True
        kept = [line for line in lines if "\r" not in line]
        if record.created >= self.last + MINUTE:
            self.last = record.created
            kept.append(bars[-1])
        record.msg, record.args = "\n".join(kept).strip(), ()
        return bool(record.msg)


@contextmanager
def _log_file(path: Path):
    """papermill's log, with the kernel's own output, in a file of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, mode="w", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    handler.addFilter(_OneBarAMinute())
    logger = logging.getLogger("papermill")
    propagate, level = logger.propagate, logger.level
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO)
    try:
        yield path
    finally:
        logger.removeHandler(handler)
        handler.close()
        logger.propagate = propagate
        logger.setLevel(level)


def _export_html(notebook: Path) -> None:
    from rgalign.report import offline

    artifacts.write_text(notebook.with_suffix(".html"), offline.page(notebook))


def estimate(stage: Stage, params: Params, entries: Mapping[str, Any]) -> float:
    """Seconds the stage took last time, by these manifest entries, else a rough estimate from the size of the data; NaN
    where a pretrained LLM works, whose size says more than that of the data (commands/estimate.py)."""
    if stage.name in entries:
        return entries[stage.name]["seconds"]
    reasoner = params.reasoner
    if reasoner.model != "tiny" and reasoner.kind == "causal" and "models/reasoner" in (*stage.reads, *stage.writes):
        return float("nan")
    fixed, per_thousand = stage.seconds
    return round(fixed + (per_thousand * size_of(params.data).sessions / 1000 if per_thousand else 0))
