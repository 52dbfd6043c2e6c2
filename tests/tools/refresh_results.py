"""The tables of docs/results.md and docs/running.md, made from outputs/published/: `make published` after the runs.

A run is published as its two small result tables, its params and its manifest. p-values are adjusted (Holm) for the
rows of the table that shows them.
"""

import difflib
import re
import shutil
import sys
from pathlib import Path

import pandas as pd
from refresh_published import worlds_of
from transformers import Qwen3Config

from benchmarks import scaling, serving
from benchmarks.gpu import QWEN3_4B
from rgalign.commands import estimate
from rgalign.commands.estimate import model_size
from rgalign.commands.study import STEPS
from rgalign.evaluation.comparisons import MIN_WORLDS, comparisons_over_worlds, holm, verdict
from rgalign.evaluation.results import MODELS
from rgalign.params import ROOT, load
from rgalign.ranker.variants import RANKERS, pairs
from rgalign.run.artifacts import write_text

PUBLISHED = ROOT / "outputs" / "published"
PAGES = ("docs/results.md", "docs/running.md")  # what holds the tables, between marks
FILES = ("tables/results.parquet", "tables/comparisons.parquet", "params.yaml", "manifest.json")
RUNS = {
    "quickstart": "ShopWorld (simulated), quickstart",
    "cfpb2014-controls": "cfpb2014 (real), 20 sampled candidates",
    "cfpb2014-minilm": "cfpb2014, MiniLM for the LM",
    "cfpb2014-no-product": "cfpb2014 without product columns",
    "msweb-controls": "msweb (real), 20 sampled candidates",
    "msweb-minilm": "msweb, MiniLM for the LM",
    "govuk2021-minilm": "govuk2021 (people's words), MiniLM, match terms, kb exposure",
    "govuk2021-opening-minilm": "govuk2021-opening (their first sentence), the same",
}
METRICS = {"gauc": "GAUC", "recall@3": "Recall@3", "ndcg@3": "NDCG@3", "recall@3/kb": "Recall@3, whole KB"}
CONTROLS = ("cfpb2014-controls", "msweb-controls")  # whose controls have a table of their own
SWEPT = ("study", "study-2")  # what sweeps ran and notebook 90 made of it; each on worlds of its own
CL_ONLY = "rgalign_rec/cl_only"  # which still had its language term in the first study
DISTANCES = "study-distance"  # a sweep over the distance between the LM's chats and the shop
ALIGNED = {  # sweeps over a public set, LLMs and rankers sampled again; an encoder is always the same one
    "cfpb2014-alignment": "cfpb2014",
    "cfpb2014-minilm-alignment": "cfpb2014, MiniLM for the LM",
    "msweb-alignment": "msweb",
    "msweb-minilm-alignment": "msweb, MiniLM for the LM",
}
SWEPT_FILES = (
    "tables/results.parquet",
    "tables/comparisons.parquet",
    "tables/worlds.parquet",
    "tables/stage_seconds.parquet",
    "params.yaml",
    "manifest.json",
    "sweep.json",
)
NO_FLOOR = "\N{DAGGER}"  # marks an interval over worlds without the floor of their sampling error
SCALING = "scaling"  # what `python -m benchmarks.scaling outputs/scaling` measured
SERVING = "serving"  # what `python -m benchmarks.serving RUN` measured
LINEAR = 1_000_000  # sessions, up to which growth is told: the one size beyond was measured beside other work
PLANNED = {"H100": (1, 36_000), "8 x H100": (8, 7_530_000)}  # cards, sessions: the shipped size, and the paper's
STUDY = "study-w"  # outputs/study-w3-lm3 and so on: worlds and LM seeds of params/study.yaml


def made_by_first_version(run: str) -> bool:
    """Whether a published run is older than ranker.whitening_ridge: of 0.1.0, whose rankers were tuned without it.

    They stay as what was measured then; their ranker settings are no longer those of the shipped params files.
    """
    return "whitening_ridge" not in (PUBLISHED / run / "params.yaml").read_text(encoding="utf-8")


def publish(run: str) -> None:
    """Copy the small files of outputs/<run>, a run or the folder of a sweep, to outputs/published/<run>."""
    for name in _files(run):
        target = PUBLISHED / run / Path(name).name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / "outputs" / run / name, target)
    figure = ROOT / "outputs" / run / "figures/09_evaluation/distance_to_oracle.png"
    if run == DISTANCES:
        figure = ROOT / "outputs" / run / "figures/90_ablation/gain_by_distance.png"
    if run in ("quickstart", DISTANCES):
        shutil.copyfile(figure, PUBLISHED / run / figure.name)
    if run == "quickstart":
        shutil.copyfile(ROOT / "outputs" / run / "figures/00_tour/idea.png", PUBLISHED / run / "idea.png")


def _files(run: str) -> tuple[str, ...]:
    if run == SCALING:
        return scaling.TABLE, scaling.FIGURE
    if run == SERVING:
        return (serving.TABLE,)
    return SWEPT_FILES if run in (*SWEPT, DISTANCES, *ALIGNED) else FILES


def results_table() -> str:
    """The Markdown table of every published run without its controls: means over ranker seeds, test split, whole.

    A row that an earlier run on the same data has in the same words is not repeated.
    """
    told = set()
    lines = [f"| data | model | {' | '.join(METRICS.values())} | GAUC, difference (95 % interval) | to |"]
    lines.append("|---" * (len(METRICS) + 4) + "|")
    for run, title in RUNS.items():
        results = pd.read_parquet(PUBLISHED / run / "results.parquet")
        (data,) = results.data.unique()
        title += " (0.1.0)" if made_by_first_version(run) else ""
        whole = results[(results.slice == "all") & (results.split == "test")]
        means = whole.pivot_table("value", "model", "metric", sort=False)
        compared = pd.read_parquet(PUBLISHED / run / "comparisons.parquet")
        chosen = (compared.slice == "all") & (compared.metric == "gauc") & (compared.split == "test")
        compared = compared[chosen]
        for model in [name for name in means.index if "/" not in name]:
            figures = " | ".join(f"{means.loc[model, metric]:.3f}" for metric in METRICS)
            # the model it builds on stands first, after it the best one without training
            own = compared[compared.model == model].sort_values("against", key=_place, ascending=False)
            against = [f"{_interval(row)} | {MODELS[row.against]}" for row in own.itertuples()] or ["|"]
            line = f"{MODELS[model]} | {figures} | {against[0]} |"
            if (data, line) not in told:
                told.add((data, line))
                lines.append(f"| {title} | {line}")
                lines += [f"|  | {MODELS[model]} |{' |' * len(METRICS)} {more} |" for more in against[1:]]
                title = ""
    return "\n".join(lines)


def study_table() -> str:
    """QE-Rec and its controls in each of the study's worlds, as Markdown; intervals are those of the sessions."""
    folders = sorted(PUBLISHED.glob(f"{STUDY}*"))
    results = pd.concat([pd.read_parquet(folder / "results.parquet") for folder in folders])
    whole = results[(results.slice == "all") & (results.split == "test")]
    means = whole.pivot_table("value", "model", "metric")
    found = [pd.read_parquet(folder / "comparisons.parquet").query("split == 'test'") for folder in folders]
    worlds = [f"world {world}" for world in sorted(whole.world_seed.unique())]
    lines = [
        f"| model | GAUC | Recall@3 | {' | '.join(worlds)} | error removed | to |",
        "|---" * (5 + len(worlds)) + "|",
    ]
    for model, against in pairs([name for name in RANKERS if name in means.index]):
        rows = [_row(compared, model, "all", against) for compared in found]
        removed = 100 * sum(row.relative for row in rows) / len(rows)
        cells = [f"{means.loc[model, 'gauc']:.4f}", f"{means.loc[model, 'recall@3']:.3f}", *map(_interval, rows)]
        lines.append(f"| {' | '.join([MODELS[model], *cells])} | {removed:+.1f} % | {MODELS[against]} |")
    lines += ["", "QE-Rec's difference by slice:"]
    for name in ("cold", "tail", "shuffled"):
        told = ", ".join(_interval(_row(compared, "qe_rec", name, "two_tower_text")) for compared in found)
        lines[-1] += f" {name} {told};"
    seeds = whole.groupby("model").seed.nunique().max()
    lines[-1] = lines[-1][:-1] + f". Means over {seeds} ranker seeds; each world has an LM of its own seed."
    return "\n".join(lines)


def worlds_table() -> str:
    """What the sweeps say of the method's two steps, in each sweep's worlds and in all of them, as Markdown."""
    pairs = [("qe_rec", "two_tower_text"), ("rgalign_rec", "qe_rec")]
    found = [_at_main_distance(study, worlds_of(PUBLISHED / study)) for study in SWEPT]
    rows = []
    for part in (*found, pd.concat(found)):
        compared = comparisons_over_worlds(part)
        rows += [_row(compared[compared.against == against], model, "all") for model, against in pairs]
    lines = ["| worlds | model | to | GAUC, difference | error removed | p (Holm) | verdict |", "|---" * 7 + "|"]
    for row in _verdicts(rows):
        cells = [_worlds(row), MODELS[row.model], MODELS[row.against], _interval(row), _removed(row)]
        lines.append(f"| {' | '.join([*cells, _p(row), row.says])} |")
    return "\n".join([*lines, *_footnote(rows)])


def stages_table() -> str:
    """What the sweeps say of RGAlign-Rec with something left out or changed, as Markdown; intervals are over worlds."""
    rows, names = [], []
    for study in SWEPT:
        compared = _at_main_distance(study, pd.read_parquet(PUBLISHED / study / "comparisons.parquet"))
        compared = compared[compared.against == "rgalign_rec"]
        for model in [name for name in MODELS if name in set(compared.model)]:
            rows.append(_row(compared, model, "all"))
            names.append(MODELS[model] + (" and its language term" if (study, model) == (SWEPT[0], CL_ONLY) else ""))
    lines = [
        "| left out or changed | GAUC, difference to RGAlign-Rec | p (Holm) | verdict | worlds |",
        "|---" * 5 + "|",
    ]
    for name, row in zip(names, _verdicts(rows), strict=True):
        lines.append(f"| {name} | {_interval(row)} | {_p(row)} | {row.says} | {_worlds(row)} |")
    return "\n".join([*lines, *_footnote(rows)])


def steps_table() -> str:
    """What a step is worth where nothing comes after it (study.STEPS), as Markdown; intervals are over worlds."""
    rows = []
    for study in SWEPT:
        compared = _at_main_distance(study, pd.read_parquet(PUBLISHED / study / "comparisons.parquet"))
        known = set(compared.model) - ({CL_ONLY} if study == SWEPT[0] else set())
        there = set(compared[["model", "against"]].itertuples(index=False, name=None))
        for model, against in [pair for pair in STEPS if pair in there and pair[0] in known]:
            rows.append(_row(compared[compared.against == against], model, "all"))
    lines = ["| with | against | GAUC, difference | error removed | p (Holm) | verdict | worlds |", "|---" * 7 + "|"]
    for row in _verdicts(rows):
        cells = [MODELS[row.model], MODELS[row.against], _interval(row), _removed(row), _p(row), row.says]
        lines.append(f"| {' | '.join([*cells, _worlds(row)])} |")
    return "\n".join([*lines, *_footnote(rows)])


def distances_table() -> str:
    """RGAlign-Rec's gain at each distance between the LM's chats and the shop, as Markdown; intervals over worlds."""
    table = pd.read_parquet(PUBLISHED / DISTANCES / "results.parquet")
    whole = table.query("slice == 'all' and split == 'test' and metric == 'gauc'")
    means = whole.groupby(["distance", "model", "world_seed"])["value"].mean().groupby(level=[0, 1]).mean()
    compared = pd.read_parquet(PUBLISHED / DISTANCES / "comparisons.parquet").query("split == 'test'")
    worlds = pd.read_parquet(PUBLISHED / DISTANCES / "worlds.parquet").query("slice == 'all' and metric == 'gauc'")
    own = compared[(compared["against"] == "qe_rec") & (compared["model"] == "rgalign_rec")]
    rows = _verdicts([_row(part, "rgalign_rec", "all") for _, part in own.groupby("distance")])
    lines = ["| distance | QE-Rec | RGAlign-Rec | difference | error removed | p (Holm) | verdict | by world |"]
    lines.append("|---" * 8 + "|")
    for row in rows:
        here = worlds[(worlds["distance"] == row.distance) & (worlds["model"] == "rgalign_rec")]
        here = here[here["against"] == "qe_rec"].sort_values("world_seed")
        each = [f"{seed}: {value:+.4f}" for seed, value in zip(here["world_seed"], here["difference"], strict=True)]
        gaucs = [f"{means[row.distance, model]:.4f}" for model in ("qe_rec", "rgalign_rec")]
        cells = [f"{row.distance:g}", *gaucs, _interval(row), _removed(row), _p(row), row.says, ", ".join(each)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *_footnote(rows)])


def aligned_table() -> str:
    """RGAlign-Rec and its baselines on the public sets, as Markdown: means over LMs and ranker seeds."""
    lines = ["| data | model | GAUC | Recall@3 | IHR@1 | GAUC, difference (95 % interval) | to | LMs |"]
    lines.append("|---" * 8 + "|")
    for run, title in ALIGNED.items():
        results = pd.read_parquet(PUBLISHED / run / "results.parquet")
        whole = results[(results.slice == "all") & (results.split == "test")]
        means, lms = whole.pivot_table("value", "model", "metric"), whole.groupby("model")["lm_seed"].nunique()
        compared = pd.read_parquet(PUBLISHED / run / "comparisons.parquet").query("split == 'test'")
        asked = {"qe_rec": "two_tower_text", "rgalign_rec": "qe_rec", "rgalign_rec/no_alignment": "rgalign_rec"}
        for model, against in [pair for pair in asked.items() if pair[0] in means.index]:
            row = _row(compared, model, "all", against)
            metrics = ("gauc", "recall@3", "ihr@1")  # an encoder writes no query
            cells = [f"{means.loc[model, metric]:.3f}" if metric in means else "" for metric in metrics]
            cells = [title, MODELS[model], *cells, _interval(row), MODELS[against], str(lms[model])]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def controls_table() -> str:
    """QE-Rec and its controls on the public sets, as Markdown; intervals are those of the sessions."""
    found = {run: pd.read_parquet(PUBLISHED / run / "comparisons.parquet").query("split == 'test'") for run in CONTROLS}
    names = [run.removesuffix("-controls") for run in CONTROLS]
    lines = [f"| model | {' | '.join(names)} | to |", "|---" * (2 + len(names)) + "|"]
    known = set.intersection(*(set(compared["model"]) for compared in found.values()))
    for model, against in pairs([name for name in RANKERS if name in known]):
        cells = [_interval(_row(compared, model, "all", against)) for compared in found.values()]
        lines.append(f"| {' | '.join([MODELS[model], *cells])} | {MODELS[against]} |")
    return "\n".join(lines)


def scaling_table() -> str:
    """Seconds of each step by the number of sessions, memory, and how the time grows, as Markdown."""
    table = pd.read_parquet(PUBLISHED / SCALING / scaling.TABLE)
    steps = [step for step in scaling.STEPS if step != "train"]
    lines = [f"| sessions | {', s | '.join(steps)}, s | trained lists/s | memory, GiB |", "|---" * 8 + "|"]
    for sessions, own in table.groupby("sessions"):
        own = own.set_index("step")
        cells = [f"{own.loc[step, 'seconds']:,.1f}" for step in steps]
        lines.append(
            f"| {sessions:,} | {' | '.join(cells)} | {own.loc['train', 'rate']:,} | {own.peak_mb.max() / 1024:.1f} |"
        )
    grown = scaling.growth(table[table["sessions"] <= LINEAR])
    powers = " | ".join(f"{grown[step]:.2f}" for step in steps)
    lines.append(f"| up to {LINEAR:,}: seconds grow as sessions to the power | {powers} | | |")
    return "\n".join(lines)


def serving_table() -> str:
    """Milliseconds of one session and MiB of the memory, by the sessions that are remembered, as Markdown."""
    table = pd.read_parquet(PUBLISHED / SERVING / serving.TABLE)
    steps = list(dict.fromkeys(table["step"]))
    lines = [f"| remembered sessions | {', p50 / p99 | '.join(steps)}, p50 / p99 | vectors, MiB | saved, MiB |"]
    lines.append("|---" * (3 + len(steps)) + "|")
    for remembered, own in table.groupby("remembered"):
        cells = [f"{row.cpu_p50:.1f} / {row.cpu_p99:.1f}" for row in own.set_index("step").loc[steps].itertuples()]
        sizes = f"{own['vectors_mb'].iloc[0]:.1f} | {own['file_mb'].iloc[0]:.1f}"
        lines.append(f"| {remembered:,} | {' | '.join(cells)} | {sizes} |")
    return "\n".join(lines)


def costs_table() -> str:
    """What rgalign/commands/estimate.py says of params/qwen3-4b.yaml on CUDA cards, as Markdown."""
    params, size = load("params/qwen3-4b.yaml"), model_size(Qwen3Config(**QWEN3_4B, tie_word_embeddings=True))
    works = [estimate.work(params, size, sessions) for _, sessions in PLANNED.values()]
    spent = [
        estimate.seconds(work, params, size, estimate.CARDS["H100"], cards) / 3600
        for work, (cards, _) in zip(works, PLANNED.values(), strict=True)
    ]
    heads = [f"{sessions:,} sessions, {name}: hours" for name, (_, sessions) in PLANNED.items()]
    lines = [f"| stage | {' | '.join(heads)} |", "|---" * 3 + "|"]
    for row, (stage, what) in enumerate(works[0][["stage", "what"]].itertuples(index=False)):
        lines.append(f"| {stage}: {what} | {' | '.join(f'{hours[row]:.2f}' for hours in spent)} |")
    lines.append(f"| all | {' | '.join(f'{hours.sum():.1f}' for hours in spent)} |")
    held = [sum(estimate.memory(params, size, processes=cards).values()) for cards, _ in PLANNED.values()]
    lines.append(f"| memory a card, GiB | {' | '.join(f'{held_by / estimate.GIB:.1f}' for held_by in held)} |")
    return "\n".join(lines)


def _row(compared: pd.DataFrame, model: str, name: str, against: str | None = None) -> pd.Series:
    """GAUC's row of a pair of models in a slice; without `against`, of the only pair with this model."""
    own = (compared.model == model) & ((compared.against == against) if against else True)
    return compared[own & (compared.slice == name) & (compared.metric == "gauc")].iloc[0]


def _place(models: pd.Series) -> pd.Series:
    """The place of each in results.MODELS, in which those without training stand first."""
    return models.map(list(MODELS).index)


def _at_main_distance(study: str, table: pd.DataFrame) -> pd.DataFrame:
    """A sweep's rows on the test split at the distance that its params name."""
    distance = load(PUBLISHED / study / "params.yaml").data.world.distance
    return table[(table["distance"] == distance) & (table["split"] == "test")]


def _verdicts(rows: list[pd.Series]) -> list:
    """The rows of one table with p_holm adjusted for them, and what each `says`."""
    table = pd.DataFrame(rows).reset_index(drop=True)
    table = table.assign(p_holm=holm(table["p"]))
    return list(table.assign(says=[verdict(row) for row in table.itertuples()]).itertuples())


def _worlds(row) -> str:
    return row.world_seeds.replace(" ", ", ")


def _p(row) -> str:
    return "" if pd.isna(row.p_holm) else "< 0.001" if row.p_holm < 0.001 else f"{row.p_holm:.3f}"


def _removed(row) -> str:
    """The share of the error removed, with its own interval where it has one."""
    low, high = 100 * row.relative_low, 100 * row.relative_high
    return f"{100 * row.relative:+.1f} %" + ("" if pd.isna(low) else f" [{low:.1f},\N{NO-BREAK SPACE}{high:.1f}]")


def _interval(row) -> str:
    mark = NO_FLOOR if _no_floor(row) else ""
    return f"{row.difference:+.4f} [{row.ci_low:.4f},\N{NO-BREAK SPACE}{row.ci_high:.4f}]{mark}"


def _no_floor(row) -> bool:
    return row.worlds >= MIN_WORLDS and pd.isna(row.sampling_error)


def _footnote(rows) -> list[str]:
    if not any(map(_no_floor, rows)):
        return []
    told = "the sampling error of these worlds was not kept, so the interval is Student's over the worlds alone; it is"
    return ["", f"{NO_FLOOR} {told} too narrow where a few worlds agree by luck."]


TABLES = {
    "results": results_table,
    "study": study_table,
    "worlds": worlds_table,
    "stages": stages_table,
    "steps": steps_table,
    "distances": distances_table,
    "controls": controls_table,
    "aligned": aligned_table,
    "scaling": scaling_table,
    "serving": serving_table,
    "costs": costs_table,
}


def marks(name: str) -> tuple[str, str]:
    """What stands before and after a table in a page."""
    return f"<!-- {name}: made by `make published` -->", f"<!-- end of {name} -->"


def with_tables(page: str) -> str:
    """A page's text with its tables between their marks."""
    for name, table in TABLES.items():
        begin, end = marks(name)
        if begin in page:
            page = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", f"{begin}\n{table()}\n{end}", page, flags=re.S)
    return page


def main(names: list[str]) -> None:
    """Publish the runs that are named, or else all that lie in outputs/, and print what changes in the pages."""
    studies = sorted(path.name for path in (ROOT / "outputs").glob(f"{STUDY}*"))
    known = dict.fromkeys([*RUNS, *studies, *SWEPT, DISTANCES, *ALIGNED, SCALING, SERVING])
    there = names or [name for name in known if (ROOT / "outputs" / name / _files(name)[0]).is_file()]
    for name in there:
        publish(name)
    if left := [name for name in known if name not in there]:
        print(f"as they were published before: {', '.join(left)}")
    for page in PAGES:
        before = (ROOT / page).read_text(encoding="utf-8")
        after = with_tables(before)
        write_text(ROOT / page, after)
        lines = (before.splitlines(), after.splitlines())
        print("\n".join(difflib.unified_diff(*lines, "before", page, n=0, lineterm="")))


if __name__ == "__main__":
    main(sys.argv[1:])
