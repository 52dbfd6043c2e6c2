"""The feature columns and the words of ShopWorld, read from columns.yaml and words.yaml, which say what each is for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

REGIONS = ("id", "th", "vn", "my", "ph", "sg", "tw", "br")
SEGMENTS = ("new", "regular", "loyal", "business")
INFORMATIVE = ("object", "issue", "both", "code")
GRID = (0, 1, 2, 3, 5, 8, 13, 21, 34, 55)  # values of a numeric column
TEXT_COLUMNS = ("item_title", "help_page", "event_text")


class Column(NamedTuple):
    """One discrete feature column: `values` in table order, `missing` the share of empty entries."""

    name: str
    kind: str  # categorical | numeric
    group: str
    values: tuple
    missing: float


class Thing(NamedTuple):
    """An object of the taxonomy: `title` and `about` in the knowledge base, `seen` in event texts, `asked` in chats."""

    name: str
    title: str
    about: str
    seen: tuple[str, ...]
    asked: tuple[str, ...]


class Issue(NamedTuple):
    """An issue: `title` with {} for the object; `page` begins help pages; `asked` are questions about {}."""

    name: str
    title: str
    about: str
    page: str
    seen: tuple[str, ...]
    asked: tuple[str, ...]


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _frozen(each) for key, each in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _read(name: str) -> dict:
    return _frozen(yaml.safe_load(Path(__file__).with_name(name).read_text(encoding="utf-8")))


def _columns(read: dict) -> tuple[Column, ...]:
    """All drawn columns, informative groups first. Every third column has gaps, independent of the session."""
    found: list[tuple[str, str, str, tuple]] = []
    for group, columns in read["categorical"].items():
        for name, written in columns.items():
            code, _, count = written.partition("*")  # `bg*40` stands for the codes bg1 to bg40
            values = [f"{code}{number}" for number in range(1, int(count) + 1)] if count else written.split()
            found.append((name, "categorical", group, tuple(values)))
    for group, names in read["numeric"].items():
        found += [(name, "numeric", group, GRID) for name in names.split()]
    return tuple(Column(*row, missing=(0.0, 0.0, 0.1)[i % 3]) for i, row in enumerate(found))


def _clause_words(states: Sequence, things: Sequence, issues: Sequence) -> dict[str, list[str]]:
    """Part of a clause -> the synonyms of all its concepts, one after the other."""
    parts = {"state": states, "thing": things, "issue": issues, "filler": [FILLERS]}
    return {part: [word for concept in concepts for word in concept] for part, concepts in parts.items()}


_COLUMNS, _WORDS = _read("columns.yaml"), _read("words.yaml")
PROMPT_COLUMNS = _COLUMNS["prompt"]  # what a support agent would see, in the order of the prompt
COLUMNS = _columns(_COLUMNS)
KINDS = {"region": "categorical", "user_segment": "categorical", **{column.name: column.kind for column in COLUMNS}}

THINGS = tuple(Thing(name, *own.values()) for name, own in _WORDS["objects"].items())
ISSUES = tuple(Issue(name, *own.values()) for name, own in _WORDS["issues"].items())
ACTIVE, RESOLVED, FILLERS = (_WORDS[name] for name in ("active", "resolved", "fillers"))
BRANDS, LOOKS, ITEMS, GREETINGS, VAGUE = (_WORDS[name] for name in ("brands", "looks", "items", "greetings", "vague"))
ELSEWHERE_CLAUSES, ELSEWHERE_STATES = _WORDS["other_clauses"], _WORDS["other_states"]
ELSEWHERE_THINGS, ELSEWHERE_ISSUES = _WORDS["other_objects"], _WORDS["other_issues"]
WORDS = _clause_words((ACTIVE, RESOLVED), [thing.seen for thing in THINGS], [issue.seen for issue in ISSUES])
ELSEWHERE_WORDS = _clause_words(ELSEWHERE_STATES, ELSEWHERE_THINGS, ELSEWHERE_ISSUES)
