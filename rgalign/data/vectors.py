"""Embeddings with the ids they belong to: half precision, on disk as safetensors with the ids in parquet beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from rgalign.run.artifacts import atomic, write_table

VALUES, IDS = "vectors.safetensors", "ids.parquet"


@dataclass(frozen=True, eq=False)
class Vectors:
    """One vector an id; half precision is enough for what a trained tower reads [C].

    ids     (n,) strings, no two equal
    values  (n, dim) float16; wider floats are rounded
    Raises ValueError that lists all errors: lengths that differ, doubled ids, values not finite in float16.
    """

    ids: np.ndarray
    values: np.ndarray

    def __post_init__(self):
        ids, given = np.asarray(self.ids, dtype=str), np.asarray(self.values)
        with np.errstate(over="ignore", invalid="ignore"):  # too large for float16 becomes inf, and is named below
            values = given.astype(np.float16)
        errors = []
        if ids.ndim != 1 or values.ndim != 2 or len(ids) != len(values):
            errors.append(f"ids {ids.shape} and values {values.shape}: expected (n,) and (n, dim)")
        else:
            doubled, broken = ids[pd.Index(ids).duplicated()], ~np.isfinite(values).all(axis=1)
            if len(doubled):
                errors.append(f"{len(doubled)} ids are there twice (first: {str(doubled[0])!r})")
            if broken.any():
                largest = np.finfo(np.float16).max
                first = str(ids[broken][0])
                errors.append(
                    f"{broken.sum()} vectors have NaN, infinity or more than {largest:.0f} (first: {first!r})"
                )
        if errors:
            raise ValueError("these vectors cannot be kept:\n  " + "\n  ".join(errors))
        object.__setattr__(self, "ids", ids)
        object.__setattr__(self, "values", values)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dim(self) -> int:
        return self.values.shape[1]

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """(len(ids), dim) float16, in the order asked for; an id may be asked for twice. Raises ValueError."""
        wanted = np.asarray(ids, dtype=str)
        if np.array_equal(wanted, self.ids):  # so with a single session: no index is built
            return self.values.copy()
        found = pd.Index(self.ids).get_indexer(pd.Index(wanted))
        missing = wanted[found < 0]
        if len(missing):
            raise ValueError(f"{len(missing)} of {len(wanted)} ids have no vector (first: {str(missing[0])!r})")
        return self.values[found]


def concat(parts: Sequence[Vectors]) -> Vectors:
    """All parts as one, in their order. Raises ValueError for none, for dims that differ and for doubled ids."""
    dims = sorted({part.dim for part in parts})
    if len(dims) != 1:
        raise ValueError(f"vectors of {', '.join(map(str, dims)) or 'no'} dimensions cannot be put together")
    return Vectors(np.concatenate([part.ids for part in parts]), np.concatenate([part.values for part in parts]))


def save(folder: str | Path, vectors: Vectors) -> None:
    """Write the folder whole or not at all; the same vectors give the same bytes."""
    with atomic(Path(folder)) as temporary:
        temporary.mkdir()
        save_file({"values": np.ascontiguousarray(vectors.values)}, temporary / VALUES)
        write_table(temporary / IDS, pd.DataFrame({"id": pd.array(vectors.ids, dtype="string")}))


def load(folder: str | Path) -> Vectors:
    """What `save` wrote. Raises ValueError where it is missing, damaged or does not fit together."""
    folder = Path(folder)
    try:
        values = load_file(folder / VALUES)["values"]
        ids = pd.read_parquet(folder / IDS)["id"].to_numpy(dtype=object)
    except (OSError, KeyError, SafetensorError, ValueError) as error:
        raise ValueError(f"{folder} holds no vectors that can be read: {error}") from None
    return Vectors(ids, values)
