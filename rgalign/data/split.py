"""Who is train, valid and test: by the published column, by date, or by a fraction of the time line.

Early stopping needs a fourth part, a tenth of train's *users*: `development_users`.
"""

import datetime
import hashlib

import numpy as np
import pandas as pd
import pyarrow as pa

from rgalign.data.schema import SPLITS
from rgalign.errors import nearest, quote

SPLIT_TYPE = pd.ArrowDtype(pa.large_string())
DATES, SHARES = ("valid_from", "test_from"), ("train", "valid")
A_RULE = "valid_from and test_from (dates), or train and valid (shares of the sessions)"
A_DATE = "expected a date such as 2024-03-05"
A_SHARE = "expected a number above 0 and below 1"


def published(sessions: pd.DataFrame) -> pd.Series:
    """The split column as it is stored. Raises ValueError where a value is missing or unknown."""
    known = sessions["split"].isin(SPLITS).to_numpy(dtype=bool)
    if not known.all():
        found = sessions["split"][~known].head(3).tolist()
        raise ValueError(f"split: {(~known).sum()} of {len(known)} sessions have none of {', '.join(SPLITS)} ({found})")
    return sessions["split"].astype(SPLIT_TYPE)


def by_time(sessions: pd.DataFrame, *, valid_from: str | pd.Timestamp, test_from: str | pd.Timestamp) -> pd.Series:
    """Before `valid_from` is train, from `test_from` on is test, valid lies between.

    Raises ValueError where a timestamp is missing, the two dates are in the wrong order, or a part stays empty.
    """
    if faults := rule_faults({"valid_from": valid_from, "test_from": test_from}):
        raise ValueError("; ".join(f"{key} {what}".strip() for key, what in faults))
    valid_from, test_from = _moment(valid_from), _moment(test_from)
    when = _times(sessions)
    return _parts(sessions, (when >= valid_from.to_datetime64()).astype(int) + (when >= test_from.to_datetime64()))


def by_fraction(sessions: pd.DataFrame, *, train: float = 0.7, valid: float = 0.1) -> pd.Series:
    """First `train` of the sessions by time, next `valid`, the rest is test.

    Sessions of one instant stay together, with the earlier part: a table of whole days is cut between days.
    Raises ValueError as `by_time` does.
    """
    if faults := rule_faults({"train": train, "valid": valid}):
        raise ValueError("; ".join(f"{key} {what}".strip() for key, what in faults))
    when = _times(sessions)
    in_order = np.sort(when)
    ends = [in_order[max(0, int(np.ceil(round(share * len(when), 9))) - 1)] for share in (train, train + valid)]
    return _parts(sessions, (when > ends[0]).astype(int) + (when > ends[1]))


def development_users(user_ids, *, share: float = 0.1, seed: int) -> np.ndarray:
    """True for the rows whose user belongs to development: about `share` of the distinct users.

    user_ids  (rows,) of train; all rows of a user fall on the same side
    Decided by a hash of seed and user, so that a user stays where she is when other users come or go.
    """
    codes, users = pd.factorize(np.asarray(user_ids, dtype=object))
    limit = round(share * 2**64)
    return np.array([hash_of(f"{seed}\x1f{user}") < limit for user in users], dtype=bool)[codes]


def user_folds(user_ids, *, folds: int, seed: int) -> np.ndarray:
    """(rows,) 0 to folds - 1: the fold of each row's user, by a hash of seed and user as in `development_users`."""
    codes, users = pd.factorize(np.asarray(user_ids, dtype=object))
    found = [folds - 1 - (hash_of(f"{seed}\x1f{user}") * folds >> 64) for user in users]
    return np.array(found, dtype=np.int64)[codes]


def resolve(sessions: pd.DataFrame, meta: dict) -> pd.Series:
    """The split of a data set: the published one where there is one, else a split by time.

    `time_split` in dataset.yaml is {valid_from, test_from} (dates) or {train, valid} (fractions); without it the
    fractions of `by_fraction` hold. Raises ValueError where neither a split nor timestamps are there.
    """
    if not sessions["split"].fillna("").eq("").all():
        return published(sessions)
    rule = meta.get("time_split") or {}
    return by_time(sessions, **rule) if "valid_from" in rule else by_fraction(sessions, **rule)


def rule_faults(rule: object) -> list[tuple[str, str]]:
    """What is wrong with `time_split`: (its key, or "" for the whole; what was found and expected)."""
    if not isinstance(rule, dict) or not rule:
        return [("", f"is {quote(rule)}; expected {A_RULE}")]
    known = (*DATES, *SHARES)
    if unknown := [key for key in rule if key not in known]:
        return [(str(key), f"is unknown; expected {A_RULE}{nearest(str(key), known)}") for key in unknown]
    dates, shares = [key for key in DATES if key in rule], [key for key in SHARES if key in rule]
    if dates and shares:
        return [("", f"mixes dates ({', '.join(dates)}) and shares ({', '.join(shares)}); expected {A_RULE}")]
    keys, sound, expected = (DATES, _moment, A_DATE) if dates else (SHARES, _share, A_SHARE)
    faults = [(key, f"is missing; {expected}") for key in keys if key not in rule]
    faults += [(key, f"is {quote(rule[key])}; {expected}") for key in keys if key in rule and not sound(rule[key])]
    clash = "" if faults else _dates_clash(rule) if dates else _shares_clash(rule)
    return faults or ([("", clash)] if clash else [])


def _dates_clash(rule: dict) -> str:
    valid_from, test_from = (_moment(rule[key]) for key in DATES)
    if (valid_from.tzinfo is None) != (test_from.tzinfo is None):
        with_zone, without = DATES if test_from.tzinfo is None else DATES[::-1]
        return f"{with_zone} has a time zone, {without} none; give both one or neither"
    return "" if valid_from < test_from else f"valid_from ({valid_from}) must lie before test_from ({test_from})"


def _shares_clash(rule: dict) -> str:
    if sum(rule.values()) < 1:
        return ""
    return f"train ({rule['train']}) and valid ({rule['valid']}) must leave something for test"


def _moment(value: object) -> pd.Timestamp | None:
    """A date of dataset.yaml or of a caller; words such as "today", which pandas would read, are none."""
    if isinstance(value, str):
        try:
            value = datetime.datetime.fromisoformat(value.strip())
        except ValueError:
            return None
    return pd.Timestamp(value) if isinstance(value, datetime.date) else None


def _share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1


def _times(sessions: pd.DataFrame) -> np.ndarray:
    missing = sessions["timestamp"].isna().to_numpy()
    if len(missing) == 0 or missing.any():
        raise ValueError(f"timestamp: {missing.sum()} of {len(missing)} sessions have none; a time split needs all")
    return sessions["timestamp"].to_numpy(dtype="datetime64[us]")


def _parts(sessions: pd.DataFrame, part: np.ndarray) -> pd.Series:
    counts = np.bincount(part, minlength=len(SPLITS))
    if (counts == 0).any():
        found = ", ".join(f"{name} {count}" for name, count in zip(SPLITS, counts, strict=True))
        raise ValueError(f"the time split leaves a part empty ({found}); move its dates or fractions")
    return pd.Series(np.array(SPLITS)[part], index=sessions.index, dtype=SPLIT_TYPE, name="split")


def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
