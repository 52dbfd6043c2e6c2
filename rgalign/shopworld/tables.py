"""The World: the probability tables of one ShopWorld, drawn from its seed by frozen Rules.

The direction is always intent -> observables. That is why the exact posterior of the intent is a product of table
entries, and why ShopWorld can say what no log can: how well a perfect reader of the same session would rank.
"""

import zlib
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from rgalign.shopworld.vocabulary import COLUMNS, GRID, INFORMATIVE, ISSUES, ITEMS, REGIONS, SEGMENTS, THINGS, Column

OBJECT = np.repeat(np.arange(len(THINGS)), len(ISSUES))  # object of each intent
ISSUE = np.tile(np.arange(len(ISSUES)), len(THINGS))
KB = len(OBJECT)
DAYS = 42
LATE_FROM_DAY = 28  # the last two weeks: no intent that enters is ever clicked in train
START = np.datetime64("2026-01-05T00:00:00", "us")  # a Monday
DAY = np.timedelta64(86_400_000_000, "us")
BATCH = 20_000  # sessions a batch; part of the rules, since every batch has a generator of its own
INTENT_IDS = tuple(f"kb_{intent:03d}" for intent in range(KB))

# 2 differs from 1 in the chats of the other shops alone (transcripts.py), so one can be drawn beside the other.
WORLD_VERSIONS = (1, 2)
WORLD_VERSION = 1  # the default: what every published figure was measured on


@dataclass(frozen=True)
class Rules:
    """The numbers behind every world, frozen with WORLD_VERSION.

    Calibrated at the default size (36,000 sessions, about 9,200 training lists with a click) so that GAUC on the test
    week is about 0.90 for the oracle without texts, 0.945 with them, 0.96 for who knows the intent; 0.79 for the
    two-tower ranker on ids, 0.82 with a bag of words. No figure of an aligned model was looked at.
    """

    popularity_spread: float = 0.8  # standard deviation of the log prior over intents
    region_spread: float = 0.6  # ... of what a region adds to it
    segment_spread: float = 0.4  # ... of what a user segment adds
    regions: tuple[float, ...] = (0.26, 0.18, 0.15, 0.12, 0.1, 0.08, 0.06, 0.05)  # share of the users
    segments: tuple[float, ...] = (0.3, 0.45, 0.2, 0.05)
    activity_spread: float = 0.7  # how unevenly users come (standard deviation of the log)
    weekly_traffic: tuple[float, ...] = (0.17, 0.18, 0.19, 0.175, 0.145, 0.14)
    late_intents: int = 10
    family_lean: float = 0.045  # how far object columns lean with the object, issue columns with the issue (standard
    # deviation of a value's logit); what a ranker can learn for one intent from its relatives, new ones included
    minor_lean: float = 0.015  # of object columns with the issue, and the other way round
    own_lean: float = 0.3  # of object, issue and both columns with the single intent
    code_lean: float = 0.8  # of code columns, which have many values and lean with the single intent only
    noise_spread: float = 0.8  # how uneven the values of a column are before anything leans
    active_true: float = 0.55  # the active clause tells the true object and issue,
    active_object: float = 0.12  # the true object and any issue,
    active_issue: float = 0.12  # any object and the true issue; else anything at all
    item_lean: float = 1.0  # how far the item's kind leans with the object
    page_true: float = 0.15  # the help page, in the same way
    page_object: float = 0.2
    page_issue: float = 0.2
    page_missing: float = 0.25
    wording: tuple[float, ...] = (0.5, 0.27, 0.15, 0.08)  # of a concept's four synonyms, usual to rare
    positions: int = 12
    explored: int = 3  # candidates drawn uniformly from what the policy left out
    shuffled_share: float = 0.15
    examination_decay: float = 0.35  # P(position p is looked at) = (p + 1) ** -decay
    attracts_true: float = 0.9  # P(click | looked at) of the true intent,
    attracts_issue: float = 0.05  # of one with the same issue,
    attracts_object: float = 0.05  # of one with the same object,
    attracts_other: float = 0.003


def generator(seed: int, *name: str | int) -> np.random.Generator:
    """The random generator of one named part of a world: parts do not disturb each other when one of them changes."""
    return np.random.default_rng([seed, *(zlib.crc32(str(part).encode()) for part in name)])


def cumulative(probabilities: np.ndarray) -> np.ndarray:
    """Upper ends of each value's interval along the last axis; the last end is exactly 1, so no draw falls outside."""
    ends = np.cumsum(probabilities, axis=-1)
    ends[..., -1] = 1.0
    return ends


def draw(probabilities: np.ndarray, rng: np.random.Generator, rows: np.ndarray | tuple | int) -> np.ndarray:
    """Value indices (draws,) by inversion.

    probabilities  (.., values)
    rows           (draws,) the row of each draw, a tuple where there are several axes; or how many draws of the one row
    """
    ends = cumulative(probabilities)
    own = ends[rows] if isinstance(rows, np.ndarray | tuple) else np.broadcast_to(ends, (rows, ends.shape[-1]))
    return (rng.random(len(own))[:, None] >= own).sum(axis=1)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities along the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def even_normals(rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Standard normal numbers (rows, columns), evenly spread down each column: the quantiles in random order.

    Plain draws for a dozen objects differ so much from world to world that worlds would differ in how hard they are.
    """
    quantiles = np.array([NormalDist().inv_cdf((row + 0.5) / rows) for row in range(rows)])
    return rng.permuted(np.tile((quantiles / quantiles.std())[:, None], (1, columns)), axis=0)


def leaning(group: str, width: int, rng: np.random.Generator, rules: Rules) -> np.ndarray:
    """Logits (KB, width) by which an informative column leans with the intent: object part + issue part + own part."""
    of_object, of_issue, of_intent = {
        "object": (rules.family_lean, rules.minor_lean, rules.own_lean),
        "issue": (rules.minor_lean, rules.family_lean, rules.own_lean),
        "both": (rules.family_lean, rules.family_lean, rules.own_lean),
        "code": (0.0, 0.0, rules.code_lean),
    }[group]
    by_object = even_normals(len(THINGS), width, rng)[OBJECT]
    by_issue = even_normals(len(ISSUES), width, rng)[ISSUE]
    by_intent = even_normals(KB, width, rng)
    return of_object * by_object + of_issue * by_issue + of_intent * by_intent


def column_table(column: Column, rng: np.random.Generator, rules: Rules) -> np.ndarray:
    """P(value | cause) of one column: (KB, values) if informative, (regions, values) or (1, values) if noise."""
    width = len(column.values)
    informative = column.group in INFORMATIVE
    if column.kind == "numeric":
        centre = 3.5 + (2.5 * leaning(column.group, 1, rng, rules) if informative else rng.normal(size=(1, 1)))
        return softmax(-0.5 * ((np.arange(len(GRID)) - centre) / 1.5) ** 2)
    base = rules.noise_spread * rng.normal(size=width)
    if informative:
        return softmax(base + leaning(column.group, width, rng, rules))
    rows = len(REGIONS) if column.group == "region" else 1
    return softmax(base + rng.normal(size=(rows, width)))


def column_tables(columns: tuple[Column, ...], rng: np.random.Generator, rules: Rules) -> dict[str, np.ndarray]:
    """`column_table` of each by name; every column has a generator of its own."""
    own = rng.spawn(len(columns))
    return {column.name: column_table(column, own[i], rules) for i, column in enumerate(columns)}


def prior_table(rng: np.random.Generator, rules: Rules) -> np.ndarray:
    """P(intent | region, segment), all intents open: (regions, segments, KB)."""
    popularity = rules.popularity_spread * even_normals(KB, 1, rng)[:, 0]
    by_region = rules.region_spread * rng.normal(size=(len(REGIONS), 1, KB))
    by_segment = rules.segment_spread * rng.normal(size=(1, len(SEGMENTS), KB))
    return softmax(popularity + by_region + by_segment)


def draw_wordings(rng: np.random.Generator, rules: Rules) -> dict[str, np.ndarray]:
    """How one shop puts things in its event texts: P(synonym | concept) (concepts, 4) of each part of a clause.

    The shares are the same for each concept, the ranks of its synonyms are drawn. The states are active and resolved.
    """
    shares, concepts = np.asarray(rules.wording), {"thing": len(THINGS), "issue": len(ISSUES), "state": 2}
    ranks = {part: np.tile(np.arange(len(shares)), (count, 1)) for part, count in concepts.items()}
    return {part: shares[rng.permuted(own, axis=1)] for part, own in ranks.items()}


@dataclass(frozen=True, eq=False)
class TextTables:
    """What the texts are drawn from: P(mentioned | intent), P(page | intent) (KB, KB), P(item kind | object)."""

    active: np.ndarray
    page: np.ndarray
    page_missing: float
    item: np.ndarray  # (objects, items)

    @classmethod
    def drawn(cls, rng: np.random.Generator, rules: Rules, *, reordered: bool = False) -> "TextTables":
        """reordered: how often a text tells the true intent, its object or its issue is the rules' shares in a drawn
        order, another shop's habits [C]."""
        objects, issues = OBJECT[:, None] == OBJECT, ISSUE[:, None] == ISSUE

        def mentions(*shares: float) -> np.ndarray:
            """With these chances the intent itself, any of its object, any of its issue, and else any at all."""
            same, thing, issue = rng.permutation([*shares, 1 - sum(shares)])[:3] if reordered else shares
            rest = 1.0 - same - thing - issue
            return same * np.eye(KB) + thing * objects / len(ISSUES) + issue * issues / len(THINGS) + rest / KB

        return cls(
            active=mentions(rules.active_true, rules.active_object, rules.active_issue),
            page=mentions(rules.page_true, rules.page_object, rules.page_issue),
            page_missing=rules.page_missing,
            item=softmax(rules.item_lean * even_normals(len(THINGS), len(ITEMS), rng)),
        )


@dataclass(frozen=True, eq=False)
class World:
    """The tables of one world. Axes: KB = intents in the order of intents.parquet, values in the columns' order."""

    seed: int
    rules: Rules
    prior: np.ndarray  # P(intent | region, segment) when all are open (regions, segments, KB)
    opens: np.ndarray  # day from which an intent exists (KB,)
    columns: dict[str, np.ndarray]  # P(value | intent), or | region, or on its own: `column_table`
    texts: TextTables
    wordings: dict[str, np.ndarray]
    attraction: np.ndarray  # P(click | looked at, true intent, shown intent) (KB, KB)
    examination: np.ndarray  # P(looked at) (positions,)
    version: int = WORLD_VERSION

    @classmethod
    def build(cls, seed: int, rules: Rules | None = None, version: int = WORLD_VERSION) -> "World":
        """The world of a seed, a whole number >= 0; `rules` only to rebuild one from what its tables say."""
        rules, opening = rules or Rules(), generator(seed, "opening days")
        opens = np.zeros(KB, dtype=np.int64)
        late = opening.choice(KB, size=rules.late_intents, replace=False)
        # Not after day 37, so that each is wanted for some days at least.
        opens[late] = opening.integers(LATE_FROM_DAY, DAYS - 4, size=rules.late_intents)
        attraction = np.full((KB, KB), rules.attracts_other)
        attraction[ISSUE[:, None] == ISSUE] = rules.attracts_issue
        attraction[OBJECT[:, None] == OBJECT] = rules.attracts_object
        np.fill_diagonal(attraction, rules.attracts_true)
        return cls(
            seed=seed,
            rules=rules,
            prior=prior_table(generator(seed, "prior"), rules),
            opens=opens,
            columns=column_tables(COLUMNS, generator(seed, "columns"), rules),
            texts=TextTables.drawn(generator(seed, "items"), rules),
            wordings=draw_wordings(generator(seed, "wordings"), rules),
            attraction=attraction,
            examination=(1.0 + np.arange(rules.positions)) ** -rules.examination_decay,
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

    def prior_by_day(self) -> np.ndarray:
        """P(intent | region, segment, day) (regions, segments, days, KB): 0 where the intent does not exist yet."""
        by_day = self.prior[:, :, None] * self.available(np.arange(DAYS))
        return by_day / by_day.sum(axis=-1, keepdims=True)
