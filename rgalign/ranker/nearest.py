"""The nearest of remembered vectors: of few by comparing all, of many by comparing those in the nearest cells."""

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from typing import Self

import numpy as np
import torch
from torch import Tensor

PAIRS_AT_ONCE = 1 << 25  # (vector, centre) pairs while vectors are put into cells: 128 MB

# Queries (n, dim) of length 1, and their users (n,) or None -> rows (n, count) of the nearest vectors, and cosines
Find = Callable[[np.ndarray, np.ndarray | None], tuple[np.ndarray, np.ndarray]]


def finder(vectors: np.ndarray, users: np.ndarray, count: int, compared: int) -> Find:
    """Finds the `count` vectors with the highest cosine.

    vectors   (n, dim) float16 of length 1
    users     (n,) whose they are: with a query's user given, the user's own are left out (cosine -inf). May be empty
    compared  of more vectors than these, only those in the nearest cells are looked at, about as many
    """

    if len(vectors) <= compared:
        scaled = vectors.astype(np.float32)
        scaled = (scaled / np.maximum(np.linalg.norm(scaled, axis=1, keepdims=True), 1e-12)).T.copy()

        def of_all(query: np.ndarray, asking: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
            cosines = query @ scaled
            if asking is not None and len(users):
                cosines[asking[:, None] == users] = -np.inf
            nearest = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
            return nearest, np.take_along_axis(cosines, nearest, axis=1)

        return of_all

    cells = Cells.of(vectors)

    def of_cells(query: np.ndarray, asking: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        nearest, cosines = np.empty((len(query), count), np.int64), np.empty((len(query), count), np.float32)
        for row, own in enumerate(query):
            rows, found = cells.near(own, max(count, compared))
            if asking is not None and len(users):
                found[users[rows] == asking[row]] = -np.inf
            best = np.argpartition(-found, count - 1)[:count]
            nearest[row], cosines[row] = rows[best], found[best]
        return nearest, cosines

    return of_cells


@dataclass(frozen=True, eq=False)
class Cells:
    """Vectors of length 1 in cells, each in that of the centre it is most like; the centres are some of them [C].

    vectors  (n, dim) float16, cell after cell;  rows (n,) where each stood
    centres  (cells, dim) float32;  starts (cells + 1,) the first vector of each cell
    """

    vectors: Tensor
    rows: np.ndarray
    centres: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, vectors: np.ndarray) -> Self:
        """sqrt(n) cells, their centres evenly spaced among the vectors (n, dim) float16."""
        count, given = isqrt(len(vectors)), torch.from_numpy(vectors)
        centres = given[torch.linspace(0, len(vectors) - 1, count, dtype=torch.float64).long()].float()
        chunks = given.split(max(1, PAIRS_AT_ONCE // count))
        cell = torch.cat([(chunk.float() @ centres.T).argmax(dim=1) for chunk in chunks]).numpy()
        rows = np.argsort(cell, kind="stable")
        return cls(given[rows], rows, centres.numpy(), np.searchsorted(cell[rows], np.arange(count + 1)))

    def near(self, query: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows (m,) and cosines (m,) of the vectors in the cells nearest to a query (dim,) of length 1, which together
        hold at least so many vectors, or all."""
        cells = np.argsort(-(self.centres @ query), kind="stable")
        enough = np.searchsorted(np.diff(self.starts)[cells].cumsum(), least)
        spans, asked = [slice(*self.starts[cell : cell + 2]) for cell in cells[: enough + 1]], torch.from_numpy(query)
        # torch reads float16 several times as fast as numpy
        cosines = torch.cat([self.vectors[span].float() @ asked for span in spans])
        return np.concatenate([self.rows[span] for span in spans]), cosines.numpy()
