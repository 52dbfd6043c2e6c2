"""The reference: the ranking loss itself, through the rankers into the language model, and both learn.

It is none of the paper's stages: no reward, no preference, no frozen judge. It shows what the clicks alone teach the
two together; it is no upper bound, since it fits the training clicks with all that it has.
"""

import copy
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from rgalign.alignment.context import MAIN, QE_REC, RGALIGN_REC, Context, hand_on
from rgalign.alignment.contrastive import prompt_vectors
from rgalign.alignment.info_nce import effective_rank
from rgalign.alignment.logprobs import trainable, tuned
from rgalign.alignment.monitor import Dashboard, Lookout
from rgalign.alignment.rewarding import Reader, Rewarder, train_models, with_folds, write_candidates
from rgalign.alignment.steps import CL_LOOP, best_queries, preference_pairs, pull_to_clicks, tune_by_best, tune_by_pairs
from rgalign.data import vectors
from rgalign.data.lists import QueryIntents, QueryLists
from rgalign.evaluation.metrics import gauc_of_lists
from rgalign.ranker import launched, store
from rgalign.ranker.fit import Loss, score
from rgalign.ranker.launched import Launch
from rgalign.ranker.three_tower import ThreeTower
from rgalign.ranker.train import loss_of
from rgalign.ranker.two_tower import set_whitening
from rgalign.ranker.variants import VARIANTS
from rgalign.reasoner import training
from rgalign.reasoner.model import Reasoner, fingerprint
from rgalign.run.artifacts import atomic
from rgalign.seeding import derived

# In one round of the alignment the ranker is trained again twice (METHOD.md 2.3).
#
# RG-SFT and RG-DPO; `retrain`: embed sessions and knowledge base with that model, whiten, retrain the ranker; RG-CL
# into the space of *that* ranker; `close`: embed the sessions with the aligned model and train the ranker on them. The
# knowledge base keeps the vectors of `retrain`: they are part of the space that RG-CL pulled into [C].

RETRAINED = "qe_rec/retrained"  # what tables call the rankers of `retrain`
FROZEN_ROW = {"epoch": 0, "train_loss": float("nan"), "dev_gauc": float("nan"), "best": True}  # of a frozen ranker


@dataclass(frozen=True, eq=False)
class Turn:
    """What a round ended with.

    reads_kb    the reasoner that made the knowledge base's vectors
    state       the run with the round's vectors (of all sessions of train and valid) and rankers
    dev, valid  GAUC, mean over ranker seeds
    """

    reasoner: Reasoner
    reads_kb: Reasoner
    state: Context
    curves: pd.DataFrame
    dev: float
    valid: float
    seconds: float


def retrain(
    context: Context, before: Reasoner, reasoner: Reasoner, embeddings: Path, folder: Path, work: Path
) -> pd.DataFrame:
    """Train the rankers again on the LM that RG-SFT and RG-DPO made of `before`: its vectors, their whitening.

    context     what to go on from: the vectors of `before`, and rankers trained on them
    embeddings  where sessions/ and intents/ are written;  folder: where seed-<seed>/ of every ranker is written
    Where the reasoner has not moved, its vectors are copied and the rankers are trained again all the same, so that a
    control without RG-SFT and RG-DPO trains them as often as the recipe. Returns the learning curves; without a row
    where alignment.cl.space asks for the rankers from before: then vectors and rankers are copied as they are.
    """
    if read_by_retrained(context, before, reasoner) is before:
        hand_on(context.embeddings, embeddings)
    else:
        way = context.embedding(reasoner)
        vectors.save(embeddings / "sessions", way.sessions(context.shop.sessions, work / "sessions"))
        vectors.save(embeddings / "intents", way.intents(context.shop.intents, work / "intents"))
    if context.params.alignment.cl.space == "before":
        hand_on(context.rankers_folder, folder)
        return pd.DataFrame([{**FROZEN_ROW, "seed": 0}]).iloc[:0]
    return _trained(context, embeddings, folder, work, refit_whitening=True).assign(model=RETRAINED)


def read_by_retrained(context: Context, before: Reasoner, reasoner: Reasoner) -> Reasoner:
    """The reasoner whose vectors `retrain` gives to the rankers: `before` where the other is not read or not moved."""
    unread = context.params.alignment.cl.space == "before"
    return before if unread or fingerprint(reasoner) == fingerprint(before) else reasoner


def close(
    context: Context, reads_kb: Reasoner, reasoner: Reasoner, folder: Path, work: Path, folds: Path | None = None
) -> Turn:
    """Embed with the aligned reasoner and train the rankers on it (alignment.loop): the end of a round.

    context  with the rankers into whose space RG-CL pulled, and the vectors that `reads_kb` made
    folder   where embeddings/ and rankers/ are written
    folds    what cross_fit.align_folds wrote; None: the reasoner embeds all sessions
    """
    began = time.perf_counter()
    sessions = context.embedded(reasoner, work / "sessions")
    if folds is not None:
        sessions = with_folds(context, sessions, folds, work)
    vectors.save(folder / "embeddings" / "sessions", sessions)
    hand_on(context.embeddings / "intents", folder / "embeddings" / "intents")
    how = {"refit_whitening": context.params.alignment.loop.refit_whitening}
    curves = _trained(context, folder / "embeddings", folder / "rankers", work, **how)
    state = context.reading(folder / "embeddings", folder / "rankers")
    return Turn(reasoner, reads_kb, state, curves, **gauc(state), seconds=time.perf_counter() - began)


def _trained(context: Context, embeddings: Path, folder: Path, work: Path, *, refit_whitening: bool) -> pd.DataFrame:
    """Train the context's rankers on these vectors, as alignment.loop says, into folder/seed-<seed>.

    Returns their learning curves.
    """
    own, settings = context.params.alignment.loop, dict(context.settings)
    moved = context.reading(embeddings, context.rankers_folder)
    if own.ranker == "frozen":
        for seed, model in (whitened(moved) if refit_whitening else moved).rankers.items():
            store.save(folder / f"seed-{seed}", model)
        return pd.DataFrame([{**FROZEN_ROW, "seed": seed} for seed in moved.rankers])
    if own.ranker == "warm":
        settings |= {"learning_rate": own.learning_rate, "patience": own.patience}
    job = work / "rankers"
    launch = Launch(
        context.recipe.launcher,
        job,
        encoded=context.run / "tables" / "encoded",
        embeddings=job / "embeddings",
        seed=context.params.reasoner.seed,
    )
    if launch.launcher:  # its processes look for vectors by the variant's name
        shutil.copytree(embeddings, launch.embeddings / str(VARIANTS[RGALIGN_REC].vectors), dirs_exist_ok=True)
    with atomic(folder) as temporary:
        curves = launched.train(
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
    """With copies of its rankers whose whitening is fitted to the context's vectors, and nothing else is."""
    rankers = copy.deepcopy(dict(context.rankers))
    for model in rankers.values():
        set_whitening(model, context.parts.train, context.parts.intents)
    return replace(context, rankers=rankers)


def gauc(context: Context) -> dict[str, float]:
    """dev and valid: GAUC of the context's rankers on its vectors, mean over their seeds."""
    found = {}
    for name in ("dev", "valid"):
        lists = getattr(context.parts, name)
        clicked, shown = lists.clicked.numpy(), lists.shown.numpy()
        scores = (score(model, lists, context.parts.intents) for model in context.rankers.values())
        found[name] = sum(gauc_of_lists(each, clicked, shown).value for each in scores) / len(context.rankers)
    return found


def again(context: Context, turn: Turn, form: str, folder: Path, work: Path) -> Turn:
    """One more round, from candidates to rankers, with the reasoner and the rankers of the last one.

    context  the run before its alignment, with whose vectors rewards are given;  form  of the reward; each round trains
             its reward model again [C]
    """
    began = time.perf_counter()
    how, last, reasoner, best = context.params.alignment, turn.state, turn.reasoner, None
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
                watch = Dashboard(Lookout.of(last, rewarder), reasoner, how.dpo.tolerance) if how.dpo.looks else None
                reasoner, _, _ = tune_by_pairs(context, reasoner, pairs, work / "dpo", watch)
    made = work / "retrained"
    retrain(last, turn.reasoner, reasoner, made / "embeddings", made / "rankers", work / "retrain")
    read = read_by_retrained(last, turn.reasoner, reasoner)
    reads_kb = turn.reads_kb if read is turn.reasoner else read  # what was copied keeps its maker
    retrained = last.reading(made / "embeddings", made / "rankers")
    if how.cl.use:
        reasoner, _ = pull_to_clicks(retrained, reasoner, best, work / "cl")
    turned = close(retrained, reads_kb, reasoner, folder, work / "close")
    return replace(turned, seconds=time.perf_counter() - began)


def rounds(
    context: Context,
    retrained: Context,
    reads_kb: Reasoner,
    reasoner: Reasoner,
    form: str,
    work: Path,
    folds: Path | None = None,
) -> tuple[Turn, pd.DataFrame]:
    """The loop: at most alignment.loop.rounds turns, while GAUC on the development users rises, the first turn's above
    what it was before. Returns the best turn (the first if none is better than before), and every turn's figures:
    round, dev, valid (GAUC), seconds, kept.

    context    the run before its alignment;  form  of the reward
    retrained, reads_kb, reasoner, folds   of the first turn, whose other steps notebooks 04 to 07 made: as of `close`
    """
    best = close(retrained, reads_kb, reasoner, work / "turn-1", work / "close", folds)
    last, turns = gauc(context)["dev"], [best]
    while len(turns) < context.params.alignment.loop.rounds and turns[-1].dev > last:
        number, last = len(turns) + 1, best.dev
        turns.append(again(context, best, form, work / f"turn-{number}", work / f"round-{number}"))
        best = max(best, turns[-1], key=lambda turn: turn.dev)  # of two as good the earlier
    rows = [(i, t.dev, t.valid, round(t.seconds, 1), t is best) for i, t in enumerate(turns, start=1)]
    return best, pd.DataFrame(rows, columns=["round", "dev", "valid", "seconds", "kept"])


def learn_together(context: Context, start: Reasoner, folder: Path, work: Path) -> tuple[Reasoner, pd.DataFrame]:
    """In place of RG-CL (alignment.cl.ranker_learns): reasoner and rankers, from the context's on, learn together.

    folder  where seed-<seed>/ of every ranker is written
    Returns the reasoner and the curve of `end_to_end`.
    """
    own, learners = context.params.alignment.cl, context.learners
    reasoner, rankers, curve = end_to_end(
        start,
        context.embedded_prompts(start, learners),
        rankers=list(context.rankers.values()),
        lists=learners,
        intents=context.parts.intents,
        loss=loss_of(QE_REC, context.settings),
        folder=work,
        seed=derived(context.params.run.seed, "end to end"),
        engine=context.engine,
        neftune=own.neftune or None,
        **own.model_dump(include=set(CL_LOOP)),
    )
    for seed, ranker in zip(context.rankers, rankers, strict=True):
        store.save(folder / f"seed-{seed}", ranker)
    return reasoner, curve


def going_on(context: Context, folder: Path) -> Context:
    """The context whose loop starts from the rankers that `learn_together` wrote; as it was where it wrote none."""
    if not any(folder.iterdir()):
        return context
    return context.reading(context.embeddings, folder)


def end_to_end(
    reasoner: Reasoner,
    prompts: Sequence[Sequence[int]],
    *,
    rankers: Sequence[ThreeTower],
    lists: QueryLists,
    intents: QueryIntents,
    loss: Loss,
    folder: Path,
    seed: int,
    **loop: Any,
) -> tuple[Reasoner, list[ThreeTower], pd.DataFrame]:
    """Copies of reasoner and rankers that have learnt together, and their curve.

    prompts  token ids, one a list;  lists  with a click each; the vectors that they hold are not read
    loss     of a ranker, as `fit` has it; the mean over the rankers is what the reasoner learns from
    folder, seed, loop   as of `reasoner.training.train`. All weights of both learn, by one learning rate [C]
    Curve: step, loss, effective_rank of a batch's vectors (`collapse`), seconds.
    """
    model, device = trainable(reasoner, None, seed=seed), reasoner.device
    # as a part of it, Trainer trains, saves and resumes them like its own
    model.rankers = nn.ModuleList(copy.deepcopy(ranker).requires_grad_(True) for ranker in rankers).to(device)
    hashed = sha256()
    for value in model.rankers.state_dict().values():
        hashed.update(value.cpu().contiguous().numpy().tobytes())
    documents = [{"input_ids": list(ids), "prompt": len(ids), "session": row} for row, ids in enumerate(prompts)]
    curve = training.train(
        model,
        documents,
        partial(_collate, pad=reasoner.tokenizer.pad_token_id),
        partial(_objective, reasoner=reasoner, lists=lists.to(device), intents=intents.to(device), loss=loss),
        folder=folder,
        identity={"stage": "end to end", "reasoner": fingerprint(reasoner), "rankers": hashed.hexdigest()},
        seed=seed,
        title="end to end",
        **loop,
    )
    learnt = [ranker.train(False) for ranker in model.rankers]
    del model.rankers
    return tuned(reasoner, model), learnt, curve


def _collate(rows: list[dict], pad: int) -> dict[str, Tensor]:
    return training.right_padded(rows, pad) | {"session": torch.tensor([row["session"] for row in rows])}


def _objective(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    reasoner: Reasoner,
    lists: QueryLists,
    intents: QueryIntents,
    loss: Loss,
) -> tuple[Tensor, dict[str, Tensor]]:
    _, vectors = prompt_vectors(replace(reasoner, model=model), batch)
    shown = replace(lists.take(batch["session"]), query=vectors)
    losses = [loss(ranker, shown, intents) for ranker in model.rankers]
    return torch.stack(losses).mean(), {"effective_rank": effective_rank(vectors)}
