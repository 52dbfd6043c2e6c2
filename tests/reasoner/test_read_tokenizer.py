"""The tokenizer of a folder gives the tokens of its tokenizer.json, and none that the model has no row for."""

import itertools
import json
import logging

import pytest
import small_models
from every import every
from small_models import refusal
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rgalign.reasoner import model
from rgalign.reasoner.folder import load_tokenizer
from rgalign.reasoner.model import load, save, tiny

TEXTS = ["order 12345, please?", " two  blanks\n\n", "CAPITALS isn't", "caf\u00e9 e\u0301", "\U0001f44d\U0001f3fd!!!"]
PRE_TOKENIZERS = {
    "digits apart": [pre_tokenizers.Digits(individual_digits=True)],
    "digits by three": [pre_tokenizers.Split(r"\d{1,3}", "isolated")],
    "punctuation apart": [pre_tokenizers.Punctuation()],
    "plain": [],
}
# those of transformers that build a tokenizer by their own rules, whatever its file says
CLASSES = ["GPT2Tokenizer", "GPT2TokenizerFast", "GPTNeoXTokenizerFast", "Qwen2TokenizerFast", "LlamaTokenizerFast"]
CLASSES += ["GemmaTokenizerFast", "T5TokenizerFast", "CohereTokenizerFast", "PreTrainedTokenizerFast", None]
TYPES = ["gpt2", "gpt_neox", "qwen2", "llama", "starcoder2", "opt"]


def letters(folder, *, pre, kind, model_type, normalizer=None):
    """A folder with a byte-level tokenizer without merges but for a few of digits, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("1", "2"), ("3", "4"), ("12", "34"), ("?", "?")]
    words = ["<|pad|>", "<|end|>", *alphabet, *(first + second for first, second in merges)]
    built = Tokenizer(models.BPE({word: i for i, word in enumerate(dict.fromkeys(words))}, merges))
    built.pre_tokenizer = pre_tokenizers.Sequence([*pre, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    built.decoder = decoders.ByteLevel()
    if normalizer:
        built.normalizer = normalizer
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    special = dict(pad_token="<|pad|>", eos_token="<|end|>", chat_template=template)
    PreTrainedTokenizerFast(tokenizer_object=built, **special).save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("tokenizer_class")
    settings |= {"tokenizer_class": kind} if kind else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    own = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(own["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(merge) for merge in merges)]))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": len(own["vocab"])}))
    return folder


def ids(tokenizer):
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]


def ids_of_file(folder):
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [plain.encode(text, add_special_tokens=False).ids for text in TEXTS]


def test_whatever_its_class_a_tokenizer_gives_the_tokens_of_its_file(tmp_path):
    """Each class with each pre-tokenizer; the types of models take turns."""
    pairs = list(itertools.product(CLASSES, PRE_TOKENIZERS))
    cases = {
        f"{kind}, {pre}, {model_type}": {"kind": kind, "pre": PRE_TOKENIZERS[pre], "model_type": model_type}
        for (kind, pre), model_type in zip(pairs, itertools.cycle([*TYPES, "qwen3"]), strict=False)
    }

    def judge(how, folder):
        tokenizer = load_tokenizer(letters(folder, **how))
        assert ids(tokenizer) == ids_of_file(folder)
        assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|end|>", "<|pad|>")
        assert tokenizer.chat_template == "{% for m in messages %}{{ m.content }}{% endfor %}"
        assert tokenizer.decode(ids(tokenizer)[0]) == TEXTS[0]

    every(cases, judge, tmp_path)


def test_a_files_normalizer_is_kept(tmp_path):
    how = dict(pre=[], kind="Qwen2TokenizerFast", model_type="qwen2", normalizer=normalizers.Lowercase())
    folder = letters(tmp_path, **how)
    assert ids(load_tokenizer(folder)) == ids_of_file(folder)


def test_the_log_says_which_class_was_set_aside(tmp_path, caplog):
    folder = letters(tmp_path, pre=PRE_TOKENIZERS["digits apart"], kind="GPT2TokenizerFast", model_type="gpt2")
    with caplog.at_level(logging.WARNING, "rgalign"):
        load_tokenizer(folder)
    assert "GPT2Tokenizer gives other tokens than tokenizer.json; the file is used" in caplog.text


def test_saved_and_read_again_it_gives_the_same_tokens(tmp_path):
    (tmp_path / "a").mkdir()
    own = PRE_TOKENIZERS["digits apart"]
    folder = letters(tmp_path / "a", pre=own, kind="GPT2TokenizerFast", model_type="gpt2")
    save(tiny(load_tokenizer(folder), seed=0), tmp_path / "b")
    assert ids(load(str(tmp_path / "b")).tokenizer) == ids_of_file(folder)


def test_tokens_that_a_config_adds_to_the_file_are_no_fault_of_its_class(tmp_path, caplog):
    folder = letters(tmp_path, pre=[], kind="PreTrainedTokenizerFast", model_type="llama")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    own = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    token = {"content": "order", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    settings["added_tokens_decoder"] = {str(len(own)): {**token, "special": False}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(ids(tokenizer)[0]) == TEXTS[0]
    assert "the file is used" not in caplog.text


def grown(*tokens, template=None):
    words = small_models.tokenizer()
    words.add_tokens(list(tokens))
    words.chat_template = template
    return words


IMAGE = AddedToken("<image>", special=True)


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (grown(IMAGE), None),  # Gemma 3's: no prompt holds it
        (grown(IMAGE, AddedToken("<box>", special=False)), None),  # in brackets: taken out of data too
        (grown(IMAGE, template="{% if 0 %}<image>{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"), None),
        (grown(IMAGE, template="<image>{% for m in messages %}{{ m.content }}{% endfor %}"), "(first: '<image>', 43)"),
        (grown("word"), "1 of those without a row can occur in a prompt (first: 'word', 43)"),
        (grown(IMAGE, "word"), "1 of those without a row can occur in a prompt (first: 'word', 44)"),
    ],
    ids=["special", "in brackets", "in a template's other branch", "in the template", "a word", "a word behind"],
)
def test_a_token_without_a_row_is_a_fault_only_where_a_prompt_can_hold_it(tmp_path, words, fault, monkeypatch):
    folder = str(small_models.qwen3(tmp_path / "m", words=words))
    if fault:
        monkeypatch.setattr(model, "load_weights", lambda *_, **__: pytest.fail("weights were read"))
        assert fault in refusal(folder)
    else:
        assert len(load(folder).tokenizer) > small_models.WORDS + 3


@pytest.mark.parametrize("name", ["pad_token", "eos_token"])
def test_a_token_without_a_row_that_batches_need_is_a_fault(tmp_path, name):
    words = small_models.tokenizer()
    words.add_special_tokens({name: "<new>"})
    assert "(first: '<new>', 43)" in refusal(str(small_models.qwen3(tmp_path / "m", words=words)))
