"""The reasoner against peers, measured side by side in one run; rows as in `benchmarks`, which says what they mean.

The model is a random tiny one on the CPU, in float32: speed does not depend on what a model has learnt. Both sides run
in this process, on torch's threads as the caller has set them, in turns; the quickest of the rounds counts.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd

from benchmarks.peers import MISSING, installed, row
from rgalign.params_schema import Reasoner as Settings
from rgalign.reasoner import verbalize
from rgalign.reasoner.embed import embed
from rgalign.reasoner.generate import sample
from rgalign.reasoner.model import Reasoner, save, tiny
from rgalign.reasoner.prompts import INSTRUCTION, Prompter, prompter, shown_features
from rgalign.reasoner.tiny import build_tokenizer, count_words
from rgalign.seeding import seeded
from rgalign.shopworld import world

ENCODER, GENERATOR = "sentence-transformers", "transformers"  # packages
ENCODER_BATCHES = (32, 8)  # texts: its default, and what is quickest on a CPU for the lengths measured here
GENERATOR_TOKENS = 4_096  # a batch's cache; the quickest of 2,048 to 16,384 on a CPU
TOLERANCE = 1e-4  # of a vector's entry, absolute
TOKENS_APART = 0.05  # most by which the numbers of tokens written may differ


@dataclass(frozen=True)
class Task:
    """A model, its prompter, and training sessions of the shop whose words it knows, no two with the same prompt."""

    reasoner: Reasoner
    prompter: Prompter
    sessions: pd.DataFrame


@dataclass(frozen=True)
class _Timed:
    """seconds: of the quickest round; result: of the last. Of a peer that is not installed: NaN and None."""

    seconds: float = math.nan
    result: np.ndarray | None = None


def small_task(
    *, hidden: int = 256, layers: int = 4, sessions: int = 3_000, seed: int = 0, instruction: str = INSTRUCTION
) -> Task:
    """A random model of this size and the prompts of a ShopWorld of so many sessions, under this instruction.

    Its vocabulary holds every word of the prompts, so that a prompt as text is tokenised into the same ids.
    """
    settings = Settings(instruction=instruction)
    shop = world.generate(seed=seed, sessions=sessions, users=max(20, sessions // 3), transcripts=500)
    train, features = shop.sessions[shop.sessions["split"] == "train"], shown_features(None, shop.meta)
    read = {"intents": shop.intents, "sessions": train, "transcripts": shop.transcripts}
    counts = count_words(features=features, kinds=shop.kinds, **read)
    words = build_tokenizer(counts + Counter(verbalize.compact_text(instruction).split()), min_count=1)
    reasoner = tiny(words, hidden=hidden, layers=layers, seed=seed)
    put = prompter(settings, shop.meta, shop.intents, words)
    return Task(reasoner, put, train[~pd.Series(map(tuple, put.sessions(train))).duplicated().to_numpy()])


def embedding_rows(task: Task, *, prompts: int = 300, texts: int = 200, seed: int = 0, rounds: int = 3) -> list[dict]:
    """Texts a second from session to vector and from text to vector, against SentenceTransformer.encode.

    prompts  sessions: ours verbalises, tokenises and embeds them, the instruction's tokens once for all; the peer is
             given the prompts as text, and tokenises and embeds
    texts    of 4 to 200 random words, lengths log-uniform: both tokenise and embed; nothing is shared
    No two texts are equal, so that ours gains nothing from encoding equal ones once. The peer is the same model with
    last-token pooling; it has a row for each of ENCODER_BATCHES. equal: the vectors agree to 1e-4, absolute.
    """
    reasoner, put = task.reasoner, task.prompter
    frame = task.sessions[:prompts]
    ids = put.sessions(frame)
    asked = [" ".join(reasoner.tokenizer.convert_ids_to_tokens(prompt)) for prompt in ids]
    free = _texts(reasoner, texts, seed)

    def embed_sessions() -> np.ndarray:
        return embed(reasoner, put.sessions(frame), prefix=len(put.head), progress=False)

    def embed_texts() -> np.ndarray:
        return embed(reasoner, reasoner.tokenizer(free)["input_ids"], progress=False)

    shared = f"{len(put.head)} of {np.mean([len(prompt) for prompt in ids]):.0f} tokens shared"
    encode = _encoder(reasoner) if installed(ENCODER) else None
    return [
        *_embedding_rows(f"embedding {len(ids):,} prompts, {shared}", embed_sessions, encode, asked, rounds),
        *_embedding_rows(f"embedding {texts:,} texts of 4 to 200 tokens", embed_texts, encode, free, rounds),
    ]


def sampling_rows(
    task: Task, *, prompts: int = 24, samples: int = 8, max_new_tokens: int = 24, seed: int = 0, rounds: int = 3
) -> list[dict]:
    """Queries a second: `sample`, which runs a prompt once for all its samples, against transformers' generate.

    generate: num_return_sequences=samples, prompts padded on the left, the longest first, as many a batch as are
    quickest for it; both draw from the whole distribution at temperature 1 and end with texts. Ours gives
    log-probabilities and counts as well, which the peer is not asked for. The longer a prompt is against its queries,
    the higher the ratio.
    equal: as many queries from the same prompts, and as many tokens to within 5%. A random model ends at about one
    token in a thousand: nearly all queries are of max_new_tokens, and no side is quick because it stopped early.
    """
    ids, found = task.prompter.sessions(task.sessions[:prompts]), installed(GENERATOR)
    put = {"samples": samples, "max_new_tokens": max_new_tokens, "seed": seed}

    def ours() -> np.ndarray:
        written = sample(task.reasoner, task.prompter, ids, progress=False, **put)
        return np.array([written["count"].sum(), (written["count"] * written["tokens"]).sum()])

    own, *other = _in_turns([ours, *([partial(_generate, task.reasoner, ids, **put)] if found else [])], rounds)
    (theirs,) = other or [_Timed()]
    equal = None
    if found:
        (queries, tokens), (their_queries, their_tokens) = own.result, theirs.result
        equal = bool(queries == their_queries and abs(tokens / their_tokens - 1) <= TOKENS_APART)
    name, count = f"sampling {samples} queries for each of {len(ids)} prompts", len(ids) * samples
    rates = count / own.seconds, count / theirs.seconds
    return [row(name, "transformers generate", found or MISSING, *rates, "queries/s", equal)]


def _embedding_rows(
    name: str, ours: Callable[[], np.ndarray], encode: Callable | None, texts: Sequence[str], rounds: int
) -> list[dict]:
    """A row for each of ENCODER_BATCHES. encode: the peer's, None where it is not installed."""
    peers = [partial(encode, texts, batch_size=size) for size in ENCODER_BATCHES] if encode else []
    own, *others = _in_turns([ours, *peers], rounds)
    found, rows = installed(ENCODER) or MISSING, []
    for size, other in zip(ENCODER_BATCHES, others or [_Timed()] * len(ENCODER_BATCHES), strict=True):
        equal = None if other.result is None else bool(np.abs(own.result - other.result).max() <= TOLERANCE)
        rates = len(texts) / own.seconds, len(texts) / other.seconds
        rows.append(row(name, f"SentenceTransformer.encode (batches of {size})", found, *rates, "texts/s", equal))
    return rows


def _encoder(reasoner: Reasoner) -> Callable[..., np.ndarray]:
    """encode of a SentenceTransformer of this very model, read from its folder: texts to (texts, hidden)."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer  # where both 5 and 6 have them

    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        save(reasoner, folder)
        parts = [Transformer(str(folder)), Pooling(reasoner.hidden_size, pooling_mode="lasttoken")]
        return partial(SentenceTransformer(modules=parts, device="cpu").encode, show_progress_bar=False)


def _generate(
    reasoner: Reasoner, prompts: list[list[int]], *, samples: int, max_new_tokens: int, seed: int
) -> np.ndarray:
    """(queries, their tokens with the end token) that generate writes; decoded to texts, as `sample` gives them."""
    words, ordered = reasoner.tokenizer, sorted(prompts, key=len, reverse=True)
    size = max(1, GENERATOR_TOKENS // (samples * (len(ordered[0]) + max_new_tokens)))
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_return_sequences": samples}
    queries = tokens = 0
    with seeded(seed):
        for start in range(0, len(ordered), size):
            batch = words.pad({"input_ids": ordered[start : start + size]}, padding_side="left", return_tensors="pt")
            written = reasoner.model.generate(**batch, **how, max_new_tokens=max_new_tokens)
            written = written[:, batch["input_ids"].shape[1] :]
            queries += len(words.batch_decode(written, skip_special_tokens=True))
            tokens += int((written != words.pad_token_id).sum())  # the tiny tokenizer's pad is not its end token
    return np.array([queries, tokens])


def _texts(reasoner: Reasoner, count: int, seed: int) -> list[str]:
    """Random words of the vocabulary, special tokens left out; lengths from 4 to 200, log-uniform."""
    rng = np.random.default_rng(seed)
    known, special = range(len(reasoner.tokenizer)), set(reasoner.tokenizer.all_special_ids)
    words = reasoner.tokenizer.convert_ids_to_tokens([i for i in known if i not in special])
    lengths = np.exp(rng.uniform(np.log(4), np.log(200), count)).round().astype(int)
    return [" ".join(rng.choice(words, length)) for length in lengths]


def _in_turns(sides: Sequence[Callable[[], np.ndarray]], rounds: int) -> list[_Timed]:
    """Each side once a round, so that a busy moment of the machine falls on all of them."""
    seconds: list[list[float]] = [[] for _ in sides]
    results = [None] * len(sides)
    for _ in range(rounds):
        for side, work in enumerate(sides):
            started = time.perf_counter()
            results[side] = work()
            seconds[side].append(time.perf_counter() - started)
    return [_Timed(min(spent), result) for spent, result in zip(seconds, results, strict=True)]
