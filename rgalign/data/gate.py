"""Rows that come as a pandas frame, before a finished run takes them: judged by the functions that `check` judges a
folder's tables with, so that what one refuses the other refuses."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from rgalign.data import check_values
from rgalign.data.check_columns import check_columns
from rgalign.data.faults import SHOWN, Report, count_rows, count_values, quote
from rgalign.data.schema import OPTIONAL, REQUIRED, STRING, as_type, as_types, to_frame
from rgalign.data.source import Source

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
