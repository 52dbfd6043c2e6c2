"""FSDP on two processes (gloo, CPU): the objectives' loss and gradients, and a model that is whole and can be saved.

accelerate itself shards on GPUs alone; here its FSDP is applied as it does there, to each layer and to the whole.
"""

import json
from pathlib import Path

import pytest
import small_pairs
import torch
import two_processes

from rgalign.reasoner.model import fingerprint, load

pytestmark = pytest.mark.slow

WORKER = """
import copy, json, sys
from dataclasses import replace
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import small_pairs
from rgalign.alignment.contrastive import prompt_vectors
from rgalign.reasoner.query_loss import query_loss
from rgalign.reasoner.batches import documents, right_padded
from rgalign.reasoner.model import save
from rgalign.reasoner.trainer import loss_as_forward, unshard

dist.init_process_group("gloo")
start = small_pairs.reasoner()
batch = right_padded(documents(small_pairs.PROMPTS, small_pairs.CHOSEN)[:8], 0)


def prompts(model, batch):  # as RG-CL: past the model's own forward
    return prompt_vectors(replace(start, model=model), batch)[1].square().mean(), {}


found = {}
for name, objective in {"query": query_loss, "prompt": prompts}.items():
    plain = copy.deepcopy(start.model).train()
    loss, _ = objective(plain, batch)
    loss.backward()
    model, mesh = copy.deepcopy(start.model).train(), init_device_mesh("cpu", (2,))
    with loss_as_forward(model, objective):
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        shared, _ = model(batch=batch)
        shared.backward()
    both = zip(model.parameters(), plain.parameters(), strict=True)
    gaps = [(own.grad.full_tensor() - other.grad).abs().max() for own, other in both]
    found[name] = [float(loss.detach()), float(shared.detach()), float(max(gaps))]
    unshard(model, model, None)
if dist.get_rank() == 0:
    save(replace(start, model=model.eval()), sys.argv[1] + "/whole")
    open(sys.argv[1] + "/found.json", "w").write(json.dumps(found))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "worker.py").write_text(WORKER)
    two_processes.run(folder / "worker.py", folder, seconds=300)
    return folder


@pytest.mark.parametrize("objective", ["query", "prompt"])
def test_shared_out_weights_have_the_loss_and_gradients_of_whole_ones(sharded, objective):
    whole, shared, gap = json.loads((sharded / "found.json").read_text())[objective]
    assert shared == pytest.approx(whole, rel=1e-6)
    assert gap < 1e-5


def test_weights_put_together_are_saved_as_the_model_they_were(sharded):
    start, found = small_pairs.reasoner(), load(str(sharded / "whole"))
    assert json.loads((sharded / "whole" / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
    for name, value in start.model.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[name], value, rtol=0, atol=0)
    assert found.model.get_output_embeddings().weight is found.model.get_input_embeddings().weight
    assert fingerprint(found) == fingerprint(start)
