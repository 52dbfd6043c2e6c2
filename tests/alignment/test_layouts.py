"""Two queries behind one prompt say what each says alone, and teach the same; a model that looks past a mask is met."""

import pytest
import small_pairs
import torch
from small_pairs import CHOSEN, PROMPTS, REJECTED
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from rgalign.alignment.logprobs import PREFIX_SHARED, SEPARATE, layout_for
from rgalign.reasoner.batches import documents
from rgalign.reasoner.trainer import CHECKPOINTING

ROWS = [
    {"documents": list(both)} for both in zip(documents(PROMPTS, CHOSEN), documents(PROMPTS, REJECTED), strict=True)
]
SMALL = dict(vocab_size=24, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4)


def qwen3(**_):
    return small_pairs.reasoner().model


def llama(**how):  # several heads of queries share one of keys
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, initializer_range=0.5, **how))


def gpt2(**_):  # positions are learnt
    return GPT2LMHeadModel(GPT2Config(vocab_size=24, n_embd=16, n_layer=2, n_head=2, n_positions=16))


def falcon(**_):  # its biases are made of a mask of two dimensions
    return FalconForCausalLM(
        FalconConfig(vocab_size=24, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, alibi=True)
    )


def mistral(**how):
    return MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=2, initializer_range=0.5, **how))


def mamba(**_):  # its state is carried along, and no mask hides what it has read
    return FalconMambaForCausalLM(FalconMambaConfig(vocab_size=24, hidden_size=16, num_hidden_layers=1, state_size=4))


def made(model, **how):
    torch.manual_seed(0)
    return model(**how).eval()


def alone(model, prompt: list[int], query: list[int]) -> float:
    """log p(query | prompt) of one document without padding, from all its logits."""
    log_p = model(input_ids=torch.tensor([[*prompt, *query]])).logits[0].log_softmax(-1)
    return sum(float(log_p[len(prompt) + place - 1, token]) for place, token in enumerate(query))


@pytest.mark.parametrize("layout", [SEPARATE, PREFIX_SHARED], ids=["separate", "prefix shared"])
@pytest.mark.parametrize("model", [qwen3, llama, gpt2, mistral])
def test_each_query_is_as_likely_as_it_is_alone(model, layout):
    model = made(model, **({"sliding_window": None} if model is mistral else {}))
    with torch.no_grad():
        found = layout.log_probabilities(model, layout.collate(ROWS, 0))
        expected = [
            alone(model, *document) for queries in (CHOSEN, REJECTED) for document in zip(PROMPTS, queries, strict=True)
        ]
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected, abs=1e-4)
    assert layout_for(model, ROWS, pad=0) is PREFIX_SHARED


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_is_that_of_two_documents(checkpointing):
    weight = torch.linspace(-1, 1, 2 * len(ROWS))
    found = []
    for layout in (SEPARATE, PREFIX_SHARED):
        model = made(llama).double().train()
        if checkpointing:
            getattr(model, f"{CHECKPOINTING}_enable")()
        (layout.log_probabilities(model, layout.collate(ROWS, 0)) * weight).sum().backward()
        found.append([value.grad for value in model.parameters()])
    for separate, shared in zip(*found, strict=True):
        torch.testing.assert_close(shared, separate, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("model", "how"),
    [(llama, {"attn_implementation": "eager"}), (mistral, {"sliding_window": 4}), (mamba, {}), (falcon, {})],
    ids=["a mask of other numbers", "a sliding window", "a state", "a mask of two dimensions"],
)
def test_who_looks_past_the_mask_reads_the_prompt_twice(model, how):
    assert layout_for(made(model, **how), ROWS, pad=0) is SEPARATE


def test_who_drops_the_mask_is_found_out_by_what_it_says():
    model = made(llama)
    forward = model.forward
    model.forward = lambda *given, attention_mask=None, **more: forward(*given, **more)
    assert layout_for(model, ROWS, pad=0) is SEPARATE


def test_no_position_is_past_the_documents():
    """A short row beside a long one: with its padding it is longer than the model's 16 places."""
    prompts, chosen, rejected = [[4] * 10, [5]], [[6] * 6, [7]], [[8] * 6, [9, 9]]
    sides = [documents(prompts, queries) for queries in (chosen, rejected)]
    rows, model = [{"documents": list(both)} for both in zip(*sides, strict=True)], made(gpt2)
    with torch.no_grad():
        found = PREFIX_SHARED.log_probabilities(model, PREFIX_SHARED.collate(rows, 0))
        expected = [
            alone(model, *document) for queries in (chosen, rejected) for document in zip(prompts, queries, strict=True)
        ]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


def test_trying_leaves_the_model_in_its_mode():
    model = made(llama).train()
    layout_for(model, ROWS, pad=0)
    assert model.training


def test_a_row_is_as_wide_as_its_batch():
    for layout in (SEPARATE, PREFIX_SHARED):
        for row in ROWS:
            tokens, documents = layout.width(row)
            assert layout.collate([row], 0)["ids"].shape == (documents, tokens)
