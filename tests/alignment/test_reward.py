"""The reward by hand, the draw by counting, and a shop in which the query tells the click."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import small_rewards as shop
import torch
from small_pairs import TOKENIZER, reasoner
from torch.nn import functional

from rgalign.alignment import reward as rewards
from rgalign.alignment.reward import (
    ALL,
    ONE,
    Queries,
    RewardModel,
    cross_sampled,
    load_reward_model,
    null_query,
    save_reward_model,
    score_candidates,
    train_reward_models,
    with_all_queries,
    with_each_query,
)
from rgalign.data.lists import QueryLists, with_queries
from rgalign.ranker.fit import listnet
from rgalign.ranker.store import StoreError
from rgalign.reasoner.embed import embed
from rgalign.reasoner.prompts import Prompter
from rgalign.reasoner.written import TextEmbedder
from rgalign.run.artifacts import digest
from rgalign.seeding import seeded

VECTORS = shop.query_vectors()
QUERIES = Queries(VECTORS)
MODELS = {(ALL, 3): shop.SOURCES, (ONE, 3): shop.SOURCES[:1]}
NOW, LATER = np.datetime64("2024-06-01"), np.datetime64("2025-06-01")


def some_queries(count: int, seed: int = 0) -> np.ndarray:
    return VECTORS.values[np.random.default_rng(seed).integers(len(VECTORS), size=count)]


# --- what a reward is


def by_hand(model: RewardModel, lists, query, form: str, exists: np.ndarray) -> list[float]:
    """log p of the clicked intents, list by list, in plain loops."""
    asked, found = with_queries(lists, query), []
    with torch.no_grad():
        scores, (v, _) = model.ranker(asked, model.intents), model.ranker.intent(model.intents)
        branch = model.ranker.query(asked) @ v.T / np.sqrt(8)
    for row in range(len(lists)):
        shown = [int(i) for i in lists.candidates[row] if i >= 0]
        clicked = [i for i, click in zip(shown, lists.clicked[row], strict=False) if click]
        if form == "list":
            terms = {i: float(scores[row, place]) for place, i in enumerate(shown)}
        else:
            terms = {i: float(branch[row, i]) for i in range(shop.KB) if exists[row, i]}
        total = np.log(sum(np.exp(value) for value in terms.values()))
        found.append(np.mean([terms[i] - total for i in clicked]) if clicked else np.nan)
    return found


@pytest.mark.parametrize("form", rewards.REWARDS)
def test_it_is_the_gain_in_log_probability_of_what_was_clicked(form):
    model, lists = shop.model(), shop.lists(count=20)
    lists.clicked[3] = lists.shown[3]  # several clicks share the mass
    query, null = some_queries(20), model.null.expand(20, -1)
    timestamps = np.where(np.arange(20) % 2, NOW, LATER)
    exists = np.ones((20, shop.KB), bool)
    exists[1::2, -2:] = False
    lists.clicked[1::2] &= lists.candidates[1::2] < shop.KB - 2  # what was not there was not clicked
    expected = np.subtract(*(by_hand(model, lists, q, form, exists) for q in (query, null)))
    found = model.reward(with_queries(lists, query), form=form, timestamps=timestamps)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert np.isnan(found[-1])
    always = model.reward(with_queries(lists, query), form=form)
    np.testing.assert_allclose(always[::2], found[::2], atol=1e-6)
    assert np.allclose(always[1::2], found[1::2], atol=1e-6, equal_nan=True) == (form == "list")


@pytest.mark.parametrize("form", rewards.REWARDS)
def test_the_null_query_is_worth_nothing(form):
    model, lists = shop.model(), shop.lists(count=21)
    found = model.reward(with_queries(lists, model.null.expand(21, -1).float()), form=form)
    assert (found[:-1] == 0).all()


@pytest.mark.parametrize("form", rewards.REWARDS)
def test_a_deaf_model_finds_every_query_worth_nothing(form):
    model, lists = shop.model(), shop.lists(count=21)
    assert np.abs(model.reward(with_queries(lists, some_queries(21)), form=form)[:-1]).max() > 1e-3
    last = model.ranker.query.layers[-1]
    last.weight.zero_()
    assert (model.reward(with_queries(lists, some_queries(21)), form=form)[:-1] == 0).all()


def test_its_model_is_frozen_and_its_form_known():
    model = shop.model(form="kb")
    assert not model.ranker.training
    assert not any(parameter.requires_grad for parameter in model.ranker.parameters())
    asked = with_queries(shop.lists(count=9), some_queries(9))
    assert np.array_equal(model.reward(asked), model.reward(asked, form="kb"), equal_nan=True)
    with pytest.raises(ValueError, match=r"form is 'lists'; expected list \| kb; did you mean 'list'"):
        replace(model, form="lists")
    with pytest.raises(ValueError, match="form is 'loud'"):
        model.reward(asked, form="loud")


def test_probabilities_are_those_that_the_list_reward_is_made_of():
    model, lists, query = shop.model(), shop.lists(count=12), some_queries(12)
    found = model.probabilities(with_queries(lists, query))
    assert (found[~lists.shown.numpy()] == 0).all()
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)
    clicked = np.log((found * lists.clicked.numpy()).sum(axis=1)[:-1])
    np.testing.assert_allclose(clicked, model.log_probability(with_queries(lists, query), form="list")[:-1], atol=1e-5)


def test_candidates_are_scored_in_their_sessions():
    model, lists = shop.model(), shop.lists(count=15)
    candidates = shop.candidates(lists).sample(frac=1, random_state=1)
    clicked_late = (lists.clicked & (lists.candidates >= shop.KB - 2)).any(dim=1).numpy()
    timestamps = np.where(clicked_late, LATER, NOW)
    table = score_candidates(model, candidates, lists, QUERIES, form="kb", timestamps=timestamps)
    assert table.drop(columns="reward").equals(candidates)
    empty, no_click = table["query"] == "", table["session_id"] == "train14"
    assert (table["reward"].isna() == (empty | no_click)).all()
    for row in table[~empty & ~no_click].iloc[:10].itertuples():
        at = int(row.session_id.removeprefix("train"))
        query, when = VECTORS.rows([row.query]), timestamps[[at]]
        (alone,) = model.reward(with_queries(lists.take([at]), query), form="kb", timestamps=when)
        assert row.reward == pytest.approx(alone, abs=1e-5)
    assert (table.dropna().groupby(["session_id", "query"])["reward"].nunique() == 1).all()
    with pytest.raises(ValueError, match="do not have"):
        score_candidates(model, candidates, lists.take(range(10)), QUERIES)


# --- the draw


def drawn_often(lists, times: int = 4000) -> pd.DataFrame:
    """How often each list has each vector; (lists, bank)."""
    with seeded(5):
        rows = [lists.drawn().query for _ in range(times)]
    bank = lists.bank.float()
    places = torch.stack([torch.cdist(each.float(), bank).argmin(dim=1) for each in rows], dim=1)
    return pd.DataFrame([np.bincount(own, minlength=len(bank)) / times for own in places.numpy()])


def test_a_source_is_drawn_then_one_of_its_queries_as_often_as_it_wrote_it():
    lists = shop.lists(count=3)
    rows = [
        ("train0", "main", "0 0", 1), ("train0", "main", "0 1", 3), ("train0", "main", "", 9),
        ("train0", "other", "1 0", 5), ("train1", "other", " ", 2), ("stranger", "main", "3 3", 1),
    ]  # fmt: skip
    candidates = pd.DataFrame(rows, columns=["session_id", "source", "query", "count"])
    null = null_query(lists, candidates, VECTORS)
    mean = VECTORS.rows(["0 0", "0 1", "1 0"]).astype(float).mean(axis=0)
    np.testing.assert_allclose(null.float(), mean, atol=2e-3)
    often = drawn_often(with_all_queries(lists, candidates, QUERIES, null=null, null_share=0.2))
    assert len(often) == 2  # the third has no click
    place = {text: row + 1 for row, text in enumerate(VECTORS.ids)}
    expected = np.zeros(often.shape)
    expected[0, [0, place["0 0"], place["0 1"], place["1 0"]]] = [0.2, 0.8 * 0.5 / 4, 0.8 * 0.5 * 3 / 4, 0.8 * 0.5]
    expected[1, 0] = 1
    np.testing.assert_allclose(often, expected, atol=0.03)


def test_lists_keep_their_queries_where_they_go():
    lists = shop.lists(count=12)
    candidates = shop.candidates(lists)
    whole = with_all_queries(lists, candidates, QUERIES, null=null_query(lists, candidates, VECTORS), null_share=0.1)
    taken = whole.take([7, 2, 7])
    assert torch.equal(taken.chance, whole.chance[[7, 2, 7]])
    assert torch.equal(taken.places, whole.places[[7, 2, 7]])
    assert taken.session_id.tolist() == ["train7", "train2", "train7"]
    moved = taken.to("meta")
    assert {moved.bank.device.type, moved.places.device.type, moved.chance.device.type} == {"meta"}
    with seeded(0):
        first, second = taken.drawn(), taken.drawn()
    with seeded(0):
        again = taken.drawn()
    assert torch.equal(first.query, again.query)
    assert not torch.equal(first.query, second.query)


def test_its_loss_is_that_of_the_drawn_queries():
    model, lists = shop.model(), shop.lists(count=12)
    candidates = shop.candidates(lists)
    whole = with_all_queries(lists, candidates, QUERIES, null=model.null, null_share=0.1)
    with seeded(1):
        value = cross_sampled(listnet)(model.ranker, whole, model.intents)
    with seeded(1):
        assert value == listnet(model.ranker, whole.drawn(), model.intents)


def test_a_list_that_no_source_wrote_for_is_refused():
    lists = shop.lists(count=6)
    candidates = shop.candidates(lists)
    others = candidates[candidates["session_id"] != "train3"]
    with pytest.raises(ValueError, match=r"1 of 5 sessions of train have no candidate \(first: 'train3'\)"):
        with_all_queries(lists, others, QUERIES, null=torch.zeros(6).half(), null_share=0)


def test_development_lists_have_every_sources_first_query():
    lists = shop.lists("dev", count=4)
    rows = [("dev2", "a", "0 1"), ("dev2", "a", "0 2"), ("dev0", "a", ""), ("dev0", "a", "1 1"), ("dev2", "b", "2 2")]
    found = with_each_query(lists, pd.DataFrame(rows, columns=["session_id", "source", "query"]), QUERIES, first=True)
    assert isinstance(found, QueryLists)
    assert found.session_id.tolist() == ["dev2", "dev0", "dev2"]
    assert np.array_equal(found.query.numpy(), VECTORS.rows(["0 1", "1 1", "2 2"]))


def test_a_query_is_read_as_an_intent_without_description():
    model, put = reasoner(), Prompter(TOKENIZER, features=[], kinds={}, instruction="w1")
    found = TextEmbedder(model, put).vectors(["w3 w4", "", "w5", "w3 w4"])
    assert found.ids.tolist() == ["w3 w4", "w5"]
    written = put.intents(pd.DataFrame({"intent_id": "x", "title": ["w3 w4", "w5"], "description": [None, ""]}))
    np.testing.assert_allclose(found.values, embed(model, written, progress=False), atol=2e-3)
    assert len(TextEmbedder(model, put).vectors([""])) == 0


# --- training


@pytest.fixture(scope="module")
def trained(tmp_path_factory, one_thread):
    folder, parts = tmp_path_factory.mktemp("reward"), shop.parts(train=400, dev=100)
    candidates = pd.concat([shop.candidates(parts.train), shop.candidates(parts.dev)])
    curves = train_reward_models(
        parts, candidates, QUERIES, shop.intent_vectors(), models=MODELS, settings=shop.SETTINGS,
        folder=folder, positions=shop.SHOWN, progress=False,
    )  # fmt: skip
    return folder, parts, candidates, curves


@pytest.mark.parametrize("name", [ALL, ONE])
@pytest.mark.parametrize("form", rewards.REWARDS)
def test_right_queries_gain_and_wrong_ones_lose(trained, name, form):
    model = load_reward_model(trained[0] / name / "seed-3", shop.kb())
    dev = trained[1].dev
    table = score_candidates(model, shop.candidates(dev, seed=9, right=0.5), dev, QUERIES, form=form).dropna()
    group = dict(zip(dev.session_id, shop.group_of(dev), strict=True))
    right = table["query"].str[0].astype(int) == table["session_id"].map(group)
    assert table["reward"][right].mean() > 0.3
    assert (table["reward"][right] > 0).mean() > 0.95
    assert table["reward"][~right].mean() < -0.3


def test_curves_and_folders(trained):
    folder, parts, candidates, curves = trained
    assert curves.columns.tolist() == ["epoch", "train_loss", "dev_gauc", "seconds", "model", "seed", "best"]
    assert curves.groupby("model")["best"].sum().to_dict() == {ALL: 1, ONE: 1}
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = ("config.json", "null.safetensors", "weights.safetensors")
    assert found == [f"{model}/seed-3/{name}" for model in (ALL, ONE) for name in names]
    model = load_reward_model(folder / ONE / "seed-3", shop.kb())
    assert model.form == "list"
    own = candidates[candidates["source"] == "main"]
    assert torch.equal(model.null, null_query(parts.train, own, VECTORS))
    asked = own[own["session_id"].isin(parts.train.session_id) & (own["query"] != "")]["query"]
    mean = VECTORS.rows(asked).astype(float).mean(axis=0)  # whitening is that of all of train's queries
    np.testing.assert_allclose(model.ranker.query.layers[0].mean, mean, atol=1e-4)


@pytest.mark.slow
def test_the_same_seed_has_the_same_bytes_also_side_by_side(trained, tmp_path):
    folder, parts, candidates, _ = trained
    train_reward_models(
        parts, candidates, QUERIES, shop.intent_vectors(), models=MODELS, settings=shop.SETTINGS,
        folder=tmp_path, positions=shop.SHOWN, workers=2, progress=False,
    )  # fmt: skip
    assert digest(tmp_path) == digest(folder)


def test_it_learns_from_train_alone():
    parts = shop.parts()
    how = dict(models=MODELS, settings=shop.SETTINGS, folder=None, positions=0)
    with pytest.raises(ValueError, match="holds lists of part 'valid'"):
        train_reward_models(replace(parts, train=parts.valid), pd.DataFrame(), QUERIES, VECTORS, **how)


def test_it_comes_back_from_disk_as_it_was(tmp_path):
    model, asked = shop.model(form="kb"), with_queries(shop.lists(count=9), some_queries(9))
    save_reward_model(tmp_path / "one", model)
    save_reward_model(tmp_path / "two", model)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    back = load_reward_model(tmp_path / "one", shop.kb())
    assert np.array_equal(back.reward(asked), model.reward(asked), equal_nan=True)
    (tmp_path / "one" / "null.safetensors").write_bytes(b"")
    with pytest.raises(StoreError, match="holds no reward model"):
        load_reward_model(tmp_path / "one", shop.kb())


def test_another_reward_is_one_function(monkeypatch):
    def surprise(ranker, lists, intents, exists):
        return -functional.softplus(-ranker(lists, intents)[:, 0])

    monkeypatch.setitem(rewards.REWARDS, "surprise", surprise)
    model = shop.model(form="surprise")
    assert model.reward(with_queries(shop.lists(count=5), some_queries(5))).shape == (5,)
