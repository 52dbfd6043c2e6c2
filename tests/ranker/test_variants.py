import json
from dataclasses import replace
from types import SimpleNamespace

import hypothesis
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import strategies as st
from small_lists import BUCKETS, CATEGORIES, KB

from rgalign.data.vectors import Vectors
from rgalign.params_training import RankerSettings
from rgalign.ranker import store
from rgalign.ranker.fit import fit, score
from rgalign.ranker.layers import Whitening
from rgalign.ranker.losses import listnet
from rgalign.ranker.search import SPACE, VECTOR_SPACE, tune
from rgalign.ranker.towers import ThreeTower, TwoTower
from rgalign.ranker.train import Parts, build, lists_with_vectors, load_rankers, loss_of, train, with_vectors
from rgalign.ranker.variants import RANKERS, headline, pairs, reader_of_prompts
from rgalign.run.artifacts import digest

SETTINGS = RankerSettings(dim=8, hidden=8, epochs=2, patience=1, lists_per_batch=64)
PARTS = ("train", "dev", "valid")


@pytest.fixture
def parts(lists, intents):
    space = SimpleNamespace(
        field_sizes=(CATEGORIES + 2, 11), history_sizes=(8,), word_buckets=BUCKETS, intent_ids_size=KB + 2,
        category_size=CATEGORIES + 2,
    )  # fmt: skip
    counts = {"train": 60, "dev": 30, "valid": 30}
    return Parts(space, intents, **{part: lists(part, count, seed=i) for i, (part, count) in enumerate(counts.items())})


@pytest.fixture
def vectors(parts):
    """Vectors of sessions and of intents, in another order than theirs."""
    rng = np.random.default_rng(0)
    found = []
    for ids in (np.concatenate([getattr(parts, part).session_id for part in PARTS]), parts.intents.intent_id):
        found.append(Vectors(rng.permutation(ids), rng.normal(size=(len(ids), 6)).astype(np.float16)))
    return tuple(found)


def test_each_session_gets_its_own_vector(parts, vectors):
    own = with_vectors(parts, "qe_rec", *vectors, seed=0)
    assert own.query_dim == 6
    assert parts.query_dim == 0
    for part in PARTS:
        lists = getattr(own, part)
        for i in (0, 7):
            at = list(vectors[0].ids).index(lists.session_id[i])
            assert np.array_equal(lists.query[i].numpy(), vectors[0].values[at])
    at = list(vectors[1].ids).index(own.intents.intent_id[5])
    assert np.array_equal(own.intents.text[5].numpy(), vectors[1].values[at])


def test_the_constant_query_is_the_mean_of_train_everywhere(parts, vectors):
    own = with_vectors(parts, "qe_rec", *vectors, seed=0)
    constant = with_vectors(parts, "qe_rec/constant_query", *vectors, seed=0)
    mean = own.train.query.numpy().astype(np.float64).mean(axis=0)
    for part in PARTS:
        query = getattr(constant, part).query.numpy()
        np.testing.assert_allclose(query, np.tile(mean, (len(query), 1)), atol=1e-5)


def test_shuffled_queries_are_the_same_vectors_of_other_sessions(parts, vectors):
    own = with_vectors(parts, "qe_rec", *vectors, seed=0)
    first, again, other = (with_vectors(parts, "qe_rec/shuffled_query", *vectors, seed=seed) for seed in (0, 0, 1))
    for part in PARTS:
        theirs = [getattr(each, part).query.numpy() for each in (own, first, again, other)]
        assert np.array_equal(np.sort(theirs[0], axis=0), np.sort(theirs[1], axis=0))
        assert (theirs[0] == theirs[1]).all(axis=1).mean() < 0.2
        assert np.array_equal(theirs[1], theirs[2])
        assert not np.array_equal(theirs[1], theirs[3])


def test_lists_of_another_part_get_vectors_by_themselves(parts, vectors):
    whole = with_vectors(parts, "qe_rec/constant_query", *vectors, seed=0)
    alone = lists_with_vectors(parts.valid, "qe_rec/constant_query", vectors[0], parts.train, seed=0)
    assert torch.equal(whole.valid.query, alone.query)


def test_widths_that_differ_and_variants_without_vectors_are_refused(parts, vectors):
    narrow = Vectors(vectors[1].ids, vectors[1].values[:, :4])
    with pytest.raises(ValueError, match="qe_rec: sessions have vectors of 6, intents of 4"):
        with_vectors(parts, "qe_rec", vectors[0], narrow, seed=0)
    with pytest.raises(ValueError, match="two_tower_text reads no vectors"):
        with_vectors(parts, "two_tower_text", *vectors, seed=0)
    with pytest.raises(ValueError, match="qe_rec reads vectors and these parts hold none"):
        build("qe_rec", parts, SETTINGS)


@pytest.mark.parametrize("name", RANKERS)
def test_every_variant_is_built_as_it_is_listed(name, parts, vectors):
    variant = RANKERS[name]
    own = with_vectors(parts, name, *vectors, seed=0) if variant.vectors else parts
    model = build(name, own, SETTINGS.model_copy(update={"interaction": "product"}), positions=6, seed=1)
    assert type(model) is {"two_tower": TwoTower, "three_tower": ThreeTower}[variant.architecture]
    assert (loss_of(name, SETTINGS) is listnet) == (variant.architecture == "two_tower")
    assert model.config.dim == 8
    moved = {"words": replace(own.valid, words=own.valid.words.take(torch.arange(30).roll(1)))}
    if variant.vectors:
        moved["query"] = replace(own.valid, query=own.valid.query.roll(1, 0))
    expected = score(model, own.valid, own.intents)
    reads = {what: not np.allclose(score(model, lists, own.intents), expected) for what, lists in moved.items()}
    assert reads["words"] == variant.words
    assert reads.get("query", False) == (variant.vectors is not None and variant.query != "constant")


def test_whitening_is_learnt_from_train_and_stored_with_the_ranker(parts, vectors, tmp_path):
    own = with_vectors(parts, "qe_rec", *vectors, seed=0)
    model = build("qe_rec", own, SETTINGS)
    mean = model.query.layers[0].mean
    np.testing.assert_allclose(mean, own.train.query.double().mean(0), atol=1e-6)
    np.testing.assert_allclose(model.intent.text[0].mean, own.intents.text.double().mean(0), atol=1e-6)
    store.save(tmp_path / "ranker", model)
    assert torch.equal(store.load(tmp_path / "ranker").query.layers[0].mean, mean)


def test_the_frozen_features_are_a_field_of_the_user_and_a_part_of_the_intent(parts, vectors):
    own = with_vectors(parts, "two_tower_text/lm_features", *vectors, seed=0)
    model = build("two_tower_text/lm_features", own, SETTINGS).eval()
    without = build("two_tower_text", own, SETTINGS).eval()
    assert model.user.direct.in_features - without.user.direct.in_features == model.config.embedding_dim
    silent = replace(own.intents, text=torch.zeros_like(own.intents.text))
    assert not np.allclose(score(model, own.valid, silent), score(model, own.valid, own.intents))


@pytest.mark.parametrize("as_function", [False, True], ids=["mapping", "function"])
def test_models_are_tuned_and_trained_on_their_own_parts(as_function, parts, vectors, tmp_path):
    own = {"two_tower_text": parts, "qe_rec": with_vectors(parts, "qe_rec", *vectors, seed=0)}
    given = own.__getitem__ if as_function else own
    settings = dict.fromkeys(own, SETTINGS)
    log, best = tune(settings, given, trials=2, seed=0, positions=6, progress=False)
    assert set(log.model) == set(own)
    shared = log[log["trial"] == 1].set_index("model")[["learning_rate", "dim", "lists_per_batch"]]
    assert (shared.loc["qe_rec"] == shared.loc["two_tower_text"]).all()
    tried = {name: set(log[log["model"] == name].dropna(axis=1)) for name in own}
    beside = {"query_hidden", "query_dropout", "interaction_hidden", "whitening_ridge", "kl_weight"}
    assert tried["qe_rec"] - tried["two_tower_text"] == beside
    curves = train(best, [0, 1], given, folder=tmp_path, positions=6, progress=False)
    assert set(zip(curves.model, curves.seed, strict=True)) == {(name, seed) for name in own for seed in (0, 1)}
    trained = load_rankers(tmp_path, list(own), [0, 1])
    assert type(trained["qe_rec", 1]) is ThreeTower
    assert json.loads((tmp_path / "qe_rec" / "seed-1" / "config.json").read_text())["query_dim"] == 6
    assert np.isfinite(score(trained["qe_rec", 1], own["qe_rec"].valid, own["qe_rec"].intents)).all()


def test_a_control_has_its_models_best_settings_and_searches_its_own_ridge(parts, vectors):
    models = ["qe_rec/lsa", "two_tower_text/lm_features", "qe_rec", "two_tower_text"]  # controls first
    own = {name: with_vectors(parts, name, *vectors, seed=0) if RANKERS[name].vectors else parts for name in models}
    settings = dict.fromkeys(models, SETTINGS) | {"qe_rec/lsa": SETTINGS.model_copy(update={"dropout": 0.9})}
    log, best = tune(settings, own, trials=2, seed=0, positions=6, progress=False)
    assert list(best) == list(dict.fromkeys(log["model"])) == models
    tried = {name: log[log["model"] == name].dropna(axis=1) for name in models}
    for name in models[:2]:
        parent = name.split("/")[0]
        assert sorted(tried[name]["whitening_ridge"]) == list(VECTOR_SPACE["whitening_ridge"])
        assert set(tried[name]) == {"trial", "whitening_ridge", "dev_gauc", "valid_gauc", "best_epoch", "model"}
        ridge = tried[name]["whitening_ridge"].iloc[0]
        assert best[name] == best[parent].model_copy(update={"whitening_ridge": ridge})
    assert len(tried["qe_rec"]) == len(tried["two_tower_text"]) == 1 + 2
    assert "whitening_ridge" not in tried["two_tower_text"]


def test_the_first_trial_is_what_the_search_was_given(parts):
    given = SETTINGS.model_copy(update={"learning_rate": 5e-3, "intent_std": 0.2})
    log, best = tune({"two_tower": given}, parts, trials=1, seed=0, positions=6, progress=False)
    first = log.set_index("trial").loc[0]
    assert (first.learning_rate, first.intent_std, first.dim) == (5e-3, 0.2, 8)
    curve = fit(
        build("two_tower", parts, given, positions=6, seed=0), parts.train, parts.dev, parts.intents, given,
        seed=0, progress=False,
    ).curve  # fmt: skip
    assert first.dev_gauc == curve.dev_gauc.max()
    assert best["two_tower"].intent_std in (0.2, *SPACE["intent_std"])


@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
def test_a_trial_is_trained_with_the_kl_weight_that_it_drew(kl_weight, parts, vectors, monkeypatch):
    own = with_vectors(parts, "qe_rec", *vectors, seed=0)
    monkeypatch.setattr("rgalign.ranker.search.space_of", lambda name: {"kl_weight": (kl_weight,)})
    log, best = tune(
        {"qe_rec": SETTINGS.model_copy(update={"kl_weight": 0.1})}, own, trials=1, seed=0, positions=6, progress=False
    )
    assert best["qe_rec"].kl_weight in (0.1, kl_weight)
    given = SETTINGS.model_copy(update={"kl_weight": kl_weight})
    fitted = fit(
        build("qe_rec", own, given, positions=6, seed=0), own.train, own.dev, own.intents, given,
        seed=0, progress=False, loss=loss_of("qe_rec", given),
    )  # fmt: skip
    assert log.set_index("trial").loc[1, "dev_gauc"] == fitted.curve.dev_gauc.max()


@pytest.mark.parametrize("name", [name for name, variant in RANKERS.items() if variant.vectors])
def test_the_ridge_reaches_every_whitening_of_a_ranker_and_is_stored_with_it(name, parts, vectors, tmp_path):
    own = with_vectors(parts, name, *vectors, seed=0)
    for ridge in (0.01, 1.0):
        model = build(name, own, SETTINGS.model_copy(update={"whitening_ridge": ridge}))
        alone = {"query": own.train.query, "intent": own.intents.text}
        for where, layer in whitenings(model).items():
            by_hand = Whitening(6, ridge)
            by_hand.set(alone["intent" if where.startswith("intent.") else "query"].float())
            assert torch.equal(layer.matrix, by_hand.matrix)
        store.save(tmp_path / f"{ridge}", model)
        stored = store.load(tmp_path / f"{ridge}")
        assert stored.config.whitening_ridge == ridge
        assert {layer.ridge for layer in whitenings(stored).values()} == {ridge}


def whitenings(model):
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, Whitening)}
    assert len(found) == 2
    return found


@hypothesis.given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([0.0, 1.0, 100.0]))
@hypothesis.settings(
    max_examples=20, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_the_three_tower_without_a_query_ignores_the_sessions_vectors(seed, scale, parts, vectors):
    """Whatever the vectors of valid's sessions are, and in whatever order train's stand, its scores are the same."""
    rng, (sessions, intents) = np.random.default_rng(seed), vectors
    model = build("three_tower_no_query", with_vectors(parts, "three_tower_no_query", *vectors, seed=0), SETTINGS)
    of_train = np.isin(sessions.ids, parts.train.session_id)
    values = sessions.values.copy()
    values[of_train] = rng.permutation(values[of_train])
    values[~of_train] = scale * rng.normal(size=values[~of_train].shape)
    moved = with_vectors(parts, "three_tower_no_query", Vectors(sessions.ids, values), intents, seed=seed)
    again = build("three_tower_no_query", moved, SETTINGS)
    own = with_vectors(parts, "three_tower_no_query", *vectors, seed=0)
    expected = score(model, own.valid, own.intents)
    np.testing.assert_allclose(score(again, moved.valid, moved.intents), expected, atol=1e-4)
    assert len(np.unique(expected, axis=0)) > 1  # it does read the rest of the session


def test_the_three_tower_without_a_query_is_no_control_of_another_model():
    assert "/" not in "three_tower_no_query"
    mine, ours = RANKERS["three_tower_no_query"], RANKERS["qe_rec"]
    assert replace(mine, query=ours.query, match=ours.match, label=ours.label) == ours
    assert ("three_tower_no_query", "two_tower_text") in pairs(list(RANKERS))


@pytest.mark.slow
def test_rankers_side_by_side_are_those_that_come_one_after_the_other(parts, tmp_path, one_thread):
    fixed = {"two_tower": SETTINGS.model_copy(update={"learning_rate": 1e-2}), "two_tower_text": SETTINGS}
    put = {"positions": 6, "progress": False}
    alone = train(fixed, [0, 1], parts, folder=tmp_path / "alone", **put)
    both = train(fixed, [0, 1], parts, folder=tmp_path / "both", workers=2, **put)
    pd.testing.assert_frame_equal(both, alone)
    assert digest(tmp_path / "both") == digest(tmp_path / "alone")


def test_a_control_is_compared_with_its_parent_and_a_model_with_what_it_builds_on():
    study = pairs(list(RANKERS))
    assert ("qe_rec", "two_tower_text") in study
    assert ("qe_rec/lsa", "qe_rec") in study
    assert ("qe_rec/shuffled_query", "qe_rec/constant_query") in study
    assert headline(list(RANKERS)) == ("rgalign_rec", "qe_rec")
    assert pairs(["qe_rec/lsa"]) == [("qe_rec/lsa", "popularity")]  # its counterpart is not trained
    assert headline(["two_tower", "two_tower_text"]) == ("two_tower_text", "two_tower")
    more = [("qe_rec", "raw_cosine"), ("rgalign_rec", "raw_cosine")]
    assert pairs(list(RANKERS), "raw_cosine") == [*study, *more]
    assert pairs(["two_tower"], "popularity") == [("two_tower", "popularity")], "a pair stands once"
    assert pairs(["two_tower"], "word_overlap")[1:] == [("two_tower", "word_overlap")]


def test_written_queries_are_listed_with_the_first_that_reads_prompts_of_its_own():
    assert reader_of_prompts(["two_tower", "qe_rec/no_words", "qe_rec"]) == "qe_rec"
    assert reader_of_prompts(["qe_rec/constant_query", "qe_rec/no_words"]) == "qe_rec/no_words"
    assert reader_of_prompts(["two_tower", "qe_rec/constant_query", "qe_rec/lsa"]) is None
