"""The one schema of a data set folder: which files, which columns, which types (ARCHITECTURE.md, Contracts)."""

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from rgalign.params import _UniqueKeys

KINDS = ("categorical", "numeric", "text", "history")
SPLITS = ("train", "valid", "test")
YAML_FILE = "dataset.yaml"
CHARACTERS_A_TOKEN = 32  # no text longer than this many characters a token of a prompt's budget is looked at
VALUE_CHARACTERS = 100  # of a categorical value or an entry of a history in a prompt; the rest is cut [C]

STRING = pa.large_string()  # large: the text of 7.5 M sessions passes the 2 GiB of a plain string column
TIME = pa.timestamp("us")
PROBABILITIES = pa.list_(pa.float32())
FEATURE_TYPES = {"categorical": STRING, "text": STRING, "history": pa.list_(STRING)}  # a numeric keeps its width

# Columns every file must have, in order, with the type they have in memory and after `write`.
REQUIRED = {
    "intents": {
        "intent_id": STRING,
        "title": STRING,
        "description": STRING,
        "category": STRING,
        "valid_from": TIME,
    },
    "sessions": {
        "session_id": STRING,
        "user_id": STRING,
        "timestamp": TIME,
        "region": STRING,
        "split": STRING,
    },
    "impressions": {
        "session_id": STRING,
        "intent_id": STRING,
        "position": pa.int16(),
        "clicked": pa.int8(),
    },
    "transcripts": {"typed_query": STRING},
    "labels": {"session_id": STRING, "intent_id": STRING},
    "truth": {
        "session_id": STRING,
        "intent_id": STRING,
        "click_probability": PROBABILITIES,
        "posterior_discrete": PROBABILITIES,
        "posterior": PROBABILITIES,
    },
}
OPTIONAL = {
    "sessions": {"shuffled": None},  # the whole list was shown in random order; `write` makes 0 and 1 of booleans
    "impressions": {"propensity": pa.float64()},
    "transcripts": {"session_id": STRING, "features": pa.map_(pa.string(), pa.string()), "intent_id": STRING},
}
NEEDED_TABLES = ("intents", "sessions", "impressions")
TABLES = tuple(REQUIRED)


def read_yaml(path: Path) -> object:
    """What dataset.yaml holds. Raises as yaml.safe_load does, and ParamsError where a key stands twice."""
    return yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)  # a SafeLoader


def known_columns(table: str, kinds: dict[str, str]) -> dict[str, pa.DataType | None]:
    """Column -> type in memory, None where the stored type is kept; the sessions' features by their kind."""
    columns = {**REQUIRED[table], **OPTIONAL.get(table, {})}
    if table == "sessions":
        columns |= {name: FEATURE_TYPES.get(kind) for name, kind in kinds.items()}
    return columns


def feature_kinds(folder: str | Path) -> dict[str, str]:
    """Feature column -> kind of a data set folder; none where its dataset.yaml cannot be read, which `check` tells."""
    try:
        meta = read_yaml(Path(folder) / YAML_FILE)
    except (OSError, ValueError, yaml.YAMLError, RecursionError):  # ParamsError is a ValueError
        return {}
    features = meta.get("features") if isinstance(meta, dict) else None
    return {name: kind for name, kind in features.items() if kind in KINDS} if isinstance(features, dict) else {}


def types_of_text(table: str, kinds: dict[str, str]) -> dict[str, pa.DataType]:
    """Column -> type that text is read as where text is all there is (a partition's path); others stay strings.

    A list or a map has no spelling there: it stays a string, which `check` refuses.
    """
    types = dict(known_columns(table, kinds))
    types |= {name: pa.float64() for name, kind in kinds.items() if table == "sessions" and kind == "numeric"}
    if "shuffled" in types:
        types["shuffled"] = pa.bool_()
    return {name: kind for name, kind in types.items() if kind is not None and not pa.types.is_nested(kind)}


def is_text(kind: pa.DataType) -> bool:
    """Strings in any of arrow's spellings, dictionaries of strings included."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_list(kind: pa.DataType) -> bool:
    """Lists in any of arrow's spellings."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def as_type(column: pa.ChunkedArray, wanted: pa.DataType | None) -> pa.ChunkedArray:
    """The column in the type the project works with; instants with a zone become UTC without one."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if wanted is None and (pa.types.is_boolean(column.type) or pa.types.is_decimal(column.type)):
        wanted = pa.float64()
    if wanted is None or column.type == wanted:
        return column
    if column.null_count == len(column):  # whatever type an empty column was given
        return pa.chunked_array([pa.nulls(len(column), wanted)])
    if pa.types.is_timestamp(column.type) and column.type.tz is not None:
        column = column.cast(pa.timestamp(column.type.unit, "UTC")).cast(pa.timestamp(column.type.unit))
    if wanted == TIME:
        return column.cast(TIME, safe=False)  # nanoseconds are cut to microseconds
    return column.cast(wanted, safe=not pa.types.is_float64(wanted))  # a whole number may have no float of its own


def as_types(table: pa.Table, name: str, kinds: dict[str, str]) -> pa.Table:
    """Every known column in its type in memory; unknown columns stay, dictionaries unfolded."""
    types = known_columns(name, kinds)
    columns = {column: as_type(table[column], types.get(column)) for column in table.column_names}
    return pa.table(columns)


def to_frame(table: pa.Table) -> pd.DataFrame:
    """Pandas with pyarrow types, so that missing stays missing and integers stay integers."""
    return table.to_pandas(types_mapper=pd.ArrowDtype)


def to_table(frame: pd.DataFrame, name: str, kinds: dict[str, str]) -> pa.Table:
    """The arrow table that `write` stores; column types as `known_columns` says, no pandas metadata."""
    types = known_columns(name, kinds)
    columns = {}
    for column in frame.columns:
        wanted = types.get(column)
        if isinstance(frame[column].dtype, pd.ArrowDtype):
            values = as_type(pa.chunked_array(pa.array(frame[column])), wanted)
        elif wanted in (STRING, TIME, None):
            values = as_type(pa.chunked_array([pa.array(frame[column], from_pandas=True)]), wanted)
        else:
            values = pa.chunked_array([pa.array(frame[column], type=wanted, from_pandas=True)])
        columns[column] = values
    return pa.table(columns)


def is_empty(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """True where a value is null, NaN or an empty string."""
    missing = pc.is_null(column, nan_is_null=pa.types.is_floating(column.type))
    if is_text(column.type):
        blank = pc.fill_null(pc.equal(as_type(column, STRING), pa.scalar("", STRING)), False)
        missing = pc.or_(missing, blank)
    return missing
