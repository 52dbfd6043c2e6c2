"""Large sets of embeddings, made shard by shard, by one process or several that share a folder; resumable."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from rgalign.data import vectors as store
from rgalign.data.vectors import Vectors
from rgalign.reasoner.batches import by_length, evaluating, retry_smaller
from rgalign.reasoner.generate import expanded, has_plain_cache
from rgalign.reasoner.model import Reasoner, export_reasoner, fingerprint, import_reasoner
from rgalign.reasoner.prompts import Prompter
from rgalign.run import distributed
from rgalign.run.artifacts import write_arrow
from rgalign.run.distributed import digest_of, label_of, make_shards, shard_path

# METHOD.md 2.1: the embedding is the final hidden state of the last real token [P]. Batches are padded as right_padded
# says: no mask, and padding is left out by position, never by id.
TOKENS_PER_BATCH = {"cpu": 2_048, "cuda": 16_384}  # a CPU is quickest while a batch fits its caches


@dataclass(frozen=True)
class _Prefix:
    """The shared first tokens: keys and values of each layer, and the sum of their last states."""

    tokens: int
    cache: DynamicCache
    state_sum: Tensor  # (hidden,) float32


def embed(
    reasoner: Reasoner,
    sequences: Sequence[Sequence[int]],
    *,
    prefix: int = 0,
    tokens_per_batch: int | None = None,
    pooling: str | None = None,
    progress: bool = True,
) -> np.ndarray:
    """One vector a sequence: (len(sequences), hidden) float32, in the order given.

    sequences         token ids, each at least one
    prefix            how many first ids all sequences share: a causal model runs them once; the result is the same
    tokens_per_batch  padded tokens in a batch; a longer sequence is a batch of its own. Default: by device [C]
    pooling           last | mean | cls; default: the reasoner's own
    Equal sequences are encoded once. A batch that the device has no memory for is halved, and the log says so.
    Raises ValueError for sequences that are longer than the model can read, or do not begin with the same `prefix` ids.
    """
    pooling = pooling or reasoner.pooling
    budget = tokens_per_batch or TOKENS_PER_BATCH.get(reasoner.device.type, TOKENS_PER_BATCH["cuda"])
    numbers: dict[tuple[int, ...], int] = {}
    number_of = np.array([numbers.setdefault(tuple(ids), len(numbers)) for ids in sequences], dtype=np.int64)
    unique = list(numbers)
    longest = max(map(len, unique), default=0)
    if reasoner.positions is not None and longest > reasoner.positions:
        raise ValueError(f"a sequence has {longest} tokens, the model {reasoner.positions} positions: lower max_tokens")
    if any(ids[:prefix] != unique[0][:prefix] or len(ids) < prefix for ids in unique):
        raise ValueError(f"these sequences do not share the first {prefix} ids")
    vectors = np.zeros((len(unique), reasoner.hidden_size), dtype=np.float32)
    bar = tqdm(total=len(unique), unit="text", desc="embed", disable=not progress)
    with evaluating(reasoner.model), torch.inference_mode(), bar:
        shared = _run_prefix(reasoner, unique, prefix) if pooling != "cls" else None
        skip = shared.tokens if shared else 0
        encode = partial(_encode, reasoner, unique, shared=shared, pooling=pooling)
        for batch in by_length([len(ids) - skip for ids in unique], budget):
            for rows, values in retry_smaller(encode, batch, "embed"):
                vectors[rows] = values
                bar.update(len(rows))
    return vectors[number_of]


def _run_prefix(reasoner: Reasoner, sequences: list[tuple[int, ...]], prefix: int) -> _Prefix | None:
    """Runs the shared ids; None where nothing is gained or the model's cache is not made of plain keys and values."""
    if reasoner.kind != "causal" or len(sequences) < 2:
        return None
    # A sequence that is the prefix alone still needs a token of its own to pool.
    tokens = min(prefix, min(map(len, sequences)) - 1)
    if tokens < 1:
        return None
    ids = torch.tensor([sequences[0][:tokens]], device=reasoner.device)
    output = reasoner.trunk(input_ids=ids, use_cache=True)
    cache = getattr(output, "past_key_values", None)
    if not has_plain_cache(cache, (DynamicLayer,)):
        return None  # sliding windows and recurrent states cannot be expanded by row
    return _Prefix(tokens, cache, output.last_hidden_state[0].float().sum(dim=0))


def _encode(
    reasoner: Reasoner, known: list[tuple[int, ...]], rows: Sequence[int], shared: _Prefix | None, pooling: str
) -> np.ndarray:
    """(rows, hidden) float32 of one batch: these rows of what is known."""
    sequences = [known[row] for row in rows]
    skip = shared.tokens if shared else 0
    lengths = torch.tensor([len(ids) - skip for ids in sequences])
    real = torch.arange(int(lengths.max())) < lengths[:, None]  # (rows, width)
    ids = torch.full(real.shape, reasoner.tokenizer.pad_token_id)
    ids[real] = torch.tensor([token for sequence in sequences for token in sequence[skip:]])
    ids, real, lengths = ids.to(reasoner.device), real.to(reasoner.device), lengths.to(reasoner.device)
    if reasoner.kind == "encoder":
        states = reasoner.trunk(input_ids=ids, attention_mask=real.long()).last_hidden_state
    elif shared:
        cache = expanded(shared.cache, len(ids))
        states = reasoner.trunk(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
    else:
        states = reasoner.trunk(input_ids=ids, use_cache=False).last_hidden_state
    before = (skip, shared.state_sum) if shared else (0, 0)
    return pool(reasoner, states, lengths, pooling, before=before).cpu().numpy()


def pool(
    reasoner: Reasoner,
    states: Tensor,
    lengths: Tensor,
    pooling: str | None = None,
    *,
    before: tuple[int, Tensor | int] = (0, 0),
) -> Tensor:
    """The vector of each row, (rows, hidden) float32, as the reasoner makes it; differentiable.

    states   (rows, tokens, hidden) final hidden states, padded on the right
    lengths  (rows,) tokens that count, from the left
    pooling  last | mean | cls; default: the reasoner's own
    before   number of tokens that were run before these, and the sum of their states; for the mean
    """
    pooling = pooling or reasoner.pooling
    if pooling == "last":
        pooled = states[torch.arange(len(states), device=states.device), lengths - 1].float()
    elif pooling == "cls":
        pooled = states[:, 0].float()
    else:
        real = torch.arange(states.shape[1], device=states.device) < lengths[:, None]
        pooled = ((states.float() * real[..., None]).sum(dim=1) + before[1]) / (lengths[:, None] + before[0])
    return torch.nn.functional.normalize(pooled, dim=1) if reasoner.normalize else pooled


ROWS_PER_SHARD = 20_000
SESSIONS_AT_ONCE = 4_096  # prompts made together
ROWS_BY_PROCESSES = 2_000  # in a shard, where several processes embed; fixed, so that their number changes no byte
SEQUENCES, VECTORS = "sequences.parquet", "vectors"


class Prompts(Sequence):
    """The prompts of a frame's sessions, made on demand: all at once they take ten times the frame's memory."""

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
    **options: Any,
) -> int:
    """Embed sequences into `folder/shard-00000`, ..; returns how many shards this process made.

    A finished shard of this very model, ids, sequences and options is kept; any other is replaced. Several processes,
    called with the same arguments, share the shards. A killed process leaves no half shard. options: see `embed`.
    """
    folder = Path(folder)
    count = max(1, -(-len(ids) // rows_per_shard))
    # Budget, progress and a shared prefix change the speed, never the meaning of a vector.
    meaning = {"model": fingerprint(reasoner), "rows": rows_per_shard, "ids": list(map(str, ids))}
    meaning["pooling"] = options.get("pooling") or reasoner.pooling
    label = {"of": digest_of(meaning, sequences), "shards": count}
    folder.mkdir(parents=True, exist_ok=True)
    if distributed.index() == 0:
        for left in set(folder.glob("shard-*")) - {shard_path(folder, number) for number in range(count)}:
            shutil.rmtree(left)  # of a longer set

    def make(number: int, shard: Path) -> None:
        rows = slice(number * rows_per_shard, (number + 1) * rows_per_shard)
        values = embed(reasoner, sequences[rows], **options)
        store.save(shard / VECTORS, Vectors(np.asarray(ids[rows], dtype=str), values))

    return make_shards(folder, count, make, label=lambda _: label)


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
    """`embed_to_shards` by the processes that the launcher starts, the same bytes for any number of them.
    dtype, device: of the reasoner in the processes. Raises ProcessesError, ReasonerError."""
    job = folder.with_name(f"{folder.name}-job")
    tokens = pa.array([list(map(int, row)) for row in sequences], pa.list_(pa.int32()))
    write_arrow(job / SEQUENCES, pa.table({"id": pa.array(list(map(str, ids)), pa.string()), "tokens": tokens}))
    arguments = {"reasoner": export_reasoner(reasoner, job / "reasoner"), "dtype": dtype, "device": device}
    arguments |= {"shards": str(folder.absolute()), "options": options}
    distributed.run("embed", job, launcher, arguments, device=device)
    shutil.rmtree(job)


def embed_own_shards(job: Path, arguments: dict[str, Any]) -> dict[str, int]:
    """This process's part of `embed_by_processes`."""
    table = pq.read_table(job / SEQUENCES)
    ids, sequences = table["id"].to_pylist(), table["tokens"].to_pylist()
    reasoner = import_reasoner(arguments["reasoner"], dtype=arguments["dtype"], device=arguments["device"])
    how = {**arguments["options"], "rows_per_shard": ROWS_BY_PROCESSES, "progress": distributed.index() == 0}
    return {"shards": embed_to_shards(arguments["shards"], reasoner, ids, sequences, **how)}


def gather(folder: str | Path) -> Vectors:
    """All shards of a folder as one, in the order of the ids that were given. Raises ValueError that names the shards
    that are missing or of another model or set."""
    folder = Path(folder)
    first = label_of(shard_path(folder, 0))
    if first is None:
        raise ValueError(f"{folder} has no first shard; call embed_to_shards for every process first")
    paths = [shard_path(folder, number) for number in range(first["shards"])]
    if wrong := [path.name for path in paths if label_of(path) != first]:
        raise ValueError(
            f"{folder}: {len(wrong)} of {len(paths)} shards are missing, or of another set (first: {wrong[0]})"
            "; call embed_to_shards again: finished shards are kept"
        )
    return store.concat([store.load(path / VECTORS) for path in paths])
