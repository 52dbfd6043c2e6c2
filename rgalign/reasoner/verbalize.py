"""Serialisation: a session, an intent or a transcript as text, before tokenising; customer text is data.

Two layouts [C]. `compact`, the tiny model's: a feature is one word (`wait_level=long`), a text is `name:` and its
words. `lines`, for pretrained models: `name: value`. Nothing that a customer wrote can look like a feature's word."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pandas as pd
import pyarrow as pa

from rgalign.data.features import Rows, as_keys, as_numbers, column_of
from rgalign.data.schema import VALUE_CHARACTERS, is_personal

TEXT_CHARACTERS = 4096  # of a text, unless the caller has another bound: cut before anything else is done to it
HISTORY_ENTRIES = 64  # the most recent ones; cut before anything else is done to them [C]
BETWEEN_LETTERS = "_'\u2019-"  # punctuation that stays inside a word: don't, part_1, e-mail
AT_AN_EDGE = re.compile(r"(?<!\w)['\u2019-]|['\u2019-](?!\w)")


@dataclass(frozen=True, eq=False)  # hashed by identity: rows share the templates of equal values
class FieldTemplate:
    """One feature as text: prefix, units (a value; a history's entries, oldest first), suffix."""

    column: str
    kind: str
    prefix: str
    units: tuple[str, ...]
    suffix: str

    @property
    def words(self) -> list[str]:
        """The white-space words in order: the tokens of a word-level tokenizer."""
        return " ".join([self.prefix, *self.units, self.suffix]).split()


class _Characters(dict):
    """A translation table filled at first use: control characters become blanks, `spaced` punctuation gets some."""

    def __init__(self, spaced: bool):
        super().__init__()
        self.spaced = spaced

    def __missing__(self, code: int) -> str | int:
        category, value = unicodedata.category(chr(code)), code
        if category in ("Cc", "Cf", "Cs"):
            value = " "
        elif self.spaced and category[0] in "PS" and chr(code) not in BETWEEN_LETTERS:
            value = f" {chr(code)} "
        self[code] = value
        return value


_PLAIN, _SPACED = _Characters(False), _Characters(True)


def clean(text: str) -> str:
    """NFC, control characters (Cc, Cf: line breaks, bidi marks) and lone surrogates as blanks, single blanks."""
    return " ".join(unicodedata.normalize("NFC", text.translate(_PLAIN)).split())


def compact_text(text: str) -> str:
    """Lower-cased words and punctuation marks separated by blanks; no word holds '=' or ':'."""
    lowered = unicodedata.normalize("NFC", text.lower()).translate(_SPACED)
    if not lowered.isascii() or "'" in lowered or "-" in lowered:
        lowered = AT_AN_EDGE.sub(r" \g<0> ", lowered)
    return " ".join(lowered.split())


def words_of(text: str) -> list[str]:
    """Runs of letters, marks and digits, lower case: without marks Thai and Hindi words fall apart at their vowels."""
    return "".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in text.lower()).split()


def _one_word(text: str) -> str:
    return re.sub(r"[\s=]", "_", clean(text).lower())


@dataclass(frozen=True)
class Serialiser:
    """Values as FieldTemplates.

    layout      compact | lines
    titles      intent_id -> title, for entries of a history that are KB ids
    characters  longest text looked at; the rest is cut before cleaning, so that a field of 1 MB costs nothing
    """

    layout: str
    titles: Mapping[str, str] = field(default_factory=dict)
    characters: int = TEXT_CHARACTERS

    def value(self, name: str, kind: str, value: object) -> FieldTemplate | None:
        """One value; None where it is missing or nothing of it is left.

        kind  categorical | numeric | text | history (a sequence, most recent last)
        """
        if kind == "history":
            return self._history(name, value)
        if value is None or value != value:
            return None
        if kind == "numeric":
            text = f"{float(value) + 0.0:.3g}"  # adding zero turns -0 into 0
        else:
            text = str(value)[: self.characters if kind == "text" else VALUE_CHARACTERS]
        if self.layout == "lines":
            text = clean(text)
            return FieldTemplate(name, kind, f"{clean(name)}:", (f" {text}",), "\n") if text else None
        text = compact_text(text) if kind == "text" else _one_word(text)
        if not text:
            return None
        if kind == "text":
            return FieldTemplate(name, kind, f"{_one_word(name)}:", (text,), "")
        return FieldTemplate(name, kind, "", (f"{_one_word(name)}={text}",), "")

    def _history(self, name: str, value: object) -> FieldTemplate | None:
        entries = [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else []
        keys = [str(each)[:VALUE_CHARACTERS] for each in entries[-HISTORY_ENTRIES:] if each is not None and each != ""]
        words = compact_text if self.layout == "compact" else clean
        shown = []  # (text, whether it needs a separator behind it: a title, or an entry of the lines layout)
        for key in keys:
            if self.layout == "compact" and key not in self.titles:
                shown.append((f"{_one_word(name)}={_one_word(key)}", False))
            elif text := words(self.titles.get(key) or key):
                shown.append((text, True))
        if not shown:
            return None
        separator = " ;" if self.layout == "compact" else ";"
        last = len(shown) - 1
        units = [text + (separator if separate and i < last else "") for i, (text, separate) in enumerate(shown)]
        if self.layout == "lines":
            return FieldTemplate(name, "history", f"{clean(name)}:", tuple(f" {unit}" for unit in units), "\n")
        prefix = f"{_one_word(name)}:" if any(separate for _, separate in shown) else ""
        return FieldTemplate(name, "history", prefix, tuple(units), "")

    def sessions(self, rows: Rows, features: Sequence[str], kinds: Mapping[str, str]) -> list[list[FieldTemplate]]:
        """Per row the features it has, in the order of `features`; a value that many rows have is serialised once.

        Raises ValueError where `rows` lack one of the columns.
        """
        names = rows.columns if isinstance(rows, pd.DataFrame) else rows.schema.names
        if absent := [name for name in features if name not in names]:
            raise ValueError(f"these rows have no column {', '.join(absent)}, which the prompt shows")
        found: list[list[FieldTemplate]] = [[] for _ in range(len(rows))]
        for name in features:
            kind, array = kinds[name], column_of(rows, name)
            if kind == "history":
                codes, values = np.arange(len(array)), array.to_pylist()
            elif kind == "numeric":
                values, codes = np.unique(as_numbers(array), return_inverse=True)
            else:
                codes, values = as_keys(array)
            made = [self.value(name, kind, value) for value in values]
            for row, code in zip(found, codes.tolist(), strict=True):
                if made[code] is not None:
                    row.append(made[code])
        return found

    def intents(self, intents: pd.DataFrame) -> list[list[FieldTemplate]]:
        """Per KB intent its title and description; without a title the description alone, without both its intent_id;
        no field where that, too, is empty or nothing but control characters."""
        texts = {"title": "text", "description": "text"}
        found = self.sessions(intents, list(texts), texts)
        for fields, key in zip(found, intents["intent_id"], strict=True):
            if not fields and (named := self.value("intent_id", "categorical", key)) is not None:
                fields.append(named)
        return found

    def transcripts(
        self, features: pa.Array, shown: Sequence[str], kinds: Mapping[str, str]
    ) -> list[list[FieldTemplate]]:
        """Per element of a map array (name -> value as text) its fields in stored order.

        Names in `kinds` but not in `shown` are left out; names that `kinds` does not have belong to another shop and
        are shown: as text where the value has a blank, else as a categorical [C]; personal ones never are.
        """
        hidden = set(kinds) - set(shown)
        there = features.filter(features.is_valid())
        begin, end = (there.offsets[0].as_py(), there.offsets[-1].as_py()) if len(there) else (0, 0)
        names, values = (side[begin:end].dictionary_encode() for side in (there.keys, there.items))
        keys, texts = names.dictionary.to_pylist(), [*values.dictionary.to_pylist(), None]
        pairs, codes = np.unique(_codes(names) * len(texts) + _codes(values), return_inverse=True)
        made = []
        for name, text in ((keys[pair // len(texts)], texts[pair % len(texts)]) for pair in pairs.tolist()):
            kind = kinds.get(name) or ("text" if len(str(text).split()) > 1 else "categorical")
            value = _number(text) if kind == "numeric" else text
            skip = name in hidden or (name not in shown and is_personal(name))
            made.append(None if skip else self.value(name, kind, value))
        flat = [made[code] for code in codes.tolist()]
        lengths = np.diff(features.offsets.to_numpy(zero_copy_only=False))
        lengths[features.is_null().to_numpy(zero_copy_only=False)] = 0
        ends = np.cumsum([0, *lengths]).tolist()
        return [[found for found in flat[begin:end] if found] for begin, end in pairwise(ends)]


def _codes(encoded: pa.DictionaryArray) -> np.ndarray:
    return encoded.indices.cast(pa.int64()).fill_null(len(encoded.dictionary)).to_numpy(zero_copy_only=False)


def _number(text: str | None) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None
