"""Kernels that begin with the heavy libraries imported: a server imports them once and forks itself (Linux).

A kernel that starts anew imports for six seconds of a core; forked it is there at once. The project's own modules are
not among LIBRARIES: a stage runs the code that its manifest entry names. Nothing else of the server is seen by what it
forks: folder, environment and files are those of the caller.
As a script: `forks.py ADDRESS MODULE ARGUMENTS..` is `python -m MODULE ARGUMENTS..`, forked by the server at ADDRESS.
The script stays for the process: it passes signals on, ends with it, and the process ends with the script.
"""

import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

LIBRARIES = (
    *("pandas", "pyarrow.csv", "pyarrow.parquet", "pydantic", "yaml", "tqdm.auto", "joblib", "safetensors.torch"),
    *("matplotlib.pyplot", "scipy.stats", "sklearn.pipeline", "sklearn.decomposition", "sklearn.linear_model"),
    *("sklearn.feature_extraction.text", "torch", "torch.distributed.tensor", "transformers.trainer", "peft"),
    "transformers.models.qwen3.modeling_qwen3",
)
NOTEBOOK_COLUMNS = 20  # pandas' own default in a notebook
DRAWS = "module://matplotlib_inline.backend_inline"  # as ipykernel would set it, if it came before matplotlib


GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA's, AMD's, those of Windows below Linux


def supported() -> bool:
    """Whether a process with these libraries can go on after a fork. On macOS its system libraries forbid it; a fork
    cannot use a GPU that an import has begun to use (peft's, of bitsandbytes where that is installed)."""
    return sys.platform == "linux" and not any(map(os.path.exists, GPUS))


@contextmanager
def server(address: Path, environment: dict[str, str]) -> Iterator[None]:
    """Inside, there is a server at this address (a Unix socket). Afterwards it and all that it forked are gone, also
    where this process was killed."""
    command, environment = [sys.executable, "-P", __file__], {"MPLBACKEND": DRAWS, **os.environ, **environment}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen()
        own = {"stdin": subprocess.PIPE, "pass_fds": [listener.fileno()], "start_new_session": True}
        process = subprocess.Popen([*command, str(listener.fileno())], env=environment, **own)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def fork(address: str, arguments: Sequence[str], files: Sequence[int] = (0, 1, 2)) -> socket.socket:
    """Ask the server for `python -m arguments..` with these files as its standard ones, in the caller's folder and
    environment. Returns the connection, on which the process's id comes, then nothing until it ends; closed, it ends
    the process."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    socket.send_fds(connection, [b"\n"], files)
    told = {"arguments": list(arguments), "folder": os.getcwd(), "environment": dict(os.environ)}
    connection.sendall(json.dumps(told).encode() + b"\n")
    return connection


def serve(listener: socket.socket) -> None:
    """Fork a process for each request, until the standard input is closed."""
    for name in LIBRARIES:
        with suppress(ImportError):
            importlib.import_module(name)
    if "pandas" in sys.modules:  # it took this process for a terminal, whose width tables would be cut to
        sys.modules["pandas"].set_option("display.max_columns", NOTEBOOK_COLUMNS)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for what it forks
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection, files, told = _request(listener)
        process = os.fork() if told else None
        if process == 0:
            listener.close()
            _become(connection, files, **told)
            return
        with suppress(OSError):  # who asked may be gone
            connection.sendall(b"%d\n" % (process or 0))
        connection.close()
        for file in files:
            os.close(file)
    os.killpg(0, signal.SIGKILL)


def _request(listener: socket.socket) -> tuple[socket.socket, list[int], dict | None]:
    """The next connection, the files that came with it, and what is asked for; None: who asked was killed meanwhile."""
    connection, _ = listener.accept()
    files: list[int] = []
    try:
        files = socket.recv_fds(connection, 1, 3)[1]
        return connection, files, json.loads(connection.makefile().readline())
    except (OSError, ValueError):
        return connection, files, None


def _become(connection: socket.socket, files: list[int], arguments: list[str], folder: str, environment: dict) -> None:
    """Run the module, in the forked process."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    threading.Thread(target=_end_with, args=[connection], daemon=True).start()
    sys.path.insert(0, folder)
    sys.argv = list(arguments)
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


def _end_with(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.recv(1)
    os._exit(1)


def _script(address: str, *arguments: str) -> None:
    with fork(address, arguments) as connection:
        process = int(connection.makefile().readline())
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: os.kill(process, number))
        connection.recv(1)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve(socket.socket(fileno=int(sys.argv[1])))
    else:
        _script(*sys.argv[1:])
