"""The words of a check: a Report of faults and notes, and how rows, values and near names are put."""

import difflib
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

# How a value that somebody gave is put into a message: escaped and short, however much there is of it.

_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxlist, _BRIEF.maxtuple, _BRIEF.maxdict = 3, 8, 8, 8
_BRIEF.maxstring = _BRIEF.maxother = 100


def quoted(value: object, longest: int) -> str:
    """The value in at most `longest` characters; strings as Python writes them, so that nothing in them is obeyed."""
    if isinstance(value, str):
        text = repr(value[:longest])
    elif isinstance(value, list | tuple | dict):
        text = _BRIEF.repr(value)  # ten lines of YAML can say a list of a billion lists
    else:
        try:
            text = str(value)
        except ValueError:  # Python prints no number of more than 4,300 digits
            text = "a number of thousands of digits"
    return text if len(text) <= longest else text[: longest - 3] + "..."


SHOWN = 3  # rows or values named after a count
LONGEST_NAME = 200  # of what is compared with other names: a megabyte would take minutes
LONGEST = 40  # characters of a value that are printed


@dataclass
class Report:
    """What `check` found. `str(report)` is what `python -m rgalign check` prints; rows count from 0.

    faults  (where, what) that make the data set unusable
    notes   (where, what) worth knowing; nothing is dropped because of them
    rows    table -> number of rows
    """

    folder: Path
    faults: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)

    def fault(self, where: str, what: str) -> None:
        """Adds a fault: `where` is file or table.column, `what` says found and expected."""
        self.faults.append((where, what))

    def note(self, where: str, what: str) -> None:
        """Adds a note: counted, not fatal."""
        self.notes.append((where, what))

    def __str__(self) -> str:
        name = f"{self.folder}/" if not self.folder.is_file() else str(self.folder)
        lines = []
        if self.faults:
            lines += [f"{name} fails {_many(len(self.faults), 'check')}:", *_aligned(self.faults)]
        else:
            rows = ", ".join(f"{count:,} {name}" for name, count in self.rows.items())
            lines.append(f"{name} passes every check: {rows}")
        if self.notes:
            lines += [f"{_many(len(self.notes), 'note')} (nothing is dropped because of them):", *_aligned(self.notes)]
        if self.faults:
            fix = "the file" if len({where.split(".")[0] for where, _ in self.faults}) == 1 else "the files"
            again = f"python -m rgalign check {name}"
            lines.append(f"Nothing was read. Fix {fix} (rows count from 0), then: {again}")
        return "\n".join(lines)


def count_rows(wrong: np.ndarray | pa.ChunkedArray, verb: str, noun: str = "row") -> str:
    """'5 rows are empty (first: 17, 90, 233)' for a mask of wrong rows; verb as in 'is empty', noun in singular."""
    mask = np.asarray(wrong, dtype=bool)
    rows = np.flatnonzero(mask)
    return f"{_many(len(rows), noun)} {_plural(verb, len(rows))} (first: {', '.join(map(str, rows[:SHOWN]))})"


def count_values(values: Iterable, number: int, verb: str, noun: str = "row") -> str:
    """'38 rows name ... (first: 'ret_12')': as `count_rows`, with the first different values instead of row numbers."""
    different = list(dict.fromkeys(values))[:SHOWN]
    return f"{_many(number, noun)} {_plural(verb, number)} (first: {', '.join(map(quote, different))})"


def quote(value: object) -> str:
    """A value of the data as it may be printed: escaped, cut at 40 characters."""
    return quoted(value, LONGEST)


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """'; did you mean X?' where one of `known` looks alike, else nothing."""
    lowered = {one.lower(): one for one in known}
    close = difflib.get_close_matches(name.lower()[:LONGEST_NAME], lowered, n=1, cutoff=cutoff)
    return f"; did you mean {quote(lowered[close[0]])}?" if close else ""


def _many(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _plural(verb: str, number: int) -> str:
    """'is empty' -> 'are empty', 'has no click' -> 'have no click', 'names x' -> 'name x'."""
    if number == 1:
        return verb
    first, _, rest = verb.partition(" ")
    first = {"is": "are", "has": "have", "does": "do"}.get(first) or first.removesuffix("s")
    return f"{first} {rest}"


def _aligned(entries: list[tuple[str, str]]) -> list[str]:
    width = max(len(where) for where, _ in entries)
    return [f"  {where:<{width}}  {what}" for where, what in entries]
