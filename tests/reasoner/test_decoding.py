"""Queries with a cache and without, whatever a model keeps of its prompt, against a full pass for every token."""

import pandas as pd
import pytest
import small_models
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    Gemma3TextConfig,
    Lfm2Config,
    LlamaConfig,
    MiniMaxConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
)

from rgalign.reasoner import generate
from rgalign.reasoner.embed import embed
from rgalign.reasoner.generate import Cached, Whole, begin
from rgalign.reasoner.model import load
from rgalign.reasoner.prompts import Prompter

SIZE = dict(vocab_size=small_models.WORDS + 3, hidden_size=32, num_hidden_layers=2, intermediate_size=48)
SIZE |= dict(num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
LINEAR = dict(head_dim=8, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8)
LINEAR |= dict(linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"])
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)
MAMBA = dict(head_dim=8, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8)
CONFIGS = {
    "keys and values": (LlamaConfig(**SIZE), Cached),
    "sliding windows": (Gemma3TextConfig(**SIZE, head_dim=8, sliding_window=6), Cached),
    "convolutions": (Lfm2Config(**SIZE, layer_types=["conv", "full_attention"]), Cached),
    "linear attention": (Qwen3_5TextConfig(**SIZE, **LINEAR), Cached),
    "linear attention and experts": (Qwen3NextConfig(**SIZE, **LINEAR, **EXPERTS), Cached),
    "Mamba beside attention": (FalconH1Config(**SIZE, **MAMBA, mamba_chunk_size=16), Cached),
    "a cache of its own": (MiniMaxConfig(**SIZE, head_dim=8, num_local_experts=2, block_size=16), Whole),
    "no cache": (
        RecurrentGemmaConfig(**{**SIZE, "num_hidden_layers": 3}, lru_width=32, attention_window_size=16),
        Whole,
    ),
}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [7, 20, 30], [9], [30, 31, 32, 33, 34, 35]]


@pytest.fixture(params=CONFIGS, scope="module")
def case(request, tmp_path_factory):
    """(reasoner, the kind of state that it is read with)"""
    folder = tmp_path_factory.mktemp("model")
    config, state = CONFIGS[request.param]
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for weight in plain.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    plain.save_pretrained(folder)
    small_models.tokenizer().save_pretrained(folder)
    return load(str(folder)), state


def prompter(reasoner):
    return Prompter(reasoner.tokenizer, features=["a"], kinds={"a": "text"}, layout="lines", ends=reasoner.ends)


def by_hand(reasoner, prompt, end, new):
    """Greedy, every token by a pass over all before it: its tokens and their log-probability."""
    ids, total = list(prompt), 0.0
    for _ in range(new):
        with torch.inference_mode():
            log_p = reasoner.model(torch.tensor([ids]), use_cache=False).logits[0, -1].double().log_softmax(-1)
        ids.append(int(log_p.argmax()))
        total += float(log_p[ids[-1]])
        if ids[-1] == end:
            break
    return ids[len(prompt) :], total


def test_greedy_queries_are_those_of_full_passes(case):
    reasoner, _ = case
    own = prompter(reasoner)
    for budget in (None, 20):  # all at once, padded; and nearly one by one
        found = generate.greedy(reasoner, own, PROMPTS, max_new_tokens=5, tokens_per_batch=budget, progress=False)
        for prompt, row in zip(PROMPTS, found.itertuples(), strict=True):
            tokens, log_probability = by_hand(reasoner, prompt, 2, 5)
            assert row.tokens == len(tokens)
            assert row.query == own.text(tokens)
            assert row.log_probability == pytest.approx(log_probability, abs=1e-3)


def test_samples_do_not_depend_on_the_batch(case):
    reasoner, _ = case
    how = dict(samples=3, max_new_tokens=5, seed=1, progress=False)
    own = prompter(reasoner)
    together = generate.sample(reasoner, own, PROMPTS, **how)
    alone = generate.sample(reasoner, own, PROMPTS, tokens_per_batch=1, **how)
    pd.testing.assert_frame_equal(together, alone, rtol=1e-3)
    assert together["query"].nunique() > len(PROMPTS)


def test_a_cache_is_used_where_it_can_be(case):
    reasoner, state = case
    ids, mask = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10]]), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    with torch.inference_mode():
        assert type(begin(reasoner.model, ids, mask)) is state


def test_a_shared_beginning_leaves_vectors_as_they_are(case):
    reasoner, _ = case
    sequences = [[5, 6, 7, 8, 9], [5, 6, 7, 20], [5, 6, 7, 30, 31, 32]]
    whole, shared = (embed(reasoner, sequences, prefix=prefix, progress=False) for prefix in (0, 3))
    assert shared == pytest.approx(whole, abs=1e-4)
    for sequence, vector in zip(sequences, whole, strict=True):
        with torch.inference_mode():
            states = reasoner.trunk(torch.tensor([sequence]), use_cache=False).last_hidden_state
        assert vector == pytest.approx(states[0, -1].numpy(), abs=1e-4)


def test_a_cache_that_mixes_rows_up_is_found_out_and_told_once(caplog):
    """One that says it is made of other layers, and repeats the first row for all."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZE)).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    forward = model.forward

    def mixing(*arguments, **named):
        out = forward(*arguments, **named)
        cache = out.past_key_values
        if cache is not None and type(cache).__name__ != "Mixed":
            kind = type(cache)
            cache.__class__ = type("Mixed", (kind,), {"reorder_cache": lambda c, rows: kind.reorder_cache(c, 0 * rows)})
        return out

    model.forward = mixing
    ids, mask = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]]), torch.ones(2, 4, dtype=torch.long)
    with torch.inference_mode():
        assert [type(begin(model, ids, mask)) for _ in range(2)] == [Whole, Whole]
    assert caplog.text.count("written without a cache") == 1
