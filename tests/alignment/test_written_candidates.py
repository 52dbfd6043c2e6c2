"""Every model's own prompts, its greedy query and its samples; nothing moves when another model is beside it."""

import pandas as pd
import pytest
from small_pairs import TOKENIZER, reasoner
from small_rewards import lists

from rgalign.alignment.candidates import COLUMNS, assert_sessions_of, generate_candidates, nonempty
from rgalign.reasoner import generate
from rgalign.reasoner.model import Reasoner, ReasonerError
from rgalign.reasoner.prompts import Prompter

KINDS = {"asked": "text", "said": "text"}
SESSIONS = pd.DataFrame(
    {"session_id": ["s9", "s1", "s5"], "asked": ["w1 w2 w3", "w4", "w5 w6"], "said": ["w7", "w8 w9", "w10"]}
)
MODELS = {"zeta": reasoner(0), "alpha": reasoner(1)}
PROMPTERS = {name: Prompter(TOKENIZER, features=[one], kinds=KINDS) for name, one in zip(MODELS, KINDS, strict=True)}
HOW = dict(samples=6, max_new_tokens=4, seed=3, progress=False)


def test_every_session_has_every_models_greedy_query_and_samples():
    table = generate_candidates(MODELS, PROMPTERS, SESSIONS, **HOW)
    assert table.columns.tolist() == COLUMNS
    order = table[["session_id", "source"]].drop_duplicates().to_numpy().tolist()
    assert order == [[session, source] for session in ("s9", "s1", "s5") for source in ("zeta", "alpha")]
    for _, own in table.groupby(["session_id", "source"]):
        assert own["candidate"].tolist() == list(range(-1, len(own) - 1))
        assert own["count"].iloc[1:].sum() == HOW["samples"]
        assert own["query"].iloc[1:].is_unique
    greedy = table[(table["source"] == "alpha") & (table["candidate"] == -1)]
    prompts = PROMPTERS["alpha"].sessions(SESSIONS)
    expected = generate.greedy(MODELS["alpha"], PROMPTERS["alpha"], prompts, max_new_tokens=4, progress=False)
    for name in ("query", "log_probability", "tokens", "count"):
        assert greedy[name].tolist() == expected[name].tolist()


def test_a_models_queries_depend_on_seed_and_name_alone():
    both = generate_candidates(MODELS, PROMPTERS, SESSIONS, **HOW)
    assert both.equals(generate_candidates(MODELS, PROMPTERS, SESSIONS, **HOW))
    alone = generate_candidates({"alpha": MODELS["alpha"]}, PROMPTERS, SESSIONS, **HOW)
    assert alone.equals(both[both["source"] == "alpha"].reset_index(drop=True))
    models = {"zeta": MODELS["zeta"], "twin": MODELS["zeta"]}
    twin = generate_candidates(models, {**PROMPTERS, "twin": PROMPTERS["zeta"]}, SESSIONS, **HOW)
    by_source = [twin[twin["source"] == name]["query"].tolist() for name in ("zeta", "twin")]
    assert by_source[0] != by_source[1]
    assert not both.equals(generate_candidates(MODELS, PROMPTERS, SESSIONS, **{**HOW, "seed": 4}))


def test_an_encoder_writes_no_candidates():
    encoder = Reasoner("embedder", "encoder", MODELS["zeta"].model, TOKENIZER)
    with pytest.raises(ReasonerError, match="embedder is an encoder"):
        generate_candidates({"zeta": encoder}, PROMPTERS, SESSIONS, **HOW)


def test_sessions_of_another_part_are_strangers():
    train = lists("train", 5)
    assert_sessions_of("here", ["train1", "train4", "train1"], train=train)
    with pytest.raises(ValueError, match=r"here refuses: 2 sessions are not of part train \(first: 'dev0'\)"):
        assert_sessions_of("here", ["train1", "valid3", "dev0"], train=train)
    with pytest.raises(ValueError, match="holds lists of part 'dev'"):
        assert_sessions_of("here", [], train=lists("dev", 5))


def test_a_query_of_blanks_says_nothing():
    assert nonempty(pd.DataFrame({"query": ["", " \n", "w1"]})).tolist() == [False, False, True]
