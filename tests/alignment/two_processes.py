"""Starts a script of a test in two processes, by torchrun on a CPU."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def run(script: Path, folder: Path, *, seconds: int) -> None:
    """`script folder` in each of two processes, which find the package and the test's own modules."""
    paths = [HERE, HERE.parent, HERE.parents[1], os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(script), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stderr[-3000:]
