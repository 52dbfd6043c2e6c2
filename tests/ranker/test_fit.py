import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_lists import fit
from torch import nn

from rgalign.errors import TrainingError
from rgalign.evaluation.metrics import gauc_of_lists
from rgalign.ranker.fit import score, score_kb
from rgalign.ranker.losses import listnet
from rgalign.ranker.match import log_clicks
from rgalign.ranker.store import save
from rgalign.ranker.towers import TwoTower

FAST = {"seed": 0, "lists_per_batch": 64, "learning_rate": 0.02, "progress": False}


@pytest.fixture
def parts(lists):
    return lists("train", 400, seed=0), lists("dev", 100, seed=1)


def gauc(model, lists, intents):
    return gauc_of_lists(score(model, lists, intents), lists.clicked.numpy(), lists.shown.numpy()).value


@pytest.mark.parametrize("text", [False, True])
def test_learns_what_can_be_learnt_and_beats_popularity(text, parts, intents, config):
    train, dev = parts
    fitted = fit(TwoTower(config(text=text)), train, dev, intents, epochs=10, **FAST)
    assert gauc(fitted.model, dev, intents) > 0.95
    by_clicks = log_clicks(train, intents)[dev.candidates.numpy()]
    assert gauc_of_lists(by_clicks, dev.clicked.numpy(), dev.shown.numpy()).value < 0.7
    assert list(fitted.curve) == ["epoch", "train_loss", "dev_gauc", "seconds"]
    assert fitted.curve["train_loss"].iloc[-1] < fitted.curve["train_loss"].iloc[0]


@pytest.mark.parametrize("text", [False, True])
def test_an_intent_never_seen_outranks_those_of_other_categories(text, parts, lists, intents, config):
    train, dev = parts
    fitted = fit(TwoTower(config(text=text, id_dropout=0.2)), train, dev, intents, epochs=20, **FAST)
    test = lists("test", 200, seed=2)
    of_last_category = (test.fields[:, 0] == 5).numpy()
    scores = score_kb(fitted.model, test, intents)[of_last_category]
    unseen, others = scores[:, -1:], scores[:, :9]
    assert (unseen > others).mean() > 0.95


def test_the_best_epoch_is_given_back(parts, intents, config):
    train, dev = parts
    fitted = fit(TwoTower(config()), train, dev, intents, epochs=30, patience=3, **FAST)
    curve = fitted.curve
    assert fitted.best_epoch == curve["epoch"][curve["dev_gauc"].argmax()]
    assert len(curve) == min(30, fitted.best_epoch + 3)
    assert gauc(fitted.model, dev, intents) == pytest.approx(curve["dev_gauc"].max(), abs=1e-7)


def test_two_runs_give_the_same_bytes_and_leave_the_random_state_alone(parts, intents, config, tmp_path):
    train, dev = parts
    before = torch.random.get_rng_state()
    for run in ("first", "second"):
        fitted = fit(TwoTower(config(text=True), seed=5), train, dev, intents, epochs=3, **FAST | {"seed": 5})
        save(tmp_path / run, fitted.model)
    for name in ("weights.safetensors", "config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert torch.equal(before, torch.random.get_rng_state())


def test_another_seed_gives_another_ranker(parts, intents, config):
    train, dev = parts
    scores = [
        score(fit(TwoTower(config()), train, dev, intents, epochs=2, **FAST | {"seed": seed}).model, dev, intents)
        for seed in (0, 1)
    ]
    assert not np.array_equal(*scores)


@pytest.mark.parametrize(("train", "dev"), [("test", "dev"), ("train", "test"), ("valid", "dev"), ("dev", "train")])
def test_refuses_lists_of_another_part(train, dev, lists, intents, config):
    given = lists(train, 20, seed=0), lists(dev, 20, seed=1)
    with pytest.raises(ValueError, match=r"fit refuses: .*holds lists of part"):
        fit(TwoTower(config()), *given, intents, **FAST)


def test_lists_without_a_click_change_nothing(parts, intents, config):
    train, dev = parts
    silent = replace(train, clicked=train.clicked & (torch.arange(len(train)) % 2 == 0).unsqueeze(1))
    clicked = train.take(torch.arange(0, len(train), 2))
    curves = [fit(TwoTower(config()), t, dev, intents, epochs=2, **FAST).curve for t in (silent, clicked)]
    assert curves[0].drop(columns="seconds").equals(curves[1].drop(columns="seconds"))
    with pytest.raises(ValueError, match="0 training lists have a click"):
        fit(TwoTower(config()), replace(train, clicked=torch.zeros_like(train.clicked)), dev, intents, **FAST)


def test_a_loss_that_is_not_finite_names_epoch_and_parameter(parts, intents, config):
    train, dev = parts
    epochs = iter([False] * 7 + [True] * 7)  # 400 lists in batches of 64: seven steps an epoch

    def loss(model, lists, intents):
        return listnet(model, lists, intents) * (torch.nan if next(epochs) else 1)

    with pytest.raises(TrainingError, match=r"nan in epoch 2: lower ranker.learning_rate \(it is 0.02\)"):
        fit(TwoTower(config()), train, dev, intents, loss=loss, **FAST)


def test_weights_that_the_last_step_ruined_are_told_before_they_are_judged(parts, intents, config):
    """One batch an epoch: its loss was still finite."""
    train, dev = parts
    own = FAST | {"learning_rate": 1e38, "lists_per_batch": 1000}
    with pytest.raises(TrainingError, match=r"no longer finite in epoch 1: lower ranker.learning_rate \(it is"):
        fit(TwoTower(config()), train, dev, intents, **own)


def test_the_loop_takes_any_module_and_any_loss(parts, intents):
    class OnlyIds(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Embedding(12, 6)

        def forward(self, lists, intents, *, doubled=False):
            scores = self.bias(lists.candidates.long()).gather(2, lists.fields[:, :1, None].long().expand(-1, 6, 1))
            return scores.squeeze(2) * (2 if doubled else 1)

    def loss(model, lists, intents):
        scores = model(lists, intents, doubled=True)
        return -(scores.sigmoid().log() * lists.clicked).sum(1).mean() + scores.square().mean()

    train, dev = parts
    fitted = fit(OnlyIds(), train, dev, intents, loss=loss, epochs=15, **FAST | {"learning_rate": 0.1})
    assert gauc(fitted.model, dev, intents) > 0.95


def test_from_its_start_a_ranker_only_gets_better_or_stays(parts, intents, config):
    """The weights given are epoch 0: with a learning rate that ruins them they come back as they were."""
    train, dev = parts
    trained = fit(TwoTower(config()), train, dev, intents, epochs=4, **FAST).model
    own = {name: value.clone() for name, value in trained.state_dict().items()}
    at_first = gauc(trained, dev, intents)
    how = {**FAST, "learning_rate": 5.0, "from_start": True}
    ruined = fit(copy.deepcopy(trained), train, dev, intents, epochs=9, patience=2, **how)
    assert ruined.best_epoch == 0
    assert ruined.curve["epoch"].tolist() == [0, 1, 2], "patience counts from the start"
    assert ruined.curve["dev_gauc"][0] == pytest.approx(at_first)
    assert all(torch.equal(value, own[name]) for name, value in ruined.model.state_dict().items())
    poor = TwoTower(config())
    begun = gauc(poor, dev, intents)
    better = fit(poor, train, dev, intents, epochs=4, from_start=True, **FAST)
    assert better.best_epoch > 0
    assert gauc(better.model, dev, intents) > begun
