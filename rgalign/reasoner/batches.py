"""What a training step reads: rows of token ids, divided over processes and into micro-batches that fit the memory.

transformers' gradient accumulation is not used: it has a fixed number of rows in a micro-batch, weighs by tokens alone,
and cannot repeat a step in smaller ones after an out-of-memory error."""

import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from rgalign.run import distributed

logger = logging.getLogger(__name__)


def documents(prompts: Sequence[Sequence[int]], queries: Sequence[Sequence[int]]) -> list[dict]:
    """One document a row: input_ids, token ids of prompt and query, and how many of them are the prompt's."""
    pairs = zip(prompts, queries, strict=True)
    return [{"input_ids": [*prompt, *query], "prompt": len(prompt)} for prompt, query in pairs]


def right_padded(rows: Sequence[dict], pad: int) -> dict[str, Tensor]:
    """A batch of documents: ids (rows, longest); prompt (rows,), tokens of the prompt; length (rows,), of both."""
    # on the right: in a causal model no token attends to its right, so no mask is needed. The end token may be the pad
    # token: what is padding is decided by length alone
    lengths = [len(row["input_ids"]) for row in rows]
    ids = [row["input_ids"] + [pad] * (max(lengths) - own) for row, own in zip(rows, lengths, strict=True)]
    prompt = [row["prompt"] for row in rows]
    return {"ids": torch.tensor(ids), "prompt": torch.tensor(prompt), "length": torch.tensor(lengths)}


def tokens_of(row: dict) -> tuple[int, int]:
    """Tokens of a row of `documents`, and how many documents it is."""
    return len(row["input_ids"]), 1


def by_length(tokens: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Rows of about one length, the longest first (memory is short at once or never): at most `budget` tokens, or one
    row. tokens: of each row, were it padded to no other."""
    order, first = sorted(range(len(tokens)), key=lambda row: -tokens[row]), 0  # stable
    while first < len(order):
        size = max(1, budget // tokens[order[first]])
        yield order[first : first + size]
        first += size


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode; afterwards in the mode that it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


# Out of memory: the same work on half of the rows.

Row, Result = TypeVar("Row"), TypeVar("Result")
# the words of devices, of the CPU's allocator and of cuBLAS (its own workspace)
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "cublas_status_alloc_failed")


def retry_smaller(
    job: Callable[[Sequence[Row]], Result], rows: Sequence[Row], what: str
) -> Iterator[tuple[Sequence[Row], Result]]:
    """(part, job(part)) for parts that make up `rows`, in order: all rows, or halves of what did not fit into memory
    (`what`, for the log). A single row that does not fit raises the device's error."""
    waiting = [rows]
    while waiting:
        part = waiting.pop()
        try:
            result = job(part)
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if len(part) < 2 or not is_out_of_memory(error):
                raise
            result = None
        if result is None:  # outside of the handler, whose traceback still references the batch
            half = len(part) // 2
            logger.warning("%s: out of memory with %d rows at once; going on with %d", what, len(part), half)
            empty_cache()
            waiting += [part[half:], part[:half]]
            continue
        yield part, result


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device, or the machine, did not have the memory that was asked for."""
    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in said for words in OUT_OF_MEMORY)


def empty_cache() -> None:
    """Free the GPU memory that is not in use; a failed batch may be held by a reference cycle, so collect first."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


class StepRows:
    """A step's rows as the loader passes them on: an object, since transformers visits each number of a list."""

    def __init__(self, rows: list[dict]):
        self.rows = rows


@dataclass(frozen=True)
class MicroBatch:
    """Rows that are run at once: their batch, how many they are, padded tokens, and their weight in the step's mean."""

    batch: dict[str, Tensor]
    rows: int
    tokens: int
    weight: float

    def as_inputs(self) -> dict[str, Any]:
        """What Trainer takes for a batch."""
        return {**self.batch, "loss_weight": self.weight}


# (model, batch) -> the loss to be minimised, and what else is worth a column in the curve
Loss = Callable[[nn.Module, dict[str, Tensor]], tuple[Tensor, Mapping[str, Tensor]]]


@dataclass(frozen=True)
class Task:
    """What is learned: a title for the log, rows of JSON types (read in random order), and a loss.

    collate  rows -> the batch that `loss` gets
    weight   what a row counts in the loss's mean (query tokens, pairs); None: rows are each other's negatives, the
             loss itself is averaged over the processes and a step is not divided; its batch has `counted`, the number
             of rows that count
    width    (row) -> tokens of its widest document, and documents in a row
    of_step  (rows of a step) -> what each of its micro-batches must know of all of them; None: nothing
    draw     (model, rows of a step, its number from 0) -> the rows that the step learns from instead: on-policy
    in_turn  steps that learn from one drawing, between which no checkpoint is made
    """

    title: str
    rows: list[dict]
    collate: Callable[[list], dict[str, Tensor]]
    loss: Loss
    weight: Callable[[dict], int] | None = None
    width: Callable[[dict], tuple[int, int]] = tokens_of
    of_step: Callable[[list], dict[str, Tensor]] | None = None
    draw: Callable[[nn.Module, list, int], list] | None = None
    in_turn: int = 1


@dataclass(frozen=True)
class MicroBatcher:
    """A step's rows -> the micro-batches of this process."""

    task: Task
    tokens_per_batch: int | None

    def __call__(self, rows: list[dict]) -> list[MicroBatch]:
        task, count, index = self.task, distributed.count(), distributed.index()
        own = [[rows[place] for place in places] for places in np.array_split(range(len(rows)), count)]
        divided = [self._divide(part or rows[:1]) for part in own]  # fewer rows than processes: a dummy row, weight 0
        # sharded weights are gathered in each micro-batch: all processes need equally many, so the last one is repeated
        mine, most = divided[index], max(map(len, divided))
        real = len(mine) if own[index] else 0
        of_step, batches = task.of_step(rows) if task.of_step else {}, []
        for number, part in enumerate(mine + [mine[-1]] * (most - len(mine))):
            batch, weight = {**task.collate(part), **of_step}, 1.0
            if task.weight is None:
                batch["counted"] = torch.tensor(len(part) * (number < real))
            else:  # processes' gradients are averaged: count times the part's share makes that the step's mean
                weight = count * sum(map(task.weight, part)) / sum(map(task.weight, rows))
            batches.append(MicroBatch(batch, len(part), self._tokens(part), weight * (number < real)))
        return batches

    def smaller(self, batch: MicroBatch) -> "MicroBatcher":
        """The same with half the tokens of this micro-batch at once: the step's other ones may have been wider."""
        return replace(self, tokens_per_batch=batch.tokens // 2)

    def _divide(self, rows: list[dict]) -> list[list[dict]]:
        if self.tokens_per_batch is None or self.task.weight is None:
            return [rows]
        parts = by_length([self._tokens([row]) for row in rows], self.tokens_per_batch)
        return [[rows[place] for place in part] for part in parts]

    def _tokens(self, rows: list[dict]) -> int:
        """Padded tokens of rows that are run at once."""
        widest, documents = max(map(self.task.width, rows))
        return widest * documents * len(rows)
