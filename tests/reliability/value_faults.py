"""Values: empty, not a number, infinite, doubled, orphaned, of one class, out of range, out of time."""

import datetime
import math

import pyarrow as pa
from small_shop import SESSIONS, SHOWN, good_shop
from table_case import at, kept, noted, refused
from table_changes import drop_rows, empty, put, together, typed
from type_faults import became, constant

ROWS = SESSIONS * SHOWN
NAN, INF = math.nan, math.inf


def value(table, column, row):
    return good_shop()[0][table][column][row].as_py()


def copied(table, column, target, source):
    """The value of row `source` in row `target` as well."""
    return put(table, column, {target: value(table, column, source)})


def rows_again(table):
    """Every row twice."""

    def change(tables, meta):
        tables[table] = pa.concat_tables([tables[table]] * 2).combine_chunks()

    return change


def transcript_of(session):
    """The first transcript names a session and has no features of its own."""

    def change(tables, meta):
        names = pa.array([session] + [None] * (len(tables["transcripts"]) - 1), pa.string())
        tables["transcripts"] = tables["transcripts"].append_column("session_id", names)
        put("transcripts", "features", {0: None})(tables, meta)

    return change


def of_split(name, clicked):
    """The clicks of a whole split: all, or none."""

    def change(tables, meta):
        own = dict(zip(*(tables["sessions"][c].to_pylist() for c in ("session_id", "split")), strict=True))
        mine = [own[session] == name for session in tables["impressions"]["session_id"].to_pylist()]
        values = tables["impressions"]["clicked"].to_pylist()
        values = [clicked if here else was for here, was in zip(mine, values, strict=True)]
        put("impressions", "clicked", pa.array(values, pa.int8()))(tables, meta)

    return change


def first_of_each_list(tables, meta):
    """Lists of one intent."""
    tables["impressions"] = tables["impressions"].filter(pa.array([row % SHOWN == 0 for row in range(ROWS)]))
    del tables["truth"], meta["world"]


def only_clicked_in_first(tables, meta):
    """The first session was shown what it clicked on, thrice, and nothing else."""
    put("impressions", "clicked", dict.fromkeys(range(SHOWN), 1))(tables, meta)


EMPTY = {
    **{f"{table} without rows": refused(empty(table), f"{table}.parquet", "is empty: no rows")
       for table in ("intents", "sessions", "impressions", "transcripts", "labels", "truth")},
    **{f"{column} empty in a row": refused(put(table, column, {5: none}), f"{table}.{column}", "1 row is empty", at(5))
       for table, column, none in (
           ("sessions", "session_id", ""), ("sessions", "user_id", None), ("intents", "title", ""),
           ("impressions", "intent_id", ""), ("impressions", "position", None),
           ("impressions", "clicked", None), ("impressions", "propensity", NAN), ("transcripts", "typed_query", None))},
    "every user empty": refused(constant("sessions", "user_id", None, pa.string()), "sessions.user_id", "240 rows"),
    "every click empty": refused(constant("impressions", "clicked", None, pa.int8()), "impressions.clicked", "2,880"),
    "a title of blanks": refused(put("intents", "title", {5: " \t\u3000"}), "intents.title", "1 row is empty", at(5)),
    "an id of blanks": refused(put("sessions", "user_id", {5: "  "}), "sessions.user_id", "1 row is empty", at(5)),
    "a column of nulls only": noted(constant("sessions", "device", None, pa.string()), "sessions.device", "every row"),
    "no description": noted(constant("intents", "description", "", pa.string()), "intents.description", "only the"),
    "no time at all, split published": kept(constant("sessions", "timestamp", None, pa.timestamp("us"))),
    "no time and no split": refused(
        together(constant("sessions", "timestamp", None, pa.timestamp("us")),
                 constant("sessions", "split", None, pa.string())),
        "sessions.split", "fails"),
    "a session without a time": noted(put("sessions", "timestamp", {5: None}), "sessions.timestamp", "1 row is empty"),
    "a label that is not there yet": noted(put("labels", "intent_id", {0: None}), "labels.intent_id", "not labelled"),
    "a transcript of nothing": refused(put("transcripts", "features", {5: None}), "transcripts", "has neither", at(5)),
    "split in half the rows": refused(put("sessions", "split", {5: None}), "sessions.split", "1 row is empty", at(5)),
    "an empty entry of a history": refused(
        put("sessions", "seen", {5: ["a", None]}), "sessions.seen", "has an empty entry", at(5)),
}  # fmt: skip
NUMBERS = {
    "numeric not a number": kept(
        became("sessions", "order_amount", lambda row, v: NAN if row == 5 else 1.5, pa.float64())),
    "numeric infinite": refused(typed("sessions", "order_amount", pa.float64(), INF), "sessions.order_amount", "240"),
    "numeric minus infinite": refused(
        became("sessions", "order_amount", lambda row, v: -INF if row == 5 else 1.0, pa.float64()),
        "sessions.order_amount", "1 row is infinite", at(5)),
    "numeric at the edge of floats": kept(
        became("sessions", "order_amount", lambda row, v: 1.7e308 * (-1) ** row, pa.float64())),
    "whole numbers too long for a float": noted(
        became("sessions", "order_amount", lambda row, v: 2**63 - 1 - row, pa.int64()),
        "sessions.order_amount", "240 rows", "2^53"),
    "propensity infinite": refused(put("impressions", "propensity", {5: INF}), "impressions.propensity", "inf", at(5)),
    "propensity zero": refused(put("impressions", "propensity", {5: 0.0}), "impressions.propensity", "0.0", at(5)),
    "propensity above one": refused(put("impressions", "propensity", {5: 1.5}), "impressions.propensity", "1.5", at(5)),
    "propensity negative": refused(put("impressions", "propensity", {5: -0.1}), "impressions.propensity", at(5)),
    "clicked two": refused(put("impressions", "clicked", {5: 2}), "impressions.clicked", "has the value 2", at(5)),
    "clicked minus one": refused(put("impressions", "clicked", {5: -1}), "impressions.clicked", "value -1", at(5)),
    "clicked a huge number": refused(
        became("impressions", "clicked", lambda row, v: 2**62 if row == 5 else v, pa.int64()),
        "impressions.clicked", "4611686018427387904", at(5)),
    "position a huge number": refused(
        became("impressions", "position", lambda row, v: 2**64 - 1 if row == 5 else v, pa.uint64()),
        "impressions.position", "18446744073709551615", at(5)),
    "position negative": refused(put("impressions", "position", {5: -3}), "impressions.position", "value -3", at(5)),
    "positions from one": refused(
        became("impressions", "position", lambda row, v: v + 1, pa.int16()),
        "impressions.position", "240 rows have a position beyond"),
    "two at one position": refused(copied("impressions", "position", 5, 4), "impressions.position", "already", at(5)),
    "a posterior not a number": refused(
        put("truth", "posterior", {5: [NAN] * 96}), "truth.posterior", "outside 0 to 1", at(5)),
    "a click probability infinite": refused(
        put("truth", "click_probability", {5: [INF] * SHOWN}), "truth.click_probability", "outside 0 to 1", at(5)),
    "a posterior that sums to two": refused(
        put("truth", "posterior_discrete", {5: [2 / 96] * 96}), "truth.posterior_discrete", "does not sum to 1", at(5)),
    "click probabilities cut short": refused(
        put("truth", "click_probability", {5: [0.5]}), "truth.click_probability", "another length", at(5)),
    "a posterior cut short": refused(put("truth", "posterior", {5: [1.0]}), "truth.posterior", "another length", at(5)),
}  # fmt: skip
IDS = {
    "a session twice": refused(copied("sessions", "session_id", 5, 4), "sessions.session_id", "1 row repeats an id"),
    "an intent twice": refused(copied("intents", "intent_id", 5, 4), "intents.intent_id", "1 row repeats an id"),
    "truth twice": refused(copied("truth", "session_id", 5, 4), "truth.session_id", "1 row repeats an id"),
    "an intent shown twice": refused(copied("impressions", "intent_id", 5, 4), "impressions", "already shown", at(5)),
    **{f"every row of {table} twice": refused(rows_again(table), words, f"{rows:,} rows")
       for table, words, rows in (("sessions", "sessions.session_id", SESSIONS), ("intents", "intents.intent_id", 96),
                                  ("impressions", "impressions", ROWS), ("truth", "truth.session_id", SESSIONS))},
    "every label twice": kept(rows_again("labels")),
    **{f"an orphan in {table}.{column}": refused(
        put(table, column, {1: "nobody"}), f"{table}.{column}", "1 row names what", "(first: 'nobody')")
       for table, column in (("impressions", "session_id"), ("impressions", "intent_id"), ("labels", "session_id"),
                             ("labels", "intent_id"), ("truth", "session_id"),
                             ("truth", "intent_id"))},
    "an id with a blank too many": refused(
        put("impressions", "session_id", {5: value("sessions", "session_id", 0) + " "}),
        "impressions.session_id", "1 row names what sessions.parquet does not have"),
    "an id in capitals": refused(
        put("impressions", "intent_id", {5: value("intents", "intent_id", 0).upper() + "X"}), "impressions.intent_id"),
    "a transcript of nobody": refused(transcript_of("nobody"), "transcripts.session_id", "(first: 'nobody')"),
    "a session without truth": refused(drop_rows("truth", 1), "truth.session_id", "1 session has no row", at(239)),
}  # fmt: skip
CLASSES = {
    "nothing clicked": refused(constant("impressions", "clicked", 0, pa.int8()), "impressions.clicked", "of train has"),
    "all clicked": refused(
        constant("impressions", "clicked", 1, pa.int8()), "impressions.clicked", "of test has", "sampled negatives"),
    "nothing clicked in valid": refused(of_split("valid", 0), "impressions.clicked", "no session of valid has"),
    "all clicked in test": refused(of_split("test", 1), "impressions.clicked", "no session of test has"),
    "lists of one": refused(first_of_each_list, "impressions.clicked", "no session of train has a clicked and an"),
    "one list of clicks only": noted(
        only_clicked_in_first, "1 session has only clicks", at(0),
        "sessions have no click (first: 1,", "left out of it"),
    "one user": refused(constant("sessions", "user_id", "u", pa.string()), "sessions.user_id", "one user alone"),
    "one split": refused(constant("sessions", "split", "train", pa.string()), "sessions.split", "is valid or test"),
    "an unknown split": refused(put("sessions", "split", {5: "dev"}), "sessions.split", "1 row has an unknown value"),
    "one value of a categorical": kept(constant("sessions", "device", "phone", pa.string())),
    "one number everywhere": kept(constant("sessions", "order_amount", 1.0, pa.float64())),
}  # fmt: skip
LONG_AGO, FAR = datetime.datetime(1, 1, 1), datetime.datetime(9999, 12, 31)
TIMES = {
    "a time zone on one side": refused(
        typed("sessions", "timestamp", pa.timestamp("us", "Asia/Singapore")),
        "sessions.timestamp", "one has a time zone, the other none", "intents.valid_from"),
    "time zones that differ": kept(
        together(typed("sessions", "timestamp", pa.timestamp("us", "Asia/Singapore")),
                 typed("intents", "valid_from", pa.timestamp("ns", "UTC")))),
    "a time before all times": refused(
        put("sessions", "timestamp", {5: LONG_AGO}), "sessions.timestamp", "1 row lies outside", at(5)),
    "a time after all times": refused(
        put("sessions", "timestamp", {5: FAR}), "sessions.timestamp", "1 row lies outside", at(5)),
    "milliseconds taken for seconds": refused(
        became("sessions", "timestamp", lambda row, v: 1_767_571_200_000 + row, pa.timestamp("s")),
        "sessions.timestamp", "240 rows lie outside"),
    "seconds taken for milliseconds": refused(
        became("intents", "valid_from", lambda row, v: -9_000_000_000_000 if row == 5 else None, pa.timestamp("ms")),
        "intents.valid_from", "1 row lies outside", at(5)),
    "a time that wraps round in microseconds": refused(
        became("sessions", "timestamp", lambda row, v: 2**62 if row == 5 else None, pa.timestamp("ms")),
        "sessions.timestamp", "1 row lies outside", at(5)),
    "one moment and no split": refused(
        together(constant("sessions", "timestamp", datetime.datetime(2026, 1, 5), pa.timestamp("us")),
                 constant("sessions", "split", None, pa.string())),
        "sessions.split", "a split by time fails"),
    "times out of order": noted(
        put("sessions", "timestamp", {5: value("sessions", "timestamp", 200)}), 
        "sessions.timestamp", "steps back 1 times", "1 train session lies at or after the first session of"),
    "an intent shown before it was there": refused(
        became("intents", "valid_from", lambda *_: datetime.datetime(2026, 3, 1), pa.timestamp("us")),
        "impressions.intent_id", "before its valid_from"),
}  # fmt: skip
CASES = EMPTY | NUMBERS | IDS | CLASSES | TIMES
