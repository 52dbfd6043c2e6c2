"""What made an artifact: code, package versions, device, memory."""

import hashlib
import json
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rgalign import artifacts
from rgalign.params import PACKAGE, ROOT

HOMES = {"rgalign": PACKAGE, "benchmarks": ROOT}  # whose code makes artifacts, and what it lies in
PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy", "pandas", "pyarrow", "matplotlib")


def code_in_use(notebook: str) -> dict[str, str]:
    """Digest of a notebook, and of every module of HOMES that this process has imported with the YAML beside it."""
    names = [f"notebooks/{notebook}.ipynb"]
    for name, module in sorted(sys.modules.items()):
        home, path = HOMES.get(name.partition(".")[0]), getattr(module, "__file__", None)
        if home and path and (file := Path(path).resolve()).is_relative_to(home):
            names += [each.relative_to(home).as_posix() for each in (file, *sorted(file.parent.glob("*.yaml")))]
    return {name: code_digest(code_file(name)) for name in dict.fromkeys(names) if code_file(name).is_file()}


def code_file(name: str) -> Path:
    """Where a file of a manifest lies: of the package where that is installed, all else in the project's folder."""
    return (PACKAGE if name.startswith("rgalign/") else ROOT) / name


def code_digest(path: Path) -> str:
    """Of a notebook only the code counts: not its outputs, its prose or its parameters. Empty for a missing file."""
    if not path.is_file():
        return ""
    if path.suffix != ".ipynb":
        return artifacts.digest(path)
    sources = [
        "".join(cell["source"])
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code" and "parameters" not in cell["metadata"].get("tags", [])
    ]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def peak_memory_mb() -> int:
    """Largest resident size of this process so far, MiB (macOS counts in bytes, Linux in KiB)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 2**20 if sys.platform == "darwin" else peak / 2**10)


def device_name() -> str:
    """The accelerator torch sees, or the CPU's architecture."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu ({platform.machine()})"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages whose change may change results."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found
