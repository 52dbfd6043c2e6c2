"""What a log's policy did to its clicks, and the losses that take account of it, against worlds of known truth."""

from dataclasses import replace
from itertools import permutations, product
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from small_lists import KB, fit, make_intents, make_lists, make_query_intents, make_query_lists

from rgalign.data import tables
from rgalign.data.features import UNKNOWN
from rgalign.data.lists import Lists, Match, with_match
from rgalign.params_training import Ranker, RankerSettings
from rgalign.ranker import exposure
from rgalign.ranker.fit import score_kb
from rgalign.ranker.losses import listnet, listnet_loss, widen_by, with_unshown
from rgalign.ranker.towers import ThreeTower, TwoTower, bias_of
from rgalign.shopworld.tables import DAYS, World
from rgalign.shopworld.traffic import Traffic, draw_lists
from rgalign.shopworld.world import generate

NOW = np.datetime64("2026-01-20", "us")
KB_LOSS, IPS_LOSS = RankerSettings(exposure="kb", kb_negatives=4), RankerSettings(exposure="ips")


@pytest.fixture(scope="module")
def shop() -> tables.Dataset:
    return generate(seed=3, sessions=1500, users=300, transcripts=0)


@pytest.fixture(scope="module")
def folder(shop, tmp_path_factory):
    path = tmp_path_factory.mktemp("shop") / "dataset"
    tables.write(shop, path)
    return path


def lists_of(candidates: np.ndarray, clicked: np.ndarray, ids=None, users=None) -> Lists:
    ids = np.arange(len(candidates)).astype(str) if ids is None else ids
    empty = torch.zeros((len(ids), 0), dtype=torch.int16)
    own = torch.from_numpy(candidates), torch.from_numpy(clicked)
    return Lists("train", ids, ids if users is None else users, empty, (), None, *own)


def train_lists(shop: tables.Dataset) -> Lists:
    train = (shop.sessions["split"] == "train").to_numpy(bool)
    rows = pd.Index(shop.intents["intent_id"]).get_indexer(shop.impressions["intent_id"]).reshape(len(train), -1)
    clicked = shop.impressions["clicked"].to_numpy(bool).reshape(rows.shape)
    ids, users = (shop.sessions[name].to_numpy(str)[train] for name in ("session_id", "user_id"))
    return lists_of(rows[train], clicked[train], ids, users)


def timed(lists: Lists, **more) -> Lists:
    return replace(lists, timestamp=np.full(len(lists), NOW), **more)


def test_clicks_of_shuffled_lists_tell_how_much_positions_are_looked_at():
    """In 20 worlds of 4,000 lists in random order: 220 estimates, of which 3 standard errors miss about one."""
    found = []
    for seed in range(20):
        world, rng = World.build(seed), np.random.default_rng(seed)
        world = replace(world, rules=replace(world.rules, shuffled_share=1.0))
        intents, available = rng.integers(60, size=4000), world.available(np.full(4000, DAYS - 1))
        lists = draw_lists(world, intents, rng.integers(100, size=available.shape), available, rng)
        found.append(exposure.examination(lists_of(lists.candidates, lists.clicked), lists.shuffled))
    value, error = (
        np.stack([table[name].to_numpy() for table in found])[:, 1:] for name in ("value", "standard_error")
    )
    off = value - np.arange(2, 13) ** -0.35
    assert (np.abs(off) < 3 * error).mean() > 0.98
    assert (np.abs(off.mean(axis=0)) < 3 * value.std(axis=0, ddof=1) / 20**0.5 + 0.01).all()
    assert error.mean() == pytest.approx(off.std(), rel=0.15)


def test_examination_of_a_case_worked_by_hand():
    """Position 2 of three lists, of two users: 1 click, and 2 at the first. The last list ends after the first."""
    candidates = np.array([[0, 1], [1, 0], [2, 0], [0, -1]])
    clicked = np.array([[True, False], [True, False], [False, True], [True, False]])
    lists = lists_of(candidates, clicked, users=np.array(["a", "a", "b", "b"]))
    table = exposure.examination(lists, np.ones(4, bool))
    # influences (there - 0.5 first) / 2: a -0.25 twice, b 0.5; error sqrt(2 (0.25 + 0.25))
    assert table.loc[1, ["value", "standard_error"]].tolist() == pytest.approx([0.5, 1.0])
    with pytest.raises(exposure.ExposureError, match="1 reach position 1 and none of these has a click at the first"):
        exposure.examination(lists, np.array([False, False, True, False]))


def test_the_chance_to_be_shown_is_that_of_the_policy(shop):
    """9 of 12 are the policy's own choices, by its scores; 3 are drawn uniformly from what is left."""
    traffic, lists = Traffic.of(shop.meta, shop.sessions, shop.truth), train_lists(shop)
    keys = np.where(traffic.available, -traffic.scores * 96 + np.arange(96), np.iinfo(np.int64).max)
    chance = np.repeat(3 / (traffic.available.sum(axis=1, keepdims=True) - 9), 96, axis=1)
    np.put_along_axis(chance, np.argsort(keys, axis=1)[:, :9], 1.0, axis=1)
    expected = np.take_along_axis(chance[: len(lists)], lists.candidates.numpy(), axis=1)
    np.testing.assert_allclose(exposure.chance_shown(shop, lists), expected)
    logged = SimpleNamespace(name="shop", meta={}, impressions=shop.impressions.assign(selection=0.25))
    assert (exposure.chance_shown(logged, lists) == 0.25).all()


POLICY = {(0, 1): 0.45, (0, 2): 0.2, (1, 0): 0.1, (1, 2): 0.12, (2, 0): 0.05, (2, 1): 0.08}  # of lists of two of three
LOOKED, ATTRACTS = np.array([1.0, 0.6]), np.array([0.5, 0.2, 0.7])


def outcomes() -> tuple[np.ndarray, Lists, np.ndarray]:
    """Every list of one session with every pattern of clicks: probability, lists, chance to be shown."""
    assert set(POLICY) == set(permutations(range(3), 2))
    rows = [(p, shown, click) for shown, p in POLICY.items() for click in product([False, True], repeat=2)]
    shown, clicked = np.array([row[1] for row in rows]), np.array([row[2] for row in rows])
    looks = LOOKED * ATTRACTS[shown]
    probability = np.array([row[0] for row in rows]) * np.where(clicked, looks, 1 - looks).prod(axis=1)
    selected = np.array([sum(p for pair, p in POLICY.items() if i in pair) for i in range(3)])
    return probability, lists_of(shown, clicked), selected[shown]


def expected_loss(scores: torch.Tensor, bias: torch.Tensor | None = None, cap: float = np.inf) -> torch.Tensor:
    """Of ips over all outcomes, a list at a time; bias (2,) of the positions, where a ranker has it."""
    probability, lists, chance = outcomes()
    weight = torch.from_numpy(exposure.click_weights(lists.clicked.numpy(), LOOKED, chance, cap)).double()
    total = torch.zeros((), dtype=torch.float64)
    intents = replace(make_intents(), valid_from=np.full(3, "NaT", "datetime64[us]"), id=torch.arange(3))
    wide = with_unshown(timed(lists), intents, 3)
    for row in lists.clicked.any(dim=1).nonzero().flatten().tolist():
        own = wide.take([row])
        given = scores[own.candidates.clamp(min=0)] + (0 if bias is None else bias_of(bias, own))
        padded = torch.nn.functional.pad(weight[row : row + 1], (0, own.unshown))
        total = total + probability[row] * listnet_loss(given, own.clicked, own.shown, padded)
    return total


def test_weighted_clicks_have_the_loss_of_what_is_wanted():
    """E[sum over clicks of w loss_i] = sum of a_i loss_i, up to the scale of the weights."""
    found = [
        expected_loss(scores) / (torch.from_numpy(ATTRACTS) * -scores.log_softmax(0)).sum()
        for scores in torch.randn((5, 3), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ]
    assert torch.stack(found).tolist() == pytest.approx([found[0].item()] * 5, rel=1e-6)


@pytest.mark.parametrize(("bias", "off"), [(None, (0, 1e-4)), (torch.tensor(LOOKED).log(), (0.02, 1))])
def test_the_best_scores_are_the_attraction_unless_position_is_corrected_twice(bias, off):
    scores = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([scores], max_iter=100, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = expected_loss(scores, bias)
        loss.backward()
        return loss

    optimizer.step(closure)
    apart = np.abs(scores.detach().softmax(0).numpy() - ATTRACTS / ATTRACTS.sum()).max()
    assert off[0] <= apart <= off[1]


def test_clicks_at_one_position_weigh_the_same_and_give_the_loss_of_today():
    lists = make_lists("train", 30, seed=0)
    clicked = torch.zeros_like(lists.clicked)
    clicked[:, 2] = True
    weight = exposure.click_weights(clicked.numpy(), np.linspace(1, 0.3, 6), np.full(clicked.shape, 0.5), cap=10)
    assert np.array_equal(weight, clicked.numpy().astype(np.float32))
    scores = torch.randn(clicked.shape, generator=torch.Generator().manual_seed(0))
    today = listnet_loss(scores, clicked, lists.shown)
    assert listnet_loss(scores, clicked, lists.shown, torch.from_numpy(weight)).item() == pytest.approx(today.item())


def test_weights_are_capped_before_they_are_scaled():
    clicked, chance = np.array([[True, False], [False, True]]), np.array([[1.0, np.nan], [np.nan, 0.01]])
    found = exposure.click_weights(clicked, np.array([1.0, 0.5]), chance, cap=10)
    assert found.tolist() == [pytest.approx([1 / 5.5, 0]), pytest.approx([0, 10 / 5.5])]
    assert exposure.click_weights(clicked, np.array([1.0, 0.0]), chance, cap=9)[1, 1] == pytest.approx(9 / 5)


def test_negatives_are_drawn_uniformly_from_what_existed_and_was_not_shown():
    lists, intents = timed(make_lists("train", 400, seed=1, padded=2)), make_intents()
    later = intents.valid_from.copy()
    later[[2, 7]] = NOW + np.timedelta64(1, "D")
    intents = replace(intents, valid_from=later)
    torch.manual_seed(0)
    wide = with_unshown(lists, intents, 3)
    drawn, times = wide.candidates[:, 8:], np.zeros(KB)
    assert (wide.unshown, wide.candidates.shape, wide.clicked.sum()) == (3, (400, 11), lists.clicked.sum())
    free = np.zeros((400, KB), bool)
    for row in range(400):
        free[row] = [i not in (2, 7) and i not in lists.candidates[row].tolist() for i in range(KB)]
        own = [i for i in drawn[row].tolist() if i >= 0]
        assert len(own) == len(set(own)) == min(3, free[row].sum())
        assert free[row, own].all()
        times[own] += 1
    expected = (free * np.minimum(3, free.sum(1))[:, None] / free.sum(1)[:, None]).sum(0)
    assert (np.abs(times - expected) <= 4 * np.sqrt(expected)).all()


def test_negatives_of_kb_were_clicked_in_train(config):
    lists, intents = timed(make_lists("train", 50, seed=1)), make_intents()
    known = intents.id.clone()
    known[[1, 5, 6]] = UNKNOWN
    wide = widen_by(RankerSettings(exposure="kb", kb_negatives=KB))(lists, replace(intents, id=known))
    drawn = wide.candidates[:, 8:]
    assert not torch.isin(drawn, torch.tensor([1, 5, 6])).any()
    assert (drawn >= 0).any()


@pytest.mark.parametrize("three", [False, True])
def test_with_all_unshown_intents_the_loss_is_that_of_full_lists(config, three_config, three):
    lists = make_query_lists("train", 20, seed=2)
    given = RankerSettings(exposure="kb", kb_negatives=KB, kl_weight=0.0)
    ranker, intents = (
        (ThreeTower(three_config()), make_query_intents()) if three else (TwoTower(config()), make_intents())
    )
    ranker.eval()  # without dropout and position bias
    intents = replace(intents, id=intents.id.clamp(min=2))  # all clicked in train, else kb draws them never
    clicked = torch.zeros((20, KB), dtype=torch.bool)
    clicked[torch.arange(20)[:, None].expand_as(lists.candidates), lists.candidates.long()] = lists.clicked
    full = replace(lists, candidates=torch.arange(KB).expand(20, -1), clicked=clicked)
    expected = listnet(ranker, full, intents).item()
    assert ranker.loss(given)(ranker, timed(lists), intents).item() == pytest.approx(expected, rel=1e-5)
    weighted = timed(lists, weight=torch.ones(lists.candidates.shape) * lists.clicked)
    ips = given.model_copy(update={"exposure": "ips"})
    once = listnet_loss(score_full := ranker(full, intents), clicked, full.shown, clicked.float()).item()
    assert score_full.shape == (20, KB)
    assert ranker.loss(ips)(ranker, weighted, intents).item() == pytest.approx(once, rel=1e-5)


def test_the_kl_term_is_over_the_shown_list_alone(three_config):
    lists, intents, ranker = (
        timed(make_query_lists("train", 20, seed=2)),
        make_query_intents(),
        ThreeTower(three_config()),
    )
    ranker.eval()
    apart = []
    for kind in ("kb", "shown"):
        losses = [ranker.loss(RankerSettings(exposure=kind, kb_negatives=KB, kl_weight=weight)) for weight in (0.5, 0)]
        with_kl, without = (loss(ranker, lists, intents).item() for loss in losses)
        apart.append(with_kl - without)
    assert apart[0] == pytest.approx(apart[1], abs=1e-5)
    assert apart[0] > 0


def test_an_unshown_intent_has_the_mean_position_bias_and_its_own_match_terms(three_config):
    position, lists = torch.tensor([0.0, -1.0, -2.0, 9.0]), replace(make_lists("train", 1, seed=0), unshown=4)
    wide = replace(lists, candidates=torch.zeros((1, 7), dtype=torch.int16))
    assert bias_of(position, wide).tolist() == [0, -1, -2, -1, -1, -1, -1]
    values = torch.randn((20, KB, 2), generator=torch.Generator().manual_seed(0)).half()
    lists = with_match(timed(make_query_lists("train", 20, seed=3)), Match(values, ("raw_cosine", "memory")))
    ranker, intents = ThreeTower(three_config(match=("raw_cosine", "memory"))), make_query_intents()
    torch.nn.init.normal_(ranker.match.weight)
    wide = with_unshown(lists, intents, 4)
    whole = np.take_along_axis(score_kb(ranker, lists, intents), wide.candidates.long().numpy(), axis=1)
    np.testing.assert_allclose(ranker.eval()(wide, intents).detach().numpy(), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["kb", "ips"])
def test_a_ranker_learns_by_each_loss(three_config, kind):
    train, dev, intents = (
        make_query_lists("train", 300, seed=0),
        make_query_lists("dev", 100, seed=1),
        make_query_intents(),
    )
    train = timed(train, weight=train.clicked.float())
    ranker = ThreeTower(three_config(positions=0 if kind == "ips" else 6, dropout=0.0))
    loss = ranker.loss(RankerSettings(exposure=kind, kb_negatives=4))
    found = fit(ranker, train, dev, intents, seed=0, loss=loss, epochs=8, lists_per_batch=32, progress=False)
    assert found.curve["dev_gauc"].max() > 0.9


def test_lists_without_what_a_loss_needs_are_refused(three_config):
    lists, intents, ranker = make_query_lists("train", 4, seed=0), make_query_intents(), ThreeTower(three_config())
    with pytest.raises(ValueError, match="no timestamps"):
        ranker.loss(KB_LOSS)(ranker, lists, intents)
    with pytest.raises(ValueError, match=r"ranker\.exposure is ips, and these lists have no weights"):
        ranker.loss(IPS_LOSS)(ranker, timed(lists), intents)


def written(folder, train, tmp_path, **how):
    ranker = Ranker(models=("qe_rec",), **how)
    return exposure.write(tmp_path / "exposure", folder, train, ranker, lambda: np.log(np.array([2.0] + [1.0] * 11)))


def test_what_is_written_comes_back_and_by_default_nothing_is(shop, folder, tmp_path):
    train = train_lists(shop)
    looked = written(folder, train, tmp_path)
    assert not [*(tmp_path / "exposure").iterdir()]
    assert exposure.with_exposure(train, tmp_path / "exposure") is train
    assert looked["truth"].tolist() == pytest.approx((np.arange(1, 13) ** -0.35).tolist())

    (tmp_path / "exposure").rmdir()
    written(folder, train, tmp_path, exposure="ips", weight_cap=5.0)
    found = exposure.with_exposure(train, tmp_path / "exposure")
    sessions = shop.sessions.set_index("session_id").loc[list(train.session_id)]
    assert (found.timestamp == sessions["timestamp"].to_numpy("datetime64[us]")).all()
    raw = 1 / (looked["value"].to_numpy() * exposure.chance_shown(shop, train))
    expected = np.minimum(raw, 5)[train.clicked.numpy()]
    own = found.weight.numpy()
    np.testing.assert_allclose(own[train.clicked.numpy()], expected / expected.mean(), rtol=1e-5)
    assert (own[~train.clicked.numpy()] == 0).all()
    with pytest.raises(exposure.ExposureError, match=f"is of {len(train)} lists; expected 2"):
        exposure.with_exposure(train.take([0, 1]), tmp_path / "exposure")


def test_without_shuffled_lists_the_trained_position_bias_says_how_much_is_looked_at(shop, tmp_path):
    plain = replace(shop, sessions=shop.sessions.drop(columns="shuffled"), truth=None)
    tables.write(plain, tmp_path / "plain")
    looked = written(tmp_path / "plain", train_lists(shop), tmp_path, exposure="ips")
    assert looked["value"].tolist() == pytest.approx([1.0] + [0.5] * 11)


SAMPLED = {"popularity": 9, "uniform": 2, "smoothing": 0.5}


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        (
            {"sampled_negatives": SAMPLED},
            "ips",
            r"ranker\.exposure is ips or alignment\.weights is exposure, and dataset\.yaml of 'shopworld' says",
        ),
        (
            {"sampled_negatives": SAMPLED},
            "kb",
            r"ranker\.exposure is kb, .* expected .* negatives drawn uniformly \(popularity: 0\)",
        ),
        ({"position_is_real": False}, "ips", r"says position_is_real: False"),
        (
            {"impressions": ["propensity"]},
            "ips",
            r"no column selection \(found: session_id, intent_id, position, clicked",
        ),
    ],
)
def test_a_log_that_cannot_support_it_is_refused(shop, tmp_path, change, kind, says):
    lacks = shop.impressions.drop(columns=change.pop("impressions", []))
    tables.write(replace(shop, impressions=lacks, truth=None, meta=shop.meta | change), tmp_path / "log")
    with pytest.raises(exposure.ExposureError, match=says):
        written(tmp_path / "log", train_lists(shop), tmp_path, exposure=kind)


def test_negatives_that_were_drawn_uniformly_may_be_joined_by_more(shop, tmp_path):
    uniform = {"sampled_negatives": {"popularity": 0, "uniform": 11, "smoothing": 0.5}, "position_is_real": False}
    tables.write(replace(shop, truth=None, meta=shop.meta | uniform), tmp_path / "log")
    written(tmp_path / "log", train_lists(shop), tmp_path, exposure="kb")
