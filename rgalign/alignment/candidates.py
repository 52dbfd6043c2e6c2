"""Candidate queries: each of several language models writes some for a session (METHOD.md 2.3, steps 1 and 2)."""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import pandas as pd

from rgalign.data.lists import Lists
from rgalign.ranker.fit import refuse_other_parts
from rgalign.reasoner import generate
from rgalign.reasoner.model import Reasoner
from rgalign.reasoner.prompts import Prompter

COLUMNS = ["session_id", "source", "candidate", "query", "log_probability", "tokens", "count"]


def generate_candidates(
    models: Mapping[str, Reasoner], prompters: Mapping[str, Prompter], sessions: pd.DataFrame, *, seed: int, **how: Any
) -> pd.DataFrame:
    """The greedy query and `samples` sampled ones of every model, for every session. how: see `generate.sample`.

    Columns: session_id, source (the model's name), candidate (-1: greedy, then as `generate.sample` numbers them),
    query, log_probability, tokens, count (see there). Rows: sessions in their order, models in theirs, greedy first.
    A model's samples depend on seed and its name alone, not on the other models. Raises ReasonerError for an encoder.
    """
    tables = []
    for number, (name, model) in enumerate(models.items()):
        own_seed = int.from_bytes(sha256(f"{seed} {name}".encode()).digest()[:8], "big")
        prompts = prompters[name].sessions(sessions)
        own = generate.greedy_and_samples(model, prompters[name], prompts, seed=own_seed, **how)
        tables.append(own.assign(source=name, number=number))
    table = pd.concat(tables).sort_values(["row", "number", "candidate"], ignore_index=True)
    return table.assign(session_id=sessions["session_id"].to_numpy()[table["row"]])[COLUMNS]


def nonempty(candidates: pd.DataFrame) -> np.ndarray:
    """(rows,) bool: the query is not blank."""
    return (candidates["query"].str.strip() != "").to_numpy(dtype=bool)


def assert_sessions_of(who: str, session_ids: Sequence[str], **lists: Lists) -> None:
    """Raise ValueError unless the lists, named by their part, are of that part, and all these sessions among them."""
    refuse_other_parts(who, **lists)
    known = {session for part in lists.values() for session in part.session_id.tolist()}
    unknown = sorted(set(map(str, session_ids)) - known)
    if unknown:
        raise ValueError(
            f"{who} refuses: {len(unknown)} sessions are not of part {' or '.join(lists)} (first: {unknown[0]!r})"
        )
