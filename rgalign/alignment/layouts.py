"""How the two documents of a preference pair are put before the model: behind one prompt, or each behind its own.

Prompts are many times as long as queries, so that a prompt that is read once about halves RG-DPO's work. Such a row is

    prompt, chosen query, the prompt's last token once more, rejected query

From that repeated token on, a mask hides the chosen query and the token's first place, and positions are as if the
rejected query stood right behind the prompt.
Prefix sharing for pairs: Wang and Hegde 2024 (arXiv 2410.20305).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from rgalign.alignment.tuning import query_log_probabilities, token_log_probabilities
from rgalign.reasoner import training
from rgalign.reasoner.memory import in_halves, is_out_of_memory

TRIED = 2  # pairs by which a layout is judged
# By how many nats a token's log-probability may move when its batch is laid out otherwise, by the type of the weights
# that it is made with (where all weights learn, RG-DPO's policy begins from the same ones in float32).
ROUNDING = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class Layout:
    """collate  rows with `documents` (chosen, rejected), and the pad token -> a batch
    width    of a row: tokens of its widest document, and how many documents it has
    said     (model, batch) -> (2 * rows,) float32: log p(query | prompt) in nats, all chosen ones first
    """

    collate: Callable[[Sequence[dict], int], dict[str, Tensor]]
    width: Callable[[dict], tuple[int, int]]
    said: Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


def query_tokens(rows: Sequence[dict]) -> Tensor:
    """(2 * rows,): how many tokens the queries have, all chosen ones first."""
    return torch.tensor([len(document["input_ids"]) - document["prompt"] for document in _chosen_first(rows)])


def _chosen_first(rows: Sequence[dict]) -> list[dict]:
    return [row["documents"][side] for side in (0, 1) for row in rows]


def _apart(rows: Sequence[dict], pad: int) -> dict[str, Tensor]:
    """A batch of `training.right_padded`: all chosen documents, then all rejected ones, in one forward."""
    return training.right_padded(_chosen_first(rows), pad)


def _apart_width(row: dict) -> tuple[int, int]:
    return max(len(document["input_ids"]) for document in row["documents"]), 2


def _behind_one(rows: Sequence[dict], pad: int) -> dict[str, Tensor]:
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


def _one_width(row: dict) -> tuple[int, int]:
    chosen, rejected = row["documents"]
    return len(chosen["input_ids"]) + len(rejected["input_ids"]) - rejected["prompt"] + 1, 1


def _said_behind_one(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    prompt, middle, length = (batch[name][:, None] for name in ("prompt", "middle", "length"))
    place = torch.arange(batch["ids"].shape[1], device=prompt.device)
    second = place >= middle  # the rejected query, from the prompt's last token on; and padding, which nobody reads
    hidden = second[:, :, None] & ((place >= prompt - 1) & ~second)[:, None]
    seen = (place <= place[:, None]) & ~hidden  # (rows, longest, longest)
    positions = torch.where(second, place - middle + prompt - 1, place)
    positions = torch.where(place < length, positions, 0)  # padding's would go on past what the model knows
    after = place[1:]  # tokens that something comes before
    chosen, rejected = (after >= prompt) & (after < middle), (after > middle) & (after < length)
    more = {"attention_mask": seen[:, None], "position_ids": positions}
    said = token_log_probabilities(model, batch["ids"], chosen | rejected, **more)
    return torch.cat([(said * own).sum(dim=1) for own in (chosen, rejected)])


APART = Layout(_apart, _apart_width, query_log_probabilities)
BEHIND_ONE = Layout(_behind_one, _one_width, _said_behind_one)


def rounding_of(model: nn.Module) -> float:
    """Nats a token by which equal queries may be apart, of a model with weights of this type."""
    return ROUNDING.get(next(model.parameters()).dtype, ROUNDING[torch.bfloat16])


def layout_for(model: nn.Module, rows: Sequence[dict], *, pad: int) -> Layout:
    """BEHIND_ONE where the model heeds a mask of ours: torch's attention in all layers, and the same figures as APART.

    The first of these rows are read in both ways, in eval mode, to find out; a model may also refuse such a mask. What
    the device has no memory for is halved.
    """
    if model.config.get_text_config()._attn_implementation != "sdpa" or not full_attention(model.config):
        return APART
    rows = rows[:TRIED]
    apart = _tried(model, APART, rows, pad)
    try:
        one = _tried(model, BEHIND_ONE, rows, pad)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        return APART
    gap = ((one - apart).abs() / query_tokens(rows).view(2, -1)).max()
    return BEHIND_ONE if gap <= rounding_of(model) else APART


def full_attention(config: PreTrainedConfig) -> bool:
    """Whether every token sees all before it, in all layers: a window that slides, or a state that is carried along,
    would look past a mask."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    return kinds == {"full_attention"} and not getattr(text, "sliding_window", None)


@torch.no_grad()
def _tried(model: nn.Module, layout: Layout, rows: Sequence[dict], pad: int) -> Tensor:
    """(2, rows) on the CPU: what the model says in eval mode."""
    was_training, device = model.training, next(model.parameters()).device

    def read(part: Sequence[dict]) -> Tensor:
        batch = {name: value.to(device) for name, value in layout.collate(part, pad).items()}
        return layout.said(model, batch).view(2, -1).cpu()

    model.eval()
    try:
        return torch.cat([said for _, said in in_halves(read, rows, "RG-DPO")], dim=1)
    finally:
        model.train(was_training)
