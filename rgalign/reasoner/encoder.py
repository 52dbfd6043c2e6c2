"""Sentence-transformers folders, read without sentence-transformers: which pooling, normalised or not, how long."""

import json
from dataclasses import dataclass
from pathlib import Path

from rgalign.reasoner.folder import ReasonerError, read_json, refuse

MODULES = "modules.json"
POOLINGS = {"mean": "mean", "cls": "cls", "lasttoken": "last"}  # theirs: ours
OLD_NAMES = {  # before sentence-transformers 6 each mode was a switch
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True)
class Encoder:
    """What a sentence-transformers folder says about itself; `max_tokens` is None where it sets no limit."""

    transformer: Path
    pooling: str
    normalize: bool
    max_tokens: int | None


def read_encoder(folder: Path) -> Encoder:
    """Reads modules.json and the folders it names.

    Prompts in config_sentence_transformers.json are not applied [C]: a prompt is the Prompter's business. Raises
    ReasonerError for a folder without modules.json, and for modules or poolings that are not understood.
    """
    if not (folder / MODULES).is_file():
        raise ReasonerError(
            f"{folder} has no {MODULES}: an encoder is a sentence-transformers folder; for a causal language model "
            "set kind: causal"
        )
    modules = [(str(m["type"]).rsplit(".", 1)[-1], folder / m["path"]) for m in read_json(folder / MODULES)]
    names = [name for name, _ in modules]
    if names[:2] != ["Transformer", "Pooling"] or names[2:] not in ([], ["Normalize"]):
        raise ReasonerError(
            f"{folder} is built of {', '.join(names)}; understood is Transformer, Pooling and, optionally, Normalize"
        )
    settings_file = modules[0][1] / "sentence_bert_config.json"
    settings = read_json(settings_file) if settings_file.is_file() else {}
    pooling = _pooling(read_json(modules[1][1] / "config.json"))
    faults = []
    if pooling not in POOLINGS:
        faults.append(f"its pooling is {pooling}; understood is one of {', '.join(POOLINGS)}")
    if settings.get("do_lower_case"):
        faults.append("it lower-cases text before its tokenizer, which is not understood (do_lower_case)")
    refuse(str(folder), faults)
    return Encoder(modules[0][1], POOLINGS[pooling], "Normalize" in names, settings.get("max_seq_length"))


def write_encoder(folder: Path, *, hidden_size: int, pooling: str, normalize: bool, max_tokens: int | None) -> None:
    """Writes the files that `read_encoder` reads beside a saved transformer; sentence-transformers reads them too."""
    theirs = {ours: name for name, ours in POOLINGS.items()}[pooling]
    modes = {name: mode == theirs for name, mode in OLD_NAMES.items()}
    paths = {"Transformer": "", "Pooling": "1_Pooling"} | ({"Normalize": "2_Normalize"} if normalize else {})
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (name, path) in enumerate(paths.items())
    ]
    (folder / "1_Pooling").mkdir()
    _write(folder / MODULES, modules)
    _write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": hidden_size, **modes})
    _write(folder / "sentence_bert_config.json", {"max_seq_length": max_tokens, "do_lower_case": False})


def _pooling(config: dict) -> str:
    if "pooling_mode" in config:
        mode = config["pooling_mode"]
        return mode if isinstance(mode, str) else " + ".join(mode)
    return " + ".join(mode for name, mode in OLD_NAMES.items() if config.get(name)) or "none"


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
