"""What is trained of a reasoner: all its weights, or a LoRA adapter."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn

from rgalign.reasoner.model import Reasoner
from rgalign.seeding import seeded


def trainable(reasoner: Reasoner, lora: Mapping[str, Any] | None, *, seed: int) -> nn.Module:
    """A copy of the reasoner's model, ready to be trained.

    lora  rank, alpha, dropout, targets (names of modules) of an adapter, drawn from `seed`; None: all weights learn
    """
    model = copy.deepcopy(reasoner.model).train()
    if lora is None:
        return model
    config = LoraConfig(
        r=lora["rank"], lora_alpha=lora["alpha"], lora_dropout=lora["dropout"], target_modules=list(lora["targets"])
    )
    with seeded(seed):
        return get_peft_model(model, config)


def tuned(reasoner: Reasoner, model: nn.Module) -> Reasoner:
    """The reasoner with this trained model in its place."""
    return replace(reasoner, model=model.eval())
