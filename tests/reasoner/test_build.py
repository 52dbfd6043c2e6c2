"""From params to models and vectors: what is built, what is refused, and that vectors do not depend on company."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from rgalign.params_schema import OtherModel, Params, Reasoner
from rgalign.reasoner import build, prompts
from rgalign.reasoner.model import ReasonerError, fingerprint

SMALL = {"hidden": 16, "layers": 1, "heads": 2, "min_count": 1}


@pytest.fixture(scope="module")
def recipe() -> build.Recipe:
    own = Params().reasoner.model_dump()
    own |= {"seed": 5, "tiny": SMALL, "pretraining": {**own["pretraining"], "epochs": 0.2}}
    return build.Recipe(Reasoner(**own))


@pytest.fixture(scope="module")
def models(recipe, shop, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    build.build_models(recipe, shop, {"prompt", "kb_lm"}, folder=folder / "built", work=folder / "work")
    return build.load_models(recipe, folder / "built")


WAYS = ("prompt", "prompt_query", "random_lm", "no_text", "kb_lm", "lsa", "mean")


@pytest.mark.parametrize("name", WAYS)
def test_a_session_has_the_same_vector_alone_as_among_others(name, recipe, models, shop, tmp_path):
    way = build.embedding(name, recipe, models, shop)
    among = way.sessions(shop.sessions.head(20), tmp_path / "among")
    alone = way.sessions(shop.sessions.iloc[[7]], tmp_path / "alone")
    np.testing.assert_allclose(alone.values[0].astype(float), among.values[7].astype(float), atol=2e-3)
    assert way.intents(shop.intents, tmp_path / "intents").dim == among.dim


def test_the_ways_differ(recipe, models, shop, tmp_path):
    made = {n: build.embedding(n, recipe, models, shop).sessions(shop.sessions.head(5), tmp_path / n) for n in WAYS}
    values = [vectors.values.astype(float).tobytes() for vectors in made.values()]
    assert len(set(values)) == len(WAYS)


def test_the_prompt_without_text_holds_no_word_of_a_text(recipe, models, shop):
    main = models["main"]
    kinds = {kind for kind in recipe.prompter(shop, main, texts=False).explain(shop.sessions.iloc[0])["kind"]}
    assert "text" not in kinds
    assert "text" in set(recipe.prompter(shop, main).explain(shop.sessions.iloc[0])["kind"])


def test_models_have_their_own_seeds_and_sizes_and_repeat(recipe, shop, tmp_path):
    others = [OtherModel(seed=6, tiny={**SMALL, "hidden": 32})]
    two = replace(recipe, settings=recipe.settings.model_copy(update={"others": others}))
    for run in ("one", "two"):
        build.build_models(two, shop, {"prompt"}, folder=tmp_path / run, work=tmp_path / "work")
    one, again = (build.load_models(two, tmp_path / run) for run in ("one", "two"))
    assert (one["main"].hidden_size, one["other-1"].hidden_size) == (16, 32)
    assert {n: fingerprint(m) for n, m in one.items()} == {n: fingerprint(m) for n, m in again.items()}


def test_a_prompt_weight_that_is_set_is_obeyed(recipe, shop, tmp_path):
    assert [build.prompt_weight(None, asked=asked) for asked in (True, False)] == [0.0, 1.0]
    mute, prints = replace(shop, transcripts=None), []
    for number, weight in enumerate((None, 1.0, 0.0)):
        pretraining = recipe.settings.pretraining.model_copy(update={"prompt_weight": weight})
        own = recipe.settings.model_copy(update={"pretraining": pretraining})
        folder, put = tmp_path / str(number), replace(recipe, settings=own)
        build.build_models(put, mute, {"prompt"}, folder=folder, work=tmp_path / "work")
        prints.append(fingerprint(build.load_models(put, folder)["main"]))
    assert prints[0] == prints[1] != prints[2]


def test_the_words_of_an_instruction_are_in_the_tiny_vocabulary(recipe, shop, tmp_path):
    told = replace(recipe, settings=recipe.settings.model_copy(update={"instruction": "Quoth the zebra"}))
    build.build_models(told, shop, {"prompt"}, folder=tmp_path / "built", work=tmp_path / "work")
    main = build.load_models(told, tmp_path / "built")["main"]
    assert main.tokenizer.convert_ids_to_tokens(told.prompter(shop, main).head) == ["quoth", "the", "zebra"]


def test_without_transcripts_the_model_reads_the_kb_and_train_alone(recipe, models, shop, tmp_path):
    mute = replace(shop, transcripts=None)
    main = models["main"]
    put = recipe.prompter(mute, main)
    for prompt, said in zip(*build._documents(mute, put), strict=True):
        assert [*put.head, *said[:-1], *put.tail] == prompt, "a session says itself"
        assert said[-1] == put.end_id
    curves = build.build_models(recipe, mute, {"prompt"}, folder=tmp_path / "built", work=tmp_path / "work")
    assert curves["loss"].iloc[-1] < curves["loss"].iloc[0]


def test_what_was_typed_after_train_is_never_read(recipe, shop, tmp_path):
    """Own logs: transcripts that name sessions. The same model comes out whatever was typed in valid."""
    split = ["train"] * 250 + ["valid"] * (len(shop.sessions) - 250)
    own = replace(shop, sessions=shop.sessions.assign(split=split))
    ids = own.sessions["session_id"].iloc[200:]
    prints = []
    for late in ("my parcel is late", "zebra zebra zebra"):
        typed = ["where is it"] * 50 + [late] * (len(ids) - 50)
        typed = pd.DataFrame({"session_id": ids.to_numpy(), "typed_query": typed})
        folder = tmp_path / late
        build.build_models(recipe, replace(own, transcripts=typed), {"prompt"}, folder=folder, work=tmp_path / "work")
        prints.append(fingerprint(build.load_models(recipe, folder)["main"]))
    assert prints[0] == prints[1]


def test_an_intent_that_enters_after_train_is_not_read_beforehand(recipe, shop, tmp_path):
    later = shop.sessions["timestamp"].max() + pd.Timedelta(days=1)
    prints = []
    for title in ("Speed up a drone", "Nothing of the kind"):
        intents = shop.intents.copy()
        intents.loc[3, ["title", "valid_from"]] = [title, later]
        folder = tmp_path / title
        build.build_models(recipe, replace(shop, intents=intents), {"prompt"}, folder=folder, work=tmp_path / "work")
        prints.append(fingerprint(build.load_models(recipe, folder)["main"]))
    assert prints[0] == prints[1]


def test_a_pretrained_model_has_no_control_that_read_the_kb_alone(recipe, shop, tmp_path):
    hub = replace(recipe, settings=recipe.settings.model_copy(update={"model": "some/model"}))
    with pytest.raises(ReasonerError, match=r"need reasoner\.model tiny"):
        build.build_models(hub, shop, {"kb_lm"}, folder=tmp_path / "built", work=tmp_path / "work")


def test_unknown_and_dropped_features_never_enter_a_prompt(recipe, shop):
    with pytest.raises(ValueError, match="did you mean 'order_status'"):
        prompts.shown_features(["order_statu"], shop.meta)
    with pytest.raises(ValueError, match="'order_status': shown more than once"):
        prompts.shown_features(["order_status", "order_status"], shop.meta)
    shown = prompts.shown_features(None, shop.meta, drop=("order_status",))
    assert "order_status" not in shown
    with pytest.raises(ValueError, match="leave no column"):
        prompts.shown_features(["order_status"], shop.meta, drop=("order_status",))
