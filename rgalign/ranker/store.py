"""A ranker on disk: its weights as safetensors, what fixes its shape as config.json."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from rgalign.ranker.towers import ThreeTower, TwoTower
from rgalign.run.artifacts import atomic

CONFIG, WEIGHTS = "config.json", "weights.safetensors"
ARCHITECTURES = {"two_tower": TwoTower, "three_tower": ThreeTower}  # of variants.Variant
CLASSES = {ranker.__name__: ranker for ranker in ARCHITECTURES.values()}  # as config.json names them
BEFORE = {"intent_std": 0.3, "whitening_ridge": 0.01}  # of rankers that were saved before these were settings


class StoreError(ValueError):
    """A folder does not hold the ranker asked for; the message lists what is wrong with it."""


def save(folder: str | Path, model: nn.Module) -> None:
    """Write the folder whole or not at all; the same ranker gives the same bytes. model.config is a dataclass."""
    config = {"ranker": type(model).__name__, **asdict(model.config)}
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with atomic(Path(folder)) as temporary:
        temporary.mkdir()
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(weights, temporary / WEIGHTS)


def load(folder: str | Path, *, device: str | torch.device = "cpu") -> nn.Module:
    """The ranker that `save` wrote, of its own class, ready to score; lists and scores stay on the CPU.

    device  auto (cuda where there is one) | cpu | cuda | ..
    Raises StoreError.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise StoreError(f"{folder} holds no ranker that can be read: {error}") from None
    name = config.pop("ranker", None) if isinstance(config, dict) else None
    if not isinstance(name, str) or name not in CLASSES:
        raise StoreError(f"{folder / CONFIG} is that of {name!r}; expected a ranker: {', '.join(CLASSES)}")
    ranker = CLASSES[name]
    try:
        model = ranker(TypeAdapter(ranker.Config).validate_json(json.dumps(BEFORE | config)))
    except ValidationError as invalid:
        lines = "".join(f"\n  {_said(error)}" for error in invalid.errors())
        raise StoreError(f"{folder / CONFIG} is not that of a {name}:{lines}") from None
    except ValueError as error:  # such as heads that do not divide a width
        raise StoreError(f"{folder / CONFIG} is not that of a {name}: {error}") from None
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise StoreError(f"{folder / WEIGHTS} does not fit {CONFIG} beside it: {error}") from None
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    return model.eval().to(where)


def _said(error: Mapping[str, Any]) -> str:
    if not error["loc"]:  # no setting is wrong but the whole, such as half of a surrogate pair
        return str(error["msg"])
    key, kind = error["loc"][0], error["type"]
    if kind in ("missing", "unexpected_keyword_argument"):
        return f"{key} is {'missing' if kind == 'missing' else 'not a setting'}"
    return f"{key} is {error['input']!r}; {error['msg'].replace('Input should be', 'expected', 1)}"
