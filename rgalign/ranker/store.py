"""A ranker on disk: its weights as safetensors, what fixes its shape as config.json."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
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
    model = ranker(_config(ranker.Config, config, folder / CONFIG))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise StoreError(f"{folder / WEIGHTS} does not fit {CONFIG} beside it: {error}") from None
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    return model.eval().to(where)


def _config(kind: type, given: dict[str, Any], path: Path) -> Any:
    given, names = BEFORE | given, {field.name for field in fields(kind)}
    errors = [f"{key} is not a setting of {kind.__name__}" for key in sorted(given.keys() - names)]
    errors += [f"{key} is missing" for key in sorted(names - given.keys())]
    if not errors:
        try:
            return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()})
        except (TypeError, ValueError) as error:
            errors = [str(error)]
    raise StoreError(f"{path} fails {len(errors)} check{'s' if len(errors) > 1 else ''}:\n  " + "\n  ".join(errors))
