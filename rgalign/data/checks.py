"""Every fault of a data set folder at once: dataset.yaml, the files, their columns and types, then their values."""

import hashlib
from pathlib import Path

import pyarrow as pa

from rgalign.data import check_values
from rgalign.data.check_columns import check_columns, note_columns
from rgalign.data.check_yaml import check_world, check_yaml
from rgalign.data.faults import Report, nearest
from rgalign.data.parquet import Table, is_there, location
from rgalign.data.schema import KINDS, NEEDED_TABLES, REQUIRED, TABLES, YAML_FILE

NO_TRANSCRIPTS = (
    "is not there: a tiny LM never sees a question and can only repeat the columns; RG-SFT and RG-DPO are of no use "
    "then (alignment.sft.use, alignment.dpo.use), unless reasoner.model is a pretrained one"
)
READ_ERRORS = (pa.ArrowException, OSError, ValueError)


def check(folder: str | Path) -> Report:
    """All faults and notes of the data set in `folder`; never raises for what it finds there.

    Memory: the impressions as integers (about 20 bytes a row) and one column of the sessions at a time.
    """
    folder = Path(folder)
    report = Report(folder)
    if not folder.is_dir():
        report.fault(str(folder), "is not a folder; expected a data set: intents, sessions, impressions, dataset.yaml")
        return report
    meta = check_yaml(report, folder / YAML_FILE)
    files = {name: file for name in TABLES if (file := _open(report, folder, name)) is not None}
    report.rows = {name: file.rows for name, file in files.items()}
    kinds = {name: kind for name, kind in meta.get("features", {}).items() if kind in KINDS}
    if meta:
        check_world(report, meta, simulated="truth" in files)
    columns = {name: _columns_of(report, name, file, kinds) for name, file in files.items()}
    _check_checksums(report, folder, meta)
    _note_other_tables(report, folder)
    if not is_there(folder, "transcripts"):
        report.note("transcripts.parquet", NO_TRANSCRIPTS)
    check_values.check_values(report, check_values.Source(files, columns, kinds, meta))
    return report


def _open(report: Report, folder: Path, name: str) -> Table | None:
    path, many = folder / f"{name}.parquet", folder / name
    if path.is_dir():
        report.fault(path.name, f"is a folder; expected one parquet file, or a folder {name}/ of many")
        return None
    if path.is_file() and many.is_dir():
        report.fault(path.name, f"is there, and a folder {name}/ as well; expected one of the two")
        return None
    if not location(folder, name).exists():
        if name in NEEDED_TABLES:
            report.fault(path.name, f"is missing; expected columns {', '.join(REQUIRED[name])}")
        return None
    try:
        return Table(folder, name, checked=True)
    except READ_ERRORS as error:
        if many.is_dir():
            report.fault(f"{name}/", f"cannot be read as one table ({' '.join(str(error).split())})")
            return None
        size = path.stat().st_size
        report.fault(path.name, f"cannot be read, {size:,} bytes, corrupt or cut short ({error}); write it again")
        return None


def _columns_of(report: Report, name: str, file: Table, kinds: dict[str, str]) -> set[str]:
    """The columns of a table whose type is sound."""
    features = kinds if name == "sessions" else {}
    if file.rows == 0:
        report.fault(f"{name}.parquet", "is empty: no rows")
    needed = [*REQUIRED[name], *features]
    sound = check_columns(report, name, file, features, needed, file.schema_arrow.names)
    note_columns(report, name, file.schema_arrow.names, needed)
    return sound


def _note_other_tables(report: Report, folder: Path) -> None:
    for path in sorted(folder.glob("*.parquet")):
        if path.stem not in TABLES:
            report.note(path.name, f"is no table of a data set: it is not read{nearest(path.stem, TABLES)}")


def _check_checksums(report: Report, folder: Path, meta: dict) -> None:
    for name, entry in meta.get("files", {}).items():
        path = folder / Path(str(name)).name
        wanted = entry.get("sha256") if isinstance(entry, dict) else None
        if wanted and path.is_file():
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != wanted:
                report.note(path.name, f"has the sha256 {found[:12]}...; {YAML_FILE} says {str(wanted)[:12]}...")
