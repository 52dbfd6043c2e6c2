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
from rgalign.evaluation.comparisons import PAIR, holm, verdict
from rgalign.evaluation.metrics import LABELS, gap_closed
from rgalign.evaluation.results import MODELS, UNTRAINED, best_untrained
from rgalign.params import Params, dump, load_run
from rgalign.params_training import STEPS
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
SIMPLE = (*UNTRAINED, "two_tower", "two_tower_text")  # what a shop could have without a language model
FEW_LISTS, SLICE_LISTS = 500, 100  # below: a red line; a slice is too small to be named
EXAMPLES = 12
UNDECIDED = "does not differ demonstrably from"


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
        pages.filters["masked"] = masked
        for name, form in (("figure", "{:.4f}"), ("signed", "{:+.4f}"), ("percent", "{:+.1%}")):
            pages.filters[name] = partial(_number, form)
        artifacts.write_text(path, pages.get_template(f"{path.name}.j2").render(values))
    return paths


def _number(form: str, value: float) -> str:
    if pd.isna(value):
        return ""
    if form == "{:+.4f}" and 0 < abs(value) < 5e-5:  # +0.0000 would say that there is no difference
        form = "{:+.0e}"
    return form.format(value).replace("%", " %")


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
        "decision": decision(results, compared, online),
        "few_lists": FEW_LISTS,
        "simple": _simple(results, compared),
        "verdicts": gauc_differences(compared).to_dict("records"),
        "differences": by_pair.to_dict("records"),
        "slices": _slices(compared, results),
        "no_gain": labelled[~labelled.says.str.startswith("gain")].to_dict("records"),
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
    known = compared[(compared.split == "test") & compared.difference.notna()]
    return known.assign(says=_says(known))


def _says(rows: pd.DataFrame) -> list[str]:
    """What each comparisons row shows, in words (comparisons.verdict); a log is no world among others."""
    says, world = [verdict(row) for row in rows.itertuples()], rows.world_seeds.fillna("").astype(str)
    return [what if of else what.replace(" (in one world)", "") for what, of in zip(says, world, strict=True)]


def gauc_differences(compared: pd.DataFrame) -> pd.DataFrame:
    """Of `on_test`'s rows those of GAUC on the whole split, one a pair of models."""
    return compared[(compared.metric == "gauc") & (compared.slice == "all")]


def decision(results: pd.DataFrame, compared: pd.DataFrame, online: dict) -> dict[str, Any]:
    """What a decision needs: the last model against the best simple one (SIMPLE, by GAUC on valid), and how sure.

    model, against  their names;  row  their comparison in GAUC on test, None where notebook 09 made none
    difference  of GAUC on test;  lists  that it is a mean over;  worlds  None of a log;  seeds  of the rankers
    best, worst  slices of SLICE_LISTS lists or more, None where there is none
    ctr  the experiment's row (notebook 10), debiased  rows of the debiased CTR@3 where there is no experiment, or None
    """
    gauc = results[(results.slice == "all") & (results.metric == "gauc")]
    on_valid, on_test = (gauc[gauc.split == split].groupby("model")["value"].mean() for split in ("valid", "test"))
    trained = [name for name in MODELS if name in on_test and "/" not in name and not name.startswith("oracle")]
    model, simple = trained[-1], [name for name in SIMPLE if name in on_test and name != trained[-1]]
    chosen = on_valid.reindex(simple).dropna()
    against = str(chosen.idxmax()) if len(chosen) else simple[-1]
    pair = compared[(compared.model == model) & (compared.against == against) & (compared.slice == "all")]
    rows = pair.set_index("metric", drop=False).to_dict("index")
    large = [row for row in _slices(compared, results) if row["lists"] >= SLICE_LISTS and row["slice"] != "all"]
    own = gauc[(gauc.model == model) & (gauc.split == "test")]
    return {
        "model": model,
        "against": against,
        "row": rows.get("gauc"),
        "difference": on_test[model] - on_test[against],
        "lists": int(own.groups.max()),
        "seeds": int(own.seed.nunique()),
        "world": own.world_seed.notna().any(),
        "best": max(large, key=lambda row: row["difference"], default=None),
        "worst": min(large, key=lambda row: row["difference"], default=None),
        "ctr": online.get((model, against)) or online.get((model, "qe_rec")),
        "debiased": rows.get("ctr@3/kb"),
    }


def figures(run: Path) -> list[dict[str, str]]:
    """The run's figures in the order of its stages: stage, name, alt (what it shows), data (a base64 PNG)."""
    found = []
    for path in sorted((run / "figures").glob("*/*.png")):
        with Image.open(path) as image:
            alt = getattr(image, "text", {}).get("Description") or path.stem.replace("_", " ")
        data = base64.b64encode(path.read_bytes()).decode()
        found.append({"stage": path.parent.name, "name": path.stem.replace("_", " "), "alt": alt, "data": data})
    return found


def _simple(results: pd.DataFrame, compared: pd.DataFrame) -> dict[str, Any] | None:
    """The best model without training: its name, how it was chosen (its GAUC on valid), and the rows of the trained
    models that are compared with it, the last first; None where no such comparison was made.

    outcome  beats | loses to | UNDECIDED
    """
    name = best_untrained(results)
    gauc = gauc_differences(compared)
    rows = gauc[(gauc.against == name) & ~gauc.model.str.contains("/")]
    if name is None or rows.empty:
        return None
    rows = rows.sort_values("model", ascending=False, key=lambda column: column.map(list(MODELS).index))
    outcome = {"gain": "beats", "loss": "loses to"}
    rows = rows.assign(outcome=[outcome.get(says.split()[0], UNDECIDED) for says in rows.says])
    valid = results[(results.split == "valid") & (results.slice == "all") & (results.metric == "gauc")]
    known = [other for other in UNTRAINED if other in set(valid.model)]
    on_valid = valid[valid.model == name].value.mean()
    return {"name": name, "of": known, "on_valid": on_valid, "rows": rows.to_dict("records")}


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
    last = last.assign(p_holm=holm(last.p)).assign(says=_says)
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
