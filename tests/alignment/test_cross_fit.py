"""Cross-fitting: no training session's vector comes from a model that has learnt from a click of its user."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import small_rewards as shop

from rgalign.alignment import closed_loop, rewarding
from rgalign.data.vectors import Vectors
from rgalign.params import ParamsError, check
from rgalign.ranker.fit import with_click

SERVING = 9.0  # what the vectors of the model that was aligned on all are filled with


class Small:
    """A context whose "reasoners" are the sessions that RG-CL was given; a vector is filled with its model's number."""

    def __init__(self, users: int, **alignment):
        self.params = check({"alignment": {"loop": {"cross_fit": True}, **alignment}})
        lists = shop.lists("train", 60)
        user_id = np.array([f"u{i % users}" for i in range(60)])
        self.parts = SimpleNamespace(train=type(lists)(**{**vars(lists), "user_id": user_id}))
        self.clicked_lists = with_click(self.parts.train)
        self.users_of: dict[str, set] = {}

    def sessions(self, lists):
        return pd.DataFrame({"session_id": lists.session_id, "user_id": lists.user_id})

    def save(self, reasoner, folder: Path):
        folder.mkdir()
        self.users_of[folder.name] = reasoner

    def load(self, folder: Path):
        return folder.name

    def embedding(self, name: str):
        def sessions(frame, work):
            return Vectors(frame["session_id"].tolist(), np.full((len(frame), 2), float(name.removeprefix("fold-"))))

        return SimpleNamespace(sessions=sessions)


@pytest.fixture
def aligned(monkeypatch):
    """RG-CL as nothing but the users that it is trained on."""

    def train_contrastive(context, start, best, work, lists):
        return set(lists.user_id.tolist()), pd.DataFrame()

    monkeypatch.setattr(closed_loop, "train_contrastive", train_contrastive)


def served(context) -> Vectors:
    ids = [*context.parts.train.session_id, "dev0", "valid0"]
    return Vectors(ids[::-1], np.full((len(ids), 2), SERVING))


def test_users_are_whole_and_halved():
    context = Small(users=30)
    fold = rewarding.fold_of(context, context.parts.train, 2)
    by_user = pd.Series(fold).groupby(context.parts.train.user_id).nunique()
    assert (by_user == 1).all()
    assert 0.25 < fold.mean() < 0.75
    again = rewarding.fold_of(context, context.parts.train.take(np.arange(60)[::-1].copy()), 2)
    assert again.tolist() == fold[::-1].tolist()


def test_a_training_sessions_vector_is_of_the_model_that_has_not_heard_its_user(aligned, tmp_path):
    context = Small(users=30)
    closed_loop.train_folds(context, None, None, tmp_path / "folds", tmp_path / "work")
    everyone = set(context.clicked_lists.user_id.tolist())
    assert context.users_of["fold-0"] | context.users_of["fold-1"] == everyone
    assert not context.users_of["fold-0"] & context.users_of["fold-1"]
    given = served(context)
    found = closed_loop.cross_fitted(context, given, tmp_path / "folds", tmp_path / "work")
    assert found.ids.tolist() == given.ids.tolist()
    user_of = dict(zip(context.parts.train.session_id, context.parts.train.user_id, strict=True))
    for session, (number, _) in zip(found.ids.tolist(), found.values.tolist(), strict=True):
        if session in user_of:  # also those without a click, from which nothing was learnt
            assert user_of[session] not in context.users_of[f"fold-{number:.0f}"]
        else:
            assert number == SERVING


@pytest.mark.parametrize("off", [{"loop": {"cross_fit": False}}, {"cl": {"use": False}}])
def test_switched_off_it_leaves_an_empty_folder_and_the_vectors_as_they_were(off, aligned, tmp_path):
    context = Small(users=30, **off)
    closed_loop.train_folds(context, None, None, tmp_path / "folds", tmp_path / "work")
    assert not list((tmp_path / "folds").iterdir())
    given = served(context)
    assert closed_loop.cross_fitted(context, given, tmp_path / "folds", tmp_path / "work") is given


def test_a_second_round_which_would_have_heard_all_is_refused():
    with pytest.raises(ParamsError, match=r"alignment\.loop\.cross_fit +a second round would begin from a reasoner"):
        check({"alignment": {"loop": {"cross_fit": True, "rounds": 2}}})
