"""Kernels of a run's notebooks, each fresh and used once: the next one starts while a stage runs.

Most of a small stage's time is the import of its libraries. A kernel that waits has imported them; what is the
project's own it imports when its notebook does, so that a stage runs the code that its manifest entry names.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync

IMPORTS = ("pandas", "matplotlib.pyplot", "torch", "transformers.trainer", "peft")


class Kernels:
    """The kernels of one run, at work in the folder `cwd`; none outlives the `with` block."""

    def __init__(self, cwd: Path):
        self.cwd = cwd
        self._waiting: AsyncKernelManager | None = None
        self._python = _this_python()

    def __enter__(self) -> "Kernels":
        self._python.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._waiting is not None:
            _stop(self._waiting, now=True)
        self._python.__exit__(None, None, None)

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
        kernel = AsyncKernelManager(kernel_name="python3")
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
def _this_python() -> Iterator[None]:
    """Let `python3` mean the running interpreter, whatever kernels the user has installed under that name."""
    with tempfile.TemporaryDirectory() as folder:
        spec = Path(folder) / "kernels" / "python3" / "kernel.json"
        spec.parent.mkdir(parents=True)
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR"]
        # threads that spin for long while they wait make two of them seventy times slower beside a busy process
        env = {"GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "1000")}
        spec.write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python", "env": env}))
        before = os.environ.get("JUPYTER_PATH")
        os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, (folder, before)))
        try:
            yield
        finally:
            if before is None:
                del os.environ["JUPYTER_PATH"]
            else:
                os.environ["JUPYTER_PATH"] = before
