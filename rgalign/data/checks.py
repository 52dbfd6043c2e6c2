"""Every fault of a data set folder at once: dataset.yaml, the files, their columns and types, then their values."""

import dataclasses
import hashlib
from pathlib import Path

import pyarrow as pa
import yaml
from pydantic import ValidationError

from rgalign.data import check_values, split
from rgalign.data.faults import SHOWN, Report, nearest, quote
from rgalign.data.parquet import Table, location
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
    read_yaml,
)
from rgalign.data.world_model import WORLD_VERSION
from rgalign.data.world_tables import Rules
from rgalign.params import ParamsError
from rgalign.rooms import SampledNegatives

# Keys of dataset.yaml that the code reads; any other is kept and left alone.
YAML_KEYS = ("name", "features", "position_is_real", "sampled_negatives", "time_split", "world")
SAMPLED = {
    "popularity": "a whole number from 0",
    "uniform": "a whole number from 0",
    "smoothing": "a finite number above 0",
}
FREE_TEXT_KEYS = ("what", "title", "split", "candidates", "caution", "licence", "origin", "files")
MANY_NOTES = 5  # undeclared columns that are noted one by one
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
    files = {name: file for name in TABLES if (file := _open(report, folder, name)) is not None}
    report.rows = {name: file.rows for name, file in files.items()}
    kinds = {name: kind for name, kind in meta.get("features", {}).items() if kind in KINDS}
    if meta:
        _check_world(report, meta, simulated="truth" in files)
    columns = {name: _check_columns(report, name, file, kinds) for name, file in files.items()}
    _check_checksums(report, folder, meta)
    check_values.check_values(report, check_values.Source(files, columns, kinds, meta))
    return report


def _read_yaml(report: Report, path: Path) -> dict | None:
    """The keys of dataset.yaml; None, and a fault, where it cannot be read."""
    try:
        meta = read_yaml(path)
        if isinstance(meta, dict):
            return meta
        what = f"holds a {type(meta).__name__}; expected keys and values, name and features first"
    except ParamsError as error:
        what = f"{str(error).split('  in ')[0]}; expected each key once"
    except (yaml.YAMLError, ValueError) as error:  # bytes that are not UTF-8 are a ValueError too
        what = f"is not YAML: {' '.join(str(error).split())}"
    except OSError as error:
        other = "is a folder" if path.is_dir() else f"cannot be read: {error.strerror or error}"
        found = "is missing" if isinstance(error, FileNotFoundError) else other
        what = f"{found}; expected name and features (column: {' | '.join(KINDS)})"
    except RecursionError:
        what = "is nested too deeply to be read; expected keys and values, name and features first"
    report.fault(YAML_FILE, what)
    return None


def _check_yaml(report: Report, path: Path) -> dict:
    """The usable part of dataset.yaml: what is not a fault."""
    meta = _read_yaml(report, path)
    if meta is None:
        return {}
    if not isinstance(meta.get("name"), str) or not meta["name"]:
        report.fault(f"{YAML_FILE} name", f"is {quote(meta.get('name'))}; expected a short name in words")
    if not isinstance(meta.get("position_is_real", True), bool):
        report.fault(f"{YAML_FILE} position_is_real", f"is {quote(meta['position_is_real'])}; expected true or false")
    for key in meta:
        hint = nearest(str(key), YAML_KEYS, cutoff=0.8)
        if key not in YAML_KEYS and key not in FREE_TEXT_KEYS and hint:
            report.note(f"{YAML_FILE} {key}", f"is not a key the project reads{hint}")
    if "sampled_negatives" in meta:
        _check_sampled(report, meta["sampled_negatives"])
    for key, what in split.rule_faults(meta["time_split"]) if "time_split" in meta else ():
        report.fault(f"{YAML_FILE} time_split{key and '.'}{key}", what)
    sound = {key: meta[key] for key in ("time_split", "world") if key in meta}
    sound["files"] = meta["files"] if isinstance(meta.get("files"), dict) else {}
    return sound | {"features": _check_kinds(report, meta.get("features"))}


def _check_kinds(report: Report, features: object) -> dict:
    where = f"{YAML_FILE} features"
    if features is None or features == {}:
        report.fault(where, f"declares no feature column; expected at least one, column: {' | '.join(KINDS)}")
        return {}
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


def _check_sampled(report: Report, found: object) -> None:
    where = f"{YAML_FILE} sampled_negatives"
    if not isinstance(found, dict):
        report.fault(where, f"is {quote(found)}; expected {', '.join(SAMPLED)} with a value each")
        return
    for key in (key for key in found if key not in SAMPLED):
        hint = nearest(str(key), SAMPLED)
        report.fault(f"{where}.{key}", f"is unknown; expected {', '.join(SAMPLED)}{hint}")
    try:
        SampledNegatives.model_validate(found)
        wrong = set()
    except ValidationError as error:
        wrong = {each["loc"][0] for each in error.errors()}
    wrong |= {key for key, value in found.items() if isinstance(value, str)}  # '1e-1', which params would accept
    for key, expected in SAMPLED.items():
        if key not in found:
            report.fault(f"{where}.{key}", f"is missing; expected {expected}")
        elif key in wrong:
            report.fault(f"{where}.{key}", f"is {quote(found[key])}; expected {expected}")
    if not wrong and set(found) == set(SAMPLED) and found["popularity"] + found["uniform"] == 0:
        report.fault(where, "draws nothing: popularity and uniform are 0; expected at least one negative in a list")


def _check_world(report: Report, meta: dict, simulated: bool) -> None:
    """`world` says which world drew the data; without it truth.parquet cannot be judged."""
    where, world = f"{YAML_FILE} world", meta.get("world")
    again = "draw it again, python -m rgalign world DIR, or delete truth.parquet"
    if "world" not in meta:
        if simulated:
            report.fault(where, f"is missing, and truth.parquet is there; expected version, seed and rules: {again}")
    elif not isinstance(world, dict):
        report.fault(where, f"is {quote(world)}; expected version, seed and rules of a simulated world, or no such key")
    elif simulated:
        seed, rules = world.get("seed"), world.get("rules")
        if world.get("version") != WORLD_VERSION:
            found = f"is {quote(world.get('version'))}"
            report.fault(f"{where}.version", f"{found}; this code knows version {WORLD_VERSION}: {again}")
            return
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            report.fault(f"{where}.seed", f"is {quote(seed)}; expected a whole number from 0: {again}")
        if not isinstance(rules, dict) or not set(rules) <= {rule.name for rule in dataclasses.fields(Rules)}:
            report.fault(f"{where}.rules", f"are not those of version {WORLD_VERSION}: {again}")


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
        _note_undeclared(report, unknown)
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
            report.fault(f"{name}.{column}", f"has the type {found}; expected {expected}")
    return sound


def _note_undeclared(report: Report, names: list[str]) -> None:
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
    optional = ("timestamp", "region", "split", "valid_from")
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
