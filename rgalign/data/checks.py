"""Every fault of a data set folder at once: dataset.yaml, the files, their columns and types, then their values."""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from rgalign.data import check_values
from rgalign.data.check_schema import Source, check_columns, check_world, check_yaml, note_columns
from rgalign.data.schema import (
    KINDS,
    NEEDED_TABLES,
    OPTIONAL,
    REQUIRED,
    STRING,
    TABLES,
    YAML_FILE,
    Table,
    as_type,
    as_types,
    is_there,
    location,
    to_frame,
)
from rgalign.errors import SHOWN, Report, count_rows, count_values, nearest, quote

# Rows that come as a pandas frame, before a finished run takes them: judged by the functions that `check` judges a
# folder's tables with, so that what one refuses the other refuses.

CONVERSION_ERRORS = (pa.ArrowException, UnicodeError, OverflowError, TypeError, ValueError)
YES_NO = {"true", "false"}  # as text of a column of booleans
OTHER_SPELLINGS = {*YES_NO, "1", "0", "1.0", "0.0", "yes", "no", "y", "n", "t", "f"}  # in lower case


@dataclass(frozen=True, eq=False)
class InMemory:
    """A table as `parquet.Table` gives it, of rows that are in memory already."""

    table: pa.Table

    @property
    def schema_arrow(self) -> pa.Schema:
        return self.table.schema

    @property
    def rows(self) -> int:
        return len(self.table)

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        return self.table if columns is None else self.table.select(list(columns))

    def iter_batches(self, rows: int, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        return iter(self.read(columns).to_batches(rows))


def judged(
    frame: object,
    name: str,
    needed: Iterable[str],
    *,
    kinds: Mapping[str, str],
    repeats: bool = False,
    seen: Mapping[str, Collection[str]] | None = None,
) -> tuple[Report, pd.DataFrame]:
    """The report on a frame's rows, and its known columns in the types that the project works with.

    name     sessions | intents: the table whose rules hold
    needed   columns that must be there; the table's other columns are judged where they are
    kinds    feature column -> kind (dataset.yaml)
    repeats  an id may come twice
    seen     categorical column -> the values that training knew, as text: yes and no in another spelling is a fault
    Where the report has faults the frame is not to be used. Rows count from 0.
    """
    report, needed = Report(Path(name)), list(dict.fromkeys(needed))
    if not isinstance(frame, pd.DataFrame):
        report.fault(name, f"is a {type(frame).__name__}; expected a pandas DataFrame with {', '.join(needed)}")
        return report, pd.DataFrame()
    names = [str(column) for column in frame.columns]
    own = {column: kind for column, kind in kinds.items() if column in needed} if name == "sessions" else {}
    known = [*needed, *(column for column in {**REQUIRED[name], **OPTIONAL.get(name, {})} if column not in needed)]
    if name == "sessions":  # of what a log has and a ranker does not read, only the time has a use here
        known = list(dict.fromkeys([*needed, "timestamp"]))
    arrays = {}
    for column in (column for column in known if names.count(column) == 1):
        try:
            arrays[column] = pa.array(frame.iloc[:, names.index(column)], from_pandas=True)
        except CONVERSION_ERRORS as error:
            report.fault(f"{name}.{column}", _unreadable(frame.iloc[:, names.index(column)], error))
    file = InMemory(pa.table(arrays)) if arrays else InMemory(pa.table({}))
    broken = {where.rpartition(".")[2] for where, _ in report.faults}
    asked = [column for column in needed if column not in broken]
    if not len(frame):
        report.fault(name, "has no row; expected at least one")
    sound = check_columns(report, name, file, own, asked, names)
    source = Source({name: file}, {name: sound}, own, {})
    for column in [column for column in arrays if column in sound]:
        if (values := source.load(report, name, column)) is not None:
            check_values.check_column(report, source, name, column, values, repeats=repeats)
            if column in (seen or {}):
                _check_yes_no(report, f"{name}.{column}", values, set(seen[column]))
    if report.faults:
        return report, pd.DataFrame()
    types = as_types(pa.table({column: source.load(report, name, column) for column in arrays}), name, own)
    return report, to_frame(types)


def _unreadable(values: pd.Series, error: Exception) -> str:
    if isinstance(error, UnicodeError):
        wrong = [isinstance(value, str) and not _is_unicode(value) for value in values]
        return f"{count_rows(np.array(wrong), 'holds half a character')} (a lone surrogate); expected text of Unicode"
    found = dict.fromkeys(type(value).__name__ for value in values if np.ndim(value) or not pd.isna(value))
    what = f"values of the types {', '.join(found)}" if len(found) > 1 else f"values that no column can have ({error})"
    return f"holds {what}; expected one type in all rows"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_yes_no(report: Report, where: str, values: pa.ChunkedArray, seen: set[str]) -> None:
    """true and false where training had 1 and 0, or the other way round: every value would be unknown, silently."""
    if not seen or pa.types.is_null(values.type):
        return
    keys = pd.Series(as_type(values, STRING).to_pylist(), dtype=object)
    wrong = keys.notna() & ~keys.isin(seen)
    if seen <= YES_NO:
        wrong &= keys.astype(str).str.lower().isin(OTHER_SPELLINGS) & ~keys.isin(YES_NO)
    elif not pa.types.is_boolean(values.type):
        return
    if wrong.any():
        known = ", ".join(map(quote, sorted(seen)[:SHOWN]))
        what = count_values(keys[wrong].tolist(), int(wrong.sum()), "has another value")
        report.fault(where, f"{what}; training knew {known}: give yes and no in the same spelling")


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
