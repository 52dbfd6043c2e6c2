"""A finished run, loaded to serve: what a service would import.

scorer = rgalign.load("outputs/quickstart")
scorer.score(sessions)      # the intents that each session's customer most likely asks about
scorer.queries(sessions)    # the question that the reasoner expects of the user
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from timeit import timeit
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from rgalign.alignment.context import load_step
from rgalign.data import candidates, shards
from rgalign.data import vectors as stored
from rgalign.data.checks import check_frame
from rgalign.data.encode import IMPRESSION_COLUMNS, as_table, encode_intents, encode_lists, session_columns
from rgalign.data.features import FeatureSpace, Rows
from rgalign.data.lists import Intents, Lists, with_match, with_queries, with_texts
from rgalign.data.schema import REQUIRED, YAML_FILE, as_types, read_yaml, to_frame
from rgalign.data.vectors import Vectors
from rgalign.errors import Report, UserError, count_rows, nearest
from rgalign.evaluation.confidence import confidence as confidence_of
from rgalign.params import ROOT, load_run
from rgalign.ranker import store
from rgalign.ranker.fit import score_kb
from rgalign.ranker.match import PROMPT, TEXT, WRITTEN, Compared, Matcher, places_in
from rgalign.ranker.match_terms import of_written
from rgalign.reasoner import prompts
from rgalign.reasoner.build import Recipe, of_texts, text_reader
from rgalign.reasoner.embed import embed
from rgalign.reasoner.generate import embedded_sessions, greedy
from rgalign.reasoner.model import Reasoner, load_saved
from rgalign.reasoner.prompts import Prompter
from rgalign.reasoner.written import TextEmbedder, WrittenQueries, write
from rgalign.run.artifacts import ArtifactError
from rgalign.seeding import derived

INTENT_TYPES = REQUIRED["intents"]
COLLECTING = "gc.enable()"  # timeit turns it off, a service does not
NO_IMPRESSIONS = pa.table({name: pa.array([], REQUIRED["impressions"][name]) for name in IMPRESSION_COLUMNS})


class ScoreError(UserError, ValueError):
    """Sessions or intents that a finished run cannot take; the message lists all that is wrong with them."""


@dataclass(frozen=True, eq=False)
class Ranking:
    """A trained ranker and the intents it ranks, ready for sessions it has never seen.

    space          how sessions and intents are encoded
    kb, intents    intents.parquet's rows, new ones at the end; the same encoded, with the vectors of their texts where
                   the ranker reads vectors (QE-Rec, RGAlign-Rec)
    correction     (intents,) or None: added to the scores of a ranker that learnt on sampled candidates
                   (candidates.kb_correction)
    """

    model: nn.Module
    space: FeatureSpace
    kb: pd.DataFrame
    intents: Intents
    correction: np.ndarray | None = None

    @classmethod
    def of(
        cls, folder: Path, encoded: Path, kb: pd.DataFrame, vectors: Vectors | None, sampled: dict | None, device="cpu"
    ) -> "Ranking":
        """From a run's artifacts.

        folder   of the ranker (ranker.store);  encoded  tables/encoded;  vectors  of the intents, None: it reads none
        sampled  dataset.yaml's sampled_negatives, None where logs say what was shown
        device   where the ranker scores; what it is given and finds lies on the CPU
        """
        space = shards.load_space(encoded)
        seen = [shards.load_lists(encoded, part) for part in ("train", "dev")] if sampled else ()
        intents = encode_intents(space, kb)
        if vectors is not None:
            intents = with_texts(intents, vectors.rows(kb["intent_id"].tolist()))
        correction = candidates.correction_of(seen, len(kb), sampled)
        return cls(store.load(folder, device=device), space, kb, intents, correction)

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The columns of `sessions` that the ranker reads, session_id and features."""
        return tuple(name for name in session_columns(self.space) if name != "user_id")

    @cached_property
    def seen(self) -> dict[str, frozenset[str]]:
        """Categorical column -> the values that training knew."""
        return {field.name: frozenset(field.values) for field in self.space.fields if field.kind == "categorical"}

    def lists(self, sessions: Rows, vectors: Vectors | None) -> Lists:
        """Sessions, encoded, with their vectors where the ranker reads them; they were shown nothing yet."""
        known = as_table(sessions, self.columns)
        known = known.append_column("user_id", pa.repeat("", len(known)))  # a ranker reads no user id
        lists = encode_lists(self.space, known, NO_IMPRESSIONS, self.kb, "test")
        return lists if vectors is None else with_queries(lists, vectors.rows(lists.session_id))

    def scores(self, lists: Lists, timestamps: np.ndarray | None = None) -> np.ndarray:
        """(lists, intents) float32: the higher the better, comparable inside a session alone. timestamps (lists,)
        datetime64: an intent that did not exist yet has -inf; None: all exist."""
        found = score_kb(self.model, lists, self.intents)
        if self.correction is not None:
            found = found + self.correction.astype(np.float32)
        if timestamps is not None:
            found = np.where(self.intents.existing(timestamps), found, -np.inf)
        return found

    def top(self, session_ids: np.ndarray, scores: np.ndarray, k: int | None) -> pd.DataFrame:
        """session_id, rank (from 1), intent_id, title, score: the k best of each session, or all that exist; equal
        scores in the order of the knowledge base."""
        order = np.argsort(-scores, axis=1, kind="stable")[:, : k or None]
        best = np.take_along_axis(scores, order, axis=1)
        row, place = np.nonzero(np.isfinite(best))
        kb = {name: self.kb[name].to_numpy(dtype=object)[order[row, place]] for name in ("intent_id", "title")}
        return pd.DataFrame({"session_id": session_ids[row], "rank": place + 1, **kb, "score": best[row, place]})


def refuse(report: Report, what: str) -> None:
    """Raises ScoreError with every fault of the report."""
    if report.errors:
        raise ScoreError("\n".join([f"{what}:", *(f"  {where}  {fault}" for where, fault in report.errors)]))


def checked_intents(more: pd.DataFrame, kb: pd.DataFrame) -> pd.DataFrame:
    """New intents in intents.parquet's columns and types; description, category and valid_from may be missing.
    Raises ScoreError with every fault: those that `check` finds in intents.parquet, and ids that the KB has."""
    report, found = check_frame(more, "intents", ("intent_id", "title"), kinds={})
    ids = more["intent_id"] if isinstance(more, pd.DataFrame) and list(more.columns).count("intent_id") == 1 else []
    known = np.isin([str(one) for one in ids], kb["intent_id"].astype(str))
    if known.any():
        report.error("intents.intent_id", count_rows(known, "is in the knowledge base already"))
    refuse(report, "these intents cannot be added")
    frame = to_frame(found)
    missing = {name: pd.array([None] * len(frame), dtype=pd.ArrowDtype(kind)) for name, kind in INTENT_TYPES.items()}
    return frame.assign(**{name: empty for name, empty in missing.items() if name not in frame})[list(INTENT_TYPES)]


def embedded(
    reasoner: Reasoner, prompter: Prompter, frame: Rows, tokens_per_batch: int | None, *, progress: bool = False
) -> Vectors:
    """The vectors of these sessions by a reasoner and what the prompter shows it."""
    prompts = embedded_sessions(reasoner, prompter, prompter.sessions(frame), progress=progress)
    how = {"prefix": len(prompter.head), "tokens_per_batch": tokens_per_batch, "progress": progress}
    return Vectors(frame["session_id"], embed(reasoner, prompts, **how))


PARAMS, DATASET, REASONER = "params.yaml", "tables/dataset", "models/reasoner/main"
ALIGNED, ALIGNED_RANKERS, QE_REC = "models/rgalign", "models/aligned_rankers", "models/rankers/qe_rec"
KB_READER, ALIGNED_EMBEDDINGS = "models/kb_reader", "tables/aligned_embeddings"
ALIGNED_TEXTS = f"{ALIGNED_EMBEDDINGS}/intents"
ENCODED, EMBEDDINGS = "tables/encoded", "tables/embeddings"
TEXTS = f"{EMBEDDINGS}/{PROMPT}/intents"


@dataclass(frozen=True, eq=False)
class Scorer:
    """A run's models, ready for sessions that it has never seen.

    kinds      feature column -> kind (dataset.yaml)
    ranking    None where the run has no ranker yet: it writes queries alone
    reads_kb   gives the reasoner that embedded the knowledge base: the one before RG-CL (alignment.loop)
    matcher    the match terms that the ranker reads; None: it reads none
    writes     sessions -> the queries written for them, and title_embedder what embeds these; None where no match term
               reads them
    alone      embeds text columns and titles alone, where raw_cosine compares these: the reasoner before its alignment,
               as in notebook 02, and its prompter
    """

    reasoner: Reasoner
    prompter: Prompter
    kinds: Mapping[str, str]
    reads_kb: Callable[[], Reasoner]
    tokens_per_batch: int | None = None
    ranking: Ranking | None = None
    matcher: Matcher | None = None
    alone: tuple[Reasoner, Prompter] | None = None
    writes: Callable[[Rows], WrittenQueries] | None = None
    title_embedder: TextEmbedder | None = None

    def score(
        self, sessions: pd.DataFrame, *, top: int | None = 3, vectors: Vectors | None = None,
        written: WrittenQueries | None = None, confidence: bool = False, progress: bool = False
    ) -> pd.DataFrame:  # fmt: skip
        """The best intents of each session, in their order: session_id, rank (from 1), intent_id, title, score.

        sessions  session_id, each once, and every feature column that prompt or ranker reads; an intent that did not
                  exist yet at a session's `timestamp`, where that column is there, is left out
        top       intents a session; None: all of the knowledge base
        vectors   of these sessions from `embed`, which is where a language model's time goes; None: made here
        written   queries for these sessions from `write_queries`, where match terms read them; None: written here
        confidence  adds a column of that name, of 0..1 and the same in all rows of a session: how much of the softmax
                  of the scores its three best intents have, whatever `top` is. It orders sessions (serve the most
                  confident, hand the others on) and is no chance of a click: notebook 10 says how far it is from one
        Scores compare intents inside a session alone. Raises ScoreError with every fault of the frame, ArtifactError
        where the run has no ranker.
        """
        ranking = self._ranking()
        if top is not None and top < 1:
            raise ScoreError(f"top is {top}; expected at least 1, or None for all intents")
        if not isinstance(confidence, bool):
            raise ScoreError(f"confidence is {confidence!r}; expected True or False")
        shown = vectors is None or self.matcher is not None
        read = dict.fromkeys([*(self.prompter.features if shown else ()), *ranking.columns])
        frame = self._checked(sessions, read, once=True)
        vectors = self._embedded(frame, progress) if vectors is None else vectors
        when = frame["timestamp"].to_numpy() if "timestamp" in frame.column_names else None
        scores = ranking.scores(self.lists(frame, vectors, written), when)
        ids = sessions["session_id"].to_numpy()
        table = ranking.top(ids, scores, top)
        if confidence:
            table["confidence"] = table["session_id"].map(dict(zip(ids, confidence_of(scores), strict=True)))
        return table

    def lists(self, frame: Rows, vectors: Vectors, written: WrittenQueries | None = None) -> Lists:
        """Checked sessions as the ranker reads them: encoded, with their vectors and match terms."""
        lists = self._ranking().lists(frame, vectors)
        if self.matcher is None:
            return lists
        sets = {PROMPT: vectors}
        if self.matcher.compared.vector_sets[0] == TEXT:
            sets[TEXT] = embedded(*self.alone, frame, self.tokens_per_batch)
        if self.writes is not None:
            sets[WRITTEN] = self.writes(frame) if written is None else written
        return with_match(lists, self.matcher(self.matcher.sessions(frame, sets.__getitem__)))

    def write_queries(self, sessions: pd.DataFrame) -> WrittenQueries | None:
        """The queries that the ranker's match terms read (ranker.written), to be kept and given to `score`; None where
        it reads none. A session's queries depend on its id alone, not on the other sessions."""
        return None if self.writes is None else self.writes(self._checked(sessions, self.prompter.features, once=True))

    def embed(self, sessions: pd.DataFrame, *, progress: bool = False) -> Vectors:
        """What the ranker reads of each session: the last state of what reasoner.embed names (METHOD.md 2.1)."""
        frame = self._checked(sessions, self.prompter.features, once=True)
        return self._embedded(frame, progress)

    def with_intents(self, intents: pd.DataFrame) -> "Scorer":
        """The same models over a KB with more intents, known by category, words and vector; nothing is trained.

        intents  intent_id, title, and description, category, valid_from where they are known
        Raises ScoreError with every fault of the frame.
        """
        ranking = self._ranking()
        more = checked_intents(intents, ranking.kb)
        made, matcher = embed(self.reads_kb(), self.prompter.embedded_intents(more), progress=False), self.matcher
        vectors = Vectors(more["intent_id"], made).values
        kb = pd.concat([ranking.kb, more], ignore_index=True)
        texts = torch.cat([ranking.intents.text, torch.from_numpy(vectors)])
        correction = ranking.correction
        if correction is not None:  # no training list had the new ones (candidates.kb_correction)
            correction = np.concatenate([correction, np.zeros(len(more))])
        if matcher is not None:
            if matcher.compared.vector_sets[1] == TEXT:
                before, put = self.alone
                vectors = embed(before, put.embedded_intents(more.assign(description=None)), progress=False)
            titles = None if self.title_embedder is None else self.title_embedder.intents(more).values
            matcher = matcher.with_intents(kb, vectors, titles)
        wider = with_texts(encode_intents(ranking.space, kb), texts)
        return replace(self, ranking=replace(ranking, kb=kb, intents=wider, correction=correction), matcher=matcher)

    def queries(self, sessions: pd.DataFrame, *, progress: bool = False) -> pd.DataFrame:
        """The greedy query of each session, in their order: session_id, query, log_probability (nats).

        sessions  session_id and every feature column that the prompt shows, of any number of sessions but none
        Raises ScoreError with every fault of the frame, ReasonerError where the reasoner is an encoder.
        """
        frame = self._checked(sessions, self.prompter.features)
        how = {"max_new_tokens": self.prompter.max_new_tokens, "progress": progress}
        written = greedy(self.reasoner, self.prompter, self.prompter.sessions(frame), **how)
        written.insert(0, "session_id", sessions["session_id"].reset_index(drop=True))
        return written[["session_id", "query", "log_probability"]]

    def _ranking(self) -> Ranking:
        if self.ranking is None:
            why = "this run has no ranker that reads queries: run it through 03, with qe_rec in its models"
            raise ArtifactError(why)
        return self.ranking

    def _embedded(self, frame: Rows, progress: bool) -> Vectors:
        return embedded(self.reasoner, self.prompter, frame, self.tokens_per_batch, progress=progress)

    def _checked(self, sessions: pd.DataFrame, features: Iterable[str], *, once: bool = False) -> pa.Table:
        """The columns needed, in the data set's types, and the timestamp where there is one. once: a session may not
        come twice."""
        seen = {} if self.ranking is None else self.ranking.seen
        needed = ["session_id", *features]
        report, frame = check_frame(sessions, "sessions", needed, kinds=self.kinds, repeats=not once, seen=seen)
        refuse(report, "these sessions cannot be scored")
        return frame


def load(run_dir: str | Path, *, aligned: bool | None = None, seed: int | None = None, device: str = "auto") -> Scorer:
    """The scorer of a run directory, as given or seen from the project's root.

    aligned  RGAlign-Rec, which notebook 08 left, or QE-Rec before its alignment; None: aligned where the run has one
    seed     the ranker's; None: the first of the run's, so that what is served is what was measured [C]
    device  auto (cuda where there is one) | cpu | cuda | ..: where it serves, whatever the run was made on
    The model is the run's own: its dtype, adapter and quantisation, and its content where it was taken as it is.
    Raises ArtifactError that lists what the run lacks and says what to type, ReasonerError where its model
    cannot be had.
    """
    run = _find(run_dir)
    if aligned and not (run / ALIGNED).is_dir():
        raise ArtifactError(f"{run} has no {ALIGNED}: run it through 08, or load it with aligned=False")
    params = load_run(run)
    reasoner_params = params.reasoner
    meta: dict[str, Any] = read_yaml(run / DATASET / YAML_FILE)
    intents = to_frame(as_types(pq.read_table(run / DATASET / "intents.parquet"), "intents", meta["features"]))
    recipe = Recipe(reasoner_params, params.data.features.drop, device=device)
    reads_kb = partial(load_saved, run / REASONER, **recipe.loading)
    reasoner = main = reads_kb()
    serves_aligned = aligned is not False and (run / ALIGNED).is_dir()
    if serves_aligned:
        kb_reader = run / KB_READER
        reasoner = load_step(run / ALIGNED, recipe, reasoner)
        if kb_reader.is_dir() and any(kb_reader.iterdir()):  # else the one before the alignment
            reads_main = reads_kb
            reads_kb = lambda: load_step(kb_reader, recipe, reads_main())  # noqa: E731
    own = {"drop": params.data.features.drop, "ends": reasoner.ends, "positions": reasoner.positions}
    prompter = prompts.prompter(reasoner_params, meta, intents, reasoner.tokenizer, **own)
    budget, seeds = reasoner_params.embed_tokens_per_batch, params.ranker.seeds
    if seed is not None and seed not in seeds:
        raise ArtifactError(f"{run} has rankers of the seeds {', '.join(map(str, seeds))}; found seed {seed}")
    rankers, texts = (ALIGNED_RANKERS, ALIGNED_TEXTS) if serves_aligned else (QE_REC, TEXTS)
    folder, ranking = run / rankers / f"seed-{seeds[0] if seed is None else seed}", None
    if folder.is_dir():
        vectors, sampled = stored.load(run / texts), meta.get("sampled_negatives")
        ranking = Ranking.of(folder, run / ENCODED, intents, vectors, sampled, reasoner.device)
    scorer = Scorer(reasoner, prompter, dict(meta["features"]), reads_kb, budget, ranking)
    if ranking is None or not ranking.model.config.match:
        return scorer
    compared = Compared(params.evaluation.untrained, reasoner_params.compares, prompter.features, scorer.kinds)
    (reading, reads), own = text_reader(recipe, main), {"drop": params.data.features.drop}
    own |= {"ends": reads.ends, "positions": reads.positions}
    places = places_in(run / EMBEDDINGS, run / ALIGNED_EMBEDDINGS if serves_aligned else None)
    terms = run / (f"{ALIGNED_EMBEDDINGS}/match" if serves_aligned else "tables/match"), ranking.model.config.match
    scorer = replace(scorer, matcher=Matcher.load(*terms, compared, intents, places))
    if of_written(scorer.matcher.names):
        reader = TextEmbedder(reads, prompts.prompter(reading.settings, meta, intents, reads.tokenizer, **own))

        def writes(frame: Rows) -> WrittenQueries:
            seed = derived(params.run.seed, WRITTEN)
            rows = to_frame(frame) if isinstance(frame, pa.Table) else frame
            queries = write(reasoner, prompter, rows, params.ranker.written, seed=seed)
            return WrittenQueries(queries, reader.vectors(queries["query"].tolist()))

        scorer = replace(scorer, writes=writes, title_embedder=reader)
    if TEXT not in compared.vector_sets:
        return scorer
    texts = of_texts(reading, meta).settings
    put = prompts.prompter(texts, meta, intents, reads.tokenizer, embed=prompts.PROMPT, **own)
    return replace(scorer, alone=(reads, put))


def latency(scorer: Scorer, sessions: pd.DataFrame, *, warm: int = 5) -> pd.DataFrame:
    """What one session costs a service, on one core: step, and the milliseconds of its p50 and p99 over `sessions`
    without the first `warm`. scorer: of a run with a ranker (rgalign.load)."""
    ranking, vectors = scorer.ranking, scorer.embed(sessions)
    one = [sessions.iloc[[row]] for row in range(len(sessions))]
    lists = scorer.lists(sessions, vectors)
    steps = {
        "ranks the KB": lambda row: ranking.top(np.array([""]), ranking.scores(lists.take([row])), 3),
        "score(), embedded before": lambda row: scorer.score(one[row], vectors=vectors),
        "score(), all of it": lambda row: scorer.score(one[row]),
    }
    rows, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, step in steps.items():
            seconds = [timeit(partial(step, row), COLLECTING, number=1) for row in range(len(one))]
            rows.append((name, *np.percentile(1000 * np.array(seconds[warm:]), (50, 99))))
    finally:
        torch.set_num_threads(threads)
    return pd.DataFrame(rows, columns=["step", "p50", "p99"])


def _find(run_dir: str | Path) -> Path:
    """The run directory, with all that is needed in it."""
    run = next((place for place in (Path(run_dir), ROOT / run_dir) if place.is_dir()), None)
    if run is None:
        finished = sorted(f"outputs/{path.parent.name}" for path in (ROOT / "outputs").glob(f"*/{PARAMS}"))
        hint = nearest(str(run_dir), finished)
        made = "python -m rgalign run params/quickstart.yaml"
        raise ArtifactError(f"no run directory {run_dir}{hint}\nTo make one: {made}   (writes outputs/quickstart)")
    needed = (PARAMS, f"{DATASET}/{YAML_FILE}", f"{DATASET}/intents.parquet", REASONER)
    if missing := [name for name in needed if not (run / name).exists()]:
        lines = "\n".join(f"  {name}" for name in missing)
        params = run / PARAMS if (run / PARAMS).is_file() else "params/quickstart.yaml"
        command = f"python -m rgalign run {params} --run-dir {run} --through 02"
        raise ArtifactError(f"{run} lacks what a scorer reads:\n{lines}\nTo make it: {command}")
    return run
