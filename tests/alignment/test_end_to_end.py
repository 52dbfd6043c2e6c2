"""The ranking loss through the reasoner: its value is the rankers' own, both learn, a killed run goes on alike."""

import copy

import numpy as np
import pytest
import small_rewards as shop
import torch
from interrupted import Kill, Killed
from small_pairs import TOKENIZER
from small_trainings import end_to_end

from rgalign.data.lists import with_queries, with_texts
from rgalign.params import ParamsError, check
from rgalign.params_training import RankerSettings
from rgalign.ranker.fit import with_click
from rgalign.ranker.losses import listnet_kl
from rgalign.ranker.towers import ThreeTower, ThreeTowerConfig
from rgalign.reasoner.embed import embed
from rgalign.reasoner.model import fingerprint, tiny

HIDDEN = 16
LISTS = with_click(shop.lists("train", 49))
PROMPTS = [[4 + group, *(9 + (7 * n + i) % 6 for i in range(n % 4)), 2] for n, group in enumerate(shop.group_of(LISTS))]
INTENTS = with_texts(shop.intents(), np.random.default_rng(1).normal(size=(shop.KB, HIDDEN)))
HOW = dict(
    loss=listnet_kl(0.2), seed=3, epochs=6, documents_per_batch=8, learning_rate=4e-3, weight_decay=0.01, progress=False
)
SIZES = dict(
    field_sizes=(6, 6), history_sizes=(), word_buckets=1, intent_ids=shop.KB + 2, categories=shop.GROUPS + 2,
    positions=shop.SHOWN, text=False, dim=8, query_dim=HIDDEN, query_hidden=8, interaction_hidden=8,
)  # fmt: skip


def reasoner():
    return tiny(TOKENIZER, hidden=HIDDEN, layers=1, heads=2, seed=0)


def ranker(seed, dropout=0.0):
    share = dict(dropout=dropout, id_dropout=dropout, query_dropout=dropout)
    model = ThreeTower(ThreeTowerConfig.of(RankerSettings(), **SIZES, **share), seed=seed)
    model.query.layers[0].set(torch.tensor(embed(reasoner(), PROMPTS, progress=False)))
    return model.eval()


def learn(folder, rankers, **more):
    lists = with_queries(LISTS, np.full((len(LISTS), HIDDEN), 7.0))  # which nobody may read
    how = {**HOW, "rankers": rankers, "lists": lists, "intents": INTENTS, "folder": folder, **more}
    return end_to_end(reasoner(), PROMPTS, **how)


def states(aligned, rankers):
    models = [aligned.model, *rankers]
    return [value.numpy().tobytes() for model in models for value in model.state_dict().values()]


def test_the_loss_is_the_rankers_own_of_the_vectors_that_will_be_served(tmp_path):
    rankers = [ranker(1), ranker(2)]
    lists = with_queries(LISTS, embed(reasoner(), PROMPTS, progress=False))
    expected = np.mean([HOW["loss"](copy.deepcopy(each).train(), lists, INTENTS).item() for each in rankers])
    _, _, curve = learn(tmp_path / "work", rankers, epochs=1, documents_per_batch=len(LISTS))
    assert curve["loss"].tolist() == pytest.approx([expected], abs=1e-5)


def test_both_learn_and_what_was_given_stays(tmp_path):
    rankers, before = [ranker(1), ranker(2)], states(reasoner(), [ranker(1), ranker(2)])
    aligned, learnt, curve = learn(tmp_path / "work", rankers, epochs=12)
    assert states(reasoner(), rankers) == before
    assert fingerprint(aligned) != fingerprint(reasoner())
    assert not hasattr(aligned.model, "rankers")
    assert not aligned.model.training
    for was, now in zip(rankers, learnt, strict=True):
        assert not now.training
        for part in ("user", "intent", "query", "interaction"):
            moved = zip(getattr(was, part).parameters(), getattr(now, part).parameters(), strict=True)
            assert any(not torch.equal(*pair) for pair in moved)
    assert curve["loss"].iloc[-1] < 0.5 * curve["loss"].iloc[0]  # the prompt's first token tells the click


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path):
    rankers = [ranker(1, dropout=0.3)]
    aligned, learnt, curve = learn(tmp_path / "whole", rankers)
    with pytest.raises(Killed):
        learn(tmp_path / "work", rankers, callbacks=[Kill(23)])
    assert list((tmp_path / "work").glob("checkpoint-*"))
    resumed = learn(tmp_path / "work", rankers)
    assert states(*resumed[:2]) == states(aligned, learnt)
    assert resumed[2].drop(columns="seconds").equals(curve.drop(columns="seconds"))


def test_it_is_one_training_of_all_weights():
    given = {"cl": {"ranker_learns": True, "similarity": "cosine"}, "lora": {}, "loop": {"rounds": 2}}
    with pytest.raises(ParamsError, match=r"cannot go with rounds above 1, lora, similarity cosine"):
        check({"alignment": given})
    assert check({"alignment": {**given, "cl": {"ranker_learns": True, "use": False}}}).alignment.cl.ranker_learns
