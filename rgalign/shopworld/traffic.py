"""What ShopWorld shows and what is clicked, in the log and online, with every probability in closed form.

The log comes from a legacy policy with exploration and a position-based click model (`draw_lists`). `Traffic` gives
what any other list would have earned in the same sessions. It needs the truth (ARCHITECTURE.md, Contracts).
"""

from dataclasses import dataclass
from math import comb

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from rgalign.data.features import as_strings, ids_of
from rgalign.shopworld.tables import DAY, INTENT_IDS, KB, START, Rules, World
from rgalign.shopworld.vocabulary import COLUMNS

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


def selection(rules: Rules, propensity: np.ndarray) -> np.ndarray:
    """P(the policy shows this intent at any position), from its propensity at one: of the policy's own choices 1."""
    least = rules.shuffled_share / rules.positions  # of a choice of the policy, in a slot that only shuffling gives it
    return np.where(propensity < least / 2, rules.positions * propensity, 1.0)


def legacy_scores(world: World, codes: dict[str, np.ndarray]) -> np.ndarray:
    """The policy's integer scores (sessions, KB): whole numbers, so that every machine breaks ties alike."""
    scores = np.rint(100 * np.log(world.prior.mean(axis=(0, 1)))).astype(np.int64)
    for name in LEGACY_COLUMNS:
        known = np.rint(100 * np.log(world.columns[name].T)).astype(np.int64)
        scores = scores + np.vstack([known, np.zeros((1, KB), np.int64)])[codes[name]]  # last row, -1: missing
    return scores


def draw_lists(
    world: World, intents: np.ndarray, scores: np.ndarray, available: np.ndarray, rng: np.random.Generator
) -> ShownLists:
    """Lists and clicks for sessions with the true `intents` (sessions,); `available`, `scores` (sessions, KB)."""
    rules, sessions = world.rules, len(intents)
    ranks = rules.positions - rules.explored
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
    click_probability = world.attraction[intents[:, None], candidates] * world.examination
    clicked = rng.random(click_probability.shape) < click_probability
    return ShownLists(candidates, propensity, click_probability, clicked, shuffled)


@dataclass(frozen=True, eq=False)
class Traffic:
    """Sessions of a ShopWorld with what decides their lists and clicks; rows in the order of the `sessions` it is of.

    traffic = Traffic.of(dataset.meta, dataset.sessions, dataset.truth)
    traffic.ctr(traffic.top(scores))          # CTR@3 of a ranker, exactly
    traffic.relog(np.random.default_rng(0))   # another log of the same sessions
    """

    world: World
    users: np.ndarray  # 0, 1, .. (sessions,)
    intents: np.ndarray  # the true ones (sessions,)
    available: np.ndarray  # was in the KB at the session's time (sessions, KB)
    scores: np.ndarray  # of the legacy policy that wrote the log, whole numbers (sessions, KB)

    reads = LEGACY_COLUMNS  # feature columns of the sessions, beside those that every data set has

    @classmethod
    def of(cls, meta: dict, sessions: pd.DataFrame, truth: pd.DataFrame | None) -> "Traffic":
        """The traffic of `sessions`, any of a data set that was drawn from a world (world.generate).

        meta   the whole of dataset.yaml
        truth  holds every one of the sessions, in any order
        Raises ValueError where dataset.yaml names no world of this version, the truth is not there, or the tables hold
        what that world could not have drawn.
        """
        world = World.from_meta(meta)
        if truth is None:
            raise ValueError(
                f"{meta.get('name')!r} was read without its truth: what would be clicked is unknown. Read it with "
                "tables.read(folder, truth=True); the other tables alone are a log, see evaluation.off_policy"
            )
        row = pc.index_in(ids_of(sessions, "session_id"), value_set=ids_of(truth, "session_id"))
        if missing := row.null_count:
            raise ValueError(f"truth has no row for {missing} of {len(sessions)} sessions: both must be of one read")
        intents = _places(ids_of(truth, "intent_id").take(row), INTENT_IDS, "truth.intent_id")
        available = world.available((sessions["timestamp"].to_numpy(dtype="datetime64[us]") - START) // DAY)
        if early := int((~available[np.arange(len(intents)), intents]).sum()):
            raise ValueError(f"{early} sessions want an intent that is not in the KB at their time: not of this world?")
        if absent := [name for name in LEGACY_COLUMNS if name not in sessions]:
            raise ValueError(f"sessions has no column {', '.join(absent)}, which the legacy policy of ShopWorld reads")
        values = {column.name: column.values for column in COLUMNS}
        codes = {name: _places(ids_of(sessions, name), values[name], f"sessions.{name}") for name in LEGACY_COLUMNS}
        users = np.unique(as_strings(ids_of(sessions, "user_id")), return_inverse=True)[1]
        return cls(world, users, intents, available, legacy_scores(world, codes))

    def __len__(self) -> int:
        return len(self.intents)

    def top(self, scores: np.ndarray, k: int = 3) -> np.ndarray:
        """The k best of the intents that exist (sessions, k), best first, from scores (sessions, KB) of any scale.

        Ties go to the intent that comes first in the KB, as the legacy policy has it.
        """
        scores = np.asarray(scores, dtype=np.float64)
        if scores.shape != self.available.shape or np.isnan(scores).any():
            raise ValueError(
                f"scores has the shape {scores.shape} and {int(np.isnan(scores).sum())} NaN; expected one number a "
                f"session and intent, {self.available.shape}"
            )
        # What does not exist comes last, after any -inf that a ranker gave.
        return np.lexsort((-scores, ~self.available), axis=1)[:, :k]

    def best(self, pool: np.ndarray | None = None, k: int = 3) -> np.ndarray:
        """The k intents with the highest true P(click) (sessions, k), best first: the ceiling of every ranker.

        pool  (sessions, candidates) intents to choose from, -1 where padded; None: all that exist
        Raises ValueError where a pool has fewer than k intents that exist.
        """
        chance = self.world.attraction[self.intents]
        if pool is not None:
            inside = np.zeros((len(self), KB + 1), dtype=bool)  # the last column takes the padding
            np.put_along_axis(inside, np.asarray(pool), True, axis=1)
            inside = inside[:, :KB] & self.available
            if few := int((inside.sum(axis=1) < k).sum()):
                raise ValueError(f"the pools of {few} sessions have fewer than {k} intents that exist")
            chance = np.where(inside, chance, -np.inf)
        return self.top(chance, k)

    def click_probability(self, shown: np.ndarray) -> np.ndarray:
        """True P(click) of each slot of the lists shown (sessions, k), intents from position 0 on: (sessions, k).

        The position-based model of the world: attraction of the intent, times examination of the position. Raises
        ValueError for another shape and for intents that the shop does not have at the session's time.
        """
        shown, most = np.asarray(shown), self.world.rules.positions
        if shown.ndim != 2 or len(shown) != len(self) or not 1 <= shown.shape[1] <= most:
            raise ValueError(f"shown has the shape {shown.shape}; expected ({len(self)}, k), k from 1 to {most}")
        known = (shown >= 0) & (shown < KB)
        there = known & np.take_along_axis(self.available, np.where(known, shown, 0), axis=1)
        if not there.all():
            row, position = np.argwhere(~there)[0]
            raise ValueError(
                f"{int((~there).sum())} slots show an intent that is not in the KB at the session's time (first: "
                f"intent {shown[row, position]} in session {row}); rank the intents that exist: Traffic.top"
            )
        return self.world.attraction[self.intents[:, None], shown] * self.world.examination[: shown.shape[1]]

    def ctr(self, shown: np.ndarray) -> float:
        """True CTR@k of the lists shown (sessions, k): clicks on the k intents, divided by impressions of them."""
        return float(self.click_probability(shown).mean())

    def relog(self, rng: np.random.Generator) -> ShownLists:
        """Lists, propensities and clicks of the same sessions, drawn again by the policy that wrote the log."""
        return draw_lists(self.world, self.intents, self.scores, self.available, rng)


def _places(found: pa.Array, values: tuple[str, ...], what: str) -> np.ndarray:
    """Index of each entry among the values, -1 where it is missing. Raises ValueError for any other entry."""
    place = pc.index_in(found, value_set=pa.array(values, pa.large_string()))
    unknown = pc.and_(pc.is_null(place), pc.is_valid(found))
    if count := pc.sum(unknown).as_py():
        first = found.filter(unknown)[0].as_py()
        raise ValueError(f"{what} has {count} entries that ShopWorld does not know (first: {first!r}); not its tables?")
    return pc.fill_null(place, -1).to_numpy(zero_copy_only=False).astype(np.int64)
