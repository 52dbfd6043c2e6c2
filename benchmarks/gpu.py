"""On a CUDA device: what share of its own ceilings the hot paths reach; rows as in `benchmarks`.

`theirs` is what the device reached in this very run: products of two large bfloat16 matrices, or a copy in its memory.
The language model has Qwen3-4B's shape and random weights: speed does not depend on what a model has learnt. Useful
operations alone are counted, two (in training with an adapter, beside which weights are frozen, four) for every weight
and real token: attention's own products, padding and what is done twice are not, so the shares are lower bounds.
"""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.embedding import Task
from benchmarks.peers import row
from benchmarks.tuning import Clock
from rgalign.alignment.sft import sft
from rgalign.commands.estimate import model_size
from rgalign.data.lists import Lists, with_queries, with_texts
from rgalign.params_training import Lora, RankerSettings, Sft
from rgalign.ranker.fit import fit
from rgalign.ranker.losses import listnet_kl
from rgalign.ranker.train import Parts, build
from rgalign.reasoner.embed import embed
from rgalign.reasoner.generate import sample
from rgalign.reasoner.model import Reasoner
from rgalign.reasoner.trainer import Engine, Setup
from rgalign.seeding import seeded

MATRIX, COPY = "measured bf16 matrix peak", "measured copy in memory"
MISSING = "no CUDA device"
QWEN3_4B = {  # as its published config.json has them
    "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "max_position_embeddings": 40_960,
}  # fmt: skip
LISTS_PER_STEP = (512, 16_384)  # a usual batch, and one that fills a large GPU
LORA = Lora(rank=16, alpha=32)


def rows(
    task: Task,
    parts: Parts,
    *,
    device: str = "cuda",
    shape: Mapping[str, int] = QWEN3_4B,
    prompts: int = 768,
    tokens: tuple[int, int] = (160, 420),
    lists: int = 131_072,
    lists_per_step: tuple[int, ...] = LISTS_PER_STEP,
    ceilings: tuple[float, float] | None = None,
    seed: int = 0,
) -> list[dict]:
    """Embedding, writing, RG-SFT with LoRA, and QE-Rec's training, each against a ceiling of the device.

    task, parts  a tokenizer and encoded lists to take words and sessions from; lists are repeated up to `lists`
    tokens       of the shortest and the longest prompt
    ceilings     bf16 operations a second and bytes a second; None: measured
    Where torch sees no CUDA device each is a row with neither figure nor ratio.
    """
    if device == "cuda" and not torch.cuda.is_available():
        names = ["embedding", "writing", "RG-SFT, LoRA", *(f"QE-Rec, {n:,} lists a step" for n in lists_per_step)]
        return [row(name, MATRIX, MISSING, math.nan, math.nan, "share", None) for name in names]
    peak, bandwidth = ceilings or (matrix_peak(device), copy_bandwidth(device))
    reasoner, ids = random_reasoner(task, shape, device, seed), random_prompts(task, prompts, tokens, seed)
    found = [
        _embedding(reasoner, ids, peak),
        _writing(reasoner, task, ids[: prompts // 3], bandwidth, seed),
        _tuning(reasoner, ids[: prompts // 4], peak, seed),
    ]
    width = reasoner.hidden_size
    del reasoner
    return found + [_ranker(parts, width, device, lists, each, bandwidth, seed) for each in lists_per_step]


def matrix_peak(device: str, *, size: int = 8192, repeats: int = 20) -> float:
    """Operations a second of products of two random bfloat16 matrices (size, size)."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: left @ right, repeats)


def copy_bandwidth(device: str, *, size: int = 2**31, repeats: int = 10) -> float:
    """Bytes a second, read and written, of a copy of `size` bytes inside the device's memory."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), repeats)


def _embedding(reasoner: Reasoner, ids: list[list[int]], peak: float) -> dict:
    seconds = _seconds(lambda: embed(reasoner, ids, progress=False))
    tokens = sum(map(len, ids))
    reached = 2 * model_size(reasoner.model.config).trunk * tokens / seconds
    return _share(f"embedding, {tokens / seconds:,.0f} tokens/s", MATRIX, reached, peak)


def _writing(reasoner: Reasoner, task: Task, ids: list[list[int]], bandwidth: float, seed: int) -> dict:
    """Bytes: the weights, once for every step of every batch. Not the cache, and not the prompts' own pass."""
    new, steps, model = 24, 0, reasoner.model

    def count(*_: Any) -> None:
        nonlocal steps
        steps += 1

    with_hook = model.register_forward_hook(count)
    put = {"samples": 4, "max_new_tokens": new, "seed": seed, "progress": False}
    seconds = _seconds(lambda: sample(reasoner, task.prompter, ids, **put), warm=False)
    with_hook.remove()
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    return _share(f"writing, {4 * len(ids) / seconds:,.1f} queries/s", COPY, held * steps / seconds, bandwidth)


def _tuning(reasoner: Reasoner, ids: list[list[int]], peak: float, seed: int) -> dict:
    """The rate of all steps but the first: what comes before (the model's copy, its hash) is once.

    A frozen weight is multiplied with states and with their gradients; checkpointing does the first twice.
    """
    rng = np.random.default_rng(seed)
    end, most = reasoner.tokenizer.eos_token_id, len(reasoner.tokenizer)
    queries = [[*rng.integers(3, most, 12).tolist(), end] for _ in ids]
    engine = Engine(precision="bf16", gradient_checkpointing=True, tokens_per_batch=8192)
    batch, clock = max(1, len(ids) // 4), Clock()
    with TemporaryDirectory() as work:
        setup = Setup(Path(work) / "sft", seed, lora=LORA, engine=engine, progress=False, callbacks=[clock])
        sft(reasoner, ids, queries, Sft(epochs=1.0, documents_per_batch=batch), setup)
    # every step has the same number of documents, but not quite of tokens: their mean
    tokens = sum(map(len, ids)) + sum(map(len, queries))
    rate = tokens / len(clock.ends) / clock.seconds
    reached = 4 * model_size(reasoner.model.config).trunk * rate
    return _share(f"RG-SFT, LoRA and checkpointing, {rate:,.0f} tokens/s", MATRIX, reached, peak)


def _ranker(
    parts: Parts, width: int, device: str, lists: int, lists_per_step: int, bandwidth: float, seed: int
) -> dict:
    """Lists a second of the second epoch; the ceiling: what its own tensors' bytes allow.

    Bytes: what the forward pass keeps for the backward pass, written once and read once.
    """
    parts = _with_random_vectors(parts, width, lists, seed)
    settings = RankerSettings(epochs=2, patience=2, lists_per_batch=lists_per_step)
    model = build("qe_rec", parts, settings, positions=0, seed=seed)
    kept = _bytes_kept(model, parts, min(1024, len(parts.train)), device)
    learnt, how = (parts.train, parts.dev, parts.intents, settings), {"accelerator": Accelerator(cpu=device == "cpu")}
    fitted = fit(model, *learnt, seed=seed, loss=model.loss(settings), progress=False, **how)
    ours = len(parts.train) / fitted.curve["seconds"].iloc[-1]
    name = f"QE-Rec, {lists_per_step:,} lists a step, vectors of {width:,}"
    return row(name, COPY, str(torch.__version__), ours, bandwidth / (2 * kept), "lists/s", None)


def _with_random_vectors(parts: Parts, width: int, lists: int, seed: int) -> Parts:
    draw = torch.Generator().manual_seed(seed)

    def vectors(count: int) -> Tensor:
        return torch.randn(count, width, generator=draw).half()

    def as_many(own: Lists, count: int) -> Lists:
        own = own.take(own.clicked.any(dim=1).nonzero().squeeze(1))
        return with_queries(own.take(torch.arange(count) % len(own)), vectors(count))

    intents = with_texts(parts.intents, vectors(len(parts.intents)))
    train, dev = as_many(parts.train, lists), as_many(parts.dev, min(256, len(parts.dev)))
    return Parts(parts.space, intents, train, dev, dev)


def _bytes_kept(model: torch.nn.Module, parts: Parts, lists: int, device: str) -> float:
    """Bytes a list that the forward pass keeps for the backward pass; a tensor that is kept twice counts once."""
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch, intents = parts.train.take(torch.arange(lists)).to(device), parts.intents.to(device)
    model.to(device).train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        value = listnet_kl(0.2)(model, batch, intents)
    del value
    return sum(seen.values()) / lists


def _share(name: str, ceiling: str, ours: float, theirs: float) -> dict:
    """In units of 10^12 a second: operations of a matrix peak, bytes of a copy."""
    unit = "TFLOP/s" if ceiling == MATRIX else "TB/s"
    return row(name, ceiling, str(torch.__version__), ours / 1e12, theirs / 1e12, unit, None)


def random_reasoner(task: Task, shape: Mapping[str, int], device: str, seed: int) -> Reasoner:
    """A model of this shape in bfloat16, its weights drawn on the device: 8 GB would take minutes on a CPU."""
    words, before = task.reasoner.tokenizer, torch.get_default_dtype()
    config = Qwen3Config(
        **shape, tie_word_embeddings=True, pad_token_id=words.pad_token_id, eos_token_id=words.eos_token_id
    )
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(device), seeded(seed):
            model = Qwen3ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return Reasoner("random", "causal", model.eval(), words)


def random_prompts(task: Task, count: int, tokens: tuple[int, int], seed: int) -> list[list[int]]:
    """Random words after a shared instruction, lengths even between the two."""
    rng, most = np.random.default_rng(seed), len(task.reasoner.tokenizer)
    head = list(task.prompter.head)
    lengths = rng.integers(max(tokens[0], len(head) + 1), tokens[1] + 1, count)
    return [head + rng.integers(3, most, length - len(head)).tolist() for length in lengths]


def _seconds(work: Callable[[], Any], repeats: int = 1, *, warm: bool = True) -> float:
    if warm:
        work()
    _wait()
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    _wait()
    return (time.perf_counter() - started) / repeats


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
