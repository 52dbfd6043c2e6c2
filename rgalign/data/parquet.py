"""A table of a data set folder: one parquet file, or a folder of many with hive partitions.

    shop/sessions.parquet                                  or
    shop/sessions/day=2026-01-05/region=SG/part-0.parquet  whose columns day and region are read from the path

A path is text, and text it stays: the type of such a column is that of its kind in dataset.yaml (schema.types_of_text),
never a guess from what its values look like. "007" is no 7, and "null" is a word; __HIVE_DEFAULT_PARTITION__ is empty.

Files are read in the order of their paths, batch by batch: sessions and impressions that are partitioned alike, each
file in the order of its sessions, are in one order too.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from rgalign.data.faults import SHOWN, quote
from rgalign.data.schema import STRING, YAML_FILE, feature_kinds, types_of_text

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
        self._of_path: dict[str, pa.DataType] = {}  # columns that the path tells, with their types
        if self._file is not None:
            self.schema_arrow, self.rows = self._file.schema_arrow, self._file.metadata.num_rows
            return
        self._of_path = self._columns_of_path(types_of_text(name, feature_kinds(folder)))
        self.schema_arrow = pa.schema(
            [field.with_type(self._of_path.get(field.name, field.type)) for field in self._dataset.schema]
        )
        self.rows = self._dataset.count_rows()

    def _columns_of_path(self, types: Mapping[str, pa.DataType]) -> dict[str, pa.DataType]:
        """Column -> type of what `column=value` in the paths tells and the files do not. Raises ValueError where only
        some files hold such a column themselves."""
        files = ds.dataset(self._path, format=self._kinds, partitioning=None)
        if not files.files:
            raise ValueError("holds no parquet file")
        folders = [part for file in files.files for part in Path(file).relative_to(self._path).parts[:-1]]
        keys = dict.fromkeys(unquote(part.split("=", 1)[0]) for part in folders if "=" in part)
        stored = [set(fragment.physical_schema.names) for fragment in files.get_fragments()] if keys else []
        held = {key: sum(key in names for names in stored) for key in keys}
        if some := [key for key, count in held.items() if 0 < count < len(stored)]:
            raise ValueError(f"tells {', '.join(map(quote, some))} by its path, and some files hold it as well")
        return {key: types.get(key, STRING) for key, count in held.items() if not count}

    @cached_property
    def _dataset(self) -> ds.Dataset:
        """All files as one: a column that some of them lack is missing there; unlike types of a column are an error.

        Columns of the path are strings here; `_typed` gives them their types.
        """
        told = pa.schema([(name, STRING) for name in self._of_path])
        found = ds.dataset(self._path, format=self._kinds, partitioning=ds.partitioning(told, flavor="hive"))
        self._refuse_other_kinds(found)
        stored = [fragment.physical_schema for fragment in found.get_fragments()]
        return found.replace_schema(pa.unify_schemas([*stored, told]))

    def _refuse_other_kinds(self, found: ds.Dataset) -> None:
        """Raises ValueError naming every column of the path that has values which are not of its kind."""
        told = [ds.get_partition_keys(fragment.partition_expression) for fragment in found.get_fragments()]
        faults = []
        for name, kind in self._of_path.items():
            values = dict.fromkeys(each[name] for each in told if each.get(name) is not None)
            if wrong := [value for value in values if not _is_readable(value, kind)]:
                seen = ", ".join(map(quote, wrong[:SHOWN]))
                faults.append(f"{name} is {seen} in its path; expected {kind}, by its kind in {YAML_FILE}")
        if faults:
            raise ValueError("; ".join(faults))

    def _typed(self, rows: Rows) -> Rows:
        """Columns of the path in their types, and strings that arrow keeps as views made plain ones: it can neither
        filter nor sort views."""
        kinds = [field.with_type(self._of_path.get(field.name, _plain_type(field.type))) for field in rows.schema]
        return rows.cast(pa.schema(kinds)) if kinds != list(rows.schema) else rows

    def iter_batches(self, rows: int, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Batches of at most so many rows, in order; columns: None for all."""
        names = None if columns is None else list(columns)
        if self._file is not None:
            return map(self._typed, self._file.iter_batches(rows, columns=names))
        ahead = {"batch_readahead": 1, "fragment_readahead": 1}  # memory of a batch or two, not of sixteen
        return map(self._typed, self._dataset.to_batches(batch_size=rows, columns=names, use_threads=False, **ahead))

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The whole table, or these columns of it."""
        names = None if columns is None else list(columns)
        if self._file is not None:
            return self._typed(self._file.read(columns=names))
        return self._typed(self._dataset.to_table(columns=names, use_threads=False))


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


def _is_readable(text: str, kind: pa.DataType) -> bool:
    try:
        return pa.scalar(text).cast(kind).is_valid
    except pa.ArrowException:
        return False


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
