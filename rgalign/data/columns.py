"""One column of a table, read as what its kind says: keys, numbers, a history, words."""

import zlib

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch

from rgalign.data.lists import Bag

Rows = pd.DataFrame | pa.Table | pa.RecordBatch

# Marks (\pM) belong to a word: without them Thai and Hindi words fall apart at their vowels.
BETWEEN_WORDS = r"[^\pL\pM\pN_]+"


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


def hashed_words(texts: list[pa.Array], *, buckets: int, pairs: bool) -> tuple[np.ndarray, np.ndarray]:
    """Words of several text columns as one bag a row: (rows, buckets), each bucket once a row, both ascending.

    A word is a run of letters, marks, digits and underscores, in lower case; with `pairs` every two neighbours of a
    column count as a word too. The bucket is the word's CRC-32 modulo `buckets`: the same in every process, unlike
    Python's hash(). Order and repetition are lost.
    """
    found = [np.empty((0,), np.int64)]
    for text in texts:
        rows, codes, words = _words(text)
        found.append(rows * buckets + _buckets(words, buckets)[codes])
        if pairs:
            neighbours = rows[1:] == rows[:-1]
            both = (codes[:-1] * len(words) + codes[1:])[neighbours]
            unique, inverse = np.unique(both, return_inverse=True)
            joined = [f"{words[pair // len(words)]} {words[pair % len(words)]}" for pair in unique.tolist()]
            found.append(rows[1:][neighbours] * buckets + _buckets(joined, buckets)[inverse])
    ordered = np.sort(np.concatenate(found))  # with the next line eight times as fast as np.unique
    return np.divmod(ordered[np.diff(ordered, prepend=-1) != 0], buckets)


def _words(text: pa.Array) -> tuple[np.ndarray, np.ndarray, list[str]]:
    lowered = pc.utf8_lower(pc.fill_null(text.cast(pa.large_string()), ""))
    split = pc.split_pattern_regex(lowered, BETWEEN_WORDS)
    rows = np.repeat(np.arange(len(text)), pc.list_value_length(split).to_numpy(zero_copy_only=False))
    encoded = split.flatten().dictionary_encode()
    codes, words = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), encoded.dictionary.to_pylist()
    if "" in words:  # a text that starts or ends between words
        kept = codes != words.index("")
        rows, codes = rows[kept], codes[kept]
    return rows, codes, words


def _buckets(words: list[str], buckets: int) -> np.ndarray:
    return np.array([zlib.crc32(word.encode()) % buckets for word in words], dtype=np.int64)


def as_bag(rows: np.ndarray, values: np.ndarray, *, bags: int, size: int) -> Bag:
    """A Bag from (row, value) pairs with ascending rows; size: number of different values."""
    offsets = np.zeros(bags + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=bags), out=offsets[1:])
    return Bag(torch.from_numpy(values.astype(narrowest(size))), torch.from_numpy(offsets))


def narrowest(size: int) -> type[np.integer]:
    """int16 where it holds 0 .. size - 1, else int32; never uint8, which torch would take for a mask."""
    return np.int16 if size <= 2**15 else np.int32
