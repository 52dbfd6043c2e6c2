"""The warm-up of a pretrained model: a low-rank adapter that has read what customers typed (METHOD.md 2.1 [C]).

models/reasoner/<name>/adapter/   has read the questions of all users that may be read
                      fold-<i>/   those of all users but one fold, whose sessions it writes for: what is chosen among
                                  queries, or learnt from them, must not have been copied from the user's own
"""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from rgalign.data.split import user_folds
from rgalign.params_schema import Warmup
from rgalign.reasoner.batches import documents, evaluating, right_padded
from rgalign.reasoner.generate import greedy
from rgalign.reasoner.model import WARMED_UP, Reasoner, fingerprint, fold_name, load_saved, save
from rgalign.reasoner.prompts import Prompter
from rgalign.reasoner.query_loss import learn_queries, query_log_probabilities
from rgalign.reasoner.trainer import Schedule, Setup
from rgalign.run.artifacts import write_table
from rgalign.run.distributed import digest_of, make_shards, shard_path
from rgalign.seeding import derived

CURVE = "curve.parquet"
AT_ONCE = 16  # documents whose loss is taken together


def folds_of(user_ids: Sequence[str], settings: Warmup, seed: int) -> np.ndarray:
    """(users,) the fold that each user's sessions are written by. seed: of the run's reasoner."""
    return user_folds(np.asarray(user_ids, dtype=str), folds=settings.folds, seed=derived(seed, "warm-up"))


def write_adapters(
    reasoner: Reasoner,
    prompter: Prompter,
    transcripts: pd.DataFrame,
    sessions: pd.DataFrame,
    settings: Warmup,
    *,
    folder: Path,
    work: Path,
    seed: int,
    fold_seed: int,
) -> pd.DataFrame:
    """Train a model's adapters, in this one process, and write them into its folder. Returns their curves, with a
    column adapter.

    transcripts  that may be read;  sessions  of train, which some of them name: only then there are folds
    seed         of this model's training;  work  what a killed call has finished is kept there, for the same call
    """
    rows, fold = {WARMED_UP: np.ones(len(transcripts), bool)}, _fold_of_each(transcripts, sessions, settings, fold_seed)
    if (fold >= 0).any():
        rows |= {fold_name(number): fold != number for number in range(settings.folds)}
    names = list(rows)

    def documents_of(number: int) -> tuple[list, list]:
        return prompter.transcripts(transcripts[rows[names[number]]], sessions)

    def label(number: int) -> str:
        how = {"reasoner": fingerprint(reasoner), "how": settings.model_dump(), "seed": seed, "adapter": names[number]}
        return digest_of(how, [[*prompt, *query] for prompt, query in zip(*documents_of(number), strict=True)])

    def make(number: int, shard: Path) -> None:
        setup = Setup(folder=work / f"training-{number}", seed=seed, lora=settings.lora)
        schedule = Schedule(settings.epochs, settings.learning_rate, settings.documents_per_batch)
        how = {"title": "warm-up", "head": len(prompter.head)}
        trained, curve = learn_queries(reasoner, *documents_of(number), schedule, setup, **how)
        save(trained, shard / WARMED_UP)
        write_table(shard / CURVE, curve.assign(adapter=names[number]))

    make_shards(work, len(names), make, label=label)
    curves = []
    for number, name in enumerate(names):
        shutil.copytree(shard_path(work, number) / WARMED_UP, folder / name)  # work stays whole for a call after a kill
        curves.append(pd.read_parquet(shard_path(work, number) / CURVE))
    return pd.concat(curves, ignore_index=True)


def _fold_of_each(transcripts: pd.DataFrame, sessions: pd.DataFrame, settings: Warmup, seed: int) -> np.ndarray:
    """(transcripts,) the fold of each one's user; -1, which every adapter reads, where it names no session, or there
    are no folds."""
    fold = np.full(len(transcripts), -1)
    if "session_id" in transcripts and settings.folds > 1:
        users = transcripts["session_id"].map(sessions.set_index("session_id")["user_id"])
        fold[users.notna()] = folds_of(users[users.notna()], settings, seed)
    return fold


def before_and_after(
    folder: Path,
    prompter: Prompter,
    transcripts: pd.DataFrame,
    sessions: pd.DataFrame,
    settings: Warmup,
    *,
    fold_seed: int,
    device: str,
    most: int = 100,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What the warm-up changed: (rows before and after, questions). Arguments: see `write_adapters`.

    It is shown on the first questions of fold 0, by the adapter that has not read them; where there are no folds on
    the first of all, which it has read. Columns: questions; perplexity of the typed ones, a token; different, the share
    of greedy queries that are; read, whether the adapter had. questions: typed, before, after.
    """
    fold = _fold_of_each(transcripts, sessions, settings, fold_seed)
    unread = (folder / fold_name(0)).is_dir()
    shown = transcripts[fold == 0 if unread else np.ones(len(fold), bool)].head(most)
    prompts, typed = prompter.transcripts(shown, sessions)
    table, questions = [], {"typed": [prompter.text(query) for query in typed]}
    for name, adapter in (("before", None), ("after", fold_name(0) if unread else WARMED_UP)):
        reasoner = load_saved(folder, device=device, adapter=adapter)
        perplexity = math.exp(nats_per_token(reasoner, prompts, typed))
        how = {"max_new_tokens": prompter.max_new_tokens, "progress": False}
        questions[name] = greedy(reasoner, prompter, prompts, **how)["query"].tolist()
        table.append((len(prompts), perplexity, len(set(questions[name])) / max(len(prompts), 1), not unread))
    columns = ["questions", "perplexity", "different", "read"]
    return pd.DataFrame(table, columns=columns, index=["before", "after"]), pd.DataFrame(questions)


def nats_per_token(reasoner: Reasoner, prompts: Sequence[Sequence[int]], queries: Sequence[Sequence[int]]) -> float:
    """Mean of -log p over all query tokens, end token included; exp of it is the perplexity. NaN without a query."""
    total, rows = 0.0, documents(prompts, queries)
    with evaluating(reasoner.model), torch.inference_mode():
        for first in range(0, len(rows), AT_ONCE):
            batch = right_padded(rows[first : first + AT_ONCE], pad=reasoner.tokenizer.pad_token_id)
            batch = {name: value.to(reasoner.device) for name, value in batch.items()}
            total -= float(query_log_probabilities(reasoner.model, batch).sum())
    return total / sum(map(len, queries)) if rows else math.nan
