"""The reasoner: a causal language model (or, where nothing is decoded, a text encoder) with its tokenizer.

METHOD.md 2.1. Any causal model that transformers loads will do [P: Qwen3-4B]; `tiny` is a small one for laptops [C]."""

import hashlib
import json
import tempfile
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rgalign.reasoner.adapter import adapted, read_adapter
from rgalign.reasoner.folder import (
    Encoder,
    ReasonerError,
    causal_errors,
    folder_errors,
    load_tokenizer,
    load_weights,
    locate,
    positions,
    read_encoder,
    read_json,
    refuse,
    vocabulary_errors,
    write_encoder,
)
from rgalign.run.artifacts import atomic, digest
from rgalign.run.external_inputs import content, given_folder
from rgalign.run.gguf import name_of
from rgalign.seeding import seeded

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class Reasoner:
    """A model, its tokenizer and how its states become one vector.

    name       hub name, or the last part of the folder's path
    kind       causal | encoder; an encoder cannot write queries
    pooling    last | mean | cls: which token states make the vector; of causal models last [P] or mean
    normalize  whether vectors are scaled to length one
    """

    name: str
    kind: str
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    pooling: str = "last"
    normalize: bool = False

    @property
    def hidden_size(self) -> int:
        return self.model.config.get_text_config().hidden_size

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def plain(self) -> nn.Module:
        """The model without peft's wrapper (a LoRA adapter stays active in it)."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def trunk(self) -> nn.Module:
        """The plain model without its language head."""
        return self.plain.base_model

    @property
    def ends(self) -> frozenset[int]:
        """Ids with which this model ends what it writes: its tokenizer's end of text, and what its configs list."""
        configs = (getattr(self.plain, "generation_config", None), self.plain.config.get_text_config())
        said = [self.tokenizer.eos_token_id, *(getattr(config, "eos_token_id", None) for config in configs)]
        return frozenset(i for ids in said if ids is not None for i in (ids if isinstance(ids, list) else [ids]))

    @property
    def positions(self) -> int | None:
        """Most tokens it can read at once; None where nothing but memory limits it."""
        return positions(self.plain.config)


@dataclass(frozen=True)
class Found:
    """A model's folder with what is known of it before its weights are read. encoder: None for a causal model."""

    name: str
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    config: PreTrainedConfig
    encoder: Encoder | None


def look(
    model: str, *, kind: str = "causal", adapter: str | None = None, device: str = "auto", quantize: str | None = None
) -> Found:
    """Finds the model that `load` would load, and refuses what can be refused before any weight is read."""
    refuse(f"model {model!r} with these settings", _setting_errors(kind, adapter, device, quantize))
    folder = locate(model)
    name = folder.resolve().name if given_folder(model) is not None else name_of(model)
    encoder = read_encoder(folder) if kind == "encoder" else None
    place = encoder.transformer if encoder else folder
    refuse(str(folder), folder_errors(place) or ([] if encoder else causal_errors(place)))
    if adapter:
        read_adapter(locate(adapter, "adapter"), name)
    tokenizer = load_tokenizer(place)
    if encoder and encoder.max_tokens:
        tokenizer.model_max_length = min(tokenizer.model_max_length, encoder.max_tokens)
    try:
        config = AutoConfig.from_pretrained(place, local_files_only=True)
    except Exception as error:  # whatever a broken file makes a config class raise
        raise ReasonerError(f"the config in {place} cannot be read: {error}") from None
    refuse(str(place), vocabulary_errors(tokenizer, config.get_text_config().vocab_size))
    return Found(name, place, tokenizer, config, encoder)


def load(
    model: str,
    *,
    kind: str = "causal",
    adapter: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    quantize: str | None = None,
    pooling: str = "last",
) -> Reasoner:
    """A reasoner from this machine: a folder, an installed package that carries one, or a hub name already downloaded.

    kind      causal: any causal language model; encoder: a sentence-transformers folder, with its own pooling
    adapter   folder or hub name of a peft adapter of this very model (causal only); merged, unless quantised
    dtype     float32 | bfloat16 | float16
    device    auto (cuda where there is one) | cpu | cuda | cuda:1 | ..
    quantize  8bit | 4bit, by bitsandbytes on CUDA
    pooling   last | mean, of a causal model
    Raises ReasonerError that lists all that is wrong.
    """
    found = look(model, kind=kind, adapter=adapter, device=device, quantize=quantize)
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    options: dict[str, Any] = {"dtype": DTYPES[dtype]}
    if quantize:  # 4-bit weights would be unpacked to float32, unless bitsandbytes is told what to compute in
        four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": DTYPES[dtype]}
        packing = {"load_in_8bit": True} if quantize == "8bit" else {"load_in_4bit": True, **four}
        options |= {"quantization_config": BitsAndBytesConfig(**packing), "device_map": {"": where}}
    auto, spare = (AutoModel, ("pooler.",)) if found.encoder else (AutoModelForCausalLM, ())
    loaded = load_weights(auto, found.folder, spare=spare, **options)
    # peft writes it into its adapters: no machine's paths
    loaded.name_or_path = loaded.config.name_or_path = found.name
    if adapter:
        loaded = adapted(loaded, locate(adapter, "adapter"), found.name, merge=not quantize)
    put = loaded if quantize else loaded.to(where)
    if found.encoder:
        return Reasoner(found.name, kind, put, found.tokenizer, found.encoder.pooling, found.encoder.normalize)
    return Reasoner(found.name, kind, put, found.tokenizer, pooling)


def tiny(
    tokenizer: PreTrainedTokenizerBase, *, hidden: int = 64, layers: int = 2, heads: int = 2, seed: int
) -> Reasoner:
    """A random causal model of Qwen3's architecture with tied embeddings, on the CPU, in float32 [C].

    hidden is a multiple of 2 * heads (rotary positions turn pairs). Raises ReasonerError.
    """
    errors = []
    if min(hidden, layers, heads) < 1 or hidden % (2 * heads):
        errors.append(f"hidden {hidden}, layers {layers}, heads {heads}: hidden must be a multiple of 2 * heads")
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        errors.append("its tokenizer needs a pad and an end-of-text token")
    refuse("a tiny model", errors)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,  # as Qwen3-0.6B
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        attention_bias=True,  # so that a head can look at the word before, before it has learnt any content
        initializer_range=hidden**-0.5,  # Qwen's 0.02 is for widths of thousands
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    with seeded(seed):
        model = Qwen3ForCausalLM(config)
    return Reasoner("tiny", "causal", model.eval(), tokenizer)


def save(reasoner: Reasoner, folder: str | Path) -> None:
    """Write model (safetensors) and tokenizer, whole or not at all; the same reasoner gives the same bytes.
    `load(folder, kind=reasoner.kind)` reads it; a peft model writes its adapter alone, for `load(.., adapter=)`."""
    if getattr(reasoner.model, "_hf_peft_config_loaded", False):  # transformers would write the adapter alone
        raise ReasonerError(f"{reasoner.name} has an adapter inside, put there by transformers: merge it before saving")
    with atomic(Path(folder)) as temporary:
        temporary.mkdir()
        reasoner.model.save_pretrained(temporary)
        reasoner.tokenizer.save_pretrained(temporary)
        if reasoner.kind == "encoder":
            longest = reasoner.tokenizer.model_max_length
            most = longest if longest < 1e9 else None  # a tokenizer without limit says 1e30
            write_encoder(temporary, reasoner.hidden_size, reasoner.pooling, reasoner.normalize, max_tokens=most)


def fingerprint(reasoner: Reasoner) -> str:
    """SHA-256 of weights (names, types, shapes, bytes), tokenizer files and pooling: equal for equal reasoners."""
    hashed = hashlib.sha256(f"{reasoner.kind} {reasoner.pooling} {reasoner.normalize}\n".encode())
    for name, value in sorted(reasoner.model.state_dict().items()):
        hashed.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        hashed.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    with tempfile.TemporaryDirectory() as folder:
        reasoner.tokenizer.save_pretrained(folder)
        hashed.update(digest(Path(folder)).encode())
    return hashed.hexdigest()


def _setting_errors(kind: str, adapter: str | None, device: str, quantize: str | None) -> list[str]:
    """What the schema cannot know: what this machine has, and what an encoder takes."""
    errors = []
    try:
        wanted = torch.device("cpu" if device == "auto" else device)
        module = getattr(torch, wanted.type, None)
        count = module.device_count() if hasattr(module, "device_count") else 0
        if wanted.type != "cpu" and (wanted.index or 0) >= count:
            errors.append(f"device {device!r} is not on this machine; auto takes what there is")
    except RuntimeError:
        errors.append(f"device {device!r} is none that torch knows; auto, cpu and cuda are")
    if kind == "encoder" and (adapter or quantize):
        errors.append("adapter and quantize are for causal models; an encoder takes neither")
    if quantize is not None:
        lacking = [] if torch.cuda.is_available() else ["a CUDA device (none is here)"]
        lacking += [] if find_spec("bitsandbytes") else ["bitsandbytes (pip install bitsandbytes)"]
        if lacking:
            errors.append(f"quantize {quantize} needs {' and '.join(lacking)}; leave quantize empty to do without")
        if device == "cpu":
            errors.append(f"quantize {quantize} runs on CUDA alone; device is cpu")
    return errors


# The models of a run on disk, in models/reasoner/<name>/: one that was trained here is saved; of a pretrained one only
# source.json is written (model, adapter, kind, dtype, quantize, digests of their folders), since a copy would be
# gigabytes, and a quantised one with an adapter cannot be written back whole.
SOURCE = "source.json"
# model -> where its weights were read from. By the very object: a copy, which may be trained, is not among them.
_READ_FROM: WeakKeyDictionary[nn.Module, dict[str, str | None]] = WeakKeyDictionary()


def name_source(folder: Path, model: str, *, adapter: str | None = None, **how: Any) -> None:
    """Write the folder that refers to a pretrained model. how: the arguments of `load` except device."""
    source = {"model": model, "adapter": adapter, **how, "content": _contents(model, adapter)}
    with atomic(folder) as temporary:
        temporary.mkdir()
        (temporary / SOURCE).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")


WARMED_UP = "adapter"  # of a pretrained model that was warmed up here (reasoner.warmup)


def fold_name(fold: int) -> str:
    """The folder of the adapter that has not read what the users of this fold typed."""
    return f"fold-{fold}"


def load_saved(
    folder: Path,
    *,
    kind: str = "causal",
    dtype: str = "float32",
    device: str = "auto",
    pooling: str = "last",
    adapter: str | None = WARMED_UP,
) -> Reasoner:
    """The reasoner of a folder of models/reasoner, with the adapter of its warm-up merged, where it had one.

    kind, dtype, pooling  of one that was trained here; else they are stored
    adapter               another of its adapters (`fold_name`); None: as it was before the warm-up
    Raises ReasonerError, also where a pretrained model has changed since the run read it.
    """
    if not (folder / SOURCE).is_file():
        return read_from(load(str(folder), kind=kind, dtype=dtype, device=device, pooling=pooling), folder)
    source = read_json(folder / SOURCE)
    was = source.pop("content")
    now = _contents(source["model"], source["adapter"])
    if changed := [name for name in was if was[name] != now[name]]:
        lines = "\n".join(f"  {source[name]}  ({name})" for name in changed)
        raise ReasonerError(
            f"{folder} names what has changed since notebook 02 read it:\n{lines}\nPut back what was there, or run "
            "02_reasoner and all that follows again"
        )
    found = load(**source, device=device)
    own = adapter and folder / adapter
    if own and adapter != WARMED_UP and not own.is_dir():
        raise ReasonerError(f"{folder} has no adapter {adapter}: run 02_reasoner again")
    if own and own.is_dir():
        found = replace(found, model=adapted(found.model, own, found.name, merge=True))
    return read_from(found, folder) if adapter == WARMED_UP else found


def read_from(reasoner: Reasoner, folder: Path, adapter: Path | None = None) -> Reasoner:
    """The reasoner itself, whose folder is now known to `export_reasoner`."""
    _READ_FROM[reasoner.model] = {"folder": str(folder.absolute()), "adapter": adapter and str(adapter.absolute())}
    return reasoner


def place_of(reasoner: Reasoner) -> dict[str, str | None] | None:
    """The folders of this very model (`read_from`), if they still exist."""
    place = _READ_FROM.get(reasoner.model)
    return place if place and all(Path(path).is_dir() for path in place.values() if path) else None


def export_reasoner(reasoner: Reasoner, folder: Path) -> dict[str, str | None]:
    """Where another process finds these weights, for `import_reasoner`; saved into `folder` if they are in none."""
    place = place_of(reasoner)
    if place is None:
        if isinstance(reasoner.model, PeftModel):
            raise ReasonerError(f"the adapter of {reasoner.name} lies in no folder; other processes cannot read it")
        save(reasoner, folder)
        place = {"folder": str(folder.absolute()), "adapter": None}
    return {**place, "name": reasoner.name, "kind": reasoner.kind, "pooling": reasoner.pooling}


def import_reasoner(place: dict[str, str | None], *, dtype: str, device: str) -> Reasoner:
    """The reasoner at the place that `export_reasoner` returned."""
    how = {"kind": place["kind"], "dtype": dtype, "device": device, "pooling": place["pooling"]}
    base = load_saved(Path(place["folder"]), **how)
    # the base that an adapter names: the folder is only where the weights were read from
    base.model.name_or_path = base.model.config.name_or_path = place["name"]
    base = replace(base, name=place["name"])
    if place["adapter"] is not None:
        base = replace(base, model=adapted(base.model, Path(place["adapter"]), base.name, merge=False))
    return base


def _contents(model: str, adapter: str | None) -> dict[str, str]:
    found = {"model": content(locate(model))}
    return found | ({"adapter": content(locate(adapter, "adapter"))} if adapter else {})
