"""The one schema of params/*.yaml: frozen, typed, and every fault reported at once.

A file may begin with `base: <another params file>`, relative to its own folder: it then holds only what it changes.
A base may have a base. Sections are merged key by key, everything else is replaced, and so is a mapping by `{}` [C]:
`tuned: {}` empties what the base has there. A top-level section with nothing after its colon changes nothing.
Only text is YAML: params files, and `--set` on the command line. A Python value given in `overrides` stays itself.
"""

import difflib
import json
import os
import platform
import time
import timeit
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from rgalign.errors import UserError, safe_repr
from rgalign.params_schema import Params

PACKAGE = Path(__file__).resolve().parents[1]  # what rgalign/ lies in: a checkout, or site-packages


def project_folder(here: Path) -> Path:
    """The folder at or above `here` that holds notebooks and params (`python -m rgalign new`), else the checkout.

    An installed package without such a folder works where it stands: nothing is ever written into site-packages.
    """
    for folder in (here, *here.parents):
        if (folder / "notebooks" / "01_data.ipynb").is_file() and (folder / "params").is_dir():
            return folder
    return PACKAGE if (PACKAGE / "notebooks").is_dir() else here


ROOT = project_folder(Path.cwd().resolve())  # JupyterLab starts a kernel in notebooks/, the pipeline starts it here
NEW_FOLDER = "make a folder with notebooks and params: python -m rgalign new DIR"
MOST = 2**18  # bytes of a params file; YAML takes half a minute for a few megabytes
BASE = "base"  # key of a params file that is laid over another one
SECTIONS = ", ".join(Params.model_fields)
MOST_BASES = 8  # in a chain: longer ones are hard to follow [C]


class ParamsError(UserError, ValueError):
    """One or more faults in a params file or in the overrides; the message lists them all."""


def load(file: str | Path, overrides: Mapping[str, Any] | None = None) -> Params:
    """Read a params file, apply the overrides and check the whole.

    overrides   {"ranker.seeds": [0, 1]}: dotted key -> Python value, taken as it is: a str is never read as YAML
    Raises ParamsError with every fault: unknown keys (with the nearest name), wrong types, values out of range.
    """
    path = find(file)
    given = _with_bases(path)
    for key, value in (overrides or {}).items():
        place, (*sections, leaf) = given, key.split(".")
        for section in sections:
            inner = place.get(section)
            place[section] = dict(inner) if isinstance(inner, dict) else {}
            place = place[section]
        place[leaf] = value
    params, faults = check(given, path.name), []
    tuned = params.ranker.model_dump()["tuned"]
    for key in (key for key in overrides or {} if key.startswith("ranker.")):
        name = key.removeprefix("ranker.")
        if shadows := [f"ranker.tuned.{model}.{name}" for model, own in tuned.items() if name in own]:
            faults.append(f"  {key} has no effect beside {', '.join(shadows)}\n")
    if faults:
        hint = "Set those instead, or ranker.tuned={} as well."
        raise ParamsError(f"overrides that change nothing:\n{''.join(faults)}{hint}")
    return params


def load_run(run: Path) -> Params:
    """The params that a run directory was made with. Raises ParamsError that says how to make it again, where this
    version of the code cannot read them."""
    path = run / "params.yaml"
    try:
        return load(path)
    except ParamsError as error:
        raise ParamsError(
            f"{path} cannot be used: {error}\nThis run was made by another version of this code, or its params were "
            f"edited. Make it again beside it: python -m rgalign run PARAMS --run-dir {run}-new"
        ) from None


def _read(path: Path) -> dict:
    if (size := path.stat().st_size) > MOST:
        raise ParamsError(f"{path.name} has {size:,} bytes; expected a params file, of {MOST:,} at most")
    try:
        given = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # bytes, dates and numbers that are none
        raise ParamsError(f"{path.name} cannot be read as YAML: {error}") from None
    if not isinstance(given, dict | None):
        raise ParamsError(f"{path.name} holds a {type(given).__name__}; expected sections: {SECTIONS}")
    return given or {}


def _with_bases(path: Path) -> dict:
    """The sections of a params file merged over its base, that over its own base, and so on."""
    chain, layers = [path], [_read(path)]
    while BASE in layers[-1]:
        here, name = chain[-1].parent, layers[-1].pop(BASE)
        if not (base := here / str(name)).is_file():
            beside = [os.path.relpath(each, here) for each in here.parent.glob("**/*.yaml")]
            near = difflib.get_close_matches(str(name), beside, 1)
            hint = f"; did you mean {near[0]}?" if near else ": expected a params file, relative to this one's folder"
            raise ParamsError(f"{chain[-1].name} has the base {name!r}, which is not there{hint}")
        chain.append(base.resolve())
        named = " -> ".join(each.name for each in chain)
        if chain[-1] in chain[:-1]:
            raise ParamsError(f"{path.name} has bases that go in a circle: {named}")
        if len(chain) > MOST_BASES + 1:
            raise ParamsError(f"{path.name} has more than {MOST_BASES} bases in a chain: {named}; put some into one")
        layers.append(_read(chain[-1]))
    given = layers.pop()
    for above in reversed(layers):
        given = _merged(given, {section: value for section, value in above.items() if value is not None})
    return given


def _merged(below: dict, above: dict) -> dict:
    merged = {k: v for k, v in above.items() if v and isinstance(v, dict) and isinstance(below.get(k), dict)}
    return below | above | {key: _merged(below[key], value) for key, value in merged.items()}


def check(given: dict, name: str = "params") -> Params:
    """The typed, resolved params of a plain dictionary. Raises ParamsError with every fault."""
    try:
        return _resolved(Params.model_validate(given))
    except ValidationError as error:
        found, faults = error.errors(), []
    for error in found:
        key = ".".join(map(str, error["loc"])) or "params"
        if error["type"] == "extra_forbidden":
            removed = f"was removed: {REMOVED[key]}" if key in REMOVED else ""
            what = removed or f"is not a parameter; did you mean {_nearest(key)}?"
        else:
            expected, value = error["msg"].removeprefix("Value error, "), error["input"]
            what = expected[:1].lower() + expected[1:]
            what += "" if isinstance(value, dict | BaseModel) else f" (found {safe_repr(value, 200)})"
        faults.append((key, what))
    width = max(len(key) for key, _ in faults)
    lines = "\n".join(f"  {key:<{width}}  {what}" for key, what in faults)
    raise ParamsError(f"{name} fails {len(faults)} check{'s' if len(faults) > 1 else ''}:\n{lines}")


def find(file: str | Path) -> Path:
    """The params file as given, or below the project's root. Raises ParamsError if neither exists."""
    for candidate in (Path(file), ROOT / file):
        if candidate.is_file():
            return candidate.resolve()
    shipped = sorted(p.relative_to(ROOT).as_posix() for p in shipped_files())
    if not shipped:
        raise ParamsError(f"no params file {file}, and no params/ in {ROOT}; {NEW_FOLDER}")
    near = difflib.get_close_matches(str(file), shipped, 1)
    raise ParamsError(f"no params file {file}" + (f"; did you mean {near[0]}?" if near else f"; shipped: {shipped}"))


def shipped_files() -> list[Path]:
    """Every params file of the project but accelerate's own."""
    return sorted(path for path in (ROOT / "params").glob("**/*.yaml") if path.parent.name != "accelerate")


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """['ranker.seeds=[0, 1]'] -> {'ranker.seeds': [0, 1]}: the command line's text, read as YAML as in a params file.

    Raises ParamsError with every one that has no '=' or whose value is no YAML.
    """
    found, faults = {}, []
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            faults.append(f"--set expects key=value, found: {safe_repr(assignment, 100)}")
            continue
        try:
            found[key] = yaml.load(text, _UniqueKeys)  # a SafeLoader
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            faults.append(f"the value {safe_repr(text, 100)} of {key} cannot be read as YAML: {error}")
    if faults:
        raise ParamsError("\n".join(faults))
    return found


def dump(params: Params) -> str:
    """The resolved params as YAML, in the schema's order; `load` reads it back to the same params."""
    given = params.model_dump(mode="json")
    readable = "\x85" not in json.dumps(given, ensure_ascii=False)  # which PyYAML writes as a line break
    return yaml.safe_dump(given, sort_keys=False, allow_unicode=readable)


def flat(params: BaseModel | dict, prefix: str = "") -> dict[str, Any]:
    """{'ranker.search.trials': 0, ...}: one entry a leaf, for comparing two sets of params."""
    leaves: dict[str, Any] = {}
    for key, value in (params.model_dump(mode="json") if isinstance(params, BaseModel) else params).items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


class _UniqueKeys(yaml.SafeLoader):
    """In YAML the last of two equal keys silently wins; here they are an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        merge = "tag:yaml.org,2002:merge"  # `<<` is no key of its own
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value if key.tag != merge]
        counts = Counter(key for key in keys if isinstance(key, Hashable))
        if doubled := sorted(str(key) for key, count in counts.items() if count > 1):
            raise ParamsError(f"the key {', '.join(doubled)} stands twice{node.start_mark}")
        return super().construct_mapping(node, deep)


def _resolved(params: Params) -> Params:
    """Seeds that are empty derive from run.seed (ARCHITECTURE.md, Randomness); dtype auto is what this machine has."""
    seed, reasoner, ranker = params.run.seed, params.reasoner, params.ranker
    if reasoner.dtype == "auto":
        reasoner = reasoner.model_copy(update={"dtype": quick_dtype(params.run.device)})

    def seeded(section: Any, value: int) -> Any:
        return section if section.seed is not None else section.model_copy(update={"seed": value})

    reasoner, others = seeded(reasoner, seed), []
    for other in reasoner.others:
        others.append(seeded(other, 1 + (others[-1] if others else reasoner).seed))
    reasoner = reasoner.model_copy(update={"others": tuple(others)})
    seeds = ranker.seeds or tuple(1000 * seed + i for i in range(3))
    ranker = ranker.model_copy(update={"seeds": seeds, "search": seeded(ranker.search, seed)})
    return params.model_copy(update={"data": seeded(params.data, seed), "reasoner": reasoner, "ranker": ranker})


REMOVED = {  # parameters of earlier versions, and what to do
    "alignment.cl.space": "RG-CL always aligns with the rankers retrained after RG-SFT and RG-DPO; delete the line "
    "(the order that `before` asked for was measured: outputs/published/mended-valid/control.csv)"
}


def quick_dtype(device: str) -> str:
    """bfloat16 where the device multiplies in it and is quicker by it, else float32.

    A CPU is timed: some have the instructions and are slower with them. Its answer is kept in $HF_HOME/rgalign, so that
    it is the same for every stage of a run.
    """
    import torch
    from huggingface_hub.constants import HF_HOME

    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        able = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if able else "float32"
    known = Path(HF_HOME) / "rgalign" / f"dtype-{platform.node()}-torch-{torch.__version__}"
    if not known.is_file():

        def seconds(dtype: torch.dtype) -> float:
            layer, rows = torch.nn.Linear(576, 1536, dtype=dtype), torch.ones(256, 576, dtype=dtype)  # of SmolLM2-135M
            with torch.inference_mode():
                return min(timeit.repeat(lambda: layer(rows), timer=time.process_time, number=5, repeat=5))

        known.parent.mkdir(parents=True, exist_ok=True)
        known.write_text("bfloat16" if seconds(torch.bfloat16) < 0.8 * seconds(torch.float32) else "float32")
    return known.read_text()


def _nearest(key: str) -> str:
    names = list(_names(Params))
    section = key.split(".")[0] + "."
    own_last = sorted(reversed(names), key=lambda name: name.startswith(section))  # of equal leaves its own section's
    by_leaf = {name.rsplit(".", 1)[-1]: name for name in own_last}
    near = difflib.get_close_matches(key, names, 1, 0.75)
    if not near:  # the leaf may be right and the section wrong
        near = [by_leaf[leaf] for leaf in difflib.get_close_matches(key.rsplit(".", 1)[-1], by_leaf, 1, 0.6)]
    return near[0] if near else f"one of {SECTIONS}"


def _names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        if get_origin(field.annotation) is dict:  # its keys are names, not parameters
            continue
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _names(kind, f"{prefix}{name}.")
