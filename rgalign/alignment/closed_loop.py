"""The closed loop (METHOD.md 2.3, step 4): rankers retrained on the tuned reasoner, before and after RG-CL.

One iteration: RG-SFT and RG-DPO; `retrain_rankers` on the vectors of that reasoner, with whitening refitted; RG-CL in
the space of *these* rankers; `finish_iteration` embeds the sessions with the aligned reasoner and trains the rankers on
them. The knowledge base keeps the vectors of `retrain_rankers`, which belong to the space that RG-CL aligned with [C].
"""

import copy
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from rgalign.alignment.context import MAIN, QE_REC, RGALIGN_REC, Context, copy_folder
from rgalign.alignment.contrastive import digest_of, effective_rank, prompt_vectors, train_contrastive
from rgalign.alignment.dpo import planned_steps, train_dpo
from rgalign.alignment.monitor import ProbeSet, RewardHackingMonitor
from rgalign.alignment.preferences import best_queries, preference_pairs
from rgalign.alignment.rewarding import QueryEmbedder, Rewarder, fold_of, train_models, write_candidates
from rgalign.alignment.sft import train_sft
from rgalign.data import vectors
from rgalign.data.lists import Match, QueryIntents, QueryLists, with_match
from rgalign.data.vectors import Vectors
from rgalign.params_training import Contrastive
from rgalign.ranker import store, train
from rgalign.ranker.fit import gauc_of
from rgalign.ranker.losses import Loss
from rgalign.ranker.match_terms import of_written
from rgalign.ranker.towers import ThreeTower, set_whitening
from rgalign.ranker.train import loss_of
from rgalign.ranker.variants import RANKERS
from rgalign.reasoner.batches import Task, right_padded
from rgalign.reasoner.model import Reasoner, fingerprint
from rgalign.reasoner.trainer import Schedule, Setup, fit
from rgalign.run.artifacts import atomic

RETRAINED = "qe_rec/retrained"  # the name in tables of the rankers of `retrain_rankers`
FOLDS = 2  # of cross-fitting: the cheapest, since every fold is one more RG-CL to train [C]


@dataclass(frozen=True, eq=False)
class LoopIteration:
    """The result of one iteration of the loop."""

    reasoner: Reasoner
    reads_kb: Reasoner  # embedded the knowledge base
    state: Context  # with the iteration's vectors (of all sessions of train and valid) and rankers
    curves: pd.DataFrame  # of its rankers
    dev: float  # GAUC, mean over ranker seeds
    valid: float
    seconds: float


def run_loop(
    context: Context, retrained: Context, reads_kb: Reasoner, reasoner: Reasoner, form: str, work: Path, folds: Path
) -> tuple[LoopIteration, pd.DataFrame]:
    """At most alignment.loop.rounds iterations, while GAUC on the development users rises.

    context    the run before its alignment;  form  of the reward
    retrained, reads_kb, reasoner, folds   of the first iteration, whose other steps are notebooks 04 to 07
    Returns the best iteration (the first, if none is better than the run before its alignment) and a table of all:
    round, dev, valid (GAUC), seconds, kept.
    """
    best = finish_iteration(retrained, reads_kb, reasoner, work / "iteration-1", work / "close", folds)
    last, iterations = gauc(context)["dev"], [best]
    while len(iterations) < context.params.alignment.loop.rounds and iterations[-1].dev > last:
        number, last = len(iterations) + 1, best.dev
        folder, scratch = work / f"iteration-{number}", work / f"work-{number}"
        iterations.append(next_iteration(context, best, form, folder, scratch))
        best = max(best, iterations[-1], key=lambda each: each.dev)  # the earlier of equal ones
    rows = [(i, it.dev, it.valid, round(it.seconds, 1), it is best) for i, it in enumerate(iterations, start=1)]
    return best, pd.DataFrame(rows, columns=["round", "dev", "valid", "seconds", "kept"])


def next_iteration(context: Context, before: LoopIteration, form: str, folder: Path, work: Path) -> LoopIteration:
    """One more iteration, from candidates to rankers, with the reasoner and the rankers of the one before.

    context  the run before its alignment, whose vectors the reward model, trained again each time [C], reads
    """
    began = time.perf_counter()
    how, last, reasoner, best = context.params.alignment, before.state, before.reasoner, None
    if context.writes and (how.sft.use or how.dpo.use or (how.cl.use and how.cl.lm_weight)):
        embedder = QueryEmbedder(context, context.main())
        candidates = write_candidates(context, {**context.language_models(), MAIN: reasoner}, work)
        train_models(context, embedder, candidates, work / "reward")
        rewarder = Rewarder.of(embedder, work / "reward", form)
        scored = rewarder.scored(candidates)
        best = best_queries(context, scored)
        if how.sft.use:
            reasoner, _ = train_sft(context, reasoner, best, work / "sft")
        if how.dpo.use:
            pairs, _ = preference_pairs(context, reasoner, scored)
            if planned_steps(how.dpo, len(pairs), how.grpo):
                probe, tolerance = ProbeSet.of(last, rewarder), how.dpo.tolerance
                monitor = RewardHackingMonitor(probe, reasoner, tolerance) if how.dpo.looks else None
                reasoner, _, _ = train_dpo(context, reasoner, pairs, work / "dpo", monitor, rewarder)
    made = work / "retrained"
    retrain_rankers(last, before.reasoner, reasoner, made / "embeddings", made / "rankers", work / "retrain")
    reader = kb_reader(before.reasoner, reasoner)
    reads_kb = before.reads_kb if reader is before.reasoner else reader  # copied vectors keep their reasoner
    retrained = last.reading(made / "embeddings", made / "rankers")
    if how.cl.use:
        reasoner, _ = train_contrastive(retrained, reasoner, best, work / "cl")
    finished = finish_iteration(retrained, reads_kb, reasoner, folder, work / "close")
    return replace(finished, seconds=time.perf_counter() - began)


def retrain_rankers(
    context: Context, before: Reasoner, reasoner: Reasoner, embeddings: Path, folder: Path, work: Path
) -> pd.DataFrame:
    """Train the rankers again on the vectors of the reasoner that RG-SFT and RG-DPO made of `before`, and whiten again.

    context  with the vectors of `before`, and rankers trained on them
    Writes embeddings/sessions, embeddings/intents and folder/seed-<seed>; returns the learning curves. Where the
    reasoner has not changed, the rankers are trained all the same, as often as by the full method.
    """
    if kb_reader(before, reasoner) is before:
        copy_folder(context.embeddings, embeddings)
    else:
        embedding = context.embedding(reasoner)
        vectors.save(embeddings / "sessions", embedding.sessions(context.shop.sessions, work / "sessions"))
        vectors.save(embeddings / "intents", embedding.intents(context.shop.intents, work / "intents"))
    context.match_again(reasoner, embeddings, work / "written")
    return _train_rankers(context, embeddings, folder, work, refit_whitening=True).assign(model=RETRAINED)


def kb_reader(before: Reasoner, reasoner: Reasoner) -> Reasoner:
    """The reasoner whose vectors retrained rankers read: `before` where RG-SFT and RG-DPO changed nothing."""
    return before if fingerprint(reasoner) == fingerprint(before) else reasoner


def finish_iteration(
    context: Context, reads_kb: Reasoner, reasoner: Reasoner, folder: Path, work: Path, folds: Path | None = None
) -> LoopIteration:
    """Embed the sessions with the aligned reasoner and train the rankers on them.

    context  with the rankers in whose space RG-CL aligned, and the vectors of `reads_kb`
    folder   embeddings/ and rankers/ are written there
    folds    the folder of `train_folds`; None: the reasoner embeds all sessions
    """
    began = time.perf_counter()
    sessions = context.embedding(reasoner).sessions(context.shop.sessions, work / "sessions")
    if folds is not None:
        sessions = cross_fitted(context, sessions, folds, work)
    vectors.save(folder / "embeddings" / "sessions", sessions)
    copy_folder(context.embeddings / "intents", folder / "embeddings" / "intents")
    context.match_again(reasoner, folder / "embeddings", work / "written")
    refit = context.params.alignment.loop.refit_whitening
    curves = _train_rankers(context, folder / "embeddings", folder / "rankers", work, refit_whitening=refit)
    state = context.reading(folder / "embeddings", folder / "rankers")
    return LoopIteration(reasoner, reads_kb, state, curves, **gauc(state), seconds=time.perf_counter() - began)


def by_vectors_and_words(before: Context, aligned: Context) -> pd.DataFrame:
    """What of the alignment reaches the ranking by the LM's vectors, and what by the queries that it writes.

    Columns: vectors, words (whose the aligned rankers read: "before" or "aligned"), valid (GAUC, mean over ranker
    seeds). The KB's vectors are the aligned ones. Empty where no match term reads a written query.
    """
    rows, terms = [], tuple(of_written(before.params.ranker.match))
    lists = {"before": before.parts.valid, "aligned": aligned.parts.valid}
    for vectors_of, words_of in product(lists, lists if terms else ()):
        own = lists[vectors_of]
        written = Match(lists[words_of].match.columns(terms), terms)
        mixed = with_match(own, own.match.replaced(written))
        found = [gauc_of(model, mixed, aligned.parts.intents).value for model in aligned.rankers.values()]
        rows.append((vectors_of, words_of, np.mean(found)))
    return pd.DataFrame(rows, columns=["vectors", "words", "valid"])


def _train_rankers(
    context: Context, embeddings: Path, folder: Path, work: Path, *, refit_whitening: bool
) -> pd.DataFrame:
    """Train the context's rankers on these vectors, by alignment.loop, into folder/seed-<seed>. Returns curves."""
    own, settings = context.params.alignment.loop, context.settings
    moved = context.reading(embeddings, context.rankers_folder)
    if own.ranker == "frozen":
        for seed, model in (whitened(moved) if refit_whitening else moved).rankers.items():
            store.save(folder / f"seed-{seed}", model)
        untrained = {"epoch": 0, "train_loss": float("nan"), "dev_gauc": float("nan"), "best": True}
        return pd.DataFrame([{**untrained, "seed": seed} for seed in moved.rankers])
    if own.ranker == "warm":
        settings = settings.model_copy(update={"learning_rate": own.learning_rate, "patience": own.patience})
    job = work / "rankers"
    launch = train.Launch(
        context.recipe.launcher,
        job,
        encoded=context.run / "tables" / "encoded",
        match=terms if (terms := embeddings / "match").is_dir() else context.run / "tables" / "match",
        exposure=context.run / "tables" / "exposure",
        embeddings=job / "embeddings",
        seed=context.params.reasoner.seed,
    )
    if launch.launcher:  # its processes look for vectors by the variant's name
        shutil.copytree(embeddings, launch.embeddings / str(RANKERS[RGALIGN_REC].vectors), dirs_exist_ok=True)
    with atomic(folder) as temporary:
        curves = train.train(
            {RGALIGN_REC: settings},
            context.params.ranker.seeds,
            moved.parts,
            launch=launch,
            folder=work / "trained",
            positions=context.positions,
            start={RGALIGN_REC: context.rankers_folder} if own.ranker == "warm" else None,
            refit_whitening=refit_whitening,
            workers=context.params.run.workers,
            accelerator=context.accelerator,
        )
        (work / "trained" / RGALIGN_REC).rename(temporary)
    shutil.rmtree(work)
    return curves


def whitened(context: Context) -> Context:
    """With copies of its rankers, whose whitening alone is refitted to the context's vectors."""
    rankers = copy.deepcopy(dict(context.rankers))
    for model in rankers.values():
        set_whitening(model, context.parts.train, context.parts.intents)
        train.standardise_match(model, context.parts.train)
    return replace(context, rankers=rankers)


def gauc(context: Context) -> dict[str, float]:
    """dev and valid: GAUC of the context's rankers on its vectors, mean over their seeds."""
    parts, rankers = context.parts, context.rankers.values()
    return {
        name: sum(gauc_of(model, lists, parts.intents).value for model in rankers) / len(rankers)
        for name, lists in (("dev", parts.dev), ("valid", parts.valid))
    }


# Cross-fitting by user [C]: RG-CL pulls a training session's vector to the intent that was clicked in it, so that the
# vector contains the label that the ranker is to learn from it, which no vector does at inference. Therefore each of
# two halves of train's users has its vectors from a reasoner that was aligned on the other half alone. The ranker is
# chosen and evaluated on vectors of the reasoner that serves, which was not aligned on those sessions' clicks. RG-SFT
# and RG-DPO are trained on all users: they teach to write, and depend little on the clicked intent itself.


def train_folds(context: Context, start: Reasoner, best: pd.DataFrame | None, folder: Path, work: Path) -> None:
    """Write fold-<i>/, the reasoner of RG-CL without the users of that fold; nothing where alignment.loop.cross_fit or
    RG-CL is switched off. The other arguments: see `train_contrastive`."""
    folder.mkdir()
    how, lists = context.params.alignment, context.clicked_lists
    if not (how.loop.cross_fit and how.cl.use):
        return
    fold = fold_of(context, lists, FOLDS)
    for left_out in range(FOLDS):
        others = lists.take(np.flatnonzero(fold != left_out))
        reasoner, _ = train_contrastive(context, start, best, work / f"fold-{left_out}", lists=others)
        context.save(reasoner, folder / f"fold-{left_out}")


def cross_fitted(context: Context, sessions: Vectors, folds: Path, work: Path) -> Vectors:
    """The vectors with those of train's sessions by the reasoner that was aligned without their users.

    sessions  vectors of all sessions, by the reasoner that serves;  folds  of `train_folds`; empty: they stay
    """
    if not any(folds.iterdir()):
        return sessions
    frame = context.sessions(context.parts.train)
    fold = fold_of(context, context.parts.train, FOLDS)
    of_train = np.isin(sessions.ids, context.parts.train.session_id)
    parts = [Vectors(sessions.ids[~of_train], sessions.values[~of_train])]
    for left_out in range(FOLDS):
        embedding = context.embedding(context.load(folds / f"fold-{left_out}"))
        parts.append(embedding.sessions(frame[fold == left_out], work / f"fold-{left_out}"))
    return Vectors(sessions.ids, vectors.concat(parts).rows(sessions.ids))


# The reference, none of the paper's stages: the ranking loss through the rankers into the language model, and both are
# trained. It shows what the clicks alone teach the two together; it is no upper bound.


def align_vectors(
    context: Context, start: Reasoner, best: pd.DataFrame, folder: Path, work: Path
) -> tuple[Reasoner, pd.DataFrame]:
    """RG-CL (`train_contrastive`), or where alignment.cl.ranker_learns `train_end_to_end`. folder: of the rankers that
    learn with the reasoner; empty where they are frozen."""
    folder.mkdir()
    if context.params.alignment.cl.use and context.params.alignment.cl.ranker_learns:
        return train_end_to_end(context, start, folder, work)
    return train_contrastive(context, start, best, work)


def train_end_to_end(context: Context, start: Reasoner, folder: Path, work: Path) -> tuple[Reasoner, pd.DataFrame]:
    """Instead of RG-CL (alignment.cl.ranker_learns): reasoner and the context's rankers are trained together.

    Returns the reasoner and the curve of `end_to_end`; folder: seed-<seed>/ of every ranker is written there.
    """
    lists, loss = context.clicked_lists, loss_of(QE_REC, context.settings)
    prompts, setup = context.embedded_prompts(start, lists), context.setup("end to end", work)
    how = {"lists": lists, "intents": context.parts.intents, "loss": loss, "rankers": [*context.rankers.values()]}
    reasoner, rankers, curve = end_to_end(start, prompts, context.params.alignment.cl, setup, **how)
    for seed, ranker in zip(context.rankers, rankers, strict=True):
        store.save(folder / f"seed-{seed}", ranker)
    return reasoner, curve


def with_trained_rankers(context: Context, folder: Path) -> Context:
    """The context with the rankers that `train_end_to_end` wrote; unchanged where it wrote none."""
    return context.reading(context.embeddings, folder) if any(folder.iterdir()) else context


def end_to_end(
    reasoner: Reasoner,
    prompts: Sequence[Sequence[int]],
    settings: Contrastive,
    setup: Setup,
    *,
    rankers: Sequence[ThreeTower],
    lists: QueryLists,
    intents: QueryIntents,
    loss: Loss,
) -> tuple[Reasoner, list[ThreeTower], pd.DataFrame]:
    """Copies of reasoner and rankers, trained together, and their curve.

    prompts   token ids, one a list;  lists  with a click each; their own vectors are not read
    settings  of the optimiser; all weights of both are trained, with one learning rate [C]
    loss      of a ranker, see ranker.fit; the reasoner's is the mean over the rankers
    Curve: step, loss, effective_rank of a batch's vectors, seconds.
    """
    together = nn.ModuleList(copy.deepcopy(ranker).requires_grad_(True) for ranker in rankers).to(reasoner.device)
    lists, intents = lists.to(reasoner.device), intents.to(reasoner.device)
    rows = [{"input_ids": list(map(int, ids)), "prompt": len(ids), "session": row} for row, ids in enumerate(prompts)]

    def collate(part: list[dict]) -> dict[str, Tensor]:
        sessions = torch.tensor([row["session"] for row in part])
        return right_padded(part, reasoner.tokenizer.pad_token_id) | {"session": sessions}

    def ranking_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        _, read = prompt_vectors(replace(reasoner, model=model), batch)
        shown = replace(lists.take(batch["session"]), query=read)
        losses = [loss(ranker, shown, intents) for ranker in model.rankers]
        return torch.stack(losses).mean(), {"effective_rank": effective_rank(read)}

    identity = {"reasoner": fingerprint(reasoner), "rankers": digest_of(together.state_dict().values())}
    task, modules = Task("end to end", rows, collate, ranking_loss), {"rankers": together}
    trained, curve = fit(reasoner, task, Schedule.of(settings), setup, identity=identity, modules=modules)
    return trained, [ranker.train(False) for ranker in together], curve
