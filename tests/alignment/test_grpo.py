"""GRPO by hand, by enumeration and against TRL's GRPOTrainer with the same draws; killed, it ends the same."""

import itertools
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import small_pairs
import small_run
import torch
from interrupted import Kill, Killed
from small_pairs import PROMPTS, TOKENIZER
from small_trainings import split
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from rgalign.alignment import dpo, grpo, preferences, rewarding
from rgalign.alignment.grpo import ADVANTAGES, clipped_losses, grpo_loss, next_kl_weight
from rgalign.alignment.logprobs import PREFIX_SHARED
from rgalign.params import ParamsError, check
from rgalign.params_training import Grpo
from rgalign.reasoner import generate
from rgalign.reasoner.model import fingerprint
from rgalign.reasoner.prompts import Prompter
from rgalign.reasoner.trainer import CHECKPOINTING, Engine
from rgalign.seeding import derived

PROMPTER = Prompter(TOKENIZER, features=["note"], kinds={"note": "text"})
MOST = 5
REWARD = np.array([[1.0, 2.0, 3.0, 6.0]])
TOKENS = np.array([[4, 9, 5, 8]])


def judge(sessions: np.ndarray, texts: list[str]) -> np.ndarray:
    """Each session likes another word; NaN for an empty query, as a reward model's."""
    rewards = [
        text.split().count(f"w{session % 5}") - 0.2 * len(text.split())
        for session, text in zip(sessions, texts, strict=True)
    ]
    return np.where([bool(text) for text in texts], rewards, np.nan)


def trained(folder: Path, *, like=judge, **how):
    """GRPO of the tiny reasoner, on the first eight sessions."""
    own = dict(steps=8, sessions_per_step=4, samples=4, learning_rate=1e-2, seed=3, progress=False) | how
    section, setup = split(Grpo, {**own, "folder": folder})
    how = {"prompter": PROMPTER, "most": MOST, "judge": like, "others": lambda sessions, texts: -like(sessions, texts)}
    return grpo.grpo(small_pairs.reasoner(), PROMPTS[:8], section, setup, **how)


def without_seconds(curve: pd.DataFrame) -> pd.DataFrame:
    return curve.drop(columns="seconds")


@pytest.mark.parametrize(
    ("name", "between", "expected"),
    [
        ("dr", 1.0, [-2, -1, 0, 3]),
        ("group", 1.0, [-0.9258, -0.4629, 0, 1.3887]),
        ("rloo", 1.0, [-8 / 3, -4 / 3, 0, 4]),
        ("canon", 1.0, [-3, 0, -1, 4]),
        ("canon", 0.0, [-1, -2, 1, 2]),
        ("canon", 0.5, [-2, -1, 0, 3]),
    ],
)
def test_advantages_by_hand(name, between, expected):
    found = ADVANTAGES[name](REWARD, TOKENS, between)
    assert found[0] == pytest.approx(expected, abs=1e-4)
    assert found.sum() == pytest.approx(0, abs=1e-9)
    assert ADVANTAGES[name](REWARD + 17.5, TOKENS, between) == pytest.approx(found)
    assert not ADVANTAGES[name](np.full((1, 4), 2.0), TOKENS, between).any(), "a group of one reward teaches nothing"


def test_equal_metrics_are_divided_in_the_order_of_drawing():
    halves = ADVANTAGES["canon"](REWARD, np.array([[5, 5, 5, 5]]), 1.0)
    assert halves[0] == pytest.approx([1 - 4.5, 2 - 4.5, 3 - 1.5, 6 - 1.5])


def test_the_clipped_loss_and_the_kl_by_hand():
    ratio, advantage = torch.tensor([1.5, 1.5, 0.5, 0.5]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    how = {"low": 0.2, "high": 0.28, "kl_weight": torch.tensor(0.0)}
    losses, clipped, _ = clipped_losses(ratio.log(), torch.zeros(4), torch.zeros(4), advantage, **how)
    assert losses.tolist() == pytest.approx([-1.28, 1.5, -0.5, 0.8])
    assert clipped.tolist() == [True, False, False, True]
    away = torch.tensor([-0.5, 0.0, 0.5])
    losses, _, k3 = clipped_losses(
        -away, -away, torch.zeros(3), torch.zeros(3), low=0.2, high=0.28, kl_weight=torch.tensor(2.0)
    )
    assert k3.tolist() == pytest.approx([0.1065, 0, 0.1487], abs=1e-4)
    assert losses.tolist() == pytest.approx([0.2131, 0, 0.2974], abs=1e-4)


def test_gradients_are_those_of_finite_differences():
    leaf = torch.tensor([-1.0, -2.0, -0.7, -0.4], dtype=torch.double, requires_grad=True)
    fixed = [
        torch.tensor(values, dtype=torch.double) for values in ([-1.1, -1.6, -0.7, -1.4], [-1.3, -2.0, -1.0, -0.1])
    ]
    advantage = torch.tensor([1.0, 2.0, -1.0, -2.0], dtype=torch.double)
    how = {"low": 0.2, "high": 0.28, "kl_weight": torch.tensor(0.3)}
    assert torch.autograd.gradcheck(lambda log_p: clipped_losses(log_p, *fixed, advantage, **how)[0], [leaf])


@pytest.mark.parametrize(("name", "share"), [("rloo", 1.0), ("dr", 2 / 3), ("group", None)])
def test_over_all_groups_the_gradient_is_that_of_the_expected_reward(name, share):
    """Three words, one token: 27 groups of three draws, each weighed by its probability."""
    logits = torch.tensor([0.3, -0.5, 0.9], dtype=torch.double, requires_grad=True)
    reward = torch.tensor([1.0, -2.0, 0.5], dtype=torch.double)
    (exact,) = torch.autograd.grad((logits.softmax(0) * reward).sum(), logits)
    found = torch.zeros(3, dtype=torch.double)
    for words in itertools.product(range(3), repeat=3):
        log_p = logits.log_softmax(0)[list(words)]
        advantage = torch.from_numpy(ADVANTAGES[name](reward[list(words)].numpy()[None], None, 1.0)[0])
        how = {"low": 0.2, "high": 0.28, "kl_weight": torch.tensor(0.0)}
        losses, _, _ = clipped_losses(log_p, log_p.detach(), log_p.detach(), advantage, **how)
        (own,) = torch.autograd.grad(-losses.mean(), logits)
        found += log_p.detach().sum().exp() * own
    if share:
        torch.testing.assert_close(found, share * exact)
    else:  # divided by its own deviation, a group's weight depends on what it holds
        assert (found / exact).tolist() == pytest.approx([1.07, 0.43, -0.84], abs=0.01)


def test_over_all_draws_the_gradient_of_the_kl_is_that_of_policy_to_reference():
    logits = torch.tensor([0.3, -0.5, 0.9], dtype=torch.double, requires_grad=True)
    reference = torch.tensor([-0.2, 0.1, 0.4], dtype=torch.double).log_softmax(0)
    log_p = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((log_p.exp() * (log_p - reference)).sum(), logits, retain_graph=True)
    how = {"low": 0.2, "high": 0.28, "kl_weight": torch.tensor(1.0)}
    losses, _, k3 = clipped_losses(log_p, log_p.detach(), reference, torch.zeros(3), **how)
    (found,) = torch.autograd.grad((log_p.detach().exp() * losses).sum(), logits)
    torch.testing.assert_close(found, exact)
    torch.testing.assert_close((log_p.exp() * k3).sum(), (log_p.exp() * (log_p - reference)).sum())


def test_the_kl_weight_rises_over_its_target_and_falls_below_it():
    own = Grpo(kl_target=2.0, kl_rate=0.1)
    assert next_kl_weight(0.02, 4.0, own) == pytest.approx(0.02 * np.exp(0.1))
    assert next_kl_weight(0.02, 0.0, own) == pytest.approx(0.02 * np.exp(-0.1))
    assert next_kl_weight(0.02, 2.0, own) == 0.02
    assert [next_kl_weight(weight, kl, own) for weight, kl in ((9.9, 99.0), (1e-4, 0.0))] == [10.0, 1e-4]
    assert next_kl_weight(0.0, 99.0, own) == 0
    assert next_kl_weight(0.02, 99.0, Grpo(kl_target=None)) == 0.02


LOSSES = {
    "dapo, group": (dict(normaliser="tokens", advantage="group"), dict(loss_type="dapo", scale_rewards="group")),
    "dr_grpo, none": (dict(normaliser="length", advantage="dr"), dict(loss_type="dr_grpo", scale_rewards="none")),
    "two steps a round": (
        dict(normaliser="tokens", advantage="dr", inner_steps=2, steps=3),
        dict(loss_type="dapo", scale_rewards="none", num_iterations=2),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_its_losses_are_those_of_trl_fed_the_same_draws(tmp_path, name):
    ours, theirs = LOSSES[name]
    steps, samples, sessions = 6, 4, 8
    reasoner, rounds = small_pairs.reasoner(), itertools.count()
    reasoner.model.save_pretrained(tmp_path / "model")  # TRL loads its reference by name

    def rollout(prompts: list[str], trainer: GRPOTrainer) -> dict:
        order = list(dict.fromkeys(map(int, prompts)))
        assert prompts == [str(session) for session in order for _ in range(samples)]
        found = generate.draws(
            replace(reasoner, model=trainer.model), PROMPTER, [PROMPTS[session] for session in order],
            samples=samples, max_new_tokens=MOST, seed=derived(3, f"round {next(rounds)}"), numbers=order,
            progress=False,
        )  # fmt: skip
        lists = {
            "prompt_ids": [PROMPTS[session] for session in map(int, prompts)],
            "completion_ids": found["ids"].tolist(),
        }
        return lists | {"logprobs": None, "session": list(map(int, prompts)), "query": found["query"].tolist()}

    def reward(session: list[int], query: list[str], **_) -> list[float]:
        return np.nan_to_num(judge(np.array(session), query)).tolist()

    arguments = GRPOConfig(
        output_dir=str(tmp_path / "trl"), max_steps=steps, per_device_train_batch_size=sessions * samples,
        num_generations=samples, max_completion_length=MOST, logging_steps=1, learning_rate=1e-2,
        lr_scheduler_type="cosine", warmup_steps=2, weight_decay=0.05, beta=0.5, epsilon=0.2, epsilon_high=0.28,
        bf16=False, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, **{CHECKPOINTING: False},
        **theirs,
    )  # fmt: skip
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"), reward, arguments, processing_class=TOKENIZER,
        train_dataset=datasets.Dataset.from_dict({"prompt": [str(session) for session in range(sessions)]}),
        rollout_func=rollout,
    )  # fmt: skip
    trainer.train()
    expected = pd.DataFrame([entry for entry in trainer.state.log_history if "loss" in entry])
    assert len(expected) == steps
    expected = expected.groupby((expected["step"] - 1) // ours.get("inner_steps", 1)).mean(numeric_only=True)
    how = dict(steps=steps, sessions_per_step=sessions, samples=samples, kl_weight=0.5, kl_target=None)
    how |= dict(warmup=2 / steps, weight_decay=0.05)
    _, curve = trained(tmp_path / "ours", **(how | ours))
    assert curve["loss"].tolist() == pytest.approx(expected["loss"].tolist(), abs=1e-4)
    assert curve["reward"].tolist() == pytest.approx(expected["reward"].tolist(), abs=1e-4)
    assert curve["kl"].iloc[-1] > 0.01
    assert (curve["clipped"] > 0).any() == (name == "two steps a round")


def test_what_is_rewarded_is_written(tmp_path):
    """The steered KL weight follows; the reference is where training began, so there is no KL at first."""
    aligned, curve = trained(tmp_path, steps=40, sessions_per_step=8, samples=8, kl_weight=0.01, kl_target=20.0)
    assert curve["reward"].iloc[-5:].mean() > curve["reward"].iloc[0] + 0.25
    assert curve["kl"].iloc[0] == pytest.approx(0, abs=1e-6)
    assert curve["kl_weight"].iloc[:2].tolist() == pytest.approx([0.01, 0.01 * np.exp(-0.1)], rel=1e-3)
    assert list(curve) == [
        "step", "loss", "clipped", "equal", "kl", "kl_weight", "reward", "tokens", "seconds",
    ]  # fmt: skip
    assert not aligned.model.training


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_a_constant_added_to_all_rewards_changes_no_byte(tmp_path, advantage):
    """Empty queries have the reward 0, so that here none is."""

    def certain(sessions, texts):
        return np.nan_to_num(judge(sessions, texts)) * 4 // 1  # whole numbers: sums of them are exact

    how = {"advantage": advantage, "metric": "random", "steps": 3}
    one, curve = trained(tmp_path, like=certain, **how)
    other, again = trained(tmp_path, like=lambda *drawn: certain(*drawn) + 8, **how)
    assert fingerprint(one) == fingerprint(other) != fingerprint(small_pairs.reasoner())
    assert without_seconds(again).drop(columns="reward").equals(without_seconds(curve).drop(columns="reward"))


@pytest.mark.parametrize("metric", ["tokens", "entropy", "other_reward", "random"])
def test_canon_divides_by_what_is_asked(tmp_path, metric):
    _, curve = trained(tmp_path, advantage="canon", metric=metric, steps=2)
    assert curve["loss"].notna().all()


@pytest.mark.parametrize(
    ("how", "kill"), [({}, 7), ({"inner_steps": 3, "steps": 8}, 17)], ids=["a step a round", "three steps a round"]
)
def test_killed_it_goes_on_to_the_same_bytes(tmp_path, how, kill):
    lora = {"lora": {**small_pairs.LORA, "dropout": 0.2}}
    whole, curve = trained(tmp_path / "whole", **how, **lora)
    with pytest.raises(Killed):
        trained(tmp_path / "work", callbacks=[Kill(kill)], **how, **lora)
    (checkpoint,) = (tmp_path / "work").glob("checkpoint-*")
    done = int(checkpoint.name.rpartition("-")[2])
    assert 0 < done <= kill
    assert done % how.get("inner_steps", 1) == 0, "at the end of a round"
    resumed, again = trained(tmp_path / "work", **how, **lora)
    assert without_seconds(again).equals(without_seconds(curve))
    assert fingerprint(resumed) == fingerprint(whole)


def test_in_micro_batches_it_is_the_same_step(tmp_path):
    _, whole = trained(tmp_path)
    _, pieces = trained(tmp_path, engine=Engine(tokens_per_batch=60))
    pd.testing.assert_frame_equal(without_seconds(pieces), without_seconds(whole), rtol=1e-3, atol=1e-4)


def test_draws_are_those_of_sample_and_their_entropy_is_the_models():
    reasoner, prompts = small_pairs.reasoner(), PROMPTS[:3]
    how = dict(samples=6, max_new_tokens=MOST, seed=4, numbers=[5, 9, 2], progress=False)
    found, merged = (
        generate.draws(reasoner, PROMPTER, prompts, **how),
        generate.sample(reasoner, PROMPTER, prompts, **how),
    )
    assert found.groupby(["row", "query"], sort=False).size().tolist() == merged["count"].tolist()
    for own in found.itertuples():
        ids = [*prompts[own.row], *own.ids]
        with torch.no_grad():
            log_p = (
                reasoner.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)[len(prompts[own.row]) - 1 : -1]
            )
        assert own.log_probability == pytest.approx(log_p[range(len(own.ids)), own.ids].sum().item(), abs=1e-4)
        assert own.entropy == pytest.approx(-(log_p.exp() * log_p).sum(-1).mean().item(), abs=1e-4)


def test_where_policy_drew_and_reference_agree_the_loss_is_the_mean_advantage():
    rows = [
        {"documents": [{"input_ids": [4, 5, 6, 3], "prompt": 2}] * 2, "advantage": [1.0, -3.0], "reward": 0.0,
         "equal": 0.0, "kl_weight": 0.5}
    ]  # fmt: skip
    model = small_pairs.reasoner().model
    rows[0]["reference"] = PREFIX_SHARED.evaluate(model, rows, 0, "", width=2)[:, 0].tolist()
    batch = grpo.collate_groups(rows, 0, PREFIX_SHARED) | {"divisor": grpo.divisor(rows, Grpo(), MOST)}
    loss, values = grpo_loss(model, batch, layout=PREFIX_SHARED, settings=Grpo())
    assert loss.item() == pytest.approx(1.0, abs=1e-6)
    assert values["kl"].item() == pytest.approx(0, abs=1e-6)


def test_a_runs_second_step_is_grpo_where_it_is_asked_for(context, rewarded, tmp_path):
    """In RG-DPO's place, by the same function, with the run's cross-fitted reward."""
    scored, folder = rewarded
    own = {"steps": 2, "sessions_per_step": 4, "samples": 3}
    params = small_run.small({f"alignment.grpo.{name}": value for name, value in {"use": True, **own}.items()})
    listed, reasoner = replace(context, params=params), context.main()
    rewarder = rewarding.Rewarder.of(rewarding.QueryEmbedder(listed, reasoner), folder)
    pairs, _ = preferences.preference_pairs(listed, reasoner, scored)
    aligned, curve, reference = dpo.train_dpo(listed, reasoner, pairs, tmp_path / "work", None, rewarder)
    assert fingerprint(aligned) != fingerprint(reasoner)
    assert (
        curve["step"].tolist()
        == [1, 2]
        == list(range(1, 1 + dpo.planned_steps(params.alignment.dpo, 0, params.alignment.grpo)))
    )
    assert list(reference) == list(preferences.no_reference())
    assert len(reference) == 0
    lists, texts = listed.clicked_lists, [scored["query"].iloc[0]] * 2
    assert np.isfinite(rewarder.of_texts(lists.take(torch.tensor([0, 3])), texts)).all()


def test_what_cannot_be_is_refused_by_name():
    with pytest.raises(ParamsError) as error:
        check({
            "alignment": {
                "reward": {"compared": False}, "grpo": {"use": True, "advantage": "canon", "metric": "other_reward"},
            },
        })  # fmt: skip
    assert "alignment.grpo" in str(error.value)
    assert "alignment.reward.compared" in str(error.value)
    with pytest.raises(ParamsError, match=r"in one process: leave run\.launcher out"):
        check({"alignment": {"grpo": {"use": True}}, "run": {"launcher": "torchrun --nproc_per_node 2"}})
    with pytest.raises(ParamsError, match=r"set alignment\.dpo\.use to true"):
        check({"alignment": {"grpo": {"use": True}, "dpo": {"use": False}}})
    with pytest.raises(ParamsError) as error:
        check({"alignment": {"grpo": {"advantage": "grop", "samples": 1, "clip_low": 1.0, "kl_target": 0}}})
    for name in ("advantage", "samples", "clip_low", "kl_target"):
        assert f"alignment.grpo.{name}" in str(error.value)
