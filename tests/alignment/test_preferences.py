"""Best of N and pairs against pandas and plain loops; other parts are refused; TRL reads the table as it is."""

import copy

import datasets
import numpy as np
import pandas as pd
import pytest
import small_rewards as shop
from hypothesis import given
from hypothesis import strategies as st
from small_pairs import TOKENIZER, reasoner
from tokenizers import processors
from trl import DPOConfig, DPOTrainer

from rgalign.alignment.dpo import to_pairs
from rgalign.alignment.preferences import COLUMNS, best_of_n, pairs, prompt_text
from rgalign.reasoner.prompts import Prompter
from rgalign.reasoner.trainer import CHECKPOINTING
from rgalign.run.artifacts import write_table

TRAIN = shop.lists("train", 12)
KINDS = {"asked": "text", "state": "categorical"}
PROMPTER = Prompter(TOKENIZER, features=list(KINDS), kinds=KINDS, max_tokens=12)
SESSIONS = pd.DataFrame(
    {"session_id": TRAIN.session_id, "asked": [f"w{i} w{i + 3} , new" for i in range(12)], "state": "w1"}
)
PROMPTS = dict(zip(TRAIN.session_id.tolist(), PROMPTER.sessions(SESSIONS), strict=True))
EVERY = dict(train=TRAIN, margin_quantile=0.0)


def scored(rows: list[tuple]) -> pd.DataFrame:
    """(session, source, query, reward) -> what the reward model would return."""
    table = pd.DataFrame(rows, columns=["session_id", "source", "query", "reward"])
    return table.assign(candidate=0, log_probability=-1.0, tokens=2, count=1 + np.arange(len(table)) % 3)


@st.composite
def candidates(draw) -> pd.DataFrame:
    """Few queries and rewards, so that equal, empty and tied ones come about; NaN is a session without a click."""
    rows = []
    for session in draw(st.lists(st.sampled_from(TRAIN.session_id.tolist()), min_size=1, max_size=5, unique=True)):
        clicked = draw(st.booleans()) or draw(st.booleans())
        queries = draw(st.lists(st.sampled_from(["", " ", "w1", "W1 ", "w2", "w1 w2", "w3 w4", "w5"]), max_size=7))
        rewards = {query.lower().strip(): draw(st.sampled_from([-1.0, 0.0, 0.3, 0.5, 2.0])) for query in queries}
        for query in queries:
            reward = rewards[query.lower().strip()] if clicked and query.strip() else np.nan
            rows.append((session, draw(st.sampled_from(["main", "other"])), query, reward))
    return scored(rows)


MIXED = scored(
    [
        ("train3", "main", "w1", 0.5), ("train3", "other", "w1", 0.5), ("train3", "other", "w2", -1.0),
        ("train3", "main", "", np.nan), ("train3", "main", "w3", 0.2), ("train0", "main", "w4", 0.1),
        ("train0", "main", "w5", 0.1), ("train11", "main", "w6", np.nan), ("train7", "main", "w7", 3.0),
    ]
)  # fmt: skip


# --- best of N


def test_best_of_n_by_hand():
    best = best_of_n(MIXED, train=TRAIN, seed=0)
    assert best[["session_id", "query", "source"]].to_numpy().tolist() == [
        ["train3", "w1", "main"], ["train0", "w4", "main"], ["train7", "w7", "main"]
    ]  # fmt: skip
    assert best_of_n(MIXED, train=TRAIN, min_reward=0.2, seed=0)["session_id"].tolist() == ["train3", "train7"]
    assert len(best_of_n(MIXED, train=TRAIN, min_reward=9, seed=0)) == 0


@given(candidates())
def test_best_of_n_is_the_first_of_the_highest(table):
    expected = [
        max(own.to_dict("records"), key=lambda row: row["reward"])
        for _, own in table[table["reward"].notna()].groupby("session_id", sort=False)
    ]
    assert best_of_n(table, train=TRAIN, seed=0).to_dict("records") == expected


def test_the_control_draws_what_was_written_often_more_often():
    many = shop.lists("train", 4000)
    own = MIXED[(MIXED["session_id"] == "train3") & (MIXED["query"] != "")]
    table = pd.concat([own] * 4000).assign(session_id=np.repeat(many.session_id, len(own)))
    drawn = best_of_n(table, train=many, select="random", seed=0)
    assert drawn["session_id"].tolist() == many.session_id.tolist()
    often = drawn.groupby(["query", "source"]).size() / 4000
    expected = own.set_index(["query", "source"])["count"] / own["count"].sum()
    np.testing.assert_allclose(often.sort_index(), expected.sort_index(), atol=0.03)
    assert drawn.equals(best_of_n(table, train=many, select="random", seed=0))
    assert not drawn.equals(best_of_n(table, train=many, select="random", seed=1))
    kept = [best_of_n(MIXED, train=TRAIN, select=how, min_reward=0.2, seed=0) for how in ("best", "random")]
    assert kept[0]["session_id"].tolist() == kept[1]["session_id"].tolist()


@pytest.mark.parametrize("part", ["dev", "valid", "test"])
def test_sessions_of_other_parts_never_enter(part):
    other = shop.lists(part, 12)
    table = MIXED.assign(session_id=MIXED["session_id"].str.replace("train", part))
    prompts = {session: [2] for session in table["session_id"]}
    for lists, message in ((other, f"holds lists of part '{part}'"), (TRAIN, "4 sessions are not of part train")):
        with pytest.raises(ValueError, match=f"best_of_n refuses: .*{message}"):
            best_of_n(table, train=lists, seed=0)
        with pytest.raises(ValueError, match=f"pairs refuses: .*{message}"):
            pairs(table, prompts, PROMPTER, train=lists)


# --- pairs


def test_pairs_by_hand():
    found, counts = pairs(MIXED, PROMPTS, PROMPTER, **EVERY)
    assert list(found) == COLUMNS
    (row,) = found.to_dict("records")
    assert row == {
        "prompt": "<|unk|> w3 w6 <|unk|> <|unk|> <|unk|> <|ask|>",
        "chosen": "w1", "rejected": "w2", "reward_chosen": 0.5, "reward_rejected": -1.0, "source_chosen": "main",
        "source_rejected": "other", "session_id": "train3",
    }  # fmt: skip
    assert counts.to_numpy().tolist() == [
        ["written", "queries", 9], ["not empty", "queries", 8], ["session has a click", "queries", 7],
        ["different in its session", "queries", 6], ["best against worst", "pairs", 2],
        ["margin over 0", "pairs", 1], ["margin from quantile 0", "pairs", 1],
    ]  # fmt: skip


def test_of_queries_that_are_cut_to_the_same_tokens_the_best_rewarded_counts():
    short = Prompter(TOKENIZER, features=list(KINDS), kinds=KINDS, max_tokens=12, max_new_tokens=3)
    rows = [("w1 w2 w3", 0.1), ("w1 w2 w4", 0.9), ("w1 w2 w5", 0.4), ("w6", -1.0)]
    table = scored([("train3", "main", query, reward) for query, reward in rows])
    found, counts = pairs(table, PROMPTS, short, **EVERY)
    assert found[["chosen", "rejected"]].to_numpy().tolist() == [["w1 w2 w4", "w6"]]
    assert counts.set_index("filter")["left"]["different in its session"] == 2


@given(candidates(), st.floats(0, 2), st.floats(0, 1))
def test_every_pair_keeps_the_rules(table, margin, wider):
    found, counts = pairs(table, PROMPTS, PROMPTER, train=TRAIN, min_margin=margin, margin_quantile=wider)
    assert ((found["reward_chosen"] - found["reward_rejected"]) > margin).all()
    assert (found["chosen"].str.lower().str.strip() != found["rejected"].str.lower().str.strip()).all()
    assert (found[["chosen", "rejected"]].map(str.strip) != "").all(axis=None)
    assert not found.duplicated("session_id").any()
    assert counts["left"].iloc[-1] == len(found)
    assert (counts.groupby("of")["left"].diff().dropna() <= 0).all()
    best = table.groupby("session_id")["reward"].max()
    assert (found["reward_chosen"].to_numpy() == best[found["session_id"]].to_numpy()).all()
    if len(found):
        to_pairs(found, PROMPTS, PROMPTER)


@given(st.integers(2, 12), st.integers(0, 99))
def test_the_best_is_against_the_worst(number, seed):
    reward = np.random.default_rng(seed).permutation(number) * 0.1
    table = scored([("train1", "main", " ".join(["w1"] * (i + 1)), r) for i, r in enumerate(reward)])
    long = Prompter(TOKENIZER, features=[], kinds={}, max_tokens=20)
    found, _ = pairs(table, PROMPTS, long, **EVERY)
    assert found[["reward_chosen", "reward_rejected"]].to_numpy().tolist() == [[reward.max(), reward.min()]]


def test_the_wider_margins_stay():
    table = scored([(f"train{i}", "main", f"w{j}", i * j / 10) for i in range(1, 11) for j in (0, 1)])
    found, counts = pairs(table, PROMPTS, PROMPTER, train=TRAIN, margin_quantile=0.5)
    assert found["session_id"].tolist() == [f"train{i}" for i in range(6, 11)]
    assert counts["left"].tolist()[-3:] == [10, 10, 5]


def test_sessions_without_a_prompt_are_refused():
    with pytest.raises(ValueError, match=r"no pairs can be made: 3 sessions have no prompt \(first: 'train0'\)"):
        pairs(MIXED, {"train3": [2]}, PROMPTER, train=TRAIN)


# --- for TRL and for our own DPO


def pairs_of_all() -> pd.DataFrame:
    table = scored([(s, "main", f"w{i} w{j}", 1.0 * j) for i, s in enumerate(PROMPTS) for j in range(3)])
    return pairs(table, PROMPTS, PROMPTER, **EVERY)[0]


def test_trl_reads_the_table_as_it_is_and_sees_our_tokens(tmp_path):
    found = pairs_of_all()
    write_table(tmp_path / "pairs.parquet", found)
    write_table(tmp_path / "again.parquet", pairs_of_all())
    assert (tmp_path / "pairs.parquet").read_bytes() == (tmp_path / "again.parquet").read_bytes()
    read = datasets.Dataset.from_parquet(str(tmp_path / "pairs.parquet"), cache_dir=str(tmp_path / "cache"))
    arguments = DPOConfig(
        output_dir=str(tmp_path / "trl"), max_steps=1, per_device_train_batch_size=4, bf16=False, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True, **{CHECKPOINTING: False},
    )  # fmt: skip
    model = reasoner().model
    trainer = DPOTrainer(
        copy.deepcopy(model), model, arguments, train_dataset=read, processing_class=copy.deepcopy(TOKENIZER)
    )
    trainer.train()
    ours = to_pairs(found, PROMPTS, PROMPTER)
    for name, tokens in {"prompt": ours.prompts, "chosen": ours.chosen, "rejected": ours.rejected}.items():
        assert trainer.train_dataset[f"{name}_ids"] == [list(ids) for ids in tokens]


def test_pairs_read_back_are_the_same_for_our_dpo(tmp_path):
    found = pairs_of_all()
    write_table(tmp_path / "pairs.parquet", found)
    ours = to_pairs(found, PROMPTS, PROMPTER)
    assert to_pairs(pd.read_parquet(tmp_path / "pairs.parquet"), PROMPTS, PROMPTER).digest() == ours.digest()
    assert ours.prompts == list(PROMPTS.values())
    assert ours.chosen[1] == [*TOKENIZER.convert_tokens_to_ids(["w1", "w2"]), TOKENIZER.eos_token_id]
    assert ours.reward_chosen.tolist() == [2.0] * 12


def test_a_prompts_text_gives_its_ids_again_with_one_begin_token():
    for ids in PROMPTS.values():
        assert TOKENIZER(prompt_text(PROMPTER, ids))["input_ids"] == ids
    begun = copy.deepcopy(TOKENIZER)
    begun.add_special_tokens({"bos_token": "<|begin|>"})
    begin = begun.bos_token_id
    begun.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]
    )
    prompter = Prompter(begun, features=list(KINDS), kinds=KINDS)
    ids = prompter.sessions(SESSIONS)[0]
    assert ids[0] == begin
    assert begun(prompt_text(prompter, ids))["input_ids"] == ids
