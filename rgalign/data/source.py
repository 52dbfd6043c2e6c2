"""The opened files of a folder under check: which columns can be judged, and how they are read."""

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from rgalign.data.faults import Report
from rgalign.data.parquet import Table


@dataclass
class Source:
    """The opened files, the columns of each whose type is sound, the feature kinds, the sound part of dataset.yaml."""

    files: dict[str, Table]
    columns: dict[str, set[str]]
    kinds: dict[str, str]
    meta: dict
    ids: dict[str, pa.Array] = field(default_factory=dict)  # table -> its key column, where readable
    parts: np.ndarray | None = None  # (sessions,) index in SPLITS of each session's split, where it has a sound one

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
        except (pa.ArrowException, OSError) as error:
            self.columns[table].discard(column)
            report.fault(f"{table}.{column}", f"cannot be read, the file is corrupt ({error}); write it again")
            return None
        return values
