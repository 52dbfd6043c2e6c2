"""A study: what many runs in one folder found, gathered into tables (compare.py compares them).

Only results of runs that have finished count, and that were not made stale since. Where the runs are gone, the folder
holds PUBLISHED and sweep.json themselves (outputs/published/), and these tables are read instead.
"""

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pandas as pd

from rgalign.evaluation import metrics, results
from rgalign.evaluation.comparisons import INTERVALS, PAIR, by_world
from rgalign.params import ROOT, load_run
from rgalign.run import artifacts
from rgalign.run.artifacts import ArtifactError
from rgalign.run.plan import EVALUATION, STAGES, stage_params
from rgalign.run.stages import params_changes

STAGE = "90_ablation"
SWEEP = "sweep.json"  # what a sweep did (rgalign/commands/sweep.py): each run's params file, seed, stages, failure
FULL = "rgalign_rec"  # the model that an ablation leaves something out of
ABLATIONS = "ablations"  # the folder of their params files: params/ablations/no_neftune.yaml is rgalign_rec/no_neftune
METRICS = tuple(name for name, metric in metrics.METRICS.items() if metric.in_study)
SLICES = ("all", "cold", "tail", "shuffled")
WORLD_TYPES = {"distance": "float64", "world_seed": "Int64"}
WORLD = list(WORLD_TYPES)
RUN = ["run", "recipe", "ablation", "seed", "state", "data", *WORLD]  # columns of runs_of
PUBLISHED = ("results.parquet", "worlds.parquet", "stage_seconds.parquet")  # of a study whose runs are gone
# What a step is worth where nothing comes after it: the whole may make up for a step that does harm. Of the pairs with
# QE-Rec the one with no_alignment is the fair one: its ranker is trained as often, QE-Rec's once less.
STEPS = (
    ("rgalign_rec/random_sft", "rgalign_rec/sft_only"),
    ("rgalign_rec/sft_only", "qe_rec"),
    ("rgalign_rec/sft_only", "rgalign_rec/no_alignment"),
    ("rgalign_rec/sft_dpo", "rgalign_rec/sft_only"),
    ("rgalign_rec/sft_dpo", "rgalign_rec/no_alignment"),
    ("rgalign_rec/cl_only", "qe_rec"),
    ("rgalign_rec/cl_only", "rgalign_rec/no_alignment"),
)


def model_of(params_file: str | Path) -> str:
    """The model that an ablation's params file makes (rgalign_rec/<its name>); empty for any other params file.

    Raises ValueError with the nearest name where results.MODELS does not know it.
    """
    path = Path(params_file)
    if path.parent.name != ABLATIONS:
        return ""
    name = f"{FULL}/{path.stem}"
    if name not in results.MODELS:
        raise ValueError(f"{params_file} would make a row of its own, but {results.unknown_model(name)}")
    return name


def read_sweep(folder: Path) -> dict[str, Any]:
    """A folder's sweep.json; without runs where no sweep was there. Raises ArtifactError where it cannot be read."""
    path = folder / SWEEP
    if not path.is_file():
        return {"runs": {}}
    try:
        swept = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(swept["runs"], dict):
            raise ValueError("its runs are no list by name")
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); delete it and give the sweep's command again") from None
    return swept


def or_published(folder: Path) -> Path:
    """The folder; one without runs gets the tables of the published study first, so that they can be read at once."""
    published = ROOT / "outputs" / "published" / "study"
    if not any(folder.glob("*/params.yaml")) and not is_published(folder) and is_published(published):
        for name in (*PUBLISHED, SWEEP):
            shutil.copyfile(published / name, folder / name)
    return folder


def is_published(folder: Path) -> bool:
    return all((folder / name).is_file() for name in PUBLISHED)


def runs_of(folder: Path) -> pd.DataFrame:
    """The runs in a study's folder, by name: run, recipe, ablation, seed, state, data, distance, world_seed.

    recipe    name of the params file; of a run that no sweep made, its folder's
    ablation  the model that it makes of rgalign_rec (model_of), else empty
    state     `finished`, or what keeps its results out of the study
    The last three are empty where no results count. Raises ArtifactError where no run has finished.
    """
    swept, rows = read_sweep(folder)["runs"], []
    if is_published(folder):
        return _published_runs(folder, swept)
    found = {path.parent.name for path in folder.glob("*/params.yaml")}
    for name in sorted(found | set(swept)):
        made = swept.get(name, {})
        file = made.get("params_file", f"{name}.yaml")
        seed = load_run(folder / name).run.seed if name in found else made["seed"]
        state = _unfinished(folder / name) if name in found else "has not begun"
        state = state and (made.get("failed") or state)
        world = {} if state else table_of(folder, name, "results").iloc[0][["data", *WORLD]].to_dict()
        row = {"run": name, "recipe": Path(file).stem, "ablation": model_of(file), "seed": seed}
        rows.append(row | {"state": state or "finished"} | world)
    runs = pd.DataFrame(rows, columns=RUN).astype(WORLD_TYPES)
    if not (runs["state"] == "finished").any():
        states = f"\n{runs[['run', 'state']].to_string(index=False)}" if len(runs) else ""
        command = f"python -m rgalign sweep PARAMS --seeds 5 --out {folder}"
        raise ArtifactError(f"no run in {folder} has results; start some: {command}{states}")
    return runs


def _published_runs(folder: Path, swept: dict[str, Any]) -> pd.DataFrame:
    """runs_of by what sweep.json says of each run; its world and distance by the results.

    Raises ArtifactError where these do not say which world or distance a run had.
    """
    table, key, rows = _published_results(folder), "data.world.distance", []
    overridden = {float(made["overrides"][key]) for made in swept.values() if key in made["overrides"]}
    plain = [value for value in table["distance"].unique() if value not in overridden]
    for name, made in sorted(swept.items()):
        worlds = table["world_seed"][table["lm_seed"] == made["seed"]].unique()
        distance = float(made["overrides"][key]) if key in made["overrides"] else plain[0] if plain else None
        if not made["failed"] and (len(worlds) != 1 or len(plain) > 1 or distance is None):
            raise ArtifactError(f"{folder}: results.parquet does not say which world and distance {name} had")
        row = {"run": name, "recipe": Path(made["params_file"]).stem, "ablation": model_of(made["params_file"])}
        row |= {"seed": made["seed"], "state": made["failed"] or "finished", "data": table["data"].iloc[0]}
        rows.append(row | ({} if made["failed"] else {"distance": distance, "world_seed": worlds[0]}))
    return pd.DataFrame(rows, columns=RUN).astype(WORLD_TYPES)


def _published_results(folder: Path) -> pd.DataFrame:
    return results.conform(pd.read_parquet(folder / "results.parquet"), "results")


def published_worlds(folder: Path, wanted: Collection[tuple[str, str]]) -> pd.DataFrame:
    """by_world's rows of the pairs `wanted`, with each world's own INTERVALS where they were published."""
    kept = pd.read_parquet(folder / "worlds.parquet").astype(WORLD_TYPES)
    kept = kept.reindex(columns=[*kept, *(name for name in INTERVALS if name not in kept)])
    pairs = list(kept[PAIR].itertuples(index=False, name=None))
    added = by_world(_published_results(folder), [pair for pair in wanted if pair not in set(pairs)])
    kept = kept[[pair in wanted for pair in pairs]]
    return pd.concat([kept, added], ignore_index=True) if len(added) else kept.reset_index(drop=True)


def inputs(folder: Path, runs: pd.DataFrame) -> list[str]:
    """The files that name the bytes of all that a study reads."""
    finished = runs["run"][runs["state"] == "finished"]
    return list(PUBLISHED) if is_published(folder) else [f"{run}/manifest.json" for run in finished]


def _unfinished(run: Path) -> str | None:
    """Why a run's results do not count: notebook 09 has not run, or a stage before it has run again since."""
    entries, params = artifacts.read_manifest(run)["stages"], load_run(run)
    if EVALUATION not in entries:
        return f"{EVALUATION} has not run"
    made: dict[str, str] = {}
    for name, entry in entries.items():
        if name not in STAGES or not STAGES[name].in_sequence or name > EVALUATION:
            continue
        if params_changes(entry["params"], stage_params(STAGES[name], params)):
            return f"{name} has other params now: run it again"
        made |= entry["outputs"]
    stale = [name for name, was in entries[EVALUATION]["inputs"].items() if made.get(name, was) != was]
    return f"{EVALUATION} is older than {', '.join(stale)}: run it again" if stale else None


def table_of(folder: Path, run: str, table: str) -> pd.DataFrame:
    """A table that notebook 09 wrote in a run. Raises ArtifactError where it is not there or was altered since."""
    artifact = f"tables/{table}.parquet"
    path, entry = folder / run / artifact, artifacts.read_manifest(folder / run)["stages"][EVALUATION]
    if not path.is_file() or artifacts.digest(path) != entry["outputs"].get(artifact):
        state = "was altered" if path.is_file() else "is not there"
        raise ArtifactError(f"{run}/{artifact} {state}: give the sweep's command again (or run 09_evaluation)")
    try:
        return results.conform(pd.read_parquet(path), table)
    except ValueError as error:
        raise ArtifactError(f"{run}/{artifact} is of another version; run {EVALUATION} there again. {error}") from None


def results_of(folder: Path, runs: pd.DataFrame) -> pd.DataFrame:
    """The results rows of all finished runs on the test split, METRICS and SLICES alone, with a column `recipe`.

    An ablation gives its rgalign_rec alone, under its own name. A model that several runs of one world have is there
    once; raises ValueError where they do not agree, or where the runs are not of one data set.
    """
    if is_published(folder):
        table = _published_results(folder)
        recipes = runs.drop_duplicates("ablation").set_index("ablation")["recipe"]
        return table.assign(recipe=table["model"].map(recipes).fillna(recipes[""]))
    parts = []
    for run in runs[runs["state"] == "finished"].itertuples():
        table = table_of(folder, run.run, "results")
        rows = (table["split"] == "test") & table["metric"].isin(METRICS) & table["slice"].isin(SLICES)
        parts.append(as_row(table[rows], run.ablation).assign(recipe=run.recipe))
    found = pd.concat(parts, ignore_index=True)
    if len(names := sorted(found["data"].unique())) > 1:
        raise ValueError(f"the runs are of several data sets ({', '.join(names)}); give each its own study (--out)")
    found = found.drop_duplicates([name for name in found if name != "recipe"])
    doubled = found[found.duplicated(results.ORDER["results"], keep=False)]
    if len(doubled):
        first, recipes = doubled.iloc[0], " and ".join(sorted(doubled["recipe"].unique()))
        raise ValueError(
            f"{recipes} differ in {first['model']} of world {first['world_seed']} at distance {first['distance']}: "
            f"give one a study of its own (--out), or make its params file an ablation (params/{ABLATIONS}/)"
        )
    return found.reset_index(drop=True)


def as_row(table: pd.DataFrame, ablation: str) -> pd.DataFrame:
    """A run's table as the study has it: whole, or of an ablation its rgalign_rec under the ablation's name."""
    return table[table["model"] == FULL].assign(model=ablation) if ablation else table


def pairs_of(folder: Path, runs: pd.DataFrame) -> list[tuple[str, str]]:
    """(model, against): what the runs compared themselves, each ablation against the whole, and STEPS."""
    if is_published(folder):
        models, pairs = set(_published_results(folder)["model"]), pairs_in(pd.read_parquet(folder / "worlds.parquet"))
        pairs |= {pair for pair in STEPS if models.issuperset(pair)}
    else:
        finished = runs[runs["state"] == "finished"]
        pairs = {pair for pair in STEPS if set(pair) - {"qe_rec"} <= set(finished["ablation"])}
        for run in finished.itertuples():
            pairs |= {(run.ablation, FULL)} if run.ablation else pairs_in(table_of(folder, run.run, "comparisons"))
    order = list(results.MODELS).index
    return sorted(pairs, key=lambda pair: (order(pair[0]), order(pair[1])))


def pairs_in(table: pd.DataFrame) -> set[tuple[str, str]]:
    return set(table[PAIR].itertuples(index=False, name=None))


def stage_seconds(folder: Path, runs: pd.DataFrame) -> pd.DataFrame:
    """What each stage of each run cost; of a stage that was copied, in the run named in `shared_from`."""
    if is_published(folder):
        return pd.read_parquet(folder / "stage_seconds.parquet")
    columns = ["run", "recipe", "seed", "stage", "seconds", "peak_memory_mb", "shared_from"]
    rows = [
        (run.run, run.recipe, run.seed, stage, entry["seconds"], entry["peak_memory_mb"], entry.get("shared_from"))
        for run in runs.itertuples()
        for stage, entry in artifacts.read_manifest(folder / run.run)["stages"].items()
    ]
    texts = dict.fromkeys(["run", "recipe", "stage", "shared_from"], "string")
    return pd.DataFrame(rows, columns=columns).astype(texts | {"seconds": "float64"})
