"""The World: all tables of one seed, rebuilt from what a data set's dataset.yaml says about it."""

import zlib
from dataclasses import dataclass

import numpy as np

from rgalign.shopworld.columns import COLUMNS
from rgalign.shopworld.lists import examination
from rgalign.shopworld.tables import (
    Rules,
    Wordings,
    attraction_table,
    column_tables,
    even_normals,
    mention_table,
    opening_days,
    prior_table,
    softmax,
)
from rgalign.shopworld.text import TextTables
from rgalign.shopworld.words import ITEMS, THINGS

# 2 differs from 1 in the chats of the other shops alone (world_transcripts.py), so one can be drawn beside the other.
WORLD_VERSIONS = (1, 2)
WORLD_VERSION = 1  # where nobody says another: what every published figure was measured on


def generator(seed: int, *name: str | int) -> np.random.Generator:
    """The random generator of one named part of a world: parts do not disturb each other when one of them changes."""
    return np.random.default_rng([seed, *(zlib.crc32(str(part).encode()) for part in name)])


@dataclass(frozen=True, eq=False)
class World:
    """The tables of one world. Axes: KB = intents in the order of intents.parquet, values in the columns' order."""

    seed: int
    rules: Rules
    prior: np.ndarray  # P(intent | region, segment) when all are open (regions, segments, KB)
    opens: np.ndarray  # day from which an intent exists (KB,)
    columns: dict[str, np.ndarray]  # P(value | intent), or | region, or on its own: `world_tables.column_table`
    texts: TextTables
    wordings: Wordings
    attraction: np.ndarray  # P(click | looked at, true intent, shown intent) (KB, KB)
    examination: np.ndarray  # P(looked at) (positions,)
    version: int = WORLD_VERSION

    @classmethod
    def build(cls, seed: int, rules: Rules | None = None, version: int = WORLD_VERSION) -> "World":
        """The world of a seed, a whole number >= 0; `rules` only to rebuild one from what its tables say."""
        rules = rules or Rules()
        item_leaning = rules.item_lean * even_normals(len(THINGS), len(ITEMS), generator(seed, "items"))
        texts = TextTables(
            active=mention_table(rules.active_true, rules.active_object, rules.active_issue),
            page=mention_table(rules.page_true, rules.page_object, rules.page_issue),
            page_missing=rules.page_missing,
            item=softmax(item_leaning),
        )
        return cls(
            seed=seed,
            rules=rules,
            prior=prior_table(generator(seed, "prior"), rules),
            opens=opening_days(generator(seed, "opening days"), rules),
            columns=column_tables(COLUMNS, generator(seed, "columns"), rules),
            texts=texts,
            wordings=Wordings.drawn(generator(seed, "wordings"), rules),
            attraction=attraction_table(rules),
            examination=examination(rules),
            version=version,
        )

    @classmethod
    def from_meta(cls, meta: dict) -> "World":
        """The world that a data set was drawn from, from its dataset.yaml. Raises ValueError where it names none."""
        settings = meta.get("world")
        if settings is None or settings.get("version") not in WORLD_VERSIONS:
            found = "no world" if settings is None else f"a world of version {settings.get('version')}"
            raise ValueError(
                f"dataset.yaml of {meta.get('name')!r} names {found}; expected version 1 or 2. "
                "Draw it again: python -m rgalign world DIR"
            )
        rules = {key: tuple(value) if isinstance(value, list) else value for key, value in settings["rules"].items()}
        return cls.build(settings["seed"], Rules(**rules), settings["version"])

    def available(self, days: np.ndarray) -> np.ndarray:
        """Which intents exist on each of `days` (sessions,): (sessions, KB)."""
        return self.opens <= days[:, None]
