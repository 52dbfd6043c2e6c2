"""peft adapters: loaded on the model that they were trained on alone; and what of a model a stage trains."""

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from rgalign.params_training import Lora
from rgalign.reasoner.folder import ADAPTER_WEIGHTS, ReasonerError, adapter_errors
from rgalign.seeding import seeded

if TYPE_CHECKING:
    from rgalign.reasoner.model import Reasoner


def adapted(model: PreTrainedModel, folder: Path, name: str, *, merge: bool) -> nn.Module:
    """The model with the adapter of this folder; merged into its weights, or as a PeftModel.

    The adapter's base is compared by the last part of its name [C] (folders move), then by every tensor's name and
    shape. Raises ReasonerError.
    """
    config = read_adapter(folder, name)
    subject = f"adapter {folder} (of {str(config.base_model_name_or_path or '')!r})"
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
            found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no mapping)
        wrapped = PeftModel.from_pretrained(model, folder, config=config, local_files_only=True)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ReasonerError(f"{subject} does not fit the model {name!r}: {reason}") from None
    # peft would ask the network whether the vocabulary grew; embeddings that an adapter brings are its own affair.
    layers = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    wanted = {key: tuple(value.shape) for key, value in layers.items()}
    # what belongs to input and output embeddings, as adapter files name it, whatever the architecture calls them
    base_model = wrapped.get_base_model()
    ends = base_model.get_input_embeddings(), base_model.get_output_embeddings()
    names = tuple(f"{name}." for name, module in wrapped.named_modules() if any(module is end for end in ends))
    whole = {key: tuple(value.shape) for key, value in wrapped.state_dict().items() if key.startswith(names)}
    brought = {key for key, shape in found.items() if key not in wanted and whole.get(key) == shape}
    found = {key: shape for key, shape in found.items() if key not in brought}
    if wanted != found:
        first = sorted(set(wanted.items()) ^ set(found.items()))[0][0]
        raise ReasonerError(f"{subject} does not fit the model {name!r}: first error at {first}")
    # peft froze the base; merged, it is a plain model again, that can be trained.
    if not merge:
        return ready_to_save(wrapped, embeddings=bool(brought))
    return _merged(wrapped, subject).requires_grad_(True)


def read_adapter(folder: Path, name: str) -> PeftConfig:
    """The config of an adapter that is meant for the model of this name. Raises ReasonerError; no weight is read."""
    if errors := adapter_errors(folder):
        raise ReasonerError(f"adapter {folder} cannot be read: {'; '.join(errors)}")
    try:
        config = PeftConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReasonerError(f"adapter {folder} cannot be read: {error}") from None
    base = str(config.base_model_name_or_path or "")
    if config.is_prompt_learning:
        raise ReasonerError(f"adapter {folder} is {config.peft_type.value}; only LoRA and its kin can be used")
    if base and Path(base).name != Path(name).name:
        raise ReasonerError(
            f"adapter {folder} was trained on {base!r}; the model given is {name!r}. Give its own base, or, if it is "
            "the same model under another name, set base_model_name_or_path in its adapter_config.json"
        )
    return config


def _merged(wrapped: PeftModel, subject: str) -> PreTrainedModel:
    """The base model with the adapter added to its weights; its config says whether its embeddings are still tied.
    An adapter of one of two tied matrices would be added to both: they are untied first."""
    model = wrapped.get_base_model()
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    own = [layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer for layer in ends]
    if any(isinstance(layer, BaseTunerLayer) for layer in ends) and _tied(*own):
        own[1].weight = nn.Parameter(own[1].weight.detach().clone())
    try:
        merged = wrapped.merge_and_unload()
    except (RuntimeError, ValueError, NotImplementedError) as error:  # such as lora_bias beside a layer without bias
        raise ReasonerError(
            f"{subject} cannot be merged into its model: {error} Train it without what the message names"
        ) from None
    merged.config.get_text_config().tie_word_embeddings = merged.config.tie_word_embeddings = _tied(
        merged.get_input_embeddings(), merged.get_output_embeddings()
    )
    return merged


def _tied(reads: nn.Module, writes: nn.Module | None) -> bool:
    return getattr(reads, "weight", None) is getattr(writes, "weight", reads)


def ready_to_save(model: PeftModel, *, embeddings: bool = False) -> PeftModel:
    """The model itself, whose adapter is written with the same bytes every time and without a look at the network.
    embeddings: whether whole embeddings are written too, those that came with an adapter; told once, it stays."""
    for config in model.peft_config.values():
        if isinstance(config.target_modules, set):  # in no order: its file would differ from run to run
            config.target_modules = sorted(config.target_modules)
    # peft would ask the network whether the vocabulary grew; the method is copied with the model (a stage after this)
    before = getattr(model.save_pretrained, "keywords", {}).get("save_embedding_layers", False)
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=embeddings or before)
    return model


def trainable(reasoner: "Reasoner", lora: Lora | None, *, seed: int) -> nn.Module:
    """A deep copy of the reasoner's model, ready to be trained.

    lora  low-rank matrices beside the frozen weights (Hu et al. 2022), the first drawn from `seed`, the second zero, so
          that the model is unchanged at first. None: all weights, in float32 whatever their type: a step of AdamW is
          smaller than the spacing of bfloat16 (engine.precision bf16 multiplies in bfloat16 all the same)
    An adapter of an earlier stage is trained on. Raises ValueError for an encoder with lora, and where lora's rank or
    alpha differ from that adapter's.
    """
    model = copy.deepcopy(reasoner.model)
    config = lora and LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
    )
    if isinstance(model, PeftModel):
        own = model.peft_config[model.active_adapter]
        if config and (config.r, config.lora_alpha) != (own.r, own.lora_alpha):
            raise ValueError(
                f"the reasoner has an adapter of rank {own.r} and alpha {own.lora_alpha}, which would be trained on; "
                f"lora asks for rank {config.r} and alpha {config.lora_alpha}: use the same in every stage, or merge "
                "it first"
            )
        model.set_adapter(model.active_adapter)  # read from a folder it is frozen
    elif config is None:
        for weight in model.parameters():  # in place: tied weights stay tied
            weight.data = weight.data.float()
        return model.requires_grad_(True).train()
    elif reasoner.kind != "causal":
        raise ValueError(f"{reasoner.name} is an encoder, which takes no adapter; set lora to None: all weights")
    else:
        with seeded(seed):
            model = get_peft_model(model, config)
    return ready_to_save(model).train()


def tuned(reasoner: "Reasoner", model: nn.Module) -> "Reasoner":
    """The reasoner with this trained model in place of its own, in eval mode; its weights in the type of its own."""
    if not isinstance(model, PeftModel):
        for weight, own in zip(model.parameters(), reasoner.model.parameters(), strict=True):
            weight.data = weight.data.to(own.dtype)
    return replace(reasoner, model=model.eval())
