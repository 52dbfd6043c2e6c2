"""One door for every source of data: the simulator, a folder of tables, raw public files."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rgalign.data import adapters, world
from rgalign.data.faults import nearest, quote
from rgalign.data.tables import Dataset
from rgalign.data.world_columns import KINDS, TEXT_COLUMNS


def load_dataset(
    source: str,
    *,
    seed: int,
    world_settings: Mapping[str, Any],
    path: Path | None = None,
    sampled_negatives: Mapping[str, Any] | None = None,
    drop: Sequence[str] = (),
) -> Dataset:
    """The whole data set that the params name, every split and, of a simulator, the truth.

    source             shopworld | folder | cfpb | msweb; all but the first read `path`
    world_settings     sessions, users, distance, transcripts (world.generate)
    sampled_negatives  says how a folder's lists were sampled where its dataset.yaml does not
    drop               feature columns that will be left out (data.features.drop): only their names are checked
    Raises TableError with every fault of the files, ValueError where dataset.yaml says it differently and where `drop`
    names no feature column or leaves none.
    """
    if source == "shopworld":
        _refuse_drop(drop, [*KINDS, *TEXT_COLUMNS])  # before the minutes that a large world takes
        dataset = world.generate(seed=seed, progress=True, **world_settings)
    elif source == "folder":
        dataset = adapters.folder(path)
    else:
        dataset = {"cfpb": adapters.cfpb, "msweb": adapters.msweb}[source](path, seed=seed)
    _refuse_drop(drop, dataset.kinds)
    if sampled_negatives is None:
        return dataset
    stated = dataset.meta.get("sampled_negatives", sampled_negatives)
    if dict(stated) != dict(sampled_negatives):
        raise ValueError(f"data.sampled_negatives is {dict(sampled_negatives)}, but dataset.yaml says {stated}")
    return replace(dataset, meta={**dataset.meta, "sampled_negatives": dict(sampled_negatives)})


def _refuse_drop(drop: Sequence[str], known: Iterable[str]) -> None:
    known = list(known)
    if unknown := [name for name in drop if name not in known]:
        lines = "\n".join(f"  {quote(name)}{nearest(name, known)}" for name in unknown)
        raise ValueError(f"data.features.drop names what is no feature column:\n{lines}")
    if set(known) <= set(drop):
        raise ValueError(f"data.features.drop leaves none of the {len(known)} feature columns; a ranker needs one")
