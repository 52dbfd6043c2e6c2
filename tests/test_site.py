"""The site builds without a warning; its links lead somewhere, and no page needs a network to be read."""

import importlib.util
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from rgalign.params import ROOT

pytestmark = pytest.mark.slow

NEEDED = ("sphinx", "myst_nb", "furo")
NAMES = (
    "METHOD",
    "results",
    "running",
    "ARCHITECTURE",
    "READING",
    "own-logs",
    "glossary",
    "reliability",
    "site/index",
    "site/api",
)
PAGES = ("README", "CHANGELOG", "CONTRIBUTING", *(f"docs/{name}" for name in NAMES))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


class Page(HTMLParser):
    """Links, anchors, and what a browser loads by itself."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.loaded, self.anchors, self.formulae = [], [], {""}, 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list) -> None:
        given = dict(attrs)
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        self.formulae += tag == "math"
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if given.get("src"):
            self.loaded.append(given["src"])
        if tag == "link" and given.get("rel") in ("stylesheet", "preload", "icon"):
            self.loaded.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{', '.join(missing)} not installed; pip install -e '.[site]'")
    out = tmp_path_factory.mktemp("site")
    build(ROOT, out / "html")
    return out / "html"


def build(source: Path, out: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going"]
    command += ["--conf-dir", "docs/site", "--doctree-dir", str(out.parent / "doctrees"), ".", str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_page_and_notebook_is_there(site):
    for page in (*PAGES, *(f"notebooks/{path.stem}" for path in NOTEBOOKS)):
        assert (site / f"{page}.html").is_file(), page
    assert (site / "index.html").is_file()


def test_links_inside_the_site_lead_somewhere(site):
    pages = {path: Page(path) for path in site.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for link in [*page.links, *page.loaded]:
            parts = urlsplit(link)
            if parts.scheme or link.startswith("//"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file() or (target in pages and parts.fragment not in pages[target].anchors):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert not broken


def test_links_to_other_places_are_well_formed(site):
    """None is opened: a check needs no network."""
    for path in site.rglob("*.html"):
        for link in Page(path).links:
            parts = urlsplit(link)
            if not parts.scheme:
                continue
            assert parts.scheme == "https", f"{path}: {link}"
            if parts.netloc == "arxiv.org":
                assert re.fullmatch(r"/abs/\d{4}\.\d{4,5}", parts.path), link
            if parts.netloc == "doi.org":
                assert re.fullmatch(r"/10\.\d{4,}/\S+", parts.path), link


def test_nothing_is_loaded_from_a_network(site):
    for path in site.rglob("*.html"):
        page = Page(path)
        assert not [each for each in page.loaded if urlsplit(each).scheme in ("http", "https") or each[:2] == "//"]
        assert not re.search(r"cdn\.|unpkg", path.read_text(encoding="utf-8"), re.I), path
    for style in site.rglob("*.css"):
        assert not re.search(r"@import|url\(.?https?:", style.read_text(encoding="utf-8")), style


def test_formulae_are_drawn_and_outputs_are_there(site):
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        prose = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        text = (site / "notebooks" / f"{path.stem}.html").read_text(encoding="utf-8")
        assert text.count('display="block"') == prose.count("$$") / 2, path.stem
        assert "<merror" not in text
        assert text.count("<summary>Solution</summary>") == prose.count("<summary>Solution</summary>")
        pictures = sum("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", []))
        assert text.count("<img") >= pictures
