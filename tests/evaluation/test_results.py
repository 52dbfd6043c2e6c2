"""The three long tables: their figures against evaluation.metrics, their bytes, and what they refuse."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from rgalign.evaluation import bootstrap, metrics
from rgalign.evaluation.comparisons import by_world, comparisons, comparisons_over_worlds, holm, verdict
from rgalign.evaluation.results import MODELS, clicked_in_kb, conform, results, session_metrics
from rgalign.run import artifacts

LISTS, WIDTH, USERS = 60, 6, 15


@pytest.fixture(scope="module")
def shop():
    """Lists of sessions with users: clicked, shown, session_id, user_id, slices. Some have no click, or only clicks."""
    rng = np.random.default_rng(0)
    shown = np.arange(WIDTH) < rng.integers(2, WIDTH + 1, size=(LISTS, 1))
    clicked = (rng.random((LISTS, WIDTH)) < rng.choice([0, 0.3, 1], p=[0.1, 0.8, 0.1], size=(LISTS, 1))) & shown
    session_id = np.array([f"s{i:02}" for i in range(LISTS)])
    user_id = np.array([f"u{i:02}" for i in rng.integers(USERS, size=LISTS)])
    region = pd.DataFrame({"region=SG": rng.random(LISTS) < 0.3, "cold": False}, index=session_id)
    return {"clicked": clicked, "shown": shown, "session_id": session_id, "user_id": user_id, "slices": region}


def scores_of(model, seed):
    return np.random.default_rng([list(MODELS).index(model), seed or 0]).integers(0, 5, size=(LISTS, WIDTH)) / 4


def judged(shop, model, seed, **options):
    keys = {"session_id": shop["session_id"], "user_id": shop["user_id"], "model": model, "seed": seed, "split": "test"}
    return session_metrics(scores_of(model, seed), shop["clicked"], shop["shown"], **keys, **options)


@pytest.fixture(scope="module")
def table(shop):
    runs = [("popularity", None), ("two_tower", 0), ("two_tower", 1), ("two_tower", 2), ("oracle", None)]
    return pd.concat([judged(shop, model, seed) for model, seed in runs])


def test_results_are_the_metrics_of_each_model_seed_and_slice(shop, table):
    rows = results(table, shop["slices"], data="toy", distance=0.5, world_seed=1, lm_seed=2)
    assert len(rows) == 5 * 5 * 3  # models and seeds, metrics, slices
    assert rows.dtypes.astype(str).to_dict()["seed"] == "Int64"
    inside = shop["slices"]["region=SG"].to_numpy()
    scores, clicked, shown = scores_of("two_tower", 1)[inside], shop["clicked"][inside], shop["shown"][inside]
    chosen = rows[(rows.model == "two_tower") & (rows.seed == 1) & (rows.slice == "region=SG")].set_index("metric")
    expected = metrics.gauc_of_lists(scores, clicked, shown)
    assert tuple(chosen.loc["gauc", ["value", "groups", "left_out"]]) == pytest.approx(tuple(expected), abs=1e-12)
    recall = metrics.recall_at(scores, clicked, shown, 3)
    assert chosen.loc["recall@3", "value"] == pytest.approx(np.nanmean(recall), abs=1e-12)
    assert chosen.loc["recall@3", "left_out"] == np.isnan(recall).sum()
    empty = rows[rows.slice == "cold"]
    assert empty.value.isna().all()
    assert not empty.groups.any()


@pytest.mark.parametrize("weights", metrics.WEIGHTS)
def test_gauc_by_user_is_the_mean_of_the_users_aucs(shop, weights):
    sessions = judged(shop, "oracle", None, group="user", weights=weights)
    row = results(sessions, data="toy", group="user").set_index("metric").loc["gauc"]
    scores, clicked, shown = scores_of("oracle", None), shop["clicked"], shop["shown"]
    total = weight = left_out = 0
    for user in set(shop["user_id"]):
        own = (shop["user_id"] == user)[:, None] & shown
        marks = clicked[own]
        if marks.all() or not marks.any():
            left_out += 1
            continue
        part = {"impressions": len(marks), "clicks": marks.sum(), "uniform": 1}[weights]
        total, weight = total + part * roc_auc_score(marks, scores[own]), weight + part
    assert row.value == pytest.approx(total / weight, abs=1e-12)
    assert row.left_out == left_out


def test_whole_kb_adds_the_rank_metrics_over_all_intents(shop):
    rng = np.random.default_rng(1)
    intents = 20
    candidates = np.where(shop["shown"], rng.permuted(np.tile(np.arange(intents), (LISTS, 1)), axis=1)[:, :WIDTH], -1)
    clicked = clicked_in_kb(candidates, shop["clicked"], intents)
    assert [set(np.flatnonzero(row)) for row in clicked] == [
        set(own[marks]) for own, marks in zip(candidates, shop["clicked"], strict=True)
    ]
    whole = rng.normal(size=(LISTS, intents)), clicked, np.ones_like(clicked)
    sessions = judged(shop, "oracle", None, whole_kb=whole)
    np.testing.assert_array_equal(sessions["recall@3/kb"], metrics.recall_at(*whole, 3))
    assert "gauc/kb" not in sessions


@pytest.fixture(scope="module")
def compared(shop, table):
    """Comparisons of the table, and GAUC of oracle and two_tower by session, means over seeds."""
    pairs = [("two_tower", "popularity"), ("oracle", "two_tower"), ("oracle", "popularity")]
    wide = table.pivot_table(index="session_id", columns=["model", "seed"], values="gauc", dropna=False)
    gauc = [wide[name].dropna(axis=1, how="all").mean(axis=1).to_numpy() for name in ("oracle", "two_tower")]
    return comparisons(table, pairs, shop["slices"], seed=3), *gauc


def test_a_comparison_is_the_difference_of_the_results_with_its_interval(shop, table, compared):
    rows, new_gauc, old_gauc = compared
    values = results(table, shop["slices"], data="toy").groupby(["model", "metric", "slice"])["value"].mean()
    for row in rows.itertuples():
        new, old = (values[(name, row.metric, row.slice)] for name in (row.model, row.against))
        np.testing.assert_allclose(row.difference, new - old, rtol=0, atol=1e-12)
        relative = 1 - (1 - new) / (1 - old) if row.metric == "gauc" else new / old - 1
        np.testing.assert_allclose(row.relative, relative, rtol=0, atol=1e-12)
        assert row.seeds == (1 if (row.model, row.against) == ("oracle", "popularity") else 3)
    (gauc,) = rows.query("metric == 'gauc' and slice == 'all' and against == 'two_tower'").itertuples()
    interval = bootstrap.over_users(new_gauc - old_gauc, shop["shown"].sum(axis=1), shop["user_id"], seed=3)
    assert (gauc.ci_low, gauc.ci_high) == pytest.approx((interval.low, interval.high), abs=1e-12)
    assert rows[rows.slice == "cold"].difference.isna().all()


def test_over_worlds_each_world_counts_once():
    rng = np.random.default_rng(2)
    rows = [
        {"model": model, "world_seed": world, "lm_seed": 0, "seed": seed, "value": rng.random(), "distance": distance}
        for model, seeds in (("two_tower", 3), ("oracle", 1))
        for world in range(5)
        for seed in range(seeds)
        for distance in (0.0, 1.0)
        if (model, world) != ("oracle", 4)
    ]
    fixed = {"metric": "gauc", "slice": "all", "split": "test", "data": "shopworld", "groups": 9, "left_out": 0}
    table = pd.DataFrame(rows).assign(**fixed)
    found = comparisons_over_worlds(by_world(table, [("oracle", "two_tower"), ("oracle", "popularity")]))
    assert found[["distance", "worlds", "seeds"]].to_numpy().tolist() == [[0, 4, 3], [1, 4, 3]]
    means = table[table.distance == 1].groupby(["world_seed", "model"])["value"].mean().unstack().dropna()
    theirs = stats.ttest_rel(means.oracle, means.two_tower).confidence_interval(0.95)
    assert tuple(found.loc[1, ["ci_low", "ci_high"]]) == pytest.approx(tuple(theirs), abs=1e-9)


def test_holm_by_hand_and_by_its_definition():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # by hand: times 3, 1, 2, 4
    found = holm([np.nan, 0.02, 0.9, 0.03])
    assert found[1:] == pytest.approx([0.06, 0.9, 0.06])
    assert np.isnan(found[0])
    assert len(holm([])) == 0
    rng = np.random.default_rng(6)
    for _ in range(200):
        p = np.round(rng.random(rng.integers(1, 9)) ** 3, 2)
        for level in (0.01, 0.05, 0.2, 0.7):
            rejected, order = set(), list(np.argsort(p))  # step down: stop at the first that is not rejected
            while order and p[order[0]] * len(order) <= level + 1e-12:
                rejected.add(order.pop(0))
            assert {i for i, value in enumerate(holm(p)) if value <= level + 1e-12} >= rejected
            assert all(p[i] in p[list(rejected)] for i, value in enumerate(holm(p)) if value < level)


@pytest.mark.parametrize(
    ("worlds", "difference", "p_holm", "says"),
    [
        (5, 0.01, 0.049, "gain"),
        (5, -0.01, 0.049, "loss"),
        (5, 0.01, 0.05, "not significant"),
        (5, 0.01, np.nan, "not significant"),
        (1, 0.01, 0.001, "gain (in one world)"),
        (1, 0.01, 0.2, "not significant (in one world)"),
        (2, 0.01, np.nan, "two worlds: see each"),
    ],
)
def test_a_verdict_goes_by_the_adjusted_p_value(worlds, difference, p_holm, says):
    row = pd.Series({"worlds": worlds, "difference": difference, "p_holm": p_holm, "ci_low": 0.001, "ci_high": 0.02})
    assert verdict(row) == says


def test_an_interval_of_its_own_for_the_ratio_and_p_values_within_each_table(shop, table, compared):
    rows, new, old = compared
    (gauc,) = rows.query("metric == 'gauc' and slice == 'all' and against == 'two_tower'").itertuples()
    drawn = bootstrap.over_users(new - old, shop["shown"].sum(axis=1), shop["user_id"], per=1 - old, seed=3)
    assert tuple(drawn) == pytest.approx((gauc.relative, gauc.relative_low, gauc.relative_high), abs=1e-12)
    z = gauc.difference / ((gauc.ci_high - gauc.ci_low) / (2 * stats.norm.ppf(0.975)))
    assert gauc.p == pytest.approx(2 * stats.norm.sf(abs(z)))
    for _, part in rows.groupby(["metric", "slice"]):
        assert part["p_holm"].to_numpy() == pytest.approx(holm(part["p"]), nan_ok=True)
    assert comparisons(table, [("oracle", "oracle")], seed=3)["p"].eq(1).all(), "a model against itself"


def test_tables_keep_their_bytes_and_types_whatever_the_order_of_the_rows(tmp_path, shop, table):
    shuffled = table.sample(frac=1, random_state=0)
    for name, make in {
        "session_metrics": lambda rows: conform(rows, "session_metrics"),
        "results": lambda rows: results(rows, shop["slices"], data="toy"),
        "comparisons": lambda rows: comparisons(rows, [("oracle", "two_tower")], shop["slices"], seed=0),
    }.items():
        for file, rows in (("a", table), ("b", shuffled)):
            artifacts.write_table(tmp_path / f"{file}.parquet", make(rows))
        assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
        again = conform(pd.read_parquet(tmp_path / "a.parquet"), name)
        pd.testing.assert_frame_equal(again, make(table))


def test_what_does_not_belong_is_refused(shop, table):
    with pytest.raises(ValueError, match=r"(?s)column value is missing.*column colour is not known"):
        conform(pd.DataFrame(columns=["model", "colour"]), "results")
    with pytest.raises(ValueError, match=r"model 'two_towers' is not in .*MODELS; did you mean 'two_tower'"):
        conform(table.assign(model="two_towers"), "session_metrics")
    with pytest.raises(ValueError, match="60 rows repeat"):
        conform(pd.concat([table, judged(shop, "oracle", None)]), "session_metrics")
    with pytest.raises(ValueError, match="no session metrics of qe_rec"):
        comparisons(table, [("qe_rec", "two_tower")], seed=0)
    missing = table[(table.model != "oracle") | (table.session_id != "s03")]
    with pytest.raises(ValueError, match="oracle and two_tower were not judged on the same lists: session_id"):
        comparisons(missing, [("oracle", "two_tower")], seed=0)
    missing = table[(table.seed != 1) | (table.session_id != "s03")]
    with pytest.raises(ValueError, match="3 seeds of two_tower were not judged on the same sessions"):
        comparisons(missing, [("oracle", "two_tower")], seed=0)
    with pytest.raises(ValueError, match="slices lacks 50 sessions"):
        results(table, shop["slices"].iloc[:10], data="toy")
    with pytest.raises(ValueError, match="expected 'session' or 'user'"):
        judged(shop, "oracle", None, group="user_id")
