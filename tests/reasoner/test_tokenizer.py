"""The tiny tokenizer: deterministic, one token a value, and the same words as the prompts."""

from collections import Counter

import pandas as pd
import pyarrow as pa
import pytest
from transformers import AutoTokenizer

from rgalign.reasoner.prompts import ASK, Prompter
from rgalign.reasoner.tiny import END, PAD, UNKNOWN, build_tokenizer, count_words
from rgalign.run.artifacts import digest

MAP = pd.ArrowDtype(pa.map_(pa.string(), pa.string()))
KINDS = {"state": "categorical", "days": "numeric", "recent": "history", "note": "text", "hidden": "text"}
SHOWN = ["state", "days", "recent", "note"]
KB = pd.DataFrame({"intent_id": ["a", "b"], "title": ["Track it", "Log in"], "description": ["Where is it?", None]})
SESSIONS = pd.DataFrame(
    {
        "session_id": ["s0", "s1"],
        "split": ["train", "train"],
        "state": ["to ship", "paid"],
        "days": [7.0, None],
        "recent": [["a", "shoes"], None],
        "note": ["My parcel: where?", ""],
        "hidden": ["secret words", None],
    }
)
TRANSCRIPTS = pd.DataFrame(
    {"features": pd.array([{"sta_code": "x1", "hidden": "secret"}], MAP), "typed_query": ["Hi, where is my parcel?"]}
)


def words():
    return count_words(features=SHOWN, kinds=KINDS, intents=KB, sessions=SESSIONS, transcripts=TRANSCRIPTS)


def test_vocabulary_is_by_falling_count_then_by_name():
    tokenizer = build_tokenizer(Counter({"b": 3, "a": 3, "c": 9, "rare": 1}))
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == [PAD, UNKNOWN, ASK, END, "c", "a", "b"]
    assert (tokenizer.pad_token, tokenizer.unk_token, tokenizer.eos_token) == (PAD, UNKNOWN, END)


def test_two_builds_give_the_same_bytes_in_whatever_order_the_words_came(tmp_path):
    counts = words()
    build_tokenizer(counts).save_pretrained(tmp_path / "one")
    build_tokenizer(dict(reversed(counts.items()))).save_pretrained(tmp_path / "two")
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert loaded.get_vocab() == build_tokenizer(counts).get_vocab()


def test_no_word_that_was_counted_is_unknown_in_a_prompt():
    tokenizer = build_tokenizer(words(), min_count=1)
    prompter = Prompter(tokenizer, features=SHOWN, kinds=KINDS, titles={"a": "Track it"})
    prompts, queries = prompter.transcripts(TRANSCRIPTS)
    everything = [*prompter.sessions(SESSIONS), *prompter.intents(KB), *prompts, *queries]
    assert all(tokenizer.unk_token_id not in ids for ids in everything)
    assert tokenizer.convert_ids_to_tokens(prompts[0]) == ["sta_code=x1", ASK]


def test_words_that_are_not_shown_are_not_counted():
    assert not {"secret", "hidden:"} & set(words())
    assert words()["track"] == 3  # twice for the KB, once in the history


def test_faults():
    with pytest.raises(ValueError, match=r"train alone; these sessions have split \['test'\]"):
        count_words(features=SHOWN, kinds=KINDS, intents=KB, sessions=SESSIONS.assign(split=["train", "test"]))
    with pytest.raises(ValueError, match="no vocabulary to build"):
        build_tokenizer({"once": 1})
