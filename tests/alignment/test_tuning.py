"""Log-probabilities against documents taken alone; adapters begin as nothing, are saved, loaded and trained on."""

import socket
from dataclasses import replace

import numpy as np
import pytest
import small_pairs
import torch
from peft import PeftModel
from small_pairs import CHOSEN, PROMPTS
from small_trainings import dpo, sft
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from rgalign.alignment.dpo import reference_log_probabilities
from rgalign.alignment.logprobs import log_probabilities
from rgalign.params_training import Lora
from rgalign.reasoner.adapter import trainable, tuned
from rgalign.reasoner.batches import documents, right_padded
from rgalign.reasoner.model import fingerprint, load, save
from rgalign.reasoner.query_loss import query_log_probabilities
from rgalign.reasoner.trainer import Engine
from rgalign.run.artifacts import digest

IDS = torch.tensor([[5, 6, 7, 2]])
LORA = Lora(**small_pairs.LORA)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    tried = []

    def refuse(*address):
        tried.append(address)  # peft makes a warning of whatever is raised
        raise OSError("the network was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert not tried


def alone(model, prompt: list[int], query: list[int]) -> float:
    """log p(query | prompt) of one document without padding, from all its logits."""
    ids = torch.tensor([[*prompt, *query]])
    log_p = model(input_ids=ids).logits[0].log_softmax(-1)
    return sum(float(log_p[len(prompt) + place - 1, token]) for place, token in enumerate(query))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("pad_is_end", [False, True])
def test_a_query_counts_by_position_though_its_end_token_is_the_pad_token(pad_is_end):
    reasoner = small_pairs.reasoner(pad_is_end=pad_is_end)
    pad = reasoner.tokenizer.pad_token_id
    assert (pad == small_pairs.END) == pad_is_end
    with torch.no_grad():
        found = query_log_probabilities(reasoner.model, right_padded(documents(PROMPTS, CHOSEN), pad))
        expected = [alone(reasoner.model, *document) for document in zip(PROMPTS, CHOSEN, strict=True)]
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    assert log_probabilities(reasoner, PROMPTS, CHOSEN, documents_per_batch=5, progress=False) == pytest.approx(
        expected, abs=1e-5
    )


def test_only_query_tokens_are_put_through_the_head_and_what_follows_it_is_the_models_own():
    config = Gemma2Config(
        vocab_size=24, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=1.5, initializer_range=1.0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model, seen = Gemma2ForCausalLM(config).eval(), []
    with torch.no_grad():
        expected = [alone(model, *document) for document in zip(PROMPTS, CHOSEN, strict=True)]
        with model.lm_head.register_forward_hook(lambda head, given, made: seen.append(made.shape[:-1].numel())):
            found = query_log_probabilities(model, right_padded(documents(PROMPTS, CHOSEN), 0))
    assert seen == [sum(map(len, CHOSEN))]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


def test_scoring_leaves_the_model_in_its_mode():
    reasoner = small_pairs.reasoner()
    reasoner.model.train()
    log_probabilities(reasoner, PROMPTS, CHOSEN, progress=False)
    assert reasoner.model.training


def test_an_adapter_changes_nothing_at_first_and_alone_is_trained():
    reasoner = small_pairs.reasoner()
    before, random_before = fingerprint(reasoner), torch.get_rng_state()
    one, same, other = (trainable(reasoner, LORA, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), random_before)
    assert fingerprint(reasoner) == before
    assert one.training
    torch.testing.assert_close(logits(one.eval()), logits(reasoner.model))
    assert {"lora_" in name for name, weight in one.named_parameters() if weight.requires_grad} == {True}
    assert (
        fingerprint(tuned(reasoner, one)) == fingerprint(tuned(reasoner, same)) != fingerprint(tuned(reasoner, other))
    )


def test_without_lora_all_weights_of_a_copy_are_trained():
    reasoner = small_pairs.reasoner()
    reasoner.model.requires_grad_(False)
    model = trainable(reasoner, None, seed=0)
    assert all(weight.requires_grad for weight in model.parameters())
    assert not any(weight.requires_grad for weight in reasoner.model.parameters())


def in_half(dtype: torch.dtype):
    reasoner = small_pairs.reasoner()
    return replace(reasoner, model=reasoner.model.to(dtype))


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision_learn_though_a_step_is_smaller_than_their_rounding(dtype, precision, tmp_path):
    start = in_half(dtype)
    before = {name: value.clone() for name, value in start.model.state_dict().items()}
    rate, how = 2e-5 if dtype == torch.float16 else 1e-4, {"seed": 0, "weight_decay": 0.0, "progress": False}
    found, curve = sft(
        start, small_pairs.PROMPTS, small_pairs.CHOSEN, folder=tmp_path, epochs=40, documents_per_batch=12,
        learning_rate=rate, neftune=0.0, engine=Engine(precision), **how,
    )  # fmt: skip
    assert curve["step"].max() == 80
    learnt = found.model.state_dict()
    assert {value.dtype for value in learnt.values()} == {dtype}, "handed on in the type that it came in"
    assert found.model.get_output_embeddings().weight is found.model.get_input_embeddings().weight
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"):
        large = before[name].abs() >= 0.25
        value = before[name][large]
        assert torch.equal(value - torch.tensor(rate, dtype=dtype), value), "where AdamW's step is lost"
        assert (learnt[name][large] != value).float().mean() > 0.5
    assert all(torch.equal(value, before[name]) for name, value in start.model.state_dict().items())


def test_pairs_are_learnt_in_float32_against_a_reference_of_half_precision(tmp_path):
    start, types = in_half(torch.bfloat16), []

    class Onlooker(small_pairs.Onlooker):
        def __call__(self, reasoner, step: int) -> bool:
            types.append({value.dtype for value in reasoner.model.parameters()})
            return False

    given = small_pairs.pairs()
    reference = reference_log_probabilities(start, given)
    found, curve = dpo(
        start, given, reference=reference, folder=tmp_path, watch=Onlooker(), watch_steps=8, **small_pairs.SETTINGS
    )
    assert types == [{torch.float32}] * 3
    assert {value.dtype for value in found.model.parameters()} == {torch.bfloat16}
    assert curve["margin"].iloc[-1] > curve["margin"].iloc[0]


def moved(reasoner, lora):
    """The reasoner after something like training: what can be trained is somewhere else."""
    model = trainable(reasoner, lora, seed=0)
    with torch.no_grad():
        for number, (_, weight) in enumerate(model.named_parameters()):
            if weight.requires_grad:
                weight += torch.from_numpy(np.random.default_rng(number).normal(size=weight.shape) / 3).float()
    return tuned(reasoner, model)


@pytest.fixture
def base(tmp_path):
    """A base model with a name, as any that is loaded has: peft would look for it on the hub."""
    save(small_pairs.reasoner(), tmp_path / "base")
    return load(str(tmp_path / "base"))


@pytest.fixture
def adapter(base, tmp_path):
    reasoner = moved(base, LORA)
    save(reasoner, tmp_path / "adapter")
    return reasoner


def test_an_adapter_is_saved_alone_and_loaded_on_its_base(adapter, tmp_path):
    assert not list((tmp_path / "adapter").glob("model*"))
    again = load(str(tmp_path / "base"), adapter=str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(again.model), logits(adapter.model), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(again.model), logits(load(str(tmp_path / "base")).model), atol=1e-2)


def test_an_adapter_loads_with_plain_peft(adapter, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = PeftModel.from_pretrained(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(model), logits(adapter.model), atol=1e-5, rtol=1e-5)


def test_the_same_adapter_gives_the_same_bytes(adapter, base, tmp_path):
    save(moved(base, LORA), tmp_path / "again")
    assert digest(tmp_path / "again") == digest(tmp_path / "adapter")
    config = (tmp_path / "adapter" / "adapter_config.json").read_text()
    names = [line.strip(' ,"') for line in config.split('"target_modules": [')[1].split("]")[0].split()]
    assert names == sorted(names)  # a set's order would change with python's hash seed
    assert str(tmp_path) not in config


def test_all_weights_are_saved_and_loaded(base, tmp_path):
    reasoner = moved(base, None)
    save(reasoner, tmp_path / "whole")
    assert fingerprint(load(str(tmp_path / "whole"))) == fingerprint(reasoner)


def test_the_next_stage_trains_the_very_adapter_on(adapter, tmp_path):
    assert fingerprint(tuned(adapter, trainable(adapter, LORA, seed=7))) == fingerprint(adapter)
    later = moved(adapter, None)
    save(later, tmp_path / "later")
    again = load(str(tmp_path / "base"), adapter=str(tmp_path / "later"))
    torch.testing.assert_close(logits(again.model), logits(later.model), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(later.model), logits(adapter.model), atol=1e-2)


def test_an_adapter_from_a_folder_can_be_trained_though_peft_froze_it(adapter, base, tmp_path):
    model = PeftModel.from_pretrained(load(str(tmp_path / "base")).model, tmp_path / "adapter")
    assert not any(weight.requires_grad for weight in model.parameters())
    model = trainable(replace(base, model=model), LORA, seed=7)
    assert {"lora_" in name for name, weight in model.named_parameters() if weight.requires_grad} == {True}


def test_another_rank_than_the_adapters_is_refused(adapter):
    with pytest.raises(ValueError, match=r"rank 2 and alpha 4.* asks for rank 8 and alpha 4"):
        trainable(adapter, Lora(rank=8, alpha=4), seed=0)


def test_an_encoder_takes_no_adapter():
    encoder = replace(small_pairs.reasoner(), kind="encoder")
    with pytest.raises(ValueError, match="takes no adapter"):
        trainable(encoder, LORA, seed=0)
    assert trainable(encoder, None, seed=0).training
