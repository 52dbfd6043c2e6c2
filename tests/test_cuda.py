"""What a CUDA device alone can show; skipped, visibly, where there is none."""

import json
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import embedding, gpu
from rgalign.alignment.sft import sft
from rgalign.commands import estimate
from rgalign.commands.estimate import model_size
from rgalign.params import ROOT, load
from rgalign.params_training import Lora, Sft
from rgalign.reasoner.embed import embed
from rgalign.reasoner.generate import sample
from rgalign.reasoner.model import load as load_reasoner
from rgalign.reasoner.model import save
from rgalign.reasoner.trainer import Engine, Setup
from rgalign.run import artifacts

DEVICE = "cuda"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
LORA = Lora(rank=8, alpha=16)
SHAPE = {
    "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 2000, "max_position_embeddings": 1024,
}  # fmt: skip
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


@pytest.fixture(scope="module")
def task():
    return embedding.small_task(hidden=64, layers=2, sessions=400)


@pytest.fixture(scope="module")
def prompts(task) -> list[list[int]]:
    return task.prompter.sessions(task.sessions)


@pytest.fixture(scope="module")
def folder(task, tmp_path_factory):
    """A random model of SHAPE in bfloat16, as a folder."""
    path = tmp_path_factory.mktemp("model") / "random"
    save(gpu.random_reasoner(task, SHAPE, DEVICE, seed=0), path)
    return path


@pytest.fixture(scope="module")
def on_both(task, tmp_path_factory):
    """The same float32 model on the CPU and on the device."""
    path = tmp_path_factory.mktemp("tiny") / "tiny"
    save(task.reasoner, path)
    return load_reasoner(str(path), device="cpu"), load_reasoner(str(path), device=DEVICE)


def learn(reasoner, prompts, work, *, documents: int = 64, **engine):
    end = reasoner.tokenizer.eos_token_id
    queries = [[*prompt[-8:], end] for prompt in prompts[:documents]]
    settings = Sft(epochs=6.0, learning_rate=3e-3, neftune=0.0, documents_per_batch=16)
    setup = Setup(folder=work, seed=0, lora=LORA, engine=Engine(**engine), progress=False)
    return sft(reasoner, prompts[:documents], queries, settings, setup)


def test_a_whole_run_ends_and_ranks_as_on_a_cpu(tmp_path):
    found = {}
    for device in ("cpu", DEVICE):
        run = tmp_path / device
        more = ["--set", "run.precision=bf16"] if device == "cuda" else []
        command = [sys.executable, "-m", "rgalign", "run", "tests/tools/micro.yaml", "--run-dir", str(run)]
        ended = subprocess.run(
            [*command, "--set", f"run.device={device}", *more], cwd=ROOT, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr[-3000:]
        assert len(json.loads((run / "manifest.json").read_text())["stages"]) == 10
        results = pd.read_parquet(run / "tables" / "results.parquet")
        whole = results[(results["metric"] == "gauc") & (results["slice"] == "all") & (results["split"] == "test")]
        found[device] = whole.set_index("model")["value"]
    # two epochs on 300 lists: what is asked is that nothing is broken, not that roundings agree
    assert (found["cpu"] - found[DEVICE]).abs().max() < 0.1


def test_vectors_are_the_cpus(on_both, prompts, task):
    cpu, device = (embed(reasoner, prompts, prefix=len(task.prompter.head), progress=False) for reasoner in on_both)
    assert np.abs(cpu - device).max() < 2e-3 * np.abs(cpu).max()


def test_draws_are_the_cpus_but_where_a_rounding_decides(on_both, prompts, task):
    how = {"samples": 4, "max_new_tokens": 8, "seed": 0, "progress": False}
    cpu, device = (sample(reasoner, task.prompter, prompts[:50], **how) for reasoner in on_both)
    same = cpu.merge(device, on=["row", "query"])
    assert len(same) >= 0.95 * len(cpu)


@pytest.fixture
def deterministic():
    """torch's own switch: flash attention's backward pass then adds in one order, and not in any."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(was[0], warn_only=was[1])


def twice(reasoner, task, folder):
    """(digest of the weights, losses) of two trainings on documents that are longer than attention's blocks."""
    documents = gpu.random_prompts(task, 64, (400, 480), seed=0)
    for name in ("first", "again"):
        tuned, curve = learn(reasoner, documents, folder / name, precision="bf16")
        save(tuned, folder / f"model of {name}")
        yield artifacts.digest(folder / f"model of {name}"), curve["loss"]


@pytest.mark.usefixtures("deterministic")
def test_twice_the_same_bytes_where_torch_is_told_to_be_deterministic(on_both, task, tmp_path):
    (first, losses), (again, more) = twice(on_both[1], task, tmp_path)
    assert first == again
    pd.testing.assert_series_equal(losses, more)


def test_twice_the_same_losses_but_for_their_last_bits(on_both, task, tmp_path):
    (_, losses), (_, more) = twice(on_both[1], task, tmp_path)
    np.testing.assert_allclose(losses, more, rtol=1e-2)


def test_pieces_and_checkpointing_change_memory_and_not_the_losses(on_both, prompts, tmp_path):
    _, device = on_both
    _, whole = learn(device, prompts, tmp_path / "whole")
    _, pieces = learn(device, prompts, tmp_path / "pieces", gradient_checkpointing=True, tokens_per_batch=512)
    np.testing.assert_allclose(whole["loss"], pieces["loss"], rtol=1e-3)


@needs_bitsandbytes
@pytest.mark.parametrize(("bits", "least"), [("8bit", 0.98), ("4bit", 0.9)])
def test_packed_weights_embed_and_learn(folder, prompts, bits, least, tmp_path):
    plain = load_reasoner(str(folder), dtype="bfloat16", device=DEVICE)
    packed = load_reasoner(str(folder), dtype="bfloat16", device=DEVICE, quantize=bits)
    first, second = (torch.from_numpy(embed(reasoner, prompts[:64], progress=False)) for reasoner in (plain, packed))
    assert torch.cosine_similarity(first, second).mean() > least
    _, curve = learn(packed, prompts, tmp_path / "work", precision="bf16", optimizer="adamw_8bit")
    assert curve["loss"].iloc[-1] < curve["loss"].iloc[0] - 0.5


def test_a_batch_that_does_not_fit_is_halved_to_the_same_vectors(folder, prompts, caplog):
    reasoner = load_reasoner(str(folder), dtype="bfloat16", device=DEVICE)
    many = [[*prompt, number % 50 + 3, number // 50 + 3] for prompt in prompts for number in range(80)]
    expected = embed(reasoner, many, tokens_per_batch=8_192, progress=False)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.5e9 / torch.cuda.get_device_properties(0).total_memory)
    try:
        found = embed(reasoner, many, tokens_per_batch=4_000_000, progress=False)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory" in caplog.text
    gap = torch.cosine_similarity(torch.from_numpy(expected), torch.from_numpy(found))
    assert gap.min() > 0.999


def test_memory_stays_below_the_estimate(task, tmp_path):
    settings = {"alignment.lora": LORA, "reasoner.dtype": "bfloat16", "run.precision": "bf16"}
    settings |= {"reasoner.max_tokens": 400, "alignment.engine.gradient_checkpointing": True}
    settings |= {"alignment.engine.tokens_per_batch": 8192}
    # RG-SFT alone, on sixteen documents of 400 tokens and a query of nine, as `learn` has them
    settings |= {"alignment.cl.use": False, "alignment.dpo.use": False, "alignment.sft.documents_per_batch": 16}
    params = load("params/quickstart.yaml", settings | {"reasoner.queries.max_new_tokens": 9})
    shape = SHAPE | {"hidden_size": 1024, "num_hidden_layers": 12, "vocab_size": 50_000}
    reasoner = gpu.random_reasoner(task, shape, DEVICE, seed=0)
    size = model_size(reasoner.model.config)
    assert estimate.widest_step(params, size, 1) == (16 * 409, 16 * 9)
    expected = estimate.memory(params, size)
    documents = gpu.random_prompts(task, 64, (400, 400), seed=0)
    torch.cuda.reset_peak_memory_stats()
    learn(reasoner, documents, tmp_path / "work", precision="bf16", gradient_checkpointing=True, tokens_per_batch=8192)
    assert torch.cuda.max_memory_allocated() < sum(expected.values())
