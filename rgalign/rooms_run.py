"""The params of the machine: seeds, device, processes, and what a CPU refuses by name."""

import shlex
from pathlib import PurePath
from typing import Any, Literal

from pydantic import Field, field_validator

from rgalign.rooms_base import Room

LAUNCHERS = ("torchrun", "accelerate launch")  # both take `-m MODULE`


class RunRoom(Room):
    seed: int = Field(0, ge=0, le=4_000_000, description="every other seed derives from it unless set")
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["no", "bf16"] = Field("no", description="accelerate's mixed precision")
    threads: int = Field(1, ge=1, description="CPU threads; pinned, since their number changes the last bits")
    workers: int = Field(
        1, ge=1, description="rankers, and tiny models, trained at once on a CPU; they share the threads out"
    )
    launcher: str | None = Field(
        None,
        description="starts several processes for the LLM's work and for training rankers (processes.py): torchrun "
        "--nproc_per_node 4, accelerate launch --config_file params/accelerate/fsdp.yaml",
    )
    warm_start: str | None = Field(
        None, description="an aligned run to go on from with newer logs: its encoding, LLMs and rankers; keep data.seed"
    )

    @field_validator("launcher")
    @classmethod
    def a_launcher_that_is_known(cls, launcher: str | None) -> str | None:
        if launcher is None:
            return None
        words = shlex.split(launcher)
        name = PurePath(words[0]).name if words else ""
        if " ".join([name, *words[1:2]]) not in LAUNCHERS and name not in LAUNCHERS:
            raise ValueError(f"expected one that begins with {' or '.join(LAUNCHERS)}")
        return launcher


def gpu_only(reasoner: Any, alignment: Any) -> dict[str, str]:
    """Parameters given here that run on CUDA alone, and their values: 8- and 4-bit weights, the 8-bit optimizer."""
    given = {"reasoner.quantize": reasoner.quantize, "alignment.engine.optimizer": alignment.engine.optimizer}
    return {key: value for key, value in given.items() if value not in (None, "adamw")}


def refused(given: dict[str, str], device: str) -> str | None:
    """Why these parameters of `gpu_only` cannot be used on this device; None where they can."""
    if not given or device in ("auto", "cuda"):
        return None
    named = " and ".join(f"{key} ({value})" for key, value in given.items())
    return f"{named} run on CUDA alone, and run.device is {device}: set it to cuda, or leave {' and '.join(given)} out"


def packed_fault(reasoner: Any, alignment: Any) -> str | None:
    """Why 8- or 4-bit weights cannot learn what is asked of them; None where they can, or need not."""
    used = [f"alignment.{name}" for name in ("sft", "dpo", "cl") if getattr(alignment, name).use]
    learns_beside = alignment.lora is not None or reasoner.adapter is not None
    if reasoner.quantize is None or learns_beside or not (alignment.loop.rounds and used):
        return None
    return (
        f"reasoner.quantize is {reasoner.quantize} and lora is empty: packed weights cannot learn, as "
        f"{', '.join(used)} would have them do; give alignment.lora a rank, or leave reasoner.quantize out"
    )
