"""peft's adapters: put on the model they were trained on, and on no other."""

from pathlib import Path

import pytest
import small_models
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from small_models import logits, refusal
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen3ForCausalLM

from rgalign.reasoner.adapter import adapted, ready_to_save
from rgalign.reasoner.model import load, save

pytestmark = pytest.mark.usefixtures("no_network")


def test_an_adapter_of_this_model_acts_as_in_peft(folder, tmp_path):
    adapter = small_models.lora(tmp_path / "lora", folder, "/elsewhere/qwen")
    theirs = PeftModel.from_pretrained(Qwen3ForCausalLM.from_pretrained(folder), adapter)
    ours = load(str(folder), adapter=str(adapter)).model
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(ours), logits(load(str(folder)).model), atol=1e-2)
    assert not ours.training
    assert all(parameter.requires_grad for parameter in ours.parameters())


def test_an_adapter_of_another_base_names_both(folder, tmp_path):
    text = refusal(str(folder), adapter=str(small_models.lora(tmp_path / "lora", folder, "Qwen/Qwen3-4B")))
    assert "'Qwen/Qwen3-4B'" in text
    assert "'qwen'" in text


def test_an_adapter_of_another_shape_names_both_though_the_names_agree(folder, tmp_path):
    other = small_models.qwen3(tmp_path / "other", hidden=64)
    text = refusal(str(folder), adapter=str(small_models.lora(tmp_path / "lora", other, "far/qwen")))
    assert "'far/qwen'" in text
    assert "does not fit the model 'qwen'" in text


def test_an_adapter_of_fewer_layers_does_not_fit(folder, tmp_path):
    other = small_models.qwen3(tmp_path / "other", num_hidden_layers=1)
    text = refusal(str(folder), adapter=str(small_models.lora(tmp_path / "lora", other, "qwen")))
    assert "layers.1" in text


def test_a_pickled_adapter_is_refused(folder, tmp_path):
    adapter = small_models.lora(tmp_path / "lora", folder, "qwen")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "pickled adapters are not read" in refusal(str(folder), adapter=str(adapter))


def gpt2(folder: Path) -> Path:
    torch.manual_seed(0)
    size = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": small_models.WORDS + 3}
    GPT2LMHeadModel(GPT2Config(**size, initializer_range=0.3)).save_pretrained(folder)
    small_models.tokenizer().save_pretrained(folder)
    return folder


def untied(folder: Path) -> Path:
    return small_models.qwen3(folder, tie_word_embeddings=False)


BASES = {
    "qwen3": (small_models.qwen3, "embed_tokens", "lm_head", "q_proj"),
    "untied": (untied, "embed_tokens", "lm_head", "q_proj"),
    "gpt2": (gpt2, "wte", "lm_head", "c_attn"),
}
EMBEDDINGS = {
    "LoRA of the embedding": lambda reads, writes, other: {"target_modules": [other, reads]},
    "LoRA of the head": lambda reads, writes, other: {"target_modules": [other, writes]},
    "LoRA of both": lambda reads, writes, other: {"target_modules": [reads, writes]},
    "the embedding whole": lambda reads, writes, other: {"target_modules": [other], "modules_to_save": [reads]},
    "the head whole": lambda reads, writes, other: {"target_modules": [other], "modules_to_save": [writes]},
    "both whole": lambda reads, writes, other: {"target_modules": [other], "modules_to_save": [reads, writes]},
    "some rows": lambda reads, writes, other: {"target_modules": [other], "trainable_token_indices": {reads: [5, 7]}},
    "weight-decomposed": lambda reads, writes, other: {"target_modules": [other], "use_dora": True},
}


def adapter_of(base: Path, folder: Path, **how) -> Path:
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, task_type="CAUSAL_LM", **how))
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in wrapped.parameters():
            if weight.requires_grad:
                weight.add_(0.3 * torch.randn_like(weight))
    wrapped.peft_config["default"].base_model_name_or_path = base.name
    wrapped.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", EMBEDDINGS)
@pytest.mark.parametrize("base", BASES)
def test_an_adapter_that_touches_embeddings_acts_as_in_peft_and_is_saved_whole(tmp_path, base, kind):
    make, *names = BASES[base]
    folder = make(tmp_path / "base")
    adapter = adapter_of(folder, tmp_path / "adapter", **EMBEDDINGS[kind](*names))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter).eval()
    ours = load(str(folder), adapter=str(adapter))
    torch.testing.assert_close(logits(ours.model), logits(theirs), atol=1e-4, rtol=1e-4)
    save(ours, tmp_path / "saved")
    torch.testing.assert_close(logits(load(str(tmp_path / "saved")).model), logits(ours.model))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_that_cannot_be_merged_names_why(folder, tmp_path):
    adapter = adapter_of(folder, tmp_path / "lora", target_modules=["q_proj"], lora_bias=True)
    text = refusal(str(folder), adapter=str(adapter))
    assert "cannot be merged into its model" in text
    assert "lora_bias" in text


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapters_bias_is_merged_where_its_layers_have_one(tmp_path):
    folder = gpt2(tmp_path / "base")
    adapter = adapter_of(folder, tmp_path / "lora", target_modules=["c_attn"], lora_bias=True)
    theirs = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(folder), adapter).eval()
    torch.testing.assert_close(logits(load(str(folder), adapter=str(adapter)).model), logits(theirs))


def test_embeddings_that_an_unmerged_adapter_brought_are_saved_with_it(folder, tmp_path):
    """As a quantised model keeps it: what was trained beside the adapter must not be lost in the next stage."""
    wrapped = get_peft_model(Qwen3ForCausalLM.from_pretrained(folder), LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        wrapped.get_input_embeddings().weight.mul_(2)
    wrapped.peft_config["default"].base_model_name_or_path = folder.name
    wrapped.save_pretrained(tmp_path / "lora", save_embedding_layers=True)
    ours = adapted(Qwen3ForCausalLM.from_pretrained(folder), tmp_path / "lora", folder.name, merge=False)
    ready_to_save(ours).save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(Qwen3ForCausalLM.from_pretrained(folder), tmp_path / "again")
    torch.testing.assert_close(logits(again), logits(ours))
    assert not torch.allclose(logits(again), logits(Qwen3ForCausalLM.from_pretrained(folder)), atol=1e-2)
