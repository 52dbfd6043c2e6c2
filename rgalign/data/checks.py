"""Every fault of a data set folder at once: dataset.yaml, the files, their columns and types, then their values."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from rgalign.data import check_values
from rgalign.data.faults import Report, nearest, quote
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

# Keys of dataset.yaml that the code reads; any other is kept and left alone.
YAML_KEYS = ("name", "features", "position_is_real", "sampled_negatives", "time_split", "world")
SUB_KEYS = {
    "sampled_negatives": ("popularity", "uniform", "smoothing"),
    "time_split": ("valid_from", "test_from", "train", "valid"),
}
FREE_TEXT_KEYS = ("what", "title", "split", "candidates", "caution", "licence", "origin", "files")
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
    meta = _check_yaml(report, folder / YAML_FILE)
    files = {name: file for name in TABLES if (file := _open(report, folder / f"{name}.parquet", name)) is not None}
    report.rows = {name: file.metadata.num_rows for name, file in files.items()}
    kinds = {name: kind for name, kind in meta.get("features", {}).items() if kind in KINDS}
    columns = {name: _check_columns(report, name, file, kinds) for name, file in files.items()}
    _check_checksums(report, folder, meta)
    check_values.check_values(report, check_values.Source(files, columns, kinds, meta))
    return report


def _check_yaml(report: Report, path: Path) -> dict:
    """The usable part of dataset.yaml: what is not a fault."""
    if not path.is_file():
        report.fault(YAML_FILE, f"is missing; expected name and features (column: {' | '.join(KINDS)})")
        return {}
    try:
        meta = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        report.fault(YAML_FILE, f"is not YAML: {' '.join(str(error).split())}")
        return {}
    if not isinstance(meta, dict):
        report.fault(YAML_FILE, f"holds a {type(meta).__name__}; expected keys and values, name and features first")
        return {}
    if not isinstance(meta.get("name"), str) or not meta["name"]:
        report.fault(f"{YAML_FILE} name", f"is {quote(meta.get('name'))}; expected a short name in words")
    if not isinstance(meta.get("position_is_real", True), bool):
        report.fault(f"{YAML_FILE} position_is_real", f"is {quote(meta['position_is_real'])}; expected true or false")
    for key in meta:
        hint = nearest(str(key), YAML_KEYS, cutoff=0.8)
        if key not in YAML_KEYS and key not in FREE_TEXT_KEYS and hint:
            report.note(f"{YAML_FILE} {key}", f"is not a key the project reads{hint}")
    sound = {key: meta[key] for key in SUB_KEYS if key in meta and _check_numbers(report, key, meta[key])}
    sound["files"] = meta["files"] if isinstance(meta.get("files"), dict) else {}
    return sound | {"features": _check_kinds(report, meta.get("features"))}


def _check_kinds(report: Report, features: object) -> dict:
    where = f"{YAML_FILE} features"
    if not isinstance(features, dict):
        report.fault(where, f"is {quote(features)}; expected one line a feature column, column: kind")
        return {}
    reserved = set(REQUIRED["sessions"]) - {"region"}  # a ranker may know the region, and must not know the others
    for column, kind in features.items():
        if not isinstance(column, str):
            report.fault(where, f"names the column {quote(column)}; expected words, put it in quotation marks")
        elif column in reserved:
            report.fault(f"{where}.{column}", "is a column of its own and cannot be a feature; copy it to a new column")
        elif kind not in KINDS:
            known = f"expected one of {', '.join(KINDS)}{nearest(str(kind), KINDS)}"
            report.fault(f"{where}.{column}", f"has the kind {quote(kind)}; {known}")
    return {column: kind for column, kind in features.items() if isinstance(column, str) and column not in reserved}


def _check_numbers(report: Report, key: str, found: object) -> bool:
    """True where `found` is a mapping with known keys only (its values are judged where they are used)."""
    if not isinstance(found, dict):
        report.fault(f"{YAML_FILE} {key}", f"is {quote(found)}; expected {', '.join(SUB_KEYS[key])} with a value each")
        return False
    unknown = [name for name in found if name not in SUB_KEYS[key]]
    for name in unknown:
        hint = nearest(str(name), SUB_KEYS[key])
        report.fault(f"{YAML_FILE} {key}.{name}", f"is unknown; expected {', '.join(SUB_KEYS[key])}{hint}")
    if key == "sampled_negatives":
        for name, value in found.items():
            if name not in unknown and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0):
                report.fault(f"{YAML_FILE} {key}.{name}", f"is {quote(value)}; expected a number from 0")
    return not unknown


def _open(report: Report, path: Path, name: str) -> pq.ParquetFile | None:
    if not path.is_file():
        if name in NEEDED_TABLES:
            report.fault(path.name, f"is missing; expected columns {', '.join(REQUIRED[name])}")
        return None
    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except READ_ERRORS as error:
        size = path.stat().st_size
        report.fault(path.name, f"cannot be read, {size:,} bytes, corrupt or cut short ({error}); write it again")
        return None


def _check_columns(report: Report, name: str, file: pq.ParquetFile, kinds: dict[str, str]) -> set[str]:
    """The columns whose type is sound."""
    schema, features = file.schema_arrow, kinds if name == "sessions" else {}
    needed = [*REQUIRED[name], *features]
    known = {*needed, *OPTIONAL.get(name, {})}
    if file.metadata.num_rows == 0:
        report.fault(f"{name}.parquet", "is empty: no rows")
    for column in dict.fromkeys(column for column in schema.names if schema.names.count(column) > 1):
        report.fault(f"{name}.{column}", f"is there {schema.names.count(column)} times; expected once")
    unknown = [column for column in schema.names if column not in known]
    for column in needed:
        if column not in schema.names:
            why = _who_needs(column, features) + nearest(column, unknown, 0.75)
            report.fault(f"{name}.{column}", f"is missing{why}")
    for column in unknown:
        if name == "sessions":
            report.note(f"sessions.{column}", f"is not declared in {YAML_FILE}: it is kept, and is not a feature")
        elif near := nearest(column, OPTIONAL.get(name, {}), 0.75):
            report.note(f"{name}.{column}", f"is not a column the project reads{near}")
    if name == "transcripts" and not {"session_id", "features"} & set(schema.names):
        report.fault("transcripts", "has neither session_id nor features; expected one of them beside typed_query")
    sound = set()
    for column in (column for column in schema.names if column in known and schema.names.count(column) == 1):
        found, expected = schema.field(column).type, _expected(name, column, features.get(column))
        if EXPECTED[expected](found):
            sound.add(column)
        else:
            report.fault(f"{name}.{column}", f"has the type {found}; expected {expected}")
    return sound


def _who_needs(column: str, features: dict[str, str]) -> str:
    if column in features:
        return f", yet {YAML_FILE} declares it ({features[column]})"
    optional = ("timestamp", "region", "split", "valid_from")
    return "; expected it, even if all its values are empty" if column in optional else ""


def _is_number(found: pa.DataType) -> bool:
    types = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal)
    return any(is_type(found) for is_type in types)


def _is_key(found: pa.DataType) -> bool:
    return is_text(found) or pa.types.is_integer(found)


# What is expected, in the words of the message -> the types that will do. A column of nulls only has the type null.
EXPECTED = {
    "strings or integers": lambda found: _is_key(found) or pa.types.is_null(found),
    "strings": lambda found: is_text(found) or pa.types.is_null(found),
    "timestamps or dates": lambda found: (
        pa.types.is_timestamp(found) or pa.types.is_date(found) or pa.types.is_null(found)
    ),
    "integers 0 to n-1": pa.types.is_integer,
    "integers 0 or 1": lambda found: pa.types.is_integer(found) or pa.types.is_boolean(found),
    "numbers": lambda found: _is_number(found) or pa.types.is_null(found),
    "strings, integers or booleans": lambda found: (
        _is_key(found) or pa.types.is_boolean(found) or pa.types.is_null(found)
    ),
    "lists of strings or integers": lambda found: (
        (is_list(found) and _is_key(found.value_type) and not pa.types.is_dictionary(found.value_type))
        or pa.types.is_null(found)
    ),
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
OF_COLUMN = {"position": "integers 0 to n-1", "clicked": "integers 0 or 1", "propensity": "numbers"}


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


def _check_checksums(report: Report, folder: Path, meta: dict) -> None:
    for name, entry in meta.get("files", {}).items():
        path = folder / Path(str(name)).name
        wanted = entry.get("sha256") if isinstance(entry, dict) else None
        if wanted and path.is_file():
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != wanted:
                report.note(path.name, f"has the sha256 {found[:12]}...; {YAML_FILE} says {str(wanted)[:12]}...")
