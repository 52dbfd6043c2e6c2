"""Hard negatives and first click by hand; what the training functions receive is train's, with a click, row by row."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import small_run
import torch
from small_pairs import Onlooker

from rgalign.alignment import contrastive, dpo, preferences, sft
from rgalign.data import tables
from rgalign.params_training import Dpo

LISTS = SimpleNamespace(
    candidates=torch.tensor([[4, 2, 9], [7, 1, -1], [3, 8, 5]]),
    clicked=torch.tensor([[False, True, False], [True, False, False], [False, True, True]]),
    shown=torch.tensor([[True, True, True], [True, True, False], [True, True, True]]),
)
SCORES = np.array([[0.1, 9.0, 0.2], [5.0, 1.0, -np.inf], [-1.0, 2.0, 3.0]])


def test_first_click_by_hand():
    assert contrastive.first_click(LISTS).tolist() == [2, 7, 8]


def test_other_clicks_by_hand():
    assert contrastive.other_clicks(LISTS).tolist() == [[-1], [-1], [5]]


def test_where_each_list_has_one_click_there_are_no_others():
    lists = SimpleNamespace(candidates=LISTS.candidates[:2], clicked=LISTS.clicked[:2])
    assert contrastive.other_clicks(lists).shape == (2, 0)


@pytest.mark.parametrize(
    ("count", "expected"), [(2, [[9, 4], [1, -1], [3, -1]]), (1, [[9], [1], [3]]), (0, [[], [], []])]
)
def test_hard_negatives_by_hand(count, expected):
    found = contrastive.hard_negatives(LISTS, SCORES, count)
    assert found.tolist() == expected
    assert found.shape == (3, count)


def test_equal_scores_keep_the_lists_order():
    assert contrastive.hard_negatives(LISTS, np.zeros((3, 3)), 2).tolist() == [[4, 9], [1, -1], [3, -1]]


@pytest.mark.parametrize(
    ("how", "pairs", "expected"),
    [
        ({"epochs": 1.0, "pairs_per_batch": 32}, 65, 3),
        ({"epochs": 1.5, "pairs_per_batch": 10}, 40, 6),
        ({"epochs": 0.1, "pairs_per_batch": 32}, 33, 1),
        ({"use": False}, 100, 0),
        ({}, 0, 0),
    ],
)
def test_steps_by_hand(how, pairs, expected):
    assert dpo.planned_steps(Dpo(**how), pairs) == expected


def test_empty_tables_have_the_columns_of_full_ones(context, rewarded):
    pairs, counts = preferences.preference_pairs(context, context.main(), rewarded[0])
    none, nothing = preferences.no_pairs()
    assert list(none) == list(pairs)
    assert list(nothing) == list(counts)


def foreign(context, scored: pd.DataFrame) -> pd.DataFrame:
    """The candidates with rows, of the highest reward, of a development user's session and of one of valid."""
    strangers = [part.session_id[part.clicked.any(1).numpy()][0] for part in (context.parts.dev, context.parts.valid)]
    return pd.concat([scored, scored.head(2).assign(session_id=strangers, reward=99.0)], ignore_index=True)


def test_targets_and_pairs_are_of_learners_alone(context, rewarded):
    scored, learners = foreign(context, rewarded[0]), set(context.clicked_lists.session_id)
    assert set(scored.session_id) - learners, "development users have candidates: the judge was chosen on them"
    best = preferences.best_queries(context, scored)
    pairs, _ = preferences.preference_pairs(context, context.main(), scored)
    for table in (best, pairs):
        assert len(table) > 0
        assert set(table.session_id) <= learners
    highest = rewarded[0].groupby("session_id").reward.max()
    assert best.reward.to_numpy() == pytest.approx(highest.loc[best.session_id].to_numpy())
    assert pairs.reward_chosen.to_numpy() == pytest.approx(highest.loc[pairs.session_id].to_numpy())


@pytest.fixture
def spied(monkeypatch):
    """What the three training functions are given; nothing is trained."""
    seen = {}

    def spy(module, name):
        def train(reasoner, *given, **how):
            *data, section, setup = given
            seen.update({name: data, "settings": section, "setup": setup, "how": how})
            return reasoner, pd.DataFrame({"step": [1], "loss": [0.0], "seconds": [0.0]})

        monkeypatch.setattr(module, name, train)

    for module, name in ((sft, "sft"), (dpo, "dpo"), (contrastive, "contrastive")):
        spy(module, name)
    return seen


def prompts_of(context, session_ids) -> list[list[int]]:
    """Independently of the package: one prompt a session, from its row of the table."""
    reasoner = context.main()
    rows = context.shop.sessions.set_index("session_id", drop=False).loc[list(session_ids)]
    return context.recipe.prompter(context.shop, reasoner).sessions(rows.reset_index(drop=True))


def test_sft_is_given_each_sessions_prompt_and_best_query(context, rewarded, spied, tmp_path):
    best = preferences.best_queries(context, foreign(context, rewarded[0]))
    reasoner = context.main()
    sft.train_sft(context, reasoner, best, tmp_path)
    prompts, queries = spied["sft"]
    assert prompts == prompts_of(context, best.session_id)
    assert queries == context.recipe.prompter(context.shop, reasoner).queries(best["query"].tolist())
    assert spied["setup"].lora is None
    assert spied["settings"] == context.params.alignment.sft


def test_dpo_is_given_each_pairs_prompt_and_its_own_reference(context, rewarded, spied, tmp_path):
    reasoner, onlooker = context.main(), Onlooker()
    pairs, _ = preferences.preference_pairs(context, reasoner, foreign(context, rewarded[0]))
    _, _, reference = dpo.train_dpo(context, reasoner, pairs, tmp_path, onlooker)
    (given,) = spied["dpo"]
    assert given.prompts == prompts_of(context, pairs.session_id)
    assert spied["how"]["reference"] is reference
    assert len(reference) == len(pairs)
    (early_stopping,) = spied["setup"].callbacks
    assert early_stopping.monitor is onlooker
    blind = small_run.small({"alignment.dpo.looks": 0, "alignment.lora": {"rank": 3}})
    dpo.train_dpo(replace(context, params=blind), reasoner, pairs, tmp_path, onlooker)
    assert not spied["setup"].callbacks
    assert spied["setup"].lora.rank == 3


def test_rg_cl_is_given_learners_alone_in_one_order(context, spied, tmp_path):
    contrastive.train_contrastive(context, context.main(), None, tmp_path)
    learners, (sessions, spaces) = context.clicked_lists, spied["contrastive"]
    assert sessions.prompts == prompts_of(context, learners.session_id)
    clicks = context.shop.impressions.query("clicked == 1").groupby("session_id").intent_id.agg(set)
    ids = context.shop.intents.intent_id.to_numpy()
    passed_over = tables.read(context.run / "tables/dataset").impressions.query("clicked == 0")
    for session, clicked, hard in zip(learners.session_id, sessions.clicked, sessions.hard, strict=True):
        assert ids[clicked] in clicks[session]
        shown = set(passed_over.loc[passed_over.session_id == session, "intent_id"])
        assert {ids[i] for i in hard if i >= 0} <= shown
    assert [len(space.users) for space in spaces] == [len(learners)] * len(context.rankers)
    assert sessions.queries is None


def test_the_language_term_of_rg_cl_reads_the_best_query_of_the_very_session(context, rewarded, spied, tmp_path):
    best = preferences.best_queries(context, rewarded[0]).iloc[::-2]  # of some sessions, in another order
    weighted = replace(context, params=small_run.small({"alignment.cl.lm_weight": 0.5}))
    reasoner = context.main()
    contrastive.train_contrastive(weighted, reasoner, best, tmp_path)
    sessions, texts = context.clicked_lists.session_id, best.set_index("session_id")["query"]
    assert spied["contrastive"][0].prompts == prompts_of(context, sessions), "a click teaches with and without a query"
    prompter = context.recipe.prompter(context.shop, reasoner)
    assert 0 < len(texts) < len(sessions)
    for session, query in zip(sessions, spied["contrastive"][0].queries, strict=True):
        assert query == (prompter.queries([texts[session]])[0] if session in texts.index else [])
    silent = replace(context, params=small_run.small({"alignment.cl.lm_weight": 0.0}))
    contrastive.train_contrastive(silent, reasoner, best, tmp_path)
    assert spied["contrastive"][0].queries is None
    assert len(spied["contrastive"][0].prompts) == len(context.clicked_lists)
