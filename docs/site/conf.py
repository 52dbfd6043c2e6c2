"""The site: README, docs and executed notebooks as they are committed; nothing is run, and no page needs a network.

make site: sphinx-build with this folder's settings over the project's root.
"""

import sys
import tomllib
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # for docs/site/api.md
META = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = "RGAlign-Rec"
release = version = META["version"]
extensions = ["myst_nb", "sphinx.ext.autodoc"]
autodoc_typehints = "none"  # docstrings say shapes and units
root_doc = "docs/site/index"
include_patterns = [
    "docs/site/index.md",
    "docs/site/api.md",
    "docs/*.md",
    "notebooks/*.ipynb",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
]

nb_execution_mode = "off"  # outputs are committed, made by `make notebooks`
nb_merge_streams = True
nb_ipywidgets_js = {}  # a widget needs a kernel; the tour has three sessions as text beside it
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"RGAlign-Rec {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_extra_path = ["extra"]  # the way from the root to the first page
html_copy_source = html_show_copyright = False
html_math_renderer = "mathml"


def setup(app) -> None:
    """Formulae as MathML, which browsers draw themselves: no script, no font from elsewhere."""
    app.connect("autodoc-process-docstring", _as_written)
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))


def _as_written(_app, _what, _name, _obj, _options, lines: list[str]) -> None:
    """Docstrings are plain text with aligned columns, no markup: the first line, then a literal block."""
    rest = [f"   {line}" for line in lines[1:]]
    lines[1:] = ["", ".. code-block:: text", "", *rest, ""] if any(line.strip() for line in rest) else [""]


def _inline(writer, node) -> None:
    writer.body.append(_mathml(node))
    raise nodes.SkipNode


def _block(writer, node) -> None:
    writer.body.append(f'<div class="formula">{_mathml(node, as_block=True)}</div>\n')
    raise nodes.SkipNode


def _mathml(node, **how) -> str:
    """Browsers set no space after a function's name ("log q"), so it is put there."""
    return tex2mathml(node.astext(), **how).replace("<mo>&ApplyFunction;</mo>", '<mspace width="0.17em"></mspace>')
