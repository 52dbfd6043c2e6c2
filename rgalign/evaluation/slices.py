"""Slices of a split: named masks over its sessions.

all         every session
cold        clicked on an intent without a click in train (dev users included), such as all that entered the KB later
tail        clicked on one of the least clicked intents that together hold at most a third of train's clicks [C]
head        clicked on one of the others
shuffled    the whole list was shown in random order (where sessions.shuffled says so)
seen=N      the user's impressions in train: none, or up to / more than the median of those who have some [C]
hour=H      the session began in these six hours of the day (0..5, 6..11, ..), where timestamps are known [C]
region=R    the session's region, where there are 2 to 12: more would be a slice each of a few sessions [C]

A session that clicked on several intents can be in several of cold, tail and head.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from rgalign.data.lists import Intents, Lists, by_user, clicks_of

TAIL_SHARE = 1 / 3  # of train's clicks [C]
MOST_REGIONS = 12
HOURS = 6  # of a slice by time of day [C]


def intent_kinds(intent_ids, train_clicked_ids) -> pd.Series:
    """cold, tail or head for each intent id, from the ids clicked in train (one a click, repeated).

    Intents with the same number of clicks are of the same kind: a count is tail if all intents clicked that often or
    less hold at most a third of the clicks.
    """
    clicks = pd.Series(np.asarray(train_clicked_ids, dtype=object)).value_counts()
    counts, held = np.unique(clicks.to_numpy(), return_counts=True)
    upto = np.cumsum(counts * held)
    rarest = counts[upto <= TAIL_SHARE * clicks.sum()].max(initial=0)
    intent_ids = np.asarray(intent_ids, dtype=object)
    count = clicks.reindex(intent_ids).fillna(0).to_numpy()
    kinds = np.select([count == 0, count <= rarest], ["cold", "tail"], "head")
    return pd.Series(kinds, index=intent_ids, name="kind")


def of_train(lists: Sequence[Lists], intents: Intents) -> dict:
    """What `session_slices` is to know of train, from its encoded lists (train and dev)."""
    ids = np.repeat(intents.intent_id, clicks_of(lists, len(intents)))
    return {"train_clicks": ids, "seen": by_user(lists)["impressions"]}


def session_slices(
    sessions: pd.DataFrame, impressions: pd.DataFrame, train_clicks, seen: pd.Series | None = None
) -> pd.DataFrame:
    """One bool column a slice, indexed by session_id in the order of `sessions`; `.sum()` gives the counts.

    sessions, impressions  of the split to be judged; the clicked impressions will do
    train_clicks           ids clicked in train, one a click
    seen                   train's impressions of each user, by user_id; None: no slices by them
    A slice without a session is kept: its metric is undefined, and the tables say so.
    """
    ids = sessions["session_id"].to_numpy(dtype=object)
    slices = pd.DataFrame({"all": np.ones(len(ids), dtype=bool)}, index=pd.Index(ids, name="session_id"))
    clicked = impressions[impressions["clicked"].astype(bool)]
    kind = clicked["intent_id"].map(intent_kinds(clicked["intent_id"].unique(), train_clicks))
    for name in ("cold", "tail", "head"):
        slices[name] = slices.index.isin(clicked.loc[kind == name, "session_id"].to_numpy(dtype=object))
    if "shuffled" in sessions:
        slices["shuffled"] = sessions["shuffled"].eq(True).fillna(False).to_numpy(dtype=bool)
    many = np.zeros(len(ids), int) if seen is None else sessions["user_id"].map(seen).fillna(0).to_numpy(dtype=int)
    if (many > 0).any():
        middle = int(np.median(many[many > 0]))
        slices["seen=0"] = many == 0
        slices[f"seen=1..{middle}"] = (many > 0) & (many <= middle)
        slices[f"seen>{middle}"] = many > middle
    if "timestamp" in sessions and not (hour := pd.to_datetime(sessions["timestamp"]).dt.hour).isna().all():
        for first in range(0, 24, HOURS):
            inside = (hour // HOURS == first // HOURS).fillna(False)
            slices[f"hour={first}..{first + HOURS - 1}"] = inside.to_numpy(dtype=bool)
    regions = sorted(sessions["region"].dropna().unique())
    for name in regions if 1 < len(regions) <= MOST_REGIONS else ():
        slices[f"region={name}"] = (sessions["region"] == name).fillna(False).to_numpy(dtype=bool)
    return slices
