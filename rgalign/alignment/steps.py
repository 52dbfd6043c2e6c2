"""The three steps that tune the reasoner, each from params and artifacts to a reasoner and its tables."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from rgalign.alignment import launched, preferences
from rgalign.alignment.context import Context
from rgalign.alignment.contrastive import contrastive
from rgalign.alignment.dpo import dpo, reference_log_probabilities
from rgalign.alignment.info_nce import RankingSpace
from rgalign.alignment.sft import sft
from rgalign.data.lists import Lists, QueryLists, with_queries
from rgalign.params_schema import Dpo
from rgalign.ranker.fit import score
from rgalign.reasoner.embed import embed
from rgalign.reasoner.model import Reasoner
from rgalign.reasoner.prompts import PROMPT_QUERY
from rgalign.seeding import derived

SFT_LOOP = ("epochs", "learning_rate", "documents_per_batch", "neftune", "weight_decay")
DPO_LOOP = ("epochs", "learning_rate", "pairs_per_batch", "weight_decay")
DPO_LOSS = ("objective", "beta", "sft_weight", "length_normalised")
CL_LOOP = ("epochs", "learning_rate", "documents_per_batch", "weight_decay")
CL_LOSS = ("similarity", "temperature", "in_batch", "symmetric", "lm_weight")


def best_queries(context: Context, scored: pd.DataFrame) -> pd.DataFrame:
    """RG-SFT's targets: one query a session of train's part (preferences.best_of_n).

    scored  candidates with their reward; those of other parts' sessions are left aside
    """
    own, learners = context.params.alignment.sft, context.learners
    how = {"select": own.select, "min_reward": own.min_reward, "seed": derived(context.params.run.seed, "best of n")}
    return preferences.best_of_n(_learnt(scored, learners), train=learners, **how)


def tune_by_best(context: Context, start: Reasoner, best: pd.DataFrame, work: Path) -> tuple[Reasoner, pd.DataFrame]:
    """RG-SFT (METHOD.md 2.3, step 2): the reasoner learns to write each session's best query. Returns its curve too."""
    if context.recipe.launcher:
        return launched.tune(context, "sft", start, work, tables={"best": best})[:2]
    how = context.params.alignment
    prompter = context.recipe.prompter(context.shop, start)
    prompts = _prompts_by_session(context, start)
    return sft(
        start,
        [prompts[session] for session in best["session_id"]],
        prompter.queries(best["query"].tolist()),
        folder=work,
        seed=derived(context.params.run.seed, "sft"),
        lora=how.lora and how.lora.model_dump(),
        engine=context.engine,
        **how.sft.model_dump(include=set(SFT_LOOP)),
    )


def preference_pairs(context: Context, start: Reasoner, scored: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """RG-DPO's pairs, and what each filter left (preferences.pairs). Arguments as of `best_queries`."""
    how = context.params.alignment.dpo.model_dump(include={"min_margin", "margin_quantile"})
    prompter, learners = context.recipe.prompter(context.shop, start), context.learners
    scored = _learnt(scored, learners)
    return preferences.pairs(scored, _prompts_by_session(context, start), prompter, train=learners, **how)


def tune_by_pairs(
    context: Context,
    start: Reasoner,
    pairs: pd.DataFrame,
    work: Path,
    watch: Callable[[Reasoner, int], bool] | None = None,
) -> tuple[Reasoner, pd.DataFrame, pd.DataFrame]:
    """RG-DPO (METHOD.md 2.3, step 2): best against worst. Returns reasoner, curve and the reference.

    watch  called `alignment.dpo.looks` times; True stops training
    """
    how, own = context.params.alignment, context.params.alignment.dpo
    if context.recipe.launcher:
        watched = watch is not None and own.looks > 0
        aligned, curve, said = launched.tune(context, "dpo", start, work, tables={"pairs": pairs}, watched=watched)
        if watched:
            getattr(watch, "rows", {}).update({int(step): row for step, row in said["looks"].items()})
        return aligned, curve, pd.read_parquet(work / "job" / "reference.parquet")
    prompter = context.recipe.prompter(context.shop, start)
    given = preferences.to_pairs(pairs, _prompts_by_session(context, start), prompter)
    reference = reference_log_probabilities(start, given)
    steps = steps_of(own, len(given))
    aligned, curve = dpo(
        start,
        given,
        reference=reference,
        folder=work,
        seed=derived(context.params.run.seed, "dpo"),
        lora=how.lora and how.lora.model_dump(),
        engine=context.engine,
        watch=watch if own.looks else None,
        watch_steps=max(1, steps // max(1, own.looks)),
        **own.model_dump(include={*DPO_LOOP, *DPO_LOSS}),
    )
    return aligned, curve, reference


def steps_of(how: Dpo, pairs: int) -> int:
    """Optimiser steps of RG-DPO on so many pairs."""
    return max(1, round(how.epochs * -(-pairs // how.pairs_per_batch))) if how.use and pairs else 0


def no_pairs() -> tuple[pd.DataFrame, pd.DataFrame]:
    """What `preference_pairs` gives where the step is switched off."""
    return pd.DataFrame(columns=preferences.COLUMNS), pd.DataFrame(columns=["filter", "of", "left"])


def no_reference() -> pd.DataFrame:
    """The reference of no pairs."""
    return pd.DataFrame(columns=["reference_chosen", "reference_rejected", "checkpoint", "pairs"])


def pull_to_clicks(
    context: Context, start: Reasoner, best: pd.DataFrame | None, work: Path, *, learners: Lists | None = None
) -> tuple[Reasoner, pd.DataFrame]:
    """RG-CL (METHOD.md 2.3, step 3): the embedding is pulled to the clicked intents in the frozen rankers' space.

    best      best_queries, for the language term beside it; None or alignment.cl.lm_weight 0: none. A session without
              one learns from its click alone
    learners  the lists to learn from, each with a click; None: context.learners
    Hard negatives are those of a session's shown intents that the rankers like best and nobody clicked [C].
    Where queries are embedded (reasoner.embed), they are those that `start` writes, throughout the step [C].
    """
    how, own = context.params.alignment, context.params.alignment.cl
    if context.recipe.launcher:
        tables = {} if best is None else {"best": best}
        return launched.tune(context, "cl", start, work, tables=tables, learners=learners)[:2]
    learners, queries = learners if learners is not None else context.learners, None
    if best is not None and own.lm_weight:
        written = context.recipe.prompter(context.shop, start).queries(best["query"].tolist())
        asked = dict(zip(best["session_id"], written, strict=True))
        queries = [asked.get(session, []) for session in learners.session_id]
    embeds_query = context.params.reasoner.embed == PROMPT_QUERY
    return contrastive(
        start,
        context.embedded_prompts(start, learners),
        asked=context.prompts(start, learners) if embeds_query and queries is not None else None,
        spaces=[RankingSpace.of(each, context.parts.intents, learners) for each in context.rankers.values()],
        clicked=first_click(learners),
        hard=hard_negatives(learners, mean_scores(context, learners), own.hard),
        also=other_clicks(learners),
        queries=queries,
        folder=work,
        seed=derived(context.params.run.seed, "cl"),
        lora=how.lora and how.lora.model_dump(),
        engine=context.engine,
        neftune=own.neftune or None,
        **own.model_dump(include={*CL_LOOP, *CL_LOSS}),
    )


def mean_scores(context: Context, lists: QueryLists) -> np.ndarray:
    """(lists, candidates) scores of the run's QE-Rec, mean over its seeds; -inf where padded."""
    return np.mean([score(each, lists, context.parts.intents) for each in context.rankers.values()], axis=0)


def with_own_vectors(context: Context, reasoner: Reasoner, lists: Lists) -> QueryLists:
    """The lists with the vectors that this reasoner makes of their sessions."""
    prefix = len(context.recipe.prompter(context.shop, reasoner).head)
    prompts = context.embedded_prompts(reasoner, lists)
    return with_queries(lists, embed(reasoner, prompts, prefix=prefix, progress=False))


def first_click(lists: Lists) -> np.ndarray:
    """(lists,) row in the knowledge base of the first clicked intent."""
    place = lists.clicked.int().argmax(dim=1, keepdim=True)
    return lists.candidates.long().gather(1, place).squeeze(1).numpy()


def other_clicks(lists: Lists) -> np.ndarray:
    """(lists, most) rows in the knowledge base of what was clicked beside `first_click`; -1: no more."""
    candidates, clicked = lists.candidates.numpy().astype(np.int64), lists.clicked.numpy()
    order = np.argsort(~clicked, axis=1, kind="stable")[:, 1 : max(1, clicked.sum(axis=1).max(initial=1))]
    return np.where(np.take_along_axis(clicked, order, axis=1), np.take_along_axis(candidates, order, axis=1), -1)


def hard_negatives(lists: Lists, scores: np.ndarray, count: int) -> np.ndarray:
    """(lists, count) rows in the knowledge base of the shown, unclicked intents with the highest scores; -1: no more.

    scores  (lists, candidates), -inf where padded
    """
    candidates = lists.candidates.numpy().astype(np.int64)
    passed_over = np.where((lists.shown & ~lists.clicked).numpy(), scores, -np.inf)
    order = np.argsort(-passed_over, axis=1, kind="stable")[:, :count]
    found = np.take_along_axis(candidates, order, axis=1)
    return np.where(np.isfinite(np.take_along_axis(passed_over, order, axis=1)), found, -1)


def _learnt(scored: pd.DataFrame, learners: Lists) -> pd.DataFrame:
    return scored[scored["session_id"].isin(learners.session_id.tolist())]


def _prompts_by_session(context: Context, reasoner: Reasoner) -> dict[str, list[int]]:
    learners = context.learners
    return dict(zip(learners.session_id.tolist(), context.prompts(reasoner, learners), strict=True))
