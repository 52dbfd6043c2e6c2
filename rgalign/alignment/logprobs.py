"""What the stages that tune a reasoner share: the model to be trained, and the log-probabilities of its queries."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, TrainerCallback

from rgalign.reasoner import training
from rgalign.reasoner.adapter import ready_to_save
from rgalign.reasoner.model import Reasoner
from rgalign.reasoner.trainer import in_halves, is_out_of_memory
from rgalign.run import distributed
from rgalign.seeding import seeded


def trainable(reasoner: Reasoner, lora: Mapping[str, Any] | None, *, seed: int) -> nn.Module:
    """A deep copy of the reasoner's model, ready to be trained.

    lora  rank, alpha and, where they differ from these, dropout 0, targets "all-linear" (peft's target_modules): low-
          rank matrices beside the frozen weights (Hu et al. 2022), the first drawn from `seed`, the second zero, so
          that nothing is changed at first. None: all weights, in float32 whatever type they came in: a step of AdamW
          is smaller than what a bfloat16 weight can move by (engine.precision bf16 multiplies in bfloat16 all the same)
    An adapter of a stage before is trained on, as it is. Raises ValueError for an encoder with lora, and where lora
    asks for another rank or alpha than that adapter has.
    """
    model = copy.deepcopy(reasoner.model)
    if isinstance(model, PeftModel):
        _check_adapter(model, lora)
        model.set_adapter(model.active_adapter)  # read from a folder it is frozen
    elif lora is None:
        for weight in model.parameters():  # in place: tied ones stay tied
            weight.data = weight.data.float()
        return model.requires_grad_(True).train()
    elif reasoner.kind != "causal":
        raise ValueError(f"{reasoner.name} is an encoder, which takes no adapter; set lora to None: all weights")
    else:
        with seeded(seed):
            model = get_peft_model(model, _config(**lora))
    return ready_to_save(model).train()


def _config(
    *, rank: int, alpha: float, dropout: float = 0.0, targets: str | Sequence[str] = "all-linear"
) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")


def _check_adapter(model: PeftModel, lora: Mapping[str, Any] | None) -> None:
    if lora is None:
        return
    own, asked = model.peft_config[model.active_adapter], _config(**lora)
    if (asked.r, asked.lora_alpha) != (own.r, own.lora_alpha):
        raise ValueError(
            f"the reasoner has an adapter of rank {own.r} and alpha {own.lora_alpha}, which would be trained on; lora "
            f"asks for rank {asked.r} and alpha {asked.lora_alpha}: use the same in every stage, or merge it first"
        )


def tuned(reasoner: Reasoner, model: nn.Module) -> Reasoner:
    """The reasoner with this trained model in place of its own, in eval mode; its weights in the type of its own."""
    if not isinstance(model, PeftModel):
        for weight, own in zip(model.parameters(), reasoner.model.parameters(), strict=True):
            weight.data = weight.data.to(own.dtype)
    return replace(reasoner, model=model.eval())


def query_log_probabilities(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """(rows,) float32: log p(query | prompt) in nats, summed over the query's tokens, the end token included.

    batch  ids (rows, longest), prompt (rows,), length (rows,), as of `training.right_padded`
    """
    ids, place = batch["ids"], torch.arange(1, batch["ids"].shape[1], device=batch["ids"].device)
    asked = (place >= batch["prompt"][:, None]) & (place < batch["length"][:, None])
    return token_log_probabilities(model, ids, asked).sum(dim=1)


def token_log_probabilities(model: nn.Module, ids: Tensor, asked: Tensor, **more: Tensor) -> Tensor:
    """(rows, longest - 1) float32: log p in nats of each token behind the first, given those before it; 0: not asked.

    ids (rows, longest); asked (rows, longest - 1): which of them; more: what else the model is given, such as a mask
    Only the states before the asked tokens reach the language head. They are picked as they enter it: so the model
    does to its logits whatever it does after the head (Gemma caps them), and no logits of prompts are ever made.
    """

    def pick(head: nn.Module, states: tuple[Tensor]) -> tuple[Tensor]:
        return (states[0][:, :-1][asked][None],)  # (1, query tokens, hidden)

    with model.get_output_embeddings().register_forward_pre_hook(pick):
        logits = model(input_ids=ids, use_cache=False, **more).logits[0]
    log_p = -functional.cross_entropy(logits.float(), ids[:, 1:][asked], reduction="none")
    # by place and not by index_add: on a GPU that adds in any order
    return torch.zeros(asked.shape, device=ids.device).masked_scatter(asked, log_p)


def log_probabilities(
    reasoner: Reasoner,
    prompts: Sequence[Sequence[int]],
    queries: Sequence[Sequence[int]],
    *,
    documents_per_batch: int = 64,
    title: str = "log-probabilities",
    progress: bool = True,
) -> np.ndarray:
    """(documents,) float32: `query_log_probabilities` of given queries, as `said_of` makes them."""
    rows = training.Documents(prompts, queries).rows
    how = dict(collate=training.right_padded, said=query_log_probabilities, width=training.tokens_of)
    return said_of(reasoner, rows, **how, rows_per_batch=documents_per_batch, title=title, progress=progress)[0]


@torch.no_grad()
def said_of(
    reasoner: Reasoner,
    rows: Sequence[dict],
    *,
    collate: Callable[[Sequence[dict], int], dict[str, Tensor]],
    said: Callable[[nn.Module, Mapping[str, Tensor]], Tensor],
    width: Callable[[dict], tuple[int, int]],
    queries: int = 1,
    rows_per_batch: int,
    title: str,
    progress: bool,
) -> np.ndarray:
    """(queries, rows) float32: what the model says in eval mode of so many queries a row; a batch has about one width.

    collate  rows and the pad token -> a batch;  said (model, batch) -> (queries * rows,), all first ones first
    A batch that the device has no memory for is halved, and the log says so.
    Called in several processes, each runs every so many-th batch, and all return the whole.
    """
    order = sorted(range(len(rows)), key=lambda row: (width(rows[row]), row))
    found = torch.zeros(queries, len(rows))
    firsts = range(0, len(order), rows_per_batch)[distributed.index() :: distributed.count()]
    was_training = reasoner.model.training
    reasoner.model.eval()

    def read(part: Sequence[int]) -> Tensor:
        batch = collate([rows[row] for row in part], reasoner.tokenizer.pad_token_id)
        batch = {name: value.to(reasoner.device) for name, value in batch.items()}
        return said(reasoner.model, batch).view(queries, -1).cpu()

    try:
        for start in tqdm(firsts, desc=title, disable=not progress or distributed.index() > 0):
            for part, values in in_halves(read, order[start : start + rows_per_batch], title):
                found[:, part] = values
    finally:
        reasoner.model.train(was_training)
    return distributed.summed(found.to(reasoner.device)).cpu().numpy()


class Watch(TrainerCallback):
    """Shows the model in training to an onlooker, who may stop it; the training does not notice being watched.

    look   (reasoner in eval mode, step) -> whether to stop. After a kill it is asked again only for steps behind the
           last checkpoint, some of which it may have seen before; what it keeps in `rows`, by step (JSON), if it has
           any, is in the checkpoints and is given back to it
    steps  optimiser steps between two looks
    """

    def __init__(self, reasoner: Reasoner, look: Callable[[Reasoner, int], bool], steps: int):
        self.reasoner, self.look, self.steps = reasoner, look, steps
        self.rows = getattr(look, "rows", {})

    def on_train_begin(self, args, state, control, **_) -> None:
        self.rows.update({entry["step"]: entry["look"] for entry in state.log_history if "look" in entry})

    def on_step_end(self, args, state, control, model: nn.Module, **_) -> None:
        if state.global_step % self.steps:
            return
        with training.kept_random_states():
            seen = replace(self.reasoner, model=model.eval())  # its weights stay in the type in which they learn
            stop = distributed.agreed(self.look(seen, state.global_step))
        model.train()
        if state.global_step in self.rows:
            state.log_history.append({"step": state.global_step, "look": self.rows[state.global_step]})
        if stop:
            control.should_training_stop = control.should_log = True
            control.should_save = False  # Trainer forgets that it was to stop: it would go on from this checkpoint


# How the two documents of a preference pair are put before the model: behind one prompt, or each behind its own.
#
# Prompts are many times as long as queries, so that a prompt that is read once about halves RG-DPO's work. Such a row
# is
#
#     prompt, chosen query, the prompt's last token once more, rejected query
#
# From that repeated token on, a mask hides the chosen query and the token's first place, and positions are as if the
# rejected query stood right behind the prompt.
# Prefix sharing for pairs: Wang and Hegde 2024 (arXiv 2410.20305).

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
