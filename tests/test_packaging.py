"""pyproject's ranges, the constraints CI runs and conda's environment file agree; the tree is as ARCHITECTURE asks."""

import ast
import re
import tomllib
from pathlib import Path

import yaml
from every import every
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


# A folder, or a file at the root, imports from those before it alone, so that no circle of folders can come about.
ORDER = [
    "seeding",
    "params_training",
    "params_schema",
    "errors",
    "params",
    "run",
    "data",
    "shopworld",
    "reasoner",
    "ranker",
    "evaluation",
    "alignment",
    "serve",
    "experiment",
    "report",
    "commands",
    "__main__",
]
UPWARDS = {  # what may nevertheless be imported from further on
    ("params_training.py", "ranker.variants"),  # the list of rankers, which imports nothing
    ("data/sources.py", "shopworld"),  # the registry of sources, which lists the simulator among them
    ("data/dataset_yaml.py", "shopworld"),  # the simulator's own section of dataset.yaml
    ("ranker/fit.py", "evaluation.metrics"),  # numpy alone
    ("ranker/search.py", "evaluation.metrics"),
}


def imported(path: Path) -> set[str]:
    """The modules of this package that a file imports from, wherever in it, without the package's name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("rgalign.") for name in found if name.startswith("rgalign.")}


def test_a_folder_imports_only_from_those_before_it(tmp_path):
    def judge(path, _):
        name = path.relative_to(ROOT / "rgalign").as_posix()
        own = name.split("/")[0].removesuffix(".py")
        if own == "__init__":
            return
        assert own in ORDER, f"give {own} its place"
        for other in imported(path):
            if not any(name == file and other.startswith(allowed) for file, allowed in UPWARDS):
                assert ORDER.index(other.split(".")[0]) <= ORDER.index(own), f"{name} may not import {other}"

    every({str(path.relative_to(ROOT)): path for path in SOURCES}, judge, tmp_path)
