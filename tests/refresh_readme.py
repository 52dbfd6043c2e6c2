"""The README's results table, made from outputs/published/: `make published` after the runs, never typed.

A run is published as its two small result tables, its params and its manifest.
"""

import re
import shutil
import sys
from pathlib import Path

import pandas as pd

from rgalign.artifacts import write_text
from rgalign.evaluation.results import MODELS
from rgalign.params import ROOT

PUBLISHED = ROOT / "outputs" / "published"
FILES = ("tables/results.parquet", "tables/comparisons.parquet", "params.yaml", "manifest.json")
RUNS = {
    "quickstart": "ShopWorld (simulated), quickstart",
    "cfpb2014": "cfpb2014 (real), 20 sampled candidates",
    "cfpb2014-no-product": "cfpb2014 without product columns",
    "msweb": "msweb (real), 20 sampled candidates",
}
METRICS = {"gauc": "GAUC", "recall@3": "Recall@3", "ndcg@3": "NDCG@3", "recall@3/kb": "Recall@3, whole KB"}
BEGIN, END = "<!-- results: made by `make published` -->", "<!-- end of results -->"


def publish(run: str) -> None:
    """Copy the small files of outputs/<run> to outputs/published/<run>."""
    for name in FILES:
        target = PUBLISHED / run / Path(name).name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / "outputs" / run / name, target)
    figure = ROOT / "outputs" / run / "figures/09_evaluation/distance_to_oracle.png"
    if run == "quickstart":
        shutil.copyfile(figure, PUBLISHED / run / figure.name)


def results_table() -> str:
    """The Markdown table of every published run: means over ranker seeds on the test split, whole slice."""
    lines = [f"| data | model | {' | '.join(METRICS.values())} | GAUC against the row above (95 % interval) |"]
    lines.append("|---" * (len(METRICS) + 3) + "|")
    for run, title in RUNS.items():
        results = pd.read_parquet(PUBLISHED / run / "results.parquet")
        whole = results[(results.slice == "all") & (results.split == "test")]
        means = whole.pivot_table("value", "model", "metric", sort=False)
        pairs = pd.read_parquet(PUBLISHED / run / "comparisons.parquet")
        pairs = pairs[(pairs.slice == "all") & (pairs.metric == "gauc")].set_index("model")
        for model in means.index:
            figures = " | ".join(f"{means.loc[model, metric]:.3f}" for metric in METRICS)
            against = ""
            if model in pairs.index:
                row = pairs.loc[model]
                against = f"{row.difference:+.4f} [{row.ci_low:.4f}, {row.ci_high:.4f}]"
            lines.append(f"| {title} | {MODELS[model]} | {figures} | {against} |")
            title = ""
    return "\n".join(lines)


def with_table(readme: str) -> str:
    """The README's text with the table between its marks."""
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", f"{BEGIN}\n{results_table()}\n{END}", readme, flags=re.S)


if __name__ == "__main__":
    for name in sys.argv[1:] or RUNS:
        publish(name)
    write_text(ROOT / "README.md", with_table((ROOT / "README.md").read_text(encoding="utf-8")))
