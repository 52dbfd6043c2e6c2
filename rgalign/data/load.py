"""One door for every source of data: the simulator, a folder of tables, raw public files."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rgalign.data import adapters, world
from rgalign.data.tables import Dataset


def load_dataset(
    source: str,
    *,
    seed: int,
    world_settings: Mapping[str, Any],
    path: Path | None = None,
    sampled_negatives: Mapping[str, Any] | None = None,
) -> Dataset:
    """The whole data set that the params name, every split and, of a simulator, the truth.

    source             shopworld | folder | cfpb | msweb; all but the first read `path`
    world_settings     sessions, users, distance, transcripts (world.generate)
    sampled_negatives  says how a folder's lists were sampled where its dataset.yaml does not
    Raises TableError with every fault of the files, ValueError where dataset.yaml says it differently.
    """
    if source == "shopworld":
        dataset = world.generate(seed=seed, progress=True, **world_settings)
    elif source == "folder":
        dataset = adapters.folder(path)
    else:
        dataset = {"cfpb": adapters.cfpb, "msweb": adapters.msweb}[source](path, seed=seed)
    if sampled_negatives is None:
        return dataset
    stated = dataset.meta.get("sampled_negatives", sampled_negatives)
    if dict(stated) != dict(sampled_negatives):
        raise ValueError(f"data.sampled_negatives is {dict(sampled_negatives)}, but dataset.yaml says {stated}")
    return replace(dataset, meta={**dataset.meta, "sampled_negatives": dict(sampled_negatives)})
