"""Checks of a stage's notebook before a kernel starts: whether papermill would run it with the given parameters.

papermill only warns where it cannot: then the cell's defaults hold, and a run writes into another run's folder."""

import ast
import json
import re
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path

LANGUAGE = ("kernelspec", "language"), ("language_info", "name")  # where a notebook's metadata name it
TAG, INJECTED = "parameters", "injected-parameters"
NOT_PYTHON = ("%", "!", "?")  # what IPython reads before Python does
FIX = "copy it from a new folder: python -m rgalign new DIR"


def faults(path: Path, parameters: Collection[str]) -> list[str]:
    """Why this notebook cannot be run with these parameters, one line a fault; empty where it can.

    parameters  names that are given; the one code cell tagged `parameters` has to assign each, and no other cell any
    What papermill does not need may be missing: a kernel's name or language, cell ids, outputs.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        return [f"is not UTF-8 (byte {error.start}); {FIX}"]
    if text.startswith("\ufeff"):
        return ["begins with a byte order mark, which is not JSON: save it as UTF-8 without one"]
    try:
        notebook = json.loads(text)
    except (ValueError, RecursionError) as error:
        return [f"is not JSON ({error}); {FIX}"]
    if not isinstance(notebook, dict) or notebook.get("nbformat") != 4:
        found = notebook.get("nbformat") if isinstance(notebook, dict) else type(notebook).__name__
        return [f"is not a notebook of format 4 (found {found}); {FIX}"]
    import nbformat  # late: `status` does without it

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cells without an id get one
        try:
            nbformat.validate(nbformat.validator.normalize(nbformat.from_dict(notebook))[1])
        except (nbformat.ValidationError, AttributeError, KeyError, TypeError) as error:
            return [f"is not a notebook ({str(error).splitlines()[0]}); {FIX}"]
    said = [notebook["metadata"].get(part, {}).get(name) for part, name in LANGUAGE]
    others = {str(language or "python").lower() for language in said} - {"python"}
    wrong = [f"is a notebook of {language}; expected python" for language in sorted(others)]
    return wrong + _parameter_faults(notebook["cells"], parameters)


def _parameter_faults(cells: list[dict], parameters: Collection[str]) -> list[str]:
    tags = [cell["metadata"].get("tags", []) for cell in cells]
    tagged, injected = ([place for place, own in enumerate(tags) if tag in own] for tag in (TAG, INJECTED))
    if len(tagged) != 1 or cells[tagged[0]]["cell_type"] != "code":
        kind = "" if len(tagged) != 1 else f", a {cells[tagged[0]]['cell_type']} cell"
        what = f"has {_cells(tagged)} tagged `{TAG}`{kind}; expected one code cell, that which assigns "
        return [f"{what}{', '.join(parameters)}: tag it again, or {FIX}"]
    found, (place,) = [], tagged
    if missing := set(parameters) - assigned(_source(cells[place])):
        found.append(f"has no {', '.join(sorted(missing))} in its cell tagged `{TAG}`, which is given")
    if len(injected) > 1 or (injected and injected[0] < place):
        found.append(f"has {_cells(injected)} tagged `{INJECTED}`; expected none, or one below that tagged `{TAG}`")
    for number, cell in enumerate(cells):
        if number == place or number in injected or cell["cell_type"] != "code":
            continue
        if twice := assigned(_source(cell)) & set(parameters):
            found.append(f"assigns {', '.join(sorted(twice))} in cell {number + 1} as well, over what it is given")
    return found


def _cells(places: list[int]) -> str:
    return f"{len(places)} cell{'s' * (len(places) != 1)}"


def _source(cell: dict) -> str:
    return "".join(cell["source"])


def assigned(source: str) -> set[str]:
    """The names that a cell assigns outside of functions; of a cell that is no Python, those at the start of a line."""
    lines = ["" if line.startswith(NOT_PYTHON) else line for line in source.splitlines()]
    try:
        return set(_targets(ast.parse("\n".join(lines))))
    except (SyntaxError, ValueError, RecursionError):
        return set(re.findall(r"^(\w+)\s*(?::[^=\n]+)?=(?!=)", source, re.M))


def _targets(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
        return
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    for child in ast.iter_child_nodes(node):
        yield from _targets(child)
