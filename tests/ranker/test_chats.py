import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from small_lists import CATEGORIES, PER_CATEGORY, UNSEEN, bags

from rgalign.data import shards, tables
from rgalign.data.features import UNKNOWN
from rgalign.data.split import development_users
from rgalign.errors import TrainingError
from rgalign.params_training import RANKER_NAMES, Ranker, RankerSettings
from rgalign.ranker import chats as chatting
from rgalign.ranker.chats import Chats, chat_loss, encode, of_run, pretrain
from rgalign.ranker.fit import score
from rgalign.ranker.search import grid, space_of, tune
from rgalign.ranker.towers import TwoTower
from rgalign.ranker.train import Parts, load_rankers, parts_of_variant, train
from rgalign.reasoner.build import learnable
from rgalign.run.artifacts import digest
from rgalign.shopworld import world

NAME = "two_tower_text/chats"
HOW = RankerSettings(chat_epochs=8, chat_learning_rate=1e-2, chat_temperature=1.0, lists_per_batch=32)
SETTINGS = HOW.model_copy(update={"dim": 8, "hidden": 8, "epochs": 2, "patience": 1, "weight_decay": 0.0})


def made(lists, count: int, *, seed: int, labelled: bool = False) -> Chats:
    """Chats in which the session's group determines the words typed; its intent is the first of the group."""
    sessions = lists("train", count, seed=seed)
    group = sessions.fields[:, 0].long() - 2
    intent = (group * PER_CATEGORY if labelled else torch.full_like(group, -1)).unsqueeze(1)
    sessions = replace(sessions, candidates=intent, clicked=intent >= 0, words=bags([[]] * count))
    return Chats(sessions, bags([[int(own) + 24, 31] for own in group]))


def nats(model, chats, intents, known=None) -> float:
    with torch.no_grad():
        return float(chat_loss(model.eval(), chats, intents, torch.ones(len(intents), dtype=bool), 1.0))


@pytest.fixture
def ranker(config):
    return lambda seed=0, **changes: TwoTower(config(text=True, dropout=0.1, **changes), seed=seed)


def test_what_is_learnt_from_chats_holds_for_other_chats_and_beats_chance(ranker, lists, intents):
    model, other = ranker(), made(lists, 200, seed=9)
    before = nats(model, other, intents)
    losses = pretrain(model, made(lists, 300, seed=8), lists("train", 50, seed=0), intents, HOW, seed=0)
    after, groups = nats(model, other, intents), np.bincount(other.sessions.fields[:, 0])
    best = sum(count * math.log(count) for count in groups if count) / 200  # chats of one group cannot be told apart
    assert best < after < min(before, math.log(200)) - 0.5
    assert losses[-1] < losses[0]


def test_words_of_a_labelled_chat_lead_to_its_intent(ranker, lists, intents):
    model, train_lists = ranker(), lists("train", 50, seed=0)
    pretrain(model, made(lists, 300, seed=8, labelled=True), train_lists, intents, HOW, seed=0)
    model.eval()
    with torch.no_grad():
        words = model.intent.words(bags([[group + 24, 31] for group in range(CATEGORIES)]))
        vectors, bias = model.intent(intents)
        best = (words @ vectors.T * model.config.dim**-0.5 + bias).argmax(1)
    assert best.tolist() == [group * PER_CATEGORY for group in range(CATEGORIES)]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_loss_of_a_case_worked_by_hand(ranker, lists, intents, temperature):
    """Two chats, vectors given: sessions (2, 0), (0, 4), words (1, 1), (0, 1), sqrt(dim) 2. The first is labelled 1."""
    model = ranker(dim=4, hidden=4).eval()
    chats = replace(made(lists, 2, seed=0), typed=bags([[0], [1]]))
    labels = torch.tensor([[1], [UNSEEN]])
    chats = replace(chats, sessions=replace(chats.sessions, candidates=labels, clicked=labels >= 0))
    users = torch.tensor([[2.0, 0, 0, 0], [0, 4, 0, 0]])
    kb, bias = torch.zeros(len(intents), 4), torch.zeros(len(intents))
    kb[1, 0], bias[0] = 2.0, 0.5
    model.user.forward, model.intent.forward = lambda lists: users, lambda intents: (kb, bias)
    with torch.no_grad():
        model.intent.words.table.weight[:2] = torch.tensor([[1.0, 1, 0, 0], [0, 1, 0, 0]])
    known = torch.tensor([index < 3 for index in range(len(intents))])
    found = chat_loss(model, chats, intents, known, temperature)
    # user . words / 2: (1, 0), (2, 2); words . intents / 2 + bias: (0.5, 1, 0), those not known left out, label and all
    t = 1 / temperature
    rows = (-math.log(math.exp(t) / (math.exp(t) + 1)) + math.log(2)) / 2
    label = -math.log(math.exp(t) / (math.exp(t / 2) + math.exp(t) + 1))
    assert found.item() == pytest.approx(rows + label, abs=1e-6)


def test_an_intent_that_train_does_not_show_learns_nothing(ranker, lists, intents):
    """Neither as a label nor as a wrong answer: it may be one that enters later."""
    chats = made(lists, 60, seed=1, labelled=True)
    model = ranker(id_dropout=0.0)
    before = model.intent.id.weight.detach().clone()
    ids = replace(intents, id=intents.id.clone())
    ids.id[UNSEEN] = UNSEEN + 2  # an id of its own, so that it can be told
    pretrain(model, chats, lists("train", 50, seed=0), ids, HOW, seed=0)
    moved = (model.intent.id.weight != before).any(1)
    assert not moved[UNSEEN + 2]
    assert moved[2]


def test_a_learning_rate_that_is_too_high_is_named(ranker, lists, intents):
    how = HOW.model_copy(update={"chat_learning_rate": 1e30})
    with pytest.raises(TrainingError, match=r"lower ranker\.chat_learning_rate"):
        pretrain(ranker(), made(lists, 60, seed=1), lists("train", 50, seed=0), intents, how, seed=0)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A small shop on disk, encoded; its users 0 .. are of all parts."""
    folder = tmp_path_factory.mktemp("shop")
    made = world.generate(seed=0, sessions=400, users=60, transcripts=50)
    tables.write(made, folder / "dataset")
    how = {"development": lambda users: development_users(users, share=0.2, seed=0)}
    space = shards.fit_folder(folder / "dataset", **how)
    shards.encode_folder(space, folder / "dataset", folder / "encoded", **how)
    return folder


def read(shop, transcripts=None):
    data = tables.excerpt(shop / "dataset", [], transcripts=True)
    if transcripts is not None:
        data = replace(data, transcripts=transcripts)
    return learnable(data, shop / "dataset", shop / "encoded")[0]


def test_columns_that_a_chat_does_not_tell_are_unknown(shop):
    space, data = shards.load_space(shop / "encoded"), read(shop)
    chats = of_run([NAME], data, shop / "dataset", shop / "encoded")
    assert len(chats) == 50
    assert of_run(["two_tower_text", "qe_rec"], data, shop / "dataset", shop / "encoded") is None
    told = [dict(pairs) for pairs in data.transcripts["features"]]
    for column, field in enumerate(space.fields):
        for row, known in enumerate(told):
            value = known.get(field.name)
            expected = UNKNOWN if value is None or field.kind != "categorical" else field.ids.get(value, UNKNOWN)
            if value is None or field.kind == "categorical":
                assert chats.sessions.fields[row, column] == expected
    assert (chats.sessions.fields != UNKNOWN).any()
    assert all(len(bag.values) == 0 for bag in chats.sessions.history)
    assert len(chats.sessions.words.values) > 0
    assert (chats.sessions.candidates == -1).all()


def test_chats_of_users_who_are_judged_are_not_read(shop):
    """One chat a session of every part: those of learners who never come in valid or test are left, with their rows."""
    everyone = tables.read(shop / "dataset", splits=("train", "valid", "test")).sessions
    words = [f"secret{row}" for row in range(len(everyone))]
    typed = pd.DataFrame({"session_id": everyone.session_id, "typed_query": words})
    typed["intent_id"] = tables.read(shop / "dataset").intents.intent_id.iloc[3]
    space = shards.load_space(shop / "encoded")
    chats = encode(read(shop, typed.sample(frac=1, random_state=0)), shop / "dataset", space, NAME)
    learnt = shards.load_lists(shop / "encoded", "train")
    judged = set(everyone.user_id[everyone.split != "train"]) | set(shards.load_lists(shop / "encoded", "dev").user_id)
    allowed = [row for row, user in enumerate(learnt.user_id) if user not in judged]
    assert 2 <= len(chats) == len(allowed) < len(learnt)
    rows = [sorted(map(tuple, lists.fields.tolist())) for lists in (chats.sessions, learnt.take(allowed))]
    assert rows[0] == rows[1]
    assert (chats.sessions.candidates == 3).all()


@pytest.mark.parametrize("typed", [None, [], ["a word"], ["", " ", "a word"]], ids=str)
def test_a_data_set_without_chats_is_refused_and_told_what_to_remove(typed, shop):
    data = read(shop)
    frame = (
        typed
        if typed is None
        else data.transcripts.head(len(typed)).assign(typed_query=pd.array(typed, dtype="string"))
    )
    with pytest.raises(ValueError, match=rf"{NAME} learns from chats .* Remove {NAME} from ranker\.models"):
        of_run([NAME], replace(data, transcripts=frame), shop / "dataset", shop / "encoded")


@pytest.fixture
def parts(shop, tmp_path):
    chatting.save(tmp_path / "embeddings" / "chats", of_run([NAME], read(shop), shop / "dataset", shop / "encoded"))
    lists = {part: shards.load_lists(shop / "encoded", part) for part in ("train", "dev", "valid")}
    whole = Parts(shards.load_space(shop / "encoded"), shards.load_intents(shop / "encoded"), **lists)
    return whole, parts_of_variant(whole, NAME, tmp_path / "embeddings", 0)


def test_the_ranker_is_a_two_tower_like_its_parent_and_the_same_seed_gives_the_same_bytes(parts, tmp_path):
    whole, own = parts
    both = {NAME: own, "two_tower_text": whole}
    how = {"positions": 12, "progress": False}
    for folder in ("one", "two"):
        train(dict.fromkeys(both, SETTINGS), [0], both, folder=tmp_path / folder, **how)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    trained = load_rankers(tmp_path / "one", list(both), [0])
    assert trained[NAME, 0].config == trained["two_tower_text", 0].config
    scores = [score(model, whole.valid, whole.intents) for model in trained.values()]
    assert not np.allclose(*scores)
    with pytest.raises(ValueError, match="these parts hold none"):
        train({NAME: SETTINGS}, [0], whole, folder=tmp_path / "none", **how)


def test_its_own_settings_are_params_and_are_searched(parts, monkeypatch):
    assert NAME in RANKER_NAMES
    space = space_of(NAME)
    assert set(space) == {"chat_epochs", "chat_learning_rate", "chat_temperature"}
    shared = {"dim": 16}
    settings = Ranker(
        models=[NAME, "two_tower_text"], tuned={"two_tower_text": shared, NAME: {"chat_epochs": 1}}
    ).settings()
    assert (settings[NAME].dim, settings[NAME].chat_epochs) == (16, 1)
    assert all(hasattr(settings[NAME], key) for key in space)
    monkeypatch.setattr("rgalign.ranker.search.CHAT_SPACE", {"chat_epochs": (1, 2)})
    both = {NAME: parts[1], "two_tower_text": parts[0]}
    log, best = tune(dict.fromkeys(both, SETTINGS), both, trials=0, seed=0, positions=12, progress=False)
    tried = log[log["model"] == NAME]["chat_epochs"]
    assert sorted(tried) == [1, 2]
    assert len(grid(space)) == 12
    assert best[NAME] == best["two_tower_text"].model_copy(update={"chat_epochs": tried.iloc[0]})
