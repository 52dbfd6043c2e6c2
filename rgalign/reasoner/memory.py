"""What to do when a device's memory is too small for a batch: halves of it, and a word in the log."""

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

Row, Result = TypeVar("Row"), TypeVar("Result")
# as devices, the CPU's allocator and cuBLAS (its own workspace) say it
NO_ROOM = ("out of memory", "can't allocate memory", "not enough memory", "cublas_status_alloc_failed")

logger = logging.getLogger(__name__)


def in_halves(
    job: Callable[[Sequence[Row]], Result], rows: Sequence[Row], what: str
) -> Iterator[tuple[Sequence[Row], Result]]:
    """(part, job(part)) for parts that make up `rows`, in order: all of it, or halves of what did not fit.

    what  for the log. A single row that does not fit raises what the device raised.
    """
    waiting = [rows]
    while waiting:
        part = waiting.pop()
        try:
            result = job(part)
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if len(part) < 2 or not is_out_of_memory(error):
                raise
            result = None
        if result is None:  # outside of the handler, whose traceback holds on to the batch
            half = len(part) // 2
            logger.warning("%s: out of memory with %d rows at once; going on with %d", what, len(part), half)
            let_go()
            waiting += [part[half:], part[:half]]
            continue
        yield part, result


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device, or the machine, had no room for what was asked."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(words in str(error).lower() for words in NO_ROOM)


def let_go() -> None:
    """Give back what of a card's memory nobody uses any more; what has failed may hang on in a cycle."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
