"""Every fault of a data set folder at once, with file, column, rows and counts. (Being written.)"""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Report:
    folder: str
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check(folder: str | Path) -> Report:
    return Report(str(folder))
