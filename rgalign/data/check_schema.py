"""Every fault of dataset.yaml: whether it can be read, its keys, the kinds of the features, the world that drew it."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import yaml
from pydantic import ValidationError

from rgalign.data import split
from rgalign.data.schema import (
    KINDS,
    OPTIONAL,
    PROBABILITIES,
    REQUIRED,
    STRING,
    TIME,
    YAML_FILE,
    as_type,
    is_list,
    is_text,
    personal,
    read_yaml,
)
from rgalign.errors import SHOWN, Report, nearest, quote
from rgalign.params import ParamsError
from rgalign.params_schema import SampledNegatives
from rgalign.shopworld.latent import WORLD_VERSIONS
from rgalign.shopworld.tables import Rules

# The columns of a table: which must be there, which types they may have, and how a wrong one is mended.

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


# The opened files of a folder under check: which columns can be judged, and how they are read.

READ_ERRORS = (pa.ArrowException, OSError)


@dataclass
class Source:
    """The opened files, the columns of each whose type is sound, the feature kinds, the sound part of dataset.yaml."""

    files: Mapping[str, Readable]
    columns: dict[str, set[str]]
    kinds: dict[str, str]
    meta: dict
    ids: dict[str, pa.Array] = field(default_factory=dict)  # table -> its key column, where readable
    parts: np.ndarray | None = None  # (sessions,) index in SPLITS of each session's split, where it has a sound one
    shown: np.ndarray | None = None  # (sessions,) impressions of each session, where they can be told

    def has(self, table: str, *columns: str) -> bool:
        """True where all these columns can be judged."""
        return set(columns) <= self.columns.get(table, set())

    def load(self, report: Report, table: str, column: str) -> pa.ChunkedArray | None:
        """One column, or None and a fault where its pages cannot be decoded."""
        if not self.has(table, column):
            return None
        try:
            values = self.files[table].read(columns=[column])[column]
            if len(values) != self.files[table].rows:
                raise OSError(f"{len(values)} values for {self.files[table].rows} rows")
            values.validate(full=True)  # bytes that are not UTF-8 would otherwise surface in the middle of a run
        except READ_ERRORS as error:
            self._corrupt(report, table, column, error)
            return None
        # of whatever type: a column without a value has none of its own (check_columns lets it pass)
        return pa.chunked_array([pa.nulls(len(values))]) if 0 < len(values) == values.null_count else values

    def pieces(self, report: Report, table: str, column: str, rows: int) -> Iterator[pa.Array]:
        """One column, so many rows at a time; a fault and the end of it where its pages cannot be decoded."""
        if not self.has(table, column):
            return
        left = self.files[table].rows
        try:
            for batch in self.files[table].iter_batches(rows, [column]):
                batch.validate(full=True)
                left -= len(batch)
                yield batch.column(0)
            if left:
                raise OSError(f"{self.files[table].rows - left} values for {self.files[table].rows} rows")
        except READ_ERRORS as error:
            self._corrupt(report, table, column, error)

    def _corrupt(self, report: Report, table: str, column: str, error: Exception) -> None:
        self.columns[table].discard(column)
        report.fault(f"{table}.{column}", f"cannot be read, the file is corrupt ({error}); write it again")


# Keys of dataset.yaml that the code reads; any other is kept and left alone.
YAML_KEYS = ("name", "features", "prompt_features", "position_is_real", "sampled_negatives", "time_split", "world")
SAMPLED = {
    "popularity": "a whole number from 0",
    "uniform": "a whole number from 0",
    "smoothing": "a finite number above 0",
}
FREE_TEXT_KEYS = ("what", "title", "split", "candidates", "caution", "licence", "origin", "files")
LONGEST_NAME = 200  # characters


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


def check_yaml(report: Report, path: Path) -> dict:
    """The usable part of dataset.yaml: what is not a fault."""
    meta = _read_yaml(report, path)
    if meta is None:
        return {}
    if not isinstance(meta.get("name"), str) or not meta["name"]:
        report.fault(f"{YAML_FILE} name", f"is {quote(meta.get('name'))}; expected a short name in words")
    elif len(meta["name"]) > LONGEST_NAME:
        report.fault(f"{YAML_FILE} name", f"is {quote(meta['name'])}, longer than {LONGEST_NAME} characters")
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
    kinds = _check_kinds(report, meta.get("features"))
    for column in personal(kinds):
        what = "is personal by its name: no prompt shows it unless reasoner.features lists it, no report its values"
        report.note(f"sessions.{column}", what)
    _check_prompt_features(report, meta.get("prompt_features"), kinds)
    return sound | {"features": kinds}


def _check_kinds(report: Report, features: object) -> dict:
    where = f"{YAML_FILE} features"
    if features is None or features == {}:
        report.fault(where, f"declares no feature column; expected at least one, column: {' | '.join(KINDS)}")
        return {}
    if not isinstance(features, dict):
        report.fault(where, f"is {quote(features)}; expected one line a feature column, column: kind")
        return {}
    # a ranker may know the region, and must not know the others
    reserved = {*REQUIRED["sessions"], *OPTIONAL["sessions"]} - {"region"}
    for column, kind in features.items():
        if not isinstance(column, str):
            report.fault(where, f"names the column {quote(column)}; expected words, put it in quotation marks")
        elif column in reserved:
            report.fault(f"{where}.{column}", "is a column of its own and cannot be a feature; copy it to a new column")
        elif kind not in KINDS:
            known = f"expected one of {', '.join(KINDS)}{nearest(str(kind), KINDS)}"
            report.fault(f"{where}.{column}", f"has the kind {quote(kind)}; {known}")
    return {column: kind for column, kind in features.items() if isinstance(column, str) and column not in reserved}


def _check_prompt_features(report: Report, names: object, kinds: dict) -> None:
    where = f"{YAML_FILE} prompt_features"
    if names is not None and not isinstance(names, list):
        report.fault(where, f"is {quote(names)}; expected a list of feature columns, or no such key: all are shown")
    for name in (name for name in names or () if isinstance(names, list) and name not in kinds):
        report.fault(where, f"names {quote(name)}, which is no feature column{nearest(str(name), kinds)}")


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


def check_world(report: Report, meta: dict, simulated: bool) -> None:
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
        if world.get("version") not in WORLD_VERSIONS:
            found = f"is {quote(world.get('version'))}"
            report.fault(f"{where}.version", f"{found}; this code knows versions 1 and 2: {again}")
            return
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            report.fault(f"{where}.seed", f"is {quote(seed)}; expected a whole number from 0: {again}")
        if not isinstance(rules, dict) or not set(rules) <= {rule.name for rule in dataclasses.fields(Rules)}:
            report.fault(f"{where}.rules", f"are not those of version {world['version']}: {again}")
