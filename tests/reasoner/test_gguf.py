"""GGUF files as reasoner.model: the weights against the model that they were written from, and gguf's own unpacking."""

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from rgalign.reasoner.folder import ReasonerError, locate
from rgalign.reasoner.model import load
from rgalign.run import external_inputs
from rgalign.run import gguf as packed

LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)]
TOKENS = ["<|start|>", "<|end|>", *LETTERS, "Ġ", "Ġo", "or", "de", "der"]
HEADS, DIM = 2, 32


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=DIM, intermediate_size=64, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, tie_word_embeddings=True, initializer_range=0.3, bos_token_id=0, eos_token_id=1,
        rms_norm_eps=1e-5, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def as_llama_cpp_has_it(weight: np.ndarray) -> np.ndarray:
    """Rows of queries and keys in the order of llama.cpp's rotary positions: pairs lie beside each other."""
    return weight.reshape(HEADS, 2, len(weight) // HEADS // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write(model: LlamaForCausalLM, path, kind=gguf.GGMLQuantizationType.F32):
    config, state = model.config, {name: value.numpy() for name, value in model.state_dict().items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
    writer.add_token_merges(["Ġ o", "o r", "d e", "de r"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    tensors = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
    }
    for layer in range(config.num_hidden_layers):
        for theirs, ours in names.items():
            value = state[f"model.layers.{layer}.{theirs}.weight"]
            value = as_llama_cpp_has_it(value) if ours in ("attn_q", "attn_k") else value
            tensors[f"blk.{layer}.{ours}.weight"] = value
    for name, value in tensors.items():
        is_matrix = value.ndim == 2 and name != "token_embd.weight"
        own = kind if is_matrix else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(value, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rgalign"


@pytest.fixture
def file(tmp_path):
    return write(llama(), tmp_path / "small.gguf")


IDS = torch.tensor([[0, 5, 9, 21, 28, 2]])


def test_a_gguf_file_is_the_model_that_it_was_written_from(file):
    found = load(str(file))
    with torch.no_grad():
        assert torch.allclose(found.model(IDS).logits, llama()(IDS).logits, atol=1e-5)
    assert found.name == "small"
    assert found.ends == {1}
    assert found.tokenizer.encode("a order", add_special_tokens=False) == [2, 29, 19, 32]


def test_packed_weights_are_those_that_gguf_unpacks(tmp_path):
    path = write(llama(), tmp_path / "q8.gguf", gguf.GGMLQuantizationType.Q8_0)
    found = load_file(locate(str(path)) / "model.safetensors")
    raw = next(each for each in gguf.GGUFReader(path).tensors if each.name == "blk.1.ffn_down.weight")
    expected = gguf.quants.dequantize(raw.data, raw.tensor_type)
    assert np.array_equal(found["model.layers.1.mlp.down_proj.weight"], expected)
    assert not np.array_equal(expected, llama().state_dict()["model.layers.1.mlp.down_proj.weight"].numpy())


def test_it_is_unpacked_once_and_again_where_the_file_is_another(file, cache, monkeypatch):
    folder = locate(str(file))
    assert folder.parent == cache
    with monkeypatch.context() as patched:
        patched.setattr(packed, "_unpack", lambda *_: pytest.fail("unpacked twice"))
        assert locate(str(file)) == folder
    file.write_bytes(file.read_bytes() + b"\0")
    assert locate(str(file)) != folder
    assert external_inputs.located(file.parent, f"model:{file}") == locate(str(file))


def test_what_it_is_unpacked_to_names_no_release_of_transformers(file):
    for path in locate(str(file)).glob("*config.json"):
        assert "transformers_version" not in path.read_text()


def test_a_status_asks_for_no_package_that_is_not_there(file, monkeypatch):
    monkeypatch.setattr(packed, "find_spec", lambda name: None)
    assert external_inputs.located(file.parent, f"model:{file}") is None


def test_a_file_below_the_project_is_found_by_its_relative_path(file, monkeypatch):
    monkeypatch.setattr(packed, "ROOT", file.parent)
    assert packed.file_of("small.gguf") == file


BROKEN = {
    "no GGUF": (lambda raw: b"PK\3\4" + raw[4:], r"it begins with b'PK\\x03\\x04'; expected b'GGUF'"),
    "cut": (lambda raw: raw[: len(raw) // 2], "cannot be unpacked"),
    "empty": (lambda raw: b"", "begins with b''"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_refused_by_name_and_leaves_nothing(file, cache, kind):
    change, says = BROKEN[kind]
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(packed.GgufError, match=says) as refused:
        load(str(file))
    assert "small.gguf" in str(refused.value)
    assert [path.name for path in cache.glob("*") if path.suffix != ".lock"] == []


def test_without_the_package_gguf_the_message_says_how_to_get_it(file, monkeypatch):
    monkeypatch.setattr(packed, "find_spec", lambda name: None)
    with pytest.raises(packed.GgufError, match="pip install gguf"):
        load(str(file))


def test_the_model_of_a_package_that_is_not_there_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr(packed, "find_spec", lambda name: None)
    with pytest.raises(ReasonerError, match="python -m rgalign models smollm2"):
        load("smollm2")


def test_a_file_that_is_not_there_is_no_model():
    with pytest.raises(ReasonerError, match=r"'gone\.gguf' is not on this machine: there is no such file"):
        load("gone.gguf")
