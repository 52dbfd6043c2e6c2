"""torch's random state, borrowed and given back: library code never seeds the caller's."""

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch draws from this seed (initialisation, dropout); its state outside stays as it was."""
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed(seed)
        yield


def derived(seed: int, name: str) -> int:
    """A seed of its own for each named use of another, 0 to 2**32 - 1."""
    return int.from_bytes(sha256(f"{seed} {name}".encode()).digest()[:4], "big")
