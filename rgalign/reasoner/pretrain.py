"""Pre-training of the tiny model on transcripts and KB text: prompt in, the query the customer typed out.

METHOD.md 2.1 [C]. Never on clicks. Two losses: the next token, and at the prompt's end a look ahead at the whole query.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import TrainerCallback

from rgalign.reasoner import training
from rgalign.reasoner.model import Reasoner, fingerprint


def pretrain(
    reasoner: Reasoner,
    prompts: Sequence[Sequence[int]],
    queries: Sequence[Sequence[int]],
    *,
    folder: Path,
    seed: int,
    epochs: float = 3.0,
    learning_rate: float = 4e-3,
    prompt_weight: float = 0.0,
    ahead_weight: float = 1.0,
    documents_per_batch: int = 48,
    warmup: float = 0.05,
    weight_decay: float = 0.01,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[Reasoner, pd.DataFrame]:
    """A trained copy of a causal reasoner, and its curve: step, loss (of both losses, nats), seconds.

    prompts, queries  token ids (Prompter.transcripts; KB intents' prompts with their titles as queries), end id last
    folder            work folder: checkpoints of a killed call, from which the same call goes on to the same weights;
                      it is emptied of those of other settings, and gone at the end
    learning_rate     its peak; rises over the share `warmup` of the steps, then falls to zero as a cosine
    prompt_weight     what a prompt's token counts against a query's; 0: only queries are learnt
    ahead_weight      of `ahead_loss` against the next token's; 0: the prompt's last state only has to know the
                      query's first word, and says little about the rest
    Runs on the reasoner's device, in one process; random states and accelerate's state stay the caller's.
    Raises ValueError that lists all faults.
    """
    weights = {"prompt_weight": prompt_weight, "ahead_weight": ahead_weight}
    _check(reasoner, prompts, queries, weights, documents_per_batch, epochs)
    documents = training.Documents(prompts, queries)
    model = copy.deepcopy(reasoner.model).train()
    model.ahead = _ahead_head(reasoner)

    def both(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        states = model.base_model(input_ids=batch["ids"], use_cache=False).last_hidden_state
        head, rows = model.get_output_embeddings(), {name: batch[name] for name in ("ids", "prompt", "length")}
        loss = next_token_loss(states, head, **rows, prompt_weight=prompt_weight)
        return (loss + ahead_weight * ahead_loss(states, head, model.ahead, **rows) if ahead_weight else loss), {}

    curve = training.train(
        model,
        documents,
        partial(training.right_padded, pad=reasoner.tokenizer.pad_token_id),
        both,
        folder=folder,
        identity={"reasoner": fingerprint(reasoner), "documents": documents.digest(), **weights},
        seed=seed,
        epochs=epochs,
        learning_rate=learning_rate,
        documents_per_batch=documents_per_batch,
        warmup=warmup,
        weight_decay=weight_decay,
        beta2=0.98,  # a few thousand steps are too few for 0.999 to know its gradients
        title="pre-training",
        progress=progress,
        callbacks=callbacks,
    )
    del model.ahead
    return replace(reasoner, model=model.eval()), curve


def _ahead_head(reasoner: Reasoner) -> nn.Linear:
    """The look ahead's own map of the prompt's last state; the identity at first, and thrown away after training."""
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
    Arguments as of `next_token_loss`; the end token is no word, and a query without words does not count.
    """
    place = torch.arange(ids.shape[1], device=ids.device)
    word = (place >= prompt[:, None]) & (place < length[:, None] - 1)  # (rows, tokens)
    last = states[torch.arange(len(ids), device=ids.device), prompt - 1]
    log_p = head(ahead(last)).float().log_softmax(dim=1)
    losses = -(log_p.gather(1, ids) * word).sum(dim=1) / word.sum(dim=1).clamp(min=1)
    return losses.sum() / word.any(dim=1).sum().clamp(min=1)


def _check(reasoner: Reasoner, prompts, queries, weights: dict, documents_per_batch: int, epochs: float) -> None:
    faults = training.document_faults(reasoner, prompts, queries)
    if not 0 <= weights["prompt_weight"] <= 1:
        faults.append(f"prompt_weight is {weights['prompt_weight']}; expected 0 to 1")
    if not weights["ahead_weight"] >= 0:
        faults.append(f"ahead_weight is {weights['ahead_weight']}; expected 0 or more")
    if documents_per_batch < 1 or epochs <= 0:
        faults.append(f"documents_per_batch is {documents_per_batch}, epochs {epochs}; both must be positive")
    if faults:
        raise ValueError("pre-training cannot begin:\n" + "\n".join(f"  {fault}" for fault in faults))
