"""Sessions of a World, batch by batch, each from a generator of its own: users and hours first, then intent ->
columns, texts, lists, clicks, posterior."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rgalign.data.schema import PROBABILITIES, STRING
from rgalign.shopworld.tables import BATCH, DAY, DAYS, INTENT_IDS, KB, START, World, cumulative, draw, generator
from rgalign.shopworld.text import draw_texts, log_likelihood, words
from rgalign.shopworld.traffic import draw_lists, legacy_scores
from rgalign.shopworld.vocabulary import COLUMNS, INFORMATIVE, REGIONS, SEGMENTS, TEXT_COLUMNS, Column

SPLIT_OF_WEEK = np.array(["train"] * 4 + ["valid", "test"])


@dataclass(frozen=True, eq=False)
class Users:
    """Who comes: region, segment and habits stay with a user; `activity` is a user's share of the sessions."""

    region: np.ndarray  # (users,)
    segment: np.ndarray  # (users,)
    habits: dict[str, np.ndarray]  # value index of each `user` column (users,)
    activity: np.ndarray  # upper ends of the users' shares (users,)


def draw_users(world: World, users: int) -> Users:
    """All users of the world, once for all batches."""
    rng = generator(world.seed, "users")
    region, segment = (draw(np.asarray(shares), rng, users) for shares in (world.rules.regions, world.rules.segments))
    own = [column.name for column in COLUMNS if column.group == "user"]
    habits = {name: draw(world.columns[name], rng, users) for name in own}
    activity = rng.lognormal(sigma=world.rules.activity_spread, size=users)
    return Users(region, segment, habits, cumulative(activity / activity.sum()))


def draw_columns(
    columns: tuple[Column, ...], tables: dict[str, np.ndarray], causes: dict[str, np.ndarray], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Value indices of `columns`, -1 where missing, each (sessions,).

    causes  intent (sessions,), region where a table has it, and value indices that a user carries along
    """
    sessions, codes = len(causes["intent"]), {}
    for column in columns:
        table = tables[column.name]
        if column.name in causes:
            code = causes[column.name].copy()
        elif column.group in INFORMATIVE:
            code = draw(table, rng, causes["intent"])
        else:
            code = draw(table, rng, causes["region"] if len(table) > 1 else sessions)
        if column.missing:
            code[rng.random(sessions) < column.missing] = -1
        codes[column.name] = code
    return codes


def column_log_likelihood(tables: dict[str, np.ndarray], codes: dict[str, np.ndarray]) -> np.ndarray:
    """log P(columns | intent), up to what no intent changes: (sessions, KB)."""
    total = np.zeros((len(next(iter(codes.values()))), KB))
    for column in COLUMNS:
        if column.group in INFORMATIVE:
            by_value = np.vstack([np.log(tables[column.name].T), np.zeros(KB)])  # the last row, -1: missing
            total += by_value[codes[column.name]]
    return total


def posterior(log_joint: np.ndarray) -> np.ndarray:
    """P(intent | what is in `log_joint`) (sessions, KB)."""
    joint = np.exp(log_joint - log_joint.max(axis=1, keepdims=True))
    return joint / joint.sum(axis=1, keepdims=True)


def draw_timestamps(world: World, sessions: int) -> np.ndarray:
    """When the sessions are, in order: weeks by their traffic, evenly inside a week (sessions,) datetime64."""
    rng = generator(world.seed, "timestamps")
    traffic = np.asarray(world.rules.weekly_traffic)
    week = np.sort(draw(traffic / traffic.sum(), rng, sessions))
    seconds = rng.integers(7 * 86_400, size=sessions) + week * 7 * 86_400
    return START + np.sort(seconds).astype("timedelta64[s]")


def batches(
    world: World, *, sessions: int, users: int, left_out: Collection[int] = ()
) -> Iterator[tuple[pa.Table, pa.Table, pa.Table]]:
    """Sessions, impressions and truth of the world, in order of time, `BATCH` sessions at a time.

    left_out  numbers of batches that are not drawn: the others stay as they are
    """
    people, timestamps = draw_users(world, users), draw_timestamps(world, sessions)
    # P(intent | region, segment, day) (regions, segments, days, KB): 0 where the intent does not exist yet
    by_day = world.prior[:, :, None] * world.available(np.arange(DAYS))
    by_day /= by_day.sum(axis=-1, keepdims=True)
    for first in range(0, sessions, BATCH):
        if first // BATCH not in left_out:
            rng = generator(world.seed, "batch", first // BATCH)
            yield _batch(world, people, by_day, first, timestamps[first : first + BATCH], rng)


def _batch(
    world: World, people: Users, by_day: np.ndarray, first: int, timestamps: np.ndarray, rng: np.random.Generator
) -> tuple[pa.Table, pa.Table, pa.Table]:
    sessions = len(timestamps)
    user = np.searchsorted(people.activity, rng.random(sessions), side="right")
    region, segment, days = people.region[user], people.segment[user], (timestamps - START) // DAY
    intent = draw(by_day, rng, (region, segment, days))
    habits = {name: values[user] for name, values in people.habits.items()}
    codes = draw_columns(COLUMNS, world.columns, {"intent": intent, "region": region, **habits}, rng)
    texts = draw_texts(intent, world.texts, world.wordings, rng)
    available = world.available(days)
    scores = legacy_scores(world.prior, world.columns, codes)
    lists = draw_lists(intent, scores, available, world.attraction, world.rules, rng)

    log_prior = np.where(available, np.log(world.prior[region, segment]), -np.inf)
    discrete = log_prior + column_log_likelihood(world.columns, codes)
    everything = discrete + log_likelihood(texts, world.texts)
    session_id, positions = _ids("s", np.arange(first, first + sessions)), world.rules.positions
    table = {
        "session_id": session_id,
        "user_id": _ids("u", user),
        "timestamp": pa.array(timestamps),
        "region": words(REGIONS, region),
        "split": words(list(SPLIT_OF_WEEK), days // 7),
        "user_segment": words(SEGMENTS, segment),
    }
    for column in COLUMNS:
        values = pa.array(column.values, pa.int16() if column.kind == "numeric" else STRING)
        table[column.name] = values.take(pa.array(codes[column.name], mask=codes[column.name] < 0))
    table |= {name: getattr(texts, name) for name in TEXT_COLUMNS} | {"shuffled": pa.array(lists.shuffled)}
    impressions = {
        "session_id": session_id.take(pa.array(np.repeat(np.arange(sessions), positions))),
        "intent_id": words(INTENT_IDS, lists.candidates.ravel()),
        "position": pa.array(np.tile(np.arange(positions, dtype=np.int16), sessions)),
        "clicked": pa.array(lists.clicked.ravel().astype(np.int8)),
        "propensity": pa.array(lists.propensity.ravel()),
    }
    truth = {
        "session_id": session_id,
        "intent_id": words(INTENT_IDS, intent),
        "click_probability": _float_lists(lists.click_probability),
        "posterior_discrete": _float_lists(posterior(discrete)),
        "posterior": _float_lists(posterior(everything)),
    }
    return pa.table(table), pa.table(impressions), pa.table(truth)


def _ids(letter: str, numbers: np.ndarray) -> pa.Array:
    digits = pc.utf8_lpad(pa.array(numbers).cast(STRING), width=7, padding="0")
    return pc.binary_join_element_wise(pa.scalar(letter, STRING), digits, pa.scalar("", STRING))


def _float_lists(matrix: np.ndarray) -> pa.Array:
    offsets = np.arange(0, matrix.size + 1, matrix.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(matrix.astype(np.float32).ravel())).cast(PROBABILITIES)
