"""Kernels of a run's notebooks, each fresh and used once: the next one starts while a stage runs.

Most of a small stage's time is the import of its libraries. A kernel that waits has imported them; what is the
project's own it imports when its notebook does, so that a stage runs the code that its manifest entry names.

They are spoken to by Unix sockets in a folder of the run's own. A TCP port would be chosen here and bound by the kernel
seconds later, when another process may have it.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync

IMPORTS = ("pandas", "matplotlib.pyplot", "torch", "transformers.trainer", "peft")
LONGEST = 70  # bytes of the folder that holds the sockets' folder: a socket's whole path has 103 (macOS; Linux: 107)


class Kernels:
    """The kernels of one run, at work in the folder `cwd`; none outlives the `with` block."""

    def __init__(self, cwd: Path):
        self.cwd = cwd
        self._waiting: AsyncKernelManager | None = None
        self._numbers = count(1)
        self._place = _private_folder()

    def __enter__(self) -> "Kernels":
        self._folder = self._place.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        try:
            if self._waiting is not None:
                _stop(self._waiting, now=True)
        finally:
            self._place.__exit__(None, None, None)

    @contextmanager
    def one(self, *, more: bool) -> Iterator[AsyncKernelManager]:
        """A kernel that has executed nothing; more: another one will be asked for after it."""
        kernel, self._waiting = self._waiting or self._started(), None
        try:
            if more:
                self._waiting = self._started(IMPORTS)
            yield kernel
        finally:
            _stop(kernel)

    def _started(self, imports: tuple[str, ...] = ()) -> AsyncKernelManager:
        """A kernel that starts, and is not waited for. What it imports is bound to no name there."""
        file = self._folder / f"{next(self._numbers)}.json"  # the sockets lie beside it: 1-ipc-1 to 1-ipc-5
        kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", connection_file=str(file))
        told = [f"--IPKernelApp.exec_lines=import {name}; del {name.split('.')[0]}" for name in imports]
        told.append("--HistoryManager.hist_file=:memory:")  # not the user's: what a batch executes is not typed by hand
        run_sync(kernel.start_kernel)(cwd=str(self.cwd), extra_arguments=told)
        return kernel


def _stop(kernel: AsyncKernelManager, *, now: bool = False) -> None:
    """End it, by asking first unless it is to be now; papermill may have done so, when it was interrupted."""
    if kernel.has_kernel:
        run_sync(kernel.shutdown_kernel)(now=now)
    run_sync(kernel.cleanup_resources)()


@contextmanager
def _private_folder() -> Iterator[Path]:
    """A folder for the kernels' sockets, open to this user alone. Meanwhile `python3` means the running interpreter,
    whatever kernels the user has installed under that name: the folder holds its spec, too."""
    short = len(os.fsencode(tempfile.gettempdir())) <= LONGEST
    with tempfile.TemporaryDirectory(prefix="rgalign-", dir=None if short else "/tmp") as folder:
        spec = Path(folder) / "kernels" / "python3" / "kernel.json"
        spec.parent.mkdir(parents=True)
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR"]
        # threads that spin for long while they wait make two of them seventy times slower beside a busy process
        env = {"GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "1000")}
        spec.write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python", "env": env}))
        before = os.environ.get("JUPYTER_PATH")
        os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, (folder, before)))
        try:
            yield Path(folder)
        finally:
            if before is None:
                del os.environ["JUPYTER_PATH"]
            else:
                os.environ["JUPYTER_PATH"] = before
