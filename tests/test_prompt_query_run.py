"""A run with reasoner.embed prompt_query: every place that embeds a session or an intent makes the same vector."""

import shutil

import numpy as np
import pandas as pd
import pytest
import small_run

from rgalign import serve
from rgalign.alignment.context import Context
from rgalign.alignment.contrastive import train_contrastive
from rgalign.alignment.rewarding import QueryEmbedder
from rgalign.data import tables, vectors
from rgalign.reasoner.model import fingerprint
from rgalign.run.stages import open_stage

pytestmark = pytest.mark.slow

EMBED = {"reasoner.embed": "prompt_query"}
CLOSE = {"atol": 4e-3}  # what is stored is of half precision


@pytest.fixture(scope="module")
def run(ranked, tmp_path_factory):
    run = tmp_path_factory.mktemp("prompt_query") / "run"
    shutil.copytree(ranked, run)
    for name in ("02_reasoner", "03_rankers"):
        small_run.play(name, run, EMBED)
    return run


@pytest.fixture(scope="module")
def own(run):
    return Context.of(open_stage("04_reward_model", small_run.SMOKE, run, small_run.SMALL | EMBED))


def stored(run, kind: str) -> vectors.Vectors:
    return vectors.load(run / "tables/embeddings/prompt" / kind)


def test_the_stored_vectors_are_others_than_those_of_the_prompts(run, ranked):
    for kind in ("sessions", "intents"):
        here, there = stored(run, kind), stored(ranked, kind)
        assert here.ids.tolist() == there.ids.tolist()
        assert np.abs(here.values.astype(float) - there.values.astype(float)).max() > 0.1


def test_serving_embeds_as_the_run_did(run):
    scorer = serve.load(run)
    shop = tables.read(run / serve.DATASET)
    sessions = shop.sessions[shop.sessions.split == "valid"].head(15)
    served = scorer.embed(sessions)
    expected = stored(run, "sessions").rows(sessions.session_id.tolist()).astype(float)
    np.testing.assert_allclose(served.values.astype(float), expected, **CLOSE)
    known = shop.intents.head(1)
    more = scorer.with_intents(known.assign(intent_id="new"))
    new = more.ranking.intents.text[-1].numpy().astype(float)
    np.testing.assert_allclose(new, stored(run, "intents").rows(known.intent_id.tolist())[0].astype(float), **CLOSE)
    assert set(scorer.score(sessions).session_id) == set(sessions.session_id)


def test_the_alignment_reads_the_same_vectors(run, own):
    reasoner, lists = own.main(), own.clicked_lists.take(np.arange(10))
    expected = stored(run, "sessions").rows(lists.session_id.tolist()).astype(float)
    looked = own.with_vectors_of(reasoner, lists).query.numpy()
    np.testing.assert_allclose(looked.astype(float), expected, **CLOSE)


def test_the_reward_model_reads_a_title_as_the_kb_reads_an_intent_of_that_title(run, own):
    reasoner = own.main()
    frame = pd.DataFrame({"intent_id": ["x"], "title": ["where is my parcel"], "description": [""]})
    way = own.embedding(reasoner).intents(frame, run / "work-of-a-test")
    said = QueryEmbedder(own, reasoner).queries(["where is my parcel"]).vectors
    np.testing.assert_allclose(said.values.astype(float), way.values.astype(float), **CLOSE)


def test_rg_cl_pulls_what_is_embedded(own, tmp_path):
    """Its documents are prompt, query and the mark again; the language term stands beside it."""
    start, learners = own.main(), own.clicked_lists
    best = pd.DataFrame({"session_id": learners.session_id[:5], "query": ["where is my parcel"] * 5})
    aligned, curve = train_contrastive(own, start, best, tmp_path / "cl")
    assert fingerprint(aligned) != fingerprint(start)
    assert {"contrastive", "language"} <= set(curve)
    rows = own.embedded_prompts(start, learners)
    put = own.recipe.prompter(own.shop, start)
    prompts = own.prompts(start, learners)
    assert all(tuple(row[-len(put.tail) :]) == put.tail for row in rows)
    assert all(list(row[: len(prompt)]) == list(prompt) for row, prompt in zip(rows, prompts, strict=True))
    assert any(len(row) > len(prompt) + len(put.tail) for row, prompt in zip(rows, prompts, strict=True))
