"""Compare rankers with and without match terms on valid of finished runs; the test split is not read.

python tests/tools/refresh_match.py RUN.. writes outputs/published/match-valid/models.csv and comparisons.csv, with the
functions of notebook 03 (METHOD.md 4): users sampled again, mean over ranker seeds, Holm over the rows of one table.
The published tables are of

    python -m rgalign run params/govuk2021-minilm.yaml --through 09

and the same of params/govuk2021-opening-minilm.yaml, and of the sets where nobody wrote a sentence, whose rows have the
name of the run's folder (rows of other data sets stay in the tables):

    python -m rgalign run params/msweb-minilm.yaml --run-dir msweb-minilm --through 03 \
        --set 'ranker.match=[raw_cosine, word_overlap, memory]' --set 'alignment.loop.rounds=0' --set \
        'ranker.models=[two_tower_text, qe_rec, qe_rec/no_match, qe_rec/word_match, qe_rec/shuffled_match]'

and the same of params/cfpb2014-no-product.yaml and params/cfpb2014-minilm.yaml.

python tests/tools/refresh_match.py --written RUN writes outputs/published/written-valid: the same of a simulated world
whose ranker reads the queries that its reasoner writes, with RGAlign-Rec, each term alone before and after the
alignment, and what clicks the best three of the knowledge base would have had by the simulator's truth. They are of

    python -m rgalign run params/quickstart.yaml --run-dir RUN --through 08 --set 'ranker.seeds=[0, 1]' \
        --set 'ranker.match=[word_overlap, raw_cosine, memory, written_overlap, written_cosine]' \
        --set 'ranker.models=[qe_rec, qe_rec/no_match, qe_rec/word_match, qe_rec/no_written_match, \
        qe_rec/shuffled_written_match, qe_rec/shuffled_match]'

python tests/tools/refresh_match.py --worlds RUN.. writes outputs/published/match-worlds: the same models in several
simulated worlds, each row over the worlds (comparisons.comparisons_over_worlds) and each world's own, and the true CTR.
They are of the command above with --through 03, --set 'reasoner.others=[]' and --set run.seed=41, then 42.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from rgalign.data import tables, vectors
from rgalign.evaluation import comparisons, results, slices
from rgalign.evaluation.metrics import gauc_of_lists
from rgalign.params import ROOT, load_run
from rgalign.ranker import store
from rgalign.ranker.fit import score_kb, with_click
from rgalign.ranker.train import load_parts, parts_of_variant, with_vectors
from rgalign.shopworld.traffic import Traffic

TARGET = ROOT / "outputs/published/match-valid"
AGAINST = (
    "raw_cosine", "word_overlap", "two_tower_text", "two_tower_text/word_match",
    "qe_rec/no_match", "qe_rec/word_match", "qe_rec/no_written_match", "qe_rec/shuffled_written_match",
    "qe_rec/shuffled_match",
)  # fmt: skip
METRICS = ["gauc", "recall@3", "recall@3/kb"]
SLICES = ["all", "cold", "tail", "head"]


def measured(run: Path) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """Session metrics of a run's valid split, its slices, and the name of its data."""
    shop, parts = tables.excerpt(run / "tables/dataset", [], splits=("valid",)), load_parts(run / "tables/encoded")
    aligned = run / "tables/aligned_valid_metrics.parquet"
    sessions = pd.read_parquet(aligned if aligned.is_file() else run / "tables/valid_metrics.parquet")
    train = slices.of_train((parts.train, parts.dev), parts.intents)
    masks = slices.session_slices(shop.sessions, shop.impressions, **train)
    return sessions, masks, run.name if shop.name in ("msweb", "cfpb2014") else shop.name


def pairs_of(sessions: pd.DataFrame) -> list[tuple[str, str]]:
    """QE-Rec against each of AGAINST that the run has, and RGAlign-Rec where it is there."""
    there = set(sessions["model"])
    pairs = [("qe_rec", name) for name in AGAINST if name in there]
    return pairs + ([("rgalign_rec", "qe_rec"), ("rgalign_rec", "qe_rec/no_match")] if "rgalign_rec" in there else [])


def compared(run: Path, *, replicates: int = 1000) -> tuple[pd.DataFrame, pd.DataFrame]:
    """QE-Rec against each model that the run has: values of all models, and paired differences, by slice."""
    sessions, masks, name = measured(run)
    rows = comparisons.comparisons(sessions, pairs_of(sessions), masks, seed=0, replicates=replicates)
    values = results.results(sessions, masks, data=name)
    found = values.groupby(["model", "metric", "slice"], sort=False, observed=True).agg(
        value=("value", "mean"), seeds=("seed", "nunique"), groups=("groups", "first")
    )
    kept = ["model", "against", "metric", "slice", "difference", "ci_low", "ci_high", "p_holm", "seeds"]
    return tuple(
        table[table["metric"].isin(METRICS) & table["slice"].isin(SLICES)].assign(data=name).round(4)
        for table in (found.reset_index(), rows[kept])
    )


def true_ctr(run: Path) -> pd.DataFrame:
    """model, seed, ctr@3: of the best three of the KB for valid's sessions, by the simulator's truth. The last two rows
    are ceilings, which have no seed: of the list that was shown, and of the KB."""
    shop = tables.read(run / "tables/dataset", splits=("valid",), truth=True)
    traffic, params, rows = Traffic.of(shop.meta, shop.sessions, shop.truth), load_run(run), []
    before, after = run / "tables/match", run / "tables/aligned_embeddings"
    parts, seed_of = load_parts(run / "tables/encoded", before), params.reasoner.seed
    own = {name: parts_of_variant(parts, name, run / "tables/embeddings", seed_of) for name in params.ranker.models}
    if after.is_dir():
        moved = [vectors.load(after / side) for side in ("sessions", "intents")]
        aligned = load_parts(run / "tables/encoded", after / "match")
        own["rgalign_rec"] = with_vectors(aligned, "qe_rec", *moved, seed=seed_of)
    for name, parts in own.items():
        assert list(parts.valid.session_id) == shop.sessions["session_id"].tolist()
        folder = run / "models" / ("aligned_rankers" if name == "rgalign_rec" else f"rankers/{name}")
        for seed in params.ranker.seeds:
            scores = score_kb(store.load(folder / f"seed-{seed}"), parts.valid, parts.intents)
            rows.append((name, seed, traffic.ctr(traffic.top(scores))))
    shown = own["qe_rec"].valid.candidates.numpy()
    rows.append(("best three of the list", None, traffic.ctr(traffic.best(shown))))
    rows.append(("best three of the knowledge base", None, traffic.ctr(traffic.best())))
    return pd.DataFrame(rows, columns=["model", "seed", "ctr@3"]).astype({"seed": "Int64"})


def terms_alone(run: Path) -> pd.DataFrame:
    """term, part, before, aligned: GAUC of each match term alone, as notebook 03 left it and as notebook 08 did."""
    rows = {}
    for when, folder in (("before", "tables/match"), ("aligned", "tables/aligned_embeddings/match")):
        parts = load_parts(run / "tables/encoded", run / folder)
        for lists in map(with_click, (parts.dev, parts.valid)):
            values = lists.match.of_candidates(lists.candidates, lists.match.names).float().nan_to_num(0).numpy()
            for column, name in enumerate(lists.match.names):
                found = gauc_of_lists(values[:, :, column], lists.clicked.numpy(), lists.shown.numpy()).value
                rows.setdefault((name, lists.part), {})[when] = found
    return pd.DataFrame(rows).T.rename_axis(["term", "part"]).reset_index()


def write_written(run: Path) -> None:
    target = TARGET.with_name("written-valid")
    write([run], target)
    for name, table in (("true_ctr", true_ctr(run)), ("terms", terms_alone(run))):
        table.round(4).to_csv(target / f"{name}.csv", index=False, lineterminator="\n")


def write_worlds(runs: Sequence[Path]) -> None:
    """Tables over the worlds of these runs, and of each: metric, slice, model, against; true_ctr with its world."""
    target, rows, truths = TARGET.with_name("match-worlds"), [], []
    for run in runs:
        sessions, masks, _ = measured(run)
        own = comparisons.comparisons(sessions, pairs_of(sessions), masks, seed=0)
        own = own[own["metric"].isin([*METRICS, "ctr@3/kb"]) & own["slice"].isin(SLICES)]
        rows.append(own.assign(world_seed=load_run(run).run.seed))
        truths.append(true_ctr(run).assign(world_seed=load_run(run).run.seed))
    worlds, ends = pd.concat(rows), ["difference", "ci_low", "ci_high", "p_holm"]
    over = comparisons.comparisons_over_worlds(worlds.drop(columns=["worlds", "world_seeds", "p", "p_holm"]))
    target.mkdir(parents=True, exist_ok=True)
    key = ["model", "against", "metric", "slice"]
    for name, table in {
        "comparisons": over[[*key, *ends, "worlds", "world_seeds", "seeds"]],
        "by_world": worlds[["world_seed", *key, *ends, "seeds"]],
        "true_ctr": pd.concat(truths),
    }.items():
        table.round(4).to_csv(target / f"{name}.csv", index=False, lineterminator="\n")


def write(runs: Sequence[Path], target: Path = TARGET) -> None:
    tables_of = zip(*map(compared, runs), strict=True)
    target.mkdir(parents=True, exist_ok=True)
    for name, parts in zip(("models", "comparisons"), tables_of, strict=True):
        whole, path = pd.concat(parts), target / f"{name}.csv"
        whole = whole[["data", *(column for column in whole if column != "data")]]
        if path.is_file():  # rows of other data sets stay
            before = pd.read_csv(path)
            whole = pd.concat([before[~before["data"].isin(whole["data"])], whole])
        whole.to_csv(path, index=False, lineterminator="\n")


if __name__ == "__main__":
    if sys.argv[1] == "--written":
        write_written(Path(sys.argv[2]))
    elif sys.argv[1] == "--worlds":
        write_worlds([Path(run) for run in sys.argv[2:]])
    else:
        write([Path(run) for run in sys.argv[1:]])
