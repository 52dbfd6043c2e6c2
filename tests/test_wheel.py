"""The wheel alone is useful: built from a copy of the sources, installed elsewhere, `new` makes a folder that runs."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rgalign.__main__ import main
from rgalign.params import ROOT, project_folder

SOURCES = (
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "rgalign",
    "notebooks",
    "params",
    "docs",
    "benchmarks",
)
SMALL = ("data.world.sessions=300", "data.world.users=150", "data.world.transcripts=60")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder of packages with the wheel's alone in it; dependencies stay this interpreter's."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("a wheel is built by setuptools, which is not installed")
    copy, packages = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("packages")
    for name in SOURCES:
        put = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        put(ROOT / name, copy / name)
    run([*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(copy / "dist"), str(copy)], copy)
    (wheel,) = (copy / "dist").glob("rgalign-*.whl")
    run([*PIP, "install", "--no-deps", "--no-index", "--target", str(packages), str(wheel)], copy)
    return packages


def run(command: list[str], folder: Path, packages: Path | None = None) -> str:
    """What a command prints in a folder; it must end well."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(packages)} if packages else {}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_new_makes_a_folder_in_which_run_and_jupyterlab_find_what_they_need(installed, tmp_path):
    rgalign = [sys.executable, "-m", "rgalign"]
    run([*rgalign, "new", "shop"], tmp_path, installed)
    shop = tmp_path / "shop"
    where = "from rgalign import params; print(params.PACKAGE, params.ROOT)"
    for folder in (shop, shop / "notebooks"):  # JupyterLab starts its kernels in notebooks/
        assert run([sys.executable, "-c", where], folder, installed).split() == [str(installed), str(shop)]
    settings = [word for each in SMALL for word in ("--set", each)]
    said = run([*rgalign, "run", "params/smoke.yaml", "--through", "01", *settings], shop, installed)
    assert "[1/10] data: done in" in said
    again = run([*rgalign, "run", "params/smoke.yaml", "--through", "01", *settings], shop, installed)
    assert "[1/10] data: unchanged, skipped" in again
    code = json.loads((shop / "outputs/smoke/manifest.json").read_text())["stages"]["01_data"]["code"]
    assert {"notebooks/01_data.ipynb", "rgalign/params.py"} <= set(code)
    assert not (installed / "outputs").exists()


def test_what_new_copies_is_what_the_project_ships(tmp_path):
    assert main(["new", str(tmp_path / "shop")]) == 0
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        own = json.loads(path.read_text(encoding="utf-8"))["cells"]
        copied = json.loads((tmp_path / "shop/notebooks" / path.name).read_text(encoding="utf-8"))["cells"]
        assert [cell["source"] for cell in copied] == [cell["source"] for cell in own]
        assert not [cell for cell in copied if cell.get("outputs") or cell.get("execution_count")]
    for path in [*(ROOT / "params").glob("**/*.yaml"), *(ROOT / "docs").glob("*.md")]:
        assert (tmp_path / "shop" / path.relative_to(ROOT)).read_bytes() == path.read_bytes()


def test_new_refuses_a_folder_that_is_not_empty(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("precious")
    assert main(["new", str(tmp_path)]) == 1
    assert f"{tmp_path} is not empty; expected a new folder" in capsys.readouterr().err
    assert main(["new", str(tmp_path / "mine.txt")]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert (tmp_path / "mine.txt").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    assert main(["new", str(tmp_path / "empty")]) == 0


@pytest.mark.slow
def test_without_a_folder_the_error_says_how_to_make_one(installed, tmp_path):
    command = [sys.executable, "-m", "rgalign", "run", "params/quickstart.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        f"error: no notebooks/ in {tmp_path} nor above it; "
        "make a folder with notebooks and params: python -m rgalign new DIR\n"
    )
    assert not list(tmp_path.iterdir())


def test_the_project_is_the_nearest_folder_that_has_notebooks_and_params(tmp_path):
    for name in ("notebooks", "params", "outputs/run/notebooks"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("notebooks", "outputs/run/notebooks"):
        (tmp_path / name / "01_data.ipynb").touch()
    assert project_folder(tmp_path / "outputs/run/notebooks") == tmp_path  # a run has executed copies, and no params/
    assert project_folder(tmp_path.parent) == ROOT
