"""A ShopWorld of millions of sessions, written batch by batch: tables that are folders of files, in a batch's memory.

    shop/sessions/part-00000.parquet   20,000 sessions;  impressions/ and truth/ alike
    shop/intents.parquet, transcripts.parquet, dataset.yaml

The rows are those of `world.generate` with the same arguments. A killed writer goes on where it stood: a part that is
there is not drawn again, and dataset.yaml, without which a folder is no data set, comes last.
"""

import json
import shutil
from pathlib import Path

import yaml
from tqdm import tqdm

from rgalign.data.schema import YAML_FILE
from rgalign.run.artifacts import atomic, write_arrow, write_text
from rgalign.run.work_shards import unfinished
from rgalign.shopworld.sessions import batches
from rgalign.shopworld.tables import BATCH, WORLD_VERSION, World
from rgalign.shopworld.world import refuse, without_sessions

DRAWN = ("sessions", "impressions", "truth")
SETTINGS = "drawing.json"  # what the parts beside it were drawn with, until all are there


def write_world(
    folder: str | Path,
    *,
    seed: int,
    sessions: int,
    users: int,
    distance: float = 0.5,
    transcripts: int = 48_000,
    version: int = WORLD_VERSION,
    progress: bool = False,
) -> None:
    """Write the data set that `world.generate` would make of these arguments.

    Raises ValueError for arguments out of range, FileExistsError where the folder holds anything else.
    """
    settings = {"sessions": sessions, "users": users, "distance": distance, "transcripts": transcripts}
    refuse(seed=seed, version=version, **settings)
    folder, text = Path(folder), json.dumps({"version": version, "seed": seed, **settings})
    _begin(folder, text)
    world, count = World.build(seed, version=version), -(-sessions // BATCH)
    left = unfinished(count, lambda number: all(_part(folder, name, number).is_file() for name in DRAWN))
    bar, kept = tqdm(left, "ShopWorld", unit="batch", delay=5, disable=not progress), {*range(count)} - {*left}
    for number, drawn in zip(bar, batches(world, sessions=sessions, users=users, left_out=kept), strict=True):
        for name, table in zip(DRAWN, drawn, strict=True):
            write_arrow(_part(folder, name, number), table)
    others, meta = without_sessions(world, settings)
    for name, table in others.items():
        write_arrow(folder / f"{name}.parquet", table)
    with atomic(folder / YAML_FILE) as temporary:
        temporary.write_text(yaml.safe_dump(meta, sort_keys=False, allow_unicode=True, width=120), encoding="utf-8")
    (folder / SETTINGS).unlink()


def _begin(folder: Path, text: str) -> None:
    """Leave the folder with nothing but parts of this very world. Raises FileExistsError."""
    settings = folder / SETTINGS
    if settings.is_file():
        if settings.read_text(encoding="utf-8") != text:
            for name in DRAWN:
                shutil.rmtree(folder / name, ignore_errors=True)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already, and is no world that is being drawn. Name a new folder.")
    write_text(settings, text)


def _part(folder: Path, name: str, number: int) -> Path:
    return folder / name / f"part-{number:05d}.parquet"
