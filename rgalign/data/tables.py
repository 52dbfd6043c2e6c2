"""A data set is a folder: parquet tables and dataset.yaml. Reading, writing, checking (ARCHITECTURE.md, Contracts)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from rgalign.data import split as splitting
from rgalign.data.checks import check
from rgalign.data.schema import (
    NEEDED_TABLES,
    REQUIRED,
    SPLITS,
    STRING,
    TABLES,
    YAML_FILE,
    Table,
    as_types,
    is_there,
    read_yaml,
    regrouped,
    to_frame,
    to_table,
    typed_batches,
)
from rgalign.errors import UserError
from rgalign.run.artifacts import atomic

ROW_GROUP = 131_072  # rows; fixed, so that the same tables give the same bytes
ROWS_AT_ONCE = 2**20  # rows looked up together: each look-up hashes all session ids again
KEYS_AT_ONCE = 2**22  # the same where the ids alone are read


class TableError(UserError, ValueError):
    """A data set folder that cannot be used; the message lists every error and the next command."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """The tables of one data set in memory, columns in pyarrow types (`schema.known_columns`).

    kinds        feature column of `sessions` -> categorical | numeric | text | history, in dataset.yaml's order
    meta         the whole of dataset.yaml, plain Python values
    impressions  grouped by session in the order of `sessions`, by position inside a session
    """

    name: str
    kinds: dict[str, str]
    meta: dict
    intents: pd.DataFrame
    sessions: pd.DataFrame
    impressions: pd.DataFrame
    transcripts: pd.DataFrame | None = None
    labels: pd.DataFrame | None = None
    truth: pd.DataFrame | None = None


def checked(folder: str | Path) -> dict:
    """dataset.yaml of a data set without an error. Raises TableError with every error `check` finds."""
    report = check(folder)
    if report.errors:
        raise TableError(str(report))
    return read_yaml(Path(folder) / YAML_FILE)


def read(
    folder: str | Path,
    *,
    splits: Sequence[str] = ("train", "valid"),
    truth: bool = False,
    columns: Sequence[str] | None = None,
    verified: bool = False,
) -> Dataset:
    """The tables of `folder`: only sessions of `splits`, and what belongs to them; `truth` only when asked for.

    columns   of the sessions, beside those that every data set has; None for all, and names it lacks are left out. Most
              of a data set's memory are its feature columns
    verified  `check` has just found no error in it, and does not run again
    An empty split column is filled in by time (`split.resolve`). Raises TableError with every error `check` finds,
    ValueError for an unknown split.
    """
    _assert_known(splits)
    meta = read_yaml(Path(folder) / YAML_FILE) if verified else checked(folder)
    return _read(Path(folder), meta, splits, ("transcripts", "labels", *(["truth"] if truth else [])), columns=columns)


def excerpt(
    folder: str | Path,
    columns: Sequence[str],
    *,
    splits: Sequence[str] = ("train", "valid"),
    truth: bool = False,
    transcripts: bool = False,
    whole_lists: bool = False,
) -> Dataset:
    """`read` for a run's own tables, with no more in memory than a stage uses. They are not checked again: notebook 01
    did, and `open_stage` raises for what was altered since.

    columns      of the sessions, see `read`
    whole_lists  False: of the impressions those that were clicked. The encoded lists (data.shards) have all of them
    Raises ValueError for an unknown split.
    """
    _assert_known(splits)
    folder, others = Path(folder), ["labels", *["transcripts"] * transcripts, *["truth"] * truth]
    return _read(folder, read_yaml(folder / YAML_FILE), splits, others, columns=columns, clicks_only=not whole_lists)


def sessions(folder: str | Path, ids: Iterable[str], columns: Sequence[str] | None = None) -> pd.DataFrame:
    """The sessions of these ids in their order, of any split; `check` comes before it. columns: see `read`.

    They are taken from the file batch by batch. Raises KeyError where one is not there.
    """
    folder, wanted = Path(folder), pa.array(list(ids), STRING)
    parts = _session_parts(folder, SPLITS, columns)
    found = pa.concat_tables([part.filter(pc.is_in(part["session_id"], value_set=wanted)) for part in parts])
    places = pc.index_in(wanted, value_set=found["session_id"].combine_chunks())
    if places.null_count:
        raise KeyError(f"{folder}/ has no session {wanted.filter(places.is_null())[0].as_py()!r}")
    return to_frame(found.take(places))


def user_ids(folder: str | Path, splits: Sequence[str]) -> set[str]:
    """The users with a session in these splits; nothing else of the sessions is read but time and split."""
    _assert_known(splits)
    return set().union(*(pc.unique(part["user_id"]).to_pylist() for part in _session_parts(Path(folder), splits, ())))


def head(folder: str | Path, sessions: int, *, splits: Sequence[str] = ("train", "valid")) -> Dataset:
    """The first so many sessions of `splits`, every column, and what belongs to them; `check` comes before it."""
    return _read(Path(folder), read_yaml(Path(folder) / YAML_FILE), splits, ("transcripts", "labels"), most=sessions)


def write(dataset: Dataset, folder: str | Path) -> None:
    """Writes `dataset` as a folder, all of it or nothing; the same data set gives the same bytes.

    Replaces a data set that is already there. Raises FileExistsError where the folder holds anything else.
    """
    meta = {**dataset.meta, "name": dataset.name, "features": dict(dataset.kinds)}
    with _new_folder(folder, meta) as fresh:
        for name in TABLES:
            if (frame := getattr(dataset, name)) is not None:
                _write_table(fresh / f"{name}.parquet", [to_table(frame, name, dataset.kinds)])


def copy(source: str | Path, folder: str | Path, meta: Mapping) -> None:
    """Writes what `write` would of all that `read` finds in `source`, every split and the truth, but row group by row
    group: whole in memory are the sessions' ids, times and splits, and impressions that have to be sorted.

    meta  the copy's dataset.yaml: what `checked` said of `source`, or a change of it
    Raises FileExistsError as `write` does.
    """
    source, kinds = Path(source), dict(meta["features"])
    ids = pa.chunked_array(as_types(Table(source, "sessions").read(["session_id"]), "sessions", kinds)["session_id"])
    ids = ids.combine_chunks()
    with _new_folder(folder, meta) as fresh:
        for name in (name for name in TABLES if is_there(source, name)):
            if name == "sessions":
                parts = _session_parts(source, SPLITS)
            elif name == "impressions" and not _in_order(source, kinds, ids):
                parts = [_by_list(_load(source, name, kinds), ids)]
            else:  # a transcript alone may name a session that is not there
                parts = _parts(source, name, kinds, ids if name == "transcripts" else None)
            _write_table(fresh / f"{name}.parquet", parts)


@contextmanager
def _new_folder(folder: str | Path, meta: Mapping) -> Iterator[Path]:
    """A fresh folder that, with `meta` as its dataset.yaml, takes the place of `folder` when the block ends well: of
    another data set, or of nothing. A folder that is a link keeps being one. Raises FileExistsError."""
    folder = Path(folder)
    try:
        folder.stat()  # a link that leads to itself is an error here; Path.exists takes it for nothing
        found = {path.name for path in folder.iterdir()} if folder.is_dir() else None
    except FileNotFoundError:
        found = set()
    if found is None:
        raise FileExistsError(f"{folder} is a file; expected a folder for a data set")
    others = sorted(found - {YAML_FILE, *(f"{name}.parquet" for name in TABLES)})
    if others or (found and YAML_FILE not in found):
        first = ", ".join((others or sorted(found))[:3])
        raise FileExistsError(
            f"{folder}/ is not empty and holds more than a data set (first: {first}). "
            "Nothing was written. Name a new folder."
        )
    with atomic(folder.resolve()) as fresh:
        fresh.mkdir()
        yield fresh
        # `files` holds checksums of the folder the data came from: they say nothing about these bytes.
        kept = {key: value for key, value in meta.items() if key != "files"}
        text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=120)
        (fresh / YAML_FILE).write_text(text, encoding="utf-8")


def _assert_known(splits: Sequence[str]) -> None:
    if not splits or not set(splits) <= set(SPLITS):
        raise ValueError(f"splits is {tuple(splits)}; expected one or more of {', '.join(SPLITS)}")


def _read(
    folder: Path,
    meta: dict,
    splits: Sequence[str],
    others: Sequence[str],
    *,
    columns: Sequence[str] | None = None,
    clicks_only: bool = False,
    most: int | None = None,
) -> Dataset:
    kinds = dict(meta["features"])
    sessions = to_frame(pa.concat_tables(_session_parts(folder, splits, columns, most)))
    ids = pa.array(sessions["session_id"])
    impressions = to_frame(_by_list(_load(folder, "impressions", kinds, ids, clicks_only=clicks_only), ids))
    if "truth" in others and not is_there(folder, "truth"):
        raise TableError(f"{folder}/ has no truth.parquet: only a simulated data set knows the truth")
    found = {name: to_frame(_load(folder, name, kinds, ids)) for name in others if is_there(folder, name)}
    intents = to_frame(_load(folder, "intents", kinds))
    return Dataset(meta["name"], kinds, meta, intents, sessions, impressions, **found)


def _session_parts(
    folder: Path, splits: Sequence[str], columns: Sequence[str] | None = None, most: int | None = None
) -> Iterator[pa.Table]:
    """Sessions of `splits`, the first `most` of them, in pieces and in their types, the split filled in."""
    names = Table(folder, "sessions").schema_arrow.names
    if columns is not None:
        names = [name for name in names if name in {*REQUIRED["sessions"], *columns}]
    numbers, there = [SPLITS.index(name) for name in splits], 0
    for batch, code in splitting.session_batches(folder, names, ROW_GROUP):
        rows = np.flatnonzero(np.isin(code, numbers))[: None if most is None else most - there]
        there += len(rows)
        split = pa.array(np.array(SPLITS, dtype=object)[code[rows]], STRING)
        yield batch.take(rows).set_column(names.index("split"), "split", split)
        if there == most:
            return


def _load(
    folder: Path, name: str, kinds: dict[str, str], sessions: pa.Array | None = None, *, clicks_only: bool = False
) -> pa.Table:
    parts = list(_parts(folder, name, kinds, sessions, clicks_only=clicks_only))
    return pa.concat_tables(parts).combine_chunks() if parts else as_types(Table(folder, name).read(), name, kinds)


def _parts(
    folder: Path, name: str, kinds: dict[str, str], sessions: pa.Array | None, *, clicks_only: bool = False
) -> Iterator[pa.Table]:
    """One table in its types; rows of other sessions left where they are, rows without a session kept."""
    file = Table(folder, name)
    if sessions is None or "session_id" not in file.schema_arrow.names:
        yield from typed_batches(folder, name, ROW_GROUP, kinds=kinds)
        return
    for rows in regrouped(file.iter_batches(ROW_GROUP), ROWS_AT_ONCE):
        part = as_types(rows, name, kinds)
        part = part.filter(pc.equal(part["clicked"], 1)) if clicks_only else part
        known = pc.is_in(part["session_id"], value_set=sessions)
        yield part.filter(pc.or_(known, pc.is_null(part["session_id"])))


def _by_list(table: pa.Table, sessions: pa.Array) -> pa.Table:
    """Impressions grouped in the order of `sessions`, by position inside; a sorted table is left as it is."""
    places = _places(table, sessions)
    return table.take(pa.array(np.argsort(places, kind="stable"))) if (np.diff(places) < 0).any() else table


def _in_order(folder: Path, kinds: dict[str, str], sessions: pa.Array) -> bool:
    """Whether `_by_list` would leave the impressions as they are."""
    before = np.zeros(1, np.int64)
    batches = Table(folder, "impressions").iter_batches(ROW_GROUP, ["session_id", "position"])
    for rows in regrouped(batches, KEYS_AT_ONCE):
        places = _places(as_types(rows, "impressions", kinds), sessions)
        if (np.diff(places, prepend=before) < 0).any():
            return False
        before = places[-1:] if len(places) else before
    return True


def _places(table: pa.Table, sessions: pa.Array) -> np.ndarray:
    """(rows,) ascending where impressions are grouped in the order of `sessions` and by position."""
    session = pc.index_in(table["session_id"], value_set=sessions).to_numpy().astype(np.int64)
    return session * 2**16 + table["position"].to_numpy()


def _write_table(path: Path, parts: Iterable[pa.Table]) -> None:
    """One parquet file; its bytes tell nothing of how the rows were handed in.

    A table that may be missing is left out where it has no row: `check` takes an empty one for a mistake.
    """
    groups = regrouped(parts, ROW_GROUP)
    first = next(groups)
    if not len(first) and path.stem not in NEEDED_TABLES:
        return
    with pq.ParquetWriter(path, first.schema, compression="zstd", write_page_checksum=True) as writer:
        writer.write_table(first, ROW_GROUP)
        for group in groups:
            writer.write_table(group, ROW_GROUP)
