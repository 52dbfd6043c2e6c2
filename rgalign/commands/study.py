"""A study: what many runs in one folder found, gathered into tables (study_compare.py compares them).

Only what counts is gathered: the results of runs that ended, as their manifests say, and were not made stale since.
Where the runs are gone and their tables were published, these are read instead (study_kept.py).
"""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from rgalign.commands import study_kept
from rgalign.evaluation import metrics, results
from rgalign.evaluation.comparisons import PAIR
from rgalign.params import load_run
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
WORLD = ["distance", "world_seed"]
# What a step is worth where nothing comes after it: the whole may make up for a step that does harm.
STEPS = (
    ("rgalign_rec/random_sft", "rgalign_rec/sft_only"),
    ("rgalign_rec/sft_only", "qe_rec"),
    ("rgalign_rec/sft_dpo", "rgalign_rec/sft_only"),
    ("rgalign_rec/cl_only", "qe_rec"),
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
        said = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(said["runs"], dict):
            raise ValueError("its runs are no list by name")
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); delete it and give the sweep's command again") from None
    return said


def runs_of(folder: Path) -> pd.DataFrame:
    """The runs in a study's folder, by name: run, recipe, ablation, seed, state, data, distance, world_seed.

    recipe    name of the params file; of a run that no sweep made, its folder's
    ablation  the model that it makes of rgalign_rec (model_of), else empty
    seed      run.seed
    state     `finished`, or what keeps its results out of the study
    The last three are those of its results, empty where it has none that count. Raises ArtifactError where no run has
    finished: there is nothing to study.
    """
    swept, rows = read_sweep(folder)["runs"], []
    if study_kept.is_kept(folder):
        return study_kept.runs(folder, swept, model_of)
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
    runs = pd.DataFrame(rows, columns=["run", "recipe", "ablation", "seed", "state", "data", *WORLD])
    runs = runs.astype({"distance": "float64", "world_seed": "Int64"})
    if not (runs["state"] == "finished").any():
        told = f"\n{runs[['run', 'state']].to_string(index=False)}" if len(runs) else ""
        raise ArtifactError(
            f"no run in {folder} has results; start some: python -m rgalign sweep PARAMS --seeds 5 --out {folder}{told}"
        )
    return runs


def inputs(folder: Path, runs: pd.DataFrame) -> list[str]:
    """The files that name the bytes of all that a study reads: its runs' manifests, or the tables that were kept."""
    finished = runs["run"][runs["state"] == "finished"]
    return list(study_kept.FILES) if study_kept.is_kept(folder) else [f"{run}/manifest.json" for run in finished]


def _unfinished(run: Path) -> str | None:
    """Why a run's results do not count: notebook 09 has not run, or what came before it was made anew since."""
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
    if study_kept.is_kept(folder):
        table = study_kept.results(folder)
        recipes = runs.drop_duplicates("ablation").set_index("ablation")["recipe"]
        return table.assign(recipe=table["model"].map(recipes).fillna(recipes[""]))
    parts = []
    for run in runs[runs["state"] == "finished"].itertuples():
        table = table_of(folder, run.run, "results")
        wanted = (table["split"] == "test") & table["metric"].isin(METRICS) & table["slice"].isin(SLICES)
        parts.append(as_row(table[wanted], run.ablation).assign(recipe=run.recipe))
    found = pd.concat(parts, ignore_index=True)
    if len(names := sorted(found["data"].unique())) > 1:
        raise ValueError(
            f"the runs are of several data sets ({', '.join(names)}); give each a study of its own (--out)"
        )
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
    if not ablation:
        return table
    return table[table["model"] == FULL].assign(model=ablation)


def pairs_of(folder: Path, runs: pd.DataFrame) -> list[tuple[str, str]]:
    """(model, against): what the runs compared themselves, each ablation against the whole, and STEPS."""
    if study_kept.is_kept(folder):
        return study_kept.pairs(folder, STEPS)
    finished = runs[runs["state"] == "finished"]
    pairs = [pair for pair in STEPS if set(pair) - {"qe_rec"} <= set(finished["ablation"])]
    for run in finished.itertuples():
        if run.ablation:
            pairs.append((run.ablation, FULL))
        else:
            own = table_of(folder, run.run, "comparisons")
            pairs += own[PAIR].drop_duplicates().itertuples(index=False, name=None)
    order = list(results.MODELS).index
    return sorted(set(pairs), key=lambda pair: (order(pair[0]), order(pair[1])))


def stage_seconds(folder: Path, runs: pd.DataFrame) -> pd.DataFrame:
    """What each stage of each run cost: run, recipe, seed, stage, seconds, peak_memory_mb, shared_from.

    A stage that was taken over from another run has the figures of that run, named in `shared_from`, else empty.
    """
    if study_kept.is_kept(folder):
        return pd.read_parquet(folder / "stage_seconds.parquet")
    rows = [
        {
            "run": run.run,
            "recipe": run.recipe,
            "seed": run.seed,
            "stage": stage,
            "shared_from": entry.get("shared_from"),
        }
        | {name: entry[name] for name in ("seconds", "peak_memory_mb")}
        for run in runs.itertuples()
        for stage, entry in artifacts.read_manifest(folder / run.run)["stages"].items()
    ]
    columns = ["run", "recipe", "seed", "stage", "seconds", "peak_memory_mb", "shared_from"]
    types = {"run": "string", "recipe": "string", "stage": "string", "seconds": "float64", "shared_from": "string"}
    return pd.DataFrame(rows, columns=columns).astype(types)
