"""How errors are worded: a Report of all that is wrong, counts of rows, safe reprs, near names."""

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ValidationError

_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxlist, _BRIEF.maxtuple, _BRIEF.maxdict = 3, 8, 8, 8
_BRIEF.maxstring = _BRIEF.maxother = 100

SHOWN = 3  # rows or values named after a count
LONGEST_NAME = 200  # of what is compared with other names: a megabyte would take minutes
LONGEST = 40  # characters of a value that are printed

Mask = np.ndarray | pa.ChunkedArray  # (rows,) bool


class UserError(Exception):
    """An error whose message says what to change; the command line shows it without a traceback."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the step or epoch and the parameter to change."""


def safe_repr(value: object, longest: int = LONGEST) -> str:
    """A given value in at most `longest` characters; control characters of a string are escaped."""
    if isinstance(value, str):
        text = repr(value[:longest])
    elif isinstance(value, list | tuple | dict):
        text = _BRIEF.repr(value)  # ten lines of YAML can hold a list of a billion lists
    else:
        try:
            text = str(value)
        except ValueError:  # Python prints no number of more than 4,300 digits
            text = "a number of thousands of digits"
    return text if len(text) <= longest else text[: longest - 3] + "..."


@dataclass
class Report:
    """What `check` found. `str(report)` is what `python -m rgalign check` prints; rows count from 0.

    errors  (where, what) that make the data set unusable; where is a file or table.column, what says found and expected
    notes   (where, what) worth knowing; nothing is dropped because of them
    rows    table -> number of rows
    """

    folder: Path
    errors: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)

    def error(self, where: str, what: str) -> None:
        self.errors.append((where, what))

    def note(self, where: str, what: str) -> None:
        self.notes.append((where, what))

    def error_rows(self, where: str, wrong: Mask, verb: str, then: str = "", noun: str = "row") -> bool:
        """An error '5 rows are empty (first: 17, 90, 233)' + then, where any row is wrong; returns whether one is."""
        found = bool(wrong.any() if isinstance(wrong, np.ndarray) else pc.any(wrong).as_py())
        if found:
            self.error(where, count_rows(wrong, verb, noun) + then)
        return found

    def note_rows(self, where: str, wrong: Mask, verb: str, then: str = "", noun: str = "row") -> None:
        """The same as a note."""
        if wrong.any() if isinstance(wrong, np.ndarray) else pc.any(wrong).as_py():
            self.note(where, count_rows(wrong, verb, noun) + then)

    def error_values(self, where: str, values: Iterable, verb: str, then: str = "", number: int | None = None) -> bool:
        """An error '38 rows name ... (first: 'ret_12')' + then, where there are such values; returns whether there are.

        number  of wrong rows, where `values` does not hold the value of each
        """
        values = list(values)
        number = len(values) if number is None else number
        if number:
            first = ", ".join(map(safe_repr, list(dict.fromkeys(values))[:SHOWN]))
            self.error(where, f"{_many(number, 'row')} {_plural(verb, number)} (first: {first}){then}")
        return number > 0

    def __str__(self) -> str:
        name = f"{self.folder}/" if not self.folder.is_file() else str(self.folder)
        rows = ", ".join(f"{count:,} {table}" for table, count in self.rows.items())
        lines = [f"{name} passes every check: {rows}"]
        if self.errors:
            lines = [f"{name} fails {_many(len(self.errors), 'check')}:", *_aligned(self.errors)]
        if self.notes:
            lines += [f"{_many(len(self.notes), 'note')} (nothing is dropped because of them):", *_aligned(self.notes)]
        if self.errors:
            fix = "the file" if len({where.split(".")[0] for where, _ in self.errors}) == 1 else "the files"
            again = f"python -m rgalign check {name}"
            lines.append(f"Nothing was read. Fix {fix} (rows count from 0), then: {again}")
        return "\n".join(lines)


def count_rows(wrong: Mask, verb: str, noun: str = "row") -> str:
    """'5 rows are empty (first: 17, 90, 233)' for a mask of wrong rows; verb as in 'is empty', noun in singular."""
    rows = np.flatnonzero(np.asarray(wrong, dtype=bool))
    return f"{_many(len(rows), noun)} {_plural(verb, len(rows))} (first: {', '.join(map(str, rows[:SHOWN]))})"


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """'; did you mean X?' where one of `known` looks alike, else nothing."""
    lowered = {one.lower(): one for one in known}
    close = difflib.get_close_matches(name.lower()[:LONGEST_NAME], lowered, n=1, cutoff=cutoff)
    return f"; did you mean {safe_repr(lowered[close[0]])}?" if close else ""


def section_errors(
    model: type[BaseModel], values: object, expected: Mapping[str, str], keys: str = ""
) -> list[tuple[str, str]]:
    """(dotted key, what was found and expected) of each value that a model of one section of YAML refuses.

    expected  key -> what its value must be, in words;  keys  all keys, in words
    Where a key is unknown, no missing key is reported: one of them was misspelt.
    """
    try:
        model.model_validate(values)
        return []
    except ValidationError as invalid:
        found = [(".".join(map(str, error["loc"])), error["type"], error) for error in invalid.errors()]
    keys = keys or f"{', '.join(list(expected)[:-1])} and {list(expected)[-1]}"
    misspelt, errors = any(kind == "extra_forbidden" for _, kind, _ in found), []
    for key, kind, error in found:
        wanted = expected.get(key.partition(".")[0], keys)
        if kind == "extra_forbidden":
            errors.append((key, f"is unknown; expected {keys}{nearest(key, expected)}"))
        elif kind == "value_error":
            errors.append((key.removesuffix(".[key]"), str(error["ctx"]["error"])))
        elif kind == "missing":
            errors += [] if misspelt else [(key, f"is missing; expected {wanted}")]
        else:
            errors.append((key, f"is {safe_repr(error['input'])}; expected {wanted}"))
    return errors


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
