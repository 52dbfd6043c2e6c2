"""The GPU's rows: what they count, worked out here on the CPU at a tiny size. Their speed is a GPU's to say."""

import numpy as np
import pytest
import torch

from benchmarks import embedding, gpu, peers
from rgalign.data.encode import encode_intents, encode_lists
from rgalign.data.features import fit_space
from rgalign.ranker.train import Parts
from rgalign.shopworld import world

pytestmark = pytest.mark.slow

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 2000, "max_position_embeddings": 256,
}  # fmt: skip
TINY = {"shape": SHAPE, "prompts": 12, "tokens": (45, 60), "lists": 96, "lists_per_step": (32,)}
WEIGHTS = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 32 + 2 * 8) + 32  # of two layers and the last norm


@pytest.fixture(scope="module")
def task():
    return embedding.small_task(hidden=16, layers=1, sessions=200)


@pytest.fixture(scope="module")
def parts() -> Parts:
    shop = world.generate(seed=0, sessions=300, users=100, transcripts=0)
    train = shop.sessions[shop.sessions["split"] == "train"]
    shown = shop.impressions[shop.impressions["session_id"].isin(train["session_id"])]
    space = fit_space(train, shop.intents, shown, shop.kinds)
    train, dev = (encode_lists(space, train, shown, shop.intents, part) for part in ("train", "dev"))
    return Parts(space, encode_intents(space, shop.intents), train, dev, dev)


def test_without_a_device_every_row_is_there_and_says_so(task, parts, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows = peers.table(gpu.rows(task, parts))
    assert len(rows) == 3 + len(gpu.LISTS_PER_STEP)
    assert (rows["peer_version"] == gpu.MISSING).all()
    assert rows[["ours", "theirs", "ratio", "equal"]].isna().all(axis=None)


def test_a_rate_counts_two_operations_a_weight_and_real_token(task, parts, monkeypatch):
    monkeypatch.setattr(gpu, "_seconds", lambda work, *_, **__: [work(), 2.0][1])
    monkeypatch.setattr(gpu.Clock, "seconds", 0.5)
    rows = peers.table(gpu.rows(task, parts, device="cpu", ceilings=(1e12, 1e12), **TINY))
    reached = rows.set_index(rows["name"].str.split(",").str[0])["ours"]
    tokens = sum(map(len, gpu.random_prompts(task, 12, (45, 60), 0)))
    assert reached["embedding"] * 1e12 == pytest.approx(2 * WEIGHTS * tokens / 2.0)
    in_bytes = 2 * (WEIGHTS + 2000 * 32)  # bfloat16, tied vocabulary once
    assert reached["writing"] * 1e12 * 2.0 / in_bytes == pytest.approx(24)  # steps of one batch: each reads all weights
    first = gpu.random_prompts(task, 12, (45, 60), 0)[:3]  # a step each, with 12 words and the end behind
    a_step = sum(len(prompt) + 13 for prompt in first) / 3
    # frozen weights: 2 a weight forwards, 2 for the states' gradient, none for their own, none for what is made again
    assert reached["RG-SFT"] * 1e12 == pytest.approx(4 * WEIGHTS * a_step / 0.5)
    assert (rows["ratio"] == rows["ours"] / rows["theirs"]).all()
    assert (rows["ours"] > 0).all()


def test_prompts_share_the_instruction_and_have_the_lengths_asked_for(task):
    ids = gpu.random_prompts(task, 50, (45, 60), seed=1)
    lengths = np.array([len(prompt) for prompt in ids])
    assert lengths.min() >= 45
    assert lengths.max() <= 60
    assert {tuple(prompt[: len(task.prompter.head)]) for prompt in ids} == {tuple(task.prompter.head)}


def test_ceilings_are_rates_of_the_work_they_name(monkeypatch):
    monkeypatch.setattr(gpu, "_seconds", lambda work, repeats: [work(), 0.5][1])
    assert gpu.matrix_peak("cpu", size=16, repeats=1) == 2 * 16**3 / 0.5
    assert gpu.copy_bandwidth("cpu", size=1000, repeats=1) == 2 * 1000 / 0.5
