"""Candidate lists for logs that do not say what was shown: the true intent among sampled negatives.

A ranker trained on such lists learns log p(i|x) - log q(i); `kb_correction` is what to add to its scores when it ranks
all intents.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pyarrow as pa

from rgalign.data.lists import Lists, clicks_of, listed_in
from rgalign.data.schema import STRING, to_frame, to_table
from rgalign.data.tables import Dataset

SAMPLED_NEGATIVES = {"popularity": 15, "uniform": 4, "smoothing": 0.5}
LISTS_AT_ONCE = 8192
SAMPLING = (
    "20 a session: the true intent, 15 distinct negatives drawn with p ~ (train clicks + 0.5), 4 uniform ones. "
    "Never a candidate: an intent before its valid_from, an area already visited. "
    "position is a random shuffle. Add log q(i) (candidates.kb_correction) when all intents are ranked."
)  # written into dataset.yaml
NEWTON_STEPS = 60


def draw_lists(
    true_intent: np.ndarray,
    train_clicks: np.ndarray,
    *,
    available: np.ndarray | None = None,
    times: np.ndarray | None = None,
    barred: tuple[np.ndarray, np.ndarray] | None = None,
    sampled_negatives: dict = SAMPLED_NEGATIVES,
    generator: np.random.Generator,
) -> np.ndarray:
    """Candidates of each session, in random order, the true intent among them.

    true_intent   (sessions,) row of the intent in the knowledge base (KB)
    train_clicks  (KB,) counts in train
    available     (KB,) datetime64, NaT = always; an intent is no negative in a session (times) before that
    barred        pairs (row of the session, ascending; row of the intent) that are no candidates, such as what a
                  visitor has already opened
    Returns (sessions, 1 + negatives) rows of the KB, -1 where fewer intents than asked for could be drawn.
    Negatives by popularity: the largest log weight + Gumbel noise, which is drawing without replacement.
    """
    log_weight = np.log(np.asarray(train_clicks, dtype=float) + sampled_negatives["smoothing"])
    lists = []
    for start in range(0, len(true_intent), LISTS_AT_ONCE):
        true = true_intent[start : start + LISTS_AT_ONCE]
        allowed = np.ones((len(true), len(log_weight)), bool)
        if available is not None:
            allowed = ~(available[None, :] > times[start : start + LISTS_AT_ONCE, None])
        if barred is not None:
            here = slice(*np.searchsorted(barred[0], [start, start + len(true)]))
            allowed[barred[0][here] - start, barred[1][here]] = False
        allowed[np.arange(len(true)), true] = False
        popular = _largest(log_weight + generator.gumbel(size=allowed.shape), allowed, sampled_negatives["popularity"])
        uniform = _largest(generator.random(allowed.shape), allowed, sampled_negatives["uniform"])
        lists.append(generator.permuted(np.column_stack([true, popular, uniform]), axis=1))
    return np.concatenate(lists) if lists else np.empty((0, 1), int)


def _largest(keys: np.ndarray, allowed: np.ndarray, count: int) -> np.ndarray:
    """Columns of the `count` largest allowed keys of each row, -1 where fewer are; they are allowed no longer."""
    count = min(count, keys.shape[1])
    keys = np.where(allowed, keys, -np.inf)
    chosen = np.argpartition(-keys, count - 1, axis=1)[:, :count] if count else np.empty((len(keys), 0), int)
    found = np.take_along_axis(allowed, chosen, axis=1)
    np.put_along_axis(allowed, chosen, False, axis=1)
    return np.where(found, chosen, -1)


def impressions(
    lists: np.ndarray, true_intent: np.ndarray, session_id: np.ndarray, intent_id: np.ndarray
) -> pd.DataFrame:
    """The impressions table of candidate lists; one row a candidate, -1 left out, positions from 0 without gaps."""

    def taken(ids: np.ndarray, rows: np.ndarray) -> pd.Series:
        """Arrow strings: a Python object for each of 20 ids a session would not fit in memory."""
        return pd.Series(pd.array(pa.array(ids, STRING).take(pa.array(rows)), dtype=pd.ArrowDtype(STRING)))

    rows, columns = np.nonzero(lists >= 0)
    shown, position = lists[rows, columns], (np.cumsum(lists >= 0, axis=1) - 1)[rows, columns]
    ids = {"session_id": taken(session_id, rows), "intent_id": taken(intent_id, shown)}
    clicked = (shown == true_intent[rows]).astype(np.int8)
    return pd.DataFrame(ids | {"position": position.astype(np.int16), "clicked": clicked})


def sampled_dataset(
    name: str,
    kinds: dict[str, str],
    meta: dict,
    intents: pd.DataFrame,
    sessions: pd.DataFrame,
    true_intent: np.ndarray,
    train_clicks: np.ndarray,
    seed: int,
    transcripts: pd.DataFrame | None = None,
    barred: tuple[np.ndarray, np.ndarray] | None = None,
) -> Dataset:
    """A data set whose log says what was chosen and not what was shown: its tables with sampled lists.

    true_intent, train_clicks, barred  of `draw_lists`;  seed  of the lists
    """
    lists = draw_lists(
        true_intent,
        train_clicks,
        available=pd.to_datetime(intents["valid_from"]).to_numpy(),
        times=pd.to_datetime(sessions["timestamp"]).to_numpy(),
        barred=barred,
        generator=np.random.default_rng([seed, 1]),
    )
    shown = impressions(lists, true_intent, sessions["session_id"], intents["intent_id"])
    meta = {"name": name, **meta, "candidates": SAMPLING, "sampled_negatives": dict(SAMPLED_NEGATIVES)}
    meta |= {"position_is_real": False, "features": dict(kinds), "seed": seed}
    frames = {"intents": intents, "sessions": sessions, "impressions": shown, "transcripts": transcripts}
    frames = {key: to_frame(to_table(frame, key, kinds)) for key, frame in frames.items() if frame is not None}
    return Dataset(name=name, kinds=kinds, meta=meta, **frames)


def log_inclusion(train_clicks: np.ndarray, sampled_negatives: dict = SAMPLED_NEGATIVES) -> np.ndarray:
    """log q(i): the chance that an intent which is not the answer is drawn as a negative. (KB,), in nats.

    Successive draws with weights w are exponential clocks of rate w: i is drawn by time t with 1 - exp(-w_i t), where t
    is such that the expected number of draws is right. Two approximations: t is fixed (exact for a large KB), and the
    uniform draws see an average rest. The answer, itself never a negative, is averaged over the train clicks.
    Against simulation: within 2 % of q for knowledge bases like the public ones (tests/data/test_candidates.py).
    """
    weight = np.asarray(train_clicks, dtype=float) + sampled_negatives["smoothing"]
    others, popularity = len(weight) - 1, sampled_negatives["popularity"]
    if others <= popularity + sampled_negatives["uniform"]:
        return np.zeros(len(weight))  # every intent is in every list
    # Intents with the same weight have the same q: one row and one column each.
    rate, member, many = np.unique(weight, return_inverse=True, return_counts=True)
    # For each group as the answer, the time by which `popularity` of the others are drawn on average.
    rows = many[None, :] - np.eye(len(rate))  # the answer's clock is taken away
    time = np.zeros(len(rate))
    for _ in range(NEWTON_STEPS if popularity else 0):  # the draws are concave in time: the steps never pass the root
        still = rows * np.exp(-rate[None, :] * time[:, None])
        missing = popularity - (rows.sum(axis=1) - still.sum(axis=1))
        time += missing / (still * rate).sum(axis=1)
    drawn_by_popularity = 1 - np.exp(-rate[None, :] * time[:, None])  # (answer, intent)
    uniform = sampled_negatives["uniform"] / (others - popularity)
    drawn = drawn_by_popularity + (1 - drawn_by_popularity) * uniform
    # An intent is not its own answer: one member less in its group.
    chance = (rate * many)[:, None] - np.diag(rate)
    return np.log((chance * drawn).sum(axis=0) / chance.sum(axis=0))[member]


def kb_correction(train_clicks: np.ndarray, listed: np.ndarray, sampled_negatives: dict) -> np.ndarray:
    """(KB,) in nats: log q(i) less its mean over the listed intents; 0 for an intent that no training list had.

    train_clicks  (KB,) counts in train, by which negatives were drawn (`log_inclusion`)
    listed        (KB,) bool: a candidate in some list that the ranker learnt from
    The score of an intent that was in no list comes from the unknown rows and its text: no log q of its own is in it,
    it is corrected by the mean of the listed ones [C]. Its own, of an intent without clicks, would rank it last.
    """
    log_q = log_inclusion(train_clicks, sampled_negatives)
    return np.where(listed, log_q - log_q[listed].mean(), 0.0) if listed.any() else np.zeros(len(log_q))


def correction_of(seen: Sequence[Lists], intents: int, sampled_negatives: dict | None) -> np.ndarray | None:
    """`kb_correction` of a run; None where logs say what was shown, and nothing is to be corrected.

    seen  train and dev, the lists of the train split: negatives were drawn by the clicks of both; learnt was train
    """
    if not sampled_negatives:
        return None
    listed = [listed_in(lists, intents) for lists in seen if lists.part == "train"]
    listed = np.logical_or.reduce([np.zeros(intents, bool), *listed])
    return kb_correction(clicks_of(seen, intents), listed, sampled_negatives)
