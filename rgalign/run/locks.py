"""Who writes in a run directory: one run at a time, and one stage.

A lock is the operating system's: it ends with the process that holds it, however that ends, and can not go stale. The
file says who holds it and since when.
"""

import datetime
import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rgalign.run.artifacts import ArtifactError

RUN, STAGE = ".run.lock", ".stage.lock"
PATIENCE = 15.0  # seconds for the kernel of a killed run to notice that it is alone
_held: dict[Path, int] = {}  # lock file -> its descriptor, of this process


@contextmanager
def locked(run: Path, doing: str) -> Iterator[None]:
    """Nobody else runs stages in `run` meanwhile; inside another `locked` of this process it changes nothing.

    Raises ArtifactError with the other one's process and time: another run, at once; a stage that is still open,
    after PATIENCE.
    """
    run.mkdir(parents=True, exist_ok=True)
    path = (run / RUN).resolve()
    if path in _held:
        yield
        return
    _take(path, doing)
    try:
        _wait_for(run / STAGE)
        _remove_idle(run / STAGE)
        yield
    finally:
        _remove_idle(run / STAGE)  # a kernel that was ended could not
        _let_go(path)


def hold_stage(run: Path, stage: str) -> None:
    """A stage is open in this process, until `release_stage` or the process's end.

    Raises ArtifactError where another process has one open here, or runs stages here and did not start this one.
    """
    owner = _owner((run / RUN).resolve())
    if owner is not None and owner.get("process") not in (os.getppid(), os.getpid()):
        raise ArtifactError(_told(run / RUN, owner))
    path = (run / STAGE).resolve()
    if path not in _held:
        _take(path, stage)


def release_stage(run: Path) -> None:
    """The stage that this process had open is finished."""
    path = (run / STAGE).resolve()
    if path in _held:
        _let_go(path)


def _take(path: Path, doing: str) -> None:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(descriptor)
            raise ArtifactError(_told(path, _read(path))) from None
        except OSError:  # a file system that knows no locks: one has to look after oneself there
            pass
        if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
            break
        os.close(descriptor)  # its last holder took the file away in between
    about = {"process": os.getpid(), "machine": platform.node(), "since": _now(), "doing": doing}
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps(about).encode())
    _held[path] = descriptor


def _let_go(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.close(_held.pop(path))


def _wait_for(path: Path) -> None:
    """Until nobody holds this lock: the kernel of a killed run lives on for a second."""
    ends = time.monotonic() + PATIENCE
    while (owner := _owner(path.resolve())) is not None:
        if time.monotonic() > ends:
            raise ArtifactError(_told(path, owner))
        time.sleep(0.1)


def _remove_idle(path: Path) -> None:
    path = path.resolve()
    if path not in _held and _owner(path) is None:
        path.unlink(missing_ok=True)


def _owner(path: Path) -> dict | None:
    """What the holder of a lock says of itself; None where nobody holds it."""
    if path in _held:
        return {"process": os.getpid()} if path.name == RUN else None
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return _read(path)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return None


def _read(path: Path) -> dict:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def _told(path: Path, owner: dict) -> str:
    who = f"process {owner.get('process', '?')} on {owner.get('machine', '?')}"
    mend = (
        "wait for it or end it, or give another --run-dir"
        if path.name == RUN
        else "run its notebook to its end or shut its kernel down, then give the same command again"
    )
    return f"{path.parent} is in use: {owner.get('doing', 'a run')} by {who}, since {owner.get('since', '?')}; {mend}"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
