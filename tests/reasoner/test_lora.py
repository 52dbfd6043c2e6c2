"""peft's adapters: put on the model they were trained on, and on no other."""

import pytest
import small_models
import torch
from peft import PeftModel
from small_models import logits, refusal
from transformers import Qwen3ForCausalLM

from rgalign.reasoner.model import load

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
