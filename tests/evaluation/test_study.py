"""A study over made-up runs: what is gathered, its intervals against scipy's, and notebook 90 over it."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from small_studies import PAIRS, add_run, made_up_sessions, tell

from rgalign.commands import compare, pipeline, study
from rgalign.data import tables
from rgalign.evaluation import bootstrap, results
from rgalign.evaluation.comparisons import holm, verdict
from rgalign.evaluation.slices import session_slices
from rgalign.params import load
from rgalign.run import artifacts
from rgalign.run.artifacts import ArtifactError
from rgalign.shopworld import world

MAIN, ABLATION = "params/quickstart.yaml", "params/ablations/no_neftune.yaml"
DRAWS = {"seed": 0, "replicates": 100}


@pytest.fixture(scope="module")
def shop():
    """A small ShopWorld and the slices of its test sessions."""
    shop = world.generate(seed=7, sessions=400, users=200, transcripts=0)
    own = {name: shop.sessions[shop.sessions["split"] == name] for name in ("train", "test")}
    shown = {name: shop.impressions[shop.impressions["session_id"].isin(s["session_id"])] for name, s in own.items()}
    return shop, session_slices(own["test"], shown["test"], shown["train"].query("clicked == 1").intent_id)


def small_run(folder, shop, params_file, seed, distance=0.5, **given):
    """A made-up run on the test sessions of the shop, its data set beside it."""
    dataset, masks = shop
    world = given.get("world", seed)
    sessions = made_up_sessions(world, params_file, distance, ids=list(masks.index))
    given = {"sessions": sessions, "slices": masks} | given
    tables.write(dataset, add_run(folder, params_file, seed, distance=distance, **given) / "tables/dataset")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shop):
    """Four worlds at distance 0.5, of which one lacks the ablation, three at 1.0, and a run that failed."""
    out = tmp_path_factory.mktemp("study")
    for seed in range(4):
        small_run(out, shop, MAIN, seed)
        if seed < 3:
            small_run(out, shop, ABLATION, seed)
            small_run(out, shop, MAIN, seed, distance=1.0)
    tell(out, "no_neftune-s3", ABLATION, 3, failed="notebooks/05_rg_sft.ipynb failed in cell 4")
    return out


@pytest.fixture(scope="module")
def gathered(folder):
    """runs, results, pairs, comparisons, worlds."""
    runs = study.runs_of(folder)
    table, pairs = study.results_of(folder, runs), study.pairs_of(folder, runs)
    return runs, table, pairs, *compare.compare_models(folder, runs, table, pairs, **DRAWS)


def row_of(compared, model, against, metric="gauc", name="all", distance=0.5):
    same = (compared["model"] == model) & (compared["against"] == against) & (compared["distance"] == distance)
    (row,) = compared[same & (compared["metric"] == metric) & (compared["slice"] == name)].itertuples()
    return row


def test_an_ablations_params_file_names_its_model():
    assert study.model_of(ABLATION) == "rgalign_rec/no_neftune"
    assert not study.model_of(MAIN)
    with pytest.raises(ValueError, match=r"no_neftun\.yaml .*did you mean 'rgalign_rec/no_neftune'"):
        study.model_of("params/ablations/no_neftun.yaml")


def test_each_run_says_what_it_is_and_a_failed_one_why(gathered):
    runs = gathered[0].set_index("run")
    assert runs.loc["no_neftune-s0", ["recipe", "ablation", "seed", "state"]].tolist() == [
        "no_neftune", "rgalign_rec/no_neftune", 0, "finished",
    ]  # fmt: skip
    assert runs.loc["quickstart-distance=1.0-s2", ["distance", "world_seed"]].tolist() == [1.0, 2]
    assert "05_rg_sft" in runs.loc["no_neftune-s3", "state"]
    assert (runs["state"] == "finished").sum() == 10


def test_an_ablation_gives_its_own_row_alone_and_the_rest_stands_once(gathered):
    _, table, pairs, *_ = gathered
    assert set(table[table["recipe"] == "no_neftune"]["model"]) == {"rgalign_rec/no_neftune"}
    assert not table.duplicated(results.ORDER["results"]).any()
    assert set(table["slice"]) == set(study.SLICES)
    assert pairs == [*PAIRS, ("rgalign_rec/no_neftune", "rgalign_rec")]


@pytest.mark.parametrize(("model", "against", "worlds"), [(*PAIRS[2], 4), ("rgalign_rec/no_neftune", "rgalign_rec", 3)])
@pytest.mark.parametrize(("metric", "name"), [("gauc", "all"), ("recall@3", "all"), ("gauc", "shuffled")])
def test_intervals_are_those_of_a_t_test_over_world_means_or_of_their_sampling_error(
    gathered, model, against, worlds, metric, name
):
    _, table, _, compared, by_world = gathered
    row = row_of(compared, model, against, metric, name)
    chosen = (table["metric"] == metric) & (table["slice"] == name) & (table["distance"] == 0.5)
    means = table[chosen].groupby(["world_seed", "model"])["value"].mean().unstack()[[model, against]].dropna()
    assert (row.worlds, row.seeds) == (len(means), 2) == (worlds, 2)
    own = by_world[(by_world["model"] == model) & (by_world["metric"] == metric) & (by_world["slice"] == name)]
    own = own[own["distance"] == 0.5].set_index("world_seed")
    assert own["difference"].to_dict() == pytest.approx((means[model] - means[against]).to_dict())
    floor = np.sqrt((((own["ci_high"] - own["ci_low"]) / (2 * stats.norm.ppf(0.975))) ** 2).sum()) / worlds
    assert row.sampling_error == pytest.approx(floor)
    error = max(floor, stats.sem(own["difference"]))
    half = stats.t.ppf(0.975, worlds - 1) * error
    assert (row.ci_low, row.ci_high) == pytest.approx((row.difference - half, row.difference + half))
    assert row.p == pytest.approx(2 * stats.t.sf(abs(row.difference) / error, worlds - 1))
    new, old = means[model], means[against]
    relative = 1 - (1 - new) / (1 - old) if metric == "gauc" else new / old - 1
    assert row.relative == pytest.approx(relative.mean())
    assert row.relative_low < row.relative < row.relative_high
    assert row.world_seeds == " ".join(map(str, means.index))


def test_the_family_of_a_p_value_is_the_rows_of_its_table(gathered):
    compared = gathered[3]
    for _, part in compared.groupby(["metric", "slice", "split"]):
        assert part["p_holm"].to_numpy() == pytest.approx(holm(part["p"]), nan_ok=True)
    assert compared["distance"].nunique() > 1


def test_data_that_do_not_know_which_lists_were_shuffled_have_no_such_slice(tmp_path, shop):
    dataset, masks = shop
    sessions = dataset.sessions.drop(columns="shuffled")
    for seed in range(3):
        small_run(tmp_path, (replace(dataset, sessions=sessions), masks.drop(columns="shuffled")), MAIN, seed)
    runs = study.runs_of(tmp_path)
    table, pairs = study.results_of(tmp_path, runs), study.pairs_of(tmp_path, runs)
    compared, _ = compare.compare_models(tmp_path, runs, table, pairs, **DRAWS)
    assert set(compared["slice"]) == {"all", "cold", "tail"}
    rows = compare.stage_table(table, compared, study.stage_seconds(tmp_path, runs), runs)
    assert "shuffled" not in rows
    assert rows["ci_low"].notna().sum() == len(PAIRS)


def test_each_distance_has_its_own_comparisons(gathered):
    compared = gathered[3]
    pair = PAIRS[2]
    assert [row_of(compared, *pair, distance=d).worlds for d in (0.5, 1.0)] == [4, 3]
    assert compared[compared["model"] == "rgalign_rec/no_neftune"]["distance"].unique() == [0.5]


def test_lm_seeds_that_only_one_of_two_models_has_do_not_count(tmp_path):
    for seed in (0, 1, 2):
        add_run(tmp_path, MAIN, seed, world=seed // 2, sessions=made_up_sessions(seed, "main", 0.5))
    add_run(tmp_path, ABLATION, 0, world=0)
    add_run(tmp_path, ABLATION, 2, world=1)
    runs = study.runs_of(tmp_path)
    table = study.results_of(tmp_path, runs).drop(columns="recipe")
    whole = compare.comparisons.by_world(table, [("rgalign_rec/no_neftune", "rgalign_rec")])
    (row,) = whole[(whole["metric"] == "gauc") & (whole["slice"] == "all") & (whole["world_seed"] == 0)].itertuples()
    chosen = (table["metric"] == "gauc") & (table["slice"] == "all") & (table["model"] == "rgalign_rec")
    assert row.old == pytest.approx(table[chosen & (table["lm_seed"] == 0)]["value"].mean())


def test_the_stage_table_says_means_verdicts_and_seconds(gathered, folder):
    runs, table, _, compared, _ = gathered
    seconds = study.stage_seconds(folder, runs)
    rows = compare.stage_table(table, compared, seconds, runs)
    assert list(rows["model"][:5]) == [
        "popularity",
        "two_tower_text",
        "qe_rec",
        "rgalign_rec",
        "rgalign_rec/no_neftune",
    ]
    chosen = (table["model"] == "qe_rec") & (table["metric"] == "gauc") & (table["slice"] == "tail")
    tail = table[chosen & (table["distance"] == 0.5)]["value"].mean()
    assert rows.loc[2, "tail"] == pytest.approx(tail)
    assert rows["seconds"][:5].isna().tolist() == [True, False, False, False, False]
    assert rows["seconds"][2] == 60
    significant = rows["p_holm"] < 0.05
    assert (rows["says"][rows["p_holm"] >= 0.05] == "not significant").all()
    assert (rows["says"][significant & (rows["difference"] > 0)] == "gain").all()
    assert {"gain", "not significant"} <= set(rows["says"])
    shown = rows.set_index(["distance", "model"])["world_seeds"]
    assert shown[0.5, "rgalign_rec"] == "0 1 2 3"
    assert shown[0.5, "rgalign_rec/no_neftune"] == "0 1 2", "a row over other worlds says which"
    assert rows["shuffled"].between(0, 1).all()
    assert compare.main_distance(runs) == 0.5


def small_world(folder, shop, seed):
    """A main run and an ablation of one world."""
    for params_file in (MAIN, ABLATION):
        small_run(folder, shop, params_file, seed)


def test_in_one_world_the_intervals_are_those_of_its_users(tmp_path, shop):
    small_world(tmp_path, shop, 0)
    runs = study.runs_of(tmp_path)
    table, pairs = study.results_of(tmp_path, runs), study.pairs_of(tmp_path, runs)
    compared, worlds = compare.compare_models(tmp_path, runs, table, pairs, **DRAWS)
    tail = row_of(compared, "rgalign_rec/no_neftune", "rgalign_rec", "gauc", "tail")
    ours, theirs = (
        study.table_of(tmp_path, run, "session_metrics").query("model == 'rgalign_rec'")
        for run in ("no_neftune-s0", "quickstart-s0")
    )
    wide = [part.pivot(index="session_id", columns="seed", values="gauc").mean(axis=1) for part in (ours, theirs)]
    users = ours.drop_duplicates("session_id").set_index("session_id")["user_id"].loc[wide[0].index]
    weight = np.where(shop[1].loc[wide[0].index, "tail"], 12.0, 0)
    own = bootstrap.over_users((wide[0] - wide[1]).to_numpy(), weight, users.to_numpy(dtype=object), **DRAWS)
    assert tail.worlds == 1
    assert (tail.difference, tail.ci_low, tail.ci_high) == pytest.approx((own.estimate, own.low, own.high), abs=1e-9)
    assert verdict(tail).endswith("(in one world)")
    assert worlds["ci_low"].notna().all()


def test_two_worlds_have_each_their_own_interval_and_none_together(tmp_path, shop):
    for seed in (0, 1):
        small_world(tmp_path, shop, seed)
    runs = study.runs_of(tmp_path)
    table, pairs = study.results_of(tmp_path, runs), study.pairs_of(tmp_path, runs)
    compared, worlds = compare.compare_models(tmp_path, runs, table, pairs, **DRAWS)
    row = row_of(compared, *PAIRS[1])
    assert (row.worlds, np.isnan(row.ci_low)) == (2, True)
    assert verdict(row) == "two worlds: see each"
    assert worlds[["ci_low", "ci_high"]].notna().all(axis=None)
    assert row.difference == pytest.approx(
        worlds.query("model == 'qe_rec' and metric == 'gauc' and slice == 'all'")["difference"].mean()
    )


def test_data_that_know_no_world_are_one_world_however_many_seeds(tmp_path, shop):
    dataset, masks = shop
    for seed in (0, 1, 2):
        sessions = made_up_sessions(seed, "main", None, ids=list(masks.index))
        run = add_run(tmp_path, MAIN, seed, distance=None, sessions=sessions, slices=masks)
        tables.write(dataset, run / "tables/dataset")
    runs = study.runs_of(tmp_path)
    table = study.results_of(tmp_path, runs)
    compared, _ = compare.compare_models(tmp_path, runs, table, PAIRS, **DRAWS)
    (row,) = compared.query("model == 'rgalign_rec' and metric == 'gauc' and slice == 'all'").itertuples()
    values = table.query("metric == 'gauc' and slice == 'all'").groupby("model")["value"].mean()
    assert row.worlds == 1
    assert row.difference == pytest.approx(values["rgalign_rec"] - values["qe_rec"])
    assert row.ci_low < row.difference < row.ci_high
    rows = compare.stage_table(table, compared, study.stage_seconds(tmp_path, runs), runs)
    assert rows["gauc"].tolist() == pytest.approx(values[rows["model"]].tolist())


def test_runs_that_do_not_belong_together_are_refused(tmp_path):
    add_run(tmp_path, MAIN, 0)
    add_run(tmp_path, "params/other.yaml", 0)
    with pytest.raises(ValueError, match=r"other and quickstart differ in rgalign_rec of world 0 at distance 0\.5"):
        study.results_of(tmp_path, study.runs_of(tmp_path))


def test_results_that_were_altered_or_are_stale_do_not_count(tmp_path):
    for seed in (0, 1):
        add_run(tmp_path, MAIN, seed)
    entry = artifacts.read_manifest(tmp_path / "quickstart-s1")["stages"]
    artifacts.record_stage(
        tmp_path / "quickstart-s1", "03_rankers", entry["03_rankers"] | {"outputs": {"models/rankers": "new"}}
    )
    artifacts.record_stage(
        tmp_path / "quickstart-s1", "09_evaluation", entry["09_evaluation"] | {"inputs": {"models/rankers": "old"}}
    )
    states = study.runs_of(tmp_path).set_index("run")["state"]
    assert states["quickstart-s1"] == "09_evaluation is older than models/rankers: run it again"
    artifacts.write_text(tmp_path / "quickstart-s0" / "tables/results.parquet", "altered")
    with pytest.raises(ArtifactError, match=r"quickstart-s0/tables/results\.parquet was altered"):
        study.runs_of(tmp_path)


def test_a_folder_without_results_says_what_to_type(tmp_path):
    with pytest.raises(ArtifactError, match=r"python -m rgalign sweep"):
        study.runs_of(tmp_path)


def test_a_study_whose_runs_are_gone_says_the_same_from_its_tables(gathered, folder, tmp_path):
    runs, table, pairs, compared, worlds = gathered
    seconds = study.stage_seconds(folder, runs)
    for name, kept in {"results": table.drop(columns="recipe"), "worlds": worlds, "stage_seconds": seconds}.items():
        artifacts.write_table(tmp_path / f"{name}.parquet", kept)
    artifacts.write_text(tmp_path / "sweep.json", (folder / "sweep.json").read_text())
    again = study.runs_of(tmp_path)
    same = ["run", "recipe", "ablation", "seed", "distance", "world_seed"]
    finished = runs[runs["state"] == "finished"]
    pd.testing.assert_frame_equal(
        again[again["state"] == "finished"][same].reset_index(drop=True), finished[same].reset_index(drop=True)
    )
    assert study.pairs_of(tmp_path, again) == pairs
    gone = study.results_of(tmp_path, again)
    assert set(finished["recipe"]) >= set(gone["recipe"])
    found, by_world = compare.compare_models(tmp_path, again, gone, pairs, **DRAWS)
    pd.testing.assert_frame_equal(found, compared)
    assert len(by_world) == len(worlds)
    rows = [
        compare.stage_table(results_of, compared_of, study.stage_seconds(place, runs_of), runs_of)
        for place, results_of, compared_of, runs_of in ((folder, table, compared, runs), (tmp_path, gone, found, again))
    ]
    pd.testing.assert_frame_equal(*rows)
    assert all((tmp_path / file).is_file() for file in study.inputs(tmp_path, again))
    fewer = pd.read_parquet(tmp_path / "results.parquet").query("world_seed != 2")
    artifacts.write_table(tmp_path / "results.parquet", fewer)
    with pytest.raises(ArtifactError, match=r"does not say which world and distance .*-s2 had"):
        study.runs_of(tmp_path)


@pytest.mark.slow
def test_notebook_90_runs_over_a_study(folder):
    parameters = {"params_file": "params/smoke.yaml", "run_dir": str(folder), "overrides": {}}
    stage = pipeline.stage_named("90")
    pipeline.execute(folder, [stage], parameters, load("params/smoke.yaml"), forced=True)
    written = {name: pd.read_parquet(folder / f"tables/{name}.parquet") for name in ("results", "comparisons")}
    for name, table in written.items():
        results.conform(table, name)
    assert written["comparisons"]["worlds"].isin([3, 4]).all()
    executed = json.loads((folder / "notebooks/90_ablation.ipynb").read_text(encoding="utf-8"))
    outputs = json.dumps([cell.get("outputs") for cell in executed["cells"]])
    assert "not significant" in outputs
    assert outputs.count("image/png") == 2
    entry = artifacts.read_manifest(folder)["stages"]["90_ablation"]
    assert "quickstart-s0/manifest.json" in entry["inputs"]


STEP = ("rgalign_rec/sft_dpo", "rgalign_rec/sft_only")


@pytest.mark.parametrize("count", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_two_ablations_are_compared_with_each_other_on_the_same_sessions(tmp_path, shop, count):
    for seed in range(count):
        dataset, masks = shop
        for recipe in (MAIN, "params/ablations/sft_only.yaml", "params/ablations/sft_dpo.yaml"):
            sessions = made_up_sessions(seed, recipe, 0.5, ids=list(masks.index))
            tables.write(dataset, add_run(tmp_path, recipe, seed, sessions=sessions, slices=masks) / "tables/dataset")
    runs = study.runs_of(tmp_path)
    table, pairs = study.results_of(tmp_path, runs), study.pairs_of(tmp_path, runs)
    assert set(study.STEPS) & set(pairs) == {STEP, ("rgalign_rec/sft_only", "qe_rec")}
    compared, _ = compare.compare_models(tmp_path, runs, table, pairs, **DRAWS)
    row = row_of(compared, *STEP)
    own = table[(table["metric"] == "gauc") & (table["slice"] == "all")]
    new, old = (own[own["model"] == name].groupby("world_seed")["value"].mean() for name in STEP)
    assert row.difference == pytest.approx((new - old).mean())
    assert row.worlds == count
    if count > 1:
        error = max(stats.sem(new - old), row.sampling_error)
        half = stats.t.ppf(0.975, count - 1) * error
        assert (row.ci_low, row.ci_high) == pytest.approx((row.difference - half, row.difference + half))
    else:
        assert row.ci_low < row.difference < row.ci_high


def test_a_baselines_seconds_hold_no_language_model_and_a_slow_run_does_not_count(tmp_path, shop):
    for seed in range(3):
        small_run(tmp_path, shop, MAIN, seed)
    path = tmp_path / "quickstart-s0" / "manifest.json"
    told = json.loads(path.read_text())
    told["stages"]["03_rankers"]["seconds"] = 9_000.0
    path.write_text(json.dumps(told))
    runs = study.runs_of(tmp_path)
    table, pairs = study.results_of(tmp_path, runs), study.pairs_of(tmp_path, runs)
    compared, _ = compare.compare_models(tmp_path, runs, table, pairs, **DRAWS)
    rows = compare.stage_table(table, compared, study.stage_seconds(tmp_path, runs), runs).set_index("model")
    assert rows.loc["two_tower_text", "seconds"] == 10 + 30
    assert rows.loc["qe_rec", "seconds"] == 10 + 20 + 30
