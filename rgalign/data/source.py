"""The opened files of a folder under check: which columns can be judged, and how they are read."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from rgalign.data.check_columns import Readable
from rgalign.data.faults import Report

READ_ERRORS = (pa.ArrowException, OSError)


@dataclass
class Source:
    """The opened files, the columns of each whose type is sound, the feature kinds, the sound part of dataset.yaml."""

    files: Mapping[str, Readable]
    columns: dict[str, set[str]]
    kinds: dict[str, str]
    meta: dict
    ids: dict[str, pa.Array] = field(default_factory=dict)  # table -> its key column, where readable
    parts: np.ndarray | None = None  # (sessions,) index in SPLITS of each session's split, where it has a sound one
    shown: np.ndarray | None = None  # (sessions,) impressions of each session, where they can be told

    def has(self, table: str, *columns: str) -> bool:
        """True where all these columns can be judged."""
        return set(columns) <= self.columns.get(table, set())

    def load(self, report: Report, table: str, column: str) -> pa.ChunkedArray | None:
        """One column, or None and a fault where its pages cannot be decoded."""
        if not self.has(table, column):
            return None
        try:
            values = self.files[table].read(columns=[column])[column]
            if len(values) != self.files[table].rows:
                raise OSError(f"{len(values)} values for {self.files[table].rows} rows")
            values.validate(full=True)  # bytes that are not UTF-8 would otherwise surface in the middle of a run
        except READ_ERRORS as error:
            self._corrupt(report, table, column, error)
            return None
        # of whatever type: a column without a value has none of its own (check_columns lets it pass)
        return pa.chunked_array([pa.nulls(len(values))]) if 0 < len(values) == values.null_count else values

    def pieces(self, report: Report, table: str, column: str, rows: int) -> Iterator[pa.Array]:
        """One column, so many rows at a time; a fault and the end of it where its pages cannot be decoded."""
        if not self.has(table, column):
            return
        left = self.files[table].rows
        try:
            for batch in self.files[table].iter_batches(rows, [column]):
                batch.validate(full=True)
                left -= len(batch)
                yield batch.column(0)
            if left:
                raise OSError(f"{self.files[table].rows - left} values for {self.files[table].rows} rows")
        except READ_ERRORS as error:
            self._corrupt(report, table, column, error)

    def _corrupt(self, report: Report, table: str, column: str, error: Exception) -> None:
        self.columns[table].discard(column)
        report.fault(f"{table}.{column}", f"cannot be read, the file is corrupt ({error}); write it again")
