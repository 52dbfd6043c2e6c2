"""The README's results table, made from outputs/published/: `make published` after the runs, never typed.

A run is published as its two small result tables, its params and its manifest.
"""

import re
import shutil
import sys
from pathlib import Path

import pandas as pd
from transformers import Qwen3Config

from rgalign import estimate, scaling
from rgalign.artifacts import write_text
from rgalign.benchmarks_gpu import QWEN3_4B
from rgalign.evaluation.comparisons import comparisons_over_worlds
from rgalign.evaluation.results import MODELS
from rgalign.evaluation.study import STEPS
from rgalign.evaluation.study_compare import verdict
from rgalign.model_size import model_size
from rgalign.params import ROOT, load
from rgalign.ranker.variants import VARIANTS, pairs

PUBLISHED = ROOT / "outputs" / "published"
FILES = ("tables/results.parquet", "tables/comparisons.parquet", "params.yaml", "manifest.json")
RUNS = {
    "quickstart": "ShopWorld (simulated), quickstart",
    "cfpb2014-controls": "cfpb2014 (real), 20 sampled candidates",
    "cfpb2014-minilm": "cfpb2014, MiniLM for the LM",
    "cfpb2014-no-product": "cfpb2014 without product columns",
    "msweb-controls": "msweb (real), 20 sampled candidates",
    "msweb-minilm": "msweb, MiniLM for the LM",
}
METRICS = {"gauc": "GAUC", "recall@3": "Recall@3", "ndcg@3": "NDCG@3", "recall@3/kb": "Recall@3, whole KB"}
CONTROLS = ("cfpb2014-controls", "msweb-controls")  # whose controls have a table of their own
SWEPT = ("study", "study-2")  # what sweeps ran and notebook 90 made of it; each on worlds of its own
CL_ONLY = "rgalign_rec/cl_only"  # which still had its language term in the first study
DISTANCES = "study-distance"  # a sweep over the distance between the LM's chats and the shop
ALIGNED = {  # sweeps over a public set, LLMs and rankers drawn anew; an encoder is always the same one
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
SCALING = "scaling"  # what `python -m rgalign scale outputs/scaling` measured
LINEAR = 1_000_000  # sessions, up to which growth is told: the one size beyond was measured beside other work
PLANNED = {"H100": (1, 36_000), "8 x H100": (8, 7_530_000)}  # cards, sessions: the shipped size, and the paper's
STUDY = "study-w"  # outputs/study-w3-lm3 and so on: worlds and LM seeds of params/study.yaml


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


def _files(run: str) -> tuple[str, ...]:
    if run == SCALING:
        return scaling.TABLE, scaling.FIGURE
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
    for model, against in pairs([name for name in VARIANTS if name in means.index]):
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


def stages_table() -> str:
    """What the sweeps say of RGAlign-Rec with something left out or changed, as Markdown; intervals are over worlds."""
    lines = ["| left out or changed | GAUC, difference to RGAlign-Rec | says | worlds |", "|---|---|---|---|"]
    for study in SWEPT:
        compared = pd.read_parquet(PUBLISHED / study / "comparisons.parquet").query("split == 'test'")
        compared = compared[compared.distance == load(PUBLISHED / study / "params.yaml").data.world.distance]
        worlds = pd.read_parquet(PUBLISHED / study / "worlds.parquet")["world_seed"].unique()
        compared = compared[compared.against == "rgalign_rec"]
        for model in [name for name in MODELS if name in set(compared.model)]:
            row, name = _row(compared, model, "all", "rgalign_rec"), MODELS[model]
            if (study, model) == (SWEPT[0], CL_ONLY):
                name += " and its language term"
            lines.append(f"| {name} | {_interval(row)} | {verdict(row)} | {_listed(worlds)} |")
    return "\n".join(lines)


def steps_table() -> str:
    """What a step is worth where nothing comes after it (study.STEPS), as Markdown; intervals are over worlds."""
    lines = ["| with | against | GAUC, difference | error removed | worlds |", "|---" * 5 + "|"]
    for study in SWEPT:
        results = pd.read_parquet(PUBLISHED / study / "results.parquet").query("split == 'test'")
        results = results[results.distance == load(PUBLISHED / study / "params.yaml").data.world.distance]
        known = set(results.model) - ({CL_ONLY} if study == SWEPT[0] else set())
        pairs = [pair for pair in STEPS if known.issuperset(pair)]
        compared, worlds = comparisons_over_worlds(results, pairs), _listed(results.world_seed.unique())
        for model, against in pairs:
            row = _row(compared, model, "all", against)
            cells = [MODELS[model], MODELS[against], _interval(row), f"{100 * row.relative:+.1f} %", worlds]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def distances_table() -> str:
    """RGAlign-Rec's gain at each distance between the LM's chats and the shop, as Markdown; intervals over worlds."""
    table = pd.read_parquet(PUBLISHED / DISTANCES / "results.parquet")
    whole = table.query("slice == 'all' and split == 'test' and metric == 'gauc'")
    means = whole.groupby(["distance", "model", "world_seed"])["value"].mean().groupby(level=[0, 1]).mean()
    compared = pd.read_parquet(PUBLISHED / DISTANCES / "comparisons.parquet").query("split == 'test'")
    worlds = pd.read_parquet(PUBLISHED / DISTANCES / "worlds.parquet").query("slice == 'all' and metric == 'gauc'")
    lines = ["| distance | QE-Rec | RGAlign-Rec | difference | error removed | by world |", "|---" * 6 + "|"]
    for distance, own in compared[compared["against"] == "qe_rec"].groupby("distance"):
        row = _row(own, "rgalign_rec", "all", "qe_rec")
        here = worlds[(worlds["distance"] == distance) & (worlds["model"] == "rgalign_rec")]
        here = here[here["against"] == "qe_rec"].sort_values("world_seed")
        gaucs = [f"{means[distance, model]:.4f}" for model in ("qe_rec", "rgalign_rec")]
        cells = [f"{distance:g}", *gaucs, _interval(row), f"{100 * row.relative:+.1f} %"]
        lines.append(f"| {' | '.join(cells)} | {', '.join(f'{each:+.4f}' for each in here['difference'])} |")
    return "\n".join(lines)


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
    for model, against in pairs([name for name in VARIANTS if name in known]):
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


def costs_table() -> str:
    """What rgalign/estimate.py says of params/qwen3-4b.yaml on CUDA cards, as Markdown."""
    params, size = load("params/qwen3-4b.yaml"), model_size(Qwen3Config(**QWEN3_4B, tie_word_embeddings=True))
    works = [estimate.work(params, size, estimate.Sessions.of(sessions)) for _, sessions in PLANNED.values()]
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


def _row(compared: pd.DataFrame, model: str, name: str, against: str) -> pd.Series:
    """GAUC's row of a pair of models in a slice."""
    own = (compared.model == model) & (compared.against == against)
    return compared[own & (compared.slice == name) & (compared.metric == "gauc")].iloc[0]


def _place(models: pd.Series) -> pd.Series:
    """The place of each in results.MODELS, in which those without training stand first."""
    return models.map(list(MODELS).index)


def _listed(numbers) -> str:
    return ", ".join(str(number) for number in sorted(numbers))


def _interval(row) -> str:
    return f"{row.difference:+.4f} [{row.ci_low:.4f},\N{NO-BREAK SPACE}{row.ci_high:.4f}]"


TABLES = {
    "results": results_table,
    "study": study_table,
    "stages": stages_table,
    "steps": steps_table,
    "distances": distances_table,
    "controls": controls_table,
    "aligned": aligned_table,
    "scaling": scaling_table,
    "costs": costs_table,
}


def with_tables(readme: str) -> str:
    """The README's text with its tables between their marks."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}: made by `make published` -->", f"<!-- end of {name} -->"
        readme = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", f"{begin}\n{table()}\n{end}", readme, flags=re.S)
    return readme


if __name__ == "__main__":
    studies = sorted(path.name for path in (ROOT / "outputs").glob(f"{STUDY}*"))
    others = [name for name in (*SWEPT, DISTANCES, *ALIGNED, SCALING) if (ROOT / "outputs" / name).is_dir()]
    for name in sys.argv[1:] or [*RUNS, *studies, *others]:
        publish(name)
    write_text(ROOT / "README.md", with_tables((ROOT / "README.md").read_text(encoding="utf-8")))
