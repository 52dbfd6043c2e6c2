"""One fault at a time: how to put it into the good tables, and the words that its complaint must hold."""

from datetime import UTC, datetime

import pyarrow as pa
from table_changes import declare, double, drop, drop_rows, empty, kind, more_columns, put, rename, together, typed


def with_index(tables, meta):
    """What pandas writes beside the columns after rows were picked or sorted."""
    tables["sessions"] = tables["sessions"].append_column("__index_level_0__", pa.array(range(10)))


def with_shuffled(values):
    def change(tables, meta):
        tables["sessions"] = tables["sessions"].append_column("shuffled", values)

    return change


def clicks(values, rows=range(30)):
    return put("impressions", "clicked", dict.fromkeys(rows, values))


def only_intent(tables, meta):
    """Lists of one intent, which is clicked."""
    tables["impressions"] = tables["impressions"].filter(pa.array([False, True, False] * 10))
    put("impressions", "position", pa.array([0] * 10, pa.int16()))(tables, meta)
    put("truth", "click_probability", pa.array([[0.8]] * 10, pa.list_(pa.float32())))(tables, meta)


NOTHING_TO_LEARN = [
    f"no session of {part} has a clicked and an unclicked intent: nothing can be" for part in ("train", "valid", "test")
]
ZONED = [datetime(2024, 2, 1, tzinfo=UTC)] * 4
FAULTS = {
    "empty user": (
        put("sessions", "user_id", {1: None, 3: ""}),
        ["sessions.user_id", "2 rows are empty (first: 1, 3)"],
    ),
    "empty session id": (put("sessions", "session_id", {9: ""}), ["sessions.session_id", "1 row is empty (first: 9)"]),
    "empty title": (put("intents", "title", {0: ""}), ["intents.title", "1 row is empty (first: 0)"]),
    "empty click": (put("impressions", "clicked", {4: None}), ["impressions.clicked", "1 row is empty (first: 4)"]),
    "empty position": (
        put("impressions", "position", {4: None}),
        ["impressions.position", "1 row is empty (first: 4)"],
    ),
    "empty shown intent": (put("impressions", "intent_id", {4: ""}), ["impressions.intent_id", "1 row is empty"]),
    "empty propensity": (
        put("impressions", "propensity", {2: float("nan")}),
        ["impressions.propensity", "1 row is empty"],
    ),
    "doubled intent": (
        put("intents", "intent_id", {1: "i0"}),
        ["intents.intent_id", "1 row repeats an id (first: 'i0')"],
    ),
    "doubled session": (put("sessions", "session_id", {1: "s0"}), ["sessions.session_id", "1 row repeats an id"]),
    "shown twice": (
        put("impressions", "intent_id", {1: "i0"}),
        ["impressions ", "1 row shows an intent that its session was already shown (first: 1)"],
    ),
    "two at one position": (put("impressions", "position", {1: 0}), ["impressions.position", "already has (first: 1)"]),
    "gap in positions": (put("impressions", "position", {2: 5}), ["1 row has a position beyond", "(first: 2)"]),
    "negative position": (put("impressions", "position", {2: -1}), ["impressions.position", "has the value -1"]),
    "orphan intent": (
        put("impressions", "intent_id", {0: "ret_12", 3: "ret_12"}),
        ["impressions.intent_id", "2 rows name what intents.parquet does not have (first: 'ret_12')"],
    ),
    "orphan session": (
        put("impressions", "session_id", {29: "s77"}),
        ["sessions.parquet does not have (first: 's77')"],
    ),
    "clicked is 2": (
        put("impressions", "clicked", {7: 2}),
        ["impressions.clicked", "1 row has the value 2 (first: 7)"],
    ),
    "clicked in words": (
        typed("impressions", "clicked", pa.string(), "yes"),
        ["has the type string; expected integers 0 or 1"],
    ),
    "shuffled in words": (
        with_shuffled(pa.array(["yes", "no"] * 5)),
        ["sessions.shuffled", "has the type string; expected true or false, or 1 or 0"],
    ),
    "shuffled a number": (
        with_shuffled(pa.array([0.0, 2.0, 1.0, None, 7.0] * 2)),
        ["sessions.shuffled", "4 rows have another value (first: 2.0, 7.0); expected true or false, or 1 or 0"],
    ),
    "shuffled a feature": (
        together(with_shuffled(pa.array([True, False] * 5)), kind("shuffled", "categorical")),
        ["dataset.yaml features.shuffled", "cannot be a feature"],
    ),
    "clicked a float": (typed("impressions", "clicked", pa.float64()), ["impressions.clicked", "has the type double"]),
    "propensity zero": (put("impressions", "propensity", {0: 0.0}), ["impressions.propensity", "has the value 0.0"]),
    "propensity above 1": (
        put("impressions", "propensity", {0: 1.5, 1: 1.5}),
        ["2 rows have the value 1.5 (first: 0, 1)"],
    ),
    "infinite amount": (
        put("sessions", "amount", {2: float("inf")}),
        ["sessions.amount", "1 row is infinite (first: 2)"],
    ),
    "amount in words": (
        typed("sessions", "amount", pa.string(), "much"),
        ["sessions.amount", "string; expected numbers; pd.to_numeric makes them"],
    ),
    "state a list": (
        typed("sessions", "state", pa.list_(pa.string()), ["x"]),
        ["sessions.state", "expected strings, integers"],
    ),
    "history a string": (typed("sessions", "visited", pa.string(), "a b"), ["sessions.visited", "expected lists"]),
    "null in a history": (
        put("sessions", "visited", {4: ["a", None]}),
        ["sessions.visited", "(first: 4)", "empty entry"],
    ),
    "time in words": (
        typed("sessions", "timestamp", pa.string(), "1.3.2024"),
        ["sessions.timestamp", "timestamps or dates; pd.to_datetime makes them"],
    ),
    "mixed zones": (
        put("intents", "valid_from", pa.array(ZONED, pa.timestamp("us", "UTC"))),
        ["one has a time zone, the other none", "intents.valid_from (timestamp[us, tz=UTC])"],
    ),
    "shown too early": (
        put("intents", "valid_from", {0: datetime(2024, 3, 2)}),
        ["impressions.intent_id", "1 row shows an intent before its valid_from (first: 'i0')"],
    ),
    "unknown split": (
        put("sessions", "split", {0: "dev"}),
        ["sessions.split", "1 row has an unknown value (first: 'dev')"],
    ),
    "split half filled": (
        put("sessions", "split", {0: None, 1: ""}),
        ["sessions.split", "2 rows are empty (first: 0, 1)"],
    ),
    "missing column": (drop("impressions", "clicked"), ["impressions.clicked", "is missing"]),
    "missing description": (
        drop("intents", "description"),
        ["intents.description", "even if all its values are empty"],
    ),
    "missing empty column": (drop("sessions", "region"), ["sessions.region", "even if all its values are empty"]),
    "misspelt column": (rename("sessions", "user_id", "userid"), ["sessions.user_id", "did you mean 'userid'?"]),
    "doubled column": (double("sessions", "state"), ["sessions.state", "is there 2 times; expected once"]),
    "no test": (put("sessions", "split", ["train"] * 6 + ["valid"] * 4), ["sessions.split", "no session is test"]),
    "only train": (put("sessions", "split", ["train"] * 10), ["sessions.split", "no session is valid or test"]),
    "no clicks": (clicks(0), NOTHING_TO_LEARN),
    "all clicked": (clicks(1), [*NOTHING_TO_LEARN, "a log of clicks alone needs sampled negatives"]),
    "one intent a list": (only_intent, NOTHING_TO_LEARN),
    "no click in valid": (clicks(0, range(18, 24)), [NOTHING_TO_LEARN[1]]),
    "no click in test by time": (
        together(put("sessions", "split", [None] * 10), clicks(0, range(24, 30))),
        [NOTHING_TO_LEARN[2]],
    ),
    "no intents": (empty("intents"), ["intents.parquet", "is empty: no rows"]),
    "no sessions": (empty("sessions"), ["sessions.parquet", "is empty: no rows"]),
    "no impressions": (empty("impressions"), ["impressions.parquet", "is empty: no rows"]),
    "empty query": (put("transcripts", "typed_query", {0: ""}), ["transcripts.typed_query", "1 row is empty"]),
    "bare transcript": (
        put("transcripts", "session_id", {0: None}),
        ["transcripts", "1 row has neither session_id nor"],
    ),
    "foreign transcript": (put("transcripts", "session_id", {0: "s77"}), ["transcripts.session_id", "(first: 's77')"]),
    "foreign label": (put("labels", "intent_id", {0: "i9"}), ["labels.intent_id", "(first: 'i9')"]),
    "truth of nobody": (put("truth", "session_id", {0: "s77"}), ["truth.session_id", "(first: 's77')"]),
    "session without truth": (drop_rows("truth", 2), ["truth.session_id", "2 sessions have no row (first: 8, 9)"]),
    "short posterior": (
        put("truth", "posterior", {3: [1.0]}),
        ["truth.posterior ", "list of another length (first: 3)"],
    ),
    "posterior sum": (put("truth", "posterior", {3: [0.5] * 4}), ["truth.posterior ", "does not sum to 1 (first: 3)"]),
    "probability above 1": (
        put("truth", "click_probability", {0: [0, 2.0, 0]}),
        ["truth.click_probability", "outside 0 to 1"],
    ),
    "short click list": (put("truth", "click_probability", {0: [0.5]}), ["truth.click_probability", "another length"]),
}

NOTES = {
    "no click": (put("impressions", "clicked", {1: 0}), ["1 session has no click (first: 0)", "no GAUC"]),
    "only clicks": (put("impressions", "clicked", {0: 1, 2: 1}), ["1 session has only clicks (first: 0)"]),
    "out of order": (
        put("sessions", "timestamp", {5: datetime(2024, 3, 9, 5)}),
        ["it steps back 1 times", "1 train session lies at or after the first session of test"],
    ),
    "no time": (put("sessions", "timestamp", {2: None}), ["sessions.timestamp", "1 row is empty (first: 2)"]),
    "split by time": (put("sessions", "split", [None] * 10), ["every row is empty: split by time"]),
    "column not declared": (rename("transcripts", "intent_id", "intentid"), ["did you mean 'intent_id'?"]),
    "feature all empty": (put("sessions", "state", [None] * 10), ["sessions.state", "every row is empty"]),
    "not labelled": (put("labels", "intent_id", {0: None}), ["labels.intent_id", "not labelled yet"]),
    "columns not declared": (more_columns(7), ["sessions ", "7 columns are not declared", "'extra0', 'extra1'"]),
    "pandas' index": (with_index, ["sessions.__index_level_0__", "to_parquet(.., index=False) leaves it out"]),
    "few not declared": (more_columns(2), ["sessions.extra0", "sessions.extra1"]),
    "key not read": (declare(positions_is_real=False), ["did you mean 'position_is_real'?"]),
}
