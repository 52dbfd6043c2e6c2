"""What one session costs a service, and how that grows with the memory of earlier sessions (the match term `memory`).

    python -m benchmarks.serving RUN --remembered 10000 100000 1000000 --out outputs/serving

RUN is finished through notebook 03, with every match term in ranker.match. A session comes with its embedding and its
written queries, since those are the language model's work, and is ranked over 100 intents on one thread.
A memory of another size than the run's is made of its sessions, drawn again with noise: time and bytes do not depend
on what the vectors say.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter, process_time

import numpy as np
import pandas as pd
import torch

from rgalign.data import tables
from rgalign.errors import UserError
from rgalign.ranker.match_terms import MATCH_TERMS, Memory, unit_length
from rgalign.run.artifacts import ArtifactError, write_table
from rgalign.serve import DATASET, Scorer, load

TABLE = "serving.parquet"
SIZES = (10_000, 100_000, 1_000_000)
INTENTS = 100  # ranked; the knowledge base is filled up with new ones where it has fewer
NOISE = 0.5  # length of what is added to a vector of length 1


def remembering(memory: Memory, count: int, *, seed: int = 0) -> Memory:
    """The memory of so many sessions, drawn from those of this one with noise; no users."""
    rng = np.random.default_rng(seed)
    rows, dim = rng.integers(len(memory.vectors), size=count), memory.vectors.shape[1]
    vectors = np.empty((count, dim), np.float16)
    for own in np.array_split(np.arange(count), 1 + count // 100_000):  # float32 of all would be twice the memory
        noise = rng.standard_normal((len(own), dim), np.float32) * (NOISE / np.sqrt(dim))
        vectors[own] = unit_length(memory.vectors[rows[own]].astype(np.float32) + noise)
    return replace(memory, vectors=vectors, shown=memory.shown[rows], clicked=memory.clicked[rows], users=np.zeros(0))


def milliseconds(step: Callable[[int], object], rows: Sequence[int], *, warm: int = 5) -> dict[str, float]:
    """p50 and p99 of a step over these rows, the first `warm` of them left out: by the clock, and of the processor's
    time, in which other processes of a busy machine do not count."""
    spent = []
    for row in rows:
        clock, processor = perf_counter(), process_time()
        step(row)
        spent.append((perf_counter() - clock, process_time() - processor))
    found = 1000 * np.percentile(np.array(spent)[warm:], (50, 99), axis=0)
    return {"p50": found[0, 0], "p99": found[1, 0], "cpu_p50": found[0, 1], "cpu_p99": found[1, 1]}


def measure(scorer: Scorer, sessions: pd.DataFrame, sizes: Sequence[int]) -> pd.DataFrame:
    """One row a memory and step: remembered, step, intents, p50, p99, cpu_p50, cpu_p99 (ms), vectors_mb, file_mb.

    scorer     whose ranker reads every match term
    sessions   with every column; each is one call
    Steps: memory is that term alone; terms and ranker are all terms and the ranker, for a session that is encoded
    already; score is scorer.score of a frame of one row.
    vectors_mb, file_mb  MiB of the memory's float16 vectors, and of all that is saved of it
    Raises ArtifactError where a match term is not read.
    """
    if scorer.matcher is None or set(scorer.matcher.names) != set(MATCH_TERMS):
        read = ", ".join(() if scorer.matcher is None else scorer.matcher.names) or "none"
        raise ArtifactError(f"this ranker reads of the match terms {read}; expected all: {', '.join(MATCH_TERMS)}")
    if (missing := INTENTS - len(scorer.ranking.kb)) > 0:
        new = [f"new_{number}" for number in range(missing)]
        scorer = scorer.with_intents(pd.DataFrame({"intent_id": new, "title": new}))
    ones = [sessions.iloc[[row]] for row in range(len(sessions))]
    vectors, rows = [scorer.embed(one) for one in ones], []
    written = [scorer.write_queries(one) for one in ones]
    encoded = [scorer.ranking.lists(one, own) for one, own in zip(ones, vectors, strict=True)]
    of_sets = [{"prompt": own, "text": own, "written": asked}.get for own, asked in zip(vectors, written, strict=True)]
    asked = [scorer.matcher.sessions(one, own) for one, own in zip(ones, of_sets, strict=True)]
    for size in sizes:
        memory = remembering(scorer.matcher.terms["memory"], size)
        matcher = replace(scorer.matcher, terms={**scorer.matcher.terms, "memory": memory})
        own = replace(scorer, matcher=matcher)
        steps = {
            "memory": lambda row, matcher=matcher: matcher.ready["memory"](asked[row]),
            "terms and ranker": lambda row, matcher=matcher: scorer.ranking.scores(
                replace(encoded[row], match=matcher(asked[row]))
            ),
            "score": lambda row, own=own: own.score(ones[row], vectors=vectors[row], written=written[row]),
        }
        with tempfile.TemporaryDirectory() as folder:
            matcher.save(Path(folder) / "match")
            saved = (Path(folder) / "match/memory.safetensors").stat().st_size
        about = {"remembered": size, "intents": len(scorer.ranking.kb)}
        bytes_of = {"vectors_mb": memory.vectors.nbytes / 2**20, "file_mb": saved / 2**20}
        rows += [
            about | {"step": name} | milliseconds(step, range(len(ones))) | bytes_of for name, step in steps.items()
        ]
    return pd.DataFrame(rows)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table and write it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("run", help="a run directory, finished through notebook 03 with all match terms")
    parser.add_argument("--remembered", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--sessions", type=int, default=1000, help="of valid, one call each")
    parser.add_argument("--out", type=Path, default=Path("outputs/serving"), help=f"folder of {TABLE}")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    scorer, shop = load(options.run), tables.read(Path(options.run) / DATASET, splits=("valid",))
    table = measure(scorer, shop.sessions.head(options.sessions), options.remembered)
    write_table(options.out / TABLE, table)
    print(table.round(2).to_string(index=False))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(str(error))
