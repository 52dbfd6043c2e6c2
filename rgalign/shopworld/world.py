"""ShopWorld: a simulated support chatbot with a known truth, as a data set like any other (ARCHITECTURE.md, Contracts).

    dataset = generate(seed=0)
    oracle_scores(dataset.meta, dataset.truth, which="all")     # how a perfect reader would rank the knowledge base

The rules (`Rules`, the columns, the words) are frozen: a change adds to WORLD_VERSIONS, and every experiment
is run again. A world must not be tuned until the method looks good. Version 2 has the sessions of version 1, byte by
byte; only what the other shops' chats look like at a distance above 0 differs.
"""

import dataclasses

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from rgalign.data.schema import STRING, TIME, to_frame
from rgalign.data.tables import Dataset
from rgalign.shopworld.sessions import batches
from rgalign.shopworld.tables import (
    BATCH,
    DAY,
    INTENT_IDS,
    ISSUE,
    OBJECT,
    START,
    WORLD_VERSION,
    WORLD_VERSIONS,
    Rules,
    World,
)
from rgalign.shopworld.transcripts import draw_transcripts
from rgalign.shopworld.vocabulary import ISSUES, KINDS, PROMPT_COLUMNS, TEXT_COLUMNS, THINGS

__all__ = ["WORLD_VERSION", "WORLD_VERSIONS", "Rules", "World", "generate", "oracle_scores"]


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
    version   2: the other shops' clauses have, in proportion to the distance, another grammar, other words and other
              habits of what they mention; 1: this shop's grammar and words, at any distance
    progress  shows a bar once it takes more than five seconds
    The tables depend on nothing but these arguments; `distance` and `transcripts` touch the transcripts only.
    """
    settings = {"sessions": sessions, "users": users, "distance": distance, "transcripts": transcripts}
    refuse(seed=seed, version=version, **settings)
    world = World.build(seed, version=version)
    parts = batches(world, sessions=sessions, users=users)
    bar = {"total": -(-sessions // BATCH), "desc": "ShopWorld", "unit": "batch", "delay": 5, "disable": not progress}
    tables = [pa.concat_tables(part).combine_chunks() for part in zip(*tqdm(parts, **bar), strict=True)]
    others, meta = without_sessions(world, settings)
    return Dataset(
        name="shopworld",
        kinds=dict(meta["features"]),
        meta=meta,
        intents=to_frame(others["intents"]),
        sessions=to_frame(tables[0]),
        impressions=to_frame(tables[1]),
        transcripts=to_frame(others["transcripts"]) if transcripts else None,
        truth=to_frame(tables[2]),
    )


def without_sessions(world: World, settings: dict) -> tuple[dict[str, pa.Table], dict]:
    """What a world has beside its sessions: intents, transcripts where there are any, and dataset.yaml.

    settings  sessions, users, distance, transcripts of `generate`
    """
    others = {"intents": _intents(world)}
    if settings["transcripts"]:
        rows, distance = settings["transcripts"], settings["distance"]
        others["transcripts"] = draw_transcripts(world, rows=rows, distance=distance)
    return others, _meta(world, dict(KINDS) | dict.fromkeys(TEXT_COLUMNS, "text"), settings)


def oracle_scores(dataset_meta: dict, truth: pd.DataFrame, which: str = "all") -> np.ndarray:
    """P(click | looked at) of every intent for a perfect reader of each session, who ignores positions (sessions, KB).

    which  "discrete": reads the columns, region, segment and date; "all": reads the texts as well
    """
    columns = {"discrete": "posterior_discrete", "all": "posterior"}
    if which not in columns:
        raise ValueError(f"which is {which!r}; expected one of {', '.join(columns)}")
    world = World.from_meta(dataset_meta)
    flat = pc.list_flatten(pa.array(truth[columns[which]])).to_numpy()
    return flat.reshape(len(truth), -1).astype(np.float64) @ world.attraction


def refuse(*, seed: int, sessions: int, users: int, distance: float, transcripts: int, version: int) -> None:
    wrong = [f"{name} is {value}; expected at least {least}"
             for name, value, least in (("seed", seed, 0), ("sessions", sessions, 1), ("users", users, 1),
                                        ("transcripts", transcripts, 0)) if value < least]  # fmt: skip
    if not 0 <= distance <= 1:
        wrong.append(f"distance is {distance}; expected 0 (shops like this one) to 1")
    if version not in WORLD_VERSIONS:
        wrong.append(f"version is {version}; expected 1 or 2")
    if wrong:
        raise ValueError("ShopWorld can not be drawn: " + "; ".join(wrong))


def _intents(world: World) -> pa.Table:
    valid_from = pa.array(START + world.opens * DAY, TIME, mask=world.opens == 0)
    return pa.table(
        {
            "intent_id": pa.array(INTENT_IDS, STRING),
            "title": pa.array([ISSUES[s].title.format(THINGS[o].title) for o, s in _cells()], STRING),
            "description": pa.array([f"{ISSUES[s].about} {THINGS[o].about}" for o, s in _cells()], STRING),
            "category": pa.array([THINGS[o].name for o, _ in _cells()], STRING),
            "valid_from": valid_from,
        }
    )


def _cells() -> zip:
    return zip(OBJECT, ISSUE, strict=True)


def _meta(world: World, kinds: dict[str, str], settings: dict) -> dict:
    return {
        "name": "shopworld",
        "what": "Simulated sessions of a support chatbot in an online shop; rank the 96 intents of its knowledge base",
        "position_is_real": True,
        "features": kinds,
        "prompt_features": [*PROMPT_COLUMNS, *TEXT_COLUMNS],  # what an agent would see, in order
        "other_columns": {"shuffled": "sessions: True where the whole list was shown in random order; not a feature"},
        "split": "By week: 1 to 4 train, 5 valid, 6 test",
        "candidates": "12 shown; 9 by a legacy policy, 3 drawn uniformly from the rest into random slots. "
        "`propensity` = P(this intent at this position | session), over slots, draws and shuffling",
        "world": {
            "version": world.version,
            "seed": world.seed,
            **settings,
            "rules": {
                key: list(value) if isinstance(value, tuple) else value
                for key, value in dataclasses.asdict(world.rules).items()
            },
        },
    }
