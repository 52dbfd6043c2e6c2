"""The code that CONTRIBUTING.md tells people to add: added to its module, and used."""

import importlib
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rgalign.params import ROOT

BLOCKS = re.findall(
    r"```python\n# (rgalign/\S+)\.py\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.S
)


@pytest.fixture
def added():
    """A module of the package with the block of CONTRIBUTING.md that is for it."""

    def add(module: str, registry: str) -> SimpleNamespace:
        (code,) = [code for path, code in BLOCKS if path.replace("/", ".") == module]
        there = importlib.import_module(module)
        names = {**vars(there), registry: dict(getattr(there, registry))}
        exec(code, names)
        return SimpleNamespace(**names)

    return add


def test_a_metric(added):
    of_lists = added("rgalign.evaluation.metrics", "METRICS").METRICS["hit@1"].of_lists
    scores, shown = np.array([[3.0, 2, 1], [3, 2, 1], [3, 2, 1]]), np.ones((3, 3), bool)
    clicked = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(of_lists(scores, clicked, shown), [1, 0, np.nan])


def test_a_match_term(added):
    term = added("rgalign.ranker.match_terms", "MATCH_TERMS").MATCH_TERMS["shared_words"].fit(None)
    values = term.over(SimpleNamespace(texts=["track a parcel", "refund"]))
    found = values(SimpleNamespace(texts=["where is a parcel", "refund refund"]))
    assert found.tolist() == [[2, 0], [0, 1]]
    assert found.dtype == np.float32


def test_an_objective(added):
    module = added("rgalign.alignment.objectives", "OBJECTIVES")
    chosen, zero, one = torch.tensor([0.0, 5.0, 20.0]), torch.zeros(3), torch.ones(3)
    pairs = module.PairLogProbabilities(chosen, zero, zero, zero, one, one, zero, zero)
    assert module.OBJECTIVES["hinge"](pairs, 0.1).tolist() == [1, 0.5, 0]
