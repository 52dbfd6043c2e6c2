"""Simulated online experiments whose truth is known: users who come unevenly often, each with a taste for clicking."""

from typing import NamedTuple

import numpy as np

SHOWN = 3  # intents a session
# a fifth of the users comes three times as often and clicks half as much
HEAVY, HEAVY_VISITS, HEAVY_RATE = 0.2, 3.0, 0.5
RATE = 0.3  # mean click probability of the others
CONTROL_CTR = RATE * (HEAVY * HEAVY_VISITS * HEAVY_RATE + 1 - HEAVY) / (HEAVY * HEAVY_VISITS + 1 - HEAVY)


class Users(NamedTuple):
    """(experiments, 1, users) each."""

    treated: np.ndarray  # half of them
    visits: np.ndarray  # expected sessions over the whole experiment
    rate: np.ndarray  # probability that a shown intent is clicked, without treatment


def draw_users(rng, experiments: int, users: int, *, visits: float = 3.0, alike: float = 4.0) -> Users:
    """alike: the smaller, the more the sessions of one user are alike; visits have a lognormal tail of sigma 1."""
    shape = (experiments, 1, users)
    heavy = rng.random(shape) < HEAVY
    often = visits * rng.lognormal(-0.5, 1.0, shape) * np.where(heavy, HEAVY_VISITS, 1)
    rate = rng.beta(alike * RATE, alike * (1 - RATE), shape) * np.where(heavy, HEAVY_RATE, 1)
    return Users(rng.random(shape) < 0.5, often, rate)


def draw_counts(rng, users: Users, *, looks: int = 1, effect: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Clicks and impressions of each user up to each look, (experiments, looks, users); every user can come at each.

    effect  relative, of the treatment on every user's rate; 0 or below, so that no rate passes 1
    """
    shape = (len(users.visits), looks, users.visits.shape[-1])
    impressions = SHOWN * rng.poisson(np.broadcast_to(users.visits / looks, shape))
    clicks = rng.binomial(impressions, users.rate * (1 + effect * users.treated))
    return clicks.cumsum(axis=1), impressions.cumsum(axis=1)


def three_sigma(rate: float, experiments: int) -> float:
    """Three standard deviations of the share of so many experiments in which an event of this rate happened."""
    return 3 * np.sqrt(rate * (1 - rate) / experiments)
