"""The vocabulary of ShopWorld, read from words.yaml, which says what each list is for."""

from pathlib import Path
from typing import NamedTuple

import yaml


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


def _frozen(value):
    return tuple(_frozen(each) for each in value) if isinstance(value, list) else value


_READ = yaml.safe_load(Path(__file__).with_name("words.yaml").read_text(encoding="utf-8"))
THINGS = tuple(Thing(name, *map(_frozen, own.values())) for name, own in _READ.pop("objects").items())
ISSUES = tuple(Issue(name, *map(_frozen, own.values())) for name, own in _READ.pop("issues").items())
_LISTS = {name: _frozen(words) for name, words in _READ.items()}
ACTIVE, RESOLVED, FILLERS = (_LISTS[name] for name in ("active", "resolved", "fillers"))
ELSEWHERE_CLAUSES, ELSEWHERE_STATES = _LISTS["other_clauses"], _LISTS["other_states"]
ELSEWHERE_THINGS, ELSEWHERE_ISSUES = _LISTS["other_objects"], _LISTS["other_issues"]
BRANDS, LOOKS, ITEMS = (_LISTS[name] for name in ("brands", "looks", "items"))
GREETINGS, VAGUE = _LISTS["greetings"], _LISTS["vague"]
