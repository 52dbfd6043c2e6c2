import json

import numpy as np
import pytest

from rgalign.ranker.match import log_clicks
from rgalign.ranker.store import StoreError, load, save
from rgalign.ranker.towers import TwoTower


def change(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.fixture
def folder(tmp_path, config):
    save(tmp_path / "ranker", TwoTower(config(text=True), seed=2))
    return tmp_path / "ranker"


def test_a_ranker_stands_where_it_is_told_to(folder):
    def places(**how):
        return {str(value.device) for value in load(folder, **how).state_dict().values()}

    assert places() == places(device="cpu") == {"cpu"}
    assert places(device="meta") == {"meta"}


def test_saving_again_replaces_the_folder(folder, config):
    save(folder, TwoTower(config(dim=4)))
    assert load(folder).config.dim == 4
    assert sorted(p.name for p in folder.parent.iterdir()) == ["ranker"]


def test_every_fault_of_a_config_is_named(folder):
    change(folder, colour="red", shape=3, dim=None, text=None)
    with pytest.raises(StoreError, match=r"(?s)text is missing.*dim is missing.*colour is not.*shape is not"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 9}, "does not fit config.json"),
        (
            {"dim": "eight", "dropout": 1},
            "(?s)dim is 'eight'; expected a valid integer.*dropout is 1; expected less than 1",
        ),
        (
            {"whitening_ridge": 0, "intent_std": "x"},
            "(?s)intent_std is 'x'; expected a valid number.*whitening_ridge is 0; expected greater than 0",
        ),
        ({"heads": 3}, "3 heads do not divide the width 4"),
        ({"dim": "\ud800"}, "Invalid JSON"),  # half of a surrogate pair
        ({"ranker": "FourTower"}, "is that of 'FourTower'; expected a ranker: TwoTower, ThreeTower"),
        ({"ranker": ["TwoTower"]}, "is that of .*expected a ranker"),
        ({"ranker": "ThreeTower"}, "interaction is missing"),
        (
            {
                "ranker": "ThreeTower",
                "interaction": "sum",
                "query_hidden": 0,
                "query_dropout": 1,
                "interaction_hidden": 8,
            },
            "(?s)query_dim is 0;.*interaction is 'sum'; expected 'attention' or 'product'.*query_dropout is 1;",
        ),
    ],
)
def test_a_config_that_is_not_that_of_the_weights_is_refused(folder, changes, message):
    change(folder, **changes)
    with pytest.raises(StoreError, match=message):
        load(folder)


def test_a_ranker_saved_before_the_ridge_was_a_setting_has_the_one_that_it_was_made_with(folder):
    change(folder, whitening_ridge=None, intent_std=None)
    assert (load(folder).config.whitening_ridge, load(folder).config.intent_std) == (0.01, 0.3)


def test_a_missing_or_broken_file_is_named(folder, tmp_path):
    with pytest.raises(StoreError, match="holds no ranker that can be read"):
        load(tmp_path / "elsewhere")
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(StoreError, match="holds no ranker that can be read"):
        load(folder)


def test_popularity_counts_the_clicks_of_train_alone(lists, intents):
    train = lists("train", 50, seed=0)
    clicks = np.bincount(train.candidates.numpy()[train.clicked.numpy()], minlength=len(intents))
    np.testing.assert_allclose(log_clicks(train, intents), np.log(clicks + 0.5), rtol=1e-6)
    with pytest.raises(ValueError, match="popularity refuses"):
        log_clicks(lists("valid", 10, seed=1, padded=1), intents)
