"""Whose queries are judged, by how many models; what an empty query earns; how the chosen form is kept."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import small_run

from rgalign.alignment import closed_loop, judge_reward, preferences, reward, rewarding
from rgalign.alignment.context import Context
from rgalign.report import findings, plots_reasoner
from rgalign.report import summaries as look
from rgalign.run.artifacts import digest

BOTH = ["main", "other-1"]


@pytest.fixture
def rewarder(context, rewarded):
    return rewarding.Rewarder.load(context, rewarded[1])


def test_rankers_of_a_run_stand_on_its_device(context, rewarded):
    """Told with torch's `meta`, which holds no numbers: a test has no GPU."""
    run = context.params.run.model_copy(update={"device": "meta"})
    own = Context.at(context.params.model_copy(update={"run": run}), lambda artifact: context.run / artifact)
    judge = rewarding.Rewarder.of(rewarding.QueryEmbedder(own, context.main()), rewarded[1]).model.ranker
    again = closed_loop.with_trained_rankers(own, context.rankers_folder).rankers
    for ranker in (judge, *own.rankers.values(), *again.values()):
        assert {weight.device.type for weight in ranker.parameters()} == {"meta"}


def with_params(context, **overrides):
    return replace(
        context, params=small_run.small({f"alignment.{k.replace('__', '.')}": v for k, v in overrides.items()})
    )


def spy(monkeypatch, target, name, result):
    calls = []
    monkeypatch.setattr(target, name, lambda *given, **how: calls.append((given, how)) or result)
    return calls


def test_reasoner_and_rankers_that_learn_together_are_run_as_params_say(context, monkeypatch, tmp_path):
    own = with_params(context, cl__neftune=3.0, engine__gradient_checkpointing=True)
    calls = spy(monkeypatch, closed_loop, "end_to_end", (None, list(context.rankers.values()), None))
    closed_loop.train_end_to_end(own, context.main(), tmp_path, tmp_path / "work")
    (((_, _, settings, setup), _),) = calls
    assert settings.neftune == 3.0
    assert setup.engine.gradient_checkpointing


def test_candidates_are_of_train_and_development_sessions_with_a_click(context, rewarded):
    sessions = context.shop.sessions.set_index("session_id")
    clicked = set(context.shop.impressions.query("clicked == 1").session_id)
    wrote = set(rewarded[0].session_id)
    assert wrote == {session for session in sessions.index[sessions.split == "train"] if session in clicked}
    assert not wrote & set(context.parts.valid.session_id)
    assert set(rewarded[0].source) == {"main", "other-1"}


@pytest.mark.parametrize(("llms", "names", "samples"), [("all", ["main", "other-1"], 2), ("one", ["main"], 5)])
def test_one_llm_writes_as_many_as_all_would(context, monkeypatch, tmp_path, llms, names, samples):
    written = pd.DataFrame({"session_id": []}, dtype=object)
    calls = spy(monkeypatch, rewarding.generation, "generate_candidates", written)
    rewarding.write_candidates(with_params(context, candidates__llms=llms), context.language_models(), tmp_path)
    (((models, prompters, _), how),) = calls
    assert [sorted(models), sorted(prompters), how["samples"]] == [names, names, samples]
    assert len(names) * (samples + 1) == 6, "greedy ones count"


def test_what_an_llm_from_elsewhere_had_written_before_a_kill_is_kept(context, monkeypatch, tmp_path):
    """In one process as well; the tiny model writes in one go, whose bytes do not depend on shards."""
    models = context.language_models()
    whole = rewarding.write_candidates(context, models, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    monkeypatch.setattr(rewarding, "TINY", "another model")
    monkeypatch.setattr(rewarding, "SESSIONS_PER_SHARD", 30)
    write, first_rows = rewarding.generation.generate_candidates, []

    def killed_at_the_third(*given, numbers, **how):
        first_rows.append(numbers[0])
        if len(first_rows) == 3:
            raise KeyboardInterrupt
        return write(*given, numbers=numbers, **how)

    monkeypatch.setattr(rewarding.generation, "generate_candidates", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        rewarding.write_candidates(context, models, tmp_path)
    again = rewarding.write_candidates(context, models, tmp_path)
    assert first_rows == [0, 30, 60, *range(60, whole["session_id"].nunique(), 30)]
    told = ["session_id", "source", "candidate", "query", "tokens", "count"]
    pd.testing.assert_frame_equal(again[told], whole[told])


@pytest.mark.parametrize(
    ("sources", "compared", "folds", "expected"),
    [
        (BOTH, False, 1, {("all", 0): BOTH}),
        (BOTH, False, 2, {("all", 0): BOTH, ("fold-0/all", 0): BOTH, ("fold-1/all", 0): BOTH}),
        (BOTH, True, 1, {("all", 0): BOTH, ("one", 0): ["main"], ("all", 1): BOTH}),
        (["main"], True, 1, {("all", 0): ["main"], ("all", 1): ["main"]}),
    ],
    ids=["in-sample", "folds", "with what it is compared with", "of one LLM there is no control of one LLM"],
)  # fmt: skip
def test_which_models_are_trained(context, rewarded, monkeypatch, tmp_path, sources, compared, folds, expected):
    calls = spy(monkeypatch, rewarding, "train_reward_models", pd.DataFrame())
    own = with_params(context, reward__compared=compared, reward__folds=folds)
    candidates = rewarded[0][rewarded[0].source.isin(sources)]
    rewarding.train_models(own, rewarding.QueryEmbedder(own, own.main()), candidates, tmp_path)
    assert [how["models"] for _, how in calls] == [expected]


@pytest.mark.parametrize("folds", [2, 3])
def test_no_sessions_reward_is_of_a_model_that_learnt_from_its_user(context, rewarded, monkeypatch, tmp_path, folds):
    """By the ids that each model was fitted on, and by the ids that it then judged."""
    own, learnt, judged = with_params(context, reward__folds=folds), {}, {}
    users = dict(zip(context.shop.sessions.session_id, context.shop.sessions.user_id, strict=True))
    train, fit, log_probability = reward._train_one, reward.fit, reward.RewardModel.log_probability

    def train_one(name, **how):
        monkeypatch.setattr(
            reward,
            "fit",
            lambda ranker, lists, dev, *rest, **more: (
                learnt.setdefault(name, (set(lists.session_id), set(dev.session_id)))
                and fit(ranker, lists, dev, *rest, **more)
            ),
        )
        return train(name, **how)

    monkeypatch.setattr(reward, "_train_one", train_one)
    candidates = rewarded[0].drop(columns="reward")
    embedder = rewarding.QueryEmbedder(own, own.main())
    rewarding.train_models(own, embedder, candidates, tmp_path)
    rewarder = rewarding.Rewarder.of(embedder, tmp_path)
    names = {id(model): f"fold-{i}/all" for i, model in enumerate(rewarder.folds)} | {id(rewarder.model): "all"}

    def judge(self, lists, **how):
        judged.setdefault(names[id(self)], set()).update(lists.session_id.tolist())
        return log_probability(self, lists, **how)

    monkeypatch.setattr(reward.RewardModel, "log_probability", judge)
    scored = rewarder.scored(candidates)
    assert set(judged) == set(learnt) == {"all", *(f"fold-{i}/all" for i in range(folds))}
    assert set().union(*judged.values()) == set(scored.session_id[scored.reward.notna()])
    for name, sessions in judged.items():
        assert not {users[each] for each in sessions} & {users[each] for each in learnt[name][0]}, name
    assert judged["all"] <= set(context.parts.dev.session_id)
    everyone = {users[session] for session in learnt["all"][0]}
    for name in set(learnt) - {"all"}:
        assert {users[each] for each in learnt[name][0]} | {users[each] for each in judged[name]} <= everyone
        assert learnt[name][1] == learnt["all"][1], "each stops by all development users"
    monkeypatch.undo()
    lists = context.clicked_lists.take(np.arange(5))
    texts = scored.dropna(subset="reward").drop_duplicates("session_id").set_index("session_id")
    asked = texts["query"].reindex(lists.session_id).fillna("").tolist()
    expected = texts["reward"].reindex(lists.session_id).to_numpy()
    np.testing.assert_allclose(rewarder.of_texts(lists, asked), expected, atol=1e-5)


def test_in_sample_rewards_are_those_of_one_fold(context, rewarded, tmp_path):
    """The model trained on all has the same bytes and gives the same rewards, whatever the folds."""
    candidates, folder = rewarded[0].drop(columns="reward"), rewarded[1]
    own = with_params(context, reward__folds=1)
    embedder = rewarding.QueryEmbedder(own, own.main())
    rewarding.train_models(own, embedder, candidates, tmp_path)
    assert digest(tmp_path / "all") == digest(folder / "all")
    assert not list(tmp_path.glob("fold-*"))
    one = rewarding.Rewarder.of(embedder, tmp_path).scored(candidates)
    crossed = rewarding.Rewarder.load(context, folder)
    pd.testing.assert_frame_equal(crossed.in_sample.scored(candidates), one)
    found = crossed.scored(candidates)
    pd.testing.assert_frame_equal(found.drop(columns="reward"), one.drop(columns="reward"))
    dev = found.session_id.isin(context.parts.dev.session_id)
    pd.testing.assert_series_equal(found.reward[dev], one.reward[dev])
    assert not np.allclose(found.reward[~dev], one.reward[~dev], equal_nan=True)


def test_a_run_whose_users_all_fall_into_one_fold_is_told_what_to_set(context, rewarded, tmp_path):
    parts, count = context.parts, len(context.parts.train)
    own = replace(context, parts=replace(parts, train=replace(parts.train, user_id=np.array(["u"] * count))))
    embedder = rewarding.QueryEmbedder(own, own.main())
    with pytest.raises(ValueError, match=r"alignment\.reward\.folds is 2, and all users of train .* set it to 1"):
        rewarding.train_models(own, embedder, rewarded[0].drop(columns="reward"), tmp_path)


def test_the_models_to_compare_with_are_those_that_were_trained(context, rewarded):
    embedder = rewarding.QueryEmbedder(context, context.main())
    assert rewarding.rewards_of_others(embedder, rewarded[1], rewarded[0].head(3)) == {}, (
        "compared is false in this run"
    )


def test_the_reward_of_a_text_is_that_of_the_candidate_and_silence_has_none(context, rewarded, rewarder):
    some = rewarded[0][rewarded[0].reward.notna()].drop_duplicates("session_id").head(5)
    lists = context.rows_of(context.parts.train, some[some.session_id.isin(context.parts.train.session_id)].session_id)
    texts = some.set_index("session_id")["query"].loc[lists.session_id].tolist()
    found = rewarder.of_texts(lists, [*texts[:-1], " "])
    expected = some.set_index("session_id")["reward"].loc[lists.session_id].to_numpy()
    assert found[:-1] == pytest.approx(expected[:-1], abs=1e-5)
    assert np.isnan(found[-1])
    assert np.isnan(rewarder.of_texts(lists, [""] * len(lists))).all()


def test_the_chosen_form_is_the_one_that_counts(context, rewarded, tmp_path):
    embedder, some = rewarding.QueryEmbedder(context, context.main()), rewarded[0].head(20)
    both = rewarding.rewards_by_form(embedder, rewarded[1], some)
    assert set(both) == {"list", "kb"}
    assert not np.allclose(both["list"], both["kb"], equal_nan=True)
    folder = tmp_path / "reward"
    folder.mkdir()
    for name in ("all", "fold-0", "fold-1"):
        (folder / name).symlink_to(rewarded[1] / name)
    for form in both:
        rewarding.save_form(folder, form)
        assert rewarding.form_of(folder) == form
        found = rewarding.Rewarder.load(context, folder).scored(some)
        assert found.reward.to_numpy() == pytest.approx(both[form], nan_ok=True)


def test_sessions_whose_every_query_is_empty_teach_nothing_and_stop_nothing(context, rewarded, tmp_path):
    silent = set(context.clicked_lists.session_id[:3])
    candidates = rewarded[0].drop(columns="reward")
    candidates.loc[candidates.session_id.isin(silent), "query"] = ""
    embedder = rewarding.QueryEmbedder(context, context.main())
    rewarding.train_models(context, embedder, candidates, tmp_path)
    scored = rewarding.Rewarder.of(embedder, tmp_path).scored(candidates)
    assert scored.loc[scored.session_id.isin(silent), "reward"].isna().all()
    for table in (
        preferences.best_queries(context, scored),
        preferences.preference_pairs(context, embedder.reasoner, scored)[0],
    ):
        assert len(table) > 0
        assert not silent & set(table.session_id)


def test_llms_that_write_nothing_at_all_are_named_as_the_fault(context, rewarded, tmp_path):
    candidates = rewarded[0].assign(query="")
    with pytest.raises(ValueError, match="every candidate is empty"):
        rewarding.train_models(context, rewarding.QueryEmbedder(context, context.main()), candidates, tmp_path)


def test_the_table_of_an_encoder_has_the_same_columns(context, rewarded):
    none = rewarding.no_candidates()
    assert list(none) == list(rewarded[0])
    assert none.empty


def test_every_table_of_notebook_04_is_there_for_an_encoder_and_empty(context, tmp_path):
    reasoner = context.params.reasoner.model_copy(update={"kind": "encoder"})
    own = replace(context, params=context.params.model_copy(update={"reasoner": reasoner}))
    embedder = rewarding.QueryEmbedder(own, context.main())
    candidates = rewarding.write_candidates(own, {}, tmp_path)
    right = look.leads_to_click(own, embedder.reasoner, candidates)
    assert rewarding.train_models(own, embedder, candidates, tmp_path).empty
    rewarding.chosen_form(embedder, tmp_path, candidates, right)
    rewarder = rewarding.Rewarder.load(own, tmp_path)
    scored = rewarder.scored(candidates)
    assert list(scored) == list(rewarding.no_candidates())
    dev = scored.assign(right=right)
    rewards, ids = dev.reward.to_numpy(), dev.session_id.tolist()
    assert rewarder.of_texts(own.rows_of(own.parts.dev, dev.session_id), []).tolist() == []
    reliable, places = look.on_greedy_queries(rewarder, dev)
    assert not reliable["lists"].sum()
    assert [len(each) for each in places.values()] == [0, 0]
    plots_reasoner.rank_shift(places, "nobody's")
    plots_reasoner.queries_by_reward(dev)
    plots_reasoner.reliability(reliable, judge_reward.expected_calibration_error(reliable))
    judge_reward.right_over_wrong({"it": rewards}, right, ids)
    judge_reward.stability(rewards, {"please": rewards}, ids)
    judge_reward.length_effect(rewards, dev.tokens.to_numpy(), ids)
    findings.optimism(judge_reward.optimism(rewards, rewards, ids))
    assert rewarding.rewards_of_others(embedder, tmp_path, dev) == {}
    assert preferences.best_queries(own, scored).empty
    assert look.probe_set(own, tmp_path).reward is None
    assert look.before_and_after(look.probe_set(own, tmp_path), {"a": None}).empty
