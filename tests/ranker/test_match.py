"""Match terms, and the models without training: against hand-worked cases, scikit-learn, scipy and plain loops."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.spatial.distance import cdist
from scipy.special import log_softmax
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestNeighbors
from small_lists import CANDIDATES, KB, SMALL, fit, make_query_intents, make_query_lists

from rgalign.alignment.contrastive import RankingSpace
from rgalign.data import vectors
from rgalign.data.lists import Match, concat_lists, with_match
from rgalign.evaluation import results
from rgalign.evaluation.metrics import gauc_of_lists
from rgalign.params_training import Memory as MemorySettings
from rgalign.params_training import Ranker, RankerSettings
from rgalign.ranker import match, match_terms, store
from rgalign.ranker.fit import score, score_kb
from rgalign.ranker.layers import MatchTerms
from rgalign.ranker.match import Matcher, MatchError, session_texts
from rgalign.ranker.match_terms import KnowledgeBase, Learnt, Memory, RawCosine, Sessions, WordOverlap, cosine
from rgalign.ranker.train import Parts, build, lists_with_vectors, match_terms_of
from rgalign.ranker.variants import RANKERS, UNTRAINED
from rgalign.reasoner import build as reasoner_build
from rgalign.reasoner.verbalize import words_of
from rgalign.report import summaries
from rgalign.report.plots import MODEL_STYLE

TEXTS = st.lists(st.text("ab ,.é\u0e19\u0e33", max_size=12), min_size=1, max_size=5)
HOSTILE = ["", " ", "...", "\u202e\u200b", "\x00", "a" * 10**6, "{{ 7 * 7 }} </td>", "\U0001f600", "<|ask|>"]
ALL = ("raw_cosine", "word_overlap", "memory")
EVERY = (*ALL, "written_overlap", "written_cosine")


def kb_of(texts, vectors=None):
    found = np.zeros((len(texts), 1), np.float32) if vectors is None else vectors
    return KnowledgeBase(texts, found, np.ones(len(texts), bool))


def said(texts, vectors=None, **more):
    found = np.zeros((len(texts), 1), np.float32) if vectors is None else vectors
    return Sessions(texts, found, np.ones(len(texts), bool), **more)


def word_overlap(sessions, intents, corpus):
    learnt = Learnt(
        replace(kb_of(intents), in_train=np.zeros(len(intents), bool)), corpus, None, None, None, True, None
    )
    return WordOverlap.fit(learnt).over(kb_of(intents))(said(sessions))


def test_names_and_labels_are_the_same_wherever_they_stand():
    assert tuple(UNTRAINED) == results.UNTRAINED == tuple(results.MODELS)[:3] == ("popularity", *match.WITHOUT_TRAINING)
    assert set(UNTRAINED) < set(MODEL_STYLE)
    assert len({MODEL_STYLE[name] for name in MODEL_STYLE}) == len(MODEL_STYLE), "no two models look alike"
    assert (match.TEXT, match.PROMPT) == (reasoner_build.TEXT, "prompt")
    assert set(match_terms.MATCH_TERMS) == {*EVERY}
    assert Ranker(match=list(match_terms.MATCH_TERMS)).match == tuple(match_terms.MATCH_TERMS), "params know every term"


def test_word_overlap_of_a_case_by_hand():
    """Idf over two documents: 1 of a, which both have, 1 + ln(3 / 2) of b; b stands twice: 1 + ln 2."""
    b = (1 + np.log(2)) * (1 + np.log(1.5))
    expected = [[b / np.hypot(1, b), np.nan, 1 / np.hypot(1, b)]]
    np.testing.assert_allclose(
        word_overlap(["B, b! a"], ["b", "unknown", "a a a"], ["a b", "A c"]), expected, atol=1e-6
    )


@given(TEXTS, TEXTS, TEXTS)
def test_word_overlap_is_sklearns_cosine_and_missing_where_a_side_has_no_known_word(sessions, intents, corpus):
    found = word_overlap(sessions, intents, corpus)
    assert found.shape == (len(sessions), len(intents))
    if not any(map(words_of, corpus)):
        assert np.isnan(found).all()
        return
    counted = TfidfVectorizer(analyzer=words_of, sublinear_tf=True).fit(corpus)
    sides = counted.transform(sessions), counted.transform(intents)
    known = np.logical_and.outer(*(np.asarray(side.sum(axis=1)).ravel() > 0 for side in sides))
    np.testing.assert_allclose(found[known], cosine_similarity(*sides)[known], atol=1e-6)
    assert np.isnan(found[~known]).all()


@given(TEXTS, TEXTS, st.randoms(use_true_random=False))
def test_intents_in_another_order_have_their_scores_in_that_order(sessions, intents, random):
    order = random.sample(range(len(intents)), len(intents))
    found = word_overlap(sessions, intents, sessions)
    assert np.array_equal(word_overlap(sessions, [intents[i] for i in order], sessions), found[:, order], True)


def test_many_sessions_score_as_each_alone(monkeypatch):
    texts = [f"a{i % 7} b{i % 3}" for i in range(20)]
    whole = word_overlap(texts, texts, texts)
    monkeypatch.setattr(match_terms, "ROWS_AT_ONCE", 3)
    assert np.array_equal(word_overlap(texts, texts, texts), whole)


@pytest.mark.parametrize("corpus", [[], HOSTILE, ["where is my parcel"]])
def test_hostile_and_empty_texts_have_no_infinite_scores_and_no_words_no_preference(corpus):
    frame = pd.DataFrame({"session_id": map(str, range(len(HOSTILE))), "text": HOSTILE})
    texts = session_texts(frame, ["text"], {"text": "text"}, {})
    scores = word_overlap(texts, [*HOSTILE, "where is my parcel"], corpus)
    assert not np.isinf(scores).any()
    silent = [not words_of(text) for text in texts]
    assert sum(silent) >= 5
    assert np.isnan(scores[silent]).all()


def test_raw_cosine_is_that_of_scipy_and_zero_of_nothing():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(9, 5)), rng.normal(size=(4, 5))
    np.testing.assert_allclose(cosine(ours, theirs), 1 - cdist(ours, theirs, "cosine"), atol=1e-5)
    ours[3] = 0
    assert not cosine(ours, theirs)[3].any()


def memory_of(lists, query, how, intents=KB):
    learnt = Learnt(kb_of([""] * intents), [], None, lists, query, True, how)
    return Memory.fit(learnt)


def by_loop(memory, lists, query, how, users=None):
    """The formula of S2 (form rate), one session at a time; neighbours by scikit-learn."""
    with_click = lists.clicked.any(1).numpy()
    shown, clicked = lists.candidates.numpy()[with_click], lists.clicked.numpy()[with_click]
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    ours, theirs = unit((query - memory.mean) @ memory.matrix), memory.vectors.astype(float)
    rate, rows = clicked.sum() / (shown >= 0).sum(), []
    for row, vector in enumerate(ours):
        others = np.arange(len(theirs))
        if users is not None:
            others = others[lists.user_id[with_click] != users[row]]
        near = NearestNeighbors(n_neighbors=min(how.neighbours, len(others)), metric="cosine").fit(theirs[others])
        distance, found = near.kneighbors(vector[None])
        weights = np.zeros(len(theirs))
        weights[others[found[0]]] = np.exp(how.temperature * (1 - distance[0]))
        k = how.prior * weights.sum() / how.neighbours
        clicks, seen = np.full(KB, k * rate), np.full(KB, k)
        for other, weight in enumerate(weights):
            for intent, is_clicked in zip(shown[other], clicked[other], strict=True):
                if intent >= 0:
                    clicks[intent], seen[intent] = clicks[intent] + weight * is_clicked, seen[intent] + weight
        rows.append(np.log(clicks / seen))
    return np.array(rows)


@pytest.mark.parametrize(("compared", "share"), [(40, 1), (39, 0.95)])
def test_memory_is_the_formula_by_a_loop_and_leaves_a_users_own_sessions_out(compared, share):
    """With 39 of 40 remembered lists compared cells are used, and a neighbour may be missed for some sessions."""
    lists = make_query_lists("train", 40, seed=3, padded=2)
    how = MemorySettings(neighbours=7, temperature=3.0, compared=compared)
    query = lists.query.numpy().astype(np.float32)
    memory = memory_of(lists, query, how)
    over = memory.over(kb_of([""] * KB))
    for users in (None, lists.user_id):
        found = over(said([""] * 40, query=query, user_id=users))
        close = np.isclose(found, by_loop(memory, lists, query, how, users), atol=2e-3).all(axis=1)
        assert close.mean() >= share


def test_memory_of_everybody_alike_is_smoothed_clicks_per_impression_in_every_session(monkeypatch):
    lists = make_query_lists("train", 60, seed=4)
    query, how = lists.query.numpy().astype(np.float32), MemorySettings(neighbours=10**6, temperature=0.0, prior=1.0)
    over = memory_of(lists, query, how).over(kb_of([""] * KB))
    found = over(said([""] * 60, query=query))
    seen = np.bincount(lists.candidates.numpy().ravel(), minlength=KB)
    clicks = np.bincount(lists.candidates.numpy()[lists.clicked.numpy()], minlength=KB)
    rate = clicks.sum() / seen.sum()
    np.testing.assert_allclose(found, np.tile(np.log((clicks + rate) / (seen + 1)), (60, 1)), atol=1e-5)
    unseen = np.flatnonzero(seen == 0)
    assert len(unseen)
    np.testing.assert_allclose(found[:, unseen], np.log(rate), atol=1e-5)
    monkeypatch.setattr(match_terms, "PAIRS_AT_ONCE", 100)
    assert np.array_equal(over(said([""] * 60, query=query)), found), "in chunks"


def test_memory_does_not_depend_on_the_order_of_train_and_does_not_keep_ids(tmp_path):
    lists, how = make_query_lists("train", 30, seed=5), MemorySettings(neighbours=4)
    query, order = lists.query.numpy().astype(np.float32), np.random.default_rng(0).permutation(30)
    asked = said([""] * 30, query=query)
    one = memory_of(lists, query, how).over(kb_of([""] * KB))(asked)
    other = memory_of(lists.take(order), query[order], how).over(kb_of([""] * KB))(asked)
    np.testing.assert_allclose(one, other, atol=1e-3)
    terms = {name: WordOverlap(np.array(["a", "b"]), np.ones(2)) for name in ("word_overlap",)}
    terms |= {"raw_cosine": RawCosine(np.zeros(1), np.zeros(1)), "memory": memory_of(lists, query, how)}
    Matcher(terms, ALL, None, kb_of([""] * KB), {}).save(tmp_path / "match")
    written = b"".join(path.read_bytes() for path in (tmp_path / "match").iterdir())
    assert not any(user.encode() in written for user in {*lists.user_id, *lists.session_id})
    loaded = match._load(tmp_path / "match", "memory")
    assert np.array_equal(loaded.over(kb_of([""] * KB))(asked), one)
    assert match._load(tmp_path / "match", "word_overlap").words.tolist() == ["a", "b"]
    (tmp_path / "match/memory.safetensors").write_bytes(b"no")
    with pytest.raises(MatchError, match=r"memory.safetensors holds no match term"):
        match._load(tmp_path / "match", "memory")


def parts_with_match(names=ALL, seed=0) -> Parts:
    """Small parts whose terms are: noise, the answer blurred, and one that is often missing."""
    lists = {}
    for number, (part, count) in enumerate((("train", 300), ("dev", 120), ("valid", 80))):
        own = make_query_lists(part, count, seed=seed + number)
        rng = np.random.default_rng([seed, number])
        values = rng.normal(size=(count, KB, 3))
        rows = np.arange(count)
        first = own.candidates.numpy()[rows, own.clicked.numpy().argmax(1)]
        values[rows, first, 1] += 2
        values[:, :, 2] = np.where(rng.random((count, KB)) < 0.5, np.nan, values[:, :, 1])
        lists[part] = with_match(own, Match(torch.from_numpy(values[:, :, : len(names)]).half(), tuple(names)))
    return Parts(None, make_query_intents(), **lists)


SPACE = {key: SMALL[key] for key in ("field_sizes", "history_sizes", "word_buckets")}


def with_space(parts):
    space = type("Space", (), {**SPACE, "intent_ids_size": SMALL["intent_ids"], "category_size": SMALL["categories"]})
    return replace(parts, space=space)


@pytest.mark.parametrize("name", ["qe_rec", "two_tower_text/word_match"])
def test_before_the_first_step_a_ranker_is_its_best_term(name):
    parts = with_space(parts_with_match(("memory", "word_overlap", "raw_cosine")))
    settings = RankerSettings(embedding_dim=4, dim=8, experts=2, hidden=8)
    model = build(name, parts, settings, positions=CANDIDATES)
    term = parts.valid.match.values[:, :, 1].float()
    assert model.match.weight[model.config.match.index("word_overlap")] > 0, "the term that knows the answer"
    assert (model.match.weight != 0).sum() == 1
    found = score_kb(model, parts.valid, parts.intents)
    assert np.array_equal(np.argsort(-found, 1)[:, 0], np.argsort(-term.numpy(), 1)[:, 0])
    correlated = [np.corrcoef(a, b)[0, 1] for a, b in zip(found, term.numpy(), strict=True)]
    np.testing.assert_allclose(correlated, 1, atol=1e-5)


def test_its_weight_minimises_listnet_and_the_choice_is_by_gauc_on_dev():
    parts = with_space(parts_with_match())
    model = build("qe_rec", parts, RankerSettings(embedding_dim=4, dim=8, experts=2, hidden=8))
    column = int(model.match.weight.argmax())
    lists = parts.train
    at = lists.candidates.long().numpy()
    terms = np.take_along_axis(lists.match.values[:, :, column].double().numpy(), at, 1)
    terms = np.nan_to_num((terms - np.nanmean(terms)) / np.nanstd(terms))
    clicked = lists.clicked.numpy()
    best = minimize(lambda w: -log_softmax(w * terms, axis=1)[clicked].mean(), [1.0]).x[0]
    assert model.match.weight[column].item() == pytest.approx(best, rel=0.02)
    dev = parts.dev
    gauc = []
    for each in range(3):
        own = np.nan_to_num(
            np.take_along_axis(dev.match.values[:, :, each].float().numpy(), dev.candidates.long().numpy(), 1)
        )
        gauc.append(gauc_of_lists(own, dev.clicked.numpy(), dev.shown.numpy()).value)
    assert column == int(np.argmax(gauc))


def test_training_does_not_lose_to_the_term_it_starts_from_and_is_stored():
    parts = with_space(parts_with_match())
    settings = {"epochs": 4, "patience": 2, "lists_per_batch": 64, "learning_rate": 0.01}
    model = build("qe_rec", parts, RankerSettings(embedding_dim=4, dim=8, experts=2, hidden=8), positions=CANDIDATES)
    start = gauc_of_lists(score(model, parts.dev, parts.intents), parts.dev.clicked.numpy(), parts.dev.shown.numpy())
    fitted = fit(model, parts.train, parts.dev, parts.intents, seed=0, from_start=True, progress=False, **settings)
    assert fitted.curve.dev_gauc.max() >= start.value
    assert fitted.curve.dev_gauc.iloc[0] == pytest.approx(start.value, abs=1e-6)
    assert fitted.best_epoch > 0, "and learns besides"


def test_a_ranker_with_terms_is_loaded_as_it_was_and_refuses_lists_without_them(tmp_path):
    parts = with_space(parts_with_match())
    model = build("qe_rec", parts, RankerSettings(embedding_dim=4, dim=8, experts=2, hidden=8)).eval()
    store.save(tmp_path / "ranker", model)
    loaded = store.load(tmp_path / "ranker")
    assert loaded.config.match == ALL
    assert np.array_equal(score(loaded, parts.valid, parts.intents), score(model, parts.valid, parts.intents))
    with pytest.raises(ValueError, match=r"reads the match terms raw_cosine.*these lists have none"):
        score(model, replace(parts.valid, match=None), parts.intents)
    fewer = with_match(parts.valid, Match(parts.valid.match.values[:, :, :1], ("memory",)))
    with pytest.raises(ValueError, match="raw_cosine, word_overlap; these lists have: memory"):
        score(model, fewer, parts.intents)


def test_the_space_of_rg_cl_scores_as_the_ranker_with_its_terms():
    parts = with_space(parts_with_match())
    model = build("qe_rec", parts, RankerSettings(embedding_dim=4, dim=8, experts=2, hidden=8)).eval()
    space = RankingSpace.of(model, parts.intents, parts.valid)
    rows, intents = torch.tensor([3, 7]), torch.tensor([0, 5, 6])
    found = space.scores(space.queries(parts.valid.query[rows].float()), rows, intents)
    expected = score_kb(model, parts.valid.take(rows), parts.intents)[:, intents]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(expected, axis=1).min() > 0.1


def test_the_layer_is_a_weighted_sum_of_standardised_terms_and_learns_what_is_missing():
    layer, shown = MatchTerms(2), torch.tensor([[1.0, torch.nan], [3.0, 5.0], [2.0, 5.0]])
    layer.set(shown)
    np.testing.assert_allclose(layer.mean, [2, 5])
    np.testing.assert_allclose(layer.std, [np.std([1, 3, 2]), 1], rtol=1e-6)  # a constant term: not divided by zero
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([2.0, 3.0]))
        layer.missing.copy_(torch.tensor([9.0, 0.5]))
    found = layer(shown)
    np.testing.assert_allclose(found.detach(), [2 * -1 / np.std([1, 3, 2]) + 1.5, 2 / np.std([1, 3, 2]), 0], atol=1e-6)
    found.sum().backward()
    assert torch.isfinite(layer.weight.grad).all()
    np.testing.assert_allclose(layer.missing.grad, [0, 3])


@pytest.mark.parametrize("name", RANKERS)
def test_which_terms_a_variant_reads(name):
    lists = parts_with_match().valid
    read = match_terms_of(name, lists)
    own = RANKERS[name]
    if own.vectors not in ("prompt", "prompt_alone", "prompt_query", "aligned") or own.query != "own":
        assert set(read) <= {"word_overlap"}, "of the other terms each compares the main model's vectors"
    if name in ("two_tower", "two_tower_text", "qe_rec/no_match"):
        assert read == ()
    assert match_terms_of(name, replace(lists, match=None)) == ()


def test_the_placebo_has_the_terms_of_another_session():
    lists = parts_with_match().valid
    given = vectors.Vectors(lists.session_id, lists.query.numpy())
    shuffled = lists_with_vectors(lists, "qe_rec/shuffled_match", given, lists, seed=0)
    own = lists_with_vectors(lists, "qe_rec", given, lists, seed=0)
    assert torch.equal(own.query, shuffled.query)
    assert own.match.values.nan_to_num().equal(lists.match.values.nan_to_num())
    one, other = (x.match.values.nan_to_num(-9).flatten(1) for x in (lists, shuffled))
    assert sorted(map(tuple, one.tolist())) == sorted(map(tuple, other.tolist()))
    assert (one == other).all(1).float().mean() < 0.1


def test_lists_carry_their_terms_through_taking_joining_and_saving(tmp_path):
    lists = parts_with_match().valid
    order = [5, 2, 70]
    assert lists.take(order).match.values.nan_to_num().equal(lists.match.values[order].nan_to_num())
    both = concat_lists([lists, lists.take(order)])
    assert both.match.values.shape == (83, KB, 3)
    assert concat_lists([lists, replace(lists, match=None)]).match is None
    (tmp_path / "values").mkdir()
    match.save_values(tmp_path / "values", [lists])
    again = match.with_values(replace(lists, match=None), tmp_path / "values")
    assert again.match.names == ALL
    assert again.match.values.nan_to_num().equal(lists.match.values.nan_to_num())
    assert match.with_values(replace(lists, part="dev", match=None), tmp_path / "values").match is None
    with pytest.raises(MatchError, match=r"expected .3 lists"):
        match.with_values(lists.take(order), tmp_path / "values")
    with pytest.raises(ValueError, match="infinite"):
        with_match(lists, Match(torch.full((80, KB, 1), torch.inf), ("memory",)))


def test_what_a_notebook_shows_of_the_terms():
    parts = with_space(parts_with_match())
    model = build("qe_rec", parts, RankerSettings(embedding_dim=4, dim=8, experts=2, hidden=8))
    shown = summaries.match_weights(model, parts)
    assert list(shown.index) == list(ALL)
    assert shown.dev_gauc["word_overlap"] > 0.9
    titles = pd.DataFrame({"title": [f"intent {i}" for i in range(KB)]})
    decided = summaries.decided_by_match(model, parts, type("Shop", (), {"intents": titles}))
    assert 0 < len(decided) <= 5
    assert (decided.place <= 3).all()
    assert (decided.without > 3).all() or (decided.term == "word_overlap").all()
