"""The pieces that a training step is run in: which rows each process has, how many at once, and what they weigh.

A step's documents are the same however it is run. They are shared out over the processes, each of which runs its own in
pieces that fit `tokens_per_batch`; every piece's loss is weighted so that the sum is the mean over the step.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rgalign import processes

Weight = Callable[[dict], int]


class Step:
    """A step's rows as the loader hands them on: an object, as whoever moves a batch looks at each number of a list."""

    def __init__(self, rows: list[dict]):
        self.rows = rows


@dataclass(frozen=True)
class Piece:
    """Rows that are run at once: their batch, how many they are, how many padded tokens, and their weight in the step's
    mean."""

    batch: dict[str, Tensor]
    rows: int
    tokens: int
    share: float

    def as_inputs(self) -> dict[str, Any]:
        """What Trainer takes for a batch."""
        return {**self.batch, "share": self.share}


@dataclass(frozen=True)
class Share:
    """A step's rows -> the pieces of this process.

    collate rows of a piece -> the objective's batch
    weight  what a row counts in the objective's mean (query tokens, pairs); None: the objective evens itself out over
            the processes (alignment.gather), and is not run in pieces; its batch has `counted`, the rows that do
    width   (row) -> tokens of its widest document, and documents in a row
    whole   (rows of the step) -> what every piece's batch must know of them all; None: nothing
    """

    collate: Callable[[list], dict[str, Tensor]]
    weight: Weight | None
    width: Callable[[dict], tuple[int, int]]
    tokens_per_batch: int | None
    whole: Callable[[list], dict[str, Tensor]] | None = None

    def __call__(self, rows: list[dict]) -> list[Piece]:
        count, index = processes.count(), processes.index()
        own = [_part(rows, count, each) for each in range(count)]
        pieces = [self._pieces(part or rows[:1]) for part in own]  # fewer rows than processes: one that weighs 0
        most = max(map(len, pieces))  # sharded weights are gathered in every piece: all processes have equally many
        mine = pieces[index] + [pieces[index][-1]] * (most - len(pieces[index]))
        real = len(pieces[index]) if own[index] else 0
        known = self.whole(rows) if self.whole else {}
        return [
            Piece(
                batch={**self.collate(piece), **known, **self._counted(piece, number < real)},
                rows=len(piece),
                tokens=self._tokens(piece),
                share=self._share(piece, rows, count) * (number < real),
            )
            for number, piece in enumerate(mine)
        ]

    def smaller(self, piece: Piece) -> "Share":
        """The same with half the tokens at once that this piece has: a step's other pieces may have been wider."""
        return replace(self, tokens_per_batch=piece.tokens // 2)

    def _pieces(self, rows: list[dict]) -> list[list[dict]]:
        if self.tokens_per_batch is None or self.weight is None:
            return [rows]
        order = sorted(rows, key=lambda row: -self.width(row)[0])  # the longest first, and stable
        pieces = []
        while order:
            size = max(1, self.tokens_per_batch // self._tokens(order[:1]))
            pieces.append(order[:size])
            order = order[size:]
        return pieces

    def _tokens(self, piece: list[dict]) -> int:
        """Padded tokens of rows that are run at once."""
        widest, documents = max(map(self.width, piece))
        return widest * documents * len(piece)

    def _counted(self, piece: list[dict], real: bool) -> dict[str, Tensor]:
        return {} if self.weight is not None else {"counted": torch.tensor(len(piece) * real)}

    def _share(self, piece: list[dict], rows: list[dict], count: int) -> float:
        if self.weight is None:
            return 1.0
        # processes' gradients are averaged: count times the piece's part of the step makes that the step's mean
        return count * sum(map(self.weight, piece)) / sum(map(self.weight, rows))


def _part(rows: list[dict], count: int, index: int) -> list[dict]:
    """Rows of one of `count` processes: neighbours, as many as the others have or one more."""
    least, more = divmod(len(rows), count)
    first = index * least + min(index, more)
    return rows[first : first + least + (index < more)]
