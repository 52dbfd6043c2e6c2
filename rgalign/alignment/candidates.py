"""Candidate queries: what each of several language models would ask for a session (METHOD.md 2.3, steps 1 and 2)."""

from collections.abc import Mapping, Sequence
from hashlib import sha256

import numpy as np
import pandas as pd

from rgalign.data.lists import Lists
from rgalign.ranker.fit import refuse_other_parts
from rgalign.reasoner import generate
from rgalign.reasoner.model import Reasoner
from rgalign.reasoner.prompts import Prompter

GREEDY = -1  # candidate number of the greedy query; sampled ones count from 0
COLUMNS = ["session_id", "source", "candidate", "query", "log_probability", "tokens", "count"]


def write(
    models: Mapping[str, Reasoner],
    prompters: Mapping[str, Prompter],
    sessions: pd.DataFrame,
    *,
    samples: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 24,
    seed: int,
    first_row: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """The greedy query and `samples` sampled ones of every model, for every session.

    prompters  each model's own, by the models' names: tokenizers differ, and so do the prompts
    Columns: session_id, source (the model's name), candidate (-1: greedy, then as `queries.sample` numbers them),
    query, log_probability, tokens, count (as there). Rows: sessions in their order, models in theirs, greedy first.
    The rest as of `queries.sample`. A model's samples depend on seed and its name alone: another model beside it leaves
    them as they are. Raises ValueError that lists all faults, ReasonerError for an encoder.
    """
    faults = [] if models else ["there is no model"]
    if lacking := [name for name in models if name not in prompters]:
        faults.append(f"no prompter for {', '.join(lacking)}")
    if doubled := int(sessions["session_id"].duplicated().sum()):
        faults.append(f"{doubled} sessions are there twice")
    if faults:
        raise ValueError("no candidate can be written:\n" + "\n".join(f"  {fault}" for fault in faults))
    drawing = dict(samples=samples, temperature=temperature, top_p=top_p)
    how = dict(max_new_tokens=max_new_tokens, progress=progress)
    tables = []
    for number, (name, model) in enumerate(models.items()):
        put = prompters[name]
        prompts = put.sessions(sessions)
        best = generate.greedy(model, put, prompts, **how).assign(candidate=GREEDY)
        drawn = generate.sample(model, put, prompts, seed=_seed_of(seed, name), first_row=first_row, **drawing, **how)
        tables.append(pd.concat([best, drawn]).assign(source=name, number=number))
    table = pd.concat(tables).sort_values(["row", "number", "candidate"], ignore_index=True)
    return table.assign(session_id=sessions["session_id"].to_numpy()[table["row"]])[COLUMNS]


def written(candidates: pd.DataFrame) -> np.ndarray:
    """(rows,) bool: the query says something."""
    return (candidates["query"].str.strip() != "").to_numpy(dtype=bool)


def refuse_strangers(who: str, session_ids: Sequence[str], **lists: Lists) -> None:
    """Raise ValueError unless the lists, named by their part, are of that part, and all these sessions among them."""
    refuse_other_parts(who, **lists)
    known = {session for part in lists.values() for session in part.session_id.tolist()}
    strangers = sorted(set(map(str, session_ids)) - known)
    if strangers:
        raise ValueError(
            f"{who} refuses: {len(strangers)} sessions are not of part {' or '.join(lists)} (first: {strangers[0]!r})"
        )


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(sha256(f"{seed} {name}".encode()).digest()[:8], "big")
