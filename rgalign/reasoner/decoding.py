"""Reading prompts and then token by token what is written behind them: with the model's cache, or without.

Most models keep keys and values, which can be repeated for the samples of a prompt. Hybrids (linear attention,
convolutions, Mamba layers) keep states beside them; where those cannot be repeated, or a model keeps nothing at all,
the whole text is read again for every token: the same queries, slower.
"""

import logging
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rgalign.reasoner.memory import is_out_of_memory

KEYS_AND_VALUES = (DynamicLayer, DynamicSlidingWindowLayer)  # by their very type: subclasses hold more
PROBED = 8  # tokens of the prompt that a cache is tried with
# Root mean square of the difference between logits with and without the cache, in their standard deviations: bfloat16
# is within a few hundredths, a cache that mixes up rows or counts padding is about 1 apart [C].
CACHE_GAP = 0.1

logger = logging.getLogger(__name__)
_HOLDS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # models with other caches -> whether they can be used


class State(Protocol):
    """Texts as far as they are read. logits (rows, vocabulary): of each text's next token."""

    logits: Tensor

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, in this order; a row may be named several times."""

    def read(self, tokens: Tensor) -> None:
        """Read one more token a row (rows,)."""


def begin(model: nn.Module, ids: Tensor, mask: Tensor) -> State:
    """The state behind prompts; ids, mask (rows, length), padded on the left. Without a cache where it cannot be used,
    which is found out by trying, once a model."""
    state = Cached(model, ids, mask)
    if has_plain_cache(state.cache) or _cache_holds(model, ids, mask):
        return state
    return Whole(model, ids, mask)


def has_plain_cache(cache: object, kinds: tuple[type, ...] = KEYS_AND_VALUES) -> bool:
    """Whether a cache is made of keys and values alone, in layers of these kinds."""
    return type(cache) is DynamicCache and all(type(layer) in kinds for layer in cache.layers)


class Cached:
    """A state that reads every token once, and keeps what the model keeps of it."""

    def __init__(self, model: nn.Module, ids: Tensor, mask: Tensor):
        self.model, self.mask = model, mask
        place = mask.cumsum(1)
        out = model(
            input_ids=ids, attention_mask=mask, position_ids=(place - 1).clamp(min=0), use_cache=True, logits_to_keep=1
        )
        self.cache, self.logits = getattr(out, "past_key_values", None), out.logits[:, -1]
        self.place = place[:, -1:]  # of the next token

    def keep(self, rows: Tensor) -> None:
        rows = rows.to(self.mask.device)
        self.cache.reorder_cache(rows)  # the one way that every kind of layer has
        self.mask, self.place, self.logits = self.mask[rows], self.place[rows], self.logits[rows]

    def read(self, tokens: Tensor) -> None:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        out = self.model(
            input_ids=tokens[:, None],
            attention_mask=self.mask,
            position_ids=self.place,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.logits, self.place = out.logits[:, -1], self.place + 1


class Whole:
    """A state that reads whole texts again and again, padded on the right, where no causal model looks."""

    def __init__(self, model: nn.Module, ids: Tensor, mask: Tensor):
        self.model, self.length = model, mask.sum(1)
        width = ids.shape[1]
        shifted = torch.arange(width, device=ids.device) + (width - self.length)[:, None]
        self.ids = ids.gather(1, shifted.clamp(max=width - 1))
        self._run()

    def keep(self, rows: Tensor) -> None:
        rows = rows.to(self.ids.device)
        self.ids, self.length, self.logits = self.ids[rows], self.length[rows], self.logits[rows]

    def read(self, tokens: Tensor) -> None:
        self.ids = torch.cat([self.ids, self.ids[:, :1]], 1).scatter(1, self.length[:, None], tokens[:, None])
        self.length = self.length + 1
        self._run()

    def _run(self) -> None:
        def last(head: nn.Module, states: tuple[Tensor]) -> tuple[Tensor]:
            """The states that the next tokens come from, as they enter the head: no other logits are made."""
            return (states[0][torch.arange(len(self.ids)), self.length - 1][None],)

        with self.model.get_output_embeddings().register_forward_pre_hook(last):
            self.logits = self.model(input_ids=self.ids, use_cache=False).logits[0]


def _cache_holds(model: nn.Module, ids: Tensor, mask: Tensor) -> bool:
    """Whether rows of the model's cache can be repeated, mixed and padded: found by doing it, beside `Whole`."""
    if model not in _HOLDS:
        known = ids[0][mask[0].bool()][-PROBED:]
        half = known[len(known) // 2 :]
        rows = torch.stack([known, torch.cat([known[: len(known) - len(half)], half])])
        seen = torch.ones_like(rows)
        seen[1, : len(known) - len(half)] = 0
        try:
            cached, whole = (_tried(kind, model, rows, seen) for kind in (Cached, Whole))
            _HOLDS[model] = bool((cached - whole).square().mean().sqrt() <= CACHE_GAP * whole.std())
        except Exception as error:  # whatever a layer raises that lacks a method, or has rows of another number
            if is_out_of_memory(error):
                raise
            _HOLDS[model] = False
        if not _HOLDS[model]:
            logger.warning(
                "%s keeps states of its prompt that cannot be repeated: queries are written without a cache, which is "
                "slower (reasoner.queries.samples and max_new_tokens make it less)",
                type(model).__name__,
            )
    return _HOLDS[model]


def _tried(kind: type, model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    state = kind(model, ids, mask)
    for rows in ([1, 0, 0], [2, 0]):
        state.keep(torch.tensor(rows))
        state.read(ids[0, -1].expand(len(rows)))
    return state.logits.float()
