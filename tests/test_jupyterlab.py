"""The tour in a real JupyterLab, in a real browser: all cells run, the explorer answers. Skipped without Chromium."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import small_run
from playwright.sync_api import expect, sync_playwright

from rgalign.params import ROOT

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"]
PATIENCE = 300_000  # ms: a kernel that imports torch, on two cores that other tests keep busy


def make_lab(*given: str) -> list[str]:
    """The words of what `make lab` would execute."""
    command = ["make", "--dry-run", "--no-print-directory", "lab", "PYTHON=python", *given]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()


def test_make_lab_opens_the_tour_at_the_root_with_the_params_asked_for(monkeypatch):
    for name in ("RGALIGN_PARAMS", "PARAMS", "MAKEFLAGS"):
        monkeypatch.delenv(name, raising=False)
    (url,) = (word.partition("=")[2] for word in make_lab() if word.startswith("--LabApp.default_url="))
    assert (ROOT / url.removeprefix("/lab/tree/")).is_file(), "from the root, where the server's files begin"
    assert make_lab()[0] == "RGALIGN_PARAMS=params/quickstart.yaml"
    assert make_lab("PARAMS=params/class.yaml")[0] == "RGALIGN_PARAMS=params/class.yaml"
    monkeypatch.setenv("RGALIGN_PARAMS", "params/study.yaml")
    assert make_lab()[0] == "RGALIGN_PARAMS=params/study.yaml"


@pytest.fixture(scope="module")
def notebook(aligned_run, tmp_path_factory) -> Path:
    """The tour with the parameters of a small run, in a folder of its own."""
    text = (ROOT / "notebooks/00_tour.ipynb").read_text(encoding="utf-8")
    tour = json.loads(text)
    run, overrides = aligned_run
    given = {"params_file": small_run.SMOKE, "run_dir": str(run), "overrides": small_run.SMALL | overrides}
    for cell in tour["cells"]:
        cell |= {"outputs": [], "execution_count": None} if cell["cell_type"] == "code" else {}
        if "parameters" in cell["metadata"].get("tags", []):
            cell["source"] = "\n".join(f"{name} = {value!r}" for name, value in given.items())
    path = tmp_path_factory.mktemp("lab") / "notebooks" / "00_tour.ipynb"
    path.parent.mkdir()
    path.write_text(json.dumps(tour), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def lab(notebook):
    """The address of a JupyterLab as `make lab` starts it, over the folder that holds notebooks/."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = notebook.parents[1]
    tracker = home / "settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings"
    tracker.parent.mkdir(parents=True)
    tracker.write_text('{"windowingMode": "none"}')  # else what is out of sight is not in the page at all
    settings = {
        "ip": "127.0.0.1", "port": port, "open_browser": False, "allow_root": True, "root_dir": home,
        "port_retries": 0,
    }  # fmt: skip
    command = [sys.executable, *make_lab()[2:], "--IdentityProvider.token=", "--ServerApp.password="]
    command += [f"--LabApp.user_settings_dir={home / 'settings'}"]
    command += [f"--ServerApp.{name}={value}" for name, value in settings.items()]
    folders = {name: str(home / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")}
    environment = {**os.environ, **folders, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (home / "lab.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=home)
        try:
            address = f"http://127.0.0.1:{port}/"
            _wait_for(address, server, home / "lab.log")
            yield address
        finally:
            server.terminate()
            server.wait(timeout=30)


def _wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(240):
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(address, timeout=2).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
        else:
            return
    raise AssertionError(f"no JupyterLab at {address}:\n{log.read_text()}")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: the tour was not opened in a browser")
def test_the_tour_runs_and_its_explorer_answers(lab, aligned_run):
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(PATIENCE)
        page.goto(lab)  # which opens the tour
        page.locator(".jp-Notebook h1").first.wait_for()
        page.locator(".jp-Notebook-ExecutionIndicator[data-status='idle']").first.wait_for()  # a kernel that listens
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        choice = page.locator(".jp-OutputArea input[list]")  # the list of sessions
        errors = page.locator("[data-mime-type='application/vnd.jupyter.error']")
        choice.or_(errors).first.wait_for()
        assert errors.count() == 0, errors.all_inner_texts()
        shown = page.locator(".jp-OutputArea .widget-html-content").filter(has_text="The rankers show")
        shown.wait_for()
        before = shown.inner_text()
        choice.fill(page.locator(".jp-OutputArea datalist option").nth(1).get_attribute("value"))
        choice.press("Enter")
        expect(shown).not_to_have_text(before, timeout=PATIENCE)
        page.get_by_text("00_tour is done").first.wait_for(state="attached")
        assert (aligned_run[0] / "figures/00_tour/idea.png").is_file()
        assert errors.count() == 0, errors.all_inner_texts()
        browser.close()
