"""The one schema of a data set folder (ARCHITECTURE.md, Contracts), and its tables: parquet files, or folders of them.

    shop/sessions.parquet                                  or
    shop/sessions/day=2026-01-05/region=SG/part-0.parquet  whose columns day and region are read from the path

A path is text: the type of such a column is that of its kind in dataset.yaml (types_of_text), never a guess from its
values. "007" is no 7, and "null" is a word; __HIVE_DEFAULT_PARTITION__ is empty. Files are read in the order of their
paths: sessions and impressions that are partitioned alike, each in the order of its sessions, are in one order too.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import yaml

from rgalign.errors import SHOWN, safe_repr
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
    "intents": {"intent_id": STRING, "title": STRING, "description": STRING, "category": STRING, "valid_from": TIME},
    "sessions": {"session_id": STRING, "user_id": STRING, "timestamp": TIME, "region": STRING, "split": STRING},
    "impressions": {"session_id": STRING, "intent_id": STRING, "position": pa.int16(), "clicked": pa.int8()},
    "transcripts": {"typed_query": STRING},
    "labels": {"session_id": STRING, "intent_id": STRING},
    "truth": {"session_id": STRING, "intent_id": STRING}
    | dict.fromkeys(("click_probability", "posterior_discrete", "posterior"), PROBABILITIES),
}
OPTIONAL = {
    "sessions": {"shuffled": None},  # the whole list was shown in random order; `write` makes 0 and 1 of booleans
    "impressions": {"propensity": pa.float64(), "selection": pa.float64()},
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

    A list or a map cannot be written there: it stays a string, which is an error of `check`.
    """
    types = known_columns(table, kinds)
    if table == "sessions":
        types |= {name: pa.float64() for name, kind in kinds.items() if kind == "numeric"} | {"shuffled": pa.bool_()}
    return {name: kind for name, kind in types.items() if kind is not None and not pa.types.is_nested(kind)}


def is_text(kind: pa.DataType) -> bool:
    """Strings in any of arrow's spellings, dictionaries of strings included."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_list(kind: pa.DataType) -> bool:
    """Lists in any of arrow's spellings."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def as_type(column: pa.ChunkedArray, target: pa.DataType | None) -> pa.ChunkedArray:
    """The column in the type `target` (None: as it is, in plain numbers); instants with a zone become UTC."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if target is None and (pa.types.is_boolean(column.type) or pa.types.is_decimal(column.type)):
        target = pa.float64()
    if target is None or column.type == target:
        return column
    if column.null_count == len(column):  # whatever type an empty column was given
        return pa.chunked_array([pa.nulls(len(column), target)])
    if pa.types.is_timestamp(column.type) and column.type.tz is not None:
        column = column.cast(pa.timestamp(column.type.unit, "UTC")).cast(pa.timestamp(column.type.unit))
    if target == TIME:
        return column.cast(TIME, safe=False)  # nanoseconds are cut to microseconds
    return column.cast(target, safe=not pa.types.is_float64(target))  # a whole number may have no equal float


def as_types(table: pa.Table, name: str, kinds: dict[str, str]) -> pa.Table:
    """Every known column in its type in memory; unknown columns stay, dictionaries unfolded."""
    types = known_columns(name, kinds)
    return pa.table({column: as_type(table[column], types.get(column)) for column in table.column_names})


def to_frame(table: pa.Table) -> pd.DataFrame:
    """Pandas with pyarrow types, so that missing stays missing and integers stay integers."""
    return table.to_pandas(types_mapper=pd.ArrowDtype)


def to_table(frame: pd.DataFrame, name: str, kinds: dict[str, str]) -> pa.Table:
    """The arrow table that `write` stores; column types as `known_columns` says, no pandas metadata."""
    types, columns = known_columns(name, kinds), {}
    for column in frame.columns:
        target = types.get(column)
        if isinstance(frame[column].dtype, pd.ArrowDtype):
            columns[column] = as_type(pa.chunked_array(pa.array(frame[column])), target)
        elif target in (STRING, TIME, None):
            columns[column] = as_type(pa.chunked_array([pa.array(frame[column], from_pandas=True)]), target)
        else:
            columns[column] = pa.chunked_array([pa.array(frame[column], type=target, from_pandas=True)])
    return pa.table(columns)


def is_empty(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """True where a value is null, NaN or an empty string."""
    missing = pc.is_null(column, nan_is_null=pa.types.is_floating(column.type))
    if is_text(column.type):
        blank = pc.fill_null(pc.equal(as_type(column, STRING), pa.scalar("", STRING)), False)
        missing = pc.or_(missing, blank)
    return missing


# Personal data: which columns hold it by their name. A prompt shows no such column unless `reasoner.features` lists it,
# and no report shows its values.

HIDDEN = "(hidden: personal)"
# The last words of a column's name; a name alone is a person's where the word before says so.
PERSONAL = re.compile(
    r"(^|_)(e_?mails?(_address)?|(tele)?phones?|(tele)?phone_(number|no)|mobile_(number|no)|msisdn|fax"
    r"|((home|street|postal|billing|shipping|delivery|mail(ing)?|ip)_)?address(_line)?(_?\d)?|street"
    r"|((first|last|full|given|family|middle|maiden|nick|user|customer|client|contact|person|recipient|buyer)_?)names?"
    r"|surnames?|ssn|social_security_(number|no)|passport(_(number|no))?|iban|card_(number|no)"
    r"|date_of_birth|birth_?(day|date)|dob)$"
)
ALONE = ("name", "names", "phone", "mobile", "tel", "mail")  # these mean a person where nothing stands before them
MAIL = re.compile(r"[\w.+-]+@[\w-]+(\.[\w-]+)+")
PHONE = re.compile(r"(?<![\w.])(\+\d{1,3}|\(?0\d)[\d ()/.-]{6,}\d(?!\w)")


def is_personal(column: str) -> bool:
    """Whether a column's name says that it holds a person's name, e-mail, phone, address or number."""
    words = re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", column).lower()).strip("_")
    return words in ALONE or PERSONAL.search(words) is not None


def personal(columns: Iterable[str]) -> list[str]:
    """Those of the columns that are."""
    return [column for column in columns if is_personal(column)]


def masked(text: str) -> str:
    """E-mail addresses and telephone numbers in a text replaced: what a reader is shown of what customers wrote."""
    return PHONE.sub("(phone)", MAIL.sub("(e-mail)", text))


Rows = TypeVar("Rows", pa.Table, pa.RecordBatch)


class Table:
    """One table for reading. Raises OSError, ArrowException or ValueError where its files cannot be read."""

    def __init__(self, folder: str | Path, name: str, *, checked: bool = False):
        """checked: pages are compared with their checksums as they are read."""
        self._path = location(folder, name)
        self._path_types: dict[str, pa.DataType] = {}  # columns that are read from the path
        self._file = None
        if not self._path.is_dir():
            self._file = pq.ParquetFile(self._path, page_checksum_verification=checked)
            self.schema_arrow, self.rows = self._file.schema_arrow, self._file.metadata.num_rows
            return
        options = ds.ParquetFragmentScanOptions(page_checksum_verification=checked)
        self._format = ds.ParquetFileFormat(default_fragment_scan_options=options)
        # What `column=value` in the paths tells and the files do not.
        files = ds.dataset(self._path, format=self._format, partitioning=None)
        if not files.files:
            raise ValueError("holds no parquet file")
        folders = [part for file in files.files for part in Path(file).relative_to(self._path).parts[:-1]]
        keys = dict.fromkeys(unquote(part.split("=", 1)[0]) for part in folders if "=" in part)
        stored = [set(fragment.physical_schema.names) for fragment in files.get_fragments()] if keys else []
        held = {key: sum(key in names for names in stored) for key in keys}
        if some := [key for key, count in held.items() if 0 < count < len(stored)]:
            raise ValueError(f"tells {', '.join(map(safe_repr, some))} by its path, and some files hold it as well")
        kinds = types_of_text(name, feature_kinds(folder))
        self._path_types = {key: kinds.get(key, STRING) for key, count in held.items() if not count}
        types = [field.with_type(self._path_types.get(field.name, field.type)) for field in self._dataset.schema]
        self.schema_arrow, self.rows = pa.schema(types), self._dataset.count_rows()

    @cached_property
    def _dataset(self) -> ds.Dataset:
        """All files as one: a column that some of them lack is missing there; unlike types of a column are an error.

        Columns of the path are strings here; `_typed` gives them their types. Raises ValueError naming every one of
        them that has values which are not of its kind.
        """
        in_path = pa.schema([(name, STRING) for name in self._path_types])
        found = ds.dataset(self._path, format=self._format, partitioning=ds.partitioning(in_path, flavor="hive"))
        fragments, errors = list(found.get_fragments()), []
        keys = [ds.get_partition_keys(fragment.partition_expression) for fragment in fragments]
        for name, kind in self._path_types.items():
            values = dict.fromkeys(each[name] for each in keys if each.get(name) is not None)
            if wrong := [value for value in values if not _is_readable(value, kind)]:
                seen = ", ".join(map(safe_repr, wrong[:SHOWN]))
                errors.append(f"{name} is {seen} in its path; expected {kind}, by its kind in {YAML_FILE}")
        if errors:
            raise ValueError("; ".join(errors))
        return found.replace_schema(pa.unify_schemas([*(each.physical_schema for each in fragments), in_path]))

    def _typed(self, rows: Rows) -> Rows:
        """Columns of the path in their types, and strings that arrow keeps as views made plain ones: it can neither
        filter nor sort views."""
        kinds = [field.with_type(self._path_types.get(field.name, _plain_type(field.type))) for field in rows.schema]
        return rows.cast(pa.schema(kinds)) if kinds != list(rows.schema) else rows

    def iter_batches(self, rows: int, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Batches of at most so many rows, in order; columns: None for all."""
        names = None if columns is None else list(columns)
        if self._file is not None:
            return map(self._typed, self._file.iter_batches(rows, columns=names))
        ahead = {"batch_readahead": 1, "fragment_readahead": 1}  # memory of a batch or two, not of sixteen
        return map(self._typed, self._dataset.to_batches(batch_size=rows, columns=names, use_threads=False, **ahead))

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The whole table, or these columns of it."""
        names = None if columns is None else list(columns)
        if self._file is not None:
            return self._typed(self._file.read(columns=names))
        return self._typed(self._dataset.to_table(columns=names, use_threads=False))


def typed_batches(
    folder: str | Path, name: str, rows: int, columns: Sequence[str] | None = None, kinds: dict[str, str] | None = None
) -> Iterator[pa.Table]:
    """A table in pieces of at most so many rows, every known column in its type in memory; kinds: of the features."""
    for batch in Table(folder, name).iter_batches(rows, columns):
        yield as_types(pa.Table.from_batches([batch]), name, kinds or {})


def regrouped(parts: Iterable[Rows], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of so many rows, each in one piece, the last one shorter."""
    waiting, count = [], 0
    for part in parts:
        waiting.append(pa.Table.from_batches([part]) if isinstance(part, pa.RecordBatch) else part)
        count += len(part)
        if count > rows:  # joined once a group: many small pieces would else be gone through again for each
            whole = pa.concat_tables(waiting)
            while len(whole) > rows:
                yield whole.slice(0, rows).combine_chunks()
                whole = whole.slice(rows)
            waiting, count = [whole], len(whole)
    if waiting:
        yield pa.concat_tables(waiting).combine_chunks()


def _is_readable(text: str, kind: pa.DataType) -> bool:
    try:
        return pa.scalar(text).cast(kind).is_valid
    except pa.ArrowException:
        return False


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_string_view(kind):
        return pa.large_string()
    views = (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_string_view(kind.value_type)
    return pa.list_(pa.large_string()) if views else kind


def location(folder: str | Path, name: str) -> Path:
    """`name.parquet`, or the folder `name` where there is one and no such file."""
    file, many = Path(folder) / f"{name}.parquet", Path(folder) / name
    return many if many.is_dir() and not file.exists() else file


def is_there(folder: str | Path, name: str) -> bool:
    """Whether a data set folder has this table."""
    return location(folder, name).exists()
