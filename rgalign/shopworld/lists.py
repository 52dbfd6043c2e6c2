"""What ShopWorld shows and what is clicked: a legacy policy with exploration, then a position-based click model.

Everything random about a list has a probability in closed form, so that every propensity and every click probability
in the tables is the true one.
"""

from dataclasses import dataclass
from math import comb

import numpy as np

from rgalign.shopworld.tables import KB, Rules

# The policy in production when the logs were written: a few columns, the regions' average, no text.
LEGACY_COLUMNS = (
    "order_status", "parcel_state", "refund_state", "return_state", "payment_state", "last_page", "entry_point",
    "wait_level", "eta_gap", "search_verb", "faq_reading", "last_error", "search_topic", "ticket_topic", "help_section",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class ShownLists:
    """Lists of some sessions, all (sessions, positions) but `shuffled` (sessions,)."""

    candidates: np.ndarray  # intents
    propensity: np.ndarray  # P(this intent at this position | session), over slots, exploration and shuffling
    click_probability: np.ndarray
    clicked: np.ndarray
    shuffled: np.ndarray


def examination(rules: Rules) -> np.ndarray:
    """P(a position is looked at) (positions,)."""
    return (1.0 + np.arange(rules.positions)) ** -rules.examination_decay


def slot_table(rules: Rules) -> np.ndarray:
    """P(the policy's r-th choice stands at position p) (ranks, positions), over the draw of slots and the shuffling."""
    positions, ranks = rules.positions, rules.positions - rules.explored
    table = np.full((ranks, positions), rules.shuffled_share / positions)
    for rank in range(ranks):
        for position in range(rank, rank + rules.explored + 1):
            # `rank` of the policy's choices before this position, the others after it.
            ways = comb(position, rank) * comb(positions - 1 - position, ranks - 1 - rank)
            table[rank, position] += (1 - rules.shuffled_share) * ways / comb(positions, ranks)
    return table


def legacy_scores(prior: np.ndarray, tables: dict[str, np.ndarray], codes: dict[str, np.ndarray]) -> np.ndarray:
    """The policy's integer scores (sessions, KB): whole numbers, so that every machine breaks ties alike."""
    scores = np.rint(100 * np.log(prior.mean(axis=(0, 1)))).astype(np.int64)
    for name in LEGACY_COLUMNS:
        known = np.rint(100 * np.log(tables[name].T)).astype(np.int64)
        scores = scores + np.vstack([known, np.zeros((1, KB), np.int64)])[codes[name]]  # last row, -1: missing
    return scores


def draw_lists(
    intents: np.ndarray,
    scores: np.ndarray,
    available: np.ndarray,
    attraction: np.ndarray,
    rules: Rules,
    rng: np.random.Generator,
) -> ShownLists:
    """Lists and clicks for sessions with the true `intents` (sessions,); `available`, `scores` (sessions, KB)."""
    sessions, ranks = len(intents), rules.positions - rules.explored
    # Ties go to the intent that comes first in the knowledge base.
    keys = np.where(available, -scores * KB + np.arange(KB), np.iinfo(np.int64).max)
    top = np.argsort(keys, axis=1)[:, :ranks]
    chance = np.where(available, rng.random((sessions, KB)), 2.0)
    np.put_along_axis(chance, top, 2.0, axis=1)
    others = np.argpartition(chance, rules.explored, axis=1)[:, : rules.explored]
    # argpartition leaves its order to the implementation; the draws decide.
    others = np.take_along_axis(others, np.argsort(np.take_along_axis(chance, others, axis=1), axis=1), axis=1)

    explored = rng.permuted(np.tile(np.arange(rules.positions) < rules.explored, (sessions, 1)), axis=1)
    rank = np.where(explored, ranks + np.cumsum(explored, axis=1) - 1, np.cumsum(~explored, axis=1) - 1)
    shuffled = rng.random(sessions) < rules.shuffled_share
    rank[shuffled] = rng.permuted(rank[shuffled], axis=1)
    candidates = np.take_along_axis(np.hstack([top, others]), rank, axis=1)

    by_rank = np.vstack([slot_table(rules), np.zeros((rules.explored, rules.positions))])
    by_chance = rules.explored / rules.positions / (available.sum(axis=1, keepdims=True) - ranks)
    propensity = np.where(rank < ranks, by_rank[rank, np.arange(rules.positions)], by_chance)
    click_probability = attraction[intents[:, None], candidates] * examination(rules)
    clicked = rng.random(click_probability.shape) < click_probability
    return ShownLists(candidates, propensity, click_probability, clicked, shuffled)
