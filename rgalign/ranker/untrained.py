"""Models that need no training: a trained ranker that does not beat the best of them has learnt nothing useful.

popularity    how often an intent was clicked in train: every session gets the same scores
word_overlap  cosine of the TF-IDF of a session's text and an intent's text
raw_cosine    cosine of the vectors that the encoder or LM makes of both: not whitened, no tower
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.feature_extraction.text import TfidfVectorizer

from rgalign.data import tables, vectors
from rgalign.data.lists import Intents, Lists
from rgalign.data.vectors import Vectors
from rgalign.params_schema import Untrained
from rgalign.ranker.fit import refuse_other_parts
from rgalign.reasoner import verbalize

PROMPT, TEXT = "prompt", "text"  # sets of vectors: whole prompts and KB entries; text columns alone and titles alone
SMOOTHING = 0.5  # added to every count of clicks, so that an intent never clicked has a finite score [C]
# Train sessions that word frequencies are counted on, and that a mean vector is taken over. More would change little:
# a word of one session in 1,000 has its idf to a tenth, a mean is off by 2 % of the vectors' spread [C].
COUNTED, AVERAGED = 100_000, 2_000
ROWS_AT_ONCE = 4_096  # a sparse product takes three times the memory of the dense scores that it becomes
DECIMALS = 6  # so that ties do not depend on the order of a sum


@dataclass(frozen=True, eq=False)
class Known:
    """The sessions of one part, and what the models read of them.

    lists, intents  the sessions to rank for, and the KB
    log_clicks      (intents,) log(clicks in train + SMOOTHING)
    session_texts   (lists,);  intent_texts  (intents,)
    corpus          texts that word frequencies are counted on: of the KB and of train's sessions, none later
    session_vectors (lists, dim), intent_vectors (intents, dim): float32; zero where there is no text to compare
    """

    lists: Lists
    intents: Intents
    log_clicks: np.ndarray
    session_texts: Sequence[str]
    intent_texts: Sequence[str]
    corpus: Sequence[str]
    session_vectors: np.ndarray
    intent_vectors: np.ndarray

    @classmethod
    def of(
        cls,
        folder: Path,
        lists: Lists,
        train: Lists,
        intents: Intents,
        *,
        columns: Sequence[str],
        settings: Untrained,
        kind: str,
        embeddings: Path,
        more: Mapping[str, Vectors] | None = None,
    ) -> "Known":
        """From a run's tables and vectors, for the sessions of `lists` (valid or test).

        folder      the data set's tables;  columns  feature columns that a prompt shows;  kind  of the reasoner
        embeddings  folder/<set of vectors>/sessions and intents, of train and valid;  more  of test, by set
        """
        refuse_other_parts("untrained", train=train)
        shop = tables.excerpt(folder, columns, splits=("train", lists.part))
        own = shop.sessions.set_index("session_id", drop=False).loc[list(lists.session_id)]
        before, old = _train(shop.sessions), known_in_train(shop.sessions, shop.intents)
        compared = _compared_columns(settings.word_overlap.session, columns, shop.kinds)
        intent_texts = _intent_texts(shop.intents, settings.word_overlap.intent)
        corpus = [text for text, is_old in zip(intent_texts, old, strict=True) if is_old]
        titles = dict(zip(shop.intents["intent_id"], shop.intents["title"].fillna(""), strict=True))
        corpus += session_texts(_evenly_spaced(before, COUNTED), compared, shop.kinds, titles)
        sets = vector_sets(settings, kind, columns, shop.kinds)
        given = (more or {}).get(sets[0])
        of_sessions = vectors.load(embeddings / sets[0] / "sessions") if given is None else given
        sessions = of_sessions.rows(lists.session_id).astype(np.float32)
        kb = vectors.load(embeddings / sets[1] / "intents").rows(shop.intents["intent_id"]).astype(np.float32)
        if settings.raw_cosine.centred:
            averaged = _evenly_spaced(before, AVERAGED)["session_id"].tolist()
            in_train = vectors.load(embeddings / sets[0] / "sessions").rows(averaged)
            sessions -= in_train.astype(np.float32).mean(axis=0)
            kb -= (kb[old] if old.any() else kb).mean(axis=0)
        read = columns if sets[0] == PROMPT else _compared_columns(TEXT, columns, shop.kinds)
        sessions[[not text for text in session_texts(own, read, shop.kinds, titles)]] = 0
        return cls(
            lists, intents, log_clicks(train, intents), session_texts(own, compared, shop.kinds, titles),
            intent_texts, corpus, sessions, kb,
        )  # fmt: skip


def popularity(known: Known) -> np.ndarray:
    """(lists, intents) log of the clicks in train, the same for every session."""
    return np.broadcast_to(known.log_clicks, (len(known.lists), len(known.intents)))


def word_overlap(known: Known) -> np.ndarray:
    """(lists, intents) cosine of the TF-IDF of the session's and the intent's words."""
    return tfidf_cosine(known.session_texts, known.intent_texts, known.corpus)


def raw_cosine(known: Known) -> np.ndarray:
    """(lists, intents) cosine of the session's and the intent's vectors."""
    return cosine(known.session_vectors, known.intent_vectors)


UNTRAINED: dict[str, Callable[[Known], np.ndarray]] = {
    "popularity": popularity,
    "word_overlap": word_overlap,
    "raw_cosine": raw_cosine,
}


def log_clicks(train: Lists, intents: Intents, *, smoothing: float = SMOOTHING) -> np.ndarray:
    """(intents,) float32: clicks of train, not clicks per impression: what is shown often is shown for a reason [C].

    Raises ValueError for lists of another part.
    """
    refuse_other_parts("popularity", train=train)
    clicked = train.candidates[train.clicked].long().cpu()
    return (torch.bincount(clicked, minlength=len(intents)) + smoothing).log().numpy()


def tfidf_cosine(sessions: Sequence[str], intents: Sequence[str], corpus: Sequence[str]) -> np.ndarray:
    """(sessions, intents) float32 in 0..1; a text without a word of the corpus has zeros: it prefers no intent.

    Single words, 1 + log(count) times the idf of `corpus` [C]: pairs of words changed nothing on valid of four public
    sets, and idf of the KB alone lost a quarter of the Recall@3 over the KB (govuk2021).
    """
    scores = np.zeros((len(sessions), len(intents)), np.float32)
    if not any(map(verbalize.words_of, corpus)):
        return scores
    counted = TfidfVectorizer(analyzer=verbalize.words_of, sublinear_tf=True, dtype=np.float64).fit(corpus)
    kb = counted.transform(intents).T
    for first in range(0, len(sessions), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        scores[rows] = (counted.transform(sessions[rows]) @ kb).toarray().round(DECIMALS)
    return scores


def cosine(sessions: np.ndarray, intents: np.ndarray) -> np.ndarray:
    """(sessions, intents) float32 in -1..1 of vectors (sessions, dim) and (intents, dim); 0 where one is zero."""
    wide = [values.astype(np.float32) for values in (sessions, intents)]
    one, other = (values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12) for values in wide)
    return (one @ other.T).round(DECIMALS)


def vector_sets(settings: Untrained, kind: str, columns: Sequence[str], kinds: Mapping[str, str]) -> tuple[str, str]:
    """The sets of vectors of sessions and of intents that raw_cosine reads. Arguments: see `Known.of`.

    An empty `session`: an encoder reads the text columns alone, as it was trained to; an LLM's prompts are embedded
    already [C]. Without text columns: the prompt.
    """
    has_text = any(kinds[name] == "text" for name in columns)
    session = TEXT if has_text and _cosine_session(settings, kind) == TEXT else PROMPT
    return session, TEXT if settings.raw_cosine.intent == "title" else PROMPT


def reads(settings: Untrained, kind: str, columns: Sequence[str], kinds: Mapping[str, str]) -> pd.DataFrame:
    """What each model compares, in words: a table for a notebook. Arguments: see `Known.of`."""
    texts = [name for name in columns if kinds[name] == "text"]
    rows = {}
    for name, asked in (
        ("word_overlap", settings.word_overlap.session),
        ("raw_cosine", _cosine_session(settings, kind)),
    ):
        whole = "the whole prompt" + (" (no column is text)" if asked == TEXT else "")
        rows[name] = {
            "of a session": ", ".join(texts) if asked == TEXT and texts else whole,
            "of an intent": getattr(settings, name).intent.replace("_", " "),
        }
    return pd.DataFrame(rows).T


def to_embed(sessions: pd.DataFrame, name: str) -> pd.DataFrame:
    """The sessions of train and valid that notebook 02 embeds for a set of vectors: of TEXT valid and, for the mean,
    some of train; of any other all."""
    if name != TEXT:
        return sessions
    chosen = _evenly_spaced(_train(sessions), AVERAGED)["session_id"]
    return sessions[(sessions["split"] != "train") | sessions["session_id"].isin(chosen)]


def known_in_train(sessions: pd.DataFrame, intents: pd.DataFrame) -> np.ndarray:
    """(intents,) bool: the intent was in the KB at train's last session; without dates all were."""
    last = _train(sessions)["timestamp"].max()
    if pd.isna(last):
        return np.ones(len(intents), bool)
    since = intents["valid_from"].to_numpy(dtype="datetime64[us]", na_value=np.datetime64("NaT"))
    return ~(since > np.datetime64(last, "us"))


def session_texts(
    frame: pd.DataFrame, columns: Sequence[str], kinds: Mapping[str, str], titles: Mapping[str, str]
) -> list[str]:
    """The values of these columns in one line, as in a prompt; a text without its column's name."""
    rows = verbalize.Serialiser("lines", titles).sessions(frame, columns, kinds)
    # without its column's name `yes` means nothing, while a text speaks for itself
    values = [[(f.prefix if f.kind != "text" else "", *f.units, " ") for f in row] for row in rows]
    return ["".join(part for value in row for part in value) for row in values]


def _intent_texts(intents: pd.DataFrame, compared: str) -> list[str]:
    chosen = intents.assign(description=None) if compared == "title" else intents
    rows = verbalize.Serialiser("lines").intents(chosen)
    return [" ".join(unit for field in row for unit in field.units) for row in rows]


def _cosine_session(settings: Untrained, kind: str) -> str:
    """What raw_cosine reads of a session, whether or not a column is text."""
    return settings.raw_cosine.session or (TEXT if kind == "encoder" else PROMPT)


def _compared_columns(session: str, columns: Sequence[str], kinds: Mapping[str, str]) -> list[str]:
    """The columns that are compared; all of them where none is text."""
    texts = [name for name in columns if kinds[name] == "text"]
    return texts if session == TEXT and texts else list(columns)


def _train(sessions: pd.DataFrame) -> pd.DataFrame:
    return sessions[sessions["split"] == "train"]


def _evenly_spaced(rows: pd.DataFrame, most: int) -> pd.DataFrame:
    """At most so many rows, evenly spaced: those of all weeks, the same ones in every call."""
    return rows.iloc[np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int))] if len(rows) else rows
