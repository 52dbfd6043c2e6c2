"""The file of a click log as a frame: delimited text, JSON lines or parquet (`import_log` makes tables of it)."""

import csv
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from rgalign.data.schema import as_type
from rgalign.data.tables import TableError
from rgalign.errors import safe_repr


def read_log(path: Path) -> pd.DataFrame:
    """The log's rows: .csv, .tsv and .txt (every column text), .jsonl, .parquet. Raises TableError."""
    if not path.is_file():
        raise TableError(f"there is no file {path}; expected a log: one row for each answer that was shown")
    kind = path.suffix.lower()
    if kind not in READERS:
        raise TableError(f"{path} ends in {kind or 'nothing'}; expected one of {', '.join(READERS)}")
    if not path.stat().st_size:
        raise TableError(f"{path} is empty; expected one row for each answer that was shown")
    try:
        table = READERS[kind](path)
    except (ValueError, OSError, pa.ArrowException, csv.Error) as error:
        if isinstance(error, TableError):
            raise
        raise TableError(f"{path} cannot be read as {kind}: {' '.join(str(error).split())}") from None
    names = [name.strip() or f"column {number}" for number, name in enumerate(table.column_names, start=1)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not len(table):
        wrong = f"has {', '.join(map(safe_repr, twice))} more than once" if twice else "has no row"
        raise TableError(f"{path} {wrong}; expected column names that differ, and one row for each answer shown")
    whole = dict.fromkeys((pa.int8(), pa.int16(), pa.int32(), pa.int64()), pd.Int64Dtype())
    types = whole | dict.fromkeys((pa.string(), pa.large_string()), pd.StringDtype()) | {pa.bool_(): pd.BooleanDtype()}
    columns = [as_type(one, one.type.value_type) if pa.types.is_dictionary(one.type) else one for one in table.columns]
    return pa.table(dict(zip(names, columns, strict=True))).to_pandas(types_mapper=types.get)


def _read_text(path: Path) -> pa.Table:
    """Delimited text in UTF-8, with the line `sep=;` before the names that spreadsheets write. Raises TableError."""
    wrong, quotes = [], 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            quotes += line.count(b'"')
            if "\ufffd" in line.decode(errors="replace"):
                wrong.append(number)
    with path.open(encoding="utf-8-sig", newline="", errors="replace") as file:
        first = file.readline()
        stated = first.rstrip("\r\n")[4:5] if first.lower().startswith("sep=") else ""
        separator = stated or max(",;\t|", key=first.count)
        names = next(csv.reader(file if stated else [first, *file.readlines(2**16)], delimiter=separator), [])
    if wrong:
        raise TableError(f"{path} is no UTF-8 in {len(wrong):,} lines (first: line {wrong[0]:,}); save it as UTF-8")
    ragged = []

    def note_ragged(row: pa_csv.InvalidRow) -> str:
        ragged.append(row)
        return "skip"

    table = pa_csv.read_csv(
        path,
        pa_csv.ReadOptions(use_threads=False, skip_rows=len(stated)),
        pa_csv.ParseOptions(delimiter=separator, newlines_in_values=True, invalid_row_handler=note_ragged),
        pa_csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True, null_values=[""]
        ),
    )
    if ragged:
        first = ", ".join(f"row {row.number} has {row.actual_columns}" for row in ragged[:3])
        few = f"{len(ragged):,} rows have not the {ragged[0].expected_columns} columns of the first line"
        raise TableError(f"{path}: {few} (first: {first}); is a quotation mark missing?")
    last = table.slice(max(len(table) - 1, 0)).to_pylist()
    if quotes % 2 and any("\n" in (value or "") for row in last for value in row.values()):
        raise TableError(f"{path}: a quotation mark is never closed: row {len(table):,} takes in all that follows")
    return table


READERS = {
    **dict.fromkeys((".csv", ".tsv", ".txt"), _read_text),
    **dict.fromkeys((".jsonl", ".ndjson"), pa_json.read_json),
    **dict.fromkeys((".parquet", ".pq"), lambda path: pq.ParquetFile(path).read()),  # no column is read from the path
}
