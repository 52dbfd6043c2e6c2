"""Sampled and greedy queries against transformers' own generate, a full forward pass, and the model's distribution."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from rgalign.reasoner import generate
from rgalign.reasoner.model import Reasoner, ReasonerError, tiny
from rgalign.reasoner.prompts import Prompter
from rgalign.reasoner.tiny import build_tokenizer

COLUMNS = ["row", "candidate", "query", "log_probability", "tokens", "count"]


@pytest.fixture(scope="module")
def reasoner():
    """A random model with a mind of its own: wide weights and a head that does not just repeat the last token."""
    built = tiny(build_tokenizer({f"w{number}": 5 for number in range(8)}), hidden=16, layers=2, heads=2, seed=3)
    with torch.no_grad():
        for weight in built.model.parameters():
            weight.mul_(10 if weight.dim() == 2 else 1)
        head = built.model.lm_head
        head.weight = torch.nn.Parameter(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(0)) / 2)
    return built


@pytest.fixture(scope="module")
def prompter(reasoner):
    return Prompter(reasoner.tokenizer, features=["note"], kinds={"note": "text"})


@pytest.fixture(scope="module")
def prompts(prompter):
    rng = np.random.default_rng(0)
    notes = [" ".join(f"w{word}" for word in rng.integers(0, 8, rng.integers(1, 20))) for _ in range(40)]
    return prompter.sessions(pd.DataFrame({"note": notes}))


def full_forward(reasoner, prompt, query):
    """Log-probability of `query` after `prompt`, in one pass without cache or padding."""
    with torch.inference_mode():
        logits = reasoner.model(torch.tensor([[*prompt, *query]])).logits[0].double().log_softmax(-1)
    return sum(logits[len(prompt) + place - 1, token].item() for place, token in enumerate(query))


def drawn_ids(monkeypatch, prompter):
    """The token ids behind every query, as they pass through Prompter.text."""
    seen = {}
    text = prompter.text

    def spy(ids):
        seen.setdefault(text(ids), tuple(ids))
        return text(ids)

    monkeypatch.setattr(prompter, "text", spy)
    return seen


def test_greedy_writes_what_transformers_generates(reasoner, prompter, prompts):
    ours = generate.greedy(reasoner, prompter, prompts, max_new_tokens=9, tokens_per_batch=150, progress=False)
    assert list(ours) == COLUMNS
    assert ours.row.tolist() == list(range(len(prompts)))
    assert set(ours["count"]) == {1}
    lengths = set()
    for prompt, row in zip(prompts, ours.itertuples(), strict=True):
        ids = torch.tensor([prompt])
        theirs = reasoner.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=9,
            eos_token_id=prompter.end_id,
            pad_token_id=reasoner.tokenizer.pad_token_id,
        )[0, len(prompt) :].tolist()
        assert row.query == prompter.text(theirs)
        assert row.tokens == len(theirs)
        assert row.log_probability == pytest.approx(full_forward(reasoner, prompt, theirs), abs=1e-4)
        lengths.add(len(theirs))
    assert len(lengths) > 2, "the case should hold queries that end and queries that are cut"


def test_any_of_the_ends_ends_a_query(reasoner, prompts):
    ends = [reasoner.tokenizer.convert_tokens_to_ids(f"w{number}") for number in (1, 4)]
    many = Prompter(reasoner.tokenizer, features=["note"], kinds={"note": "text"}, ends=ends)
    ours = generate.greedy(reasoner, many, prompts, max_new_tokens=9, tokens_per_batch=150, progress=False)
    how = {"do_sample": False, "max_new_tokens": 9, "eos_token_id": sorted(many.ends), "pad_token_id": 0}
    stopped = 0
    for prompt, row in zip(prompts, ours.itertuples(), strict=True):
        ids = torch.tensor([prompt])
        theirs = reasoner.model.generate(ids, attention_mask=torch.ones_like(ids), **how)[0, len(prompt) :].tolist()
        assert row.tokens == len(theirs)
        stopped += theirs[-1] in ends
        assert row.query == many.text([*theirs, *prompt])[: len(row.query)]
        assert "w1" not in row.query.split()
    assert stopped > 0, "the case should hold queries that end with another token than the tokenizer's"
    drawn = generate.sample(reasoner, many, prompts, samples=3, max_new_tokens=9, seed=0, progress=False)
    assert not drawn["query"].str.split().map({"w1", "w4"}.intersection).any()


def test_more_samples_and_more_tokens_leave_a_draw_as_it_begins(reasoner, prompter, prompts):
    few = generate.sample(reasoner, prompter, prompts, samples=2, max_new_tokens=4, seed=3, progress=False)
    more = generate.sample(reasoner, prompter, prompts, samples=5, max_new_tokens=4, seed=3, progress=False)
    first = more.merge(few[["row", "candidate"]])  # what was drawn first stands first
    pd.testing.assert_frame_equal(first.drop(columns="count"), few.drop(columns="count"), rtol=1e-4)
    longer = generate.sample(reasoner, prompter, prompts, samples=1, max_new_tokens=9, seed=3, progress=False)
    short = generate.sample(reasoner, prompter, prompts, samples=1, max_new_tokens=4, seed=3, progress=False)
    assert all(long.startswith(begun) for long, begun in zip(longer["query"], short["query"], strict=True))


def test_the_numbers_behind_the_draws_are_uniform_and_unlike():
    drawn = generate._uniform(0, range(200), 5, 24)
    assert len(np.unique(drawn[:, :4], axis=0)) == 1000
    assert abs(np.corrcoef(drawn[:, 0], np.roll(drawn[:, 0], 1))[0, 1]) < 0.1
    counts = np.histogram(drawn, bins=20, range=(0, 1))[0]
    assert ((counts - 1200) ** 2 / 1200).sum() < 43.8  # chi-squared, 19 degrees, one in a thousand
    np.testing.assert_array_equal(
        generate._uniform(0, range(3), 9, 7).reshape(3, 9, 7)[:, :5], drawn.reshape(200, 5, 24)[:3, :, :7]
    )


def test_a_sampled_query_has_the_log_probability_of_the_untempered_model(reasoner, prompter, prompts, monkeypatch):
    seen = drawn_ids(monkeypatch, prompter)
    settings = {"samples": 3, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 6}
    for row, prompt in enumerate(prompts[:8]):  # one by one, so that a text leads back to its ids
        seen.clear()
        drawn = generate.sample(reasoner, prompter, [prompt], **settings, seed=row, progress=False)
        assert drawn["count"].sum() == 3
        for query in drawn.itertuples():
            assert query.tokens == len(seen[query.query])
            expected = full_forward(reasoner, prompt, seen[query.query])
            assert query.log_probability == pytest.approx(expected, abs=1e-4)


def test_draws_follow_the_models_distribution(reasoner, prompter, prompts):
    """First tokens of 20,000 draws against the softmax, tempered and cut to its nucleus by hand."""
    logits = reasoner.model(torch.tensor([prompts[0]])).logits[0, -1].detach().double()
    for temperature, top_p in ((1.0, 1.0), (1.5, 1.0), (1.0, 0.6)):
        truth = (logits / temperature).softmax(-1).numpy()
        order = np.argsort(-truth, kind="stable")
        held = order[: np.searchsorted(np.cumsum(truth[order]), top_p) + 1] if top_p < 1 else order
        nucleus = np.zeros_like(truth)
        nucleus[held] = truth[held] / truth[held].sum()
        by_text = pd.Series(nucleus).groupby([prompter.text([token]) for token in range(len(truth))]).sum()
        drawn = generate.sample(
            reasoner, prompter, [prompts[0]], samples=20_000, temperature=temperature, top_p=top_p, max_new_tokens=1,
            seed=1, progress=False,
        )  # fmt: skip
        share = drawn.set_index("query")["count"].reindex(by_text.index, fill_value=0) / 20_000
        assert (share[by_text == 0] == 0).all()
        np.testing.assert_allclose(share, by_text, atol=4 * np.sqrt(0.25 / 20_000))


def test_a_prompt_goes_through_the_model_once_for_all_its_samples(reasoner, prompter, prompts, monkeypatch):
    forward, table, passes, written = reasoner.model.forward, generate._table, [], []

    def counted(*args, input_ids, attention_mask, **rest):
        read = attention_mask[:, -input_ids.shape[1] :].sum().item()  # tokens, padding aside
        passes.append((*input_ids.shape, read))
        return forward(*args, input_ids=input_ids, attention_mask=attention_mask, **rest)

    def kept(rows, *args):
        written.extend(rows)
        return table(rows, *args)

    monkeypatch.setattr(reasoner.model, "forward", counted)
    monkeypatch.setattr(generate, "_table", kept)
    generate.sample(
        reasoner, prompter, prompts, samples=5, max_new_tokens=7, seed=0, progress=False, tokens_per_batch=900
    )
    prefill, steps = [p for p in passes if p[1] > 1], [p for p in passes if p[1] == 1]
    assert sum(rows for rows, _, _ in prefill) == len(prompts)
    assert sum(read for _, _, read in prefill) == sum(map(len, prompts))
    assert sum(rows * width for rows, width, _ in prefill) < 1.3 * sum(map(len, prompts)), "sorted: little padding"
    needed = sum(sum(token >= 0 for token in tokens) - 1 for _, tokens, _ in written)  # the last is not read
    assert needed <= sum(rows for rows, _, _ in steps) <= needed / generate.DROP_BELOW


def test_the_same_seed_gives_the_same_bytes_and_torch_keeps_its_state(reasoner, prompter, prompts):
    settings = {"samples": 4, "max_new_tokens": 8, "progress": False}
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    once = generate.sample(reasoner, prompter, prompts, seed=11, **settings)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    np.random.seed(1)
    pd.testing.assert_frame_equal(
        once, generate.sample(reasoner, prompter, prompts, seed=11, **settings), check_exact=True
    )
    assert not once.equals(generate.sample(reasoner, prompter, prompts, seed=12, **settings))


@pytest.mark.parametrize(("device", "tokens"), [("cpu", 16_384), ("cuda:1", 131_072), ("mps", 16_384)])
def test_a_card_writes_more_at_once_than_a_cpu(reasoner, prompter, device, tokens, monkeypatch):
    budgets = []
    monkeypatch.setattr(Reasoner, "device", torch.device(device))
    monkeypatch.setattr(generate, "by_length", lambda *given: budgets.append(given[-1]) or iter(()))
    generate.greedy(reasoner, prompter, [], progress=False)
    generate.sample(reasoner, prompter, [], samples=2, seed=0, progress=False)
    generate.sample(reasoner, prompter, [], samples=2, seed=0, tokens_per_batch=7, progress=False)
    assert budgets == [tokens, tokens, 7]


def test_draws_do_not_depend_on_batches_or_on_the_prompts_beside(reasoner, prompter, prompts):
    settings = {"samples": 4, "max_new_tokens": 8, "seed": 0, "progress": False}
    whole = generate.sample(reasoner, prompter, prompts, **settings)
    small = generate.sample(reasoner, prompter, prompts, tokens_per_batch=1, **settings)
    pd.testing.assert_frame_equal(whole, small, rtol=1e-4)
    first = generate.sample(reasoner, prompter, prompts[:7], **settings)
    pd.testing.assert_frame_equal(whole[whole.row < 7], first, rtol=1e-4)


def test_a_batch_that_the_device_has_no_memory_for_is_halved(reasoner, prompter, prompts, monkeypatch, caplog):
    settings = {"samples": 4, "max_new_tokens": 8, "seed": 0, "progress": False}
    whole, forward = generate.sample(reasoner, prompter, prompts, **settings), reasoner.model.forward

    def small(*args, input_ids, **rest):
        if len(input_ids) > 9:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(*args, input_ids=input_ids, **rest)

    monkeypatch.setattr(reasoner.model, "forward", small)
    halved = generate.sample(reasoner, prompter, prompts, **settings)
    pd.testing.assert_frame_equal(whole, halved, rtol=1e-4)
    assert "queries: out of memory with" in caplog.text


def test_equal_queries_of_a_prompt_are_one_row(reasoner, prompter, prompts):
    drawn = generate.sample(reasoner, prompter, prompts, samples=30, max_new_tokens=2, seed=0, progress=False)
    assert not drawn.duplicated(["row", "query"]).any()
    assert drawn["count"].max() > 1
    assert drawn.groupby("row")["count"].sum().eq(30).all()
    assert drawn.groupby("row").candidate.apply(list).map(lambda c: c == list(range(len(c)))).all()
    assert drawn.row.is_monotonic_increasing


def test_a_query_that_says_nothing_stays_empty(reasoner, prompter, prompts, monkeypatch):
    monkeypatch.setattr(generate, "_invert", lambda probability, *_: torch.full((len(probability),), prompter.end_id))
    drawn = generate.sample(reasoner, prompter, prompts[:2], samples=3, seed=0, progress=False)
    assert drawn["query"].tolist() == ["", ""]
    assert drawn[["tokens", "count"]].to_numpy().tolist() == [[1, 3], [1, 3]]
    expected = [full_forward(reasoner, prompt, [prompter.end_id]) for prompt in prompts[:2]]
    np.testing.assert_allclose(drawn.log_probability, expected, atol=1e-4)


def test_a_draw_at_the_edge_never_takes_an_impossible_token():
    probability = torch.tensor([[0.0, 0.7, 0.3, 0.0]])
    largest = torch.tensor([np.nextafter(np.float32(1), np.float32(0))])
    assert generate._invert(probability, torch.zeros(1), 1.0).item() == 1
    assert generate._invert(probability, largest, 1.0).item() == 2
    assert generate._invert(probability, largest, 0.5).item() == 1
    assert generate._invert(probability, largest, 1e-9).item() == 1


def test_no_prompts_are_no_queries(reasoner, prompter):
    drawn = generate.sample(reasoner, prompter, [], samples=2, seed=0, progress=False)
    assert list(drawn) == COLUMNS
    assert len(drawn) == 0


def test_an_encoder_cannot_write(reasoner, prompter, prompts):
    encoder = replace(reasoner, kind="encoder", name="MiniLM")
    for write in (generate.greedy, lambda *args: generate.sample(*args, samples=1, seed=0)):
        with pytest.raises(ReasonerError, match="MiniLM is an encoder: it embeds, it cannot write queries"):
            write(encoder, prompter, prompts)


def test_a_part_of_the_prompts_has_the_numbers_that_it_has_among_all():
    whole = generate._uniform(3, range(10), 2, 5)
    assert (generate._uniform(3, range(4, 10), 2, 5) == whole[8:]).all()
