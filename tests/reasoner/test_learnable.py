"""What a language model may learn from, against sets made by hand."""

from dataclasses import replace
from functools import partial

import pandas as pd
import pytest

from rgalign.data import shards, tables
from rgalign.data.schema import SPLITS
from rgalign.data.split import development_users
from rgalign.params_schema import Params, Reasoner
from rgalign.reasoner import build
from rgalign.reasoner.build import learnable
from rgalign.shopworld import world

DEVELOPMENT = partial(development_users, share=0.3, seed=1)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """(folder, encoded): a log of returning users, each of whose sessions has a transcript with a word of its own;
    five more transcripts are of no session."""
    folder = tmp_path_factory.mktemp("shop")
    drawn = world.generate(seed=5, sessions=400, users=150, transcripts=5)
    ids = drawn.sessions["session_id"]
    typed = pd.DataFrame({"session_id": ids, "typed_query": [f"word{row}" for row in range(len(ids))]})
    transcripts = pd.concat([typed, drawn.transcripts], ignore_index=True)
    tables.write(replace(drawn, transcripts=transcripts), folder / "tables")
    how = {"development": DEVELOPMENT}
    shards.encode_folder(shards.fit_folder(folder / "tables", **how), folder / "tables", folder / "encoded", **how)
    return folder / "tables", folder / "encoded"


def test_only_train_is_learnt_from_and_no_word_of_a_user_who_is_judged(shop):
    folder, encoded = shop
    found, told = learnable(tables.read(folder), folder, encoded)
    whole = pd.read_parquet(folder / "sessions.parquet")
    train = whole[whole["split"] == "train"]
    developing = set(train["user_id"][DEVELOPMENT(train["user_id"])])
    assert set(found.sessions["session_id"]) == set(train["session_id"][~train["user_id"].isin(developing)])
    judged = developing | set(whole["user_id"][whole["split"] != "train"])
    returning = developing | set(train["user_id"]) & judged
    assert returning > developing, "some users of train come back in valid or test"
    allowed = set(train["session_id"][~train["user_id"].isin(judged)])
    named = found.transcripts["session_id"].dropna()
    assert set(named) == allowed
    assert found.transcripts["session_id"].isna().sum() == 5
    assert told == {
        "transcripts": len(allowed) + 5,
        "of development, valid or test users, left out": len(whole) - len(allowed),
    }
    assert tables.user_ids(folder, ("valid", "test")) == set(whole["user_id"][whole["split"] != "train"])


def test_documents_and_vocabulary_hold_none_of_their_words(shop):
    folder, encoded = shop
    found, _ = learnable(tables.read(folder), folder, encoded)
    own = Params().reasoner.model_dump()
    recipe = build.Recipe(
        Reasoner(**own | {"seed": 5, "tiny": {"hidden": 16, "layers": 1, "heads": 2, "min_count": 1}})
    )
    words = build._vocabulary(recipe, found)
    known = set(words.get_vocab())
    whole = pd.read_parquet(folder / "sessions.parquet").reset_index()
    allowed = set(found.transcripts["session_id"].dropna())
    kept = {
        f"word{row}" for row, session in zip(whole["index"], whole["session_id"], strict=True) if session in allowed
    }
    assert {word for word in known if word.startswith("word") and word[4:].isdigit()} == kept
    put = build.prompter(recipe.settings, found.meta, found.intents, words, drop=recipe.drop)
    prompts, asked = build._documents(found, put)
    assert len(prompts) == len(asked) == len(kept) + 5


def test_without_transcripts_there_is_nothing_to_count(shop, tmp_path):
    folder, encoded = shop
    mute = replace(tables.read(folder, splits=SPLITS), transcripts=None)
    tables.write(mute, tmp_path / "mute")
    found, told = learnable(tables.read(tmp_path / "mute"), tmp_path / "mute", encoded)
    assert told == {}
    assert found.transcripts is None
    assert set(found.sessions["split"]) == {"train"}
