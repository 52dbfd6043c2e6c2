"""Weights that several processes share out (FSDP, DeepSpeed ZeRO-3), put together again once they have learnt."""

import os

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor


def is_sharded() -> bool:
    """Whether `accelerate launch` was told to share out the weights (its own environment variables say so)."""
    names = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    return any(os.environ.get(name, "false").lower() == "true" for name in names)


def put_together(model: nn.Module, wrapped: nn.Module, accelerator: Accelerator) -> None:
    """Make a trained model's weights whole, to be saved; under ZeRO-3 in the first process alone.

    Called in all processes. wrapped: what accelerate made of the model. It is not to be run any more.
    """
    if any(isinstance(weight, DTensor) for weight in model.parameters()):
        _gather(model)
    elif hasattr(next(model.parameters()), "ds_id"):
        state = accelerator.get_state_dict(wrapped)
        for name, weight in model.named_parameters() if state else ():
            weight.data = state[name]


@torch.no_grad()
def _gather(model: nn.Module) -> None:
    """FSDP's distributed tensors become plain parameters; tied ones stay one."""
    whole: dict[DTensor, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if isinstance(weight, DTensor):
                if weight not in whole:
                    whole[weight] = nn.Parameter(weight.full_tensor(), requires_grad=weight.requires_grad)
                module._parameters[name] = whole[weight]
