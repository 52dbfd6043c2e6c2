import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import BUCKETS, CATEGORIES, KB

from rgalign.artifacts import digest
from rgalign.data.vectors import Vectors
from rgalign.ranker import store
from rgalign.ranker.fit import listnet, score
from rgalign.ranker.three_tower import ThreeTower
from rgalign.ranker.train import Parts, build, lists_with_vectors, load_rankers, loss_of, train, tune, with_vectors
from rgalign.ranker.two_tower import TwoTower
from rgalign.ranker.variants import VARIANTS, headline, pairs, reader_of_prompts

SETTINGS = {"dim": 8, "hidden": 8, "epochs": 2, "patience": 1, "lists_per_batch": 64, "kl_weight": 0.2}
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


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_built_as_it_is_listed(name, parts, vectors):
    variant = VARIANTS[name]
    own = with_vectors(parts, name, *vectors, seed=0) if variant.vectors else parts
    model = build(name, own, {**SETTINGS, "interaction": "product"}, positions=6, seed=1)
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
    shared = log.sort_values("trial").groupby("model")["learning_rate"].agg(list)
    assert shared["qe_rec"] == shared["two_tower_text"]
    assert {"query_hidden", "query_dropout", "interaction_hidden"} == best["qe_rec"].keys() - best[
        "two_tower_text"
    ].keys()
    curves = train(best, [0, 1], given, folder=tmp_path, positions=6, progress=False)
    assert set(zip(curves.model, curves.seed, strict=True)) == {(name, seed) for name in own for seed in (0, 1)}
    trained = load_rankers(tmp_path, list(own), [0, 1])
    assert type(trained["qe_rec", 1]) is ThreeTower
    assert json.loads((tmp_path / "qe_rec" / "seed-1" / "config.json").read_text())["query_dim"] == 6
    assert np.isfinite(score(trained["qe_rec", 1], own["qe_rec"].valid, own["qe_rec"].intents)).all()


def test_rankers_side_by_side_are_those_that_come_one_after_the_other(parts, tmp_path):
    fixed = {"two_tower": {**SETTINGS, "learning_rate": 1e-2}, "two_tower_text": SETTINGS}
    put = {"positions": 6, "progress": False}
    alone = train(fixed, [0, 1], parts, folder=tmp_path / "alone", **put)
    both = train(fixed, [0, 1], parts, folder=tmp_path / "both", workers=2, **put)
    pd.testing.assert_frame_equal(both, alone)
    assert digest(tmp_path / "both") == digest(tmp_path / "alone")


def test_a_control_is_compared_with_its_parent_and_a_model_with_what_it_builds_on():
    study = pairs(list(VARIANTS))
    assert ("qe_rec", "two_tower_text") in study
    assert ("qe_rec/lsa", "qe_rec") in study
    assert ("qe_rec/shuffled_query", "qe_rec/constant_query") in study
    assert headline(list(VARIANTS)) == ("rgalign_rec", "qe_rec")
    assert pairs(["qe_rec/lsa"]) == [("qe_rec/lsa", "popularity")]  # its counterpart is not trained
    assert headline(["two_tower", "two_tower_text"]) == ("two_tower_text", "two_tower")
    more = [("qe_rec", "raw_cosine"), ("rgalign_rec", "raw_cosine")]
    assert pairs(list(VARIANTS), "raw_cosine") == [*study, *more]
    assert pairs(["two_tower"], "popularity") == [("two_tower", "popularity")], "a pair stands once"
    assert pairs(["two_tower"], "word_overlap")[1:] == [("two_tower", "word_overlap")]


def test_written_queries_are_listed_with_the_first_that_reads_prompts_of_its_own():
    assert reader_of_prompts(["two_tower", "qe_rec/no_words", "qe_rec"]) == "qe_rec"
    assert reader_of_prompts(["qe_rec/constant_query", "qe_rec/no_words"]) == "qe_rec/no_words"
    assert reader_of_prompts(["two_tower", "qe_rec/constant_query", "qe_rec/lsa"]) is None
