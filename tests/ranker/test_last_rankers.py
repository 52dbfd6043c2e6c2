"""Rankers of a run that another goes on from: which are found, that they go on, and where they cannot."""

from types import SimpleNamespace

import pytest
import torch

from rgalign.data.lists import Match, with_match
from rgalign.params_training import RankerSettings
from rgalign.ranker import store
from rgalign.ranker import train as rankers

SETTINGS = RankerSettings(dim=8, hidden=8, embedding_dim=4, experts=2, epochs=2, lists_per_batch=16, learning_rate=0.01)
SPACE = SimpleNamespace(  # as small_lists has it
    field_sizes=(6, 11), history_sizes=(8,), word_buckets=32, intent_ids_size=14, category_size=6
)


@pytest.fixture
def parts(lists, intents):
    made = {part: lists(part, 40, seed=seed) for seed, part in enumerate(("train", "dev", "valid"))}
    return rankers.Parts(SPACE, intents, **made)


def test_a_ranker_goes_on_and_one_that_the_last_run_had_not_begins_anew(parts, tmp_path):
    how = {"positions": 6, "progress": False}
    rankers.train({"two_tower": SETTINGS}, [0, 1], parts, folder=tmp_path / "last", **how)
    found = rankers.last_rankers(tmp_path / "aligned", tmp_path / "last", ["two_tower", "qe_rec"], [0, 1])
    assert found == {"two_tower": tmp_path / "last" / "two_tower"}
    still = SETTINGS.model_copy(update={"learning_rate": 1e-9})
    wanted = {"two_tower": still, "two_tower_text": still}
    curves = rankers.train(wanted, [1], parts, folder=tmp_path / "next", start=found, **how)
    assert curves.groupby("model")["epoch"].min().to_dict() == {"two_tower": 0, "two_tower_text": 1}
    was, now = (store.load(tmp_path / run / "two_tower" / "seed-1").state_dict() for run in ("last", "next"))
    assert all(torch.allclose(was[name], now[name], atol=1e-6) for name in was)
    with pytest.raises(ValueError, match="knows 6 positions; lists have 8 now"):
        rankers.train(wanted, [1], parts, folder=tmp_path / "wide", start=found, positions=8, progress=False)


def test_a_ranker_does_not_go_on_with_other_match_terms(parts, intents, tmp_path):
    """It would read those of the last run, or none, whatever ranker.match says."""
    wanted, how = {"two_tower_text/word_match": SETTINGS}, {"positions": 6, "progress": False}
    of_each = [getattr(parts, part) for part in ("train", "dev", "valid")]
    terms = [Match(torch.rand(len(lists), len(intents), 1).half(), ("word_overlap",)) for lists in of_each]
    matched = {lists.part: with_match(lists, own) for lists, own in zip(of_each, terms, strict=True)}
    matched = rankers.Parts(SPACE, intents, **matched)
    for name, last, now in (("more", parts, matched), ("less", matched, parts)):
        rankers.train(wanted, [0], last, folder=tmp_path / name, **how)
        start = rankers.last_rankers(tmp_path / "aligned", tmp_path / name, list(wanted), [0])
        with pytest.raises(ValueError, match=r"reads the match terms (none|word_overlap); now there are"):
            rankers.train(wanted, [0], now, folder=tmp_path / f"{name} next", start=start, **how)
    rankers.train(wanted, [0], matched, folder=tmp_path / "same", start=start, **how)


def test_qe_rec_goes_on_from_the_aligned_rankers_and_only_where_every_seed_is_there(tmp_path):
    for seed in (0, 1):
        (tmp_path / "aligned" / f"seed-{seed}").mkdir(parents=True)
    (tmp_path / "last" / "qe_rec" / "seed-0").mkdir(parents=True)
    given = tmp_path / "aligned", tmp_path / "last", ["qe_rec"]
    assert rankers.last_rankers(*given, [0, 1]) == {"qe_rec": tmp_path / "aligned"}
    assert rankers.last_rankers(*given, [0, 1, 2]) == {}
    assert rankers.last_rankers(None, None, ["qe_rec"], [0]) == {}
