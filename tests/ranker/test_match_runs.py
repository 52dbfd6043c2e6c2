"""Match terms in a run: what is compared, notebooks 02 to 10, and a service."""

import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import small_run
from scipy.spatial.distance import cdist
from sklearn.feature_extraction.text import TfidfVectorizer

from rgalign.commands.fork import fork
from rgalign.data import shards, tables, vectors
from rgalign.evaluation import results
from rgalign.params_training import Memory as MemorySettings
from rgalign.params_training import Ranker
from rgalign.ranker import match, store
from rgalign.ranker.fit import score_kb
from rgalign.ranker.match import Compared, Matcher, session_texts, to_embed
from rgalign.ranker.variants import UNTRAINED
from rgalign.reasoner import build as reasoner_build
from rgalign.reasoner import written
from rgalign.reasoner.prompts import shown_features
from rgalign.reasoner.verbalize import words_of
from rgalign.run.plan import STAGES
from rgalign.serve import load

DEFAULT = small_run.small({}).evaluation.untrained
EVERY = ("raw_cosine", "word_overlap", "memory", "written_overlap", "written_cosine")


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
    fork(source, run, small_run.small(asked))
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
