"""How much data a run will read, before it reads it: for the dry run and its estimates."""

import csv
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from rgalign.artifacts import ArtifactError, data_path
from rgalign.data.parquet import Table
from rgalign.data.schema import NEEDED_TABLES, TIME, as_type, feature_kinds
from rgalign.rooms import Data

COUNTED = (
    2**26
)  # bytes of a CSV whose rows are counted; of a longer one they tell the rest: the CFPB's has gigabytes [C]
ROWS = 2**20  # timestamps in memory at once


@dataclass(frozen=True)
class Size:
    """What is known of a data set that nobody has loaded.

    about    `sessions` is estimated from the beginning of a file
    rows     table -> rows, where the source has tables
    first, last  of the sessions' times; None where they are empty or not told
    columns  feature columns, where the source declares them
    """

    sessions: int
    about: bool = False
    rows: tuple[tuple[str, int], ...] = ()
    first: datetime | None = None
    last: datetime | None = None
    columns: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{'about ' * self.about}{self.sessions:,} sessions"]
        parts += [f"{count:,} {name}" for name, count in self.rows if name != "sessions"]
        if self.first is not None:
            parts.append(f"{self.first:%Y-%m-%d} to {self.last:%Y-%m-%d}")
        if self.columns:
            parts.append(f"{len(self.columns)} feature columns: {', '.join(self.columns)}")
        return "; ".join(parts)


def size_of(data: Data) -> Size:
    """The size of what `data` names: rows of parquet files by their metadata, of raw files by counting lines.

    Raises ArtifactError where it is not there or cannot be counted, with the command that says all that is wrong.
    """
    if data.source == "shopworld":
        return Size(data.world.sessions)
    return _size(data.source, data_path(str(data.path)))


@cache  # a plan asks once a stage
def _size(source: str, path: Path) -> Size:
    try:
        return {"folder": _of_folder, "cfpb": _of_cfpb, "msweb": _of_msweb}[source](path)
    except (OSError, ValueError, LookupError, csv.Error, pa.ArrowException) as error:
        more = f"; all that is wrong with it: python -m rgalign check {path}" if source == "folder" else ""
        raise ArtifactError(
            f"data.path {path} cannot be read as {source} ({' '.join(str(error).split())}){more}"
        ) from None


def _of_folder(folder: Path) -> Size:
    tables = {name: Table(folder, name) for name in NEEDED_TABLES}
    rows = tuple((name, table.rows) for name, table in tables.items())
    spans = []
    for batch in tables["sessions"].iter_batches(ROWS, ["timestamp"]):
        found = pc.min_max(as_type(pa.chunked_array([batch.column(0)]), TIME)).as_py()
        spans += [] if found["min"] is None else [found]
    first = min((each["min"] for each in spans), default=None)
    last = max((each["max"] for each in spans), default=None)
    return Size(tables["sessions"].rows, rows=rows, first=first, last=last, columns=tuple(feature_kinds(folder)))


def _of_cfpb(path: Path) -> Size:
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    if not files:
        raise ValueError("holds no .csv")
    counts = [_rows(file) for file in files]
    return Size(round(sum(rows for rows, _ in counts)), about=any(about for _, about in counts))


def _rows(file: Path) -> tuple[float, bool]:
    """Rows of a CSV below its header, and whether that is an estimate."""
    read = 0
    with file.open("rb") as raw:

        def lines():
            nonlocal read
            for line in raw:
                read += len(line)
                yield line.decode("utf-8", "replace")

        rows = -1
        for _ in csv.reader(lines()):
            rows += 1
            if read >= COUNTED:
                break
    size = file.stat().st_size
    return max(rows, 0) * size / max(read, 1), read < size


def _of_msweb(folder: Path) -> Size:
    """Users who opened two areas or more: one of them is withheld."""
    sessions = 0
    for name in ("anonymous-msweb.data", "anonymous-msweb.test"):
        visits = 0
        for line in (folder / name).read_text(encoding="latin-1").splitlines():
            visits = 0 if line.startswith("C") else visits + line.startswith("V")
            sessions += line.startswith("V") and visits == 2
    return Size(sessions)
