"""Executed notebooks as HTML: nothing is loaded from elsewhere, and every formula can be read."""

import base64
import json
import re
from html.parser import HTMLParser
from io import BytesIO

import pytest
from PIL import Image

from rgalign.params import ROOT
from rgalign.report import offline

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CODE = re.compile(r"```.*?```|`[^`]*`", re.DOTALL)
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$", re.DOTALL)


class Loaded(HTMLParser):
    """What a browser would load or run."""

    def __init__(self, html: str):
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag == "script" and "json" not in given.get("type", ""):
            self.found.append(f"script {given}")
        if tag in ("img", "link", "iframe") and not (given.get("src") or given.get("href") or "").startswith("data:"):
            self.found.append(f"{tag} {given}")


def formulas(notebook) -> list[str]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    prose = [CODE.sub("", "".join(cell["source"])) for cell in cells if cell["cell_type"] == "markdown"]
    return [display or inline for text in prose for display, inline in FORMULA.findall(text)]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_formula_is_drawn(notebook):
    for tex in formulas(notebook):
        picture = offline.formula(tex)
        assert picture.startswith("<img"), f"{tex}: matplotlib's mathtext cannot draw it, write it in simpler TeX"
        data = re.search(r"base64,([^\"]+)", picture)[1]
        ink = Image.open(BytesIO(base64.b64decode(data))).convert("L").getextrema()
        assert ink[0] < 64 < ink[1], f"{tex}: an empty picture"


def test_a_page_loads_nothing_and_has_the_pictures_of_its_formulas():
    notebook = ROOT / "notebooks/10_ab_test.ipynb"
    page = offline.page(notebook)
    assert Loaded(page).found == []
    assert not re.search(r"@import|url\(.?https?:", page)
    pictures = re.findall(r'<img alt="[^"]*" src="data:[^"]*" style="height:', page)
    assert len(pictures) == len(formulas(notebook)) > 0
    assert page.count("<summary>Solution</summary>") == notebook.read_text(encoding="utf-8").count("<summary>Solution")
    assert offline.page(notebook) == page


def test_what_cannot_be_drawn_is_shown_as_it_was_written():
    assert offline.formula(r"\nosuch{<b>}") == r"<code>\nosuch{&lt;b&gt;}</code>"
