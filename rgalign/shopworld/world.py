"""ShopWorld: a simulated support chatbot with a known truth, as a data set like any other (ARCHITECTURE.md, Contracts).

The rules (`Rules`, the columns, the words) are frozen: a change adds to WORLD_VERSIONS, and every experiment is run
again. Version 2 has the sessions of version 1, byte by byte; only the other shops' chats differ, at a distance above 0.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import yaml
from tqdm import tqdm

from rgalign.data.schema import STRING, TIME, YAML_FILE, to_frame
from rgalign.data.tables import Dataset
from rgalign.run.artifacts import write_arrow, write_text
from rgalign.shopworld.sessions import batches
from rgalign.shopworld.tables import BATCH, DAY, INTENT_IDS, ISSUE, OBJECT, START, WORLD_VERSION, WORLD_VERSIONS, World
from rgalign.shopworld.transcripts import draw_transcripts
from rgalign.shopworld.vocabulary import ISSUES, KINDS, PROMPT_COLUMNS, TEXT_COLUMNS, THINGS

DRAWN = ("sessions", "impressions", "truth")
SETTINGS = "drawing.json"  # what the parts beside it were drawn with, until all are there


def generate(
    *,
    seed: int,
    sessions: int = 36_000,
    users: int = 8_000,
    distance: float = 0.5,
    transcripts: int = 48_000,
    version: int = WORLD_VERSION,
    progress: bool = False,
) -> Dataset:
    """A data set drawn from the world of `seed`, with its truth, and chats of other shops at `distance`.

    distance  0 = the other shops are like this one, 1 = they share the taxonomy and the language, little else [C]
    version   2: the other shops' clauses differ too, in proportion to the distance; 1: they are this shop's
    progress  shows a bar once it takes more than five seconds
    The tables depend on nothing but these arguments; `distance` and `transcripts` touch the transcripts only.
    """
    settings = {"sessions": sessions, "users": users, "distance": distance, "transcripts": transcripts}
    world = _built(seed, version, settings)
    bar = {"total": -(-sessions // BATCH), "desc": "ShopWorld", "unit": "batch", "delay": 5, "disable": not progress}
    parts = zip(*tqdm(batches(world, sessions=sessions, users=users), **bar), strict=True)
    drawn = {name: pa.concat_tables(part).combine_chunks() for name, part in zip(DRAWN, parts, strict=True)}
    others, meta = _without_sessions(world, settings)
    frames = {name: to_frame(table) for name, table in (drawn | others).items()}
    return Dataset(name="shopworld", kinds=dict(meta["features"]), meta=meta, **frames)


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
    """The data set that `generate` makes of these arguments, written as folders of files in the memory of a batch.

        shop/sessions/part-00000.parquet   20,000 sessions;  impressions/ and truth/ alike
        shop/intents.parquet, transcripts.parquet, dataset.yaml

    A killed writer goes on where it stood: a part that is there is not drawn again, and dataset.yaml, without which a
    folder is no data set, comes last. Raises ValueError for arguments out of range, FileExistsError where the folder
    holds anything else.
    """
    settings = {"sessions": sessions, "users": users, "distance": distance, "transcripts": transcripts}
    world, folder = _built(seed, version, settings), Path(folder)
    drawing, drawn_with = folder / SETTINGS, json.dumps({"version": version, "seed": seed, **settings})
    if drawing.is_file():
        if drawing.read_text(encoding="utf-8") != drawn_with:  # parts of another world
            for name in DRAWN:
                shutil.rmtree(folder / name, ignore_errors=True)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already, and is no world that is being drawn. Name a new folder.")
    write_text(drawing, drawn_with)
    places = [[folder / name / f"part-{n:05d}.parquet" for name in DRAWN] for n in range(-(-sessions // BATCH))]
    done = {number for number, files in enumerate(places) if all(file.is_file() for file in files)}
    left = [files for number, files in enumerate(places) if number not in done]
    bar = tqdm(left, "ShopWorld", unit="batch", delay=5, disable=not progress)
    for files, drawn in zip(bar, batches(world, sessions=sessions, users=users, left_out=done), strict=True):
        for file, table in zip(files, drawn, strict=True):
            write_arrow(file, table)
    others, meta = _without_sessions(world, settings)
    for name, table in others.items():
        write_arrow(folder / f"{name}.parquet", table)
    write_text(folder / YAML_FILE, yaml.safe_dump(meta, sort_keys=False, allow_unicode=True, width=120))
    drawing.unlink()


def _built(seed: int, version: int, settings: dict) -> World:
    """The world of a seed, once its arguments are in range. Raises ValueError that names all that are not."""
    least = {"seed": 0, "sessions": 1, "users": 1, "transcripts": 0}
    given = {"seed": seed, **settings}
    wrong = [f"{name} is {given[name]}; expected at least {low}" for name, low in least.items() if given[name] < low]
    if not 0 <= settings["distance"] <= 1:
        wrong.append(f"distance is {settings['distance']}; expected 0 (shops like this one) to 1")
    if version not in WORLD_VERSIONS:
        wrong.append(f"version is {version}; expected 1 or 2")
    if wrong:
        raise ValueError("ShopWorld can not be drawn: " + "; ".join(wrong))
    return World.build(seed, version=version)


def _without_sessions(world: World, settings: dict) -> tuple[dict[str, pa.Table], dict]:
    """What a world has beside its sessions: intents, transcripts where there are any, and dataset.yaml."""
    cells = list(zip(OBJECT, ISSUE, strict=True))
    intents = {
        "intent_id": pa.array(INTENT_IDS, STRING),
        "title": pa.array([ISSUES[issue].title.format(THINGS[thing].title) for thing, issue in cells], STRING),
        "description": pa.array([f"{ISSUES[issue].about} {THINGS[thing].about}" for thing, issue in cells], STRING),
        "category": pa.array([THINGS[thing].name for thing, _ in cells], STRING),
        "valid_from": pa.array(START + world.opens * DAY, TIME, mask=world.opens == 0),
    }
    others = {"intents": pa.table(intents)}
    if rows := settings["transcripts"]:
        others["transcripts"] = draw_transcripts(world, rows=rows, distance=settings["distance"])
    rules = json.loads(json.dumps(dataclasses.asdict(world.rules)))  # tuples become lists
    return others, {
        "name": "shopworld",
        "what": "Simulated sessions of a support chatbot in an online shop; rank the 96 intents of its knowledge base",
        "position_is_real": True,
        "features": dict(KINDS) | dict.fromkeys(TEXT_COLUMNS, "text"),
        "prompt_features": [*PROMPT_COLUMNS, *TEXT_COLUMNS],  # what an agent would see, in order
        "other_columns": {"shuffled": "sessions: True where the whole list was shown in random order; not a feature"},
        "split": "By week: 1 to 4 train, 5 valid, 6 test",
        "candidates": "12 shown; 9 by a legacy policy, 3 drawn uniformly from the rest into random slots. "
        "`propensity` = P(this intent at this position | session), over slots, draws and shuffling",
        "world": {"version": world.version, "seed": world.seed, **settings, "rules": rules},
    }


def oracle_scores(dataset_meta: dict, truth: pd.DataFrame, which: str = "all") -> np.ndarray:
    """P(click | looked at) of every intent for a perfect reader of each session, who ignores positions (sessions, KB).

    which  "discrete": reads the columns, region, segment and date; "all": reads the texts as well
    """
    columns = {"discrete": "posterior_discrete", "all": "posterior"}
    if which not in columns:
        raise ValueError(f"which is {which!r}; expected one of {', '.join(columns)}")
    flat = pc.list_flatten(pa.array(truth[columns[which]])).to_numpy()
    return flat.reshape(len(truth), -1).astype(np.float64) @ World.from_meta(dataset_meta).attraction
