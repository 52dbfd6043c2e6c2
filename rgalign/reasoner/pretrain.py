"""Pre-training of the tiny model on transcripts and KB text: prompt in, the query the customer typed out.

METHOD.md 2.1 [C]. Never on clicks. Two losses: the next token, and all words of the query from the prompt's last state.
"""

from collections.abc import Sequence
from functools import partial

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

from rgalign.params_schema import Pretraining
from rgalign.reasoner.batches import Documents, document_errors, raise_all, right_padded
from rgalign.reasoner.model import Reasoner, fingerprint
from rgalign.reasoner.trainer import Schedule, Setup, Task, fit


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
    Raises ValueError that lists all errors.
    """
    raise_all("pre-training", document_errors(reasoner, prompts, queries))
    prompt_weight, ahead_weight = settings.prompt_weight or 0.0, settings.ahead_weight

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        states = model.base_model(input_ids=batch["ids"], use_cache=False).last_hidden_state
        head, rows = model.get_output_embeddings(), {name: batch[name] for name in ("ids", "prompt", "length")}
        found = next_token_loss(states, head, **rows, prompt_weight=prompt_weight)
        return (found + ahead_weight * ahead_loss(states, head, model.ahead, **rows) if ahead_weight else found), {}

    collate = partial(right_padded, pad=reasoner.tokenizer.pad_token_id)
    # beta2: a few thousand steps are too few for an average of gradients with 0.999
    schedule = Schedule(settings.epochs, settings.learning_rate, settings.documents_per_batch, beta2=0.98)
    return fit(
        reasoner,
        Task("pre-training", Documents(prompts, queries), collate, loss),
        schedule,
        setup,
        identity={"reasoner": fingerprint(reasoner), "weights": [prompt_weight, ahead_weight]},
        modules={"ahead": _ahead_head(reasoner)},
    )


def _ahead_head(reasoner: Reasoner) -> nn.Linear:
    """Maps the prompt's last state for `ahead_loss`; the identity at first, not kept after training."""
    head = nn.utils.skip_init(nn.Linear, *2 * [reasoner.hidden_size], bias=False, device=reasoner.device)
    nn.init.eye_(head.weight)
    return head


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
    Arguments: see `next_token_loss`; the end token is no word, and a query without words does not count.
    """
    place = torch.arange(ids.shape[1], device=ids.device)
    word = (place >= prompt[:, None]) & (place < length[:, None] - 1)  # (rows, tokens)
    last = states[torch.arange(len(ids), device=ids.device), prompt - 1]
    log_p = head(ahead(last)).float().log_softmax(dim=1)
    losses = -(log_p.gather(1, ids) * word).sum(dim=1) / word.sum(dim=1).clamp(min=1)
    return losses.sum() / word.any(dim=1).sum().clamp(min=1)
