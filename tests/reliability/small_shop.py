"""A small ShopWorld without a fault, as arrow tables: what the generators of faults spoil."""

import copy
import functools

import pyarrow as pa

from rgalign.data.schema import to_table
from rgalign.shopworld import world

SESSIONS, INTENTS, SHOWN = 240, 96, 12
COLUMNS = ("order_status", "device", "days_since_order", "order_amount", "event_text", "help_page")
HISTORY = "seen"  # ShopWorld has no history: its last pages serve as one


def good_shop() -> tuple[dict[str, pa.Table], dict]:
    """Tables by name, and what dataset.yaml says: 240 sessions, lists of 12 of 96 intents, one column or two a kind."""
    tables, meta = _good_shop()
    return dict(tables), copy.deepcopy(meta)


@functools.cache
def _good_shop() -> tuple[dict[str, pa.Table], dict]:
    drawn = world.generate(seed=0, sessions=SESSIONS, users=80, transcripts=40)
    frames = {name: getattr(drawn, name) for name in ("intents", "sessions", "impressions", "transcripts", "truth")}
    tables = {name: to_table(frame, name, drawn.kinds) for name, frame in frames.items()}
    sessions = tables["sessions"].select(["session_id", "user_id", "timestamp", "region", "split", *COLUMNS])
    pages = zip(*(frames["sessions"][name].tolist() for name in ("last_page", "entry_point")), strict=True)
    history = pa.array([[page for page in both if isinstance(page, str)] for both in pages], pa.list_(pa.string()))
    tables["sessions"] = sessions.append_column(HISTORY, history)
    tested = frames["sessions"].query("split == 'test'").session_id.head(5)
    labels = frames["truth"][frames["truth"].session_id.isin(tested)][["session_id", "intent_id"]]
    tables["labels"] = to_table(labels, "labels", drawn.kinds)
    meta = copy.deepcopy(drawn.meta)
    meta["features"] = {name: drawn.kinds[name] for name in COLUMNS} | {HISTORY: "history"}
    meta["prompt_features"] = [*COLUMNS, HISTORY]
    del meta["other_columns"]
    return tables, meta
