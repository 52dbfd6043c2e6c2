"""The three texts of a ShopWorld session, drawn from its true intent, and their likelihood.

An event text has three clauses, each a state, a filler, an object and an issue. One is still active and tells the true
intent (or something near it); two are resolved and tell nothing. A bag of words cannot say which words belong together.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rgalign.shopworld.tables import ISSUE, KB, OBJECT, TextTables, draw
from rgalign.shopworld.vocabulary import (
    ACTIVE,
    BRANDS,
    COLUMNS,
    ELSEWHERE_CLAUSES,
    ELSEWHERE_WORDS,
    ISSUES,
    ITEMS,
    LOOKS,
    THINGS,
    WORDS,
)

CLAUSES, SYNONYMS = 3, 4  # of a text; of a concept
CLAUSE, BETWEEN_CLAUSES = "state filler thing issue", " ; "
PAGES = pa.array([f"{ISSUES[s].page} {THINGS[o].title}" for o, s in zip(OBJECT, ISSUE, strict=True)], pa.large_string())


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


def any_of(choices: tuple[str, ...], rows: int, rng: np.random.Generator) -> pa.Array:
    """(rows,) of the strings, each with equal chance."""
    return words(choices, rng.integers(len(choices), size=rows))


def join(*parts: pa.Array, separator: str = " ") -> pa.Array:
    """Strings glued row by row."""
    return pc.binary_join_element_wise(*parts, pa.scalar(separator, pa.large_string()))


def draw_texts(
    intents: np.ndarray,
    tables: TextTables,
    wordings: dict[str, np.ndarray],
    rng: np.random.Generator,
    elsewhere: np.ndarray | None = None,
    way: int = 0,
) -> Texts:
    """The texts of sessions with the true `intents` (sessions,), in the wording of one shop.

    elsewhere  (sessions,) bool: event texts that say the same in another shop's grammar and words, ELSEWHERE_CLAUSES
               [way]; what is drawn does not change
    """
    sessions = len(intents)
    active = draw(tables.active, rng, intents)
    slot = rng.integers(CLAUSES, size=sessions)
    clauses = []  # part -> its words (sessions,), as rows of WORDS
    for clause in range(CLAUSES):
        # A resolved clause is about any other intent with equal chance, so it says nothing about the true one.
        other = (active + rng.integers(1, KB, size=sessions)) % KB
        about = np.where(slot == clause, active, other)
        concepts = {"state": (slot != clause).astype(np.int64), "thing": OBJECT[about], "issue": ISSUE[about]}
        rows = {part: each * SYNONYMS + draw(wordings[part], rng, each) for part, each in concepts.items()}
        clauses.append(rows | {"filler": rng.integers(len(WORDS["filler"]), size=sessions)})
    item = draw(tables.item, rng, OBJECT[intents])
    brand, look = any_of(BRANDS, sessions, rng), any_of(LOOKS, sessions, rng)
    page = draw(tables.page, rng, intents)
    page[rng.random(sessions) < tables.page_missing] = -1
    event_text = join(*(_worded(clause, CLAUSE, WORDS) for clause in clauses), separator=BETWEEN_CLAUSES)
    if elsewhere is not None:
        grammar, between = ELSEWHERE_CLAUSES[way]
        others = join(*(_worded(clause, grammar, ELSEWHERE_WORDS) for clause in clauses), separator=between)
        event_text = pc.if_else(pa.array(elsewhere), others, event_text)
    item_title = join(brand, look, words(ITEMS, item))
    return Texts(active, item, page, event_text, item_title, help_page=PAGES.take(pa.array(page, mask=page < 0)))


def _worded(clause: dict[str, np.ndarray], grammar: str, choices: dict) -> pa.Array:
    """A clause in the order of `grammar`, whose other words stay as they are."""
    parts = (
        words(choices[part], clause[part]) if part in choices else pa.scalar(part, pa.large_string())
        for part in grammar.split(" ")
    )
    return join(*parts)


TELLS = {  # group of a column -> what it tells of the session's intent
    "object": "moves a little with the object", "issue": "moves a little with the issue",
    "both": "moves a little with object and issue", "code": "a code that moves with the single intent alone",
}  # fmt: skip


def explained(column: str, value: str) -> str:
    """What a ShopWorld session's value tells of its intent, for people to read; of the event text clause by clause."""
    if column == "event_text":
        return "; ".join(map(_clause, value.split(BETWEEN_CLAUSES)))
    if column == "help_page":
        return "the page read last: often the intent, its object or its issue"
    if column == "item_title":
        return "brand, look and kind of an item; the kind moves with the object"
    groups = {own.name: own.group for own in COLUMNS}
    return TELLS.get(groups.get(column, ""), "nothing: noise, as in every log")


def _clause(clause: str) -> str:
    """`open on web cashback wrong` -> `STILL OPEN: coin balance, wrong (cashback, wrong)`."""
    state, *_, thing, issue = clause.split(" ")
    things = [own.title for own in THINGS if thing in own.seen]
    issues = [own.name for own in ISSUES if issue in own.seen]
    if not things or not issues:
        return clause
    return f"{'STILL OPEN' if state in ACTIVE else 'over'}: {things[0]}, {issues[0]} ({thing}, {issue})"


def log_likelihood(texts: Texts, tables: TextTables) -> np.ndarray:
    """log P(texts | intent), up to what no intent changes: (sessions, KB)."""
    mentioned = np.log(tables.active.T)[texts.active]
    item = np.log(tables.item.T[:, OBJECT])[texts.item]
    opened = np.vstack([np.log(tables.page.T), np.zeros(KB)])[texts.page]  # the last row, -1, is for no page
    return mentioned + item + opened
