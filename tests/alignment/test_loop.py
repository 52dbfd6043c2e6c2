"""One turn against QE-Rec's own bytes and figures; the loop ends when the development users gain no more."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import small_run

from rgalign.alignment import loop
from rgalign.alignment.loop import Turn
from rgalign.artifacts import digest
from rgalign.evaluation.metrics import gauc_of_lists
from rgalign.ranker import store
from rgalign.ranker.fit import score


def with_params(context, **overrides):
    return replace(
        context, params=small_run.small({f"alignment.{k.replace('__', '.')}": v for k, v in overrides.items()})
    )


def gauc(model, lists, intents) -> float:
    return gauc_of_lists(score(model, lists, intents), lists.clicked.numpy(), lists.shown.numpy()).value


def test_a_frozen_ranker_keeps_its_bytes(context, tmp_path):
    own = with_params(context, loop__ranker="frozen")
    turn = loop.close(own, own.main(), tmp_path / "rankers", tmp_path / "work")
    assert digest(turn.folder / "seed-0") == digest(context.rankers_folder / "seed-0")
    assert set(turn.vectors.ids) == set(context.shop.sessions.session_id)
    before = loop.before(context)
    assert [turn.dev, turn.valid] == pytest.approx([before["dev"], before["valid"]], abs=0.02), "float16 of vectors"


@pytest.mark.parametrize("learning_rate", [1e-3, 10.0])
def test_a_warm_ranker_never_ends_below_its_start_on_the_development_users(context, tmp_path, learning_rate):
    """The start hears the new vectors; with a learning rate that ruins it, it stays as it was."""
    own = with_params(context, loop__learning_rate=learning_rate)
    turn = loop.close(own, own.main(), tmp_path / "rankers", tmp_path / "work")
    parts = loop.with_aligned(context, turn.vectors)
    start = store.load(context.rankers_folder / "seed-0")
    assert turn.dev >= gauc(start, parts.dev, parts.intents)
    assert turn.curves.epoch.min() == 0
    assert turn.curves.best.sum() == 1
    assert sorted(path.name for path in turn.folder.iterdir()) == ["seed-0"]
    if learning_rate > 1:
        assert digest(turn.folder / "seed-0") == digest(context.rankers_folder / "seed-0")


def test_a_ranker_from_scratch_is_the_one_that_notebook_03_would_train(context, tmp_path):
    own = with_params(context, loop__ranker="scratch")
    turn = loop.close(own, own.main(), tmp_path / "rankers", tmp_path / "work")
    assert turn.curves.epoch.min() == 1
    assert turn.dev == pytest.approx(loop.before(context)["dev"], abs=0.1)


def test_the_knowledge_base_keeps_its_vectors(context):
    kept = loop.intent_vectors(context)
    assert list(kept.ids) == context.shop.intents.intent_id.tolist()
    np.testing.assert_array_equal(kept.values, context.parts.intents.text.numpy())


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
    monkeypatch.setattr(loop, "before", lambda context: {"dev": 0.4})

    def turn(folder) -> Turn:
        return Turn(folder.name, None, folder, pd.DataFrame(), next(said), 0.1, 1.0)

    monkeypatch.setattr(loop, "close", lambda context, reasoner, folder, work, folds: turn(folder))
    monkeypatch.setattr(
        loop, "again", lambda context, last, form, folder, work: begun_from.append(last.dev) or turn(folder)
    )
    best, table = loop.rounds(with_params(context, loop__rounds=most), None, "list", tmp_path)
    assert table["round"].tolist() == list(range(1, played + 1))
    assert table.dev.tolist() == dev[:played]
    assert table["round"][table.kept].tolist() == [kept]
    assert best.folder.name == f"rankers-{kept}"
    assert begun_from == dev[: played - 1], "every further round goes on from the best so far"


def test_a_second_round_goes_on_from_the_first_ones_ranker_and_needs_no_pair(context, monkeypatch, tmp_path):
    """Of pairs none is wide enough: the step is left out, as in notebook 06."""
    own = with_params(context, loop__ranker="frozen", dpo__min_margin=99.0, cl__lm_weight=0.1)
    first = loop.close(own, own.main(), tmp_path / "rankers-1", tmp_path / "work")
    seen, pull = [], loop.pull_to_clicks

    def spy(context, reasoner, best, work):
        seen.append((context.rankers_folder, len(best)))
        return pull(context, reasoner, best, work)

    monkeypatch.setattr(loop, "pull_to_clicks", spy)
    second = loop.again(own, first, "list", tmp_path / "rankers-2", tmp_path / "work")
    ((folder, targets),) = seen
    assert folder == first.folder
    assert 0 < targets <= len(context.learners)
    assert not np.array_equal(second.vectors.values, first.vectors.values)


def test_the_language_term_alone_is_reason_enough_to_write_candidates_again(context, monkeypatch, tmp_path):
    own = with_params(context, loop__ranker="frozen", sft__use=False, dpo__use=False, cl__lm_weight=0.1)
    first, targets = loop.close(own, own.main(), tmp_path / "rankers-1", tmp_path / "work"), []
    monkeypatch.setattr(
        loop, "pull_to_clicks", lambda context, reasoner, best, work: targets.append(best) or (reasoner, None)
    )
    loop.again(own, first, "list", tmp_path / "rankers-2", tmp_path / "work")
    assert len(targets[0])
    silent = with_params(context, loop__ranker="frozen", sft__use=False, dpo__use=False, cl__lm_weight=0.0)
    loop.again(silent, first, "list", tmp_path / "rankers-3", tmp_path / "work")
    assert targets[1] is None


@pytest.mark.parametrize("looks", [0, 2])
def test_rg_dpo_is_watched_in_later_rounds_too(context, monkeypatch, tmp_path, looks):
    """From the rankers and the reward model of its own round."""
    own = with_params(
        context, loop__ranker="frozen", sft__use=False, cl__use=False, dpo__min_margin=0.0, dpo__looks=looks
    )
    first, watches = loop.close(own, own.main(), tmp_path / "rankers-1", tmp_path / "work"), []

    def spy(context, reasoner, pairs, work, watch):
        watches.append((reasoner, watch))
        return reasoner, None, None

    monkeypatch.setattr(loop, "tune_by_pairs", spy)
    loop.again(own, first, "list", tmp_path / "rankers-2", tmp_path / "work")
    ((reasoner, watch),) = watches
    if looks:
        assert watch.start is reasoner
        assert watch.lookout.context.rankers_folder == first.folder
        assert np.isfinite([watch.rows[0]["ranking"], watch.rows[0]["reward"]]).all()
    else:
        assert watch is None
