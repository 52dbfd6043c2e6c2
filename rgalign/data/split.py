"""Who is train, valid and test, by the published column or by time; and who of train's users is dev (early stopping).

Users drawn at random cannot show drift: valid has later days and intents that train has never seen, and the parameters
`data.dev_days` and `data.dev_new_intents` give dev some of both [C].
"""

import contextlib
import datetime
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator

from rgalign.data import schema
from rgalign.data.features import among, as_strings, column_of, hashes, ids_of
from rgalign.data.schema import SPLITS, typed_batches
from rgalign.errors import safe_repr, section_errors

SPLIT_TYPE = pd.ArrowDtype(pa.large_string())
ROWS = 2**20  # read at once; changes nothing of what is found


def _moment(value: Any) -> pd.Timestamp:
    """A date of dataset.yaml or of a caller; words such as "today", which pandas would read, are none."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = datetime.datetime.fromisoformat(value.strip())
    if not isinstance(value, datetime.date):
        raise ValueError(f"is {safe_repr(value)}; expected {DATES['valid_from']}")
    return pd.Timestamp(value)


DATES = dict.fromkeys(("valid_from", "test_from"), "a date such as 2024-03-05")
SHARES = dict.fromkeys(("train", "valid"), "a number above 0 and below 1")
A_RULE = "valid_from and test_from (dates), or train and valid (shares of the sessions)"
Moment = Annotated[Any, PlainValidator(_moment)]
Fraction = Annotated[float, Field(gt=0, lt=1, strict=True)]


class DateSplit(BaseModel):
    """`time_split` of dataset.yaml by dates: before valid_from is train, from test_from on is test."""

    model_config = ConfigDict(extra="forbid")
    valid_from: Moment
    test_from: Moment

    @model_validator(mode="after")
    def in_order(self) -> "DateSplit":
        if (self.valid_from.tzinfo is None) != (self.test_from.tzinfo is None):
            with_zone, without = tuple(DATES) if self.test_from.tzinfo is None else tuple(DATES)[::-1]
            raise ValueError(f"{with_zone} has a time zone, {without} none; give both one or neither")
        if self.valid_from >= self.test_from:
            raise ValueError(f"valid_from ({self.valid_from}) must lie before test_from ({self.test_from})")
        return self


class ShareSplit(BaseModel):
    """`time_split` of dataset.yaml by shares of the sessions in the order of time; the rest is test."""

    model_config = ConfigDict(extra="forbid")
    train: Fraction
    valid: Fraction

    @model_validator(mode="after")
    def leaves_a_test(self) -> "ShareSplit":
        if self.train + self.valid >= 1:
            raise ValueError(f"train ({self.train}) and valid ({self.valid}) must leave something for test")
        return self


def rule_errors(rule: object) -> list[tuple[str, str]]:
    """What is wrong with `time_split`: (its key, or "" for the whole; what was found and expected)."""
    if not isinstance(rule, dict) or not rule:
        return [("", f"is {safe_repr(rule)}; expected {A_RULE}")]
    dates, shares = ([key for key in keys if key in rule] for keys in (DATES, SHARES))
    if dates and shares:
        return [("", f"mixes dates ({', '.join(dates)}) and shares ({', '.join(shares)}); expected {A_RULE}")]
    model, expected = (ShareSplit, SHARES) if shares else (DateSplit, DATES)
    return section_errors(model, rule, expected, keys=A_RULE)


def published(sessions: pd.DataFrame) -> pd.Series:
    """The split column as it is stored. Raises ValueError where a value is missing or unknown."""
    known = sessions["split"].isin(SPLITS).to_numpy(dtype=bool)
    if not known.all():
        found = sessions["split"][~known].head(3).tolist()
        raise ValueError(f"split: {(~known).sum()} of {len(known)} sessions have none of {', '.join(SPLITS)} ({found})")
    return sessions["split"].astype(SPLIT_TYPE)


def by_time(sessions: pd.DataFrame, **rule: object) -> pd.Series:
    """The split by a rule of `time_split`.

    valid_from, test_from  dates: before the first is train, from the second on is test (DateSplit)
    train, valid           shares of the sessions in the order of time, the rest is test (ShareSplit); the default, 0.7
                           and 0.1. Sessions of one instant stay together, with the earlier part: a table of whole days
                           is cut between days
    Raises ValueError where the rule is none, a timestamp is missing, or a part stays empty.
    """
    rule = rule or {"train": 0.7, "valid": 0.1}
    if errors := rule_errors(rule):
        raise ValueError("; ".join(f"{key} {what}".strip() for key, what in errors))
    missing = sessions["timestamp"].isna().to_numpy()
    if len(missing) == 0 or missing.any():
        raise ValueError(f"timestamp: {missing.sum()} of {len(missing)} sessions have none; a time split needs all")
    when = sessions["timestamp"].to_numpy(dtype="datetime64[us]")
    if "valid_from" in rule:
        dates = DateSplit(**rule)
        after = [when >= moment.to_datetime64() for moment in (dates.valid_from, dates.test_from)]
    else:
        in_order, ends = np.sort(when), (rule["train"], rule["train"] + rule["valid"])
        after = [when > in_order[max(0, int(np.ceil(round(share * len(when), 9))) - 1)] for share in ends]
    part = after[0].astype(int) + after[1]
    counts = np.bincount(part, minlength=len(SPLITS))
    if (counts == 0).any():
        found = ", ".join(f"{name} {count}" for name, count in zip(SPLITS, counts, strict=True))
        raise ValueError(f"the time split leaves a part empty ({found}); move its dates or fractions")
    return pd.Series(np.array(SPLITS)[part], index=sessions.index, dtype=SPLIT_TYPE, name="split")


def resolve(sessions: pd.DataFrame, meta: dict) -> pd.Series:
    """The split of a data set: the published one where there is one, else by time, as dataset.yaml's `time_split` says.

    Raises ValueError where neither a split nor timestamps are there.
    """
    if not sessions["split"].fillna("").eq("").all():
        return published(sessions)
    return by_time(sessions, **(meta.get("time_split") or {}))


def session_batches(
    folder: Path, names: Sequence[str] | None = None, rows: int = ROWS
) -> Iterator[tuple[pa.Table, np.ndarray]]:
    """Batches of a folder's sessions with the index in SPLITS of each session; names: columns to read, None for all."""
    meta = schema.read_yaml(folder / schema.YAML_FILE)
    keys = pa.concat_tables(typed_batches(folder, "sessions", rows, ("timestamp", "split"), meta["features"]))
    codes, start = pd.Index(SPLITS).get_indexer(resolve(schema.to_frame(keys), meta).astype(object)), 0
    for batch in typed_batches(folder, "sessions", rows, names, meta["features"]):
        yield batch, codes[start : start + len(batch)]
        start += len(batch)


def _hash(seed: int, name: str) -> int:
    """0 to 2**64 - 1."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\x1f{name}".encode(), digest_size=8).digest(), "big")


def _user_hashes(user_ids, seed: int) -> np.ndarray:
    """(rows,) Python's own integers, which a product does not overflow."""
    codes, users = pd.factorize(np.asarray(user_ids, dtype=object))
    return np.array([_hash(seed, user) for user in users], dtype=object)[codes]


def development_users(user_ids, *, share: float = 0.1, seed: int) -> np.ndarray:
    """True for the rows whose user belongs to dev: about `share` of the distinct users.

    user_ids  (rows,) of train; all rows of a user are on the same side
    Decided by a hash of seed and user, so that a user's side does not change when other users come or go.
    """
    return _user_hashes(user_ids, seed) < round(share * 2**64)


def user_folds(user_ids, *, folds: int, seed: int) -> np.ndarray:
    """(rows,) 0 to folds - 1: the fold of each row's user, by a hash of seed and user as in `development_users`."""
    return (folds - 1 - (_user_hashes(user_ids, seed) * folds >> 64)).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Development:
    """(rows,) user ids of train -> (rows,) bool, True for dev. All sessions of a user are in one part [C].

    share, seed   of `development_users`
    others        hashes of more users, ascending: those with a session in the last days or a click on a new intent
    new_intents   intents that train must not know: no user who clicked on one stays in train, and train's lists lose
                  them (`shards.encode_folder`, hidden), as an intent that enters later is in no list of train
    """

    share: float
    seed: int
    others: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    new_intents: tuple[str, ...] = ()

    def __call__(self, users: np.ndarray) -> np.ndarray:
        drawn = development_users(users, share=self.share, seed=self.seed)
        return drawn | among(hashes(pa.array(users, pa.large_string())), self.others) if len(self.others) else drawn

    @classmethod
    def of(
        cls, folder: str | Path, *, dev_users: float, seed: int, dev_days: int = 0, dev_new_intents: float = 0.0
    ) -> "Development":
        """As the section `data` of the params says of a data set folder (parameters of the same names).

        With dev_days and dev_new_intents 0 the folder is not read. Raises ValueError where a train session has no
        timestamp and last days are asked for, and where no user with a click is left to learn from.
        """
        drawn = cls(dev_users, seed)
        if not dev_days and not dev_new_intents:
            return drawn
        user, session, when, is_drawn = _train_sessions(Path(folder), drawn)
        if dev_days and (missing := int(np.isnat(when).sum())):
            found = f"{missing:,} of {len(when):,} train sessions have no timestamp"
            raise ValueError(f"data.dev_days is {dev_days}, but {found}; expected 0")
        late = when > when.max() - np.timedelta64(dev_days, "D") if dev_days else np.zeros(len(user), bool)
        clicked, row = _train_clicks(Path(folder), session)
        # The clicked intents with the smallest hashes of seed and id: adding others does not change them.
        distinct = sorted(set(clicked), key=lambda intent: _hash(seed, intent)) if dev_new_intents else []
        new = distinct[: max(1, round(dev_new_intents * len(distinct)))]
        of_new = np.zeros(len(user), bool)
        of_new[row[np.isin(clicked, new)]] = True
        others = np.unique(user[late | of_new])
        if (is_drawn | among(user, others))[row].all():
            total, by_hash, by_day, by_intent = (len(np.unique(user[rows])) for rows in (..., is_drawn, late, of_new))
            raise ValueError(
                f"no user with a click is left to learn from: of {total:,} train users {by_hash:,} are development's "
                f"by data.dev_users ({dev_users}), {by_day:,} came in the last days (data.dev_days {dev_days}) and "
                f"{by_intent:,} clicked on an intent that is made new (data.dev_new_intents {dev_new_intents}), each "
                "with all sessions. Lower these"
            )
        return cls(dev_users, seed, others, tuple(sorted(new)))


def _train_sessions(folder: Path, drawn: Development) -> tuple[np.ndarray, ...]:
    """Of train's sessions: hash of the user, hash of the session, time, whether `drawn` has the user."""
    found = []
    for batch, code in session_batches(folder, ("session_id", "user_id", "timestamp")):
        own = batch.filter(pa.array(code == SPLITS.index("train")))
        users, when = ids_of(own, "user_id"), column_of(own, "timestamp")
        times = when.cast(pa.timestamp("us")).to_numpy(zero_copy_only=False).astype("datetime64[us]")
        found.append((hashes(users), hashes(ids_of(own, "session_id")), times, drawn(as_strings(users))))
    return tuple(np.concatenate(values) for values in zip(*found, strict=True))


def _train_clicks(folder: Path, session: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Clicks in train: intent id, and the row of the session, whose hashes are given."""
    order = np.argsort(session)
    intents, rows = [], []
    for batch in typed_batches(folder, "impressions", ROWS, ("session_id", "intent_id", "clicked")):
        clicked = batch.filter(pc.equal(batch["clicked"].cast(pa.int8()), 1))
        by = hashes(ids_of(clicked, "session_id"))
        own = among(by, session[order])
        rows.append(order[np.searchsorted(session[order], by[own])])
        intents.append(as_strings(ids_of(clicked, "intent_id"))[own].astype(object))
    return np.concatenate(intents), np.concatenate(rows)
