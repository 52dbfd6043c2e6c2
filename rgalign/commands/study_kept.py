"""A study whose runs are gone: its folder holds the tables that were published, and sweep.json (outputs/published/).

`study` and `study_compare` read these tables where they find no runs, so notebook 90 can be executed from them.
"""

from pathlib import Path

import pandas as pd

from rgalign.evaluation.comparisons import INTERVALS, PAIR, by_world
from rgalign.evaluation.results import MODELS, conform
from rgalign.run.artifacts import ArtifactError

FILES = ("results.parquet", "worlds.parquet", "stage_seconds.parquet")


def is_kept(folder: Path) -> bool:
    """Whether the folder holds a study's tables themselves; beside runs they lie in tables/."""
    return all((folder / name).is_file() for name in FILES)


def results(folder: Path) -> pd.DataFrame:
    return conform(pd.read_parquet(folder / "results.parquet"), "results")


def runs(folder: Path, swept: dict, named) -> pd.DataFrame:
    """study.runs_of: what sweep.json tells of each run, its world and distance by the results.

    swept  sweep.json's runs; named: study.model_of. Raises ArtifactError where a run's world or distance is not plain.
    """
    table, key, rows = results(folder), "data.world.distance", []
    apart = {float(made["overrides"][key]) for made in swept.values() if key in made["overrides"]}
    plain = [value for value in table["distance"].unique() if value not in apart]
    for name, made in sorted(swept.items()):
        worlds = table["world_seed"][table["lm_seed"] == made["seed"]].unique()
        distance = float(made["overrides"][key]) if key in made["overrides"] else plain[0] if plain else None
        if not made["failed"] and (len(worlds) != 1 or len(plain) > 1 or distance is None):
            raise ArtifactError(f"{folder}: results.parquet does not say which world and distance {name} had")
        row = {"run": name, "recipe": Path(made["params_file"]).stem, "ablation": named(made["params_file"])}
        row |= {"seed": made["seed"], "state": made["failed"] or "finished", "data": table["data"].iloc[0]}
        rows.append(row | ({} if made["failed"] else {"distance": distance, "world_seed": worlds[0]}))
    columns = ["run", "recipe", "ablation", "seed", "state", "data", "distance", "world_seed"]
    return pd.DataFrame(rows, columns=columns).astype({"distance": "float64", "world_seed": "Int64"})


def pairs(folder: Path, steps) -> list[tuple[str, str]]:
    """The pairs that were compared, and those of `steps` whose comparison is younger than the study."""
    there, models = _worlds(folder)[PAIR].drop_duplicates(), set(results(folder)["model"])
    found = {*there.itertuples(index=False, name=None), *(pair for pair in steps if models.issuperset(pair))}
    order = list(MODELS).index
    return sorted(found, key=lambda pair: (order(pair[0]), order(pair[1])))


def worlds(folder: Path, wanted) -> pd.DataFrame:
    """by_world's rows of the pairs `wanted`, with each world's own INTERVALS where they were kept."""
    kept = _worlds(folder)
    known = set(kept[PAIR].itertuples(index=False, name=None))
    kept = kept[[pair in wanted for pair in kept[PAIR].itertuples(index=False, name=None)]]
    added = by_world(results(folder), [pair for pair in wanted if pair not in known])
    return pd.concat([kept, added], ignore_index=True) if len(added) else kept.reset_index(drop=True)


def _worlds(folder: Path) -> pd.DataFrame:
    table = pd.read_parquet(folder / "worlds.parquet").astype({"world_seed": "Int64", "distance": "float64"})
    return table.reindex(columns=[*table, *(name for name in INTERVALS if name not in table)])
