"""Made-up studies: folders of result tables and manifests as notebook 09 leaves them, and no run behind them."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from rgalign.evaluation import comparisons, results
from rgalign.params import load
from rgalign.run import artifacts
from rgalign.run.plan import STAGES, stage_params
from rgalign.run.stages import write_params

MODELS = {"popularity": 0.6, "two_tower_text": 0.75, "qe_rec": 0.8, "rgalign_rec": 0.85}  # and about their metrics
PAIRS = [("two_tower_text", "popularity"), ("qe_rec", "two_tower_text"), ("rgalign_rec", "qe_rec")]
SECONDS = {"01_data": 10.0, "02_reasoner": 20.0, "03_rankers": 30.0, "09_evaluation": 40.0}


def made_up_sessions(world: int, recipe: str, distance: float | None, seeds=(0, 1), ids=None) -> pd.DataFrame:
    """session_metrics of 60 sessions of 20 users: the same for all recipes of a world, but for rgalign_rec."""
    sessions = ids if ids is not None else [f"s{i:02}" for i in range(60)]
    parts = []
    for number, (model, level) in enumerate(MODELS.items()):
        own = sum(map(ord, recipe)) if model == "rgalign_rec" else 0
        for seed in (None,) if model == "popularity" else seeds:
            rng = np.random.default_rng([world, own, number, seed or 0, round(100 * (distance or 0))])
            values = {m: np.clip(rng.normal(level, 0.1, len(sessions)), 0, 1) for m in ("gauc", "recall@3", "ndcg@3")}
            hits = {m: rng.integers(0, 2, len(sessions)) if level >= 0.8 else np.nan for m in ("ihr@1", "ihr@3")}
            keys = {"session_id": sessions, "user_id": [f"u{i % 20}" for i in range(len(sessions))], "model": model}
            parts.append(pd.DataFrame({**keys, "seed": seed, "split": "test", "gauc_weight": 12.0, **values, **hits}))
    return results.conform(pd.concat(parts), "session_metrics")


def made_up_slices(sessions: pd.DataFrame) -> pd.DataFrame:
    ids = sessions["session_id"].unique()
    return pd.DataFrame({"cold": np.arange(len(ids)) % 5 == 0, "tail": np.arange(len(ids)) % 3 == 0}, index=ids)


def add_run(
    folder: Path, params_file: str, seed: int, *, distance: float | None = 0.5, world: int | None = None, **given
) -> Path:
    """A finished run, OUT/<recipe>-s<seed> (with the distance in its name where it is not 0.5), told in OUT/sweep.json.

    given  sessions and slices (masks) that are not to be made up
    """
    recipe = Path(params_file).stem
    overrides = {} if distance in (0.5, None) else {"data.world.distance": distance}
    name = "-".join([recipe, *(f"distance={distance}" for _ in overrides), f"s{seed}"])
    run, params = folder / name, load("params/smoke.yaml", {**overrides, "run.seed": seed})
    run.mkdir(parents=True)
    world = seed if world is None else world
    sessions = given.get("sessions", made_up_sessions(world, recipe, distance))
    masks = given.get("slices", made_up_slices(sessions))
    about = {"data": "shopworld", "distance": distance, "world_seed": None if distance is None else world}
    artifacts.write_table(run / "tables/session_metrics.parquet", sessions)
    found = results.results(sessions, masks, lm_seed=seed, **about)
    artifacts.write_table(run / "tables/results.parquet", found)
    compared = comparisons.comparisons(sessions, PAIRS, masks, distance=distance, seed=0, replicates=100)
    artifacts.write_table(run / "tables/comparisons.parquet", compared)
    write_params(run, params)
    for stage, seconds in SECONDS.items():
        tables = [each for each in STAGES[stage].writes if each.endswith(".parquet")]
        written = tables if stage == "09_evaluation" else ()
        entry = {"params": stage_params(STAGES[stage], params), "code": {}, "inputs": {}, "seconds": seconds}
        entry |= {"peak_memory_mb": 100, "outputs": {each: artifacts.digest(run / each) for each in written}}
        artifacts.record_stage(run, stage, entry)
    tell(folder, name, params_file, seed, overrides)
    return run


def tell(folder: Path, name: str, params_file: str, seed: int, overrides=None, failed: str = "") -> None:
    """Add a run to OUT/sweep.json."""
    path = folder / "sweep.json"
    said = json.loads(path.read_text()) if path.exists() else {"runs": {}}
    run = {"params_file": params_file, "seed": seed, "overrides": overrides or {}, "stages": {}, "failed": failed}
    said["runs"][name] = run
    artifacts.write_text(path, json.dumps(said))
