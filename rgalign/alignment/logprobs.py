"""Log-probabilities of queries given their prompts: of documents, and of several queries that may share a prompt."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedConfig

from rgalign.reasoner.batches import documents, evaluating, is_out_of_memory, retry_smaller, right_padded, tokens_of
from rgalign.reasoner.model import Reasoner
from rgalign.reasoner.query_loss import token_log_probabilities
from rgalign.run import distributed


@dataclass(frozen=True)
class Layout:
    """How rows become batches. A row is a document, or has `documents`: n queries of one prompt (of a preference pair
    chosen, rejected). Of a missing query the document is the prompt alone, and its log-probability is 0."""

    collate: Callable[[Sequence[dict], int], dict[str, Tensor]]  # rows and the pad token -> a batch
    width: Callable[[dict], tuple[int, int]]  # of a row: tokens of its widest document, and how many documents it has
    # -> log p of each token but the first, in nats, 0 outside of queries (lines, longest - 1); those of each query:
    # the first, and the one behind the last (queries a line, lines)
    tokens: Callable[[nn.Module, Mapping[str, Tensor]], tuple[Tensor, Tensor, Tensor]]

    def log_probabilities(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """(queries * rows,) float32 log p(query | prompt) in nats, the first queries of all rows first."""
        log_p, first, end = self.tokens(model, batch)
        place = torch.arange(log_p.shape[1], device=log_p.device)
        own = (place >= first[..., None]) & (place < end[..., None])  # (queries, lines, longest - 1)
        return torch.cat([(log_p * query).sum(dim=1) for query in own])

    def by_token(self, model: nn.Module, batch: Mapping[str, Tensor], width: int) -> Tensor:
        """(queries * rows, width) float32: the same of each of a query's first `width` tokens; 0 behind its end."""
        log_p, first, end = self.tokens(model, batch)
        place = first[..., None] + torch.arange(width, device=log_p.device)  # (queries, lines, width)
        wide = log_p.expand(len(first), *log_p.shape).gather(2, place.clamp(max=log_p.shape[1] - 1))
        return (wide * (place < end[..., None])).flatten(0, 1)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, rows: Sequence[dict], pad: int, what: str, width: int | None = None) -> Tensor:
        """(queries, rows) on the CPU, of the model in eval mode; in halves where memory is short, as the log says.
        width: (queries, rows, width) by token."""
        device = next(model.parameters()).device

        def run(part: Sequence[dict]) -> Tensor:
            batch = {name: value.to(device) for name, value in self.collate(part, pad).items()}
            if width is not None:
                return self.by_token(model, batch, width).view(-1, len(part), width).cpu()
            return self.log_probabilities(model, batch).view(-1, len(part)).cpu()

        with evaluating(model):
            return torch.cat([found for _, found in retry_smaller(run, rows, what)], dim=1)


def batched(
    reasoner: Reasoner, rows: Sequence[dict], layout: Layout, *, rows_per_batch: int, title: str, progress: bool
) -> np.ndarray:
    """(queries, rows) float32 of the model in eval mode; a batch has rows of about one width.

    Called in several processes, each runs a part of the batches, and all return the whole.
    """
    order = sorted(range(len(rows)), key=lambda row: (layout.width(rows[row]), row))
    queries, pad = len(rows[0].get("documents", [0])) if rows else 1, reasoner.tokenizer.pad_token_id
    found = torch.zeros(queries, len(rows))
    firsts = range(0, len(order), rows_per_batch)[distributed.index() :: distributed.count()]
    for first in tqdm(firsts, desc=title, disable=not progress or distributed.index() > 0):
        part = order[first : first + rows_per_batch]
        found[:, part] = layout.evaluate(reasoner.model, [rows[row] for row in part], pad, title)
    return distributed.summed(found.to(reasoner.device)).cpu().numpy()


def log_probabilities(
    reasoner: Reasoner,
    prompts: Sequence[Sequence[int]],
    queries: Sequence[Sequence[int]],
    *,
    documents_per_batch: int = 64,
    progress: bool = True,
) -> np.ndarray:
    """(documents,) float32: `query_log_probabilities` of given queries, in batches of about one length."""
    rows, layout = documents(prompts, queries), Layout(right_padded, tokens_of, _of_documents)
    how = {"rows_per_batch": documents_per_batch, "title": "log-probabilities", "progress": progress}
    return batched(reasoner, rows, layout, **how)[0]


# The queries of one prompt: each after a prompt of its own (SEPARATE), or all after one (PREFIX_SHARED, Wang and Hegde
# 2024, arXiv 2410.20305): reading a prompt once about halves the work of a preference pair. Such a row is
#     prompt, first query, the prompt's last token again, second query, the prompt's last token again, ..
# From a repeated token on, a mask hides the queries before and the token's other places, and positions are as if the
# query followed the prompt directly.

# By how many nats a token's log-probability may change with the layout of its batch, by the type of the weights (where
# all weights are trained, RG-DPO's policy begins from the same ones in float32).
ROUNDING = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}


def _query_by_query(rows: Sequence[dict]) -> list[dict]:
    return [document for documents in zip(*(row["documents"] for row in rows), strict=True) for document in documents]


def query_tokens(rows: Sequence[dict]) -> Tensor:
    """(queries * rows,): how many tokens the queries have, the first queries of all rows first."""
    return torch.tensor([len(document["input_ids"]) - document["prompt"] for document in _query_by_query(rows)])


def _of_documents(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    first, end = batch["prompt"] - 1, batch["length"] - 1
    place = torch.arange(batch["ids"].shape[1] - 1, device=first.device)
    asked = (place >= first[:, None]) & (place < end[:, None])
    return token_log_probabilities(model, batch["ids"], asked), first[None], end[None]


def _shared(rows: Sequence[dict], pad: int) -> dict[str, Tensor]:
    """ids (rows, longest); prompt (rows,), ends (rows, queries): where the prompt and each query end."""
    ids, ends = [], []
    for row in rows:
        first, *others = row["documents"]
        own, places, prompt = [*first["input_ids"]], [len(first["input_ids"])], first["prompt"]
        for other in others:
            own += other["input_ids"][prompt - 1 :]
            places.append(len(own))
        ids.append(own)
        ends.append(places)
    longest = max(map(len, ids))
    padded = torch.tensor([own + [pad] * (longest - len(own)) for own in ids])
    prompts = torch.tensor([row["documents"][0]["prompt"] for row in rows])
    return {"ids": padded, "prompt": prompts, "ends": torch.tensor(ends)}


def _shared_width(row: dict) -> tuple[int, int]:
    tokens, prompt = sum(len(each["input_ids"]) for each in row["documents"]), row["documents"][0]["prompt"]
    return tokens - (len(row["documents"]) - 1) * (prompt - 1), 1


def _shared_tokens(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    prompt, ends = batch["prompt"][:, None], batch["ends"]
    place = torch.arange(batch["ids"].shape[1], device=prompt.device)
    # which query a token is of, from the prompt's last token on; 0: prompt and first one; padding (not used): the last
    query = (place >= ends[:, :-1, None]).sum(dim=1)  # (rows, longest)
    before = (place >= prompt - 1)[:, None] & (query[:, None] != query[:, :, None])
    seen = (place <= place[:, None]) & ~((query > 0)[:, :, None] & before)  # (rows, longest, longest)
    start = torch.cat([ends[:, :1] * 0, ends[:, :-1]], dim=1)  # of a query's part; (rows, queries)
    positions = torch.where(query > 0, place - start.gather(1, query) + prompt - 1, place)
    positions = torch.where(place < ends[:, -1:], positions, 0)  # padding's would go on past what the model knows
    # by the tokens that something comes before: the one at place 1 is number 0
    first, end = torch.cat([prompt - 1, ends[:, :-1]], dim=1).T, (ends - 1).T
    own = (place[:-1] >= first[..., None]) & (place[:-1] < end[..., None])
    more = {"attention_mask": seen[:, None], "position_ids": positions}
    return token_log_probabilities(model, batch["ids"], own.any(dim=0), **more), first, end


SEPARATE = Layout(
    collate=lambda rows, pad: right_padded(_query_by_query(rows), pad),
    width=lambda row: (max(len(document["input_ids"]) for document in row["documents"]), len(row["documents"])),
    tokens=_of_documents,
)
PREFIX_SHARED = Layout(_shared, _shared_width, _shared_tokens)


def rounding_of(model: nn.Module) -> float:
    """Nats a token by which log-probabilities may differ between layouts, of a model with weights of this type."""
    return ROUNDING.get(next(model.parameters()).dtype, ROUNDING[torch.bfloat16])


def layout_for(model: nn.Module, rows: Sequence[dict], *, pad: int) -> Layout:
    """PREFIX_SHARED where the model respects our mask: torch's attention in all layers, and the values of SEPARATE on
    the first of these rows; a model may also reject such a mask."""
    if model.config.get_text_config()._attn_implementation != "sdpa" or not full_attention(model.config):
        return SEPARATE
    rows = rows[:2]
    separate = SEPARATE.evaluate(model, rows, pad, "RG-DPO")
    try:
        shared = PREFIX_SHARED.evaluate(model, rows, pad, "RG-DPO")
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        return SEPARATE
    gap = ((shared - separate).abs() / query_tokens(rows).view(shared.shape).clamp(min=1)).max()
    return PREFIX_SHARED if gap <= rounding_of(model) else SEPARATE


def full_attention(config: PreTrainedConfig) -> bool:
    """Whether every token attends to all before it, in all layers: a sliding window or a recurrent state does not
    respect a mask."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    return kinds == {"full_attention"} and not getattr(text, "sliding_window", None)
