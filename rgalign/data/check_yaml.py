"""Every fault of dataset.yaml: whether it can be read, its keys, the kinds of the features, the world that drew it."""

import dataclasses
from pathlib import Path

import yaml
from pydantic import ValidationError

from rgalign.data import split
from rgalign.data.faults import Report, nearest, quote
from rgalign.data.personal import personal
from rgalign.data.schema import KINDS, OPTIONAL, REQUIRED, YAML_FILE, read_yaml
from rgalign.data.world_model import WORLD_VERSIONS
from rgalign.data.world_tables import Rules
from rgalign.params import ParamsError
from rgalign.rooms import SampledNegatives

# Keys of dataset.yaml that the code reads; any other is kept and left alone.
YAML_KEYS = ("name", "features", "prompt_features", "position_is_real", "sampled_negatives", "time_split", "world")
SAMPLED = {
    "popularity": "a whole number from 0",
    "uniform": "a whole number from 0",
    "smoothing": "a finite number above 0",
}
FREE_TEXT_KEYS = ("what", "title", "split", "candidates", "caution", "licence", "origin", "files")
LONGEST_NAME = 200  # characters


def _read_yaml(report: Report, path: Path) -> dict | None:
    """The keys of dataset.yaml; None, and a fault, where it cannot be read."""
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
    report.fault(YAML_FILE, what)
    return None


def check_yaml(report: Report, path: Path) -> dict:
    """The usable part of dataset.yaml: what is not a fault."""
    meta = _read_yaml(report, path)
    if meta is None:
        return {}
    if not isinstance(meta.get("name"), str) or not meta["name"]:
        report.fault(f"{YAML_FILE} name", f"is {quote(meta.get('name'))}; expected a short name in words")
    elif len(meta["name"]) > LONGEST_NAME:
        report.fault(f"{YAML_FILE} name", f"is {quote(meta['name'])}, longer than {LONGEST_NAME} characters")
    if not isinstance(meta.get("position_is_real", True), bool):
        report.fault(f"{YAML_FILE} position_is_real", f"is {quote(meta['position_is_real'])}; expected true or false")
    for key in meta:
        hint = nearest(str(key), YAML_KEYS, cutoff=0.8)
        if key not in YAML_KEYS and key not in FREE_TEXT_KEYS and hint:
            report.note(f"{YAML_FILE} {key}", f"is not a key the project reads{hint}")
    if "sampled_negatives" in meta:
        _check_sampled(report, meta["sampled_negatives"])
    for key, what in split.rule_faults(meta["time_split"]) if "time_split" in meta else ():
        report.fault(f"{YAML_FILE} time_split{key and '.'}{key}", what)
    sound = {key: meta[key] for key in ("time_split", "world") if key in meta}
    sound["files"] = meta["files"] if isinstance(meta.get("files"), dict) else {}
    kinds = _check_kinds(report, meta.get("features"))
    for column in personal(kinds):
        what = "is personal by its name: no prompt shows it unless reasoner.features lists it, no report its values"
        report.note(f"sessions.{column}", what)
    _check_prompt_features(report, meta.get("prompt_features"), kinds)
    return sound | {"features": kinds}


def _check_kinds(report: Report, features: object) -> dict:
    where = f"{YAML_FILE} features"
    if features is None or features == {}:
        report.fault(where, f"declares no feature column; expected at least one, column: {' | '.join(KINDS)}")
        return {}
    if not isinstance(features, dict):
        report.fault(where, f"is {quote(features)}; expected one line a feature column, column: kind")
        return {}
    # a ranker may know the region, and must not know the others
    reserved = {*REQUIRED["sessions"], *OPTIONAL["sessions"]} - {"region"}
    for column, kind in features.items():
        if not isinstance(column, str):
            report.fault(where, f"names the column {quote(column)}; expected words, put it in quotation marks")
        elif column in reserved:
            report.fault(f"{where}.{column}", "is a column of its own and cannot be a feature; copy it to a new column")
        elif kind not in KINDS:
            known = f"expected one of {', '.join(KINDS)}{nearest(str(kind), KINDS)}"
            report.fault(f"{where}.{column}", f"has the kind {quote(kind)}; {known}")
    return {column: kind for column, kind in features.items() if isinstance(column, str) and column not in reserved}


def _check_prompt_features(report: Report, names: object, kinds: dict) -> None:
    where = f"{YAML_FILE} prompt_features"
    if names is not None and not isinstance(names, list):
        report.fault(where, f"is {quote(names)}; expected a list of feature columns, or no such key: all are shown")
    for name in (name for name in names or () if isinstance(names, list) and name not in kinds):
        report.fault(where, f"names {quote(name)}, which is no feature column{nearest(str(name), kinds)}")


def _check_sampled(report: Report, found: object) -> None:
    where = f"{YAML_FILE} sampled_negatives"
    if not isinstance(found, dict):
        report.fault(where, f"is {quote(found)}; expected {', '.join(SAMPLED)} with a value each")
        return
    for key in (key for key in found if key not in SAMPLED):
        hint = nearest(str(key), SAMPLED)
        report.fault(f"{where}.{key}", f"is unknown; expected {', '.join(SAMPLED)}{hint}")
    try:
        SampledNegatives.model_validate(found)
        wrong = set()
    except ValidationError as error:
        wrong = {each["loc"][0] for each in error.errors()}
    wrong |= {key for key, value in found.items() if isinstance(value, str)}  # '1e-1', which params would accept
    for key, expected in SAMPLED.items():
        if key not in found:
            report.fault(f"{where}.{key}", f"is missing; expected {expected}")
        elif key in wrong:
            report.fault(f"{where}.{key}", f"is {quote(found[key])}; expected {expected}")
    if not wrong and set(found) == set(SAMPLED) and found["popularity"] + found["uniform"] == 0:
        report.fault(where, "draws nothing: popularity and uniform are 0; expected at least one negative in a list")


def check_world(report: Report, meta: dict, simulated: bool) -> None:
    """`world` says which world drew the data; without it truth.parquet cannot be judged."""
    where, world = f"{YAML_FILE} world", meta.get("world")
    again = "draw it again, python -m rgalign world DIR, or delete truth.parquet"
    if "world" not in meta:
        if simulated:
            report.fault(where, f"is missing, and truth.parquet is there; expected version, seed and rules: {again}")
    elif not isinstance(world, dict):
        report.fault(where, f"is {quote(world)}; expected version, seed and rules of a simulated world, or no such key")
    elif simulated:
        seed, rules = world.get("seed"), world.get("rules")
        if world.get("version") not in WORLD_VERSIONS:
            found = f"is {quote(world.get('version'))}"
            report.fault(f"{where}.version", f"{found}; this code knows versions 1 and 2: {again}")
            return
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            report.fault(f"{where}.seed", f"is {quote(seed)}; expected a whole number from 0: {again}")
        if not isinstance(rules, dict) or not set(rules) <= {rule.name for rule in dataclasses.fields(Rules)}:
            report.fault(f"{where}.rules", f"are not those of version {world['version']}: {again}")
