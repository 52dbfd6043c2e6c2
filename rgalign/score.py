"""A finished run, loaded to serve: what a service would import.

scorer = rgalign.load("outputs/quickstart")
scorer.score(sessions)      # the intents that each session's customer most likely asks about
scorer.queries(sessions)    # the question that the reasoner expects of her
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch

from rgalign.alignment.context import load_step
from rgalign.artifacts import ArtifactError
from rgalign.data import vectors as stored
from rgalign.data.faults import nearest
from rgalign.data.gate import judged
from rgalign.data.prompts import Prompter
from rgalign.data.schema import YAML_FILE, as_types, read_yaml, to_frame
from rgalign.data.vectors import Vectors
from rgalign.params import ROOT, Params, load_run
from rgalign.ranking import Ranking, ScoreError, checked_intents, refuse
from rgalign.reasoner import settings, source
from rgalign.reasoner.build import Recipe
from rgalign.reasoner.embed import embed
from rgalign.reasoner.model import Reasoner
from rgalign.reasoner.queries import embedded_sessions, greedy

PARAMS, DATASET, REASONER = "params.yaml", "tables/dataset", "models/reasoner/main"
ALIGNED, ALIGNED_RANKERS, QE_REC = "models/rgalign", "models/aligned_rankers", "models/rankers/qe_rec"
KB_READER, ALIGNED_TEXTS = "models/kb_reader", "tables/aligned_embeddings/intents"
ENCODED, TEXTS = "tables/encoded", "tables/embeddings/prompt/intents"


@dataclass(frozen=True, eq=False)
class Scorer:
    """A run's models, ready for sessions that it has never seen.

    kinds      feature column -> kind (dataset.yaml)
    ranking    None where the run has no ranker yet: it writes queries alone
    reads_kb   gives the reasoner that embedded the knowledge base: the one before RG-CL (alignment.loop)
    """

    reasoner: Reasoner
    prompter: Prompter
    kinds: Mapping[str, str]
    reads_kb: Callable[[], Reasoner]
    max_new_tokens: int = 24
    tokens_per_batch: int | None = None
    ranking: Ranking | None = None

    def score(
        self, sessions: pd.DataFrame, *, top: int | None = 3, vectors: Vectors | None = None, progress: bool = False
    ) -> pd.DataFrame:
        """The best intents of each session, in their order: session_id, rank (from 1), intent_id, title, score.

        sessions  session_id, each once, and every feature column that prompt or ranker reads; an intent that did not
                  exist yet at a session's `timestamp`, where that column is there, is left out
        top       intents a session; None: all of the knowledge base
        vectors   of these sessions from `embed`, which is where a language model's time goes; None: made here
        Scores compare intents inside a session alone. Raises ScoreError with every fault of the frame, ArtifactError
        where the run has no ranker.
        """
        ranking = self._ranking()
        if top is not None and top < 1:
            raise ScoreError(f"top is {top}; expected at least 1, or None for all intents")
        read = dict.fromkeys([*(self.prompter.features if vectors is None else ()), *ranking.columns])
        frame = self._checked(sessions, read, once=True)
        vectors = self._embedded(frame, progress) if vectors is None else vectors
        when = frame["timestamp"].to_numpy(dtype="datetime64[us]") if "timestamp" in frame else None
        scores = ranking.scores(ranking.lists(frame, vectors), when)
        return ranking.top(sessions["session_id"].to_numpy(), scores, top)

    def embed(self, sessions: pd.DataFrame, *, progress: bool = False) -> Vectors:
        """What the ranker reads of each session: the last state of what reasoner.embed names (METHOD.md 2.1)."""
        return self._embedded(self._checked(sessions, self.prompter.features, once=True), progress)

    def with_intents(self, intents: pd.DataFrame) -> "Scorer":
        """The same models over a knowledge base with more intents; nothing is trained.

        intents  intent_id, title, and description, category, valid_from where they are known
        Raises ScoreError with every fault of the frame.
        """
        ranking = self._ranking()
        more = checked_intents(intents, ranking.kb)
        texts = embed(self.reads_kb(), self.prompter.embedded_intents(more), progress=False)
        return replace(self, ranking=ranking.extended(more, Vectors(more["intent_id"], texts)))

    def queries(self, sessions: pd.DataFrame, *, progress: bool = False) -> pd.DataFrame:
        """The greedy query of each session, in their order: session_id, query, log_probability (nats).

        sessions  session_id and every feature column that the prompt shows, of any number of sessions but none
        Raises ScoreError with every fault of the frame, ReasonerError where the reasoner is an encoder.
        """
        frame = self._checked(sessions, self.prompter.features)
        written = greedy(
            self.reasoner,
            self.prompter,
            self.prompter.sessions(frame),
            max_new_tokens=self.max_new_tokens,
            progress=progress,
        )
        found = written[["query", "log_probability"]]
        return pd.concat([sessions["session_id"].reset_index(drop=True), found], axis=1)

    def _ranking(self) -> Ranking:
        if self.ranking is None:
            raise ArtifactError(
                "this run has no ranker that reads queries: run it through 03, with qe_rec among its models"
            )
        return self.ranking

    def _embedded(self, frame: pd.DataFrame, progress: bool) -> Vectors:
        prompts = embedded_sessions(self.reasoner, self.prompter, self.prompter.sessions(frame), progress=progress)
        how = {"prefix": len(self.prompter.head), "tokens_per_batch": self.tokens_per_batch, "progress": progress}
        return Vectors(frame["session_id"], embed(self.reasoner, prompts, **how))

    def _checked(self, sessions: pd.DataFrame, features: Iterable[str], *, once: bool = False) -> pd.DataFrame:
        """The columns needed, in the data set's types, and the timestamp where there is one.

        once  a session may not come twice
        """
        seen = {} if self.ranking is None else self.ranking.seen
        needed = ["session_id", *features]
        report, frame = judged(sessions, "sessions", needed, kinds=self.kinds, repeats=not once, seen=seen)
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
    room = params.reasoner.model_dump(mode="json")
    meta: dict[str, Any] = read_yaml(run / DATASET / YAML_FILE)
    intents = to_frame(as_types(pq.read_table(run / DATASET / "intents.parquet"), "intents", meta["features"]))
    reads_kb = partial(source.load_saved, run / REASONER, kind=room["kind"], dtype=room["dtype"], device=device)
    reasoner, serves_aligned = reads_kb(), aligned is not False and (run / ALIGNED).is_dir()
    if serves_aligned:
        recipe, kb_reader = Recipe(room, params.data.features.drop, device), run / KB_READER
        reasoner = load_step(run / ALIGNED, recipe, reasoner)
        if kb_reader.is_dir() and any(kb_reader.iterdir()):  # else the one before the alignment
            reads_main = reads_kb
            reads_kb = lambda: load_step(kb_reader, recipe, reads_main())  # noqa: E731
    own = {"ends": reasoner.ends, "positions": reasoner.positions}
    prompter = settings.prompter(room, meta, intents, reasoner.tokenizer, drop=params.data.features.drop, **own)
    return Scorer(
        reasoner,
        prompter,
        dict(meta["features"]),
        reads_kb,
        room["queries"]["max_new_tokens"],
        room["embed_tokens_per_batch"],
        _load_ranking(run, params, serves_aligned, seed, intents, meta, reasoner.device),
    )


def latency(scorer: Scorer, sessions: pd.DataFrame, *, warm: int = 5) -> pd.DataFrame:
    """What one session costs a service, on one core: step, and the milliseconds of its p50 and p99 over `sessions`.

    scorer    of a run with a ranker (rgalign.load)
    warm      sessions before the first that counts
    The first step ranks a session that is encoded and embedded; each of the others holds the ones before it.
    """
    ranking, vectors = scorer.ranking, scorer.embed(sessions)
    one = [sessions.iloc[[row]] for row in range(len(sessions))]
    lists = ranking.lists(sessions, vectors)
    steps = {
        "ranks the KB": lambda row: ranking.top([""], ranking.scores(lists.take([row])), 3),
        "score(), embedded before": lambda row: scorer.score(one[row], vectors=vectors),
        "score(), all of it": lambda row: scorer.score(one[row]),
    }
    rows, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, step in steps.items():
            rows.append((name, *np.percentile([_milliseconds(step, row) for row in range(len(one))][warm:], (50, 99))))
    finally:
        torch.set_num_threads(threads)
    return pd.DataFrame(rows, columns=["step", "p50", "p99"])


def _milliseconds(step: Callable[[int], object], row: int) -> float:
    began = time.perf_counter()
    step(row)
    return 1000 * (time.perf_counter() - began)


def _load_ranking(
    run: Path,
    params: Params,
    serves_aligned: bool,
    seed: int | None,
    intents: pd.DataFrame,
    meta: Mapping[str, Any],
    device: torch.device,
) -> Ranking | None:
    seeds = params.ranker.seeds
    if seed is not None and seed not in seeds:
        raise ArtifactError(f"{run} has rankers of the seeds {', '.join(map(str, seeds))}; found seed {seed}")
    rankers, texts = (ALIGNED_RANKERS, ALIGNED_TEXTS) if serves_aligned else (QE_REC, TEXTS)
    folder = run / rankers / f"seed-{seeds[0] if seed is None else seed}"
    if not folder.is_dir():
        return None
    return Ranking.of(folder, run / ENCODED, intents, stored.load(run / texts), meta.get("sampled_negatives"), device)


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
