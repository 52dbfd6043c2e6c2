"""Sessions of a World, batch by batch, each from a generator of its own: users and hours first, then intent ->
columns, texts, lists, clicks, posterior."""

from collections.abc import Collection, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rgalign.data.schema import PROBABILITIES, STRING
from rgalign.shopworld.tables import BATCH, DAY, INTENT_IDS, KB, START, World, cumulative, draw, generator, softmax
from rgalign.shopworld.text import draw_texts, log_likelihood, words
from rgalign.shopworld.traffic import draw_lists, legacy_scores
from rgalign.shopworld.vocabulary import COLUMNS, INFORMATIVE, REGIONS, SEGMENTS, TEXT_COLUMNS, Column

SPLIT_OF_WEEK = np.array(["train"] * 4 + ["valid", "test"])
WEEK = 7 * 86_400  # seconds


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


def batches(
    world: World, *, sessions: int, users: int, left_out: Collection[int] = ()
) -> Iterator[tuple[pa.Table, pa.Table, pa.Table]]:
    """Sessions, impressions and truth of the world, in order of time, `BATCH` sessions at a time.

    left_out  numbers of batches that are not drawn: the others stay as they are
    """
    rules, rng = world.rules, generator(world.seed, "users")
    shares = {"region": np.asarray(rules.regions), "segment": np.asarray(rules.segments)}
    shares |= {column.name: world.columns[column.name] for column in COLUMNS if column.group == "user"}
    people = {name: draw(table, rng, users) for name, table in shares.items()}  # what stays with a user (users,)
    activity = rng.lognormal(sigma=rules.activity_spread, size=users)
    activity = cumulative(activity / activity.sum())  # upper ends of the users' shares of the sessions
    rng, traffic = generator(world.seed, "timestamps"), np.asarray(rules.weekly_traffic)
    week = np.sort(draw(traffic / traffic.sum(), rng, sessions))
    seconds = np.sort(rng.integers(WEEK, size=sessions) + week * WEEK)  # evenly inside a week
    timestamps = START + seconds.astype("timedelta64[s]")
    by_day = world.prior_by_day()
    for first in range(0, sessions, BATCH):
        if first // BATCH not in left_out:
            rng = generator(world.seed, "batch", first // BATCH)
            yield _batch(world, people, activity, by_day, first, timestamps[first : first + BATCH], rng)


def _batch(
    world: World,
    people: dict[str, np.ndarray],
    activity: np.ndarray,
    by_day: np.ndarray,
    first: int,
    timestamps: np.ndarray,
    rng: np.random.Generator,
) -> tuple[pa.Table, pa.Table, pa.Table]:
    sessions, days = len(timestamps), (timestamps - START) // DAY
    user = np.searchsorted(activity, rng.random(sessions), side="right")
    who = {name: values[user] for name, values in people.items()}
    region, segment = who["region"], who["segment"]
    intent = draw(by_day, rng, (region, segment, days))
    codes = draw_columns(COLUMNS, world.columns, {"intent": intent, **who}, rng)
    texts = draw_texts(intent, world.texts, world.wordings, rng)
    available = world.available(days)
    lists = draw_lists(world, intent, legacy_scores(world, codes), available, rng)

    # log P(intent, columns) and log P(intent, columns, texts), up to what no intent changes (sessions, KB)
    discrete = np.zeros((sessions, KB))
    for column in (column for column in COLUMNS if column.group in INFORMATIVE):
        by_value = np.vstack([np.log(world.columns[column.name].T), np.zeros(KB)])  # the last row, -1: missing
        discrete += by_value[codes[column.name]]
    discrete = np.where(available, np.log(world.prior[region, segment]), -np.inf) + discrete
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
        "posterior_discrete": _float_lists(softmax(discrete)),
        "posterior": _float_lists(softmax(everything)),
    }
    return pa.table(table), pa.table(impressions), pa.table(truth)


def _ids(letter: str, numbers: np.ndarray) -> pa.Array:
    digits = pc.utf8_lpad(pa.array(numbers).cast(STRING), width=7, padding="0")
    return pc.binary_join_element_wise(pa.scalar(letter, STRING), digits, pa.scalar("", STRING))


def _float_lists(matrix: np.ndarray) -> pa.Array:
    offsets = np.arange(0, matrix.size + 1, matrix.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(matrix.astype(np.float32).ravel())).cast(PROBABILITIES)
