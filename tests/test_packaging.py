"""pyproject's ranges, the constraints CI runs and conda's environment file agree; the tree is as ARCHITECTURE asks."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from rgalign.params import ROOT


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().split()
    return {canonical(name): version for name, version in (line.split("==") for line in lines)}


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(r) for r in [*project["dependencies"], *project["optional-dependencies"]["test"]]]


def test_every_requirement_admits_its_pin():
    for requirement in requirements():
        assert requirement.specifier.contains(pins()[canonical(requirement.name)]), requirement


def test_the_ranges_admit_an_older_gpu_machine():
    older = {"torch": "2.11.0", "transformers": "5.17.0"}
    by_name = {canonical(r.name): r for r in requirements()}
    for name, version in older.items():
        assert by_name[name].specifier.contains(version)


def test_pins_have_no_local_suffix_and_no_path():
    for name, version in pins().items():
        assert Version(version).local is None, name


def test_environment_yml_pins_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    pinned = dict(line.split("==") for line in pip if "==" in line)
    assert "-e ." in pip
    assert {canonical(n): v for n, v in pinned.items()} == {
        canonical(r.name): pins()[canonical(r.name)] for r in requirements()
    }
    (python,) = (entry for entry in environment["dependencies"] if str(entry).startswith("python="))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert Requirement(f"python{project['requires-python']}").specifier.contains(python.split("=")[1] + ".0")


SOURCES = sorted((ROOT / "rgalign").rglob("*.py"))
FORBIDDEN = r"\bpickle\b|torch\.load\(|yaml\.load\((?!.*_UniqueKeys)|\beval\(|\bexec\(|trust_remote_code"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_nothing_in_the_package_runs_data_as_code(path):
    hits = [line for line in path.read_text().splitlines() if re.search(FORBIDDEN, line) and "model.eval()" not in line]
    assert not hits


FLOORS = tuple(
    [
        "quoting",
        "rooms_base",
        "rooms_alignment",
        "rooms_ranker",
        "rooms_run",
        "rooms",
        "params",
        "artifacts",
        "locks",
        "outside",
        "provenance",
        "notebook_files",
        "seeding",
        "parallel",
        "processes",
        "plan",
        "stages",
        "data",
        "reasoner",
        "ranker",
        "alignment",
        "evaluation",
        "ranking",
        "score",
        "model_size",
        "plots",
        "plots_reasoner",
        "plots_alignment",
        "plots_online",
        "plots_tour",
        "explorer",
        "worker",
        "estimate",
        "machine",
        "kernels",
        "pipeline",
        "sharing",
        "sweep",
        "finished",
        "userfolder",
        "__main__",
    ]
)


def imported_rooms(path: Path) -> set[str]:
    """Rooms of this package that a file imports, wherever in it; evaluation.metrics is free to all (pure numpy)."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {name for name in found if name.startswith("rgalign.")}
    return {name.split(".")[1] for name in ours if not name.startswith("rgalign.evaluation.metrics")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_each_room_knows_only_the_rooms_below_it(path):
    room = path.relative_to(ROOT / "rgalign").parts[0].removesuffix(".py")
    if room == "__init__":
        return
    assert room in FLOORS, f"give {room} its place"
    for other in imported_rooms(path):
        assert FLOORS.index(other) <= FLOORS.index(room), f"{room} may not import {other}"
        assert (room, other) != ("ranker", "reasoner"), "they stand side by side: vectors travel in tables"
