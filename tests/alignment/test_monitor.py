"""Measuring changes nothing; the stop rule on made-up values; the KL of a policy to itself is 0."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rgalign.alignment import monitor
from rgalign.alignment.logprobs import log_probabilities
from rgalign.alignment.monitor import ProbeSet, RewardHackingMonitor
from rgalign.alignment.rewarding import Rewarder
from rgalign.reasoner.model import fingerprint


@pytest.fixture(scope="module")
def probe(context, rewarded):
    return ProbeSet.of(context, Rewarder.load(context, rewarded[1]), lambda queries: {"ihr@1": len(queries)})


def weights(model) -> dict:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_it_looks_at_the_first_sessions_with_a_click_of_each_part(context, probe):
    for name in ("train", "dev", "valid"):
        part, watched = getattr(context.parts, name), getattr(probe, name)
        clicked = part.session_id[part.clicked.any(dim=1).numpy()]
        assert watched.session_id.tolist() == clicked[:20].tolist()
        assert watched.part == name


def test_ranking_fits_the_query_tower_alone_and_leaves_the_runs_rankers_as_they_were(context, probe, monkeypatch):
    ranker, fitted, fit = context.rankers[0], [], monitor.fit

    def spy(model, *given, **how):
        learning = {name for name, weight in model.named_parameters() if weight.requires_grad}
        before, result = weights(model), fit(model, *given, **how)
        fitted.append((before, weights(result.model), learning, given))
        return result

    monkeypatch.setattr(monitor, "fit", spy)
    own, reasoner = weights(ranker), context.main()
    learning = [weight.requires_grad for weight in ranker.parameters()]
    value = probe.ranking(reasoner)
    assert 0 <= value <= 1
    assert probe.ranking(reasoner) == value
    assert all(torch.equal(value, own[name]) for name, value in ranker.state_dict().items())
    assert [weight.requires_grad for weight in ranker.parameters()] == learning
    before, after, learning, given = fitted[0]
    assert learning == {name for name, _ in ranker.named_parameters() if name.startswith("query.")}
    assert {name for name in after if not torch.equal(before[name], after[name])} <= learning
    vectors = given[0].query.double().numpy()
    np.testing.assert_allclose(before["query.layers.0.mean"], vectors.mean(axis=0), atol=1e-4), "whitened before"
    assert [lists.part for lists in given[:2]] == ["train", "dev"]


def test_figures_of_the_greedy_queries_by_hand(context, probe):
    reasoner = context.main()
    figures, written = probe.measure(reasoner), probe.written(reasoner)
    assert len(written) == len(probe.valid)
    assert figures["distinct"] == pytest.approx(written["query"].nunique() / len(written))
    assert figures["tokens"] == pytest.approx(written["tokens"].mean())
    assert figures["reward"] == pytest.approx(np.nanmean(probe.reward.of_texts(probe.valid, list(written["query"]))))
    assert figures["ihr@1"] == len(probe.valid)


def test_of_an_encoder_there_is_the_ranking_alone(context):
    assert list(ProbeSet.of(context).measure(context.main())) == ["ranking"]


def test_queries_that_are_all_empty_have_no_reward(context, probe, monkeypatch):
    silent = probe.written(context.main()).assign(query="")
    monkeypatch.setattr(ProbeSet, "written", lambda self, reasoner: silent)
    assert np.isnan(probe.measure(context.main())["reward"])


@pytest.mark.parametrize(
    ("reward", "ranking", "stops"),
    [
        (1.2, 0.594, True),
        (1.2, 0.596, False),  # within the tolerance
        (1.2, 0.700, False),
        (1.0, 0.500, False),  # a reward that does not rise is not being hacked
        (0.8, 0.500, False),
        (float("nan"), 0.500, False),
    ],
)
def test_the_stop_rule_on_made_up_figures(monkeypatch, reward, ranking, stops):
    monkeypatch.setattr(RewardHackingMonitor, "_kl", lambda self, reasoner: 0.25)
    said = iter([{"reward": 1.0, "ranking": 0.6}, {"reward": reward, "ranking": ranking}])
    watch = RewardHackingMonitor(SimpleNamespace(measure=lambda reasoner: next(said)), "start", tolerance=0.005)
    assert watch("policy", 7) is stops
    table = watch.table()
    assert table.step.tolist() == [0, 7]
    assert table.kl.tolist() == [0, 0.25]
    assert table.ranking.tolist() == [0.6, ranking]


def test_the_kl_of_a_policy_to_itself_is_0_and_to_another_what_both_say(context, probe, monkeypatch):
    monkeypatch.setattr(ProbeSet, "measure", lambda self, reasoner: {"reward": 0.0, "ranking": 0.5})
    start, other = context.main(), context.language_models("other-1")["other-1"]
    before = fingerprint(start)
    watch = RewardHackingMonitor(probe, start, tolerance=0.1)
    watch(start, 1)
    watch(other, 2)
    assert watch.rows[1]["kl"] == 0
    prompter = context.recipe.prompter(context.shop, other)
    prompts = prompter.sessions(context.sessions(probe.valid))
    how = {"samples": 1, "max_new_tokens": 6, "seed": 0, "progress": False}
    drawn = prompter.queries(monitor.generate.sample(other, prompter, prompts, **how)["query"].tolist())
    said = [log_probabilities(model, prompts, drawn, progress=False) for model in (other, start)]
    assert watch.rows[2]["kl"] == pytest.approx(float((said[0] - said[1]).mean()))
    assert fingerprint(start) == before
