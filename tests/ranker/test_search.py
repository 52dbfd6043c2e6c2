import itertools
import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
import pytest
import torch
from small_lists import fit

from rgalign.errors import TrainingError
from rgalign.evaluation.metrics import gauc_of_lists
from rgalign.params_training import RANKER_NAMES, RankerSettings
from rgalign.ranker.fit import Fitted, score
from rgalign.ranker.search import SPACE, VECTOR_SPACE, changes, configurations, grid, search, space_of
from rgalign.ranker.towers import TwoTower
from rgalign.ranker.variants import RANKERS

FAST = {"lists_per_batch": 64, "epochs": 3}
MODELS = [name for name in RANKER_NAMES if "/" not in name]


@pytest.fixture
def parts(lists):
    return lists("train", 200, seed=0), lists("dev", 50, seed=1), lists("valid", 60, seed=2)


def test_configurations_are_drawn_from_the_space_and_repeat():
    drawn = configurations(12, seed=4)
    assert drawn == configurations(12, seed=4)
    assert drawn[:5] == configurations(5, seed=4)
    assert drawn != configurations(12, seed=5)
    assert all(settings[name] in values for settings in drawn for name, values in SPACE.items())
    assert all(set(settings) == set(SPACE) for settings in drawn)
    assert all(len({settings[name] for settings in configurations(40, seed=4)}) == len(SPACE[name]) for name in SPACE)


@pytest.mark.parametrize("pair", itertools.combinations(MODELS, 2), ids="-".join)
def test_what_two_models_both_have_is_searched_alike(pair):
    spaces = [space_of(name) for name in pair]
    both = [name for name in spaces[0] if name in spaces[1] and spaces[0][name] == spaces[1][name]]
    assert set(SPACE) <= set(both)
    drawn = [configurations(9, seed=4, space=space) for space in spaces]
    changed = [changes(each, seed=4) for each in drawn]
    for trials in (drawn, changed):
        of_both = [[{name: trial[name] for name in both if name in trial} for trial in each] for each in trials]
        assert of_both[0] == of_both[1]


@pytest.mark.parametrize("name", RANKER_NAMES)
def test_the_ridge_is_searched_for_what_reads_vectors_and_is_all_that_a_control_searches(name):
    space = space_of(name)
    assert ("whitening_ridge" in space) == (RANKERS[name].vectors is not None)
    assert set(space) <= set(RankerSettings.model_fields)
    if RANKERS[name].chats:
        assert set(space) == {"chat_epochs", "chat_learning_rate", "chat_temperature"}
    elif "/" in name:
        ridges = [{"whitening_ridge": value} for value in VECTOR_SPACE["whitening_ridge"]]
        assert grid(space) == (ridges if RANKERS[name].vectors else [{}])
    else:
        assert space.items() >= SPACE.items()
        assert ("query_hidden" in space) == (RANKERS[name].architecture == "three_tower")


@pytest.mark.parametrize("name", MODELS)
def test_every_setting_that_can_be_drawn_makes_a_ranker(name):
    """Also together: heads divide the width in every combination."""
    space = space_of(name)
    for key, values in space.items():
        for value in values:
            RankerSettings(**({"embedding_dim": 8} | {key: value}))
    for width, heads in itertools.product(space["embedding_dim"], space["heads"]):
        RankerSettings(embedding_dim=width, heads=heads)


def test_about_a_quarter_of_the_settings_change_near_the_best():
    drawn = configurations(200, seed=1)
    changed = changes(drawn, seed=1)
    assert all(change.items() <= trial.items() for change, trial in zip(changed, drawn, strict=True))
    share = sum(map(len, changed)) / (200 * len(SPACE))
    assert share == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / (200 * len(SPACE))))
    assert changes([], seed=1) == []


class Knows(torch.nn.Module):
    """Scores that are `worth` times the click: GAUC 1, 0.5 or 0."""

    def __init__(self, worth: float):
        super().__init__()
        self.worth = torch.nn.Parameter(torch.tensor(float(worth)))

    def forward(self, lists, intents):
        return self.worth * lists.clicked


def known(worth: Mapping[int, float]):
    """fit_one of a model whose GAUC is known beforehand to follow from its setting `x`; NaN: it diverges."""

    def fit_one(settings):
        if np.isnan(worth[settings["x"]]):
            raise TrainingError("diverged")
        return Fitted(Knows(worth[settings["x"]]), pd.DataFrame({"dev_gauc": [0.5]}), 1)

    return fit_one


def test_the_log_holds_every_value_and_the_best_row_can_be_repeated(parts, intents, config):
    train, dev, valid = parts

    def fit_one(settings):
        own = {name: settings[name] for name in ("dim", "id_dropout")}
        rates = {name: settings[name] for name in ("learning_rate", "weight_decay")}
        return fit(TwoTower(config(**own), seed=1), train, dev, intents, seed=1, progress=False, **rates, **FAST)

    space = {"learning_rate": (0.005, 0.02), "dim": (4, 8), "id_dropout": (0.0, 0.1), "weight_decay": (0.0, 0.1)}
    drawn = configurations(4, seed=1, space=space)
    log, best = search(fit_one, drawn, [], valid, intents, progress=False)
    assert sorted(log["trial"]) == [0, 1, 2, 3]
    assert {*space, "dev_gauc", "valid_gauc", "best_epoch", "seconds"} <= set(log)
    assert log["valid_gauc"].is_monotonic_decreasing
    assert best == drawn[log["trial"].iloc[0]]
    judged = gauc_of_lists(score(fit_one(best).model, valid, intents), valid.clicked.numpy(), valid.shown.numpy())
    assert judged.value == log["valid_gauc"].iloc[0]


def test_a_trial_that_diverges_comes_last_and_does_not_stop_the_search(parts, intents):
    fit_one = known({0: math.nan, 1: 1, 2: math.nan})
    log, best = search(fit_one, [{"x": x} for x in (0, 1, 2)], [], parts[2], intents, progress=False)
    assert list(log["x"]) == [1, 0, 2]
    assert log["valid_gauc"].isna().tolist() == [False, True, True]
    assert best == {"x": 1}


def test_later_trials_change_the_best_so_far(parts, intents):
    fit_one = known({0: -1, 1: 1})
    trials, nearby = [{"x": 0, "y": 7}, {"x": 1, "y": 8}], [{"y": 9}, {"x": 0}, {}]
    log, best = search(fit_one, trials, nearby, parts[2], intents, progress=False)
    tried = [(row.x, row.y) for row in log.sort_values("trial").itertuples()]
    assert tried == [(0, 7), (1, 8), (1, 9), (0, 8), (1, 8)]  # 9 is no better than 8, which came first
    assert best == {"x": 1, "y": 8}


def test_refuses_to_choose_on_test(lists, parts, intents):
    with pytest.raises(ValueError, match="search refuses: valid holds lists of part 'test'"):
        search(known({0: 1}), [{"x": 0}], [], lists("test", 9, seed=0), intents)
