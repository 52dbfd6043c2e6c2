"""The three texts of a ShopWorld session, drawn from its true intent, and their likelihood.

An event text has three clauses, each a state, a filler, an object and an issue. One is still active and tells the true
intent (or something near it); two are resolved and tell nothing. All clauses draw their words from the same
vocabulary, so a bag of words holds three objects, three issues and three states and cannot say which belong together:
who wants to know must read.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rgalign.data.world_tables import ISSUE, KB, OBJECT, Wordings, cumulative, draw
from rgalign.data.world_words import ACTIVE, BRANDS, FILLERS, ISSUES, ITEMS, LOOKS, RESOLVED, THINGS

CLAUSES = 3
BETWEEN_CLAUSES = " ; "
PAGES = pa.array([f"{ISSUES[s].page} {THINGS[o].title}" for o, s in zip(OBJECT, ISSUE, strict=True)], pa.large_string())


@dataclass(frozen=True, eq=False)
class TextTables:
    """What the texts are drawn from: P(told | intent), P(page | intent) (KB, KB), P(item kind | object)."""

    active: np.ndarray
    page: np.ndarray
    page_missing: float
    item: np.ndarray  # (objects, items)


@dataclass(frozen=True, eq=False)
class Texts:
    """What the texts of some sessions say, all (sessions,): all that their likelihood depends on, and the strings."""

    active: np.ndarray  # intent that the active clause tells
    item: np.ndarray  # kind of the item
    page: np.ndarray  # intent whose help page was open, -1 = none
    event_text: pa.Array
    item_title: pa.Array
    help_page: pa.Array


def words(choices: tuple[str, ...] | list[str], codes: np.ndarray) -> pa.Array:
    """The chosen strings, one a code."""
    return pa.array(choices, pa.large_string()).take(pa.array(codes))


def join(*parts: pa.Array, separator: str = " ") -> pa.Array:
    """Strings glued row by row."""
    return pc.binary_join_element_wise(*parts, pa.scalar(separator, pa.large_string()))


def draw_texts(intents: np.ndarray, tables: TextTables, wordings: Wordings, rng: np.random.Generator) -> Texts:
    """The texts of sessions with the true `intents` (sessions,), in the wording of one shop."""
    sessions = len(intents)
    active = draw(cumulative(tables.active)[intents], rng)
    slot = rng.integers(CLAUSES, size=sessions)
    clauses = []
    for clause in range(CLAUSES):
        # A resolved clause is about any other intent with equal chance, so it says nothing about the true one.
        other = (active + rng.integers(1, KB, size=sessions)) % KB
        resolved = slot != clause
        clauses.append(_clause(np.where(resolved, other, active), resolved.astype(np.int64), wordings, rng))
    item = draw(cumulative(tables.item)[OBJECT[intents]], rng)
    brand, look = rng.integers(len(BRANDS), size=sessions), rng.integers(len(LOOKS), size=sessions)
    page = draw(cumulative(tables.page)[intents], rng)
    page[rng.random(sessions) < tables.page_missing] = -1
    return Texts(
        active=active,
        item=item,
        page=page,
        event_text=join(*clauses, separator=BETWEEN_CLAUSES),
        item_title=join(words(BRANDS, brand), words(LOOKS, look), words(ITEMS, item)),
        help_page=PAGES.take(pa.array(page, mask=page < 0)),
    )


def _clause(intents: np.ndarray, state: np.ndarray, wordings: Wordings, rng: np.random.Generator) -> pa.Array:
    things, issues = OBJECT[intents], ISSUE[intents]
    synonyms = len(ACTIVE)

    def worded(concepts: np.ndarray, shares: np.ndarray, choices: list[str]) -> pa.Array:
        return words(choices, concepts * synonyms + draw(cumulative(shares)[concepts], rng))

    state_words = worded(state, wordings.states, [*ACTIVE, *RESOLVED])
    thing_words = worded(things, wordings.things, [word for thing in THINGS for word in thing.seen])
    issue_words = worded(issues, wordings.issues, [word for issue in ISSUES for word in issue.seen])
    filler = words(FILLERS, rng.integers(len(FILLERS), size=len(intents)))
    return join(state_words, filler, thing_words, issue_words)


def log_likelihood(texts: Texts, tables: TextTables) -> np.ndarray:
    """log P(texts | intent), up to what no intent changes: (sessions, KB)."""
    told = np.log(tables.active.T)[texts.active]
    item = np.log(tables.item.T[:, OBJECT])[texts.item]
    opened = np.vstack([np.log(tables.page.T), np.zeros(KB)])[texts.page]  # the last row, -1, is for no page
    return told + item + opened
