"""Which id stands for which value: a FeatureSpace, fitted on training sessions alone, in memory or in batches.

A value that was not seen often enough to be learnt shares one id, unknown, with all values that later turn up for the
first time; so unknown has a trained embedding. An empty cell is a value like others.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from rgalign.errors import nearest, safe_repr

Rows = pd.DataFrame | pa.Table | pa.RecordBatch
FEW = 8  # rows of one request
MISSING, UNKNOWN, FIRST = 0, 1, 2  # ids: no value, a value that is not in the vocabulary, the first value of it


@dataclass(frozen=True)
class Field:
    """One column of ids: 0 missing, 1 unknown, from 2 the values (categorical, history) or the bins (numeric, length).

    name: the column of `sessions`, which for a length is the history itself
    edges: bin i holds edges[i - 1] <= x < edges[i]; None where train had no number at all: every number is unknown.
    missing: train has an empty cell; else it would have an id that nothing trains
    """

    name: str
    kind: str  # categorical | numeric | history | length
    values: tuple[str, ...] = ()
    edges: tuple[float, ...] | None = None
    missing: bool = True

    @property
    def empty(self) -> int:
        """The id of an empty cell."""
        return MISSING if self.missing else UNKNOWN

    @property
    def size(self) -> int:
        """Number of ids, the two reserved ones included."""
        return FIRST + len(self.values) + (0 if self.edges is None else len(self.edges) + 1)

    @cached_property
    def ids(self) -> dict[str, int]:
        return {value: FIRST + i for i, value in enumerate(self.values)}


@dataclass(frozen=True)
class FeatureSpace:
    """Vocabularies and bins of one training set; everything that encoding needs and nothing else.

    fields      categorical, numeric and length-of-history columns, in the order of dataset.yaml
    histories   history columns
    texts       text columns, hashed together into one bag of words
    intents     intents clicked in train, by falling number of clicks
    categories  categories of those intents;  missing_category  some of them have none
    """

    fields: tuple[Field, ...]
    histories: tuple[Field, ...]
    texts: tuple[str, ...]
    intents: tuple[str, ...]
    categories: tuple[str, ...]
    word_buckets: int
    word_pairs: bool
    max_history: int
    missing_category: bool = True

    # Below: the vocabulary sizes of Lists.fields, of Lists.history, of Intents.id and Intents.category.

    @property
    def field_names(self) -> tuple[str, ...]:
        return tuple(f"{field.name}.length" if field.kind == "length" else field.name for field in self.fields)

    @property
    def field_sizes(self) -> tuple[int, ...]:
        return tuple(field.size for field in self.fields)

    @property
    def history_sizes(self) -> tuple[int, ...]:
        return tuple(field.size for field in self.histories)

    @property
    def intent_ids_size(self) -> int:
        return FIRST + len(self.intents)

    @property
    def category_size(self) -> int:
        return FIRST + len(self.categories)

    def to_json(self) -> str:
        """The same space gives the same text, byte for byte."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    @staticmethod
    def from_json(text: str) -> "FeatureSpace":
        def tuples(read: dict) -> dict:
            return {key: tuple(value) if isinstance(value, list) else value for key, value in read.items()}

        raw = json.loads(text, object_hook=tuples)
        return FeatureSpace(**raw | {key: tuple(Field(**own) for own in raw[key]) for key in ("fields", "histories")})


def fit_space(
    sessions: Rows | Iterable[Rows],
    intents: pd.DataFrame,
    train_impressions: Rows | Iterable[Rows],
    kinds: dict[str, str],
    *,
    drop: Collection[str] = (),
    min_count: int = 2,
    numeric_bins: int = 16,
    word_buckets: int = 4096,
    word_pairs: bool = False,
    max_history: int = 50,
    seed: int = 0,
    sample: int = 500_000,
) -> FeatureSpace:
    """The vocabularies and bins of the training sessions; tables whole, or in batches.

    drop          feature columns to leave out
    min_count     a categorical or history value seen less often is unknown (so the unknown id is trained too)
    numeric_bins  quantile bins; every edge is a value of the column, so that no bin is empty in train
    word_pairs    two neighbouring words are hashed as a word too
    max_history   values of a history that count, the last ones; its length counts them all
    sample        rows that quantiles are taken from: exact up to here, beyond it a sample drawn with `seed`
    An intent that was never clicked in train gets no id of its own: its embedding would stay as it was initialised, or
    learn "never clicked", which is false the day the intent is new. Its text and category distinguish it; a
    category counts as seen when one of its intents was clicked.
    Raises ValueError for an unknown name in `drop`, a column that is not there, a session that is not of train, an
    impression of another session.
    """
    chosen = _kept(kinds, drop)
    read = {"numeric": as_numbers, "history": lambda array: as_history(array)[2]}  # of a history its length
    numeric = [name for name, kind in chosen.items() if kind in read]
    counts = {name: Counter() for name, kind in chosen.items() if kind in ("categorical", "history")}
    numbers, gaps = _Sample(len(numeric), sample, np.random.default_rng(seed)), np.zeros(len(numeric), int)
    session_hashes = [np.empty(0, np.uint64)]
    for batch in _batches(sessions):
        if absent := [name for name in ("session_id", *chosen) if name not in column_names(batch)]:
            raise ValueError(f"sessions have no column {', '.join(absent)}; dataset.yaml declares it as a feature")
        assert_in_split(batch, "train", "a feature space")
        session_hashes.append(hashes(column_of(batch, "session_id")))
        for name in counts:
            counts[name].update(_tally(column_of(batch, name), chosen[name], max_history))
        arrays = [read[chosen[name]](column_of(batch, name)) for name in numeric]
        found = np.stack(arrays, axis=1) if arrays else np.empty((len(batch), 0))
        numbers.add(found)
        gaps += np.isnan(found).sum(axis=0)
    clicks = _clicks(train_impressions, np.unique(np.concatenate(session_hashes)))
    of_values, of_numbers = {}, {}  # column -> Field
    for name, counted in counts.items():
        of_values[name] = Field(name, chosen[name], _vocabulary(counted, min_count), missing=counted[None] > 0)
    for name, column, missing in zip(numeric, numbers.rows().T, (gaps > 0).tolist(), strict=True):
        kind = "numeric" if chosen[name] == "numeric" else "length"
        of_numbers[name] = Field(name, kind, edges=_edges(column, numeric_bins), missing=missing)
    fields = {name: of_numbers.get(name) or of_values[name] for name, kind in chosen.items() if kind != "text"}
    codes, categories = as_keys(column_of(intents, "category"))
    by_category = Counter()
    for intent, code in zip(intents["intent_id"], codes, strict=True):
        by_category[categories[code]] += clicks[intent]
    return FeatureSpace(
        fields=tuple(fields.values()),
        histories=tuple(field for field in of_values.values() if field.kind == "history"),
        texts=tuple(name for name, kind in chosen.items() if kind == "text"),
        intents=_vocabulary(clicks, 1),
        categories=_vocabulary(by_category, 1),
        missing_category=by_category[None] > 0,
        word_buckets=word_buckets,
        word_pairs=word_pairs,
        max_history=max_history,
    )


def _kept(kinds: dict[str, str], drop: Collection[str]) -> dict[str, str]:
    if unknown := [f"  {safe_repr(name)}{nearest(name, kinds, 0)}" for name in drop if name not in kinds]:
        raise ValueError("drop names columns that dataset.yaml does not declare:\n" + "\n".join(unknown))
    if not (kept := {name: kind for name, kind in kinds.items() if name not in drop}):
        raise ValueError(f"drop leaves none of the {len(kinds)} feature columns: a ranker needs at least one")
    return kept


def _batches(rows: Rows | Iterable[Rows]) -> Iterator[Rows]:
    return iter([rows]) if isinstance(rows, Rows) else iter(rows)


def column_names(rows: Rows) -> list[str]:
    return list(rows.columns) if isinstance(rows, pd.DataFrame) else rows.schema.names


def assert_in_split(sessions: Rows, split: str, what: str) -> None:
    """Raises ValueError where the sessions say that one of them is of another split."""
    found = set(column_of(sessions, "split").unique().to_pylist()) if "split" in column_names(sessions) else set()
    if others := sorted(map(str, found - {split})):
        raise ValueError(f"{what} is made of split {split!r} alone; these sessions have split {', '.join(others)}")


def _tally(array: pa.Array, kind: str, max_history: int) -> Counter:
    """How often each value is there, None for empty cells or elements."""
    if kind == "history":
        rows, array, lengths = as_history(array)
        array = array.filter(pa.array(most_recent(rows, lengths, max_history)))
    codes, keys = as_keys(array)
    found = Counter()
    for key, count in zip(keys, np.bincount(codes, minlength=len(keys)).tolist(), strict=True):
        found[key] += count
    return +found  # without the zeros


def _edges(values: np.ndarray, bins: int) -> tuple[float, ...] | None:
    """Inner edges of the quantile bins; None where there is no number. A bin is closed below, open above."""
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return None
    inner = np.quantile(values, np.arange(1, bins) / bins, method="inverted_cdf")
    return tuple(float(edge) for edge in np.unique(inner) if edge > values.min())


def _vocabulary(counts: Counter, min_count: int) -> tuple[str, ...]:
    """By falling count, then by name: the same whatever the order of the batches. Empty (None) is not a value."""
    frequent = [(-count, value) for value, count in counts.items() if count >= min_count and value is not None]
    return tuple(value for _, value in sorted(frequent))


def _clicks(impressions: Rows | Iterable[Rows], session_hashes: np.ndarray) -> Counter:
    clicks = Counter()
    for batch in _batches(impressions):
        own = hashes(column_of(batch, "session_id").unique())
        if unknown := int((~among(own, session_hashes)).sum()):
            raise ValueError(f"impressions name {unknown} sessions that are not among the training sessions")
        clicked = pc.equal(column_of(batch, "clicked").cast(pa.int8()), 1)
        clicks.update(_tally(column_of(batch, "intent_id").filter(clicked), "categorical", 0))
    return clicks


class _Sample:
    """Up to `size` rows of a stream, drawn uniformly: those with the smallest random keys.

    A row's key depends on its place in the stream alone, so the sample does not depend on how the rows are batched.
    """

    def __init__(self, width: int, size: int, generator: np.random.Generator):
        self.size, self.generator = size, generator
        self.parts = [(np.empty(0), np.empty((0, width)))]  # keys, rows

    def add(self, rows: np.ndarray) -> None:
        self.parts.append((self.generator.random(len(rows)), rows))
        if sum(len(keys) for keys, _ in self.parts) > 2 * self.size:
            self.parts = [self._smallest()]

    def rows(self) -> np.ndarray:
        return self._smallest()[1]

    def _smallest(self) -> tuple[np.ndarray, np.ndarray]:
        keys, rows = (np.concatenate(columns) for columns in zip(*self.parts, strict=True))
        order = np.argsort(keys, kind="stable")[: self.size]
        return keys[order], rows[order]


# One column of a table, read as what its kind says: keys, numbers, a history.


def column_of(rows: Rows, name: str) -> pa.Array:
    """The column in one piece; NaN of pandas is null."""
    array = pa.array(rows[name], from_pandas=True) if isinstance(rows, pd.DataFrame) else rows[name]
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    # combine_chunks of no chunk at all still gives a ChunkedArray in some releases of pyarrow.
    return pa.concat_arrays(array.chunks or [pa.array([], array.type)]) if isinstance(array, pa.ChunkedArray) else array


def ids_of(rows: Rows, name: str) -> pa.Array:
    """A column of session, user or intent ids, in one type whatever the table's, so that two tables can be joined."""
    return column_of(rows, name).cast(pa.large_string())


def as_strings(ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """(rows,) numpy strings."""
    return ids.to_numpy(zero_copy_only=False).astype(str) if isinstance(ids, pa.Array) else ids.to_numpy().astype(str)


def as_keys(array: pa.Array) -> tuple[np.ndarray, list[str | None]]:
    """(codes, keys): keys[codes[row]] is the row's value as text; None where it is null, NaN or the empty string.

    A whole number has one spelling (1, 1.0): an integer column with gaps is float in pandas.
    """
    if len(array) <= FEW:  # keys may repeat; a dictionary costs more than these rows
        return np.arange(len(array)), [*map(_key, array.to_pylist()), None]
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
