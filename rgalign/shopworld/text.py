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

from rgalign.shopworld.tables import ISSUE, KB, OBJECT, TextTables, Wordings, draw
from rgalign.shopworld.vocabulary import BRANDS, ELSEWHERE_CLAUSES, ELSEWHERE_WORDS, ISSUES, ITEMS, LOOKS, THINGS, WORDS

CLAUSES = 3
CLAUSE, BETWEEN_CLAUSES = "state filler thing issue", " ; "
PAGES = pa.array([f"{ISSUES[s].page} {THINGS[o].title}" for o, s in zip(OBJECT, ISSUE, strict=True)], pa.large_string())


@dataclass(frozen=True, eq=False)
class Elsewhere:
    """Which event texts have another shop's grammar and words (sessions,) bool, and which of ELSEWHERE_CLAUSES."""

    rows: np.ndarray
    way: int


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


def draw_texts(
    intents: np.ndarray,
    tables: TextTables,
    wordings: Wordings,
    rng: np.random.Generator,
    elsewhere: Elsewhere | None = None,
) -> Texts:
    """The texts of sessions with the true `intents` (sessions,), in the wording of one shop.

    elsewhere  event texts that say the same in another shop's grammar and words: what is drawn does not change
    """
    sessions = len(intents)
    active = draw(tables.active, rng, intents)
    slot = rng.integers(CLAUSES, size=sessions)
    clauses = []
    for clause in range(CLAUSES):
        # A resolved clause is about any other intent with equal chance, so it says nothing about the true one.
        other = (active + rng.integers(1, KB, size=sessions)) % KB
        resolved = slot != clause
        clauses.append(_clause(np.where(resolved, other, active), resolved.astype(np.int64), wordings, rng))
    item = draw(tables.item, rng, OBJECT[intents])
    brand, look = rng.integers(len(BRANDS), size=sessions), rng.integers(len(LOOKS), size=sessions)
    page = draw(tables.page, rng, intents)
    page[rng.random(sessions) < tables.page_missing] = -1
    return Texts(
        active=active,
        item=item,
        page=page,
        event_text=_event_text(clauses, elsewhere),
        item_title=join(words(BRANDS, brand), words(LOOKS, look), words(ITEMS, item)),
        help_page=PAGES.take(pa.array(page, mask=page < 0)),
    )


def _clause(
    intents: np.ndarray, state: np.ndarray, wordings: Wordings, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Rows of WORDS (sessions,) of each part of a clause."""

    def worded(concepts: np.ndarray, shares: np.ndarray) -> np.ndarray:
        return concepts * shares.shape[1] + draw(shares, rng, concepts)

    return {
        "state": worded(state, wordings.states),
        "thing": worded(OBJECT[intents], wordings.things),
        "issue": worded(ISSUE[intents], wordings.issues),
        "filler": rng.integers(len(WORDS["filler"]), size=len(intents)),
    }


def _event_text(clauses: list[dict[str, np.ndarray]], elsewhere: Elsewhere | None) -> pa.Array:
    own = join(*(_worded(clause, CLAUSE, WORDS) for clause in clauses), separator=BETWEEN_CLAUSES)
    if elsewhere is None:
        return own
    grammar, between = ELSEWHERE_CLAUSES[elsewhere.way]
    other = join(*(_worded(clause, grammar, ELSEWHERE_WORDS) for clause in clauses), separator=between)
    return pc.if_else(pa.array(elsewhere.rows), other, own)


def _worded(clause: dict[str, np.ndarray], grammar: str, choices: dict) -> pa.Array:
    """A clause in the order of `grammar`, whose other words stay as they are."""
    parts = (
        words(choices[part], clause[part]) if part in choices else pa.scalar(part, pa.large_string())
        for part in grammar.split(" ")
    )
    return join(*parts)


def log_likelihood(texts: Texts, tables: TextTables) -> np.ndarray:
    """log P(texts | intent), up to what no intent changes: (sessions, KB)."""
    mentioned = np.log(tables.active.T)[texts.active]
    item = np.log(tables.item.T[:, OBJECT])[texts.item]
    opened = np.vstack([np.log(tables.page.T), np.zeros(KB)])[texts.page]  # the last row, -1, is for no page
    return mentioned + item + opened
