"""The 89 feature columns of ShopWorld, read from columns.yaml, which says what moves each group of them."""

from pathlib import Path
from typing import NamedTuple

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


def _values(written: list[str]) -> tuple[str, ...]:
    """Values as written in the file; `bg*40` stands for the codes bg1 to bg40."""
    if "*" not in written[0]:
        return tuple(written)
    code, count = written[0].split("*")
    return tuple(f"{code}{number}" for number in range(1, int(count) + 1))


def _columns(read: dict) -> tuple[Column, ...]:
    """All drawn columns, informative groups first. Every third column has gaps, whatever the session is about."""
    found: list[tuple[str, str, str, tuple]] = []
    for group, columns in read["categorical"].items():
        found += [(name, "categorical", group, _values(values.split())) for name, values in columns.items()]
    for group, names in read["numeric"].items():
        found += [(name, "numeric", group, GRID) for name in names.split()]
    return tuple(Column(*row, missing=(0.0, 0.0, 0.1)[i % 3]) for i, row in enumerate(found))


_READ = yaml.safe_load(Path(__file__).with_name("columns.yaml").read_text(encoding="utf-8"))
PROMPT_COLUMNS = tuple(_READ["prompt"])  # what a support agent would see, in the order of the prompt
COLUMNS = _columns(_READ)
KINDS = {"region": "categorical", "user_segment": "categorical", **{column.name: column.kind for column in COLUMNS}}
