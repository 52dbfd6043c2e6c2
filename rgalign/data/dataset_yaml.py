"""dataset.yaml: the keys that the code reads, as pydantic models, and every error of a file at once."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, StrictBool, field_validator, model_validator

from rgalign.data import split
from rgalign.data.schema import KINDS, OPTIONAL, REQUIRED, YAML_FILE, personal, read_yaml
from rgalign.errors import Report, nearest, safe_repr, section_errors
from rgalign.params import ParamsError
from rgalign.params_schema import SampledNegatives
from rgalign.shopworld.tables import WORLD_VERSIONS, Rules

LONGEST_NAME = 200  # characters
SECTIONS = ("sampled_negatives", "time_split", "world")  # models of their own; any other key is kept and left alone
FREE_TEXT = ("what", "title", "split", "candidates", "caution", "licence", "origin", "files")
# a ranker may know the region, and must not know the others
RESERVED = {*REQUIRED["sessions"], *OPTIONAL["sessions"]} - {"region"}


def _feature_column(name: Any) -> str:
    if not isinstance(name, str):
        raise ValueError(f"names the column {safe_repr(name)}; expected words, put it in quotation marks")
    if name in RESERVED:
        raise ValueError("is a column of its own and cannot be a feature; copy it to a new column")
    return name


def _feature_kind(kind: Any) -> str:
    if kind not in KINDS:
        expected = f"expected one of {', '.join(KINDS)}{nearest(str(kind), KINDS)}"
        raise ValueError(f"has the kind {safe_repr(kind)}; {expected}")
    return kind


class DatasetYaml(BaseModel):
    """The plain keys of dataset.yaml; its sections (SECTIONS) have models of their own."""

    model_config = ConfigDict(validate_default=True)
    name: Annotated[str, Field(strict=True, min_length=1)] = None
    features: dict[Annotated[Any, PlainValidator(_feature_column)], Annotated[Any, PlainValidator(_feature_kind)]] = {}
    prompt_features: list | None = None
    position_is_real: StrictBool = True

    @field_validator("name")
    @classmethod
    def short(cls, name: str) -> str:
        if len(name) > LONGEST_NAME:
            raise ValueError(f"is {safe_repr(name)}, longer than {LONGEST_NAME} characters")
        return name

    @field_validator("features", mode="before")
    @classmethod
    def at_least_one(cls, features: Any) -> Any:
        if features is None or features == {}:
            kinds = " | ".join(KINDS)
            raise ValueError(f"declares no feature column; expected at least one, column: {kinds}")
        return features


PLAIN_KEYS = {  # key -> what is expected
    "name": "a short name in words",
    "features": "one line a feature column, column: kind",
    "prompt_features": "a list of feature columns, or no such key: all are shown",
    "position_is_real": "true or false",
}


class Sampled(SampledNegatives):
    """As in the params, but `1e-1`, which YAML reads as text, is refused: dataset.yaml is used as it is read."""

    smoothing: Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]

    @model_validator(mode="after")
    def draws_some(self) -> "Sampled":
        if self.popularity + self.uniform == 0:
            nothing = "draws nothing: popularity and uniform are 0"
            raise ValueError(f"{nothing}; expected at least one negative in a list")
        return self


SAMPLED_KEYS = dict.fromkeys(("popularity", "uniform"), "a whole number from 0") | {
    "smoothing": "a finite number above 0"
}


def check_yaml(report: Report, path: Path, *, simulated: bool) -> dict:
    """The usable part of dataset.yaml: what is no error. simulated: the folder has a truth.parquet."""
    meta = _read(report, path)
    if meta is None:
        return {}
    errors = section_errors(DatasetYaml, {key: meta[key] for key in PLAIN_KEYS if key in meta}, PLAIN_KEYS)
    sections = {"world": _world_errors(meta, simulated)}
    if "sampled_negatives" in meta:
        sections["sampled_negatives"] = section_errors(Sampled, meta["sampled_negatives"], SAMPLED_KEYS)
    if "time_split" in meta:
        sections["time_split"] = split.rule_errors(meta["time_split"])
    errors += [(f"{name}.{key}".rstrip("."), what) for name, found in sections.items() for key, what in found]
    features, shown = meta.get("features"), meta.get("prompt_features")
    usable = features.items() if isinstance(features, dict) else ()
    kinds = {column: kind for column, kind in usable if isinstance(column, str) and column not in RESERVED}
    for name in shown if isinstance(shown, list) else ():
        if not isinstance(name, str) or name not in kinds:
            what = f"names {safe_repr(name)}, which is no feature column{nearest(str(name), kinds)}"
            errors.append(("prompt_features", what))
    for key, what in errors:
        report.error(f"{YAML_FILE} {key}", what)
    for key in (key for key in meta if key not in (*PLAIN_KEYS, *SECTIONS, *FREE_TEXT)):
        if hint := nearest(str(key), (*PLAIN_KEYS, *SECTIONS), cutoff=0.8):
            report.note(f"{YAML_FILE} {key}", f"is not a key the project reads{hint}")
    for column in personal(kinds):
        what = "is personal by its name: no prompt shows it unless reasoner.features lists it, no report its values"
        report.note(f"sessions.{column}", what)
    files = meta.get("files") if isinstance(meta.get("files"), dict) else {}
    return {"features": kinds, "files": files} | {key: meta[key] for key in ("time_split", "world") if key in meta}


def _read(report: Report, path: Path) -> dict | None:
    """The keys of dataset.yaml; None, and an error, where it cannot be read."""
    try:
        meta = read_yaml(path)
        if isinstance(meta, dict):
            return meta
        what = f"holds a {type(meta).__name__}; expected keys and values, name and features first"
    except ParamsError as error:
        what = f"{str(error).split('  in ')[0]}; expected each key once"
    except (yaml.YAMLError, ValueError) as error:  # bytes that are not UTF-8 are a ValueError too
        what = f"is not YAML: {' '.join(str(error).split())}"
    except OSError as error:
        other = "is a folder" if path.is_dir() else f"cannot be read: {error.strerror or error}"
        found = "is missing" if isinstance(error, FileNotFoundError) else other
        what = f"{found}; expected name and features (column: {' | '.join(KINDS)})"
    except RecursionError:
        what = "is nested too deeply to be read; expected keys and values, name and features first"
    report.error(YAML_FILE, what)
    return None


def _world_errors(meta: dict, simulated: bool) -> list[tuple[str, str]]:
    """Of the key `world`, which says what drew the data: without it truth.parquet cannot be checked."""
    expected, world = "version, seed and rules", meta.get("world")
    mend = "draw it again, python -m rgalign world DIR, or delete truth.parquet"
    if "world" not in meta:
        return [("", f"is missing, and truth.parquet is there; expected {expected}: {mend}")] if simulated else []
    if not isinstance(world, dict):
        return [("", f"is {safe_repr(world)}; expected {expected} of a simulated world, or no such key")]
    version, seed, rules = world.get("version"), world.get("seed"), world.get("rules")
    found = []
    if version not in WORLD_VERSIONS:
        found.append(("version", f"is {safe_repr(version)}; this code knows versions 1 and 2"))
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        found.append(("seed", f"is {safe_repr(seed)}; expected a whole number from 0"))
    if not isinstance(rules, dict) or not set(rules) <= {rule.name for rule in dataclasses.fields(Rules)}:
        found.append(("rules", "are not those of this version"))
    return [(key, f"{what}: {mend}") for key, what in found if simulated]
