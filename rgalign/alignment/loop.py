"""The closed loop (METHOD.md 2.3, step 4): embeddings anew by the aligned reasoner, the ranker trained on them, again.

The knowledge base keeps the vectors that it had before the alignment: they are part of the space that the reasoner was
pulled into [C].
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from rgalign.alignment.context import MAIN, RGALIGN_REC, Context
from rgalign.alignment.cross_fit import with_folds
from rgalign.alignment.looking import Dashboard, Lookout
from rgalign.alignment.rewarding import Reader, Rewarder, train_models, write_candidates
from rgalign.alignment.steps import best_queries, preference_pairs, pull_to_clicks, tune_by_best, tune_by_pairs
from rgalign.artifacts import atomic
from rgalign.data.vectors import Vectors, save
from rgalign.evaluation.metrics import gauc_of_lists
from rgalign.ranker import launched, store
from rgalign.ranker import train as rankers
from rgalign.ranker.fit import score
from rgalign.ranker.launched import Launch
from rgalign.ranker.three_tower import ThreeTower
from rgalign.ranker.train import Parts
from rgalign.ranker.variants import VARIANTS
from rgalign.reasoner.model import Reasoner

CURVE = {"epoch": 0, "train_loss": float("nan"), "best": True}  # of a ranker that is not trained on


@dataclass(frozen=True, eq=False)
class Turn:
    """What a round ended with.

    vectors  of all sessions of train and valid;  folder  of the rankers, seed-<seed>/ each
    dev, valid  GAUC, mean over ranker seeds
    """

    reasoner: Reasoner
    vectors: Vectors
    folder: Path
    curves: pd.DataFrame
    dev: float
    valid: float
    seconds: float


def close(context: Context, reasoner: Reasoner, folder: Path, work: Path, folds: Path | None = None) -> Turn:
    """Embed with the aligned reasoner and train the rankers on it (alignment.loop): one turn of the loop.

    folder  where seed-<seed>/ of every ranker is written
    folds   what cross_fit.align_folds wrote; None: the reasoner embeds all sessions
    """
    began = time.perf_counter()
    own, seeds = context.params.alignment.loop, context.params.ranker.seeds
    vectors = context.embedded(reasoner, work)
    if folds is not None:
        vectors = with_folds(context, vectors, folds, work)
    parts = with_aligned(context, vectors)
    if own.ranker == "frozen":
        for seed, model in context.rankers.items():
            store.save(folder / f"seed-{seed}", model)
        curves = pd.DataFrame([{**CURVE, "dev_gauc": float("nan"), "seed": seed} for seed in seeds])
    else:
        curves = _retrained(context, parts, vectors, folder)
    trained = load_rankers(folder, seeds, device=context.params.run.device).values()
    dev, valid = (
        sum(_gauc(model, lists, parts) for model in trained) / len(trained) for lists in (parts.dev, parts.valid)
    )
    return Turn(reasoner, vectors, folder, curves, dev, valid, time.perf_counter() - began)


def _retrained(context: Context, parts: Parts, sessions: Vectors, folder: Path) -> pd.DataFrame:
    """Train the rankers of every seed on `parts`, which have these vectors; returns their learning curves."""
    own, settings, job = context.params.alignment.loop, dict(context.settings), folder.with_name(f"{folder.name}-job")
    if own.ranker == "warm":
        settings |= {"learning_rate": own.learning_rate, "patience": own.patience}
    launch = Launch(
        context.recipe.launcher,
        job,
        encoded=context.run / "tables" / "encoded",
        embeddings=job / "embeddings",
        seed=context.params.reasoner.seed,
    )
    if launch.launcher:  # its processes read what is in memory here
        own_vectors = launch.embeddings / str(VARIANTS[RGALIGN_REC].vectors)
        save(own_vectors / "sessions", sessions)
        save(own_vectors / "intents", intent_vectors(context))
    with atomic(folder) as temporary:
        curves = launched.train(
            {RGALIGN_REC: settings},
            context.params.ranker.seeds,
            parts,
            launch=launch,
            folder=temporary / "trained",
            positions=context.positions,
            start={RGALIGN_REC: context.rankers_folder} if own.ranker == "warm" else None,
            workers=context.params.run.workers,
            accelerator=context.accelerator,
        )
        for path in (temporary / "trained" / RGALIGN_REC).iterdir():
            path.rename(temporary / path.name)
        (temporary / "trained" / RGALIGN_REC).rmdir()
        (temporary / "trained").rmdir()
    return curves


def with_aligned(context: Context, sessions: Vectors) -> Parts:
    """The run's encoded parts with the aligned reasoner's vectors of the sessions."""
    texts = intent_vectors(context)
    return rankers.with_vectors(context.parts, RGALIGN_REC, sessions, texts, seed=context.params.reasoner.seed)


def intent_vectors(context: Context) -> Vectors:
    """The knowledge base's vectors, from before the alignment."""
    intents = context.parts.intents
    return Vectors(intents.intent_id, intents.text.numpy())


def before(context: Context) -> dict[str, float]:
    """dev and valid, GAUC of QE-Rec before the alignment: mean over ranker seeds."""
    return {
        name: sum(_gauc(each, getattr(context.parts, name), context.parts) for each in context.rankers.values())
        / len(context.rankers)
        for name in ("dev", "valid")
    }


def load_rankers(folder: Path, seeds: Sequence[int], *, device: str = "cpu") -> dict[int, ThreeTower]:
    """seed -> the ranker that the loop ended with. device: where it scores, as of `store.load`."""
    return {seed: store.load(folder / f"seed-{seed}", device=device) for seed in seeds}


def again(context: Context, turn: Turn, form: str, folder: Path, work: Path) -> Turn:
    """One more round, from candidates to rankers, with the reasoner and the rankers of the last one.

    form  of the reward; each round trains its reward model anew [C]
    """
    began = time.perf_counter()
    how = context.params.alignment
    trained = load_rankers(turn.folder, context.params.ranker.seeds, device=context.params.run.device)
    parts = with_aligned(context, turn.vectors)
    context = replace(context, parts=parts, rankers=trained, rankers_folder=turn.folder)
    reasoner, best = turn.reasoner, None
    if context.writes and (how.sft.use or how.dpo.use or (how.cl.use and how.cl.lm_weight)):
        reader = Reader(context, context.main())
        candidates = write_candidates(context, {**context.language_models(), MAIN: reasoner}, work)
        train_models(context, reader, candidates, work / "reward")
        rewarder = Rewarder.of(reader, work / "reward", form)
        scored = rewarder.scored(candidates)
        best = best_queries(context, scored)
        if how.sft.use:
            reasoner, _ = tune_by_best(context, reasoner, best, work / "sft")
        if how.dpo.use:
            pairs, _ = preference_pairs(context, reasoner, scored)
            if len(pairs):
                watch = Dashboard(Lookout.of(context, rewarder), reasoner, how.dpo.tolerance) if how.dpo.looks else None
                reasoner, _, _ = tune_by_pairs(context, reasoner, pairs, work / "dpo", watch)
    if how.cl.use:
        reasoner, _ = pull_to_clicks(context, reasoner, best, work / "cl")
    turned = close(context, reasoner, folder, work / "embed")
    return replace(turned, seconds=time.perf_counter() - began)


def rounds(
    context: Context, reasoner: Reasoner, form: str, work: Path, folds: Path | None = None
) -> tuple[Turn, pd.DataFrame]:
    """The loop: at most alignment.loop.rounds turns, while GAUC on the development users rises, the first turn's above
    what it was before. Returns the best turn (the first if none is better than before), and every turn's figures:
    round, dev, valid (GAUC), seconds, kept. folds: as of `close`."""
    last, best = before(context)["dev"], close(context, reasoner, work / "rankers-1", work / "embed", folds)
    turns = [best]
    while len(turns) < context.params.alignment.loop.rounds and turns[-1].dev > last:
        number, last = len(turns) + 1, best.dev
        turns.append(again(context, best, form, work / f"rankers-{number}", work / f"round-{number}"))
        best = max(best, turns[-1], key=lambda turn: turn.dev)  # of two as good the earlier
    rows = [(i, t.dev, t.valid, round(t.seconds, 1), t is best) for i, t in enumerate(turns, start=1)]
    return best, pd.DataFrame(rows, columns=["round", "dev", "valid", "seconds", "kept"])


def _gauc(model, lists, parts: Parts) -> float:
    return gauc_of_lists(score(model, lists, parts.intents), lists.clicked.numpy(), lists.shown.numpy()).value
