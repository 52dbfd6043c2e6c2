"""Every error of a data set at once: `check` of a folder (dataset.yaml, files, columns, values), `check_frame` of rows
in pandas. Both check types by `check_columns` and values by check_values.check_column: one refuses what the other does.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from rgalign.data import check_lists, check_values
from rgalign.data.check_values import InMemory, Readable, Source
from rgalign.data.dataset_yaml import check_yaml
from rgalign.data.schema import (
    KINDS,
    NEEDED_TABLES,
    OPTIONAL,
    PROBABILITIES,
    REQUIRED,
    STRING,
    TABLES,
    TIME,
    YAML_FILE,
    Table,
    as_type,
    as_types,
    is_list,
    is_text,
    is_there,
    location,
)
from rgalign.errors import SHOWN, Report, count_rows, nearest, safe_repr

NO_TRANSCRIPTS = (
    "is not there: a tiny LM never sees a question and can only repeat the columns; RG-SFT and RG-DPO are of no use "
    "then (alignment.sft.use, alignment.dpo.use), unless reasoner.model is a pretrained one"
)


def check(folder: str | Path) -> Report:
    """All errors and notes of the data set in `folder`; never raises for what it finds there.

    Memory: the impressions as integers (about 20 bytes a row) and one column of the sessions at a time.
    """
    folder = Path(folder)
    report = Report(folder)
    if not folder.is_dir():
        report.error(str(folder), "is not a folder; expected a data set: intents, sessions, impressions, dataset.yaml")
        return report
    meta = check_yaml(report, folder / YAML_FILE, simulated=is_there(folder, "truth"))
    files = {name: file for name in TABLES if (file := _open(report, folder, name)) is not None}
    report.rows = {name: file.rows for name, file in files.items()}
    kinds, columns = {name: kind for name, kind in meta.get("features", {}).items() if kind in KINDS}, {}
    for name, file in files.items():
        features, there = (kinds if name == "sessions" else {}), file.schema_arrow.names
        if file.rows == 0:
            report.error(f"{name}.parquet", "is empty: no rows")
        needed = [*REQUIRED[name], *features]
        columns[name] = check_columns(report, name, file, features, needed, there)
        _note_columns(report, name, [column for column in there if column not in needed])
    for name, entry in meta.get("files", {}).items():  # the checksums that dataset.yaml states
        path = folder / Path(str(name)).name
        expected = entry.get("sha256") if isinstance(entry, dict) else None
        if expected and path.is_file():
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != expected:
                report.note(path.name, f"has the sha256 {found[:12]}...; {YAML_FILE} says {str(expected)[:12]}...")
    for path in (path for path in sorted(folder.glob("*.parquet")) if path.stem not in TABLES):
        report.note(path.name, f"is no table of a data set: it is not read{nearest(path.stem, TABLES)}")
    if not is_there(folder, "transcripts"):
        report.note("transcripts.parquet", NO_TRANSCRIPTS)
    source = Source(files, columns, kinds, meta)
    check_values.check_values(report, source)
    check_lists.check_lists(report, source)
    return report


def _open(report: Report, folder: Path, name: str) -> Table | None:
    path, many = folder / f"{name}.parquet", folder / name
    if path.is_dir():
        report.error(path.name, f"is a folder; expected one parquet file, or a folder {name}/ of many")
    elif path.is_file() and many.is_dir():
        report.error(path.name, f"is there, and a folder {name}/ as well; expected one of the two")
    elif not location(folder, name).exists():
        if name in NEEDED_TABLES:
            report.error(path.name, f"is missing; expected columns {', '.join(REQUIRED[name])}")
    else:
        try:
            return Table(folder, name, checked=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            if many.is_dir():
                report.error(f"{name}/", f"cannot be read as one table ({' '.join(str(error).split())})")
            else:
                found = f"cannot be read, {path.stat().st_size:,} bytes, corrupt or cut short ({error})"
                report.error(path.name, f"{found}; write it again")
    return None


# The columns of a table: which must be there, which types they may have, and how a wrong one is mended.

PANDAS_INDEX = "__index_level_"
MANY_NOTES = 5  # undeclared columns that are noted one by one
UNITS = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
# Numbers that a time between 1973 and 5138 has in each unit: the ranges do not overlap.
EPOCH = {unit: (1e8 * 1000**power, 1e11 * 1000**power) for power, unit in enumerate(UNITS)}


def check_columns(
    report: Report, name: str, file: Readable, features: Mapping[str, str], needed: Sequence[str], there: Sequence[str]
) -> set[str]:
    """The columns whose type is right; errors of the others go into `report`.

    features  feature column -> kind;  needed  columns that must be there
    there     all column names, also of columns that `file` does not have: a missing one may be misspelt among them
    A column without a single value may have any type.
    """
    known, times = {*needed, *REQUIRED[name], *OPTIONAL.get(name, {})}, Counter(there)
    for column, count in times.items():
        if count > 1:
            report.error(f"{name}.{column}", f"is there {count} times; expected once")
    unknown = [column for column in there if column not in known]
    for column in (column for column in needed if column not in times):
        why = f", yet {YAML_FILE} declares it ({features[column]})" if column in features else ""
        if column in ("description", "category", "timestamp", "region", "split", "valid_from") and not why:
            why = "; expected it, even if all its values are empty"
        report.error(f"{name}.{column}", f"is missing{why}{nearest(column, unknown, 0.75)}")
    if name == "transcripts" and not {"session_id", "features"} & set(there):
        report.error("transcripts", "has neither session_id nor features; expected one of them beside typed_query")
    right = set()
    for column in file.schema_arrow.names:
        if column not in known or times[column] > 1:
            continue
        found, expected = file.schema_arrow.field(column).type, _expected(name, column, features.get(column))
        if TYPES[expected](found.value_type if pa.types.is_dictionary(found) else found):
            right.add(column)
            continue
        try:
            values = as_type(file.read(columns=[column])[column], None)
            hint = _how_to_mend(values, expected)
        except (pa.ArrowException, OSError):
            values, hint = (), ""
        if len(values) and values.null_count == len(values):
            right.add(column)
        else:
            report.error(f"{name}.{column}", f"has the type {found}; expected {expected}{hint}")
    return right


def _note_columns(report: Report, name: str, others: list[str]) -> None:
    """Notes on columns that are there and not read."""
    if name == "sessions":
        undeclared = [column for column in others if not column.startswith(PANDAS_INDEX)]
        for column in (column for column in others if column.startswith(PANDAS_INDEX)):
            what = "is pandas' row index, and no feature: to_parquet(.., index=False) leaves it out"
            report.note(f"sessions.{column}", what)
        if len(undeclared) > MANY_NOTES:
            first = ", ".join(map(safe_repr, undeclared[:SHOWN]))
            many = f"{len(undeclared)} columns are not declared in {YAML_FILE} (first: {first})"
            report.note("sessions", f"{many}: they are kept, and no features")
        for column in undeclared if len(undeclared) <= MANY_NOTES else ():
            report.note(f"sessions.{column}", f"is not declared in {YAML_FILE}: it is kept, and is not a feature")
    optional = OPTIONAL.get(name, {})
    for column in (column for column in others if column not in optional):
        if near := nearest(column, optional, 0.75):
            report.note(f"{name}.{column}", f"is not a column the project reads{near}")


def _how_to_mend(values: pa.ChunkedArray, expected: str) -> str:
    """'; pd.to_datetime(.., unit="s") makes them': what turns these values into what is expected, where it is known."""
    try:
        numbers = values.cast(pa.float64(), safe=False).drop_null().to_numpy()
        numbers = numbers[np.isfinite(numbers)]
    except pa.ArrowException:  # words that are no numbers
        numbers = np.empty(0)
    if expected == "timestamps or dates" and len(numbers):
        typical = float(np.median(np.abs(numbers)))
        unit = next((unit for unit, (low, high) in EPOCH.items() if low <= typical < high), None)
        first = "pd.to_numeric first, then " if is_text(values.type) else ""
        found = f"looks like {UNITS[unit]} since 1970" if unit else "numbers do not say what they count"
        asked = f'unit="{unit}"' if unit else "unit=.."
        return f"; {found}: {first}pd.to_datetime(.., {asked}) makes them, and without a unit it makes dates in 1970"
    if is_text(values.type):
        makers = {"timestamps or dates": "; pd.to_datetime makes them", "numbers": "; pd.to_numeric makes them"}
        return makers.get(expected, "")
    whole = pa.types.is_floating(values.type) and len(numbers) and bool((numbers % 1 == 0).all())
    if whole and "integers" in expected and not expected.startswith("lists"):
        return '; pandas makes floats of whole numbers beside empty cells: .astype("Int64") keeps them whole'
    return ""


def _expected(table: str, column: str, kind: str | None) -> str:
    type_in_memory = {**REQUIRED[table], **OPTIONAL.get(table, {})}.get(column)
    if kind is None and type_in_memory == STRING and column.endswith("_id"):
        return "strings or integers"
    keys = (kind,) if kind else (column, type_in_memory)
    return next((EXPECTED[key] for key in keys if key in EXPECTED), "a map of strings to strings")


def _is_number(found: pa.DataType) -> bool:
    types = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal, pa.types.is_null)
    return any(is_type(found) for is_type in types)


def _is_key(found: pa.DataType) -> bool:
    return is_text(found) or pa.types.is_integer(found) or pa.types.is_null(found)


# What is expected, in the words of the message -> the types that will do. A column of nulls only has the type null.
TYPES = {
    "strings or integers": _is_key,
    "strings": lambda found: is_text(found) or pa.types.is_null(found),
    "timestamps or dates": lambda found: (
        pa.types.is_timestamp(found) or pa.types.is_date(found) or pa.types.is_null(found)
    ),
    "integers 0 to n-1": pa.types.is_integer,
    "integers 0 or 1": lambda found: pa.types.is_integer(found) or pa.types.is_boolean(found),
    "true or false, or 1 or 0": _is_number,
    "numbers": _is_number,
    "strings, integers or booleans": lambda found: _is_key(found) or pa.types.is_boolean(found),
    "lists of strings or integers": lambda found: (
        pa.types.is_null(found)
        or (is_list(found) and _is_key(found.value_type) and not pa.types.is_dictionary(found.value_type))
    ),
    "lists of floats": lambda found: is_list(found) and pa.types.is_floating(found.value_type),
    "a map of strings to strings": lambda found: (
        pa.types.is_map(found) and is_text(found.key_type) and is_text(found.item_type)
    ),
}
EXPECTED = {  # kind of a feature, name of a column, or type in memory -> words of TYPES
    "categorical": "strings, integers or booleans",
    "numeric": "numbers",
    "text": "strings",
    "history": "lists of strings or integers",
    "position": "integers 0 to n-1",
    "clicked": "integers 0 or 1",
    "propensity": "numbers",
    "selection": "numbers",
    "shuffled": "true or false, or 1 or 0",
    TIME: "timestamps or dates",
    PROBABILITIES: "lists of floats",
    STRING: "strings",
}


# Rows that come as a pandas frame, before a finished run takes them.

CONVERSION_ERRORS = (pa.ArrowException, UnicodeError, OverflowError, TypeError, ValueError)
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character
YES_NO = {"true", "false"}  # as text of a column of booleans
OTHER_SPELLINGS = {*YES_NO, "1", "0", "1.0", "0.0", "yes", "no", "y", "n", "t", "f"}  # in lower case


def check_frame(
    frame: object,
    name: str,
    needed: Iterable[str],
    *,
    kinds: Mapping[str, str],
    repeats: bool = False,
    seen: Mapping[str, Collection[str]] | None = None,
) -> tuple[Report, pa.Table]:
    """The errors of a frame's rows (no notes), and its known columns in the types that the project works with.

    name     sessions | intents: the table whose rules hold
    needed   columns that must be there; the table's other columns are checked where they are
    kinds    feature column -> kind (dataset.yaml)
    repeats  an id may come twice
    seen     categorical column -> the values that training knew, as text: yes and no in another spelling is an error
    Where the report has errors the table is empty.
    """
    report, needed = Report(Path(name)), list(dict.fromkeys(needed))
    if not isinstance(frame, pd.DataFrame):
        report.error(name, f"is a {type(frame).__name__}; expected a pandas DataFrame with {', '.join(needed)}")
        return report, pa.table({})
    names = [str(column) for column in frame.columns]
    times, series = Counter(names), dict(zip(names, (values for _, values in frame.items()), strict=True))
    features = {column: kind for column, kind in kinds.items() if column in needed} if name == "sessions" else {}
    known = {**REQUIRED[name], **OPTIONAL.get(name, {})}
    # of what a log has and a ranker does not read, only the time of a session has a use here
    others = ["timestamp"] if name == "sessions" else known
    arrays = {}
    for column in dict.fromkeys([*needed, *others]):
        if times[column] == 1:
            try:
                values = series[column].array  # arrow asks a series for many attributes before it finds its array
                known_to_arrow = hasattr(values, "__arrow_array__")
                arrays[column] = pa.array(values if known_to_arrow else series[column], from_pandas=True)
            except CONVERSION_ERRORS as error:
                report.error(f"{name}.{column}", _unreadable(series[column], error))
    file = InMemory(pa.table(arrays))
    broken = {where.rpartition(".")[2] for where, _ in report.errors}
    if not len(frame):
        report.error(name, "has no row; expected at least one")
    right = check_columns(report, name, file, features, [c for c in needed if c not in broken], names)
    source, loaded = Source({name: file}, {name: right}, features, {}), {}
    for column in (column for column in arrays if column in right):
        if (values := source.load(report, name, column)) is not None:
            loaded[column] = values
            # of a value in words alone nothing can be wrong but its type: a note at most, which nobody is shown here
            if features.get(column) not in ("categorical", "text") or column in known:
                check_values.check_column(report, source, name, column, values, repeats=repeats)
            if column in (seen or {}):
                _check_spelling(report, f"{name}.{column}", values, frozenset(seen[column]))
    return report, as_types(pa.table({} if report.errors else loaded), name, features)


def _unreadable(values: pd.Series, error: Exception) -> str:
    if isinstance(error, UnicodeError):
        wrong = np.array([isinstance(value, str) and SURROGATE.search(value) is not None for value in values])
        return f"{count_rows(wrong, 'holds half a character')} (a lone surrogate); expected text of Unicode"
    found = dict.fromkeys(type(value).__name__ for value in values if np.ndim(value) or not pd.isna(value))
    what = f"values of the types {', '.join(found)}" if len(found) > 1 else f"values that no column can have ({error})"
    return f"holds {what}; expected one type in all rows"


def _check_spelling(report: Report, where: str, values: pa.ChunkedArray, seen: frozenset[str]) -> None:
    """true and false where training had 1 and 0, or the other way round: every value would be unknown, silently."""
    spelt_out = seen <= YES_NO
    if not seen or pa.types.is_null(values.type) or not (spelt_out or pa.types.is_boolean(values.type)):
        return  # almost every column: one session is checked in the time of a request
    keys = pd.Series(as_type(values, STRING).to_pylist(), dtype=object)
    wrong = keys.notna() & ~keys.isin(seen)
    if spelt_out:
        wrong &= keys.astype(str).str.lower().isin(OTHER_SPELLINGS) & ~keys.isin(YES_NO)
    known = ", ".join(map(safe_repr, sorted(seen)[:SHOWN]))
    then = f"; training knew {known}: give yes and no in the same spelling"
    report.error_values(where, keys[wrong], "has another value", then)
