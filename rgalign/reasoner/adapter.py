"""peft adapters: put on the model they were trained on, and on no other."""

from functools import partial
from pathlib import Path

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from rgalign.reasoner.folder import ReasonerError

WEIGHTS = "adapter_model.safetensors"
EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")


def adapted(model: PreTrainedModel, folder: Path, name: str, *, merge: bool) -> nn.Module:
    """The model with the adapter of this folder; merged into its weights, or as a PeftModel.

    The adapter's base is compared by the last part of its name [C] (folders move), then by every tensor's name and
    shape. Raises ReasonerError.
    """
    try:
        config = PeftConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReasonerError(f"adapter {folder} cannot be read: {error}") from None
    base = str(config.base_model_name_or_path or "")
    if config.is_prompt_learning:
        raise ReasonerError(f"adapter {folder} is {config.peft_type.value}; only LoRA and its kin can be used")
    if not (folder / WEIGHTS).is_file():
        raise ReasonerError(f"adapter {folder} has no {WEIGHTS}; pickled adapters are not read: save it as safetensors")
    if base and Path(base).name != Path(name).name:
        raise ReasonerError(
            f"adapter {folder} was trained on {base!r}; the model given is {name!r}. Give its own base, or, if it is "
            "the same model under another name, set base_model_name_or_path in its adapter_config.json"
        )
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no mapping)
        wrapped = PeftModel.from_pretrained(model, folder, config=config, local_files_only=True)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ReasonerError(f"adapter {folder} (of {base!r}) does not fit the model {name!r}: {reason}") from None
    # peft would ask the network whether the vocabulary grew; embeddings that an adapter brings are its own affair.
    layers = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    wanted = {key: tuple(value.shape) for key, value in layers.items()}
    found = {key: shape for key, shape in found.items() if key in wanted or not key.endswith(EMBEDDINGS)}
    if wanted != found:
        first = sorted(set(wanted.items()) ^ set(found.items()))[0][0]
        raise ReasonerError(f"adapter {folder} (of {base!r}) does not fit the model {name!r}: first fault at {first}")
    # peft froze the base; merged, it is a plain model again, that can be trained.
    return wrapped.merge_and_unload().requires_grad_(True) if merge else ready_to_save(wrapped)


def ready_to_save(model: PeftModel) -> PeftModel:
    """The model itself, whose adapter is written with the same bytes every time and without a look at the network."""
    for config in model.peft_config.values():
        if isinstance(config.target_modules, set):  # in no order: its file would differ from run to run
            config.target_modules = sorted(config.target_modules)
    # peft would ask the network whether the vocabulary grew; the method is copied with the model (a stage after this)
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)
    return model
