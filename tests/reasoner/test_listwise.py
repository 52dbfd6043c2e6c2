"""The language model as ranker: against transformers alone, one text at a time."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import small_models
import torch
from scipy import stats
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from rgalign.reasoner import listwise
from rgalign.reasoner.model import ReasonerError, load
from rgalign.reasoner.prompts import Prompter

PROMPTS = [[3, 4, 5, 6, 7], [8, 9], [10]]
TITLES = [[11, 12, 2], [13, 2], [11, 14, 15, 2], [16, 2], [2]]
CANDIDATES = np.array([[0, 2, -1], [4, 3, 1], [1, -1, -1]])


def one_by_one(model, prompt, title) -> float:
    """Token by token: each by a run of its own, without padding or cache."""
    total = 0.0
    with torch.no_grad():
        for place, token in enumerate(title):
            logits = model(torch.tensor([prompt + title[:place]])).logits[0, -1].double()
            total += float(logits[token] - logits.logsumexp(0))
    return total


@pytest.fixture
def reasoner(folder):
    return load(str(folder))


def test_likelihood_is_the_sum_over_tokens_one_by_one(reasoner):
    found = listwise.log_likelihood(reasoner, PROMPTS, TITLES, progress=False)
    expected = [[one_by_one(reasoner.model, prompt, title) for title in TITLES] for prompt in PROMPTS]
    assert found == pytest.approx(np.array(expected), abs=1e-4)


def test_small_chunks_and_a_shown_list_give_the_same(reasoner, monkeypatch):
    whole = listwise.log_likelihood(reasoner, PROMPTS, TITLES, progress=False)
    monkeypatch.setitem(listwise.TOKENS_PER_BATCH, "cpu", 10)  # one or two titles at once
    assert listwise.log_likelihood(reasoner, PROMPTS, TITLES, progress=False) == pytest.approx(whole, abs=1e-5)
    shown = listwise.log_likelihood(reasoner, PROMPTS, TITLES, CANDIDATES, progress=False)
    asked = np.array([[1, 0, 1, 0, 0], [0, 1, 0, 1, 1], [0, 1, 0, 0, 0]], bool)
    assert shown[asked] == pytest.approx(whole[asked], abs=1e-5)
    assert (shown[~asked] == -np.inf).all()


def test_likelihood_runs_each_prompt_once(reasoner, monkeypatch):
    monkeypatch.setitem(listwise.TOKENS_PER_BATCH, "cpu", 10)
    seen, run = [], reasoner.model.forward
    monkeypatch.setattr(
        reasoner.model, "forward", lambda **more: (seen.append(more["input_ids"].tolist()), run(**more))[1]
    )
    listwise.log_likelihood(reasoner, PROMPTS[:1], TITLES, progress=False)
    first, *others = seen
    assert first == [[3, 4, 5, 6]], "all but the last token, which each title begins from"
    assert len(others) > 1
    assert all(row[0] == 7 for batch in others for row in batch)


def test_scores_follow_their_titles_when_the_kb_is_in_another_order(reasoner):
    order = [3, 0, 4, 2, 1]
    plain = listwise.log_likelihood(reasoner, PROMPTS, TITLES, progress=False)
    other = listwise.log_likelihood(reasoner, PROMPTS, [TITLES[i] for i in order], progress=False)
    assert other == pytest.approx(plain[:, order], abs=1e-5)


def test_forms_by_hand():
    log_p, without = np.array([[-2.0, -6.0]], np.float32), np.array([-1.0, -9.0], np.float32)
    titles = [[5, 2], [5, 6, 7, 2]]
    assert listwise.scores_of("likelihood", log_p, titles, without).tolist() == [[-2, -6]]
    assert listwise.scores_of("per_token", log_p, titles, without).tolist() == [[-1, -1.5]]
    assert listwise.scores_of("pmi", log_p, titles, without).tolist() == [[-1, 3]], (
        "a rare title that the session made likelier"
    )
    with pytest.raises(ValueError, match=r"form is 'pmii'; expected likelihood \| per_token \| pmi"):
        listwise.scores_of("pmii", log_p, titles, without)


def test_an_encoder_is_refused(reasoner):
    encoder = replace(reasoner, kind="encoder")
    with pytest.raises(ReasonerError, match="is an encoder: it gives no title a probability"):
        listwise.log_likelihood(encoder, PROMPTS, TITLES)


# setwise: a tokenizer of single characters, so that every label is a token and every text can be written by hand


def characters() -> PreTrainedTokenizerFast:
    known = ["<|pad|>", "<|unk|>", "<|end|>", *"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz[].,:\n "]
    each = Tokenizer(models.WordLevel({token: i for i, token in enumerate(known)}, unk_token="<|unk|>"))
    each.pre_tokenizer, each.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=each, unk_token="<|unk|>", pad_token="<|pad|>", eos_token="<|end|>")


@pytest.fixture
def chooser(tmp_path):
    words = characters()
    reasoner = load(str(small_models.qwen3(tmp_path / "letters", words=words, vocab_size=len(words))))
    how = {"features": ["saw"], "kinds": {"saw": "text"}, "layout": "lines", "instruction": listwise.CHOOSE}
    return reasoner, Prompter(reasoner.tokenizer, **how)


NAMES = ["late parcel", "lost refund", "wrong card", "a gift"]


def test_setwise_is_the_labels_logit_behind_the_written_list(chooser):
    reasoner, prompter = chooser
    prompts = prompter.sessions(pd.DataFrame({"saw": ["no box came", "card declined"]}))
    titles = [title[:-1] for title in prompter.queries(NAMES)]
    candidates = np.array([[3, 0, 2], [1, 2, -1]])
    answers = listwise.setwise(reasoner, prompter, prompts, titles, candidates, orders=2, seed=0, progress=False)
    assert answers.titles.shape == (2, 2, 3)
    for row, session in enumerate(prompts):
        for order in range(2):
            listed = [i for i in answers.titles[row, order] if i >= 0]
            assert sorted(listed) == sorted(i for i in candidates[row] if i >= 0)
            before = reasoner.tokenizer.decode(session[: -len(prompter.tail)])
            lines = "".join(f"\n[{label}] {NAMES[i]}" for label, i in zip("ABC", listed, strict=False))
            text = before + lines + listwise.ANSWER + reasoner.tokenizer.decode(prompter.tail) + "["
            ids = reasoner.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logits = reasoner.model(ids).logits[0, -1]
            expected = [
                float(logits[reasoner.tokenizer.convert_tokens_to_ids(label)]) for label in "ABC"[: len(listed)]
            ]
            assert answers.logits[row, order, : len(listed)] == pytest.approx(np.array(expected), abs=1e-4)


def test_setwise_turns_each_list_so_that_every_title_stands_in_each_third(chooser):
    reasoner, prompter = chooser
    titles = [title[:-1] for title in prompter.queries([*NAMES, "b", "c"])]
    prompts = prompter.sessions(pd.DataFrame({"saw": ["no box came"]}))
    answers = listwise.setwise(reasoner, prompter, prompts, titles, np.arange(6)[None], seed=1, progress=False)
    third = np.argsort(answers.titles[0], axis=1) // 2  # (orders, titles)
    assert (np.sort(third, axis=0) == [[0] * 6, [1] * 6, [2] * 6]).all()


def test_setwise_scores_are_means_over_the_orders_and_may_leave_out_what_a_place_earns():
    titles = np.array([[[0, 1, 2], [2, 0, 1]], [[1, 2, -1], [2, 1, -1]]])
    logits = np.array([[[3, 1, 0], [5, 2, 1]], [[4, 1, 0], [4, 3, 0]]], np.float32)
    answers = listwise.Answers(titles, logits)
    assert answers.scores(4).tolist() == [[2.5, 1, 2.5, -np.inf], [-np.inf, 3.5, 2.5, -np.inf]]
    place = np.array([(3 + 5 + 4 + 4) / 4, (1 + 2 + 1 + 3) / 4, (0 + 1) / 2])
    expected = [(3 - place[0] + 2 - place[1]) / 2, (1 - place[1] + 1 - place[2]) / 2, (0 - place[2] + 5 - place[0]) / 2]
    assert answers.scores(4, calibrated=True)[0, :3] == pytest.approx(np.array(expected))
    copied = answers.copied()
    assert copied["first"].tolist() == [True, True, True, True]
    assert copied["kendall"].tolist() == pytest.approx(
        [stats.kendalltau(own, [3, 2, 1][: len(own)]).statistic for own in ([3, 1, 0], [5, 2, 1], [4, 1], [4, 3])]
    )
    prefers_places = listwise.Answers(titles, np.where(titles >= 0, [9.0, 5.0, 2.0], 0).astype(np.float32))
    assert (prefers_places.copied()["kendall"] == 1).all()
    finite = prefers_places.scores(4, calibrated=True)
    assert finite[np.isfinite(finite)] == pytest.approx(0, abs=1e-6), "nothing is left but ties"


def test_setwise_refuses_what_it_cannot_label_or_read(chooser, reasoner):
    own, prompter = chooser
    prompts = prompter.sessions(pd.DataFrame({"saw": ["x"]}))
    many = np.arange(27)[None]
    with pytest.raises(ValueError, match="a list has 27 titles; setwise can label 26"):
        listwise.setwise(own, prompter, prompts, [[5]] * 27, many, seed=0)
    with pytest.raises(ValueError, match="no single token for each of ABC"):
        listwise.setwise(reasoner, prompter, prompts, [[5]] * 3, np.arange(3)[None], seed=0)
    short = GPT2LMHeadModel(GPT2Config(vocab_size=len(own.tokenizer), n_positions=64, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(ValueError, match=r"session and titles take \d+ tokens; short can read 64"):
        listwise.setwise(replace(own, name="short", model=short), prompter, prompts, [[5]] * 3, many[:, :3], seed=0)
