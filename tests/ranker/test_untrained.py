"""Models without training, against hand-worked cases, scikit-learn and numpy."""

import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import small_run
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics.pairwise import cosine_similarity

from rgalign.data import shards, tables, vectors
from rgalign.evaluation import results
from rgalign.ranker import untrained
from rgalign.ranker.untrained import UNTRAINED, Known, cosine, session_texts, tfidf_cosine, to_embed, vector_sets
from rgalign.reasoner import build
from rgalign.reasoner.prompts import shown_features
from rgalign.reasoner.verbalize import words_of
from rgalign.report.plots import MODEL_STYLE

DEFAULT = small_run.small({}).evaluation.untrained
TEXTS = st.lists(st.text("ab ,.é\u0e19\u0e33", max_size=12), min_size=1, max_size=5)
HOSTILE = ["", " ", "...", "\u202e\u200b", "\x00", "a" * 10**6, "{{ 7 * 7 }} </td>", "\U0001f600", "<|ask|>"]


def known_of(run, part="valid", settings=DEFAULT, embeddings=None, **more) -> Known:
    params, data = small_run.small({}), run / "tables/dataset"
    meta = tables.read_yaml(data / "dataset.yaml")
    columns = shown_features(params.reasoner.features, meta, params.data.features.drop)
    encoded = run / "tables/encoded"
    lists = [shards.load_lists(encoded, name) for name in (part, "train")]
    how = {"embeddings": embeddings or run / "tables/embeddings", "settings": settings, "kind": "causal", **more}
    return Known.of(data, *lists, shards.load_intents(encoded), columns=columns, **how)


def with_settings(name, **changes):
    return DEFAULT.model_copy(update={name: getattr(DEFAULT, name).model_copy(update=changes)})


def test_names_and_labels_are_the_same_wherever_they_stand():
    assert tuple(UNTRAINED) == results.UNTRAINED == tuple(results.MODELS)[:3]
    assert set(UNTRAINED) < set(MODEL_STYLE)
    assert len({MODEL_STYLE[name] for name in MODEL_STYLE}) == len(MODEL_STYLE), "no two models look alike"
    assert (untrained.TEXT, untrained.PROMPT) == (build.TEXT, "prompt")


def test_word_overlap_of_a_case_by_hand():
    """Idf over two documents: 1 of a, which both have, 1 + ln(3 / 2) of b; b stands twice: 1 + ln 2."""
    b = (1 + np.log(2)) * (1 + np.log(1.5))
    expected = [[b / np.hypot(1, b), 0, 1 / np.hypot(1, b)]]
    np.testing.assert_allclose(
        tfidf_cosine(["B, b! a"], ["b", "unknown", "a a a"], ["a b", "A c"]), expected, atol=1e-6
    )


@given(TEXTS, TEXTS, TEXTS)
def test_word_overlap_is_sklearns_cosine(sessions, intents, corpus):
    found = tfidf_cosine(sessions, intents, corpus)
    assert found.shape == (len(sessions), len(intents))
    assert np.isfinite(found).all()
    if not any(map(words_of, corpus)):
        assert not found.any()
        return
    counted = TfidfVectorizer(analyzer=words_of, sublinear_tf=True).fit(corpus)
    expected = cosine_similarity(counted.transform(sessions), counted.transform(intents))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@given(TEXTS, TEXTS, st.randoms(use_true_random=False))
def test_intents_in_another_order_have_their_scores_in_that_order(sessions, intents, random):
    order = random.sample(range(len(intents)), len(intents))
    found = tfidf_cosine(sessions, intents, sessions)
    assert np.array_equal(tfidf_cosine(sessions, [intents[i] for i in order], sessions), found[:, order])


def test_many_sessions_score_as_each_alone(monkeypatch):
    texts = [f"a{i % 7} b{i % 3}" for i in range(20)]
    whole = tfidf_cosine(texts, texts, texts)
    monkeypatch.setattr(untrained, "ROWS_AT_ONCE", 3)
    assert np.array_equal(tfidf_cosine(texts, texts, texts), whole)


@pytest.mark.parametrize("corpus", [[], HOSTILE, ["where is my parcel"]])
def test_hostile_and_empty_texts_have_finite_scores_and_no_words_no_preference(corpus):
    frame = pd.DataFrame({"session_id": map(str, range(len(HOSTILE))), "text": HOSTILE})
    said = session_texts(frame, ["text"], {"text": "text"}, {})
    scores = tfidf_cosine(said, [*HOSTILE, "where is my parcel"], corpus)
    assert np.isfinite(scores).all()
    silent = [not words_of(text) for text in said]
    assert sum(silent) >= 5
    assert not scores[silent].any()


def test_raw_cosine_is_that_of_scipy_and_zero_of_nothing():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(9, 5)), rng.normal(size=(4, 5))
    np.testing.assert_allclose(cosine(ours, theirs), 1 - cdist(ours, theirs, "cosine"), atol=1e-5)
    ours[3] = 0
    assert not cosine(ours, theirs)[3].any()


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
    kinds = {"state": "categorical", "story": "text"}
    both, none = (kinds, list(kinds)), (kinds, ["state"])

    def sets(kind, given, **changes):
        kinds, columns = given
        return vector_sets(with_settings("raw_cosine", **changes), kind, columns, kinds)

    assert sets("causal", both) == ("prompt", "prompt")
    assert sets("encoder", both) == ("text", "prompt")
    assert sets("encoder", both, session="prompt", intent="title") == ("prompt", "text")
    assert sets("causal", both, session="text") == ("text", "prompt")
    assert sets("encoder", none) == sets("causal", none, session="text") == ("prompt", "prompt")
    told = untrained.reads(DEFAULT, "encoder", ["state"], kinds)["of a session"]
    assert told.tolist() == ["the whole prompt (no column is text)"] * 2
    told = untrained.reads(DEFAULT, "causal", list(kinds), kinds)["of a session"]
    assert told.to_dict() == {"word_overlap": "story", "raw_cosine": "the whole prompt"}


def test_every_model_is_a_row_on_valid_and_popularity_is_what_it_was(ranked):
    measured = pd.read_parquet(ranked / "tables/valid_metrics.parquet")
    assert set(UNTRAINED) < set(measured.model)
    known = known_of(ranked)
    train, shape = shards.load_lists(ranked / "tables/encoded", "train"), (len(known.lists), len(known.intents))
    clicks = np.bincount(train.candidates.numpy()[train.clicked.numpy()], minlength=shape[1])
    scores = {name: of(known) for name, of in UNTRAINED.items()}
    np.testing.assert_allclose(scores["popularity"], np.tile(np.log(clicks + 0.5), (shape[0], 1)), rtol=1e-6)
    for name, found in scores.items():
        assert found.shape == shape, name
        assert np.isfinite(found).all(), name


def test_raw_cosine_reads_the_vectors_of_notebook_02_without_their_means(ranked):
    shop = tables.read(ranked / "tables/dataset")
    folder = ranked / "tables/embeddings/prompt"
    sessions, kb = (vectors.load(folder / what) for what in ("sessions", "intents"))
    known = known_of(ranked)
    ours = sessions.rows(known.lists.session_id).astype(float)
    theirs = kb.rows(shop.intents.intent_id.tolist()).astype(float)
    plain = known_of(ranked, settings=with_settings("raw_cosine", centred=False))
    np.testing.assert_allclose(untrained.raw_cosine(plain), 1 - cdist(ours, theirs, "cosine"), atol=1e-5)
    train = shop.sessions[shop.sessions.split == "train"]
    ours -= sessions.rows(train.session_id.tolist()).astype(float).mean(axis=0)
    old = (shop.intents.valid_from.isna() | (shop.intents.valid_from <= train.timestamp.max())).to_numpy(dtype=bool)
    assert not old.all(), "the world has intents that train never saw"
    theirs -= theirs[old].mean(axis=0)
    np.testing.assert_allclose(untrained.raw_cosine(known), 1 - cdist(ours, theirs, "cosine"), atol=1e-4)


def test_frequencies_are_counted_on_train_and_on_intents_that_it_knew(ranked):
    shop = tables.read(ranked / "tables/dataset")
    columns = [name for name, kind in shop.kinds.items() if kind == "text"]
    train = shop.sessions[shop.sessions.split == "train"]
    known = known_of(ranked)
    old = (shop.intents.valid_from.isna() | (shop.intents.valid_from <= train.timestamp.max())).to_numpy(dtype=bool)
    told = [text for text, is_old in zip(known.intent_texts, old, strict=True) if is_old]
    assert list(known.corpus) == told + session_texts(train, columns, shop.kinds, {})


def test_lists_of_another_part_are_not_counted(ranked):
    encoded = ranked / "tables/encoded"
    valid, intents = shards.load_lists(encoded, "valid"), shards.load_intents(encoded)
    with pytest.raises(ValueError, match="untrained refuses"):
        Known.of(ranked, valid, valid, intents, columns=[], settings=DEFAULT, kind="causal", embeddings=ranked)


def test_text_and_titles_alone_are_embedded_where_they_are_asked_for(ranked, tmp_path):
    """Through notebooks 02 and 03; a session that wrote nothing prefers no intent."""
    run = tmp_path / "run"
    shutil.copytree(ranked, run)
    changes = {"session": "text", "intent": "title"}
    for name in ("02_reasoner", "03_rankers"):
        last = small_run.play(name, run, {f"evaluation.untrained.raw_cosine.{key}": v for key, v in changes.items()})
    shop = tables.read(run / "tables/dataset")
    embedded = {what: vectors.load(run / "tables/embeddings/text" / what) for what in ("sessions", "intents")}
    assert set(embedded["sessions"].ids) == set(to_embed(shop.sessions, "text").session_id)
    assert set(shop.sessions.session_id[shop.sessions.split == "valid"]) <= set(embedded["sessions"].ids)
    known = last["inputs"]
    before, after = (pd.read_parquet(folder / "tables/valid_metrics.parquet") for folder in (ranked, run))
    before, after = (table[table.model == "raw_cosine"] for table in (before, after))
    assert not before["mrr/kb"].reset_index(drop=True).equals(after["mrr/kb"].reset_index(drop=True))
    settings = with_settings("raw_cosine", **changes)
    np.testing.assert_array_equal(untrained.raw_cosine(known_of(run, settings=settings)), untrained.raw_cosine(known))
    texts = [name for name in last["columns"] if shop.kinds[name] == "text"]
    silent = shop.sessions.session_id.isin(known.lists.session_id[:3])
    shop.sessions.loc[silent, texts] = None
    shutil.rmtree(run / "tables/dataset")
    tables.write(shop, run / "tables/dataset")
    less = known_of(run, settings=settings)
    for of in (untrained.raw_cosine, untrained.word_overlap):
        assert not of(less)[:3].any()
        assert of(less)[3:].any()


def test_only_some_of_train_are_embedded_for_a_mean_and_always_the_same(monkeypatch):
    sessions = pd.DataFrame({"session_id": map(str, range(40)), "split": ["train"] * 30 + ["valid"] * 10})
    monkeypatch.setattr(untrained, "AVERAGED", 4)
    found = to_embed(sessions, "text")
    assert found.session_id.tolist() == ["0", "9", "19", "29", *map(str, range(30, 40))]
    assert to_embed(sessions, "prompt") is sessions


def test_the_text_set_shows_text_columns_and_titles_alone(ranked):
    params = small_run.small({})
    recipe, data = build.Recipe.of(params), ranked / "tables/dataset"
    shop = tables.excerpt(data, recipe.columns(data))
    models = build.load_models(recipe, ranked / "models/reasoner")
    way = build.embedding("text", recipe, models, shop)
    assert {shop.kinds[name] for name in way.prompter.features} == {"text"}
    plain = build.embedding("prompt", recipe, models, shop)
    titles = shop.intents.assign(description=None).head(3)
    ours = way.intents(shop.intents.head(3), ranked.parent / "titles").values
    assert np.array_equal(ours, plain.intents(titles, ranked.parent / "plain").values)
    without = replace(recipe, settings=recipe.settings.model_copy(update={"features": ("region",)}))
    if "region" in shop.kinds:
        assert build.embedding("text", without, models, shop).prompter.features == ["region"]


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
