"""Match terms, and the models without training: against hand-worked cases, scikit-learn, scipy and plain loops."""

import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import small_run
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
from rgalign.data import shards, tables, vectors
from rgalign.data.lists import Match, concat_lists, with_match
from rgalign.evaluation import results
from rgalign.evaluation.metrics import gauc_of_lists
from rgalign.params_training import Memory as MemorySettings
from rgalign.params_training import Ranker, RankerSettings
from rgalign.ranker import match, match_terms, store
from rgalign.ranker.fit import score, score_kb
from rgalign.ranker.layers import MatchTerms
from rgalign.ranker.match import Compared, Matcher, MatchError, session_texts, to_embed
from rgalign.ranker.match_terms import KnowledgeBase, Learnt, Memory, RawCosine, Sessions, WordOverlap, cosine
from rgalign.ranker.train import Parts, build, lists_with_vectors, match_terms_of
from rgalign.ranker.variants import RANKERS, UNTRAINED
from rgalign.reasoner import build as reasoner_build
from rgalign.reasoner import written
from rgalign.reasoner.prompts import shown_features
from rgalign.reasoner.verbalize import words_of
from rgalign.report import summaries
from rgalign.report.plots import MODEL_STYLE
from rgalign.run.plan import STAGES
from rgalign.serve import load

DEFAULT = small_run.small({}).evaluation.untrained
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


def compared_of(settings=DEFAULT, kind="causal", columns=("state", "story"), kinds=None):
    return Compared(settings, kind, columns, kinds or {"state": "categorical", "story": "text"})


def with_settings(name, **changes):
    return DEFAULT.model_copy(update={name: getattr(DEFAULT, name).model_copy(update=changes)})


def matcher_of(run, settings=DEFAULT, names=(), **memory):
    """(matcher fitted on a small run, what it reads of valid, the run's train sessions and KB)."""
    params, data = small_run.small({}), run / "tables/dataset"
    meta = tables.read_yaml(data / "dataset.yaml")
    columns = shown_features(params.reasoner.features, meta, params.data.features.drop)
    shop = tables.excerpt(data, columns, splits=("train", "valid"))
    ranker = params.ranker.model_copy(update={"match": names, "memory": MemorySettings(**memory)})
    lists = {part: shards.load_lists(run / "tables/encoded", part) for part in ("train", "dev", "valid")}
    how, places = compared_of(settings, columns=columns, kinds=shop.kinds), match.places_in(run / "tables/embeddings")
    found = Matcher.fit(shop, lists["train"], how, places, ranker)
    return found, found.of_lists(shop, lists["valid"], places), shop, lists


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


def test_memory_is_the_formula_by_a_loop_and_leaves_a_users_own_sessions_out():
    lists, how = make_query_lists("train", 40, seed=3, padded=2), MemorySettings(neighbours=7, temperature=3.0)
    query = lists.query.numpy().astype(np.float32)
    memory = memory_of(lists, query, how)
    over = memory.over(kb_of([""] * KB))
    for users in (None, lists.user_id):
        found = over(said([""] * 40, query=query, user_id=users))
        np.testing.assert_allclose(found, by_loop(memory, lists, query, how, users), atol=2e-3)


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
    Matcher(terms, ALL, compared_of(), kb_of([""] * KB), {}).save(tmp_path / "match")
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


def test_a_session_says_its_columns_in_words():
    frame = pd.DataFrame(
        {"story": ["My parcel!", None], "late_fee": ["yes", None], "age": [34.0, np.nan], "seen": [["i1", "i2"], []]}
    )
    kinds = {"story": "text", "late_fee": "categorical", "age": "numeric", "seen": "history"}
    found = session_texts(frame, list(kinds), kinds, {"i1": "Track it"})
    assert words_of(found[0]) == ["my", "parcel", "late", "fee", "yes", "age", "34", "seen", "track", "it", "i2"]
    assert not words_of(found[1])
    assert words_of(session_texts(frame, ["story"], kinds, {})[0]) == ["my", "parcel"], "a text without its name"


def test_what_is_compared_where_nothing_is_said_and_where_no_column_is_text():
    both, none = ("state", "story"), ("state",)

    def sets(kind, columns, **changes):
        return compared_of(with_settings("raw_cosine", **changes), kind, columns).vector_sets

    assert sets("causal", both) == ("prompt", "prompt")
    assert sets("encoder", both) == ("text", "prompt")
    assert sets("encoder", both, session="prompt", intent="title") == ("prompt", "text")
    assert sets("causal", both, session="text") == ("text", "prompt")
    assert sets("encoder", none) == sets("causal", none, session="text") == ("prompt", "prompt")
    told = compared_of(DEFAULT, "encoder", none).reads()["of a session"]
    assert told.tolist() == ["the whole prompt (no column is text)"] * 2
    told = compared_of().reads()["of a session"]
    assert told.to_dict() == {"word_overlap": "story", "raw_cosine": "the whole prompt"}


def test_every_model_is_a_row_on_valid_and_popularity_is_what_it_was(ranked):
    measured = pd.read_parquet(ranked / "tables/valid_metrics.parquet")
    assert set(UNTRAINED) < set(measured.model)
    matcher, inputs, _, lists = matcher_of(ranked)
    intents = shards.load_intents(ranked / "tables/encoded")
    scores, shape = match.untrained(matcher, inputs, lists["train"], intents), (len(lists["valid"]), len(intents))
    assert list(scores) == list(UNTRAINED)
    clicks = np.bincount(lists["train"].candidates.numpy()[lists["train"].clicked.numpy()], minlength=shape[1])
    np.testing.assert_allclose(scores["popularity"], np.tile(np.log(clicks + 0.5), (shape[0], 1)), rtol=1e-6)
    for name, found in scores.items():
        assert found.shape == shape, name
        assert np.isfinite(found).all(), name


def test_raw_cosine_reads_the_vectors_of_notebook_02_without_their_means(ranked):
    folder = ranked / "tables/embeddings/prompt"
    sessions, kb = (vectors.load(folder / what) for what in ("sessions", "intents"))
    matcher, inputs, _, lists = matcher_of(ranked)
    shop = tables.read(ranked / "tables/dataset")
    ours = sessions.rows(lists["valid"].session_id).astype(float)
    theirs = kb.rows(shop.intents.intent_id.tolist()).astype(float)
    plain, same, *_ = matcher_of(ranked, settings=with_settings("raw_cosine", centred=False))
    np.testing.assert_allclose(plain.alone("raw_cosine", same), 1 - cdist(ours, theirs, "cosine"), atol=1e-5)
    train = shop.sessions[shop.sessions.split == "train"]
    ours -= sessions.rows(train.session_id.tolist()).astype(float).mean(axis=0)
    old = (shop.intents.valid_from.isna() | (shop.intents.valid_from <= train.timestamp.max())).to_numpy(dtype=bool)
    assert not old.all(), "the world has intents that train never saw"
    theirs -= theirs[old].mean(axis=0)
    np.testing.assert_allclose(matcher.alone("raw_cosine", inputs), 1 - cdist(ours, theirs, "cosine"), atol=1e-4)


def test_frequencies_are_counted_on_train_and_on_intents_that_it_knew(ranked):
    matcher, _, shop, _ = matcher_of(ranked)
    columns = [name for name, kind in shop.kinds.items() if kind == "text"]
    train = shop.sessions[shop.sessions.split == "train"]
    old = (shop.intents.valid_from.isna() | (shop.intents.valid_from <= train.timestamp.max())).to_numpy(dtype=bool)
    texts = [text for text, is_old in zip(matcher.kb.texts, old, strict=True) if is_old]
    counted = TfidfVectorizer(analyzer=words_of).fit(texts + session_texts(train, columns, shop.kinds, {}))
    term = matcher.terms["word_overlap"]
    assert term.words.tolist() == counted.get_feature_names_out().tolist()
    np.testing.assert_allclose(term.idf, counted.idf_)


def test_lists_of_another_part_are_not_learnt_from(ranked):
    _, _, shop, lists = matcher_of(ranked)
    with pytest.raises(ValueError, match="match refuses"):
        Matcher.fit(shop, lists["valid"], compared_of(), match.places_in(ranked), Ranker())


def test_a_run_with_all_terms_trains_serves_and_is_the_same_when_loaded(ranked, tmp_path):
    """Notebooks 02 and 03; the served scores are those of the ranker on valid's lists."""
    run = tmp_path / "run"
    shutil.copytree(ranked, run)
    asked = {
        "ranker.match": list(EVERY),
        "ranker.models": ["qe_rec", "qe_rec/shuffled_match"],
        "alignment.loop.rounds": 0,
    }
    for name in ("02_reasoner", "03_rankers"):
        last = small_run.play(name, run, asked)
    valid = last["parts_of"]["qe_rec"].valid
    assert valid.match.names == EVERY
    table = last["table"][last["table"].metric == "gauc"].groupby("model").value.mean()
    assert table["qe_rec"] > table["qe_rec/shuffled_match"]
    matcher, inputs, *_ = matcher_of(run, names=EVERY)
    again = Matcher.load(run / "tables/match", EVERY, matcher.compared, last["train_and_valid"].intents, last["places"])
    for name in EVERY:
        np.testing.assert_array_equal(again.alone(name, inputs), matcher.alone(name, inputs))
    scorer, rows = load(run), tables.read(run / "tables/dataset").sessions
    rows = rows[rows.split == "valid"].head(7)
    model = store.load(run / f"models/rankers/qe_rec/seed-{last['params'].ranker.seeds[0]}")
    expected = score_kb(model, valid.take(np.arange(7)), last["parts_of"]["qe_rec"].intents)
    served = scorer.score(rows.drop(columns="timestamp"), top=None)
    found = served.pivot(index="session_id", columns="intent_id", values="score")
    found = found.loc[rows.session_id, last["train_and_valid"].intents.intent_id.tolist()].to_numpy()
    np.testing.assert_allclose(found, expected, atol=2e-3)
    asked_for, few = scorer.write_queries(rows), rows.iloc[[4, 2]]
    for before in (asked_for, None):  # written before, or here: each session's queries are its own
        some = scorer.score(few.drop(columns="timestamp"), top=None, written=before)
        both = some.merge(served, on=["session_id", "intent_id"], suffixes=("", "_all"))
        assert len(both) == len(some)
        np.testing.assert_allclose(both.score, both.score_all, atol=2e-3)
    new = pd.DataFrame({"intent_id": ["new"], "title": [last["train_and_valid"].intents.title[3]]})
    more = scorer.with_intents(new).score(rows, top=None)
    assert np.isfinite(more.score).all()
    assert (more.intent_id == "new").sum() == 7


def test_a_service_embeds_texts_and_titles_alone_as_notebook_02_does(ranked, tmp_path):
    """Also where prompts are embedded with a query: texts alone are not."""
    run, asked = tmp_path / "run", {"ranker.match": ["raw_cosine"], "reasoner.embed": "prompt_query"}
    shutil.copytree(ranked, run)
    asked |= {f"evaluation.untrained.raw_cosine.{side}": of for side, of in (("session", "text"), ("intent", "title"))}
    for name in ("02_reasoner", "03_rankers"):
        last = small_run.play(name, run, asked)
    scorer, rows = load(run), tables.read(run / "tables/dataset").sessions
    rows = rows[rows.split == "valid"].head(7)
    served = scorer.lists(rows, scorer.embed(rows)).match
    np.testing.assert_allclose(served.values, last["parts"].valid.match.values[:7], atol=2e-3)
    new = last["train_and_valid"].intents[["title"]].head(5).assign(intent_id=[f"new {row}" for row in range(5)])
    more = scorer.with_intents(new).lists(rows, scorer.embed(rows)).match
    np.testing.assert_allclose(more.values[:, -5:], served.values[:, :5], atol=2e-3)
    other = replace(scorer, reads_kb=lambda: reasoner_build.untrained(scorer.reasoner, 1))
    again = other.with_intents(new).lists(rows, scorer.embed(rows)).match
    np.testing.assert_array_equal(again.values, more.values, "the reasoner before the alignment embeds titles alone")


def test_a_control_of_match_terms_needs_them():
    with pytest.raises(ValueError, match=r"ranker.match is empty"):
        small_run.small({"ranker.models": ["qe_rec", "qe_rec/word_match"]})
    with pytest.raises(ValueError, match="reads word_overlap, which is not"):
        small_run.small({"ranker.models": ["qe_rec", "qe_rec/word_match"], "ranker.match": ["memory"]})


@pytest.mark.slow
def test_terms_go_with_the_vectors_through_the_alignment_to_the_test_week_and_to_a_service(aligned_run, tmp_path):
    """The aligned ranker reads terms over the aligned vectors: in notebooks 08, 09 and 10, and when it is served."""
    source, overrides = aligned_run
    run, asked = tmp_path / "run", {**overrides, "ranker.models": ["qe_rec"], "ranker.match": list(EVERY)}
    shutil.copytree(source, run)
    last = {}
    for name in STAGES:
        if name[:2] in ("02", "03", "04", "05", "06", "07", "08", "09", "10"):
            last[name] = small_run.play(name, run, asked)
    before, after = (match.with_values(shards.load_lists(run / "tables/encoded", "dev"), run / folder).match
                     for folder in ("tables/match", "tables/aligned_embeddings/match"))  # fmt: skip
    same = [
        bool(before.values[:, :, column].nan_to_num().equal(after.values[:, :, column].nan_to_num()))
        for column in range(5)
    ]
    assert same == [False, True, False, False, False], "the words of a session alone are what they were"
    before, after = (
        written.load(run / folder / "written").queries.set_index("session_id")
        for folder in ("tables/embeddings", "tables/aligned_embeddings")
    )
    learnt = before[before.index.isin(shards.load_lists(run / "tables/encoded", "train").session_id)]
    assert len(learnt)
    assert learnt.equals(after.loc[after.index.isin(learnt.index)]), "by the reasoner that learnt from no click"
    assert not before.drop(learnt.index).equals(after.drop(learnt.index))
    test = last["09_evaluation"]
    scorer, rows = load(run), tables.read(run / "tables/dataset", splits=("test",)).sessions.head(5)
    served = scorer.score(rows.drop(columns="timestamp"), top=None).pivot(
        index="session_id", columns="intent_id", values="score"
    )
    seed = test["params"].ranker.seeds[0]
    judged = test["judge_of"]("rgalign_rec")
    places = pd.Index(judged.lists.session_id).get_indexer(rows.session_id)
    expected = score_kb(
        store.load(run / f"models/aligned_rankers/seed-{seed}"), judged.lists.take(places), judged.intents
    )
    found = served.loc[rows.session_id, judged.intents.intent_id.tolist()].to_numpy()
    np.testing.assert_allclose(found, expected, atol=2e-2)
    assert last["10_ab_test"]["scores"]["rgalign_rec", "test"].shape == (len(judged.lists), len(judged.intents))


def test_text_and_titles_alone_are_embedded_where_they_are_asked_for(ranked, tmp_path):
    """Through notebooks 02 and 03; a session that wrote nothing prefers no intent."""
    run = tmp_path / "run"
    shutil.copytree(ranked, run)
    changes = {"session": "text", "intent": "title"}
    for name in ("02_reasoner", "03_rankers"):
        last = small_run.play(name, run, {f"evaluation.untrained.raw_cosine.{key}": v for key, v in changes.items()})
    shop = tables.read(run / "tables/dataset")
    embedded = {what: vectors.load(run / "tables/embeddings/text" / what) for what in ("sessions", "intents")}
    assert set(embedded["sessions"].ids) == set(to_embed(shop.sessions, "text", ()).session_id)
    assert set(shop.sessions.session_id[shop.sessions.split == "valid"]) <= set(embedded["sessions"].ids)
    before, after = (pd.read_parquet(folder / "tables/valid_metrics.parquet") for folder in (ranked, run))
    before, after = (table[table.model == "raw_cosine"] for table in (before, after))
    assert not before["mrr/kb"].reset_index(drop=True).equals(after["mrr/kb"].reset_index(drop=True))
    settings = with_settings("raw_cosine", **changes)
    matcher, inputs, *_ = matcher_of(run, settings=settings)
    np.testing.assert_array_equal(matcher.alone("raw_cosine", inputs), last["alone"]["raw_cosine"])
    texts = [name for name, kind in shop.kinds.items() if kind == "text"]
    silent = shop.sessions.session_id.isin(last["valid"].lists.session_id[:3])
    shop.sessions.loc[silent, texts] = None
    shutil.rmtree(run / "tables/dataset")
    tables.write(shop, run / "tables/dataset")
    matcher, inputs, *_ = matcher_of(run, settings=settings)
    for name in match.WITHOUT_TRAINING:
        found = matcher.alone(name, inputs)
        assert not found[:3].any()
        assert found[3:].any()


def test_only_some_of_train_are_embedded_for_a_mean_and_always_the_same(monkeypatch):
    sessions = pd.DataFrame({"session_id": map(str, range(40)), "split": ["train"] * 30 + ["valid"] * 10})
    monkeypatch.setattr(match, "AVERAGED", 4)
    found = to_embed(sessions, "text", ())
    assert found.session_id.tolist() == ["0", "9", "19", "29", *map(str, range(30, 40))]
    assert to_embed(sessions, "prompt", ()) is to_embed(sessions, "text", ("raw_cosine",)) is sessions


def test_the_text_set_shows_text_columns_and_titles_alone(ranked):
    params = small_run.small({})
    recipe, data = reasoner_build.Recipe.of(params), ranked / "tables/dataset"
    shop = tables.excerpt(data, recipe.columns(data))
    models = reasoner_build.load_models(recipe, ranked / "models/reasoner")
    way = reasoner_build.embedding("text", recipe, models, shop)
    assert {shop.kinds[name] for name in way.prompter.features} == {"text"}
    plain = reasoner_build.embedding("prompt", recipe, models, shop)
    titles = shop.intents.assign(description=None).head(3)
    ours = way.intents(shop.intents.head(3), ranked.parent / "titles").values
    assert np.array_equal(ours, plain.intents(titles, ranked.parent / "plain").values)
    without = replace(recipe, settings=recipe.settings.model_copy(update={"features": ("region",)}))
    if "region" in shop.kinds:
        assert reasoner_build.embedding("text", without, models, shop).prompter.features == ["region"]


@pytest.mark.slow
def test_they_are_judged_on_test_and_the_best_is_compared_with_the_last_models(aligned_run):
    run, _ = aligned_run
    found, compared = (pd.read_parquet(run / f"tables/{name}.parquet") for name in ("results", "comparisons"))
    for split in ("valid", "test"):
        assert set(UNTRAINED) < set(found[found.split == split].model), split
    best = results.best_untrained(found)
    assert best in UNTRAINED
    pairs = set(compared[["model", "against"]].itertuples(index=False, name=None))
    assert {("rgalign_rec", best), ("qe_rec", best), ("rgalign_rec", "qe_rec")} < pairs
    assert {against for _, against in pairs} & set(UNTRAINED) <= {best, "popularity"}


def test_the_best_one_is_chosen_on_valid_by_gauc():
    rows = [("popularity", "valid", 0.6), ("word_overlap", "valid", 0.7), ("raw_cosine", "valid", 0.7),
            ("raw_cosine", "test", 0.9), ("qe_rec", "valid", 0.8)]  # fmt: skip
    table = pd.DataFrame(rows, columns=["model", "split", "value"]).assign(slice="all", metric="gauc")
    assert results.best_untrained(table) == "word_overlap", "the first of equals"
    assert results.best_untrained(table[table.split == "test"]) is None
    assert results.best_untrained(table.assign(value=np.nan)) is None
