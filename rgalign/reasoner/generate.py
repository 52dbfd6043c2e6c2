"""Latent queries: text that the reasoner writes for a session, sampled or greedy, with its log-probability.

A prompt goes through the model once; its keys and values are then repeated for its samples (prefill, METHOD.md 2.1)."""

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rgalign.reasoner.batches import by_length, evaluating, is_out_of_memory, retry_smaller
from rgalign.reasoner.model import Reasoner, ReasonerError
from rgalign.reasoner.prompts import PROMPT_QUERY, Prompter

# Most models keep keys and values, which can be repeated for the samples of a prompt. Hybrids (linear attention,
# convolutions, Mamba layers) keep states as well; where those cannot be repeated, or there is no cache, the whole text
# is run again for every token: the same queries, slower.
KEYS_AND_VALUES = (DynamicLayer, DynamicSlidingWindowLayer)  # by their very type: subclasses hold more
PROBED = 8  # tokens of the prompt that a cache is tested with
# Root mean square of the difference between logits with and without the cache, in their standard deviations: bfloat16
# is within a few hundredths, a cache that mixes up rows or counts padding is about 1 apart [C].
CACHE_GAP = 0.1

logger = logging.getLogger(__name__)
_HOLDS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # models with other caches -> whether they can be used


def begin(model: nn.Module, ids: Tensor, mask: Tensor) -> "Cached | Whole":
    """The state after prompts; ids, mask (rows, length), padded on the left. Without a cache where it cannot be used,
    which is tested once for each model."""
    state = Cached(model, ids, mask)
    if has_plain_cache(state.cache) or _cache_holds(model, ids, mask):
        return state
    return Whole(model, ids, mask)


def has_plain_cache(cache: object, kinds: tuple[type, ...] = KEYS_AND_VALUES) -> bool:
    """Whether a cache is made of keys and values alone, in layers of these kinds."""
    return type(cache) is DynamicCache and all(type(layer) in kinds for layer in cache.layers)


def expanded(cache: DynamicCache, rows: int) -> DynamicCache:
    """The plain cache of one text for so many rows, as views: a layer copies them only as it appends to them."""
    wide = DynamicCache()
    for layer in cache.layers:
        own = copy.copy(layer)
        own.keys, own.values = (part.expand(rows, -1, -1, -1) for part in (layer.keys, layer.values))
        wide.layers.append(own)
    return wide


class Cached:
    """Texts as far as they have been run, every token once, with the model's cache; logits (rows, vocabulary) of each
    text's next token."""

    def __init__(self, model: nn.Module, ids: Tensor, mask: Tensor):
        self.model, self.mask = model, mask
        place = mask.cumsum(1)
        how = {"attention_mask": mask, "position_ids": (place - 1).clamp(min=0), "logits_to_keep": 1}
        out = model(input_ids=ids, use_cache=True, **how)
        self.cache, self.logits = getattr(out, "past_key_values", None), out.logits[:, -1]
        self.place = place[:, -1:]  # of the next token

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, in this order; a row may be named several times."""
        rows = rows.to(self.mask.device)
        self.cache.reorder_cache(rows)  # the one way that every kind of layer has
        self.mask, self.place, self.logits = self.mask[rows], self.place[rows], self.logits[rows]

    def read(self, tokens: Tensor) -> None:
        """Read one more token a row (rows,)."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        how = {"attention_mask": self.mask, "position_ids": self.place, "past_key_values": self.cache}
        out = self.model(input_ids=tokens[:, None], use_cache=True, **how)
        self.logits, self.place = out.logits[:, -1], self.place + 1


class Whole:
    """The same without a cache: whole texts are run for every token, padded on the right."""

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
    """Whether rows of the model's cache can be repeated, reordered and padded: tested against `Whole`."""
    if model not in _HOLDS:
        known = ids[0][mask[0].bool()][-PROBED:]
        rows = known.repeat(2, 1)
        seen = torch.ones_like(rows)
        seen[1, : len(known) // 2] = 0
        states = []
        try:
            for kind in (Cached, Whole):
                states.append(kind(model, rows, seen))
                for kept in ([1, 0, 0], [2, 0]):
                    states[-1].keep(torch.tensor(kept))
                    states[-1].read(rows[0, -1].expand(len(kept)))
            cached, whole = (state.logits.float() for state in states)
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


GREEDY = -1  # candidate number of the greedy query; sampled ones count from 0
# (logits (draws, vocabulary) float32, draws (draws,) their numbers, step) -> tokens (draws,)
Choose = Callable[[Tensor, Tensor, int], Tensor]
# Tokens in the cache while queries are written, by device [C]: with few, a card waits for launches most of the time.
TOKENS_PER_BATCH = {"cpu": 16_384, "cuda": 131_072}
DROP_BELOW = 0.75  # of the draws in the cache still being written: then the others are taken out, which copies it


def sample(
    reasoner: Reasoner,
    prompter: Prompter,
    prompts: Sequence[Sequence[int]],
    *,
    samples: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 24,
    seed: int,
    numbers: Sequence[int] | None = None,
    **how: Any,
) -> pd.DataFrame:
    """`samples` queries a prompt, equal ones of a prompt as one row; sorted by row, candidate.

    prompts  token ids (Prompter.sessions); top_p  the smallest set of tokens that holds this share of the probability
    Columns: row (place in prompts), candidate (0.. in order of drawing), query (may be ""), log_probability (nats, sum
    over the query's tokens, the end token included, of the untempered model; of the first drawn), tokens (their
    number), count (how often it was drawn). A draw depends on seed, row and its own number alone, not on the number of
    samples, prompts or new tokens; torch's random state is neither read nor changed. numbers: one a prompt, that its
    draws go by instead of the row, where these prompts are a part of more. how: tokens_per_batch (in the cache;
    default: by device), progress. Raises ReasonerError for an encoder.
    """
    numbers = range(len(prompts)) if numbers is None else numbers
    uniform = torch.from_numpy(_uniform(seed, numbers, samples, max_new_tokens))

    def choose(logits: Tensor, draws: Tensor, step: int) -> Tensor:
        return _invert((logits / temperature).softmax(-1), uniform[draws, step].to(logits.device), top_p)

    written = _write(reasoner, prompter, prompts, choose, samples=samples, max_new_tokens=max_new_tokens, **how)
    return _table(written, samples, prompter)


def draws(
    reasoner: Reasoner,
    prompter: Prompter,
    prompts: Sequence[Sequence[int]],
    *,
    samples: int,
    max_new_tokens: int,
    seed: int,
    numbers: Sequence[int],
    **how: Any,
) -> pd.DataFrame:
    """The draws that `sample` makes of the model as it is (temperature 1), one row each, though some are equal.

    Columns: row, ids (tokens as they were drawn, the end id last unless the query was cut), query, log_probability
    (nats, sum over these tokens), entropy (nats, of the choice of a token, mean over these tokens). Sorted by row and
    number of the draw. The other arguments, and errors: see `sample`.
    """
    uniform = torch.from_numpy(_uniform(seed, numbers, samples, max_new_tokens))
    entropy = torch.zeros_like(uniform)

    def choose(logits: Tensor, drawn: Tensor, step: int) -> Tensor:
        probability = logits.softmax(-1)
        entropy[drawn, step] = torch.special.entr(probability).sum(-1).cpu()
        return _invert(probability, uniform[drawn, step].to(logits.device), 1.0)

    rows = []
    written = _write(reasoner, prompter, prompts, choose, samples=samples, max_new_tokens=max_new_tokens, **how)
    for draw, padded, log_probability in written:
        ids = [token for token in padded if token >= 0]
        mean = float(entropy[draw, : len(ids)].mean())
        rows.append((draw // samples, ids, prompter.text(ids), log_probability, mean))
    return pd.DataFrame(rows, columns=["row", "ids", "query", "log_probability", "entropy"])


def greedy(reasoner: Reasoner, prompter: Prompter, prompts: Sequence[Sequence[int]], **how: Any) -> pd.DataFrame:
    """The query of each prompt that takes the likeliest token at every step. how: max_new_tokens, tokens_per_batch and
    progress; these, columns and errors: see `sample`."""
    return _table(_write(reasoner, prompter, prompts, lambda logits, *_: logits.argmax(-1), **how), 1, prompter)


def greedy_and_samples(
    reasoner: Reasoner,
    prompter: Prompter,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 24,
    progress: bool = True,
    **sampling: Any,
) -> pd.DataFrame:
    """The greedy query of each prompt (candidate -1) and its samples, by row and candidate. The rest: see `sample`."""
    how = {"max_new_tokens": max_new_tokens, "progress": progress}
    best = greedy(reasoner, prompter, prompts, **how).assign(candidate=GREEDY)
    drawn = sample(reasoner, prompter, prompts, **sampling, **how)
    return pd.concat([best, drawn]).sort_values(["row", "candidate"], ignore_index=True)


def _uniform(seed: int, numbers: Sequence[int], samples: int, steps: int) -> np.ndarray:
    """(prompts * samples, steps) float32 in 0 to 1; a line depends on seed, number and draw alone, and its beginning
    not on its length. Philox is a generator of counters: number and draw are its upper words, the lower count on."""
    bits = np.random.Philox(seed)
    start, generator = bits.state, np.random.Generator(bits)
    drawn = np.empty((len(numbers) * samples, steps), dtype=np.float32)
    for line in range(len(drawn)):
        start["state"]["counter"][:] = (0, 0, line % samples, numbers[line // samples])
        bits.state = start  # as fresh: nothing is left of the line before
        generator.random(out=drawn[line], dtype=np.float32)
    return drawn


def embedded_sessions(
    reasoner: Reasoner, prompter: Prompter, prompts: Sequence[Sequence[int]], *, progress: bool = True
) -> Sequence[Sequence[int]]:
    """What is embedded of these prompts (reasoner.embed): they themselves, or with `prompt_query` each with the greedy
    query that the reasoner writes, and the asking mark again (Prompter.asked_again)."""
    if prompter.embed != PROMPT_QUERY:
        return prompts
    prompts = list(prompts)
    how = {"max_new_tokens": prompter.max_new_tokens, "progress": progress}
    return prompter.asked_again(prompts, greedy(reasoner, prompter, prompts, **how)["query"].tolist())


def repeated_share(texts: Sequence[str]) -> float:
    """Share of the queries in which three words stand in a row twice (overlaps count: "no no no no" repeats)."""
    runs = [list(zip(words, words[1:], words[2:], strict=False)) for words in map(str.split, texts)]
    return sum(len(set(own)) < len(own) for own in runs) / max(1, len(texts))


def _invert(probability: Tensor, uniform: Tensor, top_p: float) -> Tensor:
    """The token at which the running sum of probabilities passes `uniform`; (draws, vocabulary), (draws,) -> (draws,).
    One number a token, drawn beforehand, makes the draw the same in any batch and on any device."""
    order = None
    if top_p < 1:
        probability, order = probability.sort(dim=-1, descending=True, stable=True)
        before = probability.cumsum(-1) - probability
        probability = probability.masked_fill(before >= top_p, 0)
    sums = probability.cumsum(-1)
    # float32 numbers below 1 times a sum stay below it, so the draw never falls behind the last possible token
    place = torch.searchsorted(sums, uniform[:, None] * sums[:, -1:], right=True)
    return (place if order is None else order.gather(1, place))[:, 0]


def _write(
    reasoner: Reasoner,
    prompter: Prompter,
    prompts: Sequence[Sequence[int]],
    choose: Choose,
    *,
    samples: int = 1,
    max_new_tokens: int = 24,
    tokens_per_batch: int | None = None,
    progress: bool = True,
) -> list[tuple[int, list[int], float]]:
    """Runs the batches: (number of the draw, its tokens, -1 behind the end, log-probability), in order."""
    if reasoner.kind != "causal":
        raise ReasonerError(f"{reasoner.name} is an encoder: it embeds, it cannot write queries; load a causal LM")
    model, written = reasoner.model, []
    budget = tokens_per_batch or TOKENS_PER_BATCH.get(reasoner.device.type, TOKENS_PER_BATCH["cpu"])
    ends, tokens = torch.tensor(sorted(prompter.ends)), [samples * (len(prompt) + max_new_tokens) for prompt in prompts]

    def write(rows: Sequence[int]) -> list[tuple]:
        given, pad = [list(prompts[row]) for row in rows], reasoner.tokenizer.pad_token_id
        padding = [max(map(len, given)) - len(prompt) for prompt in given]  # on the left: queries begin in one column
        ids = torch.tensor([[pad] * left + prompt for left, prompt in zip(padding, given, strict=True)])
        mask = (torch.arange(ids.shape[1]) >= torch.tensor(padding)[:, None]).long()
        ids, mask = ids.to(reasoner.device), mask.to(reasoner.device)
        draws = (torch.tensor(rows)[:, None] * samples + torch.arange(samples)).flatten()
        chosen, log_probability = _decode(model, ids, mask, draws, choose, ends, max_new_tokens)
        return list(zip(draws.tolist(), chosen.tolist(), log_probability.tolist(), strict=True))

    bar = tqdm(total=len(prompts), desc="queries", disable=not progress)
    with evaluating(model), torch.inference_mode(), bar:
        for batch in by_length(tokens, budget):  # a batch's cache holds at most so many tokens
            for rows, lines in retry_smaller(write, batch, "queries"):
                written += lines
                bar.update(len(rows))
    return sorted(written)


def _decode(
    model: torch.nn.Module, ids: Tensor, mask: Tensor, draws: Tensor, choose: Choose, ends: Tensor, max_new_tokens: int
) -> tuple[Tensor, Tensor]:
    """What is written for each of `draws` (draws,), equally many a prompt: (tokens (draws, new), log-probabilities).
    ids, mask (prompts, length); tokens are -1 behind the first of `ends`."""
    state = begin(model, ids, mask)
    state.keep(torch.arange(len(ids)).repeat_interleave(len(draws) // len(ids)))
    tokens = torch.full((len(draws), max_new_tokens), -1)
    log_probability = torch.zeros(len(draws), dtype=torch.float64)
    held = torch.arange(len(draws))  # draws in the cache
    writing = torch.ones(len(draws), dtype=torch.bool)  # of those held
    for step in range(max_new_tokens):
        scores = state.logits.float()
        chosen = choose(scores, draws[held], step)
        gained = scores.gather(1, chosen[:, None])[:, 0] - scores.logsumexp(1)
        token = chosen.cpu()
        tokens[held[writing], step] = token[writing]
        log_probability[held[writing]] += gained.cpu().double()[writing]
        writing &= torch.isin(token, ends, invert=True)
        if not writing.any() or step + 1 == max_new_tokens:
            break
        if writing.sum() < DROP_BELOW * len(held):
            kept = writing.nonzero()[:, 0]
            state.keep(kept)
            chosen, held, writing = chosen[kept.to(chosen.device)], held[writing], writing[writing]
        state.read(chosen)
    return tokens, log_probability


def _table(written: list[tuple[int, list[int], float]], samples: int, prompter: Prompter) -> pd.DataFrame:
    """One row a different query of a prompt, from (draw, tokens, log-probability) in the order of draws."""
    texts: dict[tuple[int, ...], str] = {}
    found: dict[tuple[int, str], list] = {}  # (row, query) -> log-probability, tokens, count
    for draw, padded, log_probability in written:
        ids = tuple(token for token in padded if token >= 0)
        if ids not in texts:
            texts[ids] = prompter.text(ids)
        first = found.setdefault((draw // samples, texts[ids]), [log_probability, len(ids), 0])
        first[2] += 1
    table = pd.DataFrame(
        [(row, query, *rest) for (row, query), rest in found.items()],
        columns=["row", "query", "log_probability", "tokens", "count"],
    ).astype({"row": "int64", "query": object, "log_probability": "float64", "tokens": "int64", "count": "int64"})
    table.insert(1, "candidate", table.groupby("row").cumcount().astype("int64"))
    return table
