"""Work in numbered shards: a killed process goes on where it stood, and several processes share the shards.

A shard is a folder with a label that says what it was made of. It is made under a temporary name and renamed, so that
it is there whole or not at all.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from rgalign.run.artifacts import atomic

LABEL = "shard.json"


def shard_path(folder: Path, number: int) -> Path:
    """The folder of one shard."""
    return folder / f"shard-{number:05d}"


def label_of(shard: Path) -> Any:
    """What a shard was made of; None where it is not there."""
    try:
        return json.loads((shard / LABEL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def make_shards(folder: Path, count: int, make: Callable[[int, Path], object], *, label: Callable[[int], Any]) -> int:
    """Make this process's shards of `count`: index, index + processes, ..; returns how many it made.

    make   (number, empty folder to fill)
    label  number -> what the shard is made of, as JSON: one that is there with this label is kept, any other replaced
    """
    labels: dict[int, Any] = {}

    def is_made(number: int) -> bool:
        labels[number] = label(number)
        return label_of(shard_path(folder, number)) == labels[number]

    from rgalign.run import distributed  # late: it needs torch

    left = [number for number in range(distributed.index(), count, distributed.count()) if not is_made(number)]
    for number in left:
        with atomic(shard_path(folder, number)) as temporary:
            temporary.mkdir()
            make(number, temporary)
            (temporary / LABEL).write_text(json.dumps(labels[number]) + "\n", encoding="utf-8")
    return len(left)


def digest_of(meaning: Any, sequences: Iterable[Sequence[int]]) -> str:
    """SHA-256 of what is done (JSON) and of the token sequences that it is done with: a label."""
    hashed = sha256(json.dumps(meaning, sort_keys=True).encode())
    for sequence in sequences:
        hashed.update(np.array([len(sequence), *sequence], dtype=np.int64).tobytes())
    return hashed.hexdigest()
