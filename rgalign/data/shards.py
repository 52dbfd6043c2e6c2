"""Encoded tables on disk: safetensors shards, the ids beside them in parquet, an index per part written last."""

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rgalign.artifacts import atomic, write_table, write_text
from rgalign.data.columns import as_strings
from rgalign.data.features import FeatureSpace
from rgalign.data.lists import PADDING, PARTS, Bag, Intents, Lists, concat_lists, concat_offsets, concat_padded

LISTS_PER_SHARD = 500_000
SPACE, INTENTS = "space.json", "intents"


class ShardWriter:
    """Writes one part as `train-00000.safetensors`, .. of `lists_per_shard` lists each, as lists come in.

    A part without its index (`train.json`) does not exist for `load_lists`: the index goes first and comes last, so a
    killed run never leaves a mixture. The same lists give the same bytes, however they are handed in.
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
        left = concat_lists(self.waiting) if self.waiting else None
        if left is not None and (len(left) or not self.shards):
            self._write(left)
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
    count = {name: _shard_count(folder, name) for name in PARTS}
    there = [name for name, shards in count.items() if shards]
    if part not in there:
        found = ", ".join(there) or "none"
        raise FileNotFoundError(f"{folder}/ has no encoded lists of {part!r} (it has {found}); run notebook 01_data")
    shards = _shards(folder, part)[: count[part]]
    tensors = _concatenated(shards)
    names = pa.concat_tables([pq.read_table(path.with_suffix(".parquet")) for path in shards])
    histories = sum(name.startswith("history.") and name.endswith(".offsets") for name in tensors)
    return Lists(
        part=part,
        session_id=as_strings(names["session_id"]),
        user_id=as_strings(names["user_id"]),
        fields=tensors["fields"],
        history=tuple(_as_bag(f"history.{i}", tensors) for i in range(histories)),
        words=_as_bag("words", tensors),
        candidates=tensors["candidates"],
        clicked=tensors["clicked"],
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


def _shard_count(folder: Path, part: str) -> int:
    return json.loads(_index(folder, part).read_text())["shards"] if _index(folder, part).is_file() else 0


def _shards(folder: Path, part: str) -> list[Path]:
    return sorted(folder.glob(f"{part}-[0-9]*.safetensors"))


def _bag(name: str, bag: Bag) -> dict[str, torch.Tensor]:
    return {f"{name}.values": bag.values, f"{name}.offsets": bag.offsets}


def _as_bag(name: str, tensors: dict[str, torch.Tensor]) -> Bag:
    return Bag(tensors[f"{name}.values"], tensors[f"{name}.offsets"])


def _save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with atomic(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)


def _concatenated(shards: Sequence[Path]) -> dict[str, torch.Tensor]:
    """Tensor by tensor over all shards, so that the memory is that of the part and of one tensor's file pages.

    One shard alone is mapped: its pages come from the file as they are read, and go again where memory is short.
    """
    files = [safe_open(path, framework="pt") for path in shards]
    if len(files) == 1:
        return {name: files[0].get_tensor(name) for name in files[0].keys()}  # noqa: SIM118 (not a dict)
    tensors = {}
    for name in files[0].keys():  # noqa: SIM118 (not a dict)
        pieces = [file.get_tensor(name) for file in files]
        if name.endswith(".offsets"):
            tensors[name] = concat_offsets(pieces)
        elif name in ("candidates", "clicked"):
            tensors[name] = concat_padded(pieces, PADDING if name == "candidates" else False)
        else:
            tensors[name] = torch.cat(pieces)
    return tensors
