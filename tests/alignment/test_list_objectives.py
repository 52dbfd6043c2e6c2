"""List objectives by hand, against numpy, scikit-learn and enumeration; two queries are a pair; many share a prompt."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import small_pairs
import small_run
import torch
from sklearn.metrics import dcg_score
from small_pairs import CHOSEN, PROMPTS, REJECTED, align
from test_layouts import alone, gpt2, llama, made, qwen3

from rgalign.alignment import dpo as rg_dpo
from rgalign.alignment import preferences
from rgalign.alignment.logprobs import PREFIX_SHARED, SEPARATE, layout_for, log_probabilities
from rgalign.alignment.objectives import LIST_OBJECTIVES, ListLogProbabilities, PairLogProbabilities, dpo
from rgalign.alignment.preferences import _places
from rgalign.reasoner.batches import documents
from rgalign.reasoner.model import fingerprint
from rgalign.reasoner.query_loss import token_log_probabilities

DRAW = np.random.default_rng(5)
THIRD = [[*[13 + (3 * n + i) % 9 for i in range(n % 5)], 3] for n in range(24)]  # of 1 to 5 tokens
LISTS = [list(own) for own in zip(CHOSEN, REJECTED, THIRD, strict=True)]


def lists(ratio, reward, there=None, reference=None) -> ListLogProbabilities:
    ratio, reward = (torch.tensor(values, dtype=torch.double).view(-1, len(values)) for values in (ratio, reward))
    reference = torch.zeros_like(ratio) if reference is None else reference
    there = torch.ones_like(ratio, dtype=torch.bool) if there is None else torch.tensor([there])
    return ListLogProbabilities(ratio + reference, reference, torch.full_like(ratio, 3), reward, there)


def test_irpo_and_plackett_luce_by_hand():
    """Log-ratios .5, .2, -.4, rewards that scale to gains of 3, 1, 0 by the authors' y of 2, 1, 0; beta 1."""
    best = math.log(1 + (math.exp(-0.3) + math.exp(-0.9)) / 2)
    second = math.log(1 + (math.exp(0.3) + math.exp(-0.6)) / 2)
    assert [round(best, 4), round(second, 4)] == [0.4534, 0.6675]
    weight = (2**0.5 - 1) / math.log2(3)  # of the second, whose reward is halfway between worst and best
    own = lists([0.5, 0.2, -0.4], [7.0, 5.0, 3.0])
    assert LIST_OBJECTIVES["irpo"](own, 1.0).item() == pytest.approx((best + weight * second) / (1 + weight))
    assert 2 * LIST_OBJECTIVES["plackett_luce"](own, 1.0).item() == pytest.approx(1.2017, abs=5e-5)
    squares = (0.3 - 2) ** 2 + (0.9 - 4) ** 2 + (0.6 - 2) ** 2
    assert LIST_OBJECTIVES["rebel"](own, 1.0).item() == pytest.approx(squares / 3)


def test_irpo_is_that_of_numpy_with_the_weights_of_scikit_learns_dcg():
    for _ in range(20):
        n, beta = DRAW.integers(2, 7), 0.4
        ratio, reward = DRAW.normal(size=n), DRAW.permutation(n) + DRAW.random(n) / 2
        gain = 2 ** ((reward - reward.min()) / np.ptp(reward)) - 1
        terms = [np.log1p(np.mean(np.exp(beta * (np.delete(ratio, i) - ratio[i])))) for i in range(n)]
        alone = [dcg_score([np.where(np.arange(n) == i, gain, 0)], [reward]) for i in range(n)]
        expected = np.dot(alone, terms) / dcg_score([gain], [reward])
        assert LIST_OBJECTIVES["irpo"](lists(ratio, reward), beta).item() == pytest.approx(expected)


def test_plackett_luces_orders_have_probabilities_that_sum_to_one():
    ratio = [0.3, -1.0, 0.8, 0.1]
    losses = [LIST_OBJECTIVES["plackett_luce"](lists(ratio, order), 0.7) for order in itertools.permutations(range(4))]
    assert sum(math.exp(-3 * float(loss)) for loss in losses) == pytest.approx(1)


def test_rebel_is_least_where_log_ratios_are_the_rewards_over_beta():
    reward = [2.0, -1.0, 0.5]
    assert LIST_OBJECTIVES["rebel"](lists([value / 0.3 + 4 for value in reward], reward), 0.3).item() < 1e-12


@pytest.mark.parametrize("name", LIST_OBJECTIVES)
def test_gradients_are_those_of_finite_differences_and_sum_to_zero(name):
    own = lists([0.5, 0.2, -0.4, 9.0], [7.0, 5.0, 3.0, math.nan], there=[True, True, True, False])
    policy = own.policy.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda values: LIST_OBJECTIVES[name](own._replace(policy=values), 0.3), [policy])
    LIST_OBJECTIVES[name](own._replace(policy=policy), 0.3).backward()
    assert policy.grad.sum().item() == pytest.approx(0, abs=1e-12)
    assert policy.grad[0, 3] == 0


def test_irpos_gradient_by_its_formula():
    """-beta s_i w_i / W to a query's own log-ratio and beta s_i w_i / W softmax_j to the others; s = sigmoid(mean)."""
    ratio, reward, beta = np.array([0.5, 0.2, -0.4]), np.array([2.0, 1.5, 0.0]), 0.6
    weight = (2 ** (reward / 2) - 1) / np.log2([2, 3, 4])
    expected = np.zeros(3)
    for i in range(3):
        others = np.exp(beta * np.delete(ratio, i))
        mean = np.mean(others) * np.exp(-beta * ratio[i])
        pull = beta * mean / (1 + mean) * weight[i] / weight.sum()
        expected[i] -= pull
        expected[np.arange(3) != i] += pull * others / others.sum()
    own = lists(ratio, reward)
    policy = own.policy.clone().requires_grad_()
    LIST_OBJECTIVES["irpo"](own._replace(policy=policy), beta).backward()
    assert policy.grad[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", LIST_OBJECTIVES)
def test_what_does_not_matter(name):
    ratio, reward, objective = np.array([0.5, 0.2, -0.4]), np.array([7.0, 5.0, 3.5]), LIST_OBJECTIVES[name]
    loss = objective(lists(ratio, reward), 0.3).item()
    assert objective(lists(ratio + 5, reward), 0.3).item() == pytest.approx(loss), "a constant on all log-ratios"
    assert objective(lists(ratio, reward - 9), 0.3).item() == pytest.approx(loss), "a constant on all rewards"
    order = [2, 0, 1]
    assert objective(lists(ratio[order], reward[order]), 0.3).item() == pytest.approx(loss), "the order of the list"
    wider = lists([*ratio, math.nan], [*reward, math.nan], there=[True, True, True, False])
    assert objective(wider, 0.3).item() == pytest.approx(loss), "what is not there, not even NaN"


@pytest.mark.parametrize("name", ["irpo", "plackett_luce"])
def test_two_queries_are_a_pair_of_dpo(name):
    policy, reference = (torch.tensor(DRAW.normal(-9, 3, size=(50, 2)), dtype=torch.float32) for _ in range(2))
    reward, there = torch.tensor([[1.0, -2.0]]).repeat(50, 1), torch.ones(50, 2, dtype=torch.bool)
    own = LIST_OBJECTIVES[name](ListLogProbabilities(policy, reference, policy, reward, there), 0.3)
    expected = dpo(PairLogProbabilities(*policy.T, *reference.T, *policy.T, *reward.T), 0.3)
    if name == "irpo":
        assert torch.equal(own, expected), "to the last bit"
    torch.testing.assert_close(own, expected)


def in_lists(**other) -> rg_dpo.Pairs:
    """Of every fourth session there are two queries alone."""
    between = [[] if n % 4 == 0 else [query] for n, query in enumerate(THIRD)]
    rewards = [[0.3 + 0.01 * n] * len(own) for n, own in enumerate(between)]
    return small_pairs.pairs(reward_chosen=np.full(24, 2.0), between=between, reward_between=rewards, **other)


@pytest.mark.parametrize("name", ["irpo", "plackett_luce"])
def test_training_on_lists_begins_at_what_the_objective_is_where_policy_and_reference_agree(tmp_path, name):
    _, curve = align(tmp_path, of=in_lists(), sft_weight=0, objective=name, pairs_per_batch=24)
    expected = math.log(2) if name == "irpo" else (18 * math.log(6) / 2 + 6 * math.log(2)) / 24
    assert curve["loss"][0] == pytest.approx(expected, abs=1e-6)
    assert curve["loss"].iloc[-1] < 0.9 * expected
    assert {"accuracy", "chosen_ratio", "margin", "preference", "rejected_ratio"} < set(curve)


def test_rebel_regresses_the_log_ratios_on_the_rewards(tmp_path):
    aligned, _ = align(tmp_path, of=in_lists(), sft_weight=0, objective="rebel", beta=1.0, epochs=60)
    of = in_lists()
    start, rewards = small_pairs.reasoner(), np.stack([of.reward_chosen, of.reward_rejected])
    ratios = [
        log_probabilities(aligned, PROMPTS, queries, progress=False)
        - log_probabilities(start, PROMPTS, queries, progress=False)
        for queries in (CHOSEN, REJECTED)
    ]
    error = np.abs((ratios[0] - ratios[1]) - (rewards[0] - rewards[1]))
    assert error.mean() < 0.4 * np.abs(rewards[0] - rewards[1]).mean()


def test_lists_of_two_by_irpo_are_trained_to_the_bytes_of_dpo(tmp_path):
    pairs, curve = align(tmp_path)
    own, again = align(tmp_path, objective="irpo")
    assert again.drop(columns="seconds").equals(curve.drop(columns="seconds"))
    assert fingerprint(own) == fingerprint(pairs)


def test_a_stored_reference_of_lists_is_as_good_and_one_of_pairs_is_refused(tmp_path):
    reasoner, own = small_pairs.reasoner(), in_lists()
    reference = rg_dpo.reference_log_probabilities(reasoner, own, progress=False)
    reference.to_parquet(tmp_path / "reference.parquet")
    how = {"of": own, "objective": "irpo"}
    stored, _ = align(tmp_path / "work", reference=pd.read_parquet(tmp_path / "reference.parquet"), **how)
    assert fingerprint(stored) == fingerprint(align(tmp_path / "work", **how)[0])
    of_pairs = rg_dpo.reference_log_probabilities(reasoner, small_pairs.pairs(), progress=False)
    with pytest.raises(ValueError, match="RG-DPO cannot begin: the reference is of pairs"):
        align(tmp_path / "work", reference=of_pairs, **how)


def rows_of(queries: list) -> list[dict]:
    sides = [documents(PROMPTS, side) for side in zip(*queries, strict=True)]
    return [{"documents": list(own)} for own in zip(*sides, strict=True)]


@pytest.mark.parametrize("layout", [SEPARATE, PREFIX_SHARED], ids=["separate", "prefix shared"])
@pytest.mark.parametrize("model", [qwen3, llama, gpt2])
def test_each_of_several_queries_is_as_likely_as_it_is_alone_and_a_missing_one_is_0(model, layout):
    model, queries = made(model), [[*own, []] if n % 3 else [own[0], [], *own[1:]] for n, own in enumerate(LISTS)]
    rows = rows_of(queries)
    with torch.no_grad():
        batch = layout.collate(rows, 0)
        found = layout.log_probabilities(model, batch).view(4, -1)
        tokens = layout.by_token(model, batch, width=6).view(4, len(rows), 6)
    for place, row in itertools.product(range(4), range(len(rows))):
        query = queries[row][place]
        expected = alone(model, PROMPTS[row], query) if query else 0.0
        assert found[place, row].item() == pytest.approx(expected, abs=1e-4)
        assert tokens[place, row].sum().item() == pytest.approx(expected, abs=1e-4)
        assert not tokens[place, row, len(query) :].any()
        if query:
            assert tokens[place, row, 0].item() == pytest.approx(alone(model, PROMPTS[row], query[:1]), abs=1e-4)
    assert layout_for(model, rows, pad=0) is PREFIX_SHARED
    for row in rows:
        wide, count = layout.width(row)
        assert layout.collate([row], 0)["ids"].shape == (count, wide)


def of_two(model, rows: list[dict]) -> torch.Tensor:
    """Pairs behind one prompt, written for two queries alone."""
    ids, ends = [], []
    for row in rows:
        chosen, rejected = (document["input_ids"] for document in row["documents"])
        prompt = row["documents"][0]["prompt"]
        ids.append(chosen + rejected[prompt - 1 :])
        ends.append((prompt, len(chosen), len(ids[-1])))
    longest = max(map(len, ids))
    ids = torch.tensor([own + [0] * (longest - len(own)) for own in ids])
    prompt, middle, length = torch.tensor(ends).T[..., None]
    place = torch.arange(longest)
    second = place >= middle
    seen = (place <= place[:, None]) & ~(second[:, :, None] & ((place >= prompt - 1) & ~second)[:, None])
    positions = torch.where(second, place - middle + prompt - 1, place)
    positions = torch.where(place < length, positions, 0)
    after = place[1:]
    asked = (after >= prompt) & (after < middle), (after > middle) & (after < length)
    more = {"attention_mask": seen[:, None], "position_ids": positions}
    log_p = token_log_probabilities(model, ids, asked[0] | asked[1], **more)
    return torch.cat([(log_p * own).sum(dim=1) for own in asked])


def test_two_queries_behind_one_prompt_have_the_bytes_of_a_layout_for_two():
    rows, model = rows_of([own[:2] for own in LISTS]), made(llama)
    with torch.no_grad():
        found = PREFIX_SHARED.log_probabilities(model, PREFIX_SHARED.collate(rows, 0))
        assert torch.equal(found, of_two(model, rows))


def test_ranks_of_a_list_are_evenly_apart():
    assert _places(9, 6) == [0, 2, 3, 5, 6, 8]
    assert _places(3, 6) == [0, 1, 2]
    assert _places(5, 2) == [0, 4]


def test_a_runs_lists_are_its_pairs_with_the_queries_between(context, rewarded):
    how = {"alignment.candidates.samples": 2, "alignment.dpo.list_size": 4}
    scored, reasoner = rewarded[0], context.main()
    pairs, counts = preferences.preference_pairs(context, reasoner, scored)
    listed = replace(context, params=small_run.small({**how, "alignment.dpo.objective": "irpo"}))
    found, again = preferences.preference_pairs(listed, reasoner, scored)
    assert again.equals(counts)
    assert found[pairs.columns].equals(pairs)
    assert found["between"].map(len).max() == 2, "of sessions with four different queries or more"
    reward = scored.set_index(["session_id", "query"])["reward"].groupby(level=[0, 1]).max()
    for row in found.itertuples():
        assert row.reward_between == sorted(row.reward_between, reverse=True)
        assert all(row.reward_rejected <= own <= row.reward_chosen for own in row.reward_between)
        assert row.reward_between == [reward[row.session_id, text] for text in row.between]
        assert len({row.chosen, row.rejected, *row.between}) == 2 + len(row.between)
