"""Simulated online experiments: each user of a ShopWorld sees one ranker, and clicks are drawn from the truth.

A test week has a few thousand users, an experiment needs many more: users are sampled from the week with replacement,
each with all sessions, and their clicks are sampled again [C]. So the true value is known: `Audience.ctr`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from tqdm import tqdm

from rgalign.experiment.ab_test import Arm, arm_of, assign, lift, pre_period_covariate
from rgalign.shopworld.traffic import Traffic


@dataclass(frozen=True, eq=False)
class Audience:
    """The users of some sessions, and what each would click on under each arm."""

    user_row: np.ndarray  # (sessions,) row of each session's user
    probability: Mapping[str, np.ndarray]  # arm -> (sessions, k) true P(click) of each slot of the list that it shows
    covariate: np.ndarray  # (users,) from before the experiment (ab_test.pre_period_covariate)

    @classmethod
    def of(
        cls, traffic: Traffic, lists: Mapping[str, np.ndarray], users: Sequence[str], before: pd.DataFrame
    ) -> "Audience":
        """The audience of a simulated shop.

        lists   arm -> (sessions, k) what it shows (Traffic.top)
        users   (sessions,) user ids of the traffic's sessions
        before  clicks and impressions of the weeks before, by user_id (data.lists.by_user)
        """
        names, user_row = np.unique(np.asarray(users, dtype=str), return_inverse=True)
        probability = {name: traffic.click_probability(shown) for name, shown in lists.items()}
        history = before.reindex(names, fill_value=0)[["clicks", "impressions"]].to_numpy(dtype=np.float64)
        return cls(user_row, probability, pre_period_covariate(*history.T))

    @property
    def users(self) -> int:
        return len(self.covariate)

    def ctr(self, arm: str) -> float:
        """The arm's true CTR@k: what an experiment with every user in it would tend to."""
        return float(self.probability[arm].mean())

    def coming(self, times: np.ndarray) -> "Audience":
        """The same users, each `times` (users,) as often: the same sessions again, whose clicks are sampled again.

        Raises ValueError unless every user comes once at least.
        """
        if len(times) != self.users or np.min(times) < 1:
            raise ValueError(f"{len(times)} numbers, the least {np.min(times)}; expected {self.users} of at least 1")
        met = np.repeat(np.arange(len(self.user_row)), np.asarray(times)[self.user_row])
        probability = {name: of_arm[met] for name, of_arm in self.probability.items()}
        return replace(self, user_row=self.user_row[met], probability=probability)

    def experiment(self, arms: Mapping[str, str], users: int, *, seed: int, name: str) -> "Experiment":
        """One experiment of `users` users drawn with replacement, each in the arm that the hash of the id gives.

        arms  name of each arm -> the ranker whose lists it shows; twice the same one is an A/A test
        name  of the experiment: the salt of the hash, and with `seed` what draws users and clicks
        """
        rng = np.random.default_rng([seed, *name.encode()])
        drawn = rng.integers(self.users, size=users)
        order = np.argsort(self.user_row, kind="stable")
        counts = np.bincount(self.user_row, minlength=self.users)
        starts = np.cumsum(counts) - counts
        many = counts[drawn]
        user = np.repeat(np.arange(users), many)
        within = np.arange(len(user)) - np.repeat(np.cumsum(many) - many, many)
        session = order[starts[drawn][user] + within]
        arm = assign(np.arange(users), list(arms), f"{seed}:{name}")
        lists = np.stack([self.probability[ranker] for ranker in arms.values()])
        chance = lists[pd.Index(arms).get_indexer(arm)[user], session]
        clicks = (rng.random(chance.shape) < chance).sum(axis=1)
        return Experiment(arm, user, session, clicks, chance.shape[1], self.covariate[drawn])


def heavy_tail(users: int, *, seed: int, shape: float = 1.5, most: int = 50) -> np.ndarray:
    """(users,) how often each comes: most of them once, a few up to `most` times (Pareto) [C]."""
    return np.minimum(1 + np.random.default_rng(seed).pareto(shape, users), most).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Experiment:
    """The counts of an experiment; user, session, clicks are (rows,), one a session that a user had."""

    arm: np.ndarray  # (users,) names
    user: np.ndarray
    session: np.ndarray  # row in the audience
    clicks: np.ndarray
    slots: int  # impressions a session
    covariate: np.ndarray  # (users,)

    def per_user(self, inside: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Clicks and impressions of each user, (users,) each; inside: bool by the audience's sessions, None: all."""
        rows = slice(None) if inside is None else inside[self.session]
        users = len(self.arm)
        clicks = np.bincount(self.user[rows], self.clicks[rows], minlength=users)
        return clicks, np.bincount(self.user[rows], minlength=users) * self.slots

    def of_arms(self, *names: str, cuped: bool = False) -> list[Arm]:
        covariate = self.covariate if cuped else None
        return [arm_of(*self.per_user(), self.arm == name, covariate) for name in names]

    def by_group(self, masks: Sequence[np.ndarray], *names: str) -> list[Arm]:
        """Each named arm by group (groups,); masks: bool by the audience's sessions."""
        clicks, impressions = (np.stack(part) for part in zip(*map(self.per_user, masks), strict=True))
        return [arm_of(clicks, impressions, self.arm == name) for name in names]

    def p_by_session(self, control: str, treatment: str) -> float:
        """p of no difference if sessions were independent: too small where a user's sessions are alike."""
        alone, shown = self.arm[self.user], np.full(len(self.user), self.slots)
        old, new = (arm_of(self.clicks, shown, alone == name) for name in (control, treatment))
        return float(lift(new, old).p_value)

    def by_look(self, looks: int, *names: str) -> list[Arm]:
        """Each named arm's Arm after every look (looks,): users have come one after the other, in equal shares."""
        clicks, impressions = self.per_user()
        seen = np.arange(len(self.arm)) < np.linspace(0, len(self.arm), looks + 1)[1:, None].astype(int)
        return [arm_of(clicks, impressions, seen & (self.arm == name)) for name in names]


def repeated(
    audience: Audience, arms: Mapping[str, str], users: int, *, repeats: int, looks: int, seed: int,
    progress: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Many experiments of two arms, the second against the first.

    Returns difference, standard_error and p_value (repeats, looks) after every look, and p_by_session (repeats,): what
    a test gives at the end that takes sessions for independent.
    """
    control, treatment = arms
    found, naive = [], []
    for number in tqdm(range(repeats), "experiments", delay=5, disable=not progress):
        one = audience.experiment(arms, users, seed=seed, name=f"{control}/{treatment} {number}")
        old, new = one.by_look(looks, control, treatment)
        each = lift(new, old)
        found.append((each.difference.estimate, each.standard_error, each.p_value))
        naive.append(one.p_by_session(control, treatment))
    return *(np.stack(part) for part in zip(*found, strict=True)), np.array(naive)
