"""A data set is a folder: parquet tables and dataset.yaml. Reading, writing, checking (ARCHITECTURE.md, Contracts).

dataset = tables.read("shop/", splits=("train", "valid"))
dataset.sessions.head()
"""

import os
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from rgalign.data import split as splitting
from rgalign.data.checks import Report, check
from rgalign.data.parquet import Table, is_there
from rgalign.data.schema import KINDS, SPLITS, TABLES, YAML_FILE, as_types, read_yaml, to_frame, to_table

__all__ = ["KINDS", "Dataset", "Report", "TableError", "check", "read", "write"]

ROW_GROUP = 131_072  # rows; fixed, so that the same tables give the same bytes
ROWS_AT_ONCE = 2**20  # rows looked up together: each look-up hashes all session ids anew


class TableError(ValueError):
    """A data set folder that cannot be used; the message lists every fault and the next command."""


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


def read(folder: str | Path, *, splits: Sequence[str] = ("train", "valid"), truth: bool = False) -> Dataset:
    """The tables of `folder`: only sessions of `splits`, and what belongs to them; `truth` only when asked for.

    An empty split column is filled in by time (`split.resolve`). Raises TableError with every fault `check` finds,
    ValueError for an unknown split.
    """
    folder = Path(folder)
    if not splits or not set(splits) <= set(SPLITS):
        raise ValueError(f"splits is {tuple(splits)}; expected one or more of {', '.join(SPLITS)}")
    report = check(folder)
    if report.faults:
        raise TableError(str(report))
    meta = read_yaml(folder / YAML_FILE)
    kinds = dict(meta["features"])
    sessions = _sessions(folder, kinds, meta, splits)
    ids = pa.array(sessions["session_id"])
    impressions = _by_list(_load(folder, "impressions", kinds, ids), ids)
    others = {
        name: to_frame(_load(folder, name, kinds, ids))
        for name in ("transcripts", "labels", "truth")
        if is_there(folder, name) and (name != "truth" or truth)
    }
    if truth and "truth" not in others:
        raise TableError(f"{folder}/ has no truth.parquet: only a simulated data set knows the truth")
    intents = to_frame(_load(folder, "intents", kinds))
    return Dataset(meta["name"], kinds, meta, intents, sessions, impressions, **others)


def write(dataset: Dataset, folder: str | Path) -> None:
    """Writes `dataset` as a folder, all of it or nothing; the same data set gives the same bytes.

    Replaces a data set that is already there. Raises FileExistsError where the folder holds anything else.
    """
    folder = Path(folder)
    _refuse_foreign(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    fresh.mkdir()
    try:
        for name in TABLES:
            if (frame := getattr(dataset, name)) is not None:
                table = to_table(frame, name, dataset.kinds)
                path = fresh / f"{name}.parquet"
                pq.write_table(table, path, compression="zstd", row_group_size=ROW_GROUP, write_page_checksum=True)
        # `files` holds checksums of the folder the data came from: they say nothing about these bytes.
        meta = {key: value for key, value in dataset.meta.items() if key != "files"}
        meta |= {"name": dataset.name, "features": dict(dataset.kinds)}
        text = yaml.safe_dump(meta, sort_keys=False, allow_unicode=True, width=120)
        (fresh / YAML_FILE).write_text(text, encoding="utf-8")
        _put_in_place(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _sessions(folder: Path, kinds: dict[str, str], meta: dict, splits: Sequence[str]) -> pd.DataFrame:
    file = Table(folder, "sessions")
    keys = to_frame(as_types(file.read(["timestamp", "split"]), "sessions", kinds))
    part = splitting.resolve(keys, meta)
    wanted = part.isin(list(splits)).to_numpy(dtype=bool)
    batches, row = [], 0
    for batch in file.iter_batches(ROW_GROUP):
        batches.append(batch.filter(pa.array(wanted[row : row + len(batch)])))
        row += len(batch)
    table = pa.Table.from_batches(batches)
    sessions = to_frame(as_types(table, "sessions", kinds))
    sessions["split"] = part[wanted].reset_index(drop=True)
    return sessions


def _load(folder: Path, name: str, kinds: dict[str, str], sessions: pa.Array | None = None) -> pa.Table:
    """One table in its types; rows of other sessions left where they are, rows without a session kept."""
    batches = []
    file = Table(folder, name)
    for batch in file.iter_batches(ROWS_AT_ONCE):
        part = as_types(pa.Table.from_batches([batch]), name, kinds)
        if sessions is not None and "session_id" in part.column_names:
            known = pc.is_in(part["session_id"], value_set=sessions)
            part = part.filter(pc.or_(known, pc.is_null(part["session_id"])))
        batches.append(part)
    if not batches:
        return as_types(file.read(), name, kinds)
    return pa.concat_tables(batches).combine_chunks()


def _by_list(table: pa.Table, sessions: pa.Array) -> pd.DataFrame:
    """Impressions grouped in the order of `sessions`, by position inside; a sorted table is left as it is."""
    session = pc.index_in(table["session_id"], value_set=sessions).to_numpy().astype(np.int64)
    rank = session * 2**16 + table["position"].to_numpy()
    if (np.diff(rank) < 0).any():
        table = table.take(pa.array(np.argsort(rank, kind="stable")))
    return to_frame(table)


def _refuse_foreign(folder: Path) -> None:
    try:
        folder.stat()  # a link that leads to itself is an error here; Path.exists takes it for nothing
    except FileNotFoundError:
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; expected a folder for a data set")
    ours = {YAML_FILE, *(f"{name}.parquet" for name in TABLES)}
    found = {path.name for path in folder.iterdir()}
    foreign = sorted(found - ours) or (sorted(found) if found and YAML_FILE not in found else [])
    if foreign:
        raise FileExistsError(
            f"{folder}/ is not empty and holds more than a data set (first: {', '.join(foreign[:3])}). "
            "Nothing was written. Name a new folder."
        )


def _put_in_place(fresh: Path, folder: Path) -> None:
    """Two renames: the old data set aside, the new one in. A folder that is a link keeps being one."""
    folder = folder.resolve()
    if not folder.exists():
        os.replace(fresh, folder)
        return
    old = fresh.with_suffix(".old")
    os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old)
