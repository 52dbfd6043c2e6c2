"""Who is kept for early stopping: users drawn by a hash and, where asked for, train's last days and clicks on intents
that are made new.

Users drawn at random cannot see drift: their clicks are on the intents and in the weeks that the ranker learns from.
Valid has later days and intents that train has never seen. `data.dev_days` and `data.dev_new_intents` give development
some of both [C].
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rgalign.data import columns, schema, split
from rgalign.data.features import among, hashes
from rgalign.data.schema import Table

ROWS = 2**20  # read at once; changes nothing of what is found


@dataclass(frozen=True, eq=False)
class Development:
    """(rows,) user ids of train -> (rows,) bool, True for development.

    A user is in one part as a whole, with all her sessions, as everywhere [C].

    share, seed   of `split.development_users`
    others        hashes of more users, ascending: those with a session in the last days or a click on a new intent
    new_intents   intents that train must not know: nobody who clicked on one is left in it, and its lists lose them too
                  (`stream.encode_folder`, hidden), as an intent that enters later is in no list of train
    """

    share: float
    seed: int
    others: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    new_intents: tuple[str, ...] = ()

    def __call__(self, users: np.ndarray) -> np.ndarray:
        drawn = split.development_users(users, share=self.share, seed=self.seed)
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
        user, session, when, is_drawn = _train(Path(folder), drawn)
        late = _late(when, dev_days) if dev_days else np.zeros(len(user), bool)
        clicks, by = _clicks(Path(folder), session)
        new = _drawn_intents(clicks, dev_new_intents, seed) if dev_new_intents else ()
        of_new = np.zeros(len(user), bool)
        of_new[by[np.isin(clicks, new)]] = True
        others = np.unique(user[late | of_new])
        kept = ~(is_drawn | among(user, others))
        if not kept[by].any():
            counts = (len(np.unique(user[rows])) for rows in (slice(None), is_drawn, late, of_new))
            raise ValueError(
                "no user with a click is left to learn from: of {:,} train users {:,} are development's by "
                "data.dev_users ({}), {:,} came in the last days (data.dev_days {}) and {:,} clicked on an intent that "
                "is made new (data.dev_new_intents {}), each with all sessions. Lower these".format(
                    *(part for pair in zip(counts, ("", dev_users, dev_days, dev_new_intents), strict=True)
                      for part in pair if part != "")
                )
            )  # fmt: skip
        return cls(dev_users, seed, others, tuple(sorted(new)))


def _train(folder: Path, drawn: Development) -> tuple[np.ndarray, ...]:
    """Of train's sessions: hash of the user, hash of the session, time, whether `drawn` has the user."""
    keys = [_typed(batch, "sessions") for batch in Table(folder, "sessions").iter_batches(ROWS, ("timestamp", "split"))]
    meta = schema.read_yaml(folder / schema.YAML_FILE)
    parts = split.resolve(schema.to_frame(pa.concat_tables(keys)), meta).eq("train").to_numpy(dtype=bool)
    found, start = [], 0
    for batch in Table(folder, "sessions").iter_batches(ROWS, ("session_id", "user_id", "timestamp")):
        own = _typed(batch, "sessions").filter(pa.array(parts[start : start + len(batch)]))
        start += len(batch)
        users, when = columns.ids(own, "user_id"), columns.column(own, "timestamp")
        times = when.cast(pa.timestamp("us")).to_numpy(zero_copy_only=False).astype("datetime64[us]")
        found.append((hashes(users), hashes(columns.ids(own, "session_id")), times, drawn(columns.as_strings(users))))
    return tuple(np.concatenate(values) for values in zip(*found, strict=True))


def _late(when: np.ndarray, days: int) -> np.ndarray:
    if missing := int(np.isnat(when).sum()):
        raise ValueError(
            f"data.dev_days is {days}, but {missing:,} of {len(when):,} train sessions have no timestamp; expected 0"
        )
    return when > when.max() - np.timedelta64(days, "D")


def _clicks(folder: Path, session: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Clicks in train: intent id, and the row of the session."""
    order = np.argsort(session)
    intents, rows = [], []
    names = ("session_id", "intent_id", "clicked")
    for batch in Table(folder, "impressions").iter_batches(ROWS, names):
        clicked = _typed(batch, "impressions")
        clicked = clicked.filter(pc.equal(clicked["clicked"].cast(pa.int8()), 1))
        by = hashes(columns.ids(clicked, "session_id"))
        own = among(by, session[order])
        rows.append(order[np.searchsorted(session[order], by[own])])
        intents.append(columns.as_strings(columns.ids(clicked, "intent_id"))[own].astype(object))
    return np.concatenate(intents), np.concatenate(rows)


def _drawn_intents(clicked: np.ndarray, share: float, seed: int) -> list[str]:
    """The share of the clicked intents with the smallest hashes of seed and id: the same ones, whoever else comes."""
    distinct = sorted(set(clicked), key=lambda intent: split.hash_of(f"{seed}\x1f{intent}"))
    return distinct[: max(1, round(share * len(distinct)))]


def _typed(batch: pa.RecordBatch, table: str) -> pa.Table:
    return schema.as_types(pa.Table.from_batches([batch]), table, {})
