"""Which files of a folder make one whole model or adapter; what else lies there is told by name, with the mend.

Only names, sizes and headers are looked at, no weight is read.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from rgalign.outside import PICKLED

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"  # one file, or the parts that the index names
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LFS = b"version https://git-lfs.github.com/spec/"  # how a file begins that git clone left to git-lfs
READ = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")  # what is read of a model's folder


class ReasonerError(ValueError):
    """A reasoner cannot be had as asked; the message lists everything that is wrong and the next thing to type."""


def read_json(path: Path) -> Any:
    """A JSON file. Raises ReasonerError where it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReasonerError(f"{path} cannot be read: {error}") from None


def pointer_faults(folder: Path) -> list[str]:
    """Files that were left in Git's large file storage."""
    files = sorted(path for pattern in READ for path in folder.glob(pattern) if path.is_file())
    left = [path.name for path in files if _begins(path, LFS)]
    if not left:
        return []
    return [
        f"{', '.join(left)}: a Git LFS pointer, not the file itself: run `git lfs pull` there, or download it again"
    ]


def foreign_faults(folder: Path) -> list[str]:
    """What makes a folder something else than one whole model: an adapter alone or beside one, or GGUF alone."""
    if (folder / ADAPTER_CONFIG).is_file():
        if not (_whole(folder) or (folder / INDEX).is_file()):
            base = _base(folder)
            return [
                f"it holds an adapter alone ({ADAPTER_CONFIG}), trained on {base!r}: give that model as reasoner.model "
                "and this folder as reasoner.adapter"
            ]
        return [
            f"it holds a whole model and an adapter ({ADAPTER_CONFIG}), which would be put on unasked: move "
            f"{ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} to a folder of their own, to be given as reasoner.adapter or not"
        ]
    packed = [path.name for path in sorted(folder.glob("*.gguf"))]
    if packed and not any(folder.glob("*.safetensors")):
        return [f"its weights are GGUF ({packed[0]}), packed for llama.cpp: get the model's edition in safetensors"]
    return []


def weight_faults(folder: Path) -> list[str]:
    """Why the weights of this folder cannot be read whole."""
    if (folder / WEIGHTS).is_file():
        return damaged(folder, [WEIGHTS])
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        parts = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(parts, dict) or not parts:
            return [f"{INDEX} names no weights (weight_map): download it again"]
        names = sorted(set(map(str, parts.values())))
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            return [
                f"{len(absent)} of {len(names)} parts of its weights are missing ({absent[0]}): download them again"
            ]
        return damaged(folder, names)
    named = sorted(path.name for path in folder.glob("*.safetensors"))
    if any(name.startswith("consolidated") for name in named):
        return [f"its weights are in Mistral's own format ({named[0]}): get the edition that has {WEIGHTS}"]
    if named:
        return [f"its weights are named {named[0]}; expected {WEIGHTS}, or parts and {INDEX}"]
    if pickled := sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED):
        return [
            f"its weights are pickled ({', '.join(pickled)}), and unpickling can run code: convert them to safetensors"
        ]
    return ["no weights (*.safetensors) beside the config"]


def adapter_faults(folder: Path) -> list[str]:
    """Why this folder is no adapter that peft can read."""
    if faults := pointer_faults(folder):
        return faults
    if not (folder / ADAPTER_CONFIG).is_file():
        other = "it is a whole model: give it as reasoner.model" if _whole(folder) else "that is not a peft adapter"
        return [f"no {ADAPTER_CONFIG}: {other}"]
    if not (folder / ADAPTER_WEIGHTS).is_file():
        return [f"no {ADAPTER_WEIGHTS}; pickled adapters are not read: save it as safetensors"]
    return damaged(folder, [ADAPTER_WEIGHTS])


def damaged(folder: Path, names: list[str]) -> list[str]:
    """Those of these safetensors files that are not whole: header against size."""
    faults = []
    for name in names:
        try:
            with safe_open(folder / name, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            faults.append(f"{name} cannot be loaded, it is damaged or not whole ({error}): download it again")
    return faults


def _whole(folder: Path) -> bool:
    return any(path.is_file() and path.name != ADAPTER_WEIGHTS for path in folder.glob("*.safetensors"))


def _base(folder: Path) -> str:
    config = read_json(folder / ADAPTER_CONFIG)
    return str(config.get("base_model_name_or_path") or "an unnamed model") if isinstance(config, dict) else "?"


def _begins(path: Path, words: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(words)) == words
