"""A table of a data set folder: one parquet file, or a folder of many with hive partitions.

    shop/sessions.parquet                                  or
    shop/sessions/day=2026-01-05/region=SG/part-0.parquet  whose columns day and region are read from the path

Files are read in the order of their paths, batch by batch: sessions and impressions that are partitioned alike, each
file in the order of its sessions, are in one order too.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

Rows = TypeVar("Rows", pa.Table, pa.RecordBatch)


class Table:
    """One table for reading. Raises OSError, ArrowException or ValueError where its files cannot be read."""

    def __init__(self, folder: str | Path, name: str, *, checked: bool = False):
        """checked: pages are compared with their checksums as they are read."""
        path = location(folder, name)
        options = ds.ParquetFragmentScanOptions(page_checksum_verification=checked)
        self._kinds = ds.ParquetFileFormat(default_fragment_scan_options=options)
        self._file = None if path.is_dir() else pq.ParquetFile(path, page_checksum_verification=checked)
        self._path = path
        self.schema_arrow = self._file.schema_arrow if self._file else self._dataset.schema
        self.rows: int = self._file.metadata.num_rows if self._file else self._dataset.count_rows()

    @cached_property
    def _dataset(self) -> ds.Dataset:
        """All files as one: a column that some of them lack is missing there; unlike types of a column are an error."""
        found = ds.dataset(self._path, format=self._kinds, partitioning="hive")
        if not found.files:
            raise ValueError("holds no parquet file")
        stored = [fragment.physical_schema for fragment in found.get_fragments()]
        names = {name for schema in stored for name in schema.names}
        return found.replace_schema(
            pa.unify_schemas([*stored, pa.schema([field for field in found.schema if field.name not in names])])
        )

    def iter_batches(self, rows: int, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Batches of at most so many rows, in order; columns: None for all."""
        names = None if columns is None else list(columns)
        if self._file is not None:
            return map(_plain, self._file.iter_batches(rows, columns=names))
        ahead = {"batch_readahead": 1, "fragment_readahead": 1}  # memory of a batch or two, not of sixteen
        return map(_plain, self._dataset.to_batches(batch_size=rows, columns=names, use_threads=False, **ahead))

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The whole table, or these columns of it."""
        names = None if columns is None else list(columns)
        if self._file is not None:
            return _plain(self._file.read(columns=names))
        return _plain(self._dataset.to_table(columns=names, use_threads=False))


def regrouped(parts: Iterable[Rows], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of so many rows, each in one piece, the last one shorter."""
    waiting, count = [], 0
    for part in parts:
        waiting.append(pa.Table.from_batches([part]) if isinstance(part, pa.RecordBatch) else part)
        count += len(part)
        if count > rows:  # joined once a group: many small pieces would else be gone through again for each
            whole = pa.concat_tables(waiting)
            while len(whole) > rows:
                yield whole.slice(0, rows).combine_chunks()
                whole = whole.slice(rows)
            waiting, count = [whole], len(whole)
    if waiting:
        yield pa.concat_tables(waiting).combine_chunks()


def _plain(rows: Rows) -> Rows:
    """Strings that arrow keeps as views are made plain ones: it can neither filter nor sort views."""
    plain = [field.with_type(_plain_type(field.type)) for field in rows.schema]
    return rows.cast(pa.schema(plain)) if plain != list(rows.schema) else rows


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_string_view(kind):
        return pa.large_string()
    views = (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_string_view(kind.value_type)
    return pa.list_(pa.large_string()) if views else kind


def location(folder: str | Path, name: str) -> Path:
    """`name.parquet`, or the folder `name` where there is one and no such file."""
    file, many = Path(folder) / f"{name}.parquet", Path(folder) / name
    return many if many.is_dir() and not file.exists() else file


def is_there(folder: str | Path, name: str) -> bool:
    """Whether a data set folder has this table."""
    return location(folder, name).exists()
