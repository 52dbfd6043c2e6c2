"""RG-CL: contrastive alignment of the reasoner's embedding with the intents in the ranker's space.

METHOD.md 2.3, step 3 [P]: InfoNCE pulls e_q, through the frozen ranker's query tower, to the clicked intent [C: which
space]. Only the reasoner is trained. No query is generated, so an encoder can take this step as well.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from rgalign.alignment.context import Context
from rgalign.alignment.info_nce import RankingSpace, alignment, contrastive_loss, effective_rank, ranker_nce, uniformity
from rgalign.data.lists import Lists
from rgalign.params_training import Contrastive
from rgalign.reasoner.batches import Task, documents, right_padded
from rgalign.reasoner.embed import pool
from rgalign.reasoner.model import Reasoner, fingerprint
from rgalign.reasoner.prompts import PROMPT_QUERY
from rgalign.reasoner.tiny import next_token_loss
from rgalign.reasoner.trainer import Schedule, Setup, fit
from rgalign.run import distributed


def train_contrastive(
    context: Context, start: Reasoner, best: pd.DataFrame | None, work: Path, *, lists: Lists | None = None
) -> tuple[Reasoner, pd.DataFrame]:
    """RG-CL of a run: the embedding is pulled to the clicked intents in the space of the context's frozen rankers.

    best   preferences.best_queries, for the language term; None or alignment.cl.lm_weight 0: no such term
    work   folder of checkpoints, gone at the end
    lists  to learn from, each with a click; None: context.clicked_lists
    Hard negatives are those of a session's shown intents with the highest scores of these rankers and no click [C].
    Where queries are embedded (reasoner.embed), they are those that `start` writes, throughout the step [C].
    """
    settings = context.params.alignment.cl
    if context.recipe.launcher:
        given = {} if best is None else {"best": best}
        return context.tune_by_processes("cl", start, work, given=given, learners=lists)[:2]
    lists, queries = lists if lists is not None else context.clicked_lists, None
    if best is not None and settings.lm_weight:
        written = context.recipe.prompter(context.shop, start).queries(best["query"].tolist())
        by_session = dict(zip(best["session_id"], written, strict=True))
        queries = [by_session.get(session, []) for session in lists.session_id]
    embeds_query = context.params.reasoner.embed == PROMPT_QUERY
    sessions = ClickedSessions(
        prompts=context.embedded_prompts(start, lists),
        clicked=first_click(lists),
        hard=hard_negatives(lists, context.mean_scores(lists), settings.hard),
        also=other_clicks(lists),
        queries=queries,
        query_prompts=context.prompts(start, lists) if embeds_query and queries is not None else None,
    )
    spaces = [RankingSpace.of(each, context.parts.intents, lists) for each in context.rankers.values()]
    return contrastive(start, sessions, spaces, settings, context.setup("cl", work))


def first_click(lists: Lists) -> np.ndarray:
    """(lists,) row in the knowledge base of the first clicked intent."""
    place = lists.clicked.int().argmax(dim=1, keepdim=True)
    return lists.candidates.long().gather(1, place).squeeze(1).numpy()


def other_clicks(lists: Lists) -> np.ndarray:
    """(lists, most) rows in the knowledge base of the clicked intents after `first_click`; -1: none."""
    candidates, clicked = lists.candidates.numpy().astype(np.int64), lists.clicked.numpy()
    order = np.argsort(~clicked, axis=1, kind="stable")[:, 1 : max(1, clicked.sum(axis=1).max(initial=1))]
    return np.where(np.take_along_axis(clicked, order, axis=1), np.take_along_axis(candidates, order, axis=1), -1)


def hard_negatives(lists: Lists, scores: np.ndarray, count: int) -> np.ndarray:
    """(lists, count) rows in the knowledge base of the shown, unclicked intents with the highest scores; -1: none.

    scores  (lists, candidates), -inf where padded
    """
    candidates = lists.candidates.numpy().astype(np.int64)
    unclicked = np.where((lists.shown & ~lists.clicked).numpy(), scores, -np.inf)
    order = np.argsort(-unclicked, axis=1, kind="stable")[:, :count]
    found = np.take_along_axis(candidates, order, axis=1)
    return np.where(np.isfinite(np.take_along_axis(unclicked, order, axis=1)), found, -1)


@dataclass(frozen=True, eq=False)
class ClickedSessions:
    """Sessions with a click, as RG-CL reads them.

    prompts        token ids of what is embedded
    clicked        (rows,) row of the clicked intent in the knowledge base
    hard           (rows, h) rows of hard negatives, -1: none
    also           (rows, a) rows of what else the session clicked, -1: none; never its negatives. None: nothing
    queries        token ids, end id last, of each session's query, for the language term: the reasoner should not
                   forget how to write. []: none of this session; None: no such term
    query_prompts  token ids of the prompts of `queries`, where those are not what is embedded (reasoner.embed
                   prompt_query). None: `prompts`
    """

    prompts: Sequence[Sequence[int]]
    clicked: np.ndarray
    hard: np.ndarray
    also: np.ndarray | None = None
    queries: Sequence[Sequence[int]] | None = None
    query_prompts: Sequence[Sequence[int]] | None = None

    def __post_init__(self) -> None:
        also = np.zeros((len(self.prompts), 0)) if self.also is None else self.also
        for name, value in {"clicked": self.clicked, "hard": self.hard, "also": also}.items():
            object.__setattr__(self, name, np.asarray(value, dtype=np.int64))

    def rows(self) -> list[dict]:
        """One session a row; `session` is its row in the spaces' users."""
        together = self.queries is not None and self.query_prompts is None
        read = documents(self.prompts, self.queries if together else [[]] * len(self.prompts))
        own = zip(read, self.clicked.tolist(), self.hard.tolist(), self.also.tolist(), strict=True)
        rows = [
            {**row, "clicked": clicked, "hard": hard, "also": also, "session": session}
            for session, (row, clicked, hard, also) in enumerate(own)
        ]
        if self.query_prompts is not None:
            asked = documents(self.query_prompts, self.queries)
            rows = [{**row, "asked": own} for row, own in zip(rows, asked, strict=True)]
        return rows


def contrastive(
    reasoner: Reasoner, sessions: ClickedSessions, spaces: Sequence[RankingSpace], settings: Contrastive, setup: Setup
) -> tuple[Reasoner, pd.DataFrame]:
    """A copy of the reasoner, aligned, and its curve. e_q is the prompt's vector as `embed` computes it.

    spaces  of one ranker or several, frozen; the loss is the mean over them, so that it fits no single ranker's errors
    Curve: step, loss, seconds; contrastive and, with a language term, language: the parts of the loss; effective_rank,
    uniformity and alignment (info_nce) of a batch's queries. Raises ValueError that lists all errors.
    """
    if not settings.lm_weight:
        sessions = replace(sessions, queries=None, query_prompts=None)
    errors = [
        f"{reasoner.name} makes vectors of {reasoner.hidden_size}, the ranker reads {width}: "
        "it was trained on another reasoner's"
        for width in sorted({space.query_dim for space in spaces} - {reasoner.hidden_size})
    ]
    if sessions.queries is not None and not any(map(len, sessions.queries)):
        errors.append("no session has a query for the language term: give one, or lm_weight 0")
    if not (sessions.hard >= 0).any() and (not settings.in_batch or settings.documents_per_batch < 2):
        errors.append("no row has a negative: give hard negatives, or in_batch with documents_per_batch of 2 or more")
    if errors:
        raise ValueError("contrastive alignment cannot begin:\n  " + "\n  ".join(errors))
    device, pad = reasoner.device, reasoner.tokenizer.pad_token_id
    placed = [space.to(device) for space in spaces]
    language = sessions.queries is not None
    loss = partial(rg_cl_loss, reasoner=reasoner, spaces=placed, settings=settings, language=language)
    identity = {"reasoner": fingerprint(reasoner), "spaces": [space.digest() for space in spaces]}
    identity["settings"] = settings.model_dump()
    task = Task("contrastive", sessions.rows(), partial(_collate, pad=pad), loss)
    return fit(reasoner, task, Schedule.of(settings), setup, identity=identity)


def rg_cl_loss(
    model: nn.Module,
    batch: dict[str, Tensor],
    *,
    reasoner: Reasoner,
    spaces: Sequence[RankingSpace],
    settings: Contrastive,
    language: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch and the other columns of the curve; one forward serves both terms, unless prompts differ."""
    reasoner = replace(reasoner, model=model)
    ids, prompt, length, clicked = (batch[name] for name in ("ids", "prompt", "length", "clicked"))
    states, vectors = prompt_vectors(reasoner, batch)
    queries = [space.queries(vectors) for space in spaces]
    losses = [_loss_in_space(space, query, batch, settings) for space, query in zip(spaces, queries, strict=True)]
    loss, query = torch.stack(losses).mean(), queries[0]
    values = {"contrastive": loss, "effective_rank": effective_rank(query)}
    values["alignment"] = alignment(query, spaces[0].intents[clicked])
    if len(query) > 1 or distributed.several():  # all processes log the same names; of a single row it is NaN
        values["uniformity"] = uniformity(query)
    if language:
        if "asked" in batch:
            ids, prompt, length = batch["asked"], batch["asked_prompt"], batch["asked_length"]
            states = reasoner.trunk(ids, use_cache=False)[0]
        head = reasoner.plain.get_output_embeddings()
        term = next_token_loss(states, head, ids=ids, prompt=prompt, length=length, prompt_weight=0.0)
        tokens = int((length - prompt)[: int(batch["counted"])].sum())
        values["language"] = distributed.weighted_all_reduce(term, tokens)
        loss = loss + settings.lm_weight * values["language"]
    return loss, values


def prompt_vectors(reasoner: Reasoner, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """States (rows, longest, hidden) of ids, padded on the right, and e_q (rows, hidden), the prompts' vectors.

    batch  ids (rows, longest), prompt and length (rows,): tokens of the prompt, and of prompt and query
    """
    ids, prompt, length = (batch[name] for name in ("ids", "prompt", "length"))
    real = torch.arange(ids.shape[1], device=ids.device) < length[:, None]
    causal = reasoner.kind == "causal"  # no token attends to its right, neither to the query nor to padding: no mask
    states = reasoner.trunk(ids, **({"use_cache": False} if causal else {"attention_mask": real.long()}))[0]
    return states, pool(reasoner, states, prompt)


def _loss_in_space(space: RankingSpace, query: Tensor, batch: dict[str, Tensor], settings: Contrastive) -> Tensor:
    """The loss in one ranker's space; its average over processes is the loss of one process with all rows."""
    rows, counted = (batch["clicked"], batch["hard"], batch["also"]), int(batch["counted"])
    temperature = settings.temperature
    if settings.similarity != "ranker":
        how = {"similarity": settings.similarity, "in_batch": settings.in_batch, "symmetric": settings.symmetric}
        return contrastive_loss(query, space.intents, *rows, counted=counted, temperature=temperature, **how)
    shared = batch["clicked"][: counted if settings.in_batch else 0]
    negatives = distributed.all_gather_with_grad(shared) if settings.in_batch else shared
    score = partial(space.scores, query, batch["session"])
    loss = ranker_nce(score, len(space.intents), *rows, negatives=negatives, temperature=temperature)
    return distributed.weighted_all_reduce(loss, counted)


def _collate(rows: list[dict], pad: int) -> dict[str, Tensor]:
    """A batch of right_padded, and clicked and session (rows,), hard (rows, h), also (rows, a)."""
    columns = {name: torch.tensor([row[name] for row in rows]) for name in ("clicked", "session")}
    for name in ("hard", "also"):  # of type long, since without columns they would be float
        columns[name] = torch.tensor([row[name] for row in rows], dtype=torch.long)
    if "asked" in rows[0]:
        asked = right_padded([row["asked"] for row in rows], pad)
        columns |= {"asked": asked["ids"], "asked_prompt": asked["prompt"], "asked_length": asked["length"]}
    return {**right_padded(rows, pad), **columns}
