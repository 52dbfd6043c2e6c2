"""The values of a data set's tables: empty, doubled, orphaned, out of range, out of order.

Every check works on whole columns; impressions are held as integers (row of the session, row of the intent).
"""

from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from rgalign.data import check_lists
from rgalign.data import split as splitting
from rgalign.data.check_schema import Source
from rgalign.data.schema import (
    CHARACTERS_A_TOKEN,
    SPLITS,
    STRING,
    TIME,
    VALUE_CHARACTERS,
    YAML_FILE,
    as_type,
    is_empty,
    is_text,
    to_frame,
)
from rgalign.errors import Report, count_rows, count_values
from rgalign.params_schema import Reasoner

# Words in a data set: ids that cannot be kept, and what a prompt will not show of a text as it was written.

IDS = ("intents.intent_id", "sessions.session_id", "sessions.user_id")
TEXTS = ("intents.title", "intents.description", "transcripts.typed_query")
LONGEST_ID = 256  # characters: ids are kept in arrays of one width
CONTROL = r"\p{Cc}"
HIDDEN = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\p{Cf}"  # what is no blank anyway; joiners, byte order marks


def is_blank(values: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """True for words that are there and are nothing but blanks; None where the column holds no words."""
    if not is_text(values.type):
        return None
    words = as_type(values, STRING)
    return pc.fill_null(pc.and_(pc.equal(pc.utf8_trim_whitespace(words), ""), pc.not_equal(words, "")), False)


def check_text(report: Report, where: str, kind: str | None, values: pa.ChunkedArray) -> None:
    """Faults of ids, notes on texts. where: table.column;  kind: a feature's, else None."""
    if not is_text(values.type):
        return
    words = as_type(values, STRING)
    if where in IDS:
        _check_ids(report, where, words)
    elif where in TEXTS or kind == "text":
        if _any(hidden := pc.match_substring_regex(words, HIDDEN)):
            report.note(
                where, f"{count_rows(hidden, 'holds control characters or joiners')}: a prompt has them as blanks"
            )
        longest, why = CHARACTERS_A_TOKEN * Reasoner().max_tokens, "; raise reasoner.max_tokens to show more"
        _note_long(report, where, words, longest, why)
    elif kind == "categorical":
        _note_long(report, where, words, VALUE_CHARACTERS, "")


def _check_ids(report: Report, where: str, words: pa.ChunkedArray) -> None:
    if _any(wrong := pc.match_substring_regex(words, CONTROL)):
        what = count_rows(wrong, "holds control characters")
        report.fault(where, f"{what}; an id has none, not even a line break or NUL")
    if _any(wrong := pc.greater(pc.utf8_length(words), LONGEST_ID)):
        report.fault(where, f"{count_rows(wrong, f'is longer than {LONGEST_ID} characters')}; expected a short id")


def _note_long(report: Report, where: str, words: pa.ChunkedArray, longest: int, why: str) -> None:
    if _any(long := pc.greater(pc.utf8_length(words), longest)):
        what = count_rows(long, f"is longer than {longest:,} characters")
        report.note(where, f"{what}: a prompt shows the beginning{why}")


def _any(mask: pa.ChunkedArray) -> bool:
    return bool(pc.any(mask).as_py())


TIMES = ("sessions.timestamp", "intents.valid_from")
YEARS = (1900, 2100)  # the first that can be, and the first that cannot: no log and no date of a KB lies there [C]
NO_YEAR = 1970  # where numbers since 1970 end that were read in another unit than theirs; no chat is as old
SHORT = np.timedelta64(60, "s")  # a log of a minute: a note
EXACT = 2**53  # whole numbers up to here are floats
NEVER_EMPTY = {
    "intents.intent_id": "every intent needs an id",
    "intents.title": "every intent needs a title",
    "sessions.session_id": "every session needs an id",
    "sessions.user_id": "every session needs a user, a session id will do",
    "transcripts.typed_query": "a transcript without a query has no use",
    "labels.session_id": "every label belongs to a session",
    "truth.session_id": "every row belongs to a session",
    "truth.intent_id": "a simulator knows the true intent",
}


def check_values(report: Report, source: Source) -> None:
    """Adds to `report` what is wrong with the values of the sound columns."""
    for table in source.files:
        for column in [name for name in source.files[table].schema_arrow.names if source.has(table, name)]:
            if table != "impressions" and (table != "truth" or column not in check_lists.DISTRIBUTIONS):
                values = source.load(report, table, column)
                if values is not None:
                    check_column(report, source, table, column, values)
    _check_zones(report, source)
    _check_times(report, source)
    _check_users(report, source)
    check_lists.check_impressions(report, source)
    check_lists.check_others(report, source)


def check_column(
    report: Report, source: Source, table: str, column: str, values: pa.ChunkedArray, *, repeats: bool = False
) -> None:
    """One column on its own: empty values, doubled keys, infinities, nulls inside lists.

    repeats  an id may come twice
    """
    where = f"{table}.{column}"
    empty, blank = is_empty(values), is_blank(values)
    if where in NEVER_EMPTY and blank is not None:
        empty = pc.or_(empty, blank)
    if where in NEVER_EMPTY and pc.any(empty).as_py():
        report.fault(where, f"{count_rows(empty, 'is empty')}; {NEVER_EMPTY[where]}")
    if where in ("intents.intent_id", "sessions.session_id") and len(values):
        source.ids[table] = as_type(values, STRING).combine_chunks()
    if not repeats and where in ("intents.intent_id", "sessions.session_id", "truth.session_id"):
        keys = pd.Series(as_type(values, STRING).to_pandas(types_mapper=pd.ArrowDtype))
        again = (keys.duplicated() & ~np.asarray(empty)).to_numpy(dtype=bool)
        if again.any():
            report.fault(where, count_values(keys[again], again.sum(), "repeats an id", "row") + "; expected each once")
    if where == "intents.description" and pc.any(empty).as_py():
        report.note(where, f"{count_rows(empty, 'is empty')}: only the title speaks for them")
    kind = source.kinds.get(column) if table == "sessions" else None
    check_text(report, where, kind, values)
    if where in TIMES and _outside(report, where, values):
        source.columns[table].discard(column)
    if kind == "numeric" and pa.types.is_integer(values.type):
        _note_inexact(report, where, values)
    if pa.types.is_floating(values.type) and pc.any(pc.is_inf(values)).as_py():
        infinite = pc.fill_null(pc.is_inf(values), False)
        report.fault(where, f"{count_rows(infinite, 'is infinite')}; expected a finite number or empty")
    if where == "sessions.shuffled":
        _check_yes_or_no(report, where, values)
    if kind == "history":
        _check_history(report, where, values)
    if kind is not None and len(values) and pc.all(empty).as_py():
        report.note(where, "every row is empty")


def _outside(report: Report, where: str, values: pa.ChunkedArray) -> bool:
    """Whether times lie where none can, a fault: numbers that were read in another unit than theirs end there."""
    if pa.types.is_null(values.type):
        return False
    if pa.types.is_date(values.type):
        values = values.cast(pa.timestamp("s" if pa.types.is_date32(values.type) else "ms"))
    unit = values.type.unit
    units = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    low, high, first, after = (
        int(datetime(year, 1, 1, tzinfo=UTC).timestamp()) * units for year in (*YEARS, NO_YEAR, NO_YEAR + 1)
    )
    since = values.cast(pa.int64())  # before anything is turned into microseconds, where it could wrap round
    wrong = pc.fill_null(pc.or_(pc.less(since, low), pc.greater_equal(since, high)), False)
    early = pc.fill_null(pc.and_(pc.greater_equal(since, first), pc.less(since, after)), False)
    if pc.any(wrong).as_py():
        what = count_rows(wrong, f"lies outside the years {YEARS[0]} to {YEARS[1] - 1}")
        report.fault(where, f"{what}; is it in {unit}? Leave unknown times empty")
    if pc.any(early).as_py():
        what = count_rows(early, f"lies in {NO_YEAR}")
        mend = 'numbers since 1970 were read without their unit: pd.to_datetime(.., unit="s"), or "ms"'
        report.fault(where, f"{what}; {mend}. Leave unknown times empty")
    return bool(pc.any(wrong).as_py() or pc.any(early).as_py())


def _note_inexact(report: Report, where: str, values: pa.ChunkedArray) -> None:
    if pa.types.is_uint64(values.type):  # which arrow compares with no signed number
        beyond = pc.greater(values, pa.scalar(EXACT, pa.uint64()))
    else:
        beyond = pc.or_(pc.greater(values, EXACT), pc.less(values, -EXACT))
    beyond = pc.fill_null(beyond, False)
    if pc.any(beyond).as_py():
        report.note(where, f"{count_rows(beyond, 'holds a whole number')} beyond 2^53: read as the nearest float")


def _check_yes_or_no(report: Report, where: str, values: pa.ChunkedArray) -> None:
    numbers = as_type(values, pa.float64()).drop_null().to_numpy()
    if (wrong := numbers[~np.isin(numbers, (0, 1)) & ~np.isnan(numbers)]).size:
        what = count_values(wrong.tolist(), wrong.size, "has another value", "row")
        report.fault(where, f"{what}; expected true or false, or 1 or 0, or empty where unknown")


def _check_history(report: Report, where: str, values: pa.ChunkedArray) -> None:
    if pa.types.is_null(values.type):
        return
    values = values.combine_chunks()
    rows = np.asarray(pc.list_parent_indices(values))[np.asarray(is_empty(pc.list_flatten(values)))]
    if len(rows):
        wrong = np.zeros(len(values), bool)
        wrong[rows] = True
        report.fault(where, f"{count_rows(wrong, 'has an empty entry in its list')}; leave such entries out")


def _check_zones(report: Report, source: Source) -> None:
    """Instants with a zone cannot be compared with those without; a column without a value has neither."""
    zones = {}
    for table, column in (("sessions", "timestamp"), ("intents", "valid_from")):
        values = source.load(report, table, column)
        if values is not None and values.null_count < len(values):
            zones[f"{table}.{column}"] = values.type
    if len({pa.types.is_timestamp(found) and found.tz is not None for found in zones.values()}) > 1:
        named = " and ".join(f"{where} ({found})" for where, found in zones.items())
        report.fault(next(iter(zones)), f"one has a time zone, the other none: {named}; give both one or neither")


def _check_times(report: Report, source: Source) -> None:
    """Split values, the split by time where they are empty, the order of timestamps."""
    split, time = source.load(report, "sessions", "split"), source.load(report, "sessions", "timestamp")
    if split is None or not len(split):
        return
    known = _check_split(report, split)
    if known == "published":
        source.parts = _codes(as_type(split, STRING).to_pandas())
    if time is None:
        return
    time = as_type(time, TIME)
    missing = np.asarray(pc.is_null(time))
    if known == "empty":
        _split_by_time(report, source, pa.table({"split": as_type(split, STRING), "timestamp": time}))
    elif missing.any() and _some_intents_are_late(report, source):
        report.note("sessions.timestamp", f"{count_rows(missing, 'is empty')}: valid_from cannot be checked there")
    moments = time.to_numpy()
    _note_short(report, moments[~missing])
    steps = np.diff(moments[~missing])
    if (steps < np.timedelta64(0)).any():
        back = (steps < np.timedelta64(0)).sum()
        report.note("sessions.timestamp", f"rows are not in the order of time: it steps back {back:,} times")
    if known == "published":
        _check_order_of_parts(report, source.parts, moments)


def _note_short(report: Report, moments: np.ndarray) -> None:
    """All sessions within a minute, or at one moment: times that lost their unit, or the time of an export."""
    if len(moments) > 1 and (span := moments.max() - moments.min()) < SHORT:
        seconds = span / np.timedelta64(1, "s")
        what = f"all {len(moments):,} times lie within {seconds:.3g} seconds of {moments.min().astype('datetime64[s]')}"
        report.note("sessions.timestamp", f"{what}: is their unit right?")


def _check_users(report: Report, source: Source) -> None:
    """Early stopping needs users of train that are kept apart, and others to learn from."""
    users = source.load(report, "sessions", "user_id") if source.parts is not None else None
    if users is None:
        return
    own = as_type(users, STRING).filter(pa.array(source.parts == SPLITS.index("train")))
    if len(own) > 1 and pc.count_distinct(own).as_py() == 1:
        what = "train has one user alone; expected several, since some are kept apart for early stopping"
        report.fault("sessions.user_id", f"{what}: a session id will do where users are unknown")


def _split_by_time(report: Report, source: Source, keys: pa.Table) -> None:
    ruled = "time_split" in source.meta
    if ruled and splitting.rule_faults(source.meta["time_split"]):
        return  # a fault of dataset.yaml, told with its key
    try:
        source.parts = _codes(splitting.resolve(to_frame(keys), source.meta))
    except ValueError as error:
        report.fault("sessions.split", f"every row is empty, and a split by time fails: {error}; fill in either")
    else:
        how = f"{YAML_FILE} time_split" if ruled else "70 % train, 10 % valid, 20 % test"
        report.note("sessions.split", f"every row is empty: split by time, {how}")


def _codes(split: pd.Series) -> np.ndarray:
    return pd.Index(SPLITS).get_indexer(np.asarray(split, dtype=object))


def _check_split(report: Report, split: pa.ChunkedArray) -> str:
    """'published', 'empty' or 'wrong'."""
    empty = np.asarray(is_empty(split))
    if empty.all():
        return "empty"
    values = pd.Series(as_type(split, STRING).to_pandas(), dtype=object)
    unknown = ~empty & ~values.isin(SPLITS).to_numpy()
    if unknown.any():
        what = count_values(values[unknown], unknown.sum(), "has an unknown value")
        report.fault("sessions.split", f"{what}; expected {', '.join(SPLITS)}, or all empty for a split by time")
    if empty.any():
        what = count_rows(empty, "is empty")
        report.fault("sessions.split", f"{what}, the others are set; fill in all, or empty all for a split by time")
    absent = [name for name in SPLITS if not values.eq(name).any()]
    if absent and not unknown.any() and not empty.any():
        what = f"no session is {' or '.join(absent)}"
        report.fault("sessions.split", f"{what}; expected some of each, or all empty for a split by time")
    return "wrong" if unknown.any() or empty.any() else "published"


def _some_intents_are_late(report: Report, source: Source) -> bool:
    valid_from = source.load(report, "intents", "valid_from")
    return valid_from is not None and valid_from.null_count < len(valid_from)


def _check_order_of_parts(report: Report, parts: np.ndarray, moments: np.ndarray) -> None:
    """A published split need not follow time (users may be split), so a train session after the test is a note."""
    for earlier, later in (("train", "test"), ("valid", "test"), ("train", "valid")):
        starts = moments[(parts == SPLITS.index(later)) & ~np.isnat(moments)]
        late = (parts == SPLITS.index(earlier)) & (len(starts) > 0 and moments >= starts.min())
        if late.any():
            what = count_rows(late, f"lies at or after the first session of {later}", f"{earlier} session")
            report.note("sessions.split", f"{what}: this split does not follow time")
