"""The reward model: how much a query helps the ranker to find what was clicked (METHOD.md 2.3, step 1).

It is QE-Rec, trained with multi-LLM cross-sampling and frozen: a session's query comes from one of several LLMs at
random [P], so that the model scores the query and not one LLM's style. It reads a query by its text alone, embedded
like a KB intent [C]: the state after prompt and query hardly depends on the query.
folder/<name>/seed-<seed>/ holds the ranker (ranker.store) and null.safetensors, with the form's name; name is ALL, ONE,
or fold-<i>/ALL, trained without the users of fold i.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rgalign.alignment.candidates import nonempty
from rgalign.data.lists import Lists, Match, QueryIntents, QueryLists, with_match, with_queries, with_texts
from rgalign.data.vectors import Vectors
from rgalign.errors import nearest
from rgalign.params_training import RankerSettings
from rgalign.ranker import store
from rgalign.ranker.fit import fit, refuse_other_parts, score
from rgalign.ranker.losses import Loss
from rgalign.ranker.match_terms import of_written
from rgalign.ranker.store import StoreError
from rgalign.ranker.towers import ThreeTower
from rgalign.ranker.train import PartsOf, build, loss_of, parts_of, runtime_of
from rgalign.run.artifacts import atomic
from rgalign.run.distributed import each

RANKER = "qe_rec"  # its architecture and settings
NULL = "null.safetensors"
ALL, ONE = "all", "one"  # cross-sampled from every model; from one alone, the control

# (ranker, lists with queries, intents, exists (rows, intents) bool or None) -> log p of what was clicked (rows,)
Reward = Callable[[ThreeTower, QueryLists, QueryIntents, Tensor | None], Tensor]


def over_list(ranker: ThreeTower, lists: QueryLists, intents: QueryIntents, exists: Tensor | None) -> Tensor:
    """log p(clicked) by the softmax of the whole ranker's scores over the shown list, without position bias [C]."""
    return _of_clicked(list_scores(ranker, lists, intents, exists).log_softmax(dim=1), lists)


def list_scores(ranker: ThreeTower, lists: QueryLists, intents: QueryIntents, exists: Tensor | None) -> Tensor:
    """(lists, candidates) of the whole ranker; -inf where padded."""
    return ranker(lists, intents).masked_fill(~lists.shown, -torch.inf)


def over_kb(ranker: ThreeTower, lists: QueryLists, intents: QueryIntents, exists: Tensor | None) -> Tensor:
    """log p(clicked) by the softmax of the query-intent branch alone, q.v / sqrt(dim), over the whole KB [C]."""
    log_p = kb_scores(ranker, lists, intents, exists).log_softmax(dim=1)
    return _of_clicked(log_p.gather(1, lists.candidates.long().clamp(min=0)), lists)


def kb_scores(ranker: ThreeTower, lists: QueryLists, intents: QueryIntents, exists: Tensor | None) -> Tensor:
    """(lists, intents) of the query-intent branch alone; -inf for intents that do not exist yet at a session's time.

    exists  (lists, intents) bool; None: all do
    """
    vectors, _ = ranker.intent(intents)
    scores = (ranker.query(lists) * ranker.config.dim**-0.5) @ vectors.T
    return scores if exists is None else scores.masked_fill(~exists, -torch.inf)


def _of_clicked(log_p: Tensor, lists: Lists) -> Tensor:
    """(lists, candidates) -> (lists,): the mean over what was clicked, NaN where nothing was."""
    return torch.where(lists.clicked, log_p, 0).sum(dim=1) / lists.clicked.sum(dim=1)


REWARDS: dict[str, Reward] = {"list": over_list, "kb": over_kb}  # the next one is a function, named here


def _reward_of(form: str) -> Reward:
    if form not in REWARDS:
        raise ValueError(f"form is {form!r}; expected {' | '.join(REWARDS)}{nearest(form, REWARDS)}")
    return REWARDS[form]


@dataclass(frozen=True, eq=False)
class Queries:
    """Different queries, as a reward model reads them.

    vectors  by text;  match  (queries, kb, terms), the match terms of written queries, row by row; None: it reads none
    """

    vectors: Vectors
    match: Match | None = None

    def conditioned(self, lists: Lists, texts: Sequence[str]) -> QueryLists:
        """The lists, each with its query. Raises ValueError for one that is not among these."""
        vectors = self.vectors.rows(texts)
        if self.match is not None:
            rows = pd.Index(self.vectors.ids).get_indexer(pd.Index(np.asarray(texts, dtype=str)))
            lists = with_match(lists, lists.match.replaced(self.match.take(torch.from_numpy(rows))))
        return with_queries(lists, vectors)


@dataclass(frozen=True, eq=False)
class RewardModel:
    """A frozen ranker that gives queries their rewards. Raises ValueError for an unknown form."""

    ranker: ThreeTower
    intents: QueryIntents  # the KB with its texts embedded by the model that embeds the queries
    null: Tensor  # (query_dim,) float16, the null query
    form: str = "list"  # name of REWARDS, the default of the methods

    def __post_init__(self) -> None:
        _reward_of(self.form)
        self.ranker.requires_grad_(False).train(False)

    def reward(self, asked: QueryLists, *, form: str | None = None, timestamps: np.ndarray | None = None) -> np.ndarray:
        """r(q|x) = log p(clicked | x, q) - log p(clicked | x, null query), (rows,) float32 in nats; 0: no help [C].

        asked       (Queries.conditioned) one a row; a list may come many times, each time with another query
        timestamps  (rows,) datetime64 of the session, for `kb`: later intents do not count; None: all do
        Several clicks share the mass, as in ListNet. NaN without a click.
        """
        how = {"form": form, "timestamps": timestamps}
        return self.log_probability(asked, **how) - self.log_probability(with_null_query(asked, self.null), **how)

    def log_probability(
        self, asked: QueryLists, *, form: str | None = None, timestamps: np.ndarray | None = None
    ) -> np.ndarray:
        """log p(clicked | x, q), (rows,) float32 in nats; arguments: see `reward`."""
        reward = _reward_of(form or self.form)
        device = next(self.ranker.parameters()).device
        intents, found = self.intents.to(device), [torch.zeros(0)]
        with torch.inference_mode():
            for rows in torch.arange(len(asked)).split(2048):
                exists = None
                if timestamps is not None:
                    exists = torch.from_numpy(self.intents.existing(timestamps[rows.numpy()])).to(device)
                found.append(reward(self.ranker, asked.take(rows).to(device), intents, exists).cpu())
        return torch.cat(found).numpy()

    @torch.no_grad()
    def scores(self, asked: QueryLists, form: str) -> tuple[Tensor, Tensor, Tensor]:
        """What a reward is made of: scores with the query and with the null query, and what was clicked (bool), each
        (rows, candidates) in the form `list`, (rows, intents) in the form `kb`, where all intents exist."""
        both, score_of = (asked, with_null_query(asked, self.null)), {"list": list_scores, "kb": kb_scores}[form]
        device = next(self.ranker.parameters()).device
        found = [score_of(self.ranker, each.to(device), self.intents.to(device), None).cpu() for each in both]
        if form == "list":
            return *found, asked.clicked
        row, place = asked.clicked.nonzero().T
        clicked = torch.zeros_like(found[0], dtype=torch.bool)
        clicked[row, asked.candidates[row, place].long()] = True
        return *found, clicked

    def probabilities(self, asked: QueryLists) -> np.ndarray:
        """p(candidate | x, q), (rows, candidates) float32: the softmax over the shown list; 0 where padded."""
        scores = torch.from_numpy(score(self.ranker, asked, self.intents))
        return scores.softmax(dim=1).numpy()


def with_null_query(lists: Lists, null: Tensor) -> QueryLists:
    """The lists with the null query (query_dim,), whose match terms have nothing to compare."""
    if lists.match is not None:
        lists = with_match(lists, lists.match.replaced(None, of_written(lists.match.names)))
    return with_queries(lists, null.expand(len(lists), -1))


def score_candidates(
    model: RewardModel,
    candidates: pd.DataFrame,
    lists: Lists,
    queries: Queries,
    *,
    form: str | None = None,
    timestamps: np.ndarray | None = None,
) -> pd.DataFrame:
    """The candidates with a column `reward`, in nats; NaN for an empty query and for a session without a click.

    lists    the sessions of all candidates, each once; timestamps (lists,), see `RewardModel.reward`
    The same query in the same session has the same reward, whoever wrote it. Raises ValueError for unknown sessions.
    """
    row = pd.Index(lists.session_id).get_indexer(candidates["session_id"])
    if (row < 0).any():
        first = candidates["session_id"].to_numpy()[row < 0][0]
        raise ValueError(f"{(row < 0).sum()} candidates are of sessions that the lists do not have (first: {first!r})")
    asked = pd.DataFrame({"row": row, "query": candidates["query"].to_numpy(dtype=object)})
    different = asked[nonempty(candidates)].drop_duplicates()
    rows = different["row"].to_numpy(copy=True)  # pandas lends it read-only
    at = None if timestamps is None else timestamps[rows]
    asked_of = queries.conditioned(lists.take(rows), different["query"])
    reward = model.reward(asked_of, form=form, timestamps=at)
    found = asked.merge(different.assign(reward=reward), how="left", on=["row", "query"], validate="many_to_one")
    return candidates.assign(reward=found["reward"].to_numpy())


def train_reward_models(
    parts: PartsOf,
    candidates: pd.DataFrame,
    queries: Queries,
    intents: Vectors,
    *,
    models: Mapping[tuple[str, int], Sequence[str]],
    settings: RankerSettings,
    folder: Path,
    positions: int,
    null_share: float = 0.1,
    workers: int = 1,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Train the reward models and save each at once. Returns the learning curves, one row an epoch, with its seconds.

    parts       one for all models, or each model's own by its name
    candidates  of train's and dev's sessions (alignment.candidates)
    queries     of the candidates;  intents  the KB's vectors by intent_id, of the same model
    models      a model's name and seed -> the sources whose queries it is trained on
    settings    QE-Rec's;  null_share  see `with_all_queries`;  workers  trained at once, on a CPU
    Early stopping is by GAUC on the development users' lists, each once a source with its first query [C]: nothing is
    sampled, so that epochs are compared on the same lists.
    """
    every = {name: parts_of(parts, name) for name, _ in models}
    for name, own in every.items():
        refuse_other_parts("train_reward_models", train=own.train, dev=own.dev)
        every[name] = replace(own, intents=with_texts(own.intents, intents.rows(own.intents.intent_id)))
    workers, runtime = runtime_of(accelerator, workers, progress)
    shared = {"settings": settings, "positions": positions, "null_share": null_share, "queries": queries, **runtime}
    jobs = (
        {
            "name": name,
            "parts": every[name],
            "written": candidates[candidates["source"].isin(sources)],
            "folder": folder / name / f"seed-{seed}",
            "seed": seed,
            **shared,
        }
        for (name, seed), sources in models.items()
    )
    curves = each(_train_one, jobs, total=len(models), workers=workers, title="reward models", progress=progress)
    return pd.concat(curves, ignore_index=True)


def _train_one(
    name, parts, written, queries, settings, folder, positions, null_share, seed, progress, **where
) -> pd.DataFrame:
    """where: accelerator, or the precision of one that this process makes itself."""
    null = null_query(parts.train, written, queries.vectors)
    train = with_all_queries(parts.train, written, queries, null=null, null_share=null_share)
    dev = with_each_query(parts.dev, written, queries, first=True)
    read = replace(parts, train=with_each_query(parts.train, written, queries))  # what whitening is fitted on
    ranker = build(RANKER, read, settings, positions=positions, seed=seed)
    accelerator = where.get("accelerator") or Accelerator(cpu=True, mixed_precision=where["precision"])
    how = {"seed": seed, "accelerator": accelerator, "progress": progress}
    fitted = fit(ranker, train, dev, parts.intents, settings, loss=cross_sampled(loss_of(RANKER, settings)), **how)
    save_reward_model(folder, RewardModel(fitted.model, parts.intents, null))
    return fitted.curve.assign(model=name, seed=seed, best=fitted.curve.epoch == fitted.best_epoch)


def save_reward_model(folder: str | Path, model: RewardModel) -> None:
    """Write ranker, null query and form, whole or not at all; the intents are the run's own and are not written."""
    with atomic(Path(folder)) as temporary:
        store.save(temporary, model.ranker)
        save_file({"null": model.null.cpu().contiguous()}, temporary / NULL, metadata={"form": model.form})


def load_reward_model(folder: str | Path, intents: QueryIntents, *, device: str = "cpu") -> RewardModel:
    """What `save_reward_model` wrote. device: see `store.load`. Raises StoreError."""
    ranker = store.load(folder, device=device)
    try:
        with safe_open(Path(folder) / NULL, "pt") as file:
            return RewardModel(ranker, intents, file.get_tensor("null"), (file.metadata() or {}).get("form", ""))
    except (OSError, ValueError, SafetensorError) as error:
        raise StoreError(f"{folder} holds no reward model that can be read: {error}") from None


@dataclass(frozen=True)
class CrossSampled(QueryLists):
    """Impression lists with several queries each; `drawn` samples one of them. `query` is the null query at first."""

    SHARED = (*QueryLists.SHARED, "bank", "terms")

    bank: Tensor  # (queries, query_dim) float16, shared by all lists; row 0 is the null query
    terms: Match | None  # (queries, kb, terms), of written queries, as `bank`; None: they have none
    places: Tensor  # (lists, slots) rows of the bank; slot 0 is the null query, unused slots are too
    chance: Tensor  # (lists, slots) float32, a row's sum is 1: the probability of each slot; unused ones have 0

    def drawn(self) -> "CrossSampled":
        """The lists with a query each, sampled from torch's random state (`fit` seeds it)."""
        drawn = self.places.gather(1, torch.multinomial(self.chance, 1)).squeeze(1)
        match = self.match if self.terms is None else self.match.replaced(self.terms.take(drawn))
        return replace(self, query=self.bank[drawn], match=match)


def cross_sampled(base: Loss) -> Loss:
    """`base` of a batch's lists, each with a sampled query."""
    return lambda ranker, lists, intents: base(ranker, lists.drawn(), intents)


def null_query(lists: Lists, candidates: pd.DataFrame, queries: Vectors) -> Tensor:
    """(query_dim,) float16: the mean vector of all queries written for these lists. Raises ValueError without any."""
    vectors = queries.rows(_written_for(lists, candidates)["query"])
    if not len(vectors):
        sources = ", ".join(sorted(candidates["source"].unique()))
        raise ValueError(
            f"every candidate is empty (written by: {sources}): there is nothing to reward. Look at the queries of "
            "notebook 02; a reasoner that writes nothing needs more pre-training, or alignment.loop.rounds 0"
        )
    return torch.from_numpy(vectors.astype(np.float32).mean(axis=0).astype(np.float16))


def with_all_queries(
    lists: Lists, candidates: pd.DataFrame, queries: Queries, *, null: Tensor, null_share: float
) -> CrossSampled:
    """The lists with a click, each with all queries that were written for it.

    candidates  columns session_id, source, query, count (alignment.candidates); empty queries and other sessions are
                left out; a list that has none left always has the null query
    null_share  probability of the null query [C]; else a source is sampled uniformly, and one of its queries, as often
                as it wrote it [C]
    Raises ValueError for a list that no source wrote a query for: it would silently learn from the null query alone.
    """
    lists = lists.take(lists.clicked.any(dim=1).nonzero().squeeze(1))
    if missing := sorted({*lists.session_id.tolist()} - {*candidates["session_id"]}):
        raise ValueError(
            f"{len(missing)} of {len(lists)} sessions of {lists.part} have no candidate (first: {missing[0]!r}); "
            "write candidates for them too"
        )
    own = _written_for(lists, candidates)
    row = pd.Index(lists.session_id).get_indexer(own["session_id"])
    slot = own.groupby("session_id").cumcount().to_numpy() + 1
    of_source = own["count"] / own.groupby(["session_id", "source"])["count"].transform("sum")
    share = (of_source / own.groupby("session_id")["source"].transform("nunique")).to_numpy()
    places = np.zeros((len(lists), slot.max(initial=0) + 1), dtype=np.int64)
    chance = np.zeros(places.shape, dtype=np.float32)
    places[row, slot] = pd.Index(queries.vectors.ids).get_indexer(own["query"]) + 1
    chance[row, slot] = (1 - null_share) * share
    chance[:, 0] = np.where(chance[:, 1:].any(axis=1), null_share, 1)
    bank, terms, plain = (
        torch.cat([null[None], torch.from_numpy(queries.vectors.values)]),
        None,
        with_null_query(lists, null),
    )
    if queries.match is not None:
        values = queries.match.values
        terms = Match(torch.cat([values.new_full((1, *values.shape[1:]), float("nan")), values]), queries.match.names)
    kept = {field.name: getattr(plain, field.name) for field in fields(plain)}
    slots = {"places": torch.from_numpy(places), "chance": torch.from_numpy(chance)}
    return CrossSampled(**kept, bank=bank, terms=terms, **slots)


def with_each_query(lists: Lists, candidates: pd.DataFrame, queries: Queries, *, first: bool = False) -> QueryLists:
    """The lists once for every query that was written for them; first: for each source's first, the greedy one."""
    own = _written_for(lists, candidates)
    if first:
        own = own.drop_duplicates(["session_id", "source"])
    rows = pd.Index(lists.session_id).get_indexer(own["session_id"])
    return queries.conditioned(lists.take(rows), own["query"])


def _written_for(lists: Lists, candidates: pd.DataFrame) -> pd.DataFrame:
    """The candidates of these lists, in their order, without empty queries."""
    return candidates[nonempty(candidates) & candidates["session_id"].isin(lists.session_id.tolist()).to_numpy()]
