"""Glossary, changelog, reading list and citation say what the code says."""

import json
import re
import tomllib

import yaml

import rgalign
from rgalign.__main__ import _parser
from rgalign.params import ROOT

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_file_that_the_glossary_names_is_there():
    rows = re.findall(r"^\|.*\|$", (ROOT / "docs/glossary.md").read_text(encoding="utf-8"), re.M)[2:]
    assert len(rows) > 40
    for row in rows:
        term, _, meaning, where = (cell.strip() for cell in row.strip("|").split("|"))
        assert term, row
        assert meaning, row
        for path in re.findall(r"`([\w/]+(?:\.py|/))`", where):
            assert (ROOT / "rgalign" / path).exists(), row


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == rgalign.__version__ == VERSION
    assert re.search(r"^## (\S+)", CHANGELOG, re.M)[1] == VERSION


def test_the_paper_is_cited_as_the_readme_cites_it():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["preferred-citation"]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    names = [author["family-names"] for author in citation["authors"]]
    assert f"{', '.join(names[:-1])} and {names[-1]}" in readme
    assert citation["title"] in readme
    assert re.search(r"arXiv[: ](\d{4}\.\d{5})", citation["journal"])[1] in readme


def test_who_is_cited_is_in_the_reading_list():
    listed = (ROOT / "docs/READING.md").read_text(encoding="utf-8")
    for number in re.findall(r"\[arXiv ([\d.]+)\]\((\S+)\)", listed):
        assert number[1] == f"https://arxiv.org/abs/{number[0]}"
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        last = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][-1]["source"])
        told = " ".join(last.partition("**Read on:**")[2].split())
        for name, year in re.findall(r"\b([A-Z]\w+)(?: et al\.)? (\d{4})\b", told):
            assert re.search(rf"\b{name}(?: et al\.)? {year}\b", listed), f"{path.stem}: {name} {year}"


def test_the_changelog_names_every_command():
    (line,) = re.findall(r"`python -m rgalign`: (.*?)\. ", CHANGELOG.replace("\n", " "))
    (commands,) = (action.choices for action in _parser()._actions if action.choices)
    assert set(re.findall(r"`(\w+)`", line)) == set(commands)
