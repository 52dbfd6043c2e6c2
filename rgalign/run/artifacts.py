"""A run directory on disk: atomic writes, digests, and the manifest that says what made each artifact.

Writes go to a temporary name beside the target and are renamed, so a reader never sees half a file and a killed run
leaves nothing that looks finished. The manifest entry of a stage is written last."""

import errno
import hashlib
import json
import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from rgalign.errors import UserError
from rgalign.params import PACKAGE, ROOT, find

# What made an artifact: code, package versions, device, memory.
ROOTS = {"rgalign": PACKAGE, "benchmarks": ROOT}  # packages whose code makes artifacts, and the folders they lie in
PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy", "pandas", "pyarrow", "matplotlib")


def code_in_use(notebook: str) -> dict[str, str]:
    """Digest of a notebook, and of every module of ROOTS that this process has imported, with the YAML beside it."""
    names = [f"notebooks/{notebook}.ipynb"]
    for name, module in sorted(sys.modules.items()):
        root, path = ROOTS.get(name.partition(".")[0]), getattr(module, "__file__", None)
        if root and path and (file := Path(path).resolve()).is_relative_to(root):
            names += [each.relative_to(root).as_posix() for each in (file, *sorted(file.parent.glob("*.yaml")))]
    return {name: found for name in dict.fromkeys(names) if (found := code_digest(name))}


def code_digest(name: str) -> str:
    """Digest of a file of a manifest, of the package where it is installed or of the project's folder; empty where it
    is missing. Of a notebook only the code counts: not its outputs, its prose or its parameters."""
    path = (PACKAGE if name.startswith("rgalign/") else ROOT) / name
    if not path.is_file():
        return ""
    if path.suffix != ".ipynb":
        return digest(path)
    sources = [
        "".join(cell["source"])
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code" and "parameters" not in cell["metadata"].get("tags", [])
    ]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def peak_memory_mb() -> int:
    """Largest resident size of this process so far, MiB (macOS reports bytes, Linux KiB)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 2**20 if sys.platform == "darwin" else peak / 2**10)


def device_name() -> str:
    """The accelerator torch sees, or the CPU's architecture."""
    torch = sys.modules.get("torch")
    on_gpu = torch is not None and torch.cuda.is_available()
    return torch.cuda.get_device_name() if on_gpu else f"cpu ({platform.machine()})"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages whose change may change results."""
    found = {"python": platform.python_version(), **dict.fromkeys(PACKAGES, "missing")}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


MANIFEST, PARAMS = "manifest.json", "params.yaml"
TEMPORARY = ".part"
FOLDERS = ("tables", "models", "figures", "notebooks")  # folders of a run directory
VERSION = 1  # of the run directory's layout; a run of another version is not read


class ArtifactError(UserError, RuntimeError):
    """An artifact is missing, altered, or not declared; the message names what makes it again."""


@contextmanager
def atomic(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; what was made there (file or folder) replaces it on success. On any error
    the temporary path is removed and `target` stays as it was. Raises ArtifactError for a full disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_of(target)
    _remove(temporary)
    try:
        yield temporary
        if target.is_dir():  # a full folder cannot be replaced by rename alone
            aside = target.parent / f".{target.name}.old{TEMPORARY}"
            _remove(aside)
            target.rename(aside)
            temporary.rename(target)
            _remove(aside)
        else:
            temporary.replace(target)
    except Exception as error:  # a disk, a quota or a limit of file sizes is full; libraries have classes of their own
        full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        named = any(f"(os error {number})" in str(error) for number in full)
        if not named and getattr(error, "errno", None) not in full:
            raise
        free = shutil.disk_usage(target.parent).free // 2**20
        raise ArtifactError(
            f"{target} cannot be written: {error} ({free:,} MiB are free there). Nothing of it is left; free some "
            "space, then give the same command again"
        ) from error
    finally:
        _remove(temporary)


def temporary_of(target: Path) -> Path:
    """The temporary path of `atomic`: beside the target, so that a rename is enough."""
    return target.parent / f".{target.stem}{TEMPORARY}{target.suffix}"  # papermill looks at the suffix


def sweep_run(run: Path) -> list[Path]:
    """Remove what killed writers left anywhere in a run directory, where nobody else may write meanwhile; returns the
    removed paths. Other runs in the same folder are left alone, and so is `work`, which stages resume from."""
    places = [run.glob(f".*{TEMPORARY}*"), *((run / name).rglob(f".*{TEMPORARY}*") for name in FOLDERS)]
    left = sorted(path for place in places for path in place)
    for path in left:
        _remove(path)  # what was inside a removed folder is gone as well
    return left


def sweep(*targets: Path) -> list[Path]:
    """Remove what killed writers of these targets left beside them; returns the removed paths."""
    left = [path for target in targets for path in sorted(target.parent.glob(f".{target.stem}*{TEMPORARY}*"))]
    for path in left:
        _remove(path)
    return left


def digest(path: Path) -> str:
    """SHA-256 of a file, or of a folder's relative names and contents in name order."""
    hashed = hashlib.sha256()
    if path.is_dir():
        for inner in sorted(p for p in path.rglob("*") if p.is_file()):
            hashed.update(f"{inner.relative_to(path).as_posix()}\0{digest(inner)}\n".encode())
        return hashed.hexdigest()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            hashed.update(block)
    return hashed.hexdigest()


def write_table(path: Path, frame: pd.DataFrame) -> None:
    """Write a parquet table atomically; the same frame gives the same bytes. Raises ArtifactError for a folder."""
    write_arrow(path, pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None))


def write_arrow(path: Path, table: pa.Table) -> None:
    """Write an arrow table as parquet, atomically. Raises ArtifactError for a folder."""
    _refuse_folder(path)
    with atomic(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically. Raises ArtifactError for a folder."""
    _refuse_folder(path)
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _refuse_folder(path: Path) -> None:
    """Raises ArtifactError for a folder: a file that is written must not replace all that is in it."""
    if path.is_dir():
        raise ArtifactError(f"{path} is a folder; expected a file to write")


def refuse_no_folder(path: Path, what: str) -> None:
    """Raises ArtifactError for what is not a folder: a file, a device, a link that leads nowhere."""
    if os.path.lexists(path) and not path.is_dir():
        is_what = "is a file" if path.exists() else "is a link that leads nowhere"
        raise ArtifactError(f"{path} {is_what}; expected a folder for {what}")


def read_manifest(run: Path) -> dict[str, Any]:
    """The manifest of a run directory, empty where nothing has run. Raises ArtifactError where it cannot be read."""
    path = run / MANIFEST
    if not path.exists():
        return {"version": VERSION, "stages": {}}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(manifest, dict) and (found := manifest.get("version", VERSION)) != VERSION:
            raise ArtifactError(
                f"{run} was made by another version of this code (its layout is {found!r}; this code writes {VERSION})."
                f" Use it with that version, or make it again beside it: python -m rgalign run {run / 'params.yaml'} "
                f"--run-dir {run.with_name(run.name + '-new')}"
            )
        stages = manifest["stages"] if isinstance(manifest, dict) else None
        if not isinstance(stages, dict):
            raise ValueError("it does not list stages")
        if faults := [f"{name}: {fault}" for name, entry in stages.items() for fault in _entry_faults(entry)]:
            raise ValueError("; ".join(faults))
    except (ValueError, KeyError, RecursionError) as error:
        raise ArtifactError(
            f"{path} cannot be read ({error}); delete it and run again: its stages are run again"
        ) from None
    return manifest


def _entry_faults(entry: Any) -> list[str]:
    """What is wrong with a stage's entry in a manifest, of all that is read from it."""
    if not isinstance(entry, dict):
        return ["is not an entry of a stage"]
    tables = ("params", "code", "inputs", "outputs")
    faults = [f"{name} is not a table of names" for name in tables if not isinstance(entry.get(name), dict)]
    for name in ("seconds", "peak_memory_mb"):
        value = entry.get(name)
        if type(value) not in (int, float) or not 0 <= value < 1e15:
            faults.append(f"{name} is {value!r:.40}; expected a number from 0")
    outside = [name for name in entry.get("outputs") or () if Path(name).is_absolute() or ".." in Path(name).parts]
    return faults + [f"the output {name!r:.80} lies outside the run" for name in outside]


def forget_stage(run: Path, stage: str) -> None:
    """Take one stage's entry out of the manifest, atomically: it has not run."""
    manifest = read_manifest(run)
    if manifest["stages"].pop(stage, None) is not None:
        write_text(run / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def record_stage(run: Path, stage: str, entry: Mapping[str, Any]) -> None:
    """Add or replace one stage's entry in the manifest, atomically."""
    manifest = {"version": VERSION, **read_manifest(run)}
    manifest["stages"] = dict(sorted({**manifest["stages"], stage: dict(entry)}.items()))
    write_text(run / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def data_path(path: str) -> Path:
    """Where `data.path` lies: absolute, or below $RGALIGN_DATA (by default ../shared/data), or in the project.
    Raises ArtifactError that lists the places looked in."""
    given = os.environ.get("RGALIGN_DATA")
    shared = Path(given or ROOT.parent / "shared" / "data")
    places = [root / path for root in ([shared, ROOT] if given or shared.is_dir() else [ROOT])]
    for place in places:
        if place.exists():
            return place.resolve()
    looked = "\n".join(f"  {place}" for place in dict.fromkeys(places))
    raise ArtifactError(f"data.path {path} was not found; looked for\n{looked}\nSet RGALIGN_DATA or give a full path.")


def run_directory(run_dir: str | Path, params_file: str | Path) -> Path:
    """The run directory as given (relative: from the project's root); else that whose own params.yaml is the params
    file; else outputs/<name of the params file>."""
    if str(run_dir):
        return ROOT / run_dir
    name = Path(params_file)
    if name.name == PARAMS and (own := find(name).parent) and (own / MANIFEST).is_file():
        return own
    return ROOT / "outputs" / name.stem


def portable(path: Path) -> str:
    """Relative to the project where it lies inside, so that an executed notebook runs again after a move."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
