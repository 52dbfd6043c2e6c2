"""The registry of data sources: what `data.source` of the params may name, how each is read, and how large it is.

A new source is one function that returns a Dataset and one entry of SOURCES (and its name in params_schema.Data).
"""

import csv
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from rgalign.data import cfpb, tables
from rgalign.data.candidates import sampled_dataset
from rgalign.data.schema import NEEDED_TABLES, Table, feature_kinds, typed_batches
from rgalign.data.tables import Dataset, TableError
from rgalign.errors import nearest, safe_repr
from rgalign.params_schema import Data
from rgalign.run.artifacts import ArtifactError, data_path
from rgalign.shopworld import world
from rgalign.shopworld.vocabulary import KINDS, TEXT_COLUMNS

PUBLISHED_SEED = 11  # the seed of the published msweb: withheld areas and valid users come out as they are there
ROWS = 2**20  # timestamps in memory at once


@dataclass(frozen=True)
class Size:
    """What is known of a data set before it is loaded.

    about    `sessions` is estimated from the beginning of a file
    rows     table -> rows, where the source has tables
    first, last  of the sessions' times; None where they are empty or unknown
    columns  feature columns, where the source declares them
    """

    sessions: int
    about: bool = False
    rows: tuple[tuple[str, int], ...] = ()
    first: datetime | None = None
    last: datetime | None = None
    columns: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{'about ' * self.about}{self.sessions:,} sessions"]
        parts += [f"{count:,} {name}" for name, count in self.rows if name != "sessions"]
        if self.first is not None:
            parts.append(f"{self.first:%Y-%m-%d} to {self.last:%Y-%m-%d}")
        if self.columns:
            parts.append(f"{len(self.columns)} feature columns: {', '.join(self.columns)}")
        return "; ".join(parts)


@dataclass(frozen=True)
class DataSource:
    """One name of `data.source`. Both functions take the params' section `data` and the path that it names, or None.

    read      all splits with their truth; a Path is a data set folder to copy, which may be larger than memory
    size      what is known of it without reading it
    features  its feature columns, where they are known before it is read
    """

    read: Callable[[Data, Path | None], Dataset | Path]
    size: Callable[[Data, Path | None], Size]
    features: tuple[str, ...] = ()


def write_dataset(folder: Path, data: Data, path: Path | None = None) -> dict[str, str]:
    """Writes the whole data set that `data` names, every split and, of a simulator, the truth; returns its kinds.

    folder  where it is written, all of it or nothing
    path    what data.path means here (artifacts.data_path); None for a source without files
    Raises TableError with every error of the files, ValueError where dataset.yaml says otherwise how lists were sampled
    and where data.features.drop names no feature column or leaves none (only the names are checked here).
    """
    source, drop = SOURCES[data.source], data.features.drop
    if source.features:  # before the minutes that a large world takes
        _check_drop(drop, source.features)
    found = source.read(data, path)
    meta = found.meta if isinstance(found, Dataset) else tables.checked(found)
    _check_drop(drop, meta["features"])
    if data.sampled_negatives is not None:
        sampled = data.sampled_negatives.model_dump()
        if (stated := dict(meta.get("sampled_negatives", sampled))) != sampled:
            raise ValueError(f"data.sampled_negatives is {sampled}, but dataset.yaml says {stated}")
        meta = {**meta, "sampled_negatives": sampled}
    if isinstance(found, Dataset):
        tables.write(replace(found, meta=meta), folder)
    else:
        tables.copy(found, folder, meta)
    return dict(meta["features"])


@cache  # a plan asks once a stage
def size_of(data: Data) -> Size:
    """The size of what `data` names: rows of parquet files by their metadata, of raw files by counting lines.

    Raises ArtifactError where it is not there or cannot be counted, with the command that says all that is wrong.
    """
    path = data_path(data.path) if data.path else None
    try:
        return SOURCES[data.source].size(data, path)
    except (OSError, ValueError, LookupError, csv.Error, pa.ArrowException) as error:
        more = f"; all that is wrong with it: python -m rgalign check {path}" if data.source == "folder" else ""
        found = f"data.path {path} cannot be read as {data.source}"
        raise ArtifactError(f"{found} ({' '.join(str(error).split())}){more}") from None


def _check_drop(drop: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    if unknown := [name for name in drop if name not in known]:
        lines = "\n".join(f"  {safe_repr(name)}{nearest(name, known)}" for name in unknown)
        raise ValueError(f"data.features.drop names what is no feature column:\n{lines}")
    if set(known) <= set(drop):
        raise ValueError(f"data.features.drop leaves none of the {len(known)} feature columns; a ranker needs one")


def _folder_size(folder: Path) -> Size:
    rows = {name: Table(folder, name).rows for name in NEEDED_TABLES}
    spans = [pc.min_max(batch["timestamp"]) for batch in typed_batches(folder, "sessions", ROWS, ["timestamp"])]
    first = min((span["min"].as_py() for span in spans if span["min"].is_valid), default=None)
    last = max((span["max"].as_py() for span in spans if span["max"].is_valid), default=None)
    return Size(rows["sessions"], rows=tuple(rows.items()), first=first, last=last, columns=(*feature_kinds(folder),))


# The UCI's anonymous-msweb.


def msweb(folder: str | Path, *, seed: int = PUBLISHED_SEED) -> Dataset:
    """The UCI anonymous-msweb files (.data: train users, .test: test users): areas visited so far -> one withheld.

    Users with a single area are left out. For each user in file order, `seed` draws the area to withhold and, for
    train users, who is valid (one in ten); PUBLISHED_SEED repeats the published choices. Raises TableError.
    """
    titles, train = _msweb_file(Path(folder) / "anonymous-msweb.data")
    _, test = _msweb_file(Path(folder) / "anonymous-msweb.test")
    generator = np.random.default_rng(seed)
    users = {"tr" + user: areas for user, areas in train.items()} | {"te" + user: areas for user, areas in test.items()}
    users = {user: areas for user, areas in users.items() if len(areas) > 1}
    known = sorted({area for areas in users.values() for area in areas})
    withheld, split, recent = [], [], []
    for user, areas in users.items():
        which = generator.integers(len(areas))
        withheld.append(areas[which])
        recent.append(areas[:which] + areas[which + 1 :])
        split.append("test" if user.startswith("te") else "valid" if generator.random() < 0.1 else "train")
    name = np.array(list(users), dtype=object)
    sessions = pd.DataFrame(
        {
            "session_id": "w" + name,
            "user_id": "u" + name,
            "timestamp": None,
            "region": None,
            "split": split,
            "n_visited": [len(areas) for areas in recent],
            "recent": [["v" + area for area in areas] for areas in recent],
            "recent_text": ["Visited: " + "; ".join(titles[area][0] for area in areas) for areas in recent],
        }
    )
    intents = _msweb_intents(known, titles)
    true_intent = pd.Index(known).get_indexer(withheld)
    train_clicks = np.bincount(true_intent[np.array(split) == "train"], minlength=len(known))
    meta = {
        "title": "Anonymous Microsoft web data, one week of February 1998",
        "what": f"Areas of a site that a visitor has opened; rank the one that is withheld. {len(known)} areas.",
        "licence": "Donated to the UCI KDD archive by Breese, Heckerman, Kadie (1998); UCI: CC BY 4.0",
        "origin": "The published train and test users",
        "split": "The published train and test users; a random 10 % of train users are valid.",
        "leaks_removed": [],
        "caution": "No timestamps, no regions; the withheld area may lie before later visits.",
        "left_out": {"users with a single area": len(train) + len(test) - len(sessions)},
    }
    kinds = {"n_visited": "numeric", "recent": "history", "recent_text": "text"}
    visitor = np.repeat(np.arange(len(recent)), sessions["n_visited"])
    visited = pd.Index(known).get_indexer([area for areas in recent for area in areas])
    return sampled_dataset(
        "msweb", kinds, meta, intents, sessions, true_intent, train_clicks, seed, barred=(visitor, visited)
    )


def _msweb_intents(known: list[str], titles: dict[str, tuple[str, str]]) -> pd.DataFrame:
    support = [path == "/kb" or "support" in (title + path).lower() for title, path in map(titles.get, known)]
    return pd.DataFrame(
        {
            "intent_id": ["v" + area for area in known],
            "title": [titles[area][0].strip() for area in known],
            "description": [f"Area {titles[area][1]} of the site: {titles[area][0].strip()}." for area in known],
            "category": np.where(support, "support", "site area"),
            "valid_from": None,
        }
    )


def _msweb_file(path: Path) -> tuple[dict[str, tuple[str, str]], dict[str, list[str]]]:
    """Area -> (title, path), and user -> areas in file order. Lines: A(rea), C(ase = user), V(ote = visit)."""
    if not path.is_file():
        raise TableError(f"{path} is missing; expected the files anonymous-msweb.data and anonymous-msweb.test of UCI")
    titles, users, errors, areas = {}, {}, [], None
    with path.open(encoding="latin-1", newline="") as file:
        for number, row in enumerate(csv.reader(file), start=1):
            match row:
                case ["A", area, _, title, where]:
                    titles[area] = (title, where)
                case ["C", _, user]:
                    areas = users.setdefault(user, [])
                case ["V", area, _] if areas is not None and area in titles:
                    areas.append(area)
                case ["I" | "T" | "N", *_]:
                    pass
                case _:
                    errors.append(number)
    if errors or not users:
        lines = f"{len(errors)} lines cannot be read (first: {', '.join(map(str, errors[:3]))})"
        expected = "expected A,area,1,title,path, then C,user,user, then V,area,1"
        raise TableError(f"{path}: {lines if errors else 'no users'}; {expected}. Nothing was read")
    return titles, users


def _msweb_size(folder: Path) -> Size:
    """Users who opened two areas or more: one of them is withheld."""
    files = [_msweb_file(folder / f"anonymous-msweb.{name}") for name in ("data", "test")]
    return Size(sum(len(areas) > 1 for _, users in files for areas in users.values()))


SOURCES = {
    "shopworld": DataSource(
        read=lambda data, path: world.generate(seed=data.seed, progress=True, **data.world.model_dump()),
        size=lambda data, path: Size(data.world.sessions),
        features=(*KINDS, *TEXT_COLUMNS),
    ),
    "folder": DataSource(read=lambda data, path: path, size=lambda data, path: _folder_size(path)),
    "cfpb": DataSource(
        read=lambda data, path: cfpb.cfpb(path, seed=data.seed, day_first=data.day_first),
        size=lambda data, path: Size(*cfpb.count_sessions(path)),
    ),
    "msweb": DataSource(read=lambda data, path: msweb(path, seed=data.seed), size=lambda data, path: _msweb_size(path)),
}
