"""The stages of a run in their order: what each notebook reads, writes, depends on, and may open.

A new stage is one entry in STAGES; nothing else lists them.
"""

import re
from dataclasses import dataclass
from typing import Any

from rgalign.params import Params, flat


@dataclass(frozen=True)
class Stage:
    """One notebook: artifacts read and written (paths in the run directory), params it depends on.

    given  paths in the run directory that no stage writes and users may add: read where they are there
    """

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    params: tuple[str, ...]  # sections, or dotted parts of them
    given: tuple[str, ...] = ()
    seconds: tuple[float, float] = (5, 0)  # estimate on two cores: fixed, and per 1,000 sessions
    in_sequence: bool = True  # False: runs only when it is asked for by name
    models: bool = False  # reads the language models outside the run directory that the params name
    aligns: bool = False  # part of the alignment, which a run may do without (alignment.loop.rounds 0)

    @property
    def title(self) -> str:
        """What the terminal calls it: reward model, RG-SFT, .."""
        words = self.name.partition("_")[2].replace("_", " ")
        return {"ab test": "A/B test"}.get(words, re.sub("^rg (.*)", lambda found: f"RG-{found[1].upper()}", words))


def declared(name: str, *, reads: str = "", writes: str = "", params: str = "", given: str = "", **more: Any) -> Stage:
    """A Stage, of texts that have its paths and params side by side."""
    return Stage(name, *(tuple(text.split()) for text in (reads, writes, params, given)), **more)


# What every stage of the alignment reads, and the params it depends on.
LEARNT = "tables/dataset tables/encoded tables/embeddings tables/match tables/exposure models/reasoner models/rankers"
JUDGED = "evaluation.gauc_group evaluation.gauc_weight evaluation.bootstrap evaluation.ihr_judge"
# and what the models without training compare
COMPARED = "evaluation.untrained reasoner.kind reasoner.features data.features.drop"
ALIGNED = "reasoner ranker data.features.drop evaluation.ihr_judge run"
# and every one that tunes the reasoner
TUNED = f"alignment.lora alignment.weights alignment.engine alignment.loop.look_sessions {ALIGNED}"
RETRAINED = "alignment.loop.ranker alignment.loop.learning_rate alignment.loop.patience"

EVALUATION = "09_evaluation"  # writes the three long tables that studies and reports are made from

_STAGES = (
    declared(
        "01_data",
        writes="tables/dataset tables/encoded tables/encoded_test",
        params="data run.warm_start",
        seconds=(8, 0.3),
    ),
    declared(
        "02_reasoner",
        reads="tables/dataset tables/encoded",
        writes="models/reasoner tables/pretraining.parquet tables/queries.parquet tables/writing.parquet "
        "tables/embeddings",
        params="reasoner ranker.models ranker.match ranker.written data.features.drop evaluation.ihr_judge "
        "evaluation.untrained.raw_cosine run",
        seconds=(10, 3),
        models=True,
    ),
    declared(
        "03_rankers",
        reads="tables/dataset tables/encoded tables/embeddings tables/queries.parquet",
        writes="models/rankers tables/match tables/exposure tables/search.parquet tables/learning_curves.parquet "
        "tables/valid_metrics.parquet",
        params=f"ranker run alignment.weights {COMPARED} {JUDGED}",
        seconds=(8, 3),
    ),
    declared(
        "04_reward_model",
        reads=LEARNT,
        writes="tables/candidates.parquet models/reward tables/reward_judged.parquet",
        params=f"alignment.candidates alignment.reward {ALIGNED}",
        seconds=(10, 4.5),
        aligns=True,
    ),
    declared(
        "05_rg_sft",
        reads=f"{LEARNT} tables/writing.parquet tables/candidates.parquet models/reward",
        writes="tables/best_of_n.parquet tables/sft.parquet tables/row_sft.parquet tables/writing_sft.parquet "
        "models/sft",
        params=f"alignment.reward alignment.sft {TUNED}",
        seconds=(10, 1.5),
        aligns=True,
    ),
    declared(
        "06_rg_dpo",
        reads=f"{LEARNT} tables/writing.parquet tables/candidates.parquet tables/row_sft.parquet models/reward "
        "models/sft",
        writes="tables/preferences.parquet tables/reference.parquet tables/dpo.parquet tables/dpo_watch.parquet "
        "tables/row_dpo.parquet tables/writing_dpo.parquet models/dpo",
        params=f"alignment.reward alignment.dpo alignment.grpo {TUNED}",
        seconds=(10, 1.5),
        aligns=True,
    ),
    declared(
        "07_rg_cl",
        reads=f"{LEARNT} tables/best_of_n.parquet tables/valid_metrics.parquet tables/row_dpo.parquet models/reward "
        "models/dpo",
        writes="tables/retrained_embeddings tables/retrained_curves.parquet tables/row_retrained.parquet "
        "tables/cl.parquet tables/row_cl.parquet models/retrained_rankers models/cl models/cl_folds models/cl_rankers",
        params=f"alignment.reward alignment.cl {RETRAINED} alignment.loop.cross_fit {JUDGED} {TUNED}",
        seconds=(10, 3),
        aligns=True,
    ),
    declared(
        "08_closed_loop",
        reads=f"{LEARNT} models/reward models/dpo models/retrained_rankers models/cl models/cl_folds models/cl_rankers "
        "tables/valid_metrics.parquet tables/retrained_embeddings tables/retrained_curves.parquet "
        "tables/row_sft.parquet tables/row_dpo.parquet tables/row_retrained.parquet tables/row_cl.parquet",
        writes="models/rgalign models/kb_reader models/aligned_rankers tables/aligned_embeddings "
        "tables/rounds.parquet tables/stage_rows.parquet tables/aligned_curves.parquet "
        "tables/aligned_valid_metrics.parquet",
        params=f"alignment {JUDGED} {ALIGNED}",
        seconds=(10, 1.5),
        aligns=True,
    ),
    declared(
        EVALUATION,
        reads="tables/dataset tables/encoded tables/encoded_test tables/embeddings tables/match models/reasoner "
        "models/rankers tables/valid_metrics.parquet models/rgalign models/aligned_rankers tables/aligned_embeddings "
        "tables/aligned_valid_metrics.parquet",
        given="labels.parquet",  # python -m rgalign labels
        writes="tables/test_embeddings tables/test_match tables/session_metrics.parquet tables/results.parquet "
        "tables/comparisons.parquet",
        params=f"{JUDGED} evaluation.untrained ranker.models alignment.loop.rounds {ALIGNED}",
        seconds=(8, 0.3),
    ),
    declared(
        "10_ab_test",
        reads="tables/dataset tables/encoded tables/encoded_test tables/embeddings tables/aligned_embeddings "
        "tables/match tables/test_embeddings tables/test_match models/rankers models/aligned_rankers",
        writes="tables/experiment.parquet tables/alarms.parquet tables/off_policy.parquet",
        params=f"evaluation.experiment ranker.models alignment.loop.rounds {ALIGNED}",
        seconds=(15, 0.6),
    ),
    declared(
        "00_tour",  # of a finished run: trains nothing, and is opened last
        reads=f"{LEARNT} models/reward models/rgalign models/aligned_rankers tables/valid_metrics.parquet "
        "tables/aligned_valid_metrics.parquet tables/results.parquet tables/comparisons.parquet",
        params="run.seed",
        seconds=(15, 0),
        in_sequence=False,
    ),
    declared(
        "90_ablation",  # over a folder of runs, whose manifests it reads (OpenStage.use)
        given="sweep.json",
        writes="tables/results.parquet tables/comparisons.parquet tables/worlds.parquet tables/stage_seconds.parquet",
        params="evaluation.bootstrap run.seed",
        seconds=(10, 0),
        in_sequence=False,
    ),
    declared(
        "91_benchmarks",
        writes="tables/benchmarks.parquet",
        params="run data.seed",
        seconds=(240, 0),
        in_sequence=False,
    ),
)
STAGES = {each.name: each for each in _STAGES}


def maker(artifact: str) -> Stage:
    """The stage that writes an artifact."""
    return next(stage for stage in STAGES.values() if artifact in stage.writes)


def needed(stage: Stage, params: Params) -> bool:
    """Whether a run of these params has this stage."""
    return params.alignment.loop.rounds > 0 or not stage.aligns


def reads_of(stage: Stage, params: Params) -> tuple[str, ...]:
    """What a stage reads in a run of these params: of stages that it has."""
    return tuple(name for name in stage.reads if needed(maker(name), params))


def stage_params(stage: Stage, params: Params) -> dict[str, Any]:
    """The leaves of the params that a stage depends on."""
    return {
        key: value
        for key, value in flat(params).items()
        if any(key == part or key.startswith(part + ".") for part in stage.params)
    }
