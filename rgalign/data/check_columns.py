"""The columns of a table: which must be there, which types they may have, and how a wrong one is mended."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa

from rgalign.data.faults import SHOWN, Report, nearest, quote
from rgalign.data.schema import OPTIONAL, PROBABILITIES, REQUIRED, STRING, TIME, YAML_FILE, as_type, is_list, is_text

PANDAS_INDEX = "__index_level_"
MANY_NOTES = 5  # undeclared columns that are noted one by one
UNITS = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
# Numbers that a time between 1973 and 5138 has in each unit: the ranges do not overlap.
EPOCH = {unit: (1e8 * 1000**power, 1e11 * 1000**power) for power, unit in enumerate(UNITS)}


class Readable(Protocol):
    """A table under check: parquet.Table, or rows in memory (gate.InMemory)."""

    schema_arrow: pa.Schema
    rows: int

    def read(self, columns: Sequence[str] | None = None) -> pa.Table: ...


def check_columns(
    report: Report, name: str, file: Readable, features: Mapping[str, str], needed: Sequence[str], there: Sequence[str]
) -> set[str]:
    """The columns whose type is sound; what is wrong with the others goes into `report`.

    features  feature column -> kind;  needed  columns that must be there
    there     all column names, also of columns that `file` does not have: they may be what somebody meant
    A column without a single value may have any type.
    """
    known = {*needed, *REQUIRED[name], *OPTIONAL.get(name, {})}
    for column in dict.fromkeys(column for column in there if there.count(column) > 1):
        report.fault(f"{name}.{column}", f"is there {there.count(column)} times; expected once")
    unknown = [column for column in there if column not in known]
    for column in needed:
        if column not in there:
            why = _who_needs(column, features) + nearest(column, unknown, 0.75)
            report.fault(f"{name}.{column}", f"is missing{why}")
    if name == "transcripts" and not {"session_id", "features"} & set(there):
        report.fault("transcripts", "has neither session_id nor features; expected one of them beside typed_query")
    sound, names = set(), file.schema_arrow.names
    for column in (column for column in names if column in known and there.count(column) == 1):
        found, expected = file.schema_arrow.field(column).type, _expected(name, column, features.get(column))
        values = None if EXPECTED[expected](_unfolded(found)) else _values(file, column)
        if EXPECTED[expected](_unfolded(found)) or (values is not None and 0 < len(values) == values.null_count):
            sound.add(column)
        else:
            hint = "" if values is None else _how_to_mend(values, expected)
            report.fault(f"{name}.{column}", f"has the type {found}; expected {expected}{hint}")
    return sound


def note_columns(report: Report, name: str, there: Sequence[str], needed: Sequence[str]) -> None:
    """Notes on columns that are there and not read."""
    if name == "sessions":
        _note_undeclared(report, [column for column in there if column not in needed])
    for column in (column for column in there if column not in {*needed, *OPTIONAL.get(name, {})}):
        if near := nearest(column, OPTIONAL.get(name, {}), 0.75):
            report.note(f"{name}.{column}", f"is not a column the project reads{near}")


def _unfolded(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _values(file: Readable, column: str) -> pa.ChunkedArray | None:
    """A column of a wrong type, to tell how it is mended; None where it cannot be read either."""
    try:
        return as_type(file.read(columns=[column])[column], None)
    except (pa.ArrowException, OSError):
        return None


def _how_to_mend(values: pa.ChunkedArray, expected: str) -> str:
    """'; pd.to_datetime(.., unit="s") makes them': what turns these values into what is expected, where it is known."""
    numbers = _as_numbers(values)
    if expected == "timestamps or dates" and numbers is not None:
        typical = float(np.median(np.abs(numbers)))
        unit = next((unit for unit, (low, high) in EPOCH.items() if low <= typical < high), None)
        asked = f'unit="{unit}"' if unit else "unit=.."
        first = "pd.to_numeric first, then " if is_text(values.type) else ""
        found = f"looks like {UNITS[unit]} since 1970" if unit else "numbers do not say what they count"
        return f"; {found}: {first}pd.to_datetime(.., {asked}) makes them, and without a unit it makes dates in 1970"
    if is_text(values.type):
        return HINTS.get(expected, "")
    whole = numbers is not None and pa.types.is_floating(values.type) and bool((numbers % 1 == 0).all())
    if whole and "integers" in expected and not expected.startswith("lists"):
        return '; pandas makes floats of whole numbers beside empty cells: .astype("Int64") keeps them whole'
    return ""


def _as_numbers(values: pa.ChunkedArray) -> np.ndarray | None:
    """The finite numbers of a column of numbers or of words that are numbers; None where it has others, or none."""
    try:
        found = values.cast(pa.float64(), safe=False).drop_null().to_numpy()
    except pa.ArrowException:
        return None
    found = found[np.isfinite(found)]
    return found if len(found) else None


def _note_undeclared(report: Report, names: list[str]) -> None:
    for name in [name for name in names if name.startswith(PANDAS_INDEX)]:
        report.note(
            f"sessions.{name}", "is pandas' row index, and no feature: to_parquet(.., index=False) leaves it out"
        )
        names.remove(name)
    if len(names) > MANY_NOTES:
        first = ", ".join(map(quote, names[:SHOWN]))
        what = f"{len(names)} columns are not declared in {YAML_FILE} (first: {first}): they are kept, and no features"
        report.note("sessions", what)
        return
    for name in names:
        report.note(f"sessions.{name}", f"is not declared in {YAML_FILE}: it is kept, and is not a feature")


def _who_needs(column: str, features: dict[str, str]) -> str:
    if column in features:
        return f", yet {YAML_FILE} declares it ({features[column]})"
    optional = ("description", "category", "timestamp", "region", "split", "valid_from")
    return "; expected it, even if all its values are empty" if column in optional else ""


def _is_number(found: pa.DataType) -> bool:
    types = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal)
    return any(is_type(found) for is_type in types)


def _is_key(found: pa.DataType) -> bool:
    return is_text(found) or pa.types.is_integer(found)


def _is_history(found: pa.DataType) -> bool:
    """Where every list is empty, arrow may say that they hold nulls."""
    values = found.value_type if is_list(found) else pa.struct([])
    return pa.types.is_null(values) or (_is_key(values) and not pa.types.is_dictionary(values))


# What is expected, in the words of the message -> the types that will do. A column of nulls only has the type null.
EXPECTED = {
    "strings or integers": lambda found: _is_key(found) or pa.types.is_null(found),
    "strings": lambda found: is_text(found) or pa.types.is_null(found),
    "timestamps or dates": lambda found: (
        pa.types.is_timestamp(found) or pa.types.is_date(found) or pa.types.is_null(found)
    ),
    "integers 0 to n-1": pa.types.is_integer,
    "true or false, or 1 or 0": lambda found: _is_number(found) or pa.types.is_null(found),
    "integers 0 or 1": lambda found: pa.types.is_integer(found) or pa.types.is_boolean(found),
    "numbers": lambda found: _is_number(found) or pa.types.is_null(found),
    "strings, integers or booleans": lambda found: (
        _is_key(found) or pa.types.is_boolean(found) or pa.types.is_null(found)
    ),
    "lists of strings or integers": lambda found: _is_history(found) or pa.types.is_null(found),
    "lists of floats": lambda found: is_list(found) and pa.types.is_floating(found.value_type),
    "a map of strings to strings": lambda found: (
        pa.types.is_map(found) and is_text(found.key_type) and is_text(found.item_type)
    ),
}
OF_KIND = {
    "categorical": "strings, integers or booleans",
    "numeric": "numbers",
    "text": "strings",
    "history": "lists of strings or integers",
}
HINTS = {"timestamps or dates": "; pd.to_datetime makes them", "numbers": "; pd.to_numeric makes them"}  # of strings
OF_COLUMN = {
    "position": "integers 0 to n-1",
    "clicked": "integers 0 or 1",
    "propensity": "numbers",
    "shuffled": "true or false, or 1 or 0",
}


def _expected(table: str, column: str, kind: str | None) -> str:
    if kind is not None:
        return OF_KIND[kind]
    if column in OF_COLUMN:
        return OF_COLUMN[column]
    type_in_memory = {**REQUIRED[table], **OPTIONAL.get(table, {})}[column]
    if type_in_memory == TIME:
        return "timestamps or dates"
    if type_in_memory == PROBABILITIES:
        return "lists of floats"
    if type_in_memory == STRING:
        return "strings or integers" if column.endswith("_id") else "strings"
    return "a map of strings to strings"
