"""The simulated experiment of notebook 10: its tables and figures, empty where the data have no truth."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from rgalign.data.tables import Dataset
from rgalign.evaluation.off_policy import over_logs
from rgalign.evaluation.results import MODELS
from rgalign.experiment import ab_test, online
from rgalign.params_schema import Experiment
from rgalign.report import plots, summaries
from rgalign.shopworld.traffic import Traffic

NO_TRUTH = "no truth: nobody can be asked what they would have clicked"
PAPER = {"paper: QE-Rec, 0.98 %": 0.0098, "paper: alignment, 0.13 %": 0.0013}  # lifts in CTR@3 [P]


def table(*columns: str) -> Callable:
    """A method that returns a table: an empty one with these columns where there is no truth."""

    def of(method: Callable) -> Callable:
        @wraps(method)
        def found(self: "Simulation", *given: Any) -> pd.DataFrame:
            return method(self, *given) if self.traffic else pd.DataFrame(columns=list(columns))

        return found

    return of


def figure(method: Callable) -> Callable:
    """A method that returns a figure: one that says so where there is no truth."""

    @wraps(method)
    def found(self: "Simulation") -> Figure:
        return method(self) if self.traffic else plots.nothing(NO_TRUTH)

    return found


@dataclass(eq=False)
class Simulation:
    """What the customers of the test week would do under each arm.

    arms  rankers, the last one the newest;  shown  arm -> (sessions, 3) what it shows;  seed  run.seed
    """

    arms: Sequence[str]
    how: Experiment
    seed: int
    traffic: Traffic | None = None
    shown: Mapping[str, np.ndarray] | None = None
    audience: online.Audience | None = None

    @classmethod
    def of(
        cls, shop: Dataset, scores: Mapping[str, np.ndarray], before: pd.DataFrame, how: Experiment, seed: int
    ) -> "Simulation":
        """shop: of test, with the truth if it is known; scores: arm -> (sessions, KB); before: data.lists.by_user"""
        arms = list(scores)
        if shop.truth is None:
            return cls(arms, how, seed)
        truth = shop.truth.set_index("session_id").loc[list(shop.sessions.session_id)].reset_index()
        traffic = Traffic.of(shop.meta, shop.sessions, truth)
        shown = {name: traffic.top(own) for name, own in scores.items()}
        return cls(arms, how, seed, traffic, shown, online.Audience.of(traffic, shown, shop.sessions.user_id, before))

    @table("true CTR@3")
    def true_ctr(self, candidates: np.ndarray) -> pd.DataFrame:
        """Of each arm, and of two ceilings. candidates: (sessions, positions) that the log showed"""
        found = {MODELS[name]: self.traffic.ctr(self.shown[name]) for name in self.arms}
        found["best three of the list"] = self.traffic.ctr(self.traffic.best(candidates))
        found["best three of the knowledge base"] = self.traffic.ctr(self.traffic.best())
        return pd.Series(found, name="true CTR@3").to_frame()

    @cached_property
    def experiment(self) -> online.Experiment:
        return self.audience.experiment({name: name for name in self.arms}, self.how.users, seed=self.seed, name="main")

    @table("arm", "users", "planned", "p_value", "alarm")
    def ratios(self) -> pd.DataFrame:
        return summaries.sample_ratios(self.experiment, self.arms)

    @table(*summaries.FOUND)
    def lifts(self) -> pd.DataFrame:
        """Of each arm over the one before it."""
        pairs = list(zip(self.arms[1:], self.arms[:-1], strict=True))
        return summaries.lifts(self.experiment, pairs, self.audience)

    def _same_arms(self, audience: online.Audience, looks: int) -> tuple[np.ndarray, ...]:
        """Many A/A tests: online.repeated."""
        arms, how = {"one": self.arms[-1], "other": self.arms[-1]}, self.how
        more = {"repeats": how.repeats, "looks": looks, "seed": self.seed, "progress": True}
        return online.repeated(audience, arms, how.repeat_users, **more)

    @cached_property
    def repeated(self) -> tuple[np.ndarray, ...]:
        return self._same_arms(self.audience, self.how.looks)

    @cached_property
    def by_look(self) -> dict[str, np.ndarray]:
        """test -> p-values (experiments, looks) of the A/A tests."""
        difference, error, p, _ = self.repeated
        planned = float(ab_test.planned_error(self.how.repeat_users, self.one_user))
        always = ab_test.always_valid(difference, error, ab_test.mixture_for(planned))
        return {"p < 0.05 at some look": p, "always valid": always.p_value}

    @table(*summaries.rejections({}))
    def false_alarms(self) -> pd.DataFrame:
        """How often A/A tests are significant: one planned look, uneven users, and looking at any time."""
        _, _, by_user, by_session = self.repeated
        often = self.audience.coming(online.heavy_tail(self.audience.users, seed=self.seed))
        _, _, *uneven = self._same_arms(often, 1)
        tests = {"by user (delta method)": by_user[:, -1], "by session": by_session}
        tests |= {"uneven users: by user": uneven[0][:, -1], "uneven users: by session": uneven[1]}
        return summaries.rejections(tests | self.by_look)

    @figure
    def p_values(self) -> Figure:
        title = f"{self.how.repeats:,} A/A tests of {self.how.repeat_users:,} users"
        return plots.p_values(self.repeated[2][:, -1], title)

    @cached_property
    def control(self) -> ab_test.Arm:
        (found,) = self.experiment.of_arms(self.arms[-2])
        return found

    @property
    def one_user(self) -> float:
        """The variance that one user of the control brings."""
        return float(self.control.users * self.control.variance)

    @property
    def sizes(self) -> dict[str, float]:
        """Lifts: the paper's two, and the true one of the last arm."""
        last, before = (self.audience.ctr(name) for name in self.arms[:-3:-1])
        return PAPER | {f"here: {MODELS[self.arms[-1]]}, true": last / before - 1}

    @table("users of both arms, for a chance of 0.8")
    def needed(self) -> pd.DataFrame:
        """Users that it takes to see each lift that there is."""
        ctr = float(self.control.ctr)
        users = {name: int(ab_test.users_needed(size, ctr, self.one_user)) for name, size in self.sizes.items() if size}
        return pd.Series(users, name="users of both arms, for a chance of 0.8").to_frame()

    @figure
    def power(self) -> Figure:
        users, ctr = np.geomspace(1e3, 1e8, 200), float(self.control.ctr)
        return plots.power(
            users, {n: ab_test.power_of(size, users, ctr, self.one_user) for n, size in self.sizes.items()}
        )

    @figure
    def peeking(self) -> Figure:
        return plots.peeking({name: ab_test.rejected_by_look(p) for name, p in self.by_look.items()})

    @figure
    def looks(self) -> Figure:
        """The experiment as its users come in."""
        new, old = self.experiment.by_look(self.how.looks, *self.arms[:-3:-1])
        found, users = ab_test.lift(new, old), new.users + old.users
        mixture = ab_test.mixture_for(float(ab_test.planned_error(users[-1], self.one_user)))
        watched = ab_test.always_valid(found.difference.estimate, found.standard_error, mixture)
        goal = self.audience.ctr(self.arms[-1]) - self.audience.ctr(self.arms[-2])
        return plots.looks(users, found.difference, watched, goal)

    @table("group", "users", "difference", "ci_low", "ci_high", "p_value", "truth")
    def by_group(self, masks: pd.DataFrame) -> pd.DataFrame:
        """The last arm against the one before it, by group of sessions, with intervals that hold for all at once."""
        found = summaries.by_group(self.experiment, *self.arms[:-3:-1], masks, self.audience)
        return found.drop(columns=["relative", "relative_low", "relative_high"])

    @table(
        *("ranker", "against", "estimator", "truth", "bias", "standard_deviation", "coverage", "mean", "rmse"),
        *("standard_error", "effective_sample_size", "matched", "clipped", "logs"),
    )
    def over_logs(self, clicks: Mapping[str, np.ndarray]) -> pd.DataFrame:
        """How good off-policy estimates are: the same sessions logged again many times. clicks: of the direct model"""
        draws = {"logs": self.how.logs, "seed": self.seed, "against": self.arms[-2], "clip": self.how.clip}
        return over_logs(self.traffic, self.shown, clicks, progress=True, **draws)

    @table("confidence", "chance", "ece", "rank_correlation", "best_tenth", "all")
    def sureness(self, sure: Mapping[str, np.ndarray]) -> pd.DataFrame:
        """Is confidence the chance of a click? sure: arm -> (sessions,)"""
        chances = {name: self.traffic.click_probability(self.shown[name]) for name in self.arms}
        return pd.DataFrame({MODELS[name]: summaries.sureness(sure[name], chances[name]) for name in self.arms}).T

    def session_ctr(self, arm: str) -> dict[str, np.ndarray]:
        """`truth` -> (sessions,) the arm's true CTR@3 of each session; empty where there is no truth."""
        return {"truth": self.traffic.click_probability(self.shown[arm]).mean(axis=1)} if self.traffic else {}
