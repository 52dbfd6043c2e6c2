"""A small data set without a fault, as arrow tables, and the means to put one fault into it."""

import numpy as np
import pandas as pd
import pyarrow as pa

from rgalign.shopworld.tables import WORLD_VERSION

SESSIONS, KB = 10, 4
WORLD = {"version": WORLD_VERSION, "seed": 0, "rules": {}}  # beside truth.parquet
STRINGS = pa.map_(pa.string(), pa.string())


def good_meta() -> dict:
    kinds = {"state": "categorical", "amount": "numeric", "note": "text", "visited": "history"}
    return {"name": "shop", "features": kinds, "position_is_real": True, "owner": "kept as it is", "world": WORLD}


def good_tables() -> dict[str, pa.Table]:
    """10 sessions of 5 users, 4 intents, lists of 3 with one click each; transcripts, labels and truth too."""
    session = [f"s{number}" for number in range(SESSIONS)]
    intent = [f"i{number}" for number in range(KB)]
    days = pd.date_range("2024-03-01", periods=SESSIONS).to_numpy().astype("datetime64[us]")
    shown = [[(number + place) % KB for place in range(3)] for number in range(SESSIONS)]
    posterior = pa.array(np.full((SESSIONS, KB), 0.25).tolist(), pa.list_(pa.float32()))
    return {
        "intents": pa.table(
            {
                "intent_id": intent,
                "title": ["Return", "Refund", "Delay", "Other"],
                "description": ["Return a parcel", "Money back", "Where is it", ""],
                "category": ["after", "after", "before", "before"],
                "valid_from": pa.array([None, None, None, days[0]], pa.timestamp("us")),
            }
        ),
        "sessions": pa.table(
            {
                "session_id": session,
                "user_id": [f"u{number % 5}" for number in range(SESSIONS)],
                "timestamp": days,
                "region": ["north", "south"] * 5,
                "split": ["train"] * 6 + ["valid"] * 2 + ["test"] * 2,
                "state": ["paid", None] * 5,
                "amount": np.linspace(0, 9, SESSIONS),
                "note": ["gift", ""] * 5,
                "visited": pa.array([["a", "b"], []] * 5, pa.list_(pa.string())),
            }
        ),
        "impressions": pa.table(
            {
                "session_id": np.repeat(session, 3).tolist(),
                "intent_id": [intent[row] for rows in shown for row in rows],
                "position": pa.array([0, 1, 2] * SESSIONS, pa.int16()),
                "clicked": pa.array([0, 1, 0] * SESSIONS, pa.int8()),
                "propensity": [0.5] * (3 * SESSIONS),
            }
        ),
        "transcripts": pa.table(
            {
                "session_id": ["s0", None],
                "features": pa.array([None, [("state", "paid")]], STRINGS),
                "typed_query": ["where is it", "money back"],
                "intent_id": ["i2", None],
            }
        ),
        "labels": pa.table({"session_id": ["s9"], "intent_id": ["i1"]}),
        "truth": pa.table(
            {
                "session_id": session,
                "intent_id": [intent[rows[1]] for rows in shown],
                "click_probability": pa.array([[0.1, 0.8, 0.1]] * SESSIONS, pa.list_(pa.float32())),
                "posterior_discrete": posterior,
                "posterior": posterior,
            }
        ),
    }
