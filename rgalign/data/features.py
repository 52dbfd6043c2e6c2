"""Which id stands for which value: a FeatureSpace, fitted on training sessions alone, in memory or in batches.

Nothing of the development users, of valid or of test enters it. A value that was not seen often enough to be learnt
shares one id, unknown, with all values that later turn up for the first time; so unknown has a trained embedding.
"""

import json
from dataclasses import asdict, dataclass
from functools import cached_property

MISSING, UNKNOWN, FIRST = 0, 1, 2  # ids: no value, a value that is not in the vocabulary, the first value of it


@dataclass(frozen=True)
class Field:
    """One column of ids: 0 missing, 1 unknown, from 2 the values (categorical, history) or the bins (numeric, length).

    edges: bin i holds edges[i - 1] <= x < edges[i]; None where train had no number at all: every number is unknown.
    """

    name: str
    kind: str  # categorical | numeric | history | length
    values: tuple[str, ...] = ()
    edges: tuple[float, ...] | None = None

    @property
    def size(self) -> int:
        """Number of ids, the two reserved ones included."""
        bins = 0 if self.edges is None else len(self.edges) + 1
        return FIRST + len(self.values) + bins

    @cached_property
    def ids(self) -> dict[str, int]:
        return {value: FIRST + i for i, value in enumerate(self.values)}


@dataclass(frozen=True)
class FeatureSpace:
    """Vocabularies and bins of one training set; everything that encoding needs and nothing else.

    fields      categorical, numeric and length-of-history columns, in the order of dataset.yaml
    histories   history columns
    texts       text columns, hashed together into one bag of words
    intents     intents clicked in train, by falling number of clicks
    categories  categories of those intents
    """

    fields: tuple[Field, ...]
    histories: tuple[Field, ...]
    texts: tuple[str, ...]
    intents: tuple[str, ...]
    categories: tuple[str, ...]
    word_buckets: int
    word_pairs: bool
    max_history: int

    @property
    def field_names(self) -> tuple[str, ...]:
        return tuple(field.name for field in self.fields)

    @property
    def field_sizes(self) -> tuple[int, ...]:
        """Vocabulary size of each column of Lists.fields."""
        return tuple(field.size for field in self.fields)

    @property
    def history_sizes(self) -> tuple[int, ...]:
        """Vocabulary size of each Bag of Lists.history."""
        return tuple(field.size for field in self.histories)

    @property
    def intent_ids_size(self) -> int:
        """Vocabulary size of Intents.id."""
        return FIRST + len(self.intents)

    @property
    def category_size(self) -> int:
        """Vocabulary size of Intents.category."""
        return FIRST + len(self.categories)

    def to_json(self) -> str:
        """The same space gives the same text, byte for byte."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    @staticmethod
    def from_json(text: str) -> "FeatureSpace":
        raw = json.loads(text)
        for key in ("fields", "histories"):
            raw[key] = tuple(
                Field(f["name"], f["kind"], tuple(f["values"]), None if f["edges"] is None else tuple(f["edges"]))
                for f in raw[key]
            )
        for key in ("texts", "intents", "categories"):
            raw[key] = tuple(raw[key])
        return FeatureSpace(**raw)
