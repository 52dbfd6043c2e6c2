"""The language model ranks the intents itself, without a ranker and without training (METHOD.md 2.2 [C]).

It is what related systems do instead of aligning with a ranker (Rank-R1, GR2), so it is a rival to compare with. A
causal model can say how likely each title is as the answer to a session's prompt (`log_likelihood`); an instruct model
can choose from a list of titles (`setwise`). Scores are (sessions, intents), as evaluation.judge.Judge.scores takes
them; where the shown lists alone are scored, what that says of the whole knowledge base means nothing.
"""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

from rgalign.reasoner.batches import by_length, documents, evaluating, right_padded
from rgalign.reasoner.chat_template import template_ids
from rgalign.reasoner.generate import TOKENS_PER_BATCH, expanded
from rgalign.reasoner.model import Reasoner, ReasonerError
from rgalign.reasoner.prompts import Prompter
from rgalign.reasoner.query_loss import prefix_cache, query_log_probabilities

FORMS = ("likelihood", "per_token", "pmi")
LABELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # letters: many tokenizers split 10 into two tokens, so that [1] and [10] tie
CHOOSE = (  # the instruction of the prompter whose prompts `setwise` continues
    "A person is described, and then a list of titles. Choose the title that answers the question that this person is "
    "about to ask."
)
ANSWER = "\n\nAnswer with the letter of the best title."


def log_likelihood(
    reasoner: Reasoner,
    prompts: Sequence[Sequence[int]],
    titles: Sequence[Sequence[int]],
    candidates: np.ndarray | None = None,
    *,
    progress: bool = True,
) -> np.ndarray:
    """(prompts, titles) float32: log p(title | prompt) in nats, the title's end token included.

    prompts     token ids (Prompter.sessions)
    titles      token ids of the KB's titles, the end token last (Prompter.queries)
    candidates  (prompts, slots) rows of `titles` that are asked for, -1 where padded; None: all. What is not asked for
                has -inf
    A prompt is run once, and its titles in chunks that fit the memory. Raises ReasonerError for an encoder.
    """
    _refuse_encoder(reasoner)
    found = np.full((len(prompts), len(titles)), -np.inf, np.float32)
    model, pad, device = reasoner.model, reasoner.tokenizer.pad_token_id, reasoner.device
    budget = TOKENS_PER_BATCH.get(device.type, TOKENS_PER_BATCH["cpu"])
    with evaluating(model), torch.inference_mode():
        for row, prompt in enumerate(tqdm(prompts, desc="likelihood of titles", disable=not progress)):
            asked = _asked(candidates, row, len(titles))
            # the prompt's last token stays with each title: its state is what the title's first token comes from
            head = len(prompt) - 1
            cache = prefix_cache(model, torch.tensor([prompt[:head]], device=device)) if head else None
            for part in by_length([len(prompt) + len(titles[intent]) for intent in asked], budget):
                rows = documents([prompt] * len(part), [titles[intent] for intent in asked[part]])
                batch = {name: value.to(device) for name, value in right_padded(rows, pad).items()}
                how = {"head": head, "cache": cache} if cache is not None else {}
                found[row, asked[part]] = query_log_probabilities(model, batch, **how).cpu().numpy()
    return found


def without_session(prompter: Prompter) -> list[int]:
    """The prompt that says nothing of any session: what `pmi` compares with."""
    return [*prompter.head, *prompter.tail]


def scores_of(form: str, log_p: np.ndarray, titles: Sequence[Sequence[int]], without: np.ndarray) -> np.ndarray:
    """Scores (sessions, intents) from log-likelihoods.

    form     likelihood: log p(title | prompt), which prefers short and common titles; per_token: divided by the title's
             tokens; pmi: minus log p(title | the prompt without a session), the title's own likelihood [C: the default]
    log_p    (sessions, intents) nats;  without  (intents,) nats, of the prompt `without_session`
    Raises ValueError for another form.
    """
    if form == "likelihood":
        return log_p
    if form == "per_token":
        return log_p / np.array([len(title) for title in titles], np.float32)
    if form == "pmi":
        return log_p - without
    raise ValueError(f"form is {form!r}; expected {' | '.join(FORMS)}")


class Answers(NamedTuple):
    """What `setwise` read, all (sessions, orders, places): rows of the titles, -1 where padded, and label logits."""

    titles: np.ndarray
    logits: np.ndarray

    def scores(self, intents: int, *, calibrated: bool = False) -> np.ndarray:
        """(sessions, intents) float32: a title's mean logit over the orders; -inf where it was not listed.

        calibrated  the mean logit of each place over all sessions and orders is taken off: a model that prefers the
                    label A whatever stands there is judged by the rest
        """
        listed = self.titles >= 0
        logits = np.where(listed, self.logits, np.nan)
        if calibrated:
            logits = logits - np.nanmean(logits, axis=(0, 1))
        total, found = np.zeros((len(logits), intents), np.float32), np.zeros((len(logits), intents), bool)
        rows = np.broadcast_to(np.arange(len(logits))[:, None, None], listed.shape)[listed]
        np.add.at(total, (rows, self.titles[listed]), logits[listed])
        found[rows, self.titles[listed]] = True
        return np.where(found, total / logits.shape[1], -np.inf).astype(np.float32)

    def copied(self) -> pd.DataFrame:
        """How far the answers follow the order of the list, one row a session and order: row, order, kendall (tau of
        logits with the list's order: 1 where it is only copied, 0 where places do not matter), first (the best title
        was the first)."""
        rows = []
        for row, order in np.ndindex(self.titles.shape[:2]):
            own = self.logits[row, order][self.titles[row, order] >= 0]
            tau = stats.kendalltau(own, -np.arange(len(own))).statistic
            rows.append((row, order, tau, bool(own.argmax() == 0)))
        return pd.DataFrame(rows, columns=["row", "order", "kendall", "first"])


def setwise(
    reasoner: Reasoner,
    prompter: Prompter,
    prompts: Sequence[Sequence[int]],
    titles: Sequence[Sequence[int]],
    candidates: np.ndarray,
    *,
    orders: int = 3,
    seed: int,
    progress: bool = True,
) -> Answers:
    """Choice from a list: the session and its titles, each behind its label [A], [B], .., are followed by "[", and a
    title's score is the logit of its label there.

    prompter    with the instruction CHOOSE; `prompts` are its prompts of the sessions
    titles      token ids of the KB's titles, without an end token
    candidates  (sessions, slots) rows of `titles` that are listed, -1 where padded; at most as many as LABELS
    orders      of each list: the first is drawn, by seed and row alone, the others are its rotations by equal parts, so
                that every title stands in each part of the list once [C]
    Raises ReasonerError for an encoder, and ValueError for too many titles, for labels of more than one token and for
    lists that are longer than the model can read.
    """
    _refuse_encoder(reasoner)
    labels = _labels(reasoner, int((candidates >= 0).sum(axis=1).max(initial=0)))
    before, after, opening = (template_ids(reasoner.tokenizer, text) for text in ("\n[", "] ", "["))
    end = [*template_ids(reasoner.tokenizer, ANSWER), *prompter.tail, *opening]
    found = Answers(
        np.full((len(prompts), orders, len(labels)), -1), np.zeros((len(prompts), orders, len(labels)), np.float32)
    )
    with evaluating(reasoner.model), torch.inference_mode():
        for row, prompt in enumerate(tqdm(prompts, desc="choosing titles", disable=not progress)):
            listed = np.random.default_rng([seed, row]).permutation(_asked(candidates, row, len(titles)))
            turned = [np.roll(listed, -(k * len(listed) // orders)) for k in range(orders)]
            session = list(prompt[: len(prompt) - len(prompter.tail)])
            rows = []
            for own in turned:
                marked = zip(labels, own, strict=False)
                rows.append([*chain(*([*before, label, *after, *titles[i]] for label, i in marked)), *end])
            found.titles[row, :, : len(listed)] = turned
            found.logits[row, :, : len(listed)] = _next_logits(reasoner, session, rows)[:, labels[: len(listed)]]
    return found


def _next_logits(reasoner: Reasoner, head: list[int], rows: list[list[int]]) -> np.ndarray:
    """(rows, vocabulary) float32 after head and row; the rows are permutations of each other, so of one length."""
    if reasoner.positions is not None and (length := len(head) + len(rows[0])) > reasoner.positions:
        raise ValueError(f"session and titles take {length} tokens; {reasoner.name} can read {reasoner.positions}")
    model, device = reasoner.model, reasoner.device
    cache = prefix_cache(model, torch.tensor([head], device=device)) if head else None
    ids: Tensor = torch.tensor(rows if cache is not None else [[*head, *row] for row in rows], device=device)
    more = {"past_key_values": expanded(cache, len(rows)), "use_cache": True} if cache is not None else {}
    return model(input_ids=ids, logits_to_keep=1, **more).logits[:, -1].float().cpu().numpy()


def _labels(reasoner: Reasoner, count: int) -> list[int]:
    """The token of each of the first `count` LABELS."""
    if count > len(LABELS):
        raise ValueError(f"a list has {count} titles; setwise can label {len(LABELS)}")
    ids = [template_ids(reasoner.tokenizer, label) for label in LABELS[:count]]
    if any(len(own) != 1 or own[0] == reasoner.tokenizer.unk_token_id for own in ids):
        raise ValueError(f"the tokenizer of {reasoner.name} has no single token for each of {LABELS[:count]}")
    return [own[0] for own in ids]


def _asked(candidates: np.ndarray | None, row: int, intents: int) -> np.ndarray:
    return np.arange(intents) if candidates is None else candidates[row][candidates[row] >= 0]


def _refuse_encoder(reasoner: Reasoner) -> None:
    if reasoner.kind != "causal":
        raise ReasonerError(f"{reasoner.name} is an encoder: it gives no title a probability; load a causal LM")
