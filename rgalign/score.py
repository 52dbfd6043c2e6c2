"""A finished run, loaded to serve: what a service would import.

scorer = rgalign.score.load("outputs/quickstart")
scorer.queries(sessions)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from rgalign.alignment.context import load_step
from rgalign.artifacts import ArtifactError
from rgalign.data.faults import count_rows, nearest, quote
from rgalign.data.prompts import Prompter
from rgalign.data.schema import YAML_FILE, as_types, read_yaml, to_frame
from rgalign.params import ROOT
from rgalign.params import load as load_params
from rgalign.reasoner import settings, source
from rgalign.reasoner.build import Recipe
from rgalign.reasoner.model import Reasoner
from rgalign.reasoner.queries import greedy

PARAMS, DATASET, REASONER = "params.yaml", "tables/dataset", "models/reasoner/main"
ALIGNED = "models/rgalign"


@dataclass(frozen=True, eq=False)
class Scorer:
    """A run's models, ready for sessions that it has never seen. kinds: feature column -> kind (dataset.yaml)."""

    reasoner: Reasoner
    prompter: Prompter
    kinds: Mapping[str, str]
    max_new_tokens: int = 24

    def queries(self, sessions: pd.DataFrame, *, progress: bool = False) -> pd.DataFrame:
        """The greedy query of each session, in their order: session_id, query, log_probability (nats).

        sessions  session_id and every feature column that the prompt shows, of any number of sessions but none
        Raises ValueError with every fault of the frame, ReasonerError where the reasoner is an encoder.
        """
        frame = self._checked(sessions)
        written = greedy(
            self.reasoner,
            self.prompter,
            self.prompter.sessions(frame),
            max_new_tokens=self.max_new_tokens,
            progress=progress,
        )
        found = written[["query", "log_probability"]]
        return pd.concat([sessions["session_id"].reset_index(drop=True), found], axis=1)

    def _checked(self, sessions: pd.DataFrame) -> pd.DataFrame:
        """The columns needed, in the data set's types."""
        needed = ["session_id", *self.prompter.features]
        faults = [
            f"no column {quote(name)}{nearest(name, [c for c in sessions.columns if c not in needed])}"
            for name in needed
            if name not in sessions
        ]
        if not len(sessions):
            faults.append("no session: expected at least one row")
        if "session_id" in sessions and (missing := sessions["session_id"].isna()).any():
            faults.append(f"session_id: {count_rows(missing, 'is empty')}")
        columns = {}
        for name in [name for name in needed if name in sessions and len(sessions)]:
            try:
                column = pa.table({name: pa.array(sessions[name], from_pandas=True)})
                columns[name] = as_types(column, "sessions", dict(self.kinds))[name]
            except pa.ArrowException as error:
                kind = self.kinds.get(name, "categorical")
                faults.append(f"{name} cannot be read as {kind}: {str(error).splitlines()[0]}")
        if faults:
            raise ValueError("these sessions cannot be scored:\n" + "\n".join(f"  {fault}" for fault in faults))
        return to_frame(pa.table(columns))


def load(run_dir: str | Path, *, aligned: bool | None = None, device: str = "auto") -> Scorer:
    """The scorer of a run directory, as given or seen from the project's root.

    aligned  the model that notebook 08 left, or the one before its alignment; None: aligned where the run has one
    device  auto (cuda where there is one) | cpu | cuda | ..: where it serves, whatever the run was made on
    The model is the run's own: its dtype, adapter and quantisation, and its content where it was taken as it is.
    Raises ArtifactError that lists what the run lacks and says what to type, ReasonerError where its model
    cannot be had.
    """
    run = _find(run_dir)
    if aligned and not (run / ALIGNED).is_dir():
        raise ArtifactError(f"{run} has no {ALIGNED}: run it through 08, or load it with aligned=False")
    params = load_params(run / PARAMS)
    room = params.reasoner.model_dump(mode="json")
    meta: dict[str, Any] = read_yaml(run / DATASET / YAML_FILE)
    intents = to_frame(as_types(pq.read_table(run / DATASET / "intents.parquet"), "intents", meta["features"]))
    reasoner = source.load_saved(run / REASONER, kind=room["kind"], dtype=room["dtype"], device=device)
    if aligned is not False and (run / ALIGNED).is_dir():
        recipe = Recipe(room, params.data.features.drop, device)
        reasoner = load_step(run / ALIGNED, recipe, reasoner)
    own = {"ends": reasoner.ends, "positions": reasoner.positions}
    prompter = settings.prompter(room, meta, intents, reasoner.tokenizer, drop=params.data.features.drop, **own)
    return Scorer(reasoner, prompter, dict(meta["features"]), room["queries"]["max_new_tokens"])


def _find(run_dir: str | Path) -> Path:
    """The run directory, with all that is needed in it."""
    run = next((place for place in (Path(run_dir), ROOT / run_dir) if place.is_dir()), None)
    if run is None:
        finished = sorted(f"outputs/{path.parent.name}" for path in (ROOT / "outputs").glob(f"*/{PARAMS}"))
        hint = nearest(str(run_dir), finished)
        made = "python -m rgalign run params/quickstart.yaml"
        raise ArtifactError(f"no run directory {run_dir}{hint}\nTo make one: {made}   (writes outputs/quickstart)")
    needed = (PARAMS, f"{DATASET}/{YAML_FILE}", f"{DATASET}/intents.parquet", REASONER)
    if missing := [name for name in needed if not (run / name).exists()]:
        lines = "\n".join(f"  {name}" for name in missing)
        params = run / PARAMS if (run / PARAMS).is_file() else "params/quickstart.yaml"
        command = f"python -m rgalign run {params} --run-dir {run} --through 02"
        raise ArtifactError(f"{run} lacks what a scorer reads:\n{lines}\nTo make it: {command}")
    return run
