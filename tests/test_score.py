"""A run directory made by hand, loaded to serve, against the model asked directly."""

import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from data.builders import good_meta, good_tables
from reasoner import small_models
from table_changes import write_raw

from rgalign import serve
from rgalign.data.schema import to_frame
from rgalign.params import dump
from rgalign.params import load as load_params
from rgalign.reasoner import prompts
from rgalign.reasoner.generate import greedy
from rgalign.reasoner.model import fingerprint, name_source, save, tiny
from rgalign.reasoner.tiny import build_tokenizer, count_words
from rgalign.run.artifacts import ArtifactError, write_text

OVERRIDES = {"reasoner.queries.max_new_tokens": 5, "data.features.drop": ["amount"]}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("outputs") / "shop"
    meta = good_meta()
    kinds = dict(meta["features"])
    frames = {name: to_frame(table) for name, table in good_tables().items()}
    write_raw(run / serve.DATASET, good_tables(), meta)
    write_text(run / serve.PARAMS, dump(load_params("params/smoke.yaml", OVERRIDES)))
    counts = count_words(features=list(kinds), kinds=kinds, intents=frames["intents"], transcripts=None)
    save(tiny(build_tokenizer(counts), hidden=16, layers=1, heads=2, seed=0), run / serve.REASONER)
    return run


@pytest.fixture
def sessions():
    return to_frame(good_tables()["sessions"])


def test_queries_are_those_of_the_runs_own_model_and_prompt(run, sessions):
    scorer = serve.load(run)
    found = scorer.queries(sessions)
    assert list(found) == ["session_id", "query", "log_probability"]
    assert found.session_id.tolist() == sessions.session_id.tolist()
    assert scorer.prompter.features == ["state", "note", "visited"], "dropped columns are not shown"
    of_reasoner = load_params(run / serve.PARAMS).reasoner
    intents = to_frame(good_tables()["intents"])
    prompter = prompts.prompter(of_reasoner, good_meta(), intents, scorer.reasoner.tokenizer, drop=["amount"])
    asked = greedy(scorer.reasoner, prompter, prompter.sessions(sessions), max_new_tokens=5, progress=False)
    assert found["query"].tolist() == asked["query"].tolist()
    np.testing.assert_array_equal(found.log_probability, asked.log_probability)
    assert asked.tokens.max() <= 5


def test_the_aligned_model_serves_where_there_is_one(run, sessions):
    with pytest.raises(ArtifactError, match="has no models/rgalign"):
        serve.load(run, aligned=True)
    before = serve.load(run)
    words = before.reasoner.tokenizer
    save(tiny(words, hidden=16, layers=1, heads=2, seed=1), run / serve.ALIGNED)
    try:
        aligned, main = serve.load(run), serve.load(run, aligned=False)
        assert fingerprint(main.reasoner) == fingerprint(before.reasoner) != fingerprint(aligned.reasoner)
    finally:
        shutil.rmtree(run / serve.ALIGNED)


def test_new_intents_are_read_by_the_model_that_read_the_others(run):
    """The one that RG-SFT and RG-DPO made, where there is one; never the one that RG-CL made of it."""
    words = serve.load(run).reasoner.tokenizer
    made = {place: tiny(words, hidden=16, layers=1, heads=2, seed=i) for i, place in enumerate(("cl", "dpo"), start=1)}
    try:
        save(made["cl"], run / serve.ALIGNED)
        (run / serve.KB_READER).mkdir()  # empty: the one before the alignment
        main = serve.load(run, aligned=False)
        assert fingerprint(serve.load(run).reads_kb()) == fingerprint(main.reads_kb()) == fingerprint(main.reasoner)
        shutil.rmtree(run / serve.KB_READER)
        save(made["dpo"], run / serve.KB_READER)
        scorer = serve.load(run)
        assert fingerprint(scorer.reads_kb()) == fingerprint(made["dpo"])
        assert fingerprint(scorer.reasoner) == fingerprint(made["cl"])
        assert fingerprint(serve.load(run, aligned=False).reads_kb()) == fingerprint(main.reasoner)
    finally:
        shutil.rmtree(run / serve.ALIGNED)
        shutil.rmtree(run / serve.KB_READER)


def test_a_run_is_served_by_its_own_model_in_its_own_dtype(run, sessions, tmp_path):
    folder = small_models.qwen3(tmp_path / "qwen")
    own = {**OVERRIDES, "reasoner.model": str(folder), "reasoner.dtype": "bfloat16"}
    write_raw(tmp_path / serve.DATASET, good_tables(), good_meta())
    write_text(tmp_path / serve.PARAMS, dump(load_params("params/smoke.yaml", own)))
    how = {"kind": "causal", "dtype": "bfloat16", "quantize": None}
    name_source(tmp_path / serve.REASONER, str(folder), **how)
    scorer = serve.load(tmp_path, device="cpu")
    assert {weight.dtype for weight in scorer.reasoner.model.parameters()} == {torch.bfloat16}
    assert scorer.prompter.layout == "lines"
    assert len(scorer.queries(sessions)) == len(sessions)


def test_plain_pandas_frames_in_any_order_of_columns_will_do(run, sessions):
    scorer = serve.load(run)
    plain = pd.DataFrame(
        {
            "visited": [["a", "b"], [], None],
            "more": 1,
            "note": ["gift", "", np.nan],
            "state": ["paid", None, "paid"],
            "session_id": [10, 11, 12],
        },
        index=[7, 7, 9],
    )
    found = scorer.queries(plain)
    assert found.session_id.tolist() == [10, 11, 12]
    assert found.index.tolist() == [0, 1, 2]
    assert found["query"][0] == scorer.queries(sessions)["query"][0]


def test_every_fault_of_a_frame_is_told_at_once(run, sessions):
    scorer = serve.load(run)
    broken = sessions.rename(columns={"state": "sate", "visited": "visitd"}).assign(session_id=["s0", None] * 5)
    with pytest.raises(ValueError, match="cannot be scored") as caught:
        scorer.queries(broken)
    for column, near in (("state", "sate"), ("visited", "visitd")):
        assert re.search(rf"sessions\.{column}  is missing.*; did you mean '{near}'\?", str(caught.value))
    assert "sessions.session_id  5 rows are empty (first: 1, 3, 5)" in str(caught.value)
    with pytest.raises(ValueError, match=r"sessions\.visited  has the type double; expected lists"):
        scorer.queries(sessions.assign(visited=1.5))
    with pytest.raises(ValueError, match="has no row; expected at least one"):
        scorer.queries(sessions.iloc[:0])


def test_a_run_that_is_not_there_is_told_with_the_command(tmp_path):
    with pytest.raises(ArtifactError, match="no run directory outputs/nowhere") as caught:
        serve.load("outputs/nowhere")
    assert "python -m rgalign run params/quickstart.yaml" in str(caught.value)
    with pytest.raises(ArtifactError, match="lacks what a scorer reads") as caught:
        serve.load(tmp_path)
    for name in (serve.PARAMS, serve.REASONER, f"{serve.DATASET}/dataset.yaml"):
        assert name in str(caught.value)


def test_a_run_without_its_reasoner_says_which_stage_makes_it(run, tmp_path):
    write_text(tmp_path / serve.PARAMS, (run / serve.PARAMS).read_text(encoding="utf-8"))
    write_raw(tmp_path / serve.DATASET, good_tables(), good_meta())
    with pytest.raises(ArtifactError) as caught:
        serve.load(tmp_path)
    assert str(caught.value).splitlines() == [
        f"{tmp_path} lacks what a scorer reads:",
        "  models/reasoner/main",
        f"To make it: python -m rgalign run {tmp_path / serve.PARAMS} --run-dir {tmp_path} --through 02",
    ]
