"""Chats of eight other shops: what a general-purpose language model has read instead of this shop's chats.

In proportion to `distance` [C] their intents and columns follow fresh tables, half of their columns carry the names and
codes of a foreign system, and half of all concepts are worded with words that are rare here; in version 2 [C] their
event texts also have another grammar and other words, and mention other things. At distance 0 the versions are equal.
"""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rgalign.data.schema import STRING
from rgalign.shopworld.sessions import draw_columns
from rgalign.shopworld.tables import ISSUE, OBJECT, TextTables, World, column_tables, draw, generator, prior_table
from rgalign.shopworld.text import any_of, draw_texts, join, words
from rgalign.shopworld.vocabulary import (
    BRANDS,
    COLUMNS,
    ELSEWHERE_CLAUSES,
    GREETINGS,
    ISSUES,
    ITEMS,
    LOOKS,
    PROMPT_COLUMNS,
    TEXT_COLUMNS,
    THINGS,
    VAGUE,
)

SHOPS = 8
VAGUE_SHARE, UNRELATED_SHARE, OTHER_TASK_SHARE = 0.25, 0.08, 0.07
MAP = pa.map_(pa.string(), pa.string())
PROMPT = tuple({column.name: column for column in COLUMNS}[name] for name in PROMPT_COLUMNS)
# Question about an intent = greeting, beginning of the question, the customer's word for the object, its end.
QUESTIONS = [question.split("{}") for issue in ISSUES for question in issue.asked]


@dataclass(frozen=True, eq=False)
class Shop:
    prior: np.ndarray  # P(intent) (KB,)
    columns: dict[str, np.ndarray]  # tables of the prompt's columns
    foreign: np.ndarray  # which of them have foreign names (prompt columns,) bool
    texts: TextTables  # what its texts mention
    way: int  # which of ELSEWHERE_CLAUSES is its own,
    share: float  # and what share of its event texts has it


def draw_transcripts(world: World, *, rows: int, distance: float) -> pa.Table:
    """Columns `features` (name -> value in the order of the prompt) and `typed_query`; shops in random order."""
    rng, wordings = generator(world.seed, "their wordings"), {}
    # Half of all concepts in words that are rare here; the same half in all shops, or it would average out.
    for part in ("thing", "issue", "state"):
        own = world.wordings[part]
        ranks = own.argsort(axis=1).argsort(axis=1)
        usual_is_rare = np.sort(own, axis=1)[np.arange(len(own))[:, None], own.shape[1] - 1 - ranks]
        changed = (rng.random(len(own)) < 0.5)[:, None]
        wordings[part] = np.where(changed, (1 - distance) * own + distance * usual_is_rare, own)
    parts = []
    for number in range(SHOPS):
        rng = generator(world.seed, "shop", number)
        of_texts = generator(world.seed, "texts of shop", number)
        shop = _draw_shop(world, distance, rng, of_texts)
        parts.append(_chats(shop, wordings, rows // SHOPS + (number < rows % SHOPS), rng, of_texts))
    order = generator(world.seed, "order of transcripts").permutation(rows)
    return pa.concat_tables(parts).combine_chunks().take(pa.array(order))


def _draw_shop(world: World, distance: float, rng: np.random.Generator, of_texts: np.random.Generator) -> Shop:
    def mixed(own: np.ndarray, fresh: np.ndarray) -> np.ndarray:
        return (1 - distance) * own + distance * fresh

    prior = mixed(world.prior.mean(axis=(0, 1)), prior_table(rng, world.rules).mean(axis=(0, 1)))
    fresh = column_tables(PROMPT, rng, world.rules)
    columns = {name: mixed(world.columns[name], table) for name, table in fresh.items()}
    # Drawn at every distance, so that a column foreign at one distance is so at every larger one.
    candidate = rng.permutation(len(PROMPT)) < len(PROMPT) // 2
    foreign = candidate & (rng.random(len(PROMPT)) < distance)
    way, texts, share = int(of_texts.integers(len(ELSEWHERE_CLAUSES))), world.texts, 0.0
    if world.version > 1:
        fresh, share = TextTables.drawn(of_texts, world.rules, reordered=True), distance
        tables = {name: mixed(getattr(texts, name), getattr(fresh, name)) for name in ("active", "page", "item")}
        texts = replace(texts, **tables)
    return Shop(prior, columns, foreign, texts, way, share)


def _chats(
    shop: Shop, wordings: dict[str, np.ndarray], rows: int, rng: np.random.Generator, of_texts: np.random.Generator
) -> pa.Table:
    intent = draw(shop.prior, rng, rows)
    codes = draw_columns(PROMPT, shop.columns, {"intent": intent}, rng)
    # Drawn at every distance, so that a text with another shop's clauses at one distance has them at every larger one.
    texts = draw_texts(intent, shop.texts, wordings, rng, of_texts.random(rows) < shop.share, shop.way)
    kind = rng.random(rows)
    vague, other_task = kind < VAGUE_SHARE, pa.array(kind >= 1 - OTHER_TASK_SHARE)
    unrelated = ~vague & (kind < VAGUE_SHARE + UNRELATED_SHARE)
    asked = _questions(np.where(unrelated, draw(shop.prior, rng, rows), intent), rng)
    # another task of such models: the beginning of an item title, and how it goes on
    brand, look, item = (any_of(choices, rows, rng) for choices in (BRANDS, LOOKS, ITEMS))
    typed = pc.if_else(pa.array(vague), any_of(VAGUE, rows, rng), asked)
    typed = pc.if_else(other_task, item, typed)
    title = pc.if_else(other_task, join(brand, look), texts.item_title)
    features = _features(shop, codes, [title, texts.help_page, texts.event_text], other_task.to_numpy(False))
    return pa.table({"features": features, "typed_query": typed})


def _questions(intents: np.ndarray, rng: np.random.Generator) -> pa.Array:
    """What customers with these intents type: usual and rare words for the object, any of the issue's questions."""
    each = len(ISSUES[0].asked)
    question = ISSUE[intents] * each + rng.integers(each, size=len(intents))
    word = OBJECT[intents] * 4 + draw(np.array([0.5, 0.27, 0.15, 0.08]), rng, len(intents))
    thing = words([word for thing in THINGS for word in thing.asked], word)
    greeting = any_of(GREETINGS, len(intents), rng)
    begin, end = (words([question[side] for question in QUESTIONS], question) for side in (0, 1))
    return pc.utf8_trim_whitespace(join(greeting, join(begin, thing, end, separator="")))


def _features(shop: Shop, codes: dict[str, np.ndarray], texts: list[pa.Array], only_title: np.ndarray) -> pa.Array:
    """The map column. One dictionary of all strings, this batch's texts at its end, and an index into it per entry."""
    names, values, index = [], [], []
    for column, foreign in zip(PROMPT, shop.foreign, strict=True):
        code = codes[column.name]
        index.append(np.where((code < 0) | only_title, -1, code + len(values)))
        abbreviation = "".join(part[:3] for part in column.name.split("_"))
        names.append(f"{abbreviation}_code" if foreign else column.name)
        values += [f"{abbreviation}{k}" if foreign else str(value) for k, value in enumerate(column.values)]
    rows = len(only_title)
    for number, (name, text) in enumerate(zip(TEXT_COLUMNS, texts, strict=True)):
        empty = pc.is_null(text).to_numpy(zero_copy_only=False) | (only_title & (name != "item_title"))
        index.append(np.where(empty, -1, np.arange(rows) + len(values) + number * rows))
        names.append(name)
    entries = np.stack(index, axis=1)
    present = entries >= 0
    strings = pa.concat_arrays([pa.array(values, STRING), *texts]).cast(pa.string())
    keys = pa.array(names).take(pa.array(np.nonzero(present)[1]))
    offsets = np.concatenate([[0], np.cumsum(present.sum(axis=1))]).astype(np.int32)
    return pa.MapArray.from_arrays(pa.array(offsets), keys, strings.take(pa.array(entries[present]))).cast(MAP)
