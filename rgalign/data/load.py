"""One door for every source of data: the simulator, a folder of tables, raw public files."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rgalign.data import adapters, tables, world
from rgalign.data.faults import nearest, quote
from rgalign.data.world_columns import KINDS, TEXT_COLUMNS


def write_dataset(
    folder: Path,
    source: str,
    *,
    seed: int,
    world_settings: Mapping[str, Any],
    path: Path | None = None,
    sampled_negatives: Mapping[str, Any] | None = None,
    day_first: bool | None = None,
    drop: Sequence[str] = (),
) -> dict[str, str]:
    """Writes the whole data set that the params name, every split and, of a simulator, the truth; returns its kinds.

    folder             where it is written, all of it or nothing (tables.write)
    source             shopworld | folder | cfpb | msweb; all but the first read `path`. A folder may be larger than
                       memory (tables.copy); the others are held whole
    world_settings     sessions, users, distance, transcripts, version (world.generate)
    sampled_negatives  says how a folder's lists were sampled where its dataset.yaml does not
    day_first          how the CFPB's dates are read where they do not tell (adapters.cfpb)
    drop               feature columns that will be left out (data.features.drop): only their names are checked
    Raises TableError with every fault of the files, ValueError where dataset.yaml says it differently and where `drop`
    names no feature column or leaves none.
    """
    if source == "folder":
        meta = tables.checked(path)
        _refuse_drop(drop, meta["features"])
        tables.copy(path, folder, _with_sampling(meta, sampled_negatives))
        return dict(meta["features"])
    if source == "shopworld":
        _refuse_drop(drop, [*KINDS, *TEXT_COLUMNS])  # before the minutes that a large world takes
        dataset = world.generate(seed=seed, progress=True, **world_settings)
    else:
        read = {"cfpb": partial(adapters.cfpb, day_first=day_first), "msweb": adapters.msweb}[source]
        dataset = read(path, seed=seed)
    _refuse_drop(drop, dataset.kinds)
    tables.write(replace(dataset, meta=_with_sampling(dataset.meta, sampled_negatives)), folder)
    return dataset.kinds


def _with_sampling(meta: Mapping[str, Any], sampled_negatives: Mapping[str, Any] | None) -> dict[str, Any]:
    if sampled_negatives is None:
        return dict(meta)
    stated = meta.get("sampled_negatives", sampled_negatives)
    if dict(stated) != dict(sampled_negatives):
        raise ValueError(f"data.sampled_negatives is {dict(sampled_negatives)}, but dataset.yaml says {stated}")
    return {**meta, "sampled_negatives": dict(sampled_negatives)}


def _refuse_drop(drop: Sequence[str], known: Iterable[str]) -> None:
    known = list(known)
    if unknown := [name for name in drop if name not in known]:
        lines = "\n".join(f"  {quote(name)}{nearest(name, known)}" for name in unknown)
        raise ValueError(f"data.features.drop names what is no feature column:\n{lines}")
    if set(known) <= set(drop):
        raise ValueError(f"data.features.drop leaves none of the {len(known)} feature columns; a ranker needs one")
