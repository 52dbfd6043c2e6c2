"""The stages of a run in their order: what each notebook reads, writes, depends on, and may open.

A new stage is one entry in STAGES; nothing else lists them.
"""

from dataclasses import dataclass
from typing import Any

from rgalign.params import Params, flat


@dataclass(frozen=True)
class Stage:
    """One notebook: artifacts read and written (paths in the run directory), params it depends on, data it may open.

    given  paths in the run directory that no stage writes and people may: read where they are there
    """

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    params: tuple[str, ...]  # sections, or dotted parts of them
    given: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("train", "valid")
    seconds: tuple[float, float] = (5, 0)  # estimate on two cores: fixed, and per 1,000 sessions
    in_sequence: bool = True  # False: runs only when it is asked for by name
    models: bool = False  # reads the language models outside the run directory that params name


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "01_data",
            reads=(),
            writes=("tables/dataset", "tables/encoded", "tables/encoded_test"),
            params=("data",),
            splits=("train", "valid", "test"),  # checks and encodes all; shows train and valid only
            seconds=(8, 0.3),
        ),
        Stage(
            "02_reasoner",
            reads=("tables/dataset", "tables/encoded"),
            writes=(
                "models/reasoner",
                "tables/pretraining.parquet",
                "tables/queries.parquet",
                "tables/embeddings",
            ),
            params=("reasoner", "ranker.models", "data.features.drop", "evaluation.ihr_judge", "run"),
            seconds=(10, 3),
            models=True,
        ),
        Stage(
            "03_rankers",
            reads=("tables/dataset", "tables/encoded", "tables/embeddings", "tables/queries.parquet"),
            writes=(
                "models/rankers",
                "tables/search.parquet",
                "tables/learning_curves.parquet",
                "tables/valid_metrics.parquet",
            ),
            params=("ranker", "run", "evaluation"),
            seconds=(8, 3),
        ),
        Stage(
            "09_evaluation",
            reads=(
                "tables/dataset",
                "tables/encoded",
                "tables/encoded_test",
                "tables/embeddings",
                "models/reasoner",
                "models/rankers",
                "tables/valid_metrics.parquet",
            ),
            given=("labels.parquet",),  # python -m rgalign labels
            writes=("tables/session_metrics.parquet", "tables/results.parquet", "tables/comparisons.parquet"),
            params=("evaluation", "reasoner", "data.features.drop", "ranker.models", "ranker.seeds", "run"),
            splits=("train", "valid", "test"),
            seconds=(8, 0.3),
        ),
        Stage(
            "90_ablation",  # over a folder of runs, whose manifests it reads (OpenStage.use)
            reads=(),
            given=("sweep.json",),
            writes=(
                "tables/results.parquet",
                "tables/comparisons.parquet",
                "tables/worlds.parquet",
                "tables/stage_seconds.parquet",
            ),
            params=("evaluation.bootstrap", "run.seed"),
            splits=("train", "valid", "test"),
            seconds=(10, 0),
            in_sequence=False,
        ),
        Stage(
            "91_benchmarks",
            reads=(),
            writes=("tables/benchmarks.parquet",),
            params=("run", "data.seed"),
            seconds=(240, 0),
            in_sequence=False,
        ),
    )
}


def maker(artifact: str) -> Stage:
    """The stage that writes an artifact."""
    return next(stage for stage in STAGES.values() if artifact in stage.writes)


def stage_params(stage: Stage, params: Params) -> dict[str, Any]:
    """The leaves of the params that a stage depends on."""
    return {
        key: value
        for key, value in flat(params).items()
        if any(key == part or key.startswith(part + ".") for part in stage.params)
    }
