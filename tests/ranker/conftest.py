"""Fixtures of the rankers' tests."""

from collections.abc import Callable

import pytest
import torch
from small_lists import QUERY_DIM, SMALL, make_intents, make_lists, make_query_intents, make_query_lists

from rgalign.data.lists import Intents, Lists, QueryIntents, QueryLists
from rgalign.params_training import RankerSettings
from rgalign.ranker.towers import ThreeTowerConfig, TwoTowerConfig


@pytest.fixture
def lists() -> Callable[..., Lists]:
    return make_lists


@pytest.fixture
def intents() -> Intents:
    return make_intents()


@pytest.fixture
def query_lists() -> Callable[..., QueryLists]:
    return make_query_lists


@pytest.fixture
def query_intents() -> QueryIntents:
    return make_query_intents()


@pytest.fixture
def config() -> Callable[..., TwoTowerConfig]:
    """A small two-tower for these lists; keyword arguments change it."""
    return lambda **changes: TwoTowerConfig.of(RankerSettings(), **SMALL | changes)


@pytest.fixture
def three_config() -> Callable[..., ThreeTowerConfig]:
    """A small three-tower for these lists; keyword arguments change it."""
    own = {"query_dim": QUERY_DIM, "query_hidden": 8, "interaction_hidden": 8}
    return lambda **changes: ThreeTowerConfig.of(RankerSettings(), **SMALL | own | changes)


@pytest.fixture
def position_biased() -> Callable:
    """Gives a ranker a strong position bias, as training on real positions would, and makes it ready to score."""

    def biased(ranker):
        with torch.no_grad():
            ranker.position.copy_(torch.linspace(3, -3, len(ranker.position)))
        return ranker.eval()

    return biased
