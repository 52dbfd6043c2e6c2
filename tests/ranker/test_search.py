import numpy as np
import pytest
import torch

from rgalign.evaluation.metrics import gauc_of_lists
from rgalign.ranker.fit import fit, listnet, score
from rgalign.ranker.search import SPACE, THREE_TOWER_SPACE, configurations, search
from rgalign.ranker.two_tower import TwoTower

SMALL = {"learning_rate": (0.005, 0.02), "dim": (4, 8), "id_dropout": (0.0, 0.1), "weight_decay": (0.0, 0.1)}
FAST = {"lists_per_batch": 64, "epochs": 3}


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


def test_a_rankers_own_settings_leave_the_common_ones_as_they_are():
    common, both = configurations(9, seed=4), configurations(9, seed=4, own=THREE_TOWER_SPACE)
    assert [{name: each[name] for name in SPACE} for each in both] == common
    assert both[:5] == configurations(5, seed=4, own=THREE_TOWER_SPACE)
    assert all(set(each) == {*SPACE, *THREE_TOWER_SPACE} for each in both)
    assert len({each["query_hidden"] for each in both}) > 1


def test_the_log_holds_every_value_and_the_best_row_can_be_repeated(parts, intents, config):
    train, dev, valid = parts
    log = search(
        lambda own: TwoTower(config(**own), seed=1), *parts, intents,
        trials=4, seed=1, space=SMALL, progress=False, **FAST,
    )  # fmt: skip
    assert sorted(log["trial"]) == [0, 1, 2, 3]
    assert {*SMALL, "dev_gauc", "valid_gauc", "best_epoch", "seconds"} <= set(log)
    assert log["valid_gauc"].is_monotonic_decreasing
    best = log.iloc[0]
    model = TwoTower(config(dim=int(best.dim), id_dropout=float(best.id_dropout)), seed=1)
    rates = {"learning_rate": float(best.learning_rate), "weight_decay": float(best.weight_decay)}
    fitted = fit(model, train, dev, intents, seed=1, progress=False, **rates, **FAST)
    judged = gauc_of_lists(score(fitted.model, valid, intents), valid.clicked.numpy(), valid.shown.numpy())
    assert judged.value == best.valid_gauc


def test_a_trial_that_diverges_comes_last_and_does_not_stop_the_search(parts, intents, config):
    def loss(model, lists, intents):
        return listnet(model, lists, intents) * (torch.nan if model.config.dim == 4 else 1)

    log = search(
        lambda own: TwoTower(config(**own)), *parts, intents,
        trials=6, seed=0, space=SMALL, loss=loss, progress=False, **FAST,
    )  # fmt: skip
    assert set(log["dim"]) == {4, 8}
    assert np.array_equal(log["valid_gauc"].isna(), log["dim"] == 4)


def test_refuses_to_choose_on_test(lists, parts, intents, config):
    with pytest.raises(ValueError, match="search refuses: valid holds lists of part 'test'"):
        search(lambda own: TwoTower(config(**own)), *parts[:2], lists("test", 9, seed=0), intents, trials=1, seed=0)
