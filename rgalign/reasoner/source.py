"""The models of a run on disk: one that was trained here is saved, one that was taken as it is is only named.

models/reasoner/<name>/              a reasoner (reasoner.model.save), or
models/reasoner/<name>/source.json   model, adapter, kind, dtype, quantize, and the digests of what they lie in

A copy of a taken model would be gigabytes, and a quantised one with an adapter cannot be written back whole.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from peft import PeftModel
from torch import nn

from rgalign.reasoner.adapter import adapted
from rgalign.reasoner.folder import locate, read_json
from rgalign.reasoner.model import Reasoner, ReasonerError, load, save
from rgalign.run.artifacts import atomic
from rgalign.run.external_inputs import content

SOURCE = "source.json"
# model -> where its weights were read from. By the very object: a copy, which may be trained, is not among them.
_READ_FROM: WeakKeyDictionary[nn.Module, dict[str, str | None]] = WeakKeyDictionary()


def name_source(folder: Path, model: str, *, adapter: str | None = None, **how: Any) -> None:
    """Write the folder that stands for a model taken as it is. how: the arguments of `load` but device."""
    said = {"model": model, "adapter": adapter, **how, "content": _contents(model, adapter)}
    with atomic(folder) as temporary:
        temporary.mkdir()
        (temporary / SOURCE).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def load_saved(folder: Path, *, kind: str = "causal", dtype: str = "float32", device: str = "auto") -> Reasoner:
    """The reasoner of a folder of models/reasoner. kind, dtype: of one that was trained here; others say it themselves.

    Raises ReasonerError, also where a model taken as it is is no longer what the run has read.
    """
    if not (folder / SOURCE).is_file():
        return read_from(load(str(folder), kind=kind, dtype=dtype, device=device), folder)
    said = read_json(folder / SOURCE)
    was = said.pop("content")
    now = _contents(said["model"], said["adapter"])
    if changed := [name for name in was if was[name] != now[name]]:
        lines = "\n".join(f"  {said[name]}  ({name})" for name in changed)
        raise ReasonerError(
            f"{folder} names what has changed since notebook 02 read it:\n{lines}\nPut back what was there, or run "
            "02_reasoner and all that follows again"
        )
    return read_from(load(**said, device=device), folder)


def read_from(reasoner: Reasoner, folder: Path, adapter: Path | None = None) -> Reasoner:
    """The reasoner itself, of which it is now known where other processes may read it (`hand_over`)."""
    _READ_FROM[reasoner.model] = {"folder": str(folder.absolute()), "adapter": adapter and str(adapter.absolute())}
    return reasoner


def place_of(reasoner: Reasoner) -> dict[str, str | None] | None:
    """What `read_from` was told of this reasoner's very model, if it is all still there."""
    place = _READ_FROM.get(reasoner.model)
    return place if place and all(Path(path).is_dir() for path in place.values() if path) else None


def hand_over(reasoner: Reasoner, folder: Path) -> dict[str, str | None]:
    """Where another process finds these weights, for `take_over`; saved into `folder` where they lie nowhere yet."""
    place = place_of(reasoner)
    if place is None:
        if isinstance(reasoner.model, PeftModel):
            raise ReasonerError(f"the adapter of {reasoner.name} lies in no folder; other processes cannot read it")
        save(reasoner, folder)
        place = {"folder": str(folder.absolute()), "adapter": None}
    return {**place, "name": reasoner.name, "kind": reasoner.kind}


def take_over(said: dict[str, str | None], *, dtype: str, device: str) -> Reasoner:
    """The reasoner that `hand_over` told of."""
    base = load_saved(Path(said["folder"]), kind=said["kind"], dtype=dtype, device=device)
    # what an adapter will say it belongs to: the folder is only where the weights lay
    base.model.name_or_path = base.model.config.name_or_path = said["name"]
    base = replace(base, name=said["name"])
    if said["adapter"] is None:
        return base
    return replace(base, model=adapted(base.model, Path(said["adapter"]), base.name, merge=False))


def _contents(model: str, adapter: str | None) -> dict[str, str]:
    found = {"model": content(locate(model))}
    return found | ({"adapter": content(locate(adapter, "adapter"))} if adapter else {})
