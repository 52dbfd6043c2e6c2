"""Folders that are not one whole model, and adapters that are none: each told by name, before a weight is read."""

import json
import shutil

import pytest
import small_models
import torch
from small_models import refusal
from transformers import Qwen3ForCausalLM

from rgalign.reasoner import model
from rgalign.reasoner.model import Reasoner, ReasonerError, load, save

pytestmark = pytest.mark.usefixtures("no_network")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"


@pytest.fixture(autouse=True)
def no_weight_is_read(request, monkeypatch):
    if "one_model" not in request.node.name:
        monkeypatch.setattr(model, "load_weights", lambda *_, **__: pytest.fail("weights were read"))


def parts(folder):
    """The model's weights in several files."""
    whole = Qwen3ForCausalLM.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    whole.save_pretrained(folder, max_shard_size="10KB")
    return sorted(folder.glob("*.safetensors"))


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def renamed(name):
    return lambda folder: (folder / WEIGHTS).rename(folder / name)


def indexed(text):
    def change(folder):
        parts(folder)
        (folder / INDEX).write_text(text)

    return change


FOLDERS = {
    "GGUF": (renamed("tiny.Q4_K_M.gguf"), "GGUF (tiny.Q4_K_M.gguf)"),
    "Mistral's own": (renamed("consolidated.safetensors"), "Mistral's own format (consolidated.safetensors)"),
    "another name": (renamed("model.fp16.safetensors"), "named model.fp16.safetensors; expected model.safetensors"),
    "a pointer": (lambda folder: (folder / WEIGHTS).write_text(POINTER), "model.safetensors: a Git LFS pointer"),
    "a tokenizer's pointer": (
        lambda f: (f / "tokenizer.json").write_text(POINTER),
        "tokenizer.json: a Git LFS pointer",
    ),
    "cut short": (lambda folder: cut(folder / WEIGHTS), "model.safetensors cannot be loaded, it is damaged"),
    "empty": (lambda folder: (folder / WEIGHTS).write_bytes(b""), "model.safetensors cannot be loaded"),
    "a part lost": (lambda folder: parts(folder)[-1].unlink(), "parts of its weights are missing (model-000"),
    "a part cut": (lambda folder: cut(parts(folder)[0]), "model-00001-of"),
    "an empty index": (indexed('{"weight_map": {}}'), "names no weights"),
    "a broken index": (indexed("{"), f"{INDEX} cannot be read"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_that_is_not_one_whole_model_is_told_by_name(folder, kind):
    change, words = FOLDERS[kind]
    change(folder)
    assert words in refusal(str(folder))


def test_weights_in_parts_are_one_model(folder):
    before = small_models.logits(load(str(folder)).model)
    assert len(parts(folder)) > 2
    assert torch.equal(small_models.logits(load(str(folder)).model), before)


@pytest.mark.parametrize("with_config", [False, True])
def test_an_adapter_alone_names_its_base(folder, tmp_path, with_config):
    adapter = small_models.lora(tmp_path / "lora", folder, "Qwen/Qwen3-4B")
    if with_config:
        shutil.copy(folder / "config.json", adapter)
    text = refusal(str(adapter))
    assert "an adapter alone" in text
    assert "'Qwen/Qwen3-4B': give that model as reasoner.model and this folder as reasoner.adapter" in text


@pytest.mark.parametrize("in_parts", [False, True])
def test_an_adapter_beside_a_whole_model_is_never_put_on_unasked(folder, tmp_path, in_parts):
    if in_parts:
        parts(folder)
    adapter = small_models.lora(tmp_path / "lora", folder, "qwen")
    for path in adapter.glob("adapter_*"):
        shutil.copy(path, folder)
    assert "a whole model and an adapter (adapter_config.json)" in refusal(str(folder))


ADAPTERS = {
    "a whole model": (
        lambda adapter, folder: shutil.copytree(folder, adapter, dirs_exist_ok=True),
        "whole model: give",
    ),
    "nothing": (lambda adapter, folder: None, "that is not a peft adapter"),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_folder_that_is_no_adapter_is_told_by_name(folder, tmp_path, kind):
    (tmp_path / "other").mkdir()
    change, words = ADAPTERS[kind]
    change(tmp_path / "other", folder)
    assert words in refusal(str(folder), adapter=str(tmp_path / "other"))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_adapters_pointer_is_told_by_name(folder, tmp_path, name):
    adapter = small_models.lora(tmp_path / "lora", folder, "qwen")
    (adapter / name).write_text(POINTER)
    assert f"{name}: a Git LFS pointer" in refusal(str(folder), adapter=str(adapter))


def test_a_model_with_an_adapter_inside_is_not_saved_without_its_weights(folder, tmp_path):
    """transformers puts an adapter on by itself where it lies beside; saved, that is the adapter alone."""
    adapter = small_models.lora(tmp_path / "lora", folder, "qwen")
    whole = Qwen3ForCausalLM.from_pretrained(folder)
    whole.load_adapter(str(adapter))
    with pytest.raises(ReasonerError, match="has an adapter inside"):
        save(Reasoner("qwen", "causal", whole, small_models.tokenizer()), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen3"
