"""The models of a run on disk: one that was trained here is saved, one that was taken as it is is only named.

models/reasoner/<name>/              a reasoner (reasoner.model.save), or
models/reasoner/<name>/source.json   model, adapter, kind, dtype, quantize, and the digests of what they lie in

A copy of a taken model would be gigabytes, and a quantised one with an adapter cannot be written back whole.
"""

import json
from pathlib import Path
from typing import Any

from rgalign.artifacts import atomic
from rgalign.outside import content
from rgalign.reasoner.folder import locate, read_json
from rgalign.reasoner.model import Reasoner, ReasonerError, load

SOURCE = "source.json"


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
        return load(str(folder), kind=kind, dtype=dtype, device=device)
    said = read_json(folder / SOURCE)
    was = said.pop("content")
    now = _contents(said["model"], said["adapter"])
    if changed := [name for name in was if was[name] != now[name]]:
        lines = "\n".join(f"  {said[name]}  ({name})" for name in changed)
        raise ReasonerError(
            f"{folder} names what has changed since notebook 02 read it:\n{lines}\nPut back what was there, or run "
            "02_reasoner and all that follows again"
        )
    return load(**said, device=device)


def _contents(model: str, adapter: str | None) -> dict[str, str]:
    found = {"model": content(locate(model))}
    return found | ({"adapter": content(locate(adapter, "adapter"))} if adapter else {})
