"""An executed notebook as one HTML page that loads nothing: formulas are pictures, and no script is left."""

import base64
import re
from html import escape
from io import BytesIO
from pathlib import Path

from jinja2 import pass_context
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import math_to_image
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from PIL import Image

DPI = 192  # pixels an inch: two a CSS pixel
# nbconvert's lab template without what it loads from elsewhere: require.js, MathJax, Mermaid, the widgets' manager
TEMPLATE = "{% extends 'lab/index.html.j2' %}" + "".join(
    f"{{% block {name} %}}{{% endblock %}}"
    for name in ("html_head_js", "html_head_js_mathjax", "html_head_js_mermaidjs", "jupyter_widgets")
)


def page(notebook: Path) -> str:
    """The HTML of an executed notebook."""
    html, _ = _Exporter(raw_template=TEMPLATE).from_filename(str(notebook))  # embed_images closes <details> too early
    return html


def formula(tex: str) -> str:
    """An <img> of one formula, its TeX as alternative text; the TeX alone where matplotlib cannot draw it."""
    drawn = re.sub(r"\\sqrt\s+(\w)", r"\\sqrt{\1}", re.sub(r"\\le\b", r"\\leq", " ".join(tex.split())))
    png = BytesIO()
    try:
        depth = math_to_image(f"${drawn}$", png, dpi=DPI, format="png", prop=FontProperties(size=12))
    except ValueError:  # matplotlib knows a part of TeX
        return f"<code>{escape(tex)}</code>"
    with Image.open(png) as image:
        height = image.height * 72 / DPI
    data, style = base64.b64encode(png.getvalue()).decode(), f"height:{height:.1f}pt; vertical-align:{-depth:.1f}pt"
    return f'<img src="data:image/png;base64,{data}" style="{style}" alt="{escape(tex)}">'


class _Renderer(IPythonRenderer):
    def block_math(self, body: str) -> str:
        return f'<div style="text-align:center">{formula(body)}</div>'

    def inline_math(self, body: str) -> str:
        return formula(body)


class _Exporter(HTMLExporter):
    @pass_context
    def markdown2html(self, context, source: str) -> str:
        attachments = context.get("cell", {}).get("attachments", {})
        renderer = _Renderer(escape=False, attachments=attachments, anchor_link_text=self.anchor_link_text)
        return MarkdownWithMath(renderer=renderer).render(source)
