"""Large sets of embeddings, made shard by shard, by one process or several that share a folder; resumable."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from rgalign import processes
from rgalign.artifacts import atomic, write_arrow
from rgalign.data import vectors as store
from rgalign.data.prompts import Prompter
from rgalign.data.vectors import Vectors
from rgalign.reasoner.embed import embed
from rgalign.reasoner.model import Reasoner, fingerprint
from rgalign.reasoner.source import hand_over, take_over

ROWS_PER_SHARD = 20_000
SESSIONS_AT_ONCE = 4_096  # whose prompts are made together
ROWS_BY_PROCESSES = 2_000  # in a shard that several processes share out; fixed, so that their number changes no byte
SEQUENCES = "sequences.parquet"
LABEL, VECTORS = "shard.json", "vectors"


class Prompts(Sequence):
    """The prompts of a frame's sessions, made when they are asked for: those of many sessions, with the words that they
    are made of, take ten times the memory of the frame."""

    def __init__(self, prompter: Prompter, frame: pd.DataFrame):
        self._prompter, self._frame = prompter, frame

    def __len__(self) -> int:
        return len(self._frame)

    def __getitem__(self, rows):
        """One prompt, or those of a slice of rows."""
        if isinstance(rows, slice):
            return self._prompter.sessions(self._frame.iloc[rows])
        return self[range(len(self))[rows] : range(len(self))[rows] + 1][0]

    def __iter__(self) -> Iterator[list[int]]:
        for first in range(0, len(self), SESSIONS_AT_ONCE):
            yield from self[first : first + SESSIONS_AT_ONCE]


def embed_to_shards(
    folder: str | Path,
    reasoner: Reasoner,
    ids: Sequence[str],
    sequences: Sequence[Sequence[int]],
    *,
    rows_per_shard: int = ROWS_PER_SHARD,
    process_index: int = 0,
    processes: int = 1,
    **options: Any,
) -> int:
    """Embed sequences into `folder/shard-00000`, ..; returns how many shards this process made.

    A shard that is there, of this very model, ids, sequences and options, is not made again; one of anything else is
    replaced. Process i makes the shards i, i + processes, ..: every process is called with the same arguments but
    process_index. A killed process leaves no half shard. options are those of `embed`. Raises ValueError.
    """
    folder = Path(folder)
    faults = []
    if len(ids) != len(sequences):
        faults.append(f"{len(ids)} ids for {len(sequences)} sequences")
    if len(set(ids)) != len(ids):
        faults.append(f"{len(ids) - len(set(ids))} ids are there twice")
    if rows_per_shard < 1 or not 0 <= process_index < processes:
        faults.append(f"rows_per_shard {rows_per_shard}, process {process_index} of {processes}: out of range")
    if faults:
        raise ValueError(f"nothing was embedded into {folder}:\n  " + "\n  ".join(faults))
    shards = max(1, -(-len(ids) // rows_per_shard))
    label = {"of": _digest(reasoner, ids, sequences, rows_per_shard, options), "shards": shards}
    folder.mkdir(parents=True, exist_ok=True)
    if process_index == 0:
        for left in set(folder.glob("shard-*")) - {_shard(folder, i) for i in range(shards)}:  # of a longer set
            shutil.rmtree(left)
    made = 0
    for i in range(process_index, shards, processes):
        if _label(_shard(folder, i)) == label:
            continue
        part = slice(i * rows_per_shard, (i + 1) * rows_per_shard)
        values = embed(reasoner, sequences[part], **options)
        with atomic(_shard(folder, i)) as temporary:
            temporary.mkdir()
            store.save(temporary / VECTORS, Vectors(np.asarray(ids[part], dtype=str), values))
            (temporary / LABEL).write_text(json.dumps(label) + "\n", encoding="utf-8")
        made += 1
    return made


def embed_by_processes(
    folder: Path,
    reasoner: Reasoner,
    ids: Sequence[str],
    sequences: Sequence[Sequence[int]],
    *,
    launcher: str,
    dtype: str,
    device: str,
    **options: Any,
) -> None:
    """`embed_to_shards` by the processes that the launcher starts; the same bytes for any number of them.

    The job's own folder lies beside the shards' and goes when it is done. A lost process costs the shard that it was
    making. dtype, device: with which they read the reasoner. Raises ProcessesError, ReasonerError.
    """
    job = folder.with_name(f"{folder.name}-job")
    tokens = pa.array([list(map(int, row)) for row in sequences], pa.list_(pa.int32()))
    write_arrow(job / SEQUENCES, pa.table({"id": pa.array(list(map(str, ids)), pa.string()), "tokens": tokens}))
    arguments = {"reasoner": hand_over(reasoner, job / "reasoner"), "dtype": dtype, "device": device}
    arguments |= {"shards": str(folder.absolute()), "threads": torch.get_num_threads(), "options": options}
    processes.run("embed", job, launcher, arguments)
    shutil.rmtree(job)


def embed_share(job: Path, arguments: dict[str, Any]) -> dict[str, int]:
    """This process's part of `embed_by_processes`."""
    table = pq.read_table(job / SEQUENCES)
    ids, sequences = table["id"].to_pylist(), table["tokens"].to_pylist()
    reasoner = take_over(arguments["reasoner"], dtype=arguments["dtype"], device=arguments["device"])
    share = {"process_index": processes.index(), "processes": processes.count(), "rows_per_shard": ROWS_BY_PROCESSES}
    how = {**arguments["options"], **share, "progress": processes.index() == 0}
    return {"shards": embed_to_shards(arguments["shards"], reasoner, ids, sequences, **how)}


def gather(folder: str | Path) -> Vectors:
    """All shards of a folder as one, in the order of the ids that were given.

    Raises ValueError that names the shards that are missing or of another model or set.
    """
    folder = Path(folder)
    first = _label(_shard(folder, 0))
    if first is None:
        raise ValueError(f"{folder} has no first shard; call embed_to_shards for every process first")
    paths = [_shard(folder, i) for i in range(first["shards"])]
    wrong = [path.name for path in paths if _label(path) != first]
    if wrong:
        raise ValueError(
            f"{folder}: {len(wrong)} of {len(paths)} shards are missing, or of another set (first: {wrong[0]})"
            "; call embed_to_shards again: finished shards are kept"
        )
    return store.concat([store.load(path / VECTORS) for path in paths])


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}"


def _label(shard: Path) -> dict[str, Any] | None:
    try:
        return json.loads((shard / LABEL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _digest(reasoner: Reasoner, ids: Sequence[str], sequences: Sequence, rows: int, options: dict[str, Any]) -> str:
    # Budget, progress and a shared prefix change the speed, never the meaning of a vector.
    meaning = {"model": fingerprint(reasoner), "rows": rows, "pooling": options.get("pooling") or reasoner.pooling}
    hashed = hashlib.sha256(json.dumps([meaning, list(map(str, ids))]).encode())
    for sequence in sequences:
        hashed.update(np.array([len(sequence), *sequence], dtype=np.int64).tobytes())
    return hashed.hexdigest()
