"""One column of a table, read as what its kind says: keys, numbers, a history, words."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

Rows = pd.DataFrame | pa.Table | pa.RecordBatch


def column(rows: Rows, name: str) -> pa.Array:
    """The column in one piece; NaN of pandas is null."""
    array = pa.array(rows[name], from_pandas=True) if isinstance(rows, pd.DataFrame) else rows[name]
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    # combine_chunks of no chunk at all still gives a ChunkedArray in some releases of pyarrow.
    return pa.concat_arrays(array.chunks or [pa.array([], array.type)]) if isinstance(array, pa.ChunkedArray) else array


def ids(rows: Rows, name: str) -> pa.Array:
    """A column of session, user or intent ids, in one type whatever the table's, so that two tables can be joined."""
    return column(rows, name).cast(pa.large_string())


def as_strings(ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """(rows,) numpy strings."""
    return ids.to_numpy(zero_copy_only=False).astype(str) if isinstance(ids, pa.Array) else ids.to_numpy().astype(str)


def as_keys(array: pa.Array) -> tuple[np.ndarray, list[str | None]]:
    """(codes, keys): keys[codes[row]] is the row's value as text; None where it is null, NaN or the empty string.

    A whole number has one spelling (1, 1.0): an integer column with gaps is float in pandas.
    """
    encoded = array if pa.types.is_dictionary(array.type) else array.dictionary_encode()
    keys = [_key(value) for value in encoded.dictionary.to_pylist()]
    codes = pc.fill_null(encoded.indices.cast(pa.int64()), len(keys)).to_numpy(zero_copy_only=False)
    return codes, [*keys, None]


def _key(value) -> str | None:
    if value is None or value == "" or value != value:
        return None
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def as_numbers(array: pa.Array) -> np.ndarray:
    """(rows,) float64, NaN where there is none; a whole number beyond 2^53 is the nearest that there is."""
    return pc.fill_null(array.cast(pa.float64(), safe=False), np.nan).to_numpy(zero_copy_only=False)


def as_history(array: pa.Array) -> tuple[np.ndarray, pa.Array, np.ndarray]:
    """A list column without its null elements: (rows of the elements, elements, lengths with NaN for a null list)."""
    if pa.types.is_null(array.type):
        array = array.cast(pa.list_(pa.string()))
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    rows, elements = np.repeat(np.arange(len(array)), lengths), array.flatten()
    if elements.null_count:
        there = elements.is_valid()
        rows, elements = rows[there.to_numpy(zero_copy_only=False)], elements.filter(there)
    lengths = np.bincount(rows, minlength=len(array)).astype(float)
    lengths[array.is_null().to_numpy(zero_copy_only=False)] = np.nan
    return rows, elements, lengths


def most_recent(rows: np.ndarray, lengths: np.ndarray, limit: int) -> np.ndarray:
    """Mask of the last `limit` elements of each row; rows: (elements,) ascending, lengths: (all rows,)."""
    ends = np.cumsum(np.nan_to_num(lengths).astype(np.int64))
    return ends[rows] - np.arange(len(rows)) <= limit


def hashes(ids: pa.Array) -> np.ndarray:
    """(rows,) uint64 in place of ids, eight bytes each: two of 7.5 M ids collide once in 600,000 runs."""
    return pd.util.hash_array(ids.to_numpy(zero_copy_only=False).astype(object), categorize=False)


def among(values: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """(values,) bool, as np.isin, which would sort the whole of `ascending` again for every batch."""
    place = np.searchsorted(ascending, values)
    return np.append(ascending, np.uint64(0))[place] == values if len(ascending) else np.zeros(len(values), bool)
