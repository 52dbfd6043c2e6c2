"""How seconds and memory grow with the sessions: a ShopWorld in shards, encoded, a two-tower trained, test evaluated.

    python -m benchmarks.scaling outputs/scaling --sessions 100000 300000 1000000

Each size is measured in a process of its own, so that its peak memory is its own. What a size has left on disk is used
again: a killed measurement goes on, and a size that was measured is not measured again. Training is cut after so many
lists, and its rate told.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from rgalign.params import ROOT
from rgalign.report import plots
from rgalign.run import artifacts
from rgalign.run.artifacts import ArtifactError, atomic, write_table, write_text

STEPS = ("draw", "fit", "encode", "load", "train", "evaluate")
SETTINGS = {"lists_per_batch": 512, "learning_rate": 4e-3}
TABLE, FIGURE = "scaling.parquet", "scaling.png"
DEV = 20_000  # lists at most on which the cut epoch is looked at
LISTS = 200_000  # trained on, at most


def measure(folder: Path, sizes: list[int], *, lists: int = LISTS, threads: int = 1) -> pd.DataFrame:
    """Measure every size, and write scaling.parquet: one row a size and step.

    Columns: sessions, step (STEPS), seconds, rows (what it went over), rate (rows a second), peak_mb (the process's
    peak memory by the end of it), disk_mb (what it left). A figure of it lies beside it. Raises ArtifactError where a
    size fails.
    """
    rows: list[dict[str, Any]] = []
    for size in sizes:
        said = folder / f"{size}.json"
        if said.is_file():
            rows += json.loads(said.read_text(encoding="utf-8"))
            continue
        command = [sys.executable, "-m", "benchmarks.scaling", str(folder), "--only", str(size)]
        command += ["--lists", str(lists), "--threads", str(threads)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
        if status := subprocess.run(command, cwd=ROOT, env=environment).returncode:
            raise ArtifactError(f"measuring {size:,} sessions ended with exit {status}: give the same command again")
        rows += json.loads(said.read_text(encoding="utf-8"))
    table = pd.DataFrame(rows)
    write_table(folder / TABLE, table)
    with atomic(folder / FIGURE) as temporary:
        figure_of(table).savefig(temporary, format="png", dpi=120)
    return table


def growth(table: pd.DataFrame) -> pd.Series:
    """Per step the exponent of seconds in sessions, by least squares on logarithms: 1 is linear; NaN for one size."""
    return table.groupby("step", sort=False).apply(_exponent, include_groups=False).reindex(STEPS)


def _exponent(own: pd.DataFrame) -> float:
    own = own[own["seconds"].notna()]
    if own["sessions"].nunique() < 2:
        return float("nan")
    return float(np.polyfit(np.log(own["sessions"]), np.log(own["seconds"].clip(lower=1e-3)), 1)[0])


def measure_one(folder: Path, size: int, *, lists: int, threads: int) -> list[dict[str, Any]]:
    """The rows of one size; run in a process of its own."""
    import torch

    from rgalign.data import shards, split
    from rgalign.params_training import RankerSettings
    from rgalign.ranker.train import Parts, build
    from rgalign.shopworld.world import write_world

    torch.set_num_threads(threads)
    world, encoded = folder / str(size) / "world", folder / str(size) / "encoded"
    development = partial(split.development_users, share=0.1, seed=0)
    rows: list[dict[str, Any]] = []

    def timed(step: str, job: Callable[[], Any], count: Callable[[Any], int], left: Path | None = None) -> Any:
        began = time.perf_counter()
        made = job()
        took, went_over = time.perf_counter() - began, count(made)
        peak, disk = artifacts.peak_memory_mb(), _megabytes(left) if left else 0
        rows.append({"sessions": size, "step": step, "seconds": round(took, 2), "rows": went_over,
                     "rate": round(went_over / max(took, 1e-3)), "peak_mb": peak, "disk_mb": disk})  # fmt: skip
        print(f"  {size:>9,}  {step:<8} {took:8.1f} s  {peak:6,} MiB", flush=True)
        return made

    there, users = (world / "dataset.yaml").is_file(), max(20, size * 2 // 9)  # as many visits a user as by default
    draw = partial(write_world, world, seed=0, sessions=size, users=users, progress=True)
    timed("draw", (lambda: None) if there else draw, lambda _: size, world)
    if there:
        rows[0] |= {"seconds": math.nan, "rate": math.nan}  # it was drawn by an earlier measurement
    space = timed("fit", lambda: shards.fit_folder(world, development=development), lambda _: size)
    encode = partial(shards.encode_folder, space, world, encoded, development=development)
    timed("encode", lambda: encode(splits=("train", "valid", "test")), lambda of: sum(of.values()), encoded)
    names = ("train", "dev", "valid", "test")
    parts = timed("load", lambda: {name: shards.load_lists(encoded, name) for name in names},
                  lambda found: sum(map(len, found.values())))  # fmt: skip
    intents = shards.load_intents(encoded)
    seen = Parts(space, intents, parts["train"], parts["dev"], parts["valid"])
    model = build("two_tower", seen, RankerSettings(), positions=seen.train.candidates.shape[1], seed=0)
    timed("train", lambda: _trained(model, seen, lists), lambda went_over: went_over)
    timed("evaluate", lambda: _judged(model, parts["test"], intents), len)
    return rows


def _trained(model, parts, most: int) -> int:
    """One epoch over at most so many lists with a click; returns how many it was."""
    import torch

    from rgalign.params_training import RankerSettings
    from rgalign.ranker.fit import fit, with_click

    own = with_click(parts.train.take(torch.arange(min(most, len(parts.train)))))
    dev = parts.dev.take(torch.arange(min(DEV, len(parts.dev))))
    fit(model, own, dev, parts.intents, RankerSettings(epochs=1, **SETTINGS), seed=0, progress=False)
    return len(own)


def _judged(model, lists, intents) -> np.ndarray:
    """The test split's scores, and its GAUC, printed."""
    from rgalign.evaluation.metrics import gauc_of_lists
    from rgalign.ranker.fit import score

    scores = score(model, lists, intents)
    found = gauc_of_lists(scores, lists.clicked.numpy(), lists.shown.numpy())
    print(f"             GAUC of test {found.value:.4f} after the cut epoch", flush=True)
    return scores


def _megabytes(folder: Path) -> int:
    return round(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20)


def main(arguments: list[str] | None = None) -> int:
    """Measure the sizes, or the one of --only in this process, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("folder", help="worlds and scaling.parquet go there, for example outputs/scaling")
    parser.add_argument("--sessions", type=int, nargs="+", default=[100_000, 300_000, 1_000_000])
    parser.add_argument("--lists", type=int, default=LISTS, help="trained on at most; the rate is told")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    folder = Path(os.path.abspath(options.folder))
    artifacts.refuse_no_folder(folder, "worlds and the table: give another one")
    if options.only:
        rows = measure_one(folder, options.only, lists=options.lists, threads=options.threads)
        write_text(folder / f"{options.only}.json", json.dumps(rows, indent=2) + "\n")
        return 0
    found = measure(folder, options.sessions, lists=options.lists, threads=options.threads)
    print(found.to_string(index=False))
    print(f"seconds ~ sessions ^ {growth(found).round(2).to_dict()}; table: {folder / TABLE}")
    return 0


def figure_of(table: pd.DataFrame) -> Figure:
    """Seconds of each step and peak memory against the number of sessions, log-log; a straight grey line is linear.

    table: columns sessions, step, seconds, peak_mb (`measure`); training, which is cut, is left out.
    """
    figure, (time, memory) = plots.panels_of(2, columns=2, width=10, height=4)
    grown = table[(table["step"] != "train") & table["seconds"].notna()]
    colours = plt.get_cmap("tab10").colors
    for colour, (step, own) in zip(colours, grown.groupby("step", sort=False), strict=False):
        time.plot(own["sessions"], own["seconds"].clip(lower=1e-2), marker="o", color=colour, label=step)
    sizes = np.array(sorted(table["sessions"].unique()), dtype=float)
    time.plot(sizes, sizes / sizes[0], color="#999999", linestyle=":", label="linear")
    peak = table.groupby("sessions")["peak_mb"].max()
    memory.plot(peak.index, peak / 1024, marker="o", color="#0072B2")
    for axes in (time, memory):
        axes.set_xscale("log")
        axes.set_xlabel("sessions")
    time.set_yscale("log")
    time.set(title="Time of each step", ylabel="seconds")
    time.legend(frameon=False, fontsize=8)
    memory.set(title="Memory, at its peak", ylabel="GiB")
    memory.set_ylim(bottom=0)
    return figure


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ArtifactError as error:
        sys.exit(str(error))
