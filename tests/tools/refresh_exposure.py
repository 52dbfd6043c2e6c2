"""What QE-Rec learns by each loss of ranker.exposure, on valid of a finished simulated run; test is not read.

python tests/tools/refresh_exposure.py RUN.. writes outputs/published/exposure-valid/worlds.csv. Each run is finished
through notebook 03; the published table is of the worlds 41 and 42 of outputs/published/match-worlds, which no
search has used; no match terms, ranker seeds 0 and 1. Settings are those of the run, found with the shown list alone.
"""

import sys
import tempfile
from pathlib import Path

import pandas as pd

from rgalign.data import tables
from rgalign.evaluation.judge import Judge
from rgalign.params import ROOT, load_run
from rgalign.ranker import exposure, store
from rgalign.ranker.fit import gauc_of, score_kb
from rgalign.ranker.train import load_parts, parts_of_variant, train
from rgalign.shopworld.traffic import Traffic

TARGET = ROOT / "outputs/published/exposure-valid/worlds.csv"
LOSSES = (("shown", 0), ("kb", 24), ("kb", 80), ("ips", 0))
SEEDS = (0, 1)
COLUMNS = ["world_seed", "exposure", "kb_negatives", "seed", "gauc", "recall@3/kb"]
COLUMNS += ["ctr@3 debiased", "standard error", "ctr@3 true"]


def losses(run: Path, work: Path) -> pd.DataFrame:
    """world_seed, exposure, kb_negatives, seed, gauc, recall@3/kb, and what clicks the best three of the KB would have
    had: debiased, as a log says it (its standard error over sessions beside it), and true, by the simulator."""
    params, rows = load_run(run), []
    shop = tables.read(run / "tables/dataset", splits=("valid",), truth=True)
    traffic = Traffic.of(shop.meta, shop.sessions, shop.truth)
    asked = params.ranker.model_copy(update={"exposure": "ips", "models": ("qe_rec",), "tuned": {}})
    seen = load_parts(run / "tables/encoded").train
    exposure.write(work / "exposure", run / "tables/dataset", seen, asked, lambda: None)
    parts = load_parts(run / "tables/encoded", exposure=work / "exposure")
    own = parts_of_variant(parts, "qe_rec", run / "tables/embeddings", params.reasoner.seed)
    assert own.valid.session_id.tolist() == shop.sessions["session_id"].tolist()
    judge = Judge.of(shop, own.valid, own.intents, (own.train, own.dev))
    judge = judge.with_log(run / "tables/dataset", (own.train, own.dev))
    for kind, negatives in LOSSES:
        change = {"exposure": kind, "kb_negatives": max(negatives, 1)}
        settings = params.ranker.settings()["qe_rec"].model_copy(update=change)
        for seed in SEEDS:
            folder, positions = work / f"{kind}-{negatives}", own.train.candidates.shape[1]
            train({"qe_rec": settings}, [seed], own, folder=folder, positions=positions, progress=False)
            ranker = store.load(folder / f"qe_rec/seed-{seed}")
            scores = score_kb(ranker, own.valid, own.intents)
            found = judge.scores(scores, "qe_rec", seed)
            debiased = found["ctr@3/kb"].dropna()
            told = gauc_of(ranker, own.valid, own.intents).value, found["recall@3/kb"].mean()
            told += debiased.mean(), debiased.sem(), traffic.ctr(traffic.top(scores))
            rows.append((params.run.seed, kind, negatives, seed, *told))
            print(*rows[-1], flush=True)
    return pd.DataFrame(rows, columns=COLUMNS)


if __name__ == "__main__":
    found = []
    for run in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as scratch:
            found.append(losses(Path(run), Path(scratch)))
    table = pd.concat(found)
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    table.round(4).to_csv(TARGET, index=False, lineterminator="\n")
