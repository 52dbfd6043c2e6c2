"""A data set folder is put in its place whole or not at all, and replaces nothing but another one."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rgalign.data.schema import TABLES, YAML_FILE


@contextmanager
def placed(folder: str | Path) -> Iterator[Path]:
    """A fresh folder that takes the place of `folder` when the block ends well."""
    folder = Path(folder)
    _refuse_foreign(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    fresh.mkdir()
    try:
        yield fresh
        _put_in_place(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _refuse_foreign(folder: Path) -> None:
    try:
        folder.stat()  # a link that leads to itself is an error here; Path.exists takes it for nothing
    except FileNotFoundError:
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; expected a folder for a data set")
    ours = {YAML_FILE, *(f"{name}.parquet" for name in TABLES)}
    found = {path.name for path in folder.iterdir()}
    foreign = sorted(found - ours) or (sorted(found) if found and YAML_FILE not in found else [])
    if foreign:
        raise FileExistsError(
            f"{folder}/ is not empty and holds more than a data set (first: {', '.join(foreign[:3])}). "
            "Nothing was written. Name a new folder."
        )


def _put_in_place(fresh: Path, folder: Path) -> None:
    """Two renames: the old data set aside, the new one in. A folder that is a link keeps being one."""
    folder = folder.resolve()
    if not folder.exists():
        os.replace(fresh, folder)
        return
    old = fresh.with_suffix(".old")
    os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old)
