"""Small random models on disk, made by transformers alone: what the reasoner's tests load, and how they look at it."""

import socket
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from rgalign.reasoner.model import ReasonerError, load

WORDS = 40


def tokenizer(pad: str | None = "<|pad|>", eos: str | None = "<|end|>") -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<|pad|>", "<|unk|>", "<|end|>", *(f"w{i}" for i in range(WORDS))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<|unk|>", pad_token=pad, eos_token=eos)


def qwen3(folder: Path, *, seed: int = 0, hidden: int = 32, words=None, **config) -> Path:
    """A Qwen3 folder with two layers; `words` replaces its tokenizer, False leaves it out."""
    words = tokenizer() if words is None else words
    torch.manual_seed(seed)
    settings = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    settings |= {"vocab_size": WORDS + 3, "hidden_size": hidden, "head_dim": 8, "tie_word_embeddings": True, **config}
    Qwen3ForCausalLM(Qwen3Config(**settings, initializer_range=0.3)).save_pretrained(folder)
    if words:
        words.save_pretrained(folder)
    return folder


def bert(folder: Path) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=WORDS + 3, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    BertModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def lora(folder: Path, base: Path, name: str) -> Path:
    """A LoRA adapter of the model in `base`, with weights that change it, that says it was trained on `name`."""
    model = get_peft_model(
        Qwen3ForCausalLM.from_pretrained(base),
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    torch.manual_seed(1)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter)
    model.peft_config["default"].base_model_name_or_path = name
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


IDS = torch.tensor([[5, 6, 7, 8]])


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def refusal(*arguments, **options) -> str:
    """What `load` says as it refuses."""
    with pytest.raises(ReasonerError) as caught:
        load(*arguments, **options)
    return str(caught.value)


def forbid_network(monkeypatch) -> None:
    def refuse(*_):
        raise AssertionError("the network was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
