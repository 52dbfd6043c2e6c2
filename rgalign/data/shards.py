"""Fitting and encoding a data set folder of any size, batch by batch: no table is ever whole in memory.

Both read the folder as it is; `tables.check` comes before them.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rgalign.data import encode, schema, split
from rgalign.data.features import FeatureSpace, among, as_strings, fit_space, hashes, ids_of
from rgalign.data.lists import PADDING, PARTS, Bag, Intents, Lists, concat_lists, concat_offsets, concat_padded
from rgalign.data.schema import Table, typed_batches
from rgalign.run.artifacts import atomic, write_table, write_text

# Encoded tables on disk: safetensors shards, the ids beside them in parquet, an index per part written last.

LISTS_PER_SHARD = 500_000
SPACE, INTENTS = "space.json", "intents"


class ShardWriter:
    """Writes one part as `train-00000.safetensors`, .. of `lists_per_shard` lists each, as lists come in.

    The same lists give the same bytes. The index (`train.json`) goes first and comes last: without it there is no part.
    """

    def __init__(self, folder: str | Path, part: str, lists_per_shard: int = LISTS_PER_SHARD):
        self.folder, self.part, self.lists_per_shard = Path(folder), part, lists_per_shard
        self.waiting: list[Lists] = []
        self.shards, self.lists = 0, 0
        _index(self.folder, part).unlink(missing_ok=True)

    def add(self, lists: Lists) -> None:
        if lists.part != self.part:
            raise ValueError(f"these lists are of {lists.part!r}; this writer writes {self.part!r}")
        self.waiting.append(lists)
        while sum(map(len, self.waiting)) >= self.lists_per_shard:
            everything = concat_lists(self.waiting)
            self._write(everything.take(torch.arange(self.lists_per_shard)))
            self.waiting = [everything.take(torch.arange(self.lists_per_shard, len(everything)))]

    def close(self) -> int:
        """Writes what is left and the index; returns the number of lists of the part."""
        if self.waiting and (any(map(len, self.waiting)) or not self.shards):
            self._write(concat_lists(self.waiting))
        for path in _shards(self.folder, self.part)[self.shards :]:  # of an earlier, longer run
            path.unlink()
            path.with_suffix(".parquet").unlink(missing_ok=True)
        write_text(_index(self.folder, self.part), json.dumps({"lists": self.lists, "shards": self.shards}) + "\n")
        return self.lists

    def _write(self, lists: Lists) -> None:
        # The width of a batch is that of its longest list: cut to the shard's own, so that batches leave no trace.
        used = lists.shown.any(dim=0).nonzero()
        width = int(used.max()) + 1 if len(used) else 1
        tensors = {"candidates": lists.candidates[:, :width], "clicked": lists.clicked[:, :width]}
        tensors |= {"fields": lists.fields, **_bag("words", lists.words)}
        for i, bag in enumerate(lists.history):
            tensors |= _bag(f"history.{i}", bag)
        path = self.folder / f"{self.part}-{self.shards:05d}.safetensors"
        _save(path, tensors)
        names = pd.DataFrame({"session_id": lists.session_id, "user_id": lists.user_id})
        write_table(path.with_suffix(".parquet"), names)
        self.shards, self.lists = self.shards + 1, self.lists + len(lists)


def save_lists(folder: str | Path, lists: Lists, *, lists_per_shard: int = LISTS_PER_SHARD) -> None:
    """Writes one part; replaces what the folder had of it, and leaves the other parts."""
    writer = ShardWriter(folder, lists.part, lists_per_shard)
    writer.add(lists)
    writer.close()


def load_lists(folder: str | Path, part: str) -> Lists:
    """One part, whole, in memory. Raises ValueError for an unknown part, FileNotFoundError where it is not there."""
    folder = Path(folder)
    if part not in PARTS:
        raise ValueError(f"part is {part!r}; expected one of {', '.join(PARTS)}")
    indices = {name: json.loads(_index(folder, name).read_text()) for name in PARTS if _index(folder, name).is_file()}
    count = {name: index["shards"] for name, index in indices.items() if index["shards"]}
    if part not in count:
        found = ", ".join(count) or "none"
        raise FileNotFoundError(f"{folder}/ has no encoded lists of {part!r} (it has {found}); run notebook 01_data")
    shards = _shards(folder, part)[: count[part]]
    # Tensor by tensor over all shards, so that the memory is that of the part and of one tensor's file pages. One shard
    # alone is mapped: its pages come from the file as they are read, and go again where memory is short.
    files, tensors = [safe_open(path, framework="pt") for path in shards], {}
    for name in files[0].keys():  # noqa: SIM118 (not a dict)
        pieces = [file.get_tensor(name) for file in files]
        if len(files) == 1:
            (tensors[name],) = pieces
        elif name.endswith(".offsets"):
            tensors[name] = concat_offsets(pieces)
        elif name in ("candidates", "clicked"):
            tensors[name] = concat_padded(pieces, PADDING if name == "candidates" else False)
        else:
            tensors[name] = torch.cat(pieces)
    names = pa.concat_tables([pq.read_table(path.with_suffix(".parquet")) for path in shards])
    histories = sum(name.startswith("history.") and name.endswith(".offsets") for name in tensors)
    return Lists(
        part=part,
        session_id=as_strings(names["session_id"]),
        user_id=as_strings(names["user_id"]),
        history=tuple(_as_bag(f"history.{i}", tensors) for i in range(histories)),
        words=_as_bag("words", tensors),
        **{name: tensors[name] for name in ("fields", "candidates", "clicked")},
    )


def save_intents(folder: str | Path, intents: Intents) -> None:
    """Writes `intents.safetensors` and, beside it, ids and dates in `intents.parquet`."""
    tensors = {"id": intents.id, "category": intents.category, **_bag("words", intents.words)}
    path = Path(folder) / f"{INTENTS}.safetensors"
    _save(path, tensors)
    names = pd.DataFrame({"intent_id": intents.intent_id, "valid_from": intents.valid_from})
    write_table(path.with_suffix(".parquet"), names)


def load_intents(folder: str | Path) -> Intents:
    """The KB as `save_intents` wrote it."""
    path = Path(folder) / f"{INTENTS}.safetensors"
    tensors, names = load_file(path), pq.read_table(path.with_suffix(".parquet"))
    return Intents(
        intent_id=as_strings(names["intent_id"]),
        valid_from=names["valid_from"].to_numpy().astype("datetime64[us]"),
        id=tensors["id"],
        category=tensors["category"],
        words=_as_bag("words", tensors),
    )


def save_space(folder: str | Path, space: FeatureSpace) -> None:
    """Writes `space.json`; parts that were encoded with another space no longer exist for `load_lists`."""
    path, text = Path(folder) / SPACE, space.to_json()
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        for part in PARTS:
            _index(Path(folder), part).unlink(missing_ok=True)
    write_text(path, text)


def load_space(folder: str | Path) -> FeatureSpace:
    """The space that the lists of this folder were encoded with."""
    return FeatureSpace.from_json((Path(folder) / SPACE).read_text(encoding="utf-8"))


def _index(folder: Path, part: str) -> Path:
    return folder / f"{part}.json"


def _shards(folder: Path, part: str) -> list[Path]:
    return sorted(folder.glob(f"{part}-[0-9]*.safetensors"))


def _bag(name: str, bag: Bag) -> dict[str, torch.Tensor]:
    return {f"{name}.values": bag.values, f"{name}.offsets": bag.offsets}


def _as_bag(name: str, tensors: dict[str, torch.Tensor]) -> Bag:
    return Bag(tensors[f"{name}.values"], tensors[f"{name}.offsets"])


def _save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with atomic(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)


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
            train_hashes.append(hashes(ids_of(train, "session_id")))
            yield train

    def impressions() -> Iterator[pa.Table]:
        own = np.unique(np.concatenate(train_hashes))
        for batch in _batches(folder, "impressions", ("session_id", "intent_id", "clicked")):
            clicked = batch.filter(pc.equal(batch["clicked"], 1))
            yield clicked.filter(pa.array(among(hashes(ids_of(clicked, "session_id")), own)))

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
    batch_rows: int = encode.ROWS,
) -> dict[str, int]:
    """Encodes the parts of `splits` into `out`, with the KB and the space; returns part -> number of lists.

    development  picks the users of train who become the part dev, the same as in `fit_folder`
    hidden       intents taken out of the lists of train (split.Development.new_intents); the others keep their
                 positions
    batch_rows   sessions in memory at once; changes no byte of the result
    Parts that `out` already has stay, unless they were encoded with another space.
    Raises ValueError for an unknown split, where development gets none or all of the train users, where impressions
    are not in the order of the sessions, and as `encode_lists` does.
    """
    if unknown := set(splits) - set(schema.SPLITS):
        raise ValueError(f"splits name {', '.join(sorted(unknown))}; expected some of {', '.join(schema.SPLITS)}")
    folder, intents = Path(folder), _intents(Path(folder))
    impressions = _Impressions(folder, 8 * batch_rows)
    # dev is always written with train: one left from a run with other development users would share users with it.
    parts = [part for part in PARTS if encode.SPLIT_OF[part] in splits]
    save_space(out, space)
    save_intents(out, encode.encode_intents(space, intents))
    hidden = pa.array(list(hidden), schema.STRING)
    writers = {part: ShardWriter(out, part, lists_per_shard) for part in parts}
    for batch, part in _sessions(folder, development, encode.session_columns(space), batch_rows):
        shown = impressions.of(ids_of(batch, "session_id"))
        rows = encode.session_rows(shown, batch)
        for name, writer in writers.items():
            chosen = part == PARTS.index(name)
            own = chosen[rows]
            if name == "train" and len(hidden):
                own = own & ~pc.is_in(ids_of(shown, "intent_id"), value_set=hidden).to_numpy(zero_copy_only=False)
            sessions, lists = batch.filter(pa.array(chosen)), shown.filter(pa.array(own))
            if len(sessions):
                writer.add(encode.encode_lists(space, sessions, lists, intents, name))
    impressions.assert_all_taken()
    count = {part: writer.close() for part, writer in writers.items()}
    return {part: lists for part, lists in count.items() if lists}


class _Impressions:
    """The impressions, handed out session by session in the order of the file."""

    def __init__(self, folder: Path, rows: int):
        self.batches = _batches(folder, "impressions", encode.IMPRESSION_COLUMNS, rows)
        self.rest = next(self.batches)

    def of(self, session_ids: pa.Array) -> pa.Table:
        """The impressions that follow, as long as they are of these sessions and in their order."""
        taken = []
        while True:
            rows = pc.fill_null(pc.index_in(ids_of(self.rest, "session_id"), value_set=session_ids), -1)
            others = np.flatnonzero(rows.to_numpy(zero_copy_only=False) < 0)
            end = int(others[0]) if len(others) else len(rows)
            taken.append(self.rest.slice(0, end))
            self.rest = self.rest.slice(end)
            following = next(self.batches, None) if len(self.rest) == 0 else None
            if following is None:
                return pa.concat_tables(taken).combine_chunks()
            self.rest = following

    def assert_all_taken(self) -> None:
        if left := len(self.rest) + sum(map(len, self.batches)):
            raise ValueError(
                f"impressions.parquet is not grouped in the order of sessions.parquet: {left} rows are left, the "
                f"first of session {self.rest['session_id'][0].as_py()!r}. Sort it as the sessions "
                "are; rgalign.data.tables reads a folder in any order and writes it sorted"
            )


def _sessions(
    folder: Path, development: Development | None, names: Sequence[str] | None = None, rows: int = encode.ROWS
) -> Iterator[tuple[pa.Table, np.ndarray]]:
    """Batches of sessions.parquet with the index in PARTS of each session; names: columns to read, None for all."""
    if development is not None:
        _assert_two_sides(folder, development)
    part_of = np.array([PARTS.index(name) for name in schema.SPLITS], np.int8)
    for batch, code in split.session_batches(folder, names, rows):
        part = part_of[code]
        if development is not None:
            users = as_strings(ids_of(batch, "user_id").filter(pa.array(part == TRAIN)))
            part[part == TRAIN] = np.where(development(users), DEV, TRAIN)
        yield batch, part


def _assert_two_sides(folder: Path, development: Development) -> None:
    """Raises ValueError where development gets none or all of the train users; stops at the first user of each side."""
    seen, sides = set(), set()
    for batch, code in split.session_batches(folder, ("user_id",)):
        users = as_strings(pc.unique(ids_of(batch, "user_id").filter(pa.array(code == schema.SPLITS.index("train")))))
        seen.update(users)
        sides.update(development(users).tolist())
        if len(sides) == 2:
            return
    if sides:
        found = f"{'all' if True in sides else 'none'} of the {len(seen):,} train users fell into development"
        why = "none is left to learn from. Lower" if True in sides else "early stopping needs some. Raise"
        more = "data.dev_users or change data.seed; sessions.user_id needs several users, a session id will do"
        raise ValueError(f"{found} (data.dev_users): {why} {more}")


def _batches(
    folder: Path, table: str, names: Sequence[str] | None = None, rows: int = encode.ROWS
) -> Iterator[pa.Table]:
    return typed_batches(folder, table, rows, names, _meta(folder)["features"])


def _intents(folder: Path) -> pd.DataFrame:
    return schema.to_frame(schema.as_types(Table(folder, "intents").read(), "intents", {}))


def _meta(folder: Path) -> dict:
    return schema.read_yaml(folder / schema.YAML_FILE)
