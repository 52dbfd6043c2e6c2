"""The reward model: how much a query helps the ranker to find what was clicked (METHOD.md 2.3, step 1).

It is QE-Rec, trained on queries of several LLMs (`cross_sampling`) and frozen.

folder/<name>/seed-<seed>/   config.json, weights.safetensors (ranker.store), null.safetensors with the form's name
name: ALL, ONE; fold-<i>/ALL was trained without the users of fold i
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rgalign.alignment.candidates import written
from rgalign.alignment.cross_sampling import cross_sampled, null_query, with_all_queries, with_each_query
from rgalign.data.lists import Lists, QueryIntents, QueryLists, with_queries, with_texts
from rgalign.data.vectors import Vectors
from rgalign.errors import nearest
from rgalign.ranker import store
from rgalign.ranker.fit import fit, refuse_other_parts, score
from rgalign.ranker.store import StoreError
from rgalign.ranker.three_tower import ThreeTower
from rgalign.ranker.train import Parts, PartsOf, build, fitting, loss_of, parts_of, runtime_of
from rgalign.run.artifacts import atomic
from rgalign.run.distributed import each

RANKER = "qe_rec"  # whose architecture and settings it has
NULL = "null.safetensors"
ALL, ONE = "all", "one"  # cross-sampled from every model; from one alone, the control

# (ranker, lists with queries, intents, exists (rows, intents) bool or None) -> log p of what was clicked (rows,)
Reward = Callable[[ThreeTower, QueryLists, QueryIntents, Tensor | None], Tensor]


def over_list(ranker: ThreeTower, lists: QueryLists, intents: QueryIntents, exists: Tensor | None) -> Tensor:
    """log p(clicked) by the softmax of the whole ranker's scores over the shown list, without position bias [C]."""
    scores = ranker(lists, intents).masked_fill(~lists.shown, -torch.inf)
    return _of_clicked(scores.log_softmax(dim=1), lists)


def over_kb(ranker: ThreeTower, lists: QueryLists, intents: QueryIntents, exists: Tensor | None) -> Tensor:
    """log p(clicked) by the softmax of the query-intent branch alone, q.v / sqrt(dim), over the whole KB [C].

    Intents that do not exist yet at a session's time are left out; exists None: all do.
    """
    vectors, _ = ranker.intent(intents)
    scores = (ranker.query(lists) * ranker.config.dim**-0.5) @ vectors.T
    if exists is not None:
        scores = scores.masked_fill(~exists, -torch.inf)
    return _of_clicked(scores.log_softmax(dim=1).gather(1, lists.candidates.long().clamp(min=0)), lists)


REWARDS: dict[str, Reward] = {"list": over_list, "kb": over_kb}  # the next one is a function, named here


@dataclass(frozen=True, eq=False)
class RewardModel:
    """A frozen ranker that says what a query is worth.

    intents  the KB with its texts embedded by the model that embeds the queries
    null     (query_dim,) float16, the query that says nothing
    form     name of REWARDS that counts unless another is asked for
    Raises ValueError for an unknown form.
    """

    ranker: ThreeTower
    intents: QueryIntents
    null: Tensor
    form: str = "list"

    def __post_init__(self) -> None:
        _reward_of(self.form)
        self.ranker.requires_grad_(False).train(False)

    def reward(
        self,
        lists: Lists,
        query: Tensor | np.ndarray,
        *,
        form: str | None = None,
        timestamps: np.ndarray | None = None,
    ) -> np.ndarray:
        """r(q|x) = log p(clicked | x, q) - log p(clicked | x, null query), (rows,) float32 in nats; 0: no help [C].

        lists       one a row; a list may come many times, each time with another query
        query       (rows, query_dim)
        timestamps  (rows,) datetime64, when the session was, for `kb`: later intents do not count; None: all do
        Several clicks share the mass, as in ListNet. NaN without a click.
        """
        null = self.null.expand(len(lists), -1)
        return self.log_probability(lists, query, form=form, timestamps=timestamps) - self.log_probability(
            lists, null, form=form, timestamps=timestamps
        )

    def log_probability(
        self,
        lists: Lists,
        query: Tensor | np.ndarray,
        *,
        form: str | None = None,
        timestamps: np.ndarray | None = None,
        rows_per_batch: int = 2048,
    ) -> np.ndarray:
        """log p(clicked | x, q), (rows,) float32 in nats; arguments as of `reward`."""
        says, heard = _reward_of(form or self.form), with_queries(lists, query)
        device = next(self.ranker.parameters()).device
        intents, found = self.intents.to(device), [torch.zeros(0)]
        with torch.inference_mode():
            for rows in torch.arange(len(heard)).split(rows_per_batch):
                exists = None
                if timestamps is not None:
                    exists = torch.from_numpy(self.intents.existing(timestamps[rows.numpy()])).to(device)
                found.append(says(self.ranker, heard.take(rows).to(device), intents, exists).cpu())
        return torch.cat(found).numpy()

    def probabilities(self, lists: Lists, query: Tensor | np.ndarray) -> np.ndarray:
        """p(candidate | x, q), (rows, candidates) float32: the softmax over the shown list; 0 where padded."""
        scores = torch.from_numpy(score(self.ranker, with_queries(lists, query), self.intents))
        return scores.softmax(dim=1).numpy()


def scored(
    model: RewardModel,
    candidates: pd.DataFrame,
    lists: Lists,
    queries: Vectors,
    *,
    form: str | None = None,
    timestamps: np.ndarray | None = None,
) -> pd.DataFrame:
    """The candidates with a column `reward`, in nats; NaN for an empty query and for a session without a click.

    lists       the sessions of all candidates, each once; timestamps (lists,), as of `RewardModel.reward`
    queries     vectors by text
    The same query in the same session has the same reward, whoever wrote it. Raises ValueError for unknown sessions.
    """
    row = pd.Index(lists.session_id).get_indexer(candidates["session_id"])
    if (row < 0).any():
        first = candidates["session_id"].to_numpy()[row < 0][0]
        raise ValueError(f"{(row < 0).sum()} candidates are of sessions that the lists do not have (first: {first!r})")
    asked = pd.DataFrame({"row": row, "query": candidates["query"].to_numpy(dtype=object)})
    different = asked[written(candidates)].drop_duplicates()
    rows = different["row"].to_numpy(copy=True)  # pandas lends it read-only
    at = None if timestamps is None else timestamps[rows]
    reward = model.reward(lists.take(rows), queries.rows(different["query"]), form=form, timestamps=at)
    found = asked.merge(different.assign(reward=reward), how="left", on=["row", "query"], validate="many_to_one")
    return candidates.assign(reward=found["reward"].to_numpy())


def train_reward_models(
    parts: PartsOf,
    candidates: pd.DataFrame,
    queries: Vectors,
    intents: Vectors,
    *,
    models: Mapping[tuple[str, int], Sequence[str]],
    settings: Mapping[str, Any],
    folder: Path,
    positions: int,
    null_share: float = 0.1,
    form: str = "list",
    workers: int = 1,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Train the reward models and save each at once. Returns the learning curves, one row an epoch, with its seconds.

    parts       one for all models, or each model's own by its name
    candidates  of train's and dev's sessions (alignment.candidates.write)
    queries     their vectors by text; intents: the KB's by intent_id, of the same model
    models      a model's name and seed -> the sources whose queries it hears: ALL has every one, the control ONE a
                single one
    settings    QE-Rec's;  null_share  as of `cross_sampling.with_all_queries`
    workers     trained at once, on a CPU
    Training stops by GAUC on the development users' lists, each once a source with its first query [C]: without a draw,
    so that epochs are compared on the same, and no source counts more than another.
    """
    _reward_of(form)
    every = {name: parts_of(parts, name) for name, _ in models}
    for own in every.values():
        refuse_other_parts("train_reward_models", train=own.train, dev=own.dev)
    workers, runtime = runtime_of(accelerator, workers, progress)
    shared = dict(settings=settings, positions=positions, null_share=null_share, form=form, queries=queries, **runtime)
    jobs = (
        {
            "name": name,
            "parts": _with_texts(every[name], intents),
            "candidates": candidates[candidates["source"].isin(sources)],
            "folder": folder / name / f"seed-{seed}",
            "seed": seed,
            **shared,
        }
        for (name, seed), sources in models.items()
    )
    curves = each(_train_one, jobs, total=len(models), workers=workers, title="reward models", progress=progress)
    return pd.concat(curves, ignore_index=True)


def _with_texts(parts: Parts, intents: Vectors) -> Parts:
    return replace(parts, intents=with_texts(parts.intents, intents.rows(parts.intents.intent_id)))


def _train_one(
    name, parts, candidates, queries, settings, folder, positions, null_share, form, seed, progress,
    accelerator=None, precision=None,
) -> pd.DataFrame:  # fmt: skip
    null = null_query(parts.train, candidates, queries)
    train = with_all_queries(parts.train, candidates, queries, null=null, null_share=null_share)
    dev = with_each_query(parts.dev, candidates, queries, first=True)
    heard = replace(parts, train=with_each_query(parts.train, candidates, queries))  # all that whitening is made from
    ranker = build(RANKER, heard, settings, positions=positions, seed=seed)
    how = {**fitting(settings), "progress": progress}
    accelerator = accelerator or Accelerator(cpu=True, mixed_precision=precision)
    loss = cross_sampled(loss_of(RANKER, settings))
    fitted = fit(ranker, train, dev, parts.intents, seed=seed, loss=loss, accelerator=accelerator, **how)
    save_reward_model(folder, RewardModel(fitted.model, parts.intents, null, form))
    curve = fitted.curve
    return curve.assign(model=name, seed=seed, best=curve.epoch == fitted.best_epoch)


def save_reward_model(folder: str | Path, model: RewardModel) -> None:
    """Write ranker, null query and form, whole or not at all; the intents are the run's own and are not written."""
    with atomic(Path(folder)) as temporary:
        store.save(temporary, model.ranker)
        save_file({"null": model.null.cpu().contiguous()}, temporary / NULL, metadata={"form": model.form})


def load_reward_model(folder: str | Path, intents: QueryIntents, *, device: str = "cpu") -> RewardModel:
    """What `save_reward_model` wrote. device: where it judges, as of `store.load`. Raises StoreError."""
    ranker = store.load(folder, device=device)
    try:
        with safe_open(Path(folder) / NULL, "pt") as file:
            return RewardModel(ranker, intents, file.get_tensor("null"), (file.metadata() or {}).get("form", ""))
    except (OSError, ValueError, SafetensorError) as error:
        raise StoreError(f"{folder} holds no reward model that can be read: {error}") from None


def _of_clicked(log_p: Tensor, lists: Lists) -> Tensor:
    """(lists, candidates) -> (lists,): the mean over what was clicked, NaN where nothing was."""
    return torch.where(lists.clicked, log_p, 0).sum(dim=1) / lists.clicked.sum(dim=1)


def _reward_of(form: str) -> Reward:
    if form not in REWARDS:
        raise ValueError(f"form is {form!r}; expected {' | '.join(REWARDS)}{nearest(form, REWARDS)}")
    return REWARDS[form]
