"""What a data set looks like: small tables for notebook 01's figures and for reading."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from rgalign.data.check_lists import MAX_POSITIONS
from rgalign.data.encode import session_rows
from rgalign.data.schema import HIDDEN, is_personal
from rgalign.data.tables import Dataset


def overview(dataset: Dataset) -> pd.DataFrame:
    """Rows a split: sessions, users, impressions, clicks, and lists without a click or with only clicks."""
    rows, sessions = session_rows(dataset.impressions, dataset.sessions), len(dataset.sessions)
    clicks = np.bincount(rows, dataset.impressions.clicked.to_numpy(), sessions)
    # A session that was shown nothing is still a session.
    lists = dataset.sessions[["session_id", "user_id", "split"]]
    lists = lists.assign(size=np.bincount(rows, minlength=sessions), clicks=clicks, none=clicks == 0)
    lists["all"] = (lists["size"] > 0) & (lists["clicks"] == lists["size"])
    columns = {"sessions": ("session_id", "size"), "users": ("user_id", "nunique"), "impressions": ("size", "sum")}
    columns |= {"clicks": ("clicks", "sum"), "lists without a click": ("none", "sum")}
    table = lists.groupby("split").agg(**columns, **{"lists with only clicks": ("all", "sum")})
    return table.reindex([s for s in ("train", "valid", "test") if s in table.index]).astype(int)


RULES = {  # of ShopWorld's (shopworld/tables.py), those that decide what can be learnt; a table shows 50 characters
    "active_true": "open clause: the session's own object and issue",
    "active_object": ".. its object, and any issue",
    "active_issue": ".. any object, and its issue (else anything)",
    "wording": "share of each of a concept's four synonyms",
    "positions": "intents in a list",
    "explored": ".. of which drawn at random from all others",
    "shuffled_share": "share of the lists whose order is random",
    "examination_decay": "a: place p = 1, 2, .. is looked at with p^-a",
    "attracts_true": "click on the session's own intent, once seen",
    "attracts_issue": ".. on another intent with its issue",
    "attracts_object": ".. on another intent of its object",
    "attracts_other": ".. on any other",
    "late_intents": "intents that enter in the last two weeks",
    "weekly_traffic": "share of the sessions in each of six weeks",
}


def rules(meta: Mapping) -> pd.DataFrame:
    """The simulator's rules in words, from dataset.yaml; empty for data that nobody simulated."""
    known = meta.get("world", {}).get("rules", {})
    rows = {name: (known[name], words) for name, words in RULES.items() if name in known}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["value", "what it says"])


def features(dataset: Dataset) -> pd.DataFrame:
    """Rows a kind of feature: how many columns, and their names, shortened."""
    names = pd.Series(dataset.kinds).reset_index().set_axis(["column", "kind"], axis=1)
    grouped = names.groupby("kind", sort=False).column
    listed = grouped.agg(lambda columns: ", ".join(columns.head(6)) + (", …" if len(columns) > 6 else ""))
    return pd.DataFrame({"columns": grouped.size(), "names": listed})


def sessions_by_day(sessions: pd.DataFrame) -> pd.DataFrame:
    """Sessions of each day and split: columns day, split, sessions. Empty where no session has a timestamp."""
    day = pd.to_datetime(sessions.timestamp).astype("datetime64[us]").dt.floor("D").rename("day")
    counted = sessions.groupby([day, sessions.split.astype(str)]).size()
    return counted.rename("sessions").reset_index()


def value_shares(sessions: pd.DataFrame, columns: Sequence[str], top: int = 6) -> pd.DataFrame:
    """Shares of the commonest values of some columns, missing ones counted: columns feature, value, share."""
    parts = []
    for column in columns:
        values = sessions[column].astype(object).where(sessions[column].notna(), "(missing)")
        values = values.where(values == "(missing)", HIDDEN) if is_personal(column) else values
        shares = values.value_counts(normalize=True).head(top)
        parts.append(pd.DataFrame({"feature": column, "value": shares.index.astype(str), "share": shares.to_numpy()}))
    return pd.concat(parts, ignore_index=True)


def train_clicks(dataset: Dataset) -> pd.Series:
    """intent_id of every click in train, one row a click."""
    train = dataset.sessions.session_id[dataset.sessions.split == "train"]
    clicked = dataset.impressions[dataset.impressions.clicked == 1]
    return clicked.intent_id[clicked.session_id.isin(train)].astype(object)


def click_rates(dataset: Dataset) -> pd.DataFrame:
    """Click rate by position and kind of list: columns position, lists, rate, error (one standard error).

    Where `sessions.shuffled` says so, lists in shuffled order stand apart: there the order knows nothing of the user.
    """
    sessions, shown = dataset.sessions, dataset.impressions
    known = "shuffled" in sessions
    names = np.array(["lists in the shop's order" if known else "all lists", "shuffled lists"], dtype=object)
    shuffled = sessions["shuffled"].eq(True).fillna(False).to_numpy(bool) if known else np.zeros(len(sessions), bool)
    # Counted by one number a row: frames of all impressions, joined and grouped, would be ten times as large.
    place = shuffled[session_rows(dataset.impressions, dataset.sessions)] * MAX_POSITIONS + shown.position.to_numpy()
    size, clicks = np.bincount(place), np.bincount(place, shown.clicked.to_numpy())
    (there,) = size.nonzero()
    rate = clicks[there] / size[there]
    lists, position = np.divmod(there, MAX_POSITIONS)
    error = np.sqrt(rate * (1 - rate) / size[there])
    return pd.DataFrame({"position": position, "lists": names[lists], "rate": rate, "error": error})


def session_card(dataset: Dataset, session_id: str) -> tuple[pd.Series, pd.DataFrame]:
    """One session as the shop sees it: its columns that hold something, and the list it was shown with the clicks."""
    session = dataset.sessions.set_index("session_id").loc[session_id]
    shown = dataset.impressions[dataset.impressions.session_id == session_id]
    shown = shown.merge(dataset.intents[["intent_id", "title"]], on="intent_id").sort_values("position")
    sized = str | list | np.ndarray  # an empty text or history holds as little as a missing value
    held = session[[len(value) > 0 if isinstance(value, sized) else not pd.isna(value) for value in session]]
    held = held.mask([is_personal(name) for name in held.index], HIDDEN)
    return held, shown[["position", "title", "clicked"]].reset_index(drop=True)
