"""How large a language model is, by its config alone: parameters, adapter, and what a token costs.

Nothing but shapes is built (torch's meta device): Qwen3-4B takes a second and no memory.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig

from rgalign.alignment.layouts import full_attention


@dataclass(frozen=True)
class ModelSize:
    """parameters  all of them, tied ones once
    trunk        of these, all but the vocabulary's table and the language head: what every token is multiplied with
    linear       of these, in linear layers but the language head: what 8- and 4-bit weights pack, LoRA stands beside
    linear_ends  sum over these layers of inputs + outputs: LoRA has rank times as many parameters
    activations  numbers that a token leaves in one layer for the backward pass
    cached       numbers that a token leaves in one layer while queries are written: its key and its value
    full_attention   no window slides and no state is carried: RG-DPO reads a pair's prompt once (alignment.layouts)
    """

    parameters: int
    trunk: int
    linear: int
    linear_ends: int
    layers: int
    hidden: int
    vocabulary: int
    activations: int
    cached: int
    full_attention: bool

    def lora(self, rank: int) -> int:
        """Parameters of an adapter of this rank beside all linear layers."""
        return rank * self.linear_ends


def model_size(config: PreTrainedConfig, *, kind: str = "causal") -> ModelSize:
    """Of the model that transformers builds for this config. kind: causal | encoder."""
    auto = AutoModelForCausalLM if kind == "causal" else AutoModel
    with torch.device("meta"):
        model = auto.from_config(config)
    text, trunk = config.get_text_config(), model.base_model if kind == "causal" else model
    head = model.get_output_embeddings() if kind == "causal" else None
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trunk=sum(parameter.numel() for parameter in trunk.parameters()) - model.get_input_embeddings().weight.numel(),
        linear=sum(module.weight.numel() for module in linear),
        linear_ends=sum(module.in_features + module.out_features for module in linear),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        activations=_activations(text),
        cached=2 * _shared(text),
        full_attention=full_attention(config),
    )


def _activations(text: PreTrainedConfig) -> int:
    """About how many numbers a token leaves in one layer of Qwen3's kind [C]: inputs and outputs of the two norms,
    queries and keys before and after norm and rotation, values, attention's output, and four of the MLP's width.

    Attention's own matrix is not kept (flash and sdpa make it again).
    """
    heads = text.num_attention_heads * _head(text)
    return 4 * text.hidden_size + 3 * heads + 4 * _shared(text) + 4 * text.intermediate_size


def _head(text: PreTrainedConfig) -> int:
    """Width of one head of attention."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _shared(text: PreTrainedConfig) -> int:
    """Width of all keys of a token, which several heads may share; that of its values."""
    return (getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * _head(text)
