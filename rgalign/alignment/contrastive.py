"""RG-CL: contrastive alignment of the reasoner's embedding with the intents in the ranker's space.

METHOD.md 2.3, step 3 [P]: InfoNCE pulls e_q, through the frozen ranker's query tower, to the clicked intent [C: which
space]. Only the reasoner is trained. No query is generated, so an encoder can take this step as well.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

from rgalign.alignment.context import Context
from rgalign.data.lists import Lists, QueryIntents
from rgalign.params_training import Contrastive
from rgalign.ranker.towers import ThreeTower
from rgalign.reasoner.batches import Task, documents, right_padded
from rgalign.reasoner.embed import pool
from rgalign.reasoner.model import Reasoner, fingerprint
from rgalign.reasoner.prompts import PROMPT_QUERY
from rgalign.reasoner.tiny import next_token_loss
from rgalign.reasoner.trainer import Schedule, Setup, fit, no_curve
from rgalign.run import distributed
from rgalign.run.distributed import all_gather_with_grad, weighted_all_reduce


def train_contrastive(
    context: Context, start: Reasoner, best: pd.DataFrame | None, work: Path, *, lists: Lists | None = None
) -> tuple[Reasoner, pd.DataFrame]:
    """RG-CL of a run: the embedding is pulled to the clicked intents in the space of the context's frozen rankers.

    best   preferences.best_queries, for the language term; None or alignment.cl.lm_weight 0: no such term
    work   folder of checkpoints, gone at the end
    lists  to learn from, each with a click; None: context.clicked_lists
    Hard negatives are those of a session's shown intents with the highest scores of these rankers and no click [C].
    Where the step is switched off: `start` and no curve.
    Where queries are embedded (reasoner.embed), they are those that `start` writes, throughout the step [C].
    """
    settings = context.params.alignment.cl
    if not settings.use:
        return start, no_curve()
    best = best if context.writes else None
    if context.recipe.launcher:
        given = {} if best is None else {"best": best}
        return context.tune_by_processes("cl", start, work, given=given, learners=lists)[:2]
    lists = context.clicked_lists if lists is None else lists
    lists = lists.take(context.drawn(lists.session_id, "cl"))
    hard = hard_negatives(lists, context.mean_scores(lists), settings.hard)
    prompts, also = context.embedded_prompts(start, lists), other_clicks(lists)
    sessions = ClickedSessions(prompts, first_click(lists), hard, also)
    if best is not None and settings.lm_weight:
        written = context.recipe.prompter(context.shop, start).queries(best["query"].tolist())
        by_session = dict(zip(best["session_id"], written, strict=True))
        sessions = replace(sessions, queries=[by_session.get(session, []) for session in lists.session_id])
        if context.params.reasoner.embed == PROMPT_QUERY:
            sessions = replace(sessions, query_prompts=context.prompts(start, lists))
    spaces = [RankingSpace.of(each, context.parts.intents, lists) for each in context.rankers.values()]
    return contrastive(start, sessions, spaces, settings, context.setup("cl", work))


@torch.no_grad()
def first_batch(
    context: Context, reasoner: Reasoner, count: int = 32
) -> tuple["RankingSpace", Tensor, dict[str, Tensor]]:
    """The first sessions with a click, to look at the loss with: the space of the first ranker, the sessions' queries
    in it (rows, dim), and their batch of `_collate`, all on the CPU but for the reasoner's own work."""
    lists = context.clicked_lists
    lists = lists.take(torch.arange(min(count, len(lists))))
    ranker = copy.deepcopy(next(iter(context.rankers.values()))).to("cpu")
    hard = hard_negatives(lists, context.mean_scores(lists), context.params.alignment.cl.hard)
    prompts, clicked = context.embedded_prompts(reasoner, lists), first_click(lists)
    sessions = ClickedSessions(prompts, clicked, hard, other_clicks(lists))
    batch = {**_collate(sessions.rows(), reasoner.tokenizer.pad_token_id), "counted": torch.tensor(len(lists))}
    _, vectors = prompt_vectors(reasoner, {name: value.to(reasoner.device) for name, value in batch.items()})
    space = RankingSpace.of(ranker, context.parts.intents, lists)
    return space, space.queries(vectors.float().cpu()), batch


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

    queries        token ids, end id last, of each session's query, for the language term: the reasoner should not
                   forget how to write. []: none of this session; None: no such term
    query_prompts  token ids of the prompts of `queries`, where those are not what is embedded (reasoner.embed
                   prompt_query). None: `prompts`
    """

    prompts: Sequence[Sequence[int]]  # token ids of what is embedded
    clicked: np.ndarray  # (rows,) row of the clicked intent in the knowledge base
    hard: np.ndarray  # (rows, h) rows of hard negatives, -1: none
    also: np.ndarray | None = None  # (rows, a) rows of what else was clicked, -1: none; never negatives
    queries: Sequence[Sequence[int]] | None = None
    query_prompts: Sequence[Sequence[int]] | None = None

    def rows(self) -> list[dict]:
        """One session a row; `session` is its row in the spaces' users."""
        together = self.queries is not None and self.query_prompts is None
        read = documents(self.prompts, self.queries if together else [[]] * len(self.prompts))
        others = np.zeros((len(read), 0)) if self.also is None else self.also
        intents = (np.asarray(value, dtype=np.int64).tolist() for value in (self.clicked, self.hard, others))
        rows = [
            {**row, "clicked": clicked, "hard": hard, "also": also, "session": session}
            for session, (row, clicked, hard, also) in enumerate(zip(read, *intents, strict=True))
        ]
        if self.query_prompts is not None:
            asked = documents(self.query_prompts, self.queries)
            rows = [{**row, "asked": own} for row, own in zip(rows, asked, strict=True)]
        return rows


@dataclass(frozen=True, eq=False)
class RankingSpace:
    """The space that RG-CL aligns queries with: a frozen ranker without dropout, through which gradients pass.

    intents  (kb, dim) float32, the intent tower's vectors of the whole knowledge base;  bias  (kb,) of each intent
    users    (sessions, dim) float32, the user tower's vectors; None where only queries are compared
    match    (sessions, kb) float32, what match terms add to the scores; None where the ranker reads none
    """

    ranker: ThreeTower
    intents: Tensor
    bias: Tensor
    users: Tensor | None = None
    match: Tensor | None = None

    @classmethod
    def of(cls, ranker: ThreeTower, intents: QueryIntents, lists: Lists | None = None) -> "RankingSpace":
        """A copy; the ranker itself stays as it was.

        lists  of the sessions, in the order of their prompts. Raises ValueError for intents without texts.
        """
        frozen = copy.deepcopy(ranker).train(False).requires_grad_(False)
        device = frozen.intent.bias.weight.device
        vectors, bias = frozen.intent(intents.to(device))
        rows = torch.arange(len(lists)).split(4096) if lists is not None else ()
        users, match = [], []
        for some in rows:  # one batch on the device at a time
            batch = lists.take(some).to(device)
            users.append(frozen.user(batch))
            if frozen.match is not None:
                match.append(frozen.match(batch.match.columns(frozen.config.match)))
        return cls(frozen, vectors, bias, *(torch.cat(own) if own else None for own in (users, match)))

    def queries(self, vectors: Tensor) -> Tensor:
        """e_q (rows, hidden) -> (rows, dim)."""
        return self.ranker.query.layers(vectors)

    def scores(self, query: Tensor, sessions: Tensor, intents: Tensor) -> Tensor:
        """(rows, columns) scores by the ranker of query (rows, dim), of sessions (rows,), in `users`, for intents
        (columns,) of the KB, without position bias."""
        candidates = intents.expand(len(query), -1)
        found = self.ranker.interaction(self.users[sessions], self.intents, query, candidates) + self.bias[intents]
        return found if self.match is None else found + self.match[sessions][:, intents]

    def to(self, device: torch.device) -> "RankingSpace":
        own = [None if each is None else each.to(device) for each in (self.users, self.match)]
        return RankingSpace(copy.deepcopy(self.ranker).to(device), self.intents.to(device), self.bias.to(device), *own)

    def digest(self) -> str:
        own = [each for each in (self.users, self.match) if each is not None]
        return digest_of([*self.ranker.state_dict().values(), self.intents, self.bias, *own])


def digest_of(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of all numbers in them."""
    hashed = sha256()
    for value in tensors:
        hashed.update(value.cpu().contiguous().numpy().tobytes())
    return hashed.hexdigest()


def contrastive(
    reasoner: Reasoner, sessions: ClickedSessions, spaces: Sequence[RankingSpace], settings: Contrastive, setup: Setup
) -> tuple[Reasoner, pd.DataFrame]:
    """A copy of the reasoner, aligned, and its curve. e_q is the prompt's vector as `embed` computes it.

    spaces  of one ranker or several, frozen; the loss is the mean over them, so that it fits no single ranker's errors
    Curve: step, loss, seconds; contrastive and, with a language term, language: the parts of the loss; effective_rank,
    uniformity and alignment of a batch's queries. Raises ValueError that lists all errors.
    """
    if not settings.lm_weight:
        sessions = replace(sessions, queries=None, query_prompts=None)
    errors = [
        f"{reasoner.name} makes vectors of {reasoner.hidden_size}, the ranker reads {width}: "
        "it was trained on another reasoner's"
        for width in sorted({space.ranker.query.query_dim for space in spaces} - {reasoner.hidden_size})
    ]
    if sessions.queries is not None and not any(map(len, sessions.queries)):
        errors.append("no session has a query for the language term: give one, or lm_weight 0")
    if not (np.asarray(sessions.hard) >= 0).any() and (not settings.in_batch or settings.documents_per_batch < 2):
        errors.append("no row has a negative: give hard negatives, or in_batch with documents_per_batch of 2 or more")
    if errors:
        raise ValueError("contrastive alignment cannot begin:\n  " + "\n  ".join(errors))
    placed = [space.to(reasoner.device) for space in spaces]
    how = {"reasoner": reasoner, "spaces": placed, "settings": settings, "language": sessions.queries is not None}
    collate = partial(_collate, pad=reasoner.tokenizer.pad_token_id)
    task = Task("contrastive", sessions.rows(), collate, partial(rg_cl_loss, **how))
    identity = {"reasoner": fingerprint(reasoner), "spaces": [space.digest() for space in spaces]}
    identity["settings"] = settings.model_dump()
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
    losses = [loss_in_space(space, query, batch, settings) for space, query in zip(spaces, queries, strict=True)]
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
        values["language"] = weighted_all_reduce(term, tokens)
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


def loss_in_space(space: RankingSpace, query: Tensor, batch: Mapping[str, Tensor], settings: Contrastive) -> Tensor:
    """InfoNCE of this process's rows by the ranker's scores, or by the similarity of query (rows, dim) and intents.

    batch  of `_collate`; the first rows count, as many as `counted` says: none where a process has a dummy row
    Its average over processes is the loss of one process with all rows.
    """
    rows, counted = (batch["clicked"], batch["hard"], batch["also"]), int(batch["counted"])
    clicked, _, also = rows
    negatives = all_gather_with_grad(clicked[:counted]) if settings.in_batch else clicked[:0]
    how = {"negatives": negatives, "temperature": settings.temperature}
    if settings.similarity == "ranker":
        score = partial(space.scores, query, batch["session"])
        return weighted_all_reduce(ranker_nce(score, len(space.intents), *rows, **how), counted)
    loss = info_nce(query, space.intents, *rows, **how, similarity=settings.similarity)
    if settings.symmetric:
        everyone = all_gather_with_grad(query[:counted])
        clicks = all_gather_with_grad(torch.cat([clicked[:, None], also], dim=1)[:counted])
        how = {"temperature": settings.temperature, "similarity": settings.similarity}
        loss = loss + settings.symmetric * session_nce(query, space.intents, clicked, everyone, clicks, **how)
    return weighted_all_reduce(loss, counted)


def _collate(rows: list[dict], pad: int) -> dict[str, Tensor]:
    """A batch of right_padded, and clicked and session (rows,), hard (rows, h), also (rows, a)."""
    columns = {name: torch.tensor([row[name] for row in rows]) for name in ("clicked", "session")}
    for name in ("hard", "also"):  # of type long, since without columns they would be float
        columns[name] = torch.tensor([row[name] for row in rows], dtype=torch.long)
    if "asked" in rows[0]:
        asked = right_padded([row["asked"] for row in rows], pad)
        columns |= {"asked": asked["ids"], "asked_prompt": asked["prompt"], "asked_length": asked["length"]}
    return {**right_padded(rows, pad), **columns}


def info_nce(
    query: Tensor,
    intents: Tensor,
    clicked: Tensor,
    hard: Tensor,
    also: Tensor,
    *,
    negatives: Tensor,
    temperature: float = 0.2,
    similarity: str = "cosine",
) -> Tensor:
    """Mean over rows of -log p(clicked intent | query) in nats, p a softmax over it and the row's negatives.

    query        (rows, dim);  intents  (kb, dim) vectors of the whole knowledge base
    clicked      (rows,) row of the clicked intent in `intents`
    hard         (rows, h) rows of a row's own negatives, -1: none
    also         (rows, a) rows of what was clicked beside it in the same session, -1: none; never a row's negatives
    negatives    (n,) rows that are negatives of every row, as the intents clicked anywhere in the batch
    similarity   cosine | dot, which is q.v / sqrt(dim), as in the ranker's query branch; divided by temperature
    A row's negatives are a set [C]: an intent that is there twice counts once (else popular intents would be pushed
    away by how often they are clicked, unlike in the softmax over the KB), and none that the row clicked is among them.
    A row without negatives counts as 0.
    """
    left, right = _scaled(query, intents, similarity)
    scores = left @ right.T / temperature
    others = ~compared(len(intents), clicked, hard, also, negatives)
    return functional.cross_entropy(scores.masked_fill(others, -torch.inf), clicked)


def compared(intents: int, clicked: Tensor, hard: Tensor, also: Tensor, negatives: Tensor) -> Tensor:
    """(rows, intents) bool: the clicked intent of each row and its negatives. Arguments: see `info_nce`."""
    rows = torch.arange(len(clicked), device=clicked.device)
    found = torch.zeros(len(clicked), intents + 1, dtype=torch.bool, device=clicked.device)
    found[:, negatives] = True
    found[rows[:, None], hard] = True  # -1 is the last column, which stands for no intent
    found[rows[:, None], also] = False
    found[rows, clicked] = True
    return found[:, :intents]


def ranker_nce(
    score: Callable[[Tensor], Tensor],
    intents: int,
    clicked: Tensor,
    hard: Tensor,
    also: Tensor,
    *,
    negatives: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """`info_nce` with the frozen ranker's own score of a session and an intent for the similarity [C].

    score    rows of the knowledge base (columns,) -> scores (rows, columns) of the batch's sessions
    intents  how many the knowledge base has
    At temperature 1, with a shown list's intents for negatives, it is the ranker's ListNet loss (of one click).
    """
    chosen = compared(intents, clicked, hard, also, negatives)
    columns = chosen.any(dim=0).nonzero()[:, 0]  # intents that no row compares are not scored
    logits = score(columns) / temperature
    place = torch.searchsorted(columns, clicked)
    return functional.cross_entropy(logits.masked_fill(~chosen[:, columns], -torch.inf), place)


def session_nce(
    query: Tensor,
    intents: Tensor,
    clicked: Tensor,
    others: Tensor,
    others_clicks: Tensor,
    *,
    temperature: float = 0.2,
    similarity: str = "cosine",
) -> Tensor:
    """Mean over rows of -log p(own session | clicked intent): against the sessions that did not click it.

    others, others_clicks   (sessions, dim) and (sessions, c): queries and all clicks of the batch's sessions, -1: none;
                            those that clicked a row's own intent, itself among them, are not its negatives
    """
    target = intents[clicked]
    same = (clicked[:, None, None] == others_clicks).any(dim=2)
    left, right = _scaled(target, others, similarity)
    own = torch.linalg.vecdot(*_scaled(query, target, similarity))
    logits = torch.cat([own[:, None], (left @ right.T).masked_fill(same, -torch.inf)], dim=1) / temperature
    return functional.cross_entropy(logits, torch.zeros_like(clicked))


def _scaled(left: Tensor, right: Tensor, similarity: str) -> tuple[Tensor, Tensor]:
    """Both sides (.., dim) so that their inner product is the similarity."""
    if similarity == "cosine":
        return functional.normalize(left, dim=-1), functional.normalize(right, dim=-1)
    return left * left.shape[-1] ** -0.5, right


@torch.no_grad()
def effective_rank(vectors: Tensor) -> Tensor:
    """exp of the entropy of the singular values' shares (Roy & Vetterli 2007): how many directions are in use, from 1
    (all rows on one line, or zero) to min(rows, dim); NaN where one is not finite. vectors (rows, dim), not centred."""
    vectors = _floats(vectors)
    if not vectors.isfinite().all():
        return vectors.new_full((), torch.nan)  # a decomposition would raise, and hide the loss that diverged
    values = torch.linalg.svdvals(vectors)
    return torch.special.entr(values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)).sum().exp()


@torch.no_grad()
def uniformity(vectors: Tensor, t: float = 2.0) -> Tensor:
    """log of the mean over pairs of rows of exp(-t |x - y|^2), rows scaled to length 1 (Wang & Isola 2020): 0 where all
    are one point, the lower the more evenly they cover the sphere. vectors: (rows, dim), at least two."""
    distance = torch.pdist(functional.normalize(_floats(vectors), dim=1))
    return distance.square().mul(-t).exp().mean().log()


@torch.no_grad()
def alignment(query: Tensor, positive: Tensor) -> Tensor:
    """Mean over rows (rows, dim) of |x - y|^2, scaled to length 1 (Wang & Isola 2020): 0 where all hit, 4 at most."""
    pairs = functional.normalize(_floats(query), dim=1) - functional.normalize(_floats(positive), dim=1)
    return pairs.square().sum(dim=1).mean()


def _floats(vectors: Tensor) -> Tensor:
    return vectors if vectors.dtype == torch.float64 else vectors.float()
