"""The values of a data set's columns, each as a whole: empty, repeated, out of range; splits and times of sessions."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from rgalign.data import schema
from rgalign.data import split as splitting
from rgalign.data.schema import REQUIRED, SPLITS, STRING, TIME, Table, as_type, is_empty, is_text
from rgalign.errors import Report
from rgalign.params_schema import Reasoner

NEVER_EMPTY = {
    "intents.intent_id": "every intent needs an id",
    "intents.title": "every intent needs a title",
    "sessions.session_id": "every session needs an id",
    "sessions.user_id": "every session needs a user, a session id will do",
    "transcripts.typed_query": "a transcript without a query has no use",
    "labels.session_id": "every label belongs to a session",
    "truth.session_id": "every row belongs to a session",
    "truth.intent_id": "a simulator knows the true intent",
    "impressions.session_id": "every impression belongs to a session",
    "impressions.intent_id": "every impression shows an intent",
    "impressions.position": "expected 0 for the first place, then 1, 2, ...",
    "impressions.clicked": "expected 0 or 1",
    "impressions.propensity": "fill every row, or leave the column out",
    "impressions.selection": "fill every row, or leave the column out",
}
KEYS = ("intents.intent_id", "sessions.session_id")  # of their tables, which others refer to
LONGEST_ID = 256  # characters: ids are kept in arrays of one width
CONTROL = r"\p{Cc}"
HIDDEN = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\p{Cf}"  # what is no blank anyway; joiners, byte order marks
EXACT = 2**53  # whole numbers up to here are floats
YEARS = (1900, 2100)  # the first that can be, and the first that cannot: no log and no date of a KB lies there [C]
NO_YEAR = 1970  # where numbers since 1970 end that were read in another unit than theirs; no chat is as old
SHORT = np.timedelta64(60, "s")  # a log of a minute: a note
DISTRIBUTIONS = [column for column, kind in REQUIRED["truth"].items() if kind == schema.PROBABILITIES]


class InMemory:
    """Rows in memory, to be read as schema.Table is."""

    def __init__(self, table: pa.Table):
        self.table, self.schema_arrow, self.rows = table, table.schema, len(table)

    def read(self, columns: Sequence[str]) -> pa.Table:
        return self.table.select(list(columns))


Readable = Table | InMemory


@dataclass
class Source:
    """The opened files, the columns of each that have the right type, the feature kinds, the usable dataset.yaml."""

    files: Mapping[str, Readable]
    columns: dict[str, set[str]]
    kinds: dict[str, str]
    meta: dict
    ids: dict[str, pa.Array] = field(default_factory=dict)  # table -> its key column, where readable
    parts: np.ndarray | None = None  # (sessions,) index in SPLITS of each session's split, where the splits are right
    shown: np.ndarray | None = None  # (sessions,) impressions of each session, where they can be counted

    def has(self, table: str, column: str) -> bool:
        """True where this column can be checked."""
        return column in self.columns.get(table, set())

    def load(self, report: Report, table: str, column: str) -> pa.ChunkedArray | None:
        """One column, or None and an error where its pages cannot be decoded."""
        found = list(self.pieces(report, table, column))
        if not self.has(table, column):
            return None
        (values,) = found
        # a column without a value may have any type (check_columns)
        return pa.chunked_array([pa.nulls(len(values))]) if 0 < len(values) == values.null_count else values

    def pieces(self, report: Report, table: str, column: str, rows: int | None = None) -> Iterator[pa.Array]:
        """One column, so many rows at a time (None: whole); an error, and no more, where pages cannot be decoded."""
        if not self.has(table, column):
            return
        file, count = self.files[table], 0
        try:
            parts = [file.read(columns=[column])] if rows is None else file.iter_batches(rows, [column])
            for part in parts:
                values = part.column(0)
                values.validate(full=True)  # bytes that are not UTF-8 would otherwise surface in the middle of a run
                count += len(values)
                if rows is None and count != file.rows:
                    break
                yield values
            if count != file.rows:
                raise OSError(f"{count} values for {file.rows} rows")
        except (pa.ArrowException, OSError) as error:
            self.columns[table].discard(column)
            report.error(f"{table}.{column}", f"cannot be read, the file is corrupt ({error}); write it again")


def check_values(report: Report, source: Source) -> None:
    """Adds to `report` what is wrong with the columns of every table but impressions, and with splits and times."""
    for table in (table for table in source.files if table != "impressions"):
        for column in source.files[table].schema_arrow.names:
            if table == "truth" and column in DISTRIBUTIONS:
                continue
            if (values := source.load(report, table, column)) is not None:
                check_column(report, source, table, column, values)
    zones = {}  # a column without a value has neither
    for table, column in (("sessions", "timestamp"), ("intents", "valid_from")):
        values = source.load(report, table, column)
        if values is not None and values.null_count < len(values):
            zones[f"{table}.{column}"] = values.type
    if len({pa.types.is_timestamp(found) and found.tz is not None for found in zones.values()}) > 1:
        named = " and ".join(f"{where} ({found})" for where, found in zones.items())
        report.error(next(iter(zones)), f"one has a time zone, the other none: {named}; give both one or neither")
    _check_split_and_times(report, source)


def check_column(
    report: Report, source: Source, table: str, column: str, values: pa.ChunkedArray, *, repeats: bool = False
) -> None:
    """Empty values, repeated keys, long texts, impossible times, infinities, nulls inside lists.

    repeats  an id may come twice
    """
    where, empty = f"{table}.{column}", is_empty(values)
    kind = source.kinds.get(column) if table == "sessions" else None
    words = as_type(values, STRING) if is_text(values.type) else None
    if where in NEVER_EMPTY:
        if words is not None:
            empty = pc.or_(empty, pc.fill_null(pc.equal(pc.utf8_trim_whitespace(words), ""), False))
        report.error_rows(where, empty, "is empty", f"; {NEVER_EMPTY[where]}")
    if where in KEYS and len(values):
        source.ids[table] = as_type(values, STRING).combine_chunks()
    if where in (*KEYS, "truth.session_id") and not repeats and len(values) > 1:
        keys = pd.Series(as_type(values, STRING).to_pandas(types_mapper=pd.ArrowDtype))
        again = keys[(keys.duplicated() & ~np.asarray(empty)).to_numpy(dtype=bool)]
        report.error_values(where, again, "repeats an id", "; expected each once")
    if where == "intents.description":
        report.note_rows(where, empty, "is empty", ": only the title speaks for them")
    if words is not None:
        _check_words(report, where, kind, words)
    if where in ("sessions.timestamp", "intents.valid_from") and _check_years(report, where, values):
        source.columns[table].discard(column)
    if kind == "numeric" and pa.types.is_integer(values.type):
        largest = pa.scalar(EXACT, pa.uint64() if pa.types.is_uint64(values.type) else pa.int64())
        beyond = pc.greater(values, largest)
        if not pa.types.is_uint64(values.type):  # which arrow compares with no signed number
            beyond = pc.or_(beyond, pc.less(values, -EXACT))
        report.note_rows(where, beyond, "holds a whole number", " beyond 2^53: read as the nearest float")
    if pa.types.is_floating(values.type):
        report.error_rows(where, pc.is_inf(values), "is infinite", "; expected a finite number or empty")
    if where == "sessions.shuffled":
        numbers = as_type(values, pa.float64()).drop_null().to_numpy()
        wrong = numbers[~np.isin(numbers, (0, 1)) & ~np.isnan(numbers)]
        then = "; expected true or false, or 1 or 0, or empty where unknown"
        report.error_values(where, wrong.tolist(), "has another value", then)
    if kind == "history" and not pa.types.is_null(values.type):
        lists = values.combine_chunks()
        wrong = np.zeros(len(lists), bool)
        wrong[np.asarray(pc.list_parent_indices(lists))[np.asarray(is_empty(pc.list_flatten(lists)))]] = True
        report.error_rows(where, wrong, "has an empty entry in its list", "; leave such entries out")
    if kind is not None and len(values) and pc.all(empty).as_py():
        report.note(where, "every row is empty")


def _check_words(report: Report, where: str, kind: str | None, words: pa.ChunkedArray) -> None:
    """Errors of ids, notes on what a prompt does not show of a text as it was written."""
    length = pc.utf8_length(words)
    if where in (*KEYS, "sessions.user_id"):
        control = pc.match_substring_regex(words, CONTROL)
        then = "; an id has none, not even a line break or NUL"
        report.error_rows(where, control, "holds control characters", then)
        long = f"is longer than {LONGEST_ID} characters"
        report.error_rows(where, pc.greater(length, LONGEST_ID), long, "; expected a short id")
    elif where in ("intents.title", "intents.description", "transcripts.typed_query") or kind == "text":
        hidden, then = pc.match_substring_regex(words, HIDDEN), ": a prompt has them as blanks"
        report.note_rows(where, hidden, "holds control characters or joiners", then)
        most = schema.CHARACTERS_A_TOKEN * Reasoner().max_tokens
        then = ": a prompt shows the beginning; raise reasoner.max_tokens to show more"
        report.note_rows(where, pc.greater(length, most), f"is longer than {most:,} characters", then)
    elif kind == "categorical":
        most = schema.VALUE_CHARACTERS
        then = ": a prompt shows the beginning"
        report.note_rows(where, pc.greater(length, most), f"is longer than {most} characters", then)


def _check_years(report: Report, where: str, values: pa.ChunkedArray) -> bool:
    """Whether times lie where none can, an error: numbers that were read in another unit than theirs end there."""
    if pa.types.is_null(values.type):
        return False
    if pa.types.is_date(values.type):
        values = values.cast(pa.timestamp("s" if pa.types.is_date32(values.type) else "ms"))
    unit, since = values.type.unit, values.cast(pa.int64())  # before microseconds, where it could wrap round
    low, high, first, after = (
        int(datetime(year, 1, 1, tzinfo=UTC).timestamp()) * {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
        for year in (*YEARS, NO_YEAR, NO_YEAR + 1)
    )
    outside = pc.or_(pc.less(since, low), pc.greater_equal(since, high))
    early = pc.and_(pc.greater_equal(since, first), pc.less(since, after))
    verb = f"lies outside the years {YEARS[0]} to {YEARS[1] - 1}"
    mend = 'numbers since 1970 were read without their unit: pd.to_datetime(.., unit="s"), or "ms"'
    found = report.error_rows(where, outside, verb, f"; is it in {unit}? Leave unknown times empty")
    return report.error_rows(where, early, f"lies in {NO_YEAR}", f"; {mend}. Leave unknown times empty") or found


def _check_split_and_times(report: Report, source: Source) -> None:
    """Split values, the split by time where they are empty, the order of timestamps, the users of train."""
    split, time = source.load(report, "sessions", "split"), source.load(report, "sessions", "timestamp")
    if split is None or not len(split):
        return
    split, time = as_type(split, STRING), None if time is None else as_type(time, TIME)
    by_time = pc.all(is_empty(split)).as_py()
    if not by_time:
        _check_split(report, source, split)
    elif time is not None:
        _check_split_by_time(report, source, pa.table({"split": split, "timestamp": time}))
    if time is not None:
        valid_from = None if by_time else source.load(report, "intents", "valid_from")
        if valid_from is not None and valid_from.null_count < len(valid_from):
            report.note_rows("sessions.timestamp", pc.is_null(time), "is empty", ": valid_from cannot be checked there")
        _note_order(report, None if by_time else source.parts, time.to_numpy())
    users = source.load(report, "sessions", "user_id") if source.parts is not None else None
    if users is not None:
        own = as_type(users, STRING).filter(pa.array(source.parts == SPLITS.index("train")))
        if len(own) > 1 and pc.count_distinct(own).as_py() == 1:
            what = "train has one user alone; expected several, since some are kept apart for early stopping"
            report.error("sessions.user_id", f"{what}: a session id will do where users are unknown")


def _check_split(report: Report, source: Source, split: pa.ChunkedArray) -> None:
    """Errors where a session has no known split, and where a split has no session."""
    where, expected = "sessions.split", f"expected {', '.join(SPLITS)}, or all empty for a split by time"
    empty, values = np.asarray(is_empty(split)), pd.Series(split.to_pandas(), dtype=object)
    parts = pd.Index(SPLITS).get_indexer(values)
    unknown = report.error_values(where, values[~empty & (parts < 0)], "has an unknown value", f"; {expected}")
    then = ", the others are set; fill in all, or empty all for a split by time"
    if report.error_rows(where, empty, "is empty", then) or unknown:
        return
    source.parts = parts
    if absent := [name for name in SPLITS if not values.eq(name).any()]:
        what = f"no session is {' or '.join(absent)}"
        report.error(where, f"{what}; expected some of each, or all empty for a split by time")


def _check_split_by_time(report: Report, source: Source, keys: pa.Table) -> None:
    ruled = "time_split" in source.meta
    if ruled and splitting.rule_errors(source.meta["time_split"]):
        return  # an error of dataset.yaml, in the report with its key
    try:
        split = splitting.resolve(schema.to_frame(keys), source.meta)
    except ValueError as error:
        report.error("sessions.split", f"every row is empty, and a split by time fails: {error}; fill in either")
    else:
        source.parts = pd.Index(SPLITS).get_indexer(split.astype(object))
        how = f"{schema.YAML_FILE} time_split" if ruled else "70 % train, 10 % valid, 20 % test"
        report.note("sessions.split", f"every row is empty: split by time, {how}")


def _note_order(report: Report, parts: np.ndarray | None, moments: np.ndarray) -> None:
    """Times that lost their unit, or are that of an export: all within a minute. Rows out of the order of time. And
    where the published split (parts) does not follow time, as it need not: users may be split."""
    known = moments[~np.isnat(moments)]
    if len(known) > 1 and (span := known.max() - known.min()) < SHORT:
        seconds = span / np.timedelta64(1, "s")
        what = f"all {len(known):,} times lie within {seconds:.3g} seconds of {known.min().astype('datetime64[s]')}"
        report.note("sessions.timestamp", f"{what}: is their unit right?")
    if back := int((np.diff(known) < np.timedelta64(0)).sum()):
        report.note("sessions.timestamp", f"rows are not in the order of time: it steps back {back:,} times")
    for earlier, later in (("train", "test"), ("valid", "test"), ("train", "valid")) if parts is not None else ():
        starts = moments[(parts == SPLITS.index(later)) & ~np.isnat(moments)]
        if len(starts):
            late = (parts == SPLITS.index(earlier)) & (moments >= starts.min())
            verb = f"lies at or after the first session of {later}"
            report.note_rows("sessions.split", late, verb, ": this split does not follow time", f"{earlier} session")
