"""Fitting and encoding a data set folder of any size, batch by batch: no table is ever whole in memory.

Both read the folder as it is; `tables.check` comes before them.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from rgalign.data import columns, schema, split
from rgalign.data.encode import (
    IMPRESSION_COLUMNS,
    ROWS,
    SPLIT_OF,
    encode_batch,
    encode_intents,
    session_columns,
    session_rows,
)
from rgalign.data.features import FeatureSpace, among, fit_space, hashes
from rgalign.data.lists import PARTS
from rgalign.data.parquet import Table
from rgalign.data.shards import LISTS_PER_SHARD, ShardWriter, save_intents, save_space

TRAIN, DEV = PARTS.index("train"), PARTS.index("dev")
Development = Callable[[np.ndarray], np.ndarray]  # (rows,) user ids of train -> (rows,) bool, True for dev


def fit_folder(folder: str | Path, *, development: Development | None = None, **settings) -> FeatureSpace:
    """`fit_space` on the training sessions of a data set folder.

    development  picks the users kept for early stopping: no value that only they have enters the space
    settings     those of `fit_space`: drop, min_count, numeric_bins, ..
    Raises ValueError where development gets none or all of the train users, and as `fit_space` does.
    """
    folder, train_hashes = Path(folder), []

    def sessions() -> Iterator[pa.Table]:
        for batch, part in _sessions(folder, development):
            train = batch.filter(pa.array(part == TRAIN)).drop_columns("split")
            train_hashes.append(hashes(columns.ids(train, "session_id")))
            yield train

    def impressions() -> Iterator[pa.Table]:
        own = np.unique(np.concatenate(train_hashes))
        for batch in _batches(folder, "impressions", ("session_id", "intent_id", "clicked")):
            clicked = batch.filter(pc.equal(batch["clicked"], 1))
            yield clicked.filter(pa.array(among(hashes(columns.ids(clicked, "session_id")), own)))

    return fit_space(sessions(), _intents(folder), impressions(), _meta(folder)["features"], **settings)


def encode_folder(
    space: FeatureSpace,
    folder: str | Path,
    out: str | Path,
    *,
    splits: Sequence[str] = ("train", "valid"),
    development: Development | None = None,
    hidden: Sequence[str] = (),
    lists_per_shard: int = LISTS_PER_SHARD,
    batch_rows: int = ROWS,
) -> dict[str, int]:
    """Encodes the parts of `splits` into `out`, with the KB and the space; returns part -> number of lists.

    development  picks the users of train who become the part dev, the same as in `fit_folder`
    hidden       intents taken out of the lists of train (development.Development.new_intents); the others keep their
                 positions
    batch_rows   sessions in memory at once; changes no byte of the result
    Parts that `out` already has stay, unless they were encoded with another space.
    Raises ValueError for an unknown split, where development gets none or all of the train users, where impressions
    are not in the order of the sessions, and as `encode_lists` does.
    """
    if unknown := set(splits) - set(schema.SPLITS):
        raise ValueError(f"splits name {', '.join(sorted(unknown))}; expected some of {', '.join(schema.SPLITS)}")
    folder, intents = Path(folder), _intents(Path(folder))
    kb, impressions = columns.ids(intents, "intent_id"), _Impressions(folder, 8 * batch_rows)
    # dev is always written with train: one left from a run with other development users would share users with it.
    parts = [part for part in PARTS if SPLIT_OF[part] in splits]
    save_space(out, space)
    save_intents(out, encode_intents(space, intents))
    hidden = pa.array(list(hidden), schema.STRING)
    writers = {part: ShardWriter(out, part, lists_per_shard) for part in parts}
    for batch, part in _sessions(folder, development, session_columns(space), batch_rows):
        shown = impressions.of(columns.ids(batch, "session_id"))
        rows = session_rows(shown, batch)
        for name, writer in writers.items():
            chosen = part == PARTS.index(name)
            own = chosen[rows]
            if name == "train" and len(hidden):
                own = own & ~pc.is_in(columns.ids(shown, "intent_id"), value_set=hidden).to_numpy(zero_copy_only=False)
            sessions, lists = batch.filter(pa.array(chosen)), shown.filter(pa.array(own))
            if len(sessions):
                writer.add(encode_batch(space, sessions, lists, (np.cumsum(chosen) - 1)[rows[own]], kb, name))
    impressions.refuse_rest()
    count = {part: writer.close() for part, writer in writers.items()}
    return {part: lists for part, lists in count.items() if lists}


class _Impressions:
    """The impressions, handed out session by session in the order of the file."""

    def __init__(self, folder: Path, rows: int):
        self.batches = _batches(folder, "impressions", IMPRESSION_COLUMNS, rows)
        self.rest = next(self.batches)

    def of(self, session_ids: pa.Array) -> pa.Table:
        """The impressions that follow, as long as they are of these sessions and in their order."""
        taken = []
        while True:
            rows = pc.fill_null(pc.index_in(columns.ids(self.rest, "session_id"), value_set=session_ids), -1)
            others = np.flatnonzero(rows.to_numpy(zero_copy_only=False) < 0)
            end = int(others[0]) if len(others) else len(rows)
            taken.append(self.rest.slice(0, end))
            self.rest = self.rest.slice(end)
            following = next(self.batches, None) if len(self.rest) == 0 else None
            if following is None:
                return pa.concat_tables(taken).combine_chunks()
            self.rest = following

    def refuse_rest(self) -> None:
        left = len(self.rest) + sum(map(len, self.batches))
        if left:
            raise ValueError(
                f"impressions.parquet is not grouped in the order of sessions.parquet: {left} rows are left, the "
                f"first of session {self.rest['session_id'][0].as_py()!r}. Sort it as the sessions "
                "are; rgalign.data.tables reads a folder in any order and writes it sorted"
            )


def _sessions(
    folder: Path, development: Development | None, names: Sequence[str] | None = None, rows: int = ROWS
) -> Iterator[tuple[pa.Table, np.ndarray]]:
    """Batches of sessions.parquet with the index in PARTS of each session; names: columns to read, None for all."""
    keys = pa.concat_tables(_batches(folder, "sessions", ("timestamp", "split")))
    splits = pa.array(split.resolve(schema.to_frame(keys), _meta(folder)))
    parts, start = pc.index_in(splits, value_set=pa.array(PARTS, schema.STRING)).to_numpy().astype(np.int8), 0
    if development is not None:
        _refuse_one_side(folder, parts == TRAIN, development)
    for batch in _batches(folder, "sessions", names, rows):
        part = parts[start : start + len(batch)]
        if development is not None:
            users = columns.as_strings(columns.ids(batch, "user_id").filter(pa.array(part == TRAIN)))
            part[part == TRAIN] = np.where(development(users), DEV, TRAIN)
        start += len(batch)
        yield batch, part


def _refuse_one_side(folder: Path, train: np.ndarray, development: Development) -> None:
    """Raises ValueError where development gets none or all of the train users; stops at the first user of each side."""
    seen, sides, start = set(), set(), 0
    for batch in _batches(folder, "sessions", ("user_id",)):
        own = columns.ids(batch, "user_id").filter(pa.array(train[start : start + len(batch)]))
        start += len(batch)
        users = columns.as_strings(pc.unique(own))
        seen.update(users)
        sides.update(development(users).tolist())
        if len(sides) == 2:
            return
    if sides == {False}:
        raise ValueError(
            f"none of the {len(seen):,} train users fell into development (data.dev_users): early stopping needs some. "
            "Raise data.dev_users or change data.seed; sessions.user_id needs several users, a session id will do"
        )
    if sides == {True}:
        raise ValueError(
            f"all of the {len(seen):,} train users fell into development (data.dev_users): none is left to learn from. "
            "Lower data.dev_users or change data.seed; sessions.user_id needs several users, a session id will do"
        )


def _batches(folder: Path, table: str, names: Sequence[str] | None = None, rows: int = ROWS) -> Iterator[pa.Table]:
    kinds = _meta(folder)["features"]
    for batch in Table(folder, table).iter_batches(rows, names):
        yield schema.as_types(pa.Table.from_batches([batch]), table, kinds)


def _intents(folder: Path) -> pd.DataFrame:
    return schema.to_frame(schema.as_types(Table(folder, "intents").read(), "intents", {}))


def _meta(folder: Path) -> dict:
    return schema.read_yaml(folder / schema.YAML_FILE)
