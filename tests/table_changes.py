"""Changes of a data set's tables and of its dataset.yaml, each a function of (tables, meta) that works in place."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml


def write_raw(folder: Path, tables: dict[str, pa.Table], meta: object) -> Path:
    """The tables as they are, faults included (`tables.write` would put them right or refuse them)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        pq.write_table(table, folder / f"{name}.parquet")
    (folder / "dataset.yaml").write_text(meta if isinstance(meta, str) else yaml.safe_dump(meta, sort_keys=False))
    return folder


def replaced(table: pa.Table, column: str, values) -> pa.Table:
    """The table with another column; `values` is a sequence, or a dict row -> value."""
    if isinstance(values, dict):
        old = table[column]
        values = [values.get(row, value) for row, value in enumerate(old.to_pylist())]
        values = pa.array(values, old.type)
    return table.set_column(table.column_names.index(column), column, pa.array(values))


def put(table, column, values):
    """A fault: values put into a column."""

    def change(tables, meta):
        tables[table] = replaced(tables[table], column, values)

    return change


def typed(table, column, kind, values=None):
    """A fault: the column in another type."""

    def change(tables, meta):
        old = tables[table][column]
        tables[table] = replaced(
            tables[table], column, pa.array([values] * len(old) if values else old.to_pylist(), kind)
        )

    return change


def drop(table, column):
    def change(tables, meta):
        tables[table] = tables[table].drop_columns([column])

    return change


def rename(table, column, to):
    def change(tables, meta):
        tables[table] = tables[table].rename_columns(
            [to if name == column else name for name in tables[table].column_names]
        )

    return change


def double(table, column):
    def change(tables, meta):
        tables[table] = tables[table].append_column(column, tables[table][column])

    return change


def empty(table):
    def change(tables, meta):
        tables[table] = tables[table].slice(0, 0)

    return change


def drop_rows(table, last):
    def change(tables, meta):
        tables[table] = tables[table].slice(0, len(tables[table]) - last)

    return change


def more_columns(number):
    def change(tables, meta):
        for each in range(number):
            tables["sessions"] = tables["sessions"].append_column(f"extra{each}", tables["sessions"]["region"])

    return change


def declare(**keys):
    def change(tables, meta):
        meta.update(keys)

    return change


def kind(column, value):
    def change(tables, meta):
        meta["features"][column] = value

    return change


def undeclare(*keys):
    def change(tables, meta):
        for key in keys:
            del meta[key]

    return change


def together(*changes):
    def change(tables, meta):
        for each in changes:
            each(tables, meta)

    return change
