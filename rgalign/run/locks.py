"""Who writes in a run directory: one run at a time, and one stage.

A lock is the operating system's (filelock): it ends with its process and cannot go stale. Its file stays, since two
processes could lock two files of one name otherwise. A JSON file beside it says who holds it and since when."""

import datetime
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from rgalign.run.artifacts import ArtifactError, write_text

RUN, STAGE = ".run.lock", ".stage.lock"
PATIENCE = 15.0  # seconds for the kernel of a killed run to notice that its run is gone
_held: dict[Path, FileLock] = {}  # of this process


@contextmanager
def locked(run: Path, doing: str) -> Iterator[None]:
    """Nobody else runs stages in `run` meanwhile; inside another `locked` of this process it changes nothing. Raises
    ArtifactError that names the other process: at once for another run, after PATIENCE for a stage still open."""
    run.mkdir(parents=True, exist_ok=True)
    path, stage = (run / RUN).resolve(), (run / STAGE).resolve()
    if path in _held:
        yield
        return
    _acquire(path, doing)
    try:
        if stage not in _held:
            _acquire(stage, doing, timeout=PATIENCE)
            _release(stage)
        yield
    finally:
        if stage not in _held:
            with suppress(ArtifactError, OSError):  # the run directory may be gone
                _acquire(stage, doing)
                _release(stage)  # a kernel that was killed could not remove its owner file
        _release(path)


def hold_stage(run: Path, stage: str) -> None:
    """A stage is open in this process, until `release_stage` or the process's end. Raises ArtifactError where another
    process has one open here, or runs stages here and did not start this one."""
    path = (run / RUN).resolve()
    if path.exists() and not of_this_run(run):
        _acquire(path, stage)
        _release(path)
    path = (run / STAGE).resolve()
    if path not in _held:
        _acquire(path, stage)


def of_this_run(run: Path) -> bool:
    """Whether it is this process that runs stages in `run`, or the one that started it: no notebook opened by hand."""
    path = (run / RUN).resolve()
    return path in _held or _owner(path).get("process") == os.getppid()


def at_work(run: Path) -> dict:
    """Who has a stage open in `run`, else who runs stages there (process, machine, since, doing); empty: nobody. What a
    killed process of this machine left counts as nobody. Nothing is locked."""
    for path in (run / STAGE, run / RUN):
        owner = _owner(path)
        if owner and (owner.get("machine") != platform.node() or _lives(owner.get("process"))):
            return owner
    return {}


def _lives(process: object) -> bool:
    """Whether this number is that of a process of this machine."""
    if type(process) is not int or process <= 0:
        return False
    try:
        os.kill(process, 0)
    except PermissionError:
        return True  # somebody else's
    except (ProcessLookupError, OverflowError):
        return False
    return True


def release_stage(run: Path) -> None:
    """The stage that this process had open is finished."""
    path = (run / STAGE).resolve()
    if path in _held:
        _release(path)


def owner_file(path: Path) -> Path:
    """Says who holds this lock: process, machine, since, doing."""
    return path.with_name(f"{path.name}.json")


def _acquire(path: Path, doing: str, timeout: float = 0) -> None:
    lock = FileLock(path, timeout=timeout, thread_local=False)
    try:
        lock.acquire(poll_interval=0.1)
    except Timeout:
        owner = _owner(path)
        who = f"process {owner.get('process', '?')} on {owner.get('machine', '?')}"
        fix = (
            "wait for it or end it, or give another --run-dir"
            if path.name == RUN
            else "run its notebook to its end or shut its kernel down, then give the same command again"
        )
        raise ArtifactError(
            f"{path.parent} is in use: {owner.get('doing', 'a run')} by {who}, since {owner.get('since', '?')}; {fix}"
        ) from None
    _held[path] = lock
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    owner = {"process": os.getpid(), "machine": platform.node(), "since": since, "doing": doing}
    try:
        write_text(owner_file(path), json.dumps(owner) + "\n")
    except BaseException:
        _release(path)
        raise


def _release(path: Path) -> None:
    owner_file(path).unlink(missing_ok=True)
    _held.pop(path).release()


def _owner(path: Path) -> dict:
    """What the owner file says; empty where it cannot be read."""
    try:
        owner = json.loads(owner_file(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}
