"""Every fault of a data set folder at once: dataset.yaml, the files, their columns and types, then their values."""

import hashlib
from pathlib import Path

import pyarrow as pa

from rgalign.data import check_values
from rgalign.data.check_yaml import check_world, check_yaml
from rgalign.data.faults import SHOWN, Report, nearest, quote
from rgalign.data.parquet import Table, is_there, location
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
    is_list,
    is_text,
)

PANDAS_INDEX = "__index_level_"
MANY_NOTES = 5  # undeclared columns that are noted one by one
NO_TRANSCRIPTS = (
    "is not there: a tiny LM never sees a question and can only repeat the columns; RG-SFT and RG-DPO are of no use "
    "then (alignment.sft.use, alignment.dpo.use), unless reasoner.model is a pretrained one"
)
READ_ERRORS = (pa.ArrowException, OSError, ValueError)


def check(folder: str | Path) -> Report:
    """All faults and notes of the data set in `folder`; never raises for what it finds there.

    Memory: the impressions as integers (about 20 bytes a row) and one column of the sessions at a time.
    """
    folder = Path(folder)
    report = Report(folder)
    if not folder.is_dir():
        report.fault(str(folder), "is not a folder; expected a data set: intents, sessions, impressions, dataset.yaml")
        return report
    meta = check_yaml(report, folder / YAML_FILE)
    files = {name: file for name in TABLES if (file := _open(report, folder, name)) is not None}
    report.rows = {name: file.rows for name, file in files.items()}
    kinds = {name: kind for name, kind in meta.get("features", {}).items() if kind in KINDS}
    if meta:
        check_world(report, meta, simulated="truth" in files)
    columns = {name: _check_columns(report, name, file, kinds) for name, file in files.items()}
    _check_checksums(report, folder, meta)
    _note_other_tables(report, folder)
    if not is_there(folder, "transcripts"):
        report.note("transcripts.parquet", NO_TRANSCRIPTS)
    check_values.check_values(report, check_values.Source(files, columns, kinds, meta))
    return report


def _open(report: Report, folder: Path, name: str) -> Table | None:
    path, many = folder / f"{name}.parquet", folder / name
    if path.is_dir():
        report.fault(path.name, f"is a folder; expected one parquet file, or a folder {name}/ of many")
        return None
    if path.is_file() and many.is_dir():
        report.fault(path.name, f"is there, and a folder {name}/ as well; expected one of the two")
        return None
    if not location(folder, name).exists():
        if name in NEEDED_TABLES:
            report.fault(path.name, f"is missing; expected columns {', '.join(REQUIRED[name])}")
        return None
    try:
        return Table(folder, name, checked=True)
    except READ_ERRORS as error:
        if many.is_dir():
            report.fault(f"{name}/", f"cannot be read as one table ({' '.join(str(error).split())})")
            return None
        size = path.stat().st_size
        report.fault(path.name, f"cannot be read, {size:,} bytes, corrupt or cut short ({error}); write it again")
        return None


def _check_columns(report: Report, name: str, file: Table, kinds: dict[str, str]) -> set[str]:
    """The columns whose type is sound."""
    schema, features = file.schema_arrow, kinds if name == "sessions" else {}
    needed = [*REQUIRED[name], *features]
    known = {*needed, *OPTIONAL.get(name, {})}
    if file.rows == 0:
        report.fault(f"{name}.parquet", "is empty: no rows")
    for column in dict.fromkeys(column for column in schema.names if schema.names.count(column) > 1):
        report.fault(f"{name}.{column}", f"is there {schema.names.count(column)} times; expected once")
    unknown = [column for column in schema.names if column not in known]
    for column in needed:
        if column not in schema.names:
            why = _who_needs(column, features) + nearest(column, unknown, 0.75)
            report.fault(f"{name}.{column}", f"is missing{why}")
    if name == "sessions":
        _note_undeclared(report, [column for column in schema.names if column not in needed])
    for column in unknown:
        if near := nearest(column, OPTIONAL.get(name, {}), 0.75):
            report.note(f"{name}.{column}", f"is not a column the project reads{near}")
    if name == "transcripts" and not {"session_id", "features"} & set(schema.names):
        report.fault("transcripts", "has neither session_id nor features; expected one of them beside typed_query")
    sound = set()
    for column in (column for column in schema.names if column in known and schema.names.count(column) == 1):
        found, expected = schema.field(column).type, _expected(name, column, features.get(column))
        if EXPECTED[expected](found):
            sound.add(column)
        else:
            hint = HINTS.get(expected, "") if is_text(found) else ""
            report.fault(f"{name}.{column}", f"has the type {found}; expected {expected}{hint}")
    return sound


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


def _note_other_tables(report: Report, folder: Path) -> None:
    for path in sorted(folder.glob("*.parquet")):
        if path.stem not in TABLES:
            report.note(path.name, f"is no table of a data set: it is not read{nearest(path.stem, TABLES)}")


def _check_checksums(report: Report, folder: Path, meta: dict) -> None:
    for name, entry in meta.get("files", {}).items():
        path = folder / Path(str(name)).name
        wanted = entry.get("sha256") if isinstance(entry, dict) else None
        if wanted and path.is_file():
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != wanted:
                report.note(path.name, f"has the sha256 {found[:12]}...; {YAML_FILE} says {str(wanted)[:12]}...")
