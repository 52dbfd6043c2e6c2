"""Vectors, whitening and rankers in their order; the loop ends when the development users gain no more."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import small_run
import torch

from rgalign.alignment import closed_loop, contrastive
from rgalign.alignment.closed_loop import LoopIteration
from rgalign.alignment.contrastive import RankingSpace
from rgalign.evaluation.metrics import gauc_of_lists
from rgalign.ranker import store
from rgalign.ranker.fit import score
from rgalign.ranker.towers import of_their_time
from rgalign.reasoner.embed import embed
from rgalign.reasoner.model import fingerprint
from rgalign.run.artifacts import atomic, digest


def with_params(context, **overrides):
    return replace(
        context, params=small_run.small({f"alignment.{k.replace('__', '.')}": v for k, v in overrides.items()})
    )


def gauc(model, lists, intents) -> float:
    return gauc_of_lists(score(model, lists, intents), lists.clicked.numpy(), lists.shown.numpy()).value


def closed(context, tmp_path, name: str = "turn-1") -> LoopIteration:
    """The end of an iteration, with the reasoner from before the alignment."""
    main = context.main()
    return closed_loop.finish_iteration(context, main, main, tmp_path / name, tmp_path / "work")


@pytest.fixture(scope="module")
def moved(context):
    """The run's reasoner after what stands for RG-SFT and RG-DPO: all its weights have moved a little."""
    reasoner = context.main()
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in reasoner.model.parameters():
            weight += 0.05 * weight.std() * torch.randn(weight.shape, generator=noise)
    return reasoner


def retrained(context, reasoner, tmp_path):
    """What `retrain_rankers` made of the run for this reasoner, and its curves."""
    to, folder = tmp_path / "embeddings", tmp_path / "rankers"
    curves = closed_loop.retrain_rankers(context, context.main(), reasoner, to, folder, tmp_path / "work")
    return context.reading(to, folder), curves


def whitening_of(rows: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and matrix by numpy: each dimension to variance 1, then ZCA of the correlation plus a ridge."""
    scale = 1 / rows.std(axis=0)
    variance, directions = np.linalg.eigh(np.corrcoef(rows, rowvar=False))
    return rows.mean(axis=0), scale[:, None] * (directions / np.sqrt(variance + ridge) @ directions.T)


def states(ranker) -> dict:
    return {name: value for name, value in ranker.state_dict().items()}


@pytest.mark.parametrize("how", ["warm", "scratch", "frozen"])
def test_the_retrained_ranker_has_the_vectors_and_the_whitening_of_the_moved_reasoner(context, moved, tmp_path, how):
    """Queries and intents: all vectors are of the reasoner that RG-SFT and RG-DPO made, and of no other."""
    found, curves = retrained(with_params(context, loop__ranker=how), moved, tmp_path)
    assert len(curves)
    prompter = context.recipe.prompter(context.shop, moved)
    intents = embed(moved, prompter.intents(context.shop.intents), progress=False)
    np.testing.assert_allclose(found.parts.intents.text, intents, atol=5e-3, rtol=5e-3)
    sessions = embed(moved, context.prompts(moved, context.parts.train), progress=False)
    np.testing.assert_allclose(found.parts.train.query, sessions, atol=5e-3, rtol=5e-3)
    ranker = found.rankers[0]
    in_time = of_their_time(found.parts.train, found.parts.intents)  # what train cannot know is not fitted on
    assert not in_time.all()
    for name, rows in {"query.layers.0": sessions, "intent.text.0": intents[in_time]}.items():
        mean, matrix = whitening_of(rows.astype(float), ranker.config.whitening_ridge)
        own = states(ranker)
        np.testing.assert_allclose(own[f"{name}.mean"], mean, atol=2e-3)
        np.testing.assert_allclose(own[f"{name}.matrix"], matrix, atol=0.05 * np.abs(matrix).max())


def test_a_retraining_that_was_killed_leaves_nothing_half_written_and_ends_as_if_it_had_not_been(
    context, moved, monkeypatch, tmp_path
):
    """Killed while the ranker trains, when vectors are written already."""

    def made(name: str) -> Path:
        with atomic(tmp_path / name) as folder:
            parts = folder / "embeddings", folder / "rankers"
            closed_loop.retrain_rankers(context, context.main(), moved, *parts, tmp_path / "work")
        return tmp_path / name

    whole = made("whole")

    def killed(*given, **how):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(closed_loop.train, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            made("again")
    assert sorted(path.name for path in tmp_path.iterdir()) in (["whole"], ["whole", "work"])
    assert digest(made("again")) == digest(whole)


def test_where_the_reasoner_has_not_moved_the_rankers_are_trained_again_all_the_same(context, tmp_path):
    """So that a control without RG-SFT and RG-DPO trains its rankers as often as the recipe does."""
    found, curves = retrained(context, context.main(), tmp_path)
    assert len(curves)
    assert digest(found.rankers_folder / "seed-0") != digest(context.rankers_folder / "seed-0")
    assert digest(found.embeddings) == digest(context.embeddings)


def test_rg_cl_pulls_into_the_space_of_the_retrained_rankers(context, moved, monkeypatch, tmp_path):
    """And with as few as this the closed loop goes on from them, with the knowledge base's vectors that they read."""
    found, _ = retrained(context, moved, tmp_path)
    seen = []

    def spy(start, sessions, spaces, *how):
        seen.extend(spaces)
        return start, None

    monkeypatch.setattr(contrastive, "contrastive", spy)
    contrastive.train_contrastive(found, moved, None, tmp_path / "cl")
    (space,) = seen
    assert space.digest() == RankingSpace.of(found.rankers[0], found.parts.intents, found.clicked_lists).digest()
    others = RankingSpace.of(context.rankers[0], context.parts.intents, context.clicked_lists)
    assert space.digest() != others.digest()
    turn = closed_loop.finish_iteration(
        with_loop(found, ranker="frozen"), moved, moved, tmp_path / "turn", tmp_path / "work"
    )
    assert digest(turn.state.embeddings / "intents") == digest(found.embeddings / "intents")
    same = [
        name
        for name, value in states(found.rankers[0]).items()
        if torch.equal(value, states(turn.state.rankers[0])[name])
    ]
    assert len(same) >= len(states(found.rankers[0])) - 2, "all but the query's whitening"


def with_loop(context, **own):
    return with_params(context, **{f"loop__{name}": value for name, value in own.items()})


def test_what_is_only_scaled_and_shifted_is_ranked_as_before_once_it_is_whitened_again(context):
    """A language model that moves its vectors so does no harm; through the old whitening it does."""
    rng = np.random.default_rng(0)
    scale, shift = rng.uniform(0.3, 3, context.parts.query_dim), rng.normal(size=context.parts.query_dim)

    def put(values):
        return (values.double() * torch.tensor(scale) + torch.tensor(shift)).float()

    parts = context.parts
    lists = {
        name: replace(getattr(parts, name), query=put(getattr(parts, name).query)) for name in ("train", "dev", "valid")
    }
    other = replace(
        context, parts=replace(parts, intents=replace(parts.intents, text=put(parts.intents.text)), **lists)
    )
    wanted = score(context.rankers[0], parts.valid, parts.intents)
    stale = score(other.rankers[0], other.parts.valid, other.parts.intents)
    again = score(closed_loop.whitened(other).rankers[0], other.parts.valid, other.parts.intents)
    shown = np.isfinite(wanted)
    assert np.abs(stale - wanted)[shown].max() > 10 * np.abs(again - wanted)[shown].max()
    np.testing.assert_allclose(again[shown], wanted[shown], atol=0.02 * np.abs(wanted[shown]).max())


@pytest.mark.parametrize("refit", [True, False])
def test_a_frozen_ranker_keeps_its_weights_and_its_whitening_where_params_say_so(context, tmp_path, refit):
    own = with_params(context, loop__ranker="frozen", loop__refit_whitening=refit)
    turn = closed(own, tmp_path)
    assert (digest(turn.state.rankers_folder / "seed-0") == digest(context.rankers_folder / "seed-0")) or refit
    changed = {n for n, v in states(turn.state.rankers[0]).items() if not torch.equal(v, states(context.rankers[0])[n])}
    assert changed <= ({"query.layers.0.mean", "query.layers.0.matrix"} if refit else set())
    before = closed_loop.gauc(context)
    assert [turn.dev, turn.valid] == pytest.approx([before["dev"], before["valid"]], abs=0.02), "float16 of vectors"


@pytest.mark.parametrize("learning_rate", [1e-3, 10.0, 1e-12])
def test_a_warm_ranker_never_ends_below_its_start_on_the_development_users(context, tmp_path, learning_rate):
    """The start reads the new vectors; where no epoch is better (1e-12 moves no weight), it stays as it was."""
    own = with_params(context, loop__learning_rate=learning_rate, loop__refit_whitening=False)
    turn = closed(own, tmp_path)
    parts = turn.state.parts
    start = store.load(context.rankers_folder / "seed-0")
    assert turn.dev >= gauc(start, parts.dev, parts.intents)
    assert turn.curves.epoch.min() == 0
    assert turn.curves.best.sum() == 1
    assert sorted(path.name for path in turn.state.rankers_folder.iterdir()) == ["seed-0"]
    if learning_rate < 1e-6:
        assert digest(turn.state.rankers_folder / "seed-0") == digest(context.rankers_folder / "seed-0")


def test_a_ranker_from_scratch_is_the_one_that_notebook_03_would_train(context, tmp_path):
    turn = closed(with_params(context, loop__ranker="scratch"), tmp_path)
    assert turn.curves.epoch.min() == 1
    assert turn.dev == pytest.approx(closed_loop.gauc(context)["dev"], abs=0.1)


@pytest.mark.parametrize(
    ("most", "dev", "played", "kept"),
    [
        (1, [0.5], 1, 1),
        (4, [0.5, 0.6, 0.55, 0.9], 3, 2),
        (4, [0.5, 0.5, 0.9], 2, 1),  # as good is no better
        (3, [0.5, 0.6, 0.7], 3, 3),
        (3, [0.4, 0.6, 0.7], 1, 1),  # the first turn lost against QE-Rec, which has 0.4
    ],
)
def test_rounds_end_when_the_development_users_gain_no_more(context, monkeypatch, tmp_path, most, dev, played, kept):
    said, begun_from = iter(dev), []
    monkeypatch.setattr(closed_loop, "gauc", lambda context: {"dev": 0.4})

    def turn(folder) -> LoopIteration:
        return LoopIteration(folder.name, None, None, pd.DataFrame(), next(said), 0.1, 1.0)

    monkeypatch.setattr(
        closed_loop, "finish_iteration", lambda context, reads_kb, reasoner, folder, work, folds: turn(folder)
    )
    monkeypatch.setattr(
        closed_loop,
        "next_iteration",
        lambda context, last, form, folder, work: begun_from.append(last.dev) or turn(folder),
    )
    best, table = closed_loop.run_loop(
        with_params(context, loop__rounds=most), None, None, None, "list", tmp_path, None
    )
    assert table["round"].tolist() == list(range(1, played + 1))
    assert table.dev.tolist() == dev[:played]
    assert table["round"][table.kept].tolist() == [kept]
    assert best.reasoner == f"iteration-{kept}"
    assert begun_from == dev[: played - 1], "every further round goes on from the best so far"


def test_a_second_round_has_the_order_of_the_first(context, monkeypatch, tmp_path):
    """RG-SFT, then rankers retrained from the first round's, then RG-CL into their space. Of pairs none is wide enough:
    RG-DPO is left out, as in notebook 06."""
    own = with_params(context, loop__ranker="frozen", dpo__min_margin=99.0, cl__lm_weight=0.1)
    first = closed(own, tmp_path)
    seen, train = [], closed_loop.train_contrastive

    def spy(context, reasoner, best, work):
        seen.append((context, fingerprint(reasoner), len(best)))
        return train(context, reasoner, best, work)

    monkeypatch.setattr(closed_loop, "train_contrastive", spy)
    second = closed_loop.next_iteration(own, first, "list", tmp_path / "turn-2", tmp_path / "work")
    ((pulled, tuned, targets),) = seen
    assert 0 < targets <= len(context.clicked_lists)
    assert tuned != fingerprint(context.main()), "by RG-SFT"
    assert fingerprint(second.reads_kb) == tuned
    prompter = context.recipe.prompter(context.shop, second.reads_kb)
    intents = embed(second.reads_kb, prompter.intents(context.shop.intents), progress=False)
    for own in (pulled, second.state):
        np.testing.assert_allclose(own.parts.intents.text, intents, atol=5e-3, rtol=5e-3)
    assert not np.array_equal(second.state.parts.train.query, pulled.parts.train.query), "by RG-CL"
    same = states(first.state.rankers[0])
    assert all(
        torch.equal(value, same[name])
        for name, value in states(pulled.rankers[0]).items()
        if "layers.0" not in name and "text.0" not in name
    )


def test_a_second_round_that_tunes_nothing_hands_the_rankers_on_to_rg_cl(context, moved, monkeypatch, tmp_path):
    own = with_params(context, loop__ranker="frozen", sft__use=False, dpo__use=False, cl__lm_weight=0.0)
    first, seen = closed(own, tmp_path), []
    monkeypatch.setattr(
        closed_loop, "train_contrastive", lambda context, reasoner, *rest: seen.append(context) or (reasoner, None)
    )
    first = replace(first, reads_kb=moved)  # another than the one that RG-CL has made of it
    second = closed_loop.next_iteration(own, first, "list", tmp_path / "turn-2", tmp_path / "work")
    ((pulled),) = seen
    assert digest(pulled.rankers_folder) == digest(first.state.rankers_folder)
    assert digest(pulled.embeddings) == digest(first.state.embeddings)
    assert second.reads_kb is first.reads_kb


def test_the_language_term_alone_is_reason_enough_to_write_candidates_again(context, monkeypatch, tmp_path):
    own = with_params(context, loop__ranker="frozen", sft__use=False, dpo__use=False, cl__lm_weight=0.1)
    first, targets = closed(own, tmp_path), []
    monkeypatch.setattr(
        closed_loop, "train_contrastive", lambda context, reasoner, best, work: targets.append(best) or (reasoner, None)
    )
    closed_loop.next_iteration(own, first, "list", tmp_path / "turn-2", tmp_path / "work")
    assert len(targets[0])
    silent = with_params(context, loop__ranker="frozen", sft__use=False, dpo__use=False, cl__lm_weight=0.0)
    closed_loop.next_iteration(silent, first, "list", tmp_path / "turn-3", tmp_path / "work")
    assert targets[1] is None


@pytest.mark.parametrize("looks", [0, 2])
def test_rg_dpo_is_monitored_in_later_rounds_too(context, monkeypatch, tmp_path, looks):
    """From the rankers of the round before and the reward model of its own."""
    own = with_params(
        context, loop__ranker="frozen", sft__use=False, cl__use=False, dpo__min_margin=0.0, dpo__looks=looks
    )
    first, monitors = closed(own, tmp_path), []

    def spy(context, reasoner, pairs, work, monitor, rewarder):
        monitors.append((reasoner, monitor))
        return reasoner, None, None

    monkeypatch.setattr(closed_loop, "train_dpo", spy)
    closed_loop.next_iteration(own, first, "list", tmp_path / "turn-2", tmp_path / "work")
    ((reasoner, monitor),) = monitors
    if looks:
        assert monitor.start is reasoner
        assert monitor.probe.context.rankers_folder == first.state.rankers_folder
        monitor(reasoner, 1)
        assert np.isfinite([[row["ranking"], row["reward"]] for row in (monitor.rows[0], monitor.rows[1])]).all()
    else:
        assert monitor is None
