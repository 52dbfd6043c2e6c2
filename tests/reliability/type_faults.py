"""Columns of another type, missing, misspelt or doubled."""

import datetime
from decimal import Decimal

import pyarrow as pa
from table_case import kept, noted, refused
from table_changes import double, drop, kind, put, rename, together, typed

KEYS = "expected strings or integers"
DAY = datetime.datetime(2026, 1, 5)


def became(table, column, convert, to):
    """Every value of a column converted, the column of another type."""

    def change(tables, meta):
        values = [convert(number, value) for number, value in enumerate(tables[table][column].to_pylist())]
        put(table, column, pa.array(values, to))(tables, meta)

    return change


def constant(table, column, value, to):
    return became(table, column, lambda *_: value, to)


def number(row, value):
    return row


def shuffled(values):
    """The column that says whether a list was shuffled."""

    def change(tables, meta):
        tables["sessions"] = tables["sessions"].append_column("shuffled", pa.array(values))

    return change


TYPES = {
    "session id a float": refused(
        became("sessions", "session_id", number, pa.float64()), "sessions.session_id", "has the type double", KEYS
    ),
    "session id a boolean": refused(constant("sessions", "session_id", True, pa.bool_()), "sessions.session_id", KEYS),
    "session id bytes": refused(
        became("sessions", "session_id", lambda _, v: v.encode(), pa.binary()), "sessions.session_id", "binary", KEYS
    ),
    "user id a float": refused(became("sessions", "user_id", number, pa.float32()), "sessions.user_id", KEYS),
    "user id a list": refused(
        became("sessions", "user_id", lambda _, v: [v], pa.list_(pa.string())), "sessions.user_id", KEYS
    ),
    "timestamp a string": refused(
        constant("sessions", "timestamp", "2026-01-05", pa.string()), "sessions.timestamp", "pd.to_datetime makes them"
    ),
    "timestamp seconds": refused(
        constant("sessions", "timestamp", 1_767_571_200, pa.int64()), "sessions.timestamp", "has the type int64"
    ),
    "timestamp a time of day": refused(
        constant("sessions", "timestamp", datetime.time(9), pa.time64("us")), "sessions.timestamp", "time64"
    ),
    "region a number": refused(constant("sessions", "region", 3, pa.int64()), "sessions.region", "expected strings"),
    "split a number": refused(constant("sessions", "split", 0, pa.int8()), "sessions.split", "expected strings"),
    "categorical a float": refused(
        constant("sessions", "device", 1.5, pa.float64()), "sessions.device", "strings, integers or booleans"
    ),
    "categorical a list": refused(
        constant("sessions", "device", ["phone"], pa.list_(pa.string())), "sessions.device", "has the type list"
    ),
    "categorical a struct": refused(
        constant("sessions", "device", {"a": 1}, pa.struct({"a": pa.int64()})), "sessions.device", "struct"
    ),
    "numeric a string": refused(
        constant("sessions", "order_amount", "12,50", pa.string()), "sessions.order_amount", "pd.to_numeric makes them"
    ),
    "numeric a time": refused(
        constant("sessions", "order_amount", DAY, pa.timestamp("us")), "sessions.order_amount", "expected numbers"
    ),
    "numeric a duration": refused(
        constant("sessions", "order_amount", 5, pa.duration("s")), "sessions.order_amount", "duration"
    ),
    "text a number": refused(constant("sessions", "event_text", 7, pa.int64()), "sessions.event_text", "strings"),
    "text bytes": refused(constant("sessions", "event_text", b"late", pa.binary()), "sessions.event_text", "binary"),
    "history a string": refused(constant("sessions", "seen", "a,b", pa.string()), "sessions.seen", "lists of strings"),
    "history of floats": refused(
        constant("sessions", "seen", [1.5], pa.list_(pa.float64())), "sessions.seen", "lists of strings or integers"
    ),
    "history of lists": refused(
        constant("sessions", "seen", [["a"]], pa.list_(pa.list_(pa.string()))), "sessions.seen", "lists of strings"
    ),
    "intent id a float": refused(became("intents", "intent_id", number, pa.float64()), "intents.intent_id", KEYS),
    "title a number": refused(became("intents", "title", number, pa.int64()), "intents.title", "expected strings"),
    "description bytes": refused(
        constant("intents", "description", b"x", pa.binary()), "intents.description", "binary"
    ),
    "category a list": refused(
        constant("intents", "category", ["a"], pa.list_(pa.string())), "intents.category", "expected strings"
    ),
    "valid_from a string": refused(
        constant("intents", "valid_from", "soon", pa.string()), "intents.valid_from", "timestamps or dates"
    ),
    "position a float": refused(
        became("impressions", "position", lambda _, v: float(v), pa.float64()),
        "impressions.position",
        "integers 0 to n-1",
    ),
    "position a string": refused(
        became("impressions", "position", lambda _, v: str(v), pa.string()), "impressions.position", "integers"
    ),
    "clicked a float": refused(
        became("impressions", "clicked", lambda _, v: float(v), pa.float64()), "impressions.clicked", "integers 0 or 1"
    ),
    "clicked yes or no": refused(
        became("impressions", "clicked", lambda _, v: "yes" if v else "no", pa.string()), "impressions.clicked"
    ),
    "propensity a string": refused(
        became("impressions", "propensity", lambda _, v: str(v), pa.string()), "impressions.propensity", "numbers"
    ),
    "posterior one number": refused(constant("truth", "posterior", 1.0, pa.float32()), "truth.posterior", "lists"),
    "posterior words": refused(
        constant("truth", "posterior", ["1"], pa.list_(pa.string())), "truth.posterior", "lists of floats"
    ),
    "typed query a number": refused(
        constant("transcripts", "typed_query", 5, pa.int64()), "transcripts.typed_query", "expected strings"
    ),
    "transcript features a struct": refused(
        constant("transcripts", "features", {"a": "b"}, pa.struct({"a": pa.string()})), "transcripts.features", "a map"
    ),
    "label a float": refused(constant("labels", "intent_id", 1.0, pa.float64()), "labels.intent_id", KEYS),
    "shuffled in words": refused(shuffled(["yes", "no"] * 120), "sessions.shuffled", "true or false, or 1 or 0"),
    "shuffled other numbers": refused(
        shuffled([0.0, 2.0, 1.0, None] * 60), "sessions.shuffled", "60 rows have another value (first: 2.0)"
    ),
    "shuffled a feature": refused(
        together(shuffled([True, False] * 120), kind("shuffled", "categorical")),
        "features.shuffled",
        "cannot be a feature",
    ),
    "kind of another type": refused(kind("event_text", "numeric"), "sessions.event_text", "expected numbers"),
    "user ids unsigned": kept(became("sessions", "user_id", lambda row, _: 2**64 - 1 - row % 60, pa.uint64())),
    "clicked a boolean": kept(became("impressions", "clicked", lambda _, v: bool(v), pa.bool_())),
    "position unsigned": kept(typed("impressions", "position", pa.uint8())),
    "numeric a decimal": kept(constant("sessions", "order_amount", Decimal("12.50"), pa.decimal128(12, 2))),
    "numeric a boolean": noted(
        constant("sessions", "order_amount", None, pa.bool_()), "sessions.order_amount", "empty"
    ),
    "numeric half precision": kept(typed("sessions", "order_amount", pa.float16())),
    "titles a dictionary": kept(typed("intents", "title", pa.dictionary(pa.int32(), pa.string()))),
    "timestamps days": kept(typed("sessions", "timestamp", pa.date32())),
    "user ids a dictionary": kept(typed("sessions", "user_id", pa.dictionary(pa.int32(), pa.string()))),
    "user ids of nulls": refused(constant("sessions", "user_id", None, pa.null()), "sessions.user_id", "240 rows are"),
    "session ids views": kept(typed("sessions", "session_id", pa.string_view())),
    "user ids views": kept(typed("sessions", "user_id", pa.string_view())),
    "texts views": kept(typed("sessions", "event_text", pa.string_view())),
    "history of views": kept(became("sessions", "seen", lambda _, v: v, pa.list_(pa.string_view()))),
    "history long, of views": kept(became("sessions", "seen", lambda _, v: v, pa.large_list(pa.string_view()))),
    "history a list view": refused(
        became("sessions", "seen", lambda _, v: v, pa.list_view(pa.string())), "sessions.seen", "lists of strings"
    ),
    "session ids universal": refused(
        became("sessions", "session_id", lambda row, _: row.to_bytes(16, "big"), pa.uuid()), "sessions.session_id", KEYS
    ),
    "numeric beyond all signed": noted(
        constant("sessions", "order_amount", 2**64 - 1, pa.uint64()), "sessions.order_amount", "beyond 2^53"
    ),
    "propensity beyond all signed": refused(
        constant("impressions", "propensity", 2**64 - 1, pa.uint64()), "impressions.propensity", "a probability"
    ),
    "propensity beyond 2^53": refused(
        constant("impressions", "propensity", 2**53 + 1, pa.int64()), "impressions.propensity", "a probability"
    ),
}

NEEDED = {
    "intents": ("intent_id", "title", "description", "category", "valid_from"),
    "sessions": ("session_id", "user_id", "timestamp", "region", "split", "order_status", "seen"),
    "impressions": ("session_id", "intent_id", "position", "clicked"),
    "transcripts": ("typed_query",),
    "labels": ("session_id", "intent_id"),
    "truth": ("session_id", "intent_id", "click_probability", "posterior_discrete", "posterior"),
}
MISSING = {
    f"{table}.{column} missing": refused(drop(table, column), f"{table}.{column}", "is missing")
    for table, columns in NEEDED.items()
    for column in columns
}
MISSING["sessions.region missing"] = refused(
    drop("sessions", "region"), "sessions.region", "is missing; expected it, even if all its values are empty"
)
DOUBLED = {
    f"{table}.{column} doubled": refused(double(table, column), f"{table}.{column}", "is there 2 times; expected once")
    for table, column in (
        ("sessions", "session_id"),
        ("sessions", "timestamp"),
        ("sessions", "event_text"),
        ("intents", "title"),
        ("impressions", "clicked"),
        ("transcripts", "typed_query"),
    )
}
MISSPELT = {
    f"{column} misspelt {wrong}": refused(rename(table, column, wrong), f"{table}.{column}", "did you mean", wrong)
    for table, column, wrong in (
        ("sessions", "session_id", "sesion_id"),
        ("sessions", "user_id", "User_ID"),
        ("intents", "intent_id", "intentid"),
        ("impressions", "position", "postion"),
        ("impressions", "clicked", "clicke"),
        ("sessions", "event_text", "event-text"),
    )
}
CASES = TYPES | MISSING | DOUBLED | MISSPELT
