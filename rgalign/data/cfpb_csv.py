"""The CFPB's complaint CSV in every spelling since 2014, as one table of strings under one set of names."""

import csv
import re
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.csv

from rgalign.data.faults import Report, count_rows, count_values, nearest, quote
from rgalign.data.tables import TableError

NEEDED = ("complaint_id", "date_received", "product", "sub_product", "issue", "sub_issue", "company", "state")
NEEDED += ("zip_code", "submitted_via")
# Later releases add these; the download and the search API name the narrative differently.
LATER = {"tags": ("tags",), "narrative": ("consumer_complaint_narrative", "complaint_what_happened")}
LEAKS = (  # known only after the complaint was made
    "company response",
    "timely response",
    "consumer disputed",
    "consent",
    "company public response",
    "date sent to company",
)
DATE_FORMATS = ("%m/%d/%Y", "%Y-%m-%d", "%m/%d/%y")
EMPTY = ("", "N/A", "None")
READ_AT_ONCE = 2**24  # bytes; a row must fit in
MOST_BROKEN_ROWS = 0.01  # of a file: one is cut off at its end, more is another kind of file


def read_rows(path: str | Path) -> tuple[pd.DataFrame, dict[str, int]]:
    """Complaints in the order of dates, then of the file; and how many rows were left out, by reason.

    Columns: NEEDED, tags, narrative; strings, '' where empty; date_received as datetime64.
    Left out: rows with another number of fields than the header (a file cut short), rows without an issue.
    Raises TableError naming column and rows: no such file, a column missing, a date unreadable, an id doubled.
    """
    path = Path(path)
    report = Report(path)
    spelt = _columns(report, path)
    _raise(report)
    table, broken = _read_csv(path, list(spelt.values()))
    rows = pd.DataFrame({column: table[name].to_pandas().astype(object) for column, name in spelt.items()})
    for column in rows:
        rows[column] = rows[column].str.strip()
        rows.loc[rows[column].isin(EMPTY), column] = ""
    for column in LATER:
        rows[column] = rows.get(column, "")
    rows["date_received"] = _dates(report, rows["date_received"])
    _check_ids(report, rows["complaint_id"])
    _raise(report)
    usable = rows["issue"] != ""
    if not usable.any():
        raise TableError(f"{path}: none of {len(rows)} rows has an issue. Nothing was read")
    left_out = {"rows with another number of fields": broken, "rows without an issue": int((~usable).sum())}
    return rows[usable].sort_values("date_received", kind="stable", ignore_index=True), left_out


def _columns(report: Report, path: Path) -> dict[str, str]:
    """Our name -> the header's, for the columns that are read."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader(file), [])
    except (OSError, ValueError, csv.Error) as error:
        raise TableError(f"{path} cannot be read as CSV: {error}. Nothing was read") from error
    names = {re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_"): name for name in header}
    for column in NEEDED:
        if column not in names:
            report.fault(column, f"is missing{nearest(column, names, 0.7)}")
    for name in (name for name in dict.fromkeys(header) if header.count(name) > 1):
        report.fault(quote(name), f"is in the header {header.count(name)} times; expected once")
    later = {column: names[name] for column, options in LATER.items() for name in options if name in names}
    return {column: names.get(column, column) for column in NEEDED} | later


def _read_csv(path: Path, names: list[str]) -> tuple[pa.Table, int]:
    """These columns as strings, and the number of rows left out because they have another number of fields."""
    broken = []

    def skip(row: pyarrow.csv.InvalidRow) -> str:
        broken.append(row.number)
        return "skip"

    try:
        table = pyarrow.csv.read_csv(
            path,
            read_options=pyarrow.csv.ReadOptions(use_threads=False, block_size=READ_AT_ONCE),
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=skip),
            convert_options=pyarrow.csv.ConvertOptions(
                include_columns=names, column_types=dict.fromkeys(names, pa.large_string())
            ),
        )
    except (pa.ArrowException, OSError) as error:
        raise TableError(f"{path} cannot be read as CSV: {error}. Nothing was read") from error
    if len(broken) > max(1, MOST_BROKEN_ROWS * table.num_rows):
        rows = f"{len(broken):,} rows have another number of fields than the header"
        raise TableError(f"{path}: {rows} (first: {', '.join(map(str, broken[:3]))}). Nothing was read")
    return table, len(broken)


def _dates(report: Report, written: pd.Series) -> pd.Series:
    """The day of each row; a time of day behind it, as the search API writes, is cut off."""
    day = written.str.split("T", n=1).str[0].str.split(" ", n=1).str[0]
    dates = pd.Series(pd.NaT, index=written.index, dtype="datetime64[us]")
    for spelling in DATE_FORMATS:
        missing = dates.isna()
        dates[missing] = pd.to_datetime(day[missing], format=spelling, errors="coerce").astype("datetime64[us]")
    if (wrong := dates.isna().to_numpy()).any():
        found = ", ".join(map(quote, written[wrong].unique()[:3]))
        what = count_rows(wrong, f"is no date ({found})")
        report.fault("date_received", f"{what}; expected 11/13/2014 or 2014-11-13")
    return dates


def _check_ids(report: Report, complaint_id: pd.Series) -> None:
    empty, again = complaint_id.eq("").to_numpy(), complaint_id.duplicated().to_numpy()
    if empty.any():
        report.fault("complaint_id", f"{count_rows(empty, 'is empty')}; every complaint needs its number")
    if (again & ~empty).any():
        what = count_values(complaint_id[again & ~empty], (again & ~empty).sum(), "repeats a number")
        report.fault("complaint_id", f"{what}; expected each complaint once")


def _raise(report: Report) -> None:
    if report.faults:
        raise TableError("\n".join([*str(report).splitlines()[:-1], "Nothing was read. Rows count from 0."]))
