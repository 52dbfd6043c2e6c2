"""What the sections of the params are made of: strict pydantic models and the types of their values."""

from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
)


def _float_from_yaml(value: Any) -> Any:
    """YAML 1.1 reads `1e-5` (no dot) as a string; people mean the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def all_different(values: tuple) -> tuple:
    if len(set(values)) < len(values):
        raise ValueError("each may be there once")
    return values


def tuple_from_yaml(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Real = Annotated[float, BeforeValidator(_float_from_yaml), Field(allow_inf_nan=False)]
Share = Annotated[Real, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=1 << 32)]
Seeds = Annotated[tuple[Seed, ...], BeforeValidator(tuple_from_yaml), AfterValidator(all_different)]
Names = Annotated[tuple[str, ...], BeforeValidator(tuple_from_yaml)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())
