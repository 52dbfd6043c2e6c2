"""The reasoner's benchmark rows at a tiny size: their columns, and that both sides did the same work. Never speed."""

import math

import pytest

from benchmarks import embedding, peers

pytestmark = pytest.mark.slow

SAMPLING = {"prompts": 3, "samples": 2, "max_new_tokens": 4, "rounds": 1}


@pytest.fixture(scope="module")
def task():
    return embedding.small_task(hidden=16, layers=1, sessions=200)


def test_embedding_rows_have_equal_vectors_in_every_batch_size(task):
    rows = peers.table(embedding.embedding_rows(task, prompts=12, texts=9, rounds=1))
    assert tuple(rows.columns) == peers.COLUMNS
    assert len(rows) == 2 * len(embedding.ENCODER_BATCHES)
    assert rows["equal"].notna().all()
    assert rows["equal"].all()
    assert (rows["unit"] == "texts/s").all()
    assert (rows["ratio"] - rows["ours"] / rows["theirs"]).abs().max() < 1e-9


def test_other_vectors_are_not_equal(task, monkeypatch):
    embed = embedding.embed
    monkeypatch.setattr(embedding, "embed", lambda *given, **how: embed(*given, **how) + 2e-4)
    rows = peers.table(embedding.embedding_rows(task, prompts=3, texts=3, rounds=1))
    assert not rows["equal"].any()


def test_the_prompts_share_their_head_and_are_the_same_ids_as_text(task):
    ids, head = task.prompter.sessions(task.sessions), list(task.prompter.head)
    assert len(head) > 30
    assert all(prompt[: len(head)] == head for prompt in ids)
    words = task.reasoner.tokenizer
    texts = [" ".join(words.convert_ids_to_tokens(prompt)) for prompt in ids]
    assert words(texts)["input_ids"] == ids
    assert words.unk_token_id not in {token for prompt in ids for token in prompt}


def test_sampling_writes_as_many_queries_and_tokens_as_the_peer(task):
    (found,) = embedding.sampling_rows(task, **SAMPLING)
    assert tuple(found) == peers.COLUMNS
    assert found["equal"] is True
    assert found["unit"] == "queries/s"


def test_a_peer_that_is_not_installed_is_shown_as_missing(task, monkeypatch):
    monkeypatch.setattr(embedding, "installed", lambda package: None)
    rows = embedding.embedding_rows(task, prompts=3, texts=3, rounds=1)
    rows = peers.table(rows + embedding.sampling_rows(task, **SAMPLING))
    assert len(rows) == 5
    assert (rows["peer_version"] == peers.MISSING).all()
    assert rows[["theirs", "ratio", "equal"]].isna().all(axis=None)
    assert rows["ours"].map(math.isfinite).all()
