"""The tiny model's tokenizer and its pre-training on transcripts and KB text, never on clicks (METHOD.md 2.1 [C]).

The tokenizer has one token a word and one a feature value: training BPE is not deterministic over runs, counting words
is. Two losses: the next token, and all words of the typed query from the prompt's last state."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import pandas as pd
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from rgalign.data.features import column_of
from rgalign.params_schema import Pretraining
from rgalign.reasoner import verbalize
from rgalign.reasoner.batches import Task, documents, right_padded
from rgalign.reasoner.model import Reasoner, fingerprint
from rgalign.reasoner.prompts import ASK
from rgalign.reasoner.trainer import Schedule, Setup, fit
from rgalign.reasoner.verbalize import FieldTemplate, Serialiser

PAD, UNKNOWN, END = "<|pad|>", "<|unk|>", "<|end|>"


def build_tokenizer(counts: Mapping[str, int], *, min_count: int = 2) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the words seen at least `min_count` times, by falling count, then by name.

    Special tokens have the first ids: pad, unknown, ask, end. The same counts give the same files.
    Raises ValueError where no word is left.
    """
    kept = sorted((-count, word) for word, count in counts.items() if count >= min_count)
    if not kept:
        raise ValueError(f"none of {len(counts)} words was seen {min_count} times: there is no vocabulary to build")
    words = dict.fromkeys([PAD, UNKNOWN, ASK, END, *(word for _, word in kept)])
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    special = dict(pad_token=PAD, unk_token=UNKNOWN, eos_token=END, additional_special_tokens=[ASK])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def count_words(
    *,
    features: Sequence[str],
    kinds: Mapping[str, str],
    intents: pd.DataFrame,
    sessions: pd.DataFrame | None = None,
    transcripts: pd.DataFrame | None = None,
) -> Counter[str]:
    """Words of the KB (each twice: a title may stand in no transcript and must have its tokens), of training sessions
    and of transcripts as compact prompts put them, with their counts. Raises ValueError for another split's sessions.
    """
    counts: Counter[str] = Counter()
    titles = dict(zip(intents["intent_id"], intents["title"].fillna(""), strict=True))
    put = Serialiser("compact", titles)
    _add(counts, put.intents(intents) * 2)
    if sessions is not None:
        if others := set(sessions["split"].dropna()) - {"train"} if "split" in sessions else set():
            raise ValueError(f"a vocabulary is built on train alone; these sessions have split {sorted(others)}")
        _add(counts, put.sessions(sessions, features, kinds))
    if transcripts is not None:
        if "features" in transcripts:
            _add(counts, put.transcripts(column_of(transcripts, "features"), features, kinds))
        for query, count in Counter(transcripts["typed_query"].dropna()).items():
            for word in verbalize.compact_text(query).split():
                counts[word] += count
    return counts


def _add(counts: Counter[str], rows: Iterable[list[FieldTemplate]]) -> None:
    seen = Counter(field for row in rows for field in row)
    for field, count in seen.items():
        for word in field.words:
            counts[word] += count


def pretrain(
    reasoner: Reasoner,
    prompts: Sequence[Sequence[int]],
    queries: Sequence[Sequence[int]],
    settings: Pretraining,
    setup: Setup,
) -> tuple[Reasoner, pd.DataFrame]:
    """A trained copy of a causal reasoner, and its curve: step, loss (of both losses, nats), seconds.

    prompts, queries  token ids (Prompter.transcripts; KB intents' prompts with their titles as queries), end id last
    settings          prompt_weight None counts as 0: only queries are learnt. ahead_weight 0: the prompt's last state
                      has to predict the query's first word alone, and says little about the rest
    """
    prompt_weight, ahead_weight = settings.prompt_weight or 0.0, settings.ahead_weight

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        states = model.base_model(input_ids=batch["ids"], use_cache=False).last_hidden_state
        head, rows = model.get_output_embeddings(), {name: batch[name] for name in ("ids", "prompt", "length")}
        found = next_token_loss(states, head, **rows, prompt_weight=prompt_weight)
        return (found + ahead_weight * ahead_loss(states, head, model.ahead, **rows) if ahead_weight else found), {}

    # maps the prompt's last state for `ahead_loss`: the identity at first, not kept after training
    ahead = nn.utils.skip_init(nn.Linear, *2 * [reasoner.hidden_size], bias=False, device=reasoner.device)
    nn.init.eye_(ahead.weight)
    collate = partial(right_padded, pad=reasoner.tokenizer.pad_token_id)
    # beta2: a few thousand steps are too few for an average of gradients with 0.999
    schedule = Schedule(settings.epochs, settings.learning_rate, settings.documents_per_batch, beta2=0.98)
    task = Task("pre-training", documents(prompts, queries), collate, loss)
    identity = {"reasoner": fingerprint(reasoner), "weights": [prompt_weight, ahead_weight]}
    return fit(reasoner, task, schedule, setup, identity=identity, modules={"ahead": ahead})


def next_token_loss(
    states: Tensor, head: nn.Module, *, ids: Tensor, prompt: Tensor, length: Tensor, prompt_weight: float
) -> Tensor:
    """Weighted mean of -log p(next token) in nats; only targets that count are put through the language head.

    states          (rows, tokens, hidden), final hidden states of ids (rows, tokens)
    prompt, length  (rows,) tokens of the prompt, and of prompt and query; what follows is padding
    prompt_weight   what a prompt's token counts as a target, a query's being 1; a document's first token never counts
    Where nothing counts it is 0.
    """
    place = torch.arange(1, ids.shape[1], device=ids.device)
    asked, real = place >= prompt[:, None], place < length[:, None]
    weight = torch.where(asked, 1.0, prompt_weight) * real  # (rows, tokens - 1)
    counted = weight > 0
    losses = functional.cross_entropy(head(states[:, :-1][counted]).float(), ids[:, 1:][counted], reduction="none")
    return (losses * weight[counted]).sum() / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)


def ahead_loss(
    states: Tensor, head: nn.Module, ahead: nn.Module, *, ids: Tensor, prompt: Tensor, length: Tensor
) -> Tensor:
    """Mean over a query's words of -log p(word | the prompt's last state) in nats: multi-token prediction [C].

    A language model's state at the prompt's end only has to know the first word of what follows; a large one plans
    the rest all the same, a tiny one does not. `ahead` maps the state before the head, so that writing keeps its own
    distribution (Gloeckle et al. 2024 predict the next few tokens in order; here all words, in any order).
    """
    place = torch.arange(ids.shape[1], device=ids.device)
    word = (place >= prompt[:, None]) & (place < length[:, None] - 1)  # (rows, tokens)
    last = states[torch.arange(len(ids), device=ids.device), prompt - 1]
    log_p = head(ahead(last)).float().log_softmax(dim=1)
    losses = -(log_p.gather(1, ids) * word).sum(dim=1) / word.sum(dim=1).clamp(min=1)
    return losses.sum() / word.any(dim=1).sum().clamp(min=1)
