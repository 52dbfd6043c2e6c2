"""Multi-LLM cross-sampling: a session's query comes from one of several LLMs at random (METHOD.md 2.3, step 1 [P]).

A reward model so trained judges the query, not one LLM's style. It hears a query by its text alone, read as if it were
a KB intent [C]: the state after prompt and query knows the prompt so well that the query is hardly heard.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from rgalign.alignment.candidates import written
from rgalign.data.lists import Intents, Lists, QueryLists, with_queries
from rgalign.data.vectors import Vectors
from rgalign.ranker.fit import Loss
from rgalign.reasoner.embed import embed
from rgalign.reasoner.model import Reasoner
from rgalign.reasoner.prompts import Prompter


def query_vectors(
    reasoner: Reasoner,
    prompter: Prompter,
    texts: Sequence[str],
    *,
    tokens_per_batch: int | None = None,
    progress: bool = True,
) -> Vectors:
    """The vectors of the different texts, by text: each is read as the title of a KB intent without a description [C].

    reasoner, prompter  those that embed the KB's own texts, so that both lie in one space
    An empty text has no vector.
    """
    different = [text for text in dict.fromkeys(texts) if text.strip()]
    frame = pd.DataFrame({"intent_id": "query", "title": different, "description": ""}, dtype=object)
    how = {"prefix": len(prompter.head), "tokens_per_batch": tokens_per_batch, "progress": progress}
    return Vectors(different, embed(reasoner, prompter.embedded_intents(frame), **how))


@dataclass(frozen=True)
class CrossSampled(QueryLists):
    """Impression lists of which each has several queries; `drawn` gives it one of them.

    bank    (queries, query_dim) float16, shared by all lists; row 0 is the null query
    places  (lists, slots) rows of the bank; slot 0 is the null query, unused slots are too
    chance  (lists, slots) float32, a row's sum is 1: the probability of each slot; unused ones have 0
    query   as of QueryLists; before a draw the null query
    """

    bank: Tensor
    places: Tensor
    chance: Tensor

    def take(self, indices: Tensor | np.ndarray | Sequence[int]) -> "CrossSampled":
        own = torch.as_tensor(indices, device=self.places.device).long()
        return replace(super().take(indices), places=self.places[own], chance=self.chance[own])

    def drawn(self) -> "CrossSampled":
        """The lists with a query each, drawn anew from torch's random state (`fit` seeds it)."""
        slot = torch.multinomial(self.chance, 1)
        return replace(self, query=self.bank[self.places.gather(1, slot).squeeze(1)])


def cross_sampled(base: Loss) -> Loss:
    """A loss that draws queries for the lists of a batch, and then is `base`."""

    def loss(ranker: nn.Module, lists: CrossSampled, intents: Intents) -> Tensor:
        return base(ranker, lists.drawn(), intents)

    return loss


def null_query(lists: Lists, candidates: pd.DataFrame, queries: Vectors) -> Tensor:
    """(query_dim,) float16: the mean vector of all queries written for these lists (train): it says nothing of any.

    Raises ValueError where nothing was written.
    """
    vectors = queries.rows(_of(lists, candidates)["query"])
    if not len(vectors):
        sources = ", ".join(sorted(candidates["source"].unique()))
        raise ValueError(
            f"every candidate is empty (written by: {sources}): there is nothing to judge. Look at the queries of "
            "notebook 02; a reasoner that writes nothing needs more pre-training, or alignment.loop.rounds 0"
        )
    return torch.from_numpy(vectors.astype(np.float32).mean(axis=0).astype(np.float16))


def with_all_queries(
    lists: Lists, candidates: pd.DataFrame, queries: Vectors, *, null: Tensor, null_share: float
) -> CrossSampled:
    """The lists with a click, and every query that was written for them.

    candidates  columns session_id, source, query, count (alignment.candidates); empty queries and other sessions are
                left out; a list that has none left always has the null query
    queries     vectors by text (`query_vectors`)
    null_share  how often the null query stands in for them [C]; else a source is drawn, each alike, and one of its
                queries, as often as it wrote them [C]
    Raises ValueError for a share outside 0 <= null_share < 1, and for a list of which no source wrote anything at all.
    """
    lists = lists.take(lists.clicked.any(dim=1).nonzero().squeeze(1))
    if not 0 <= null_share < 1:
        raise ValueError(f"null_share is {null_share!r}; expected a share, 0 <= null_share < 1")
    if missing := sorted(set(lists.session_id.tolist()) - set(candidates["session_id"])):
        raise ValueError(
            f"{len(missing)} of {len(lists)} sessions of {lists.part} have no candidate (first: {missing[0]!r}); "
            "write candidates for them too"
        )
    own = _of(lists, candidates)
    row = pd.Index(lists.session_id).get_indexer(own["session_id"])
    slot = own.groupby("session_id").cumcount().to_numpy() + 1
    of_source = own["count"] / own.groupby(["session_id", "source"])["count"].transform("sum")
    share = (of_source / own.groupby("session_id")["source"].transform("nunique")).to_numpy()
    places = np.zeros((len(lists), slot.max(initial=0) + 1), dtype=np.int64)
    chance = np.zeros(places.shape, dtype=np.float32)
    places[row, slot] = pd.Index(queries.ids).get_indexer(own["query"]) + 1
    chance[row, slot] = (1 - null_share) * share
    chance[:, 0] = np.where(chance[:, 1:].any(axis=1), null_share, 1)
    bank = torch.cat([null[None], torch.from_numpy(queries.values)])
    plain = with_queries(lists, null.expand(len(lists), -1))
    kept = {field.name: getattr(plain, field.name) for field in fields(plain)}
    return CrossSampled(**kept, bank=bank, places=torch.from_numpy(places), chance=torch.from_numpy(chance))


def with_each_query(lists: Lists, candidates: pd.DataFrame, queries: Vectors, *, first: bool = False) -> QueryLists:
    """The lists once for every query that was written for them.

    first  of every source the first one alone: the greedy query, unless it is empty
    """
    own = _of(lists, candidates)
    if first:
        own = own.drop_duplicates(["session_id", "source"])
    rows = pd.Index(lists.session_id).get_indexer(own["session_id"])
    return with_queries(lists.take(rows), queries.rows(own["query"]))


def _of(lists: Lists, candidates: pd.DataFrame) -> pd.DataFrame:
    """What was written for these lists, in the order of `candidates`, without empty queries."""
    return candidates[written(candidates) & candidates["session_id"].isin(lists.session_id.tolist()).to_numpy()]
