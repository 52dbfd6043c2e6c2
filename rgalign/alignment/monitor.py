"""What a step changed: the ranking with its query tower refitted, and what the reasoner writes and earns."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch

from rgalign.alignment.context import QE_REC, Context
from rgalign.alignment.logprobs import log_probabilities
from rgalign.alignment.rewarding import Rewarder
from rgalign.alignment.steps import with_own_vectors
from rgalign.data.lists import Lists
from rgalign.evaluation.metrics import gauc_of_lists
from rgalign.ranker.fit import fit, score, with_click
from rgalign.ranker.train import loss_of
from rgalign.ranker.two_tower import vectors_of
from rgalign.reasoner import generate
from rgalign.reasoner.model import Reasoner

REFIT = {"epochs": 3, "patience": 3, "learning_rate": 1e-3}  # of a query tower that knows all but the new vectors [C]

# (queries of the watched sessions, in their order) -> {"ihr@1": .., "ihr@3": ..}; evaluation stands above this room
Hits = Callable[[Sequence[str]], Mapping[str, float]]


@dataclass(frozen=True, eq=False)
class Lookout:
    """The sessions on which a reasoner is looked at while it is aligned: the first ones of train's part and of valid.

    reward  None for an encoder, which writes nothing;  hits  IHR of the queries of `valid`'s sessions, by the click
    """

    context: Context
    train: Lists
    dev: Lists
    valid: Lists
    reward: Rewarder | None = None
    hits: Hits | None = None

    @classmethod
    def of(cls, context: Context, reward: Rewarder | None = None, hits: Hits | None = None) -> "Lookout":
        """With at most alignment.loop.look_sessions of each part."""
        most = context.params.alignment.loop.look_sessions
        train, dev, valid = (with_click(getattr(context.parts, part)) for part in ("train", "dev", "valid"))
        firsts = [lists.take(torch.arange(min(most, len(lists)))) for lists in (train, dev, valid)]
        return cls(context, *firsts, reward, hits)

    def ranking(self, reasoner: Reasoner) -> float:
        """GAUC on valid of the context's ranker (its first seed), whitening and query tower refitted to this reasoner.

        The tower that is only whitened again is kept where no epoch is better on the development users.
        The old tower on new vectors would lose what has only moved; a whole new ranker would take minutes.
        """
        own = [with_own_vectors(self.context, reasoner, lists) for lists in (self.train, self.dev, self.valid)]
        intents, settings = self.context.parts.intents, self.context.settings
        seed, ranker = next(iter(self.context.rankers.items()))
        ranker = copy.deepcopy(ranker).requires_grad_(False)
        ranker.query.requires_grad_(True)
        # the query's alone: the KB's vectors, and what follows their whitening, are as they were
        ranker.query.layers[0].set(vectors_of(own[0], ranker.query.query_dim))
        loop = {
            **REFIT,
            "from_start": True,
            "lists_per_batch": settings["lists_per_batch"],
            "weight_decay": settings["weight_decay"],
        }
        how = {"loss": loss_of(QE_REC, settings), "accelerator": self.context.accelerator, "progress": False}
        fitted = fit(ranker, own[0], own[1], intents, seed=seed, **loop, **how).model
        clicked, shown = self.valid.clicked.numpy(), self.valid.shown.numpy()
        return gauc_of_lists(score(fitted, own[2], intents), clicked, shown).value

    def written(self, reasoner: Reasoner) -> pd.DataFrame:
        """The greedy query of each of valid's watched sessions."""
        prompter = self.context.recipe.prompter(self.context.shop, reasoner)
        most = self.context.params.reasoner.queries.max_new_tokens
        prompts = prompter.sessions(self.context.sessions(self.valid))
        return generate.greedy(reasoner, prompter, prompts, max_new_tokens=most, progress=False)

    def figures(self, reasoner: Reasoner) -> dict[str, float]:
        """ranking (GAUC on valid), and of the greedy queries: reward (nats), ihr@1, ihr@3, tokens, distinct and
        repeated (shares)."""
        found = {"ranking": self.ranking(reasoner)}
        if self.reward is None:
            return found
        texts = self.written(reasoner)
        rewards = self.reward.of_texts(self.valid, texts["query"].tolist())
        found["reward"] = float(pd.Series(rewards).mean())  # NaN, without a warning, where all are silent
        found |= self.hits(texts["query"].tolist()) if self.hits else {}
        found |= {"tokens": float(texts["tokens"].mean()), "distinct": texts["query"].nunique() / len(texts)}
        return found | {"repeated": generate.repeated_share(texts["query"].tolist())}


def hacked(first: Mapping[str, float], now: Mapping[str, float], tolerance: float) -> bool:
    """Whether the reward has risen since the first look while the ranking fell by more than `tolerance` (GAUC) [C]."""
    return bool(now["reward"] > first["reward"] and now["ranking"] < first["ranking"] - tolerance)


@dataclass(eq=False)
class Dashboard:
    """RG-DPO's watch (METHOD.md 2.3): stops training when the reward rises and the ranking on valid falls.

    lookout    where it looks;  start  the reasoner that training begins from, which is the reference
    tolerance  GAUC on valid below that at the start, at which a risen reward is called hacked [C]
    rows       what it saw, by step; a resumed training gives back what was seen before it was killed (tuning.Watch)
    """

    lookout: Lookout
    start: Reasoner
    tolerance: float
    rows: dict[int, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self):
        self.rows[0] = {**self.lookout.figures(self.start), "kl": 0.0}

    def __call__(self, reasoner: Reasoner, step: int) -> bool:
        self.rows[step] = {**self.lookout.figures(reasoner), "kl": self._kl(reasoner)}
        return hacked(self.rows[0], self.rows[step], self.tolerance)

    def table(self) -> pd.DataFrame:
        """One row a look: step and what `Lookout.figures` finds, and kl to the reference (nats a query)."""
        return pd.DataFrame([{"step": step, **row} for step, row in sorted(self.rows.items())])

    def _kl(self, reasoner: Reasoner) -> float:
        """Mean of log policy - log reference over one query a session that the policy drew."""
        context = self.lookout.context
        prompter = context.recipe.prompter(context.shop, reasoner)
        prompts = prompter.sessions(context.sessions(self.lookout.valid))
        most = context.params.reasoner.queries.max_new_tokens
        drawn = generate.sample(reasoner, prompter, prompts, samples=1, max_new_tokens=most, seed=0, progress=False)
        asked = prompter.queries(drawn["query"].tolist())
        said = [log_probabilities(each, prompts, asked, progress=False) for each in (reasoner, self.start)]
        return float(np.mean(said[0] - said[1]))
