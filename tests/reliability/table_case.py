"""A case of a data set that is not as it should be: what is changed, and what must become of it.

refused  `check` and `read` give one error that names file or column, what was found, and rows where rows are at fault
noted    the data set is read whole, and a stated rule is told as a note
kept     the data set is read whole, every value as it was written, and nothing need be said
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

Change = Callable[[dict[str, pa.Table], dict], None]


@dataclass(frozen=True)
class Case:
    """change works on the tables, damage on the folder once it is written; words must all be in the report."""

    change: Change
    words: tuple[str, ...] = ()
    outcome: str = "refused"
    damage: Callable[[Path], None] | None = None


def nothing(tables: dict[str, pa.Table], meta: dict) -> None:
    """No change of the tables: the damage is done to the files."""


def refused(change: Change, *words: str) -> Case:
    return Case(change, words)


def noted(change: Change, *words: str) -> Case:
    return Case(change, words, "noted")


def kept(change: Change) -> Case:
    return Case(change, outcome="kept")


def damaged(damage: Callable[[Path], None], *words: str, outcome: str = "refused") -> Case:
    return Case(nothing, words, outcome, damage)


def at(row: int) -> str:
    """How a report names the one row at fault."""
    return f"(first: {row})"
