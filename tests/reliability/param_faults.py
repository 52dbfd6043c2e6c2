"""Bad params, generated from the schema's leaves: a typo of each, a wrong type, a value outside its range.

Each is one `--set key=value` of `python -m rgalign run`, and the words that the refusal must hold.
"""

import random
from dataclasses import dataclass
from typing import Any

import annotated_types
from pydantic import BaseModel

from rgalign.params import flat
from rgalign.params_schema import Params

LEAVES = tuple(sorted(flat(Params())))
MORE = {  # sections that the defaults leave empty
    "alignment.lora": ("rank", "alpha", "dropout", "targets"),
    "data.sampled_negatives": ("popularity", "uniform", "smoothing"),
}
FREE = ("ranker.tuned",)  # a dictionary of sections


@dataclass(frozen=True)
class BadParam:
    """`--set key=value`, and the key that the refusal must name."""

    key: str
    value: str
    named: str
    kind: str  # typo | type | range | meaning


def _typo(word: str, draw: random.Random) -> str:
    """A word with one slip of the finger: a letter left out, doubled, swapped with its neighbour, or another one."""
    at = draw.randrange(len(word) - 1)
    slips = [
        word[:at] + word[at + 1 :],
        word[: at + 1] + word[at:],
        word[:at] + word[at + 1] + word[at] + word[at + 2 :],
        word[:at] + "x" + word[at + 1 :],
    ]
    return draw.choice([slip for slip in slips if slip and slip != word])


def typos() -> dict[str, BadParam]:
    """One of each leaf and of each section; a word that is another parameter of the same section is no typo."""
    draw, found = random.Random(0), {}
    sections = {key.rpartition(".")[0] for key in LEAVES}
    for key in [*LEAVES, *sorted(sections)]:
        section, _, leaf = key.rpartition(".")
        wrong = f"{section}.{_typo(leaf, draw)}".lstrip(".")
        if any(other == wrong or other.startswith(f"{wrong}.") for other in LEAVES):
            continue
        found[f"typo {wrong}"] = BadParam(wrong, "1", wrong, "typo")
    return found


def _kinds(key: str) -> Any:
    section: type[BaseModel] = Params
    for part in key.split("."):
        field = section.model_fields[part]
        section = field.annotation
    return field


def types() -> dict[str, BadParam]:
    """A dictionary for every leaf, a list for every leaf that is no list, words for every number."""
    found = {}
    for key, default in flat(Params()).items():
        if key in FREE:
            continue
        values = {"a dictionary": "{a: 1}", "a date": "2026-01-05"}
        if not isinstance(default, list) and default is not None:
            values["a list"] = "[1, 2]"
        if isinstance(default, int | float):
            values["words"] = "many"
        if isinstance(default, bool):
            values["a number"] = "2"
        for what, value in values.items():
            found[f"{key} {what}"] = BadParam(key, value, key, "type")
    return found


def ranges() -> dict[str, BadParam]:
    """Just outside each bound that the schema states, and what is no number at all."""
    found = {}
    for key, default in flat(Params()).items():
        if isinstance(default, bool) or not isinstance(default, int | float):
            continue
        for bound in _bounds(_kinds(key).metadata):
            found[f"{key} {bound}"] = BadParam(key, bound, key, "range")
        for endless in (".nan", ".inf", "-.inf"):
            found[f"{key} {endless}"] = BadParam(key, endless, key, "range")
    return found


def _bounds(metadata: list) -> list[str]:
    values = []
    for one in metadata:
        for name, beyond in (("ge", -1), ("le", 1), ("gt", 0), ("lt", 0)):
            limit = getattr(one, name, None) if isinstance(one, annotated_types.BaseMetadata) else None
            if limit is not None:
                values.append(str(limit + beyond))
    return values


MEANINGS = {
    "a folder without a path": BadParam("data.source", "folder", "data.path", "meaning"),
    "a source that is none": BadParam("data.source", "shopwrld", "data.source", "meaning"),
    "a model that is none": BadParam("ranker.models", "[two_towers]", "ranker.models", "meaning"),
    "a model twice": BadParam("ranker.models", "[qe_rec, qe_rec]", "ranker.models", "meaning"),
    "no model": BadParam("ranker.models", "[]", "ranker.models", "meaning"),
    "an alignment without its ranker": BadParam("ranker.models", "[two_tower]", "alignment", "meaning"),
    "a seed twice": BadParam("ranker.seeds", "[1, 1]", "ranker.seeds", "meaning"),
    "a seed below zero": BadParam("ranker.seeds", "[-1]", "ranker.seeds", "meaning"),
    "heads that do not divide": BadParam("ranker.heads", "3", "ranker.heads", "meaning"),
    "heads of the tiny model": BadParam("reasoner.tiny.heads", "3", "reasoner.tiny.heads", "meaning"),
    "an adapter of the tiny model": BadParam("reasoner.adapter", "some/lora", "reasoner.adapter", "meaning"),
    "an encoder without a name": BadParam("reasoner.kind", "encoder", "reasoner.model", "meaning"),
    "nothing to push away": BadParam("alignment.cl", "{hard: 0, in_batch: false}", "alignment.cl.in_batch", "meaning"),
    "a settings of a model that is none": BadParam("ranker.tuned", "{one_tower: {}}", "ranker.tuned", "meaning"),
    "a feature shown twice is a list": BadParam("reasoner.features", "device", "reasoner.features", "meaning"),
    "broken YAML": BadParam("ranker.seeds", "[1", "seeds", "meaning"),
    "an object": BadParam("run.seed", "!!python/object/apply:os.getcwd []", "seed", "meaning"),
    "a number of 5,000 digits": BadParam("run.seed", "9" * 5000, "seed", "meaning"),
    "a number too long to print": BadParam("run.seed", "0x" + "f" * 5000, "run.seed", "meaning"),
    "an empty key": BadParam("", "1", "is not a parameter", "meaning"),
    "a key of dots": BadParam("..", "1", "is not a parameter", "meaning"),
    "a section that is a leaf": BadParam("run.seed.value", "1", "run.seed", "meaning"),
    "no such run to go on from": BadParam("run.warm_start", "outputs/none", "run.warm_start", "meaning"),
    "no such data": BadParam("data", "{source: folder, path: /no/where}", "data.path", "meaning"),
    "a device that is not here": BadParam("run.device", "mps", "run.device", "meaning"),
}
CASES: dict[str, BadParam] = typos() | types() | ranges() | MEANINGS
