"""The one schema of params/*.yaml: frozen, typed, and every fault reported at once.

A params file, `--set key=value` on the command line and `overrides` in a notebook all come through `load`.
Each room of the package has its section; a key that no section knows is an error which names the nearest one.
"""

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

ROOT = Path(__file__).resolve().parents[1]
RankerName = Literal["two_tower", "two_tower_text"]  # rankers that can be trained (ranker/train.py)
RANKERS = get_args(RankerName)


class ParamsError(ValueError):
    """One or more faults in a params file or in the overrides; the message lists them all."""


def _float_from_yaml(value: Any) -> Any:
    """YAML 1.1 reads `1e-5` (no dot) as a string; people mean the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _all_different(values: tuple) -> tuple:
    if len(set(values)) < len(values):
        raise ValueError("each may stand once")
    return values


def _tuple_from_yaml(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Real = Annotated[float, BeforeValidator(_float_from_yaml), Field(allow_inf_nan=False)]
Share = Annotated[Real, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=1 << 32)]
Seeds = Annotated[tuple[Seed, ...], BeforeValidator(_tuple_from_yaml), AfterValidator(_all_different)]
Names = Annotated[tuple[str, ...], BeforeValidator(_tuple_from_yaml)]


class Room(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class World(Room):
    """ShopWorld's size; its rules are frozen with its version (data/world.py)."""

    sessions: int = Field(36_000, ge=200, description="chat sessions in six weeks, with and without a click")
    users: int = Field(8_000, ge=20)
    distance: Share = Field(0.5, description="how far the chats the LLM has read are from this shop; 0 = its own kind")
    transcripts: int = Field(48_000, ge=0, description="chats of other shops")


class Features(Room):
    drop: Names = Field((), description="feature columns left out")
    min_count: int = Field(2, ge=1, description="rarer values become 'unknown'")
    numeric_bins: int = Field(16, ge=2, le=256, description="quantile bins fitted on train")
    word_buckets: int = Field(4096, ge=16, le=1 << 20, description="hashed words of the text-aware control")
    max_history: int = Field(50, ge=1, description="most recent entries of a history that are kept")


class SampledNegatives(Room):
    """How the candidates of sampled lists were drawn (data/README of the public sets)."""

    popularity: int = Field(ge=0, description="distinct negatives drawn with p ~ train clicks + smoothing")
    uniform: int = Field(ge=0, description="distinct negatives drawn uniformly from the rest")
    smoothing: Real = Field(0.5, gt=0)


class Data(Room):
    source: Literal["shopworld", "folder", "cfpb", "msweb"] = "shopworld"
    path: str | None = Field(
        None, validate_default=True, description="tables or raw files; relative: below $RGALIGN_DATA"
    )
    seed: Seed | None = Field(None, description="of the world or of sampled lists; empty: run.seed")
    dev_users: Share = Field(0.1, gt=0, lt=1, description="train's users kept for early stopping")
    world: World = World()
    sampled_negatives: SampledNegatives | None = None
    features: Features = Features()

    @field_validator("sampled_negatives")
    @classmethod
    def only_for_folders(cls, sampled: SampledNegatives | None, info: ValidationInfo) -> SampledNegatives | None:
        if sampled is not None and info.data.get("source", "folder") != "folder":
            raise ValueError("only a folder's lists are described here; other sources say it themselves")
        return sampled

    @field_validator("path")
    @classmethod
    def path_where_needed(cls, path: str | None, info: ValidationInfo) -> str | None:
        source = info.data.get("source", "shopworld")
        if source != "shopworld" and not path:
            raise ValueError(f"data.source {source} needs the folder or file to read")
        return path


class Search(Room):
    trials: int = Field(0, ge=0, description="random configurations judged on valid; 0: take the values given here")
    seed: Seed | None = Field(None, description="of the configurations and their training; empty: run.seed")


class RankerSettings(Room):
    """What one ranker is built and trained with; the sizes are choices [C] that the search may replace."""

    embedding_dim: int = Field(8, ge=1, description="width of a feature field")
    dim: int = Field(32, ge=1, description="width of the user and intent vectors")
    attention_layers: int = Field(1, ge=0, description="AutoInt layers over the fields")
    heads: int = Field(1, ge=1, description="of the attention; they divide embedding_dim")
    experts: int = Field(4, ge=1, description="mixture of experts on top of the fields")
    hidden: int = Field(32, ge=1, description="width of an expert")
    dropout: Share = Field(0.5, lt=1)
    id_dropout: Share = Field(0.1, lt=1, description="ids shown as 'unknown' in training, so that it can stand in")
    learning_rate: Real = Field(4e-3, gt=0)
    weight_decay: Real = Field(0.01, ge=0)
    epochs: int = Field(60, ge=1, description="at most; early stopping ends before")
    patience: int = Field(5, ge=1, description="epochs without a better GAUC on the development users")
    lists_per_batch: int = Field(128, ge=2, description="impression lists, not rows")

    @field_validator("heads")
    @classmethod
    def heads_divide_the_width(cls, heads: int, info: ValidationInfo) -> int:
        width = info.data.get("embedding_dim", heads)
        if width % heads:
            raise ValueError(f"does not divide ranker.embedding_dim, which is {width}")
        return heads


class Ranker(RankerSettings):
    models: Annotated[tuple[RankerName, ...], BeforeValidator(_tuple_from_yaml), AfterValidator(_all_different)] = (
        Field(RANKERS, min_length=1)
    )
    seeds: Seeds | None = Field(None, min_length=1, description="one ranker a seed; empty: three from run.seed")
    position_bias: bool = Field(True, description="learnt in training, dropped at inference; needs real positions")
    search: Search = Search()
    tuned: dict[RankerName, RankerSettings] = Field({}, description="model: settings that a search found for it")

    @field_serializer("tuned")
    def tuned_as_given(self, tuned: dict[str, RankerSettings]) -> dict[str, dict[str, Any]]:
        """Only what was set: the rest keeps following the shared settings when the params are read back."""
        return {name: own.model_dump(exclude_unset=True) for name, own in tuned.items()}

    def settings(self) -> dict[str, dict[str, Any]]:
        """model -> everything it is built and trained with: the shared settings under the model's own."""
        shared = self.model_dump(include=set(RankerSettings.model_fields))
        tuned = self.model_dump()["tuned"]
        return {name: {**shared, **tuned.get(name, {})} for name in self.models}


class Evaluation(Room):
    gauc_group: Literal["session", "user"] = "session"
    gauc_weight: Literal["impressions", "clicks", "uniform"] = "impressions"
    bootstrap: int = Field(1000, ge=100, description="replicates, users drawn with replacement")


class RunRoom(Room):
    seed: int = Field(0, ge=0, le=4_000_000, description="every other seed derives from it unless set")
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["no", "bf16"] = Field("no", description="accelerate's mixed precision")
    threads: int = Field(1, ge=1, description="CPU threads; pinned, since their number changes the last bits")


class Params(Room):
    """All parameters of a run, resolved: no seed is left empty."""

    data: Data = Data()
    ranker: Ranker = Ranker()
    evaluation: Evaluation = Evaluation()
    run: RunRoom = RunRoom()

    @model_validator(mode="before")
    @classmethod
    def empty_sections_are_defaults(cls, given: Any) -> Any:
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given


def load(file: str | Path, overrides: Mapping[str, Any] | None = None) -> Params:
    """Read a params file, lay the overrides over it and check the whole.

    overrides   {"ranker.seeds": [0, 1]}: dotted key -> value; strings are read as YAML, as on the command line
    Raises ParamsError with every fault: unknown keys (with the nearest name), wrong types, values out of range.
    """
    path = find(file)
    try:
        given = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError, ParamsError) as error:
        raise ParamsError(f"{path.name} cannot be read as YAML: {error}") from None
    if given is None:
        given = {}
    if not isinstance(given, dict):
        raise ParamsError(f"{path.name} holds a {type(given).__name__}; expected sections: {', '.join(_sections())}")
    for key, value in (overrides or {}).items():
        _lay_over(given, key, value)
    params = check(given, path.name)
    _refuse_shadowed(params, overrides or {})
    return params


def check(given: dict, name: str = "params") -> Params:
    """The typed, resolved params of a plain dictionary. Raises ParamsError with every fault."""
    try:
        return _fill_seeds(Params.model_validate(given))
    except ValidationError as error:
        faults = [_fault(each) for each in error.errors()]
    width = max(len(key) for key, _ in faults)
    lines = "\n".join(f"  {key:<{width}}  {what}" for key, what in faults)
    raise ParamsError(f"{name} fails {len(faults)} check{'s' if len(faults) > 1 else ''}:\n{lines}")


def find(file: str | Path) -> Path:
    """The params file as given, or seen from the project's root. Raises ParamsError if neither exists."""
    for candidate in (Path(file), ROOT / file):
        if candidate.is_file():
            return candidate.resolve()
    shipped = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "params").glob("**/*.yaml"))
    near = difflib.get_close_matches(str(file), shipped, 1)
    raise ParamsError(f"no params file {file}" + (f"; did you mean {near[0]}?" if near else f"; shipped: {shipped}"))


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """['ranker.seeds=[0, 1]'] -> {'ranker.seeds': '[0, 1]'}. Raises ParamsError where the '=' is missing."""
    wrong = [a for a in assignments if "=" not in a]
    if wrong:
        raise ParamsError(f"--set wants key=value, found: {', '.join(wrong)}")
    return dict(a.split("=", 1) for a in assignments)


def dump(params: Params) -> str:
    """The resolved params as YAML, in the schema's order; `load` reads it back to the same params."""
    return yaml.safe_dump(params.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def flat(params: BaseModel | dict, prefix: str = "") -> dict[str, Any]:
    """{'ranker.search.trials': 0, ...}: one entry a leaf, for comparing two sets of params."""
    values = params.model_dump(mode="json") if isinstance(params, BaseModel) else params
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        leaves.update(flat(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return leaves


class _UniqueKeys(yaml.SafeLoader):
    """YAML lets the last of two equal keys win in silence; here they are an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        merge = "tag:yaml.org,2002:merge"  # `<<` is no key of its own
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value if key.tag != merge]
        doubled = sorted({str(key) for key in keys if keys.count(key) > 1})
        if doubled:
            raise ParamsError(f"the key {', '.join(doubled)} stands twice{node.start_mark}")
        return super().construct_mapping(node, deep)


def _lay_over(given: dict, key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    for section in sections:
        inner = given.get(section)
        given[section] = dict(inner) if isinstance(inner, dict) else {}
        given = given[section]
    try:
        given[leaf] = yaml.load(value, _UniqueKeys) if isinstance(value, str) else value
    except (yaml.YAMLError, ParamsError) as error:
        raise ParamsError(f"the value {value!r} of {leaf} cannot be read as YAML: {error}") from None


def _refuse_shadowed(params: Params, overrides: Mapping[str, Any]) -> None:
    """An override that a model's own `tuned` value would overrule in silence is an error."""
    faults = []
    for key in overrides:
        name = key.removeprefix("ranker.")
        tuned = params.ranker.model_dump()["tuned"]
        shadows = [f"ranker.tuned.{model}.{name}" for model, own in tuned.items() if name in own]
        if key.startswith("ranker.") and shadows:
            faults.append(f"  {key} has no effect beside {', '.join(shadows)}")
    if faults:
        lines = "\n".join(faults)
        raise ParamsError(f"overrides that change nothing:\n{lines}\nSet those instead, or ranker.tuned={{}} as well.")


def _fill_seeds(params: Params) -> Params:
    """Seeds that are empty derive from run.seed (ARCHITECTURE.md, Randomness)."""
    seed = params.run.seed
    data = params.data if params.data.seed is not None else params.data.model_copy(update={"seed": seed})
    ranker = params.ranker
    seeds = ranker.seeds or tuple(1000 * seed + i for i in range(3))
    search = ranker.search if ranker.search.seed is not None else ranker.search.model_copy(update={"seed": seed})
    ranker = ranker.model_copy(update={"seeds": seeds, "search": search})
    return params.model_copy(update={"data": data, "ranker": ranker})


def _fault(error: dict) -> tuple[str, str]:
    """Where and what of one of pydantic's errors."""
    key = ".".join(str(part) for part in error["loc"]) or "params"
    if error["type"] == "extra_forbidden":
        return key, f"is not a parameter; did you mean {_nearest(key)}?"
    found = "" if isinstance(error["input"], dict | BaseModel) else f" (found {error['input']!r})"
    expected = error["msg"].removeprefix("Value error, ")
    return key, expected[:1].lower() + expected[1:] + found


def _nearest(key: str) -> str:
    names = list(_names(Params))
    by_leaf = {name.rsplit(".", 1)[-1]: name for name in reversed(names)}
    near = difflib.get_close_matches(key, names, 1, 0.75)
    if not near:  # the leaf may be right and the room wrong
        near = [by_leaf[leaf] for leaf in difflib.get_close_matches(key.rsplit(".", 1)[-1], by_leaf, 1, 0.6)]
    return near[0] if near else f"one of {', '.join(_sections())}"


def _names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        if get_origin(field.annotation) is dict:  # its keys are names, not parameters
            continue
        kinds = [field.annotation, *get_args(field.annotation)]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _names(kind, f"{prefix}{name}.")


def _sections() -> list[str]:
    return list(Params.model_fields)
