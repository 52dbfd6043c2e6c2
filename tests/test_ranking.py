"""A small run's ranker, served: against the figures that notebook 03 measured with it, and by hand."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

import rgalign
from rgalign.__main__ import main
from rgalign.data import tables
from rgalign.run.artifacts import ArtifactError
from rgalign.serve import (
    ALIGNED,
    ALIGNED_RANKERS,
    ALIGNED_TEXTS,
    DATASET,
    QE_REC,
    TEXTS,
    ScoreError,
    checked_intents,
    latency,
)


@pytest.fixture(scope="module")
def scorer(ranked):
    return rgalign.load(ranked)


@pytest.fixture(scope="module")
def shop(ranked):
    return tables.read(ranked / DATASET, splits=("train", "valid"))


@pytest.fixture
def sessions(shop):
    return shop.sessions[shop.sessions.split == "valid"].reset_index(drop=True)


def test_what_is_served_is_what_was_measured(ranked, scorer, shop, sessions):
    measured = pd.read_parquet(ranked / "tables/valid_metrics.parquet").query("model == 'qe_rec'")
    clicks = shop.impressions[shop.impressions.clicked == 1].groupby("session_id").intent_id.apply(set)
    top = scorer.score(sessions).groupby("session_id").intent_id.apply(set)
    wanted = measured.set_index("session_id")["recall@3/kb"].dropna()
    shares = {session: len(clicks[session] & top[session]) / len(clicks[session]) for session in wanted.index}
    found = pd.Series(shares, dtype="float64")
    assert len(found) > 5
    pd.testing.assert_series_equal(found, wanted, check_names=False, check_index_type=False)


def test_ranks_are_in_the_order_of_scores_and_sessions_in_their_own(scorer, sessions):
    table = scorer.score(sessions.iloc[::-1], top=None)
    assert list(table) == ["session_id", "rank", "intent_id", "title", "score"]
    assert table.session_id.unique().tolist() == sessions.session_id.tolist()[::-1]
    for _, own in table.groupby("session_id"):
        assert own["rank"].tolist() == list(range(1, len(own) + 1))
        assert own.score.is_monotonic_decreasing
        assert own.intent_id.is_unique
    short = scorer.score(sessions.iloc[::-1], top=2)
    pd.testing.assert_frame_equal(short, table[table["rank"] <= 2].reset_index(drop=True))


def test_one_session_alone_scores_as_among_others_and_vectors_can_be_kept(scorer, sessions):
    kept = scorer.embed(sessions)
    whole = scorer.score(sessions, vectors=kept)
    alone = scorer.score(sessions.iloc[[3]], vectors=kept)
    mine = whole[whole.session_id == sessions.session_id[3]].reset_index(drop=True)
    assert alone.intent_id.tolist() == mine.intent_id.tolist()
    np.testing.assert_allclose(alone.score, mine.score, atol=1e-4)
    fresh = scorer.score(sessions)
    assert fresh.intent_id.tolist() == whole.intent_id.tolist()


def test_confidence_is_the_mass_of_the_best_three_whatever_is_asked_for(scorer, sessions):
    whole = scorer.score(sessions, top=None, confidence=True)
    assert list(whole)[-1] == "confidence"
    for _, own in whole.groupby("session_id"):
        weights = np.exp(own.score.to_numpy(dtype=float))
        np.testing.assert_allclose(own.confidence, weights[:3].sum() / weights.sum(), rtol=1e-5)
    one = scorer.score(sessions, top=1, confidence=True)
    best = whole[whole["rank"] == 1].reset_index(drop=True)
    pd.testing.assert_frame_equal(one, best)
    pd.testing.assert_frame_equal(one.drop(columns="confidence"), scorer.score(sessions, top=1))
    for wrong in (1, "yes", None):
        with pytest.raises(ScoreError, match=f"confidence is {wrong!r}; expected True or False"):
            scorer.score(sessions, confidence=wrong)


def test_what_one_session_costs_is_measured_on_one_core(scorer, sessions):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        table = latency(scorer, sessions.head(12), warm=2).set_index("step")
        assert torch.get_num_threads() == 2, "the caller's threads are left alone"
    finally:
        torch.set_num_threads(threads)
    assert (table.p50 <= table.p99).all()
    assert table.p50["ranks the KB"] < table.p50["score(), all of it"], "it is a part of it"


def test_an_intent_that_does_not_exist_yet_is_not_shown(scorer, shop, sessions):
    late = shop.intents.dropna(subset="valid_from")
    early = sessions.assign(timestamp=late.valid_from.min() - pd.Timedelta(days=1))
    assert not set(scorer.score(early, top=None).intent_id) & set(late.intent_id)
    timeless = scorer.score(sessions.drop(columns="timestamp"), top=None)
    assert set(timeless.intent_id) == set(shop.intents.intent_id)


def test_a_new_intent_is_ranked_without_training_and_changes_no_other(scorer, sessions):
    twin = scorer.ranking.kb.iloc[[0]].assign(intent_id="twin", valid_from=pd.NaT)
    more = scorer.with_intents(twin[["intent_id", "title", "description", "category"]])
    before, after = (each.score(sessions, top=None) for each in (scorer, more))
    assert (after.intent_id == "twin").sum() == len(sessions)
    others = after[after.intent_id != "twin"]
    pd.testing.assert_frame_equal(
        others.drop(columns="rank").reset_index(drop=True), before.drop(columns="rank"), rtol=1e-4, atol=1e-4
    )
    assert "twin" not in set(scorer.ranking.kb.intent_id), "the scorer it came from stays as it was"


def test_a_new_intent_that_nobody_clicked_is_ranked_as_one_with_the_same_words(scorer, shop, sessions):
    clicked = shop.impressions[shop.impressions.clicked == 1].intent_id
    cold = scorer.ranking.kb[~scorer.ranking.kb.intent_id.isin(clicked)].iloc[[0]]
    twin = cold.assign(intent_id="twin", valid_from=pd.NaT)
    table = scorer.with_intents(twin).score(sessions.drop(columns="timestamp"), top=None)
    scores = table.pivot_table("score", "session_id", "intent_id")
    np.testing.assert_allclose(scores["twin"], scores[cold.intent_id.item()], atol=5e-3)  # vectors are float16


def test_every_fault_of_new_intents_is_told_at_once(scorer):
    kb = scorer.ranking.kb
    more = pd.DataFrame({"intent_id": ["a", "a", kb.intent_id[0], None], "title": ["x", "x", "", "x"]})
    with pytest.raises(ScoreError, match="cannot be added") as caught:
        checked_intents(more, kb)
    for fault in (
        "intents.title  1 row is empty (first: 2)",
        "intents.intent_id  1 row is empty (first: 3)",
        "intents.intent_id  1 row repeats an id (first: 'a')",
    ):
        assert fault in str(caught.value)
    assert "in the knowledge base already (first: 2)" in str(caught.value)
    with pytest.raises(ScoreError, match=r"has no row.*\n  intents\.title  is missing"):
        checked_intents(pd.DataFrame({"intent_id": []}), kb)


def test_every_fault_of_sessions_is_told_at_once(scorer, sessions):
    column = scorer.ranking.columns[-1]
    broken = pd.concat([sessions.head(2), sessions.head(1)]).drop(columns=column)
    with pytest.raises(ScoreError, match="cannot be scored") as caught:
        scorer.score(broken)
    assert f"sessions.{column}  is missing" in str(caught.value)
    assert "sessions.session_id  1 row repeats an id" in str(caught.value)
    with pytest.raises(ScoreError, match=r"sessions\.timestamp  has the type .*string; expected timestamps or dates"):
        scorer.score(sessions.assign(timestamp="soon"))
    with pytest.raises(ScoreError, match="top is 0"):
        scorer.score(sessions, top=0)


def test_the_aligned_ranker_serves_where_there_is_one(ranked, sessions, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(ranked, run)
    shutil.copytree(run / "models/reasoner/main", run / ALIGNED)
    shutil.copytree(run / QE_REC, run / ALIGNED_RANKERS)
    shutil.copytree(run / TEXTS, run / ALIGNED_TEXTS)
    weights = run / ALIGNED_RANKERS / "seed-0" / "weights.safetensors"
    from safetensors.torch import load_file, save_file

    changed = load_file(weights)
    save_file({name: value * 1.5 for name, value in changed.items()}, weights)
    both = [rgalign.load(run, aligned=aligned).score(sessions).score for aligned in (None, False)]
    assert not np.allclose(*both)
    with pytest.raises(ArtifactError, match="rankers of the seeds 0; found seed 4"):
        rgalign.load(run, seed=4)
    shutil.rmtree(run / ALIGNED)
    shutil.rmtree(run / "models/rankers")
    with pytest.raises(ArtifactError, match="no ranker that reads queries: run it through 03"):
        rgalign.load(run).score(sessions)


def test_the_command_writes_the_same_table(ranked, scorer, sessions, tmp_path, capsys):
    given, out = tmp_path / "sessions.parquet", tmp_path / "ranked.parquet"
    sessions.to_parquet(given)
    command = ["score", str(ranked), str(given), "--top", "2", "-o"]
    assert main([*command, str(out)]) == 0
    assert f"{len(sessions)} sessions, the best 2 of" in capsys.readouterr().out
    pd.testing.assert_frame_equal(pd.read_parquet(out), scorer.score(sessions, top=2), check_dtype=False)
    assert main([*command, str(given)]) == 1
    assert "is the table of sessions itself" in capsys.readouterr().err
    assert pq.read_table(given).num_rows == len(sessions), "nothing is lost"


def test_a_broken_table_is_named_and_nothing_is_written(ranked, sessions, tmp_path, capsys):
    given, out = tmp_path / "sessions.parquet", tmp_path / "ranked.parquet"
    faults = {
        "sessions.parquet cannot be read as parquet": lambda path: path.write_bytes(b"PAR1 not"),
        "is missing": lambda path: sessions.iloc[:, :1].to_parquet(path),
        "there is no file": Path.unlink,
    }
    for told, break_it in faults.items():
        given.touch()
        break_it(given)
        assert main(["score", str(ranked), str(given), "-o", str(out)]) == 1
        assert told in capsys.readouterr().err.rpartition("error: ")[2]
        assert not out.exists()


def test_a_folder_is_never_replaced_by_a_table(ranked, sessions, tmp_path, capsys):
    given = tmp_path / "sessions.parquet"
    sessions.to_parquet(given)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/kept").touch()
    assert main(["score", str(ranked), str(given), "-o", str(tmp_path / "mine")]) == 1
    assert "mine is a folder" in capsys.readouterr().err
    assert (tmp_path / "mine/kept").exists()


def test_a_word_where_a_number_belongs_and_a_doubled_column_are_told(scorer, sessions):
    number = next(name for name in scorer.ranking.columns if scorer.kinds.get(name) == "numeric")
    with pytest.raises(ScoreError, match=f"sessions.{number}  has the type .*string; expected numbers"):
        scorer.score(sessions.assign(**{number: "many"}))
    doubled = pd.concat([sessions, sessions[[number]]], axis=1)
    with pytest.raises(ScoreError, match=f"sessions.{number}  is there 2 times; expected once"):
        scorer.score(doubled)


def test_an_empty_column_of_any_type_is_missing(scorer, sessions):
    number = next(name for name in scorer.ranking.columns if scorer.kinds.get(name) == "numeric")
    word = next(name for name in scorer.ranking.columns if scorer.kinds.get(name) == "categorical")
    for nothing in (None, float("nan"), pd.NaT):
        empty = sessions.assign(**{number: nothing, word: nothing, "timestamp": nothing})
        assert len(scorer.score(empty)) == 3 * len(sessions)


def test_what_check_refuses_is_refused_and_nothing_is_ranked_by_a_misread_time(scorer, sessions):
    """Epoch numbers would be years before every intent: no row would come back (tests/data/test_check_frame.py)."""
    kind = {kind: name for name, kind in scorer.kinds.items() if name in scorer.ranking.columns}
    seconds = sessions.timestamp.astype("datetime64[s]").astype("int64")
    for column, values, told in (
        ("timestamp", seconds, 'looks like seconds since 1970: pd.to_datetime(.., unit="s")'),
        ("timestamp", seconds * 1000, 'pd.to_datetime(.., unit="ms")'),
        ("timestamp", pd.to_datetime(seconds), "lie in 1970"),
        (kind["numeric"], np.inf, "is infinite" if len(sessions) == 1 else "are infinite"),
        (kind["text"], pd.Series(["\ud800"] * len(sessions), sessions.index, dtype=object), "half a character"),
        (kind["categorical"], [["a"]] * len(sessions), "expected strings, integers or booleans"),
        (kind["categorical"], 1.5, "has the type double"),
    ):
        with pytest.raises(ScoreError) as caught:
            scorer.score(sessions.assign(**{column: values}))
        assert f"sessions.{column}  " in str(caught.value)
        assert told in str(caught.value)
    for rows in ([{"session_id": "s"}], sessions.to_dict("list"), sessions.session_id, None):
        with pytest.raises(ScoreError, match="expected a pandas DataFrame with session_id"):
            scorer.score(rows)
        with pytest.raises(ScoreError, match="expected a pandas DataFrame with intent_id, title"):
            scorer.with_intents(rows)
