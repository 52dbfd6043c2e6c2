"""Match terms: scores of a session and an intent that compare the two before any tower is trained (METHOD.md 2.2 [C]).

word_overlap  cosine of the TF-IDF of a session's text and an intent's text: no language model
raw_cosine    cosine of the vectors that the encoder or LM makes of both: not whitened, no tower
memory        what train's sessions with a near vector clicked, per impression
written_overlap, written_cosine   the same two of the queries that the reasoner writes for a session

A ranker combines those of ranker.match with few learnt weights (layers.MatchTerms). The first two, and popularity, are
the models without training that every ranker has to beat. ranker.match_terms has the terms themselves.

tables/match/<term>.safetensors   what the terms learnt from train: no ids are in it
             <part>.safetensors   their values for the lists of a part, row by row as encoded
tables/aligned_embeddings/match   the same over the vectors after the alignment
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from scipy.sparse import csr_array, eye_array

from rgalign.data import tables, vectors
from rgalign.data.features import Rows, column_of
from rgalign.data.lists import Intents, Lists, Match, with_match
from rgalign.data.vectors import Vectors
from rgalign.errors import UserError
from rgalign.params_schema import Untrained
from rgalign.params_training import Ranker
from rgalign.ranker.fit import refuse_other_parts, with_click
from rgalign.ranker.match_terms import MATCH_TERMS, KnowledgeBase, Learnt, Sessions, Term, Values, of_written
from rgalign.reasoner import verbalize
from rgalign.reasoner import written as writing
from rgalign.reasoner.written import SessionQueries, WrittenQueries
from rgalign.run.artifacts import atomic

PROMPT, TEXT = "prompt", "text"  # sets of vectors: whole prompts and KB entries; text columns alone and titles alone
WRITTEN = "written"  # the queries written for sessions, with their vectors (reasoner.written)
WITHOUT_TRAINING = ("word_overlap", "raw_cosine")  # terms that are models of their own as well
SMOOTHING = 0.5  # added to every count of clicks, so that an intent never clicked has a finite score [C]
# Train sessions that word frequencies are counted on, and that a mean vector is taken over. More would change little:
# a word of one session in 1,000 has its idf to a tenth, a mean is off by 2 % of the vectors' spread [C].
COUNTED, AVERAGED = 100_000, 2_000


class MatchError(UserError, ValueError):
    """A folder does not hold the match terms asked for."""


Places = Callable[[str], Path]  # set of vectors -> folder with sessions/ and intents/; WRITTEN -> its folder
OfSet = Callable[[str], Vectors | WrittenQueries]  # set of vectors -> those of the sessions; WRITTEN -> their queries


@dataclass(frozen=True)
class Compared:
    """What of a session and an intent a run's terms compare (evaluation.untrained).

    kind     reasoner.compares;  columns  feature columns that a prompt shows;  kinds  feature column -> kind
    """

    settings: Untrained
    kind: str
    columns: Sequence[str]
    kinds: Mapping[str, str]

    @property
    def vector_sets(self) -> tuple[str, str]:
        """The sets of vectors of sessions and of intents that raw_cosine reads. Without text columns: the prompt. A
        reader beside the LLM has made the set TEXT alone."""
        if self.kind == "reader":
            return TEXT, TEXT
        has_text = any(self.kinds[name] == "text" for name in self.columns)
        session = TEXT if has_text and self._cosine_session == TEXT else PROMPT
        return session, TEXT if self.settings.raw_cosine.intent == "title" else PROMPT

    def reads(self) -> pd.DataFrame:
        """What each term compares, in words: a table for a notebook."""
        texts, rows = [name for name in self.columns if self.kinds[name] == "text"], {}
        for name, asked in (
            ("word_overlap", self.settings.word_overlap.session),
            ("raw_cosine", self._cosine_session),
        ):
            whole = "the whole prompt" + (" (no column is text)" if asked == TEXT else "")
            rows[name] = {
                "of a session": ", ".join(texts) if asked == TEXT and texts else whole,
                "of an intent": self._intent(name).replace("_", " "),
            }
        return pd.DataFrame(rows).T

    def words(self, frame: Rows, titles: Mapping[str, str]) -> list[str]:
        """The words of sessions that word_overlap compares. titles: intent_id -> title, for histories."""
        return session_texts(frame, self._columns(self.settings.word_overlap.session), self.kinds, titles)

    def is_read(self, frame: Rows, titles: Mapping[str, str]) -> np.ndarray:
        """(rows,) bool: there is something that the session's vector of raw_cosine stands for."""
        columns = self.columns if self.vector_sets[0] == PROMPT else self._columns(TEXT)
        return np.array([bool(text) for text in session_texts(frame, columns, self.kinds, titles)], bool)

    def of_intents(self, intents: pd.DataFrame) -> list[str]:
        """The words of intents that word_overlap compares."""
        title = self.settings.word_overlap.intent == "title"
        rows = verbalize.Serialiser("lines").intents(intents.assign(description=None) if title else intents)
        return [" ".join(unit for field in row for unit in field.units) for row in rows]

    @property
    def _cosine_session(self) -> str:
        """An encoder reads the text columns alone, as it was trained to; an LLM's prompts are embedded already [C]."""
        if self.kind == "reader":
            return TEXT
        return self.settings.raw_cosine.session or (PROMPT if self.kind == "causal" else TEXT)

    def _intent(self, name: str) -> str:
        return "title" if self.kind == "reader" and name == "raw_cosine" else getattr(self.settings, name).intent

    def _columns(self, session: str) -> list[str]:
        texts = [name for name in self.columns if self.kinds[name] == "text"]
        return texts if session == TEXT and texts else list(self.columns)


@dataclass(frozen=True, eq=False)
class Matcher:
    """A run's match terms, fitted on train, and the knowledge base that they match sessions with.

    terms   those of ranker.match, and those that need no training
    names   ranker.match: what a ranker reads, in this order
    titles  intent_id -> title
    """

    terms: Mapping[str, Term]
    names: tuple[str, ...]
    compared: Compared
    kb: KnowledgeBase
    titles: Mapping[str, str]

    @classmethod
    def fit(cls, shop: tables.Dataset, train: Lists, compared: Compared, places: Places, settings: Ranker) -> "Matcher":
        """From a run's tables and vectors.

        shop  its train sessions with the columns that are compared, and the KB;  train  lists of train's part
        """
        refuse_other_parts("match", train=train)
        plain = cls._of({}, settings.match, compared, shop.intents, places)
        before, ids = _train(shop.sessions), train.session_id
        own, averaged = plain.compared.vector_sets[0], evenly_spaced(before, AVERAGED)["session_id"].tolist()
        kb = replace(plain.kb, in_train=known_in_train(shop.sessions, shop.intents))
        learnt = Learnt(
            kb,
            texts=compared.words(evenly_spaced(before, COUNTED), plain.titles),
            averaged=vectors.load(places(own) / "sessions").rows(averaged).astype(np.float32),
            lists=train,
            query=vectors.load(places(PROMPT) / "sessions").rows(ids) if "memory" in settings.match else None,
            centred=compared.settings.raw_cosine.centred,
            memory=settings.memory,
            written=writing.load(places(WRITTEN)).of(with_click(train).session_id)
            if of_written(settings.match)
            else None,
        )
        chosen = dict.fromkeys([*WITHOUT_TRAINING, *settings.match])
        return replace(plain, kb=kb, terms={name: MATCH_TERMS[name].fit(learnt) for name in chosen})

    @classmethod
    def load(
        cls,
        folder: Path,
        names: Sequence[str],
        compared: Compared,
        intents: pd.DataFrame,
        places: Places,
        train: Lists | None = None,
    ) -> "Matcher":
        """What `save` wrote, with the KB of these tables and vectors. Raises MatchError.

        train  the lists it was fitted on, where it is to leave a user's own sessions out of train's; None: serving
        """
        terms = {name: _load(folder, name) for name in dict.fromkeys([*WITHOUT_TRAINING, *names])}
        if train is not None and "memory" in terms:
            terms["memory"] = replace(terms["memory"], users=with_click(train).user_id)
        return cls._of(terms, names, compared, intents, places)

    @classmethod
    def _of(cls, terms, names, compared: Compared, intents: pd.DataFrame, places: Places) -> "Matcher":
        found = vectors.load(places(compared.vector_sets[1]) / "intents").rows(intents["intent_id"])
        texts = compared.of_intents(intents)
        kb = KnowledgeBase(texts, found.astype(np.float32), np.ones(len(texts), bool))
        if of_written(names):
            own = writing.load(places(WRITTEN)).intents.rows(intents["intent_id"])
            kb = replace(kb, titles=own.astype(np.float32))
        titles = dict(zip(intents["intent_id"], intents["title"].fillna(""), strict=True))
        return cls(terms, tuple(names), compared, kb, titles)

    @cached_property
    def ready(self) -> dict[str, Values]:
        """Each term over this knowledge base."""
        return {name: term.over(self.kb) for name, term in self.terms.items()}

    def save(self, folder: Path, parts: Sequence[Lists] = ()) -> None:
        """Write the folder whole or not at all; the same terms give the same bytes.

        parts  lists whose match terms are written as well, for `with_values`
        """
        with atomic(folder) as temporary:
            temporary.mkdir()
            for name, term in self.terms.items():
                saved = [each.name for each in fields(term) if each.name not in term.NOT_SAVED]
                arrays = {key: _plain(getattr(term, key)) for key in saved}
                save_file(arrays, temporary / f"{name}.safetensors")
            save_values(temporary, parts)

    def sessions(self, frame: Rows, of_set: OfSet, lists: Lists | None = None) -> Sessions:
        """What the terms read of these sessions (the columns that are compared).

        of_set  set of vectors -> those of the sessions
        lists   of train, row by row, whose users' own sessions memory leaves out; None: it leaves out none
        """
        ids = column_of(frame, "session_id").to_pylist()
        return Sessions(
            self.compared.words(frame, self.titles),
            of_set(self.compared.vector_sets[0]).rows(ids).astype(np.float32),
            self.compared.is_read(frame, self.titles),
            of_set(PROMPT).rows(ids) if "memory" in self.names else None,
            None if lists is None or lists.part != "train" else lists.user_id,
            of_set(WRITTEN).of(ids) if of_written(self.names) else None,
        )

    def of_lists(self, shop: tables.Dataset, lists: Lists, of_set: OfSet | Places) -> Sessions:
        """What the terms read of the sessions of these lists. of_set: set of vectors -> those of the sessions, or where
        they are."""
        frame = shop.sessions.set_index("session_id", drop=False).loc[list(lists.session_id)]

        def loaded(name: str) -> Vectors | WrittenQueries:
            found = of_set(name)
            if not isinstance(found, Path):
                return found
            return writing.load(found) if name == WRITTEN else vectors.load(found / "sessions")

        return self.sessions(frame, loaded, lists)

    @property
    def sets(self) -> set[str]:
        """The sets of sessions' vectors that are read."""
        return {self.compared.vector_sets[0], *([PROMPT] if "memory" in self.names else [])}

    def matched(self, shop: tables.Dataset, parts: Sequence[Lists], of_set) -> list[Lists]:
        """The lists of these parts with the terms that a ranker reads; arguments: see `of_lists`."""
        if not self.names:
            return list(parts)
        return [with_match(lists, self(self.of_lists(shop, lists, of_set))) for lists in parts]

    def __call__(self, sessions: Sessions) -> Match | None:
        """The terms that a ranker reads of these sessions; None where ranker.match is empty."""
        if not self.names:
            return None
        values = np.empty((len(sessions), len(self.kb.texts), len(self.names)), np.float16)
        for column, name in enumerate(self.names):
            values[:, :, column] = self.ready[name](sessions)
        return Match(torch.from_numpy(values), self.names)

    def of_queries(self, queries: Vectors) -> Match | None:
        """The terms of written queries, each query for itself, row by row; None where no such term is read."""
        if not (names := of_written(self.names)):
            return None
        count, one = len(queries), csr_array(eye_array(len(queries), dtype=np.float32))
        each = SessionQueries(queries.ids.tolist(), queries.values.astype(np.float32), one)
        plain = Sessions(each.texts, np.zeros((count, 1), np.float32), np.zeros(count, bool), written=each)
        values = np.stack([self.ready[name](plain) for name in names], axis=2)
        return Match(torch.from_numpy(values.astype(np.float16)), tuple(names))

    def alone(self, name: str, sessions: Sessions) -> np.ndarray:
        """(n, intents) float32: a term as a model of its own; 0 where there is nothing to compare."""
        return np.nan_to_num(self.ready[name](sessions), nan=0.0)

    def with_intents(self, intents: pd.DataFrame, more: np.ndarray, titles: np.ndarray | None = None) -> "Matcher":
        """The same terms over a larger KB; of a new intent memory knows nothing.

        intents  of the whole KB, new ones at the end;  more, titles  (new, dim) their vectors of raw_cosine and of
        written_cosine
        """
        found = np.concatenate([self.kb.vectors, more.astype(np.float32)])
        kb = KnowledgeBase(self.compared.of_intents(intents), found, np.ones(len(found), bool))
        if titles is not None:
            kb = replace(kb, titles=np.concatenate([self.kb.titles, titles.astype(np.float32)]))
        return replace(self, kb=kb, titles=dict(zip(intents["intent_id"], intents["title"].fillna(""), strict=True)))


def untrained(matcher: Matcher, sessions: Sessions, train: Lists, intents: Intents) -> dict[str, np.ndarray]:
    """Model without training -> its scores (n, intents)."""
    clicks = np.broadcast_to(log_clicks(train, intents), (len(sessions), len(intents)))
    return {"popularity": clicks, **{name: matcher.alone(name, sessions) for name in WITHOUT_TRAINING}}


def places_in(embeddings: Path, prompt: Path | None = None) -> Places:
    """Where a run has its sets of vectors. prompt: folder of the set `prompt`, where another LM has made it again."""

    def place(name: str) -> Path:
        if prompt is not None and name == WRITTEN:
            return prompt / WRITTEN if (prompt / WRITTEN).is_dir() else embeddings / WRITTEN
        return prompt if prompt is not None and name == PROMPT else embeddings / name

    return place


def save_values(folder: Path, parts: Sequence[Lists]) -> None:
    """Write the match terms of these parts' lists, row by row as encoded; nothing where they have none."""
    for lists in parts:
        if lists.match is not None:
            path = folder / f"{lists.part}.safetensors"
            save_file({"values": lists.match.values.numpy()}, path, {"terms": json.dumps(lists.match.names)})


def with_values(lists: Lists, folder: Path | None) -> Lists:
    """The lists with the match terms that `save_values` wrote of them; as they are where it wrote none.

    Raises MatchError.
    """
    path = None if folder is None else folder / f"{lists.part}.safetensors"
    if path is None or not path.is_file():
        return lists
    try:
        with safe_open(path, "pt") as file:
            names = tuple(json.loads((file.metadata() or {})["terms"]))
            return with_match(lists, Match(file.get_tensor("values"), names))
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise MatchError(f"{path} holds no match terms of these lists: {error}") from None


def log_clicks(train: Lists, intents: Intents, *, smoothing: float = SMOOTHING) -> np.ndarray:
    """(intents,) float32: clicks of train, not clicks per impression: what is shown often is shown for a reason [C].

    Raises ValueError for lists of another part.
    """
    refuse_other_parts("popularity", train=train)
    clicked = train.candidates[train.clicked].long().cpu()
    return (torch.bincount(clicked, minlength=len(intents)) + smoothing).log().numpy()


def to_embed(sessions: pd.DataFrame, name: str, match: Sequence[str]) -> pd.DataFrame:
    """The sessions of train and valid that notebook 02 embeds for a set of vectors.

    match  ranker.match: where no ranker reads raw_cosine, of TEXT only valid and, for the mean, some of train
    """
    if name != TEXT or "raw_cosine" in match:
        return sessions
    chosen = evenly_spaced(_train(sessions), AVERAGED)["session_id"]
    return sessions[(sessions["split"] != "train") | sessions["session_id"].isin(chosen)]


def sessions_to_write(sessions: pd.DataFrame, parts: Sequence[Lists]) -> pd.DataFrame:
    """The sessions that queries are written for: those of these parts, of train those with a click alone."""
    read = [with_click(lists) if lists.part == "train" else lists for lists in parts]
    ids = np.concatenate([lists.session_id for lists in read])
    return sessions[sessions["session_id"].isin(ids)]


def known_in_train(sessions: pd.DataFrame, intents: pd.DataFrame) -> np.ndarray:
    """(intents,) bool: the intent was in the KB at train's last session; without dates all were."""
    last = _train(sessions)["timestamp"].max()
    if pd.isna(last):
        return np.ones(len(intents), bool)
    since = intents["valid_from"].to_numpy(dtype="datetime64[us]", na_value=np.datetime64("NaT"))
    return ~(since > np.datetime64(last, "us"))


def session_texts(
    frame: Rows, columns: Sequence[str], kinds: Mapping[str, str], titles: Mapping[str, str]
) -> list[str]:
    """The values of these columns in one line, as in a prompt; a text without its column's name."""
    rows = verbalize.Serialiser("lines", titles).sessions(frame, columns, kinds)
    # without its column's name `yes` means nothing, while a text speaks for itself
    values = [[(f.prefix if f.kind != "text" else "", *f.units, " ") for f in row] for row in rows]
    return ["".join(part for value in row for part in value) for row in values]


def evenly_spaced(rows: pd.DataFrame, most: int) -> pd.DataFrame:
    """At most so many rows, evenly spaced: those of all weeks, the same ones in every call."""
    return rows.iloc[np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int))] if len(rows) else rows


def _train(sessions: pd.DataFrame) -> pd.DataFrame:
    return sessions[sessions["split"] == "train"]


def _plain(values: np.ndarray) -> np.ndarray:
    """An array that safetensors can hold: strings, which have no line break, as their UTF-8."""
    text = "\n".join(values.tolist()).encode() if values.dtype.kind == "U" else None
    return np.ascontiguousarray(values) if text is None else np.frombuffer(text, np.uint8)


def _load(folder: Path, name: str) -> Term:
    kind, path = MATCH_TERMS[name], folder / f"{name}.safetensors"
    try:
        arrays = load_file(path)
        if "words" in arrays:
            arrays["words"] = np.array(bytes(arrays["words"]).decode().split("\n") if len(arrays["words"]) else [], "U")
        return kind(**arrays)
    except (OSError, TypeError, ValueError, SafetensorError) as error:
        raise MatchError(f"{path} holds no match term that can be read: {error}") from None
