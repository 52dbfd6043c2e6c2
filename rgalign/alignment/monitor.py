"""Measurements while a reasoner is aligned: the ranking with its query tower refitted, and its queries' rewards."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import TrainerCallback

from rgalign.alignment.context import QE_REC, Context
from rgalign.alignment.logprobs import log_probabilities
from rgalign.alignment.rewarding import Rewarder
from rgalign.data.lists import Lists
from rgalign.ranker.fit import fit, gauc_of, with_click
from rgalign.ranker.towers import vectors_of
from rgalign.ranker.train import loss_of
from rgalign.reasoner import generate
from rgalign.reasoner.model import Reasoner
from rgalign.reasoner.trainer import kept_random_states
from rgalign.run import distributed

REFIT = {"epochs": 3, "patience": 3, "learning_rate": 1e-3}  # of a trained query tower on new vectors [C]

# (queries of the probe set's valid sessions, in their order) -> {"ihr@1": .., "ihr@3": ..}
Hits = Callable[[Sequence[str]], Mapping[str, float]]


@dataclass(frozen=True, eq=False)
class ProbeSet:
    """The sessions that a reasoner is measured on while it is aligned: the first ones of train's part and of valid."""

    context: Context
    train: Lists
    dev: Lists
    valid: Lists
    reward: Rewarder | None = None  # None for an encoder, which writes nothing
    hits: Hits | None = None  # IHR of the queries of `valid`'s sessions, by the click

    @classmethod
    def of(cls, context: Context, reward: Rewarder | None = None, hits: Hits | None = None) -> "ProbeSet":
        """At most alignment.loop.look_sessions of each part."""
        most = context.params.alignment.loop.look_sessions
        train, dev, valid = (with_click(getattr(context.parts, part)) for part in ("train", "dev", "valid"))
        firsts = [lists.take(torch.arange(min(most, len(lists)))) for lists in (train, dev, valid)]
        return cls(context, *firsts, reward, hits)

    def ranking(self, reasoner: Reasoner) -> float:
        """GAUC on valid of the context's ranker (its first seed), whitening and query tower refitted to this reasoner:
        without that, vectors that have merely moved would count as a loss; a whole new ranker would take minutes."""
        own = [self.context.with_vectors_of(reasoner, lists) for lists in (self.train, self.dev, self.valid)]
        intents, settings = self.context.parts.intents, self.context.settings
        seed, ranker = next(iter(self.context.rankers.items()))
        ranker = copy.deepcopy(ranker).requires_grad_(False)
        ranker.query.requires_grad_(True)
        # of the query tower alone: the KB's vectors and their whitening stay
        ranker.query.layers[0].set(vectors_of(own[0], ranker.query.query_dim))
        how = {"loss": loss_of(QE_REC, settings), "accelerator": self.context.accelerator, "progress": False}
        refit = settings.model_copy(update=REFIT)
        fitted = fit(ranker, own[0], own[1], intents, refit, seed=seed, from_start=True, **how).model
        return gauc_of(fitted, own[2], intents).value

    def written(self, reasoner: Reasoner) -> pd.DataFrame:
        """The greedy query of each of valid's sessions."""
        prompter = self.context.recipe.prompter(self.context.shop, reasoner)
        most, prompts = self.context.params.reasoner.queries.max_new_tokens, self.context.prompts(reasoner, self.valid)
        return generate.greedy(reasoner, prompter, prompts, max_new_tokens=most, progress=False)

    def measure(self, reasoner: Reasoner) -> dict[str, float]:
        """ranking (GAUC on valid), and of the greedy queries: reward (nats), ihr@1, ihr@3, tokens, distinct and
        repeated (shares)."""
        found = {"ranking": self.ranking(reasoner)}
        if self.reward is None:
            return found
        texts = self.written(reasoner)
        queries = texts["query"].tolist()
        reward = float(pd.Series(self.reward.of_texts(self.valid, queries)).mean())  # NaN if all are empty
        found |= {"reward": reward, **(self.hits(queries) if self.hits else {})}
        found |= {"tokens": float(texts["tokens"].mean()), "distinct": texts["query"].nunique() / len(texts)}
        return found | {"repeated": generate.repeated_share(queries)}


def hacked(first: Mapping[str, float], now: Mapping[str, float], tolerance: float) -> bool:
    """Whether the reward has risen since the first measurement while the ranking fell by more than `tolerance` [C]."""
    return bool(now["reward"] > first["reward"] and now["ranking"] < first["ranking"] - tolerance)


@dataclass(eq=False)
class RewardHackingMonitor:
    """Says when RG-DPO should stop (METHOD.md 2.3): the reward rises while the ranking on valid falls."""

    probe: ProbeSet
    start: Reasoner  # that training begins from, which is the reference
    tolerance: float  # GAUC on valid below that at the start, at which a higher reward counts as hacked [C]
    # the measurements, by step; a resumed training restores those from before it was killed
    rows: dict[int, dict[str, float]] = field(default_factory=dict)

    def __call__(self, reasoner: Reasoner, step: int) -> bool:
        if 0 not in self.rows:  # of a reasoner that training leaves alone
            self.rows[0] = {**self.probe.measure(self.start), "kl": 0.0}
        self.rows[step] = {**self.probe.measure(reasoner), "kl": self._kl(reasoner)}
        return hacked(self.rows[0], self.rows[step], self.tolerance)

    def table(self) -> pd.DataFrame:
        """One row a measurement: step, the columns of `ProbeSet.measure`, and kl to the reference (nats a query)."""
        return pd.DataFrame([{"step": step, **row} for step, row in sorted(self.rows.items())], columns=self._columns)

    def verdict(self, planned: int) -> str:
        """Whether the reward was hacked, in a line. planned: how many steps were to be made."""
        seen = self.table()
        if len(seen) < 2:
            return "So: nothing was evaluated; RG-DPO is switched off, has no pair, or alignment.dpo.looks is 0."
        first, last = seen.iloc[0], seen.iloc[-1]
        stopped = hacked(first, last, self.tolerance)
        end = (
            f"training was stopped at step {last.step:.0f} of {planned}"
            if stopped
            else f"all {planned} steps were made"
        )
        moved = ", ".join(
            f"{name} {last[name] - first[name]:+.3f}" for name in ("reward", "ranking", "ihr@1") if name in seen
        )
        return f"So: the reward was {'' if stopped else 'not '}hacked, by the rule above; {end} ({moved})."

    @property
    def _columns(self) -> list[str]:
        return ["step", *next(iter(self.rows.values()), {})]

    def _kl(self, reasoner: Reasoner) -> float:
        """Mean of log policy - log reference over one query a session, sampled from the policy."""
        context, prompts = self.probe.context, self.probe.context.prompts(reasoner, self.probe.valid)
        prompter = context.recipe.prompter(context.shop, reasoner)
        most = context.params.reasoner.queries.max_new_tokens
        sampled = generate.sample(reasoner, prompter, prompts, samples=1, max_new_tokens=most, seed=0, progress=False)
        documents = prompts, prompter.queries(sampled["query"].tolist())
        policy, reference = (log_probabilities(each, *documents, progress=False) for each in (reasoner, self.start))
        return float(np.mean(policy - reference))


class EarlyStopping(TrainerCallback):
    """Evaluates the model in training every `steps` optimiser steps, and may stop it; otherwise training is unchanged.

    monitor  (reasoner in eval mode, step) -> whether to stop. After a kill it is called for the steps behind the last
             checkpoint alone; its `rows` (by step, JSON) are kept in the checkpoints and restored
    """

    def __init__(self, reasoner: Reasoner, monitor: Callable[[Reasoner, int], bool], steps: int):
        self.reasoner, self.monitor, self.steps = reasoner, monitor, steps

    def on_train_begin(self, args, state, control, **_) -> None:
        self.monitor.rows.update({entry["step"]: entry["look"] for entry in state.log_history if "look" in entry})

    def on_step_end(self, args, state, control, model: nn.Module, **_) -> None:
        if state.global_step % self.steps:
            return
        with kept_random_states():
            policy = replace(self.reasoner, model=model.eval())  # its weights stay in the type in which they learn
            stop = distributed.broadcast(self.monitor(policy, state.global_step))
        model.train()
        if state.global_step in self.monitor.rows:
            state.log_history.append({"step": state.global_step, "look": self.monitor.rows[state.global_step]})
        if stop:
            control.should_training_stop = control.should_log = True
            control.should_save = False  # Trainer does not store that it was to stop: it would go on from here
