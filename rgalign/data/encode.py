"""Tables to tensors: sessions with their impressions as Lists, the knowledge base as Intents."""

import zlib

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch

from rgalign.data.features import (
    FIRST,
    UNKNOWN,
    FeatureSpace,
    Field,
    Rows,
    as_history,
    as_keys,
    as_numbers,
    as_strings,
    assert_in_split,
    column_names,
    column_of,
    ids_of,
    most_recent,
)
from rgalign.data.lists import PADDING, Bag, Intents, Lists, concat_lists

ROWS = 65_536  # sessions encoded at once; bounds the memory, changes no byte
SPLIT_OF = {"train": "train", "dev": "train", "valid": "valid", "test": "test"}
# Marks (\pM) belong to a word: without them Thai and Hindi words fall apart at their vowels.
BETWEEN_WORDS = r"[^\pL\pM\pN_]+"
IMPRESSION_COLUMNS = ("session_id", "intent_id", "position", "clicked")


def encode_lists(space: FeatureSpace, sessions: Rows, impressions: Rows, intents: pd.DataFrame, part: str) -> Lists:
    """The impression lists of one part, one a session, in the order of `sessions`; a session shown nothing is empty.

    intents  the KB: candidates are its row numbers
    Raises ValueError for a session of another split, an impression of a session or of an intent that is not there, and
    two impressions at one position.
    """
    if part not in SPLIT_OF:
        raise ValueError(f"part is {part!r}; expected one of {', '.join(SPLIT_OF)}")
    assert_in_split(sessions, SPLIT_OF[part], f"part {part!r}")
    sessions, impressions = as_table(sessions, session_columns(space)), as_table(impressions, IMPRESSION_COLUMNS)
    rows = session_rows(impressions, sessions)
    if others := (rows < 0).sum():
        raise ValueError(f"{others} impressions are of sessions that are not among these {len(sessions)}")
    order = np.argsort(rows, kind="stable")
    impressions, rows = impressions.take(pa.array(order)), rows[order]
    kb, encoded = ids_of(intents, "intent_id"), []
    for start in range(0, max(len(sessions), 1), ROWS):
        first, end = np.searchsorted(rows, (start, start + ROWS))
        shown = impressions.slice(first, end - first)
        encoded.append(_encode(space, sessions.slice(start, ROWS), shown, rows[first:end] - start, kb, part))
    return encoded[0] if len(encoded) == 1 else concat_lists(encoded)


def _encode(
    space: FeatureSpace, sessions: pa.Table, impressions: pa.Table, rows: np.ndarray, kb: pa.Array, part: str
) -> Lists:
    """rows: (impressions,) the row of `sessions` that each belongs to;  kb: ids in the order of intents.parquet."""
    candidates, clicked = _candidates(impressions, rows, len(sessions), kb)
    size = max(space.field_sizes, default=1)
    fields = [_field(field, column_of(sessions, field.name), size) for field in space.fields]
    histories = []
    for field in space.histories:
        of_element, elements, lengths = as_history(column_of(sessions, field.name))
        recent = most_recent(of_element, lengths, space.max_history)
        ids = _lookup(elements.filter(pa.array(recent)), field, field.size)
        histories.append(as_bag(of_element[recent], ids.numpy(), bags=len(sessions), size=field.size))
    texts = [column_of(sessions, name) for name in space.texts]
    return Lists(
        part=part,
        session_id=as_strings(ids_of(sessions, "session_id")),
        user_id=as_strings(ids_of(sessions, "user_id")),
        fields=torch.stack(fields, dim=1) if fields else torch.empty((len(sessions), 0), dtype=torch.int16),
        history=tuple(histories),
        words=_bag_of_words(space, texts, len(sessions)),
        candidates=candidates,
        clicked=clicked,
    )


def encode_intents(space: FeatureSpace, intents: pd.DataFrame) -> Intents:
    """The KB, row by row; words are those of title and description."""
    size = max(space.intent_ids_size, space.category_size)
    texts = [column_of(intents, name) for name in ("title", "description")]
    known = Field("category", "categorical", space.categories, missing=space.missing_category)
    return Intents(
        intent_id=as_strings(ids_of(intents, "intent_id")),
        valid_from=pd.to_datetime(intents["valid_from"]).to_numpy(dtype="datetime64[us]"),
        id=_lookup(column_of(intents, "intent_id"), Field("intent_id", "categorical", space.intents), size),
        category=_lookup(column_of(intents, "category"), known, size),
        words=_bag_of_words(space, texts, len(intents)),
    )


def session_columns(space: FeatureSpace) -> tuple[str, ...]:
    """Columns of `sessions` that encoding reads."""
    features = [*(field.name for field in space.fields), *(field.name for field in space.histories), *space.texts]
    return tuple(dict.fromkeys(["session_id", "user_id", *features]))


def as_table(rows: Rows, names: tuple[str, ...]) -> pa.Table:
    """These columns in arrow. Raises ValueError for one that is not there."""
    there = column_names(rows)
    if absent := [name for name in names if name not in there]:
        raise ValueError(f"there is no column {', '.join(absent)}; the table has {', '.join(there)}")
    return pa.table({name: column_of(rows, name) for name in names})


def session_rows(impressions: pa.Table, sessions: pa.Table) -> np.ndarray:
    """(impressions,) the row of each impression's session, -1 where it is not there."""
    found = pc.index_in(ids_of(impressions, "session_id"), value_set=ids_of(sessions, "session_id"))
    return pc.fill_null(found, -1).to_numpy(zero_copy_only=False).astype(np.int64)


def _candidates(
    impressions: pa.Table, rows: np.ndarray, sessions: int, kb: pa.Array
) -> tuple[torch.Tensor, torch.Tensor]:
    found = pc.index_in(ids_of(impressions, "intent_id"), value_set=kb)
    position = column_of(impressions, "position").to_numpy(zero_copy_only=False).astype(np.int64)
    if found.null_count:
        orphans = ids_of(impressions, "intent_id").filter(found.is_null()).unique().to_pylist()
        raise ValueError(f"impressions show {len(orphans)} intents that the KB does not have (first: {orphans[0]!r})")
    if len(position) and position.min() < 0:
        raise ValueError(f"position is {position.min()} in impressions; expected 0, 1, .. from the top of the list")
    shape = (sessions, int(position.max(initial=0)) + 1)
    candidates = np.full(shape, PADDING, narrowest(len(kb)))
    clicked = np.zeros(shape, bool)
    candidates[rows, position] = found.to_numpy(zero_copy_only=False)
    clicked[rows, position] = column_of(impressions, "clicked").cast(pa.int8()).to_numpy(zero_copy_only=False) == 1
    if hidden := len(rows) - int((candidates != PADDING).sum()):
        raise ValueError(f"{hidden} impressions share session and position with another")
    return torch.from_numpy(candidates), torch.from_numpy(clicked)


def _field(field: Field, array: pa.Array, size: int) -> torch.Tensor:
    """(rows,) ids of a column; size: that of the largest vocabulary, so that all columns have one type."""
    if field.kind == "categorical":
        return _lookup(array, field, size)
    numbers = as_numbers(array) if field.kind == "numeric" else as_history(array)[2]
    ids = np.full(len(numbers), UNKNOWN)
    if field.edges is not None:
        ids = FIRST + np.searchsorted(field.edges, numbers, side="right")
    ids[np.isnan(numbers)] = field.empty
    return torch.from_numpy(ids.astype(narrowest(size)))


def _lookup(array: pa.Array, field: Field, size: int) -> torch.Tensor:
    codes, keys = as_keys(array)
    ids = [field.empty if key is None else field.ids.get(key, UNKNOWN) for key in keys]
    return torch.from_numpy(np.array(ids, narrowest(size))[codes])


def _bag_of_words(space: FeatureSpace, texts: list[pa.Array], bags: int) -> Bag:
    rows, buckets = hashed_words(texts, buckets=space.word_buckets, pairs=space.word_pairs)
    return as_bag(rows, buckets, bags=bags, size=space.word_buckets)


def hashed_words(texts: list[pa.Array], *, buckets: int, pairs: bool) -> tuple[np.ndarray, np.ndarray]:
    """Words of several text columns as one bag a row: (rows, buckets), each bucket once a row, both ascending.

    A word is a run of letters, marks, digits and underscores, in lower case; with `pairs` every two neighbours of a
    column count as a word too. The bucket is the word's CRC-32 modulo `buckets`: the same in every process, unlike
    Python's hash(). Order and repetition are lost.
    """

    def bucket(words: list[str]) -> np.ndarray:
        return np.array([zlib.crc32(word.encode()) % buckets for word in words], dtype=np.int64)

    if not texts:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    text = pa.concat_arrays([text.cast(pa.large_string()) for text in texts])
    split = pc.split_pattern_regex(pc.utf8_lower(pc.fill_null(text, "")), BETWEEN_WORDS)
    rows = np.repeat(np.arange(len(text)), pc.list_value_length(split).to_numpy(zero_copy_only=False))
    encoded = split.flatten().dictionary_encode()
    codes, words = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), encoded.dictionary.to_pylist()
    if "" in words:  # a text that starts or ends between words
        kept = codes != words.index("")
        rows, codes = rows[kept], codes[kept]
    of_row = rows % max(len(texts[0]), 1)  # the columns lie one after the other
    found = [of_row * buckets + bucket(words)[codes]]
    if pairs:
        neighbours = rows[1:] == rows[:-1]
        both = (codes[:-1] * len(words) + codes[1:])[neighbours]
        unique, inverse = np.unique(both, return_inverse=True)
        joined = [f"{words[pair // len(words)]} {words[pair % len(words)]}" for pair in unique.tolist()]
        found.append(of_row[1:][neighbours] * buckets + bucket(joined)[inverse])
    ordered = np.sort(np.concatenate(found))  # with the next line eight times as fast as np.unique
    return np.divmod(ordered[np.diff(ordered, prepend=-1) != 0], buckets)


def as_bag(rows: np.ndarray, values: np.ndarray, *, bags: int, size: int) -> Bag:
    """A Bag from (row, value) pairs with ascending rows; size: number of different values."""
    offsets = np.zeros(bags + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=bags), out=offsets[1:])
    return Bag(torch.from_numpy(values.astype(narrowest(size))), torch.from_numpy(offsets))


def narrowest(size: int) -> type[np.integer]:
    """int16 where it holds 0 .. size - 1, else int32; never uint8, which torch would take for a mask."""
    return np.int16 if size <= 2**15 else np.int32
