"""Log-probabilities of queries given their prompts: of documents, and of preference pairs, which may share a prompt."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedConfig

from rgalign.reasoner.batches import documents, evaluating, is_out_of_memory, retry_smaller, right_padded, tokens_of
from rgalign.reasoner.model import Reasoner
from rgalign.reasoner.query_loss import query_log_probabilities, token_log_probabilities
from rgalign.run import distributed


@dataclass(frozen=True)
class Layout:
    """How rows become batches. log_probabilities: (queries * rows,) float32 log p(query | prompt) in nats, all first
    ones first."""

    collate: Callable[[Sequence[dict], int], dict[str, Tensor]]  # rows and the pad token -> a batch
    width: Callable[[dict], tuple[int, int]]  # of a row: tokens of its widest document, and how many documents it has
    log_probabilities: Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
    queries: int = 2  # of a row: 1, or 2 of a preference pair, whose row has `documents` (chosen, rejected)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, rows: Sequence[dict], pad: int, what: str) -> Tensor:
        """(queries, rows) on the CPU, of the model in eval mode; in halves where memory is short, as the log says."""
        device = next(model.parameters()).device

        def run(part: Sequence[dict]) -> Tensor:
            batch = {name: value.to(device) for name, value in self.collate(part, pad).items()}
            return self.log_probabilities(model, batch).view(self.queries, -1).cpu()

        with evaluating(model):
            return torch.cat([found for _, found in retry_smaller(run, rows, what)], dim=1)


def batched(
    reasoner: Reasoner, rows: Sequence[dict], layout: Layout, *, rows_per_batch: int, title: str, progress: bool
) -> np.ndarray:
    """(queries, rows) float32 of the model in eval mode; a batch has rows of about one width.

    Called in several processes, each runs a part of the batches, and all return the whole.
    """
    order = sorted(range(len(rows)), key=lambda row: (layout.width(rows[row]), row))
    found, pad = torch.zeros(layout.queries, len(rows)), reasoner.tokenizer.pad_token_id
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
    rows, layout = documents(prompts, queries), Layout(right_padded, tokens_of, query_log_probabilities, queries=1)
    how = {"rows_per_batch": documents_per_batch, "title": "log-probabilities", "progress": progress}
    return batched(reasoner, rows, layout, **how)[0]


# The two documents of a preference pair: each after a prompt of its own (SEPARATE), or both after one (PREFIX_SHARED,
# Wang and Hegde 2024, arXiv 2410.20305): reading a prompt once about halves RG-DPO's work. Such a row is
#     prompt, chosen query, the prompt's last token again, rejected query
# From that repeated token on, a mask hides the chosen query and the token's first place, and positions are as if the
# rejected query followed the prompt directly.

# By how many nats a token's log-probability may change with the layout of its batch, by the type of the weights (where
# all weights are trained, RG-DPO's policy begins from the same ones in float32).
ROUNDING = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}


def _chosen_first(rows: Sequence[dict]) -> list[dict]:
    return [row["documents"][side] for side in (0, 1) for row in rows]


def query_tokens(rows: Sequence[dict]) -> Tensor:
    """(2 * rows,): how many tokens the queries have, all chosen ones first."""
    return torch.tensor([len(document["input_ids"]) - document["prompt"] for document in _chosen_first(rows)])


def _shared(rows: Sequence[dict], pad: int) -> dict[str, Tensor]:
    """ids (rows, longest); prompt, middle and length (rows,): where prompt, chosen query and row end."""
    ids, ends = [], []
    for row in rows:
        chosen, rejected = (document["input_ids"] for document in row["documents"])
        prompt = row["documents"][0]["prompt"]
        ids.append(chosen + rejected[prompt - 1 :])
        ends.append((prompt, len(chosen), len(ids[-1])))
    longest = max(map(len, ids))
    padded = torch.tensor([own + [pad] * (longest - len(own)) for own in ids])
    return {"ids": padded, **dict(zip(("prompt", "middle", "length"), torch.tensor(ends).T, strict=True))}


def _shared_width(row: dict) -> tuple[int, int]:
    chosen, rejected = row["documents"]
    return len(chosen["input_ids"]) + len(rejected["input_ids"]) - rejected["prompt"] + 1, 1


def _shared_log_probabilities(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    prompt, middle, length = (batch[name][:, None] for name in ("prompt", "middle", "length"))
    place = torch.arange(batch["ids"].shape[1], device=prompt.device)
    second = place >= middle  # the rejected query, from the prompt's last token on; and padding, which is not used
    hidden = second[:, :, None] & ((place >= prompt - 1) & ~second)[:, None]
    seen = (place <= place[:, None]) & ~hidden  # (rows, longest, longest)
    positions = torch.where(second, place - middle + prompt - 1, place)
    positions = torch.where(place < length, positions, 0)  # padding's would go on past what the model knows
    after = place[1:]  # tokens that something comes before
    chosen, rejected = (after >= prompt) & (after < middle), (after > middle) & (after < length)
    more = {"attention_mask": seen[:, None], "position_ids": positions}
    log_p = token_log_probabilities(model, batch["ids"], chosen | rejected, **more)
    return torch.cat([(log_p * own).sum(dim=1) for own in (chosen, rejected)])


SEPARATE = Layout(
    collate=lambda rows, pad: right_padded(_chosen_first(rows), pad),
    width=lambda row: (max(len(document["input_ids"]) for document in row["documents"]), 2),
    log_probabilities=query_log_probabilities,
)
PREFIX_SHARED = Layout(_shared, _shared_width, _shared_log_probabilities)


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
    gap = ((shared - separate).abs() / query_tokens(rows).view(2, -1)).max()
    return PREFIX_SHARED if gap <= rounding_of(model) else SEPARATE


def full_attention(config: PreTrainedConfig) -> bool:
    """Whether every token attends to all before it, in all layers: a sliding window or a recurrent state does not
    respect a mask."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    return kinds == {"full_attention"} and not getattr(text, "sliding_window", None)
