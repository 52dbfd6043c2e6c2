"""A run of the real notebooks at a size of seconds: their cells in this process, without a kernel's start."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib

from rgalign.params import ROOT, Params, load

matplotlib.use("Agg")

SMALL = {
    "data.world.sessions": 300,
    "data.world.users": 150,
    "data.world.transcripts": 60,
    "reasoner.tiny": {"hidden": 16, "layers": 1},
    "reasoner.others": [{"tiny": {"hidden": 8, "layers": 1}}],
    "reasoner.pretraining.kb_repeats": 1,
    "reasoner.queries": {"sessions": 20, "samples": 1, "max_new_tokens": 6},
    "ranker.models": ["qe_rec"],
    "ranker.seeds": [0],
    "ranker.epochs": 2,
    "alignment.candidates.samples": 2,
    "alignment.reward.compared": False,
    "alignment.loop.look_sessions": 20,
    "evaluation.experiment": {"users": 400, "repeats": 20, "repeat_users": 100, "looks": 3, "logs": 3},
    "run.threads": 1,
    "run.workers": 1,
}


SMOKE = "params/smoke.yaml"
ALIGNMENT = ("04_reward_model", "05_rg_sft", "06_rg_dpo", "07_rg_cl", "08_closed_loop")


def small(overrides: Mapping[str, Any]) -> Params:
    """The params of such a run with these overrides."""
    return load(SMOKE, SMALL | dict(overrides))


def play(
    name: str, run: Path, overrides: Mapping[str, Any] = MappingProxyType({}), params_file: str = SMOKE
) -> dict[str, Any]:
    """Execute a stage's notebook in `run`, with SMALL and these overrides. Returns its variables."""
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    variables = {"__name__": name, "display": lambda *shown: None}
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        exec("".join(cell["source"]), variables)
        if "parameters" in cell["metadata"].get("tags", []):
            variables |= {"params_file": params_file, "run_dir": str(run), "overrides": SMALL | dict(overrides)}
    return variables
