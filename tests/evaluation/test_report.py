"""The pages of a run, made from the published quickstart's tables, against those tables read by hand."""

import json
import re
import shutil
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import yaml
from scipy.stats import norm

from rgalign.__main__ import main
from rgalign.evaluation.comparisons import holm
from rgalign.evaluation.results import MODELS, conform
from rgalign.params import ROOT, load_run
from rgalign.report import decision, pages
from rgalign.report.decision import SESSIONS
from rgalign.run import stages
from rgalign.run.artifacts import ArtifactError, write_table
from rgalign.run.plan import STAGES, stage_params

PUBLISHED = ROOT / "outputs" / "published" / "quickstart"
VOID = {"meta", "img", "br", "link", "input"}


@pytest.fixture
def run(tmp_path) -> Path:
    """What is published of quickstart, without the models that need no training, and without the pair RGAlign-Rec and
    two-tower + text: tests that want one put it there."""
    for name in ("results", "comparisons"):
        table = pd.read_parquet(PUBLISHED / f"{name}.parquet")
        of = table[["model", *(["against"] if "against" in table else [])]]
        left = of.isin(["word_overlap", "raw_cosine"]).any(axis=1)
        if "against" in table:
            left |= (table["model"] == "rgalign_rec") & (table["against"] == "two_tower_text")
        write_table(tmp_path / f"run/tables/{name}.parquet", table[~left])
    for name in ("params.yaml", "manifest.json"):
        shutil.copy(PUBLISHED / name, tmp_path / "run" / name)
    made_now(tmp_path / "run")
    with_sessions(tmp_path / "run", {"two_tower_text": 0.5, "rgalign_rec": 0.6})
    return tmp_path / "run"


def with_sessions(run: Path, gauc: dict[str, float], users: int = 40) -> None:
    """Session metrics that the published run does not keep: two sessions a user, with these means and some noise that
    the models do not share."""
    noise = np.random.default_rng(0).normal(0, 0.02, (len(gauc), 2 * users))
    ids = [f"s{number}" for number in range(2 * users)]
    fixed = {"session_id": ids, "user_id": [f"u{number // 2}" for number in range(2 * users)], "gauc_weight": 6.0}
    rows = [
        pd.DataFrame(fixed | {"model": name, "seed": 0, "split": "test", "gauc": mean + own})
        for (name, mean), own in zip(gauc.items(), noise, strict=True)
    ]
    write_table(run / SESSIONS, conform(pd.concat(rows), "session_metrics"))


def made_now(run: Path) -> None:
    """Let the manifest say the params of today's schema: what is published may be older than a parameter."""
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    params = load_run(run)
    for name, entry in manifest["stages"].items():
        entry["params"] = stage_params(STAGES[name], params)
    (run / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def compared_with_word_overlap(run: Path, low: float) -> None:
    """Word overlap is the best simple model on valid; RGAlign-Rec differs by low + 0.01 [low, low + 0.02]."""
    results, compared = (pd.read_parquet(run / f"tables/{name}.parquet") for name in ("results", "comparisons"))
    of_popularity = results[results.model == "popularity"]
    more = of_popularity.assign(model="word_overlap", value=0.88)
    write_table(run / "tables/results.parquet", pd.concat([results, more]))
    own = compared[(compared.model == "rgalign_rec") & (compared.against == "qe_rec")]
    p = 2 * norm.sf(abs(low + 0.01) / (0.02 / 3.92))
    own = own.assign(against="word_overlap", difference=low + 0.01, ci_low=low, ci_high=low + 0.02, p=p, p_holm=p)
    write_table(run / "tables/comparisons.parquet", pd.concat([compared, own]))


class Page(HTMLParser):
    """Tags that are open, every attribute, and the text of table cells, row by row."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.attributes, self.rows, self.tags = [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"{tag} closes what is not open"

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def page_of(run: Path) -> Page:
    return Page(pages.write(run)[0].read_text(encoding="utf-8"))


def test_the_page_is_whole_and_asks_nobody_for_anything(run):
    page = page_of(run)
    assert page.open == []
    assert "script" not in page.tags
    for tag, name, value in page.attributes:
        if name in ("src", "href"):
            assert value.startswith(("data:", "#")), (tag, value)
    assert not re.search(r"https?://|@import|url\(", (run / "report.html").read_text(encoding="utf-8"))


def test_results_are_the_means_over_ranker_seeds(run):
    results = pd.read_parquet(run / "tables/results.parquet")
    results.loc[results.model == "qe_rec", "seed"] = 0
    again = results[results.model == "qe_rec"].assign(seed=1, value=lambda t: t.value + 0.1)
    write_table(run / "tables/results.parquet", pd.concat([results, again]))
    (own,) = results.query("model == 'qe_rec' and metric == 'gauc' and slice == 'all' and split == 'test'").value
    width = 1 + pages.results_table(results).shape[1]
    rows = {row[0]: row for row in page_of(run).rows if len(row) == width and row[0] in MODELS.values()}
    assert rows["QE-Rec"][1] == f"{own + 0.05:.4f}"
    assert list(rows) == [MODELS[name] for name in MODELS if name in set(results.model)]


def test_the_gap_is_that_to_the_oracle(run):
    table = pages.results_table(pd.read_parquet(run / "tables/results.parquet"))
    low, own, high = table.gauc[["two_tower_text", "rgalign_rec", "oracle"]]
    assert table.gap["rgalign_rec"] == pytest.approx((own - low) / (high - low))
    assert table.gap[["popularity", "two_tower_text"]].isna().all()
    without = pd.read_parquet(run / "tables/results.parquet").query("model != 'oracle'")
    assert "gap" not in pages.results_table(without)


def test_every_comparison_that_shows_no_gain_is_listed(run):
    compared = pd.read_parquet(run / "tables/comparisons.parquet").query("split == 'test'")
    compared = compared[compared.metric.isin(pages.LABELS)].dropna(subset="difference")
    worst = compared.index[compared.metric.eq("gauc") & compared.slice.eq("tail")][0]
    compared.loc[worst, ["difference", "ci_low", "ci_high", "p_holm"]] = [-0.2, -0.3, -0.1, 0.001]
    write_table(run / "tables/comparisons.parquet", compared)
    page, negative = page_of(run), compared[(compared.p_holm >= 0.05) | (compared.difference < 0)]
    assert (negative.ci_low > 0).any(), "an interval alone is no verdict: many pairs are compared"
    text = (run / "report.html").read_text(encoding="utf-8")
    assert f"{len(negative)} of {len(compared)} comparisons" in text
    losses = negative[(negative.p_holm < 0.05) & (negative.difference < 0)]
    assert f"{len(losses)} of them are losses" in text
    listed = [row for row in page.rows if len(row) == 5 and row[3].endswith("]") and row[2] in pages.LABELS.values()]
    assert len(listed) == len(negative)
    assert {row[4] for row in listed[: len(losses)]} == {"loss"}, "losses come first"
    assert ["-0.2000 [-0.3000, -0.1000]", "loss"] in [row[3:] for row in listed[: len(losses)]]


def test_a_table_of_slices_is_one_family(run):
    compared = pd.read_parquet(run / "tables/comparisons.parquet").query("split == 'test'")
    own = compared[(compared.metric == "gauc") & (compared.model == "rgalign_rec")]
    relative = own.assign(relative_low=0.01, relative_high=0.2)
    write_table(run / "tables/comparisons.parquet", relative)
    rows = {row[0]: row for row in page_of(run).rows if len(row) == 5 and row[0] in set(own.slice)}
    adjusted = dict(zip(own.slice, holm(own.p), strict=True))
    assert {name for name, row in rows.items() if row[4].startswith("gain")} == {
        name for name, p in adjusted.items() if p < 0.05
    }
    assert rows["all"][3].endswith("[+1.0 %, +20.0 %]"), "a ratio has an interval of its own"


def test_what_the_experiment_found_stands_beside_the_papers(run):
    rows = [
        ("rgalign_rec", "qe_rec", method, low + 0.05, low, low + 0.1)
        for method, low in (("plain", 0.02), ("CUPED", 0.5))
    ]
    columns = ["treatment", "control", "method", "relative", "relative_low", "relative_high"]
    write_table(run / "tables/experiment.parquet", pd.DataFrame(rows, columns=columns))
    (row,) = (row for row in page_of(run).rows if row and row[0] == "here: RGAlign-Rec over QE-Rec")
    assert row[-1] == "+7.0 % [+2.0 %, +12.0 %]"


def test_what_customers_wrote_is_shown_and_never_obeyed(run):
    evil = "</td><script>alert(1)</script>{{ 7 * 7 }}{% raw %}<img src=x onerror=alert(1)>&amp;"
    rows = [("s1", "main", number, evil, reward) for number, reward in ((-1, 0.5), (0, 2.0), (1, -1.0))]
    columns = ["session_id", "source", "candidate", "query", "reward"]
    write_table(run / "tables/candidates.parquet", pd.DataFrame(rows, columns=columns))
    page = page_of(run)
    assert "script" not in page.tags
    assert page.tags.count("img") == 0
    assert ["s1", evil, "+0.50", evil, "+2.00", evil, "-1.00"] in page.rows, "as it was written"


def test_figures_are_inside_with_words_for_who_cannot_see_them(run, tmp_path):
    figure, axes = plt.subplots(1, 2)
    axes[0].plot([1, 2], label='GAUC "of" <all>')
    axes[0].set(title="How far", xlabel="epoch", ylabel="loss")
    stage = stages.OpenStage.__new__(stages.OpenStage)
    stage.__dict__ |= {"run": run, "figures": [], "stage": type("Named", (), {"name": "03_rankers"})}
    stage.figure("curve", figure)
    plt.close(figure)
    (run / "figures/09_evaluation").mkdir()
    plt.imsave(run / "figures/09_evaluation/older_one.png", [[0.0, 1.0]])
    alts = [value for tag, name, value in page_of(run).attributes if name == "alt"]
    assert alts == ['How far: loss against epoch (GAUC "of" <all>)', "older one"]


def test_results_of_other_params_are_not_reported(run):
    params = (run / "params.yaml").read_text(encoding="utf-8")
    (run / "params.yaml").write_text(re.sub(r"bootstrap: \d+", "bootstrap: 500", params), encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"09_evaluation was made with other params \(evaluation\.bootstrap"):
        pages.write(run)


def test_the_same_run_gives_the_same_pages(run):
    first = [path.read_bytes() for path in pages.write(run)]
    assert [path.read_bytes() for path in pages.write(run)] == first


def test_a_run_without_evaluation_is_told_what_to_do(run, capsys):
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["stages"]["09_evaluation"]
    (run / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="has no 09_evaluation: python -m rgalign run"):
        pages.write(run)
    assert main(["report", str(run)]) == 1
    assert "has no 09_evaluation" in capsys.readouterr().err
    assert not (run / "report.html").exists()


def test_the_model_card_can_be_read_by_a_hub_and_says_what_was_measured(run):
    _, front, text = pages.write(run)[1].read_text(encoding="utf-8").split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    compared = pd.read_parquet(run / "tables/comparisons.parquet")
    own = compared.query("model == 'rgalign_rec' and metric == 'gauc' and slice == 'all' and split == 'test'")
    assert f"RGAlign-Rec against QE-Rec: GAUC {own.difference.item():+.4f}" in text
    for part in ("## Use", "## Measured", "## Limits", "RG-SFT, RG-DPO, RG-CL, closed loop"):
        assert part in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1, "every row has every column"


def test_the_command_prints_the_table_and_where_to_read(run, capsys):
    assert main(["report", str(run)]) == 0
    told = capsys.readouterr().out
    assert told.splitlines()[-1] == f"Open: {run / 'report.html'}"
    assert "RGAlign-Rec" in told


def lines_of(run: Path) -> dict[str, str]:
    """The four lines as a reader sees them, question -> text."""
    html = pages.write(run)[0].read_text(encoding="utf-8")
    found = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", html)
    return {question: unescape(re.sub(r"<[^>]*>", " ", text)).strip() for question, text in found}


@pytest.mark.parametrize(
    ("low", "answer", "says"),
    [
        (0.01, "Yes. RGAlign-Rec ranks better than", "gain"),
        (-0.05, "No. RGAlign-Rec ranks worse than", "loss"),
        (-0.01, "Not shown. RGAlign-Rec does not differ significantly from", "not significant"),
    ],
)
def test_the_first_line_is_the_best_trained_model_against_the_best_simple_one(run, low, answer, says):
    compared_with_word_overlap(run, low)
    html, card = (path.read_text(encoding="utf-8") for path in pages.write(run))
    told = f"{answer} word overlap (TF-IDF cosine), the best simple model by GAUC on valid: "
    told += f"{low + 0.01:+.4f} [{low:+.4f}, {low + 0.02:+.4f}] GAUC ({says}), on 1,726 lists of 40 users"
    assert told in html[: html.index('id="results"')]
    assert f'<span class="{says if says != "not significant" else "soft"}">{told}' in html, (
        "a loss is as large as a gain"
    )
    assert f"Does it work? {told}" in card


@pytest.mark.parametrize(("ours", "answer"), [(0.6, "Yes."), (0.4, "No.")])
def test_a_pair_that_is_no_neighbour_is_compared_from_the_sessions(run, ours, answer):
    with_sessions(run, {"two_tower_text": 0.5, "rgalign_rec": ours})
    sessions = pd.read_parquet(run / SESSIONS)
    mean = sessions.groupby("model")["gauc"].mean()
    lines = lines_of(run)
    assert lines["Does it work?"].startswith(answer)
    assert (
        f"two-tower + text, the best simple model by GAUC on valid: {mean.rgalign_rec - mean.two_tower_text:+.4f} ["
        in (lines["Does it work?"])
    )
    assert "One simulated world, one ranker seed" in lines["How sure is that?"]


def test_a_loss_of_the_first_line_is_not_hidden_by_the_number_of_other_pairs(run):
    compared_with_word_overlap(run, -0.05)
    compared = pd.read_parquet(run / "tables/comparisons.parquet")
    own = (compared.against == "word_overlap") & (compared.slice == "all")
    compared.loc[own, ["p", "p_holm"]] = [0.02, 0.14]
    write_table(run / "tables/comparisons.parquet", compared)
    assert lines_of(run)["Does it work?"].startswith("No. RGAlign-Rec ranks worse than word overlap")


def test_the_second_line_has_the_best_and_the_worst_slice_that_is_large_enough(run):
    compared_with_word_overlap(run, 0.01)
    results, compared = (pd.read_parquet(run / f"tables/{name}.parquet") for name in ("results", "comparisons"))
    own = (compared.against == "word_overlap") & (compared.metric == "gauc") & (compared.split == "test")
    for name, difference, groups in (
        ("tail", 0.9, 99),
        ("head", 0.5, 100),
        ("cold", -0.5, 100),
        ("region=sg", -0.9, 99),
    ):
        here = own & (compared.slice == name)
        compared.loc[here, ["difference", "ci_low", "ci_high", "p"]] = [
            difference,
            difference - 0.1,
            difference + 0.1,
            0,
        ]
        results.loc[(results.slice == name) & (results.metric == "gauc"), "groups"] = groups
    for name, table in (("results", results), ("comparisons", compared)):
        write_table(run / f"tables/{name}.parquet", table)
    where = lines_of(run)["Where?"]
    assert "Best: head, +0.5000 [+0.4000, +0.6000] GAUC (gain, 100 lists)." in where
    assert "Worst: cold, -0.5000 [-0.6000, -0.4000] GAUC (loss, 100 lists)." in where


def test_the_last_line_is_the_experiment_or_the_log_or_says_that_nobody_knows(run):
    assert lines_of(run)["And online?"] == decision.NOT_YET
    results = pd.read_parquet(run / "tables/results.parquet")
    write_table(run / "tables/results.parquet", results.assign(world_seed=pd.NA))
    assert lines_of(run)["And online?"].startswith("Cannot be known from this log")
    assert "One log, one ranker seed" in lines_of(run)["How sure is that?"]
    assert "world" not in " ".join(lines_of(run).values())
    sessions = pd.read_parquet(run / SESSIONS)
    clicks = sessions.gauc.where(sessions.model == "two_tower_text", sessions.gauc / 2)
    write_table(run / SESSIONS, sessions.assign(**{"ctr@3/kb": clicks}))
    mean = sessions.assign(clicks=clicks).groupby("model").clicks.mean()
    estimated = f"{mean.rgalign_rec / mean.two_tower_text - 1:+.1%}".replace("%", " %")
    assert f"estimated from the log's propensities: {estimated} [" in lines_of(run)["And online?"]
    row = {"treatment": "rgalign_rec", "control": "qe_rec", "method": "plain", "relative": -0.27}
    write_table(run / "tables/experiment.parquet", pd.DataFrame([row | {"relative_low": -0.4, "relative_high": -0.1}]))
    html = pages.write(run)[0].read_text(encoding="utf-8")
    told = '<span class="loss">CTR@3 of RGAlign-Rec over QE-Rec: -27.0 % [-40.0 %, -10.0 %] (loss).'
    assert told in html
    assert '<td class="loss">-27.0 % [-40.0 %, -10.0 %]</td>' in html, "and in the table of the paper"


def test_a_small_run_has_a_banner_that_says_how_small_it_is(run):
    assert 'class="banner"' not in pages.write(run)[0].read_text(encoding="utf-8")
    results = pd.read_parquet(run / "tables/results.parquet")
    for groups, few in ((decision.FEW - 1, True), (decision.FEW, False)):
        write_table(run / "tables/results.parquet", results.assign(groups=groups))
        html, card = (path.read_text(encoding="utf-8") for path in pages.write(run))
        assert (f"Do not decide by this page: {groups} lists of 40 users were judged" in html) == few
        assert ("Do not decide by this page" in card) == few


@pytest.mark.parametrize("low", [3e-5, -3e-5, 4e-9])
def test_an_end_of_an_interval_that_is_not_zero_does_not_look_like_zero(low):
    told = decision.interval({"difference": 1e-4, "ci_low": low, "ci_high": 3e-4})
    ends = [float(text) for text in re.findall(r"[+-][\d.]+", told)]
    assert len(ends) == 3
    assert all(ends)
    assert decision.interval({"difference": 0.05, "ci_low": 0.0, "ci_high": 0.1}) == "+0.0500 [+0.0000, +0.1000]"


def test_empty_slices_are_left_out_and_long_tables_are_folded(run):
    compared = pd.read_parquet(run / "tables/comparisons.parquet")
    cold = compared.slice == "cold"
    compared.loc[cold, ["difference", "ci_low", "ci_high", "relative", "p", "p_holm"]] = np.nan
    write_table(run / "tables/comparisons.parquet", compared)
    page = page_of(run)
    assert not [row for row in page.rows if "cold" in row[:2]]
    assert ("details", "open", None) not in page.attributes
    assert not [cell for row in page.rows for cell in row if "[, ]" in cell]


def test_a_run_without_a_trained_model_says_so(run):
    results = pd.read_parquet(run / "tables/results.parquet")
    write_table(run / "tables/results.parquet", results[~results.model.isin(["qe_rec", "rgalign_rec"])])
    assert decision.decide(run, load_run(run), pages.read(run, "results"), None, {})["lines"] == {
        "Does it work?": [("soft", "Not known: the run has no trained model.")]
    }


def test_slices_are_those_of_one_pair(run):
    before = pages.contents(run)["slices"]
    compared_with_word_overlap(run, 0.01)
    pd.testing.assert_frame_equal(pd.DataFrame(pages.contents(run)["slices"]), pd.DataFrame(before))
    assert {row["against"] for row in before} == {"qe_rec"}
