"""A run's report.html and model_card.md: what notebook 09 found, on one page that opens from disk.

The templates escape every value: what customers wrote is shown, never obeyed.
"""

import base64
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from rgalign.data.schema import masked
from rgalign.evaluation import writing_checks
from rgalign.evaluation.comparisons import PAIR, holm
from rgalign.evaluation.metrics import LABELS, gap_closed
from rgalign.evaluation.results import MODELS
from rgalign.params import Params, dump, load_run
from rgalign.params_training import STEPS
from rgalign.report import decision
from rgalign.run import artifacts
from rgalign.run.plan import EVALUATION, STAGES, maker, stage_params
from rgalign.run.stages import params_changes

ONLINE = "10_ab_test"
PAPER = [  # METHOD.md 5: published figures, on private data; the abstract does not say over which arm the 3.52 % are
    ("QE-Rec over the baseline", {"ihr": "+1.43 %", "ctr@3": "+0.98 %"}),
    ("RGAlign-Rec over QE-Rec", {"ihr": "+0.30 %", "ctr@3": "+0.13 %"}),
    ("RGAlign-Rec in all", {"gauc": "+0.12 % (3.52 % of the error)", "recall@3": "+0.56 %", "ndcg@3": "+0.35 %"}),
]
OURS = [("qe_rec", "two_tower_text"), ("rgalign_rec", "qe_rec")]  # the pairs that the paper has too
EXAMPLES = 12


def write(run: Path) -> tuple[Path, Path]:
    """Write report.html and model_card.md into the run. Raises ArtifactError where notebook 09 has not run there."""
    values = contents(run)
    paths = run / "report.html", run / "model_card.md"
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    for path in paths:  # a model card quotes no customer, so only HTML is escaped
        html = path.suffix == ".html"
        pages = Environment(
            loader=loader, autoescape=html, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        pages.filters |= {"masked": masked, "interval": decision.interval, "css": decision.css}
        for name, form in (("figure", "{:.4f}"), ("signed", "{:+.4f}"), ("percent", "{:+.1%}")):
            pages.filters[name] = partial(_number, form)
        artifacts.write_text(path, pages.get_template(f"{path.name}.j2").render(values))
    return paths


def _number(form: str, value: float) -> str:
    return "" if pd.isna(value) else form.format(value).replace("%", " %")


def contents(run: Path) -> dict[str, Any]:
    """The values that both templates show."""
    stages = artifacts.read_manifest(run)["stages"]
    again = f"python -m rgalign run {run / 'params.yaml'} --run-dir {run}"
    if EVALUATION not in stages:
        raise artifacts.ArtifactError(f"{run} has no {EVALUATION}: {again}")
    params = load_run(run)
    if changed := _changed_params(stages, EVALUATION, params):
        raise artifacts.ArtifactError(f"{run}: {EVALUATION} was made with other params ({changed}): {again}")
    results, compared = read(run, "results"), on_test(read(run, "comparisons"))
    table = results_table(results)
    labelled, whole = compared[compared.metric.isin(LABELS)], compared[compared.slice == "all"]
    place = [*MODELS, *LABELS].index
    by_pair = whole[whole.metric.isin(LABELS)].sort_values(["model", "metric"], key=lambda column: column.map(place))
    pairs = {pair: own.set_index("metric", drop=False).to_dict("index") for pair, own in whole.groupby(PAIR)}
    online = _online(run, stages, params)
    warned = [table for table in writing_checks.TABLES if maker(table).name in stages and (run / table).is_file()]
    writing = writing_checks.joined(*(pd.read_parquet(run / table) for table in warned)).drop_duplicates("warning")
    aligned = params.alignment
    recipe = [name for section, name in STEPS.items() if getattr(aligned, section).use]
    return {
        "run": run.name,
        "folder": artifacts.portable(run.resolve()),
        "writes": params.reasoner.kind == "causal",
        "by_kind": _by_kind(results),
        "data": results.data.iloc[0],
        "evaluated": stages[EVALUATION]["started"],
        "names": MODELS,
        "columns": {name: label for name, label in LABELS.items() if name in table},
        "results": table,
        "decision": decision.decide(run, params, results, compared, online),
        "limits": {"lists": decision.FEW, "slice": decision.SLICE},
        "verdicts": gauc_differences(compared).to_dict("records"),
        "differences": by_pair.to_dict("records"),
        "slices": _slices(compared, results),
        "no_gain": labelled[labelled.says != "gain"].sort_values("says", kind="stable").to_dict("records"),
        "compared": len(labelled),
        "paper": PAPER,
        "ours": [
            (MODELS[model], MODELS[other], pairs.get((model, other), {}), online.get((model, other)))
            for model, other in OURS
        ],
        "figures": figures(run),
        "writing": writing.to_dict("records"),
        "examples": _examples(run),
        "stages": [{"name": name, **stages[name]} for name in STAGES if name in stages],
        "params": dump(params),
        "recipe": [*recipe, f"closed loop ({aligned.loop.ranker} ranker)"] if aligned.loop.rounds else [],
    }


def read(run: Path, table: str) -> pd.DataFrame:
    """One of the run's long tables (ARCHITECTURE.md, Results)."""
    return pd.read_parquet(run / f"tables/{table}.parquet")


def results_table(results: pd.DataFrame) -> pd.DataFrame:
    """One row a model, means over ranker seeds on the whole test split.

    gap  share of the way from two-tower + text to the oracle (ARCHITECTURE.md, Results); absent without an oracle, NaN
         for the models that two-tower + text builds on
    """
    whole = results[(results.slice == "all") & (results.split == "test")]
    wide = whole.pivot_table("value", "model", "metric", sort=False).filter(list(LABELS))
    wide = wide.loc[[model for model in MODELS if model in wide.index]]
    if {"two_tower_text", "oracle"} <= set(wide.index):
        low, high = wide.gauc["two_tower_text"], wide.gauc["oracle"]
        above = [list(MODELS).index(model) > list(MODELS).index("two_tower_text") for model in wide.index]
        wide["gap"] = wide.gauc.map(lambda gauc: gap_closed(gauc, low, high)).where(above)
    return wide


def on_test(compared: pd.DataFrame) -> pd.DataFrame:
    """The comparisons rows of the test split, with what each `says`: gain, loss or not significant."""
    known = compared[(compared.split == "test") & compared.difference.notna()]  # a slice may be empty
    return known.assign(says=lambda t: [decision.shown(row) for row in t.itertuples()])


def gauc_differences(compared: pd.DataFrame) -> pd.DataFrame:
    """Of `on_test`'s rows those of GAUC on the whole split, one a pair of models."""
    return compared[(compared.metric == "gauc") & (compared.slice == "all")]


def figures(run: Path) -> list[dict[str, str]]:
    """The run's figures in the order of its stages: stage, name, alt (what it shows), data (a base64 PNG)."""
    found = []
    for path in sorted((run / "figures").glob("*/*.png")):
        with Image.open(path) as image:
            alt = getattr(image, "text", {}).get("Description") or path.stem.replace("_", " ")
        data = base64.b64encode(path.read_bytes()).decode()
        found.append({"stage": path.parent.name, "name": path.stem.replace("_", " "), "alt": alt, "data": data})
    return found


def _by_kind(results: pd.DataFrame) -> dict[str, float]:
    """GAUC of the last model on head, tail and cold intents, of those that were clicked."""
    gauc = results[(results.metric == "gauc") & (results.split == "test")]
    gauc = gauc[gauc.slice.isin(["head", "tail", "cold"])]
    trained = [name for name in MODELS if name in set(gauc.model) and not name.startswith("oracle")]  # untrained first
    return gauc[gauc.model == trained[-1]].groupby("slice")["value"].mean().dropna().sort_values().to_dict()


def _slices(compared: pd.DataFrame, results: pd.DataFrame) -> list[dict]:
    """GAUC of the last model against the one it builds on, slice by slice, with the lists that it is a mean over.

    Holm's family are these slices.
    """
    gauc = compared[compared.metric == "gauc"]
    if gauc.empty:
        return []
    place = list(MODELS).index
    last = gauc[gauc.model == max(gauc.model, key=place)]
    last = last[last.against == max(last.against, key=place)]  # not the best model without training
    last = last.assign(p_holm=holm(last.p)).assign(says=lambda t: [decision.shown(row) for row in t.itertuples()])
    groups = results[(results.metric == "gauc") & (results.split == "test")].groupby(["model", "slice"])["groups"].max()
    return last.assign(lists=[groups[row.model, row.slice] for row in last.itertuples()]).to_dict("records")


def _changed_params(stages: dict, name: str, params: Params) -> str:
    """How a stage's params differ from the run's; empty where they do not."""
    return params_changes(stages[name]["params"], stage_params(STAGES[name], params))


def _online(run: Path, stages: dict, params: Params) -> dict[tuple[str, str], dict[str, float]]:
    """What notebook 10's simulated experiment found of each pair of models; empty where none ran with these params."""
    there = ONLINE in stages and (run / "tables/experiment.parquet").is_file()
    if not there or _changed_params(stages, ONLINE, params):
        return {}
    found = read(run, "experiment")
    rows = found[found.method == "plain"].to_dict("records")
    return {(row["treatment"], row["control"]): row for row in rows}


def _examples(run: Path) -> list[dict]:
    """The first sessions' candidates with the highest and lowest reward, beside the greedy query."""
    path = run / "tables/candidates.parquet"
    if not path.is_file():
        return []
    candidates = pd.read_parquet(path)
    chosen = candidates[candidates.session_id.isin(candidates.session_id.unique()[:EXAMPLES])]
    rows = []
    for session, own in chosen.groupby("session_id", sort=False):
        ordered = own.sort_values("reward", kind="stable")
        greedy = next((row for _, row in own[(own.candidate < 0) & (own.source == "main")].iterrows()), None)
        rows.append({"session": session, "greedy": greedy, "best": ordered.iloc[-1], "worst": ordered.iloc[0]})
    return rows
