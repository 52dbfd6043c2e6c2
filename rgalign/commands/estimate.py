"""Before a run starts: what this machine cannot do, and what a pretrained language model takes in time and memory.

With P the parameters that a token is multiplied with (model_size.trunk) and T the tokens, in floating point operations:
reading 2PT; training all weights 6PT; a LoRA adapter 4PT, since frozen weights need no gradient; gradient checkpointing
reads once more, 2PT (Kaplan et al. 2020, 2.1). Queries are written by steps, a token of every query of a batch: one
takes as long as its weights and cache take to be moved, or its kernels to be launched. Time is that at UTILISATION of
the card's peak [C]. Counts are upper bounds: every session has a click, and every prompt max_tokens unless the tables
are there to be counted; but RG-DPO is taken to read a pair's prompt once where all attention is full, and an attention
other than torch's (sdpa) reads it twice. Attention's own products, rankers and evaluation while training are left out.
A CPU has no data sheet: two layers of the model are timed on it. torch is imported late: most runs do without.
"""

import copy
import math
import timeit
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from rgalign.data.schema import feature_kinds, is_there, typed_batches
from rgalign.data.sources import size_of
from rgalign.params import Params, ParamsError
from rgalign.params_schema import gpu_only, refused
from rgalign.params_training import STEPS, WRITTEN_TERMS, Alignment
from rgalign.reasoner.prompts import NEVER_ASKED, TINY
from rgalign.run import artifacts, distributed
from rgalign.run.external_inputs import model_folder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PLANNED_FOR = "H100"  # the card of an estimate where there is no CUDA and no --card
UTILISATION = 0.4  # of a card's peak in bf16 and of its bandwidth [C]
LAUNCHES = 0.7e-3  # seconds a layer and step of writing: its kernels, launched one by one; not measured [C]
WRITTEN_ON_CPU = 3  # times what a read token takes: small products, the head and the cache; one CPU measured [C]
CHARACTERS = 4  # a token of a prompt, where the model's own tokenizer is not asked [C]
CACHE_MOVED = 3  # times a step: it is read for attention, and copied (read, written) to be a token longer
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
TRAINED = 4  # bytes of a trained weight, of its gradient and of each of AdamW's two numbers: float32
PACKED = {"8bit": 1.0, "4bit": 0.5}  # bytes of a weight of a linear layer
GIB = 2**30


def check_machine(params: Params) -> None:
    """Raise ParamsError for what cannot be done here: a device that is not there, all that needs CUDA, and names of
    objectives and rewards that do not exist."""
    usual = Alignment()
    if (params.alignment.dpo.objective, params.alignment.reward.form) != (usual.dpo.objective, usual.reward.form):
        from rgalign.alignment.context import unknown_names

        if unknown := unknown_names(params.alignment):
            raise ParamsError("\n  ".join(["these params name what does not exist:", *unknown]))
    device, needs = params.run.device, gpu_only(params.reasoner, params.alignment)
    if device in ("auto", "cpu") and not needs:
        return
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    faults = []
    if not there.get(device, True):
        faults.append(
            f"run.device is {device}, and torch finds none on this machine; set run.device to auto, which takes what "
            f"there is, or see what torch says: python -c 'import torch; print(torch.zeros(1, device=\"{device}\"))'"
        )
    if needs and not there["cuda"]:
        faults.append(refused(needs, "cpu"))
    if faults:
        raise ParamsError("\n  ".join(["these params cannot run on this machine:", *faults]))


def pretraining_note(params: Params) -> str:
    """A note for a tiny model that will be tuned to write and is pretrained on no question; empty where that is not so,
    or not known before the data are read (cfpb: some complaints have a text)."""
    how, data = params.alignment, params.data
    tunes = how.loop.rounds and (how.sft.use or how.dpo.use)
    if not tunes or params.reasoner.model != TINY or params.run.warm_start:
        return ""
    there = {"shopworld": data.world.transcripts > 0, "msweb": False}.get(data.source, True)
    if data.source == "folder":
        there = is_there(artifacts.data_path(str(data.path)), "transcripts")
    return "" if there else f"note: {'; '.join(NEVER_ASKED)}"


@dataclass(frozen=True)
class ModelSize:
    """How large a language model is."""

    parameters: int  # all of them, tied ones once
    trunk: int  # of these, all but the vocabulary's table and the language head: what every token is multiplied with
    linear: int  # of these, in linear layers but the head: what 8- and 4-bit weights pack, LoRA stands beside
    linear_ends: int  # sum over these layers of inputs + outputs: LoRA has rank times as many parameters
    layers: int
    hidden: int
    vocabulary: int
    activations: int  # numbers that a token leaves in one layer for the backward pass
    cached: int  # numbers that a token leaves in one layer while queries are written: its key and its value
    full_attention: bool  # no window slides, no state is carried: RG-DPO reads a pair's prompt once

    def lora(self, rank: int) -> int:
        """Parameters of an adapter of this rank beside all linear layers."""
        return rank * self.linear_ends


def model_size(config: "PreTrainedConfig", *, kind: str = "causal") -> ModelSize:
    """Of the model that transformers builds for this config; nothing but shapes is built (torch's meta device).

    kind  causal | encoder
    About so many numbers stay of a token in one layer of Qwen3's kind [C]: inputs and outputs of the two norms, queries
    and keys before and after norm and rotation, values, attention's output, and four of the MLP's width. Attention's
    own matrix is not kept (flash and sdpa make it again).
    """
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    from rgalign.alignment.logprobs import full_attention

    auto = AutoModelForCausalLM if kind == "causal" else AutoModel
    with torch.device("meta"):
        model = auto.from_config(config)
    text, trunk = config.get_text_config(), model.base_model if kind == "causal" else model
    head = model.get_output_embeddings() if kind == "causal" else None
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    queries = text.num_attention_heads * width
    keys = (getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * width  # several heads share them
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trunk=sum(parameter.numel() for parameter in trunk.parameters()) - model.get_input_embeddings().weight.numel(),
        linear=sum(module.weight.numel() for module in linear),
        linear_ends=sum(module.in_features + module.out_features for module in linear),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        activations=4 * text.hidden_size + 3 * queries + 4 * keys + 4 * text.intermediate_size,
        cached=2 * keys,
        full_attention=full_attention(config),
    )


@dataclass(frozen=True)
class Card:
    """One accelerator by its data sheet: dense bf16 operations a second, bytes a second, bytes. A CPU: as timed."""

    name: str
    operations: float
    bandwidth: float | None  # None: of a CPU
    memory: float


CARDS = {  # in the order in which a device's name is searched for them
    name: Card(name, operations * 1e12, bandwidth * 1e12, memory * GIB)
    for name, operations, bandwidth, memory in (
        ("B200", 2250, 8.0, 180),
        ("H200", 989, 4.8, 141),
        ("H100", 989, 3.35, 80),
        ("A100", 312, 1.55, 40),  # the smaller one; a device says its memory itself
        ("L40S", 362, 0.864, 48),
        ("L40", 181, 0.864, 48),
        ("A10G", 70, 0.6, 24),
        ("A10", 125, 0.6, 24),
        ("L4", 121, 0.3, 24),
        ("RTX 4090", 165, 1.008, 24),
        ("RTX 3090", 71, 0.936, 24),
    )
}


def work(params: Params, size: ModelSize, sessions: int, lengths: tuple[int, int] | None = None) -> pd.DataFrame:
    """One row a use of the main model: stage, what, read (tokens), written (tokens), operations a read token.

    sessions  in all, by ShopWorld's weeks: four of six train, one valid, one test; all of train taken to have a click
    lengths   tokens of a prompt and of a query, on the mean (`mean_lengths`); None: the most that params allow
    """
    train_valid, clicked = sessions * 5 // 6, sessions * 4 // 6
    test = sessions - train_valid
    prompt, query = lengths or (params.reasoner.max_tokens, params.reasoner.queries.max_new_tokens)
    how, warmup, terms = params.alignment, params.reasoner.warmup, set(params.ranker.match) & set(WRITTEN_TERMS)
    forward = 2 * size.trunk
    learning = ((4 if how.lora else 6) + (2 if how.engine.gradient_checkpointing else 0)) * size.trunk
    drawn, models = how.candidates.samples + 1, 1 + len(params.reasoner.others)
    if how.candidates.llms == "one":
        drawn, models = models * drawn, 1
    # with prompt_query a prompt is read to write its query, and again with the query and the asking mark (not counted)
    repeats = params.reasoner.embed == "prompt_query"
    embedded, asked = (2 * prompt + query, query) if repeats else (prompt, 0)
    rows = []

    def add(stage: str, what: str, read: int, written: int = 0, operations: int = forward) -> None:
        rows.append((stage, what, read, written, operations))

    def embed(stage: str, what: str, count: int) -> None:
        add(stage, f"embed {what}", count * embedded, count * asked)

    def write_terms(stage: str, count: int) -> None:
        if terms:
            samples = params.ranker.written.samples
            add(stage, "write queries for the match terms", count * prompt, count * samples * query)

    if warmup.epochs:  # each fold's adapter reads the other folds' questions, and one reads all
        trained = int(clicked * warmup.epochs * max(1, warmup.folds))
        add("02_reasoner", "warm-up", trained * (prompt + query), 0, 4 * size.trunk)
    embed("02_reasoner", "train and valid", train_valid)
    write_terms("02_reasoner", train_valid)
    embed("09_evaluation", "test", test)
    write_terms("09_evaluation", test)
    if how.loop.rounds:
        if writes := params.reasoner.kind == "causal":
            what = f"write {drawn} queries a session, by each of {models} models"
            add("04_reward_model", what, 2 * clicked * prompt * models, clicked * drawn * query * models)
        if writes and how.sft.use:
            add("05_rg_sft", "RG-SFT", int(clicked * how.sft.epochs) * (prompt + query), 0, learning)
        if writes and how.dpo.use and how.grpo.use:
            groups, query_tokens = how.grpo.steps * how.grpo.sessions_per_step, how.grpo.samples * (query + 1)
            add("06_rg_dpo", "write groups of queries", groups * prompt, groups * how.grpo.samples * query)
            add("06_rg_dpo", "reference", groups * (prompt + query_tokens))
            add("06_rg_dpo", "rewards", groups * query_tokens)
            add("06_rg_dpo", "GRPO", groups * how.grpo.inner_steps * (prompt + query_tokens), 0, learning)
        elif writes and how.dpo.use:
            pairs, both = int(clicked * (1 - how.dpo.margin_quantile)), tokens_of_pair(params, size)
            add("06_rg_dpo", "reference", pairs * both)
            add("06_rg_dpo", "RG-DPO", int(pairs * how.dpo.epochs) * both, 0, learning)
        if writes and (how.sft.use or how.dpo.use):
            embed("07_rg_cl", "train and valid for the retraining", train_valid)
            write_terms("07_rg_cl", train_valid - clicked)
        if how.cl.use:
            runs = 2 if repeats and how.cl.lm_weight else 1  # what is embedded, and what the language loss reads
            add("07_rg_cl", "RG-CL", int(clicked * how.cl.epochs) * (prompt + query) * runs, 0, learning)
            if repeats:
                add("07_rg_cl", "write queries to embed", clicked * prompt, clicked * query)
        embed("08_closed_loop", "train and valid again", train_valid)
        write_terms("08_closed_loop", train_valid - clicked)
        embed("09_evaluation", "test again", test)
        write_terms("09_evaluation", test)
    table = pd.DataFrame(rows, columns=["stage", "what", "read", "written", "operations"])
    return table.sort_values("stage", kind="stable", ignore_index=True)


def seconds(table: pd.DataFrame, params: Params, size: ModelSize, card: Card, processes: int) -> pd.Series:
    """(rows,) seconds of each row of `work` on so many cards; a step of writing is one token of each of its queries."""
    from rgalign.reasoner.generate import TOKENS_PER_BATCH

    if card.bandwidth is None:
        return (
            table["read"].astype(float) * table["operations"] + WRITTEN_ON_CPU * 2 * size.trunk * table["written"]
        ) / (card.operations * processes)
    document = params.reasoner.max_tokens + params.reasoner.queries.max_new_tokens
    together = max(1, TOKENS_PER_BATCH["cuda"] // document)
    cache = together * document * size.layers * size.cached * BYTES[params.reasoner.dtype]
    moved = memory_of_weights(params, size) + CACHE_MOVED * cache
    a_token = max(moved / card.bandwidth / UTILISATION, size.layers * LAUNCHES) / together
    reading = table["read"].astype(float) * table["operations"] / card.operations  # more than int64 can hold
    return (reading / UTILISATION + table["written"] * a_token) / processes


def memory_of_weights(params: Params, size: ModelSize) -> float:
    """Bytes of the model as it is loaded."""
    own = BYTES[params.reasoner.dtype]
    return size.linear * PACKED.get(params.reasoner.quantize, own) + (size.parameters - size.linear) * own


def memory(params: Params, size: ModelSize, *, processes: int = 1, sharded: bool = False) -> dict[str, float]:
    """Bytes on each card at the widest step of the alignment's steps, by what they are for.

    sharded  FSDP, ZeRO-3: trained weights, gradients and optimizer are sharded over the processes
    """
    how = params.alignment
    own = BYTES[params.reasoner.dtype] if how.lora else TRAINED
    learning = size.lora(how.lora.rank) if how.lora else size.parameters
    state = 1 if how.engine.optimizer == "adamw_8bit" else TRAINED  # of each of AdamW's two numbers a parameter
    tokens, queries = widest_step(params, size, processes)
    kept = size.layers * size.activations
    if how.engine.gradient_checkpointing:  # each layer's input, and one layer whole
        kept = size.layers * size.hidden + size.activations
    copies = 2 if params.run.precision == "bf16" else 0
    weights, share = memory_of_weights(params, size), processes if sharded else 1
    trained = weights if how.lora else size.parameters * (TRAINED + copies)
    return {
        "weights": weights + trained / share,  # the model that a stage starts from stays beside it, and is not sharded
        "gradients": learning * TRAINED / share,
        "optimizer": 2 * learning * state / share,
        "activations": tokens * kept * own,
        "logits": queries * size.vocabulary * (own + 8),  # the head's own, and twice float32 for the loss
    }


def tokens_of_pair(params: Params, size: ModelSize) -> int:
    """Tokens that RG-DPO reads for a pair or a list, or GRPO for a group, at most (alignment.logprobs)."""
    prompt, query, many = params.reasoner.max_tokens, params.reasoner.queries.max_new_tokens, queries_of_row(params)
    return prompt + many * (query + 1) - 1 if size.full_attention else many * (prompt + query)


def queries_of_row(params: Params) -> int:
    """Queries that RG-DPO, or GRPO in its place, reads of a session, at most."""
    from rgalign.alignment.objectives import LIST_OBJECTIVES

    how = params.alignment.dpo
    if params.alignment.grpo.use:
        return params.alignment.grpo.samples
    return how.list_size if how.objective in LIST_OBJECTIVES else 2


def widest_step(params: Params, size: ModelSize, processes: int) -> tuple[int, int]:
    """Tokens, and queries' tokens, that a process runs at once at most; not of the same step where pairs have more."""
    how, query = params.alignment, params.reasoner.queries.max_new_tokens
    document = (params.reasoner.max_tokens + query, query)
    wide = {"sft": document, "dpo": (tokens_of_pair(params, size), queries_of_row(params) * query), "cl": document}
    rows = {"sft": how.sft.documents_per_batch, "dpo": how.dpo.pairs_per_batch, "cl": how.cl.documents_per_batch}
    rows |= {"dpo": how.grpo.sessions_per_step} if how.grpo.use else {}
    found = [(0, 0)]
    for name in STEPS if how.loop.rounds else ():
        at_once = -(-rows[name] // processes)
        if how.engine.tokens_per_batch and name != "cl":
            at_once = min(rows[name], max(1, how.engine.tokens_per_batch // wide[name][0]))
        if getattr(how, name).use:
            found.append((at_once * wide[name][0], at_once * wide[name][1]))
    return max(tokens for tokens, _ in found), max(queries for _, queries in found)


def describe(params: Params, card: str | None = None) -> str:
    """What is printed before a run begins: the estimate, or why there is none. Raises ParamsError for an unknown card.

    card  a name of CARDS; None: the one that is here, else PLANNED_FOR
    """
    reasoner = params.reasoner
    if reasoner.model == TINY:
        return "the language model is tiny: seconds by stage above are all there is to say, and memory is small"
    folder = model_folder(reasoner.model)
    if folder is None:
        return f"no estimate: {reasoner.model} is not on this machine (python -m rgalign models {reasoner.model})"
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        size = model_size(config, kind=reasoner.kind)
    except (OSError, ValueError) as error:  # notebook 02 lists all that is wrong with a model
        return f"no estimate: {reasoner.model} has no config that can be read ({str(error).splitlines()[0]})"
    found, note = _card(card, params.run.device)
    if found is None and note:
        return note
    found = found or this_cpu(config, params)
    launcher = params.run.launcher or ""
    count = (distributed.planned(launcher) if launcher else 1) or 1
    table = work(params, size, size_of(params.data).sessions, mean_lengths(params))
    hours = seconds(table, params, size, found, count) / 3600
    shown = table[["stage", "what"]].assign(**{"million tokens": ((table["read"] + table["written"]) / 1e6).round(1)})
    held = memory(params, size, processes=count, sharded="fsdp" in launcher or "zero3" in launcher)
    parts, total = ", ".join(f"{name} {amount / GIB:.1f}" for name, amount in held.items()), sum(held.values())
    unit, reached, verdict = "process", "", ""
    if found.bandwidth is not None:
        unit, reached = "card", f" at {UTILISATION:.0%} of its peak"
        verdict = f" of {found.memory / GIB:.0f}: {'fits' if total < 0.9 * found.memory else 'DOES NOT FIT'}"
    lines = [
        f"estimate for {count} x {found.name}{reached}; at most (commands/estimate.py)",
        f"{params.reasoner.model}: {size.parameters:,} parameters, {size.trunk:,} without vocabulary",
        shown.assign(hours=hours.round(2)).to_string(index=False),
        f"about {hours.sum():.1f} hours in all, and {hours.sum() * count:.1f} {unit}-hours",
        f"memory a {unit}, GiB: {parts}; {total / GIB:.1f}{verdict}",
    ]
    return "\n".join([note, *lines] if note else lines)


def _card(name: str | None, device: str) -> tuple[Card | None, str]:
    """The card that an estimate is for, and a note; None: it is for this CPU, or a note says why there is none."""
    import torch

    if name is not None:
        if name not in CARDS:
            raise ParamsError(f"--card is {name}; expected one of {', '.join(CARDS)}")
        return CARDS[name], ""
    if torch.cuda.is_available() and device in ("auto", "cuda"):
        here = torch.cuda.get_device_properties(0)
        known = next((card for key, card in CARDS.items() if key in here.name), None)
        if known is None:
            return None, f"no estimate: {here.name} is not in rgalign/commands/estimate.py; --card names one like it"
        return Card(here.name, known.operations, known.bandwidth, here.total_memory), ""
    if device == "cuda":
        return CARDS[PLANNED_FOR], f"no CUDA device is here: the estimate is for one {PLANNED_FOR} (--card for another)"
    return None, ""


def this_cpu(config: "PreTrainedConfig", params: Params) -> Card:
    """This CPU with run.threads: operations a second of two layers of the model, with random weights, forward."""
    import torch
    from transformers import AutoModel

    shallow = copy.deepcopy(config)
    text = shallow.get_text_config()
    text.num_hidden_layers, text.vocab_size, threads = 2, 64, torch.get_num_threads()
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:2]
    torch.set_num_threads(params.run.threads)
    try:
        model = AutoModel.from_config(shallow, dtype=getattr(torch, params.reasoner.dtype)).eval()
        ids = torch.ones((16, 64), dtype=torch.long)
        with torch.inference_mode():
            took = min(timeit.repeat(lambda: model(input_ids=ids), number=1, repeat=5))
    finally:
        torch.set_num_threads(threads)
    weights = sum(each.numel() for each in model.parameters()) - model.get_input_embeddings().weight.numel()
    return Card("this CPU", 2 * weights * ids.numel() / took, None, math.inf)


def mean_lengths(params: Params) -> tuple[int, int] | None:
    """Mean tokens of a prompt and of a typed question, from the tables of data.source folder; None of another."""
    if params.data.source != "folder":
        return None
    folder, how = artifacts.data_path(str(params.data.path)), params.reasoner
    kinds = feature_kinds(folder)
    shown = [name for name in how.features or kinds if kinds[name] == "text"]
    batch = next(typed_batches(folder, "sessions", 1000, shown), None) if shown else None
    if batch is None:
        return None
    texts = batch.to_pandas().fillna("").agg(" ".join, axis=1).str.len().mean()
    around = 40 + len(how.instruction or "") / CHARACTERS  # the chat template and the asking mark [C]
    query = how.queries.max_new_tokens
    if is_there(folder, "transcripts"):
        typed = next(typed_batches(folder, "transcripts", 1000, ["typed_query"])).to_pandas()["typed_query"]
        query = min(query, round(typed.str.len().mean() / CHARACTERS) + 1)
    return min(how.max_tokens, round(texts / CHARACTERS + around)), query
