"""Learning to write: log p of queries given their prompts, and the training that raises it (the warm-up, RG-SFT)."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from rgalign.reasoner.batches import Task, documents, right_padded
from rgalign.reasoner.generate import expanded, has_plain_cache
from rgalign.reasoner.model import Reasoner, fingerprint
from rgalign.reasoner.trainer import Schedule, Setup, fit

SHORT = 8  # a shared beginning of fewer tokens is not worth a run of its own [C]


def learn_queries(
    reasoner: Reasoner,
    prompts: Sequence[Sequence[int]],
    queries: Sequence[Sequence[int]],
    schedule: Schedule,
    setup: Setup,
    *,
    title: str,
    head: int = 0,
) -> tuple[Reasoner, pd.DataFrame]:
    """A reasoner tuned to write these queries, and its curve: step, loss, seconds.

    prompts, queries  token ids (Prompter.sessions, Prompter.queries), end id last
    head              how many first ids all prompts share: they are run once a batch, and the loss is the same. With
                      noise on embeddings or dropout in the adapter, of which each row has its own, they are not
    """
    noisy = schedule.neftune or (setup.lora is not None and setup.lora.dropout)
    collate = partial(right_padded, pad=reasoner.tokenizer.pad_token_id)
    loss = partial(query_loss, head=head) if head >= SHORT and not noisy else query_loss
    rows = documents(prompts, queries)
    task = Task(title, rows, collate, loss, weight=lambda row: len(row["input_ids"]) - row["prompt"])
    return fit(reasoner, task, schedule, setup, identity={"reasoner": fingerprint(reasoner)})


def query_loss(model: nn.Module, batch: Mapping[str, Tensor], *, head: int = 0) -> tuple[Tensor, dict]:
    """Mean of -log p per query token of a batch of `right_padded`, in nats. head: see `query_log_probabilities`."""
    tokens = (batch["length"] - batch["prompt"]).sum()
    return -query_log_probabilities(model, batch, head=head).sum() / tokens, {}


def query_log_probabilities(
    model: nn.Module, batch: Mapping[str, Tensor], *, head: int = 0, cache: DynamicCache | None = None
) -> Tensor:
    """(rows,) float32: log p(query | prompt) in nats, summed over the query's tokens, the end token included.

    batch  ids (rows, longest), prompt (rows,), length (rows,), see `right_padded`
    head   first tokens of all rows that are the same and shorter than any prompt: they are run once
    cache  of the head, where the caller has run it already (`prefix_cache`)
    """
    ids, more = batch["ids"], {}
    cache = prefix_cache(model, ids[:1, :head]) if head and cache is None else cache
    if cache is not None:
        ids, more = ids[:, head:], {"past_key_values": expanded(cache, len(ids)), "use_cache": True}
    before = head if more else 0
    place = torch.arange(1, ids.shape[1], device=ids.device) + before
    asked = (place >= batch["prompt"][:, None]) & (place < batch["length"][:, None])
    return token_log_probabilities(model, ids, asked, **more).sum(dim=1)


def prefix_cache(model: nn.Module, ids: Tensor) -> DynamicCache | None:
    """Keys and values of these tokens (1, tokens); None where a model keeps others, or none (checkpointing)."""
    cache = getattr(model(input_ids=ids, use_cache=True, logits_to_keep=1), "past_key_values", None)
    return cache if has_plain_cache(cache, (DynamicLayer,)) else None


def token_log_probabilities(model: nn.Module, ids: Tensor, asked: Tensor, **more: Any) -> Tensor:
    """(rows, longest - 1) float32: log p in nats of each token behind the first, given those before it; 0: not asked.

    ids (rows, longest); asked (rows, longest - 1): which of them; more: what else the model is given, such as a mask
    Only the states before the asked tokens reach the language head. They are picked as they enter it: so the model
    does to its logits whatever it does after the head (Gemma caps them), and no logits of prompts are ever made.
    """

    def pick(head: nn.Module, states: tuple[Tensor]) -> tuple[Tensor]:
        return (states[0][:, :-1][asked][None],)  # (1, query tokens, hidden)

    with model.get_output_embeddings().register_forward_pre_hook(pick):
        logits = model(input_ids=ids, **{"use_cache": False, **more}).logits[0]
    log_p = -functional.cross_entropy(logits.float(), ids[:, 1:][asked], reduction="none")
    # by place and not by index_add: on a GPU that adds in any order
    return torch.zeros(asked.shape, device=ids.device).masked_scatter(asked, log_p)
